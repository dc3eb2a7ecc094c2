"""A stream that is killed at random moments and goes on: is its table the same as that of one that nothing disturbs?

    python benchmarks/stream_kills.py [--kills 10] [--seed 0] [KEY=VALUE …]

The stream of examples/stream, 6 steps a stage, a checkpoint every second one, 8 items a task. The process that plans
is killed (SIGKILL), and so are those that train, at a moment drawn uniformly from the first 8 seconds of their work.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = ["train.max_steps=6", "train.save_steps=2", "evaluation.per_task=8", "--quiet"]


def command(out: Path, words: list[str]) -> list[str]:
    """The command line of the stream."""
    config = str(ROOT / "examples/stream.yaml")
    return [sys.executable, "-m", "train.cli", "stream", "--config", config, f"out={out}", *WORDS, *words]


def digest(out: Path) -> str:
    """Of the table's bytes."""
    return hashlib.sha256((out / "results.parquet").read_bytes()).hexdigest()[:16]


def newest(out: Path) -> float:
    """When anything was last written into a stage."""
    return max((f.stat().st_mtime for f in out.glob("stages/*/*") if f.exists()), default=0.0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, cut = Path(place) / "whole", Path(place) / "cut"
        began = time.monotonic()
        subprocess.run(command(whole, args.words), check=True, cwd=ROOT)
        print(f"undisturbed: {time.monotonic() - began:.0f} s, {digest(whole)}", flush=True)
        for kill in range(args.kills):
            process = subprocess.Popen(command(cut, args.words), cwd=ROOT)
            began = time.time()
            while process.poll() is None and not newest(cut) > began + 1:  # its stages' configs are written at once
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 8))
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            done = len(list(cut.glob("stages/*/eval-*/metrics.json")))
            print(f"kill {kill + 1}: {'it had ended' if ended else f'after {time.time() - began:.1f} s'}, "
                  f"{done} stages scored", flush=True)  # fmt: skip
        subprocess.run(command(cut, args.words), check=True, cwd=ROOT)
        same = digest(cut) == digest(whole)
        print(f"resumed: {digest(cut)}: {'the same table' if same else 'ANOTHER TABLE'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
