"""A prompt's answers in one row against a row each: time and peak memory of a forward and backward pass.

    python benchmarks/prefix.py [--model FOLDER] [--rounds 5]

Random tokens, every answer token a target, one prompt at a time, float32. What `auto` picks stands beside it. Peak is
of the process, each case in one of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from train.logprobs import token_logps
from train.prefix import Cost, batch_of, plan

ROOT = Path(__file__).parent.parent
SHAPES = ((256, 64, 4, 1.8), (512, 64, 8, 3.0), (64, 256, 2, None))  # prompt, answer, J, bar


def one(model_name: str, p: int, c: int, j: int, layout: str, rounds: int) -> dict[str, object]:
    """Seconds (the best of some rounds), peak MiB, log-probabilities and rows of a layout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompt = rng.integers(5, 6000, p).astype(np.int32)
    answers = [rng.integers(5, 6000, c).astype(np.int32) for _ in range(j)]
    rows = plan([p], [[c] * j], layout, Cost.of(model))  # type: ignore[arg-type]
    batch = batch_of([prompt], [answers], rows)
    before, best, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, float("inf"), torch.zeros(0)
    for _ in range(rounds):
        model.zero_grad()
        start = time.perf_counter()
        logps = token_logps(model, batch)
        found = logps.new_zeros(j).index_add(0, batch["segment"][batch["loss_mask"]], logps[batch["loss_mask"]])
        found.sum().backward()
        best = min(best, time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": best, "peak": peak, "logps": (found / c).tolist(), "rows": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help="of one process: prompt,answer,J,layout")
    args = parser.parse_args()
    if args.case:
        p, c, j, layout = args.case.split(",")
        print(json.dumps(one(args.model, int(p), int(c), int(j), layout, args.rounds)))
        return
    print("| prompt, answer, J | one row: s | a row each: s | ratio | bar | MiB | MiB | auto: s | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for p, c, j, bar in SHAPES:
        found = {}
        for layout in ("shared", "separate", "auto"):
            command = [sys.executable, __file__, "--model", args.model, "--rounds", str(args.rounds)]
            done = subprocess.run(
                [*command, "--case", f"{p},{c},{j},{layout}"], capture_output=True, text=True, check=True
            )
            found[layout] = json.loads(done.stdout.splitlines()[-1])
        a, b, auto = found["shared"], found["separate"], found["auto"]
        gap = max(abs(x - y) for x, y in zip(a["logps"], b["logps"], strict=True))
        print(f"| {p}, {c}, {j} | {a['seconds']:.3f} | {b['seconds']:.3f} | {b['seconds'] / a['seconds']:.2f} | "
              f"{bar or '–'} | {a['peak']:.0f} | {b['peak']:.0f} | "
              f"{'one' if auto['rows'] == 1 else 'each'}: {auto['seconds']:.3f} | {gap:.1e} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
