"""`check`: does a manifest keep its own promises? Every fault is a sentence that names table, row and column.

Each rule below is one small function of the tables. A rule may assume that the schema holds: it runs only then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from curate.manifest.io import Manifest, hash_faults, read_provenance, validate
from curate.manifest.schema import TABLES, ManifestError, completion_uid, instruction_uid, sample_uid

Rule = Callable[[Manifest], Iterator[str]]
MAX_SHOWN = 5  # of one kind; the rest is counted


def check(folder: str | os.PathLike[str]) -> list[str]:
    """Faults of a manifest folder; an empty list means that it is sound.

    Looks at the schema, the file hashes, every uid, the quotas, the order of the stream, lineage, InsInfo, and that
    every source row is either in samples or in drops. Raises ManifestError only where there is no manifest at all.
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    faults = hash_faults(folder, provenance)
    frames: dict[str, pl.DataFrame] = {}
    for table in TABLES.values():
        try:
            frames[table.name] = pl.read_parquet(folder / table.file)
            faults += validate(table, frames[table.name])
        except FileNotFoundError:
            faults.append(f"{table.file}: missing")
        except (pl.exceptions.PolarsError, OSError) as error:
            faults.append(f"{table.file}: not readable as Parquet: {error}")
            frames.pop(table.name, None)
    schema_holds = len(frames) == len(TABLES) and not any(validate(t, frames[n]) for n, t in TABLES.items())
    if schema_holds:
        manifest = Manifest(folder=folder, provenance=provenance, **frames)
        for rule in RULES:
            faults += _shortened(rule(manifest))
    return faults


def _shortened(faults: Iterator[str]) -> list[str]:
    every = list(faults)
    more = len(every) - MAX_SHOWN
    return every if more <= 0 else [*every[:MAX_SHOWN], f"… and {more} more like the last one"]


def _stream(m: Manifest) -> Iterator[str]:
    """Stages are 1..T without gaps; only the last task is the current one."""
    stages = sorted(m.tasks["stage"])
    if stages != list(range(1, len(stages) + 1)):
        yield f"tasks.parquet: stages are {stages}, they must be 1 to {len(stages)}"
        return
    for task in m.tasks.filter(pl.col("quota").is_null() != (pl.col("stage") == len(stages))).iter_rows(named=True):
        kind = "the current task has" if task["stage"] == len(stages) else "a previous task lacks"
        yield f"tasks.parquet: task {task['task']!r}: {kind} a quota"


def _rows_belong(m: Manifest) -> Iterator[str]:
    """Every row names a task of the stream with its right stage, and its origin fits: no row of a future task."""
    stage_of = dict(m.tasks.select("task", "stage").iter_rows())
    current = max(stage_of.values(), default=0)
    for name in ("samples", "completions", "instructions", "drops"):
        frame: pl.DataFrame = getattr(m, name)
        for number, (task, stage) in enumerate(frame.select("task", "stage").iter_rows()):
            if task not in stage_of:
                yield f"{name}.parquet: row {number}: task {task!r} is not in the stream (tasks.parquet)"
            elif stage_of[task] != stage:
                yield f"{name}.parquet: row {number}: stage {stage} of task {task!r}, it must be {stage_of[task]}"
    for number, (stage, origin) in enumerate(m.samples.select("stage", "origin").iter_rows()):
        if (stage == current) != (origin == "current") and origin != "augmented":
            yield f"samples.parquet: row {number}: origin {origin!r} at stage {stage}, the current stage is {current}"


def _uids(m: Manifest) -> Iterator[str]:
    """Every uid is the hash of its row."""
    columns = ("uid", "task", "prompt", "completion", "references", "tools", "parent_uid")
    for number, (uid, *content) in enumerate(m.samples.select(columns).iter_rows()):
        if sample_uid(*content) != uid:
            yield f"samples.parquet: row {number}: uid {uid} is not the hash of its content; the row was edited"
    for number, (uid, task, text) in enumerate(m.instructions.select("uid", "task", "instruction").iter_rows()):
        if instruction_uid(task, text) != uid:
            yield f"instructions.parquet: row {number}: uid {uid} is not the hash of its content"
    same = ["prompt_uid", "origin", "text"]
    for prompt, origin, text, uids in m.completions.group_by(same, maintain_order=True).agg("uid").iter_rows():
        known = {completion_uid(prompt, origin, text, index) for index in range(len(uids))}
        for uid in sorted(set(uids) - known):
            yield f"completions.parquet: uid {uid} is not the hash of its content; the row was edited"


def _quotas(m: Manifest) -> Iterator[str]:
    """Quotas add up to the budget; granted rows are there; a difference has its reason."""
    drawn = dict(m.samples.filter(pl.col("origin") == "replay").group_by("task").len().iter_rows())
    by_instruction = dict(m.instructions.group_by("task").agg(pl.col("granted").sum()).iter_rows())
    previous = m.tasks.filter(pl.col("quota").is_not_null())
    asked = m.provenance.get("replay", {}).get("asked")
    if asked != previous["quota"].sum():
        yield f"tasks.parquet: column 'quota' adds up to {previous['quota'].sum()}, the budget asked for {asked}"
    for t in previous.iter_rows(named=True):
        where = f"tasks.parquet: task {t['task']!r}"
        if t["granted"] != drawn.get(t["task"], 0):
            yield f"{where}: granted {t['granted']} rows, samples.parquet holds {drawn.get(t['task'], 0)} replay rows"
        if t["granted"] != by_instruction.get(t["task"], 0):
            yield f"{where}: granted {t['granted']}, instructions.parquet adds up to {by_instruction.get(t['task'], 0)}"
        if t["granted"] > t["rows"]:
            yield f"{where}: granted {t['granted']} rows of {t['rows']}"
        if (t["granted"] != t["quota"]) != (t["reason"] is not None):
            yield f"{where}: quota {t['quota']}, granted {t['granted']}, reason {t['reason']!r}"


def _nothing_lost(m: Manifest) -> Iterator[str]:
    """Each usable row of a task is in samples or was left out by the draw; no uid is in both."""
    kept = dict(m.samples.filter(pl.col("origin") != "augmented").group_by("task").len().iter_rows())
    left = dict(m.drops.filter(pl.col("step") == "sample").group_by("task").len().iter_rows())
    for task, rows in m.tasks.select("task", "rows").iter_rows():
        if kept.get(task, 0) + left.get(task, 0) != rows:
            yield (
                f"tasks.parquet: task {task!r} has {rows} rows, but {kept.get(task, 0)} are in samples.parquet and "
                f"{left.get(task, 0)} in drops.parquet"
            )
    both = m.drops.filter(pl.col("step") == "sample").join(m.samples.select("uid"), on="uid", how="semi")
    for uid in sorted(both["uid"]):
        yield f"drops.parquet: uid {uid} was left out by the draw, yet it is in samples.parquet"


def _lineage(m: Manifest) -> Iterator[str]:
    """Parents, prompts and instructions that rows point to are there."""
    samples = set(m.samples["uid"])
    for number, parent in enumerate(m.samples["parent_uid"]):
        if parent is not None and parent not in samples:
            yield f"samples.parquet: row {number}: parent_uid {parent} is not in samples.parquet"
    for number, prompt in enumerate(m.completions["prompt_uid"]):
        if prompt not in samples:
            yield f"completions.parquet: row {number}: prompt_uid {prompt} is not in samples.parquet"
    instructions = set(m.instructions["uid"])
    for number, uid in enumerate(m.drops["instruction_uid"]):
        if uid is not None and uid not in instructions:
            yield f"drops.parquet: row {number}: instruction_uid {uid} is not in instructions.parquet"
    known = m.instructions.select("task", "instruction")
    read = m.samples.filter(pl.col("origin") != "augmented")
    for task, text in (
        read.join(known, on=["task", "instruction"], how="anti").select("task", "instruction").iter_rows()
    ):
        yield f"samples.parquet: task {task!r}: instruction {text[:60]!r} is not in instructions.parquet"


def _scores(m: Manifest) -> Iterator[str]:
    """InsInfo is Σ log(N/f_t) of the tags table, and a sample has its instruction's."""
    counts = dict(m.tags.select("canonical", "count").iter_rows())
    pool = max(m.tags["pool"], default=0)
    rows = m.instructions.filter(pl.col("insinfo").is_not_null()).select("uid", "tags", "insinfo")
    for uid, tags, insinfo in rows.iter_rows():
        unknown = [t for t in tags or [] if not counts.get(t)]
        if unknown:
            yield f"instructions.parquet: uid {uid}: tag {unknown[0]!r} has no count in tags.parquet"
        elif not math.isclose(insinfo, math.fsum(math.log(pool / counts[t]) for t in tags or []), abs_tol=1e-9):
            yield f"instructions.parquet: uid {uid}: insinfo {insinfo} is not what its tags and tags.parquet give"
    columns = ["task", "instruction", "insinfo"]
    both = m.samples.filter(pl.col("origin") == "replay").join(
        m.instructions.select(columns), on=columns[:2], suffix="_of_instruction"
    )
    for uid in both.filter(pl.col("insinfo").ne_missing(pl.col("insinfo_of_instruction")))["uid"]:
        yield f"samples.parquet: uid {uid}: column 'insinfo' is not its instruction's"


RULES: tuple[Rule, ...] = (_stream, _rows_belong, _uids, _quotas, _nothing_lost, _lineage, _scores)

__all__ = ["ManifestError", "check"]
