"""Source files -> samples, one row at a time; what is held in memory does not grow with the file.

Owns the way from a task of the config to its samples: the rows of its split and time block, the check of its column
map, and what becomes of a row that cannot be used. `curate.sources` opens files, `curate.formats` knows what columns
mean. What becomes of a sample, and of the stream that it belongs to, is not known here.

A fault of a row is an `InputError`, or a `BadRow` with `bad_rows: drop`. A fault of a file is always an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, cast

from curate.config import Format, TaskConfig
from curate.errors import InputError
from curate.formats import FORMATS, Candidate, detect, format_of, names_of
from curate.sources import Item, SourceId, file_kind, identify, records
from curate.values import (
    Message,
    MissingColumn,
    Names,
    Record,
    RowFault,
    as_json_list,
    as_license,
    as_tags,
    kind_of,
    optional,
    required,
)

__all__ = ["BadRow", "Candidate", "Row", "SourceId", "detect_format", "detect_splits", "identify", "read",
           "split_counts", "time_blocks"]  # fmt: skip

T = TypeVar("T")

_MEND = "mend the row, or leave such rows out with `bad_rows: drop`"
_MAX_SPLITS = 100  # distinct values of a split column that are remembered for an error
_AHEAD = 1_000  # rows that are looked at for a column that the first one lacks
_YEAR_OR_MONTH = re.compile(r"\d{4}(-(0[1-9]|1[0-2]))?", re.ASCII)
_BLOCK_LENGTH = {"year": 4, "month": 7, "day": 10}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source that can be used.

    `row` counts from 1: the line of a JSONL file, else the record (the header of a CSV is not one).
    A message is {role, content} and, where the source has them, tool_calls (JSON of the list), tool_call_id, name.
    `split` is what the split column holds, if it is a text.
    """

    row: int
    instruction: str
    prompt: list[Message]
    completion: list[Message]
    references: list[str]
    tools: str | None
    license: str | None
    tags: list[str] | None
    candidates: list[Candidate]
    split: str | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used. `digest`: BLAKE2b-128 of the raw line, or of the record's canonical JSON."""

    row: int
    reason: str
    digest: str


def read(task: TaskConfig, base: Path, block: str | None = None) -> Iterator[Row | BadRow]:
    """The rows of a task in the order of its source: of its split, and of one time block where `block` is given.

    A row whose block cannot be told (it is not JSON, say) belongs to the block of the row before it.

    Raises:
        InputError: the source cannot be read, has no usable row, or has a bad row and `bad_rows` is `error`.
    """
    names = names_of(task)
    needs = [*FORMATS[format_of(task)].needs, *_mapped(task)]
    first_bad, good = "", False
    for row, value, raw in _apply(_rows(task, base, names, block), task, names, needs, _sampler(task, names)):
        if isinstance(value, RowFault):
            first_bad = first_bad or f"; row {row}: {value.where()}{value.reason}"
            yield BadRow(row, value.where() + value.reason, _digest(raw))
        else:
            good = True
            yield value
    if not good:
        raise InputError(f"{task.path}: no row can be used{first_bad}", remedy="check `format` and `columns`")


def time_blocks(task: TaskConfig, base: Path) -> list[str]:
    """The distinct time blocks of a task, oldest first: 2019, 2019-03 or 2019-03-01. One pass over the source.

    Raises:
        InputError: as `read`, or the task has no `blocks`.
    """
    names = names_of(task)
    items = _apply(_rows(task, base, names), task, names, ["time"], _block_of(task, names))
    blocks = sorted({value for _, value, _ in items if not isinstance(value, RowFault)})
    if not blocks:
        raise InputError(f"{task.path}: no row has a usable time", remedy="check `columns.time`")
    return blocks


def split_counts(task: TaskConfig, base: Path) -> dict[str, int]:
    """How many rows each value of the split column has, in the order of appearance. One pass over the source.

    Raises:
        InputError: as `read`.
    """
    names, counts = names_of(task), dict[str, int]()
    every = records(task.model_copy(update={"split": None}), base)
    for _, value, _ in _apply(every, task, names, ["split"], lambda _, r: str(required(r, names, "split"))):
        if not isinstance(value, RowFault):
            counts[value] = counts.get(value, 0) + 1
    return counts


def detect_format(path: Path) -> Format | None:
    """The format that the first row's columns fit under their default names; None if no format does.

    Raises:
        InputError: the file is of a known kind but cannot be read.
    """
    if path.is_file() and file_kind(path.name) is None:
        return None
    return detect(_first(_probe(path)))


def detect_splits(path: Path) -> list[str]:
    """The values of the column `split`, in the order of appearance; none where the first row has no such column.

    Raises:
        InputError: the file cannot be read.
    """
    probe = _probe(path)
    return list(split_counts(probe, Path())) if "split" in _first(probe) else []


def _probe(path: Path) -> TaskConfig:
    return TaskConfig.model_validate({"name": "probe", "path": str(path), "format": "text", "bad_rows": "drop"})


def _first(probe: TaskConfig) -> Record:
    row, record, _ = next(records(probe, Path()))
    if isinstance(record, RowFault):
        raise _error(probe, row, record)
    return cast(Record, record)


# ------------------------------------------------------------------------------------------------ rows of a task


def _rows(task: TaskConfig, base: Path, names: Names, block: str | None = None) -> Iterator[Item]:
    items = records(task, base)
    if task.split is not None:
        items = _of_split(items, task, names)
    if block is not None:
        items = _of_block(items, task, names, block)
    return items


def _apply(
    items: Iterable[Item],
    task: TaskConfig,
    names: Names,
    needs: Iterable[str],
    convert: Callable[[int, Record], T],
    there: frozenset[str] = frozenset(),
) -> Iterator[tuple[int, T | RowFault, Any]]:
    """Each record converted; a fault takes its place, or stops the run. All that `bad_rows` means is here.

    A column of `needs` that the first record lacks, and those behind it too, is a wrong column map, and stops the run
    in any case. `there`: keys of columns of which it is known that some rows have them.
    """
    first, stop, items = True, task.bad_rows == "error", iter(items)
    for row, record, raw in items:
        result: T | RowFault
        if isinstance(record, RowFault):
            result = record
        else:
            try:
                if first:
                    for key in needs:
                        required(record, names, key)
                result = convert(row, record)
            except RowFault as fault:
                result = fault.at(record, names)
        if first and isinstance(result, MissingColumn) and result.missing not in there:
            ahead = list(islice(items, _AHEAD))
            if not any(name in other for _, other, _ in ahead if isinstance(other, dict)
                       for name in names[result.missing]):  # fmt: skip
                raise _error(task, row, result, result.remedy)
            if not stop:
                yield row, result, raw
                yield from _apply(chain(ahead, items), task, names, needs, convert, there | {result.missing})
                return
        if stop and isinstance(result, RowFault):
            raise _error(task, row, result)
        first = first and (isinstance(record, RowFault) or isinstance(result, MissingColumn))
        yield row, result, raw


def _error(task: TaskConfig, row: int, fault: RowFault, remedy: str = _MEND) -> InputError:
    return InputError(f"{task.path}: row {row}: {fault.where()}{fault.reason}", remedy=remedy)


def _mapped(task: TaskConfig) -> set[str]:
    return {key for key, name in task.columns if name is not None}


def _sampler(task: TaskConfig, names: Names) -> Callable[[int, Record], Row]:
    """The function from a record of this task to its sample."""
    fields, mapped = FORMATS[format_of(task)].fields, _mapped(task)

    def sample(row: int, record: Record) -> Row:
        instruction, prompt, completion, references, candidates = fields(record, names)
        tools = as_json_list(optional(record, names, "tools"), "tools")
        license = _side(as_license, record, names, "license", mapped)
        tags = _side(as_tags, record, names, "tags", mapped)
        split = optional(record, names, "split")
        split = split if isinstance(split, str) else None
        return Row(row, instruction, prompt, completion, references, tools, license, tags, candidates, split)

    return sample


def _side(convert: Callable[[Any], T], record: Record, names: Names, key: str, mapped: set[str]) -> T | None:
    """A column beside the sample. One that nobody mapped, and that merely has its name, counts only where it fits."""
    value = optional(record, names, key)
    if value is None:
        return None
    try:
        return convert(value)
    except RowFault:
        if key in mapped:
            raise
        return None


def _digest(raw: Any) -> str:
    if isinstance(raw, bytes):
        data = raw.rstrip(b"\r\n")
    else:  # as canonical_json, but of anything that a row may hold: dates, NaN, lone surrogates
        text = json.dumps(raw, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        data = text.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------- splits and time blocks


def _of_split(items: Iterator[Item], task: TaskConfig, names: Names) -> Iterator[Item]:
    """The rows of the task's split. A row that cannot be read may be of any split, so it stays."""
    seen, found = dict[str, int](), False
    pairs = _apply(items, task, names, ["split"], lambda _, r: (str(required(r, names, "split")), r))
    for row, value, raw in pairs:
        if isinstance(value, RowFault):
            yield row, value, raw
        elif value[0] == task.split:
            found = True
            yield row, value[1], raw
        elif value[0] in seen or len(seen) < _MAX_SPLITS:
            seen[value[0]] = seen.get(value[0], 0) + 1
    if not found:
        has = ", ".join(f"{name} ({count} rows)" for name, count in seen.items()) or "no readable row"
        raise InputError(f"{task.path}: no row of split {task.split!r}; it has {has}", remedy="correct `split`")


def _of_block(items: Iterator[Item], task: TaskConfig, names: Names, block: str) -> Iterator[Item]:
    """The rows of one block. A fault goes with the dated row before it, else after it: so it is in one block only."""
    block_of = _block_of(task, names)
    current, early = "", list[Item]()
    found = False
    for row, value, raw in _apply(items, task, names, ["time"], lambda n, r: (block_of(n, r), r)):
        if not isinstance(value, RowFault):
            current, record = value
            if current == block:
                found = True
                yield from early
                yield row, record, raw
            early = []
        elif not current:
            early.append((row, value, raw))
        elif current == block:
            yield row, value, raw
    if not found:
        raise InputError(
            f"{task.path}: no row of block {block!r}", remedy="`curate` lists a task's blocks when it builds"
        )


def _block_of(task: TaskConfig, names: Names) -> Callable[[int, Record], str]:
    """The function from a record to its block."""
    if task.blocks is None:
        raise InputError(f"task {task.name!r} has no time blocks", remedy="give `blocks` and `columns.time`")
    unit, length = task.blocks, _BLOCK_LENGTH[task.blocks]

    def block_of(_: int, record: Record) -> str:
        day = _iso(required(record, names, "time"))
        if len(day) < length:
            raise RowFault(f"{day} names no {unit}", "time")
        return day[:length]

    return block_of


def _iso(value: Any) -> str:
    """YYYY, YYYY-MM or YYYY-MM-DD, as precise as the value is; the day is the one written, whatever the time zone."""
    if isinstance(value, date):  # a datetime is one, too
        return f"{value.year:04d}-{value.month:02d}-{value.day:02d}"
    if isinstance(value, int | float) and not isinstance(value, bool) and value in range(1, 10_000):
        return f"{int(value):04d}"
    if not isinstance(value, str):
        raise RowFault(f"a date or year was expected, found {kind_of(value)} ({value!r:.40})", "time")
    text = value.strip()
    if _YEAR_OR_MONTH.fullmatch(text):
        return text
    try:
        return _iso(datetime.fromisoformat(text))
    except ValueError:
        raise RowFault(f"{value[:40]!r} is not an ISO date", "time") from None
