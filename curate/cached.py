"""A model whose every answer is kept: the same question is never computed, or paid for, twice.

It is a Generator and a Scorer like the model that it wraps, so a stage does not know whether it is cached. Questions
are cut into blocks in the order in which they come; a build that is killed loses the block under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, cast

import polars as pl

from curate.blocks import Advance, Blocks
from curate.errors import InputError
from curate.manifest.schema import content_hash, plain_message
from curate.models.base import Completion, Generator, Message, Prompt, Sampling, Scorer
from curate.models.travel import Travels
from curate.store import Store

VERSION = 1
ROOM = 4096  # prompts whose length is looked up together
SCORED = 256  # answers that are scored together

COMPLETION: dict[str, Any] = {
    "text": pl.String,
    "token_ids": pl.List(pl.Int32),
    "token_logps": pl.List(pl.Float32),
    "n_tokens": pl.Int32,
    "finished": pl.Boolean,
    "prompt_tokens": pl.Int32,
}


class Cached:
    """`model` with its answers kept in `store`; `size` prompts are one block."""

    def __init__(self, model: Generator, store: Store, size: int = 64) -> None:
        self.model, self.store, self.size = model, store, size

    def sized(self, size: int) -> Cached:
        """The same with blocks of another size."""
        return Cached(self.model, self.store, size)

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self.model.fingerprint

    @property
    def how(self) -> str:
        """What else decides the last bit of a number, as the model says; "" for a server."""
        return str(getattr(self.model, "how", ""))

    @cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """The model's; kept, since asking for it loads the tokenizer."""
        block = Blocks(self.store, "tokenizer", [VERSION, self.fingerprint], [None], [""], 1)
        frames = block.frames(lambda _: pl.DataFrame({"tokenizer": [self.model.tokenizer_fingerprint]},
                                                     schema={"tokenizer": pl.String}), here=True)  # fmt: skip
        return cast("str | None", frames[0].item())

    def room(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """The model's."""
        work = Blocks(self.store, "room", [VERSION, self.fingerprint], prompts, [_name(p) for p in prompts], ROOM)
        frames = work.frames(lambda part: pl.DataFrame({"room": self.model.room(part)}, schema={"room": pl.Int64}),
                             here=True)  # fmt: skip
        return [room for frame in frames for room in frame["room"]]

    def to_generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> int:
        """How many of the prompts `generate` would have to answer anew."""
        return self._generated(prompts, sampling).left

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, done: Advance = lambda n: None
    ) -> list[list[Completion]]:
        """The model's; `done(n)` is told of every n prompts that were answered anew."""
        frames = self._generated(prompts, sampling).frames(partial(_ask, self.model, sampling), done, self._stays)
        rows = [_completion(row) for frame in frames for row in frame.iter_rows(named=True)]
        return [rows[at : at + sampling.k] for at in range(0, len(rows), sampling.k)]

    def to_score(self, pairs: Sequence[tuple[Prompt, Sequence[Message]]]) -> int:
        """How many of the answers `score` would have to measure anew."""
        return self._scored(pairs).left

    def score(
        self, pairs: Sequence[tuple[Prompt, Sequence[Message]]], done: Advance = lambda n: None
    ) -> list[Completion | None]:
        """The model's; `done(n)` is told of every n answers that were measured anew.

        Raises:
            InputError: the model is behind a server, which gives no log-probabilities of a text that it did not write.
        """
        if not hasattr(self.model, "score"):
            raise InputError(
                f"{self.fingerprint}: a server cannot measure the log-probability of given answers",
                remedy="use a policy with backend: transformers for selectors that go by the loss",
            )
        frames = self._scored(pairs).frames(partial(_scores, cast(Scorer, self.model)), done, self._stays)
        rows = [row for frame in frames for row in frame.iter_rows(named=True)]
        return [_completion(row) if row["token_logps"] is not None else None for row in rows]

    @property
    def scores(self) -> bool:
        """True where the model can measure given answers."""
        return hasattr(self.model, "score")

    def _generated(self, prompts: Sequence[Prompt], sampling: Sampling) -> Blocks[Prompt]:
        how = [VERSION, self.fingerprint, self.how, asdict(sampling)]
        return Blocks(self.store, "generate", how, prompts, [_name(p) for p in prompts], self.size)

    def _scored(self, pairs: Sequence[tuple[Prompt, Sequence[Message]]]) -> Blocks[tuple[Prompt, Sequence[Message]]]:
        how = [VERSION, self.fingerprint, self.how]
        names = [content_hash([_name(p), _plain(answer)]) for p, answer in pairs]
        return Blocks(self.store, "loss", how, pairs, names, SCORED)

    @property
    def _stays(self) -> bool:
        """True where the model is asked from here whatever the engine is: a server is a pool of its own."""
        return not isinstance(self.model, Travels)


def _ask(model: Generator, sampling: Sampling, prompts: Sequence[Prompt]) -> pl.DataFrame:
    answers = model.generate(prompts, sampling)
    return pl.DataFrame([vars(c) for some in answers for c in some], schema=COMPLETION)


def _scores(model: Scorer, pairs: Sequence[tuple[Prompt, Sequence[Message]]]) -> pl.DataFrame:
    nothing = Completion("")
    return pl.DataFrame([vars(nothing if c is None else c) for c in model.score(pairs)], schema=COMPLETION)


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(**row)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [plain_message(m) for m in messages]


def _name(prompt: Prompt) -> str:
    """All that decides an answer to a prompt: its content, and the uid that seeds its draws."""
    return content_hash([prompt.uid, _plain(prompt.messages), prompt.tools])
