"""What a run over several answers of a prompt needs before its first step: sets, references, targets, constraints.

For the methods PBL, DPO and COPR. It owns where log π_ref comes from (the manifest, or the model before training) and
how log P* and d_i are computed from it. It knows neither the trainer nor the losses of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from curate.errors import InputError
from curate.manifest import Manifest, read
from curate.manifest.io import sha256_file
from curate.models.weights import model_folder, weights_hash
from train.buffers import TARGETS, chosen, read_buffer, write_buffer
from train.config import AnswersConfig, CoprConfig, DpoConfig, PblConfig
from train.folder import whole as whole_or_gone
from train.losses.copr import advantages, draw_scale, fit_loss, optimal_logps
from train.methods import Method
from train.methods.answers import Reduction, answer_values
from train.methods.copr import Copr
from train.methods.dpo import Dpo
from train.methods.pbl import Pbl
from train.prefix import Cost, shares_prefixes
from train.sets import Kind, SetCollator, Sets

Values = NDArray[np.float64]
BUFFER = "buffer"
EVERY = ("current", "replay", "augmented")


@dataclass(frozen=True, eq=False)
class Stage:
    """What a stage trains on and is held by.

    Attributes:
        sets: of the current task, and behind them those of the buffers; source 0, 1, ….
        manifest: of the current task.
        tasks: names of the old tasks, one a buffer.
    """

    sets: Sets
    manifest: Manifest
    tasks: list[str]

    def write_left_out(self, folder: Path) -> None:
        """List in the run folder what is not used."""
        self.sets.write_left_out(folder)


def read_stage(name: str, config: AnswersConfig, tokenizer: Any, ends: set[int], context: int | None) -> Stage:
    """The sets of a run.

    Raises:
        InputError: nothing usable; answers that do not fit; a buffer that is none, or of other settings.
    """
    if isinstance(config, CoprConfig) and len(config.data) > 1:
        raise InputError("data: COPR has one current task, in one manifest", remedy="older ones are `buffers`")
    own = ("current",) if name == "copr" else EVERY
    parts, tasks = [read_sets(name, config, config.data, tokenizer, ends, context, own)], list[str]()
    if isinstance(config, CoprConfig):
        most, seen = _most(config, context), dict[str, str]()
        for folder in config.buffers:
            where = config.path(folder)
            task, sets = read_buffer(where, tokenizer, config.beta, config.reduction, ends=ends, max_length=most)
            _refuse_long(folder, sets, config, most)
            stamp = sha256_file(where / TARGETS)
            if stamp in seen:
                raise InputError(f"buffers: {folder} and {seen[stamp]} are the same", remedy="name each task once")
            seen[stamp] = folder
            if config.constraint == "none":  # read all the same: a name that is wrong is told
                continue
            if not len(sets):
                raise InputError(f"buffer {folder}: none of its prompts has two answers that fit",
                                 remedy="a larger max_length, or leave it out of `buffers`")  # fmt: skip
            parts.append(as_replay(sets))
            tasks.append(task if task not in tasks else f"{task} ({len(tasks) + 1})")
    if isinstance(config, CoprConfig) and (config.mixture or {}).get("replay", 0) > 0 and not tasks:
        raise InputError("mixture: COPR's replay are its `buffers`, and none is given or used",
                         remedy="name the folders `buffer` of older stages, or leave `mixture` out")  # fmt: skip
    if tasks and config.mixture is not None and config.mixture.get("replay", 1) == 0:
        raise InputError("mixture: it leaves out the `buffers`, so nothing would hold the older tasks",
                         remedy="give replay a share, or set constraint=none")  # fmt: skip
    return Stage(Sets.concat(parts), read(config.path(config.data[0])), tasks)


def read_sets(
    name: str, config: AnswersConfig, folders: Sequence[str], tokenizer: Any, ends: set[int], context: int | None,
    origins: Sequence[str] = EVERY,
) -> Sets:  # fmt: skip
    """The sets of manifests, as one source.

    Raises:
        InputError: nothing usable at all; answers that do not fit where `too_long` is error.
    """
    kind: Kind = "compared" if name == "pbl" else "ranked"
    most, policy = _most(config, context), policy_hash(config) if config.reference == "manifest" else None
    found = [Sets.of(read(config.path(folder)), tokenizer, kind=kind, ends=ends, policy=policy, max_length=most,
                     origins=origins) for folder in folders]  # fmt: skip
    for folder, sets in zip(folders, found, strict=True):
        _refuse_long(folder, sets, config, most)
    if not any(len(sets.tokens) for sets in found):
        raise _nothing(folders, kind, found)
    whole = Sets.concat(found)
    where, ranked = ", ".join(folders), kind == "ranked"
    if not whole.rows.weights.any():
        raise InputError(f"{where}: column 'weight' is 0 for all prompts with answers", remedy="use weights of about 1")
    if name == "dpo" and not any(len(set(whole.rank[whole.bounds[i] : whole.bounds[i + 1]])) > 1
                                 for i in range(len(whole))):  # fmt: skip
        raise InputError(f"{where}: the answers of every prompt are tied", remedy="DPO needs two of unlike rank")
    asked = pl.concat([read(config.path(folder)).samples for folder in folders])
    if ranked and asked.filter(origin="current").height and not (whole.rows.groups("origin").keys() & {"current"}):
        raise InputError(f"{where}: no prompt of the current task has two ranked answers",
                         remedy="is it the right manifest? its current task has no ranked answers")  # fmt: skip
    return replace(whole, source=np.zeros_like(whole.source))


def _most(config: AnswersConfig, context: int | None) -> int | None:
    return min((n for n in (config.max_length, context) if n is not None), default=None)


def _refuse_long(folder: str, sets: Sets, config: AnswersConfig, most: int | None) -> None:
    long = sets.left_out.filter(sets.left_out["reason"].str.contains("fit beside the prompt"))
    if long.height and config.too_long == "error":
        raise InputError(
            f"{folder}: {long.height} answers do not fit into {most} tokens beside their prompt, the first is "
            f"completion {long['uid'][0]} of prompt {long['prompt_uid'][0]}: {long['reason'][0]}",
            remedy="set too_long=drop (leaves such answers out and lists them)",
        )


def policy_hash(config: AnswersConfig) -> str | None:
    """Names the weights that training starts from, as a manifest's `policy` does."""
    if config.model is None:
        return None
    folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
    return weights_hash(folder)


def collator(config: AnswersConfig, model: Any, pad: int, gold: bool, every: Sequence[Sets]) -> SetCollator:
    """Batches of sets, in the layout that this model obeys for all of them.

    Raises:
        InputError: the layout `shared` for a model that does not obey a block mask.
    """
    layout = config.layout
    longest = max(sets.longest for sets in every)
    if layout != "separate" and not shares_prefixes(model.eval(), longest):
        if layout == "shared":
            raise InputError("layout shared: this model's attention takes no block mask, or sees a window of less "
                             f"than {longest} tokens", remedy="set layout=separate, or attention=sdpa")  # fmt: skip
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


def fill(config: AnswersConfig, sets: Sets, model: Any, collate: SetCollator, batch_size: int, seed: int) -> None:
    """Log π_ref of every answer, and for COPR log P* where a buffer has not brought it, into the sets.

    Raises:
        InputError: a stored log-probability is missing, or not finite.
    """
    for i, tokens in enumerate(sets.tokens):
        if len(tokens) and int(tokens.max()) >= model.config.get_text_config().vocab_size:
            raise InputError(f"{', '.join(sets.rows.sources)}: completions.parquet, column 'token_ids' of uid "
                             f"{sets.uid[i]}: token {tokens.max()}, the model has "
                             f"{model.config.get_text_config().vocab_size}", remedy="build the manifest again with "
                             "this model as `policy`")  # fmt: skip
    if config.reference == "measure":
        sets.logps[:] = measure(model, sets, collate, batch_size)
    unset = np.isnan(sets.target) if isinstance(config, CoprConfig) else np.ones(len(sets.logps), bool)
    bad = np.flatnonzero(unset & ~np.isfinite(sets.logps))
    if bad.size:
        first = int(bad[0])
        row = int(np.searchsorted(sets.bounds, first, side="right")) - 1
        what = "not there" if np.isnan(sets.logps[first]) else str(sets.logps[first])
        raise InputError(
            f"{', '.join(sets.rows.sources)}: the log-probability of {bad.size} of {len(sets.logps)} answers is "
            f"missing or infinite, the first of completion {sets.uid[first]} of prompt {sets.rows.uid[row]}: {what}",
            remedy="build with `policy` naming this model (rollouts at temperature 1, top_p 1), or set "
            "reference=measure: the model before training then measures them"
            if config.reference == "manifest"
            else "look at the model's weights: its log-probabilities are no numbers",
        )
    if isinstance(config, CoprConfig):
        ref = per_token(sets, sets.logps, config.reduction)
        sets.target[unset] = targets(sets, np.where(unset, ref, 0), config.beta, seed)[unset]


def method_of(
    config: AnswersConfig, stage: Stage, model: Any, reference: Any, collate: SetCollator, batch_size: int
) -> Method:
    """The method of a run, with the constraints of COPR measured under the model before training."""
    if isinstance(config, PblConfig):
        return Pbl(config.threshold, config.alpha, config.beta, config.gamma, config.negative, config.b)
    if isinstance(config, DpoConfig):
        return Dpo(config.loss, config.beta, config.label_smoothing, config.reduction, config.gamma,
                   config.kl.weight if config.kl else 0.0, reference)  # fmt: skip
    assert isinstance(config, CoprConfig)
    tasks = [] if config.constraint == "replay" else stage.tasks
    if tasks:
        logps = per_token(stage.sets, measure(model, stage.sets, collate, batch_size), config.reduction)
        each = fits(stage.sets, logps, stage.sets.target, config.fit)
        stage.sets.start[:] = np.where(stage.sets.source > 0, each, 0)
    return Copr(
        tasks=tasks, log_lambda=torch.full((len(tasks),), math.log(config.initial)),
        distance=config.fit, gamma=config.gamma, reduction=config.reduction, constraint=config.constraint,
        rate=config.rate, low=config.clamp[0], high=config.clamp[1],
    )  # fmt: skip


def leave_buffer(config: CoprConfig, stage: Stage, tokenizer: Any, out: Path, seed: int) -> Path | None:
    """Write the buffer of the current task; None where `keep` is 0."""
    mine = np.flatnonzero(stage.sets.source == 0)
    places = chosen([stage.sets.rows.uid[i] for i in mine.tolist()], config.keep, seed)
    if not places:
        return None
    names = stage.sets.rows.task_names
    task = " + ".join(sorted({names[stage.sets.rows.task[i]] for i in mine.tolist()}))
    facts = {"task": task, "beta": config.beta, "reduction": config.reduction, "seed": seed,
             "policy": policy_hash(config)}  # fmt: skip
    rows = [int(mine[i]) for i in places]
    with whole_or_gone(out / BUFFER, "the model is there, and the same command writes the buffer"):
        return write_buffer(out / BUFFER, stage.manifest, stage.sets, rows, tokenizer, facts)


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


def per_token(sets: Sets, sums: Values, reduction: Reduction) -> Values:
    """Sums over tokens as a run's reduction has them."""
    return sums / np.array([len(t) for t in sets.tokens]) if reduction == "mean" else sums


def as_replay(sets: Sets) -> Sets:
    """The same, as rows of origin `replay`."""
    rows = replace(sets.rows, origin=np.zeros(len(sets), np.int32), origin_names=("replay",))
    return replace(sets, rows=rows)


def _nothing(folders: Sequence[str], kind: Kind, found: Sequence[Sets]) -> InputError:
    if any(sets.left_out["reason"].str.contains("fit beside the prompt").any() for sets in found):
        return InputError(f"{', '.join(folders)}: no answer fits beside its prompt",
                          remedy="a larger max_length, or a model of a longer context")  # fmt: skip
    if kind == "ranked":
        return InputError(f"{', '.join(folders)}: no prompt has two ranked answers",
                          remedy="build with a source of format `ranked` or `preference`, or with `rollouts` and a "
                          "reward")  # fmt: skip
    return InputError(f"{', '.join(folders)}: no answer has a similarity to its target",
                      remedy="build with `rollouts` and `candidates: {similarity: true}`")  # fmt: skip
