"""The part of a data card about its use: licences with what they forbid, considerations, citation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.manifest.licences import LIMITS, limits
from curate.manifest.markdown import escape, table

PAPERS = {
    "InsCL": "Wang et al., *InsCL: A Data-efficient Continual Learning Paradigm for Fine-tuning Large Language Models "
    "with Instructions*, NAACL 2024",
    "CPPO": "Zhang et al., *CPPO: Continual Learning for Reinforcement Learning with Human Feedback*, ICLR 2024",
    "COPR": "*Continual Human Preference Learning via Optimal Policy Regularization*, ACL Findings 2025",
    "PBL": "preference bias learning with self-distilled augmentation, NAACL Findings 2025, 303",
}


def licences(samples: pl.DataFrame) -> str:
    """The licences of the rows, which stay with them, and a warning for each use that one forbids."""
    counts = samples.group_by("license").agg(pl.len(), pl.col("task").unique().sort())
    rows, held = [], dict[str, int]()
    for name, n, tasks in counts.sort(["len", "license"], descending=[True, False], nulls_last=True).iter_rows():
        forbids = limits(name)
        rows.append(["not stated" if name is None else escape(name), f"{n:,}", _few(tasks), ", ".join(forbids) or None])
        for limit in forbids:
            held[limit] = held.get(limit, 0) + n
    parts = ["Rows keep the licence of their source, as it states it (column `license`)."]
    parts += [
        f"> **Warning: {limit}** ({held[limit]:,} of {samples.height:,} rows). {LIMITS[limit].capitalize()}."
        for limit in LIMITS
        if limit in held
    ]
    if not held and samples.height:
        parts.append("By their names, none of them forbids a use; some ask for attribution or for their notice.")
    parts.append(table(["licence as the source states it", "rows", "tasks", "restricts"], rows))
    parts.append("This table was made from the names of the licences, not from their texts, and is no legal advice.")
    return "\n\n".join(parts)


def _few(tasks: list[str], most: int = 5) -> str:
    more = f" and {len(tasks) - most} more" if len(tasks) > most else ""
    return ", ".join(map(escape, tasks[:most])) + more


def considerations(frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any]) -> str:
    """What a user should know before use, as far as tables and provenance tell it."""
    config, samples = provenance["config"], frames["samples"]
    written = int(samples["written_by"].eq_missing("policy").sum())
    splits = sorted({task["split"] for task in config["tasks"] if task.get("split")})
    lines = [
        "Contents are those of the sources: nothing was filtered for truth, offence, or personal data, beyond the rows "
        "that are listed as left out.",
        "Language is not recorded: it is that of the sources.",
        "Replayed rows are a choice, not a fair sample: the selector decides which tasks and instructions weigh more.",
        "Rows that were not drawn are not free of trace: `instructions` holds the texts of all instructions.",
    ]
    if splits:
        named = ", ".join(escape(split) for split in splits)
        lines.append(f"Rows are of the split {named} where a source has splits; do not test on them.")
    if written:
        lines.append(
            f"{written:,} of {samples.height:,} completions were written by the model that is being trained, not by a "
            "person; its errors are in them. The terms of that model are not recorded here."
        )
    if (rolled := frames["completions"].filter(origin="policy")).height:
        lines.append(f"{rolled.height:,} rollouts are what that model says, right or wrong; a reward is not a proof.")
    return "\n".join(f"- {line}" for line in lines)


def citation(frames: Mapping[str, pl.DataFrame], provenance: Mapping[str, Any]) -> str:
    """What to cite: the sources, this library, and the papers whose methods made the set."""
    completions, used = frames["completions"], list[str]()
    if provenance["replay"]["selector"] != "none":
        used.append("InsCL")
    if completions["bucket"].is_not_null().any():
        used.append("CPPO")
    if completions["rank"].is_not_null().any():
        used.append("COPR")
    if completions["side"].is_not_null().any() or frames["augmentations"].height:
        used.append("PBL")
    lines = [f"- {name}: {PAPERS[name]}." for name in used]
    return "\n".join([
        "Cite the sources (above) as they ask for it, this set by its name and the hashes in `provenance.json`"
        + (", and the methods that made it:" if used else "."),
        *(["", *lines] if lines else []),
    ])  # fmt: skip
