"""A prompt and its answers in one forward pass: the prompt once, then each answer, which sees the prompt and itself.

A row is  x_1 … x_{p-1}, (x_p, y_1), (x_p, y_2), …: the prompt's last token stands again before each answer, at its own
position p, so that everywhere a token is predicted from the place before it, and no other code needs to know of the
layout. Positions go on from p in every answer. The block mask is a 4-D one, which every attention of transformers but
flash attention takes as it is; `shares_prefixes` finds out whether a model obeys it.

It owns which answers share a row, and the tensors of a batch. It knows nothing of ranks, rewards or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.logprobs import token_logps

Layout = Literal["auto", "shared", "separate"]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Cost:
    """What a row of t tokens costs, in units of a token's way through the weights: t + attention · t², once more with
    `mask` for the square where a block mask is given (it is dense: kernels skip nothing of it).

    Attributes:
        attention: share of attention in a token's cost, for each token that it may see.
        mask: what a dense mask makes of it.
    """

    attention: float = 2e-4
    mask: float = 2.5

    @classmethod
    def of(cls, model: Any) -> Cost:
        """From a model's shape: 2 operations a weight, and 4 · width · layers a pair of tokens, halved by causality."""
        config = model.config.get_text_config()
        weights = sum(p.numel() for p in model.parameters())
        if not config.tie_word_embeddings:
            weights -= config.vocab_size * config.hidden_size  # the table of inputs is looked up, not multiplied
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(attention=width * config.num_hidden_layers / weights)

    def row(self, t: int, masked: bool) -> float:
        """Cost of one row of t tokens."""
        return t + self.attention * t * t * (self.mask if masked else 1.0)


def groups(
    prompt: int, answers: Sequence[int], layout: Layout, cost: Cost, limit: int | None = None
) -> list[list[int]]:
    """Which answers share a row: lists of their numbers, each row of at most `limit` tokens where that can be met.

    Args:
        prompt: tokens of the prompt.
        answers: tokens of each answer.
        layout: shared: as many to a row as `limit` allows; separate: each its own row; auto: the cheaper of the two.
        cost: of a row.
        limit: tokens of a row; an answer that does not fit beside its prompt still gets a row.
    """
    alone = [[i] for i in range(len(answers))]
    if layout == "separate" or len(answers) < 2:
        return alone
    shared: list[list[int]] = []
    room = 0
    for i, n in enumerate(answers):
        if not shared or (limit is not None and n + 1 > room):
            shared.append([])
            room = (limit or 0) - max(prompt - 1, 0)
        shared[-1].append(i)
        room -= n + 1
    if layout == "shared":
        return shared

    def total(rows: list[list[int]]) -> float:
        return sum(cost.row(max(prompt - 1, 0) + sum(answers[i] + 1 for i in row), len(row) > 1) for row in rows)

    return shared if total(shared) < total(alone) else alone


def batch_of(
    prompts: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
    rows: Sequence[Sequence[Sequence[int]]],
    pad: int = 0,
) -> dict[str, Tensor]:
    """Tensors of some prompts with their answers.

    Args:
        prompts: tokens of each prompt [p]. Of an empty prompt the answer's first token is no target.
        answers: tokens of each prompt's answers.
        rows: for each prompt the groups that `groups` gave.
        pad: any token.

    Returns:
        input_ids, position_ids, segment [r, t] int64 and loss_mask [r, t] bool; segment is the answer's number, counted
        over all prompts in turn, -1 = prompt or padding; attention_mask [r, t] int64, or [r, 1, t, t] bool (True = may
        see) where answers share a row.
    """
    offsets = np.cumsum([0, *(len(a) for a in answers)])
    made = [
        _row(prompts[k], [(int(offsets[k]) + j, answers[k][j]) for j in row])
        for k, some in enumerate(rows)
        for row in some
    ]
    r, t = len(made), max(len(row[0]) for row in made)
    ids, positions = np.full((r, t), pad, np.int64), np.zeros((r, t), np.int64)
    segment, targets = np.full((r, t), -1, np.int64), np.zeros((r, t), np.bool_)
    block = np.full((r, t), -2, np.int64)  # -1: the prompt, -2: padding, else the answer in the row
    for k, parts in enumerate(made):
        n = len(parts[0])
        for array, part in zip((ids, positions, segment, targets, block), parts, strict=True):
            array[k, :n] = part
        positions[k, n:] = positions[k, n - 1] + 1 + np.arange(t - n)
    arrays = {"input_ids": ids, "position_ids": positions, "segment": segment, "loss_mask": targets}
    found: dict[str, Tensor] = {name: torch.from_numpy(value) for name, value in arrays.items()}
    of = torch.from_numpy(block)
    if bool((of > 0).any()):
        same = of[:, :, None] == of[:, None, :]
        seen = (same | (of == -1)[:, None, :]) & torch.ones(t, t, dtype=torch.bool).tril()
        found["attention_mask"] = (seen | torch.eye(t, dtype=torch.bool))[:, None]
    else:
        found["attention_mask"] = (of > -2).long()
    return found


def _row(prompt: Tokens, answers: Sequence[tuple[int, Tokens]]) -> tuple[NDArray[Any], ...]:
    """(tokens, positions, answer's number, targets, blocks) of one row."""
    p, head = len(prompt), prompt[-1:]
    start = max(p - 1, 0)
    parts = [(prompt[:start], np.arange(start), np.full(start, -1), np.zeros(start, bool), np.full(start, -1))]
    for k, (number, answer) in enumerate(answers):
        tokens = np.concatenate([head, answer])
        n = len(tokens)
        of, is_target = np.full(n, number), np.arange(n) > 0
        of[: len(head)] = -1
        parts.append((tokens, start + np.arange(n), of, is_target, np.full(n, k)))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@torch.no_grad()
def shares_prefixes(model: Any) -> bool:
    """Whether this model, as it is configured, obeys a block mask: three tiny forward passes.

    Recurrent models do not, nor does flash attention. Dropout must be off.
    """
    prompt, some = np.array([1, 2, 3], np.int32), [np.array([4, 5], np.int32), np.array([6, 7, 5], np.int32)]
    shared, separate = (batch_of([prompt], [some], [rows]) for rows in ([[0, 1]], [[0], [1]]))
    joined = {**shared, "attention_mask": torch.ones_like(shared["attention_mask"]).tril()}  # no block is kept apart
    device = next(model.parameters()).device
    try:
        one, other, without = (
            _answers(model, {k: v.to(device) for k, v in b.items()}) for b in (shared, separate, joined)
        )
    except (ValueError, RuntimeError, NotImplementedError):  # an attention that takes no such mask
        return False
    return bool((one - other).abs().max() < 0.01 * (without - other).abs().max())


def _answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[n] log-probabilities of the targets, in the order of the answers."""
    return token_logps(model, batch)[batch["loss_mask"]]
