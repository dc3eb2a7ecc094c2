"""From stage results to the manifest's tables: joins and sorts, no decision.

samples and drops, which may be larger than memory, are LazyFrames in the order of their files; nothing here runs them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import polars as pl

import curate
from curate.augment import why_dropped
from curate.ingest import TaskRows
from curate.losses import deciding
from curate.manifest import Bucket
from curate.manifest.schema import (
    DROPS,
    INSTRUCTIONS,
    SAMPLES,
    TAGS,
    TASKS,
    TOOL_MESSAGE,
)
from curate.manifest.tables import Rows, batches, streamed
from curate.policy import PolicyWork

PACKAGES = ("numpy", "polars", "POT", "scikit-learn", "rouge-score", "scipy", "sentence-transformers", "spacy",
            "spacy-lookups-data", "torch", "transformers")  # fmt: skip
SLICE = 262_144  # dropped rows that are written at once


def assemble(
    tasks: list[TaskRows], made: Mapping[str, Any], work: PolicyWork, facts: Mapping[str, Any]
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """(tables, provenance) of a build.

    Args:
        tasks: the stream, the current task last.
        made: `sample`: folder of the draw; `tags`: folder of the scores, `distances`: list, `losses`: table, and `map`:
            (uid, x, y) of every instruction with the variance of both axes, where there are any.
        work: what the policy stages made of the rows.
        facts: what the provenance records of the build.
    """
    drawn = {
        name: pl.read_parquet(made["sample"] / f"{name}.parquet", glob=False)
        for name in ("rows", "instructions", "tasks")
    }
    scored = pl.read_parquet(made["tags"] / "instructions.parquet", glob=False) if "tags" in made else None
    places, variance = made.get("map", (None, None))
    instructions = _instructions(tasks, drawn["instructions"], scored, places)
    untagged = _untagged(instructions, scored)
    frames: dict[str, Rows] = {
        "samples": _samples(work.rows, instructions, made.get("losses")),
        "completions": work.completions,
        "tasks": _tasks(tasks, drawn["tasks"], instructions, made.get("distances"), untagged),
        "instructions": instructions,
        "tags": pl.read_parquet(made["tags"] / "tags.parquet", glob=False).sort("tag")
        if "tags" in made
        else TAGS.empty(),
        "augmentations": work.augmentations,
        "drops": _drops(tasks, drawn["rows"], instructions, scored, made.get("losses"), work),
    }
    frames = with_augmentations(frames, facts.get("augment", {}).get("theta", 0.0))
    frames["tasks"] = counted(frames)
    facts = {**facts, "map": {"variance": variance}} if variance else facts
    provenance = {**facts, "rehearse": curate.__version__, "packages": _packages(), "python": platform.python_version()}
    return frames, provenance


def picked(task: TaskRows, drawn: pl.DataFrame, last: bool) -> pl.LazyFrame:
    """The rows of a task that go into samples, by uid: all of the current task, the drawn ones of another."""
    rows = task.scan()
    if not last:
        mine = drawn.lazy().filter(task=task.task.name).select("uid")
        rows = rows.join(mine, on="uid", how="semi", maintain_order="left")
    return rows.with_columns(
        task=pl.lit(task.task.name),
        stage=pl.lit(task.task.stage, dtype=pl.Int32),
        origin=pl.lit("current" if last else "replay"),
        ranked_by=pl.lit(task.task.config.ranked_by),
    )


def _samples(rows: pl.LazyFrame, instructions: pl.DataFrame, losses: pl.DataFrame | None) -> pl.LazyFrame:
    score = instructions.lazy().select(pl.col("uid").alias("instruction_uid"), "tags", "insinfo")
    rows = rows.drop("tags", "candidates").join(score, on="instruction_uid", how="left", maintain_order="left")
    if losses is not None:
        named = losses.lazy().rename({"uid": "source_uid"})
        rows = rows.join(named, on="source_uid", how="left", maintain_order="left")
    return SAMPLES.fit(_plain_messages(rows).with_columns(weight=pl.lit(1.0)))


def with_augmentations(frames: Mapping[str, Rows], theta: float) -> dict[str, Rows]:
    """`frames` with samples and drops as `augmentations.kept` says; the ones that were there before are replaced."""
    every, samples = frames["augmentations"].lazy().collect(), frames["samples"].lazy()
    samples = samples.filter(pl.col("origin") != "augmented")
    parents = samples.select(pl.col("uid").alias("parent_uid"), "instruction", "license", "tags", "insinfo")
    parents = parents.join(every.lazy().select("parent_uid").unique(), on="parent_uid", how="semi")
    joined = every.join(parents.collect(), on="parent_uid", how="left", maintain_order="left")
    answer = pl.col("completion").list.first().struct.field("content")
    new = joined.filter("kept").with_columns(
        origin=pl.lit("augmented"), references=pl.concat_list(answer), augmentation="template", weight=pl.lit(1.0),
        written_by=pl.lit("policy"),
    )  # fmt: skip
    new = _like(SAMPLES.fit(new), samples).sort("stage", "uid")
    reasons = [why_dropped(fault, theta) for fault in joined.filter(~pl.col("kept"))["fault"]]
    instruction = (
        frames["instructions"].lazy().collect().select("task", "instruction", pl.col("uid").alias("instruction_uid"))
    )
    out = joined.filter(~pl.col("kept")).with_columns(
        step=pl.lit("augment"), reason=pl.Series(reasons, dtype=pl.String)
    )
    out = out.join(instruction, on=["task", "instruction"], how="left", maintain_order="left")
    # rewrites of one row may be the same text; augmentations.parquet tells them apart by template, a uid cannot
    first = (pl.int_range(pl.len()).over("uid") == 0) & pl.col("uid").is_in(new["uid"].to_list()).not_()
    drops, added = frames["drops"].lazy().filter(pl.col("step") != "augment"), DROPS.fit(out.filter(first))
    return {  # a task's rewrites come behind its rows in samples; in drops, where they have no row number, before them
        **frames,
        "samples": samples.merge_sorted(new.lazy(), key="stage", maintain_order=True),
        "drops": added.sort("stage", "uid").lazy().merge_sorted(drops, key="stage", maintain_order=True),
    }


def _like(new: pl.DataFrame, samples: pl.LazyFrame) -> pl.DataFrame:
    """Messages in the layout of `samples`, which may carry the fields of tool calls."""
    if samples.collect_schema()["prompt"] == new.schema["prompt"]:
        return new
    empty = [pl.lit(None, dtype=pl.String).alias(f.name) for f in TOOL_MESSAGE.fields[2:]]
    keep = pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"), *empty)
    return new.with_columns(pl.col("prompt", "completion").list.eval(keep))


def counted(frames: Mapping[str, Rows]) -> pl.DataFrame:
    """Tasks with what was augmented, rolled out and sorted into buckets; null where nothing of the kind was done."""
    tasks, rewrites = frames["tasks"].lazy().collect(), frames["augmentations"].lazy()
    kept = rewrites.group_by("task").agg(augmented=pl.col("kept").sum().cast(pl.Int64)).collect()
    if kept.height:
        tasks = tasks.drop("augmented").join(kept, on="task", how="left", maintain_order="left")
    rolled = frames["completions"].lazy().filter(origin="policy").group_by("task")
    counts = rolled.agg(
        pl.len().cast(pl.Int64).alias("rollouts"),
        *((pl.col("bucket") == b).sum().cast(pl.Int64).alias(str(b)) for b in Bucket),
    ).collect()
    if counts.height:
        tasks = tasks.drop("rollouts", *map(str, Bucket)).join(counts, on="task", how="left", maintain_order="left")
    return TASKS.fit(tasks)


def _plain_messages(rows: pl.LazyFrame) -> pl.LazyFrame:
    """{role, content} only, unless some message of the table carries a tool call, its answer, or a name."""
    extras = ("tool_calls", "tool_call_id", "name")
    for batch in batches(rows.select("prompt", "completion")):
        messages = pl.concat([batch[c].list.explode(empty_as_null=False) for c in ("prompt", "completion")])
        if len(messages) and any(messages.struct.field(f).is_not_null().any() for f in extras):
            return rows
    keep = pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"))
    return rows.with_columns(pl.col("prompt", "completion").list.eval(keep))


def _instructions(
    tasks: list[TaskRows], drawn: pl.DataFrame, scored: pl.DataFrame | None, places: pl.DataFrame | None
) -> pl.DataFrame:
    each = [
        t.instructions.drop("tags").with_columns(task=pl.lit(t.task.name), stage=pl.lit(t.task.stage, dtype=pl.Int32))
        for t in tasks
    ]
    frame = pl.concat(each).join(drawn, on="uid", how="left", maintain_order="left")
    if scored is not None:
        frame = frame.join(scored.drop("rarest", "fault"), on="uid", how="left", maintain_order="left")
    if places is not None:
        frame = frame.join(places, on="uid", how="left", maintain_order="left")
    return INSTRUCTIONS.fit(frame)


def _untagged(instructions: pl.DataFrame, scored: pl.DataFrame | None) -> dict[str, int]:
    """Task -> rows that cannot be drawn, since the tagger failed at their instruction."""
    if scored is None:
        return {}
    faulty = scored.filter(pl.col("fault").is_not_null())
    rows = instructions.join(faulty, on="uid", how="semi").group_by("task").agg(pl.col("rows").sum())
    return dict(rows.iter_rows())


def _tasks(
    tasks: list[TaskRows], quotas: pl.DataFrame, instructions: pl.DataFrame, distances: Any, untagged: dict[str, int]
) -> pl.DataFrame:
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
                    "reason": _reason(asked, got["granted"], row["rows"], untagged.get(t.task.name, 0))}  # fmt: skip
            if distances is not None:
                row |= {"distance": distances[place].value, "distance_bound": distances[place].bound}
        found.append({name: row.get(name) for name in TASKS.schema})
    return TASKS.fit(pl.DataFrame(found, schema=TASKS.schema))


def _reason(quota: int, granted: int, rows: int, untagged: int) -> str | None:
    if granted == quota:
        return None
    if granted > quota:
        return f"{granted - quota} more: the excess of tasks that are smaller than their quota"
    if granted == rows - untagged:
        return f"the task has only {granted} rows" + (f" with tags, of {rows}" if untagged else "")
    return f"{quota - granted} fewer: all shares were rounded anew with the excess of smaller tasks"


def _drops(
    tasks: list[TaskRows],
    drawn: pl.DataFrame,
    instructions: pl.DataFrame,
    scored: pl.DataFrame | None,
    losses: pl.DataFrame | None,
    work: PolicyWork,
) -> pl.LazyFrame:
    """Rows that could not be read, tagged or drawn, and those that on-policy replay left out; by stage, row and uid."""
    score = instructions.select(pl.col("uid").alias("instruction_uid"), pl.col("insinfo").alias("score"))
    if losses is not None:
        ratio = losses["reference_loss"].null_count() < losses.height
        value = [deciding(a, b, ratio) for a, b in losses.select("loss", "reference_loss").iter_rows()]
        losses = losses.select("uid").with_columns(score=pl.Series(value, dtype=pl.Float64).fill_nan(None))

    def told(left: pl.DataFrame) -> pl.DataFrame:
        """Rows that were not drawn, each with its score and the reason."""
        out = left.join(score, on="instruction_uid", how="left")
        out = out.with_columns(step=pl.lit("sample"), reason=pl.lit("not drawn"))
        if losses is not None:
            out = out.drop("score").join(losses, on="uid", how="left")
        if scored is not None:
            fault = scored.filter(pl.col("fault").is_not_null()).select(instruction_uid="uid", fault="fault")
            out = out.join(fault, on="instruction_uid", how="left").with_columns(
                step=pl.when(pl.col("fault").is_null()).then("step").otherwise(pl.lit("tags")),
                reason=pl.coalesce(pl.lit("its instruction has no tags: ") + pl.col("fault"), "reason"),
            )
        return out

    def of(task: TaskRows) -> Iterator[pl.DataFrame]:
        stage, name = pl.lit(task.task.stage, dtype=pl.Int32), pl.lit(task.task.name)
        others = pl.concat([DROPS.fit(task.drops.with_columns(stage=stage)), work.drops.filter(stage=task.task.stage)])
        left = task.scan().select("row", "uid", "instruction_uid")
        left = left.join(drawn.lazy().filter(task=task.task.name).select("uid"), on="uid", how="anti")
        end = 0
        for part in left.collect().sort("row").iter_slices(SLICE) if task is not tasks[-1] else ():
            start, end = end, part["row"][-1]
            between = others.filter(pl.col("row").is_between(start, end, closed="right"))
            out = DROPS.fit(told(part).with_columns(task=name, stage=stage))
            yield pl.concat([out, between]).sort("row", "uid")
        yield others.filter(pl.col("row") > end).sort("row", "uid")

    return streamed(lambda: (frame for task in tasks for frame in of(task)), DROPS.schema)


def _packages() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
