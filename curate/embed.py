"""Vectors of every distinct text of a build, computed once and kept in blocks.

A block is up to 1,024 texts that are embedded together, stored under a hash of the model and of the texts. The last bit
of a vector depends on what shares its batch, so the block and not the text is the unit that is cached: then a build
that was killed, or that finds half of its texts known, still ends with the bytes of an undisturbed one. A text that
several tasks share is embedded with the first of them, and has one vector in the whole build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from curate.errors import InputError
from curate.manifest.schema import content_hash
from curate.models.embedder import ANOTHER_MODEL, Embedder, Vectors
from curate.models.travel import Travels
from curate.store import Store, key_of

VERSION = 1
BLOCK = 1024
STAGE = "embed"
FILE = "embeddings.parquet"


@dataclass(frozen=True)
class Block:
    """Texts that are embedded together."""

    key: str
    texts: tuple[str, ...]


class Embeddings:
    """The vectors of a build. `extend` says which texts are needed, `compute` makes what is missing, `of` reads."""

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder
        self.blocks: list[Block] = []
        self._place: dict[str, tuple[int, int]] = {}  # text -> (block, row)
        self._loaded: dict[int, Vectors] = {}

    def extend(self, texts: Iterable[str]) -> str:
        """Plan the vectors of `texts`; returns a key that names these vectors to the last bit."""
        wanted = sorted(set(texts))
        new = sorted((t for t in wanted if t not in self._place), key=lambda t: (len(t), t))
        for at in range(0, len(new), BLOCK):
            part = tuple(new[at : at + BLOCK])
            for row, text in enumerate(part):
                self._place[text] = (len(self.blocks), row)
            self.blocks.append(Block(key_of(STAGE, VERSION, self.embedder.fingerprint, part), part))
        used = sorted({self._place[t][0] for t in wanted})
        return content_hash([[self.blocks[i].key for i in used], wanted])

    def missing(self) -> list[Block]:
        """Blocks that nobody has computed yet."""
        missing = self.store.missing(STAGE, ((b.key, None) for b in self.blocks))
        return [b for b in self.blocks if b.key in missing]

    def compute(self, done: Callable[[int], None] = lambda n: None) -> None:
        """Embed the missing blocks; `done(n)` is told of every n texts."""
        missing = self.store.missing(STAGE, ((b.key, b.texts) for b in self.blocks))
        stays = not isinstance(self.embedder, Travels)
        self.store.fill(
            STAGE, FILE, missing, partial(_embed, self.embedder), lambda texts: done(len(texts)), here=stays
        )

    def of(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, d] of n planned texts."""
        places = [self._place[t] for t in texts]
        for i in {i for i, _ in places} - self._loaded.keys():
            self._loaded[i] = _read(self._get(self.blocks[i]))
        if len(sizes := {vectors.shape[1] for vectors in self._loaded.values()}) > 1:
            found = " and of ".join(map(str, sorted(sizes)))
            raise InputError(f"{self.embedder.fingerprint}: vectors of {found} numbers", remedy=ANOTHER_MODEL)
        return np.stack([self._loaded[i][row] for i, row in places]) if places else np.zeros((0, 0), np.float32)

    def _get(self, block: Block) -> Path:
        return self.store.get(
            STAGE, block.key, lambda folder: _embed(self.embedder, block.texts).write_parquet(folder / FILE)
        )


def _embed(embedder: Embedder, texts: Sequence[str]) -> pl.DataFrame:
    return pl.DataFrame({"embedding": embedder.encode(texts)})


def _read(folder: Path) -> Vectors:
    return np.asarray(pl.read_parquet(folder / FILE, glob=False)["embedding"].to_numpy(), np.float32)
