"""The radius graph of DBSCAN, block by block, on a CPU or a GPU: no n × n matrix, and no list of neighbours, is held.

Near = x·y ≥ `nearness`. A block is some rows against all rows behind them (the graph is symmetric), tile by tile; what
comes back of it is at most a few numbers a row. Blocks know nothing of each other, so that an engine may spread them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BLOCK = 1024  # rows of a block
TILE = 8192  # columns that are held at once: 32 MB of products

Rows = tuple[int, int]  # from, to


class Near:
    """Unit vectors [n, d] of which some are near each other."""

    def __init__(self, units: NDArray[np.float32], nearness: float, device: str) -> None:
        self.units, self.nearness, self.device = units, nearness, device

    def __len__(self) -> int:
        return len(self.units)

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("units", "nearness", "device")}

    def some(self, rows: Ints) -> Near:
        """Those rows alone."""
        return Near(self.units[rows], self.nearness, self.device)

    @property
    def blocks(self) -> list[tuple[str, Rows]]:
        """(name, rows) of every block."""
        return [(str(at), (at, min(at + BLOCK, len(self)))) for at in range(0, len(self), BLOCK)]

    @cached_property
    def _tensor(self) -> Any:
        import torch

        return torch.from_numpy(np.array(self.units)).to(self.device)

    def tiles(self, rows: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
        """(first column, near [b, at most TILE]) of `rows` [b, d] against all rows from `start` on."""
        for at in range(start, len(self), TILE):
            yield at, rows @ self._tensor[at : at + TILE].T >= self.nearness


def degrees(near: Near, rows: Rows) -> tuple[Ints, Ints]:
    """(how many of the rows from a on each row of a block a:b is near to, how many of a:b each row from b on is)."""
    a, b = rows
    own, others = np.zeros(b - a, np.int64), np.zeros(len(near) - a, np.int64)
    for at, tile in near.tiles(near._tensor[a:b], a):
        own += tile.sum(1).cpu().numpy()
        others[at - a : at - a + tile.shape[1]] = tile.sum(0).cpu().numpy()
    return own, others[b - a :]


def edges(near: Near, rows: Rows) -> Ints:
    """[e, 2] pairs that connect all that a block a:b connects, among the rows from a on; at most one pair a row.

    Rows of the block that share a neighbour are joined first: near · onehot(first near row of each column) is a graph
    of the block's rows alone. Every other row then needs one pair, to the group of any row that is near it.
    """
    import torch
    from scipy.sparse.csgraph import connected_components

    a, b = rows
    shared = torch.zeros((b - a, b - a), device=near.device)
    firsts = []
    for at, tile in near.tiles(near._tensor[a:b], a):
        found = tile.any(0).nonzero()[:, 0]
        tile = tile[:, found]
        first = tile.byte().argmax(0)
        several = tile.sum(0) > 1
        if several.any():
            onehot = torch.nn.functional.one_hot(first[several], b - a).float()
            shared += tile[:, several].float() @ onehot
        firsts.append(np.stack([(found + at).cpu().numpy(), first.cpu().numpy()]))
    column, first = np.concatenate(firsts, axis=1)
    group = connected_components((shared > 0).cpu().numpy(), directed=False)[1]
    head = np.unique(group, return_index=True)[1] + a  # first row of each group
    of_rows = np.stack([np.arange(a, b), head[group]], axis=1)
    return np.concatenate([of_rows, np.stack([column, head[group[first]]], axis=1)])


def lowest(near: Near, labels: Ints, rows: NDArray[np.float32]) -> Ints:
    """Smallest of `labels` [n] among the rows that each of `rows` [b, d] is near to; the largest integer where none."""
    import torch

    none = torch.iinfo(torch.int64).max
    found = torch.full((len(rows),), none, device=near.device)
    given = torch.from_numpy(labels).to(near.device)
    block = torch.from_numpy(np.array(rows)).to(near.device)
    for at, tile in near.tiles(block):
        least = torch.where(tile, given[at : at + tile.shape[1]], none).amin(1)
        found = torch.minimum(found, least)
    return np.asarray(found.cpu().numpy())
