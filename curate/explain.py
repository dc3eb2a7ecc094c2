"""`explain`: why a row is in the set, or why it is not; told from the manifest alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import polars as pl

from curate.errors import InputError
from curate.manifest import Manifest, Rule, Stats, sequence_logp

Row = dict[str, Any]
PLACES = ("samples", "completions", "drops")  # where a uid may be
_FIND = "a click on a row of report.html shows its uid; samples.parquet and drops.parquet have them all"
SHORTEST = 4  # digits of a uid's beginning that are enough to look it up


def explain(manifest: Manifest, uid: str) -> str:
    """The story of one row, or of one completion, in sentences.

    Args:
        manifest: what `curate.manifest.read` gives.
        uid: a uid of a row or a completion, or the beginning of one.

    Raises:
        InputError: no row has this uid, or several rows begin so.
    """
    uid = _whole(manifest, uid)
    sample, completion, drop = (manifest.scan(name).filter(uid=uid).collect() for name in PLACES)
    try:
        if completion.height:
            return "\n".join(_answer(manifest, completion.row(0, named=True)))
        if sample.height:
            return "\n".join(_in(manifest, sample.row(0, named=True)))
        return "\n".join(_out(manifest, drop.row(0, named=True)))
    except (TypeError, ValueError, LookupError, ArithmeticError, pl.exceptions.PolarsError):
        raise InputError(f"{manifest.folder}: the tables do not fit together, so row {uid} cannot be explained",
                         remedy=f"`curate check {manifest.folder}` says what is wrong") from None  # fmt: skip


def _whole(manifest: Manifest, uid: str) -> str:
    if len(uid) < SHORTEST:
        raise InputError(f"uid {uid!r}: give at least {SHORTEST} digits", remedy=_FIND)
    begins = pl.col("uid").str.starts_with(uid.lower())
    tables = (manifest.scan(name).filter(begins).select("uid").collect() for name in PLACES)
    found = sorted(set().union(*(table["uid"] for table in tables)))
    if not found:
        raise InputError(
            f"uid {uid!r} is in none of samples.parquet, completions.parquet and drops.parquet of {manifest.folder}",
            remedy=f"{_FIND}; it is a hash of content: a row of another task, or edited text, has another",
        )
    if len(found) > 1:
        raise InputError(
            f"uid {uid!r}: {len(found)} rows begin so, {', '.join(found[:3])} …", remedy="give more digits"
        )
    return found[0]


def _in(m: Manifest, sample: Row) -> Iterator[str]:
    task, story = m.tasks.filter(task=sample["task"]).row(0, named=True), Story(m)
    if sample["origin"] == "augmented":
        yield f"{sample['uid']} is in the set, as augmented: a rewrite of {sample['parent_uid']}, {sample['task']!r}."
        yield from _rewrite(m, sample["uid"])
        return
    yield f"{sample['uid']} is in the set, as {sample['origin']}: row {sample['row']} of task {sample['task']!r}."
    yield _excerpt("instruction", sample["instruction"])
    if "part" in m.provenance:
        yield f"Why: {m.provenance['part']['what']} asked it. The set that it is a part of tells why it is there."
    elif sample["origin"] == "current":
        yield story.current(task)
    else:
        instruction = m.instructions.filter(task=sample["task"], instruction=sample["instruction"]).row(0, named=True)
        yield from story.task(task)
        yield from story.instruction(instruction)
        yield from story.draw(sample, task, instruction)
    yield from _policy(m, sample)


def _answer(m: Manifest, row: Row) -> Iterator[str]:
    """What a completion is: whose, how good, how likely, in which bucket and why."""
    whose = {"policy": f"a rollout of {row['policy']}", "gold": "the source's answer that gave way to a rollout"}
    yield f"{row['uid']} is a completion: {whose.get(row['origin'], 'an answer that the data brought')}."
    yield _excerpt("text", row["text"])
    yield f"Prompt: {row['prompt_uid']} of task {row['task']!r}; `curate explain` tells of it too."
    if row["reward"] is not None:
        rank = f", rank {row['rank']} of its prompt's" if row["rank"] is not None else ""
        yield f"Reward: {_number(row['reward'])} ({_line(row['reward_id'] or 'none')}){rank}."
    if row["token_logps"] is not None:
        yield (
            f"Log-probability: {sequence_logp(row['token_logps']):.4f} nats a token over {row['n_tokens']} tokens"
            + (f", drawn at temperature {row['temperature']:g}." if row["temperature"] is not None else ".")
        )
    facts = m.provenance.get("buckets", {})
    if row["bucket"] is not None and (given := facts.get("overrides", {}).get(row["uid"])) is not None:
        yield f"Bucket: {given}, given by hand (buckets.overrides)."
    elif row["bucket"] is not None and "rule" in facts:
        rule = Rule(**facts["rule"])
        populations = {name: Stats(**moments) for name, moments in facts["statistics"].items()}
        z_p, z_r = rule.z(m.scan("completions").filter(uid=row["uid"]).collect(), populations).row(0)
        yield f"Bucket: {row['bucket']}, as z_P = {z_p:+.2f} and z_R = {z_r:+.2f} against k = {rule.k:g}."


class Story:
    """Why rows were drawn, in sentences. What many rows share is looked up once."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.seed = manifest.provenance["config"]["seed"]
        self.newest = manifest.tasks.sort("stage")["task"].to_list()[-1:]
        self.previous = manifest.tasks.filter(pl.col("quota").is_not_null())
        self.frequency = {t: (n, N) for t, n, N in manifest.tags.select("canonical", "count", "pool").iter_rows()}
        self.insinfo = dict(manifest.instructions.group_by("task").agg(pl.col("insinfo").sum()).iter_rows())

    def current(self, task: Row) -> str:
        """Of a row of the newest task."""
        return f"Why: it belongs to the newest task, and all {task['rows']:,} of its rows are trained on."

    def task(self, task: Row) -> Iterator[str]:
        """The task's distance, share and grant."""
        replay = self.manifest.provenance["replay"]
        yield f"Selector {replay['selector']}: {replay['about']}."
        if task["distance"] is not None:
            place = (self.previous["distance"] > task["distance"]).sum() + 1
            bound = f" ± {task['distance_bound']:.4f}" if task["distance_bound"] else ""
            yield (
                f"Task: {task['task']!r} is {task['distance']:.4f}{bound} from {self.newest[0]!r} (number {place} of "
                f"{self.previous.height} by distance); all distances add up to {self.previous['distance'].sum():.4f}."
            )
        why = f" ({task['reason']})" if task["reason"] else ""
        yield (
            f"Quota: a share of {task['share']:.2f} of {replay['asked']} rows, rounded to {task['quota']}; "
            f"{task['granted']} granted{why}."
        )

    def instruction(self, instruction: Row) -> Iterator[str]:
        """The instruction's tags with their frequencies, and its InsInfo."""
        if instruction["insinfo"] is None:
            yield f"Instruction: {instruction['rows']} rows carry it; this selector does not score instructions."
            return
        pairs = [(tag, *self.frequency[tag]) for tag in instruction["tags"] or []]
        terms = [f"{tag} log({pool}/{n}) = {math.log(pool / n):.2f}" for tag, n, pool in pairs]
        yield f"Tags: {'; '.join(terms)}." if terms else "Tags: none, so it tells nothing."
        yield (
            f"InsInfo: {instruction['insinfo']:.4f} nats of {self.insinfo[instruction['task']]:.4f} in the task; quota "
            f"{instruction['quota']} of its {instruction['rows']} rows."
        )

    def draw(self, sample: Row, task: Row, instruction: Row) -> Iterator[str]:
        """The draw of a replayed row, and the loss that the selector went by."""
        if sample["loss"] is None:
            yield (
                f"Draw: {instruction['granted']} of the instruction's {instruction['rows']} rows were taken "
                f"(seed {self.seed}); this is one of them."
            )
            return
        yield f"Draw: the {task['granted']} of the task's {task['rows']} rows that score highest; this is one of them."
        ratio = ""
        if sample["reference_loss"] is not None:
            value = math.exp(min(sample["loss"] - sample["reference_loss"], 700.0))
            ratio = f", {sample['reference_loss']:.4f} under the reference: a perplexity ratio of {value:.3f}"
        yield f"Loss: {sample['loss']:.4f} nats a token under the policy{ratio}."


def _policy(m: Manifest, sample: Row) -> Iterator[str]:
    """What the policy made of the row: whose answer it carries, its rollouts and their buckets, its rewrites."""
    rolled = m.scan("completions").filter(prompt_uid=sample["uid"], origin="policy").collect()
    if sample["written_by"] == "policy":
        mine = rolled.filter(text=sample["completion"][0]["content"])["reward"].max()
        yield (
            f"Answer: the policy's own best finished rollout, reward {_number(mine)}: "  # type: ignore[arg-type]
            f"{_line(sample['completion'][0]['content'])!r}. It took the place of the source's "
            f"{_line(sample['references'][0])!r} (on-policy replay), which is kept in completions.parquet."
        )
    if rolled.height:
        logp = pl.Series("logp", [sequence_logp(p) for p in rolled["token_logps"].to_list()], dtype=pl.Float64)
        order = rolled.with_columns(logp.fill_nan(None)).sort("reward", "logp", descending=True, nulls_last=True)
        best = order.row(0, named=True)
        counts = rolled.group_by("bucket").len().sort("bucket")
        buckets = ", ".join(f"{n} {name}" for name, n in counts.iter_rows() if name)
        sides = ", ".join(f"{n} {name}" for name, n in rolled.group_by("side").len().sort("side").iter_rows() if name)
        yield (
            f"Rollouts: {rolled.height} by the policy ({buckets}{'; ' + sides if sides else ''}); the highest reward "
            f"is {_number(best['reward'])} ({_line(best['reward_id'] or 'none')}): {_line(best['text'])!r}."
        )
        given = m.provenance.get("buckets", {}).get("overrides", {})
        if n := sum(uid in given for uid in rolled["uid"]):
            yield f"Buckets given by hand (buckets.overrides): {n} of them."
    rewrites = m.augmentations.filter(parent_uid=sample["uid"])
    if rewrites.height:
        yield f"Rewrites: {int(rewrites['kept'].sum())} of {rewrites.height} are kept."


def _rewrite(m: Manifest, uid: str) -> Iterator[str]:
    """How a rewrite was made and decided about."""
    row = m.augmentations.filter(uid=uid).sort("kept", "template", descending=[True, False]).row(0, named=True)
    yield _excerpt("rewrite", row["prompt"][-1]["content"])
    yield _excerpt("answer", row["completion"][0]["content"])
    yield decision(row, m.provenance["augment"]["theta"])


def decision(row: Row, theta: float) -> str:
    """Why a rewrite is in the set, or why not; `row` is of the table `augmentations`."""
    if row["fault"] is not None:
        return f"Why: {row['fault']} (template {row['template']!r})."
    return (
        f"Why: template {row['template']!r}; MI(x, x̂) = {row['mi_input']:.4f}, MI(y, ŷ) = {row['mi_output']:.4f}, "
        f"their product {row['score']:.4f} is {'above' if row['kept'] else 'not above'} θ = {theta:g}."
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _out(m: Manifest, drop: Row) -> Iterator[str]:
    task, story = m.tasks.filter(task=drop["task"]).row(0, named=True), Story(m)
    if drop["step"] == "augment":
        yield f"{drop['uid']} is not in the set: a rewrite by the policy, task {drop['task']!r}."
        yield from _rewrite(m, drop["uid"])
        return
    yield f"{drop['uid']} is not in the set: row {drop['row']} of task {drop['task']!r}."
    found = m.instructions.filter(uid=drop["instruction_uid"] or "")
    if drop["step"] != "sample":
        best = (
            f"; the best reward was {drop['score']:.4g}"
            if drop["step"] == "rollout" and drop["score"] is not None
            else ""
        )
        yield f"Why: it could not be used ({drop['reason']}{best})."
        return
    instruction = found.row(0, named=True)
    yield _excerpt("instruction", instruction["instruction"])
    yield from story.task(task)
    yield from story.instruction(instruction)
    if m.provenance["config"]["replay"]["selector"] in ("highest_loss", "perplexity_ratio"):
        lowest = f"it scores {_number(drop['score'])}" if drop["score"] is not None else "it could not be measured"
        yield f"Draw: the {task['granted']} rows of the task that score highest were taken; {lowest}."
        return
    if instruction["granted"] == 0:
        yield f"Draw: none of the instruction's {instruction['rows']} rows was taken."
    else:
        yield (
            f"Draw: {instruction['granted']} of the instruction's {instruction['rows']} rows were taken "
            f"(seed {m.provenance['config']['seed']}); this one was not."
        )


def _excerpt(name: str, text: str) -> str:
    return f"{name.capitalize()}: {_line(text, 300)}"


def _line(text: str, most: int = 80) -> str:
    """Text of the data as one printable line: no escape codes reach the terminal."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"
