"""The results of a stream: one table, a row a run and stage, made of what the stages' folders hold.

`results.parquet` has no times, so a stream that was killed and went on ends with the same bytes; seconds are in each
stage's `seconds.json`. What is not done yet is not in the table.

Metrics are of the stages so far, R[i, j] with j ≤ i; `train/metrics.py` defines them. Relative gain is against the
mean, over the stream's seeds, of each task trained alone (InsCL, section 4.1). A departure: where tasks to come are not
scored (`evaluation.every_task: false`), the maximum in forgetting is over stages from a task's own on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from curate.errors import InputError
from train import metrics
from train.evaluate import LEAST
from train.stream.plan import Plan, Run
from train.stream.stage import seconds

FILE = "results.parquet"
SCHEMA: dict[str, Any] = {
    "run": pl.String, "arm": pl.String, "cell": pl.String, "kind": pl.String, "seed": pl.Int64,
    "settings": pl.String, "order": pl.String,
    "selector": pl.String, "method": pl.String, "stage": pl.Int32, "task": pl.String, "folder": pl.String,
    "tasks": pl.List(pl.String), "scores": pl.List(pl.Float64), "items": pl.List(pl.Int64),
    "upper": pl.List(pl.Float64), "average_performance": pl.Float64, "backward_transfer": pl.Float64,
    "forgetting": pl.Float64, "forward_transfer": pl.Float64, "relative_gain": pl.Float64, "ACC": pl.Float64,
    "KGR": pl.Float64, "KRR": pl.Float64, "current": pl.Int64,
    "replay": pl.Int64, "augmented": pl.Int64, "steps": pl.Int64, "tokens": pl.Int64,
}  # fmt: skip
"""kind: run; the bounds single (a task alone) and joint (all at once), which have no arm, cell and selector. run: arm
and cell, its place in the grid. settings: what these changed, as JSON. stage: 0 = before training; its own row for each
run. folder: below stages/. tasks: in the order of training; scores, items (how many were scored) and upper (score of
the task alone, mean over seeds) are of these, null = not measured. relative_gain is in %, all else from 0 to 1.
current, replay and augmented: distinct rows that the stage was trained on; tokens (no padding, nothing that a model
wrote) and steps likewise. ACC, KGR and KRR: over the items of the tasks so far, against the model before training."""
Floats = NDArray[np.float64]


def collect(plan: Plan) -> pl.DataFrame:
    """The table of what is done so far."""
    upper = uppers(plan)
    rows = [row for run in plan.runs for row in _rows(plan, run, upper)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def write(plan: Plan, table: pl.DataFrame) -> Path:
    """Write the table beside the stages, whole or not at all."""
    path, half = plan.out / FILE, plan.out / f".{FILE}"
    table.write_parquet(half)
    os.replace(half, path)
    return path


def of_others(plan: Plan) -> int:
    """How many stages the table that lies there holds which are none of this plan's."""
    try:
        there = pl.read_parquet(plan.out / FILE, columns=["folder"])["folder"].unique().to_list()
    except (OSError, pl.exceptions.PolarsError):
        return 0
    return len(set(there) - set(plan.stages))


def replayed(plan: Plan, name: str) -> tuple[int, int]:
    """(rows that a stage's build asked of the older tasks, rows that these could give)."""
    if "build" not in plan.stages[name].steps:
        return 0, 0
    manifest = plan.folder(name) / str(plan.stages[name].steps["build"].settings["out"])
    asked = json.loads((manifest / "provenance.json").read_bytes())["replay"]["asked"]
    return asked, int(pl.read_parquet(manifest / "tasks.parquet", columns=["granted"])["granted"].sum())


def uppers(plan: Plan) -> dict[str, float]:
    """Task → its score when it is trained alone, mean over seeds; tasks of which that is not known are missing."""
    found: dict[str, list[float]] = {}
    for run in plan.runs:
        if run.kind == "single" and plan.done(run.stages[0]):
            found.setdefault(run.tasks[0], []).append(scores(plan, run.stages[0])[run.tasks[0]][0])
    return {task: float(np.sort(values).mean()) for task, values in found.items()}


def matrix(plan: Plan, run: Run, stages: int) -> Floats:
    """R [stages + 1, T] of a run, NaN where nothing was scored."""
    found = [scores(plan, name) for name in (run.start, *run.stages[:stages])]
    return np.array([[each.get(task, (np.nan, 0))[0] for task in run.tasks] for each in found], np.float64)


def _rows(plan: Plan, run: Run, upper: dict[str, float]) -> Iterator[dict[str, Any]]:
    if not plan.done(run.start):
        return
    best = [upper.get(task) for task in run.tasks]
    done = 0
    while done < len(run.stages) and plan.done(run.stages[done]):
        done += 1
    r, how = matrix(plan, run, done), run.recipe.how
    bound = run.kind != "run"  # has the stream's own settings, but no arm, and replays nothing
    about = {
        "run": run.name, "arm": None if bound else run.recipe.arm, "cell": None if bound else run.recipe.cell,
        "kind": run.kind, "seed": run.seed,
        "order": how.order, "method": how.method,
        "settings": json.dumps(run.recipe.changes, sort_keys=True, ensure_ascii=False), "tasks": list(run.tasks),
        "selector": None if bound else how.replay.get("selector", "inscl"), "upper": best,
    }  # fmt: skip
    for stage in range(done + 1):
        folder = (run.start, *run.stages)[stage]
        scored = scores(plan, folder)
        yield about | {
            "stage": stage, "task": run.tasks[stage - 1] if stage and run.kind != "joint" else None, "folder": folder,
            "scores": [scored[task][0] if task in scored else None for task in run.tasks],
            "items": [scored[task][1] if task in scored else None for task in run.tasks],
            **(_measured(r[: stage + 1], best) if stage and run.kind == "run" else
               _mean(r[stage], best if stage and run.kind == "joint" else ())),
            **(_trained(plan, run, stage) if stage else {}),
        }  # fmt: skip


def _trained(plan: Plan, run: Run, stage: int) -> dict[str, Any]:
    """What a stage's training cost, and which answers it won and lost."""
    trained = run.tasks if run.kind == "joint" else run.tasks[:stage]
    return _answers(plan, run.start, run.stages[stage - 1], trained) | cost(plan.folder(run.stages[stage - 1]))


def _measured(r: Floats, upper: Sequence[float | None]) -> dict[str, float | None]:
    """Metrics of the stages so far; a task to come is no part of them."""
    n = len(r) - 1
    known = r[:, :n]
    found: dict[str, float | None] = {"average_performance": metrics.average_performance(known)}
    if n > 1:
        found["backward_transfer"] = metrics.backward_transfer(known)
        found["forgetting"] = metrics.forgetting(np.where(np.isnan(known), -np.inf, known))
        transfer = metrics.forward_transfer(known)
        found["forward_transfer"] = None if np.isnan(transfer) else transfer
        best = [value for value in upper[: n - 1] if value is not None and value >= LEAST]
        if len(best) == n - 1:
            found["relative_gain"] = float(metrics.relative_gain(known, [*best, 1.0])[-1])  # its own task has no part
    return found


def _mean(scores: Floats, upper: Sequence[float | None]) -> dict[str, float | None]:
    """Of a bound, or of the first model: the mean over its tasks, and with `upper` the relative gain over them."""
    found: dict[str, float | None] = {"average_performance": float(np.nanmean(scores))}
    best = [value for value in upper if value is not None and value >= LEAST]
    if len(best) == len(scores):
        found["relative_gain"] = float(100 * (scores / np.array(best)).mean())
    return found


def cost(folder: Path) -> dict[str, Any]:
    """Distinct rows that a stage was trained on, by origin; its steps and tokens. Nothing where these were removed."""
    found: dict[str, Any] = {}
    with suppress(OSError, pl.exceptions.PolarsError):
        seen = pl.read_parquet(folder / "train/lineage.parquet", columns=["uid", "task", "origin"]).unique()
        found = {name: int((seen["origin"] == name).sum()) for name in ("current", "replay", "augmented")}
    with suppress(OSError, ValueError, IndexError, AttributeError, TypeError):
        last = json.loads((folder / "train/log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        found |= {name: int(last[key]) for name, key in (("steps", "step"), ("tokens", "tokens")) if key in last}
    return found


def times(plan: Plan, run: Run) -> dict[str, float] | None:
    """Seconds of a run by kind of command, each stage counted though others share it; None: one was done by hand."""
    found: dict[str, float] = {}
    for name in run.stages:
        took = seconds(plan.folder(name))
        for step in plan.stages[name].ordered:
            if (value := took.get(str(step.settings["out"]))) is None:
                return None
            found[step.kind] = found.get(step.kind, 0.0) + value
    return found


def scores(plan: Plan, name: str) -> dict[str, tuple[float, int]]:
    """Task → (mean score of a stage's model, items)."""
    found = {}
    for (task,), part in _items(plan, name).group_by("task"):
        values = np.sort(part["score"].to_numpy())  # sorted: the order of rows has no effect on the last bit
        found[str(task)] = float(values.mean()), len(values)
    return found


def _answers(plan: Plan, before: str, after: str, tasks: Sequence[str]) -> dict[str, Any]:
    """ACC, and KGR and KRR against the first model, over the items of tasks that a stage scores."""
    both = _items(plan, after).filter(pl.col("task").is_in(tasks)).join(_items(plan, before), on=["task", "uid"])
    was, now = (both[name].to_numpy() for name in ("correct_right", "correct"))
    found = {"ACC": float(now.mean()) if len(now) else math.nan, "KGR": metrics.knowledge_gain_ratio(was, now),
             "KRR": metrics.knowledge_retention_ratio(was, now)}  # fmt: skip
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _items(plan: Plan, name: str) -> pl.DataFrame:
    """Every item that a stage's model was scored on: task, uid, score, correct."""
    file = plan.folder(name) / plan.stages[name].scores / "items.parquet"
    return _read_items(file, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=4096)
def _read_items(file: Path, _: int) -> pl.DataFrame:
    columns = ["checkpoint", "task", "uid", "score", "correct"]
    try:
        items = pl.read_parquet(file, columns=columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{file}: cannot be read: {str(error)[:200]}",
            remedy=f"remove the folder {file.parent.name} there; the same command scores the stage again",
        ) from None
    return items.filter(pl.col("checkpoint") == pl.col("checkpoint").max()).drop("checkpoint")


# --- runs beside each other ---


def ends(table: pl.DataFrame) -> pl.DataFrame:
    """The last row of every run that is through."""
    return table.filter(pl.col("kind") == "run", pl.col("stage") == pl.col("tasks").list.len())


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation over seeds; None of one)."""
    found = np.sort(np.asarray(values, np.float64))
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None


def written(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds, as tables show it; a deviation that rounds to no whole is left out.

    >>> written([1.0, 3.0], 2), written([1234.0, 1234.4], 0), written([0, 0, 0, 1], 0), written([], 1)
    ('2.00 ± 1.41', '1,234', '0', '–')
    """
    if not len(values):
        return "–"
    mean, sd = spread(values)
    return f"{mean:,.{digits}f}" + (f" ± {sd:,.{digits}f}" if sd is not None and (digits or round(sd)) else "")


def difference(table: pl.DataFrame, run: str, baseline: str, metric: str = "relative_gain") -> dict[str, Any] | None:
    """What a run has more than another at its end, seed by seed: mean, 95% interval by Student's t, the pairs.

    The same seeds draw the same orders in both, so seeds are pairs. None: fewer than one seed in common.

    >>> rows = {"run": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "relative_gain": [3.0, 5.0, 1.0, 1.0]}
    >>> frame = pl.DataFrame(rows).with_columns(kind=pl.lit("run"), stage=1, tasks=pl.lit(["t"]))
    >>> found = difference(frame, "a", "b")  # differences 2 and 4: 3 ± 12.706 · 1
    >>> found["mean"], [round(v, 2) for v in found["interval"]], found["pairs"]
    (3.0, [-9.71, 15.71], 2)
    """
    last = ends(table).select("run", "seed", metric)
    both = last.filter(run=run).join(last.filter(run=baseline), on="seed").sort("seed").drop_nulls()
    if not both.height:
        return None
    more = (both[metric] - both[f"{metric}_right"]).to_numpy()
    found: dict[str, Any] = {"mean": float(more.mean()), "pairs": len(more), "interval": None}
    if len(more) > 1:
        half = float(stats.t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / np.sqrt(len(more)))
        found["interval"] = [found["mean"] - half, found["mean"] + half]
    return found
