"""COPR's buffers R_i: what a stage leaves behind so that later ones can hold its optimum.

A buffer is a manifest of some prompts of the task with their ranked answers, and beside it `targets.parquet` (log P*_i
of every answer) and `buffer.json` (what log P*_i was computed with). It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.errors import InputError
from curate.manifest import Manifest, part, read, write
from curate.manifest.io import sha256_file
from curate.manifest.markdown import escape
from curate.models.local import tokenizer_fingerprint
from train.sets import Sets

TARGETS, FACTS = "targets.parquet", "buffer.json"


def chosen(uids: list[str], keep: float, seed: int) -> list[int]:
    """Places of a buffer's prompts: a share of them, at least one, by a hash of seed and uid; ascending."""
    n = max(1, round(keep * len(uids))) if keep > 0 else 0
    places = sorted(range(len(uids)), key=lambda i: hashlib.sha256(f"{seed}/{uids[i]}".encode()).digest())
    return sorted(places[:n])


def write_buffer(
    folder: Path, manifest: Manifest, sets: Sets, rows: list[int], tokenizer: Any, facts: dict[str, Any]
) -> Path:
    """Write the buffer of some prompts.

    Args:
        folder: of the buffer.
        manifest: that the sets are of.
        sets: with their targets.
        rows: the prompts.
        tokenizer: of the model.
        facts: beta, reduction, seed, task, policy (weight hash of π_{t-1}): what log P* depends on.
    """
    prompts = [sets.rows.uid[row] for row in rows]
    answers = [k for row in rows for k in sets.answers(row)]
    kept = manifest.completions.filter(pl.col("uid").is_in([sets.uid[k] for k in answers]))
    frames, provenance = part(manifest, prompts, kept, "a buffer of COPR")
    (folder / FACTS).unlink(missing_ok=True)  # a buffer without it is none
    card = (
        f"# Buffer of {escape(facts['task'])}\n\n{len(rows)} prompts with their ranked answers, kept by COPR for the "
        f"stages after this one. `{TARGETS}`: log P* of each answer over its prompt's own, nats, with "
        f"β = {facts['beta']} and log π of an answer as the {facts['reduction']} over its tokens. `{FACTS}`: what they "
        "were computed with.\n"
    )
    write(folder, frames, {**provenance, "buffer": facts}, card)
    table = pl.DataFrame({"uid": [sets.uid[k] for k in answers], "log_target": sets.target[answers]})
    table.sort("uid").write_parquet(folder / TARGETS)
    whole = {
        **facts,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "targets": sha256_file(folder / TARGETS),
        "manifest": sha256_file(folder / "provenance.json"),
    }
    (folder / FACTS).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _targets(path: Path) -> dict[str, float]:
    """Log P* of each completion.

    Raises:
        ValueError: not two columns, a uid twice, or a value that no log-probability has.
    """
    table = pl.read_parquet(path, glob=False)
    if table.schema != {"uid": pl.String, "log_target": pl.Float64} or table["uid"].is_duplicated().any():
        raise ValueError(f"{path.name}: not one log_target for each uid")
    values = table["log_target"]
    if values.null_count() or not values.is_finite().all() or (table.height and float(values.max()) > 1e-9):  # type: ignore[arg-type]
        raise ValueError(f"{path.name}: a log P* that is no log-probability")
    return dict(table.iter_rows())


def read_buffer(folder: Path, tokenizer: Any, beta: float, reduction: str, **how: Any) -> tuple[str, Sets]:
    """(name of the task, its sets with log P*); `how` as `Sets.of` takes it.

    Raises:
        InputError: no buffer, one that was edited, or one of another tokenizer, β or reduction.
    """
    if not (folder / FACTS).is_file():
        inside = folder / "buffer"
        raise InputError(
            f"buffer {folder}: not a buffer: it has no {FACTS}",
            remedy=f"did you mean {inside}?" if (inside / FACTS).is_file()
            else "name the folder `buffer` of a finished `train copr` run",
        )  # fmt: skip
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        stored = _targets(folder / TARGETS)
        if not isinstance(facts["task"], str):
            raise ValueError("task is no name")
        for name, key in ((TARGETS, "targets"), ("provenance.json", "manifest")):
            if sha256_file(folder / name) != facts[key]:
                raise InputError(f"buffer {folder}: {name} is not what its stage wrote", remedy="run that stage again")
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"buffer {folder}: not a buffer: {error!r}",
                         remedy="name the folder `buffer` of a finished `train copr` run") from None  # fmt: skip
    mine = {"tokenizer": tokenizer_fingerprint(tokenizer), "beta": beta, "reduction": reduction}
    for key, value in mine.items():
        if facts.get(key) != value:
            raise InputError(
                f"buffer {folder}: its log P* was computed with {key} {facts.get(key)!r}, this run has {value!r}",
                remedy="use the same one in all stages: log P* of different ones cannot be compared",
            )
    sets = Sets.of(read(folder), tokenizer, kind="ranked", **how)
    if missing := [uid for uid in sets.uid if uid not in stored]:
        raise InputError(f"buffer {folder}: {TARGETS} has no row for completion {missing[0]}",
                         remedy="run that stage again")  # fmt: skip
    target = np.array([stored[uid] for uid in sets.uid], np.float64)
    for row in range(len(sets)):  # of the answers that are left where others did not fit
        at = slice(int(sets.bounds[row]), int(sets.bounds[row + 1]))
        target[at] -= np.logaddexp.reduce(target[at])
    return facts["task"], replace(sets, target=target)
