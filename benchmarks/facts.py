"""Facts that changed: does PBL learn the new ones and keep the others? Three relations, through `train stream`.

    python benchmarks/facts.py CONFLICT_FOLDER [--seeds 3] [--out FOLDER]

CONFLICT_FOLDER holds templama.jsonl.gz. Of each relation (team, employer, position) 40 subjects' facts change and 80 do
not; a seed draws them. The starter model is first fine-tuned on the old answer of all of them (`train cft`), which is
what it then knows. The stream teaches the new answers, relation after relation. Scored after every stage, on questions
of the relations so far: changed facts by their new answer, the others by their old one, `contains` (the paper's: the
lower-cased answer is a substring). KGR: of what the first model answers wrongly, the share that is right now; KRR: of
what it answers rightly, the share that still is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from curate.build import build
from curate.settings import checked
from train.config import CftConfig
from train.run import run
from train.settings import load
from train.stream import StreamConfig, stream
from train.stream.results import written
from train.stream.screen import Terminal

ROOT = Path(__file__).parent.parent
RELATIONS = {"P54": "team", "P108": "employer", "P39": "position"}
CHANGED, KEPT = 40, 80
Row = dict[str, Any]
PBL = {
    "method": "pbl",
    "build.rollouts": {"k": 4, "max_new_tokens": 16, "origins": ["current"], "reward": "contains"},
    "build.candidates": {"similarity": True, "threshold": 0.7},
}
ARMS: dict[str, dict[str, Any]] = {
    "CFT": {},
    "CFT + KL 0.1": {"train.kl.weight": 0.1},
    "CFT + KL 1": {"train.kl.weight": 1.0},
    "PBL": PBL,
    "PBL without preference terms": {**PBL, "train.alpha": 0.0, "train.beta": 0.0},
    "PBL literal": {**PBL, "train.negative": "literal"},
    "CFT + replay": {"replay": {"selector": "random", "per_task": 8}},
}


def write(source: Path, folder: Path, seed: int) -> None:
    """<relation>.known, .new and .now.jsonl: old answers of all, new ones of what changes, what is right at the end."""
    with gzip.open(source / "templama.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    folder.mkdir(parents=True, exist_ok=True)
    for relation, name in RELATIONS.items():
        newest = {row["question"]: row for row in sorted(rows, key=lambda r: r["new_date"])
                  if row["relation"] == relation}  # fmt: skip
        mine = [newest[question] for question in sorted(newest)]
        random.Random(f"{seed}/{relation}").shuffle(mine)
        changed, kept = mine[:CHANGED], mine[CHANGED : CHANGED + KEPT]
        parts = {"known": [(r, "old") for r in changed + kept], "new": [(r, "new") for r in changed],
                 "now": [(r, "new") for r in changed] + [(r, "old") for r in kept]}  # fmt: skip
        for part, some in parts.items():
            lines = [json.dumps({"instruction": r["question"], "output": r[f"{side}_answer"]}) for r, side in some]
            (folder / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tasks(folder: Path, part: str) -> list[dict[str, str]]:
    """The tasks of a stream, or of a manifest."""
    return [{"name": n, "path": str(folder / f"{n}.{part}.jsonl"), "format": "alpaca"} for n in RELATIONS.values()]


def known(folder: Path, seed: int, epochs: int) -> Path:
    """The model that knows the old answers."""
    out, everything = folder / f"knows-{epochs}", {"selector": "random", "ratio": 1000}
    for part in ("known", "now"):
        build({"tasks": tasks(folder, part), "replay": everything, "out": str(folder / part)})
    if not (out / "model").is_dir():
        words = [f"model={ROOT / 'examples/starter'}", f"data={folder / 'known'}", f"out={out}", f"seed={seed}",
                 f"num_train_epochs={epochs}", "learning_rate=1e-3", "per_device_train_batch_size=16",
                 "lr_scheduler_type=linear", "save_strategy=no"]  # fmt: skip
        run("cft", *load(CftConfig, None, words), quiet=True)
    return out / "model"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="passes over what is known before")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/facts"))
    args = parser.parse_args()
    tables = []
    for seed in range(args.seeds):
        folder = args.out / f"seed-{seed}"
        write(args.folder, folder, seed)
        given = {
            "name": "facts that changed", "model": str(known(folder, seed, args.epochs)), "seeds": [seed],
            "tasks": tasks(folder, "new"), "replay": {"selector": "none"},
            "train": {"learning_rate": args.rate, "num_train_epochs": 6, "per_device_train_batch_size": 8,
                      "lr_scheduler_type": "linear", "save_strategy": "no"},
            "evaluation": {"data": str(folder / "now"), "metric": "contains", "max_new_tokens": 16, "batch_size": 64},
            "bounds": {"none": False, "single": False, "joint": False}, "workers": args.workers,
            "arms": {name: ARMS[name] for name in args.arms.split(",")}, "out": str(folder / "stream"),
        }  # fmt: skip
        tables.append(stream(checked(StreamConfig, given), screen=Terminal(Console(stderr=True))))
    table = pl.concat(tables)
    before = table.filter(pl.col("stage") == 0).unique("seed")["average_performance"].to_list()
    print(f"\nBefore: ACC {written(before, 3)}\n")
    print("| run | ACC | KGR | KRR | ACC by relation |\n| --- | --- | --- | --- | --- |")
    for name in table["run"].unique(maintain_order=True):
        end = table.filter(run=name, stage=len(RELATIONS))
        each = [written([scores[i] for scores in end["scores"].to_list()], 3) for i in range(len(RELATIONS))]
        cells = [written(end[c].to_list(), 3) for c in ("ACC", "KGR", "KRR")]
        print(f"| {name} | {' | '.join([*cells, ', '.join(each)])} |")


if __name__ == "__main__":
    main()
