"""The order of examples for a whole run: which group each position takes, and which of the group's rows.

Everything is a pure function of (rows, ratios, seed, position): a run that is resumed, or cut otherwise into batches
and processes, meets the same rows at the same positions. It owns no tokens and no batches.

Departures from "always the group that is furthest behind": with five groups or more that rule falls behind a ratio by
more than one row (1, 3, 192, 183, 1 of 380: by 1.1). Here the group whose next row is due first comes first, of those
that are not ahead (Tijdeman, The chairman assignment problem, 1980): at every position each group's count is within 1.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from curate.errors import InputError
from train.data import Examples, Origin

EVERYTHING = "all"  # the one group where no ratios are given
FINEST = 10**6  # a ratio is a fraction with at most this denominator
Rows = NDArray[np.int64]


class Mixture:
    """Rows in training order.

    Without ratios every row comes once an epoch, shuffled anew each epoch. With ratios each group (an origin, or a
    task) comes as often as its ratio says: at every position n its count is within 1 of n · ratio, and the group is
    shuffled anew at each of its own passes.

    Args:
        examples: whose rows are mixed.
        ratios: share of each origin (current, replay, augmented) or of each task; they sum to 1. A group that has rows
            must be named: 0 leaves it out.
        seed: of the shuffles, ≥ 0.

    Attributes:
        length: positions of an epoch. Without ratios: all rows. With: until each current row was seen once (where the
            ratios leave out all current rows: each row that they do not leave out).

    Raises:
        InputError: ratios that cannot be met.
    """

    def __init__(self, examples: Examples, ratios: Mapping[str, float] | None = None, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"the seed must not be negative, not {seed}")
        if not len(examples):
            raise InputError(f"no rows to train on in {', '.join(examples.sources)}")
        self.seed = seed
        self._rows = {EVERYTHING: np.arange(len(examples))} if ratios is None else _grouped(examples, ratios)
        self.names = tuple(self._rows)
        self._turns = Turns([Fraction(1)] if ratios is None else _exact([ratios[name] for name in self._rows]))
        self._pass: dict[str, tuple[int, Rows]] = {}
        self.length = self._epoch(examples)

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{float(share):.3g} {name} ({len(rows):,} rows)"
            for share, (name, rows) in zip(self._turns.shares, self._rows.items(), strict=True)
        )
        return f"Mixture({shares}; an epoch is {self.length:,}; seed {self.seed})"

    def order(self, start: int, stop: int) -> Rows:
        """[stop - start] rows of the positions start … stop - 1, without any of those before them."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions must be 0 ≤ start ≤ stop, not {start} and {stop}")
        turns, before = self._turns.at(start, stop), self._turns.counts(start)
        found = np.empty(stop - start, np.int64)
        for group, name in enumerate(self.names):
            places = np.flatnonzero(turns == group)
            found[places] = self._drawn(name, before[group], len(places))
        return found

    def counts(self, n: int) -> dict[str, int]:
        """Rows of each group among the first n positions."""
        return dict(zip(self.names, self._turns.counts(n), strict=True))

    def _drawn(self, name: str, start: int, n: int) -> Rows:
        """The n rows of a group behind its first `start`, over as many passes as that takes."""
        rows, parts = self._rows[name], []
        while n:
            number, at = divmod(start, len(rows))
            parts.append(self._shuffled(name, number)[at : at + n])
            start, n = start + len(parts[-1]), n - len(parts[-1])
        return np.concatenate(parts) if parts else rows[:0]

    def _shuffled(self, name: str, number: int) -> Rows:
        """A group's rows in the order of its pass `number`."""
        kept = self._pass.get(name)
        if kept is None or kept[0] != number:
            rng = np.random.default_rng([self.seed, number, *name.encode()])
            kept = self._pass[name] = (number, rng.permutation(self._rows[name]))
        return kept[1]

    def _epoch(self, examples: Examples) -> int:
        current = examples.groups("origin").get(Origin.CURRENT, np.zeros(0, np.int64))
        holders = [i for i, rows in enumerate(self._rows.values()) if np.isin(current, rows, assume_unique=True).any()]
        whole = range(len(self.names)) if self.names == (EVERYTHING,) or not holders else holders
        return max(self._turns.position(i, len(self._rows[self.names[i]]) - 1) for i in whole) + 1


class Turns:
    """Whose turn it is at each position: groups interleaved so that no count is ever a whole row off its share.

    Group g's row number c (from 0) may come once c < (n + 1) · share, and must before n · share - c reaches 1; of the
    groups that may, the one that must first comes, ties by number. The pattern repeats with the common denominator of
    the shares, so a position far on needs at most one period of it; it is made once, about a microsecond a position.

    Args:
        shares: of each group, > 0, with the sum 1.
    """

    def __init__(self, shares: list[Fraction]) -> None:
        self.shares = shares
        self.period = math.lcm(*(share.denominator for share in shares))
        self._a_period = [int(share * self.period) for share in shares]  # rows of each group in a period
        self._pattern = array("H")
        self._done = [0] * len(shares)
        self._due: list[tuple[int, int]] = []  # (last position, group) of those that may come
        self._later = [(0, group) for group in range(len(shares))]  # (first position, group) of the others

    def at(self, start: int, stop: int) -> NDArray[np.uint16]:
        """[stop - start] group of each position."""
        return self._upto(stop)[np.arange(start, stop) % min(self.period, 1 << 62)]  # no position is that far on

    def counts(self, n: int) -> list[int]:
        """Rows of each group among the first n positions; |count - n · share| < 1."""
        periods, rest = divmod(n, self.period)
        inside = np.bincount(self._upto(n)[:rest], minlength=len(self.shares)).tolist()
        return [periods * whole + c for whole, c in zip(self._a_period, inside, strict=True)]

    def position(self, group: int, number: int) -> int:
        """Where the row `number` (from 0) of a group comes."""
        periods, rest = divmod(number, self._a_period[group])
        pattern = self._upto(math.ceil((rest + 1) / self.shares[group]))  # its turn is not later
        return periods * self.period + int(np.flatnonzero(pattern == group)[rest])

    def _upto(self, n: int) -> NDArray[np.uint16]:
        """The pattern, at least up to position n or to its end."""
        for position in range(len(self._pattern), min(n, self.period)):
            while self._later and self._later[0][0] <= position:
                group = heapq.heappop(self._later)[1]
                end = -(-(self._done[group] + 1) * self.period // self._a_period[group])  # ⌈(c + 1) / share⌉
                heapq.heappush(self._due, (end - 1, group))
            group = heapq.heappop(self._due)[1]
            self._pattern.append(group)
            self._done[group] += 1
            start = self._done[group] * self.period // self._a_period[group]  # ⌊c / share⌋
            heapq.heappush(self._later, (start, group))
        return np.array(self._pattern, np.uint16)


def _grouped(examples: Examples, ratios: Mapping[str, float]) -> dict[str, Rows]:
    """Rows of each group with a ratio above 0, by name."""
    faulty = [f"{name}: {r}" for name, r in ratios.items() if not (r == 0 or 1 / FINEST <= r <= 1)]
    if faulty or abs(math.fsum(ratios.values()) - 1) > 1 / FINEST:
        what = ", ".join(faulty) if faulty else f"their sum is {math.fsum(ratios.values()):.6g}"
        raise InputError(
            f"the mixture's ratios cannot be used: {what}",
            remedy=f"each is 0 or {1 / FINEST:g} to 1, and they sum to 1",
        )
    by_origin = set(ratios) <= set(Origin)
    groups, where = examples.groups("origin" if by_origin else "task"), ", ".join(examples.sources)
    for name in sorted(ratios):
        if ratios[name] and name not in groups:
            raise InputError(
                f"no {name if by_origin else f'task {name!r}'} rows in {where}, yet the mixture asks for "
                f"{100 * ratios[name]:.6g}% of them{_lost(examples, name, by_origin)}",
                remedy="give it the ratio 0, or build a manifest that has such rows; there are "
                f"{', '.join(map(repr, groups))} (ratios are by origin, current, replay and augmented, or by task, "
                "never both)",
            )
    if unnamed := [name for name in groups if name not in ratios]:
        raise InputError(
            f"{where} has rows of {', '.join(unnamed)}, which the mixture does not name",
            remedy=f"give each a ratio; {unnamed[0]}: 0 leaves them out",
        )
    return {name: groups[name] for name in sorted(groups) if ratios[name]}


def _lost(examples: Examples, name: str, by_origin: bool) -> str:
    """Where dropping long rows has emptied the group, say so."""
    lost = examples.too_long.filter(outcome="dropped", **{"origin" if by_origin else "task": name}).height
    return f" ({lost} were dropped as too long)" if lost else ""


def _exact(ratios: list[float]) -> list[Fraction]:
    """The ratios as fractions with the sum 1.

    >>> _exact([0.8, 0.15, 0.05]), _exact([1 / 3, 2 / 3])
    ([Fraction(4, 5), Fraction(3, 20), Fraction(1, 20)], [Fraction(1, 3), Fraction(2, 3)])
    """
    found = [Fraction(ratio).limit_denominator(FINEST) for ratio in ratios]
    return [fraction / sum(found) for fraction in found]
