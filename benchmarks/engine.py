"""`engine: ray` against the local engine on one machine: the same bytes, and what the pool costs or saves.

    python benchmarks/engine.py [--workers 1,2,4] [--rounds 2] [--scale 6]

The demo's stream with `scale` times its rollouts and rewrites, each build with a cache of its own, every process with
one thread a forward pass, so that all compute the same. Rounds are in turns; a build with one actor is held against the
local one of its round. Seconds are of the whole command, Ray's start and end included.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(out: Path, scale: int, words: list[str]) -> tuple[float, str]:
    """Seconds of a build, and a hash of all that it wrote."""
    command = [sys.executable, "-m", "curate.cli", "build", str(ROOT / "examples/demo/config.yaml"), "--quiet",
               f"out={out / 'run'}", f"cache={out / 'cache'}", "engine.threads=1", f"rollouts.per_task={4 * scale}",
               "rollouts.block=8", f"augment.per_task={2 * scale}", "augment.block=8", *words]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for file in sorted((out / "run").iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return seconds, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=int, default=6)
    args = parser.parse_args()
    cases: dict[str, list[str]] = {"local": []}
    for n in args.workers.split(","):
        cases[f"ray, {n} actor{'s' * (n != '1')}"] = ["engine.kind=ray", f"engine.workers={n}"]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    hashes: dict[str, set[str]] = {name: set() for name in cases}
    for _ in range(args.rounds):
        for name, words in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                took, digest = build(Path(folder), args.scale, words)
            seconds[name].append(took)
            hashes[name].add(digest)
            print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
    print("| engine | seconds, median | against local, round by round | every file's bytes |")
    print("| --- | --- | --- | --- |")
    for name, some in seconds.items():
        ratios = [a / b for a, b in zip(some, seconds["local"], strict=True)]
        cell = ", ".join(f"{ratio:.2f}" for ratio in ratios) if name != "local" else "–"
        same = hashes[name] == hashes["local"] and len(hashes[name]) == 1
        print(f"| {name} | {statistics.median(some):.0f} | {cell} | {'the same' if same else 'DIFFERENT'} |")


if __name__ == "__main__":
    main()
