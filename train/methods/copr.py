"""COPR: fit the policy to the optimum of its own update, and hold the optima of older tasks by constraints.

    L = Λ⁻¹ [J_t + Σ_i λ_i J_i^C],  Λ = 1 + Σ λ_i
    J_t = mean_x fit(x) + γ · NLL(y_best),  J_i^C = mean over R_i of fit − d_i

fit compares the policy with log P* over a prompt's own candidates (`train/losses/copr.py`); log P* of the current task
is computed from stored log π_{t−1} before training, that of older tasks is read from their buffers R_i; d_i is the fit
of R_i under the stage's initial parameters. ln λ_i ← ln λ_i + lr · λ_i · J_i^C after each step that saw rows of R_i.

Departures from the paper:
- J_i^C is estimated on the rows of R_i in a step, each less its own fit under the initial parameters: over all of R_i
  that is fit − d_i, but at θ₀ it is 0 for any rows. (Less d_i, the spread of the fits would drive λ before anything
  moves.)
- A step without rows of R_i leaves λ_i as it is, and λ_i out of Λ.
- The NLL of the best answer is a mean over tokens, as in `train cft`; tied best answers share it, and where the best
  one does not fit the context it is the best of the others.
- `constraint`: none, replay (buffers are fitted as the current task is), fixed (λ stays) are ablations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from train.losses.cft import weighted_nll
from train.losses.copr import dual_ascent, fit_loss, lagrangian
from train.methods.answers import Grid, Reduction, answer_values, by_answer, lengths, of_answers, ordered
from train.methods.base import Batch, Logged, Memoryless

Constraint = Literal["dual", "fixed", "replay", "none"]


@dataclass
class Copr(Memoryless):
    """Attributes: as in `train.config.CoprConfig`, and

    tasks: names of the old tasks, whose buffers have the sources 1, 2, …; 0 is the current task.
    log_lambda: [n] ln λ, the state.
    """

    tasks: list[str] = field(default_factory=list)
    log_lambda: Tensor = field(default_factory=lambda: torch.zeros(0))
    distance: Literal["mse", "kl"] = "mse"
    gamma: float = 1.0
    reduction: Reduction = "sum"
    constraint: Constraint = "dual"
    rate: float = 0.1
    low: float = -5.0
    high: float = 5.0
    name: str = "copr"

    def __post_init__(self) -> None:
        self._met = torch.zeros(len(self.tasks))  # J_i^C of the step so far, of this process
        self._seen = torch.zeros(len(self.tasks), dtype=torch.bool)

    def size(self, batch: Batch) -> Tensor:
        """[Σ w of the current prompts, Σ w over tokens of their best answers, Σ w of the prompts of each R_i]."""
        weight, source = batch["weight"], self._source(batch)
        best = by_answer(batch, (weight * (source == 0))[batch["prompt"]] * batch["best"]).sum()
        of = [(weight * (source == i)).sum() for i in range(len(self.tasks) + 1)]
        return torch.stack([of[0], best, *of[1:]])

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """The Lagrangian; its parts are kept for the dual step."""
        found, logps = answer_values(model, batch)
        if self.reduction == "mean":
            logps = logps / lengths(batch)
        grid, own = Grid.of(batch, ~batch["gold"]), self.size(batch)
        target = batch["target"].to(logps.dtype)
        each = fit_loss(grid(logps), grid(target), grid.mask, self.distance)  # [n]
        weight, source = batch["weight"], self._source(batch)
        moved = each - batch["start"].to(each)  # 0 at the initial parameters; of the current task: the fit
        parts = torch.stack([(weight * moved * (source == i)).sum() for i in range(len(self.tasks) + 1)])
        counts = torch.cat([normaliser[:1], normaliser[2:]])
        means = parts / counts.clamp_min(1e-12)
        nll = weighted_nll(
            found["logps"], of_answers(batch, (batch["best"] > 0) & (source == 0)[batch["prompt"]]),
            by_answer(batch, weight[batch["prompt"]] * batch["best"]), normaliser[1],
        )  # fmt: skip
        constraints, seen = means[1:], normaliser[2:] > 0
        if model.training:
            self._met = self._met.to(means) + constraints.detach()
            self._seen = self._seen.to(means.device) | seen
        loss = lagrangian(means[0] + self.gamma * nll, constraints[seen], self.log_lambda.to(means)[seen])
        ranks = grid(batch["rank"])
        logged = {
            "loss": torch.stack([each.detach(), torch.ones_like(each)]),
            "fit": torch.stack([parts[0].detach(), own[0].to(parts.dtype)]),
            "nll": torch.stack([nll.detach() * normaliser[1], own[1].to(nll.dtype)]),
            "accuracy": ordered(grid(logps).detach(), ranks, grid.mask),
        }
        for i, task in enumerate(self.tasks):
            logged[f"constraint/{task}"] = torch.stack([parts[i + 1].detach(), own[i + 2]])
            logged[f"lambda/{task}"] = self.log_lambda[i].exp()
        return loss, logged

    def after_step(self, total: Callable[[Tensor], Tensor]) -> None:
        """The dual ascent, on what all processes met."""
        if self.constraint == "dual" and len(self.tasks):
            met = total(self._met).cpu().to(self.log_lambda)
            moved = dual_ascent(self.log_lambda, met, self.rate, self.low, self.high)
            self.log_lambda = torch.where(self._seen.cpu(), moved, self.log_lambda)
        self._met, self._seen = torch.zeros_like(self._met), torch.zeros_like(self._seen)

    def state_dict(self) -> dict[str, Tensor]:
        """Of each old task ln λ."""
        return {"log_lambda": self.log_lambda}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a checkpoint's state."""
        self.log_lambda = state["log_lambda"]

    def _source(self, batch: Batch) -> Tensor:
        """[n] 0 = the current task, i = R_i; as replay, all are the current task."""
        return torch.zeros_like(batch["source"]) if self.constraint == "replay" else batch["source"]
