"""A prompt and its answers in one forward pass: the prompt once, then each answer, which sees the prompt and itself.

A row is  x_1 … x_{p-1}, (x_p, y_1), (x_p, y_2), …: the prompt's last token stands again before each answer, at its own
position p, so that everywhere a token is predicted from the place before it, and no other code needs to know of the
layout. Positions go on from p in every answer. Prompts of unlike length may stand behind one another in a row, so that
less of the batch is padding. The block mask is a 4-D one, which every attention of transformers but flash attention
takes as it is; `shares_prefixes` finds out whether a model obeys it.

It owns what shares a row, and the tensors of a batch. It knows nothing of ranks, rewards or losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.logprobs import token_logps

Layout = Literal["auto", "shared", "separate"]
Tokens = NDArray[np.int32]
Piece = tuple[int, list[int]]
"""A prompt, and those of its answers that stand behind it."""


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


def plan(
    prompts: Sequence[int], answers: Sequence[Sequence[int]], layout: Layout, cost: Cost, limit: int | None = None
) -> list[list[Piece]]:
    """The rows of a batch, each of at most `limit` tokens where that can be met.

    Args:
        prompts: tokens of each prompt.
        answers: tokens of each prompt's answers.
        layout: shared: a prompt's answers stand behind it, as many as `limit` allows; separate: each its own row; auto:
            the cheapest of these, of each prompt as it is cheaper, and of such pieces behind one another.
        cost: of a row.
        limit: tokens of a row; an answer that does not fit beside its prompt still gets a row.
    """
    alone: list[list[Piece]] = [[(k, [i]) for i in range(len(some))] for k, some in enumerate(answers)]
    shared = [[(k, g) for g in groups(p, n, limit)] for k, (p, n) in enumerate(zip(prompts, answers, strict=True))]
    if layout != "auto":
        return [[piece] for some in (alone if layout == "separate" else shared) for piece in some]

    def size(piece: Piece) -> int:
        return max(prompts[piece[0]] - 1, 0) + sum(answers[piece[0]][i] + 1 for i in piece[1])

    def total(rows: list[list[Piece]]) -> float:
        longest = max((sum(map(size, row)) for row in rows), default=0)
        masked = any(len(r) > 1 or len(r[0][1]) > 1 for r in rows)
        return len(rows) * cost.row(longest, masked)  # the others are padded to the longest

    mixed = [min(ways, key=lambda pieces: sum(total([[piece]]) for piece in pieces)) if ways[0] else []
             for ways in zip(alone, shared, strict=True)]  # fmt: skip
    options: list[list[list[Piece]]] = []
    for pieces in ([piece for some in way for piece in some] for way in (alone, shared, mixed)):
        longest = max(map(size, pieces), default=0)
        options.append([[piece] for piece in pieces])
        options += [_fitted(pieces, size, n * longest) for n in (1, 2) if n == 1 or (limit or math.inf) >= n * longest]
    return min(options, key=total)


def groups(prompt: int, answers: Sequence[int], limit: int | None = None) -> list[list[int]]:
    """Which answers share their prompt's row: as many as `limit` allows, in their order."""
    found: list[list[int]] = []
    room = 0
    for i, n in enumerate(answers):
        if not found or (limit is not None and n + 1 > room):
            found.append([])
            room = (limit or 0) - max(prompt - 1, 0)
        found[-1].append(i)
        room -= n + 1
    return found


def _fitted(pieces: Sequence[Piece], size: Callable[[Piece], int], length: int) -> list[list[Piece]]:
    """Pieces behind one another in rows of so many tokens: the longest first, each into the first row that has room."""
    rows, room = list[list[Piece]](), list[int]()
    for piece in sorted(pieces, key=size, reverse=True):
        n = size(piece)
        at = next((k for k, free in enumerate(room) if free >= n), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(length)
        rows[at].append(piece)
        room[at] -= n
    return rows


def batch_of(
    prompts: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
    rows: Sequence[Sequence[Piece]],
    pad: int = 0,
) -> dict[str, Tensor]:
    """Tensors of some prompts with their answers.

    Args:
        prompts: tokens of each prompt [p]. Of an empty prompt the answer's first token is no target.
        answers: tokens of each prompt's answers.
        rows: of `plan`.
        pad: any token.

    Returns:
        input_ids, position_ids, segment [r, t] int64 and loss_mask [r, t] bool; segment is the answer's number, counted
        over all prompts in turn, -1 = prompt or padding; attention_mask [r, t] int64, or [r, 1, t, t] bool (True = may
        see) where answers share a row.
    """
    offsets = np.cumsum([0, *(len(a) for a in answers)])
    made = [
        [_piece(prompts[k], [(int(offsets[k]) + i, answers[k][i]) for i in some]) for k, some in row] for row in rows
    ]
    lengths = [[len(piece[0]) for piece in row] for row in made]
    r, t = len(made), max(map(sum, lengths))
    ids, positions = np.full((r, t), pad, np.int64), np.zeros((r, t), np.int64)
    segment, targets = np.full((r, t), -1, np.int64), np.zeros((r, t), np.bool_)
    block, owner = np.full((r, t), -2, np.int64), np.full((r, t), -1, np.int64)  # -1 = a prompt, -2 = padding
    for k, (pieces, sizes) in enumerate(zip(made, lengths, strict=True)):
        n = sum(sizes)
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        for array, column in zip((ids, positions, segment, targets, block), columns, strict=True):
            array[k, :n] = column
        owner[k, :n] = np.repeat(np.arange(len(pieces)), sizes)
        positions[k, n:] = positions[k, n - 1]  # not beyond: a model may have no such position
    arrays = {"input_ids": ids, "position_ids": positions, "segment": segment, "loss_mask": targets}
    found: dict[str, Tensor] = {name: torch.from_numpy(value) for name, value in arrays.items()}
    of, piece = torch.from_numpy(block), torch.from_numpy(owner)
    if bool((of > 0).any() or (piece > 0).any()):
        seen = (of[:, :, None] == of[:, None, :]) | (of == -1)[:, None, :]
        seen &= (piece[:, :, None] == piece[:, None, :]) & torch.ones(t, t, dtype=torch.bool).tril()
        found["attention_mask"] = (seen | torch.eye(t, dtype=torch.bool))[:, None]
    else:
        found["attention_mask"] = (of > -2).long()
    return found


def _piece(prompt: Tokens, answers: Sequence[tuple[int, Tokens]]) -> tuple[NDArray[Any], ...]:
    """(tokens, positions, answer's number, targets, blocks) of a prompt and its answers."""
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
def shares_prefixes(model: Any, longest: int = 0) -> bool:
    """Whether this model, as it is configured, obeys a block mask: three tiny forward passes.

    Recurrent models do not, nor does flash attention, nor those that see a window of fewer tokens than the `longest`
    sequence has: transformers leaves a mask that is given as it is, without the window. Dropout must be off.
    """
    text = model.config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if any(isinstance(window, int) and 0 < window < longest for window in windows):
        return False
    prompt, some = np.array([1, 2, 3], np.int32), [np.array([4, 5], np.int32), np.array([6, 7, 5], np.int32)]
    shared, separate = (batch_of([prompt], [some], rows) for rows in ([[(0, [0, 1])]], [[(0, [0])], [(0, [1])]]))
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
