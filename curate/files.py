"""Single files that a command writes for a user: whole or not there, and nothing is overwritten unasked."""

from __future__ import annotations

import os
from pathlib import Path

from curate.errors import InputError
from curate.manifest.io import sync


def refuse_existing(path: Path, force: bool, option: str = "--out") -> None:
    """What is there already stays there without `force`; a folder stays in any case."""
    if path.is_dir() or (path.exists() and not force):
        more = "" if path.is_dir() else "add --force, "
        raise InputError(f"{path}: is there already",
                         remedy=f"move it away, {more}or choose another place with {option}")  # fmt: skip


def replace_text(path: Path, text: str) -> None:
    """Write a text beside its place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8", newline="\n")
        sync(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
