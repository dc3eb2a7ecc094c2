"""Throughput of `train dpo` against TRL's DPOTrainer: one model, the same pairs, in one process, in turns.

    pip install -e '.[bench]'
    python benchmarks/dpo.py FOLDER [--model examples/starter] [--steps 8] [--batch 8] [--length 512] [--rounds 3]

FOLDER holds hh/harmless-base-train.jsonl.gz (long prompts, short answers) and pref/pandalm_human_pairs.jsonl.gz (short
prompts). Pairs with more than `length` tokens are left out beforehand. Float32, both with the reference's
log-probabilities computed before the first step, as the manifest has them for `train dpo`; that is not in the time. A
figure is pairs a second over all steps but the first two of each run. Losses of the first step are printed: ln 2.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from clock import Clock, against, count
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig as PeerConfig
from trl import DPOTrainer

from curate.build import build
from train.config import DpoConfig
from train.run import run
from train.settings import load
from train.trainer import RehearseTrainer

ROOT = Path(__file__).parent.parent
SETS = {"long prompts": "hh/harmless-base-train.jsonl.gz", "short prompts": "pref/pandalm_human_pairs.jsonl.gz"}


def pairs_of(inputs: Any) -> int:
    """Pairs of a pass: TRL stacks the better answers on the others."""
    return len(inputs["row"]) if "row" in inputs else len(inputs["input_ids"]) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    for name, value in (("steps", 8), ("batch", 8), ("length", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    for trainer in (RehearseTrainer, DPOTrainer):
        count(trainer, pairs_of)
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}\n")  # fmt: skip
    print("| pairs | train dpo, pairs a second | TRL | ours against it, pair by pair: median (min to max) |")
    print("| --- | --- | --- | --- |")
    for name, file in SETS.items():
        with tempfile.TemporaryDirectory() as place:
            mine, theirs = measure(args, args.folder / file, Path(place))
        print(f"| {name} | {statistics.median(mine):.2f} | {statistics.median(theirs):.2f} | {against(mine, theirs)} |",
              flush=True)  # fmt: skip


def measure(args: Any, file: Path, place: Path) -> tuple[list[float], list[float]]:
    """Pairs a second of both, round by round."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        every = [json.loads(line) for line in lines]
    sizes = {text: len(tokenizer(text, verbose=False).input_ids) for row in every
             for text in (row["prompt"], row["chosen"], row["rejected"])}  # fmt: skip
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in every
            if sizes[row["prompt"]] + max(sizes[row["chosen"]], sizes[row["rejected"]]) + 8 <= args.length]  # fmt: skip
    rows = rows[: args.steps * args.batch]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "pairs", "path": str(place / "rows.jsonl"), "format": "preference"}
    build(
        {"tasks": [task], "replay": {"selector": "none"}, "policy": {"model": args.model}, "out": str(place / "data")}
    )
    turned = [{"prompt": [{"role": "user", "content": row["prompt"]}],
               **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}}
              for row in rows]  # fmt: skip
    shared = {"max_steps": args.steps, "per_device_train_batch_size": args.batch, "learning_rate": 1e-5,
              "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False,
              "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}  # fmt: skip

    def ours() -> float:
        words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shared.items()]
        settings = [f"model={args.model}", f"data={place / 'data'}", f"out={place / 'ours'}", "resume=false"]
        run("dpo", *load(DpoConfig, None, settings + words), quiet=True)
        return float(json.loads((place / "ours/log.jsonl").read_text().splitlines()[0])["preference"])

    def peer() -> float:
        config = PeerConfig(str(place / "trl"), max_length=args.length, gradient_checkpointing=False, beta=0.1,
                            precompute_ref_log_probs=True, model_init_kwargs={"dtype": "float32"},
                            **shared)  # fmt: skip
        trainer = DPOTrainer(args.model, args=config, train_dataset=Dataset.from_list(turned),
                             processing_class=tokenizer)  # fmt: skip
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        for kept, go in zip(rates, (ours, peer), strict=True):
            torch.manual_seed(0)
            first = go()
            kept.append(Clock.units / Clock.seconds)
            print(f"<!-- {go.__name__}: {Clock.units} pairs in {Clock.seconds:.1f} s, first loss {first:.4f} "
                  f"(ln 2 = {math.log(2):.4f}) -->", flush=True)  # fmt: skip
    return rates


if __name__ == "__main__":
    main()
