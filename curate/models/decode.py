"""Sampling from a causal language model: one prefill a prompt for all of its completions, and no step for ended rows.

transformers' `generate` keeps an ended row in its batch until the last one ends, prefills a prompt once a completion,
and draws from one global generator, so that a row's text depends on its batch. Here a row has its own random numbers,
which makes draws independent of batching; the log-probability of each drawn token is kept, not [t, vocabulary].
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from curate.models.base import Sampling

COMPACT = 0.8  # ended rows leave the batch once so few of it are open: leaving costs a copy of the cache


@dataclass(frozen=True)
class Drawn:
    """One sampled sequence: its tokens, their log-probabilities in nats, and whether an end token closed it."""

    tokens: list[int]
    logps: list[float]
    finished: bool


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and their mask, both [b, t]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Positions that do not count padding.   [b, t] -> [b, t]"""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def step_inputs(model: Any, mask: Tensor, length: int) -> dict[str, Tensor]:
    """Mask, and positions of the last `length` tokens for a model that takes them (ALiBi models derive their own)."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"attention_mask": mask, **({"position_ids": positions(mask)[:, -length:]} if takes else {})}


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: NDArray[np.float64],
    sampling: Sampling,
    ends: Sequence[int],
    pad: int,
) -> list[list[Drawn]]:
    """`sampling.k` completions of each of b prompts.

    Args:
        model: a causal language model in eval mode.
        prompts: b lists of tokens, none empty.
        uniforms: [b, k, max_new_tokens] numbers in [0, 1): token t of completion j of row i is drawn by inversion with
            uniforms[i, j, t]. Not used at temperature 0.
        sampling: temperature, top_p, max_new_tokens, k.
        ends: tokens that end a completion.
        pad: token for the padding.
    """
    b, k = len(prompts), sampling.k
    ids, mask = padded(prompts, pad, model.device)
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
                   **step_inputs(model, mask, ids.shape[1])).logits[:, -1]  # [b, v]  # fmt: skip
    if k > 1:
        cache.reorder_cache(torch.arange(b, device=model.device).repeat_interleave(k))
        logits, mask = logits.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
    numbers = torch.from_numpy(uniforms.reshape(b * k, -1)).to(model.device)
    stop = torch.tensor(sorted(ends), device=model.device)
    tokens = torch.full((b * k, sampling.max_new_tokens), -1, device=model.device)
    logps = torch.zeros((b * k, sampling.max_new_tokens), device=model.device)
    rows = torch.arange(b * k, device=model.device)  # which sequence each row of the batch is
    open_ = torch.ones(b * k, dtype=torch.bool, device=model.device)  # of the rows in the batch
    for t in range(sampling.max_new_tokens):
        token, logp = _draw(logits, numbers[rows, t] if sampling.temperature else None, sampling)
        tokens[rows[open_], t], logps[rows[open_], t] = token[open_], logp[open_]
        open_ &= ~torch.isin(token, stop)
        alive = int(open_.sum())
        if alive == 0 or t + 1 == sampling.max_new_tokens:
            break
        if alive <= COMPACT * len(rows):
            keep = open_.nonzero().squeeze(1)
            cache.reorder_cache(keep)
            rows, mask, token, open_ = rows[keep], mask[keep], token[keep], open_[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(input_ids=token[:, None], past_key_values=cache, use_cache=True,
                       **step_inputs(model, mask, 1)).logits[:, -1]  # fmt: skip
    finished = torch.isin(tokens, stop).any(1).tolist()
    length = (tokens >= 0).sum(1).tolist()
    flat = [
        Drawn(ids_[:n], logps_[:n], done)
        for ids_, logps_, n, done in zip(tokens.tolist(), logps.tolist(), length, finished, strict=True)
    ]
    return [flat[i * k : (i + 1) * k] for i in range(b)]


def _draw(logits: Tensor, numbers: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token a row and its log-probability under the processed distribution.   [n, v], [n] -> [n], [n]"""
    if numbers is None:
        logp = torch.log_softmax(logits.float(), -1)
        token = logp.argmax(-1)
    else:
        unused = torch.zeros(0, dtype=torch.long)  # processors of other kinds look at the tokens so far
        logp = torch.log_softmax(_processors(sampling)(unused, logits.float()), -1)  # type: ignore[arg-type]
        total = logp.double().exp().cumsum(-1)
        # the first token whose cumulative probability exceeds the number: never one of probability 0
        number = torch.minimum(numbers, torch.tensor(1 - 2**-40, dtype=torch.float64)) * total[:, -1]
        token = torch.searchsorted(total, number[:, None], right=True).squeeze(1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
