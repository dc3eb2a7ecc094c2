"""Samples as the rows of a forward pass (`prefix.py` plans them), and its values back as a row a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from train.prefix import Cost, batch_of, plan


@dataclass(frozen=True)
class Layout:
    """How samples become a batch: those of one prompt may share its row (`prefix.py`).

    Attributes:
        kind: auto, or separate for a model that obeys no block mask.
        cost: of a row.
        limit: tokens of a row that several share.
    """

    kind: Literal["auto", "separate"] = "separate"
    cost: Cost = field(default_factory=Cost)
    limit: int = 4096

    def batch(self, prompts: Sequence[Any], answers: Sequence[Any], of: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of `batch_of`, whose segment is a sample's number, and place [m]: of each target in its answer.

        `of` says which prompt a sample answers.
        """
        members: dict[int, list[int]] = {}
        for i, row in enumerate(of):
            members.setdefault(row, []).append(i)
        groups = list(members.values())
        heads, some = [prompts[g[0]] for g in groups], [[answers[i] for i in g] for g in groups]
        rows = plan(
            [len(h) for h in heads], [[len(a) for a in each] for each in some], self.kind, self.cost, self.limit
        )
        batch = batch_of(heads, some, rows)
        number = torch.tensor([i for g in groups for i in g])
        segment = batch["segment"]
        batch["segment"] = torch.where(segment >= 0, number[segment.clamp_min(0)], -1)
        at = batch["segment"][batch["loss_mask"]]  # the targets of an answer stand together
        first = torch.ones_like(at, dtype=torch.bool)
        first[1:] = at[1:] != at[:-1]
        count = torch.arange(len(at))
        batch["place"] = count - count.masked_fill(~first, 0).cummax(0).values
        return batch


def of_samples(values: Tensor, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Values at the targets of a batch [r, t] as [n, t'], a row a sample, like `mask`; differentiable."""
    at = batch["loss_mask"]
    return values.new_zeros(mask.shape).index_put((batch["segment"][at], batch["place"]), values[at])
