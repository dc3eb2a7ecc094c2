"""The terms of continual fine-tuning: weighted NLL, KL to a reference, O-LoRA's orthogonality, EWC.

Departures from the papers:
- NLL and KL are divided by the sum of the weights of all target tokens of the step, not by a count: rows weighted 2
  then train as rows that stand there twice.
- Orthogonality sums absolute values, as O-LoRA's code does; the paper squares them. Both are 0 at the same points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_nll(
    logps: Tensor, mask: Tensor, weight: Tensor | float = 1.0, normaliser: Tensor | float | None = None
) -> Tensor:
    """L = Σ w·m·(−log π) / Σ w·m over the tokens of a batch.   -> scalar, nats a token.

    Args:
        logps: log π of the tokens [b, t].
        mask: [b, t] bool, True where a token counts; what `logps` holds elsewhere is never looked at.
        weight: w ≥ 0: a number, [b, 1] a row, or [b, t] a token (so packed samples keep their own). A weight of 2 is
            the sample twice.
        normaliser: Σ w·m over the whole step (all passes, all processes), so that accumulating and splitting change
            nothing: losses of the passes add up. (DDP averages gradients: multiply by the number of processes.)
            Default: that of this batch.

    Without any weighted token the loss is 0, with a graph.

    >>> weighted_nll(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]]), torch.tensor([[1.0, 3.0]])).item()
    2.5

    Raises:
        ValueError: shapes that do not fit.
    """
    return _weighted_mean(-logps, mask, weight, normaliser)


def kl_penalty(
    kl: Tensor, mask: Tensor, weight: Tensor | float = 1.0, normaliser: Tensor | float | None = None
) -> Tensor:
    """Σ w·m·KL / Σ w·m over the tokens of a batch.   [b, t] -> scalar, nats a token; arguments as in `weighted_nll`.

    >>> kl_penalty(torch.tensor([[0.5, 9.0]]), torch.tensor([[True, False]])).item()
    0.5
    """
    return _weighted_mean(kl, mask, weight, normaliser)


def orthogonality(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Σ_layers Σ |A_old A_newᵀ|: 0 where the new adapter reads only directions that the old ones do not.   -> scalar.

    O-LoRA (Wang et al., EMNLP Findings 2023). One pair of matrices [r_old, d], [r_new, d] a layer (or a layer and an
    older task); the old ones get no gradient.

    >>> orthogonality([torch.tensor([[1.0, 0.0]])], [torch.tensor([[-2.0, 5.0]])]).item()
    2.0

    Raises:
        ValueError: not as many matrices, or of unlike width.
    """
    if len(old) != len(new) or any(a.shape[-1:] != b.shape[-1:] for a, b in zip(old, new, strict=False)):
        raise ValueError(
            f"old and new must be pairs of [r, d] with one d each, not {[*map(_shape, old)]} and {[*map(_shape, new)]}"
        )
    overlaps = [(_wide(a.detach()) @ _wide(b).mT).abs().sum() for a, b in zip(old, new, strict=True)]
    return torch.stack(overlaps).sum() if overlaps else torch.zeros(())


def ewc_penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], fisher: Sequence[Tensor]) -> Tensor:
    """½ Σ_i F_i (θ_i − θ*_i)²: what moving from θ* costs an older task, to second order.   -> scalar, nats.

    EWC (Kirkpatrick et al., PNAS 2017), the second term of its loss without λ. Three lists of tensors of pairwise one
    shape: the parameters, their values after the older task, and the diagonal of its Fisher information (≥ 0).

    >>> ewc_penalty([torch.tensor([3.0])], [torch.tensor([1.0])], [torch.tensor([0.5])]).item()
    1.0

    Raises:
        ValueError: not as many tensors, or of unlike shape: a stage that cannot be compared with this model.
    """
    shapes = [[*map(_shape, each)] for each in (parameters, anchors, fisher)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError("parameters, anchors and Fisher information must be tensors of pairwise one shape")
    if not parameters:
        return torch.zeros(())
    triples = zip(parameters, anchors, fisher, strict=True)
    return 0.5 * torch.stack([(_wide(f) * (_wide(p) - _wide(a)).square()).sum() for p, a, f in triples]).sum()


def _weighted_mean(values: Tensor, mask: Tensor, weight: Tensor | float, normaliser: Tensor | float | None) -> Tensor:
    """Σ w·m·values / normaliser.   [b, t] -> scalar."""
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"need a bool mask of shape {_shape(values)}, not {mask.dtype} {_shape(mask)}")
    values = _wide(values)
    w = torch.as_tensor(weight, dtype=values.dtype, device=values.device)
    if w.dim() not in (0, values.dim()):  # [b] would spread over tokens, and silently so where b = t
        raise ValueError(f"weight must be a number, [b, 1] or {_shape(values)}, not {_shape(w)}")
    w = w.expand_as(values) * mask
    total = torch.as_tensor(w.sum() if normaliser is None else normaliser, dtype=values.dtype, device=values.device)
    # 0 · NaN is NaN, and padding may hold anything
    return (w * values.masked_fill(w == 0, 0)).sum() / torch.where(total > 0, total, 1)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: thousands of small squares add up."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
