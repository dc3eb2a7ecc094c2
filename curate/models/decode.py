"""Sampling from a causal language model: a prompt is prefilled once for its completions, ended rows take no step.

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
from torch.nn.functional import pad as with_padding
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from curate.errors import InputError
from curate.models.base import Sampling

COMPACT = 0.8  # ended rows leave the batch once so few of it are open: leaving costs a copy of the cache


ROOM = 64  # tokens that a cache layer has room for before it is copied


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


def pads(model: Any) -> bool:
    """True where rows of unequal length may share a batch: a model that is not told positions may count the padding."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def step_inputs(model: Any, mask: Tensor, length: int) -> dict[str, Tensor]:
    """Mask, and positions of the last `length` tokens; nothing for a model whose rows have one length."""
    return {"attention_mask": mask, "position_ids": positions(mask)[:, -length:]} if pads(model) else {}


def cache_name(model: Any) -> str | None:
    """The argument that takes a `Cache`, whatever its name; None where a model keeps its state in its own way."""
    if model.config.model_type in ("recurrent_gemma", "xlstm", "minimax"):  # in modules; in classes of their own
        return None
    taken = inspect.signature(type(model).forward).parameters  # of the class: accelerate wraps the method
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), None)


class Roomy(DynamicLayer):
    """Keys and values [b, h, t, d] in buffers that are longer than t: its parent copies them all at every token."""

    buffers: Sequence[Tensor] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far."""
        start = self.get_seq_length()
        if start == 0:
            return super().update(key_states, value_states)
        end = start + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            held: Any = (self.keys, self.values)
            self.buffers = [with_padding(old, (0, 0, 0, end - start + ROOM)) for old in held]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these rows."""
        super().reorder_cache(beam_idx)
        self.buffers = ()


@torch.no_grad()  # not inference mode: a sharded model gathers its weights in place
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    uniforms: NDArray[np.float64],
    sampling: Sampling,
    ends: Sequence[int],
    pad: int,
) -> list[Drawn]:
    """Completions of b prompts.

    Args:
        model: a causal language model in eval mode that takes a cache (`cache_name`).
        prompts: b lists of tokens, none empty; of one length unless the model `pads`.
        owners: [n] indices into `prompts`: which prompt each completion answers.
        uniforms: [n, max_new_tokens] numbers in [0, 1): token t of completion i is drawn by inversion with
            uniforms[i, t]. Not used at temperature 0.
        sampling: temperature, top_p, max_new_tokens.
        ends: tokens that end a completion.
        pad: token for the padding.
    """
    n, device = len(owners), model.device
    ids, mask = padded(prompts, pad, device)
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    kept = {str(cache_name(model)): cache, "use_cache": True}
    logits = model(input_ids=ids, logits_to_keep=1, **kept, **step_inputs(model, mask, ids.shape[1])).logits[:, -1]
    if list(owners) != list(range(len(prompts))):
        owner = torch.tensor(owners, device=device)
        cache.reorder_cache(owner)  # any choice of rows: unlike batch_repeat_interleave, recurrent layers have it too
        logits, mask = logits[owner], mask[owner]  # [n, v], [n, t]
    numbers = torch.from_numpy(uniforms).to(device)
    stop = torch.tensor(sorted(ends), device=device, dtype=torch.long)
    tokens = torch.full((n, sampling.max_new_tokens), -1, device=device)
    logps = torch.zeros((n, sampling.max_new_tokens), device=device)
    rows = torch.arange(n, device=device)  # which sequence each row of the batch is
    open_ = torch.ones(n, dtype=torch.bool, device=device)  # of the rows in the batch
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
        logits = model(input_ids=token[:, None], **kept, **step_inputs(model, mask, 1)).logits[:, -1]
    finished = torch.isin(tokens, stop).any(1).tolist()
    length = (tokens >= 0).sum(1).tolist()
    return [
        Drawn(ids_[:n], logps_[:n], done)
        for ids_, logps_, n, done in zip(tokens.tolist(), logps.tolist(), length, finished, strict=True)
    ]


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
    found = logp.gather(-1, token.clamp_max(logp.shape[-1] - 1)[:, None]).squeeze(1)
    if bool(torch.isnan(found).any()):
        raise InputError(
            "the model's logits are not numbers, so nothing can be sampled from it",
            remedy="look at its weights: NaN or infinity there (a run that diverged?), or a temperature next to 0",
        )
    return token, found


def _processors(sampling: Sampling) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
