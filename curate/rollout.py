"""Rollouts: K completions of a prompt by the policy, their log-probabilities, their rewards, and the best of them.

Everything here is a table in and a table out; what is asked of a model goes through `Cached`, so a build that is
killed in the middle of a task goes on where it stopped.

Departures from on-policy replay (arXiv 2605.29495): rows are drawn first, by any selector, and each drawn prompt gets
the best of K answers at the sampling temperature that reach `min_reward`; the official code writes one answer
(temperature 0.1) for every old prompt and fills the buffer with the highest rewards. Where no answer is good enough the
old one stays, or the row is left out. A reward that compares with the references prefers answers like the old ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import polars as pl

from curate.blocks import Advance, Blocks
from curate.cached import COMPLETION
from curate.config import RolloutsConfig
from curate.errors import InputError
from curate.manifest import sequence_logp
from curate.manifest.schema import content_hash
from curate.models.base import Generator, Prompt, Reward, Sampling
from curate.sample import generator as seeded
from curate.store import Store

LARGEST = 1e150  # beyond it a variance is no number any more
REWARDED = 256  # completions that are rewarded together

ROLLOUTS: dict[str, Any] = {
    "source_uid": pl.String,  # the row whose prompt was answered
    "number": pl.Int32,  # 0 … k − 1
    "batch": pl.Int32,
    **COMPLETION,
}


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row of samples, or of a task."""
    return Prompt(row["uid"], row["prompt"], row["tools"])


def some_rows(
    rows: pl.DataFrame | pl.LazyFrame, origins: Sequence[str], per_task: int | None, seed: int, purpose: str
) -> pl.DataFrame:
    """Rows with a prompt, of these origins, at most `per_task` a task; drawn uniformly, the same in any row order."""
    able = rows.lazy().filter(pl.col("origin").is_in(list(origins)) & (pl.col("prompt").list.len() > 0))
    if per_task is None:
        return able.collect().sort("uid")
    parts = [pl.DataFrame(schema={"uid": pl.String})]
    every = able.select("uid", "task", "stage").collect().sort("uid")  # the texts of those that are drawn only
    for (task, stage), part in every.group_by("task", "stage", maintain_order=True):
        rng = seeded(seed, int(stage), f"{purpose}/{task}")
        drawn = rng.choice(part.height, min(per_task, part.height), replace=False)
        parts.append(part.select("uid")[sorted(drawn.tolist())])
    return able.join(pl.concat(parts).lazy(), on="uid", how="semi").collect().sort("stage", "uid")


def that_fit(
    rows: pl.DataFrame | pl.LazyFrame,
    prompts: Sequence[Prompt],
    policy: Generator,
    tokens: int,
    too_long: str,
    what: str,
) -> tuple[list[int], list[str]]:
    """(indices of the prompts that leave the policy room for `tokens`, uids of the others).

    Raises:
        InputError: one does not, and `too_long` is `error`.
    """
    found, skipped = [], []
    for i, (prompt, room) in enumerate(zip(prompts, policy.room(prompts), strict=True)):
        if room is None or room >= tokens:
            found.append(i)
            continue
        if too_long == "error":
            row = rows.lazy().filter(uid=prompt.uid.partition("/")[0]).collect().row(0, named=True)
            raise InputError(
                f"task {row['task']!r}: row {row['row']}: its prompt leaves the policy room for {max(0, room)} tokens, "
                f"{what} may take {tokens}",
                remedy="lower max_new_tokens, shorten the row, or set too_long: skip",
            )
        skipped.append(prompt.uid)
    return found, skipped


def sampling_of(config: RolloutsConfig, seed: int) -> Sampling:
    """How rollouts are drawn."""
    return Sampling(config.k, config.temperature, config.top_p, config.max_new_tokens, seed)


def in_batches(rows: pl.DataFrame) -> list[Prompt]:
    """The prompts of rows, those of like length side by side: the order in which they are cut into blocks."""
    found = [prompt_of(row) for row in rows.iter_rows(named=True)]
    return sorted(found, key=lambda p: (sum(len(m["content"] or "") for m in p.messages), p.uid))


def rollouts(policy: Any, prompts: Sequence[Prompt], config: RolloutsConfig, seed: int, done: Advance) -> pl.DataFrame:
    """The table ROLLOUTS: `config.k` completions of every prompt. `policy` is a Cached model."""
    answers = policy.sized(config.block).generate(prompts, sampling_of(config, seed), done)
    found = [
        {"source_uid": prompt.uid, "number": number, "batch": place // config.block, **vars(completion)}
        for place, (prompt, some) in enumerate(zip(prompts, answers, strict=True))
        for number, completion in enumerate(some)
    ]
    return pl.DataFrame(found, schema=ROLLOUTS)


def rewards(
    rolled: pl.DataFrame, rows: pl.DataFrame, reward: Reward, store: Store, done: Advance = lambda n: None
) -> pl.Series:
    """Reward of every rollout; null where the reward is not a number."""
    frames = reward_blocks(rolled, rows, reward, store).frames(
        partial(_judge, reward), done, here=getattr(reward, "stays", False)
    )
    return pl.concat([pl.DataFrame(schema={"reward": pl.Float64}), *frames])["reward"]


def _judge(reward: Reward, items: Sequence[Any]) -> pl.DataFrame:
    prompts, texts, references = zip(*items, strict=True)
    found = reward(prompts, texts, references)
    values = [value if abs(value) < LARGEST else None for value in found]  # NaN compares false
    return pl.DataFrame({"reward": values}, schema={"reward": pl.Float64})


def reward_blocks(rolled: pl.DataFrame, rows: pl.DataFrame, reward: Reward, store: Store) -> Blocks[Any]:
    """The rewards of rollouts as work in blocks."""
    known = {row["uid"]: (prompt_of(row), row["references"]) for row in rows.iter_rows(named=True)}
    items = [(known[uid][0], text, known[uid][1]) for uid, text in rolled.select("source_uid", "text").iter_rows()]
    names = [content_hash([prompt.uid, text]) for prompt, text, _ in items]
    return Blocks(store, "reward", [1, reward.fingerprint], items, names, REWARDED)


def best(rolled: pl.DataFrame, min_reward: float | None) -> dict[str, str]:
    """source_uid -> the policy's best answer: finished, not empty, reward ≥ min_reward; the likelier of equals."""
    found: dict[str, tuple[tuple[float, float, int], str]] = {}
    columns = ("source_uid", "number", "text", "token_logps", "finished", "reward")
    for uid, number, text, logps, finished, reward in rolled.select(columns).iter_rows():
        if finished is False or reward is None or not text.strip():
            continue
        if min_reward is not None and reward < min_reward:
            continue
        logp = sequence_logp(logps)
        key = (reward, -math.inf if math.isnan(logp) else logp, -number)
        if uid not in found or key > found[uid][0]:
            found[uid] = (key, text)
    return {uid: text for uid, (_, text) in found.items()}
