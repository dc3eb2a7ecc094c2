"""The diagonal Fisher information of a model on the rows that it has just learned: what EWC holds in later stages.

F_i = (1/N) Σ_n (∂ log π_θ(y_n|x_n) / ∂θ_i)², one gradient a sample (a mean over a batch would mix samples before they
are squared). Source: EWC (Kirkpatrick et al., PNAS 2017). Departure: y is the data's answer by default (the empirical
Fisher, as most implementations have it), because sampling from the model costs a generation a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from curate.errors import InputError
from curate.settings import Section
from train.config import CftConfig
from train.data import Examples
from train.logprobs import token_logps
from train.methods.cft import plain_name
from train.models import end_tokens, open_model, open_tokenizer
from train.packing import Collator, Item


class FisherConfig(Section):
    """What `train fisher` takes."""

    model: str = Field(description="folder of the trained model, or of an adapter, which is merged into its base")
    data: list[str] = Field(min_length=1, description="manifest that it was trained on")
    out: str = Field(description="folder of fisher.safetensors and anchor.safetensors")
    origins: tuple[Literal["current", "replay", "augmented"], ...] = Field(("current",), description="rows that count")
    samples: int | None = Field(None, gt=0, description="rows at most, drawn by the seed; by default all")
    max_length: int | None = Field(None, gt=1, description="longest sample in tokens; longer ones are cut")
    seed: int = Field(0, ge=0, description="of the draw")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the weights")
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")
    base: str = Field(".", exclude=True, description="set by the command line")


def fisher(config: FisherConfig) -> Path:
    """Estimate, and write F and the parameters θ* that it belongs to; returns the folder.

    Raises:
        InputError: the model or the manifest cannot be used, or there is no row of these origins.
    """
    run = CftConfig.model_validate({"model": config.model, "data": config.data, "out": config.out,
                                    "dtype": config.dtype, "base": config.base})  # fmt: skip
    tokenizer, model = open_tokenizer(run), open_model(run)
    model = model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    most = config.max_length or getattr(model.config, "max_position_embeddings", None)
    examples = Examples.read([run.path(d) for d in run.data], tokenizer, max_length=most, too_long="truncate",
                             ends=end_tokens(run, tokenizer))  # fmt: skip
    rows = chosen(examples, config)
    found = estimate(model, batches(examples, rows, tokenizer.pad_token_id or 0, model.device))
    anchor = {plain_name(n): p.detach().cpu().contiguous() for n, p in model.named_parameters() if n in found}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("fisher", found), ("anchor", anchor)):
        save_file({plain_name(k): v.cpu().contiguous() for k, v in tensors.items()}, out / f".{name}.safetensors")
        os.replace(out / f".{name}.safetensors", out / f"{name}.safetensors")
    facts = {"model": config.model, "data": config.data, "samples": len(rows), "origins": list(config.origins)}
    (out / "fisher.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


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
