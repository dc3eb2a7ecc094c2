"""What `train eval` can measure of a model on a sample, each a number from 0 to 1: overlap of its answer with the
references, or how it orders answers that people ranked.

It owns which rows can be scored, and the scoring. Models are asked through `curate.models`; files are `evaluate.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.errors import InputError
from curate.manifest import Manifest
from curate.models import LocalModel, Prompt, Sampling
from curate.models.chat import answer_ids
from curate.models.reward import OVERLAPS
from train.sets import preferred

Metric = Literal["rouge_l", "exact", "contains", "ranking", "ranking_change"]
Floats = NDArray[np.float64]
Scored = tuple[list[str], list[float]]  # a text, and a score from 0 to 1, of every row


class Score(Protocol):
    """A way to score a model on rows."""

    def rows(self, manifest: Manifest) -> tuple[pl.DataFrame, str, str]:
        """(samples with a column `usable`, why the others are not, what to do where none is)."""

    def check(self, model: LocalModel, name: str, rows: pl.DataFrame) -> None:
        """Raises InputError where the model cannot take the rows."""

    def of(self, model: LocalModel, rows: pl.DataFrame) -> Scored:
        """What the model says, and the score, of every row."""


def score_of(metric: Metric, max_new_tokens: int, reduction: Literal["sum", "mean"]) -> Score:
    """The score of a name."""
    if metric in OVERLAPS:
        return Overlap(metric, max_new_tokens)
    return Ranking(reduction, change=metric == "ranking_change")


@dataclass
class Overlap:
    """Of a greedy answer with the references.

    Attributes:
        metric: rouge_l, exact or contains.
        max_new_tokens: longest answer.
    """

    metric: str
    max_new_tokens: int

    def rows(self, manifest: Manifest) -> tuple[pl.DataFrame, str, str]:
        """Samples; usable are those with references."""
        usable = pl.col("references").list.drop_nulls().list.len().fill_null(0) > 0
        return (manifest.samples.with_columns(usable=usable), "no references",
                "build the manifest from sources with references")  # fmt: skip

    def check(self, model: LocalModel, name: str, rows: pl.DataFrame) -> None:
        """There is room for the answer."""
        prompts = _prompts(rows)
        short = [room is not None and room < self.max_new_tokens for room in model.room(prompts)]
        if any(short):
            first = prompts[short.index(True)].uid
            raise InputError(
                f"{sum(short):,} prompts leave {name!r} no room for {self.max_new_tokens} tokens, the first is uid "
                f"{first}",
                remedy="lower max_new_tokens, or leave such rows out of the manifest",
            )

    def of(self, model: LocalModel, rows: pl.DataFrame) -> Scored:
        """(the answers, their scores)."""
        sampling = Sampling(k=1, temperature=0, max_new_tokens=self.max_new_tokens)
        texts = [some[0].text for some in model.generate(_prompts(rows), sampling)]
        score = OVERLAPS[self.metric]
        return texts, [score(text, some) for text, some in zip(texts, rows["references"].to_list(), strict=True)]


@dataclass
class Ranking:
    """The share of a prompt's pairs of unlike rank whose better answer is the likelier one; equally likely counts ½.

    Attributes:
        reduction: log π(y|x) summed over the tokens of y, or their mean.
        change: compare log π(y|x) − log π_0(y|x) instead, π_0 = the first model asked: DPO's implicit reward, without
            what π_0 itself prefers, such as short answers. (A gain of each token still counts more in a long answer
            where `reduction` is sum.) The first model itself scores ½ everywhere.
    """

    reduction: Literal["sum", "mean"] = "sum"
    change: bool = False
    before: list[Floats] | None = field(default=None, init=False)  # log π_0

    def rows(self, manifest: Manifest) -> tuple[pl.DataFrame, str, str]:
        """Samples with the texts and ranks of their answers; usable are those with two of unlike rank."""
        answers = preferred(manifest.completions).sort("prompt_uid", "rank", "uid")
        of = answers.group_by("prompt_uid", maintain_order=True).agg(answers="text", ranks="rank")
        rows = manifest.samples.join(of, left_on="uid", right_on="prompt_uid", how="left")
        usable = pl.col("ranks").list.n_unique().fill_null(0) > 1
        return (rows.with_columns(usable=usable), "no two answers of unlike rank",
                "build the manifest from a source of format `ranked` or `preference`")  # fmt: skip

    def check(self, model: LocalModel, name: str, rows: pl.DataFrame) -> None:
        """Every answer fits behind its prompt."""
        prompts, texts = _prompts(rows), rows["answers"].to_list()
        for prompt, room, some in zip(prompts, model.room(prompts), texts, strict=True):
            longest = max(
                len(answer_ids(model.tokenizer, prompt, [{"role": "assistant", "content": t}], ())) for t in some
            )
            if room is not None and longest > room:
                raise InputError(
                    f"{name!r}: an answer of {longest} tokens to uid {prompt.uid}, {max(0, room)} fit behind its "
                    "prompt",
                    remedy="leave such rows out of the manifest, or use a model of a longer context",
                )

    def of(self, model: LocalModel, rows: pl.DataFrame) -> Scored:
        """(the answers that are likeliest, the scores)."""
        prompts, texts = _prompts(rows), rows["answers"].to_list()
        pairs = [
            (p, [{"role": "assistant", "content": t}]) for p, some in zip(prompts, texts, strict=True) for t in some
        ]
        found = model.score(pairs)
        if None in found:
            first = pairs[found.index(None)][0].uid
            raise InputError(
                f"{found.count(None):,} answers do not fit {model.name!r} behind their prompt, or have no token; the "
                f"first is of uid {first}",
                remedy="leave such rows out of the manifest, or use a model of a longer context",
            )
        values = [math.fsum(c.token_logps or ()) / (c.n_tokens or 1 if self.reduction == "mean" else 1)
                  for c in found if c]  # fmt: skip
        logps = np.split(np.array(values), np.cumsum([len(some) for some in texts])[:-1])
        if self.change:
            self.before = self.before or logps
            logps = [now - before for now, before in zip(logps, self.before, strict=True)]
        best = [some[int(np.argmax(values))] for some, values in zip(texts, logps, strict=True)]
        return best, [ordered(v, np.array(r)) for v, r in zip(logps, rows["ranks"].to_list(), strict=True)]


def ordered(values: Floats, ranks: NDArray[np.int64]) -> float:
    """The share of pairs of unlike rank whose better one (smaller rank) has the larger value; equal ones count ½.   [j]

    >>> ordered(np.array([-2.0, -1.0, -2.0]), np.array([1, 2, 3]))  # wrong, equal, right
    0.5
    """
    pairs = ranks[:, None] < ranks[None, :]
    right = (values[:, None] > values[None, :]) + 0.5 * (values[:, None] == values[None, :])
    return float((right * pairs).sum() / pairs.sum())


def _prompts(rows: pl.DataFrame) -> list[Prompt]:
    return [Prompt(uid, prompt, tools) for uid, prompt, tools in rows.select("uid", "prompt", "tools").iter_rows()]


def usable_rows(score: Score, manifest: Manifest) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows that can be scored, by stage and uid; uid, task and reason of the others).

    Raises:
        InputError: there is nothing to score.
    """
    rows, why, remedy = score.rows(manifest)
    rows = rows.filter(pl.col("prompt").list.len() > 0, pl.col("origin") != "augmented").sort("stage", "uid")
    if not rows.height:
        raise InputError(f"{manifest.folder}: no sample with a prompt to answer")
    left_out = rows.filter(~pl.col("usable")).select("uid", "task", pl.lit(why).alias("reason"))
    rows = rows.filter("usable")
    if not rows.height:
        raise InputError(f"{manifest.folder}: none of {left_out.height:,} samples can be scored: {why}", remedy=remedy)
    return rows, left_out
