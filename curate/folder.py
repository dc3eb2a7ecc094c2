"""The folder that a build writes into: its own, writable, and one build's at a time. Nothing foreign is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from curate.errors import InputError
from curate.manifest.io import CARD, PROVENANCE, REPORT, STAGING
from curate.manifest.schema import TABLES

HALF = (".writable.", f".{REPORT}.")  # what a build that was killed may have left beside


@contextmanager
def locked(out: Path, cache: Path | None, sources: Mapping[str, Path]) -> Iterator[None]:
    """Hold `out` for this build.

    Args:
        out: where the manifest goes.
        cache: where results of stages go, if any do.
        sources: name of a task -> its source; a build that writes into one would read itself the next time.

    Raises:
        InputError: a folder cannot be written, holds something else, lies inside a source, or is in use.
    """
    folders = {"out": out} | ({"cache": cache} if cache else {})
    _refuse_own_input(folders, sources)
    refuse_foreign(out)
    for key, folder in folders.items():
        place = folder if key != "out" or folder.exists() else folder.absolute().parent
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe = place / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{key} {place}: cannot be written: {error.strerror}",
                             remedy=f"choose another folder with {key}=FOLDER") from None  # fmt: skip
    lock = FileLock(out.resolve().with_name(f".{out.resolve().name}.lock"))
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise InputError(f"out {out}: another build is running in this folder",
                         remedy="wait for it, or choose another folder with out=FOLDER") from None  # fmt: skip


def _refuse_own_input(folders: Mapping[str, Path], sources: Mapping[str, Path]) -> None:
    for task, path in sources.items():
        source = path.resolve()
        for name, folder in folders.items():
            if source.is_dir() and folder.resolve().is_relative_to(source):
                raise InputError(f"{name} {folder}: lies inside the source of task {task!r} ({path})",
                                 remedy=f"choose another folder with {name}=FOLDER")  # fmt: skip


def refuse_foreign(out: Path) -> None:
    """A folder that holds anything but a manifest is somebody else's: nothing there is touched."""
    ours = {STAGING, CARD, REPORT, *(t.file for t in TABLES.values())}
    wrong = [n for n in (*ours, PROVENANCE) if (out / n).exists() and (out / n).is_dir() != (n == STAGING)]
    if (out.is_symlink() and not out.exists()) or wrong:
        raise InputError(f"out {out}: {wrong[0] if wrong else 'a link to nothing'} is in the way of the manifest",
                         remedy="remove it, or choose another folder with out=FOLDER")  # fmt: skip
    if out.is_dir() and not (out / PROVENANCE).is_file():
        if foreign := sorted(f.name for f in out.iterdir() if f.name not in ours and not f.name.startswith(HALF)):
            raise InputError(f"out {out}: the folder holds other files than a manifest ({foreign[0]!r})",
                             remedy="choose a new folder with out=FOLDER")  # fmt: skip
