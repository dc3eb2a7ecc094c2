"""`check`: does a manifest keep its own promises? Every fault is a sentence that names table, row and column.

Each rule below is one small function of the tables. A rule may assume that the schema holds: it runs only then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from curate.manifest.check_policy import POLICY_RULES, buckets, tokens
from curate.manifest.io import Manifest, hash_faults, of_this_version, read_provenance, tables_of, validate
from curate.manifest.remote import local, named
from curate.manifest.schema import TABLES, ManifestError, completion_uid, instruction_uid, sample_uid

Rule = Callable[[Manifest], Iterator[str]]
MAX_SHOWN = 5  # of one kind; the rest is counted
LEFT_OUT = ("sample", "tags", "rollout")  # steps of drops that leave out a row that could be read


def check(folder: str | os.PathLike[str]) -> list[str]:
    """Faults of a manifest folder, or of a manifest at a URL; an empty list means that it is sound.

    Looks at the schema, the file hashes, every uid, the quotas, the order of the stream, lineage, InsInfo, and that
    every source row is either in samples or in drops. Raises ManifestError only where there is no manifest at all.
    """
    with local(folder) as path:
        return [named(fault, path, folder) for fault in _faults(path)]


def _faults(folder: Path) -> list[str]:
    provenance = read_provenance(folder)
    faults = hash_faults(folder, provenance)
    frames: dict[str, pl.DataFrame] = {}
    for table in TABLES.values():
        if table.file not in provenance["outputs"] and table not in tables_of(provenance):
            frames[table.name] = table.empty()
            continue
        try:
            frames[table.name] = of_this_version(pl.read_parquet(folder / table.file, glob=False), table, provenance)
            faults += validate(table, frames[table.name])
        except FileNotFoundError:
            faults.append(f"{table.file}: missing")
        except (pl.exceptions.PolarsError, OSError) as error:
            faults.append(f"{table.file}: not readable as Parquet: {error}")
            frames.pop(table.name, None)
    schema_holds = len(frames) == len(TABLES) and not any(validate(t, frames[n]) for n, t in TABLES.items())
    if schema_holds:
        manifest = Manifest(folder=folder, provenance=provenance, **frames)
        for rule in PART_RULES if "part" in provenance else RULES:
            faults += _shortened(_applied(rule, manifest))
    return faults


def _applied(rule: Rule, manifest: Manifest) -> Iterator[str]:
    """A rule's faults; a rule that a forged value breaks says so, and the others still run."""
    try:
        yield from rule(manifest)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, pl.exceptions.PolarsError) as error:
        promise = " ".join((rule.__doc__ or "").split())
        yield f"cannot be verified, a value is out of place ({type(error).__name__}: {error}): {promise}"


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
        if origin != "augmented" and (stage == current) != (origin == "current"):
            yield f"samples.parquet: row {number}: origin {origin!r} at stage {stage}, the current stage is {current}"


def _uids(m: Manifest) -> Iterator[str]:
    """Every uid is the hash of its row."""
    ranked: dict[str, list[tuple[str, int]]] = {}
    brought = m.completions.filter(pl.col("origin").is_in(["annotated", "human"]) & pl.col("rank").is_not_null())
    for prompt, text, rank in brought.select("prompt_uid", "text", "rank").iter_rows():
        ranked.setdefault(prompt, []).append((text, rank))
    columns = ("uid", "task", "prompt", "completion", "references", "tools", "parent_uid")
    for number, (uid, *content) in enumerate(m.samples.select(columns).iter_rows()):
        task, prompt, completion, references, tools, parent = content
        if sample_uid(task, prompt, completion, references, tools, parent, ranked.get(uid, ())) != uid:
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
    """Shares and quotas add up to the budget and follow the distances; a difference of quota and grant has a reason."""
    previous, replay = m.tasks.filter(pl.col("quota").is_not_null()).sort("stage"), m.provenance["replay"]
    asked = replay["asked"]
    total = previous["distance"].sum()
    for column in ("share", "granted", "covered"):
        if previous[column].null_count():
            yield f"tasks.parquet: column {column!r} is null for a previous task"
            return
    for column in ("quota", "share"):
        if previous.height and not math.isclose(previous[column].sum(), asked, abs_tol=1e-6):
            yield f"tasks.parquet: column {column!r} adds up to {previous[column].sum()}, the budget asked for {asked}"
    for t in previous.iter_rows(named=True):
        where = f"tasks.parquet: task {t['task']!r}"
        if abs(t["quota"] - t["share"]) >= 1 + 1e-6:
            yield f"{where}: quota {t['quota']} is not its share {t['share']}, rounded"
        if t["distance"] is not None and total:
            share = t["distance"] / total * asked
            if not math.isclose(t["share"], share, rel_tol=1e-9, abs_tol=1e-6):
                yield f"{where}: share {t['share']}, its distance {t['distance']} of {total} gives {share}"
        if (t["distance"] is None) != (t["distance_bound"] is None):
            yield f"{where}: distance {t['distance']}, distance_bound {t['distance_bound']}"
        if t["granted"] > t["rows"]:
            yield f"{where}: granted {t['granted']} rows of {t['rows']}"
        if (t["granted"] != t["quota"]) != (t["reason"] is not None):
            yield f"{where}: quota {t['quota']}, granted {t['granted']}, reason {t['reason']!r}"


def _counts(m: Manifest) -> Iterator[str]:
    """Rows, instructions, grants and means of a task or instruction are what the other tables hold."""
    gone = m.drops.filter(step="rollout").join(
        m.instructions.select("instruction", pl.col("uid").alias("instruction_uid")), on="instruction_uid"
    )  # drawn, then left out because the policy had no good answer
    drawn = pl.concat([m.samples.filter(origin="replay").select("task", "instruction"),
                       gone.select("task", "instruction")])  # fmt: skip
    drawn = drawn.group_by("task", "instruction").len("drawn")
    each = m.instructions.join(drawn, on=["task", "instruction"], how="left").with_columns(pl.col("drawn").fill_null(0))
    for uid, granted, found in each.select("uid", "granted", "drawn").iter_rows():
        if (granted or 0) != found:
            yield f"instructions.parquet: uid {uid}: granted {granted}, the tables hold {found} of its rows"
    kept = m.samples.filter(pl.col("origin") != "augmented").join(
        m.instructions.select("task", "instruction", pl.col("uid").alias("instruction_uid")), on=["task", "instruction"]
    )
    left = m.drops.filter(pl.col("step").is_in(LEFT_OUT))
    have = pl.concat([kept.select("instruction_uid"), left.select("instruction_uid")]).group_by("instruction_uid").len()
    rows = m.instructions.join(have, left_on="uid", right_on="instruction_uid", how="left")
    for uid, said, found in (
        rows.filter(pl.col("rows").ne_missing(pl.col("len"))).select("uid", "rows", "len").iter_rows()
    ):
        yield f"instructions.parquet: uid {uid}: {said} rows, but {found or 0} are in samples.parquet and drops.parquet"
    weighted = pl.col("insinfo") * pl.col("granted")
    sums = m.instructions.group_by("task").agg(
        pl.len().alias("n"), pl.col("rows").sum(), pl.col("granted").sum(), 
        (pl.col("granted") > 0).sum().alias("covered"),
        weighted.sum().alias("insinfo"),
    )  # fmt: skip
    for t in m.tasks.join(sums, on="task", how="left", suffix="_of").iter_rows(named=True):
        where, previous = f"tasks.parquet: task {t['task']!r}", t["quota"] is not None
        for column, found in (("instructions", t["n"]), ("rows", t["rows_of"])):
            if t[column] != found:
                yield f"{where}: {column} {t[column]}, instructions.parquet gives {found}"
        for column in ("granted", "covered") if previous else ():
            if t[column] != t[f"{column}_of"]:
                yield f"{where}: {column} {t[column]}, instructions.parquet gives {t[f'{column}_of']}"
        mean = t["insinfo_of"] / t["granted"] if t["insinfo"] is not None and t["granted"] else None
        if t["insinfo"] is not None and (
            mean is None or not math.isclose(t["insinfo"], mean, rel_tol=1e-9, abs_tol=1e-9)
        ):
            yield f"{where}: insinfo {t['insinfo']}, instructions.parquet gives {mean}"


def _inputs(m: Manifest) -> Iterator[str]:
    """Each task has as many usable and unusable rows as the provenance says that its source had."""
    for name, rows in m.provenance["rows"].items():
        if name in TABLES and getattr(m, name).height != rows:  # a later minor version may have more tables
            yield f"{name}.parquet: {getattr(m, name).height} rows, provenance.json says {rows}"
    unusable = dict(m.drops.filter(pl.col("step") == "read").group_by("task").len().iter_rows())
    inputs = {i["task"]: i for i in m.provenance["inputs"]}
    for task, rows, instructions in m.tasks.select("task", "rows", "instructions").iter_rows():
        said, found = (
            inputs.get(task, {}),
            {"rows": rows, "instructions": instructions, "dropped": unusable.get(task, 0)},
        )
        for key, number in found.items():
            if said.get(key) != number:
                yield f"task {task!r}: the tables have {key} {number}, provenance.json says {said.get(key)}"


def _map(m: Manifest) -> Iterator[str]:
    """A place on the map has both coordinates, and either every instruction has one or none has."""
    for uid in m.instructions.filter(pl.col("x").is_null() != pl.col("y").is_null())["uid"]:
        yield f"instructions.parquet: uid {uid}: one of its coordinates x, y is null"
    if 0 < (n := m.instructions["x"].null_count()) < m.instructions.height:
        yield f"instructions.parquet: column 'x' is null for {n} of {m.instructions.height} instructions"


def _nothing_lost(m: Manifest) -> Iterator[str]:
    """Each usable row of a task is in samples or was left out by the draw; no uid is in both."""
    kept = dict(m.samples.filter(pl.col("origin") != "augmented").group_by("task").len().iter_rows())
    left = dict(m.drops.filter(pl.col("step").is_in(LEFT_OUT)).group_by("task").len().iter_rows())
    for task, rows in m.tasks.select("task", "rows").iter_rows():
        if kept.get(task, 0) + left.get(task, 0) != rows:
            yield (
                f"tasks.parquet: task {task!r} has {rows} rows, but {kept.get(task, 0)} are in samples.parquet and "
                f"{left.get(task, 0)} in drops.parquet"
            )
    both = m.drops.filter(pl.col("step") != "read").join(m.samples.select("uid"), on="uid", how="semi")
    for uid in sorted(both["uid"]):
        yield f"drops.parquet: uid {uid} was left out by the build, yet it is in samples.parquet"


def _lineage(m: Manifest) -> Iterator[str]:
    """Parents, prompts and instructions that rows point to are there."""
    samples = set(m.samples["uid"])
    for number, parent in enumerate(m.samples["parent_uid"]):
        if parent is not None and parent not in samples:
            yield f"samples.parquet: row {number}: parent_uid {parent} is not in samples.parquet"
    for number, (origin, parent) in enumerate(m.samples.select("origin", "parent_uid").iter_rows()):
        if (origin == "augmented") != (parent is not None):
            yield f"samples.parquet: row {number}: origin {origin!r} with parent_uid {parent}"
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
    """F_t, N and InsInfo are what the instructions' tags give, and a sample has its instruction's tags and InsInfo."""
    config = m.provenance["config"]
    current = m.tasks.sort("stage")["task"][-1]
    pool = m.instructions if config["score"]["pool"] == "all" else m.instructions.filter(pl.col("task") != current)
    if config["tags"]["tagger"] == "llm":  # an instruction that the model gave no tags for is not in the pool
        pool = pool.filter(pl.col("tags").is_not_null())
        untagged = m.instructions.filter(pl.col("tags").is_null() & (pl.col("task") != current))
        for uid in m.samples.join(untagged, on=["task", "instruction"], how="semi").filter(origin="replay")["uid"]:
            yield f"samples.parquet: uid {uid}: it is replayed, yet its instruction has no tags"
    found = dict(pool.select(pl.col("tags").list.explode()).drop_nulls().to_series().value_counts().iter_rows())
    for tag, canonical, count, n in m.tags.select("tag", "canonical", "count", "pool").iter_rows():
        if n != pool.height:
            yield f"tags.parquet: tag {tag!r}: pool {n}, instructions.parquet gives {pool.height}"
        if count != found.get(canonical, 0) and (canonical in found or config["tags"]["min_frequency"] == 1):
            yield f"tags.parquet: tag {tag!r}: count {count}, instructions.parquet gives {found.get(canonical, 0)}"
    if m.tags.height and (n := pool["insinfo"].null_count()):
        yield f"instructions.parquet: column 'insinfo' is null for {n} instructions of the pool"
    rows = m.instructions.filter(pl.col("insinfo").is_not_null()).select("uid", "tags", "insinfo")
    for uid, tags, insinfo in rows.iter_rows():
        if not math.isclose(insinfo, math.fsum(math.log(pool.height / found[t]) for t in tags or []), abs_tol=1e-9):
            yield f"instructions.parquet: uid {uid}: insinfo {insinfo} is not what its tags and tags.parquet give"
    both = m.samples.filter(pl.col("origin") != "augmented").join(
        m.instructions.select("task", "instruction", "tags", "insinfo"), on=["task", "instruction"], suffix="_of"
    )
    for column in ("tags", "insinfo"):
        for uid in both.filter(pl.col(column).ne_missing(pl.col(f"{column}_of")))["uid"]:
            yield f"samples.parquet: uid {uid}: column {column!r} is not its instruction's"


RULES: tuple[Rule, ...] = (
    _stream, _rows_belong, _uids, _quotas, _counts, _inputs, _map, _nothing_lost, _lineage, _scores, *POLICY_RULES
)  # fmt: skip
PART_RULES: tuple[Rule, ...] = (_uids, tokens, buckets)
"""Of what training leaves behind (`part.py`): its tables of sources, draws and scores are empty."""

__all__ = ["ManifestError", "check"]
