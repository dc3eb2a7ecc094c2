"""CPPO's five classes of completions: the one rule that curation and training share.

P is the log-probability of a completion under its policy (mean over tokens, nats), R its reward. Both are standardised
over a stated population; a threshold k cuts the plane. Source: CPPO (ICLR 2024), Table 1, with strict inequalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from curate.manifest.tables import Rows, batches


class Bucket(StrEnum):
    """The five classes, named as in CPPO."""

    HIGH_PERFORMANCE = "high_performance"  # likely and good: learn it and hold it
    OVERFITTING = "overfitting"  # likely and bad
    HIGH_VARIANCE = "high_variance"  # unlikely and good
    NOISY = "noisy"  # unlikely and bad
    NORMAL = "normal"  # anything in between, and whatever cannot be judged


NOISE = 1e-12
"""Differences below this share of the largest value are rounding."""


@dataclass(frozen=True)
class Stats:
    """Mean and population standard deviation (divisor n) of log-probability and reward over one population."""

    logp_mean: float
    logp_std: float
    reward_mean: float
    reward_std: float
    n: int

    @classmethod
    def of(cls, logp: ArrayLike, reward: ArrayLike) -> Stats:
        """Moments over the rows where both values are finite.

        >>> Stats.of([-1.0, -3.0], [0.0, 1.0])
        Stats(logp_mean=-2.0, logp_std=1.0, reward_mean=0.5, reward_std=0.5, n=2)
        """
        p, r = _pair(logp, reward)
        valid = np.isfinite(p) & np.isfinite(r)
        n = int(valid.sum())
        if n == 0:
            return cls(0.0, 0.0, 0.0, 0.0, 0)
        (p_mean, p_std), (r_mean, r_std) = _moments(p[valid]), _moments(r[valid])
        return cls(p_mean, p_std, r_mean, r_std, n)

    def z(self, logp: ArrayLike, reward: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(z_P, z_R): standard scores; 0 everywhere along an axis whose deviation is 0."""
        p, r = _pair(logp, reward)
        return _standardise(p, self.logp_mean, self.logp_std), _standardise(r, self.reward_mean, self.reward_std)


def classify(logp: ArrayLike, reward: ArrayLike, stats: Stats, k: float) -> NDArray[Any]:
    """Bucket of every row, as an array of strings.

    high_performance z_P > k, z_R > k; overfitting z_P > k, z_R < -k; high_variance z_P < -k, z_R > k;
    noisy z_P < -k, z_R < -k; else normal. All inequalities are strict; what is not finite, and a deviation of 0, give
    normal. Scores are compared at 9 decimals: a binary reward may lie on the threshold exactly, and its unit must not
    decide.

    Args:
        logp: [n] log-probability of each completion, nats.
        reward: [n] reward of each completion, any unit.
        stats: moments of the population that the rows are compared with.
        k: threshold in standard deviations, ≥ 0.

    Raises:
        ValueError: shapes differ, or k is negative or not a number.

    >>> population = Stats(logp_mean=0.0, logp_std=1.0, reward_mean=0.0, reward_std=1.0, n=4)
    >>> classify([2.0, 2.0, -2.0, 0.5], [2.0, -2.0, 2.0, 9.0], population, k=0.5).tolist()
    ['high_performance', 'overfitting', 'high_variance', 'normal']
    """
    return np.array(NAMES)[_places(logp, reward, stats, k)]


NAMES = [str(bucket) for bucket in Bucket]


def _places(logp: ArrayLike, reward: ArrayLike, stats: Stats, k: float) -> NDArray[np.uint8]:
    """Bucket of every row as its place in `NAMES`."""
    if not k >= 0:
        raise ValueError(f"k must be ≥ 0, not {k}")
    z_p, z_r = (np.round(z, 9) for z in stats.z(logp, reward))
    z_p = np.where(np.isfinite(z_p) & np.isfinite(z_r), z_p, np.nan)
    with np.errstate(invalid="ignore"):  # NaN compares false, which is normal
        rules = [
            ((z_p > k) & (z_r > k), Bucket.HIGH_PERFORMANCE),
            ((z_p > k) & (z_r < -k), Bucket.OVERFITTING),
            ((z_p < -k) & (z_r > k), Bucket.HIGH_VARIANCE),
            ((z_p < -k) & (z_r < -k), Bucket.NOISY),
        ]
    places = [np.uint8(NAMES.index(bucket)) for _, bucket in rules]
    return np.select([where for where, _ in rules], places, default=np.uint8(NAMES.index(Bucket.NORMAL)))


@dataclass(frozen=True)
class Rule:
    """How a table of rollouts is sorted into buckets: threshold, log-probability, population. Kept in the provenance.

    A population is a task ("task"), every rollout ("all"), or a rollout batch ("batch").
    """

    k: float
    logp: Literal["mean", "sum"] = "mean"
    population: Literal["task", "all", "batch"] = "task"

    def assign(self, completions: Rows) -> tuple[pl.Series, dict[str, Stats]]:
        """(bucket of every row, moments of every population).

        Args:
            completions: rows of the manifest's table that were sampled: task, batch, token_logps, reward. Of a
                LazyFrame a batch is held, and beside it 40 bytes a row.
        """
        p, r, of, populations = self._measured(completions)
        place, stats = np.zeros(len(p), np.uint8), dict[str, Stats]()
        for name in sorted(populations):
            mine = np.flatnonzero(of == populations[name])
            stats[name] = Stats.of(p[mine], r[mine])
            place[mine] = _places(p[mine], r[mine], stats[name], self.k)
        return pl.Series("bucket", NAMES, dtype=pl.String).gather(place), stats

    def z(self, completions: pl.DataFrame, stats: Mapping[str, Stats] | None = None) -> pl.DataFrame:
        """(z_P, z_R) of every row, as columns z_p and z_r: where a rollout lies on the plane of the buckets.

        Args:
            completions: as for `assign`.
            stats: moments of every population, as `assign` gives them; None = of these rows.

        Raises:
            KeyError: a row of a population that `stats` does not have.

        >>> rows = pl.DataFrame({"task": ["a", "a"], "token_logps": [[-1.0], [-3.0]], "reward": [0.0, 1.0]})
        >>> Rule(k=0.5).z(rows).rows()
        [(1.0, -1.0), (-1.0, 1.0)]
        """
        stats = self.assign(completions)[1] if stats is None else stats
        p, r, of, populations = self._measured(completions)
        z_p, z_r = np.zeros(len(p)), np.zeros(len(p))
        for name, number in populations.items():
            mine = of == number
            z_p[mine], z_r[mine] = stats[name].z(p[mine], r[mine])
        return pl.DataFrame({"z_p": z_p, "z_r": z_r})

    def _measured(
        self, completions: Rows
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32], dict[str, int]]:
        """(P, R, number of the population) of every row, NaN where there is none; numbers of the populations."""
        population = pl.lit("all") if self.population == "all" else pl.col(self.population)
        populations, parts = dict[str, int](), [(np.zeros(0), np.zeros(0), np.zeros(0, np.int32))]
        for batch in batches(completions.lazy().select("token_logps", "reward", population.alias("population"))):
            p = np.array([sequence_logp(row, self.logp) for row in batch["token_logps"].to_list()], np.float64)
            r = batch["reward"].cast(pl.Float64).fill_null(math.nan).to_numpy()
            of = [populations.setdefault(str(name), len(populations)) for name in batch["population"]]
            parts.append((p, r, np.array(of, np.int32)))
        p, r, number = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return p, r, number, populations


def sequence_logp(token_logps: Sequence[float] | None, reduce: Literal["mean", "sum"] = "mean") -> float:
    """Sum of a completion's token log-probabilities, log π(y|x) in nats, or their mean; NaN where it has none.

    Summed exactly, so that the last bit does not depend on the order of additions.

    >>> sequence_logp([-1.0, -3.0]), sequence_logp([-1.0, -3.0], "sum")
    (-2.0, -4.0)
    """
    if not token_logps:
        return math.nan
    total = math.fsum(token_logps)
    return total / len(token_logps) if reduce == "mean" else total


def moved_inside(bucket: str, z_p: float, z_r: float, k: float) -> tuple[float, float]:
    """The point of a bucket nearest to (z_P, z_R): where a sample counts as lying that a person put there.

    Both z are finite; the middle of `normal` stands for all of it. The inequalities are strict, hence the hair's
    breadth.

    >>> moved_inside("noisy", 0.2, -1.0, k=0.5)
    (-0.500001, -1.0)
    """
    signs = {
        Bucket.HIGH_PERFORMANCE: (1, 1), Bucket.OVERFITTING: (1, -1), Bucket.HIGH_VARIANCE: (-1, 1),
        Bucket.NOISY: (-1, -1),
    }.get(Bucket(bucket))  # fmt: skip
    if signs is None:
        return 0.0, 0.0
    edge = k + 1e-6
    a, b = (sign * max(sign * z, edge) for sign, z in zip(signs, (z_p, z_r), strict=True))
    return a, b


def _pair(logp: ArrayLike, reward: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    p, r = np.asarray(logp, np.float64), np.asarray(reward, np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise ValueError(f"logp and reward must be two vectors of one length, not {p.shape} and {r.shape}")
    return p, r


def _moments(x: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and deviation; a constant population has a deviation of exactly 0, whatever its mean rounds to.

    Constant are values that differ by rounding alone: rewards are sums, and 0.1 + 0.2 is not 0.3.

    Values are sorted first, so that the last bit does not depend on the order of the rows.
    """
    x = np.sort(x)
    if x[-1] - x[0] <= NOISE * max(abs(x[0]), abs(x[-1])):
        return float(x[0]), 0.0
    mean = float(x.mean())
    return mean, float(np.sqrt(np.mean((x - mean) ** 2)))


def _standardise(x: NDArray[np.float64], mean: float, std: float) -> NDArray[np.float64]:
    if std == 0:
        return np.where(np.isnan(x), np.nan, 0.0)
    return (x - mean) / std
