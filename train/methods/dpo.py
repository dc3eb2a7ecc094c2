"""DPO and IPO, with what holds old tasks: KL to the old policy, and replay of old preferences by the mixture.

    L = mean_x dpo(x) [+ λ · mean_t KL(π_θ ‖ π_ref) over the tokens of the answers] [+ γ · NLL of the best answer]

The peers of COPR, on the same sets. Δ is against stored log-probabilities; a model is held for the KL alone. The losses
and their departures from the papers: `train/losses/dpo.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from train.logprobs import Measure
from train.losses.cft import kl_penalty, weighted_nll
from train.losses.dpo import dpo_loss, ipo_loss
from train.methods.answers import Grid, Reduction, answer_values, by_answer, lengths, of_answers, ordered
from train.methods.base import Batch, Logged, Memoryless


@dataclass
class Dpo(Memoryless):
    """Attributes: as in `train.losses.dpo` and `train.config.DpoConfig`."""

    loss_type: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reduction: Reduction = "sum"
    gamma: float = 0.0
    kl: float = 0.0
    reference: Any = None
    name: str = "dpo"

    def size(self, batch: Batch) -> Tensor:
        """[Σ w of the prompts with a pair, Σ w over the tokens of all answers, Σ w over those of the best ones]."""
        of_answer = batch["weight"][batch["prompt"]]
        paired = batch["weight"] * self._paired(batch)
        best = by_answer(batch, of_answer * batch["best"]).sum()
        return torch.stack([paired.sum(), by_answer(batch, of_answer).sum(), best])

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """The pairs' loss, and the other terms where they are on."""
        measures: tuple[Measure, ...] = ("logps", "kl") if self.kl else ("logps",)
        found, logps = answer_values(model, batch, measures, self.reference)
        ref, own, weight = batch["ref_logps"].to(logps.dtype), self.size(batch), batch["weight"]
        if self.reduction == "mean":
            logps, ref = logps / lengths(batch), ref / lengths(batch)
        grid = Grid.of(batch, ~batch["gold"])
        now, before, ranks = grid(logps), grid(ref), grid(batch["rank"])
        if self.loss_type == "dpo":
            each = dpo_loss(now, before, ranks, self.beta, grid.mask, self.label_smoothing)
        else:
            each = ipo_loss(now, before, ranks, self.beta, grid.mask)
        loss = (weight * each).sum() / normaliser[0].clamp_min(1e-12)
        logged = {
            "loss": torch.stack([each.detach(), self._paired(batch).to(each)]),
            "preference": torch.stack([loss.detach() * normaliser[0], own[0].to(loss.dtype)]),
            "accuracy": ordered(now.detach(), ranks, grid.mask),
            "accuracy_of_change": ordered((now - before).detach(), ranks, grid.mask),
        }
        of_token = by_answer(batch, weight[batch["prompt"]])
        if self.gamma:
            of_best = by_answer(batch, weight[batch["prompt"]] * batch["best"])
            best = weighted_nll(found["logps"], of_answers(batch, batch["best"] > 0), of_best, normaliser[2])
            loss = loss + self.gamma * best
            logged["nll"] = torch.stack([best.detach() * normaliser[2], own[2].to(best.dtype)])
        if self.kl:
            kl = kl_penalty(found["kl"], batch["loss_mask"], of_token, normaliser[1])
            loss = loss + self.kl * kl
            logged["kl"] = torch.stack([kl.detach() * normaliser[1], own[1].to(kl.dtype)])
        return loss, logged

    def _paired(self, batch: Batch) -> Tensor:
        """[n] 1 where a prompt has answers of unlike rank; others have no loss, and count nothing."""
        grid = Grid.of(batch, ~batch["gold"])
        ranks = grid(batch["rank"])
        most, least = ranks.amax(dim=1), ranks.masked_fill(~grid.mask, 1 << 40).amin(dim=1)
        return (most > least).float()
