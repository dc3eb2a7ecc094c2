"""What passes report, added up until it is logged: numbers of a step, and values of rows, also by origin and task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.data import Examples
from train.methods.base import Batch, Logged

Pairs = dict[str, list[Tensor]]  # by name: sums and how many they are of, [2] each


class Tally:
    """Sums, and how many each is of.

    Attributes:
        examples: what batches point to: their origins and tasks.
        steps: what is of passes.
        rows: by name what is of rows: in all (""), by origin ("_origin/replay") and by task ("_task/qa").
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.steps: Pairs = defaultdict(list)
        self.rows: dict[str, Pairs] = defaultdict(lambda: defaultdict(list))

    def clear(self) -> None:
        """Begin anew."""
        self.steps.clear()
        self.rows.clear()

    def add_step(self, logged: Logged) -> None:
        """Take what is not of rows."""
        for name, value in logged.items():
            if value.dim() < 2:
                value = value.detach().float()
                self.steps[name].append(value if value.dim() else torch.stack([value, torch.ones_like(value)]))

    def add_rows(self, logged: Logged, batch: Batch, counted: Callable[[Tensor], Tensor] = lambda v: v) -> None:
        """Take what is of the batch's rows, [2, n]; `counted` puts 0 where a row does not count."""
        at = batch["row"].cpu().numpy()
        for name, value in logged.items():
            if value.dim() == 2:
                both, sums = counted(value.detach()).float().cpu(), self.rows[name]
                sums[""].append(both.sum(1))
                for suffix, codes, code in self._groups():
                    if (mine := codes[at] == code).any():
                        sums[suffix].append(both[:, mine].sum(1))

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Every mean over all processes, of nothing none; `total` adds a pair up over them.

        They must ask for the same pairs in the same order: also for groups that one of them has not met.
        """
        suffixes = ["", *(suffix for suffix, *_ in self._groups())]
        every = {name: self.steps[name] for name in sorted(self.steps)}
        every |= {name + s: self.rows[name].get(s, []) for name in sorted(self.rows) for s in suffixes}
        found = {}
        for name, parts in every.items():
            pair = total(torch.stack([torch.zeros(2), *(part.cpu() for part in parts)]).sum(0))
            if float(pair[1]) > 0:
                found[name] = float(pair[0] / pair[1])
        return found

    def _groups(self) -> list[tuple[str, Any, int]]:
        """(suffix of the name, the code of each row, the code of the group)."""
        each = self.examples
        kinds = (("origin", each.origin, each.origin_names), ("task", each.task, each.task_names))
        return [(f"_{kind}/{name}", codes, k) for kind, codes, names in kinds for k, name in enumerate(names)]
