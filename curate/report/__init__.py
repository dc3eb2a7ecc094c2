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
from curate.files import refuse_existing, replace_text
from curate.manifest import Manifest, read
from curate.manifest.io import REPORT
from curate.manifest.remote import Remote, is_url
from curate.report.page import key_of, mark, page
from curate.storage import as_input_error

__all__ = ["is_current", "report", "write_report"]


def report(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, force: bool = False) -> Path | str:
    """Make the page of a manifest, in its folder, at its URL, or at `out`; returns where it lies.

    Args:
        run: folder of a manifest, or its URL.
        out: where the page goes instead; not a place in `run`.
        force: overwrite the file that is there.

    Raises:
        ManifestError: `run` is not a sound manifest.
        InputError: `out` is there already, or cannot be written; or the tables do not fit together.
    """
    manifest = read(run)
    if out is not None:
        path, folder = Path(out), manifest.folder.resolve()
        if folder in path.resolve().parents and path.resolve() != folder / REPORT:
            raise InputError(f"{path}: inside the manifest", remedy=f"leave out= away: the page goes to {REPORT} there")
        if path.resolve() != folder / REPORT:
            refuse_existing(path, force, "out=")
    try:
        file = write_report(manifest, Path(out) if out is not None else None)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, pl.exceptions.PolarsError):
        raise InputError(f"{run}: the tables do not fit together, so there is no page of them",
                         remedy=f"`curate check {run}` says what is wrong") from None  # fmt: skip
    if out is None and isinstance(run, str) and is_url(run):
        with as_input_error():
            remote = Remote.of(run)
            remote.put(file, REPORT)
        return f"{remote.url}/{REPORT}"
    return file


def is_current(manifest: Manifest) -> bool:
    """True where the page in the manifest's folder is of this manifest and this version of the page."""
    wanted = mark(key_of(manifest)).encode()
    try:
        with (manifest.folder / REPORT).open("rb") as file:
            begins = wanted in file.read(1024)
            file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return begins and file.read().rstrip().endswith(b"</html>")
    except OSError:
        return False


def write_report(manifest: Manifest, path: Path | None = None) -> Path:
    """Write the page, whole or not at all."""
    path = path or manifest.folder / REPORT
    elsewhere = f"`curate report {manifest.folder} out=page.html` makes it elsewhere; the manifest is whole"
    if path.is_dir():
        raise InputError(f"{path}: a folder is in the way of the page", remedy=f"move it away; {elsewhere}")
    try:
        replace_text(path, page(manifest))
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written: {error.strerror}",
                         remedy=f"make room or mend the path; {elsewhere}") from None  # fmt: skip
    return path
