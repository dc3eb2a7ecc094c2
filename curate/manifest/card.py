"""The data card of a manifest: README.md, written from the tables and the provenance alone.

Its YAML front matter follows the Hugging Face conventions, so `datasets.load_dataset(folder, "samples")` works.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.manifest.card_policy import policy_sections
from curate.manifest.markdown import code, escape, real, table
from curate.manifest.schema import TABLES

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def card(frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any]) -> str:
    """The whole card as Markdown."""
    config = provenance["config"]
    parts = [
        _front_matter(frames, config["name"]),
        f"# {escape(config['name'])}",
        _summary(frames, provenance),
        "## The stream",
        _stream(frames["tasks"]),
        "## How rows were chosen",
        _method(frames, provenance),
        *policy_sections(frames, provenance),
        "## Licences",
        _licences(frames["samples"]),
        "## What was left out",
        _left_out(frames["drops"]),
        "## Files",
        _files(),
        "## How to make it again",
        _again(provenance),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(frames: Mapping[str, pl.DataFrame], name: str) -> str:
    # json.dumps gives a valid YAML string whatever the name holds
    lines = [
        "---",
        f"pretty_name: {json.dumps(name).replace(chr(127), ' ')}",
        "tags:",
        "- replay",
        "- continual-learning",
    ]
    lines += [f"size_categories:\n- {_size(frames['samples'].height)}", "configs:"]
    for each in TABLES.values():
        if frames[each.name].height:
            lines += [f"- config_name: {each.name}", f"  data_files: {each.file}"]
            lines += ["  default: true"] if each.name == "samples" else []
    return "\n".join([*lines, "---"])


def _size(n: int) -> str:
    return next((name for limit, name in SIZES if n < limit), "n>1M")


def _summary(frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any]) -> str:
    samples, tasks = frames["samples"], frames["tasks"].sort("stage")
    origins = {name: (samples["origin"] == name).sum() for name in ("current", "replay", "augmented")}
    return (
        f"Training data for the task **{escape(tasks['task'][-1])}**, number {tasks.height} of a stream: "
        f"{origins['current']:,} rows of it, and {origins['replay']:,} rows of the tasks before it, replayed so that "
        f"they are not forgotten"
        + (f", with {origins['augmented']:,} augmented rows" if origins["augmented"] else "")
        + f". Made by `curate build` (rehearse {provenance['rehearse']})."
    )


def _stream(tasks: pl.DataFrame) -> str:
    header = ["stage", "task", "rows", "instructions", "distance", "± bound", "share", "quota", "granted", "covered",
              "mean InsInfo", "why granted differs"]  # fmt: skip
    rows = [
        [t["stage"], escape(t["task"]), t["rows"], t["instructions"], real(t["distance"]), real(t["distance_bound"]),
         real(t["share"], 2), t["quota"], t["granted"], t["covered"], real(t["insinfo"], 3), t["reason"]]
        for t in tasks.sort("stage").iter_rows(named=True)
    ]  # fmt: skip
    note = (
        "Distance: Wasserstein-1 between the instruction embeddings of the task and of the current one, cosine cost "
        "(0 = the same, 2 = opposite); the bound is the largest possible error, 0 = exact. InsInfo in nats."
    )
    return table(header, rows) + "\n\n" + note


def _method(frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any]) -> str:
    config, replay = provenance["config"], provenance["replay"]
    tags = frames["tags"]
    lines = [
        f"- Selector `{replay['selector']}`: {replay['about']}.",
        f"- Budget: {replay['asked']:,} rows asked, {frames['tasks']['granted'].sum():,} granted.",
        f"- Seed: {config['seed']}.",
    ]
    if provenance["embedder"]:
        name = config["embed"]["path"] or config["embed"]["model"]
        lines.append(f"- Embedder: {code(name)} ({code(provenance['embedder'])}).")
    if provenance["solver"]:
        lines.append(f"- Transport solver: {', '.join(provenance['solver'])}; optimality proven.")
    if tags.height:
        clusters = tags.filter(pl.col("cluster") >= 0)["cluster"].n_unique()
        lines.append(
            f"- Tags: tagger `{config['tags']['tagger']}`, {tags.height:,} raw tags, "
            f"{tags['canonical'].n_unique():,} after lemmas and {clusters:,} clusters; InsInfo over a pool of "
            f"{tags['pool'][0]:,} instructions."
        )
    return "\n".join(lines)


def _licences(samples: pl.DataFrame) -> str:
    counts = samples.group_by("license").len().sort(["len", "license"], descending=[True, False], nulls_last=True)
    rows = [["not stated" if name is None else escape(name), n] for name, n in counts.iter_rows()]
    return table(["licence as the source states it", "rows"], rows)


def _left_out(drops: pl.DataFrame) -> str:
    if not drops.height:
        return "Nothing: every source row is in `samples.parquet`."
    counts = drops.group_by("step", "reason").len().sort("step", "reason")
    rows = [[step, escape(reason), n] for step, reason, n in counts.iter_rows()]
    return table(["step", "reason", "rows"], rows) + "\n\nEach row is in `drops.parquet`."


def _files() -> str:
    rows = [[f"`{t.file}`", f"one {t.row} a row", ", ".join(f"`{c}`" for c in t.columns)] for t in TABLES.values()]
    return table(["file", "holds", "columns"], rows)


def _again(provenance: Mapping[str, Any]) -> str:
    inputs = [
        [escape(i["task"]), escape(name), f"`{digest[:16]}…`"]
        for i in provenance["inputs"]
        for name, digest in sorted(i["files"].items())
    ]
    return (
        "`provenance.json` holds the whole configuration, the hash of every input and output, and the versions of all "
        "packages. The same inputs, configuration and seed give these bytes again.\n\n"
        + table(["task", "source", "sha256"], inputs)
    )
