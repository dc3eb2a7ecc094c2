"""The diagonal Fisher information of a model on the rows that it has just learned: what EWC holds in later stages.

F_i = (1/N) Σ_n (∂ log π_θ(y_n|x_n) / ∂θ_i)², one gradient a sample (a mean over a batch would mix samples before they
are squared). Source: EWC (Kirkpatrick et al., PNAS 2017). Departure: y is the data's answer by default (the empirical
Fisher, as most implementations have it), because sampling from the model costs a generation a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from curate.errors import InputError
from curate.models.weights import model_folder, refuse_foreign_tokens, stack
from curate.settings import Section
from train.config import CftConfig, Folders
from train.data import Examples
from train.folder import refuse_foreign, whole
from train.logprobs import token_logps
from train.methods.ewc import plain_name
from train.models import end_tokens, open_model, open_tokenizer
from train.packing import Collator, Item

FILES = ("fisher.safetensors", "anchor.safetensors", "fisher.json")


class FisherConfig(Section):
    """What `train fisher` takes."""

    model: str = Field(description="folder of the trained model, or of an adapter, which is merged into its base")
    data: Folders = Field(min_length=1, description="manifest that it was trained on")
    out: str = Field(description="folder of fisher.safetensors and anchor.safetensors")
    origins: tuple[Literal["current", "replay", "augmented"], ...] = Field(("current",), description="rows that count")
    samples: int | None = Field(None, gt=0, description="rows at most, drawn by the seed; by default all")
    max_length: int | None = Field(None, gt=1, description="longest sample in tokens; longer ones are cut")
    seed: int = Field(0, ge=0, description="of the draw")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the weights")
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")
    base: str = Field(".", exclude=True, description="set by the command line")


def fisher(config: FisherConfig, say: Callable[[str], None] = lambda text: None) -> Path:
    """Estimate, and write F and the parameters θ* that it belongs to; returns the folder.

    Raises:
        InputError: the model, the manifest, `device` or `out` cannot be used, there is no row of these origins,
            weights or information are not finite, or the disk is full.
    """
    run = CftConfig.model_validate({"model": config.model, "data": config.data, "out": config.out,
                                    "dtype": config.dtype, "base": config.base})  # fmt: skip
    out, where, data = Path(config.out), f"model {config.model!r}", [run.path(d) for d in config.data]
    folder, _ = model_folder(str(run.path(config.model)), Path(config.base), "model")
    refuse_foreign(out, [*FILES, *(f".{name}" for name in FILES)], [*stack(folder, "model"), *data])
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()  # `meta` holds no numbers
    except Exception as error:  # whatever torch says of a device that is not there
        raise InputError(f"device {device!r} cannot be used: {str(error)[:300]}", remedy="device=cpu") from None
    tokenizer, model = open_tokenizer(run), open_model(run)
    refuse_foreign_tokens(model, tokenizer, where)
    _check_finite(dict(model.named_parameters()), f"{where}: its weight",
                  "a run that diverged? name an older checkpoint")  # fmt: skip
    try:
        model = model.to(device).eval()
    except RuntimeError as error:  # no room
        raise InputError(f"{where} cannot be moved to {device!r}: {str(error)[:300]}", remedy="device=cpu") from None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = min((n for n in (config.max_length, context) if n), default=None)
    examples = Examples.read(data, tokenizer, max_length=most, too_long="truncate", ends=end_tokens(run, tokenizer))
    rows = chosen(examples, config)
    long = set(examples.too_long["uid"])
    cut = sum(uid in long for uid in examples.uids(rows[examples.lengths[rows] == most]))
    if cut:
        say(f"{cut:,} of {len(rows):,} rows are cut to {most:,} tokens")
    found = estimate(model, batches(examples, rows, tokenizer.pad_token_id or 0, model.device))
    _check_finite(found, f"{where}: the information of", "dtype=float32, or look at the rows: an answer of "
                  "probability 0?")  # fmt: skip
    anchor = {n: p.detach() for n, p in model.named_parameters() if n in found}
    facts = {"model": config.model, "data": config.data, "samples": len(rows), "origins": list(config.origins),
             "max_length": most, "cut": cut}  # fmt: skip
    _write(out, found, anchor, facts)
    return out


def _check_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    if wrong := next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
        raise InputError(f"{what} {wrong!r} holds NaN or infinity", remedy=remedy)


def _write(out: Path, found: dict[str, Tensor], anchor: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """All files under their names, or none."""
    staged = [out / f".{name}" for name in FILES]
    try:
        for path, tensors in zip(staged, (found, anchor), strict=False):
            with whole(path, "nothing else was written"):
                out.mkdir(parents=True, exist_ok=True)
                save_file({plain_name(k): v.cpu().contiguous() for k, v in tensors.items()}, path)
        with whole(staged[-1], "nothing else was written"):
            staged[-1].write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name in FILES:  # the information of one model beside the anchor of another is worse than none
                (out / name).unlink(missing_ok=True)
            for path, name in zip(staged, FILES, strict=True):
                os.replace(path, out / name)
    finally:
        for path in staged:
            path.unlink(missing_ok=True)


def chosen(examples: Examples, config: FisherConfig) -> np.ndarray[Any, Any]:
    """Rows of the origins, at most `samples`, in the order of their uids."""
    groups = examples.groups("origin")
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *(groups[o] for o in config.origins if o in groups)]))
    if not len(rows):
        raise InputError(f"{', '.join(config.data)}: no rows of origin {', '.join(config.origins)}",
                         remedy="name other origins: origins=[current,replay]")  # fmt: skip
    if config.samples is not None and config.samples < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.samples, replace=False))
    return rows.astype(np.int64)


def batches(examples: Examples, rows: np.ndarray[Any, Any], pad: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """One batch a row."""
    collate = Collator(pad)
    for row in rows.tolist():
        tokens = examples.row_tokens(row)
        t = len(tokens)
        item = Item(
            tokens=tokens, positions=np.arange(t), loss=np.arange(t) >= examples.first_target[row],
            lengths=np.array([t]), rows=np.array([row]), weights=np.ones(1, np.float32),
        )  # fmt: skip
        yield {name: tensor.to(device) for name, tensor in collate([item]).items()}


def estimate(model: Any, samples: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """F of every trainable parameter, float32, by its name.

    Args:
        model: a causal language model in eval mode.
        samples: batches of one sample each.
    """
    found = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters() if p.requires_grad}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    count = 0
    for batch in samples:
        logp = token_logps(model, batch).sum()
        for (name, _), g in zip(parameters.items(), torch.autograd.grad(logp, list(parameters.values())), strict=True):
            found[name] += g.float().square()
        count += 1
    return {name: value / max(1, count) for name, value in found.items()}
