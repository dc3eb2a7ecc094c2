"""What a model of `curate` does: generate, score, reward. Protocols and the small types that pass between them.

Light on purpose: no torch, no HTTP. Implementations are in `local.py` (transformers), `server.py` (OpenAI-compatible)
and `reward.py`; `curate.models` opens the one that a configuration asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What is answered: messages of a conversation, or none for plain text. `uid` names it in errors and draws."""

    uid: str
    messages: Sequence[Message]
    tools: str | None = None  # JSON list of the tools that the conversation offers


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Draws depend on seed, uid and the completion's number, never on what shares a batch.

    Temperature 0 is greedy decoding; its log-probabilities are those of the unscaled distribution.
    """

    k: int = 1  # completions a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    `token_ids` [t] ends with the end token where the completion is finished; `token_logps` [t] are natural logs under
    the processed distribution that it was sampled from (temperature, top-p), or of the plain one where it was scored.
    """

    text: str  # without special tokens
    token_ids: list[int] | None = None  # None: the server does not tell
    token_logps: list[float] | None = None  # None: not measured
    n_tokens: int | None = None  # tokens of the completion, the end token included
    finished: bool | None = None  # False: cut at max_new_tokens; None: not generated
    prompt_tokens: int | None = None  # tokens of the prompt, as a server bills them
    names: list[str] | None = None  # of the tokens that `token_logps` are of, as a server tells them: texts, or ids


class Generator(Protocol):
    """Writes completions."""

    @property
    def fingerprint(self) -> str:
        """Names the weights: equal fingerprints answer alike. The `policy` of a manifest."""

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Names the tokenizer; None where a server does not tell."""

    def room(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tokens that fit behind each prompt, negative where the prompt alone does not fit; None where unknown."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.k` completions of every prompt, in order."""


class Scorer(Protocol):
    """Measures the log-probability of given answers."""

    @property
    def fingerprint(self) -> str:
        """Names the weights."""

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Names the tokenizer."""

    def score(self, pairs: Sequence[tuple[Prompt, Sequence[Message]]]) -> list[Completion | None]:
        """Each answer's tokens and log-probabilities at temperature 1; None where prompt and answer do not fit."""


class Reward(Protocol):
    """Says how good a completion is; higher is better."""

    @property
    def fingerprint(self) -> str:
        """What measures, and its unit: `reward_id` of a manifest."""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """One number a completion; NaN where it cannot be judged."""
