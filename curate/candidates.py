"""Several answers of one prompt: ranked sets for COPR, align / conflict for PBL, as rows of completions.parquet.

Ranks come from people or annotators (the source brings them), or from rewards over rollouts. A rank is 1 + the number
of better answers of the prompt, so ties share one. Sources: COPR (ACL Findings 2025) for ranked sets with log π_{t−1}
measured once; PBL (NAACL Findings 2025, 303) for the two sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from curate.manifest.schema import completion_uid
from curate.models.base import Completion, Message, Prompt
from curate.rollout import prompt_of

Pair = tuple[Prompt, Sequence[Message]]


def ranks(rolled: pl.DataFrame) -> pl.Series:
    """Place of every rollout among its prompt's by reward; null without a reward.   [n] -> [n]

    >>> rolled = pl.DataFrame({"source_uid": ["a", "a", "a", "b"], "reward": [0.5, 1.0, 0.5, None]})
    >>> ranks(rolled).to_list()
    [2, 1, 2, None]
    """
    return rolled.select(pl.col("reward").rank("min", descending=True).over("source_uid").cast(pl.Int32)).to_series()


def sides(similarity: pl.Series, threshold: float) -> pl.Series:
    """Align where similarity ≥ threshold, conflict below; null where nothing was compared."""
    side = pl.when(pl.col("s").is_not_null()).then(
        pl.when(pl.col("s") >= threshold).then(pl.lit("align")).otherwise(pl.lit("conflict"))
    )
    return similarity.rename("s").to_frame().select(side.alias("side")).to_series()


def compared(rolled: pl.DataFrame, rows: pl.DataFrame) -> tuple[list[str], list[str]]:
    """(completion, target) of every rollout: what `similarity` compares. The target is the source's first answer."""
    target = {uid: references[0] for uid, references in rows.select("uid", "references").iter_rows()}
    return rolled["text"].to_list(), [target[uid] for uid in rolled["source_uid"]]


def similarity(rolled: pl.DataFrame, rows: pl.DataFrame, embeddings: Any) -> pl.Series:
    """Cosine of every rollout to its target, from planned embeddings; null for an empty completion."""
    pairs = [(i, text, target) for i, (text, target) in enumerate(zip(*compared(rolled, rows), strict=True))
             if text.strip() and target.strip()]  # fmt: skip
    found: list[float | None] = [None] * rolled.height
    if pairs:
        places, texts, targets = zip(*pairs, strict=True)
        cosine = (embeddings.of(texts).astype("float64") * embeddings.of(targets).astype("float64")).sum(axis=1)
        for i, value in zip(places, cosine.clip(-1, 1).tolist(), strict=True):
            found[i] = value
    return pl.Series("similarity", found, dtype=pl.Float64)


def brought(rows: pl.DataFrame) -> pl.DataFrame:
    """The ranked answers that rows bring with them: source_uid, text, rank, score; best first."""
    ranked = rows.filter(pl.col("candidates").list.len() > 0)
    return (
        ranked.select(pl.col("uid").alias("source_uid"), "candidates")
        .explode("candidates")
        .unnest("candidates")
        .sort("source_uid", "rank", "text")
    )


def pairs_of(answers: pl.DataFrame, rows: pl.DataFrame) -> list[Pair]:
    """(prompt, answer) of every ranked answer: what a Scorer measures."""
    prompts = {row["uid"]: prompt_of(row) for row in rows.iter_rows(named=True)}
    return [
        (prompts[uid], [{"role": "assistant", "content": text}])
        for uid, text in answers.select("source_uid", "text").iter_rows()
    ]


def measured(answers: pl.DataFrame, scores: Sequence[Completion | None]) -> pl.DataFrame:
    """`answers` with token_ids, token_logps and n_tokens; null for an answer that does not fit the context."""
    columns = {
        "token_ids": pl.Series([c and c.token_ids for c in scores], dtype=pl.List(pl.Int32)),
        "token_logps": pl.Series([c and c.token_logps for c in scores], dtype=pl.List(pl.Float32)),
        "n_tokens": pl.Series([c and c.n_tokens for c in scores], dtype=pl.Int32),
    }
    return answers.with_columns(**columns)


def with_uids(frame: pl.DataFrame, prompt_uid: dict[str, str]) -> pl.DataFrame:
    """The columns `uid` and `prompt_uid`, of prompts by their final uid.

    `frame` has source_uid, origin, text; equal texts of one prompt and origin are told apart by their number.
    """
    seen: dict[tuple[str, str, str], int] = {}
    uids, prompts = [], []
    for source, origin, text in frame.select("source_uid", "origin", "text").iter_rows():
        prompt = prompt_uid[source]
        index = seen.get((prompt, origin, text), 0)
        seen[prompt, origin, text] = index + 1
        prompts.append(prompt)
        uids.append(completion_uid(prompt, origin, text, index))
    return frame.with_columns(uid=pl.Series(uids, dtype=pl.String), prompt_uid=pl.Series(prompts, dtype=pl.String))
