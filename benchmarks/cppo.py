"""Two tasks with a verifiable reward, one after the other: what is still answered rightly? PPO and CPPO, some seeds.

    python benchmarks/cppo.py FOLDER [--model examples/starter] [--seeds 3] [--arms ppo,ppo-ewc,cppo-reward,…]

FOLDER holds the SuperNI files sentiment_analysis.jsonl.gz and detection.jsonl.gz. 200 prompts of each are trained on
and 100 test rows of each are held out, of those whose prompt has at most 200 tokens and whose references at most 4. The
reward is exact match. A warm-up stage of `train cft` on 100 other rows of each task makes right answers possible; then
`train stream` runs a stage of reinforcement learning a task, scored on both tasks by `metric: exact`. KL is the last
phase's to the model before the stage, in nats a sample. `ppo-replay` brings a fifth of its prompts from the first task.
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
from train.stream.results import difference, written
from train.stream.screen import Terminal

ROOT = Path(__file__).parent.parent
TASKS = ("sentiment_analysis", "detection")
TRAINED, HELD_OUT, WARM = 200, 100, 100
PLAIN = {"train.weights.kind": "none", "train.retention.weight": 0}
ARMS: dict[str, dict[str, Any]] = {
    "ppo": PLAIN,
    "ppo-replay": {**PLAIN, "replay": {"selector": "random", "per_task": TRAINED // 5},
                   "train.mixture": {"current": 0.8, "replay": 0.2}},
    "ppo-ewc": {**PLAIN, "train.ewc.weight": 100},
    "cppo-reward": {"train.weights": {"kind": "heuristic", "lead": "reward"}},
    "cppo-probability": {"train.weights": {"kind": "heuristic", "lead": "probability"}},
    "cppo-learned": {"train.weights.kind": "learned"},
}  # fmt: skip
Row = dict[str, Any]


def write_split(folder: Path, source: Path, tokens: Any, seed: int) -> None:
    """<task>.train.jsonl.gz, <task>.warm.jsonl.gz and <task>.test.jsonl.gz of a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        with gzip.open(source / f"{task}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if tokens(row["definition"] + row["input"]) <= 200
                and max(tokens(each) for each in row["outputs"]) <= 4]  # fmt: skip
        random.Random(f"{seed}/{task}").shuffle(rows)
        train = [row for row in rows if row.get("split") != "test"]
        test = [row for row in rows if row.get("split") == "test"]
        if not test:
            train, test = train[HELD_OUT:], train[:HELD_OUT]
        parts = {"warm": train[:WARM], "train": train[WARM : WARM + TRAINED], "test": test[:HELD_OUT]}
        for name, some in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in some)
            (folder / f"{task}.{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def tasks(folder: Path, part: str) -> list[dict[str, str]]:
    """The tasks of a stream, or of a manifest."""
    return [{"name": t, "path": str(folder / f"{t}.{part}.jsonl.gz"), "format": "superni"} for t in TASKS]


def before(folder: Path, start: str, seed: int) -> Path:
    """The model that answers rightly now and then; and the manifest that all are scored on."""
    everything = {"selector": "random", "ratio": 1000}
    for part in ("warm", "test"):
        build({"tasks": tasks(folder, part), "replay": everything, "seed": seed, "out": str(folder / part)})
    if not (folder / "start/model").is_dir():
        words = [f"model={start}", f"data={folder / 'warm'}", f"out={folder / 'start'}", f"seed={seed}",
                 "num_train_epochs=2", "learning_rate=3e-4", "per_device_train_batch_size=16",
                 "save_strategy=no"]  # fmt: skip
        run("cft", *load(CftConfig, None, words), quiet=True)
    return folder / "start/model"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/cppo-proof"))
    for name, value in (("seeds", 3), ("first", 0), ("steps", 80)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if odd := [arm for arm in args.arms.split(",") if arm not in ARMS]:
        parser.error(f"no arm {odd[0]!r}: there are {', '.join(ARMS)}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tables = []
    for seed in range(args.first, args.first + args.seeds):
        folder = args.out / f"seed-{seed}"
        write_split(folder, args.folder, lambda text: len(tokenizer(text, verbose=False).input_ids), seed)
        given = {
            "name": "two tasks with a verifiable reward", "model": str(before(folder, args.model, seed)),
            "seeds": [seed], "tasks": tasks(folder, "train"), "replay": {"selector": "none"}, "method": "cppo",
            "train": {
                "max_steps": args.steps, "per_device_train_batch_size": 64, "save_strategy": "no",
                "learning_rate": 3e-4, "lr_scheduler_type": "constant", "reward": "exact", "too_long": "drop",
                "logging_steps": 1, "kl": {"most": 1e6, "coef": 0.02},
                "rollouts": {"prompts": 16, "k": 4, "max_new_tokens": 6, "passes": 2},
            },
            "evaluation": {"data": str(folder / "test"), "metric": "exact", "max_new_tokens": 6, "batch_size": 64,
                           "every_task": True},
            "bounds": {"none": False, "single": False, "joint": False}, "workers": args.workers,
            "arms": {arm: ARMS[arm] for arm in args.arms.split(",")}, "out": str(folder / "stream"),
        }  # fmt: skip
        made = stream(checked(StreamConfig, given), screen=Terminal(Console(stderr=True)))
        where = pl.lit(str(folder / "stream/stages"))
        tables.append(made.with_columns(where=where))
    table = pl.concat(tables)
    print("\n| arm | before | after stage 1 | after stage 2 | forgetting of the first | both | "
          "more than PPO: the first, both | KL |\n| --- | --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    table = table.with_columns(first=pl.col("scores").list.first())
    for arm in table["run"].unique(maintain_order=True):
        stages = [table.filter(run=arm, stage=stage).sort("seed") for stage in (0, 1, 2)]
        cells = [", ".join(written([r[j] for r in each["scores"].to_list()], 2) for j in (0, 1)) for each in stages]
        cells += [written(stages[2][name].to_list(), 2) for name in ("forgetting", "average_performance")]
        more = [_more(table, arm, of) for of in ("first", "average_performance")]
        cells.append(", ".join(more) if arm != "ppo" else "–")
        kl = ", ".join(written([_last_kl(Path(w) / f) for w, f in stage.select("where", "folder").iter_rows()], 2)
                       for stage in stages[1:])  # fmt: skip
        print(f"| {arm} | {' | '.join([*cells, kl])} |")


def _more(table: pl.DataFrame, arm: str, of: str) -> str:
    """A score at the end, less that of PPO, with its 95% interval."""
    found = difference(table, arm, "ppo", of)
    if found is None or found["interval"] is None:
        return "–"
    return f"{found['mean']:+.2f} [{found['interval'][0]:+.2f}, {found['interval'][1]:+.2f}]"


def _last_kl(stage: Path) -> float:
    """KL of the last phase to the model before the stage, nats a sample."""
    lines = [json.loads(line) for line in (stage / "train/log.jsonl").read_text().splitlines()]
    return float([line["kl_reference"] for line in lines if "kl_reference" in line][-1])


if __name__ == "__main__":
    main()
