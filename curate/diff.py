"""`diff`: what changed between two builds, row by row, and why; told from the two manifests alone.

A row that only one of them has gets the first cause that applies, in this order: the other is a part of a set; its task
is not in the other stream; its source row is not there, or was changed; the row could not be used; its task is the
current one in one build only; a setting of the draw; the rows granted to its task; its instruction's tags; scores; the
seed; what the draw goes by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import polars as pl

from curate.manifest import Manifest

CAUSES = {
    "task": "its task is not in the other stream",
    "part": "the other is a part of a set, which lacks it",
    "source": "its source row is not in the other source, or reads otherwise there",
    "unusable": "it could not be used",
    "role": "its task is the current one in one build, an older one in the other",
    "setting": "a setting that decides the draw is another",
    "quota": "fewer rows are granted to its task in the build without it",
    "tags": "its instruction has other tags",
    "score": "the scores are others",
    "seed": "the seed is another",
    "place": "its task stands at another place in the stream, which the draw goes by",
    "pool": "its task has other rows to draw from",
    "draw": "other rows were drawn, and none of the above tells why",
    "answer": "it has another answer in the other build",
    "parent": "the row that it rewrites is not in the other set",
    "rewrite": "the policy wrote another rewrite, or none",
}
"""Name of a cause -> what it says of a row that one build has and the other has not."""

DRAWN_BY = ("replay.selector", "replay.unit", "replay.rounding")
"""Settings that decide the draw, beside those that show as quota or score."""
KEPT = ("origin", "weight", "tags", "insinfo", "written_by")  # columns that a row may have changed while it stayed


@dataclass(frozen=True)
class Diff:
    """What changed from build `a` to build `b`."""

    a: str
    b: str
    kept: int
    rows: pl.DataFrame
    """uid, task, row, origin, move (out: only in a; in: only in b), why (of CAUSES), detail."""
    tasks: pl.DataFrame
    """task; stage, rows, distance, quota, granted, each as _a and _b (null: not in that stream); kept, out, in."""
    settings: pl.DataFrame
    """kind (setting, by hand, source, model, version), key, a, b as JSON (null: not there)."""
    moves: pl.DataFrame
    """bucket_a, bucket_b, completions: of the completions that both have (null: in no bucket)."""
    changed: dict[str, int]
    """Column -> rows that both have, but with another value there."""
    notes: list[str] = field(default_factory=list)

    def count(self, move: str) -> int:
        """Rows that went `out` or came `in`."""
        return int((self.rows["move"] == move).sum())

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        found = {k: v.to_dicts() if isinstance(v, pl.DataFrame) else v for k, v in vars(self).items()}
        return {**found, "out": self.count("out"), "in": self.count("in")}


def diff(a: Manifest, b: Manifest) -> Diff:
    """What changed from `a` to `b`. Rows are told apart by their uid, a hash of their content.

    Rows of a = kept + out; rows of b = kept + in; and so for every task.
    """
    sides = _Side(a), _Side(b)
    rows = [*_moved(*sides, "out"), *_moved(*sides[::-1], "in")]
    frame = pl.DataFrame(rows, schema=_ROW).sort("move", "task", "row", "uid", descending=[True, False, False, False])
    both = a.samples.select("uid", *KEPT).join(b.samples.select("uid", *KEPT), on="uid", suffix="_b")
    changed = {c: int(both[c].ne_missing(both[f"{c}_b"]).sum()) for c in KEPT}
    return Diff(
        a=str(a.folder),
        b=str(b.folder),
        kept=both.height,
        rows=frame,
        tasks=_tasks(a, b, frame),
        settings=_settings(a.provenance, b.provenance),
        moves=_moves(a, b),
        changed={column: n for column, n in changed.items() if n},
        notes=_notes(a, b, both.height),
    )


_ROW = {"uid": pl.String, "task": pl.String, "row": pl.Int64, "origin": pl.String, "move": pl.String,
        "why": pl.String, "detail": pl.String}  # fmt: skip


class _Side:
    """One manifest with what is looked up in it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.settings = dict(_flat(manifest.provenance["config"]))
        self.tasks = {t["task"]: t for t in manifest.tasks.iter_rows(named=True)}
        self.uids = set(manifest.samples["uid"])

    @cached_property
    def instructions(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(task, instruction) -> its tags, InsInfo and granted rows."""
        rows = self.manifest.instructions.select("task", "instruction", "tags", "insinfo", "granted")
        return {(row["task"], row["instruction"]): row for row in rows.iter_rows(named=True)}

    @cached_property
    def drops(self) -> dict[str, tuple[str, str]]:
        """Uid of a row that was left out -> step and reason."""
        rows = self.manifest.drops.select("uid", "step", "reason").rows()
        # of rows that read alike one could be drawn, and the others are duplicates of it
        return {uid: (step, reason) for uid, step, reason in sorted(rows, key=lambda row: row[1] == "sample")}

    @cached_property
    def places(self) -> dict[tuple[str, int], str | None]:
        """(task, number of a source row) -> who wrote its completion."""
        rows = self.manifest.samples.filter(pl.col("row").is_not_null()).select("task", "row", "written_by").rows()
        return {(task, row): written_by for task, row, written_by in rows}

    @cached_property
    def rewrites(self) -> dict[str, dict[str, Any]]:
        """Uid -> score and fault of a rewrite that was not kept."""
        rows = self.manifest.augmentations.filter(~pl.col("kept")).select("uid", "score", "fault")
        return {row["uid"]: row for row in rows.iter_rows(named=True)}

    @cached_property
    def scores(self) -> dict[str, tuple[float | None, ...]]:
        """Task -> InsInfo of its instructions, sorted by instruction."""
        rows = self.manifest.instructions.sort("instruction").group_by("task").agg("insinfo")
        return {task: tuple(values) for task, values in rows.iter_rows()}


def _moved(here: _Side, there: _Side, move: str) -> Iterator[dict[str, Any]]:
    """The rows that are `here` only, each with its cause."""
    columns = ("uid", "task", "row", "origin", "instruction", "parent_uid", "written_by", "loss")
    for row in here.manifest.samples.select(columns).iter_rows(named=True):
        if row["uid"] not in there.uids:
            why, detail = _why(row, here, there, move)
            yield {name: row[name] for name in ("uid", "task", "row", "origin")} | {
                "move": move, "why": why, "detail": detail,
            }  # fmt: skip


def _why(row: Mapping[str, Any], here: _Side, there: _Side, move: str) -> tuple[str, str]:
    """(cause, detail) of a row that is `here` and not `there`."""
    task, uid = row["task"], row["uid"]
    if "part" in there.manifest.provenance:
        return "part", f"{there.manifest.folder} is {there.manifest.provenance['part']['what']}, which lacks it"
    if task not in there.tasks:
        return "task", f"{there.manifest.folder} has no task {task!r}"
    if row["origin"] == "augmented":
        return _why_rewrite(row, here, there, move)
    if uid not in there.drops:
        if (task, row["row"]) not in there.places:
            return "source", "the other source has no such row"
        written_by = there.places[task, row["row"]]
        if written_by != row["written_by"]:
            return "answer", f"written by: {_arrow(row['written_by'], written_by, move)}"
        return "source", f"row {row['row']} reads otherwise in the other source"
    step, reason = there.drops[uid]
    return _why_not_drawn(row, here, there, move) if step == "sample" else ("unusable", reason)


def _why_not_drawn(row: Mapping[str, Any], here: _Side, there: _Side, move: str) -> tuple[str, str]:
    task = row["task"]
    granted, other = here.tasks[task]["granted"], there.tasks[task]["granted"]
    if granted is None or other is None:
        return "role", f"rows drawn: {_arrow('all' if granted is None else granted, other, move)}"
    for key in DRAWN_BY:
        if (mine := here.settings.get(key)) != (its := there.settings.get(key)):
            return "setting", f"{key}: {_arrow(mine, its, move)}"
    if other < granted:
        return "quota", f"rows granted to its task: {_arrow(granted, other, move)}"
    if row["loss"] is not None:
        return "score", "its task's rows are taken by their losses, which are others"
    mine, its = (side.instructions.get((task, row["instruction"])) for side in (here, there))
    if mine and its and (its["granted"] or 0) < (mine["granted"] or 0):
        if mine["tags"] != its["tags"]:
            return "tags", _tags(mine["tags"], its["tags"], move)
        if mine["insinfo"] != its["insinfo"]:
            return "score", f"InsInfo: {_arrow(mine['insinfo'], its['insinfo'], move)}"
        if here.scores.get(task) != there.scores.get(task):
            return "score", "other instructions of its task have another InsInfo"
    if (seed := here.settings.get("seed")) != (another := there.settings.get("seed")):
        return "seed", f"seed: {_arrow(seed, another, move)}"
    for cause, column in (("place", "stage"), ("pool", "rows")):
        if (first := here.tasks[task][column]) != (second := there.tasks[task][column]):
            return cause, f"{column} of its task: {_arrow(first, second, move)}"
    return "draw", "other rows of its task were drawn"


def _why_rewrite(row: Mapping[str, Any], here: _Side, there: _Side, move: str) -> tuple[str, str]:
    if row["parent_uid"] not in there.uids:
        return "parent", f"it rewrites {row['parent_uid']}"
    mine, its = (side.settings.get("augment.theta") for side in (here, there))
    if mine is not None and its is None:
        return "setting", f"augment: {_arrow('rewrites', None, move)}"
    if found := there.rewrites.get(row["uid"]):
        if found["fault"] is None and mine != its:
            return "setting", f"augment.theta: {_arrow(mine, its, move)}"
        return "score", found["fault"] or f"MI(x, x̂) · MI(y, ŷ) is {found['score']:.4f} there"
    return "rewrite", "the other build has no such rewrite"


def _tags(mine: list[str] | None, its: list[str] | None, move: str) -> str:
    before, after = (set(mine or []), set(its or [])) if move == "out" else (set(its or []), set(mine or []))
    return ", ".join([*(f"− {t}" for t in sorted(before - after)), *(f"+ {t}" for t in sorted(after - before))])


def _arrow(here: Any, there: Any, move: str) -> str:
    """Both values in the order a → b, whichever side a row is on."""
    first, second = (here, there) if move == "out" else (there, here)
    return f"{_said(first)} → {_said(second)}"


def _said(value: Any) -> str:
    return "none" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _tasks(a: Manifest, b: Manifest, rows: pl.DataFrame) -> pl.DataFrame:
    columns = ("stage", "rows", "distance", "quota", "granted")
    named = [m.tasks.select("task", *(pl.col(c).alias(f"{c}_{s}") for c in columns)) for m, s in ((a, "a"), (b, "b"))]
    both = named[0].join(named[1], on="task", how="full", coalesce=True)
    kept = a.samples.join(b.samples, on="uid", how="semi").group_by("task").agg(kept=pl.len().cast(pl.Int64))
    moved = rows.group_by("task").agg(
        *((pl.col("move") == m).sum().cast(pl.Int64).alias(m) for m in ("out", "in"))
    )  # fmt: skip
    frame = both.join(kept, on="task", how="left").join(moved, on="task", how="left")
    order = [name for column in columns for name in (f"{column}_a", f"{column}_b")]
    return (
        frame.with_columns(pl.col("kept", "out", "in").fill_null(0))
        .sort(pl.coalesce("stage_b", "stage_a"), pl.col("stage_b").is_null(), "task")
        .select("task", *order, "kept", "out", "in")
    )


def _moves(a: Manifest, b: Manifest) -> pl.DataFrame:
    both = a.completions.select("uid", bucket_a="bucket").join(b.completions.select("uid", bucket_b="bucket"), on="uid")
    counts = both.group_by("bucket_a", "bucket_b").agg(completions=pl.len().cast(pl.Int64))
    return counts.sort("bucket_a", "bucket_b", nulls_last=True)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> pl.DataFrame:
    """What the two builds were told, read and run with, where it differs."""
    found = []
    for kind, pick in _KINDS.items():
        mine, its = dict(pick(a)), dict(pick(b))
        for key in sorted(mine.keys() | its.keys()):
            if mine.get(key) != its.get(key) or (key in mine) != (key in its):
                values = (json.dumps(d[key], ensure_ascii=False) if key in d else None for d in (mine, its))
                found.append((kind, key, *values))
    return pl.DataFrame(found, schema={n: pl.String for n in ("kind", "key", "a", "b")}, orient="row")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path; tasks by their names, and the order of the stream beside them."""
    if path == "tasks" and isinstance(value, list):
        yield "tasks", [task["name"] for task in value]
        for task in value:
            yield from _flat({k: v for k, v in task.items() if k != "name"}, f"tasks.{task['name']}")
    elif isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _sources(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for each in provenance.get("inputs", []):
        yield each["task"], sorted(each["files"].values())


def _models(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "embedder", provenance.get("embedder")
    for role, found in provenance.get("models", {}).items():
        yield role, found["fingerprint"]


def _versions(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from provenance.get("packages", {}).items()
    for key in ("rehearse", "python", "schema_version"):
        yield key, provenance.get(key)


_KINDS = {
    "setting": lambda p: _flat(p["config"]),
    "by hand": lambda p: ((p.get("buckets") or {}).get("overrides") or {}).items(),
    "source": _sources, "model": _models, "version": _versions,
}  # fmt: skip


def _notes(a: Manifest, b: Manifest, kept: int) -> list[str]:
    notes, (first, second) = [], [m.tasks.sort("stage")["task"].to_list() for m in (a, b)]
    if not set(first) & set(second):
        notes.append("different streams: they have no task in common")
    elif first != second:
        notes.append("different streams: their tasks, or the order of them, are not the same")
    if first[-1:] != second[-1:]:
        notes.append(f"the current task is {' and '.join(repr(s[-1]) if s else 'none' for s in (first, second))}")
    hashes = [{k: v for k, v in m.provenance["outputs"].items() if k.endswith(".parquet")} for m in (a, b)]
    if hashes[0] == hashes[1]:
        notes.append("all tables are the same, byte for byte")
    elif kept == a.samples.height == b.samples.height:
        notes.append("both hold the same rows")
    return notes
