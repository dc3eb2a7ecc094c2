"""Metrics of continual learning: pure functions of the R matrix and of per-item correctness.

R is [T+1, T]: R[i, j] = score on task j after stage i, row 0 = before training; higher is better, any unit. Stage i
(1..T) is the one that learns task i, so its own column is j = i - 1 counted from 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def average_performance(scores: ArrayLike) -> float:
    """AP = mean_j R[T][j]: the mean score after the last stage.

    >>> average_performance([[0, 0], [1, 0], [0.5, 1]])
    0.75
    """
    return float(_r(scores)[-1].mean())


def backward_transfer(scores: ArrayLike) -> float:
    """BWT = 1/(T-1) Σ_{j<T} (R[T][j] - R[j][j]): negative where tasks were forgotten (Lopez-Paz & Ranzato 2017).

    >>> backward_transfer([[0, 0], [1, 0], [0.5, 1]])  # task 1 fell from 1 to 0.5
    -0.5
    """
    r = _r(scores, at_least=2)
    learned = np.diagonal(r, offset=-1)  # R[j][j], stage j on task j
    return float((r[-1] - learned)[:-1].mean())


def forgetting(scores: ArrayLike) -> float:
    """Forgetting = 1/(T-1) Σ_{j<T} (max_{1≤i<T} R[i][j] - R[T][j]), after training began (Chaudhry et al. 2018).

    >>> forgetting([[0, 0], [1, 0], [0.5, 1]])
    0.5
    """
    r = _r(scores, at_least=2)
    return float((r[1:-1].max(axis=0) - r[-1])[:-1].mean())


def forward_transfer(scores: ArrayLike) -> float:
    """FWT, zero-shot: 1/(T-1) Σ_{j≥2} (R[j-1][j] - R[0][j]): what earlier tasks taught about one not yet trained on.

    >>> forward_transfer([[0, 0.25], [1, 0.5], [1, 1]])  # task 2 rose from 0.25 to 0.5 before its own stage
    0.25
    """
    r = _r(scores, at_least=2)
    before_own_stage = np.diagonal(r)  # R[j-1][j]
    return float((before_own_stage - r[0])[1:].mean())


def forward_transfer_single_task(scores: ArrayLike, single: ArrayLike) -> float:
    """FWT against single-task training: 1/(T-1) Σ_{j≥2} (R[j][j] - single_j): what earlier tasks added to learning j.

    The other thing that the field calls FWT. `single` [T] is the score of each task trained alone.

    >>> forward_transfer_single_task([[0, 0], [1, 0], [1, 0.75]], single=[1, 1])  # task 2 alone would reach 1
    -0.25
    """
    r, alone = _r(scores, at_least=2), np.asarray(single, np.float64)
    if alone.shape != (r.shape[1],):
        raise ValueError(f"single must be {r.shape[1]} scores, not of shape {alone.shape}")
    return float((np.diagonal(r, offset=-1) - alone)[1:].mean())


def relative_gain(scores: ArrayLike, upper: ArrayLike) -> Matrix:
    """Relative gain_i = 100/(i-1) Σ_{j<i} R[i][j]/upper_j, per cent, for each stage i from the second on.   -> [T-1].

    InsCL, section 4.1. `upper` [T] is the score of each task trained alone; it must be positive.

    >>> relative_gain([[0, 0], [1, 0], [0.5, 1]], upper=[1, 1]).tolist()
    [50.0]
    """
    r, best = _r(scores, at_least=2), np.asarray(upper, np.float64)
    if best.shape != (r.shape[1],) or not (best > 0).all():
        raise ValueError(f"upper must be {r.shape[1]} positive scores, not {best.tolist()}")
    part = r[1:] / best  # [T, T], stage by task
    return np.array([100 * part[i - 1, : i - 1].mean() for i in range(2, r.shape[1] + 1)])


def every(scores: ArrayLike, upper: ArrayLike | None = None) -> dict[str, float | list[float]]:
    """All metrics that R allows, by the functions' names (`forward_transfer` is the zero-shot one).

    Those against single-task training where `upper` [T] is given.
    """
    r = _r(scores)
    found: dict[str, float | list[float]] = {"average_performance": average_performance(r)}
    if r.shape[1] > 1:
        found |= {
            "backward_transfer": backward_transfer(r),
            "forgetting": forgetting(r),
            "forward_transfer": forward_transfer(r),
        }
        if upper is not None:
            found["forward_transfer_single_task"] = forward_transfer_single_task(r, upper)
            found["relative_gain"] = relative_gain(r, upper).tolist()
    return found


def knowledge_gain_ratio(before: ArrayLike, after: ArrayLike) -> float:
    """KGR = #(wrong before and right now) / #(wrong before); NaN where nothing was wrong.

    >>> knowledge_gain_ratio([False, False, True], [True, False, True])
    0.5
    """
    was, now = _correct(before, after)
    return float(now[~was].mean()) if (~was).any() else float("nan")


def knowledge_retention_ratio(before: ArrayLike, after: ArrayLike) -> float:
    """KRR = #(right before and right now) / #(right before); NaN where nothing was right.

    >>> knowledge_retention_ratio([True, True, False], [True, False, True])
    0.5
    """
    was, now = _correct(before, after)
    return float(now[was].mean()) if was.any() else float("nan")


def _r(scores: ArrayLike, at_least: int = 1) -> Matrix:
    r = np.asarray(scores, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] + 1:
        raise ValueError(f"R must be [T+1, T] with row 0 = before training, not of shape {r.shape}: it takes the "
                         "scores of T + 1 checkpoints on T tasks")  # fmt: skip
    if r.shape[1] < at_least:
        raise ValueError(f"this metric needs at least {at_least} tasks, R has {r.shape[1]}")
    return r


def _correct(before: ArrayLike, after: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    for name, given in (("before", before), ("after", after)):
        if not np.isin(np.asarray(given), (0, 1)).all():
            raise ValueError(f"{name} must hold right (True, 1) or wrong (False, 0) alone")
    was, now = np.asarray(before, bool), np.asarray(after, bool)
    if was.ndim != 1 or was.shape != now.shape:
        raise ValueError(f"before and after must be two vectors of one length, not {was.shape} and {now.shape}")
    return was, now
