"""The commands of a stage and their settings: a build, a training, an estimate, the scores.

All paths in a stage's files are relative to its folder.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.config import BuildConfig
from curate.errors import InputError
from curate.manifest.io import sha256_file
from curate.manifest.schema import content_hash
from curate.models.function import open_function
from curate.models.weights import model_folder, stack, weights_hash
from curate.settings import FUNCTION, checked
from train.evaluate import EvalConfig
from train.facts import HOUSEKEEPING
from train.fisher import FisherConfig
from train.run import CONFIGS
from train.settings import parse
from train.stream.config import StreamConfig

CACHE = "cache"
PATHS = ("model", "path", "reference", "overrides", "tokenizer", "head", "eval_data", "fsdp_config", "deepspeed")
"""Keys of a build and of training that may hold a path."""
WORDS = ("manifest", "measure")  # what `reference` may be instead
ASKS_POLICY = ("highest_loss", "perplexity_ratio")


@dataclass(frozen=True)
class Step:
    """A command of a stage, and the settings that its file holds."""

    command: str  # build, a method of training, fisher, eval
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """build, train, fisher or eval."""
        return self.command if self.command in ("build", "fisher", "eval") else "train"

    @property
    def by_hand(self) -> str:
        """The command line that does it, in the stage's folder."""
        program = "curate build" if self.command == "build" else f"train {self.command} --config"
        return f"{program} {self.kind}.yaml"

    @property
    def leaves(self) -> str:
        """What is in the stage's folder when it is done."""
        last = {"build": "provenance.json", "train": "model", "fisher": "fisher.json", "eval": "metrics.json"}
        return f"{self.settings['out']}/{last[self.kind]}"


class Steps:
    """A stream's commands, whose settings are those that the files of its stages hold.

    Args:
        config: of the stream.
        here: a folder as deep as every stage's.
        sources: task → hash of its files.

    Attributes:
        model: path of the first model, in a stage's file.
        weights: hash of its weights.

    Raises:
        InputError: the model cannot be used.
    """

    def __init__(self, config: StreamConfig, here: Path, sources: Mapping[str, str]) -> None:
        self.config, self.base, self.here = config, Path(config.base), here
        self.inputs: dict[str, str] = {}  # text in a stage's settings → hash of what it names
        folder, _ = model_folder(str(config.path(config.model)), self.base, "model")
        for below in stack(folder.absolute(), "model")[:-1]:
            if not below.is_absolute():
                raise InputError(
                    f"model {config.model!r}: an adapter whose base {str(below)!r} is found from the working "
                    "directory alone",
                    remedy="merge it, or give its adapter_config.json the base's whole path as base_model_name_or_path",
                )
        self.weights = weights_hash(folder)
        self.model = self._path(config.model, self.weights)
        self.tasks = {
            task.name: {**task.model_dump(exclude_defaults=True), "path": self._path(task.path, sources[task.name])}
            for task in config.tasks
        }

    def build(self, tasks: Sequence[str], replay: Mapping[str, Any], sections: Mapping[str, Any], seed: int,
              split: str | None = None) -> Step:  # fmt: skip
        """The manifest of the last of some tasks, with what comes back of the others."""
        rows = [{**self.tasks[name], **({} if split is None else {"split": split})} for name in tasks]
        replay = replay if len(tasks) > 1 else {"selector": "none"}
        return Step("build", {"name": self.config.name, **sections, "tasks": rows, "replay": dict(replay), "seed": seed,
                              "out": "manifest", "cache": f"../../{CACHE}"})  # fmt: skip

    def sections(self, build: Mapping[str, Any], replay: Mapping[str, Any], ahead: str, older: str) -> dict[str, Any]:
        """Of a build, with the checkpoint `ahead` as policy wherever one is asked or given settings.

        The reference of a perplexity ratio is the checkpoint before the newest stage: what that stage made it lose.
        """
        found = copy.deepcopy(self._relative(build))
        tags = found.get("tags") or {}
        by_llm = tags.get("tagger") == "llm" and not tags.get("model")
        asked = by_llm or replay["selector"] in ASKS_POLICY or any(found.get(k) for k in ("rollouts", "augment"))
        if asked or "policy" in found:
            found["policy"] = {**(found.get("policy") or {}), "model": ahead}
        if replay["selector"] == "perplexity_ratio":
            found.setdefault("reference", {**found["policy"], "model": older})
        return found

    def train(self, how: Any, data: list[str], seed: int, ahead: str, before: Sequence[str] = (), replays: bool = False,
              times: int = 1) -> Step:  # fmt: skip
        """A training, with what older stages hand on.

        Args:
            how: method and its settings.
            data: manifests.
            seed: of the run.
            ahead: model that it goes on from.
            before: folders of the older stages.
            replays: whether rows of older tasks are in the data.
            times: so often are the steps that the user allows a stage.
        """
        train = copy.deepcopy(self._relative(how.train))
        buffers = how.method == "copr" and train.get("constraint") != "none" and train.get("keep") != 0
        if not before or not (buffers if how.method == "copr" else replays):
            train.pop("mixture", None)  # nothing comes back
        for key in ("ewc", "o_lora"):
            if train.get(key) is None or not before:
                train.pop(key, None)
        if "ewc" in train:
            there = self.fisher(how, seed).settings["out"]
            train["ewc"] = {**train["ewc"], "fisher": [f"../{folder}/{there}" for folder in before]}
        if "o_lora" in train:  # the newest adapter holds the older ones too, beside the first model
            train["o_lora"] = {**train["o_lora"], "previous": [f"../{before[-1]}/train/model"]}
            ahead = self.model
        if before and buffers:
            train["buffers"] = [f"../{folder}/train/buffer" for folder in before]
        advantages = train.get("advantages", {"cppo": "gae", "grpo": "group"}.get(how.method))
        if before and advantages == "gae":
            value = {**(train.get("value") or {}), "head": f"../{before[-1]}/train/value.safetensors"}
            if value.get("model"):
                value["model"] = f"../{before[-1]}/train/value"
            train["value"] = value
        with suppress(TypeError, ValueError):  # what is no number is refused with the other settings
            if times > 1 and (most := int(train.get("max_steps", -1))) > 0:
                train["max_steps"] = most * times
        return Step(how.method, {**train, "model": ahead, "out": "train", "seed": seed, "data": data})

    def fisher(self, how: Any, seed: int) -> Step:
        """A stage's Fisher information, for EWC in the stages behind it."""
        given = {**self._relative(how.fisher), "model": "train/model", "data": ["manifest"], "seed": seed}
        return Step("fisher", {**given, "out": f"fisher-{content_hash(self.decides(given))[:8]}"})

    def eval(self, model: str, tasks: Sequence[str], held_out: str | None) -> Step:
        """A model's scores on tasks; `held_out`: folder of the stage with their rows."""
        how = self.config.evaluation
        first = [self.model] if how.metric == "ranking_change" and model != self.model else []
        data = self._path(str(how.data)) if held_out is None else f"../{held_out}/manifest"
        given = how.model_dump(include={"metric", "max_new_tokens", "reduction", "per_task", "batch_size"})
        given |= {"models": [*first, model], "data": data, "tasks": sorted(tasks)}
        return Step("eval", {**given, "out": f"eval-{content_hash(self.decides(given))[:8]}"})

    def decides(self, value: Any, key: str = "") -> Any:
        """Settings as they decide a result: contents instead of places, and nothing that changes none."""
        if isinstance(value, Mapping):
            idle = (*HOUSEKEEPING, "name", "out", "cache", "engine") if not key else ()
            return {name: self.decides(each, name) for name, each in value.items() if name not in idle}
        if isinstance(value, list | tuple):
            return [self.decides(each, key) for each in value]
        return self.inputs.get(value, value) if isinstance(value, str) else value

    def _path(self, name: str, digest: str | None = None) -> str:
        """A path of the stream's file as a stage's file has it; the name of what is no path (a hub id) as it is."""
        path = self.config.path(name)
        text = os.path.relpath(path.absolute(), self.here) if path.exists() else name
        if text not in self.inputs and (digest or path.exists()):
            self.inputs[text] = digest or _bytes(path)
        return text

    def _relative(self, value: Any, key: str = "") -> Any:
        """Settings whose paths are those that a stage's file has, and whose functions can be imported."""
        if isinstance(value, Mapping):
            return {name: self._relative(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [self._relative(each, key) for each in value]
        if isinstance(value, str) and key in ("function", "sync") and re.match(FUNCTION, value):
            _, file = open_function(value, self.base, f"{key} {value!r}")
            self.inputs[value] = f"{value}@{sha256_file(file)}"
        return self._path(value) if isinstance(value, str) and key in PATHS and value not in WORDS else value


def _bytes(path: Path) -> str:
    """Hash of what a path names: a file, a manifest, or a model."""
    if path.is_file():
        return sha256_file(path)
    provenance = path / "provenance.json"  # holds the hashes of a manifest's tables
    return sha256_file(provenance) if provenance.is_file() else weights_hash(path)


CHECKS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "build": lambda settings, base: BuildConfig.parse({**settings, "base": str(base)}, "build"),
    "fisher": lambda settings, base: checked(FisherConfig, settings, "fisher"),
    "eval": lambda settings, base: checked(EvalConfig, settings, "evaluation"),
}


def check(step: Step, base: Path) -> None:
    """Whether a command will take its settings.

    Raises:
        InputError: a key that it does not know, or a value that does not fit.
    """
    if step.kind != "train":
        CHECKS[step.kind](step.settings, base)
    else:
        parse(CONFIGS[step.command], step.settings, str(base), f"train ({step.command})")
