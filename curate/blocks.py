"""Work that is bound by a model, done in blocks: what a kill can lose, and what a rebuild need not do again.

A block is a few items that are computed together and stored under a hash of the model, the settings and the items. As
with embeddings, the block and not the item is the unit, since the last bit of a number depends on what shares a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import polars as pl

from curate.store import Store, key_of

Item = TypeVar("Item")
Advance = Callable[[int], None]
RESULT = "result.parquet"


@dataclass(frozen=True)
class Blocks(Generic[Item]):
    """Items of one stage, cut into blocks.

    Args:
        store: where results are kept.
        stage: name of the stage in the store.
        how: JSON values that decide the result besides the items: version, model, settings.
        items: what is worked on, in a fixed order.
        names: one text an item that stands for all that the work sees of it (a uid, say).
        size: items a block.
    """

    store: Store
    stage: str
    how: Sequence[Any]
    items: Sequence[Item]
    names: Sequence[str]
    size: int

    @property
    def parts(self) -> list[tuple[str, Sequence[Item]]]:
        """(key, items) of every block."""
        starts = range(0, len(self.items), self.size)
        return [
            (key_of(self.stage, 1, *self.how, list(self.names[at : at + self.size])), self.items[at : at + self.size])
            for at in starts
        ]

    @property
    def keys(self) -> list[str]:
        """The blocks' keys: together they name the whole result."""
        return [key for key, _ in self.parts]

    @property
    def left(self) -> int:
        """Items in blocks that nobody has computed yet."""
        return sum(len(items) for key, items in self.parts if not self.store.has(self.stage, key))

    def frames(
        self, make: Callable[[Sequence[Item]], pl.DataFrame], done: Advance = lambda n: None, here: bool = False
    ) -> list[pl.DataFrame]:
        """The result of every block, computed by `make` where it is missing; `done(n)` is told of every n new items.

        `make` goes to where the engine computes, so it must be one that can be pickled, unless `here` is set.
        """
        missing = self.store.missing(self.stage, self.parts)
        self.store.fill(self.stage, RESULT, missing, make, lambda items: done(len(items)), here=here)
        return [pl.read_parquet(self.store.path(self.stage, key) / RESULT, glob=False) for key in self.keys]
