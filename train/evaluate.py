"""`train eval`: checkpoints on the tasks of a manifest, item by item, and the metrics of continual learning from them.

Writes `items.parquet` (one row a checkpoint and item, so that every number can be computed again), `matrix.csv` (R) and
`metrics.json` with bootstrap intervals. Answers are greedy.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from curate.errors import InputError
from curate.manifest import Manifest, read
from curate.models import LocalModel, ModelConfig, Prompt, Sampling
from curate.models.reward import OVERLAPS
from curate.settings import Section
from train import metrics
from train.plots import heat_map

ITEMS: dict[str, Any] = {
    "checkpoint": pl.Int32, "model": pl.String, "uid": pl.String, "task": pl.String, "stage": pl.Int32,
    "prediction": pl.String, "score": pl.Float64, "correct": pl.Boolean,
}  # fmt: skip
DRAWS = 1000  # bootstrap samples of an interval
Floats = NDArray[np.float64]


class EvalConfig(Section):
    """What `train eval` takes."""

    models: list[str] = Field(min_length=1, description="checkpoints in order; the first one is before training")
    data: str = Field(description="manifest whose samples are answered, task by task")
    out: str = Field(description="folder of the results")
    metric: Literal["rouge_l", "exact", "contains"] = Field("rouge_l", description="score of an item, 0 to 1")
    max_new_tokens: int = Field(64, gt=0, description="longest answer in tokens")
    per_task: int | None = Field(None, gt=0, description="items a task at most: the first by uid")
    upper: dict[str, float] | None = Field(None, description="score of each task trained alone, for the relative gain")
    batch_size: int = Field(32, gt=0, description="sequences a forward pass")
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    base: str = Field(".", exclude=True, description="set by the command line")


def evaluate(config: EvalConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Answer, score, write; returns what metrics.json holds.

    Raises:
        InputError: a model or the manifest cannot be used, or nothing fits the context.
    """
    rows, out = _rows(read(config.data), config.per_task), Path(config.out)
    parts = []
    for number, name in enumerate(config.models):
        given = {"model": name, "batch_size": config.batch_size, "device": config.device}
        settings = ModelConfig.model_validate(given)
        model = LocalModel(settings, Path(config.base), f"models.{number}")
        parts.append(_answers(model, number, name, rows, config))
        mean = _mean(parts[-1]["score"].to_numpy())
        say(f"{name}: {config.metric} {mean:.4f} over {rows.height:,} items")
    items = pl.concat(parts)
    found = summary(items, config)
    out.mkdir(parents=True, exist_ok=True)
    items.write_parquet(out / ".items.parquet")
    os.replace(out / ".items.parquet", out / "items.parquet")
    tasks, r = matrix(items)
    with (out / "matrix.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["checkpoint", *tasks])
        lines.writerows([name, *scores] for name, scores in zip(config.models, r.tolist(), strict=True))
    heat_map(r, config.models, tasks, config.metric, out / "matrix.svg")
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (out / "metrics.json").write_text(text, encoding="utf-8")
    return found


def _rows(manifest: Manifest, per_task: int | None) -> pl.DataFrame:
    rows = manifest.samples.filter(pl.col("prompt").list.len() > 0, pl.col("origin") != "augmented")
    rows = rows.sort("stage", "uid")
    if per_task is not None:
        rows = rows.filter(pl.int_range(pl.len()).over("task") < per_task)
    if not rows.height:
        raise InputError(f"{manifest.folder}: no sample with a prompt to answer")
    return rows


def _answers(model: LocalModel, number: int, name: str, rows: pl.DataFrame, config: EvalConfig) -> pl.DataFrame:
    prompts = [Prompt(row["uid"], row["prompt"], row["tools"]) for row in rows.iter_rows(named=True)]
    short = [room is not None and room < config.max_new_tokens for room in model.room(prompts)]
    if any(short):
        first = prompts[short.index(True)].uid
        raise InputError(
            f"{config.data}: {sum(short):,} prompts leave {name!r} no room for {config.max_new_tokens} tokens, the "
            f"first is uid {first}",
            remedy="lower max_new_tokens, or leave such rows out of the manifest",
        )
    sampling = Sampling(k=1, temperature=0, max_new_tokens=config.max_new_tokens)
    texts = [some[0].text for some in model.generate(prompts, sampling)]
    score = OVERLAPS[config.metric]
    found = [score(text, references) for text, references in zip(texts, rows["references"].to_list(), strict=True)]
    return rows.select("uid", "task", "stage").with_columns(
        checkpoint=pl.lit(number, dtype=pl.Int32), model=pl.lit(name), prediction=pl.Series(texts, dtype=pl.String),
        score=pl.Series(found, dtype=pl.Float64), correct=pl.Series([v >= 1.0 for v in found], dtype=pl.Boolean),
    ).select(list(ITEMS))  # fmt: skip


def matrix(items: pl.DataFrame) -> tuple[list[str], Floats]:
    """(tasks by stage, mean score [checkpoints, tasks])."""
    tasks = items.select("stage", "task").unique().sort("stage")["task"].to_list()
    each = {(c, t): part["score"].to_numpy() for (c, t), part in items.group_by("checkpoint", "task")}
    checkpoints = sorted({c for c, _ in each})
    return tasks, np.array([[_mean(each[c, t]) for t in tasks] for c in checkpoints], np.float64)


def _mean(values: Floats) -> float:
    return float(np.sort(values).mean())  # sorted: the order of rows has no effect on the last bit


def summary(items: pl.DataFrame, config: EvalConfig) -> dict[str, Any]:
    """Every metric that these checkpoints allow, with a 95% bootstrap interval over items."""
    tasks, r = matrix(items)
    scores = {t: _per_item(items, t, "score") for t in tasks}  # task -> [checkpoints, items]
    correct = {t: _per_item(items, t, "correct").astype(bool) for t in tasks}
    rng = np.random.default_rng(config.seed)
    drawn = []
    for _ in range(DRAWS):  # the same items for every checkpoint
        at = {t: rng.integers(0, s.shape[1], s.shape[1]) for t, s in scores.items()}
        again = np.stack([scores[t][:, at[t]].mean(1) for t in tasks], 1)
        drawn.append(_metrics(tasks, again, config) | _answers_kept([correct[t][:, at[t]] for t in tasks]))
    found: dict[str, Any] = {"tasks": tasks, "models": config.models, "metric": config.metric}
    for name, value in (_metrics(tasks, r, config) | _answers_kept([correct[t] for t in tasks])).items():
        interval = _interval([each[name] for each in drawn])
        if name == "forgetting" and interval is not None:  # a maximum: resampling adds its bias once more
            interval = [2 * value - interval[1], 2 * value - interval[0]]
        found[name] = {"value": None if _missing(value) else value, "interval": interval}
    return found


def _answers_kept(correct: list[NDArray[np.bool_]]) -> dict[str, float]:
    """ACC, KGR and KRR over the items of all tasks, of the last checkpoint against the first.   [checkpoints, items]"""
    before, after = (np.concatenate([each[i] for each in correct]) for i in (0, -1))
    return {
        "ACC": float(after.mean()),
        "KGR": metrics.knowledge_gain_ratio(before, after),
        "KRR": metrics.knowledge_retention_ratio(before, after),
    }


def _per_item(items: pl.DataFrame, task: str, column: str) -> NDArray[Any]:
    part = items.filter(task=task).sort("checkpoint", "uid")
    n = part["checkpoint"].n_unique()
    return part[column].to_numpy().reshape(n, -1)


def _metrics(tasks: list[str], r: Floats, config: EvalConfig) -> dict[str, Any]:
    """The mean of the last checkpoint; and what R allows where there is a checkpoint a stage, and one before."""
    found: dict[str, Any] = {"last": float(r[-1].mean())}
    if len(r) == len(tasks) + 1:
        upper = None if config.upper is None else [config.upper[t] for t in tasks]
        found |= metrics.every(r, upper)
    return found


def _interval(values: list[Any]) -> Any:
    """The middle 95% of what was drawn; None where there is nothing. (A ratio of nothing is left out.)"""
    kept = [value for value in values if not _missing(value)]
    if not kept:
        return None
    low, high = np.quantile(np.asarray(kept, np.float64), [0.025, 0.975], axis=0)
    return [low.tolist(), high.tolist()]


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
