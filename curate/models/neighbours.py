"""The radius graph of DBSCAN, block by block, on a CPU or a GPU: no n × n matrix is held.

Near = x·y ≥ `nearness`. A block is some rows against all rows from its first one on (the graph is symmetric), tile by
tile. Of a tile with few near pairs the pairs come back. One with many is only counted, and looked at again when it is
known which rows are cores; what it says then is at most a few numbers a row. So a cluster may be as dense as it likes.
Blocks know nothing of each other: an engine may spread them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]

BLOCK, TILE = 1024, 4096  # rows of a block, columns of a tile: 16 MB of products are held
FEW = 1 << 17  # near pairs of a tile that are listed
NONE = 1 << 62  # a label that is none
MOST = 1 << 18  # near pairs of a block that are listed: 2 MB, so at most 2 KB a row


class Near:
    """Unit vectors [n, d] of which some are near each other."""

    def __init__(self, units: NDArray[np.float32], nearness: float, device: str) -> None:
        self.units, self.nearness, self.device = units, nearness, device

    def __len__(self) -> int:
        return len(self.units)

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("units", "nearness", "device")}

    @property
    def blocks(self) -> list[tuple[str, tuple[int, int]]]:
        """(name, rows from and to) of every block."""
        return [(str(at), (at, min(at + BLOCK, len(self)))) for at in range(0, len(self), BLOCK)]

    @cached_property
    def _tensor(self) -> Any:
        import torch

        return torch.from_numpy(np.array(self.units)).to(self.device)

    def tile(self, a: int, b: int, c: int) -> Any:
        """Bool [b − a, at most TILE]: which rows from c on the rows a:b are near to."""
        return self._tensor[a:b] @ self._tensor[c : c + TILE].T >= self.nearness


@dataclass(frozen=True)
class Counted:
    """What a block a:b says at first sight."""

    rows: tuple[int, int]
    own: Ints  # [b − a] near rows from a on, itself among them
    others: Ints  # [n − b] rows of the block that each row from b on is near to
    pairs: NDArray[np.int32]  # [e, 2] near pairs, the lower row first, of all tiles but the dense ones
    dense: list[int]  # first columns of tiles whose pairs are not listed


def count(near: Near, rows: tuple[int, int]) -> Counted:
    """Degrees and pairs of a block."""
    a, b = rows
    own, others = np.zeros(b - a, np.int64), np.zeros(len(near) - a, np.int64)
    pairs, listed, dense = [np.zeros((0, 2), np.int32)], 0, list[int]()
    for c in range(a, len(near), TILE):
        hit = near.tile(a, b, c)
        width = hit.shape[1]
        if (n := _number(hit)) <= FEW and listed + n <= MOST:
            i, j = _places(hit)
            own += np.bincount(i, minlength=b - a)
            others[c - a : c - a + width] += np.bincount(j, minlength=width)
            i, j = i + a, j + c
            pairs.append(np.stack([i, j], axis=1)[i < j].astype(np.int32))
            listed += len(pairs[-1])
        else:
            number = hit.float()  # sums of floats are vectorised, those of bools are not
            own += number.sum(1).cpu().numpy().astype(np.int64)
            others[c - a : c - a + width] += number.sum(0).cpu().numpy().astype(np.int64)
            dense.append(c)
    return Counted(rows, own, others[b - a :], np.concatenate(pairs), dense)


def joined(near: Near, core: NDArray[np.bool_], component: Ints, block: Counted) -> Ints:
    """[e, 2] pairs of components that the dense tiles of a block join, by cores that are near each other.

    A tile is worked off from pivots: the row with the most near columns outside of its component is joined with them,
    and with every row that is near one of them, until few pairs are left. A dense cluster takes one pivot or two.
    """
    import torch

    (a, b), component = block.rows, component.copy()
    before = component.copy()
    for c in block.dense:
        hit = near.tile(a, b, c)
        d = c + hit.shape[1]
        hit &= torch.from_numpy(core[a:b, None] & core[None, c:d]).to(near.device)
        while True:
            mine, theirs = (torch.from_numpy(component[s:e]).to(near.device) for s, e in ((a, b), (c, d)))
            left = hit & (mine[:, None] != theirs[None, :])
            number = left.float().sum(1)
            if int(number.sum()) <= FEW:
                i, j = _places(left)
                component = merge(component, np.stack([i + a, j + c], axis=1))
                break
            pivot = int(number.argmax())
            columns = left[pivot].nonzero()[:, 0]
            rows = hit[:, columns].any(1).nonzero()[:, 0]
            members = np.concatenate([rows.cpu().numpy() + a, columns.cpu().numpy() + c])
            component = merge(component, np.stack([np.full(len(members), pivot + a), members], axis=1))
    first = np.unique(component, return_index=True)[1]
    return np.unique(np.stack([before, before[first[component]]], axis=1), axis=0)


def merge(component: Ints, pairs: Ints) -> Ints:
    """Join the components [n], numbered from 0 without gaps, of the rows that `pairs` [e, 2] connects."""
    ends = component[pairs]
    size = int(component.max(initial=-1)) + 1
    graph = sp.coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)[component]


def lowest(near: Near, labels: Ints, block: Counted) -> list[tuple[int, Ints]]:
    """(first row, smallest label that each row from there on is near to) of both sides of each dense tile.

    `labels` [n] has NONE where a row is no core. A side without such rows is left out.
    """
    import torch

    (a, b), given, found = block.rows, torch.from_numpy(labels).to(near.device), list[tuple[int, Ints]]()
    for c in block.dense:
        hit = near.tile(a, b, c)
        d = c + hit.shape[1]
        if (labels[a:b] == NONE).any():
            found.append((a, torch.where(hit, given[None, c:d], NONE).amin(1).cpu().numpy()))
        if (labels[c:d] == NONE).any():
            found.append((c, torch.where(hit, given[a:b, None], NONE).amin(0).cpu().numpy()))
    return found


def _number(hit: Any) -> int:
    """How many entries are true: NumPy counts them faster than torch on a CPU."""
    return int(np.count_nonzero(hit.numpy())) if hit.device.type == "cpu" else int(hit.count_nonzero())


def _places(hit: Any) -> tuple[Ints, Ints]:
    """(rows, columns) of the true entries."""
    on_cpu = hit.device.type == "cpu"
    flat = np.flatnonzero(hit.numpy()) if on_cpu else hit.flatten().nonzero()[:, 0].cpu().numpy()
    return np.divmod(flat, hit.shape[1])
