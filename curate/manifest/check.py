"""`check`: does a manifest keep its own promises? Every fault is a sentence that names table, row and column.

Each rule below is one small function of the tables. A rule may assume that the schema holds: it runs only then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from curate.manifest.check_policy import POLICY_RULES, buckets, tokens
from curate.manifest.io import Manifest, Stored, hash_faults, read_provenance, tables_of
from curate.manifest.remote import local, named
from curate.manifest.schema import TABLES, ManifestError, completion_uid, instruction_uid, sample_uid
from curate.manifest.tables import batches, counts, validate

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
    faults, tables, sound = hash_faults(folder, provenance), dict[str, Any](), True
    for table in TABLES.values():
        if table.file not in provenance["outputs"] and table not in tables_of(provenance):
            tables[table.name] = table.empty()
            continue
        try:
            tables[table.name] = stored = Stored(folder / table.file, table, provenance)
            found = validate(table, stored.lazy())
        except FileNotFoundError:
            found = [f"{table.file}: missing"]
        except (pl.exceptions.PolarsError, OSError) as error:
            found = [f"{table.file}: not readable as Parquet: {error}"]
        faults, sound = faults + found, sound and not found
    if sound:
        manifest = Manifest(folder=folder, provenance=provenance, **tables)
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
    shown = list(islice(faults, MAX_SHOWN))
    more = sum(1 for _ in faults)
    return [*shown, f"… and {more} more like the last one"] if more else shown


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
    right = pl.col("task").replace_strict(stage_of, default=None, return_dtype=pl.Int32)
    for name in ("samples", "completions", "instructions", "drops"):
        rows = m.scan(name).select("task", "stage").with_row_index("number")
        for number, task, stage in rows.filter(right.ne_missing(pl.col("stage"))).collect().iter_rows():
            if task not in stage_of:
                yield f"{name}.parquet: row {number}: task {task!r} is not in the stream (tasks.parquet)"
            else:
                yield f"{name}.parquet: row {number}: stage {stage} of task {task!r}, it must be {stage_of[task]}"
    rows = m.scan("samples").select("stage", "origin").with_row_index("number").filter(pl.col("origin") != "augmented")
    wrong = (pl.col("stage") == current) != (pl.col("origin") == "current")
    for number, stage, origin in rows.filter(wrong).collect().iter_rows():
        yield f"samples.parquet: row {number}: origin {origin!r} at stage {stage}, the current stage is {current}"


def _uids(m: Manifest) -> Iterator[str]:
    """Every uid is the hash of its row."""
    ranked: dict[str, list[tuple[str, int]]] = {}
    brought = pl.col("origin").is_in(["annotated", "human"]) & pl.col("rank").is_not_null()
    for prompt, text, rank in _rows(m.scan("completions").filter(brought).select("prompt_uid", "text", "rank")):
        ranked.setdefault(prompt, []).append((text, rank))
    columns = ("uid", "task", "prompt", "completion", "references", "tools", "parent_uid")
    for number, (uid, *content) in enumerate(_rows(m.scan("samples").select(columns))):
        task, prompt, completion, references, tools, parent = content
        if sample_uid(task, prompt, completion, references, tools, parent, ranked.get(uid, ())) != uid:
            yield f"samples.parquet: row {number}: uid {uid} is not the hash of its content; the row was edited"
    for number, (uid, task, text) in enumerate(m.instructions.select("uid", "task", "instruction").iter_rows()):
        if instruction_uid(task, text) != uid:
            yield f"instructions.parquet: row {number}: uid {uid} is not the hash of its content"
    same = ["prompt_uid", "origin", "text"]  # equal texts of a prompt have numbers; most texts have no equal
    answers = m.scan("completions").select(*same, "uid")
    other = [row for row in _rows(answers) if completion_uid(row[0], row[1], row[2]) != row[3]]
    named = pl.DataFrame(other, schema=answers.collect_schema(), orient="row").select(same).unique()
    again = answers.join(named.lazy(), on=same, how="semi", maintain_order="left").collect()
    for prompt, origin, text, uids in again.group_by(same, maintain_order=True).agg("uid").iter_rows():
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
    known = m.instructions.lazy().select("task", "instruction", pl.col("uid").alias("instruction_uid"))
    # drawn, then left out because the policy had no good answer
    gone = m.scan("drops").filter(step="rollout").join(known.drop("task"), on="instruction_uid")
    taken = pl.concat([m.scan("samples").filter(origin="replay").select("task", "instruction"),
                       gone.select("task", "instruction")])  # fmt: skip
    drawn = taken.group_by("task", "instruction").len("drawn").collect()
    each = m.instructions.join(drawn, on=["task", "instruction"], how="left").with_columns(pl.col("drawn").fill_null(0))
    for uid, granted, found in each.select("uid", "granted", "drawn").iter_rows():
        if (granted or 0) != found:
            yield f"instructions.parquet: uid {uid}: granted {granted}, the tables hold {found} of its rows"
    kept = m.scan("samples").filter(pl.col("origin") != "augmented").join(known, on=["task", "instruction"])
    left = m.scan("drops").filter(pl.col("step").is_in(LEFT_OUT))
    both = pl.concat([kept.select("instruction_uid"), left.select("instruction_uid")])
    have = both.group_by("instruction_uid").len().collect()
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
        if name in TABLES and (n := m.height(name)) != rows:  # a later minor version may have more tables
            yield f"{name}.parquet: {n} rows, provenance.json says {rows}"
    unusable = _by_task(m.scan("drops").filter(step="read"))
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
    kept = _by_task(m.scan("samples").filter(pl.col("origin") != "augmented"))
    left = _by_task(m.scan("drops").filter(pl.col("step").is_in(LEFT_OUT)))
    for task, rows in m.tasks.select("task", "rows").iter_rows():
        if kept.get(task, 0) + left.get(task, 0) != rows:
            yield (
                f"tasks.parquet: task {task!r} has {rows} rows, but {kept.get(task, 0)} are in samples.parquet and "
                f"{left.get(task, 0)} in drops.parquet"
            )
    out = m.scan("drops").filter(pl.col("step") != "read").select("uid")
    for uid in sorted(out.join(m.scan("samples").select("uid"), on="uid", how="semi").collect()["uid"]):
        yield f"drops.parquet: uid {uid} was left out by the build, yet it is in samples.parquet"


def _lineage(m: Manifest) -> Iterator[str]:
    """Parents, prompts and instructions that rows point to are there."""
    samples = m.scan("samples").select("uid")
    instructions = m.scan("instructions").select("uid")
    for table, column, where, there in (
        ("samples", "parent_uid", "samples", samples),
        ("completions", "prompt_uid", "samples", samples),
        ("drops", "instruction_uid", "instructions", instructions),
    ):
        points = m.scan(table).select(column).with_row_index("number").filter(pl.col(column).is_not_null())
        lost = points.join(there, left_on=column, right_on="uid", how="anti").collect().sort("number")
        for number, uid in lost.iter_rows():
            yield f"{table}.parquet: row {number}: {column} {uid} is not in {where}.parquet"
    rows = m.scan("samples").select("origin", "parent_uid").with_row_index("number")
    for number, origin, parent in (
        rows.filter((pl.col("origin") == "augmented") != pl.col("parent_uid").is_not_null()).collect().iter_rows()
    ):
        yield f"samples.parquet: row {number}: origin {origin!r} with parent_uid {parent}"
    known = m.scan("instructions").select("task", "instruction")
    read = m.scan("samples").filter(pl.col("origin") != "augmented").select("task", "instruction")
    lost = read.join(known, on=["task", "instruction"], how="anti", maintain_order="left").collect()
    for task, text in lost.iter_rows():
        yield f"samples.parquet: task {task!r}: instruction {text[:60]!r} is not in instructions.parquet"


def _scores(m: Manifest) -> Iterator[str]:
    """F_t, N and InsInfo are what the instructions' tags give, and a sample has its instruction's tags and InsInfo."""
    config = m.provenance["config"]
    current = m.tasks.sort("stage")["task"][-1]
    pool = m.instructions if config["score"]["pool"] == "all" else m.instructions.filter(pl.col("task") != current)
    if config["tags"]["tagger"] == "llm":  # an instruction that the model gave no tags for is not in the pool
        pool = pool.filter(pl.col("tags").is_not_null())
        untagged = m.instructions.lazy().filter(pl.col("tags").is_null() & (pl.col("task") != current))
        replayed = m.scan("samples").filter(origin="replay").select("uid", "task", "instruction")
        for uid in replayed.join(untagged, on=["task", "instruction"], how="semi").collect()["uid"]:
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
    read = (
        m.scan("samples")
        .filter(pl.col("origin") != "augmented")
        .select("uid", "task", "instruction", "tags", "insinfo")
    )
    of = m.scan("instructions").select("task", "instruction", "tags", "insinfo")
    both = read.join(of, on=["task", "instruction"], suffix="_of", maintain_order="left")
    for column in ("tags", "insinfo"):
        for uid in both.filter(pl.col(column).ne_missing(pl.col(f"{column}_of"))).collect()["uid"]:
            yield f"samples.parquet: uid {uid}: column {column!r} is not its instruction's"


def _rows(table: pl.LazyFrame) -> Iterator[tuple[Any, ...]]:
    """The rows of a table of any size as Python values."""
    return (row for batch in batches(table) for row in batch.iter_rows())


def _by_task(table: pl.LazyFrame) -> dict[str, int]:
    return {task: n for (task,), n in counts(table, "task").items()}


RULES: tuple[Rule, ...] = (
    _stream, _rows_belong, _uids, _quotas, _counts, _inputs, _map, _nothing_lost, _lineage, _scores, *POLICY_RULES
)  # fmt: skip
PART_RULES: tuple[Rule, ...] = (_uids, tokens, buckets)
"""Of what training leaves behind (`part.py`): its tables of sources, draws and scores are empty."""

__all__ = ["ManifestError", "check"]
