"""The policy's rewrites: kept and dropped, and what another threshold would keep."""

from __future__ import annotations

import numpy as np
import polars as pl

from curate.manifest import Manifest
from curate.manifest.card_policy import CURVE
from curate.report.parts import Plot, Section, Table, count, percent, plural, short

STEPS = 120  # thresholds of the curve, beside the card's


def augmentations(m: Manifest) -> Section:
    """Rewrites kept and dropped, by template and by fault, with the curve."""
    title, every, theta = "Augmentations", m.augmentations, (m.provenance.get("augment") or {}).get("theta")
    if not every.height:
        return Section("augmentations", title, ["No rewrites: this build has no self-distilled augmentation."])
    kept = f"{count(int(every['kept'].sum()))} of {count(every.height)} are kept"
    says = [
        f"The policy rewrote {plural(every['parent_uid'].n_unique(), 'row')} and answered its rewrites. {kept}"
        + (f": those where MI(x, x̂) · MI(y, ŷ) is above θ = {theta:g}." if theta is not None else "."),
        "“curate refilter RUN theta=…” moves the threshold without asking the model again.",
    ]
    parts: list[Plot | Table] = [_curve(every, theta)] if theta is not None else []
    faulty = pl.col("fault").is_not_null()
    counts = every.group_by("template").agg(n=pl.len(), kept=pl.col("kept").sum(), faulty=faulty.sum()).sort("template")
    rows = [[short(t), count(k), count(n - k - f), count(f), percent(k, n)] for t, n, k, f in counts.iter_rows()]
    header = ["template", "kept", "not above θ", "not usable", "share kept"]
    parts.append(Table("Rewrites by template.", header, rows, [1, 2, 3, 4], half=True))
    faults = every.filter(faulty).group_by("fault").len("n").sort(["n", "fault"], descending=[True, False])
    if faults.height:
        rows = [[short(fault, 200), count(n)] for fault, n in faults.iter_rows()]
        parts.append(Table("Not usable, whatever θ is.", ["why", "rewrites"], rows, [1], half=True))
    return Section("augmentations", title, says, parts)


def _curve(every: pl.DataFrame, theta: float) -> Plot:
    """Share of all rewrites whose score is above a threshold, over thresholds."""
    scores = np.sort(every.filter(pl.col("fault").is_null())["score"].to_numpy())
    spread = np.quantile(scores, np.linspace(0, 1, STEPS + 1)) if len(scores) > STEPS else scores
    at = sorted({*CURVE, theta, *map(float, spread)})
    n = {value: int(len(scores) - np.searchsorted(scores, value, side="right")) for value in at}
    end = max(1.05 * float(scores[-1]) if len(scores) else 0.0, 2 * theta, 1e-6)
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": at,
        "y": [round(n[value] / every.height, 6) for value in at],
        "line": {"color": "@accent", "shape": "hv", "width": 2.5},
        "text": [f"θ = {value:.4g}: {n[value]:,} of {every.height:,} kept" for value in at],
        "hoverinfo": "text",
    }
    layout = {
        "height": 320,
        "showlegend": False,
        "xaxis": {"title": {"text": "threshold θ"}, "range": [-end / 60, end]},
        "yaxis": {"title": {"text": "share kept"}, "rangemode": "tozero", "tickformat": ".0%"},
        "shapes": [
            {"type": "line", "x0": theta, "x1": theta, "yref": "paper", "y0": 0, "y1": 1,
             "line": {"color": "@second", "width": 2, "dash": "dash"}}
        ],
        "annotations": [
            {"x": theta, "yref": "paper", "y": 1, "text": f"θ = {theta:g}", "showarrow": False, "xanchor": "left",
             "yanchor": "top", "xshift": 5, "font": {"color": "@second"}}
        ],
    }  # fmt: skip
    rows = [
        [f"{v:g}" + (" (chosen)" if v == theta else ""), count(n[v]), count(every.height - n[v]),
         percent(n[v], every.height)]
        for v in sorted({*CURVE, theta})
    ]  # fmt: skip
    table = Table("What a threshold keeps.", ["θ", "kept", "dropped", "share kept"], rows, [0, 1, 2, 3])
    note = f"{count(n[theta])} of {plural(every.height, 'rewrite')} score above the threshold."
    if len(scores) < every.height:
        note += f" {count(every.height - len(scores))} cannot be used at any."
    return Plot("curve", "Share of rewrites kept, by threshold", f"Falling curve. {note}", [trace], layout, table, note)
