"""`report.html`: what a model will forget, what was picked against it, and why each row is there; one file, offline.

The page is a view of the manifest and no part of it: nothing reads it, no hash of it is kept, and `curate report` makes
it again from the tables. The same tables give the same bytes. It begins with a key of what it shows, so a build knows
whether the page that lies there is of this manifest.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from curate.errors import InputError
from curate.manifest import Manifest, read
from curate.manifest.io import REPORT, sync
from curate.report.page import key_of, mark, page

__all__ = ["is_current", "report", "write_report"]


def report(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Make the page of a manifest, in its folder or at `out`; returns where it lies.

    Raises:
        ManifestError: `run` is not a sound manifest.
        InputError: `out` cannot be written, or the tables do not fit together.
    """
    manifest = read(run)
    try:
        return write_report(manifest, Path(out) if out is not None else None)
    except (TypeError, LookupError, ArithmeticError, pl.exceptions.PolarsError):
        raise InputError(f"{run}: the tables do not fit together, so there is no page of them",
                         remedy=f"`curate check {run}` says what is wrong") from None  # fmt: skip


def is_current(manifest: Manifest) -> bool:
    """True where the page in the manifest's folder is of this manifest and this version of the page."""
    wanted = mark(key_of(manifest)).encode()
    try:
        with (manifest.folder / REPORT).open("rb") as file:
            return wanted in file.read(1024)
    except OSError:
        return False


def write_report(manifest: Manifest, path: Path | None = None) -> Path:
    """Write the page, whole or not at all."""
    path = path or manifest.folder / REPORT
    half = path.with_name(f".{path.name}")  # a killed run's is written over by the next one
    if path.is_dir():
        raise InputError(f"{path}: a folder is in the way of the page", remedy="name a file: out=page.html")
    try:
        half.write_text(page(manifest), encoding="utf-8", newline="\n")
        sync(half)
        os.replace(half, path)
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written: {error.strerror}",
                         remedy="make room or mend the path, or name another one: out=page.html") from None  # fmt: skip
    finally:
        half.unlink(missing_ok=True)
    return path
