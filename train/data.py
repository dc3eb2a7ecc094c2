"""Manifests to token arrays: the only place of `train` where rows of a manifest become tokens.

It owns which tokens a row becomes and on which of them the loss is. It knows nothing of order (`mixing.py`), of what
shares a forward pass (`packing.py`), or of any method.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from curate.errors import InputError
from curate.manifest import Manifest, read
from curate.manifest.schema import Origin as Origin  # for the rest of train
from curate.models.base import Message, Prompt
from curate.models.chat import answer_ids, prompt_ids
from curate.models.local import tokenizer_fingerprint

TooLong = Literal["error", "truncate", "drop"]
LossOn = Literal["answer", "all"]

CHUNK = 2048  # rows whose texts share a call of the tokenizer
LISTED = "too_long.parquet"
_READ = ("uid", "task", "origin", "row", "weight", "prompt", "completion", "tools")
_LONG = ("uid", "task", "origin", "row", "manifest", "prompt_tokens", "answer_tokens", "max_length", "outcome")


@dataclass(frozen=True, eq=False)
class Examples:
    """The samples of manifests as tokens, n rows in the order of their uids, whatever order the Parquet has.

    Flat arrays, no object a row: a row costs 4 bytes a token and about 100 bytes beside.

    Attributes:
        tokens: [Σ t] int32, all rows behind one another; row i is tokens[offsets[i] : offsets[i + 1]].
        offsets: [n + 1] int64.
        first_target: [n] int32, place in its row of the first token that the loss is on; all behind it are targets too.
            Never 0: nothing predicts a first token.
        weights: [n] float32, sample weights of the manifest.
        task: [n] int32, index into `task_names`.
        origin: [n] int32, index into `origin_names`.
        uid: [n] uids of the manifest. Two manifests may hold one uid: they are two rows, as each manifest says.
        too_long: the rows longer than `max_length`, with what became of them ("outcome": dropped or truncated).
        sources: folders of the manifests.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    first_target: NDArray[np.int32]
    weights: NDArray[np.float32]
    task: NDArray[np.int32]
    task_names: tuple[str, ...]
    origin: NDArray[np.int32]
    origin_names: tuple[str, ...]
    uid: pl.Series
    too_long: pl.DataFrame
    sources: tuple[str, ...]

    @classmethod
    def read(cls, folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], tokenizer: Any,
             **how: Any) -> Examples:  # fmt: skip
        """The samples of one manifest folder or several; `how` as in `of`.

        Raises:
            ManifestError: not a manifest, edited, or of another major version of the schema.
            InputError: as `of`.
        """
        several = [folders] if isinstance(folders, str | os.PathLike) else folders
        return cls.of([read(folder) for folder in several], tokenizer, **how)

    @classmethod
    def of(
        cls,
        manifests: Manifest | Sequence[Manifest],
        tokenizer: Any,
        *,
        max_length: int | None = None,
        too_long: TooLong = "error",
        loss_on: LossOn = "answer",
        ends: Collection[int] | None = None,
    ) -> Examples:
        """Encode the samples of manifests: `prompt_ids`, then `answer_ids`, as the policy scored them.

        Args:
            manifests: what `curate.manifest.read` gives.
            tokenizer: of the model that is trained.
            max_length: most tokens of a row; None: no limit (blocks are cut anyway).
            too_long: what becomes of a longer row. error; truncate: the prompt loses its start, and an answer that is
                longer by itself its end, end token included; drop. What was cut or dropped stands in `too_long`.
            loss_on: the answer's tokens with its end token; or all tokens but the first. A document is all answer.
            ends: tokens that end an answer of the model; by default the tokenizer's end token.

        Raises:
            InputError: a row is too long, has no token to learn, or the chat template refuses it.
        """
        some = [manifests] if isinstance(manifests, Manifest) else list(manifests)
        if max_length is not None and max_length < 2:
            raise InputError(f"max_length must be at least 2 (a token that predicts and its target), not {max_length}")
        rows = _rows(some)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        store = _Store(max_length, cut=too_long == "truncate")
        store.fill(_encoded(rows, tokenizer, own if ends is None else ends))
        listed = store.listed(rows, "truncated" if too_long == "truncate" else "dropped")
        if too_long == "error" and listed.height:
            raise _too_long_error(listed, rows.height)
        first = np.maximum(store.answer_at, 1) if loss_on == "answer" else np.ones(len(store.kept), np.int32)
        rows = rows[store.kept]
        _check_targets(rows, first, store.lengths)
        _check_weights(rows)
        task, task_names = _codes(rows["task"])
        origin, origin_names = _codes(rows["origin"])
        return cls(
            tokens=np.frombuffer(store.tokens, np.int32) if store.tokens else np.zeros(0, np.int32),
            offsets=np.concatenate([[0], np.cumsum(store.lengths, dtype=np.int64)]).astype(np.int64),
            first_target=first.astype(np.int32), weights=rows["weight"].cast(pl.Float32).to_numpy().copy(),
            task=task, task_names=task_names, origin=origin, origin_names=origin_names,
            uid=rows["uid"].rechunk(), too_long=listed, sources=tuple(str(m.folder) for m in some),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        counts = np.bincount(self.origin, minlength=len(self.origin_names))
        held = ", ".join(f"{n:,} {name}" for n, name in zip(counts, self.origin_names, strict=True))
        outcomes = self.too_long["outcome"].value_counts(sort=True).iter_rows()
        more = "".join(f"; {n:,} {outcome} as too long" for outcome, n in outcomes)
        return f"Examples({', '.join(self.sources)}: {held or 'no rows'}; {len(self.tokens):,} tokens{more})"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] tokens of each row."""
        return np.diff(self.offsets)

    def row_tokens(self, row: int) -> NDArray[np.int32]:
        """[t] tokens of a row, without a copy."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def uids(self, rows: ArrayLike) -> list[str]:
        """Lineage: the uids of rows, in their order; they name rows of the manifest's samples."""
        return list(self.uid.gather(np.asarray(rows, np.int64)))

    def groups(self, by: Literal["origin", "task"]) -> dict[str, NDArray[np.int64]]:
        """Rows of each origin, or of each task, ascending; only those that have rows."""
        codes, names = (self.origin, self.origin_names) if by == "origin" else (self.task, self.task_names)
        return {name: np.flatnonzero(codes == i) for i, name in enumerate(names)}

    def take(self, rows: ArrayLike) -> Examples:
        """Only these rows, in this order."""
        rows = np.asarray(rows, np.int64)
        parts = [self.row_tokens(row) for row in rows.tolist()]
        return replace(
            self, tokens=np.concatenate([self.tokens[:0], *parts]),
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            first_target=self.first_target[rows], weights=self.weights[rows], task=self.task[rows],
            origin=self.origin[rows], uid=self.uid.gather(rows),
        )  # fmt: skip

    @classmethod
    def concat(cls, parts: Sequence[Examples]) -> Examples:
        """The rows of several, one behind the other."""
        codes = {}
        for kind in ("task", "origin"):
            names = [np.array(getattr(p, f"{kind}_names"), object)[getattr(p, kind)] for p in parts]
            codes[kind] = _codes(pl.Series(np.concatenate(names), dtype=pl.String))
        return cls(
            tokens=np.concatenate([p.tokens for p in parts]),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))]).astype(np.int64),
            first_target=np.concatenate([p.first_target for p in parts]),
            weights=np.concatenate([p.weights for p in parts]),
            task=codes["task"][0], task_names=codes["task"][1],
            origin=codes["origin"][0], origin_names=codes["origin"][1],
            uid=pl.concat([p.uid for p in parts]).rechunk(), too_long=pl.concat([p.too_long for p in parts]),
            sources=tuple(source for p in parts for source in p.sources),
        )  # fmt: skip

    def write_left_out(self, folder: Path) -> Path | None:
        """List in the run folder what was dropped or truncated, so that nothing disappears silently; None: nothing."""
        if not self.too_long.height:
            return None
        self.too_long.write_parquet(folder / LISTED)
        return folder / LISTED


def check_fingerprints(manifest: Manifest, tokenizer: Any, policy: str | None = None) -> None:
    """Refuse stored tokens of another tokenizer and stored log-probabilities of another policy.

    For methods that use `token_ids` or `token_logps` of a manifest's completions.

    Args:
        manifest: whose completions are used.
        tokenizer: of the model that is trained.
        policy: weight hash that `token_logps` must be of; None: any.

    Raises:
        InputError: a completion that has tokens or log-probabilities was made by something else.
    """
    mine, file = tokenizer_fingerprint(tokenizer), f"{manifest.folder}/completions.parquet"
    rows = manifest.completions.select("uid", "task", "tokenizer", "policy", "token_ids", "token_logps")
    other = rows.filter(pl.col("token_ids").is_not_null(), pl.col("tokenizer").ne_missing(mine))
    if other.height:
        raise InputError(
            f"{file}: the tokens of {other.height} of {rows.height} completions are of another tokenizer than the "
            f"model's (column 'tokenizer': {_first(other, 'tokenizer')}; the model's is {mine})",
            remedy="train the model that the manifest names as policy, or build the manifest again with this one",
        )
    other = rows.filter(pl.col("token_logps").is_not_null(), pl.col("policy").ne_missing(policy))
    if policy is not None and other.height:
        raise InputError(
            f"{file}: the log-probabilities of {other.height} of {rows.height} completions were measured under another "
            f"policy (column 'policy': {_first(other, 'policy')}; the model's is {policy})",
            remedy="start from the weights that the manifest names as policy, or build it again with `policy.model` "
            "naming these, or, where training measures them itself, set reference=measure",
        )


def _first(rows: pl.DataFrame, column: str) -> str:
    row = rows.row(0, named=True)
    return f"{row[column]!r} in the completion {row['uid']} of task {row['task']!r}"


# --- rows, encoded ---


def _rows(manifests: Sequence[Manifest]) -> pl.DataFrame:
    """Samples of all manifests in an order that depends on nothing but the rows."""
    if not manifests:
        raise InputError("no manifest is given", remedy="name the folder of at least one")
    frames = [m.samples.select(*_READ, pl.lit(str(m.folder)).alias("manifest")) for m in manifests]
    return pl.concat(frames, how="vertical_relaxed").sort("uid", "origin", "weight", "row", nulls_last=True)


def _codes(names: pl.Series) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """([n] index of each row's name, the names that occur, sorted)."""
    known = tuple(names.unique().sort())
    found = names.replace_strict(known, range(len(known)), return_dtype=pl.Int32) if known else pl.Series([])
    return np.array(found.to_numpy(), np.int32), known


def _encoded(rows: pl.DataFrame, tokenizer: Any, ends: Collection[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt tokens, answer tokens) of each row in turn."""
    source = rows.select("uid", "prompt", "completion", "tools").iter_rows()
    while chunk := [(Prompt(uid, p, tools), answer) for uid, p, answer, tools in islice(source, CHUNK)]:
        batched = _Batched(tokenizer)
        for _ in batched.encode(chunk, ends):
            pass
        batched.tokenise()
        yield from batched.encode(chunk, ends)


class _Batched:
    """Stands in for the tokenizer, so that `chat.py` alone decides on tokens and still many texts share a call.

    First `prompt_ids` and `answer_ids` get no tokens while their texts are collected; the second time they get them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._row = tokenizer, 0
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._rendered: dict[tuple[int, int, bool], str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._ids.setdefault((text, add_special_tokens), [])}

    def apply_chat_template(self, messages: Sequence[Any], *, add_generation_prompt: bool, **how: Any) -> str:
        """Each text is asked for several times; within a row the number of messages tells which one is meant."""
        key = self._row, len(messages), add_generation_prompt
        if key not in self._rendered:
            self._rendered[key] = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **how
            )
        return self._rendered[key]

    def encode(
        self, chunk: Iterable[tuple[Prompt, Sequence[Message]]], ends: Collection[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(prompt tokens, answer tokens) of each row."""
        for self._row, (prompt, answer) in enumerate(chunk):
            yield prompt_ids(self, prompt), answer_ids(self, prompt, answer, ends)

    def tokenise(self) -> None:
        """One call for all texts that were asked for."""
        for special in (True, False):
            texts = [text for text, with_special in self._ids if with_special is special]
            if texts:
                # verbose: it would warn of rows beyond the model's context, which is decided elsewhere
                found = self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
                self._ids |= {(text, special): ids for text, ids in zip(texts, found["input_ids"], strict=True)}


class _Store:
    """Rows as they come, behind one another in one growing array; what is too long is cut or left out, and noted."""

    def __init__(self, max_length: int | None, cut: bool) -> None:
        self.max_length, self.cut = max_length, cut
        self.tokens = array("i")
        self._kept, self._lengths, self._answer_at = array("q"), array("q"), array("q")
        self._long: list[tuple[int, int, int]] = []

    def fill(self, rows: Iterable[tuple[list[int], list[int]]]) -> None:
        """Take all rows."""
        for i, (prompt, answer) in enumerate(rows):
            if self.max_length is not None and len(prompt) + len(answer) > self.max_length:
                self._long.append((i, len(prompt), len(answer)))
                if not self.cut:
                    continue
                prompt, answer = truncated(prompt, answer, self.max_length)
            self.tokens.extend(prompt)
            self.tokens.extend(answer)
            self._kept.append(i)
            self._lengths.append(len(prompt) + len(answer))
            self._answer_at.append(len(prompt))

    @property
    def kept(self) -> NDArray[np.int64]:
        """[n] which of the rows are stored."""
        return np.array(self._kept, np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] their tokens."""
        return np.array(self._lengths, np.int64)

    @property
    def answer_at(self) -> NDArray[np.int64]:
        """[n] place of the answer's first token."""
        return np.array(self._answer_at, np.int64)

    def listed(self, rows: pl.DataFrame, outcome: str) -> pl.DataFrame:
        """The rows that were too long, with their lengths."""
        where, prompt, answer = (list(column) for column in zip(*self._long, strict=True)) if self._long else ([],) * 3
        return rows[where].with_columns(
            pl.Series("prompt_tokens", prompt, pl.Int64), pl.Series("answer_tokens", answer, pl.Int64),
            pl.lit(self.max_length, pl.Int64).alias("max_length"), pl.lit(outcome).alias("outcome"),
        ).select(_LONG)  # fmt: skip


def truncated(prompt: Sequence[int], answer: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Cut a row to `most` tokens: the prompt from the left; an answer longer than that at its end, without end token.

    >>> truncated([1, 2, 3], [7, 8], 3), truncated([1, 2], [7, 8, 9], 2)
    (([3], [7, 8]), ([], [7, 8]))
    """
    room = max(0, most - len(answer))
    return list(prompt[len(prompt) - room :] if room else []), list(answer[:most])


def _too_long_error(listed: pl.DataFrame, n: int) -> InputError:
    total = pl.col("prompt_tokens") + pl.col("answer_tokens")
    worst: Mapping[str, Any] = listed.sort(total, "uid", descending=[True, False]).row(0, named=True)
    length = worst["prompt_tokens"] + worst["answer_tokens"]
    row = "a row made here" if worst["row"] is None else f"row {worst['row']}"
    return InputError(
        f"{worst['manifest']}: {listed.height} of {n} rows are longer than max_length={worst['max_length']} tokens "
        f"(by default the model's context); the longest is task {worst['task']!r}, {row} (uid {worst['uid']}): "
        f"{worst['prompt_tokens']} tokens of prompt "
        f"and {worst['answer_tokens']} of answer",
        remedy=f"max_length={length} if the model's context allows it; too_long: truncate (cuts the start of the "
        "prompt) or too_long: drop (leaves such rows out and lists them)",
    )


def _check_weights(rows: pl.DataFrame) -> None:
    """Weights that float32 holds, and not all of them nothing."""
    held = rows["weight"].cast(pl.Float32, strict=False)
    bad = rows.filter(held.is_null() | ~held.is_finite())
    if bad.height:
        row = bad.row(0, named=True)
        raise InputError(f"{row['manifest']}: column 'weight' of uid {row['uid']} (task {row['task']!r}) is "
                         f"{row['weight']}, which float32 does not hold", remedy="use weights of about 1")  # fmt: skip
    if rows.height and held.sum() == 0:
        raise InputError(f"{rows['manifest'][0]}: all weights are 0 (column 'weight'): there is nothing to learn",
                         remedy="use weights of about 1")  # fmt: skip


def _check_targets(rows: pl.DataFrame, first: NDArray[Any], lengths: NDArray[np.int64]) -> None:
    """A row without a token to learn would be divided by its zero tokens."""
    if (bad := np.flatnonzero(first >= lengths)).size:
        worst = rows.row(int(bad[0]), named=True)
        raise InputError(
            f"{worst['manifest']}: task {worst['task']!r}, row {worst['row']} (uid {worst['uid']}): no token to learn: "
            f"its answer is empty, or nothing stands before its only token ({bad.size} such rows)",
            remedy="leave such rows out of the source, or use a tokenizer with a token that ends a text",
        )
