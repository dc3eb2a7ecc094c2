"""Wasserstein distances over centroids: seconds at 50,000 × 50,000 instructions, and whether the bound holds.

    python benchmarks/transport.py [--size 50000] [--trials 100] [--points 4000]

`size`: two sides of random unit vectors around 200 topics each (384 dimensions), 1,024 centroids a side: no matrix of
size × size is made. `trials`: sides of `points` vectors with random topics, widths and masses, exact against centroids:
|exact − estimate| ≤ bound must hold in each (POT's exact solver takes some seconds a trial). The peer is that solver.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray

from curate.config import DistanceConfig
from curate.distance import side, task_distance, wasserstein


def points(rng: np.random.Generator, n: int, topics: int, width: float) -> NDArray[np.float32]:
    """Vectors [n, 384] around some topics."""
    centres = rng.normal(size=(topics, 384))
    return np.asarray(centres[rng.integers(0, topics, n)] + width * rng.normal(size=(n, 384)), np.float32)


def trial(seed: int, n: int) -> tuple[float, float, float, float, float]:
    """(exact, estimate, bound, seconds of the exact solver, of the estimate)."""
    rng = np.random.default_rng(seed)
    topics, width = int(rng.integers(5, 400)), float(rng.uniform(0.1, 1.0))
    a, b = (points(rng, n, topics, width) for _ in range(2))
    mass_a, mass_b = (rng.integers(1, 20, n).astype(float) for _ in range(2))
    start = time.perf_counter()
    exact = wasserstein(a, b, mass_a, mass_b)
    middle = time.perf_counter()
    config = DistanceConfig(max_points=n // 2, centroids=max(16, n // 8))
    found = task_distance(side(a, mass_a, config, seed), side(b, mass_b, config, seed))
    return exact, found.value, found.bound, middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--points", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    rng, config = np.random.default_rng(0), DistanceConfig.model_validate({})
    sides = [points(rng, args.size, 200, 0.5) for _ in range(2)]
    start = time.perf_counter()
    a, b = (side(each, np.ones(len(each)), config, 0) for each in sides)
    found = task_distance(a, b)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("| distinct instructions | centroids | seconds | W | bound | peak GiB, vectors included |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| {args.size:,} × {args.size:,} | {config.centroids:,} | {seconds:.1f} | {found.value:.4f} | "
          f"{found.bound:.4f} | {peak:.2f} |", flush=True)  # fmt: skip
    with ProcessPoolExecutor(args.processes) as pool:
        rows = list(pool.map(trial, range(args.trials), [args.points] * args.trials))
    exact, value, bound, slow, quick = np.array(rows).T
    gap = np.abs(exact - value)
    held = int((gap <= bound).sum())
    print(f"\n{args.points:,} × {args.points:,}: within the bound in {held} of {len(rows)} trials; "
          f"gap / bound: median {np.median(gap / bound):.2f}, most {np.max(gap / bound):.2f}; gap / exact: median "
          f"{np.median(gap / exact):.3f}. Exact {np.median(slow):.1f} s, centroids {np.median(quick):.1f} s "
          f"(medians, {args.processes} at once).")  # fmt: skip


if __name__ == "__main__":
    main()
