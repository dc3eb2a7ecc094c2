"""`train eval`: checkpoints on the tasks of a manifest, item by item, and the metrics of continual learning from them.

Writes `items.parquet` (one row a checkpoint and item, so that every number can be computed again), `matrix.csv` (R),
`matrix.svg`, `left_out.parquet` where rows could not be scored, and last `metrics.json` with bootstrap intervals: a
folder without it is not finished. What is scored, and how: `train/scores.py`.

In matrix.csv a name that begins with = + - or @ has an apostrophe before it: a spreadsheet would run it as a formula.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from curate.errors import InputError
from curate.manifest import read
from curate.models import LocalModel, ModelConfig
from curate.models.weights import stack
from curate.settings import Section
from train import metrics
from train.config import Folders, one_or_several
from train.folder import refuse_foreign, whole
from train.plots import heat_map
from train.scores import Metric, Score, score_of, usable_rows

ITEMS: dict[str, Any] = {
    "checkpoint": pl.Int32, "model": pl.String, "uid": pl.String, "task": pl.String, "stage": pl.Int32,
    "prediction": pl.String, "score": pl.Float64, "correct": pl.Boolean,
}  # fmt: skip
FILES = ("metrics.json", "matrix.csv", "matrix.svg", "left_out.parquet", "items.parquet")
DECIDE = {"models", "data", "metric", "max_new_tokens", "reduction", "per_task", "tasks", "upper", "seed"}
LEAST = 1e-9  # of an upper score, which others are divided by
DRAWS = 1000  # bootstrap samples of an interval
HEAD = "checkpoint"  # first cell of matrix.csv
Floats = NDArray[np.float64]


class EvalConfig(Section):
    """What `train eval` takes."""

    models: Folders = Field(min_length=1, description="checkpoints in order; the first one is before training")
    data: str = Field(description="manifest whose samples are answered, task by task")
    out: str = Field(description="folder of the results")
    metric: Metric = Field(
        "rouge_l", description="score of an item, 0 to 1: of a greedy answer; ranking: pairs of ranked answers whose "
        "better one is the likelier; ranking_change: the one that has gained more since the first checkpoint"
    )  # fmt: skip
    max_new_tokens: int = Field(64, gt=0, description="longest answer in tokens")
    reduction: Literal["sum", "mean"] = Field("sum", description="log-probability of a ranked answer: over its tokens")
    per_task: int | None = Field(None, gt=0, description="items a task at most: the first by uid")
    tasks: Annotated[list[str], BeforeValidator(one_or_several)] | None = Field(
        None, min_length=1, description="tasks that are scored; by default all of the manifest"
    )
    upper: dict[str, float] | None = Field(None, description="score of each task trained alone, for the relative gain")
    batch_size: int = Field(32, gt=0, description="sequences a forward pass")
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    base: str = Field(".", exclude=True, description="set by the command line")


def evaluate(config: EvalConfig, say: Callable[[str], None] = lambda text: None, force: bool = False) -> dict[str, Any]:
    """Answer, score, write; returns what metrics.json holds.

    Args:
        config: what is scored, and where the results go.
        say: told of what happens.
        force: replace finished results of other settings.

    Raises:
        InputError: a model, the manifest, `upper` or `out` cannot be used, `out` holds results of other settings, no
            row can be scored, nothing fits the context, or the disk is full.
    """
    if not force:
        _refuse_others(Path(config.out), config.model_dump(mode="json", include=DECIDE))
    score = score_of(config.metric, config.max_new_tokens, config.reduction)
    rows, left_out = usable_rows(score, read(config.data))
    if config.tasks is not None:
        there = rows["task"].unique().sort().to_list()
        if missing := next((task for task in config.tasks if task not in there), None):
            raise InputError(f"tasks: {missing!r} has no row in {config.data} that can be scored",
                             remedy=f"there are {', '.join(map(repr, there))}")  # fmt: skip
        rows, left_out = (frame.filter(pl.col("task").is_in(config.tasks)) for frame in (rows, left_out))
    if config.per_task is not None:
        rows = rows.filter(pl.int_range(pl.len()).over("task") < config.per_task)
    _check_upper(config.upper, rows["task"].unique().sort().to_list(), config.data)
    models = [_open(number, name, config) for number, name in enumerate(config.models)]
    out, read_from = Path(config.out), [part for model in models for part in stack(model.folder, model.where)]
    refuse_foreign(out, [*FILES, *(f".{name}" for name in FILES)], [Path(config.data), *read_from])
    for model, name in zip(models, config.models, strict=True):
        score.check(model, name, rows)
    _make(out)
    if left_out.height:
        why = left_out["reason"][0]
        say(f"{left_out.height:,} rows cannot be scored ({why}) and are left out: left_out.parquet")
    parts: list[pl.DataFrame] = []
    for number, name in enumerate(config.models):
        parts.append(_items(models.pop(0), number, name, rows, score))  # none stays in memory
        with _staged(out, "items.parquet") as file:  # at once: answers cost the most
            for old in FILES[:-1] if number == 0 else ():  # metrics.json first: it says that all are there
                (out / old).unlink(missing_ok=True)
            pl.concat(parts).write_parquet(file)
        mean = _mean(parts[-1]["score"].to_numpy())
        say(f"{name}: {config.metric} {mean:.4f} over {rows.height:,} items")
    items = pl.concat(parts)
    if left_out.height:
        with _staged(out, "left_out.parquet") as file:
            left_out.write_parquet(file)
    tasks, r = matrix(items)
    with _staged(out, "matrix.csv") as file:
        write_matrix(file, config.models, tasks, r)
    with _staged(out, "matrix.svg") as file:
        heat_map(r, config.models, tasks, config.metric, file)
    found = summary(items, config)
    found |= {"left_out": left_out.height, "settings": config.model_dump(mode="json", include=DECIDE)}
    if len(config.models) != len(tasks) + 1:
        say(f"no AP, BWT or forgetting: for {len(tasks)} tasks they take {len(tasks) + 1} models, one before training "
            "and one a stage, of one method")  # fmt: skip
    with _staged(out, "metrics.json") as file:
        text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        file.write_text(text, encoding="utf-8")
    return found


def _refuse_others(out: Path, mine: Mapping[str, Any]) -> None:
    """Finished results of other settings stay."""
    try:
        there = json.loads((out / "metrics.json").read_bytes())
        stored = there.get("settings") or {key: there[key] for key in ("models", "metric")}  # of an older version
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    differ = [f"{key} is {stored[key]!r}, here {mine[key]!r}" for key in sorted(DECIDE & stored.keys())
              if stored[key] != mine[key]]  # fmt: skip
    if differ:
        raise InputError(f"out {out}: holds results of other settings: {'; '.join(differ)}",
                         remedy="choose another folder with out=FOLDER, or --force replaces them")  # fmt: skip


def _check_upper(upper: Mapping[str, float] | None, tasks: Sequence[str], data: str) -> None:
    if upper is None:
        return
    if unlike := sorted(set(tasks) ^ upper.keys()):
        what = "is missing" if unlike[0] in tasks else f"is no task that is evaluated of {data}"
        raise InputError(
            f"upper: {unlike[0]!r} {what}", remedy=f"give one score for each of {', '.join(map(repr, tasks))}"
        )
    if wrong := next((t for t, value in upper.items() if not LEAST <= value < math.inf), None):
        raise InputError(f"upper: {wrong!r}: {upper[wrong]} is not a positive number",
                         remedy="give the score that the task reaches when it is trained alone")  # fmt: skip


def _open(number: int, name: str, config: EvalConfig) -> LocalModel:
    given = {"model": name, "batch_size": config.batch_size, "device": config.device}
    return LocalModel(ModelConfig.model_validate(given), Path(config.base), f"models.{number}")


def _make(out: Path) -> None:
    """The folder, found to be writable before anything is answered."""
    with whole(out / ".items.parquet", "or choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        (out / ".items.parquet").touch()
        (out / ".items.parquet").unlink()


@contextmanager
def _staged(out: Path, name: str) -> Iterator[Path]:
    """Where to write a file, which gets its name when it is whole."""
    file = out / f".{name}"
    with whole(file, "items.parquet keeps the answers that it has"):
        try:
            yield file
        except pl.exceptions.PolarsError as error:
            raise OSError(str(error)) from None
        os.replace(file, out / name)


def _items(model: LocalModel, number: int, name: str, rows: pl.DataFrame, score: Score) -> pl.DataFrame:
    texts, found = score.of(model, rows)
    return rows.select("uid", "task", "stage").with_columns(
        checkpoint=pl.lit(number, dtype=pl.Int32), model=pl.lit(name), prediction=pl.Series(texts, dtype=pl.String),
        score=pl.Series(found, dtype=pl.Float64), correct=pl.Series([v >= 1.0 for v in found], dtype=pl.Boolean),
    ).select(list(ITEMS))  # fmt: skip


def matrix(items: pl.DataFrame) -> tuple[list[str], Floats]:
    """(tasks by their first stage, mean score [checkpoints, tasks])."""
    tasks = items.group_by("task").agg(pl.col("stage").min()).sort("stage", "task")["task"].to_list()
    each = {(c, t): part["score"].to_numpy() for (c, t), part in items.group_by("checkpoint", "task")}
    checkpoints = sorted({c for c, _ in each})
    return tasks, np.array([[_mean(each[c, t]) for t in tasks] for c in checkpoints], np.float64)


def write_matrix(path: Path, checkpoints: Sequence[str], tasks: Sequence[str], r: Floats) -> None:
    """R as CSV: a header, then a line a checkpoint that begins with its name.   r [checkpoints, tasks]."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow([HEAD, *map(_no_formula, tasks)])
        lines.writerows([_no_formula(name), *scores] for name, scores in zip(checkpoints, r.tolist(), strict=True))


def read_matrix(path: Path) -> list[list[float]]:
    """R of a CSV: what `write_matrix` writes, or numbers alone.

    Raises:
        InputError: no such file, lines of several lengths, or a cell that is no finite number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise InputError(f"{path}: no scores", remedy="a line a checkpoint, a column a task, as `train eval` writes it")
    width, named = len(lines[0][1]), lines[0][1][0].strip() == HEAD
    for number, cells in lines:
        if len(cells) != width:
            raise InputError(f"{path}, line {number}: {len(cells)} cells, and the first line has {width}")
    return [[_number(cell, f"{path}, line {number}, column {column}") for column, cell in enumerate(cells, 1)
             if column > named] for number, cells in lines[named:]]  # fmt: skip


def _number(cell: str, where: str) -> float:
    try:
        value = float("nan" if "_" in cell else cell)  # Python reads 1_0 as 10
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {cell[:80]!r} is not a finite number")
    return value


def _no_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


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
    if config.metric.startswith("ranking"):
        found["reduction"] = config.reduction
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
    part = items.filter(task=task).sort("checkpoint", "uid", maintain_order=True)
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
