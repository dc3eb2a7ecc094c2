"""How good a completion is: overlap with references, a sentence embedder, a reward model, or the user's own function.

`rouge_l`, `exact_match` and `contains` are pure functions of texts; evaluation uses them too. Every reward gives NaN
where there is nothing to judge by (no reference, an empty text, a number that is not finite), and none depends on the
order in which it is asked: each distinct text is measured once, in an order of its own.

Departures from Natural Instructions' `compute_metrics.py`, for texts that it cannot tell apart or never rewards:
- ROUGE-L: `rouge_score` drops all but a-z and 0-9, so that Cyrillic or Chinese always scores 0. Here letters, marks and
  digits of every script count; in scripts without spaces each character is a word. ASCII texts score as there.
- Exact match and ROUGE-L: a text of punctuation only, such as "+", would be empty, and equal to "-" or to nothing. It
  stands for itself.
"""

from __future__ import annotations

import json
import math
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from curate.config import RewardConfig
from curate.errors import InputError
from curate.models.base import Prompt, Reward
from curate.models.chat import render
from curate.models.embedder import Embedder, Precomputed
from curate.models.function import Function, finite
from curate.models.memory import halving
from curate.models.travel import Travels
from curate.models.weights import architectures, model_folder, quiet, refuse_foreign_tokens, weights_hash

KEY = "rollouts.reward"  # where a configuration asks for a reward: errors name it


def open_reward(config: RewardConfig, base: Path, embedder: Embedder, where: str = KEY) -> Reward:
    """The reward that a configuration asks for; relative paths and modules are relative to `base`.

    Errors name the key `where`.

    Raises:
        InputError: the model or the function cannot be used (before any completion is judged).
    """
    match config.kind:
        case "similarity":
            return Similarity(embedder)
        case "model":
            return RewardModel(config, base, where)
        case "python":
            return Function(str(config.function), base, where, config.retries)
        case kind:
            return Overlap(kind, OVERLAPS[kind])


# --- against the references ---


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 against the reference that fits best, in [0, 1]; NaN without references.   Lin 2004, Section 3.1.

    P = LCS / words of the prediction, R = LCS / words of the reference, F1 = 2PR / (P + R), with LCS the length of
    their longest common subsequence of words. ASCII words of more than three letters are stemmed (Porter), as in
    Natural Instructions.

    >>> rouge_l("the cat sat", ["a dog", "the cat ran"])  # LCS "the cat": P = R = 2/3
    0.6666666666666666
    """
    scores = (_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)
    return float(max(scores, default=math.nan))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised reference, else 0.0; NaN without references.

    Natural Instructions' rule: lower case, no ASCII punctuation, white space squeezed; articles stay. So "-5" equals
    "5", and "3.5" equals "35".

    >>> exact_match("  The  Answer. ", ["answer", "the answer"])
    1.0
    """
    pairs = (_normalised(prediction, reference) for reference in references)
    return max((float(left == right) for left, right in pairs), default=math.nan)


def contains(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction holds a normalised reference, else 0.0; NaN without references.

    A plain substring test, as in PBL, but normalised as for `exact_match`: "1" is in "100". An empty reference is in
    nothing but an empty prediction.

    >>> contains("I think it is Paris.", ["Rome", "paris"])
    1.0
    """
    pairs = (_normalised(prediction, reference) for reference in references)
    return max((float(right in left if right else not left) for left, right in pairs), default=math.nan)


OVERLAPS = {"rouge_l": rouge_l, "exact": exact_match, "contains": contains}


@dataclass(frozen=True)
class Overlap:
    """A reward that compares each completion with its own references and needs nothing else."""

    fingerprint: str
    measure: Callable[[str, Sequence[str]], float]

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """`measure` of every completion."""
        return [self.measure(c, refs) for c, refs in zip(completions, references, strict=True)]


class Similarity:
    """Cosine in [-1, 1] of a completion's embedding to that of the nearest reference; an empty text has none: NaN.

    The embedder reads as much of a text as its model takes (all-MiniLM-L6-v2: the first 256 tokens).
    """

    def __init__(self, embedder: Embedder) -> None:
        if isinstance(embedder, Precomputed):
            raise InputError(
                f"{KEY}.kind similarity embeds completions, and embed.backend precomputed knows the texts of its file",
                remedy="use embed.backend sentence-transformers, lm or api, or another reward",
            )
        self.embedder = embedder

    @property
    def stays(self) -> bool:
        """True where the embedder is behind a server, which is asked from here whatever the engine is."""
        return not isinstance(self.embedder, Travels)

    @cached_property
    def fingerprint(self) -> str:
        """Names the embedder."""
        return f"similarity:{self.embedder.fingerprint}"

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """The largest x·y over the references; each distinct text is embedded once, in sorted order."""
        texts = sorted({text for text in chain(completions, *references) if text.strip()})
        vectors = dict(zip(texts, self.embedder.encode(texts), strict=True)) if texts else {}
        return [self._nearest(vectors, c, refs) for c, refs in zip(completions, references, strict=True)]

    @staticmethod
    def _nearest(vectors: dict[str, Any], completion: str, references: Sequence[str]) -> float:
        if completion not in vectors:
            return math.nan
        cosines = (float(vectors[completion] @ vectors[r]) for r in references if r in vectors)
        return float(np.clip(max(cosines, default=math.nan), -1, 1))


def _normalised(prediction: str, reference: str) -> tuple[str, str]:
    """Both texts by Natural Instructions' rule, or only lower-cased where it leaves nothing of the reference."""
    left, right = (" ".join(text.lower().split()) for text in (prediction, reference))
    if bare := " ".join(right.translate(_NO_PUNCTUATION).split()):
        return " ".join(left.translate(_NO_PUNCTUATION).split()), bare
    return left, right


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from rouge_score.tokenizers import DefaultTokenizer  # type: ignore[import-untyped]

    stems = DefaultTokenizer(use_stemmer=True)

    @lru_cache(4096)  # a reference is compared with each of its prompt's completions
    def words(text: str) -> Sequence[str]:
        text = unicodedata.normalize("NFKC", text).lower()
        spaced = "".join(_spaced(character) for character in text).split()
        return [w for word in spaced for w in (stems.tokenize(word) if word.isascii() else [word])] or text.split()

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))


# Thai, Lao, Burmese, Khmer, kana and Han.
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


def _spaced(character: str) -> str:
    """Letters, marks and numbers as they are, or apart in scripts without spaces; a space for everything else."""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if _NO_SPACES.match(character) else character


# --- a reward model ---


class RewardModel(Travels):
    """The one output of a sequence-classification head, in float32; weights are loaded at the first call.

    With a chat template the model sees prompt and completion as the template writes them, without one (or without a
    prompt) their texts joined by blank lines. What is longer than the context loses its beginning. The head of a causal
    model reads at the last token that is not the pad token (the end token, where the tokenizer has no pad token).
    """

    def __init__(self, config: RewardConfig, base: Path, key: str = KEY) -> None:
        self.config, self.key = config, key
        self.folder, name = model_folder(str(config.model), base, f"{key}.model", whole=True)
        self.where = f"{key}.model {name!r}"
        kinds = architectures(self.folder)
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise InputError(
                f"{self.where}: not a sequence classifier ({', '.join(kinds) or 'no architecture'})",
                remedy="name a reward model whose config.json says …ForSequenceClassification; remote code is not run",
            )
        labels = _labels(self.folder)
        if len(labels) != 1:
            raise InputError(
                f"{self.where}: {len(labels)} labels, {labels}; a reward is one number",
                remedy=f"use a model that was trained with num_labels=1, or choose a label's logit in {key}.function",
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer and chat template."""
        return f"model:{weights_hash(self.folder)}"

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """The model's output for every completion; references are not looked at.

        Each distinct sequence is judged once, the longest first: what shares a batch does not depend on the order of
        the arguments, and what does not fit into memory shows at once.
        """
        rows = [self._ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        distinct = sorted({row for row in rows if row}, key=lambda row: (-len(row), row))
        found: dict[tuple[int, ...], float] = {(): math.nan}
        for at in range(0, len(distinct), self.config.batch_size):
            part = distinct[at : at + self.config.batch_size]
            found |= dict(zip(part, halving(part, self._outputs, self.where), strict=True))
        return [found[row] for row in rows]

    def _ids(self, prompt: Prompt, completion: str) -> tuple[int, ...]:
        _, tokenizer, limit, _ = self._loaded
        templated = bool(prompt.messages) and tokenizer.chat_template is not None
        if templated:
            answer = [{"role": "assistant", "content": completion}]
            text = render(tokenizer, prompt, answer, add_generation_prompt=False)
        else:
            text = "\n\n".join(str(part) for part in (*(m["content"] for m in prompt.messages), completion) if part)
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        # A template writes the tokens that begin and end a text; the tokenizer must not write them once more.
        return tuple(tokenizer(text, add_special_tokens=not templated, **cut)["input_ids"])

    def _outputs(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        import torch

        model, _, _, pad = self._loaded
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in rows], device=model.device)  # [b, t]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits  # [b, 1]
        return [finite(value) for value in logits[:, 0].float().tolist()]

    @cached_property
    def _loaded(self) -> tuple[Any, Any, int | None, int | None]:
        """Model, tokenizer, longest sequence and pad token."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        quiet()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, truncation_side="left", **local)
            model: Any
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            model = model.to(device).eval()
        except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
            raise InputError(f"{self.where} cannot be loaded: {str(error)[:500]}") from None
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise InputError(
                f"{self.where}: its files lack the weights {', '.join(sorted(info['missing_keys'])[:5])}",
                remedy="save the trained model, head included, with model.save_pretrained(folder)",
            )
        refuse_foreign_tokens(model, tokenizer, self.where)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None and self.config.batch_size > 1:
            raise InputError(
                f"{self.where}: its tokenizer has neither a pad nor an end token, so that texts cannot share a batch",
                remedy=f"set {self.key}.batch_size to 1, or save the tokenizer with the pad token of the training",
            )
        settings = model.config.get_text_config()
        settings.pad_token_id = pad
        limits = (getattr(settings, "max_position_embeddings", None), tokenizer.model_max_length)
        limit = min((int(n) for n in limits if n and n < 1e9), default=None)  # 1e30: the tokenizer knows of no limit
        return model, tokenizer, limit, pad


def _labels(folder: Path) -> dict[int, str]:
    """A classifier's labels as its config.json has them; two where it says nothing, as transformers has it."""
    config = json.loads((folder / "config.json").read_bytes())
    given = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    return {int(i): str(label) for i, label in given.items()}
