"""A folder that a command writes into: that it is ours alone, that nothing of others is in it, and what a run leaves.

It knows names of files and nothing of what is in them, but for the marks of checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from polars.exceptions import PolarsError
from safetensors import SafetensorError

from curate.errors import InputError
from curate.manifest.io import sha256_file

MARK = "rehearse.json"  # last file of a checkpoint: a folder without it is not whole
MODEL, FACTS, LOCK = "model", "run.json", ".lock"
RUN = (FACTS, MODEL, "buffer", "checkpoint-*", "log.jsonl", "lineage.parquet", "too_long.parquet", "left_out.parquet",
       "rollouts", "value.safetensors", ".value.safetensors", "runs", f".{FACTS}", ".lineage.parquet", ".log.jsonl",
       f".{MODEL}", LOCK)  # fmt: skip
"""What a run may have left in its folder (`runs` are TensorBoard's)."""
SMALL = 1 << 20  # bytes up to which a file of a checkpoint is hashed; of larger ones the size must do


def refuse_foreign(out: Path, own: Collection[str], inputs: Iterable[Path] = (), where: str = "out") -> None:
    """Whether a command may write into a folder.

    Args:
        out: the folder; it need not be there.
        own: names, or patterns of names, that the command itself writes.
        inputs: what the command reads; none of it may lie in the folder, nor be the folder.
        where: key of the settings, for errors.

    Raises:
        InputError: it is no folder, holds files of others, or an input.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):  # `Path` has folded the slashes of a URL
        raise InputError(f"{where} {out}: a URL", remedy="choose a folder, and copy it there when it is done")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"{where} {out}: a file, not a folder", remedy="choose another folder")
    if out.is_symlink():
        raise InputError(f"{where} {out}: a link", remedy=f"name the folder itself: {where}={out.resolve()}")
    here = out.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == here or here in path.resolve().parents):
            raise InputError(f"{where} {out}: {path}, which is read, lies in it", remedy="choose a new folder")
    try:
        names = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{where} {out}: {error.strerror or error}", remedy="choose another folder") from None
    if odd := next((n for n in names if n in ("buffer", MODEL, "rollouts") and (
        (out / n).is_symlink() or not (out / n).is_dir())), None):  # fmt: skip
        raise InputError(f"{where} {out}: {odd} in it is no folder of a run", remedy="choose a new folder")
    if other := next((n for n in names if not any(fnmatch(n, pattern) for pattern in own)), None):
        raise InputError(f"{where} {out}: the folder holds other files than this command writes, as {other!r}",
                         remedy="choose a new folder")  # fmt: skip


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside, no other process of ours writes into the folder.

    Raises:
        InputError: another one does, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"out {out}: another run is writing into it",
                         remedy="wait for it, or choose another folder") from None  # fmt: skip
    except OSError as error:
        raise InputError(f"out {out}: {error.strerror or error}", remedy="choose another folder") from None
    try:
        yield
    finally:
        lock.release()
        (out / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # a run that was refused leaves no folder
            out.rmdir()


def clear(out: Path) -> None:
    """Remove what a run has left; the lock stays."""
    for entry in out.iterdir() if out.is_dir() else ():
        if entry.name != LOCK and any(fnmatch(entry.name, pattern) for pattern in RUN):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def whole(path: Path, remedy: str) -> Iterator[None]:
    """What is written inside: all of it, or it is gone and the error says what to do.

    Raises:
        InputError: the disk is full, or refuses otherwise.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, PolarsError) as error:
        if isinstance(error, PolarsError) and "os error" not in str(error).lower():
            raise
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's way to say so
            raise
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be written: {getattr(error, 'strerror', None) or error}",
                         remedy=f"make room; {remedy}") from None  # fmt: skip


# --- checkpoints ---


def mark(checkpoint: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Say that a checkpoint is whole, what it belongs to, and which files it has."""
    files = {f.relative_to(checkpoint).as_posix(): _print_of(f) for f in sorted(checkpoint.rglob("*"))
             if f.is_file() and f.name != MARK}  # fmt: skip
    text = json.dumps({"step": step, **identity, "files": files}, sort_keys=True)
    temporary = checkpoint / f".{MARK}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, checkpoint / MARK)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: nothing."""
    try:
        files = json.loads((checkpoint / MARK).read_bytes())["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no {MARK} that can be read"
    for name, stored in files:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is not there"
        if _print_of(file) != stored:
            return f"{name} is not what was written"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    found = [f for f in folder.glob("checkpoint-*") if f.name[11:].isdigit() and fault(f) is None]
    return sorted(found, key=lambda f: int(f.name[11:]))


def resumable(
    out: Path, identity: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint of this run, what was wrong with newer ones).

    `facts` are those of this run: where they are given, an error names what differs.

    Raises:
        InputError: the folder is of a run of another method, other data or other settings.
    """
    whole_ones = checkpoints(out)
    last = whole_ones[-1] if whole_ones else None
    step = int(last.name[11:]) if last else -1
    newer = [f for f in out.glob("checkpoint-*") if f.name[11:].isdigit() and int(f.name[11:]) > step]
    damaged = [f"{f}: {fault(f)}" for f in sorted(newer) if (f / MARK).is_file()]
    if last is not None:
        _check_identity(last, json.loads((last / MARK).read_bytes()), identity, facts)
    elif (out / MODEL).is_dir():
        try:
            stored = json.loads((out / FACTS).read_bytes())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{out / FACTS}: cannot be read, so it cannot be told whose model is there",
                             remedy="choose another folder, or start anew with resume=false") from None  # fmt: skip
        _check_identity(out, stored, identity, facts)
    return last, damaged


def _check_identity(
    folder: Path, stored: Mapping[str, Any], mine: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> None:
    for key, value in mine.items():
        if stored.get(key) != value:
            out = folder if (folder / FACTS).is_file() else folder.parent
            differs = _differences(out, facts or {}) or [f"{key} is {stored.get(key)!r}, here {value!r}"]
            raise InputError(
                f"{folder}: of another run: {'; '.join(differs[:5])}{' …' if len(differs) > 5 else ''}",
                remedy="choose another folder with out=FOLDER, or start anew with resume=false",
            )


def _differences(out: Path, facts: Mapping[str, Any]) -> list[str]:
    """What run.json says there and here."""
    try:
        theirs = json.loads((out / FACTS).read_bytes())
        mine = json.loads(json.dumps(facts, default=str))
        found = [] if theirs["method"] == mine["method"] else [f"method is {theirs['method']}, here {mine['method']}"]
        for kind in ("settings", "training", "data", "inputs"):
            there, here = _flat(theirs[kind]), _flat(mine[kind])
            found += [f"{key} is {there.get(key, 'not given')!r}, here {here.get(key, 'not given')!r}"
                      for key in sorted({*there, *here}) if there.get(key) != here.get(key)]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return found


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Sections by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and bool(value)
        found |= _flat(value, f"{before}{key}.") if inner else {before + key: value}
    return found


def _print_of(file: Path) -> list[Any]:
    """[size, hash of a small file]."""
    size = file.stat().st_size
    return [size, sha256_file(file)] if size <= SMALL else [size]
