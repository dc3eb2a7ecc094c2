"""The part of a data card that tells what the policy did: rollouts, buckets, answers, augmentation with its θ curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.manifest.buckets import Bucket
from curate.manifest.markdown import code, escape, real, table
from curate.manifest.tables import Rows, counts

CURVE = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # thresholds of the curve, beside the chosen one
BAR = 30  # characters of a full bar


def policy_sections(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> list[str]:
    """Headings and texts, in order; none where no model was asked."""
    parts: list[str] = []
    if provenance.get("models"):
        parts += ["## Models", _models(provenance)]
    if provenance.get("rollouts"):
        parts += ["## Rollouts and the five buckets", _rollouts(frames, provenance)]
    if provenance.get("augment"):
        parts += [
            "## Self-distilled augmentation",
            _augmentation(frames["augmentations"].lazy().collect(), provenance["augment"]),
        ]
    return parts


def _models(provenance: Mapping[str, Any]) -> str:
    config, rows = provenance["config"], []
    for role, found in sorted(provenance["models"].items()):
        section = (config["tags"]["model"] or config["policy"]) if role == "tagger" else config[role]
        rows.append([role, code(section["model"]), code(found["fingerprint"][:80])])
    parts = [table(["role", "model", "weights"], rows)]
    spent = {"tags": provenance.get("tagging"), "rollouts": provenance.get("rollouts"),
             "augmentation": provenance.get("augment")}  # fmt: skip
    asked = [
        [name, f"{s['requests']:,}", f"{s['prompt_tokens']:,}", f"{s['completion_tokens']:,}", s.get("cost")]
        for name, s in spent.items()
        if s
    ]
    parts += [table(["asked for", "answers", "prompt tokens", "completion tokens", "cost"], asked)] if asked else []
    return "\n\n".join(parts)


def _rollouts(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    facts, rule = provenance["rollouts"], provenance["buckets"]["rule"]
    rolled = frames["completions"].lazy().filter(origin="policy")
    n, prompts, cut, no_logps, no_reward = rolled.select(
        pl.len(),
        pl.col("prompt_uid").n_unique().alias("prompts"),
        (~pl.col("finished")).sum().alias("cut"),
        pl.col("token_logps").null_count(),
        pl.col("reward").null_count(),
    ).collect().row(0)  # fmt: skip
    rewards = {task: _mean(mine) for task, mine in rolled.group_by("task").agg("reward").collect().iter_rows()}
    by_hand = len(provenance["buckets"].get("overrides", {}))
    lines = [
        f"{n:,} completions of {prompts:,} prompts, {facts['k']} each, at "
        f"temperature {facts['temperature']:g}, top-p {facts['top_p']:g}, at most {facts['max_new_tokens']} tokens "
        f"({cut:,} were cut there). Reward: {code(facts['reward'][:80])}"
        + (f"; {no_logps:,} have no log-probabilities" if no_logps else "")
        + (f"; {no_reward:,} rewards are not a number" if no_reward else "")
        + (f". {len(facts['skipped']):,} prompts are too long for the policy" if facts["skipped"] else "")
        + ".",
        f"Buckets (CPPO): log-probability ({rule['logp']} over tokens) and reward, standardised over "
        f"{_population(rule['population'])}, are beyond {rule['k']:g} standard deviations, or the rollout is normal."
        + (f" {by_hand:,} were put elsewhere by a person." if by_hand else ""),
        table(
            ["task", "rollouts", *map(str, Bucket), "mean reward"],
            [
                [escape(t["task"]), t["rollouts"], *(t[str(b)] for b in Bucket),
                 real(rewards.get(t["task"]), 3)]
                for t in frames["tasks"].lazy().collect().sort("stage").iter_rows(named=True)
                if t["rollouts"]
            ],
        ),
    ]  # fmt: skip
    if similar := provenance.get("similarity"):
        sides = {side: n for (side,), n in counts(rolled, "side").items()}
        lines.append(
            f"Beside the target answer (cosine ≥ {similar['threshold']:g}): {sides.get('align', 0):,} align, "
            f"{sides.get('conflict', 0):,} conflict."
        )
    if swap := provenance.get("on_policy"):
        lines.append(
            f"On-policy replay: {swap['replaced']:,} replayed rows carry the policy's own best answer, "
            f"{swap['dropped']:,} were left out for want of a good one."
        )
    return "\n\n".join(lines)


def _mean(rewards: list[float | None]) -> float | None:
    values = [reward for reward in rewards if reward is not None]
    return math.fsum(values) / len(values) if values else None  # exact, so that the order of rows has no effect


def _population(name: str) -> str:
    return {"task": "the task", "all": "the whole set", "batch": "the rollout batch"}[name]


def _augmentation(every: pl.DataFrame, facts: Mapping[str, Any]) -> str:
    theta, scores = facts["theta"], every.filter(pl.col("fault").is_null())["score"]
    faulty = every.filter(pl.col("fault").is_not_null()).group_by("fault").len().sort("fault")
    at = sorted({*CURVE, theta})
    rows = []
    for value in at:
        kept = int((scores > value).sum())
        share = kept / max(1, every.height)
        mark = "**" if value == theta else ""
        rows.append([f"{mark}{value:g}{mark}", kept, every.height - kept, f"`{'█' * round(share * BAR):<{BAR}}`"])
    lines = [
        f"The policy rewrote {every['parent_uid'].n_unique():,} rows by {len(facts['templates'])} templates "
        f"({', '.join(code(name) for name in facts['templates'])}) and answered its rewrites. A rewrite stays "
        f"where MI(x, x̂) · MI(y, ŷ) > θ = {theta:g}: {int(every['kept'].sum()):,} of {every.height:,} are kept. Word "
        f"statistics are from {facts['corpus']:,} texts of the stream. The curve says what another θ would keep; "
        "`curate refilter RUN theta=…` moves it without asking the model again.",
        table(["θ", "kept", "dropped", "share kept"], rows),
    ]
    if faulty.height:
        lines.append(table(["not usable whatever θ is", "rewrites"],
                           [[escape(fault), n] for fault, n in faulty.iter_rows()]))  # fmt: skip
    return "\n\n".join(lines)
