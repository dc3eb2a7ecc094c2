"""Throughput of rollouts against `model.generate`, on the same prompts, in one process, in turns.

    python benchmarks/generation.py [--model FOLDER] [--k 4] [--prompts 192] [--new 96] [--batch 32] [--rounds 3]

The peer is transformers' own `generate` as people call it: prompts in the order of the file, a fixed batch, left
padding, `num_return_sequences=K`. Both sample at temperature 1 with the same length limit and the same number of
sequences a forward pass; both return text and tokens, ours also the log-probability of every token. Tokens differ
from run to run of the peer, so the figure is tokens a second, end tokens counted, padding not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from curate.config import ModelConfig
from curate.models.base import Prompt, Sampling
from curate.models.chat import prompt_ids
from curate.models.local import LocalModel

ROOT = Path(__file__).parent.parent


def prompts_of(n: int) -> list[Prompt]:
    found = []
    for path in sorted((ROOT / "examples/superni").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                found.append(Prompt(row["id"], [{"role": "user", "content": f"{row['definition']}\n\n{row['input']}"}]))
    step = max(1, len(found) // n)
    return found[::step][:n]


def peer(model: LocalModel, prompts: list[Prompt], sampling: Sampling, batch: int) -> int:
    """Tokens that transformers' generate wrote."""
    tokenizer, net, total = model.tokenizer, model.model, 0
    size = max(1, batch // sampling.k)
    for at in range(0, len(prompts), size):
        ids = [prompt_ids(tokenizer, p) for p in prompts[at : at + size]]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(net.device)
        out = net.generate(**inputs, do_sample=True, num_return_sequences=sampling.k, top_k=0,
                           max_new_tokens=sampling.max_new_tokens, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        new = out[:, inputs["input_ids"].shape[1] :]
        total += int((new != tokenizer.pad_token_id).sum())
        tokenizer.batch_decode(new, skip_special_tokens=True)
    return total


def ours(model: LocalModel, prompts: list[Prompt], sampling: Sampling, batch: int) -> int:
    """Tokens that the local generator wrote."""
    return sum(len(c.token_ids or ()) for some in model.generate(prompts, sampling) for c in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    for name, value in (("k", 4), ("prompts", 192), ("new", 96), ("batch", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model = LocalModel(ModelConfig(model=args.model, batch_size=args.batch))
    sampling = Sampling(k=args.k, max_new_tokens=args.new)
    every = prompts_of(args.prompts)
    room = model.room(every)
    prompts = [p for p, r in zip(every, room, strict=True) if r is None or r >= args.new]
    torch.manual_seed(0)
    rates: dict[str, list[float]] = {"transformers generate": [], "curate": []}
    runs: list[tuple[str, Any]] = [("transformers generate", peer), ("curate", ours)]
    for _, run in runs:
        run(model, prompts[:8], sampling, args.batch)  # warm-up
    for _ in range(args.rounds):
        for name, run in runs:
            start = time.perf_counter()
            n = run(model, prompts, sampling, args.batch)
            rates[name].append(n / (time.perf_counter() - start))
            print(f"{name}: {n:,} tokens, {rates[name][-1]:,.0f} a second", flush=True)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    print(f"| | tokens a second, median of {args.rounds} |\n| --- | --- |")
    for name, each in rates.items():
        print(f"| {name} | {statistics.median(each):,.0f} |")
    print(f"| ratio, pair by pair: median (min to max) | {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}) |\n| device | {model.model.device} |")  # fmt: skip


if __name__ == "__main__":
    main()
