"""What a run over several answers of a prompt needs before its first step: sets, references, targets, constraints.

For the methods PBL, DPO and COPR. It owns where log π_ref comes from (the manifest, or the model before training) and
how log P* and d_i are computed from it. It knows neither the trainer nor the losses of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.errors import InputError
from curate.manifest import read
from curate.models.weights import model_folder, weights_hash
from train.config import AnswersConfig, CoprConfig
from train.losses.copr import advantages, draw_scale, fit_loss, optimal_logps
from train.methods.answers import answer_values
from train.prefix import Cost, shares_prefixes
from train.sets import Kind, SetCollator, Sets

Values = NDArray[np.float64]


def read_sets(
    config: AnswersConfig, folders: Sequence[str], tokenizer: Any, ends: set[int], kind: Kind, context: int | None,
    origins: Sequence[str] = ("current", "replay", "augmented"),
) -> list[Sets]:  # fmt: skip
    """The sets of each folder.

    Raises:
        InputError: nothing usable at all; answers that do not fit where `too_long` is error.
    """
    most = min((n for n in (config.max_length, context) if n is not None), default=None)
    manifests = [read(config.path(folder)) for folder in folders]
    policy = policy_hash(config) if config.reference == "manifest" else None
    found = [Sets.of(m, tokenizer, kind=kind, ends=ends, policy=policy, max_length=most, origins=origins)
             for m in manifests]  # fmt: skip
    if not any(len(sets.tokens) for sets in found):
        raise _nothing(folders, kind)
    for folder, sets in zip(folders, found, strict=True):
        long = sets.left_out.filter(sets.left_out["reason"].str.contains("fit beside the prompt"))
        if long.height and config.too_long == "error":
            raise InputError(
                f"{folder}: {long.height} answers do not fit into {most} tokens beside their prompt, the first is "
                f"completion {long['uid'][0]} of prompt {long['prompt_uid'][0]}: {long['reason'][0]}",
                remedy="set too_long=drop (leaves such answers out and lists them)",
            )
    return found


def policy_hash(config: AnswersConfig) -> str | None:
    """Names the weights that training starts from, as a manifest's `policy` does."""
    if config.model is None:
        return None
    folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
    return weights_hash(folder)


def collator(config: AnswersConfig, model: Any, pad: int, gold: bool) -> SetCollator:
    """Batches of sets, in the layout that this model obeys.

    Raises:
        InputError: the layout `shared` for a model that does not obey a block mask.
    """
    layout = config.layout
    if layout != "separate" and not shares_prefixes(model.eval()):
        if layout == "shared":
            raise InputError("layout shared: this model's attention takes no block mask",
                             remedy="set layout=separate, or attention=sdpa")  # fmt: skip
        layout = "separate"
    return SetCollator(gold=gold, layout=layout, cost=Cost.of(model), limit=config.row_length, pad=pad)


@torch.no_grad()
def measure(model: Any, sets: Sets, collate: SetCollator, batch_size: int) -> Values:
    """Log π of every answer under a model, [a], nats, summed over its tokens."""
    plain, device = replace(collate, gold=False), next(model.parameters()).device
    model.eval()
    found = np.zeros(len(sets.tokens))
    for start in range(0, len(sets), batch_size):
        rows = [row for row in range(start, min(start + batch_size, len(sets))) if len(sets.answers(row))]
        if rows:
            batch = plain.batch(sets, rows)
            logps = answer_values(model, {key: value.to(device) for key, value in batch.items()})[1]
            found[batch["answer"].numpy()] = logps.double().cpu().numpy()
    return found


def references(config: AnswersConfig, sets: Sets, now: Callable[[], Values]) -> Values:
    """Log π_ref of every answer, [a], summed: as stored, or as `now` measures it under the model before training.

    Raises:
        InputError: a stored one is missing, or not finite.
    """
    if config.reference == "measure":
        return now()
    bad = np.flatnonzero(~np.isfinite(sets.logps))
    if bad.size:
        first = int(bad[0])
        row = int(np.searchsorted(sets.bounds, first, side="right")) - 1
        what = "not there" if np.isnan(sets.logps[first]) else str(sets.logps[first])
        raise InputError(
            f"{', '.join(sets.rows.sources)}: the log-probability of {bad.size} of {len(sets.logps)} answers is "
            f"missing or infinite, the first of completion {sets.uid[first]} of prompt {sets.rows.uid[row]}: {what}",
            remedy="build with `policy` naming this model (rollouts at temperature 1, top_p 1), or set "
            "reference=measure: the model before training then measures them",
        )
    return sets.logps


def targets(sets: Sets, ref: Values, beta: float, seed: int) -> Values:
    """COPR's log P* of every answer, [a], from log π_{t−1} and ranks: each prompt over its own answers."""
    found = np.zeros(len(ref))
    for row in range(len(sets)):
        at = slice(int(sets.bounds[row]), int(sets.bounds[row + 1]))
        ranks = torch.from_numpy(sets.rank[at].astype(np.int64))[None]
        r = torch.tensor([draw_scale(sets.rows.uid[row], ranks.shape[1], seed)], dtype=torch.float64)
        logps = torch.from_numpy(ref[at])[None]
        found[at] = optimal_logps(logps, advantages(ranks, r), beta)[0].numpy()
    return found


def fits(sets: Sets, logps: Values, target: Values, distance: Any) -> Values:
    """COPR's distance of every prompt, [n]."""
    found = np.zeros(len(sets))
    for row in range(len(sets)):
        at = slice(int(sets.bounds[row]), int(sets.bounds[row + 1]))
        found[row] = fit_loss(torch.from_numpy(logps[at])[None], torch.from_numpy(target[at])[None], None, distance)[0]
    return found


def per_token(sets: Sets, sums: Values, config: CoprConfig | Any) -> Values:
    """Sums over tokens as the run's reduction has them."""
    return sums / np.array([len(t) for t in sets.tokens]) if config.reduction == "mean" else sums


def as_replay(sets: Sets) -> Sets:
    """The same, as rows of origin `replay`."""
    rows = replace(sets.rows, origin=np.zeros(len(sets), np.int32), origin_names=("replay",))
    return replace(sets, rows=rows)


def _nothing(folders: Sequence[str], kind: Kind) -> InputError:
    if kind == "ranked":
        return InputError(f"{', '.join(folders)}: no prompt has two ranked answers that differ",
                          remedy="build with a source of format `ranked` or `preference`, or with `rollouts` and a "
                          "reward")  # fmt: skip
    return InputError(f"{', '.join(folders)}: no answer has a similarity to its target",
                      remedy="build with `rollouts` and `candidates: {similarity: true}`")  # fmt: skip
