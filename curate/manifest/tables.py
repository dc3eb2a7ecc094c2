"""Tables of any size: their rows in batches, their Parquet files, and whether they keep to the schema.

A table is a polars DataFrame, or a LazyFrame where it may not fit into memory. What is held of a LazyFrame is a batch
of 16,384 rows, and 8 bytes a row to find rows that share a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from curate.manifest.schema import SCHEMA_VERSION, Table

Rows = pl.DataFrame | pl.LazyFrame
GROUP = 16_384  # rows of a batch, and of a row group


def batches(rows: Rows) -> Iterator[pl.DataFrame]:
    """The rows in their order, 16,384 at a time; the last batch holds what is left."""
    return (batch.rechunk() for batch in rows.lazy().collect_batches(chunk_size=GROUP, maintain_order=True))


def value(rows: Rows, of: pl.Expr) -> Any:
    """One figure of a table of any size."""
    return rows.lazy().select(of).collect().item()


def height(rows: Rows) -> int:
    """Number of rows."""
    return int(value(rows, pl.len()))


def counts(rows: Rows, *columns: str) -> dict[tuple[Any, ...], int]:
    """Number of rows of each combination of values, in their order, null first."""
    found = rows.lazy().group_by(columns).len().collect().sort(columns)
    return {tuple(each): n for *each, n in found.iter_rows()}


def streamed(make: Callable[[], Iterable[pl.DataFrame]], schema: Any) -> pl.LazyFrame:
    """A table of frames that are made one after another, anew whenever the table is read."""

    def source(columns: list[str] | None, predicate: pl.Expr | None, most: int | None, _: int | None) -> Any:
        for frame in make():
            if most is not None:  # rows are counted before they are filtered
                frame = frame.head(most)
                most -= frame.height
            frame = frame if predicate is None else frame.filter(predicate)
            yield frame if columns is None else frame.select(columns)
            if most == 0:
                return

    return register_io_source(source, schema=dict(schema))


def write_parquet(rows: Rows, path: Path, table: str, faults: Faults | None = None) -> None:
    """One Parquet file with the bytes fixed by the rows: row groups of 16,384, zstd, schema version in the metadata.

    Args:
        rows: in the order of the file.
        path: of the file.
        table: its name in the manifest.
        faults: looks at every batch on its way.
    """

    def looked_at() -> Iterator[pl.DataFrame]:
        for batch in batches(rows):
            if faults:
                faults.look(batch)
            yield batch

    streamed(looked_at, rows.lazy().collect_schema()).sink_parquet(
        path,
        compression="zstd",
        compression_level=3,
        row_group_size=GROUP,
        metadata={"rehearse.table": table, "rehearse.schema_version": SCHEMA_VERSION},
    )


def validate(table: Table, rows: Rows, where: str = "") -> list[str]:
    """Faults of one table against its schema, each naming table, column and (where there is one) row. Empty = sound."""
    faults = Faults(table, rows.lazy().collect_schema(), where)
    for batch in batches(rows):
        faults.look(batch)
    return faults.found(rows)


class Faults:
    """Looks at a table batch by batch; of the faults of one kind in a column the first one is told.

    Args:
        table: what the rows have to be.
        schema: column name -> type, as they are.
        where: what a fault calls the table.
    """

    def __init__(self, table: Table, schema: pl.Schema, where: str = "") -> None:
        self.table, self.where, self.rows = table, where or table.file, 0
        self.of_schema = [f"column {c!r} is missing" for c in table.columns if c not in schema]
        self.of_schema += [f"column {c!r} is not in the schema" for c in schema if c not in table.columns]
        self.of_schema += [
            f"column {name!r} is {schema[name]}, it must be {column.dtype}"
            for name, column in table.columns.items()
            if name in schema and not column.accepts(schema[name])
        ]
        self._of_rows: dict[tuple[str, str], str] = {}
        self._hashes: list[np.ndarray[Any, np.dtype[np.uint64]]] = []

    def look(self, batch: pl.DataFrame) -> None:
        """The next rows."""
        if not self.of_schema:
            for name in self.table.columns:
                for kind, row, text in _column_faults(self.table, batch[name]):
                    self._of_rows.setdefault((name, kind), f"row {self.rows + row}: column {name!r} {text}")
            self._hashes.append(batch.select(self.table.key).hash_rows().to_numpy())
        self.rows += batch.height

    def found(self, rows: Rows) -> list[str]:
        """All faults; `rows` are those that were looked at, which are read again where some may share a key."""
        order = {name: place for place, name in enumerate(self.table.columns)}
        of_rows = [self._of_rows[key] for key in sorted(self._of_rows, key=lambda key: (order[key[0]], key[1]))]
        faults = self.of_schema + of_rows
        return [f"{self.where}: {fault}" for fault in faults or self._doubles(rows)]

    def _doubles(self, rows: Rows) -> list[str]:
        """Rows that share their key with another: first by hash, then, if there are any, exactly."""
        hashes = np.sort(np.concatenate(self._hashes)) if self._hashes else np.zeros(0, np.uint64)
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not twice.size:
            return []
        keys = pl.concat(
            keys.filter(np.isin(keys.hash_rows().to_numpy(), twice))
            for keys in batches(rows.lazy().select(self.table.key))
        )
        double = keys.filter(keys.is_duplicated())
        key = list(self.table.key)
        return [f"{double.height} rows share {key} with another, first {list(double.row(0))}"] if double.height else []


def _column_faults(table: Table, series: pl.Series) -> Iterator[tuple[str, int, str]]:
    """(kind, row in the series, what is wrong) of the first fault of each kind."""
    column = table.columns[series.name]

    def first(bad: pl.Series) -> int:
        return bad.arg_max() or 0

    if not column.null and series.null_count():
        yield "1 null", first(series.is_null()), "is null, which is not allowed"
    if column.values and (bad := series.is_in(list(column.values)).not_() & series.is_not_null()).any():
        yield "2 value", first(bad), f"is {series[first(bad)]!r}, not one of {', '.join(column.values)}"
    if series.name in table.sizes and (bad := (series < 0).fill_null(False)).any():
        yield "3 size", first(bad), f"is {series[first(bad)]}, it must not be negative"
    if isinstance(column.dtype, pl.List) and (bad := series.list.contains(None).fill_null(False)).any():
        yield "4 entry", first(bad), "holds a null entry"
    if series.dtype.is_float() and (bad := (series.is_finite().not_() & series.is_not_null())).any():
        yield "5 finite", first(bad), "is not a finite number"
