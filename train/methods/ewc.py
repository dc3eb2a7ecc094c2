"""EWC for any method: what older tasks need of the parameters, and the penalty of leaving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.losses.cft import ewc_penalty
from train.methods.base import Logged


@dataclass
class Fisher:
    """What an older task needs: the diagonal of its Fisher information, and the parameters that it had."""

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]

    def move(self, device: torch.device) -> None:
        """To where the parameters are, once."""
        if next(iter(self.fisher.values())).device != device:
            self.fisher = {name: value.to(device) for name, value in self.fisher.items()}
            self.anchor = {name: value.to(device) for name, value in self.anchor.items()}


def held(parameters: Mapping[str, Tensor], fishers: Sequence[Fisher], weight: float) -> tuple[Tensor | None, Logged]:
    """(λ/2 Σ F (θ − θ*)² over all older tasks, the same without λ to log); None where there is none."""
    total, logged = None, dict[str, Tensor]()
    for each in fishers:
        names = list(each.fisher)
        each.move(parameters[names[0]].device)
        part = ewc_penalty([parameters[n] for n in names], [each.anchor[n] for n in names],
                           [each.fisher[n] for n in names])  # fmt: skip
        logged["ewc"] = logged.get("ewc", 0.0) + part.detach()
        total = weight * part if total is None else total + weight * part
    return total, logged


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and checkpointing put before it.

    >>> plain_name("module._orig_mod.model.norm.weight")
    'model.norm.weight'
    """
    for part in ("module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name
