"""Results of stages on disk, each under a key of what made it.

A result is a folder `<root>/<stage>/<key>/`. It appears whole, by one rename, or not at all; so a build killed at any
moment finds all that it had finished. Keys are hashes of inputs, the stage's own configuration and its code version:
equal keys mean equal bytes, which is why several builds may share one store.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from curate.engine import Engine, Local
from curate.manifest.io import sha256_file, sync
from curate.manifest.schema import content_hash

PACKAGES = {
    "embed": ("torch", "transformers", "sentence-transformers"),
    "distance": ("POT", "numpy", "scikit-learn"),
    "tags": ("spacy", "spacy-lookups-data"),
    "sample": ("numpy", "scikit-learn"),
    "generate": ("torch", "transformers"),
    "loss": ("torch", "transformers"),
    "room": ("transformers",),
    "tokenizer": ("transformers",),
    "reward": ("rouge-score", "torch", "transformers"),
    "mi": ("numpy", "scipy", "spacy", "spacy-lookups-data"),
}


def key_of(stage: str, version: int, *parts: Any) -> str:
    """Key of a result: what went in (JSON values: configuration and upstream keys) and the code that made it.

    The code is the stage's own version and those of the libraries whose numbers the result holds.
    """
    return content_hash([stage, version, _versions(stage), *parts])


@cache
def _versions(stage: str) -> list[str]:
    return [package_version(name) for name in PACKAGES.get(stage, ())]


STAGES = ("read", "embed", "distance", "tags", "score", "sample",
          "generate", "loss", "room", "tokenizer", "reward", "mi")  # fmt: skip
_HOST = content_hash(platform.node())[:8]  # a process number means something on its own machine only
_HALF = re.compile(r"\.[0-9a-f]{32}\.([0-9a-f]{8})-([0-9]{1,9})\.[0-9a-f]{8}")
CONTENTS = "contents.json"  # file name -> sha256, in every result


Item = TypeVar("Item")


class Store:
    """Stage results by (stage, key). `engine` computes those that are missing."""

    def __init__(self, root: Path, engine: Engine | None = None) -> None:
        self.root, self.engine = root, engine or Local()

    def path(self, stage: str, key: str) -> Path:
        """Where a result is or will be."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """True where the result is there."""
        return self.path(stage, key).is_dir()

    def get(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """The result's folder; `make(folder)` fills it first where it is missing, or where its bytes were changed."""
        path = self.path(stage, key)
        if not self._whole(path):
            with self._new(path) as folder:
                make(folder)
        return path

    def missing(self, stage: str, parts: Iterable[tuple[str, Item]]) -> dict[str, Item]:
        """Those of `parts` (key, item) whose result is not there, or was damaged; equal keys are one result."""
        return {key: item for key, item in parts if not self._whole(self.path(stage, key))}

    def fill(
        self,
        stage: str,
        file: str,
        missing: Mapping[str, Item],
        make: Callable[[Any], pl.DataFrame],
        done: Callable[[Item], None] = lambda item: None,
        prepare: Callable[[Item], Any] = lambda item: item,
        here: bool = False,
    ) -> None:
        """Compute missing results, each a table `make(prepare(item))` in `file`, by the engine.

        Args:
            stage: name of the stage.
            file: name of the table in a result's folder.
            missing: key -> item.
            make: can be pickled; runs where the engine computes.
            done: told of every item whose result is there now.
            prepare: runs here, just before an item is handed out: texts looked up, say.
            here: in this process, whatever the engine is.
        """
        ready = ((key, prepare(item)) for key, item in missing.items())
        for key, frame in (Local() if here else self.engine).map(make, ready):
            self.get(stage, key, partial(_write, frame, file))
            done(missing[key])

    def _whole(self, path: Path) -> bool:
        """Whether a result is there with the bytes that were stored; a damaged one is removed."""
        if path.is_dir() and not _sound(path):
            shutil.rmtree(path)
        elif path.exists() and not path.is_dir():
            path.unlink()
        return path.is_dir()

    @contextmanager
    def _new(self, path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{_HOST}-{os.getpid()}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            yield temporary
            hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            (temporary / CONTENTS).write_text(json.dumps(hashes), encoding="utf-8")
            for file in temporary.iterdir():
                sync(file)
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.is_dir():  # another build may have finished the same result first: equal key, equal bytes
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed builds of this machine left half-written: names that only this class gives."""
        for stage in STAGES:
            for leftover in (self.root / stage).glob(".*"):
                match = _HALF.fullmatch(leftover.name)
                if match and match[1] == _HOST and not _alive(int(match[2])):
                    shutil.rmtree(leftover, ignore_errors=True)


def _write(frame: pl.DataFrame, file: str, folder: Path) -> None:
    frame.write_parquet(folder / file)


def _sound(path: Path) -> bool:
    """True where a result still has the bytes that were stored."""
    try:
        hashes = json.loads((path / CONTENTS).read_bytes())
        whole = hashes.keys() == {file.name for file in path.iterdir()} - {CONTENTS}
        return bool(hashes) and whole and all(sha256_file(path / name) == sha for name, sha in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
