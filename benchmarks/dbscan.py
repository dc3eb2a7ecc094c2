"""DBSCAN over phrase vectors against scikit-learn's: labels, seconds, peak memory; and sizes that it has no memory for.

    python benchmarks/dbscan.py [--phrases 20000,100000] [--dense 40000] [--device cpu]

`mixed`: clusters of eight phrases on average, noise between them (unit vectors, 384 dimensions, eps 0.1, 5 samples), at
20,000 phrases against scikit-learn in turns, at 100,000 alone. `dense`: one cluster of all phrases. Each case in a
process of its own; peak is the process's, the vectors included. scikit-learn is not run on `dense`: one such cluster of
40,000 took 21 GB when it was measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

EPS, LEAST, DIMENSIONS = 0.1, 5, 384


def vectors(kind: str, n: int) -> NDArray[np.float32]:
    """Unit vectors [n, 384] in an order that tells nothing."""
    rng = np.random.default_rng(0)
    k, width = (1, 0.2) if kind == "dense" else (n // 8, 0.25)
    centres = rng.normal(size=(k, DIMENSIONS))
    found = centres[rng.integers(0, k, n)] + width * rng.normal(size=(n, DIMENSIONS))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def one(who: str, kind: str, n: int, device: str) -> dict[str, object]:
    """Seconds, peak GiB and labels of one run."""
    points = vectors(kind, n)
    if who == "ours":
        from curate.models.neighbours import Near  # noqa: F401  torch is imported before the clock starts
        from curate.tags import cluster

        names = [f"{i:08d}" for i in range(n)]
        cluster(names[:64], points[:64], [1] * 64, EPS, LEAST, device=device)
        start = time.perf_counter()
        labels = cluster(names, points, [1] * n, EPS, LEAST, device=device).labels
    else:
        from sklearn.cluster import DBSCAN

        start = time.perf_counter()
        labels = DBSCAN(eps=EPS, min_samples=LEAST, metric="cosine").fit(points).labels_
    seconds = time.perf_counter() - start
    first = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "clusters": len(set(labels.tolist()) - {-1}), "noise": int((labels == -1).sum()),
            "labels": [-1 if label == -1 else first[label] for label in labels.tolist()]}  # fmt: skip


def run(who: str, kind: str, n: int, device: str) -> dict[str, object]:
    """`one` in a process of its own."""
    words = [sys.executable, __file__, "--case", f"{who},{kind},{n}", "--device", device]
    return dict(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phrases", default="20000,100000")
    parser.add_argument("--dense", default="40000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", help="of one process: who,kind,n")
    args = parser.parse_args()
    if args.case:
        who, kind, n = args.case.split(",")
        print(json.dumps(one(who, kind, int(n), args.device)))
        return
    print(
        "| phrases | clusters, noise | ours: s | peak GiB | scikit-learn: s | peak GiB | ratio, pair by pair | labels |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    sizes = [(kind, int(n)) for kind, some in (("mixed", args.phrases), ("dense", args.dense)) for n in some.split(",")]
    for kind, n in sizes:
        beside = kind == "mixed" and n <= 20_000
        pairs = [(run("ours", kind, n, args.device), run("scikit-learn", kind, n, "cpu") if beside else None)
                 for _ in range(args.rounds if beside else 1)]  # fmt: skip
        ours, theirs = pairs[-1]
        seconds = statistics.median(float(o["seconds"]) for o, _ in pairs)  # type: ignore[arg-type]
        cells = ["–"] * 4
        if theirs is not None:
            ratios = sorted(float(t["seconds"]) / float(o["seconds"]) for o, t in pairs if t)  # type: ignore[arg-type]
            same = all(t is not None and o["labels"] == t["labels"] for o, t in pairs)
            slow = statistics.median(float(t["seconds"]) for _, t in pairs if t)  # type: ignore[arg-type]
            cells = [f"{slow:.1f}", f"{theirs['peak']:.2f}",
                     f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
                     "equal" if same else "DIFFERENT"]  # fmt: skip
        print(f"| {kind} {n:,} | {ours['clusters']:,}, {ours['noise']:,} | {seconds:.1f} | {ours['peak']:.2f} | "
              f"{' | '.join(cells)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
