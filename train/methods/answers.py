"""What methods over several answers of a prompt share: log-probabilities of answers, laid out as [prompts, answers]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from train.logprobs import Measure, sequence_logps, token_values
from train.methods.base import Batch

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Grid:
    """Answers of a batch by prompt: values [a] to [b, j], j the most answers of a prompt.

    Attributes:
        prompt: [a] which prompt an answer is of.
        place: [a] its place among them.
        mask: [b, j] bool, True where there is an answer.
    """

    prompt: Tensor
    place: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Batch, wanted: Tensor) -> Grid:
        """Of the wanted answers [a] bool, in their order."""
        prompt, n = batch["prompt"][wanted], batch["row"].shape[0]
        first = torch.ones_like(prompt, dtype=torch.bool)
        first[1:] = prompt[1:] != prompt[:-1]
        start = torch.arange(len(prompt), device=prompt.device).masked_fill(~first, 0).cummax(0).values
        place = torch.arange(len(prompt), device=prompt.device) - start
        width = int(place.max()) + 1 if len(place) else 1
        mask = torch.zeros(n, width, dtype=torch.bool, device=prompt.device)
        mask[prompt, place] = True
        return cls(prompt, place, mask)

    def __call__(self, values: Tensor) -> Tensor:
        """[a] of the wanted answers -> [b, j], 0 where there is none; differentiable."""
        empty = values.new_zeros(self.mask.shape)
        return empty.index_put((self.prompt, self.place), values)


def answer_values(
    model: Any, batch: Batch, measures: Sequence[Measure] = ("logps",), reference: Any = None
) -> tuple[dict[Measure, Tensor], Tensor]:
    """(values of the tokens [r, t], log π of the answers [a], summed over their tokens)."""
    found = token_values(model, batch, measures, reference=reference)
    return found, sequence_logps(found["logps"], batch["loss_mask"], batch["segment"], batch["gold"].shape[0])


def lengths(batch: Batch) -> Tensor:
    """[a] tokens of each answer."""
    segment = batch["segment"][batch["loss_mask"]]
    return torch.bincount(segment, minlength=batch["gold"].shape[0])


def of_answers(batch: Batch, wanted: Tensor) -> Tensor:
    """[r, t] bool: targets that belong to wanted answers [a]."""
    return batch["loss_mask"] & wanted[batch["segment"].clamp_min(0)]


def by_answer(batch: Batch, values: Tensor) -> Tensor:
    """Values of the answers [a] at each of their tokens.   -> [r, t], 0 elsewhere."""
    return torch.where(batch["loss_mask"], values[batch["segment"].clamp_min(0)], 0)


def ordered(logps: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """[2, b]: a prompt's pairs of unlike rank whose better answer is the likelier one (equal: ½), and all such.

    Arguments [b, j] each.
    """
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    right = (logps[:, :, None] > logps[:, None, :]) + 0.5 * (logps[:, :, None] == logps[:, None, :])
    return torch.stack([(right * pairs).sum(dim=(1, 2)), pairs.sum(dim=(1, 2)).float()])
