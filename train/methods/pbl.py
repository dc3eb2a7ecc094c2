"""PBL: towards answers that agree with the target, off those that conflict with it, and to the target itself.

    L = mean_x preference_bias_loss(x) + γ · NLL(y_gold)

Sides come from stored similarities against a threshold of this run, ρ from stored log-probabilities: no reference model
is held. The loss and its departures from the paper: `train/losses/pbl.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from train.losses.cft import weighted_nll
from train.losses.pbl import preference_bias_loss
from train.methods.answers import Grid, answer_values, by_answer, of_answers
from train.methods.base import Batch, Logged, Memoryless


@dataclass
class Pbl(Memoryless):
    """Attributes: as in `train.losses.pbl` and `train.config.PblConfig`."""

    threshold: float = 0.7
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    negative: Literal["bounded", "literal"] = "bounded"
    b: float = 1.0
    name: str = "pbl"

    def size(self, batch: Batch) -> Tensor:
        """[Σ w of the prompts, Σ w over tokens of their gold answers]."""
        weight = batch["weight"]
        gold = by_answer(batch, weight[batch["prompt"]] * batch["gold"])
        return torch.stack([weight.sum(), gold.sum()])

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """Both terms."""
        found, logps = answer_values(model, batch)
        compared, weight, own = ~batch["gold"], batch["weight"], self.size(batch)
        grid = Grid.of(batch, compared)
        now, ref = grid(logps[compared]), grid(batch["ref_logps"][compared].to(logps.dtype))
        aligned = grid((batch["similarity"][compared] >= self.threshold).float()) > 0.5
        each = preference_bias_loss(now, ref, aligned, grid.mask, self.alpha, self.beta, self.negative, self.b)
        bias = (weight * each).sum() / normaliser[0].clamp_min(1e-12)
        nll = weighted_nll(found["logps"], of_answers(batch, batch["gold"]),
                           by_answer(batch, weight[batch["prompt"]]), normaliser[1])  # fmt: skip
        rho = (now - ref).detach()
        logged = {
            "loss": torch.stack([each.detach(), torch.ones_like(each)]),
            "bias": torch.stack([bias.detach() * normaliser[0], own[0].to(bias.dtype)]),
            "nll": torch.stack([nll.detach() * normaliser[1], own[1].to(nll.dtype)]),
            "rho_align": _mean(rho, grid.mask & aligned), "rho_conflict": _mean(rho, grid.mask & ~aligned),
        }  # fmt: skip
        return bias + self.gamma * nll, logged


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[2]: a sum and how many it is of."""
    return torch.stack([values.masked_fill(~mask, 0).sum(), mask.sum().to(values.dtype)])
