"""`stream.html`: what each run kept, by how much runs differ, R itself, and what it cost; one file that opens offline.

It is a view of `results.parquet` and of the stages' times: nothing reads it. `curves.svg` beside it is its first plot.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.files import replace_text
from curate.report.page import shell
from curate.report.parts import Plot, Section, Table, label, plural, short
from curate.report.plots import height, names_axis
from train.evaluate import LEAST
from train.plots import curves
from train.stream import results
from train.stream.config import StreamConfig
from train.stream.plan import Plan
from train.stream.results import difference, ends, spread, written

FILE, CURVES = "stream.html", "curves.svg"
MOST_MATRICES = 24
COLOURS = [f"@run-{n}" for n in range(1, 13)]
DASHES = ("solid", "dash", "dot")
NAMES = {"relative_gain": "relative gain, %", "average_performance": "mean score of the tasks so far"}


def write(plan: Plan, table: pl.DataFrame, config: StreamConfig) -> Path:
    """The page and its plot, of what is done so far."""
    path = plan.out / FILE
    replace_text(path, shell(contents(plan, table, config)))
    measure = _measure(table)
    lines = [(name, *_curve(table, name, measure)) for name in _names(table)]
    half = plan.out / f".{CURVES}"
    curves([line for line in lines if len(line[1])], "stage", NAMES[measure], half)
    os.replace(half, plan.out / CURVES)
    return path


def contents(plan: Plan, table: pl.DataFrame, config: StreamConfig) -> dict[str, Any]:
    """All that the page says."""
    names = _names(table)
    against = _against(table, config)
    through, every = ends(table).height, sum(run.kind == "run" for run in plan.runs)
    sections = [_gains(table, names), _differences(table, against), _matrices(table, names),
                _bounds(table, config), _costs(plan, table, names)]  # fmt: skip
    return {
        "name": short(config.name, 80), "kicker": "Rehearse · a continual run, stage after stage",
        "tiles": _tiles(plan, table, through, every), "says": _sentences(table, names, against, through, every),
        "sections": [asdict(section) for section in sections],
        "note": f"{results.FILE} holds every score; each stage's folder under stages/ its manifest, its training, and "
                "every item that was scored.",
    }  # fmt: skip


def _against(table: pl.DataFrame, config: StreamConfig) -> dict[str, str]:
    """Run → the run that it is compared with: of the baseline's arm, at its own place in the grid."""
    runs = table.filter(kind="run").unique("run", maintain_order=True).select("run", "arm", "cell").rows()
    first = config.baseline if config.baseline is not None else (runs[0][1] if runs else "")
    base = {frozenset(cell.split(" · ")) - {""}: run for run, arm, cell in runs if arm == first}
    found = {}
    for run, arm, cell in runs:
        # a run without replay has no place among budgets: its cell is the part of theirs that counts for it
        fits = [place for place in base if place <= set(cell.split(" · "))]
        if arm != first and (fits or len(base) == 1):
            found[run] = base[max(fits, key=len)] if fits else next(iter(base.values()))
    return found or {run: runs[0][0] for run, *_ in runs[1:]}  # a grid alone: its first place


def _names(table: pl.DataFrame) -> list[str]:
    return table.filter(kind="run")["run"].unique(maintain_order=True).to_list()


def _measure(table: pl.DataFrame) -> str:
    """What runs are compared by: relative gain, or the mean score where no upper bound is known."""
    return "relative_gain" if ends(table)["relative_gain"].drop_nulls().len() else "average_performance"


def _nothing(table: pl.DataFrame) -> str:
    """Says which tasks score nothing when they are trained alone; empty where none does.

    >>> _nothing(pl.DataFrame({"tasks": [["a", "b"], ["b", "a"]], "upper": [[0.0, 0.5], [0.5, 0.0]]}))
    '“a” scores 0 when it is trained alone'
    """
    bounds = table.select("tasks", "upper").explode("tasks", "upper").filter(pl.col("upper") < LEAST)
    names = [f"“{short(name)}”" for name in bounds["tasks"].unique(maintain_order=True)]
    verb = "scores 0 when it is" if len(names) == 1 else "score 0 when each is"
    return f"{', '.join(names)} {verb} trained alone" if names else ""


def _tiles(plan: Plan, table: pl.DataFrame, through: int, every: int) -> list[tuple[str, str, str]]:
    runs = [run for run in plan.runs if run.kind == "run"]
    seeds, tasks = len({run.seed for run in runs}), len(runs[0].tasks)
    done = table.filter(pl.col("stage") > 0)["folder"].n_unique()
    return [
        (f"{tasks}", "tasks", "in a row"),
        (f"{len({run.name for run in runs})}", "ways to train", "arms and grid"),
        (f"{seeds}", "seed" if seeds == 1 else "seeds", "of each"),
        (f"{through:,}", "runs through", f"of {every:,}"),
        (f"{done:,}", "stages trained", "what runs share counts once"),
    ]


def _sentences(table: pl.DataFrame, names: list[str], against: dict[str, str], through: int, every: int) -> list[str]:
    measure, says = _measure(table), list[str]()
    last, digits, unit = ends(table), _digits(measure), " %" if measure == "relative_gain" else ""
    means = {n: spread(v)[0] for n in names if len(v := last.filter(run=n)[measure].drop_nulls().to_list())}
    if len({round(mean, digits) for mean in means.values()}) > 1:
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        what = "of what older tasks reach when each is trained alone" if unit else "as the mean score at the end"
        most, least = f"{means[best]:.{digits}f}{unit}", f"{means[worst]:.{digits}f}{unit}"
        says.append(f"Most is kept by “{short(best)}”: {most} {what}. Least by “{short(worst)}”: {least}.")
    for name, other in against.items() if len(against) <= 3 else ():
        found = difference(table, name, other, measure)
        if found and found["interval"]:
            low, high = found["interval"]
            shown = f"{found['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            verdict = (f"“{short(name)}” keeps {'more' if low > 0 else 'less'} than “{short(other)}”"
                       if low > 0 or high < 0 else
                       f"“{short(name)}” and “{short(other)}” cannot be told apart by these seeds")  # fmt: skip
            says.append(f"{verdict}: {shown} (95 %, {plural(found['pairs'], 'seed')}).")
    if nothing := _nothing(table):
        says.append(f"{nothing}: from the stage behind it on there is no relative gain.")
    if through < every:
        says.append(f"{every - through} of {plural(every, 'run')} are not through; they are shown as far as they are.")
    return says


# --- sections ---


def _curve(table: pl.DataFrame, name: str, measure: str) -> tuple[list[int], list[float], list[float]]:
    """(stages, means, standard deviations) of a run over its seeds."""
    part = table.filter(pl.col("kind") == "run", pl.col("run") == name, pl.col("stage") > 0).drop_nulls(measure)
    stages = part["stage"].unique().sort().to_list()
    found = [spread(part.filter(stage=stage)[measure].to_list()) for stage in stages]
    return stages, [mean for mean, _ in found], [sd or 0.0 for _, sd in found]


def _gains(table: pl.DataFrame, names: list[str]) -> Section:
    measure = _measure(table)
    traces, reached, spreads = [], set[int](), False
    for number, name in enumerate(names):
        stages, means, sds = _curve(table, name, measure)
        reached, spreads = reached | set(stages), spreads or any(sds)
        colour = COLOURS[number % len(COLOURS)]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": label(name, 40), "x": stages,
            "y": [round(v, 4) for v in means], "line": {"color": colour, "dash": DASHES[number // len(COLOURS) % 3]},
            "error_y": {"type": "data", "array": [round(v, 4) for v in sds], "thickness": 1, "width": 3,
                        "color": colour, "visible": any(sds)},
            "hovertext": [f"{label(name, 40)}, stage {s}: {m:.2f} ± {d:.2f}"
                          for s, m, d in zip(stages, means, sds, strict=True)],
            "hoverinfo": "text",
        })  # fmt: skip
    last = ends(table)
    rows = []
    for name in names:
        part = last.filter(run=name)
        rows.append([short(name), *(written(part[m].drop_nulls().to_list(), d) for m, d in
                     (("relative_gain", 1), ("average_performance", 3), ("backward_transfer", 3), ("forgetting", 3),
                      ("KGR", 3), ("KRR", 3))), str(part.height)])  # fmt: skip
    header = ["run", "relative gain, %", "AP", "BWT", "forgetting", "KGR", "KRR", "seeds"]
    caption = (
        "After the last stage: mean ± standard deviation over seeds. KGR, KRR: of the items that were wrong, or right, "
        "before training, the share that is right now."
    )
    ended = Table(caption, header, rows, list(range(1, len(header))))
    layout = {"height": 440, "xaxis": {"title": {"text": "stage"}, "tickvals": sorted(reached)},
              "yaxis": {"title": {"text": NAMES[measure]}, "rangemode": "tozero"}, "showlegend": True}  # fmt: skip
    nothing = _nothing(table)
    why = f"There is no relative gain: {nothing}" if nothing else "Relative gain needs each task trained alone"
    says = ["Relative gain after stage i: the mean, over the tasks before i, of a task's score as a share of what it "
            "reaches when it is trained alone. 100 % = nothing is forgotten."
            if measure == "relative_gain" else f"Mean score of the tasks so far. {why}."]  # fmt: skip
    alt = f"{NAMES[measure]} by stage, {plural(len(names), 'line')}."
    note = "Bars are one standard deviation over seeds." if spreads else ""
    plot = Plot("gain", NAMES[measure].capitalize(), alt, traces, layout, None, note)
    return Section("kept", "What is kept, stage after stage", says, [plot, ended])


def _digits(measure: str) -> int:
    return 1 if measure == "relative_gain" else 3


def _differences(table: pl.DataFrame, against: dict[str, str]) -> Section:
    measure = _measure(table)
    others = list(dict.fromkeys(against.values()))
    title = f"Beside “{short(others[0])}”" if len(others) == 1 else "Beside each other"
    found = {n: d for n, o in against.items() if (d := difference(table, n, o, measure)) is not None}
    if not found:
        return Section("differences", title, ["There is nothing to compare: no other run is through."])
    digits = _digits(measure)
    rows = [[short(n), short(against[n]), f"{d['mean']:+.{digits}f}",
             f"{d['interval'][0]:+.{digits}f} to {d['interval'][1]:+.{digits}f}" if d["interval"] else "–",
             str(d["pairs"])] for n, d in found.items()]  # fmt: skip
    table_ = Table(
        f"Difference in {NAMES[measure]} after the last stage.", ["run", "mean", "95 %", "seeds"], rows, [1, 2, 3]
    )
    kept = list(found)
    trace = {
        "type": "scatter", "mode": "markers", "x": [round(found[n]["mean"], 4) for n in kept],
        "y": list(range(len(kept))), "marker": {"color": "@accent", "size": 9},
        "error_x": {"type": "data", "thickness": 1.5, "width": 5, "color": "@accent",
                    "array": [round(found[n]["interval"][1] - found[n]["mean"], 4) if found[n]["interval"] else 0
                              for n in kept]},
        "hovertext": [f"{label(n, 40)}: {found[n]['mean']:+.{digits}f}" for n in kept], "hoverinfo": "text",
    }  # fmt: skip
    layout = {"height": height(len(kept), 30), "yaxis": names_axis(kept), "showlegend": False,
              "xaxis": {"title": {"text": f"difference in {NAMES[measure]}"}, "zeroline": True,
                        "rangemode": "tozero"}}  # fmt: skip
    seeds = max(d["pairs"] for d in found.values())
    chance = (
        f"A bar is the 95 % interval of the mean by Student's t; where it holds 0, {seeds} seeds cannot part the two."
        if seeds > 1
        else "With one seed nothing can be said of chance."
    )
    says = [f"Seed by seed: what two runs of one seed have in common is no part of their difference. {chance}"]
    heading = "Differences with their intervals" if seeds > 1 else "Differences of one seed, without intervals"
    plot = Plot("difference", heading, f"{plural(len(kept), 'difference')}.", [trace], layout, table_)
    return Section("differences", title, says, [plot])


def _matrices(table: pl.DataFrame, names: list[str]) -> Section:
    """Mean R of each run; rows are stages, columns tasks in the order of training, where all seeds have that order."""
    parts: list[Plot | Table] = []
    every = table.filter(kind="run")
    high = max((v for scores in every["scores"].to_list() for v in scores if v is not None), default=1.0)
    for number, name in enumerate(names[:MOST_MATRICES]):
        part = every.filter(run=name)
        orders = {tuple(tasks) for tasks in part["tasks"].to_list()}
        tasks = list(orders.pop()) if len(orders) == 1 else [f"task {i}" for i in range(1, len(part["tasks"][0]) + 1)]
        stages = part["stage"].unique().sort().to_list()
        r = [_mean([part.filter(stage=s)["scores"].to_list()][0], len(tasks)) for s in stages]
        cells = [["" if v is None else f"{v:.3f}" for v in row] for row in r]
        trace = {
            "type": "heatmap", "z": [[None if v is None else round(v, 4) for v in row] for row in r],
            "x": list(range(len(tasks))), "y": stages, "text": cells,
            "texttemplate": "%{text}", "textfont": {"color": "@ink"}, "hoverinfo": "text", "colorscale": "@sequential",
            "zmin": 0, "zmax": round(high, 4),
            "hovertext": [[f"{label(t)}, stage {s}: {c or '–'}" for t, c in zip(tasks, row, strict=True)]
                          for s, row in zip(stages, cells, strict=True)],
            "showscale": False, "xgap": 2, "ygap": 2,
        }  # fmt: skip
        layout = {
            "height": 120 + 30 * len(stages), "margin": {"l": 10, "r": 60, "t": 90, "b": 10},
            "xaxis": {"tickvals": list(range(len(tasks))), "ticktext": [label(t, 16) for t in tasks], "side": "top",
                      "showgrid": False, "tickangle": -35},
            "yaxis": {"tickvals": stages, "ticktext": ["before" if s == 0 else f"stage {s}" for s in stages],
                      "range": [max(stages) + 0.5, -0.5], "showgrid": False, "zeroline": False},
        }  # fmt: skip
        rows = [
            ["before" if s == 0 else str(s), *(c or "–" for c in row)] for s, row in zip(stages, cells, strict=True)
        ]
        figures = Table(f"R of {short(name)}.", ["stage", *map(short, tasks)], rows, list(range(1, len(tasks) + 1)))
        alt = f"Heat map of the scores of {plural(len(tasks), 'task')} after {plural(len(stages) - 1, 'stage')}."
        parts.append(Plot(f"matrix-{number}", short(name), alt, [trace], layout, figures, half=len(tasks) <= 8))
    more = f" The first {MOST_MATRICES} of {len(names)} runs; the table has all." if len(names) > MOST_MATRICES else ""
    says = [
        "R: the mean score over seeds of each task (column) after each stage (row). Where a column fades downwards, "
        f"its task is forgotten.{more}"
    ]
    return Section("matrices", "R, the scores behind it", says, parts)


def _bounds(table: pl.DataFrame, config: StreamConfig) -> Section:
    tasks = [task.name for task in config.tasks]
    start = table.filter(pl.col("kind") == "run", pl.col("stage") == 0).head(1)
    before = dict(zip(start["tasks"][0].to_list(), start["scores"][0].to_list(), strict=True)) if start.height else {}
    rows = []
    for task in tasks:
        alone = table.filter(pl.col("kind") == "single", pl.col("run") == task, pl.col("stage") == 1)
        both = table.filter(pl.col("kind") == "joint", pl.col("stage") == 1).select("tasks", "scores").iter_rows()
        joint = [dict(zip(t, scores, strict=True))[task] for t, scores in both]
        rows.append([short(task), written([v for v in (before.get(task),) if v is not None], 3),
                     written([scores[0] for scores in alone["scores"].to_list()], 3),
                     written([v for v in joint if v is not None], 3)])  # fmt: skip
    header = ["task", "before training", "trained alone", "all tasks at once"]
    says = [
        "Upper bounds, trained with the stream's own settings, without what an arm changes. Each task alone is what "
        "relative gain is divided by."
    ]
    return Section("bounds", "Bounds", says, [Table("Mean ± standard deviation over seeds.", header, rows, [1, 2, 3])])


def _costs(plan: Plan, table: pl.DataFrame, names: list[str]) -> Section:
    rows, columns = [], ("current", "replay", "augmented", "steps", "tokens")
    for name in names:
        seeds = ends(table).filter(run=name)["seed"]  # of runs that are through
        part = table.filter(pl.col("kind") == "run", pl.col("run") == name, pl.col("stage") > 0,
                            pl.col("seed").is_in(seeds.implode()))  # fmt: skip
        summed = part.group_by("seed").agg(pl.col(columns).sum()).sort("seed")
        runs = [run for run in plan.runs if run.kind == "run" and run.name == name and run.seed in seeds.to_list()]
        took = [found for run in runs if (found := results.times(plan, run)) is not None]
        means = [[t.get(c, 0.0) for t in took] for c in ("build", "train", "fisher", "eval")]
        rows.append([short(name), *("–" if part[c].null_count() else written(summed[c].to_list(), 0) for c in columns),
                     *(f"{sum(v) / len(v):,.0f}" if v and any(v) else "–" for v in means),
                     f"{sum(map(sum, means)) / len(took):,.0f}" if took else "–"])  # fmt: skip
    header = ["run", "rows of its tasks", "rows replayed", "rewrites", "steps", "tokens", "build, s", "training, s",
              "Fisher, s", "scoring, s", "in all, s"]  # fmt: skip
    says = [
        "Of a whole run, mean over seeds. A stage that several runs share is counted in each of them, though it was "
        "done once; seconds are those of one process while others ran."
    ]
    return Section("cost", "What it cost", says, [Table("Rows, tokens and time.", header, rows, list(range(1, 11)))])


def _mean(rows: Sequence[Sequence[float | None]], n: int) -> list[float | None]:
    found = []
    for column in range(n):
        values = [v for row in rows if (v := row[column]) is not None]
        found.append(float(np.mean(np.sort(values))) if values else None)
    return found
