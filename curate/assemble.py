"""From stage results to the manifest's tables: joins and sorts, no decision."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import polars as pl

import curate
from curate.ingest import TaskRows
from curate.manifest.card import card
from curate.manifest.schema import (
    COMPLETIONS,
    DROPS,
    INSTRUCTIONS,
    MESSAGE,
    SAMPLES,
    TAGS,
    TASKS,
    Table,
    completion_uid,
)

PACKAGES = ("numpy", "polars", "POT", "scikit-learn", "scipy", "sentence-transformers", "spacy", "spacy-lookups-data",
            "torch", "transformers")  # fmt: skip


def assemble(
    tasks: list[TaskRows], made: Mapping[str, Any], facts: Mapping[str, Any]
) -> tuple[dict[str, pl.DataFrame], dict[str, Any], str]:
    """(tables, provenance, data card) of a build.

    Args:
        tasks: the stream, the current task last.
        made: `sample`: folder of the draw; `tags`: folder of the scores and `distances`: list, where there are any.
        facts: what the provenance records of the build.
    """
    drawn = {
        name: pl.read_parquet(made["sample"] / f"{name}.parquet", glob=False)
        for name in ("rows", "instructions", "tasks")
    }
    scored = pl.read_parquet(made["tags"] / "instructions.parquet", glob=False) if "tags" in made else None
    instructions = _instructions(tasks, drawn["instructions"], scored)
    picked = [_picked(task, drawn["rows"], last=task is tasks[-1]) for task in tasks]
    frames = {
        "samples": _samples(tasks, picked, instructions),
        "completions": _completions(tasks, picked),
        "tasks": _tasks(tasks, drawn["tasks"], instructions, made.get("distances")),
        "instructions": instructions,
        "tags": pl.read_parquet(made["tags"] / "tags.parquet", glob=False).sort("tag")
        if "tags" in made
        else TAGS.empty(),
        "drops": _drops(tasks, picked, instructions),
    }
    provenance = {**facts, "rehearse": curate.__version__, "packages": _packages(), "python": platform.python_version()}
    return frames, provenance, card(frames, provenance)


def _fit(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The table's columns in their order; columns that a build does not fill are null."""
    absent = {name: pl.lit(None, dtype=dtype) for name, dtype in table.schema.items() if name not in frame.columns}
    wanted: Any = {name: dtype for name, dtype in table.schema.items() if dtype != pl.List(MESSAGE)}
    return frame.with_columns(**absent).select(list(table.schema)).cast(wanted)


def _picked(task: TaskRows, drawn: pl.DataFrame, last: bool) -> pl.DataFrame:
    """The rows of a task that go into samples, sorted by uid: all of the current task, the drawn ones of another."""
    rows = task.scan()
    if not last:
        rows = rows.join(drawn.lazy().filter(task=task.task.name).select("uid"), on="uid", how="semi")
    origin = "current" if last else "replay"
    return (
        rows.collect()
        .sort("uid")
        .with_columns(task=pl.lit(task.task.name), stage=pl.lit(task.task.stage, dtype=pl.Int32), origin=pl.lit(origin))
    )


def _samples(tasks: list[TaskRows], picked: list[pl.DataFrame], instructions: pl.DataFrame) -> pl.DataFrame:
    rows = pl.concat(picked).drop("tags", "candidates")
    score = instructions.select(pl.col("uid").alias("instruction_uid"), "tags", "insinfo")
    rows = rows.join(score, on="instruction_uid", how="left", maintain_order="left")
    return _fit(_plain_messages(rows).with_columns(weight=pl.lit(1.0)), SAMPLES)


def _plain_messages(rows: pl.DataFrame) -> pl.DataFrame:
    """{role, content} only, unless some message of the table carries a tool call, its answer, or a name."""
    messages = pl.concat([rows[c].list.explode(empty_as_null=False) for c in ("prompt", "completion")])
    extras = ("tool_calls", "tool_call_id", "name")
    if len(messages) and any(messages.struct.field(f).is_not_null().any() for f in extras):
        return rows
    keep = pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"))
    return rows.with_columns(pl.col("prompt", "completion").list.eval(keep))


def _completions(tasks: list[TaskRows], picked: list[pl.DataFrame]) -> pl.DataFrame:
    """The ranked answers that preference and ranked rows bring, best first."""
    found = []
    for rows in picked:
        ranked = rows.filter(pl.col("candidates").list.len() > 0).select("uid", "task", "stage", "candidates")
        for prompt, task, stage, candidates in ranked.iter_rows():
            seen: dict[str, int] = {}
            for c in sorted(candidates, key=lambda c: (c["rank"], c["text"])):
                index = seen.get(c["text"], 0)
                seen[c["text"]] = index + 1
                uid = completion_uid(prompt, "annotated", c["text"], index)
                score = c["score"]
                found.append((uid, prompt, task, stage, "annotated", c["text"], score,
                              None if score is None else "source score", c["rank"]))  # fmt: skip
    names = ["uid", "prompt_uid", "task", "stage", "origin", "text", "reward", "reward_id", "rank"]
    schema = {name: COMPLETIONS.schema[name] for name in names}
    return _fit(pl.DataFrame(found, schema=schema, orient="row"), COMPLETIONS)


def _instructions(tasks: list[TaskRows], drawn: pl.DataFrame, scored: pl.DataFrame | None) -> pl.DataFrame:
    each = [
        t.instructions.drop("tags").with_columns(task=pl.lit(t.task.name), stage=pl.lit(t.task.stage, dtype=pl.Int32))
        for t in tasks
    ]
    frame = pl.concat(each).join(drawn, on="uid", how="left", maintain_order="left")
    if scored is not None:
        frame = frame.join(scored.drop("rarest"), on="uid", how="left", maintain_order="left")
    return _fit(frame, INSTRUCTIONS)


def _tasks(tasks: list[TaskRows], quotas: pl.DataFrame, instructions: pl.DataFrame, distances: Any) -> pl.DataFrame:
    quota = {name: (share, asked) for name, share, asked in quotas.select("task", "share", "quota").iter_rows()}
    drawn = instructions.filter(pl.col("granted") > 0)
    totals = drawn.group_by("task").agg(
        granted=pl.col("granted").sum(),
        covered=pl.len(),
        insinfo=(pl.col("insinfo") * pl.col("granted")).sort().sum() / pl.col("granted").sum(),
        scored=pl.col("insinfo").is_not_null().all(),
    )
    total = {row["task"]: row for row in totals.iter_rows(named=True)}
    found = []
    for place, t in enumerate(tasks):
        row: dict[str, Any] = {"task": t.task.name, "stage": t.task.stage, **t.summary}
        if place < len(tasks) - 1:
            share, asked = quota[t.task.name]
            got = total.get(t.task.name, {"granted": 0, "covered": 0, "insinfo": None, "scored": False})
            row |= {"share": share, "quota": asked, "granted": got["granted"], "covered": got["covered"],
                    "insinfo": got["insinfo"] if got["scored"] else None,
                    "reason": _reason(asked, got["granted"], row["rows"])}  # fmt: skip
            if distances is not None:
                row |= {"distance": distances[place].value, "distance_bound": distances[place].bound}
        found.append({name: row.get(name) for name in TASKS.schema})
    return _fit(pl.DataFrame(found, schema=TASKS.schema), TASKS)


def _reason(quota: int, granted: int, rows: int) -> str | None:
    if granted == quota:
        return None
    if granted > quota:
        return f"{granted - quota} more: the excess of tasks that are smaller than their quota"
    if granted == rows:
        return f"the task has only {rows} rows"
    return f"{quota - granted} fewer: all shares were rounded anew with the excess of smaller tasks"


def _drops(tasks: list[TaskRows], picked: list[pl.DataFrame], instructions: pl.DataFrame) -> pl.DataFrame:
    """Rows that could not be used, and rows that the draw left out with their instruction's InsInfo."""
    score = instructions.lazy().select(pl.col("uid").alias("instruction_uid"), pl.col("insinfo").alias("score"))
    every = []
    for task, rows in zip(tasks, picked, strict=True):
        stage = pl.lit(task.task.stage, dtype=pl.Int32)
        every.append(task.drops.with_columns(stage=stage))
        if task is not tasks[-1]:
            left = task.scan().select("uid", "row", "instruction_uid")
            left = left.join(rows.lazy().select("uid"), on="uid", how="anti").join(
                score, on="instruction_uid", how="left"
            )
            named = left.with_columns(task=pl.lit(task.task.name), stage=stage, step=pl.lit("sample"),
                                      reason=pl.lit("not drawn"))  # fmt: skip
            every.append(_fit(named.collect(), DROPS))
    return pl.concat([_fit(each, DROPS) for each in every]).sort("stage", "row", "uid")


def _packages() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
