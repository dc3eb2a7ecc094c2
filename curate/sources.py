"""A path of the config -> its rows as dicts, streamed: JSONL, JSON, Parquet, CSV, `datasets` folders and the hub.

Owns kinds of files: how each is found, opened, decoded, numbered and identified. Knows nothing of formats or samples.
What is wrong with one row travels in its place as a `RowFault`; what is wrong with a file is an `InputError`.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from curate.config import TaskConfig
from curate.errors import InputError
from curate.json_array import elements
from curate.values import Record, RowFault, kind_of

Item = tuple[int, Any, Any]
"""Row number; a record, or the RowFault that there is instead; the raw row: a line's bytes, or the record."""

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_GZIP = b"\x1f\x8b"
_BATCH = 1024  # Parquet rows that are held at once
_MAX_FIELD = 1 << 28  # a CSV field longer than this is a quote that nobody closed
_DAMAGED = (EOFError, zlib.error, OSError)
_UTF8 = "save the file as UTF-8"
_AGAIN = "the file is damaged: copy or download it again"


@dataclass(frozen=True)
class SourceId:
    """What identifies a source's content: file -> sha256, or `hub:owner/name@commit` -> commit (0 bytes)."""

    files: dict[str, str]
    n_bytes: int


def records(task: TaskConfig, base: Path) -> Iterator[Item]:
    """The rows of a task's source, of every split.

    Raises:
        InputError: there is no such source, it has no rows, or it is damaged.
    """
    kind, path = locate(task.path, base)
    items = _READERS[kind](path, task)
    first = next(items, None)
    if first is None:
        raise InputError(f"{task.path}: no rows", remedy="give a source with at least one row")
    yield first
    yield from items


def identify(task: TaskConfig, base: Path) -> SourceId:
    """The hashes of a task's files, each under the path that the config has for it (a member: folder/member).

    Raises:
        InputError: there is no such source, or the hub cannot be asked for its commit.
    """
    kind, path = locate(task.path, base)
    if kind == "hub":
        commit = _hub_commit(task)
        return SourceId({f"hub:{task.path}@{commit}": commit}, 0)
    files = {task.path: path}
    if kind == "folder":
        files = {f"{task.path.rstrip('/')}/{p.relative_to(path).as_posix()}": p for p in _members(path)}
    if not files:
        raise InputError(f"{task.path}: the folder has no files", remedy="give a file, or a folder with data files")
    try:
        return SourceId({name: _sha256(p) for name, p in files.items()}, sum(p.stat().st_size for p in files.values()))
    except OSError as error:
        raise _damaged(task.path, error) from None


def locate(shown: str, base: Path) -> tuple[str, Path]:
    """Kind (jsonl, json, parquet, csv, tsv, folder, hub) and place of a path that is written `shown` in the config."""
    try:
        return _place(shown, base)
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no permission, an unknown ~user
        if isinstance(error, InputError):
            raise
        raise _damaged(shown, error) from None


def _place(shown: str, base: Path) -> tuple[str, Path]:
    path = base / Path(shown).expanduser()
    if "://" in shown:
        from curate.storage import located  # with polars, which plain files do not need

        path = located(base, shown)
    kind = file_kind(shown)
    if path.is_dir():
        return "folder", path
    if path.exists():
        if kind is None:
            raise InputError(f"{shown}: not a known kind of file", remedy=f"use one of {_known()}")
        if path.stat().st_size == 0:
            raise InputError(f"{shown}: the file is empty", remedy=_AGAIN)
        return kind, path
    if kind is None and not shown.endswith(".gz") and _HUB_ID.match(shown):
        return "hub", path
    raise InputError(f"{shown}: no such file{_near(path)}", remedy=f"correct `path`; it is relative to {base}")


def file_kind(name: str) -> str | None:
    """The kind that a file's name tells, None if it tells none."""
    suffixes = Path(name.lower().removesuffix(".gz")).suffix
    kind = KINDS.get(suffixes)
    return None if kind == "parquet" and name.lower().endswith(".gz") else kind


def _known() -> str:
    return ", ".join(f"{suffix}{'' if kind == 'parquet' else '(.gz)'}" for suffix, kind in KINDS.items())


def _near(path: Path) -> str:
    """A hint at the file that was probably meant."""
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _members(folder: Path) -> list[Path]:
    """The files below a folder that are not hidden, in a fixed order."""
    inside = ((p.relative_to(folder).parts, p) for p in folder.rglob("*") if p.is_file())
    return [p for parts, p in sorted(inside) if not any(part.startswith(".") for part in parts)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- bytes and lines


def _open(path: Path, shown: str) -> BinaryIO:
    """The file's bytes, unpacked where its name ends in .gz."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    named = path.name.lower().endswith(".gz")
    if named and not packed:
        raise InputError(f"{shown}: not a gzip file, though its name ends in .gz", remedy="rename it, or pack it")
    if packed and not named:
        raise InputError(f"{shown}: is packed with gzip", remedy="rename the file so that it ends in .gz")
    # the buffer around GzipFile makes lines in C
    return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(path), 1 << 18)) if named else path.open("rb")


def _lines(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, without a byte order mark."""
    number = 0
    try:
        with _open(path, shown) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except _DAMAGED as error:
        raise _damaged(shown, error, number) from None


def _damaged(shown: str, error: Exception, row: int | None = None) -> InputError:
    after = "" if row is None else f" after row {row}"
    if isinstance(error, EOFError):
        return InputError(f"{shown}: the gzip file is truncated: it ends too early{after}", remedy=_AGAIN)
    if isinstance(error, zlib.error | gzip.BadGzipFile):
        return InputError(f"{shown}: the gzip file is damaged{after}: {error}", remedy=_AGAIN)
    why = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    return InputError(f"{shown}: cannot be read{after}: {why}", remedy="check the file and its permissions")


# ------------------------------------------------------------------------------------------------------- JSON lines


def _jsonl(path: Path, task: TaskConfig) -> Iterator[Item]:
    for row, line in _lines(path, task.path):
        if row == 1 and (line.strip() == b"[" or line.startswith(b"[{")):
            raise InputError(f"{task.path}: a JSON array, not one object a line", remedy="rename the file to .json")
        if line and not line.isspace():
            yield row, _parsed(line), line


def _parsed(line: bytes) -> Record | RowFault:
    line = line.rstrip(b"\r\n")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowFault(f"invalid UTF-8 at byte offset {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return RowFault(_json_fault(error))
    if isinstance(value, dict):
        return value
    return RowFault(f"not a JSON object but {kind_of(value)}: {_excerpt(line.decode(), 0)}")


def _json_fault(error: Exception, whole: bool = True) -> str:
    """What is wrong, and where if the whole line was parsed."""
    if isinstance(error, json.JSONDecodeError):
        place = f" at column {error.pos + 1}" if whole else ""
        what = error.msg.removesuffix(" at").removesuffix(" starting")  # Unterminated string starting at
        return f"not JSON: {what}{place}: {_excerpt(error.doc, error.pos)}"
    return f"not usable JSON: {_first_line(error)}"


def _excerpt(text: str, at: int) -> str:
    """The text around a place, as one line."""
    start, end = max(0, at - 20), at + 20
    return repr(f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}")


# ------------------------------------------------------------------------------------------------------- JSON arrays


def _json(path: Path, task: TaskConfig) -> Iterator[Item]:
    """A .json file: one array of objects, or one object a line."""
    try:
        with _open(path, task.path) as stream:
            head = cast(io.BufferedReader, stream).peek(64).removeprefix(codecs.BOM_UTF8).lstrip()
    except _DAMAGED as error:
        raise _damaged(task.path, error) from None
    return _array(path, task) if head.startswith(b"[") else _jsonl(path, task)


def _array(path: Path, task: TaskConfig) -> Iterator[Item]:
    row = 0
    try:
        with _open(path, task.path) as stream:
            for row, value in enumerate(elements(stream), 1):
                fault = None if isinstance(value, dict) else RowFault(f"not a JSON object but {kind_of(value)}")
                yield row, fault or value, value
    except UnicodeDecodeError as error:
        why = f"invalid UTF-8 after row {row}: {error.reason}"
        raise InputError(f"{task.path}: {why}", remedy=_UTF8) from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        why = f"row {row + 1}: {_json_fault(error, whole=False)}"
        remedy = "mend the file; what follows a broken element of an array cannot be read"
        raise InputError(f"{task.path}: {why}", remedy=remedy) from None
    except _DAMAGED as error:
        raise _damaged(task.path, error, row) from None


# --------------------------------------------------------------------------------------------------------------- CSV


def _csv(path: Path, task: TaskConfig, delimiter: str = ",") -> Iterator[Item]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
    table = filter(None, csv.reader(_csv_lines(path, task.path), delimiter=delimiter, strict=True))
    row = 0
    try:
        header = next(table, [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise InputError(f"{task.path}: header: two columns are named {min(twice)!r}", remedy="rename one of them")
        for row, cells in enumerate(table, 1):
            yield row, _csv_record(header, cells), cells
    except csv.Error as error:
        remedy = "mend the file: a quote is not closed, or a quote inside a field is not doubled"
        raise InputError(f"{task.path}: row {row + 1}: not valid CSV: {error}", remedy=remedy) from None


def _csv_lines(path: Path, shown: str) -> Iterator[str]:
    for number, line in _lines(path, shown):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{shown}: line {number}: invalid UTF-8 at byte offset {error.start} of the line",
                remedy=_UTF8,
            ) from None


def _csv_record(header: list[str], cells: list[str]) -> Record | RowFault:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return RowFault(f"has {len(cells)} fields, the header has {len(header)}")


# ----------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path, task: TaskConfig) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH)
            for row, record in enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches), 1):
                yield row, record, record
    except UnicodeDecodeError as error:
        where = f"rows {row + 1} to {row + _BATCH}"
        raise InputError(f"{task.path}: {where}: invalid UTF-8: {error.reason}", remedy="write it again") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        after = f" after row {row}" if row else ""
        why = f"not a readable Parquet file{after}: {_first_line(error)}"
        raise InputError(f"{task.path}: {why}", remedy=_AGAIN) from None


# ---------------------------------------------------------------------------------------------------------- datasets


def _folder(path: Path, task: TaskConfig) -> Iterator[Item]:
    """A folder that `datasets` reads: one of save_to_disk, or one of data files."""
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return _dataset(
        lambda: (
            datasets.load_from_disk(str(path))
            if saved
            else datasets.load_dataset(str(path), name=task.subset, streaming=True)
        ),
        task,
        "check that the folder holds data files that `datasets.load_dataset(folder)` reads",
    )


def _hub(path: Path, task: TaskConfig) -> Iterator[Item]:
    """A data set of the hub. Its own code is never run."""
    import datasets

    return _dataset(
        lambda: datasets.load_dataset(task.path, name=task.subset, revision=task.revision, streaming=True),
        task,
        "there is no such file or folder, so it was looked up on the Hugging Face hub; correct `path`, or go online "
        "(HF_HUB_OFFLINE unset), or download the data set and give its folder",
    )


def _dataset(load: Callable[[], Any], task: TaskConfig, remedy: str) -> Iterator[Item]:
    """Rows of a loaded data set. `datasets` has no common exception, so all of them are taken for the source's."""
    row = 0
    try:
        for row, record in enumerate(_split_rows(load(), task), 1):
            yield row, record, record
    except InputError:
        raise
    except Exception as error:
        after = f" after row {row}" if row else ""
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"{task.path}: cannot be read{after}: {why}", remedy=remedy) from None


def _split_rows(data: Any, task: TaskConfig) -> Iterable[Record]:
    """The rows of the wanted split: one of the data set's own, or of train, where the rows may name a split.

    Rows of a data set's own split get a column that says so, as rows of a file have.
    """
    if not isinstance(data, dict):
        return cast(Iterable[Record], data)
    has = ", ".join(data)
    own = task.split in data
    name = task.split if own else "train" if "train" in data else next(iter(data))
    if not own and name != "train" and len(data) > 1:
        raise InputError(f"{task.path}: which split? It has {has}", remedy="set `split` to one of them")
    rows = iter(data[name])
    first = next(rows, None)
    column = task.columns.split or "split"
    if task.split is not None and not own and (first is None or column not in first):
        raise InputError(f"{task.path}: no split {task.split!r}; it has {has}", remedy="set `split` to one of them")
    every = itertools.chain([] if first is None else [first], rows)
    return ({column: task.split, **record} for record in every) if own else every


def _hub_commit(task: TaskConfig) -> str:
    """The commit that a hub data set is at now; a pinned one is not asked for."""
    if task.revision and _COMMIT.match(task.revision):
        return task.revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(task.path, revision=task.revision).sha)
    except Exception as error:  # offline, unknown, private: all of them are for the user to mend
        raise InputError(
            f"{task.path}: no such file, and the hub cannot be asked for it: {_first_line(error)}",
            remedy="correct `path`, or pin `revision` to a full commit",
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


_READERS: dict[str, Callable[[Path, TaskConfig], Iterator[Item]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "tsv": lambda path, task: _csv(path, task, "\t"),
    "folder": _folder,
    "hub": _hub,
}
