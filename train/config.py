"""The settings of a training run: our own keys here, and every key of transformers' TrainingArguments by its own name.

`train cft --config run.yaml data=runs/superni learning_rate=1e-5`: a key that is not ours goes to TrainingArguments
(learning_rate, per_device_train_batch_size, num_train_epochs, report_to, deepspeed, fsdp, …), so that nothing has two
names. LoRA's keys are those of peft.LoraConfig.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from curate.manifest.remote import fetched, is_url
from curate.models import ModelConfig, RewardConfig
from curate.settings import FUNCTION, Section


def one_or_several(value: Any) -> Any:
    """A list of one text where it stands alone."""
    return [value] if isinstance(value, str) else value


Folders = Annotated[list[str], BeforeValidator(one_or_several)]
"""Several, or one without brackets."""


class KlConfig(Section):
    """KL(π_θ ‖ π_ref) per token of the answers."""

    weight: float = Field(ge=0, allow_inf_nan=False, description="λ; 0 = off")
    reference: str | None = Field(None, description="folder or hub name of π_ref; by default the model before training")


class EwcConfig(Section):
    """Elastic weight consolidation: ½ λ Σ F (θ − θ*)², summed over the given Fisher folders."""

    weight: float = Field(ge=0, allow_inf_nan=False, description="λ; 0 = off")
    fisher: Folders = Field(min_length=1, description="folders that `train fisher` wrote, one an older task")


class OLoraConfig(Section):
    """O-LoRA: a new adapter orthogonal to the frozen ones of older tasks."""

    weight: float = Field(0.5, ge=0, allow_inf_nan=False, description="λ₁ of Σ |A_old A_newᵀ|")
    previous: Folders = Field(min_length=1, description="adapter folders of older tasks, in the order of training")


class RunConfig(Section):
    """A run, whatever its method."""

    model: str | None = Field(None, description="folder or hub name of a causal language model, safetensors only")
    init: str | None = Field(None, description="instead of model: a config.json that random weights are made from")
    tokenizer: str | None = Field(None, description="folder or hub name; by default the model's")
    data: Folders = Field(min_length=1, description="manifest folder or its URL (s3://, gs://, hf://), or several")
    eval_data: Folders = Field(default_factory=list, description="manifests whose samples are only evaluated")
    out: str = Field(description="run folder: checkpoints, the final model, what was seen")
    max_length: int | None = Field(
        None, gt=1, description="longest sample in tokens; by default, and at most, the model's context"
    )
    too_long: Literal["error", "truncate", "drop"] = Field("error", description="what becomes of a longer sample")
    mixture: dict[str, float] | None = Field(
        None, description="exact shares by origin or task: {current: 0.8, replay: 0.2}; null = every row once an epoch"
    )
    packing: bool = Field(False, description="samples end to end without padding, none of them split")
    pack_length: int | None = Field(None, gt=1, description="tokens of a pack; by default max_length")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights in memory; auto: bfloat16 on a GPU where only an adapter is trained, else "
        "float32, for small steps are lost in bfloat16 weights (matrix products are bfloat16 on a GPU: `bf16`)"
    )  # fmt: skip
    save_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the final model; auto: as trained"
    )
    attention: str | None = Field(None, description="transformers' attn_implementation: sdpa, flash_attention_2, …")
    lora: dict[str, Any] | None = Field(None, description="keys of peft.LoraConfig: {r: 16, use_dora: true}")
    merge: bool = Field(False, description="beside the adapter, write the model with it merged")
    resume: bool = Field(True, description="go on from the newest whole checkpoint of `out`")
    base: str = Field(".", exclude=True, description="folder that paths are relative to; set by load()")
    _copies: dict[str, Path] = PrivateAttr(default_factory=dict)

    @field_validator("lora")
    @classmethod
    def _known_to_peft(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            from peft import LoraConfig

            known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
            if wrong := sorted(value.keys() - known):
                raise ValueError(f"unknown key {wrong[0]!r} of peft.LoraConfig")
        return value

    @model_validator(mode="after")
    def _one_start(self) -> RunConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give `model` (weights to start from) or `init` (a config.json for random weights)")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("`init` needs `tokenizer`")
        if self.pack_length is not None and not self.packing:
            raise ValueError("`pack_length` belongs to `packing: true`")
        return self

    def path(self, name: str) -> Path:
        """A path of the settings: relative to the file where it is there, else to the working directory.

        A URL is a manifest's: the local copy, which stays the same as long as these settings live.
        """
        if is_url(name):
            if name not in self._copies:
                self._copies[name] = fetched(name)
            return self._copies[name]
        beside = Path(self.base) / name
        return beside if beside.exists() else Path(name)


class CftConfig(RunConfig):
    """Continual fine-tuning: weighted NLL, and what holds the old tasks."""

    kl: KlConfig | None = Field(None, description="stay near a reference")
    ewc: EwcConfig | None = Field(None, description="hold the weights that older tasks needed")
    o_lora: OLoraConfig | None = Field(None, description="an adapter orthogonal to older ones; needs `lora`")

    @model_validator(mode="after")
    def _adapter(self) -> CftConfig:
        if self.ewc is not None and self.lora is not None:
            raise ValueError("`ewc` with `lora`: EWC holds the weights, and an adapter leaves them alone; use `o_lora`")
        if self.o_lora is not None and self.lora is None:
            raise ValueError("`o_lora` needs `lora`: {r: 8}")
        if self.o_lora is not None and self.lora is not None and self.lora.get("use_dora"):
            raise ValueError("`o_lora` with `use_dora`: DoRA's magnitude makes several adapters on one layer undefined")
        return self


class CptConfig(RunConfig):
    """Continued pre-training: the loss is on all tokens."""

    packing: bool = Field(True, description="always: rows behind one another, cut into blocks of `pack_length`")

    @field_validator("packing")
    @classmethod
    def _always(cls, value: bool) -> bool:
        if not value:
            raise ValueError("continued pre-training is always packed: leave it out")
        return value


class AnswersConfig(RunConfig):
    """What methods over several answers of a prompt share."""

    too_long: Literal["error", "drop"] = Field("error", description="what becomes of an answer that does not fit")
    reference: Literal["manifest", "measure"] = Field(
        "manifest", description="log π_ref: as the manifest has it (of the policy `model`), or measured by the model "
        "before training"
    )  # fmt: skip
    layout: Literal["auto", "shared", "separate"] = Field(
        "auto",
        description="answers share their prompt's row, or each has one; auto: what is cheapest, prompts behind "
        "one another included",
    )
    row_length: int | None = Field(4096, gt=1, description="tokens of a shared row at most; null = no limit")

    @model_validator(mode="after")
    def _no_packs(self) -> AnswersConfig:
        if self.init is not None and self.reference == "manifest":
            raise ValueError("`init`: no manifest knows log π of random weights; set reference: measure")
        if self.packing:
            raise ValueError("`packing` is for single answers; here `layout` decides what shares a row")
        return self


class PblConfig(AnswersConfig):
    """PBL: towards answers that agree with the target, off those that conflict with it, and to the target itself."""

    threshold: float = Field(0.7, ge=-1, le=1, description="similarity from which an answer agrees, a cosine")
    alpha: float = Field(1.0, ge=0, allow_inf_nan=False, description="α of the agreeing answers")
    beta: float = Field(1.0, ge=0, allow_inf_nan=False, description="β of the conflicting ones")
    gamma: float = Field(1.0, ge=0, allow_inf_nan=False, description="γ of the target's NLL")
    negative: Literal["bounded", "literal"] = Field("bounded", description="the conflicting term; literal: the paper's")
    b: float = Field(1.0, gt=0, allow_inf_nan=False, description="how soon the bounded term lets go, 1/nat")


class DpoConfig(AnswersConfig):
    """DPO and IPO, with KL to the old policy."""

    loss: Literal["dpo", "ipo"] = Field("dpo", description="the pairs' loss")
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="β, 1/nat")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round")
    reduction: Literal["sum", "mean"] = Field("sum", description="log-probability of an answer: over its tokens")
    gamma: float = Field(0.0, ge=0, allow_inf_nan=False, description="γ of the best answer's NLL")
    kl: KlConfig | None = Field(None, description="stay near a reference, over the tokens of the answers")


class CoprConfig(AnswersConfig):
    """COPR: the policy is fitted to the optimum of its own update; older optima are constraints."""

    beta: float = Field(0.1, ge=1e-6, allow_inf_nan=False, description="β of P* ∝ π_{t−1} · exp(Adv/β): small = bold")
    gamma: float = Field(1.0, ge=0, allow_inf_nan=False, description="γ of the best answer's NLL")
    fit: Literal["mse", "kl"] = Field("mse", description="distance of log P_θ and log P*; kl is an ablation")
    reduction: Literal["sum", "mean"] = Field("sum", description="log-probability of an answer: over its tokens")
    buffers: Folders = Field(default_factory=list, description="folders `buffer` of all older stages, in their order")
    constraint: Literal["dual", "fixed", "replay", "none"] = Field(
        "dual", description="what buffers are for: fixed: λ stays; replay: fitted as the current task; none: nothing"
    )
    initial: float = Field(1.0, gt=0, allow_inf_nan=False, description="λ_i at the start")
    rate: float = Field(0.1, ge=0, allow_inf_nan=False, description="learning rate of the dual ascent of ln λ")
    clamp: tuple[float, float] = Field((-5.0, 5.0), description="least and most ln λ")
    keep: float = Field(
        0.05, ge=0, le=1, description="share of the task's prompts that its buffer keeps, at least one; with few of "
        "them, give `mixture` a share of replay, so that steps see them"
    )  # fmt: skip

    @model_validator(mode="after")
    def _interval(self) -> CoprConfig:
        low, high = self.clamp
        if not -math.inf < low <= math.log(self.initial) <= high < math.inf:
            raise ValueError(f"`clamp`: [{low:g}, {high:g}] must be an interval that ln `initial` lies in")
        if len(set(self.buffers)) < len(self.buffers):
            raise ValueError("`buffers`: one is named twice")
        return self


class RolloutConfig(Section):
    """Phases: fresh samples of the policy, each gone through several times."""

    prompts: int = Field(32, gt=0, description="of a phase")
    k: int = Field(1, gt=0, description="completions of a prompt")
    max_new_tokens: int = Field(64, gt=0, description="longest completion")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of sampling, and of every log π")
    passes: int = Field(2, gt=0, description="over the samples of a phase: its steps are prompts · k · passes / batch")
    batch_size: int = Field(32, gt=0, description="sequences of a forward pass that draws or measures")
    show: int = Field(1, ge=0, description="every how many phases the best and the worst sample are shown; 0 = never")
    offline: bool = Field(False, description="nothing is drawn: the manifest's own rollouts, with their rewards")
    server: ModelConfig | None = Field(
        None, description="OpenAI-compatible server that draws; keeping its weights those of the policy is up to you"
    )
    sync: str | None = Field(
        None, pattern=FUNCTION,
        description="package.module:function(folder, phase), called before each phase with the policy's weights",
    )  # fmt: skip
    staleness: int = Field(
        0, ge=0, description="phases by which the weights that draw may be older than those that are trained: so far "
        "ahead the `server` is asked, while older phases are trained on; 0 = each phase waits for its own"
    )  # fmt: skip
    importance_clip: float = Field(
        2.0, ge=1, allow_inf_nan=False, description="staleness: c of w = min(c, π/μ), by which advantages count"
    )

    @model_validator(mode="after")
    def _one_source(self) -> RolloutConfig:
        if self.sync is not None and self.server is None:
            raise ValueError("`sync` keeps a `server` up to date, and there is none")
        if self.server is not None and self.offline:
            raise ValueError("`offline` draws nothing, so there is nothing for a `server` to do")
        if self.server is not None and self.server.backend != "api":
            raise ValueError("`server`: give base_url and backend: api; without a server the policy itself draws")
        if self.staleness and self.server is None:
            raise ValueError("`staleness` is of a `server` that draws while the policy is trained, and there is none")
        if self.staleness and self.sync is None:
            raise ValueError("`staleness`: weights that no `sync` publishes have no age that could be bounded")
        if self.staleness and self.temperature != 1:
            raise ValueError("`staleness` needs the server's log-probabilities, which are of temperature 1")
        return self


class RewardKlConfig(Section):
    """The KL to a reference: in the reward of each token, or (advantages: group) in the loss."""

    coef: float = Field(0.05, ge=0, allow_inf_nan=False, description="at the start")
    target: float | None = Field(None, gt=0, description="nats a sample that the coefficient aims at; null = it stays")
    horizon: float = Field(10_000, gt=0, allow_inf_nan=False, description="samples in which it moves")
    most: float = Field(
        100.0, gt=0, description="nats a sample from the reference, or from where a phase began, at which the run stops"
    )  # fmt: skip
    reference: str | None = Field(None, description="folder or hub name; by default the model before training")

    @model_validator(mode="after")
    def _moves(self) -> RewardKlConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("`target` multiplies `coef`, and 0 stays 0: give kl.coef")
        return self


class RetentionConfig(Section):
    """CPPO's retention: the square of log π_θ − log π_{t−1}, by β."""

    weight: float = Field(0.1, ge=0, allow_inf_nan=False, description="0 = off")
    anchor: Literal["previous_task", "rollout"] = Field(
        "previous_task",
        description="π_{t−1}: `model`, or the policy that drew the sample (the official code); offline its log π is "
        "the stored one",
    )
    model: str | None = Field(None, description="folder or hub name; by default the model before training")


class WeightsConfig(Section):
    """CPPO's α and β, by the bucket of a sample."""

    kind: Literal["none", "heuristic", "learned"] = Field("heuristic", description="none: 1 and 1, plain PPO")
    lead: Literal["reward", "probability"] = Field("reward", description="which score α follows")
    k: float = Field(0.5, ge=0, allow_inf_nan=False, description="threshold of the buckets, standard deviations")
    lb: float = Field(0.5, ge=0, le=1, description="least weight")
    ub: float = Field(2.5, ge=1, allow_inf_nan=False, description="largest weight")
    power: Literal[1, 2] = Field(2, description="learned: p of β")
    tau: float = Field(0.1, ge=0, allow_inf_nan=False, description="learned: τ of the order of the buckets")


class ValueConfig(Section):
    """V of the state before each token (advantages: gae); trained without weight decay."""

    model: str | None = Field(None, description="a model of its own below the head; null: the policy's states")
    head: str | None = Field(
        None, description="value.safetensors of an older stage, with its folder `value` as `model` where it had one; "
        "null: begins at 0"
    )  # fmt: skip
    weight: float = Field(0.1, ge=0, allow_inf_nan=False, description="of its loss")
    clip: float = Field(0.2, gt=0, description="how far V may move from the phase's, in the reward's unit")


class CppoConfig(RunConfig):
    """CPPO: PPO on fresh rollouts, weighted by bucket, held to the policy of the task before."""

    too_long: Literal["error", "drop"] = Field("error", description="what becomes of a prompt without room to answer")
    rollouts: RolloutConfig = Field(RolloutConfig.model_validate({}), description="phases")
    reward: RewardConfig = Field(RewardConfig.model_validate({}), description="as `rollouts.reward` of a build")
    unjudged: float | None = Field(
        None,
        allow_inf_nan=False,
        description="of a completion that the reward gives no number; null: the run stops",
    )
    missing_end: float = Field(-1.0, allow_inf_nan=False, description="added to the reward of a completion cut off")
    advantages: Literal["gae", "group"] = Field("gae", description="group: GRPO, by the other samples of a prompt")
    scale: bool = Field(True, description="group: divide by the group's deviation")
    level: Literal["token", "sequence"] = Field("token", description="of the ratio; sequence (with group): GSPO")
    clip: float = Field(0.2, gt=0, description="ε of the ratio")
    gamma: float = Field(1.0, ge=0, le=1, description="γ, discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="λ of GAE")
    kl: RewardKlConfig = Field(RewardKlConfig.model_validate({}), description="to the reference")
    retention: RetentionConfig = Field(RetentionConfig.model_validate({}), description="to the task before")
    weights: WeightsConfig = Field(WeightsConfig.model_validate({}), description="α and β")
    value: ValueConfig = Field(ValueConfig.model_validate({}), description="the value function")
    ewc: EwcConfig | None = Field(None, description="hold the weights that older tasks needed")

    @model_validator(mode="after")
    def _fits(self) -> CppoConfig:
        if self.packing:
            raise ValueError("`packing` is for rows that are there before the run; samples here are fresh")
        if self.ewc is not None and self.lora is not None:
            raise ValueError("`ewc` with `lora`: EWC holds the weights, and an adapter leaves them alone")
        if self.eval_data:
            raise ValueError("`eval_data`: a policy is evaluated by its answers, with `train eval`")
        if self.kl.target is not None and self.rollouts.prompts * self.rollouts.k >= 5 * self.kl.horizon:
            raise ValueError("`kl.horizon` is in samples: more than a fifth of a phase (rollouts.prompts · rollouts.k)")
        if self.level == "sequence" and self.advantages != "group":
            raise ValueError("`level: sequence` is GSPO's, whose samples have one advantage each: advantages=group")
        if self.retention.model is not None and self.retention.anchor == "rollout":
            raise ValueError("`retention.model` is the anchor `previous_task`; `rollout` is the policy that drew")
        if self.advantages == "group" and self.rollouts.k < 2:
            raise ValueError("`advantages: group` compares the samples of a prompt: rollouts.k is 2 or more")
        if len(self.data) > 1:
            raise ValueError("`data`: one manifest; old prompts come back in it as replay")
        return self


class GrpoConfig(CppoConfig):
    """GRPO (GSPO: level=sequence), with CPPO's weights and retention where they are switched on."""

    rollouts: RolloutConfig = Field(RolloutConfig.model_validate({"prompts": 8, "k": 8}), description="phases")
    advantages: Literal["gae", "group"] = Field("group", description="by the other samples of a prompt")
    missing_end: float = Field(0.0, allow_inf_nan=False, description="added to the reward of a completion cut off")
    retention: RetentionConfig = Field(RetentionConfig.model_validate({"weight": 0}), description="to the task before")
    weights: WeightsConfig = Field(WeightsConfig.model_validate({"kind": "none"}), description="α and β")
