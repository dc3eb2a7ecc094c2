"""The read stage: one task's source as canonical Parquet parts, its instructions, and the rows that cannot be used.

Streams: a part of 16,384 rows is all that is held, and beside it 16 bytes a row to find exact duplicates. The rows are
stored in the order of their uids, which is that of every draw and of samples.parquet, by an external sort.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import TaskConfig
from curate.manifest.schema import DROPS, TOOL_MESSAGE, canonical_json, content_hash, instruction_uid, sample_uid
from curate.readers import BadRow, Row, read

VERSION = 3
PART = 16_384
MOST_SPLITS = 100  # values of a split column that are remembered
SORTED = 262_144, 1 << 26  # rows, and bytes on the disk, that are sorted at once

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
        """All usable rows, lazily, in the order of their uids."""
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
        return {name: n for name, n in self._facts.items() if name != "splits"}

    @property
    def splits(self) -> list[str]:
        """Values of the split column, where the task chooses none of them."""
        return list(self._facts.get("splits", ()))  # kept results may be of a version that did not look

    @property
    def _facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_bytes()))


def row_texts(task: TaskRows) -> list[str]:
    """What a row is embedded as: its prompt's messages, or its document. In the order of uids."""
    rows = task.scan().select("prompt", "completion").collect()
    return ["\n\n".join(m["content"] or "" for m in prompt or completion) for prompt, completion in rows.iter_rows()]


def ingest(task: Task, base: Path, folder: Path, done: Callable[[int], None] = lambda n: None) -> None:
    """Read a task into `folder`; `done(n)` is told of every n rows.

    Raises:
        InputError: the source cannot be read, or has no usable row.
    """
    with _uncollected():
        _ingest(task, base, folder, done)


def _ingest(task: Task, base: Path, folder: Path, done: Callable[[int], None]) -> None:
    drops: list[dict[str, Any]] = []
    texts: dict[str, _Instruction] = {}
    seen: set[bytes] = set()
    splits: dict[str, None] = {}
    unsorted = folder / ".unsorted"
    unsorted.mkdir()
    for number, part in enumerate(_parts(read(task.config, base, task.block))):
        fresh = []
        for row in part:
            if isinstance(row, BadRow):
                drops.append(_bad(task, row))
                continue
            found = texts.get(row.instruction)
            if found is None:
                found = texts[row.instruction] = _Instruction(instruction_uid(task.name, row.instruction))
            sample = _sample(task, row, found.uid)
            uid = bytes.fromhex(sample["uid"])
            if uid in seen:
                drops.append(_drop(task, sample["uid"], row.row, "the same as an earlier row of the task", found.uid))
                continue
            seen.add(uid)
            fresh.append(sample)
            if row.split is not None and len(splits) < MOST_SPLITS:
                splits[row.split] = None
            found.rows += 1
            found.tags.update(row.tags or ())
        _frame(fresh).write_parquet(unsorted / f"{number:05d}.parquet")
        done(len(part))
    _sort(unsorted, len(seen), folder)
    shutil.rmtree(unsorted)
    _finish(folder, drops, texts, len(seen), [*splits] if task.config.split is None else [])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: rows have none, and walking through them takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(slots=True)
class _Instruction:
    uid: str
    rows: int = 0
    tags: set[str] = field(default_factory=set)


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table. Arrow makes nested columns of Python objects eight times as fast as polars does."""
    import pyarrow as pa

    schema = pl.DataFrame(schema=ROWS).to_arrow().schema
    columns = [pa.array([row[name] for row in rows], type=schema.field(name).type) for name in ROWS]
    frame = pl.from_arrow(pa.table(columns, schema=schema))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _sort(unsorted: Path, rows: int, folder: Path) -> None:
    """Parts in any order -> parts in the order of uids, and sorted inside.

    Uids are uniform hashes, so their first digits cut the rows into bins of like size; a bin is sorted in memory.
    """
    parts = sorted(unsorted.glob("*.parquet"))
    most_rows, most_bytes = SORTED
    bins = 1 + max(rows // most_rows, sum(part.stat().st_size for part in parts) // most_bytes)
    every = pl.scan_parquet(parts, schema=ROWS, glob=False)
    if bins > 1:
        digits = pl.col("uid").str.head(4).str.to_integer(base=16, dtype=pl.Int64)
        cut = pl.PartitionBy(
            unsorted, key=(digits * bins // 16**4).alias("bin"), include_key=False, approximate_bytes_per_file=None
        )
        every.sink_parquet(cut)
    for number in range(bins):
        here = sorted((unsorted / f"bin={number}").glob("*.parquet")) if bins > 1 else parts
        mine = pl.DataFrame(schema=ROWS)  # a bin may have no row
        if here:
            mine = pl.read_parquet(here, schema=ROWS, hive_partitioning=False, glob=False)
        mine.sort("uid").write_parquet(folder / f"rows-{number:05d}.parquet", row_group_size=PART)


def _finish(
    folder: Path, drops: list[dict[str, Any]], texts: dict[str, _Instruction], rows: int, splits: list[str]
) -> None:
    pl.DataFrame(drops, schema=DROPS.schema).write_parquet(folder / "drops.parquet")
    pl.DataFrame(
        sorted((found.uid, text, found.rows, sorted(found.tags)) for text, found in texts.items()),
        schema={"uid": pl.String, "instruction": pl.String, "rows": pl.Int64, "tags": pl.List(pl.String)},
        orient="row",
    ).write_parquet(folder / "instructions.parquet")
    summary = {"rows": rows, "instructions": len(texts), "dropped": len(drops), "splits": splits}
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


def _sample(task: Task, row: Row, instruction: str) -> dict[str, Any]:
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
        "instruction_uid": instruction,
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
