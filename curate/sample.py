"""How many rows of which task, of which instruction, and which ones: quotas, selectors, draws.

Everything here is arithmetic on counts, scores and vectors; randomness comes from the generator passed in. Source:
InsCL (NAACL 2024), sections 3.2-3.3 and appendix B for the baselines. Departures:
- shares are rounded by largest remainder and add up exactly; the excess of a pool that is too small goes to the others
  in proportion (the official code raises, or stops short); by systematic sampling where `rounding` says so;
- zero scores everywhere mean equal shares (the official code divides by zero);
- `prototype_instruction` tries at most 32 clusters;
- `unit: tag_cluster` puts an instruction into the cluster of its rarest tag, so that clusters do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def shares(scores: ArrayLike, total: float, capacity: ArrayLike | None = None) -> Floats:
    """Real-valued shares of `total` in proportion to `scores`, none above its capacity (water-filling).   [n] -> [n].

    Where a share would exceed its capacity, the excess goes to the others in proportion; items of score 0 get a part,
    equally, only when every item of positive score is full. All scores 0: equal shares. Adds up to min(total, Σ cap).
    """
    score, limit = _checked(scores, capacity)
    share = np.zeros_like(score)
    left = min(float(total), float(limit.sum()))
    for group in (score > 0, score == 0):  # zero scores come second
        weight = np.where(score > 0, score, 1.0)
        open_ = group & (limit > 0)
        while left > 0 and open_.any():
            part = weight * open_
            offer = left * (part / part.sum())
            full = open_ & (offer >= limit)
            if not full.any():
                share += offer
                return share
            share[full] = limit[full]
            left = max(0.0, left - float(limit[full].sum()))
            open_ &= ~full
    return share


def allocate(
    scores: ArrayLike, total: int, capacity: ArrayLike | None = None, rng: np.random.Generator | None = None
) -> Ints:
    """Whole-number quotas in proportion to `scores`.   [n] -> [n], adds up to min(total, Σ cap).

    InsCL, Eq. 2 and 5, made exact: every quota is within 1 of its real-valued share (`shares`) and within capacity.
    By largest remainder, equal remainders going to the earlier item; or, with a generator, by systematic sampling
    (Madow 1949): the mean of a quota over generators is its share, also where that is below one row.

    Args:
        scores: [n] weights ≥ 0. All 0 = equal shares.
        total: rows to give away, ≥ 0.
        capacity: [n] most that each may get; None = no limit.
        rng: rounds by systematic sampling; None = by largest remainder.

    Raises:
        ValueError: a negative or non-finite score, a negative total or capacity, or lengths that differ.

    >>> allocate([3, 1, 1], 10).tolist()
    [6, 2, 2]
    >>> allocate([5, 3, 2], 100, capacity=[10, 100, 100]).tolist()  # 40 rows too many go 3 : 2 to the others
    [10, 54, 36]
    """
    if total != int(total) or not 0 <= total < 2**53:  # above it, floats are no longer whole numbers
        raise ValueError(f"total must be a whole number from 0 to 2^53, not {total}")
    share = shares(scores, total, capacity)
    if share.size == 0:
        return np.zeros(0, np.int64)
    limit = _checked(scores, capacity)[1]
    whole = np.minimum(np.floor(share + 1e-9), limit)  # 2.9999999999 is a 3 that rounding has touched
    left = round(min(float(total), float(limit.sum())) - float(whole.sum()))
    remainder = np.where(whole < limit, share - whole, -1.0)
    if rng is not None and left > 0:
        some = rng.permutation(np.flatnonzero(remainder > 1e-9))
        points = np.floor(np.minimum(np.cumsum(remainder[some]), left) + rng.random())
        up = some[np.diff(points, prepend=0.0) > 0]  # the item that holds the m-th of points one apart gets a row
        whole[up] += 1
        remainder[up] = -1.0
        left -= len(up)  # 0, or 1 where a sum of remainders has been rounded down
    if left > 0:
        whole[np.argsort(-np.round(remainder, 9), kind="stable")[:left]] += 1
    elif left < 0:  # the 1e-9 above rounded up more than there is
        whole[np.argsort(remainder, kind="stable")[:-left]] -= 1
    return whole.astype(np.int64)


def _checked(scores: ArrayLike, capacity: ArrayLike | None) -> tuple[Floats, Floats]:
    score = np.asarray(scores, np.float64)
    if score.ndim != 1:
        raise ValueError(f"scores must be a vector, not of shape {score.shape}")
    if not np.isfinite(score).all() or (score < 0).any():
        bad = int(np.argmax(~np.isfinite(score) | (score < 0)))
        raise ValueError(f"scores must be finite and ≥ 0; number {bad} is {score[bad]}")
    limit = np.full(len(score), np.inf) if capacity is None else np.asarray(capacity, np.float64)
    if limit.shape != score.shape:
        raise ValueError(f"capacity must have shape {score.shape}, not {limit.shape}")
    if np.isnan(limit).any() or (limit < 0).any() or (np.isfinite(limit) & (limit != np.floor(limit))).any():
        raise ValueError("capacity must be whole numbers ≥ 0")
    return score / max(1.0, float(score.max(initial=0.0))), limit


@dataclass(frozen=True)
class Pool:
    """A previous task as the draw sees it. Rows and instructions are in the order of their uids, never of the file."""

    task: str
    instruction_of: Ints  # [rows] index of each row's instruction
    vectors: NDArray[np.float32] | None = None  # [instructions, d]
    row_vectors: NDArray[np.float32] | None = None  # [rows, d]
    scores: Floats | None = None  # [instructions] InsInfo, nats
    clusters: Ints | None = None  # [instructions] the tag cluster of each, for `unit: tag_cluster`
    row_scores: Floats | None = None  # [rows] loss or perplexity ratio; NaN = could not be measured
    instructions: int | None = None  # how many there are; None = those that rows carry

    @property
    def rows(self) -> int:
        """Rows that can be drawn."""
        return len(self.instruction_of)

    @property
    def counts(self) -> Ints:
        """[instructions] rows of each instruction."""
        n = int(self.instruction_of.max(initial=-1)) + 1 if self.instructions is None else self.instructions
        return np.bincount(self.instruction_of, minlength=n)


@dataclass(frozen=True)
class Draw:
    """What was drawn from one task: quota and grant of each instruction, and the rows."""

    quota: Ints  # [instructions]
    granted: Ints  # [instructions]
    rows: Ints  # indices of the drawn rows, ascending


TaskShares = Callable[[Sequence[Pool], Floats | None], Floats]
Draws = Callable[[Pool, int, np.random.Generator, "Context"], Draw]


@dataclass(frozen=True)
class Context:
    """What a draw may look at besides its pool."""

    current_vectors: NDArray[np.float32] | None = None  # [instructions of the current task, d]
    seed: int = 0
    systematic: bool = False  # quotas of instructions are rounded by systematic sampling


@dataclass(frozen=True)
class Selector:
    """A way to choose replay rows: how tasks share the budget, how a task's rows are drawn, and what both must know."""

    about: str
    shares: TaskShares
    draw: Draws
    needs: frozenset[str] = frozenset()  # of: distance, insinfo, vectors, row_vectors, loss, reference_loss


# --- how tasks share the budget ---


def _by_distance(pools: Sequence[Pool], distances: Floats | None) -> Floats:
    assert distances is not None
    return distances


def _by_size(pools: Sequence[Pool], distances: Floats | None) -> Floats:
    return np.array([p.rows for p in pools], np.float64)


def _equal(pools: Sequence[Pool], distances: Floats | None) -> Floats:
    return np.ones(len(pools))


def _by_ratio(pools: Sequence[Pool], distances: Floats | None) -> Floats:
    """Perplexity ratio of each task, exp(mean(loss - reference loss)): the geometric mean of its rows' ratios.

    A task that nothing could be measured of counts as one that lost nothing: 1.
    """
    found = []
    for pool in pools:
        assert pool.row_scores is not None
        measured = pool.row_scores[np.isfinite(pool.row_scores) & (pool.row_scores > 0)]
        found.append(float(np.exp(np.log(np.sort(measured)).mean())) if len(measured) else 1.0)
    return np.array(found, np.float64)


# --- how a task's rows are drawn ---


def _grouped(pool: Pool, quota: Ints, group_of_row: Ints, rng: np.random.Generator) -> Ints:
    """Rows drawn uniformly without replacement, `quota[g]` of each group g of rows (-1 = no group)."""
    order = rng.permutation(pool.rows)
    group = group_of_row[order]
    by_group = np.argsort(group, kind="stable")
    sorted_group = group[by_group]
    place = np.arange(pool.rows) - np.searchsorted(sorted_group, sorted_group)  # place of a row inside its group
    taken = (sorted_group >= 0) & (place < quota[np.maximum(sorted_group, 0)])
    return np.sort(order[by_group[taken]])


def _result(pool: Pool, rows: Ints, quota: Ints | None = None) -> Draw:
    granted = np.bincount(pool.instruction_of[rows], minlength=len(pool.counts))
    return Draw(granted if quota is None else quota, granted, rows)


def draw_uniform(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """N rows, each equally likely."""
    everything = np.zeros(pool.rows, np.int64)
    return _result(pool, _grouped(pool, np.array([n]), everything, rng))


def draw_insinfo(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """β_k = s_k / Σ s · n rows of instruction k (InsCL Eq. 5); inside an instruction uniform."""
    assert pool.scores is not None
    if pool.clusters is not None:
        return _draw_clusters(pool, n, rng, context)
    quota = allocate(pool.scores, n, pool.counts, rng if context.systematic else None)
    return _result(pool, _grouped(pool, quota, pool.instruction_of, rng), quota)


def _draw_clusters(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """The same over tag clusters, with s the mean InsInfo of a cluster's instructions; inside a cluster uniform."""
    assert pool.scores is not None and pool.clusters is not None
    size = np.bincount(pool.clusters)
    mean = np.bincount(pool.clusters, pool.scores) / np.maximum(size, 1)
    cluster_of_row = pool.clusters[pool.instruction_of]
    rows = np.bincount(cluster_of_row, minlength=len(size))
    quota = allocate(mean, n, rows, rng if context.systematic else None)
    return _result(pool, _grouped(pool, quota, cluster_of_row, rng))


def draw_prototype_data(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """k-means over the rows' vectors, one centre an instruction; the n rows nearest to their own centres."""
    assert pool.row_vectors is not None
    _, nearness = _k_means(pool.row_vectors, len(pool.counts), context.seed)
    return _result(pool, np.sort(np.argsort(-nearness, kind="stable")[:n]))


def draw_prototype_instruction(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """k-means over instructions with the best silhouette; n random rows of those nearest to a centre first."""
    assert pool.vectors is not None
    label, nearness = _best_k_means(pool.vectors, context.seed)
    prototypes = np.array([max(np.flatnonzero(label == c), key=lambda i: (nearness[i], -i)) for c in np.unique(label)])
    first = np.isin(np.arange(len(pool.counts)), prototypes)
    return _in_order(pool, n, np.where(first, 0, 1), rng)


def draw_diverse_instruction(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """N rows of the instruction least like the current task's (smallest summed cosine); the next where it runs out."""
    assert pool.vectors is not None and context.current_vectors is not None
    likeness = (pool.vectors.astype(np.float64) @ context.current_vectors.astype(np.float64).T).sum(axis=1)
    return _in_order(pool, n, np.argsort(np.argsort(likeness, kind="stable")), rng)


def _in_order(pool: Pool, n: int, level: Ints, rng: np.random.Generator) -> Draw:
    """N rows, those of instructions of a lower level first, uniform inside a level."""
    order = rng.permutation(pool.rows)
    return _result(pool, np.sort(order[np.argsort(level[pool.instruction_of[order]], kind="stable")][:n]))


def _k_means(x: NDArray[np.float32], k: int, seed: int) -> tuple[Ints, Floats]:
    """(cluster, cosine to its centre) of every vector, with at most k clusters."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    k = min(k, len(np.unique(x, axis=0)))
    with threadpool_limits(1):  # one thread sums in one order
        fit = KMeans(k, n_init=1, random_state=seed).fit(x)
    centre = fit.cluster_centers_[fit.labels_].astype(np.float64)
    nearness = (x * centre).sum(axis=1) / np.maximum(np.linalg.norm(centre, axis=1), 1e-12)
    return fit.labels_.astype(np.int64), np.round(nearness, 6)  # equal to 1e-6 is equal: ties go by uid


MOST_CLUSTERS = 32  # silhouettes are quadratic; more prototypes than this an InsCL task never had


def _best_k_means(x: NDArray[np.float32], seed: int) -> tuple[Ints, Floats]:
    """k-means with the number of clusters that has the largest mean silhouette."""
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(x, axis=0))
    tried = [_k_means(x, k, seed) for k in range(2, min(distinct - 1, MOST_CLUSTERS) + 1)]
    if not tried:  # fewer than three distinct instructions: each is its own prototype
        return _k_means(x, distinct, seed)
    some = np.random.default_rng(seed).permutation(len(x))[:2000]  # silhouettes are quadratic

    def silhouette(fit: tuple[Ints, Floats]) -> float:
        label = fit[0][some]
        return float(silhouette_score(x[some], label)) if 1 < len(np.unique(label)) < len(some) else -1.0

    return max(tried, key=silhouette)


def draw_highest(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """The n rows of the highest score; rows that could not be measured come last, ties by uid."""
    assert pool.row_scores is not None
    score = np.where(np.isfinite(pool.row_scores), np.round(pool.row_scores, 6), -np.inf)
    return _result(pool, np.sort(np.argsort(-score, kind="stable")[:n]))


def draw_nothing(pool: Pool, n: int, rng: np.random.Generator, context: Context) -> Draw:
    """No rows."""
    return _result(pool, np.zeros(0, np.int64))


SELECTORS: dict[str, Selector] = {
    "inscl": Selector(
        "tasks by Wasserstein distance, instructions by InsInfo (InsCL)",
        _by_distance, draw_insinfo, frozenset({"distance", "insinfo"}),
    ),
    "dynamic_only": Selector(
        "tasks by Wasserstein distance, rows uniform (InsCL's ablation)", _by_distance, draw_uniform,
        frozenset({"distance"}),
    ),
    "insinfo_only": Selector(
        "equal share a task, instructions by InsInfo (InsCL's ablation)", _equal, draw_insinfo, frozenset({"insinfo"})
    ),
    "random": Selector("every previous row equally likely: tasks by size, rows uniform", _by_size, draw_uniform),
    "uniform": Selector("equal share a task, rows uniform (InsCL's random replay)", _equal, draw_uniform),
    "prototype_data": Selector(
        "equal share a task, rows nearest to the k-means centres of its rows", _equal, draw_prototype_data,
        frozenset({"row_vectors"}),
    ),
    "prototype_instruction": Selector(
        "equal share a task, rows of the instructions nearest to k-means centres", _equal, draw_prototype_instruction,
        frozenset({"vectors"}),
    ),
    "diverse_instruction": Selector(
        "equal share a task, rows of the instruction least like the current task's", _equal, draw_diverse_instruction,
        frozenset({"vectors"}),
    ),
    "highest_loss": Selector(
        "equal share a task, rows with the highest loss under the policy", _equal, draw_highest, frozenset({"loss"})
    ),
    "perplexity_ratio": Selector(
        "tasks by perplexity ratio of policy to reference, rows with the highest ratio (after RGD-R)",
        _by_ratio, draw_highest, frozenset({"loss", "reference_loss"}),
    ),
    "none": Selector("no replay", _equal, draw_nothing),
}  # fmt: skip


def generator(seed: int, stage: int, task: str) -> np.random.Generator:
    """The generator of one task's draw: the same whatever the order of rows or of other tasks' draws."""
    return np.random.default_rng([seed, stage, *task.encode()])
