"""What the instructions are about: tags, their clusters, and InsInfo."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import polars as pl

from curate.manifest import Manifest
from curate.report.parts import Plot, Section, Table, count, plural, real, short
from curate.report.plots import bars

TOP = 20
MEMBERS = 12
BINS = 24


def tags(m: Manifest) -> Section:
    """Clusters with their members, the rarest tags, the distribution of InsInfo."""
    if not m.tags.height:
        return Section("tags", "Tags", ["No tags: this selector does not need them, so instructions are not scored."])
    clustered, pool = m.tags.filter(pl.col("cluster") >= 0), int(m.tags["pool"][0])
    merged = "none are near enough to each other for a cluster."
    if clustered.height:
        n = plural(clustered["cluster"].n_unique(), "cluster")
        merged = f"{n} hold {count(clustered.height)} of the raw ones, the others stay themselves."
    says = [
        f"{plural(m.tags.height, 'raw tag')} count as {plural(m.tags['canonical'].n_unique(), 'tag')}; {merged} "
        f"Frequencies are over a pool of {plural(pool, 'instruction')}.",
        "InsInfo of an instruction is Σ log(N/f) over its tags, in nats: rare tags and many of them make it large, and "
        "within a task InsCL's draw prefers large values.",
    ]
    parts: list[Plot | Table] = [_clusters(clustered)] if clustered.height else []
    canonical = m.tags.group_by("canonical").agg(pl.col("count").first()).filter(pl.col("count") > 0)
    for what, down in (("rarest", False), ("most frequent", True)):
        first = canonical.sort(["count", "canonical"], descending=[down, False]).head(TOP)
        rows = [[short(t), count(n), real(math.log(pool / n), 2)] for t, n in first.iter_rows()]
        caption = f"The {what} tags, {first.height} of {canonical.height:,} that occur in the pool."
        parts.append(Table(caption, ["tag", "instructions f", "log(N/f), nats"], rows, [1, 2], half=True))
    scored = m.instructions.filter(pl.col("insinfo").is_not_null())
    return Section("tags", "Tags", says, [*parts, _insinfo(scored)] if scored.height else parts)


def _clusters(clustered: pl.DataFrame) -> Plot:
    """Sizes of the largest clusters, with their members."""
    every = (
        clustered.sort(["raw_count", "tag"], descending=[True, False])
        .group_by("cluster", maintain_order=True)
        .agg(pl.col("canonical").first(), pl.len().alias("size"), pl.col("count").first(), "tag")
        .sort(["size", "canonical"], descending=[True, False])
    )
    top, rows = every.head(TOP), []
    for r in top.iter_rows(named=True):
        more = [f"… {len(r['tag']) - MEMBERS:,} more"] if len(r["tag"]) > MEMBERS else []
        members = ", ".join([short(t, 40) for t in r["tag"][:MEMBERS]] + more)
        rows.append([short(r["canonical"]), count(r["size"]), count(r["count"]), members])
    caption = "Clusters by size; a cluster is named after its most frequent member."
    table = Table(caption, ["cluster", "raw tags", "instructions f", "members"], rows, [1, 2])
    note = f"The {top.height} largest of {every.height:,} clusters." if every.height > TOP else ""
    series = [("raw tags", top["size"].to_list(), "@accent")]
    return bars("clusters", "Sizes of the clusters", top["canonical"].to_list(), series, "raw tags", table, note)


def _insinfo(scored: pl.DataFrame) -> Plot:
    """Distribution of InsInfo, of instructions that rows were drawn of and of the others."""
    values, drawn = scored["insinfo"].to_numpy(), (scored["granted"].fill_null(0) > 0).to_numpy()
    edges = np.histogram_bin_edges(values, BINS)
    n = {"replayed": np.histogram(values[drawn], edges)[0], "left out": np.histogram(values[~drawn], edges)[0]}
    ranges = [f"{a:.2f} to {b:.2f}" for a, b in pairwise(edges.tolist())]
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": ((edges[:-1] + edges[1:]) / 2).round(6).tolist(),
            "y": n[name].tolist(),
            "width": round(float(edges[1] - edges[0]), 6),
            "marker": {"color": colour},
            "hovertext": [f"{r} nats: {k:,} {name}" for r, k in zip(ranges, n[name].tolist(), strict=True)],
            "hoverinfo": "text",
        }
        for name, colour in (("replayed", "@accent"), ("left out", "@faint"))
    ]
    layout = {
        "height": 320,
        "barmode": "stack",
        "xaxis": {"title": {"text": "InsInfo, nats"}},
        "yaxis": {"title": {"text": "instructions"}},
    }
    rows = [[r, count(int(a)), count(int(b))] for r, a, b in zip(ranges, n["replayed"], n["left out"], strict=True)]
    table = Table("InsInfo of instructions.", ["nats", "replayed", "left out"], rows, [1, 2])
    mean, median = math.fsum(values) / len(values), float(np.median(values))
    note = f"{plural(len(values), 'instruction')} with a score; mean {real(mean, 2)}, median {real(median, 2)} nats."
    return Plot("insinfo", "Distribution of InsInfo", f"Histogram. {note}", traces, layout, table, note)
