"""Which rows a step saw: a table of the whole run, written before its first step.

The order of a run is known before it starts (`mixing.py`, `packing.py`), so the table holds for a run that is killed
and goes on, and tells of steps to come as well. It knows nothing of losses.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import InputError
from train.packing import Ints, Items, step_rows

FILE = "lineage.parquet"
_AGAIN = "the same command as the run's, into a new folder, writes it again before its first step"
CHUNK = 200_000  # rows that are held at once, or one step's
SCHEMA = pa.schema([("step", pa.int32()), ("uid", pa.string()), ("task", pa.string()), ("origin", pa.string())])


def write(items: Items, folder: Path, batch_size: int, accumulation: int = 1, world_size: int = 1) -> Path:
    """Write `lineage.parquet` into a run folder: a row a step and sample (or piece of one), in the order of training.

    Columns: step, counted from 1 as logs and checkpoints count; uid, task, origin of the manifest's samples.
    """
    examples, temporary, final = items.examples, folder / f".{FILE}", folder / FILE
    names = np.array(examples.task_names, object), np.array(examples.origin_names, object)

    def table(steps: list[int], rows: list[Ints]) -> pa.Table:
        number, row = np.repeat(steps, [len(r) for r in rows]).astype(np.int32), np.concatenate(rows)
        columns = [number, examples.uids(row), names[0][examples.task[row]], names[1][examples.origin[row]]]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)

    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as file:
        steps: list[int] = []
        rows: list[Ints] = []
        for step in range(len(items) // (batch_size * accumulation * world_size)):
            steps.append(step + 1)
            rows.append(step_rows(items, step, batch_size, accumulation, world_size))
            if sum(map(len, rows)) >= CHUNK:
                file.write_table(table(steps, rows))
                steps, rows = [], []
        if steps:
            file.write_table(table(steps, rows))
    os.replace(temporary, final)
    return final


def seen(run: str | os.PathLike[str], step: int) -> pl.DataFrame:
    """The rows of a step of a run: uid, task, origin, in the order in which they were trained on.

    Args:
        run: the run's folder.
        step: counted from 1, as in log.jsonl, `checkpoint-N`, and in the message of a loss that is not a number.

    Raises:
        InputError: no such run, or no such step; a file that is damaged, or of others.
    """
    path = Path(run) / FILE
    if not path.is_file():
        raise InputError(f"{run}: no {FILE}", remedy="name the folder of a run (its `out`)")
    try:
        with pq.ParquetFile(path) as file:  # not polars, which panics on some damaged files
            if not file.schema_arrow.equals(SCHEMA):
                raise InputError(f"{path}: not a table of a run's steps: it has the columns "
                                 f"{', '.join(map(repr, file.schema_arrow.names[:8]))}, not {', '.join(SCHEMA.names)} "
                                 "of their types", remedy=_AGAIN)  # fmt: skip
            found: dict[str, list[str]] = {name: [] for name in SCHEMA.names[1:]}
            last = 0
            for batch in file.iter_batches():
                batch.validate(full=True)  # texts that are no UTF-8
                if any(column.null_count for column in batch.columns):
                    raise pa.ArrowInvalid("it has empty cells")
                steps = batch.column("step").to_numpy()
                last = max(last, int(steps.max(initial=0)))
                at = pa.array(np.flatnonzero(steps == step))
                for name in found:
                    found[name] += batch.column(name).take(at).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {str(error)[:300]}", remedy=_AGAIN) from None
    if not found["uid"]:
        raise InputError(f"{run}: no step {step}", remedy=f"the run has steps 1 to {last}" if last else "it has none")
    return pl.DataFrame(found, dict.fromkeys(found, pl.String))
