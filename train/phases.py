"""The order of a run of reinforcement learning: phases of fresh samples, each gone through several times.

A phase answers the next prompts of a mixture, k times each, and its samples are shuffled anew in each pass. All is a
pure function of seed and position, as in `mixing.py`, so items, lineage and resume work as for any other run. It knows
nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, tensor

from curate.errors import InputError
from train.mixing import Mixture
from train.packing import Item, Items

Rows = Any  # NDArray[np.int64]


@dataclass(frozen=True)
class Phases:
    """A mixture of prompts as an order of samples.

    Attributes:
        mixture: order of the prompts.
        prompts: of a phase.
        k: samples a prompt.
        passes: over the samples of a phase.
        seed: of the shuffles.
    """

    mixture: Mixture
    prompts: int
    k: int
    passes: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.prompts, self.k, self.passes) < 1:
            raise InputError("a phase needs a prompt, a sample of it and a pass")

    @property
    def samples(self) -> int:
        """Of a phase."""
        return self.prompts * self.k

    @property
    def size(self) -> int:
        """Positions of a phase."""
        return self.samples * self.passes

    @property
    def length(self) -> int:
        """Positions of an epoch: as many phases as see each prompt."""
        return -(-self.mixture.length // self.prompts) * self.size

    def rows(self, phase: int) -> Rows:
        """[prompts · k] prompt of each sample of a phase; the k of one prompt stand together."""
        return np.repeat(self.mixture.order(phase * self.prompts, (phase + 1) * self.prompts), self.k)

    def sample(self, position: int) -> tuple[int, int]:
        """(phase, number of its sample) at a position."""
        phase, inside = divmod(position, self.size)
        turn, place = divmod(inside, self.samples)
        return phase, int(self._shuffled(phase, turn)[place])

    def order(self, start: int, stop: int) -> Rows:
        """[stop - start] prompts of the positions."""
        found = np.empty(stop - start, np.int64)
        for phase in range(start // self.size, -(-stop // self.size)):
            rows = self.rows(phase)
            turns = [self._shuffled(phase, turn) for turn in range(self.passes)]
            whole, at = rows[np.concatenate(turns)], phase * self.size
            low, high = max(start, at), min(stop, at + self.size)
            found[low - start : high - start] = whole[low - at : high - at]
        return found

    def _shuffled(self, phase: int, turn: int) -> Rows:
        return np.random.default_rng([self.seed, phase, turn]).permutation(self.samples)


@dataclass(frozen=True, eq=False)
class Slot(Item):
    """A sample that is not there yet: number `sample` of a phase."""

    phase: int
    sample: int


class Slots(Items):
    """The samples of a run in order; arguments as `Items` takes them, without packing.

    Raises:
        InputError: steps that would straddle phases.
    """

    def __init__(self, examples: Any, phases: Phases, *, items_per_step: int = 1, **how: Any) -> None:
        if phases.samples % items_per_step:
            raise InputError(
                f"a phase has {phases.samples} samples, which steps of {items_per_step} do not divide",
                remedy="steps take whole shares of a phase: change rollouts.prompts, rollouts.k or the batch size",
            )
        super().__init__(examples, phases, items_per_step=items_per_step, **how)  # type: ignore[arg-type]
        self.phases = phases

    def __getitem__(self, index: int) -> Slot:
        phase, sample = self.phases.sample(index)
        return Slot(**vars(super().__getitem__(index)), phase=phase, sample=sample)


def collate(items: list[Slot]) -> dict[str, Tensor]:
    """The phase [], sample [n] and row [n] of the slots: what the method fills with samples before the step."""
    return {
        "phase": tensor(items[0].phase),
        "sample": tensor([item.sample for item in items]),
        "row": tensor([int(item.rows[0]) for item in items]),
    }
