"""The policy's rollouts in CPPO's five buckets: probability against reward, with the thresholds."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from curate.manifest import Bucket, Manifest, Stats, sequence_logp
from curate.manifest.tables import counts
from curate.report.even import evenly
from curate.report.parts import Plot, Section, Table, capped, count, label, percent, plural, real, short

MOST_POINTS = 2_000
BUCKETS = {  # name: what it holds, the symbol of its points
    Bucket.HIGH_PERFORMANCE: ("likely and good", "circle"),
    Bucket.OVERFITTING: ("likely and bad", "square"),
    Bucket.HIGH_VARIANCE: ("unlikely and good", "diamond"),
    Bucket.NOISY: ("unlikely and bad", "x"),
    Bucket.NORMAL: ("in between, or not to be judged", "circle-open"),
}
SIDES = ("align", "conflict")
POPULATIONS = {"task": "its task", "all": "the whole set", "batch": "its rollout batch"}


def buckets(m: Manifest, places: dict[str, int]) -> Section:
    """The rollouts on the plane, and counts by task.

    Args:
        m: the manifest.
        places: uid of a sample -> its number among the rows that the page holds; a point opens one of these.
    """
    title, rolled = "The five buckets", m.scan("completions").filter(origin="policy")
    facts = m.provenance.get("buckets") or {}
    n, prompts, judged_n = rolled.select(
        pl.len(), pl.col("prompt_uid").n_unique().alias("prompts"), pl.col("bucket").count()
    ).collect().row(0)  # fmt: skip
    if not n:
        return Section("buckets", title, ["No rollouts: no policy was asked, so nothing is sorted into buckets."])
    says = [f"{plural(n, 'rollout')} of {plural(prompts, 'prompt')}."]
    judged = rolled.filter(pl.col("bucket").is_not_null())
    if not judged_n:
        return Section("buckets", title, [*says, "None is sorted into a bucket."])
    if rule := facts.get("rule"):
        says.append(
            f"P is the {rule['logp']} of a rollout's token log-probabilities in nats, R its reward; z_P and z_R are "
            f"both standardised over {POPULATIONS[rule['population']]}. Beyond ±{rule['k']:g} on both axes a rollout "
            "falls into a corner."
        )
    if given := facts.get("overrides"):
        says.append(f"{plural(len(given), 'rollout')} by hand in another bucket than by the rule (buckets.overrides).")
    return Section("buckets", title, says, [_plane(judged, facts, places), _by_task(m, judged)])


def _by_task(m: Manifest, judged: pl.LazyFrame) -> Table:
    buckets = [(pl.col("bucket") == b).sum().alias(str(b)) for b in Bucket]
    sides = [(pl.col("side") == side).sum().alias(side) for side in SIDES]
    found = judged.group_by("task").agg(pl.len().alias("n"), *buckets, *sides, pl.col("reward").drop_nulls()).collect()
    rows = []
    for t in m.tasks.sort("stage").select("task").join(found, on="task", maintain_order="left").iter_rows(named=True):
        mean = math.fsum(t["reward"]) / len(t["reward"]) if t["reward"] else None
        beside = [f"{t[side]:,}" for side in SIDES] if any(t[side] for side in SIDES) else ["–"]
        each = (count(t[b]) for b in Bucket)
        rows.append([short(t["task"]), count(t["n"]), *each, real(mean, 3), " / ".join(beside)])
    rows, more = capped(rows, "tasks.parquet")
    header = ["task", "rollouts", *(_spaced(b) for b in Bucket), "mean reward", "align / conflict"]
    return Table(f"Buckets of each task.{more}", header, rows, list(range(1, len(header))))


def _plane(judged: pl.LazyFrame, facts: dict[str, Any], places: dict[str, int]) -> Plot:
    """Rollouts by standardised log-probability and reward; by the plain ones where the rule is not known."""
    rule, found = facts.get("rule"), counts(judged, "bucket")
    every = {b: found.get((str(b),), 0) for b in Bucket}
    total = sum(every.values())
    points, n = _points(judged, facts, places), 0
    traces = []
    for bucket, (_, symbol) in BUCKETS.items():
        mine = points[bucket]
        n += len(mine)
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": f"{_spaced(bucket)} ({every[bucket]:,})",
            "x": [round(x, 4) for x, *_ in mine],
            "y": [round(y, 4) for _, y, *_ in mine],
            "customdata": [place for *_, place, _ in mine],
            "text": [text for *_, text in mine],
            "hoverinfo": "text",
            "marker": {"color": f"@{bucket}", "symbol": symbol, "size": 9, "opacity": 0.8},
        }
        traces.append(trace)
    names = ("z_P: likelier than its peers →", "z_R: better than its peers →") if rule else ("P, nats", "reward")
    dashed = {"type": "line", "line": {"color": "@muted", "width": 1.5, "dash": "dash"}}
    lines = [
        dashed | {f"{a}0": side, f"{a}1": side, f"{b}ref": "paper", f"{b}0": 0, f"{b}1": 1}
        for a, b in ("xy", "yx")
        for side in ((-rule["k"], rule["k"]) if rule else ())
    ]
    layout = {"height": 500, "shapes": lines} | {
        axis: {"title": {"text": text}, "zeroline": False} for axis, text in zip(("xaxis", "yaxis"), names, strict=True)
    }
    rows = [[_spaced(b), BUCKETS[b][0], count(every[b]), percent(every[b], total)] for b in Bucket]
    table = Table(
        "Rollouts in each bucket, all of them.", ["bucket", "what it holds", "rollouts", "share"], rows, [2, 3]
    )
    note = "A click on a point opens its sample; dragging enlarges, a double click shows all."
    note += " Dashed lines are the thresholds." if rule else ""
    if n < total:
        note += (
            f" Drawn are {n:,} of {total:,} rollouts, evenly over buckets and tasks, so shares on the plane "
            "are not those of the set; the counts are of all."
        )
    alt = f"Scatter of probability against reward. {', '.join(f'{_spaced(b)} {every[b]:,}' for b in Bucket)}."
    return Plot("plane", "Probability against reward", alt, traces, layout, table, note)


def _points(
    judged: pl.LazyFrame, facts: dict[str, Any], places: dict[str, int]
) -> dict[str, list[tuple[float, float, int, str]]]:
    """Bucket -> (x, y, number of the sample, text) of the rollouts that are drawn: of prompts that the page holds."""
    rule, found = facts.get("rule"), {str(b): list[tuple[float, float, int, str]]() for b in Bucket}
    here = judged.filter(pl.col("prompt_uid").is_in(list(places)), pl.col("reward").is_not_null()).collect()
    for row in evenly(here, ["bucket", "task"], MOST_POINTS).sort("uid").iter_rows(named=True):
        p, r = sequence_logp(row["token_logps"], rule["logp"] if rule else "mean"), row["reward"]
        if math.isnan(p):
            continue
        x, y = p, r
        if rule:
            population = "all" if rule["population"] == "all" else str(row[rule["population"]])
            z_p, z_r = Stats(**facts["statistics"][population]).z([p], [r])
            x, y = float(z_p[0]), float(z_r[0])
        text = f"<b>{label(row['task'])}</b><br>P {p:.3f} nats, R {r:.4g}<br>{label(row['text'] or '(empty)', 70)}"
        found[row["bucket"]].append((x, y, places[row["prompt_uid"]], text))
    return found


def _spaced(bucket: str) -> str:
    return str(bucket).replace("_", " ")
