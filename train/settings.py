"""How settings are read, split between ours and transformers.TrainingArguments, and shown."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curate.errors import InputError
from curate.settings import Section, checked, override, read_yaml
from train.config import AnswersConfig, RunConfig

OWN = ("output_dir", "remove_unused_columns", "train_sampling_strategy", "average_tokens_across_devices",
       "label_names", "resume_from_checkpoint", "ignore_data_skip", "dataloader_drop_last",
       "group_by_length")  # fmt: skip
"""Keys of TrainingArguments that this trainer sets itself."""

UNUSED = {
    "label_smoothing_factor": "the loss is the method's",
    "data_seed": "`seed` decides the order",
    "auto_find_batch_size": "the rows of every step are planned before the first one",
    "n_gpu": "start one process a GPU: torchrun or accelerate launch",
}
"""Keys that would change nothing, or break the plan of the run; why."""


def load(
    model: type[RunConfig], path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, Any]]:
    """(our settings, keys for TrainingArguments) of a YAML file and `key=value` words.

    Raises:
        InputError: a key that neither we nor TrainingArguments know, or a value that does not fit.
    """
    data = read_yaml(path) if path is not None else {}
    for word in overrides:
        override(data, word)
    if path is None:
        return parse(model, data, ".", "command line")
    return parse(model, data, str(Path(path).parent), str(path))


def parse(model: type[RunConfig], data: Mapping[str, Any], base: str, where: str) -> tuple[RunConfig, dict[str, Any]]:
    """(our settings, keys for TrainingArguments) of a mapping; paths in it are relative to `base`.

    Raises:
        InputError: a key that neither we nor TrainingArguments know, or a value that does not fit.
    """
    ours, theirs = _split(model, data)
    return checked(model, {**ours, "base": base}, where), theirs


def _split(model: type[RunConfig], data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from transformers import TrainingArguments

    fields = {f.name: str(f.type) for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in OWN}
    if wrong := next((key for key in data if key in OWN), None):
        raise InputError(f"{wrong}: this trainer sets it itself", remedy="leave it out; see `train cft --help`")
    if wrong := next((key for key in data if key in UNUSED and key not in model.model_fields), None):
        raise InputError(f"{wrong}: not for this trainer: {UNUSED[wrong]}", remedy="leave it out")
    if wrong := next((key for key in data if key not in fields and key not in model.model_fields), None):
        if wrong in ALIASES:
            raise InputError(f"unknown key {wrong!r}", remedy=f"its name here is {ALIASES[wrong]}")
        others = [m.__name__.removesuffix("Config").lower() for m in _methods(RunConfig) if wrong in m.model_fields]
        if others:
            raise InputError(f"{wrong}: not for this command", remedy=f"it belongs to train {' and '.join(others)}")
        near = difflib.get_close_matches(wrong, [*model.model_fields, *fields], 1)
        raise InputError(f"unknown key {wrong!r}{f'; did you mean {near[0]!r}?' if near else ''}",
                         remedy="see `train settings METHOD` and transformers.TrainingArguments")  # fmt: skip
    theirs = {key: _meant(key, value, fields[key]) for key, value in data.items()
              if key in fields and key not in model.model_fields}  # fmt: skip
    return {key: value for key, value in data.items() if key not in theirs}, theirs


ALIASES = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
           "lambda": "initial (λ at the start; COPR)", "steps": "max_steps"}  # fmt: skip


def _methods(model: type[RunConfig]) -> list[type[RunConfig]]:
    """The settings of all methods, those that are no method themselves left out."""
    found = [m for sub in model.__subclasses__() for m in _methods(sub)]
    return found if model in (RunConfig, AnswersConfig) else [model, *found]


RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 1e6), "per_device_eval_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6), "num_train_epochs": (1e-9, 1e5), "max_steps": (-1, 1e9),
    "learning_rate": (0, 1e30), "weight_decay": (0, 1e30), "max_grad_norm": (0, 1e30), "seed": (0, 2**32 - 1),
    "save_total_limit": (1, 1e9), "save_steps": (1e-9, 1e9), "logging_steps": (1e-9, 1e9), "eval_steps": (1e-9, 1e9),
    "adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (0, 1), "warmup_steps": (0, 1e9),
    "dataloader_num_workers": (0, 1e4),
}  # fmt: skip
"""Least and most of some keys of TrainingArguments, which does not look."""


def _meant(key: str, value: Any, kind: str) -> Any:
    """A value as TrainingArguments wants it: YAML reads 1e-5 as a text and `no` as false.

    Raises:
        InputError: of another type, not finite, or out of range.
    """
    if value is False and key.endswith("_strategy"):
        return "no"
    plain = kind.replace("<class '", "").replace("'>", "")
    types = {part.strip() for part in plain.split("|")}
    if value is None and ("None" in types or types - {"int", "float", "bool"}):
        return None
    if types <= {"int", "float", "None"}:
        try:
            number = float(value) if isinstance(value, str) else value
            finite = isinstance(number, int | float) and math.isfinite(number)
        except (ValueError, OverflowError):
            finite = False
        if not finite or isinstance(number, bool):
            raise InputError(f"{key}: {value!r} is no number", remedy=f"{key} takes {' or '.join(sorted(types))}")
        if "float" not in types and number != int(number):
            raise InputError(f"{key}: {value!r} is no whole number")
        low, high = RANGES.get(key, (-math.inf, math.inf))
        if not low <= number <= high:
            raise InputError(f"{key}: {value!r} is not between {low:g} and {high:g}")
        return number if "float" in types else int(number)
    if types == {"bool"} and not isinstance(value, bool):
        raise InputError(f"{key}: {value!r} is neither true nor false")
    return value


def described(command: str) -> list[tuple[str, str, str]]:
    """(key, default, what it means) of a command's own settings, those of sections by their dotted names.

    Raises:
        KeyError: no such command.
    """
    from train.evaluate import EvalConfig
    from train.fisher import FisherConfig
    from train.stream.config import StreamConfig

    known: dict[str, type[Section]] = {m.__name__.removesuffix("Config").lower(): m for m in _methods(RunConfig)}
    known |= {"eval": EvalConfig, "fisher": FisherConfig, "stream": StreamConfig}
    if command not in known:
        raise KeyError(f"there are {', '.join(known)}")
    return _described(known[command], "")


def _described(model: type[Section], before: str) -> list[tuple[str, str, str]]:
    found = []
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        default = field.get_default(call_default_factory=True)
        shown = (
            "…"
            if field.is_required()
            else "(off)"
            if section and default is None
            else ""
            if section
            else _shown(default)
        )
        found.append((before + name, shown, field.description or ""))
        if section is not None:
            found += _described(section, f"{before}{name}.")
    return found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
