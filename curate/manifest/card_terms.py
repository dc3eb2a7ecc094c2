"""The part of a data card about its use: licences with what they forbid, considerations, citation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.manifest.licences import LIMITS, limits
from curate.manifest.markdown import escape, table
from curate.manifest.tables import Rows, counts, height, value

PAPERS = {
    "InsCL": "Wang et al., *InsCL: A Data-efficient Continual Learning Paradigm for Fine-tuning Large Language Models "
    "with Instructions*, NAACL 2024",
    "CPPO": "Zhang et al., *CPPO: Continual Learning for Reinforcement Learning with Human Feedback*, ICLR 2024",
    "COPR": "*Continual Human Preference Learning via Optimal Policy Regularization*, ACL Findings 2025",
    "PBL": "preference bias learning with self-distilled augmentation, NAACL Findings 2025, 303",
}


def licences(samples: Rows) -> str:
    """The licences of the rows, which stay with them, and a warning for each use that one forbids."""
    each: dict[str | None, dict[str, int]] = {}
    for (name, task), n in counts(samples, "license", "task").items():
        each.setdefault(name, {})[task] = n
    rows, held, every = [], dict[str, int](), sum(sum(tasks.values()) for tasks in each.values())
    for name, tasks in sorted(each.items(), key=lambda item: (-sum(item[1].values()), item[0] is None, item[0])):
        n = sum(tasks.values())
        forbids = limits(name)
        rows.append(
            ["not stated" if name is None else escape(name), f"{n:,}", _few(sorted(tasks)), ", ".join(forbids) or None]
        )
        for limit in forbids:
            held[limit] = held.get(limit, 0) + n
    parts = ["Rows keep the licence of their source, as it states it (column `license`)."]
    parts += [
        f"> **Warning: {limit}** ({held[limit]:,} of {every:,} rows). {LIMITS[limit].capitalize()}."
        for limit in LIMITS
        if limit in held
    ]
    if not held and every:
        parts.append("By their names, none of them forbids a use; some ask for attribution or for their notice.")
    parts.append(table(["licence as the source states it", "rows", "tasks", "restricts"], rows))
    parts.append("This table was made from the names of the licences, not from their texts, and is no legal advice.")
    return "\n\n".join(parts)


def _few(tasks: list[str], most: int = 5) -> str:
    more = f" and {len(tasks) - most} more" if len(tasks) > most else ""
    return ", ".join(map(escape, tasks[:most])) + more


def considerations(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    """What a user should know before use, as far as tables and provenance tell it."""
    config, written_by = provenance["config"], counts(frames["samples"], "written_by")
    written = written_by.get(("policy",), 0)
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
            f"{written:,} of {sum(written_by.values()):,} completions were written by the model that is being "
            "trained, not by a person; its errors are in them. The terms of that model are not recorded here."
        )
    if rolled := counts(frames["completions"], "origin").get(("policy",)):
        lines.append(f"{rolled:,} rollouts are what that model says, right or wrong; a reward is not a proof.")
    return "\n".join(f"- {line}" for line in lines)


def citation(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    """What to cite: the sources, this library, and the papers whose methods made the set."""
    completions, used = frames["completions"], list[str]()
    if provenance["replay"]["selector"] != "none":
        used.append("InsCL")
    if value(completions, pl.col("bucket").count()):
        used.append("CPPO")
    if value(completions, pl.col("rank").count()):
        used.append("COPR")
    if value(completions, pl.col("side").count()) or height(frames["augmentations"]):
        used.append("PBL")
    lines = [f"- {name}: {PAPERS[name]}." for name in used]
    return "\n".join([
        "Cite the sources (above) as they ask for it, this set by its name and the hashes in `provenance.json`"
        + (", and the methods that made it:" if used else "."),
        *(["", *lines] if lines else []),
    ])  # fmt: skip
