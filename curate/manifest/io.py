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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.manifest import show
from curate.manifest.remote import PROVENANCE as PROVENANCE
from curate.manifest.remote import local
from curate.manifest.schema import SCHEMA_VERSION, TABLES, ManifestError, Table

CARD = "README.md"
REPORT = "report.html"  # a view of the manifest, no part of it: made after it, and not hashed
STAGING = ".staging"


@dataclass(frozen=True)
class Manifest:
    """A manifest in memory: one polars frame a table, and the provenance."""

    folder: Path
    samples: pl.DataFrame
    completions: pl.DataFrame
    tasks: pl.DataFrame
    instructions: pl.DataFrame
    tags: pl.DataFrame
    augmentations: pl.DataFrame
    drops: pl.DataFrame
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        return show.line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return show.html(self)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def validate(table: Table, frame: pl.DataFrame, where: str = "") -> list[str]:
    """Faults of one table against its schema, each naming table, column and (where there is one) row. Empty = sound."""
    where = where or table.file
    missing = [c for c in table.columns if c not in frame.columns]
    extra = [c for c in frame.columns if c not in table.columns]
    faults = [f"{where}: column {c!r} is missing" for c in missing]
    faults += [f"{where}: column {c!r} is not in the schema" for c in extra]
    for name in (c for c in table.columns if c not in missing):
        faults += _column_faults(table, frame, name, where)
    if not faults and (n := frame.select(table.key).is_duplicated().sum()):
        double = frame.filter(frame.select(table.key).is_duplicated()).row(0, named=True)
        faults.append(f"{where}: {n} rows share {table.key} with another, first {[double[k] for k in table.key]}")
    return faults


def _column_faults(table: Table, frame: pl.DataFrame, name: str, where: str) -> list[str]:
    column, series = table.columns[name], frame[name]
    if not column.accepts(series.dtype):
        return [f"{where}: column {name!r} is {series.dtype}, it must be {column.dtype}"]
    faults = []
    if not column.null and series.null_count():
        faults.append(f"{where}: row {series.is_null().arg_max()}: column {name!r} is null, which is not allowed")
    if column.values and (bad := series.is_in(list(column.values)).not_() & series.is_not_null()).any():
        row = bad.arg_max() or 0
        faults.append(f"{where}: row {row}: column {name!r} is {series[row]!r}, not one of {', '.join(column.values)}")
    if name in table.sizes and (bad := (series < 0).fill_null(False)).any():
        row = bad.arg_max() or 0
        faults.append(f"{where}: row {row}: column {name!r} is {series[row]}, it must not be negative")
    if isinstance(column.dtype, pl.List) and series.list.contains(None).any():
        faults.append(f"{where}: row {series.list.contains(None).arg_max()}: column {name!r} holds a null entry")
    if series.dtype.is_float() and (bad := series.is_finite().not_() & series.is_not_null()).any():
        faults.append(f"{where}: row {bad.arg_max()}: column {name!r} is not a finite number")
    return faults


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
    frames = {table.name: _read_table(folder, table, provenance) for table in TABLES.values()}
    return Manifest(folder=folder, provenance=provenance, **frames)


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
        if Path(name).name != name:
            faults.append(f"{folder / PROVENANCE}: output {name!r} is not a plain file name")
        elif not path.is_file():
            faults.append(f"{path}: missing; run `curate build` again")
        elif sha256_file(path) != expected:
            faults.append(
                f"{path}: changed since the build (sha256 differs from {PROVENANCE}); run `curate build` again"
            )
    return faults


def _read_table(folder: Path, table: Table, provenance: Mapping[str, Any]) -> pl.DataFrame:
    path = folder / table.file
    if table.file not in provenance["outputs"]:
        return table.empty()  # a table that a later minor version has added
    try:
        frame = of_this_version(pl.read_parquet(path, glob=False), table, provenance)
    except FileNotFoundError:
        raise ManifestError(f"{path}: missing; run `curate build` again") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ManifestError(f"{path}: not readable as Parquet: {error}; run `curate build` again") from None
    if faults := validate(table, frame, str(path)):
        raise ManifestError("\n".join(faults))
    return frame


def tables_of(provenance: Mapping[str, Any]) -> list[Table]:
    """The tables that a manifest of this version must have; those of another minor version it may lack."""
    same = str(provenance["schema_version"]) == SCHEMA_VERSION
    return [t for t in TABLES.values() if same or t.since == "1.0"]


def of_this_version(frame: pl.DataFrame, table: Table, provenance: Mapping[str, Any]) -> pl.DataFrame:
    """A table of another minor version as this one sees it: columns that it lacks are null, unknown ones are left out.

    Minor versions only add columns that may be null, so this loses nothing that the reader could have used.
    """
    if str(provenance["schema_version"]) == SCHEMA_VERSION:
        return frame
    absent = [name for name, column in table.columns.items() if name not in frame.columns and column.null]
    filled = frame.with_columns(pl.lit(None, dtype=table.columns[name].dtype).alias(name) for name in absent)
    return filled.select(name for name in table.columns if name in filled.columns)


def write(folder: Path, frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any], card: str) -> None:
    """Write tables, card and provenance so that a kill at any moment leaves the old manifest, none, or the new one.

    `provenance` gets `schema_version` and the SHA-256 of every output. Same frames, same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        for table in TABLES.values():
            if faults := validate(table, frames[table.name]):
                raise ManifestError("\n".join(faults))
            write_parquet(frames[table.name], staging / table.file, table.name)
        (staging / CARD).write_text(card, encoding="utf-8")
        names = sorted([t.file for t in TABLES.values()] + [CARD])
        outputs = {name: sha256_file(staging / name) for name in names}
        rows = {name: frames[name].height for name in TABLES}
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


def write_parquet(frame: pl.DataFrame, path: Path, table: str) -> None:
    """One Parquet file with the bytes fixed by the rows: row groups of 16,384, zstd, schema version in the metadata."""
    frame.rechunk().write_parquet(
        path,
        compression="zstd",
        compression_level=3,
        row_group_size=16_384,
        metadata={"rehearse.table": table, "rehearse.schema_version": SCHEMA_VERSION},
    )


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
