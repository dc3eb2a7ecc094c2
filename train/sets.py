"""Prompts with several answers each, from a manifest's completions: what preference methods train on.

It owns which completions make a set and what is wrong with one. It knows nothing of losses, and of layouts only that
`prefix.py` decides them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.errors import InputError
from curate.manifest import Manifest
from curate.models.base import Prompt
from curate.models.chat import answer_ids
from train.data import Examples, check_fingerprints
from train.mixing import Mixture
from train.packing import Item, Items
from train.prefix import Cost, Layout, batch_of, plan

Kind = Literal["ranked", "compared"]
PREFERRED = ("human", "annotated", "policy")  # whose ranking counts where a prompt has several
LISTED = "left_out.parquet"
_WHY = {"uid": pl.String, "prompt_uid": pl.String, "task": pl.String, "reason": pl.String}
_READ = ("uid", "prompt_uid", "task", "origin", "text", "token_ids", "token_logps", "temperature", "top_p", "rank",
         "similarity")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sets:
    """n prompts with a answers in all; those of prompt i are bounds[i] … bounds[i + 1] - 1, by their uids.

    Attributes:
        rows: the prompts with their gold answers, as Examples.
        source: [n] int32, which manifest a prompt is of: index into rows.sources.
        bounds: [n + 1] int64.
        tokens: of each answer [t], int32.
        rank: [a] int32, 1 = best, ties share one; 0 = not ranked.
        similarity: [a] float64, cosine to the gold answer; NaN = not compared.
        logps: [a] float64, Σ log π over its tokens as the manifest has it, nats; NaN = not there.
        target: [a] float64, COPR's log P*; NaN = not computed.
        start: [n] float64, COPR's fit of a prompt under the model before training, where it is a buffer's; else 0.
        uid: [a] uids of the completions.
        left_out: completions and prompts that are not used, with the reason.
    """

    rows: Examples
    source: NDArray[np.int32]
    bounds: NDArray[np.int64]
    tokens: list[NDArray[np.int32]]
    rank: NDArray[np.int32]
    similarity: NDArray[np.float64]
    logps: NDArray[np.float64]
    target: NDArray[np.float64]
    start: NDArray[np.float64]
    uid: pl.Series
    left_out: pl.DataFrame

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        tokenizer: Any,
        *,
        kind: Kind,
        ends: Collection[int],
        policy: str | None = None,
        max_length: int | None = None,
        origins: Collection[str] = ("current", "replay", "augmented"),
    ) -> Sets:
        """The sets of a manifest, none where it has none.

        Args:
            manifest: its samples are the prompts.
            tokenizer: of the model that is trained; stored tokens must be its.
            kind: ranked: the answers with a rank, of people where a prompt has such, else of annotators, else of the
                policy; a prompt needs two that differ. compared: the answers with a similarity; a prompt may have none,
                but its gold answer, which is trained on, must fit.
            ends: tokens that end an answer.
            policy: weight hash that stored log-probabilities must be of; None: any.
            max_length: most tokens of a prompt with one of its answers; longer answers are left out, and listed.
            origins: of the samples that are taken.

        Raises:
            InputError: stored tokens or log-probabilities of something else.
        """
        check_fingerprints(manifest, tokenizer, policy)
        every = Examples.of(manifest, tokenizer, ends=ends)
        wanted = np.array([name in origins for name in every.origin_names], bool)[every.origin]
        skipped = [{"uid": None, "prompt_uid": every.uid[row], "task": every.task_names[every.task[row]],
                    "reason": f"origin {every.origin_names[every.origin[row]]}: not for this method"}
                   for row in np.flatnonzero(~wanted).tolist()]  # fmt: skip
        mine, prompts = _answers(manifest, kind), _prompts(manifest)
        taken, kept, bounds, why = list[int](), list[dict[str, Any]](), [0], list[dict[str, Any]]()
        for row in np.flatnonzero(wanted).tolist():
            uid = every.uid[row]
            room = None if max_length is None else max_length - int(every.first_target[row])
            good, bad = _usable(mine.get(uid, []), prompts[uid], tokenizer, ends, room)
            if kind == "ranked" and len(good) < 2:
                bad.append({"uid": None, "reason": f"{len(good)} usable answers: nothing to compare"})
                good = []
            if wrong := next((a for a in good if kind == "ranked" and a["rank"] < 1), None):
                raise InputError(f"{manifest.folder}: completions.parquet, column 'rank' of uid {wrong['uid']}: "
                                 f"{wrong['rank']}, 1 is the best", remedy="build the manifest again")  # fmt: skip
            gold = int(every.lengths[row] - every.first_target[row])
            lost = kind == "compared" and room is not None and gold > room
            if lost:
                bad, good = (
                    [{"uid": None, "reason": f"a target of {gold} tokens, {max(0, room or 0)} fit beside the prompt"}],
                    [],
                )
            why += [{**b, "prompt_uid": uid, "task": every.task_names[every.task[row]]} for b in bad]
            if good or (kind == "compared" and not lost):
                taken.append(row)
                kept += good
                bounds.append(len(kept))
        similarity = [np.nan if k["similarity"] is None else k["similarity"] for k in kept]
        return cls(
            rows=every.take(taken), source=np.zeros(len(taken), np.int32), bounds=np.array(bounds, np.int64),
            tokens=[np.array(k["ids"], np.int32) for k in kept],
            rank=np.array([k["rank"] or 0 for k in kept], np.int32), similarity=np.array(similarity, np.float64),
            logps=np.array([k["logp"] for k in kept], np.float64), target=np.full(len(kept), np.nan),
            start=np.zeros(len(taken)),
            uid=pl.Series("uid", [k["uid"] for k in kept], dtype=pl.String),
            left_out=pl.DataFrame(why + skipped, schema=_WHY),
        )  # fmt: skip

    @classmethod
    def concat(cls, parts: Sequence[Sets]) -> Sets:
        """The prompts of several, one behind the other; `source` tells which they are of."""
        shifts = np.cumsum([0, *(len(p.tokens) for p in parts)])
        return cls(
            rows=Examples.concat([p.rows for p in parts]),
            source=np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts]),
            bounds=np.concatenate([[0], *(p.bounds[1:] + s for p, s in zip(parts, shifts[:-1], strict=True))]),
            tokens=[t for p in parts for t in p.tokens], rank=np.concatenate([p.rank for p in parts]),
            similarity=np.concatenate([p.similarity for p in parts]), logps=np.concatenate([p.logps for p in parts]),
            target=np.concatenate([p.target for p in parts]), start=np.concatenate([p.start for p in parts]),
            uid=pl.concat([p.uid for p in parts]), left_out=pl.concat([p.left_out for p in parts]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def answers(self, row: int) -> range:
        """Numbers of a prompt's answers."""
        return range(int(self.bounds[row]), int(self.bounds[row + 1]))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer, or with its gold answer."""
        each = np.repeat(self.rows.first_target, np.diff(self.bounds)) + np.array([len(t) for t in self.tokens], int)
        return int(max(self.rows.lengths.max(initial=0), each.max(initial=0)))

    def write_left_out(self, folder: Path) -> Path | None:
        """List in the run folder what is not used, so that nothing disappears silently; None: nothing."""
        if not self.left_out.height:
            return None
        self.left_out.write_parquet(folder / LISTED)
        return folder / LISTED


@dataclass(frozen=True, eq=False)
class SetItem(Item):
    """A prompt with its gold answer, and the sets that hold its other answers."""

    sets: Sets


class SetItems(Items):
    """The prompts of sets in the order of a mixture; arguments as `Items` takes them, without packing."""

    def __init__(self, sets: Sets, mixture: Mixture, **how: Any) -> None:
        super().__init__(sets.rows, mixture, **how)
        self.sets = sets

    def __getitem__(self, index: int) -> SetItem:
        return SetItem(**vars(super().__getitem__(index)), sets=self.sets)


@dataclass(frozen=True)
class SetCollator:
    """Prompts to a batch: `prefix.batch_of`, and what is known of the answers.

    Beside the tensors of `batch_of`: prompt [a] int64, which of the batch's prompts an answer is of; rank [a] int64,
    similarity, ref_logps and target [a] float64; best [a] float32, 1 shared by the best answers of a prompt that are
    there, else 0; gold [a] bool, True where it is the prompt's gold answer (it has no rank); answer [a] int64, its
    number in the sets, -1 = gold; weight [n] float32, start [n] float64, row and source [n] int64 of the prompts.

    Attributes:
        gold: whether each prompt brings its gold answer too.
        layout: how answers share rows.
        cost: of a row, for the layout `auto`.
        limit: most tokens of a shared row.
        pad: any token.
    """

    gold: bool = False
    layout: Layout = "auto"
    cost: Cost = field(default_factory=Cost)
    limit: int | None = None
    pad: int = 0

    def __call__(self, items: Sequence[SetItem]) -> dict[str, Tensor]:
        """The batch of items, all of the same sets."""
        return self.batch(items[0].sets, [int(item.rows[0]) for item in items])

    def batch(self, sets: Sets, rows: Sequence[int]) -> dict[str, Tensor]:
        """The batch of prompts."""
        prompts, answers, numbers = [], [], []
        for row in rows:
            whole, first = sets.rows.row_tokens(row), int(sets.rows.first_target[row])
            mine = [sets.tokens[k] for k in sets.answers(row)]
            prompts.append(whole[:first])
            answers.append([*mine, whole[first:]] if self.gold else mine)
            numbers.append([*sets.answers(row), -1] if self.gold else [*sets.answers(row)])
        sizes = [[len(a) for a in some] for some in answers]
        places = plan([len(p) for p in prompts], sizes, self.layout, self.cost, self.limit)
        batch = batch_of(prompts, answers, places, self.pad)
        number = np.concatenate([np.array(n, np.int64) for n in numbers])
        gold = number < 0
        batch["prompt"] = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(n) for n in numbers]))
        batch["gold"] = torch.from_numpy(gold)
        batch["answer"] = torch.from_numpy(number)
        batch["rank"] = torch.from_numpy(np.where(gold, 0, sets.rank[number]).astype(np.int64))
        batch["best"] = torch.cat([_best(sets.rank[n[n >= 0]], n) for n in map(np.array, numbers)])
        batch["similarity"] = torch.from_numpy(np.where(gold, np.nan, sets.similarity[number]))
        batch["ref_logps"] = torch.from_numpy(np.where(gold, np.nan, sets.logps[number]))
        batch["target"] = torch.from_numpy(np.where(gold, np.nan, sets.target[number]))
        batch["weight"] = torch.from_numpy(sets.rows.weights[list(rows)])
        batch["start"] = torch.from_numpy(sets.start[list(rows)])
        batch["row"] = torch.tensor(list(rows))
        batch["source"] = torch.from_numpy(sets.source[list(rows)].astype(np.int64))
        return batch


def _best(ranks: NDArray[np.int32], numbers: NDArray[np.int64]) -> Tensor:
    """The share of each answer in being the best; a gold answer (-1) has none."""
    found = np.zeros(len(numbers), np.float32)
    if len(ranks):
        first = ranks == ranks.min()
        found[numbers >= 0] = first / first.sum()
    return torch.from_numpy(found)


def _prompts(manifest: Manifest) -> dict[str, Prompt]:
    rows = manifest.samples.select("uid", "prompt", "tools").iter_rows()
    return {uid: Prompt(uid, prompt, tools) for uid, prompt, tools in rows}


def preferred(completions: pl.DataFrame) -> pl.DataFrame:
    """The ranked answers that count: of people where a prompt has such, else of annotators, else of the policy."""
    place = pl.col("origin").replace_strict(PREFERRED, range(3), default=None, return_dtype=pl.Int32)
    rows = completions.with_columns(place=place).filter(pl.col("rank").is_not_null(), pl.col("place").is_not_null())
    return rows.filter(pl.col("place") == pl.col("place").min().over("prompt_uid")).drop("place")


def _answers(manifest: Manifest, kind: Kind) -> dict[str, list[dict[str, Any]]]:
    """Completions of each prompt that belong to its set, by uid."""
    rows = manifest.completions.select(*_READ)
    if kind == "compared":
        rows = rows.filter(pl.col("similarity").is_not_null(), pl.col("origin") == "policy")
    else:
        rows = preferred(rows)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.sort("prompt_uid", "uid").iter_rows(named=True):
        found.setdefault(row["prompt_uid"], []).append(row)
    return found


def _usable(
    answers: list[dict[str, Any]], prompt: Prompt, tokenizer: Any, ends: Collection[int], room: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(answers with their tokens and log-probability, those left out with a reason)."""
    good: dict[tuple[int, ...], dict[str, Any]] = {}
    bad = []
    for answer in answers:
        ids = answer["token_ids"]
        if ids is None:
            ids = answer_ids(tokenizer, prompt, [{"role": "assistant", "content": answer["text"]}], ends)
        key = tuple(ids)
        if not ids:
            bad.append({"uid": answer["uid"], "reason": "an answer of 0 tokens"})
        elif room is not None and len(ids) > room:
            bad.append({"uid": answer["uid"], "reason": f"{len(ids)} tokens, {max(0, room)} fit beside the prompt"})
        elif key in good:
            first = good[key]
            worse, better = sorted((answer, first), key=lambda a: a["rank"] or 0, reverse=True)
            bad.append({"uid": worse["uid"], "reason": f"the same tokens as answer {better['uid']}"})
            good[key] = better if "ids" in better else {**better, "ids": ids, "logp": _logp(better)}
        else:
            good[key] = {**answer, "ids": ids, "logp": _logp(answer)}
    return sorted(good.values(), key=lambda answer: answer["uid"]), bad


def _logp(answer: dict[str, Any]) -> float:
    """Σ log π as stored; NaN where there is none, where it is none, or of a distribution that sampling has bent."""
    logps = answer["token_logps"]
    bent = answer["temperature"] not in (None, 0.0, 1.0) or answer["top_p"] not in (None, 1.0)
    if logps is None or bent or len(logps) != len(answer["token_ids"] or ()) or max(logps, default=0.0) > 1e-4:
        return float("nan")
    return float(np.sum(np.array(logps, np.float64)))
