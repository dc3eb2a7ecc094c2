"""`export`: a manifest's rows in the format of a trainer. What a format cannot express is listed, never dropped.

A format is a function from a Manifest to rows and `Skipped`s; this file knows their names and writes. All are JSONL,
which `datasets.load_dataset("json", data_files=…)` and the tools themselves read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from curate.errors import InputError
from curate.export import chat, trl
from curate.export.base import Row, Skipped
from curate.files import refuse_existing, replace_text
from curate.manifest import Manifest

Rows = Iterator[Row | Skipped]
INFO = "dataset_info.json"  # where LLaMA-Factory looks data sets up


@dataclass(frozen=True)
class Format:
    """One format: how rows are made, and what reads them."""

    rows: Callable[[Manifest], Rows]
    about: str


FORMATS = {
    "trl-sft": Format(trl.sft, "TRL's SFTTrainer: prompt and completion as messages"),
    "trl-dpo": Format(trl.dpo, "TRL's DPOTrainer: pairs of a better and a worse answer"),
    "trl-prompts": Format(trl.prompts, "TRL's GRPOTrainer: prompts with their references"),
    "alpaca": Format(chat.alpaca, "instruction, input, output, system, history"),
    "llamafactory": Format(chat.llamafactory, f"LLaMA-Factory: ShareGPT, and its entry in {INFO}"),
    "openai": Format(chat.openai, "OpenAI's fine-tuning: messages and tools"),
}


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its rows, and what the format could not express."""

    file: Path
    rows: int
    skipped: list[Skipped]
    skipped_file: Path | None
    notes: list[str]


def rows_of(manifest: Manifest, to: str, *, origins: Collection[str] = (), pairs: str = "rank") -> Rows:
    """Rows of a format, and Skipped for every sample (trl-dpo: prompt) that it cannot express.

    Args:
        manifest: what `curate.manifest.read` gives.
        to: one of FORMATS.
        origins: only samples of these origins; () = all.
        pairs: trl-dpo: what orders two answers, `rank` or `side`.
    """
    if origins:
        manifest = replace(manifest, samples=manifest.samples.filter(pl.col("origin").is_in(list(origins))))
    make = partial(trl.dpo, pairs=pairs) if to == "trl-dpo" else FORMATS[to].rows
    return make(manifest)


def export(
    manifest: Manifest,
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    origins: Collection[str] = (),
    pairs: str = "rank",
    force: bool = False,
) -> Exported:
    """Write a manifest's rows in a format. Each file is whole or not there.

    Args:
        manifest: what `curate.manifest.read` gives.
        to: one of FORMATS.
        out: the file; by default `<run>.<format>.jsonl` beside the run.
        origins: only samples of these origins; () = all.
        pairs: trl-dpo: what orders two answers, `rank` or `side`.
        force: overwrite what an earlier export wrote.

    Raises:
        InputError: a file is in the way, or the format can express no row.
    """
    run = manifest.folder.resolve()
    file = Path(out) if out is not None else run.with_name(f"{run.name}.{to}.jsonl")
    left_out = file.with_name(f"{file.name.removesuffix('.jsonl')}.skipped.jsonl")
    if file.resolve().is_relative_to(run):
        raise InputError(f"{file}: lies inside the manifest", remedy="choose another place with --out")
    for path in (file, left_out):
        refuse_existing(path, force)
    known = _known(file, force) if to == "llamafactory" else None
    rows, skipped = list[Row](), list[Skipped]()
    for each in rows_of(manifest, to, origins=origins, pairs=pairs):
        skipped.append(each) if isinstance(each, Skipped) else rows.append(each)
    if not rows:
        raise _nothing(manifest, to, pairs, skipped, origins)
    left_out.unlink(missing_ok=True)
    if skipped:
        _write(left_out, map(vars, skipped))
    if known is not None:
        text = json.dumps(known | {_name(file): chat.dataset_info(file.name)}, indent=2)
        replace_text(file.with_name(INFO), text + "\n")
    _write(file, rows)
    return Exported(file, len(rows), skipped, left_out if skipped else None, _notes(manifest, to, rows, origins))


def _name(file: Path) -> str:
    return file.name.removesuffix(".jsonl")


def _known(file: Path, force: bool) -> dict[str, Any]:
    """The entries that the folder's dataset_info.json holds; ours is added to them."""
    path = file.with_name(INFO)
    try:
        known = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(known, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a {INFO} of LLaMA-Factory ({error})",
                         remedy="mend it, or choose another folder with --out") from None  # fmt: skip
    if _name(file) in known and not force:
        raise InputError(f"{path}: has an entry {_name(file)!r} already",
                         remedy="add --force, or choose another name with --out")  # fmt: skip
    return known


def _nothing(manifest: Manifest, to: str, pairs: str, skipped: list[Skipped], origins: Collection[str]) -> InputError:
    why = sorted({s.reason for s in skipped})
    other = "side" if pairs == "rank" else "rank"
    remedy = "choose another format"
    if not skipped:
        remedy = "choose other origins" if origins else "build with a task that has rows"
    elif to == "trl-dpo" and manifest.completions[other].is_not_null().any():
        remedy = f"try --pairs {other}"
    elif to == "trl-dpo":
        remedy = "build with ranked or preference data, or with `rollouts` (and `candidates: {similarity: true}`)"
    because = f" ({'; '.join(why[:3])})" if why else ""
    return InputError(f"{manifest.folder}: no row can be written as {to}{because}", remedy=remedy)


def _notes(manifest: Manifest, to: str, rows: list[Row], origins: Collection[str]) -> list[str]:
    """What the user has to know of the file."""
    notes = []
    weighted = manifest.samples.filter(pl.col("weight") != 1)
    weights = sum(not origins or origin in origins for origin in weighted["origin"])
    if weights and not to.endswith(("dpo", "prompts")):
        where = "the column `weight` is for you" if to.startswith("trl") else "they are not in the file"
        notes.append(f"{weights:,} rows have a weight other than 1, which this format does not know: {where}")
    if to == "llamafactory" and any(len(row["conversations"]) > 2 for row in rows):
        notes.append("rows have several answers: set `mask_history: true` to train on the last one alone")
    if to == "openai" and len(rows) < 10:
        notes.append("OpenAI wants at least 10 examples")
    return notes


def _write(path: Path, rows: Iterable[Row]) -> None:
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
