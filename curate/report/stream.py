"""The stream and its distances, the quotas that follow from them, and what was drawn."""

from __future__ import annotations

import polars as pl

from curate.augment import why_dropped
from curate.manifest import Manifest
from curate.manifest.tables import counts, height
from curate.report.even import evenly
from curate.report.parts import Plot, Section, Table, capped, count, label, left_out, newest_task, plural, real, short
from curate.report.plots import SHORT, bars, names_axis
from curate.report.plots import height as pixels

MOST_TASKS = 60  # that a plot shows
MOST_POINTS = 2_000


def shown_tasks(tasks: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """(the tasks that a plot shows, in stream order; a remark where they are not all)."""
    more = f"Drawn are the newest {MOST_TASKS} of {tasks.height:,} tasks." if tasks.height > MOST_TASKS else ""
    return tasks.sort("stage").tail(MOST_TASKS), more


def stream(m: Manifest) -> Section:
    """The stream, its distances as a heat map, and the map of its instructions."""
    newest, far = newest_task(m), m.tasks.filter(pl.col("distance").is_not_null())
    rows = [
        [count(t["stage"]), short(t["task"]), count(t["rows"]), count(t["instructions"]), real(t["distance"]),
         "exact" if t["distance_bound"] == 0 else real(t["distance_bound"])]
        for t in m.tasks.sort("stage").iter_rows(named=True)
    ]  # fmt: skip
    rows, more = capped(rows, "tasks.parquet")
    header = ["stage", "task", "rows", "instructions", "distance", "± bound"]
    table = Table(f"The tasks in the order of the stream.{more}", header, rows, [0, 2, 3, 4, 5])
    if far.height:
        bounded = far.filter(pl.col("distance_bound") > 0).height
        says = [
            "Distance is Wasserstein-1 between the embedded instructions of a task and of the newest one, cosine cost: "
            "0 = the same, 2 = opposite. The farther a task, the less training on the newest one rehearses it.",
            f"{plural(bounded, 'distance')} are of centroids; the largest possible error stands in the table."
            if bounded
            else "All of them are exact.",
        ]
    else:
        says = ["No distances: this selector does not measure them, or the stream has one task."]
    parts: list[Plot | Table] = [_heat(far, newest, table) if far.height else table]
    places = m.instructions.filter(pl.col("x").is_not_null() & pl.col("y").is_not_null())
    if places.height:
        parts.append(_map(m, places, newest))
    else:
        says.append(
            "No map of instructions: the manifest holds no coordinates (its selector needs no embeddings of "
            "instructions, or it is older than schema 1.2)."
        )
    return Section("stream", "The stream and its distances", says, parts)


def _heat(far: pl.DataFrame, newest: str, table: Table) -> Plot:
    tasks, note = shown_tasks(far)
    names, values = tasks["task"].to_list(), tasks["distance"].to_list()
    trace = {
        "type": "heatmap",
        "z": [[v] for v in values],
        "x": [0],
        "y": list(range(len(values))),
        "text": [[real(v)] for v in values],
        "texttemplate": "%{text}",
        "textfont": {"color": "@ink"},
        "hovertext": [[f"{label(t)}: {real(v)}"] for t, v in zip(names, values, strict=True)],
        "hoverinfo": "text",
        "colorscale": "@sequential",
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "xgap": 2,
        "ygap": 2,
    }
    across = {"tickvals": [0], "ticktext": [f"to {label(newest, SHORT)}"], "side": "top", "showgrid": False}
    layout = {"height": max(460, pixels(len(names))), "yaxis": names_axis(names), "xaxis": across}
    low, high = min(far["distance"].to_list()), max(far["distance"].to_list())
    alt = f"Heat map of {plural(far.height, 'distance')} to the newest task, from {real(low)} to {real(high)}."
    return Plot("distances", "Distance to the newest task", alt, [trace], layout, table, note, half=True)


def _map(m: Manifest, places: pl.DataFrame, newest: str) -> Plot:
    """Instructions on the plane: those that rows were drawn of, the others, and the newest task's."""
    kinds = {
        "left out": ("@muted", "circle-open"),
        "replayed": ("@accent", "circle"),
        "newest task": ("@second", "diamond"),
    }
    old = pl.when(pl.col("granted") > 0).then(pl.lit("replayed")).otherwise(pl.lit("left out"))
    places = places.with_columns(kind=pl.when(pl.col("task") == newest).then(pl.lit("newest task")).otherwise(old))
    shown = evenly(places, ["task", "kind"], MOST_POINTS).sort("stage", "uid")
    traces, rows = [], []
    for kind, (colour, symbol) in kinds.items():
        here, every = shown.filter(kind=kind), places.filter(kind=kind)
        rows.append([kind, *(count(int(n)) for n in (every.height, every["rows"].sum(), every["granted"].sum()))])
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": f"{kind} ({every.height:,})",
            "x": [round(v, 4) for v in here["x"].to_list()],
            "y": [round(v, 4) for v in here["y"].to_list()],
            "text": [
                f"<b>{label(t)}</b><br>{label(i, 90)}<br>{plural(n, 'row')}"
                + (f", {granted:,} drawn" if granted else "")
                for t, i, n, granted in here.select("task", "instruction", "rows", "granted").iter_rows()
            ],
            "hoverinfo": "text",
            "marker": {"color": colour, "symbol": symbol, "size": 8, "opacity": 0.75},
        }
        traces.append(trace)
    held = m.provenance.get("map", {}).get("variance")
    axes = [f"component {i + 1}" + (f" ({100 * held[i]:.1f} % of the variance)" if held else "") for i in (0, 1)]
    layout = {"height": 460} | {
        axis: {"title": {"text": text}, "zeroline": False} for axis, text in zip(("xaxis", "yaxis"), axes, strict=True)
    }
    header = ["kind", "instructions", "rows", "rows drawn"]
    table = Table("Instructions on the map, all of them.", header, rows, [1, 2, 3])
    note = (
        "A point is a distinct instruction of a task, by the first two principal components of all embeddings. "
        "Neighbours are alike; distances on the plane are smaller than real ones."
    )
    if shown.height < places.height:
        note += f" Drawn are {shown.height:,} of {places.height:,}, evenly over tasks; the counts are of all."
    alt = f"Map of {plural(places.height, 'instruction')} of {plural(places['task'].n_unique(), 'task')}."
    return Plot("map", "Map of the instructions", alt, traces, layout, table, note, half=True)


def quotas(m: Manifest) -> Section:
    """What was asked of each task, what it gave, and why they differ."""
    previous, replay = m.tasks.filter(pl.col("quota").is_not_null()).sort("stage"), m.provenance["replay"]
    if not previous.height:
        return Section("quotas", "Quotas", ["No quotas: there is no older task here to draw from."])
    asked, granted = (int(previous[c].sum()) for c in ("quota", "granted"))
    differ = previous.filter(pl.col("quota") != pl.col("granted")).height
    why = (
        f"{plural(differ, 'task')} gave another number; the table says why." if differ else "Every task gave its quota."
    )
    says = [
        f"Selector {replay['selector']}: {replay['about']}.",
        f"{plural(asked, 'row')} were asked of the older tasks, {count(granted)} granted. {why}",
    ]
    if not previous["distance"].null_count():
        says.append("A task's share is its distance over the sum of all distances, times the budget.")
    rows = [
        [short(t["task"]), real(t["share"], 2), count(t["quota"]), count(t["granted"]),
         f"{count(t['covered'])} of {count(t['instructions'])}", real(t["insinfo"], 2),
         short(t["reason"] or "as asked", 200)]
        for t in previous.iter_rows(named=True)
    ]  # fmt: skip
    rows, more = capped(rows, "tasks.parquet")
    header = ["task", "share", "asked", "granted", "instructions covered", "InsInfo", "why they differ"]
    table = Table(f"Quotas; InsInfo is the mean over the drawn rows, in nats.{more}", header, rows, [1, 2, 3, 4, 5])
    shown, note = shown_tasks(previous)
    series = [("asked", shown["quota"].to_list(), "@faint"), ("granted", shown["granted"].to_list(), "@accent")]
    plot = bars("quota", "Rows asked and granted", shown["task"].to_list(), series, "rows", table, note, "group")
    return Section("quotas", "Quotas asked and granted", says, [plot])


def drawn(m: Manifest) -> Section:
    """What is in the set and what was left, task by task, with the reasons."""
    kept, left = m.scan("samples").filter(pl.col("origin") != "augmented"), left_out(m)
    both = pl.concat([kept.select("task", kind="origin"), left.select("task", kind=pl.lit("left"))])
    found = both.group_by("task").agg(
        (pl.col("kind") == kind).sum().alias(kind) for kind in ("current", "replay", "left")
    )
    n = m.tasks.select("task", "stage").join(found.collect(), on="task", how="left").fill_null(0).sort("stage")
    n_kept, n_left = height(kept), height(left)
    listed = " and listed in drops.parquet" if n_left else ""
    says = [f"{plural(n_kept, 'source row')} are in the set, {plural(n_left, 'row')} were left out{listed}."]
    rows, more = capped([[short(t), *map(count, each)] for t, _, *each in n.iter_rows()], "drops.parquet")
    header = ["task", "newest task", "replayed", "left out"]
    table = Table(f"Rows of each task.{more}", header, rows, [1, 2, 3])
    shown, note = shown_tasks(n)
    series = [
        (name, shown[kind].to_list(), colour)
        for name, kind, colour in zip(
            header[1:], ("current", "replay", "left"), ("@second", "@accent", "@faint"), strict=True
        )
    ]
    title = "Rows in the set and left out"
    parts: list[Plot | Table] = [bars("rows", title, shown["task"].to_list(), series, "rows", table, note)]
    why_left = {each: k for each, k in counts(m.scan("drops"), "step", "reason").items() if each[0] != "augment"}
    theta = (m.provenance.get("augment") or {}).get("theta", 0.0)
    for (fault,), k in counts(m.scan("augmentations").filter(~pl.col("kept")), "fault").items():  # some share a uid
        why_left["augment", why_dropped(fault, theta)] = k
    reasons = sorted(why_left.items(), key=lambda each: (-each[1], each[0]))
    if reasons:
        why, more = capped([[s, short(r, 200), count(n)] for (s, r), n in reasons], "drops.parquet")
        caption = f"Why rows and rewrites were left out.{more}"
        parts.append(Table(caption, ["step", "reason", "rows"], why, [2]))
    return Section("drawn", "What was drawn and what was left", says, parts)
