"""CFT: continual fine-tuning on current and replayed rows.

    L = Σ_i w_i Σ_t −log π_θ(y_t | x, y_<t) / Σ_i w_i T_i  +  λ · mean_t KL(π_θ ‖ π_ref)
        +  λ₁ Σ |A_old A_newᵀ|  +  ½ λ₂ Σ F (θ − θ*)²

Each term beside the first is left out where its weight is 0, so that such a run is plain fine-tuning bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.logprobs import Measure, token_values
from train.losses.cft import kl_penalty, orthogonality, weighted_nll
from train.methods.base import Batch, Logged, Memoryless, by_sample, token_weights, weighted_tokens
from train.methods.ewc import Fisher, held, plain_name


@dataclass
class Cft(Memoryless):
    """Weighted NLL with optional terms that hold the old tasks.

    Fisher information, anchors and old adapters are inputs of the run, and named in its settings: nothing is stored.

    Attributes:
        kl: λ.
        reference: π_ref: a frozen model, or what `train.logprobs.token_kl` takes instead of one.
        ewc: λ₂.
        fishers: one an older task.
        orthogonal: λ₁.
        old_adapters: A matrices [r_old, d] of the frozen adapters, by the name of the new one's parameter.
    """

    kl: float = 0.0
    reference: Any = None
    ewc: float = 0.0
    fishers: list[Fisher] = field(default_factory=list)
    orthogonal: float = 0.0
    old_adapters: dict[str, list[Tensor]] = field(default_factory=dict)
    name: str = "cft"

    def size(self, batch: Batch) -> Tensor:
        """Σ w·m: target tokens by the weight of their sample."""
        return weighted_tokens(batch)

    def loss(self, model: Any, batch: Batch, normaliser: Tensor) -> tuple[Tensor, Logged]:
        """NLL, and KL where it is on."""
        mask, weight, own = batch["loss_mask"], token_weights(batch), self.size(batch)[0]
        measures: tuple[Measure, ...] = ("logps", "kl") if self.kl and model.training else ("logps",)
        found = token_values(model, batch, measures, reference=self.reference)  # one pass of the model for both
        loss = weighted_nll(found["logps"], mask, weight, normaliser[0])
        logged = {"loss": by_sample(-found["logps"].detach(), batch), "nll": _of(loss, normaliser[0], own)}
        if "kl" in found:
            kl = kl_penalty(found["kl"], mask, weight, normaliser[0])
            loss, logged["kl"] = loss + self.kl * kl, _of(kl, normaliser[0], own)
        return loss, logged

    def penalty(self, model: Any) -> tuple[Tensor | None, Logged]:
        """EWC and orthogonality, where they are on."""
        total, logged = None, dict[str, Tensor]()
        if not (self.ewc and self.fishers) and not (self.orthogonal and self.old_adapters):
            return None, logged
        parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        if self.ewc:
            total, logged = held(parameters, self.fishers, self.ewc)
        if self.orthogonal and self.old_adapters:
            pairs = [(old.to(parameters[n]), parameters[n]) for n, olds in self.old_adapters.items() for old in olds]
            part = orthogonality([old for old, _ in pairs], [new for _, new in pairs])
            logged["orthogonality"] = part.detach()
            total = self.orthogonal * part if total is None else total + self.orthogonal * part
        return total, logged


def _of(mean: Tensor, normaliser: Tensor, own: Tensor) -> Tensor:
    """[2]: a sum that `normaliser` has divided, and how many of them are of this batch."""
    return torch.stack([mean.detach() * normaliser, own.to(mean.dtype)])
