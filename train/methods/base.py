"""What the trainer asks of a method. It knows no method by name; a method knows no trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

Batch = Mapping[str, Tensor]
"""input_ids, position_ids, loss_mask, segment [b, t] (attention_mask where rows are padded); weight, row [n]."""


class Method(Protocol):
    """One way to train."""

    name: str

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, what to log) of one forward pass.

        `normaliser` is Σ w·m over all passes of the step, on all processes: losses of the passes then simply add up,
        whatever accumulation and world size are.
        """

    def penalty(self, model: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(what depends on the parameters alone, what to log); counted once a step. None where there is nothing."""

    def after_step(self) -> None:
        """Called when the optimizer has stepped: the place of a dual ascent or an adaptive coefficient."""

    def state_dict(self) -> dict[str, Tensor]:
        """The method's own state, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's state."""


def token_weights(batch: Batch) -> Tensor:
    """The weight of each token's sample, 0 for padding.   [n], [b, t] -> [b, t]"""
    segment = batch["segment"]
    return batch["weight"][segment.clamp_min(0)] * (segment >= 0)
