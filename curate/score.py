"""InsInfo: how much an instruction's tags tell, given how common they are in a pool of instructions.

Source: InsCL (NAACL 2024), Eq. 4. Departure: a tag counts once an instruction, as the paper says and its code does not
(the code counts a tag as often as the tagger repeats it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def frequencies(pool: Iterable[Iterable[str]]) -> Counter[str]:
    """f_t: how many instructions of the pool carry tag t."""
    return Counter(tag for tags in pool for tag in set(tags))


def insinfo(tags: Sequence[Iterable[str]], pool: Sequence[Iterable[str]] | None = None) -> NDArray[np.float64]:
    """InsInfo of every instruction: Σ_t log(N / f_t), natural log, in nats.   InsCL Eq. 4; [n] sets -> [n].

    Args:
        tags: the tags of each of n instructions; repeats count once.
        pool: the tags of each of N instructions that f_t and N are counted over; None = `tags` itself.

    Returns:
        [n] values ≥ 0; 0 for an instruction without tags, and for one whose tags are everywhere.

    Raises:
        ValueError: a tag that no instruction of the pool carries (log N/0), or a string where a set of tags belongs.

    >>> insinfo([{"code"}, {"code", "sql"}]).round(4).tolist()  # log(2/2), log(2/2) + log(2/1)
    [0.0, 0.6931]
    """
    pool = tags if pool is None else pool
    for place, given in (("tags", tags), ("pool", pool)):
        if any(isinstance(one, str) for one in given):
            raise ValueError(f"{place} must be a sequence of sets of tags, not of strings")
    count, n = frequencies(pool), len(pool)
    return np.array([_sum(set(one), count, n) for one in tags], np.float64)


def _sum(tags: set[str], count: Counter[str], n: int) -> float:
    unknown = sorted(t for t in tags if not count[t])
    if unknown:
        raise ValueError(f"tag {unknown[0]!r} is not in the pool, so its information is unbounded; add its instruction")
    return math.fsum(math.log(n / count[t]) for t in tags)
