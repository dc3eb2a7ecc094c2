"""Training items: single samples, packs of whole samples, or blocks of running text, in the order of a mixture.

`Items` is read from its start to its end, once: `TrainingArguments(train_sampling_strategy="sequential",
num_train_epochs=1)`. It holds the whole run, all epochs in turn, so skipping items on resume, gradient accumulation and
accelerate's BatchSamplerShard all cut one and the same global order. `Collator` makes a batch of tensors of it;
`step_rows` says which rows a step saw. It knows nothing of losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from curate.errors import InputError
from train.data import Examples
from train.mixing import Mixture

CHUNK = 65_536  # positions of the order that are read at once, at most
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """How samples share an item.

    Whole samples are put into packs in the order of the mixture, each into the oldest of `window` open packs that has
    room; where none has, the oldest is closed and a new one opened. Packs come in the order in which they were opened.
    So the first m packs hold every sample before some position p of the order, and beyond it only what found room in
    the last `window` - 1 of them: order and ratios hold to within the samples of `window` - 1 packs. `window` 1 keeps
    the order exactly.

    Attributes:
        length: most tokens of a pack; of every block.
        window: open packs.
        split: blocks instead: all rows behind one another, cut into exactly `length` tokens, every token once an epoch;
            the last block of a run may be shorter. Where a row is cut, its rest begins anew: position 0, and its first
            token is no target, as nothing stands before it. (So a piece may have no target.)
    """

    length: int
    window: int = 8
    split: bool = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.window < 1:
            raise InputError(f"packs need at least 2 tokens and a window of 1, not {self.length} and {self.window}")


@dataclass(frozen=True, eq=False)
class Item:
    """One item: s samples (or pieces of them) behind one another, t tokens.

    tokens [t] int32; positions [t] int64, from 0 in each sample; loss [t] bool: the targets; lengths [s] int64; rows
    [s] int64, index into the examples; weights [s] float32.
    """

    tokens: NDArray[np.int32]
    positions: Ints
    loss: NDArray[np.bool_]
    lengths: Ints
    rows: Ints
    weights: NDArray[np.float32]


class Items(Dataset[Item]):
    """The items of a run in their final order, as a map-style data set.

    Args:
        examples: the samples.
        mixture: their order.
        packing: None: an item is one sample.
        epochs: epochs of the mixture; a part of one is fine.
        max_steps: steps instead of epochs; the order goes on over as many epochs as that takes.
        items_per_step: batch size × accumulation × processes. Above 1 the run ends with a whole step: the order goes on
            a little into the next epoch, where Trainer would make the last step smaller, or on several processes repeat
            the run's first items.

    Raises:
        InputError: neither epochs nor steps to make, or a sample is longer than a pack.
    """

    def __init__(
        self, examples: Examples, mixture: Mixture, *, packing: Packing | None = None, epochs: float = 1,
        max_steps: int | None = None, items_per_step: int = 1,
    ) -> None:  # fmt: skip
        if items_per_step < 1 or not (epochs > 0 if max_steps is None else max_steps > 0):
            raise InputError(f"nothing to do: {epochs} epochs, {max_steps} steps of {items_per_step} items")
        if packing is not None and not packing.split:
            _check_lengths(examples, packing)
        self.examples, self.packing = examples, packing
        plan = _Planner(mixture, examples.lengths, packing)
        if max_steps is not None:
            self.plan = plan.of_items(max_steps * items_per_step)
        else:
            self.plan = plan.of_rows(math.ceil(epochs * mixture.length))
            if over := len(self.plan) % items_per_step:
                self.plan = plan.of_items(len(self.plan) + items_per_step - over)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        examples, (rows, starts, stops) = self.examples, self.plan.pieces(index % len(self))
        begins, lengths = examples.offsets[rows], stops - starts
        parts = zip((begins + starts).tolist(), (begins + stops).tolist(), strict=True)
        offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)  # [t] where each token's sample begins
        positions = np.arange(len(offsets)) - offsets
        inside = positions + np.repeat(starts, lengths)  # [t] place in the whole row
        return Item(
            tokens=np.concatenate([examples.tokens[start:stop] for start, stop in parts]),
            positions=positions,
            loss=(inside >= np.repeat(examples.first_target[rows], lengths)) & (positions > 0),
            lengths=lengths, rows=rows, weights=examples.weights[rows],
        )  # fmt: skip

    def rows(self, items: Sequence[int] | Ints) -> Ints:
        """[n] rows of items, in order: a row for each sample, or piece of one, that they hold."""
        found = [self.plan.pieces(int(i))[0] for i in items]
        return np.concatenate(found) if found else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Collator:
    """Items to a batch of tensors on the CPU.

    input_ids, position_ids [b, t] int64 (positions from 0 in each sample); loss_mask [b, t] bool, True at targets;
    segment [b, t] int64, which of the batch's n samples a token is of, -1 = padding; weight [n] float32 and row [n]
    int64 of the samples in their order; where each row is one sample: attention_mask [b, t] int64, 1 = token, 0 =
    padding. Padding is on the right. What is padding, and what is a target, the masks say: the padding token may well
    be the end token.

    Packs and blocks are rows too, and their samples are kept apart by the positions, which transformers sees where it
    gets no attention_mask and no cache: call the model with `use_cache=False`. Attention then costs the square of a
    pack, not of a batch. Flash attention finds samples in one row only: `one_row` puts all items into it, [1, T].

    Attributes:
        pad: token of the padding; any will do.
        one_row: no padding at all, for flash attention's kernels with variable lengths.
        multiple_of: padded rows, and only they, are as long as a multiple of this.
    """

    pad: int = 0
    one_row: bool = False
    multiple_of: int = 1

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The batch of items."""
        lengths = np.concatenate([item.lengths for item in items])
        segment = np.repeat(np.arange(len(lengths)), lengths)  # [T]
        if self.one_row:
            batch: dict[str, NDArray[Any]] = {
                "input_ids": np.concatenate([item.tokens for item in items])[None].astype(np.int64),
                "position_ids": np.concatenate([item.positions for item in items])[None],
                "loss_mask": np.concatenate([item.loss for item in items])[None],
                "segment": segment[None],
            }
        else:
            batch = self._rows(items, segment)
        batch["weight"] = np.concatenate([item.weights for item in items])
        batch["row"] = np.concatenate([item.rows for item in items])
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _rows(self, items: Sequence[Item], segment: Ints) -> dict[str, NDArray[Any]]:
        ends = np.cumsum([len(item.tokens) for item in items])
        t = max(len(item.tokens) for item in items)
        shape = len(items), -(-t // self.multiple_of) * self.multiple_of
        batch: dict[str, NDArray[Any]] = {
            "input_ids": np.full(shape, self.pad, np.int64), "position_ids": np.zeros(shape, np.int64),
            "loss_mask": np.zeros(shape, np.bool_), "segment": np.full(shape, -1, np.int64),
        }  # fmt: skip
        for i, (item, end) in enumerate(zip(items, ends.tolist(), strict=True)):
            n = len(item.tokens)
            batch["input_ids"][i, :n], batch["loss_mask"][i, :n] = item.tokens, item.loss
            batch["segment"][i, :n] = segment[end - n : end]
            batch["position_ids"][i, :n] = item.positions
        longest = max(int(item.lengths.max()) for item in items)
        singles = all(len(item.rows) == 1 for item in items)
        for i, item in enumerate(items):
            # Padding has positions that a sample has, no more: models have no others, or change all for longer ones.
            # Behind a sample alone they go on, as a fall back to 0 is how a pack is recognised.
            n, after = len(item.tokens), item.positions[-1] + 1 if singles else 0
            batch["position_ids"][i, n:] = after + np.arange(shape[1] - n) % (shape[1] if singles else longest)
        if singles:
            batch["attention_mask"] = (batch["segment"] >= 0).astype(np.int64)
        return batch


def step_rows(items: Items, step: int, batch_size: int, accumulation: int = 1, world_size: int = 1) -> Ints:
    """[n] rows that all processes together saw in a step: micro-batch by micro-batch, in each process by process.

    What Trainer and accelerate feed with `dataloader_drop_last=False` and their other defaults: where the items do not
    fill the last batch of each process, the run's first items fill it (one process: the batch stays short).

    Args:
        items: the data set of the run.
        step: 0 = first; Trainer's `state.global_step` while it runs.
        batch_size: items a process takes at once.
        accumulation: micro-batches of a step.
        world_size: data-parallel processes.

    Raises:
        IndexError: the run has no such step.
    """
    a_batch, total = batch_size * world_size, len(items)
    fed = total if world_size == 1 else -(-total // a_batch) * a_batch
    start = step * a_batch * accumulation
    if not 0 <= start < fed:
        raise IndexError(f"step {step} of a run of {-(-fed // (a_batch * accumulation))} steps")
    places = np.arange(start, min(start + a_batch * accumulation, fed))
    again = (places - total) % min(total, a_batch)
    return items.rows(np.where(places < total, places, again))


# --- which rows an item holds ---


@dataclass(frozen=True, eq=False)
class Plan:
    """What each item holds: piece k is tokens starts[k] … stops[k] - 1 of row rows[k], item i has pieces bounds[i] …"""

    rows: Ints
    starts: Ints
    stops: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, item: int) -> tuple[Ints, Ints, Ints]:
        """(rows, starts, stops) [s] of an item."""
        part = slice(self.bounds[item], self.bounds[item + 1])
        return self.rows[part], self.starts[part], self.stops[part]


class _Planner:
    """Plans of the same endless order: a longer run begins as a shorter one does."""

    def __init__(self, mixture: Mixture, lengths: Ints, packing: Packing | None) -> None:
        self.mixture, self.lengths, self.packing = mixture, lengths, packing

    def of_rows(self, n: int) -> Plan:
        """The first n rows of the order."""
        order = self.mixture.order(0, n)
        if self.packing is None:
            return _whole(order, self.lengths, np.arange(n + 1))
        if self.packing.split:
            return _blocks(order, self.lengths, self.packing.length, None)
        packer = _Packer(self.packing)
        return _packs(order, self.lengths, packer.put(self.lengths[order]), packer.opened)

    def of_items(self, n: int) -> Plan:
        """The first n items of the endless order."""
        if self.packing is None:
            return self.of_rows(n)
        order, numbers, tokens, packer, at = list[Ints](), list[Ints](), 0, _Packer(self.packing), 0
        while (tokens < n * self.packing.length) if self.packing.split else (packer.closed < n):
            order.append(self.mixture.order(at, at + min(at or 256, CHUNK)))  # how many it takes shows on the way
            at, lengths = at + len(order[-1]), self.lengths[order[-1]]
            tokens += int(lengths.sum())
            if not self.packing.split:
                numbers.append(packer.put(lengths))
        if self.packing.split:
            return _blocks(np.concatenate(order), self.lengths, self.packing.length, n)
        return _packs(np.concatenate(order), self.lengths, np.concatenate(numbers), n)


class _Packer:
    """First fit over the open packs, the oldest first."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.closed = 0  # packs that get nothing more
        self._rooms: list[int] = []  # of the open packs

    @property
    def opened(self) -> int:
        """Packs that hold something."""
        return self.closed + len(self._rooms)

    def put(self, lengths: Ints) -> Ints:
        """[n] the pack of each of the next n samples."""
        found, rooms = np.empty(len(lengths), np.int64), self._rooms
        for k, length in enumerate(lengths.tolist()):
            place = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
            if place == len(rooms):
                if place == self.packing.window:
                    del rooms[0]
                    self.closed, place = self.closed + 1, place - 1
                rooms.append(self.packing.length)
            rooms[place] -= length
            found[k] = self.closed + place
        return found


def _whole(rows: Ints, lengths: Ints, bounds: Ints) -> Plan:
    return Plan(rows, np.zeros(len(rows), np.int64), lengths[rows], bounds)


def _packs(order: Ints, lengths: Ints, numbers: Ints, n: int) -> Plan:
    """The first n packs; within a pack samples keep the order."""
    by_pack = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[by_pack], np.arange(n + 1))
    return _whole(order[by_pack[: bounds[-1]]], lengths, bounds)


def _blocks(order: Ints, lengths: Ints, length: int, n: int | None) -> Plan:
    """All tokens of the rows cut into blocks; the first n of them, or all with a shorter last one."""
    ends = np.cumsum(lengths[order])  # [rows] where each row ends in the running text
    total = int(ends[-1]) if n is None else n * length
    blocks = -(-total // length)
    cuts = np.union1d(ends[ends < total], np.minimum(np.arange(1, blocks + 1) * length, total))  # [pieces] piece ends
    begins = np.concatenate([[0], cuts[:-1]])
    which = np.searchsorted(ends, begins, side="right")  # the row that a piece is of
    at = ends[which] - lengths[order[which]]  # where that row begins
    bounds = np.searchsorted(begins, np.arange(blocks + 1) * length)
    bounds[-1] = len(cuts)
    return Plan(order[which], begins - at, cuts - at, bounds)


def _check_lengths(examples: Examples, packing: Packing) -> None:
    longest = int(examples.lengths.argmax())
    if (most := int(examples.lengths[longest])) > packing.length:
        raise InputError(
            f"a pack holds {packing.length} tokens, the row with uid {examples.uid[longest]} has {most}",
            remedy=f"packs of {most} tokens, or max_length={packing.length} and too_long: truncate or drop",
        )
