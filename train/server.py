"""The policy's completions from an OpenAI-compatible server (vLLM, SGLang, `transformers serve`), in place of our own.

Whether the server has the weights of the step is the user's affair: it cannot be asked. `sync`, a function of theirs,
is called before each phase with a folder of the policy's weights, to load them there. Log-probabilities are measured by
the policy in training on the tokens of the text that came back, or on those that were drawn, where the server names
their ids. Where it tells its own, `gap` says how far apart the two are, which shows stale weights; by them asynchronous
rollouts (`ahead.py`) are corrected.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from curate.errors import InputError
from curate.models import Completion, Prompt, Sampling, ServerModel
from curate.models.chat import answer_ids
from train.folder import whole

POLICY = "policy"


@dataclass(frozen=True)
class Server:
    """Draws completions.

    Attributes:
        model: asks.
        tokenizer: of the policy.
        ends: tokens that end an answer.
        out: folder in which the weights for `sync` are written.
        sync: called with (folder, number of the phase); None: the server is left as it is.
    """

    model: ServerModel
    tokenizer: Any
    ends: Collection[int]
    out: Path
    sync: Callable[[Path, int], Any] | None = None

    def refresh(self, policy: Any, phase: int) -> None:
        """Hand the policy's weights to `sync`.

        Raises:
            InputError: it raises anything; a full disk.
        """
        if self.sync is None:
            return
        staging, final = self.out / f".{POLICY}", self.out / POLICY
        shutil.rmtree(staging, ignore_errors=True)
        with whole(staging, "the same command goes on from its last checkpoint"):
            policy.save_pretrained(staging, safe_serialization=True)
            self.tokenizer.save_pretrained(staging)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        self._hand_over(final, phase)

    def again(self, policy: Any, phase: int) -> None:
        """Hand over what was handed over last, by a process that is no more; where it left nothing, the policy."""
        if (self.out / POLICY).is_dir():
            self._hand_over(self.out / POLICY, phase)
        else:
            self.refresh(policy, phase)

    def _hand_over(self, folder: Path, phase: int) -> None:
        if self.sync is None:
            return
        try:
            self.sync(folder, phase)
        except Exception as error:  # the user's own function may raise anything
            raise InputError(
                f"rollouts.sync raised {type(error).__name__} before phase {phase + 1}: {str(error)[:300]}",
                remedy="mend the function: no sample was drawn, and the same command goes on from the last checkpoint",
            ) from error

    def draw(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """`sampling.k` completions of each prompt, one prompt after the other, with the policy's tokens.

        Raises:
            InputError: the server gives no usable answer in all its tries.
        """
        return self.read(prompts, self.model.generate(prompts, sampling), sampling)

    def read(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], sampling: Sampling
    ) -> list[Completion]:
        """What the server has said, with the policy's tokens."""
        return [
            self._of(prompt, each, sampling.max_new_tokens)
            for prompt, some in zip(prompts, answers, strict=True)
            for each in some
        ]

    def _of(self, prompt: Prompt, found: Completion, most: int) -> Completion:
        named = self._named(found)
        said = [{"role": "assistant", "content": found.text}]
        ids = named or answer_ids(self.tokenizer, prompt, said, self.ends)
        ended = bool(found.finished) and len(ids) <= most
        if not ended:  # text that was cut has no end token; one that tokenises longer than asked for is cut
            ids = (ids if named else ids[:-1] or ids)[:most]
        same = found.token_logps is not None and len(found.token_logps) in (len(ids), len(ids) - ended)
        if same and not named and found.names is not None:
            same = self._drawn(ids[: len(ids) - ended], found.names)
        return replace(
            found, token_ids=ids, n_tokens=len(ids), finished=ended, token_logps=found.token_logps if same else None
        )

    def _named(self, found: Completion) -> list[int] | None:
        """The tokens that were drawn, where the server names their ids: vLLM with --return-tokens-as-token-ids."""
        ids = [re.fullmatch(r"token_id:(\d+)", name) for name in found.names or ()]
        numbers = [int(each[1]) for each in ids if each is not None]
        if not numbers or len(numbers) < len(ids) or max(numbers) >= len(self.tokenizer):
            return None
        ended = numbers[-1] in self.ends or not found.finished or self.tokenizer.eos_token_id is None
        return numbers if ended else [*numbers, self.tokenizer.eos_token_id]

    def _drawn(self, ids: Sequence[int], names: Sequence[str]) -> bool:
        """Whether the tokens of a text are those that were drawn, by their own texts; parts of characters have none."""
        texts = [self.tokenizer.decode([token]) for token in ids]
        return all("\ufffd" in a or a.strip() == b.strip() for a, b in zip(texts, names, strict=False))


def told(drawn: Sequence[Completion], mask: Tensor) -> Tensor:
    """[n, t] log μ of the server, nats; NaN where it told none: padding, an end token, a text with other tokens."""
    found = torch.full(mask.shape, torch.nan)
    for i, each in enumerate(drawn):
        if each.token_logps:
            found[i, : len(each.token_logps)] = torch.tensor(each.token_logps)
    return found


def gap(drawn: Sequence[Completion], logps: Tensor, mask: Tensor) -> float | None:
    """How far log π_server is from log π, nats a token: the median over completions whose tokens the server told.

    A median, since a text may have other tokens than were drawn. None: of no completion.

    Args:
        drawn: n completions; their token_logps may leave out the end token.
        logps: [n, t] of the policy in training.
        mask: [n, t] its tokens.
    """
    apart = []
    for each, row, kept in zip(drawn, logps, mask, strict=True):
        if each.token_logps:
            own = row[kept].tolist()[: len(each.token_logps)]
            apart.append(fmean(abs(a - b) for a, b in zip(each.token_logps, own, strict=True)))
    return median(apart) if apart else None
