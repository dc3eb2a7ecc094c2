"""What a run of reinforcement learning begins with: prompts, reward, references, value function.

The method is `methods/cppo.py`, its phases are `rollouts.py`; the run itself is like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curate.errors import InputError
from curate.manifest import Manifest, Rule, read
from curate.models import (
    EmbedConfig,
    LocalModel,
    ModelConfig,
    Reward,
    Sampling,
    ServerModel,
    open_embedder,
    open_function,
    open_reward,
)
from curate.models.local import tokenizer_fingerprint
from curate.models.weights import model_folder
from train.config import CppoConfig
from train.data import Examples, check_fingerprints
from train.folder import whole
from train.layout import Layout
from train.logprobs import AdapterOff, token_values
from train.methods.cppo import Cppo
from train.models import check_vocabulary, end_tokens, open_model, read_fishers
from train.phases import Phases
from train.prefix import Cost, shares_prefixes
from train.rollouts import FOLDER, Rollouts, stored
from train.server import Server
from train.sets import LISTED

REQUESTS = ".requests"  # what a server has answered, so that a run that goes on does not ask again
VALUE = "value.safetensors"  # the head's weights, beside the final model


@dataclass(frozen=True)
class Prompts:
    """Samples of a manifest as prompts, what judges their answers, and the rows that are not used."""

    manifest: Manifest
    rows: Examples
    left_out: pl.DataFrame
    reward: Reward

    def write_left_out(self, folder: Path) -> Path | None:
        """List in the run folder what is not used, so that nothing disappears silently; None: nothing."""
        if not self.left_out.height:
            return None
        self.left_out.write_parquet(folder / LISTED)
        return folder / LISTED


def read_prompts(config: CppoConfig, tokenizer: Any, ends: Any, context: int | None) -> Prompts:
    """The prompts of a run.

    Raises:
        InputError: no prompt at all, or one that leaves no room for an answer (too_long: error); a reward that cannot
            be used; buckets by another rule; rollouts of another temperature (offline).
    """
    manifest = read(config.path(config.data[0]))
    reward = open_reward(config.reward, Path(config.base), open_embedder(EmbedConfig.model_validate({}),
                         Path(config.base)), "reward")  # fmt: skip
    every = Examples.of(manifest, tokenizer, ends=ends)
    room = min((n for n in (config.max_length, context) if n is not None), default=None)
    long = every.first_target + config.rollouts.max_new_tokens > (room or np.iinfo(np.int64).max)
    asked = {row["uid"] for row in manifest.samples.select("uid", "prompt").iter_rows(named=True) if row["prompt"]}
    silent = np.array([uid not in asked for uid in every.uid], bool)
    if long.any() and config.too_long == "error" and not config.rollouts.offline:
        first = int(np.flatnonzero(long)[0])
        raise InputError(
            f"{config.data[0]}: {int(long.sum())} prompts leave no room for {config.rollouts.max_new_tokens} tokens in "
            f"{room}, the first is uid {every.uid[first]}",
            remedy="set too_long=drop, or a smaller rollouts.max_new_tokens",
        )
    few = np.zeros(len(every), bool)
    _check_rule(config, manifest)
    if config.rollouts.offline:
        check_fingerprints(manifest, tokenizer)
        have = stored(manifest, config.rollouts.temperature)
        few = np.array([len(have.get(uid, ())) < config.rollouts.k for uid in every.uid], bool)
        long &= False  # nothing is drawn
    kept = np.flatnonzero(~(long | silent | few))
    if not len(kept):
        what = f"with a prompt and {config.rollouts.k} rollouts of known reward" if few.any() else "with a prompt"
        raise InputError(f"{config.data[0]}: no sample {what}")
    why = [{"uid": every.uid[i], "task": every.task_names[every.task[i]],
            "reason": "no prompt" if silent[i] else "too few rollouts" if few[i] else "no room for an answer"}
           for i in np.flatnonzero(long | silent | few).tolist()]  # fmt: skip
    return Prompts(
        manifest, every.take(kept), pl.DataFrame(why, schema=dict.fromkeys(("uid", "task", "reason"), pl.String)),
        reward,
    )  # fmt: skip


def _check_rule(config: CppoConfig, manifest: Manifest) -> None:
    """Training sorts by the manifest's own rule, new rollouts too; only the population is the phase."""
    rule = manifest.provenance.get("buckets", {}).get("rule")
    if rule and (rule["k"], rule["logp"]) != (config.weights.k, "mean"):
        raise InputError(
            f"{config.data[0]}: its buckets are by k = {rule['k']:g} and the {rule['logp']} of log-probabilities, this "
            f"run's by k = {config.weights.k:g} and their mean",
            remedy=f"set weights.k={rule['k']:g}" if rule["logp"] == "mean" else "build it with buckets.logp: mean",
        )


def cppo_of(
    config: CppoConfig, stage: Prompts, phases: Phases, model: Any, tokenizer: Any, device: torch.device, seed: int,
    say: Callable[[str], None], lockstep: bool = False, positions: int = 0,
) -> Cppo:  # fmt: skip
    """The method of a run, which has so many `positions`.

    Raises:
        InputError: a reward, a reference or a value function that cannot be used; dropout.
    """
    _check_dropout(model)
    of, how = config.rollouts, config.weights
    longest = int(stage.rows.first_target.max()) + of.max_new_tokens
    reference = _other(config, config.kl.reference, "kl.reference", model, tokenizer, device, longest)
    named, anchor = config.retention.model, None
    if config.retention.anchor == "previous_task":
        anchor = reference if named == config.kl.reference else _other(
            config, named, "retention.model", model, tokenizer, device, longest)  # fmt: skip
    head, critic = None, None
    if config.advantages == "gae":
        head, critic = _value(config, model, tokenizer, device, longest)
    asked = [model, *(m for m in (reference, anchor, critic) if isinstance(m, nn.Module))]
    rollouts = Rollouts(
        phases=phases, manifest=stage.manifest, examples=stage.rows, tokenizer=tokenizer,
        sampling=Sampling(of.k, of.temperature, 1.0, of.max_new_tokens, seed), reward=stage.reward,
        reward_id=stage.reward.fingerprint, unjudged=config.unjudged,
        rule=Rule(how.k, "mean", "batch"), reference=reference, anchor=anchor,
        out=Path(config.out), batch_size=of.batch_size, offline=of.offline,
        name=of.server.model if of.server else "policy in training",
        layout=_layout(asked, longest), server=_server(config, tokenizer), lockstep=lockstep, tell=say,
        staleness=of.staleness, total=-(-positions // phases.size),
    )  # fmt: skip
    return Cppo(
        rollouts=rollouts, head=head, critic=critic, advantages=config.advantages, scale=config.scale,
        level=config.level, clip=config.clip, gamma=config.gamma, lam=config.lam, value_clip=config.value.clip,
        value_weight=config.value.weight, missing_end=config.missing_end, kl=config.kl.coef,
        kl_target=config.kl.target, kl_horizon=config.kl.horizon, kl_most=config.kl.most,
        retention=config.retention.weight, weights=how.kind, lead=how.lead, k=how.k, bounds=(how.lb, how.ub),
        power=how.power, tau=how.tau, importance_clip=of.importance_clip, ewc=config.ewc.weight if config.ewc else 0.0,
        fishers=read_fishers([config.path(f) for f in config.ewc.fisher], model) if config.ewc else [],
        seed=seed, show=of.show, say=say,
    )  # fmt: skip


def _other(
    config: CppoConfig, named: str | None, where: str, model: Any, tokenizer: Any, device: Any, longest: int
) -> Any:
    """A model that stays: the one before training (of an adapter: the weights without it), or another."""
    if named is None and config.lora is not None:
        return AdapterOff(model, "default")
    if named is None and config.model is None:  # random weights are nowhere else
        other = deepcopy(model)
    else:
        other = open_model(config, named, where)
        if named is not None:
            _check_other(config, named, where, other, model, tokenizer, longest)
    return other.to(device).eval().requires_grad_(False)


def _check_other(
    config: CppoConfig, named: str, where: str, other: Any, model: Any, tokenizer: Any, longest: int
) -> None:
    """Whether another model can be asked about the policy's tokens.

    Raises:
        InputError: it has another vocabulary or tokenizer, too few positions, or takes no such batch.
    """
    where = f"{where} {named!r}"
    check_vocabulary(other, tokenizer, where)
    family = "an anchor speaks of the same tokens: name a model of this family"
    if other.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        sizes = f"{other.config.get_text_config().vocab_size:,} tokens, the model has "
        raise InputError(f"{where}: {sizes}{model.config.get_text_config().vocab_size:,}", remedy=family)
    folder, _ = model_folder(str(config.path(named)), Path(config.base), where)
    if (folder / "tokenizer.json").is_file():
        theirs = LocalModel(ModelConfig.model_validate(str(folder)), where=where).tokenizer
        if tokenizer_fingerprint(theirs, template=False) != tokenizer_fingerprint(tokenizer, template=False):
            raise InputError(f"{where}: its tokenizer is another one than the policy's", remedy=family)
    positions = getattr(other.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < longest:
        raise InputError(f"{where}: positions for {positions:,} tokens, the longest sample may have {longest:,}",
                         remedy="lower max_length or rollouts.max_new_tokens, with too_long=drop")  # fmt: skip
    prompt, answer = np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)
    try:
        with torch.no_grad():
            token_values(other.eval(), Layout().batch([prompt], [answer], [0]), ("logps",))
    except Exception as error:  # an architecture may object by any exception
        raise InputError(f"{where}: {type(other).__name__} cannot be asked for log-probabilities: {str(error)[:200]}",
                         remedy="name a model of the policy's architecture") from None  # fmt: skip


def _value(
    config: CppoConfig, model: Any, tokenizer: Any, device: Any, longest: int
) -> tuple[nn.Module, nn.Module | None]:
    critic = None
    if config.value.model is not None:
        critic = open_model(config, config.value.model, "value.model")
        _check_other(config, config.value.model, "value.model", critic, model, tokenizer, longest)
        critic = critic.to(device)
    width = (critic or model).config.get_text_config().hidden_size
    head = nn.Linear(width, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if config.value.head is not None:
        path = config.path(config.value.head)
        try:
            head.load_state_dict(load_file(path))
        except Exception as error:  # whatever a broken or foreign file raises, it cannot be used
            said = str(error).splitlines()[0][:200]
            raise InputError(f"value.head {path}: no value head of {width} numbers: {said}",
                             remedy=f"name the {VALUE} that an older stage of this model left") from None  # fmt: skip
    return head, critic


def _server(config: CppoConfig, tokenizer: Any) -> Server | None:
    of = config.rollouts
    if of.server is None:
        return None
    out = Path(config.out) / FOLDER
    sync = open_function(of.sync, Path(config.base), "rollouts.sync")[0] if of.sync else None
    return Server(ServerModel(of.server, out / REQUESTS), tokenizer, end_tokens(config, tokenizer), out, sync)


def _layout(models: Sequence[Any], longest: int) -> Layout:
    """Prompts are shared where every model that is asked obeys the mask."""
    shared = all(shares_prefixes(model.eval(), longest) for model in models)
    return Layout("auto", Cost.of(models[0])) if shared else Layout()


def _check_dropout(model: Any) -> None:
    """A pass that is trained on must be the one that was measured, else no ratio is 1."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or any(
        getattr(model.config, name, 0.0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
    ):
        raise InputError("the model has dropout: its ratios to the policy that drew a sample would be noise",
                         remedy="set lora.lora_dropout=0, or the dropout of the model's config.json to 0")  # fmt: skip


def write_value(method: Cppo, out: Path) -> None:
    """The value function for the next stage: its head, and in a folder the model below it where that is its own."""
    if method.critic is not None:
        staging = out / ".value"
        with whole(staging, "the same command ends the run from its last checkpoint"):
            shutil.rmtree(staging, ignore_errors=True)
            critic: Any = method.critic
            critic.save_pretrained(staging)
            method.rollouts.tokenizer.save_pretrained(staging)
        shutil.rmtree(out / "value", ignore_errors=True)
        staging.replace(out / "value")
    if method.head is not None:
        save_file({k: v.detach().cpu().contiguous() for k, v in method.head.state_dict().items()}, out / f".{VALUE}")
        (out / f".{VALUE}").replace(out / VALUE)
