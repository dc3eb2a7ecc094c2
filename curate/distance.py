"""Distances between tasks: Wasserstein-1 over instruction embeddings, exact or with a proven bound.

Source: InsCL (NAACL 2024), section 3.2. Departures:
- the solver must prove optimality; the official code accepts POT's result after 100,000 iterations with a warning;
- above `max_points` instructions a side is replaced by weighted centroids and the largest possible error is reported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.config import DistanceConfig

Matrix = NDArray[np.float64]

ROUNDING = 1e-12  # a float64 dot product of unit vectors is off by less; a cost below it is a cost of 0
MAX_ITERATIONS = 2_000_000_000


@dataclass(frozen=True)
class Distance:
    """A distance and how it was found: |value - exact| ≤ bound; bound 0 means that the solver proved it optimal."""

    value: float
    bound: float
    method: str  # exact | centroids


def wasserstein(
    a: ArrayLike,
    b: ArrayLike,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    metric: str = "cosine",
) -> float:
    """Exact Wasserstein-1 distance W(a, b) = min_γ Σ_xy γ_xy c(x, y), γ with marginals `weights_a`, `weights_b`.

    InsCL, Eq. 1, with c(x, y) = 1 - x·y/(|x||y|) for "cosine", |x - y| for "euclidean".

    Args:
        a: [n, d] points.
        b: [m, d] points.
        weights_a: [n] masses ≥ 0, of any sum > 0 (normalised here); None = uniform.
        weights_b: [m] masses, likewise.
        metric: "cosine" or "euclidean".

    Returns:
        The distance: 0 to 2 for cosine.

    Raises:
        ValueError: shapes, masses or points cannot be used (NaN; a zero vector under cosine).
        RuntimeError: the solver did not prove optimality.

    >>> wasserstein([[1, 0], [0, 1]], [[1, 0]])  # half of the mass stays, half goes to an orthogonal vector
    0.5
    """
    x, y = _points(a, "a"), _points(b, "b")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a and b must have one dimension, not {x.shape[1]} and {y.shape[1]}")
    mass_x, mass_y = _masses(weights_a, len(x), "weights_a"), _masses(weights_b, len(y), "weights_b")
    if metric == "cosine":
        cost = _half_squared(_normalised(x, "a"), _normalised(y, "b"))
    elif metric == "euclidean":
        cost = np.sqrt(_half_squared(x, y) * 2)
    else:
        raise ValueError(f"metric must be 'cosine' or 'euclidean', not {metric!r}")
    return _transport(cost, mass_x, mass_y)


def task_distance(
    a: ArrayLike, b: ArrayLike, weights_a: ArrayLike, weights_b: ArrayLike, config: DistanceConfig, seed: int
) -> Distance:
    """Distance between two tasks' instruction sets: exact up to `max_points` a side, otherwise over centroids.

    On the unit sphere the cosine cost is half the squared Euclidean distance, so √(2W) is the 2-Wasserstein metric.
    Replacing a side by centroids moves it by at most q, its root-mean-square quantisation error; by the triangle
    inequality |√(2W) - √(2Ŵ)| ≤ q_a + q_b = q, hence |W - Ŵ| ≤ q·√(2Ŵ) + q²/2.
    """
    x, y = _normalised(_points(a, "a"), "a"), _normalised(_points(b, "b"), "b")
    mass_x, mass_y = _masses(weights_a, len(x), "weights_a"), _masses(weights_b, len(y), "weights_b")
    if max(len(x), len(y)) <= config.max_points:
        return Distance(_transport(_half_squared(x, y), mass_x, mass_y), 0.0, "exact")
    x, mass_x, q_x = _quantise(x, mass_x, config, seed)
    y, mass_y, q_y = _quantise(y, mass_y, config, seed)
    value, q = _transport(_half_squared(x, y), mass_x, mass_y), q_x + q_y
    bound = q * float(np.sqrt(2 * value)) + q * q / 2
    return Distance(value, min(bound, max(value, 2 - value)), "centroids")  # W itself lies in [0, 2]


def _quantise(x: Matrix, mass: Matrix, config: DistanceConfig, seed: int) -> tuple[Matrix, Matrix, float]:
    """(centroids, their masses, RMS quantisation error); a side that is small enough stays as it is."""
    if len(x) <= config.max_points:
        return x, mass, 0.0
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    k = min(config.centroids, len(x))
    means = KMeans(k, init="random", n_init=1, max_iter=10, random_state=seed, copy_x=True)
    with threadpool_limits(1), warnings.catch_warnings():  # one thread: sums in one order; no fit needs to converge
        warnings.simplefilter("ignore")
        label = means.fit(x.astype(np.float32), sample_weight=mass).labels_
    total = np.bincount(label, mass, minlength=k)
    used = total > 0
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.flatnonzero(used))
    centroids = np.add.reduceat((x * mass[:, None])[order], starts) / total[used][:, None]  # the true weighted means
    place = np.cumsum(used) - 1
    error = np.sqrt(np.sum(mass * np.sum((x - centroids[place[label]]) ** 2, axis=1)))
    return centroids, total[used] / total[used].sum(), float(error)


def _half_squared(x: Matrix, y: Matrix) -> Matrix:
    """½|x - y|² [n, m]: the cosine cost of unit vectors, and its extension to centroids inside the sphere."""
    cost = 0.5 * (np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)[None, :]) - x @ y.T
    cost[cost < ROUNDING] = 0.0
    return np.asarray(cost)


def _transport(cost: Matrix, mass_x: Matrix, mass_y: Matrix) -> float:
    import ot

    if len(mass_x) == 1 or len(mass_y) == 1:  # one plan only: everything goes there
        return float(mass_x @ cost @ mass_y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its verdict is read from the log, and is an error here
        value, log = ot.emd2(mass_x, mass_y, np.ascontiguousarray(cost), numItermax=MAX_ITERATIONS, log=True)
    if log.get("result_code") != 1 or log.get("warning"):
        raise RuntimeError(f"the transport solver did not prove optimality: {log.get('warning') or log}")
    return max(0.0, float(value))


def _points(x: ArrayLike, name: str) -> Matrix:
    points = np.asarray(x, np.float64)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"{name} must be a matrix [n, d] with at least one row, not of shape {points.shape}")
    if (bad := ~np.isfinite(points).all(axis=1)).any():
        raise ValueError(f"{name}: row {int(bad.argmax())} holds NaN or infinity")
    return points


def _normalised(x: Matrix, name: str) -> Matrix:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError(f"{name}: row {int((norms == 0).argmax())} is zero and has no direction")
    return np.asarray(x / norms)


def _masses(weights: ArrayLike | None, n: int, name: str) -> Matrix:
    if weights is None:
        return np.full(n, 1 / n)
    mass = np.asarray(weights, np.float64)
    if mass.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), not {mass.shape}")
    if not np.isfinite(mass).all() or (mass < 0).any() or mass.sum() <= 0:
        raise ValueError(f"{name} must be finite, ≥ 0 and not all 0")
    return np.asarray(mass / mass.sum())
