"""The read stage: one task's source as canonical Parquet parts, its instructions, and the rows that cannot be used.

Streams: a part of 16,384 rows is all that is held, and beside it 16 bytes a row to find exact duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import TaskConfig
from curate.manifest.schema import DROPS, TOOL_MESSAGE, canonical_json, content_hash, instruction_uid, sample_uid
from curate.readers import BadRow, Row, read

VERSION = 2
PART = 16_384

CANDIDATE = pl.Struct({"text": pl.String, "rank": pl.Int32, "score": pl.Float64})

ROWS: dict[str, Any] = {
    "uid": pl.String,
    "row": pl.Int64,
    "instruction_uid": pl.String,
    "instruction": pl.String,
    "prompt": pl.List(TOOL_MESSAGE),
    "completion": pl.List(TOOL_MESSAGE),
    "references": pl.List(pl.String),
    "tools": pl.String,
    "license": pl.String,
    "tags": pl.List(pl.String),
    "candidates": pl.List(CANDIDATE),
}


@dataclass(frozen=True)
class Task:
    """One task of the stream as it is read: a source, or one time block of it."""

    config: TaskConfig
    name: str
    stage: int
    block: str | None = None


@dataclass(frozen=True)
class TaskRows:
    """What the read stage made of a task, on disk."""

    task: Task
    folder: Path
    key: str

    def scan(self) -> pl.LazyFrame:
        """All usable rows, lazily, in the order of the source."""
        return pl.scan_parquet(sorted(self.folder.glob("rows-*.parquet")), schema=ROWS, glob=False)

    @property
    def instructions(self) -> pl.DataFrame:
        """uid, instruction, rows, tags (of the tags column); sorted by uid."""
        return pl.read_parquet(self.folder / "instructions.parquet", glob=False)

    @property
    def drops(self) -> pl.DataFrame:
        """Rows that could not be used."""
        return pl.read_parquet(self.folder / "drops.parquet", glob=False)

    @property
    def size(self) -> int:
        """Number of distinct instructions."""
        return self.summary["instructions"]

    @property
    def summary(self) -> dict[str, int]:
        """rows, instructions, dropped."""
        return dict(json.loads((self.folder / "summary.json").read_bytes()))


def row_texts(task: TaskRows) -> list[str]:
    """What a row is embedded as: its prompt's messages, or its document. In the order of uids."""
    rows = task.scan().select("uid", "prompt", "completion").collect().sort("uid")
    return [
        "\n\n".join(m["content"] or "" for m in prompt or completion)
        for prompt, completion in rows.select("prompt", "completion").iter_rows()
    ]


def ingest(task: Task, base: Path, folder: Path, done: Callable[[int], None] = lambda n: None) -> None:
    """Read a task into `folder`; `done(n)` is told of every n rows.

    Raises:
        InputError: the source cannot be read, or has no usable row.
    """
    drops: list[dict[str, Any]] = []
    texts: dict[str, tuple[str, int, set[str]]] = {}  # instruction uid -> text, rows, tags
    seen: set[bytes] = set()
    for number, part in enumerate(_parts(read(task.config, base, task.block))):
        good = [_sample(task, row) for row in part if isinstance(row, Row)]
        drops += [_bad(task, row) for row in part if isinstance(row, BadRow)]
        fresh = []
        for sample in good:
            uid = bytes.fromhex(sample["uid"])
            if uid in seen:
                drops.append(_drop(task, sample["uid"], sample["row"], "the same as an earlier row of the task",
                                   sample["instruction_uid"]))  # fmt: skip
                continue
            seen.add(uid)
            fresh.append(sample)
            text, rows, tags = texts.get(sample["instruction_uid"], (sample["instruction"], 0, set()))
            texts[sample["instruction_uid"]] = (text, rows + 1, tags.union(sample["tags"] or ()))
        pl.DataFrame(fresh, schema=ROWS).write_parquet(folder / f"rows-{number:05d}.parquet")
        done(len(part))
    _finish(folder, drops, texts, len(seen))


def _finish(folder: Path, drops: list[dict[str, Any]], texts: dict[str, tuple[str, int, set[str]]], rows: int) -> None:
    pl.DataFrame(drops, schema=DROPS.schema).write_parquet(folder / "drops.parquet")
    pl.DataFrame(
        [(uid, text, count, sorted(tags)) for uid, (text, count, tags) in sorted(texts.items())],
        schema={"uid": pl.String, "instruction": pl.String, "rows": pl.Int64, "tags": pl.List(pl.String)},
        orient="row",
    ).write_parquet(folder / "instructions.parquet")
    summary = {"rows": rows, "instructions": len(texts), "dropped": len(drops)}
    (folder / "summary.json").write_bytes(canonical_json(summary))


def _parts(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    part: list[Row | BadRow] = []
    for row in rows:
        part.append(row)
        if len(part) == PART:
            yield part
            part = []
    if part:
        yield part


def _sample(task: Task, row: Row) -> dict[str, Any]:
    return {
        "uid": sample_uid(
            task.name,
            row.prompt,
            row.completion,
            row.references,
            row.tools,
            candidates=[(c.text, c.rank) for c in row.candidates],
        ),
        "row": row.row,
        "instruction_uid": instruction_uid(task.name, row.instruction),
        "instruction": row.instruction,
        "prompt": row.prompt,
        "completion": row.completion,
        "references": row.references,
        "tools": row.tools,
        "license": row.license or task.config.license,
        "tags": row.tags,
        "candidates": [{"text": c.text, "rank": c.rank, "score": c.score} for c in row.candidates],
    }


def _bad(task: Task, row: BadRow) -> dict[str, Any]:
    return _drop(task, content_hash({"task": task.name, "digest": row.digest}), row.row, row.reason, None)


def _drop(task: Task, uid: str, row: int, reason: str, instruction: str | None) -> dict[str, Any]:
    # the stage is filled in with the manifest: the same source may stand at another place of another stream
    return {"uid": uid, "task": task.name, "stage": None, "row": row, "step": "read", "reason": reason,
            "instruction_uid": instruction, "score": None}  # fmt: skip
