"""What benchmarks beside another trainer share: units and seconds of a run's steps, but for the first ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

WARM = 2  # steps of a run that are not counted


class Clock(TrainerCallback):
    """Units and time of the counted steps of whatever trainer runs."""

    units, seconds, began = 0, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting after the warm-up."""
        if state.global_step == WARM:
            Clock.units, Clock.began = 0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The time so far."""
        Clock.seconds = time.perf_counter() - Clock.began


def count(kind: type[Any], units: Callable[[Any], int]) -> None:
    """Let a trainer class count what it is fed: `units` of the inputs of a pass."""
    if Clock not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(Clock)
    plain = kind.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        Clock.units += units(inputs)
        return plain(self, model, inputs, *args, **more)

    kind.compute_loss = compute_loss


def against(mine: list[float], theirs: list[float]) -> str:
    """Ratios of two series, pair by pair: median (least to most)."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
