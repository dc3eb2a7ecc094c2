"""Reading, writing and validating a manifest folder.

A manifest is published in one order: tables and card are written and synced in a hidden folder, the old
`provenance.json` goes, the files move into place, the new `provenance.json` comes last. So a folder with a
`provenance.json` is whole, and its hashes say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.manifest import show
from curate.manifest.remote import PLAIN, local
from curate.manifest.remote import PROVENANCE as PROVENANCE
from curate.manifest.schema import SCHEMA_VERSION, TABLES, ManifestError, Table
from curate.manifest.tables import Faults, Rows, height, validate, write_parquet

CARD = "README.md"
REPORT = "report.html"  # a view of the manifest, no part of it: made after it, and not hashed
STAGING = ".staging"


class Stored:
    """A table in its file, which stays open: another build may put a new file in its place, and this one is still read.

    Args:
        path: of the file.
        table: what it holds.
        provenance: of its manifest.
    """

    def __init__(self, path: Path, table: Table, provenance: Mapping[str, Any]) -> None:
        self.table, self.provenance, self.file = table, provenance, path.open("rb")
        weakref.finalize(self, self.file.close)

    def lazy(self) -> pl.LazyFrame:
        """The table, to be scanned."""
        return of_this_version(pl.scan_parquet(self.file), self.table, self.provenance)


class Held:
    """A table as an attribute of a manifest: collected when it is first asked for, then kept."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, manifest: Manifest | None, owner: type | None = None) -> pl.DataFrame:
        if manifest is None:
            raise AttributeError(self.name)  # no default: every manifest has every table
        table: Any = vars(manifest)[self.name]
        if not isinstance(table, pl.DataFrame):
            table = vars(manifest)[self.name] = table.lazy().collect()
        return table

    def __set__(self, manifest: Manifest, table: Rows | Stored) -> None:
        vars(manifest)[self.name] = table


@dataclass(frozen=True)
class Manifest:
    """A manifest: the provenance and a polars frame a table, which is loaded on first use; `scan` never loads one."""

    folder: Path
    provenance: dict[str, Any]
    samples: Held = Held()
    completions: Held = Held()
    tasks: Held = Held()
    instructions: Held = Held()
    tags: Held = Held()
    augmentations: Held = Held()
    drops: Held = Held()

    def scan(self, table: str) -> pl.LazyFrame:
        """A table to query without loading it: for those that may be larger than memory."""
        found: pl.LazyFrame = vars(self)[table].lazy()
        return found

    def height(self, table: str) -> int:
        """Number of rows of a table."""
        return height(self.scan(table))

    def __repr__(self) -> str:
        return show.line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return show.html(self)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
    """Read and validate a manifest.

    Args:
        folder: what `curate build` wrote; or its URL, and a local copy is read.
        verify: compare every file with its SHA-256 in the provenance (a hand-edited table is refused).

    Raises:
        ManifestError: not a manifest, unfinished, of a newer schema, edited, or against the schema.
    """
    with local(folder) as path:
        return _read(path, verify)


def _read(folder: Path, verify: bool) -> Manifest:
    provenance = read_provenance(folder)
    if verify and (faults := hash_faults(folder, provenance)):
        raise ManifestError("\n".join(faults))
    tables: dict[str, Any] = {table.name: _stored(folder, table, provenance) for table in TABLES.values()}
    return Manifest(folder=folder, provenance=provenance, **tables)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a manifest, its schema version checked."""
    path = folder / PROVENANCE
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder; `curate build` writes one")
    if not path.is_file():
        raise ManifestError(f"{folder}: no {PROVENANCE}, so this is not a finished manifest; run `curate build` again")
    try:
        provenance = json.loads(path.read_bytes())
        version = str(provenance["schema_version"])
        for section in ("config", "replay", "outputs"):
            if not isinstance(provenance[section], dict):
                raise TypeError(f"{section!r} is not an object")
        int(version.split(".")[0])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: not a provenance file ({error!r}); run `curate build` again") from None
    mine = SCHEMA_VERSION.split(".")[0]
    if version.split(".")[0] != mine:
        newer = int(version.split(".")[0]) > int(mine)
        remedy = "upgrade rehearse" if newer else "build it again with this version"
        raise ManifestError(f"{path}: schema version {version}, this library reads {mine}.x; {remedy}")
    return provenance


def hash_faults(folder: Path, provenance: Mapping[str, Any]) -> list[str]:
    """Files whose bytes are not those that the build wrote."""
    outputs = provenance.get("outputs")
    if not isinstance(outputs, dict) or not {CARD, *(t.file for t in tables_of(provenance))} <= outputs.keys():
        return [f"{folder / PROVENANCE}: it does not list the hash of every file; run `curate build` again"]
    faults = []
    for name, expected in sorted(outputs.items()):
        path = folder / name
        if not PLAIN.fullmatch(name):
            faults.append(f"{folder / PROVENANCE}: output {name!r} is not a plain file name")
        elif not path.is_file():
            faults.append(f"{path}: missing; run `curate build` again")
        elif sha256_file(path) != expected:
            faults.append(
                f"{path}: changed since the build (sha256 differs from {PROVENANCE}); run `curate build` again"
            )
    return faults


def _stored(folder: Path, table: Table, provenance: Mapping[str, Any]) -> pl.DataFrame | Stored:
    """A table of a manifest, which keeps to its schema."""
    if table.file not in provenance["outputs"]:
        return table.empty()  # a table that a later minor version has added
    path = folder / table.file
    try:
        stored = Stored(path, table, provenance)
        faults = validate(table, stored.lazy(), str(path))
    except FileNotFoundError:
        raise ManifestError(f"{path}: missing; run `curate build` again") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ManifestError(f"{path}: not readable as Parquet: {error}; run `curate build` again") from None
    if faults:
        raise ManifestError("\n".join(faults))
    return stored


def tables_of(provenance: Mapping[str, Any]) -> list[Table]:
    """The tables that a manifest of this version must have; those of another minor version it may lack."""
    same = str(provenance["schema_version"]) == SCHEMA_VERSION
    return [t for t in TABLES.values() if same or t.since == "1.0"]


def of_this_version(rows: pl.LazyFrame, table: Table, provenance: Mapping[str, Any]) -> pl.LazyFrame:
    """A table of another minor version as this one sees it: columns that it lacks are null, unknown ones are left out.

    Minor versions only add columns that may be null, so this loses nothing that the reader could have used.
    """
    if str(provenance["schema_version"]) == SCHEMA_VERSION:
        return rows
    there = rows.collect_schema().names()
    absent = [name for name, column in table.columns.items() if name not in there and column.null]
    filled = rows.with_columns(pl.lit(None, dtype=table.columns[name].dtype).alias(name) for name in absent)
    return filled.select(name for name in table.columns if name in {*there, *absent})


def write(
    folder: Path,
    frames: Mapping[str, Rows],
    provenance: Mapping[str, Any],
    card: str | Callable[[Mapping[str, pl.LazyFrame]], str],
) -> None:
    """Write tables, card and provenance so that a kill at any moment leaves the old manifest, none, or the new one.

    `provenance` gets `schema_version` and the SHA-256 of every output. Same rows, same bytes.

    Args:
        folder: of the manifest.
        frames: a table each, its rows in the order of the file; a LazyFrame is run once and held in parts only.
        provenance: how they were made.
        card: the data card; a function makes it of the tables as they were written.

    Raises:
        ManifestError: a table does not keep to its schema.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        written, rows = dict[str, pl.LazyFrame](), dict[str, int]()
        for name, table in TABLES.items():
            written[name], rows[name] = _written(frames[name], table, staging)
        (staging / CARD).write_text(card if isinstance(card, str) else card(written), encoding="utf-8")
        names = sorted([t.file for t in TABLES.values()] + [CARD])
        outputs = {name: sha256_file(staging / name) for name in names}
        whole = {"schema_version": SCHEMA_VERSION, **provenance, "rows": rows, "outputs": outputs}
        text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        (staging / PROVENANCE).write_text(text, encoding="utf-8")
        for name in [*names, PROVENANCE]:
            sync(staging / name)
        for name in (PROVENANCE, REPORT):
            (folder / name).unlink(missing_ok=True)
        for name in [*names, PROVENANCE]:
            os.replace(staging / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _written(frame: Rows, table: Table, folder: Path) -> tuple[pl.LazyFrame, int]:
    """A table's file, to be scanned, and its number of rows."""
    path, faults = folder / table.file, Faults(table, frame.lazy().collect_schema())
    if not faults.of_schema:
        write_parquet(frame, path, table.name, faults)
        frame = pl.scan_parquet(path, glob=False)
    if found := faults.found(frame):
        raise ManifestError("\n".join(found))
    return frame.lazy(), faults.rows


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
