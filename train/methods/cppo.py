"""CPPO: PPO on fresh rollouts whose samples differ in how much is learned from them, and how much they hold the past.

    L = mean_t α(x) L^CLIP + c_R · mean_t β(x) (log π_θ − log π_{t−1})² + c_V · mean_t L^VF

over the tokens of a step; α and β come from a sample's bucket (`train/losses/cppo.py`). `advantages="group"` is GRPO
(GSPO with level="sequence"): no values, and the KL to the reference is a term of the loss; weights and retention are
the same. A phase of samples is drawn, judged and measured before its first step (`train/rollouts.py`).

Asynchronous rollouts (`train/ahead.py`): an older policy μ drew the samples, and L^CLIP is the decoupled objective: its
r is π_θ/π_prox, π_prox the policy where the phase begins, and A counts by w = min(c, π_prox/μ), log μ as the server
told it. A token that it did not tell (an end token) has w = 1, a sample of which it told none that fits (its text
tokenises otherwise) is not learned from: w = 0. Everything else goes by log-probabilities measured where the phase
begins, as in a synchronous run: buckets, α and β, the KLs, the values, and retention.

Departures from the paper, or from official code: those of the losses, and
- Buckets' moments are those of the whole phase (the code: of the last chunk of 32 samples), whatever population the
  buckets of the manifest are over; k and the mean of log-probabilities must be the manifest's.
- `group` with level "token" divides by the tokens of the step (DAPO), where GRPO's paper takes each sample's mean
  first; samples of a prompt that a phase asks twice are one group.
- The adaptive coefficient follows the KL to the reference, per sample of a phase, and moves between phases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.layout import of_samples
from train.logprobs import token_values
from train.losses.cppo import (
    adapt_kl,
    gae,
    group_advantages,
    heuristic_weights,
    importance_weights,
    learned_weights,
    policy_loss,
    ratios,
    retention_loss,
    statistics,
    token_rewards,
    value_loss,
    whiten,
)
from train.methods.base import Batch, Logged, Memoryless, RunAway
from train.methods.ewc import Fisher, held, plain_name
from train.rollouts import BUCKETS, Rollouts, Samples

CALM = "raise kl.coef or give kl.target, or lower learning_rate"
STALE = 0.1  # nats a token between a server's log-probabilities and the policy's, beyond what half precision does


@dataclass
class Cppo(Memoryless):
    """Attributes: as in `train.config.CppoConfig`, and

    rollouts: makes the phases.
    fishers: of older tasks, for `ewc`.
    head: V of the last hidden state, [n, d] -> [n, 1]; None for `advantages="group"`.
    critic: a model of its own below the head; None: the policy's states.
    say: tells the user a line.
    show: phases from one that shows its best and its worst sample to the next; 0: none does.
    """

    rollouts: Rollouts
    head: nn.Module | None
    critic: nn.Module | None = None
    advantages: Literal["gae", "group"] = "gae"
    scale: bool = True
    level: Literal["token", "sequence"] = "token"
    clip: float = 0.2
    importance_clip: float = 2.0
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_weight: float = 0.1
    missing_end: float = -1.0
    kl: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000
    kl_most: float = 100.0
    retention: float = 0.1
    weights: Literal["none", "heuristic", "learned"] = "heuristic"
    lead: Literal["reward", "probability"] = "reward"
    k: float = 0.5
    bounds: tuple[float, float] = (0.5, 2.5)
    power: int = 2
    tau: float = 0.1
    ewc: float = 0.0
    fishers: list[Fisher] = field(default_factory=list)
    seed: int = 0
    show: int = 1
    say: Any = print
    name: str = "cppo"

    def __post_init__(self) -> None:
        self.number = -1  # of the phase that the state belongs to
        self.met = math.nan  # its KL to the reference, nats a sample
        self.samples: Samples | None = None
        self.made: dict[str, Tensor] = {}  # of the samples: advantages, returns [n, t]; alpha, beta [n]

    @property
    def phase(self) -> int | None:
        """The one that the samples are of."""
        return self.number

    def parameters(self) -> list[nn.Parameter]:
        """Of the value function."""
        return [p for module in (self.head, self.critic) if module is not None for p in module.parameters()]

    # --- phases ---

    def fill(self, model: Any, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """The samples of a step, after drawing those of its phase where it is the first."""
        number = int(batches[0]["phase"])
        if self.samples is None or number != self.number:
            self._begin(number, model)
        return [self._batch(batch["sample"].tolist()) for batch in batches]

    def _begin(self, number: int, model: Any) -> None:
        if number != self.number and self.kl_target is not None and math.isfinite(self.met):
            self.kl = adapt_kl(self.kl, self.met, self.kl_target, self.kl_horizon, self.rollouts.phases.samples)
        samples = self.rollouts.phase(number, model, self.head, self.critic)
        self.number, self.samples = number, samples
        self.met = float(((samples.logps - samples.reference) * samples.mask).sum() / len(samples.row))
        if not self.met <= self.kl_most:
            raise RunAway(f"phase {number + 1}: the policy is {self.met:.1f} nats a sample from its reference, kl.most "
                          f"is {self.kl_most:g}", CALM)  # fmt: skip
        if float(samples.ended.sum()) == 0:
            self.say(f"phase {number + 1}: no completion has ended within rollouts.max_new_tokens")
        self.made = self._worth(samples)
        self.say(self._line(samples))
        if len(samples.score) > 1 and float(samples.score.std()) == 0:
            self.say(f"  every reward is {float(samples.score[0]):.4g}: it says nothing of which answer is better")
        if self.show and number % self.show == 0:
            for i in sorted({int(samples.score.argmax()), int(samples.score.argmin())}):
                self.say(self._sample(samples, i))

    def _worth(self, samples: Samples) -> dict[str, Tensor]:
        """Advantages and returns [n, t], α and β [n]."""
        mask, score = samples.mask, samples.score.float()
        if self.advantages == "gae":
            rewards = token_rewards(
                score, samples.logps, samples.reference, mask, samples.ended, self.kl, self.missing_end
            )
            each, returns = gae(rewards, samples.values, mask, self.gamma, self.lam)
            made = {"advantages": whiten(each, mask), "returns": returns}
        else:
            whole = score + self.missing_end * (1 - samples.ended)
            each = group_advantages(whole, samples.row, self.scale)
            made = {"advantages": each[:, None].expand(mask.shape) * mask, "returns": torch.zeros(mask.shape)}
        alpha, beta = torch.ones(len(score)), torch.ones(len(score))
        how: Any = {"k": self.k, "lb": self.bounds[0], "ub": self.bounds[1], "lead": self.lead}
        if self.weights == "heuristic":
            alpha, beta = heuristic_weights(samples.z_p, samples.z_r, **how)
        elif self.weights == "learned":
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
            alpha, beta = learned_weights(
                samples.z_p, samples.z_r, power=self.power, tau=self.tau, generator=draw, **how
            )
        if samples.behaviour is not None:
            made["importance"] = self._importance(samples, samples.behaviour)
            made["advantages"] = made["advantages"] * made["importance"]  # w ≥ 0 moves through the surrogate's maximum
        return made | {"alpha": alpha.float(), "beta": beta.float()}

    def _importance(self, samples: Samples, behaviour: Tensor) -> Tensor:
        """Importance weights [n, t]; 1 of a token, and 0 of a sample, of which no log μ is known."""
        known = behaviour.isfinite()
        drawn = torch.where(known, behaviour, samples.logps)
        found = importance_weights(samples.logps, drawn, samples.mask, self.importance_clip, self.level)
        return found * known.any(dim=1, keepdim=True)

    def _line(self, samples: Samples) -> str:
        shares = {name: samples.bucket.count(name) / len(samples.bucket) for name in BUCKETS}
        others = ", ".join(self._share(samples, name, share) for name, share in shares.items() if share)
        stale = ""
        if samples.gap is not None:
            older = samples.version is not None and bool((samples.version < self.number).any())
            doubt = ": has it the weights of this step?" if samples.gap > STALE and not older else ""
            stale = f" · the server is {samples.gap:.3f} nats a token from the policy{doubt}"
        if samples.version is not None:
            age = self.number - samples.version
            w = self.made["importance"][samples.mask]
            cut = float((w >= self.importance_clip).float().mean())
            stale += f" · by weights of {float(age.float().mean()):.1f} phases ago, at most {int(age.max())}"
            stale += f", w {float(w.mean()):.3f} ({cut:.0%} at {self.importance_clip:g})"
        length = float(samples.mask.sum(1).float().mean())
        knows = f" · V explains {float(self._explained()):.1%}" if self.head is not None else ""
        cut = 1 - float(samples.ended.mean())
        cut_off = f" ({cut:.0%} cut off)" if cut else ""
        return (
            f"phase {self.number + 1}: reward {float(samples.score.mean()):.4g} · KL to the reference {self.met:.3f} "
            f"nats a sample · {length:.1f} tokens{cut_off}{knows} · "
            f"{others}{stale}"
        )

    def _share(self, samples: Samples, name: str, share: float) -> str:
        text = f"{name.replace('_', ' ')} {share:.0%}"
        if self.weights == "none":
            return text
        mine = torch.tensor([bucket == name for bucket in samples.bucket])
        alpha, beta = (float(self.made[which][mine].mean()) for which in ("alpha", "beta"))
        return f"{text} (α {alpha:.2f}, β {beta:.2f})"

    def _sample(self, samples: Samples, i: int) -> str:
        """A sample for the screen, its text in ASCII: it may hold what a terminal obeys."""

        def text(tokens: Any) -> str:
            return self.rollouts.tokenizer.decode(tokens, skip_special_tokens=True)

        asked = " ".join(text(samples.prompts[i].tolist()).split())[-60:]
        said = text(samples.tokens[i][samples.mask[i]].tolist())[:80]
        return (
            f"  {samples.bucket[i].replace('_', ' ')} · reward {float(samples.score[i]):.4g} · α "
            f"{float(self.made['alpha'][i]):.2f}, β {float(self.made['beta'][i]):.2f} · … {json.dumps(asked)[1:-1]} → "
            f"{json.dumps(said)}"
        )

    def _batch(self, at: list[int]) -> dict[str, Tensor]:
        samples = self.samples
        assert samples is not None
        answers = samples.answers()
        more = {"importance": self.made["importance"][at]} if "importance" in self.made else {}
        rows = samples.row[at].tolist()
        batch = self.rollouts.layout.batch([samples.prompts[i] for i in at], [answers[i] for i in at], rows)
        return batch | {
            "mask": samples.mask[at], "old_logps": samples.logps[at], "reference": samples.reference[at],
            "anchor": samples.anchor[at], "old_values": samples.values[at], "advantages": self.made["advantages"][at],
            "returns": self.made["returns"][at], "row": samples.row[at], "score": samples.score[at].float(),
            "ended": samples.ended[at].float(),
            "alpha": self.made["alpha"][at], "beta": self.made["beta"][at],
            "bucket": torch.tensor([BUCKETS.index(samples.bucket[i]) for i in at]),
            **more,
        }  # fmt: skip

    # --- the loss ---

    def size(self, batch: Batch) -> Tensor:
        """[tokens, samples]."""
        mask = batch["mask"]
        return torch.stack([mask.sum(), mask.any(dim=1).sum()]).float()

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """The terms that are on, over the tokens of the step."""
        mask, temperature = batch["mask"], self.rollouts.sampling.temperature
        own = self.critic is None and self.head is not None
        of: Any = ("logps", "entropy", "values") if own else ("logps", "entropy")
        said = token_values(model, batch, of, value_head=self.head if own else None, temperature=temperature)
        found = {name: of_samples(values, batch, mask) for name, values in said.items()}  # [n, t]
        logps, old = found["logps"], batch["old_logps"]
        tokens = normaliser[0]
        policy = policy_loss(logps, old, batch["advantages"], mask, batch["alpha"], self.clip, level=self.level,
                             normaliser=tokens if self.level == "token" else normaliser[1])  # fmt: skip
        loss, size = policy, mask.sum()
        logged: Logged = {"policy": torch.stack([policy.detach() * (tokens if self.level == "token" else normaliser[1]),
                                                 size if self.level == "token" else mask.any(1).sum()])}  # fmt: skip
        if self.retention:
            kept = retention_loss(logps, batch["anchor"], mask, batch["beta"], normaliser=tokens)
            loss = loss + self.retention * kept
            logged["retention"] = torch.stack([kept.detach() * tokens, size])
        if self.advantages == "group" and self.kl:
            gap = (batch["reference"] - logps).masked_fill(~mask, 0)
            near = ((gap.clamp(max=40).expm1() - gap) * mask).sum() / tokens.clamp_min(1)
            loss = loss + self.kl * near
            logged["kl_reference_k3"] = torch.stack([near.detach() * tokens, size])
        if self.head is not None:
            values = found["values"] if self.critic is None else of_samples(token_values(
                self.critic, batch, ("values",), value_head=self.head)["values"], batch, mask)  # fmt: skip
            fit = value_loss(values, batch["old_values"], batch["returns"], mask, self.value_clip, normaliser=tokens)
            loss = loss + self.value_weight * fit
            logged["value"] = torch.stack([fit.detach() * tokens, size])
        return loss, logged | self._shown(batch, logps.detach(), found["entropy"].detach(), size)

    def _shown(self, batch: Batch, logps: Tensor, entropy: Tensor, size: Tensor) -> Logged:
        mask, one = batch["mask"], torch.ones_like(batch["score"])
        moved = statistics(logps, batch["old_logps"], mask, self.clip, self.level)
        gain = -(ratios(logps, batch["old_logps"], mask, self.level) * batch["advantages"]).masked_fill(~mask, 0)
        length = mask.sum(dim=1)

        def summed(values: Tensor) -> Tensor:
            return torch.stack([values.masked_fill(~mask, 0).sum(dim=1), one])

        logged: Logged = {
            "gain": torch.stack([gain.sum(dim=1), length]),
            "reward": torch.stack([batch["score"], one]), "length": torch.stack([length, one]),
            "kl_reference": summed(batch["old_logps"] - batch["reference"]),
            "entropy": torch.stack([entropy.masked_fill(~mask, 0).sum(), size]),
            **{name: torch.stack([value * size, size]) for name, value in moved.items()},
        }  # fmt: skip
        if self.rollouts.anchor is not None:
            logged["kl_previous"] = summed(batch["old_logps"] - batch["anchor"])
        logged["truncated"] = torch.stack([1 - batch["ended"], one])
        self._look(float(summed(batch["old_logps"] - logps)[0].mean()))
        for number, name in enumerate(BUCKETS):
            inside = (batch["bucket"] == number).float()
            logged[f"bucket/{name}"] = torch.stack([inside.sum(), one.sum()])
            if self.weights != "none":
                for which in ("alpha", "beta"):
                    logged[f"{which}/{name}"] = torch.stack([(inside * batch[which]).sum(), inside.sum()])
        if self.head is not None and self.made and self.samples is not None:
            logged["explained_variance"] = self._explained()
        logged["kl_coef"] = torch.tensor(self.kl)
        if "importance" in batch and self.samples is not None and self.samples.version is not None:
            w, age = batch["importance"], (self.number - self.samples.version).float()
            for name, values in (("importance", w), ("importance_cut", (w >= self.importance_clip).float())):
                logged[name] = torch.stack([values.masked_fill(~mask, 0).sum(), size])
            logged["importance_unknown"] = torch.stack([(w * mask).sum(1) == 0, one > 0]).float()
            logged |= {"staleness": age.mean(), "staleness_max": age.max()}
        return logged

    def _look(self, gone: float) -> None:
        """Stop where KL(π_old‖π_θ), estimated by mean Σ log π_old − log π_θ of the phase's samples, is too large."""
        if not gone <= self.kl_most:
            raise RunAway(f"within phase {self.number + 1} the policy has moved by {gone:.1f} nats a sample, kl.most "
                          f"is {self.kl_most:g}", CALM)  # fmt: skip

    def end(self, model: Any) -> None:
        """Look once more at the samples of the last phase: no later one does."""
        if self.samples is not None:
            now = self.rollouts.again(self.samples, model)
            self._look(float(((self.samples.logps - now) * self.samples.mask).sum() / len(now)))

    def close(self) -> None:
        """Nothing more is asked of a server."""
        if self.rollouts.ahead is not None:
            self.rollouts.ahead.close()

    def _explained(self) -> Tensor:
        """1 − Var(G − V)/Var(G) over the tokens of the phase."""
        assert self.samples is not None
        mask = self.samples.mask
        returns, values = self.made["returns"][mask], self.samples.values[mask]
        spread = returns.var(unbiased=False)
        return torch.where(spread > 0, 1 - (returns - values).var(unbiased=False) / spread, torch.zeros(()))

    def penalty(self, model: Any) -> tuple[Tensor | None, Logged]:
        """EWC, where it is on."""
        if not (self.ewc and self.fishers):
            return None, {}
        return held({plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}, self.fishers, self.ewc)

    # --- the state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Phase, coefficient of the KL and what it met, and the value function."""
        numbers = torch.tensor([self.number, self.kl, self.met], dtype=torch.float64)
        return {"phase": numbers, **self._modules_state()}

    def _modules_state(self) -> dict[str, Tensor]:
        named = {"head": self.head, "critic": self.critic}
        return {f"{k}.{n}": v.clone() for k, m in named.items() if m is not None for n, v in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's state; the samples of its phase are read when they are needed."""
        self.number, self.kl, self.met = int(state["phase"][0]), float(state["phase"][1]), float(state["phase"][2])
        self.samples = None
        for name, module in (("head", self.head), ("critic", self.critic)):
            if module is not None:
                own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
                module.load_state_dict(own)
