"""Throughput of `train cft` against TRL's SFTTrainer: one model, the same rows and dtype, in one process, in turns.

    pip install -e '.[bench]'
    python benchmarks/sft.py [--model FOLDER] [--steps 8] [--batch 8] [--length 512] [--rounds 3] [--dtype float32]

Rows: 77 of each of the sixteen SuperNI categories in examples/superni, those of more than `length` tokens left out
beforehand. Each step has `batch` packs of `length` tokens (or `batch` rows without packing). TRL's own default packs
whole samples and feeds them as one row ("bfd"); "wrapped" cuts samples and lets them see each other in a pack, which
spares the mask: it trains something else, and stands here for the whole picture. A figure is tokens of samples a
second over all steps but the first two of each run, padding not counted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch
import transformers
import trl
from clock import Clock, against, count
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from curate.build import build
from curate.manifest import read
from train.config import CftConfig
from train.data import Examples
from train.run import run
from train.settings import load
from train.trainer import RehearseTrainer

ROOT = Path(__file__).parent.parent


def tokens_of(inputs: Any) -> int:
    """Tokens of samples, padding not counted."""
    if "segment" in inputs:
        return int((inputs["segment"] >= 0).sum())
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def manifest(folder: Path) -> Path:
    """A manifest of the shipped rows."""
    paths = sorted((ROOT / "examples/superni").glob("*.jsonl.gz"))
    tasks = [{"name": p.name.split(".")[0], "path": str(p), "format": "superni", "split": "train"} for p in paths]
    build({"tasks": tasks, "replay": {"selector": "random", "per_task": 77}, "out": str(folder / "all")})
    return folder / "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the matrix products")
    for name, value in (("steps", 8), ("batch", 8), ("length", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    for trainer in (RehearseTrainer, SFTTrainer):
        count(trainer, tokens_of)
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


def measure(args: Any, place: Path) -> None:
    data = manifest(place)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    short = set(Examples.read(data, tokenizer, max_length=args.length, too_long="drop").uid)
    rows = read(data).samples.filter(pl.col("uid").is_in(short)).select("prompt", "completion").to_dicts()
    half = args.dtype == "bfloat16"
    shared = {"max_steps": args.steps, "per_device_train_batch_size": args.batch, "learning_rate": 1e-4,
              "report_to": "none", "save_strategy": "no", "logging_steps": 1000, "bf16": half,
              "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}  # fmt: skip

    def ours(packing: bool) -> None:
        words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shared.items()]
        settings = [f"model={args.model}", f"data={data}", f"out={place / 'ours'}", f"max_length={args.length}",
                    "too_long=drop", f"packing={str(packing).lower()}", "dtype=float32", "resume=false"]  # fmt: skip
        run("cft", *load(CftConfig, None, settings + words), quiet=True)

    def peer(packing: bool, strategy: str = "bfd") -> None:
        config = SFTConfig(str(place / "trl"), max_length=args.length, packing=packing, packing_strategy=strategy,
                           gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, **shared)  # fmt: skip
        SFTTrainer(args.model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()

    runs = {
        "train cft, packing": lambda: ours(True),
        "TRL, packing (bfd, its default)": lambda: peer(True),
        "TRL, packing (wrapped: samples see each other)": lambda: peer(True, "wrapped"),
        "train cft, padding": lambda: ours(False),
        "TRL, padding": lambda: peer(False),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, go in runs.items():
            torch.manual_seed(0)
            go()
            rates[name].append(Clock.units / Clock.seconds)
            print(f"{name}: {Clock.units:,} tokens in {Clock.seconds:.1f} s", flush=True)
    print(f"\ntrl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, {args.dtype}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}")  # fmt: skip
    print("| | tokens a second, median | ours against it, pair by pair: median (min to max) |\n| --- | --- | --- |")
    for name, each in rates.items():
        mine = rates["train cft, padding" if "padding" in name else "train cft, packing"]
        print(f"| {name} | {statistics.median(each):,.0f} | {against(mine, each) if 'TRL' in name else '–'} |")


if __name__ == "__main__":
    main()
