"""Distances between tasks: Wasserstein-1 over instruction embeddings, exact or with a proven bound.

Source: InsCL (NAACL 2024), section 3.2. Departures:
- the solver must prove optimality; the official code accepts POT's result after 100,000 iterations with a warning;
- above `max_points` instructions a side is replaced by weighted centroids and the largest possible error is reported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from curate.config import DistanceConfig

Matrix = NDArray[np.float64]

ROUNDING = 1e-12  # a float64 dot product of unit vectors is off by less; a cost below it is a cost of 0
MAX_ITERATIONS = 2_000_000_000
FILE = "distance.parquet"


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


@dataclass(frozen=True)
class Side:
    """One task's instructions as the solver sees them: unit vectors, or the centroids that stand for them."""

    points: Matrix  # [n, d]
    mass: Matrix  # [n], adds up to 1
    error: float  # root-mean-square quantisation error; 0 = the instructions themselves


def side(points: ArrayLike, weights: ArrayLike, config: DistanceConfig, seed: int) -> Side:
    """A task's instructions [n, d] with their masses [n]; above `max_points` of them, `centroids` weighted means."""
    x = _normalised(_points(points, "points"), "points")
    mass = _masses(weights, len(x), "weights")
    return Side(x, mass, 0.0) if len(x) <= config.max_points else _quantise(x, mass, config.centroids, seed)


def task_distance(a: Side, b: Side) -> Distance:
    """Distance between two tasks: exact, or over centroids with the largest possible error.

    On the unit sphere the cosine cost is half the squared Euclidean distance, so √(2W) is the 2-Wasserstein metric.
    Replacing a side by centroids moves it by at most q, its root-mean-square quantisation error. From below, by the
    triangle inequality, √(2W) ≥ √(2Ŵ) - q_a - q_b. From above, spreading each centroid's plan evenly over its points is
    a plan, and costs 2W ≤ 2Ŵ + q_a² + q_b² (Pythagoras), which is sharper than the triangle inequality. The bound is
    the larger gap of the two.
    """
    value = _transport(_half_squared(a.points, b.points), a.mass, b.mass)
    if a.error == b.error == 0:
        return Distance(value, 0.0, "exact")
    below = value - max(0.0, float(np.sqrt(2 * value)) - a.error - b.error) ** 2 / 2
    above = (a.error**2 + b.error**2) / 2
    return Distance(value, max(below, above), "centroids")


class ToCurrent:
    """Distances of tasks to the current one, whose side is made once, at the first of them.

    Args:
        points: [n, d] the current task's instructions.
        weights: [n] their masses.
        config: sizes of a side.
        seed: of the centroids.
    """

    def __init__(self, points: ArrayLike, weights: ArrayLike, config: DistanceConfig, seed: int) -> None:
        self.points, self.weights, self.config, self.seed = points, weights, config, seed

    def __call__(self, task: tuple[ArrayLike, ArrayLike]) -> pl.DataFrame:
        """The `Distance` of a task, given as points [m, d] and masses [m], as a table of one row."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # one thread: sums in one order
            found = task_distance(side(*task, self.config, self.seed), self._current)
        return pl.DataFrame([vars(found)])

    @cached_property
    def _current(self) -> Side:
        return side(self.points, self.weights, self.config, self.seed)


def _quantise(x: Matrix, mass: Matrix, k: int, seed: int) -> Side:
    """Weighted k-means; every centroid is the mean of its points, as the bound above needs it."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    x, mass = x[mass > 0], mass[mass > 0]
    means = KMeans(min(k, len(x)), init="random", n_init=1, max_iter=10, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():  # one thread: sums in one order; no fit needs to converge
        warnings.simplefilter("ignore")
        label = means.fit(x.astype(np.float32), sample_weight=mass).labels_
    used, label = np.unique(label, return_inverse=True)
    total = np.bincount(label, mass)
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(len(used)))
    centroids = np.add.reduceat((x * mass[:, None])[order], starts) / total[:, None]
    error = np.sqrt(np.sum(mass * np.sum((x - centroids[label]) ** 2, axis=1)))
    return Side(centroids, total / total.sum(), float(error))


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
    if not np.isfinite(mass).all() or (mass < 0).any() or not (mass > 0).any():
        raise ValueError(f"{name} must be finite, ≥ 0 and not all 0")
    if mass.max() > 1e300:  # their sum may be infinite
        mass = mass / mass.max()
    return np.asarray(mass / mass.sum())
