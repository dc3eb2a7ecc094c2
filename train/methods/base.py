"""What the trainer asks of a method. It knows no method by name; a method knows no trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""input_ids, position_ids, loss_mask, segment [b, t] (attention_mask where rows are padded); weight, row [n]."""


Logged = dict[str, Tensor]
"""What a pass reports: a number, or [2]: a sum and how many it is of, or [2, n]: the same of each of the batch's rows,
which is logged by origin and task too. `loss` is of rows."""


class RunAway(Exception):
    """The policy has gone too far: what was seen, and what helps."""

    def __init__(self, seen: str, remedy: str) -> None:
        super().__init__(seen)
        self.seen, self.remedy = seen, remedy


class Method(Protocol):
    """One way to train."""

    name: str

    @property
    def phase(self) -> int | None:
        """Number of the phase that a step belongs to; None: the method has none."""

    def parameters(self) -> list[nn.Parameter]:
        """What the method trains beside the model: a value function."""

    def fill(self, model: Any, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches of a step, before it: the place of fresh rollouts. Most methods return what the collator made."""

    def size(self, batch: Batch) -> Tensor:
        """What the loss of a batch is divided by, [g] numbers: target tokens by weight, prompts, prompts of a task …"""

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """(loss, what to log) of one forward pass.

        `normaliser` [g] is `size` added up over all passes of the step, on all processes: losses of the passes then
        simply add up, whatever accumulation and world size are.
        """

    def penalty(self, model: Any) -> tuple[Tensor | None, Logged]:
        """(what depends on the parameters alone, what to log); counted once a step. None where there is nothing."""

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Called when the optimizer has stepped: the place of a dual ascent or an adaptive coefficient.

        `total` adds a tensor up over all processes, which must ask for the same ones.
        """

    def end(self, model: Any) -> None:
        """Called after the last step, before the model is published.

        Raises:
            RunAway: it should not be.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The method's own state, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's state."""


class Memoryless:
    """A method that is its loss: no penalty, nothing that moves with the steps, nothing to store."""

    @property
    def phase(self) -> int | None:
        """None."""
        return None

    def parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def fill(self, model: Any, batches: Sequence[Batch]) -> Sequence[Batch]:
        """As they are."""
        return batches

    def penalty(self, model: Any) -> tuple[Tensor | None, Logged]:
        """None."""
        return None, {}

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """Nothing moves."""

    def end(self, model: Any) -> None:
        """Nothing to look at."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take up."""


def token_weights(batch: Batch) -> Tensor:
    """The weight of each token's sample, 0 for padding.   [n], [b, t] -> [b, t]"""
    segment = batch["segment"]
    return batch["weight"][segment.clamp_min(0)] * (segment >= 0)


def weighted_tokens(batch: Batch) -> Tensor:
    """Σ w·m over the target tokens of a batch.   -> [1]"""
    return (token_weights(batch) * batch["loss_mask"]).sum()[None]


def by_sample(values: Tensor, batch: Batch) -> Tensor:
    """[2, n]: the sum of token values over each sample's targets, and the number of them.   values [b, t]"""
    mask, n = batch["loss_mask"], batch["row"].shape[0]
    segment = batch["segment"][mask]
    sums = values.new_zeros(n).index_add(0, segment, values[mask])
    return torch.stack([sums, values.new_zeros(n).index_add(0, segment, torch.ones_like(values[mask]))])
