"""The map of a stream: its instructions on a plane, by the first two principal components of their embeddings.

For the eye only: no number of the curation comes from it. Distances on the plane are smaller than those in full.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curate.models.embedder import Vectors

DECIMALS = 4  # so that the last bits of a kernel decide nothing


def coordinates(vectors: Vectors) -> tuple[NDArray[np.float32], list[float]]:
    """Places [n, 2] on the plane, and the share of the variance that each of its two axes holds.

    The sign of an axis is fixed: the component of largest size is positive. One distinct vector lies at (0, 0).

    Args:
        vectors: [n, d] embeddings; centred in place.
    """
    from threadpoolctl import threadpool_limits

    if not vectors.size:
        return np.zeros((len(vectors), 2), np.float32), [0.0, 0.0]
    with threadpool_limits(1):  # one thread sums in one order
        vectors -= vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        variance, axes = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))  # ascending
        total, axes = float(variance.clip(0).sum()), axes[:, ::-1][:, :2]
        axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) < 0, -1.0, 1.0)
        places = vectors @ axes.astype(np.float32)
    flat = np.zeros((len(vectors), 2), np.float32)
    flat[:, : places.shape[1]] = places.round(DECIMALS) + 0.0  # + 0: no negative zeros
    shares = [round(float(v), DECIMALS) for v in variance[::-1][:2].clip(0) / (total or 1.0)]
    return flat, [*shares, 0.0][:2]
