"""Two tasks with a verifiable reward, one after the other: what is still answered rightly? PPO and CPPO, some seeds.

    python benchmarks/cppo.py FOLDER [--model examples/starter] [--seeds 3] [--arms ppo,ppo-replay,ppo-ewc,cppo,…]

FOLDER holds the SuperNI files sentiment_analysis.jsonl.gz and detection.jsonl.gz. 200 prompts of each are trained on
and 100 test rows of each are held out, of those whose prompt has at most 200 tokens and whose references at most 4. The
reward is exact match. Each arm runs through `train` as a user would run it: a warm-up stage of `train cft` on 100 other
rows of each task, so that right answers are drawn at all, then a stage of reinforcement learning a task, from the model
before. `train eval metric=exact` scores every checkpoint on both tasks; KL is the last phase's to the model before
the stage, in nats a sample. `ppo-replay` brings a fifth of its prompts from the first task.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from curate.build import build
from train.config import CftConfig, CppoConfig
from train.evaluate import EvalConfig, evaluate
from train.fisher import FisherConfig, fisher
from train.run import run
from train.settings import load

ROOT = Path(__file__).parent.parent
TASKS = ("sentiment_analysis", "detection")
TRAINED, HELD_OUT, WARM = 200, 100, 100
PLAIN = ["weights.kind=none", "retention.weight=0"]
ARMS: dict[str, list[str]] = {
    "ppo": PLAIN,
    "ppo-replay": PLAIN,
    "ppo-ewc": PLAIN,
    "cppo-reward": ["weights={kind: heuristic, lead: reward}"],
    "cppo-probability": ["weights={kind: heuristic, lead: probability}"],
    "cppo-learned": ["weights.kind=learned"],
}
Row = dict[str, Any]


def write_split(folder: Path, source: Path, tokens: Any, seed: int) -> None:
    """<task>.train.jsonl.gz, <task>.warm.jsonl.gz and <task>.test.jsonl.gz of a seed."""
    folder.mkdir(parents=True)
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
            with gzip.open(folder / f"{task}.{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in some)


def manifest(folder: Path, part: str, tasks: tuple[str, ...], per_task: int, seed: int, name: str) -> Path:
    """A manifest of the stream up to its last task, so many rows of each earlier one."""
    named = [{"name": t, "path": str(folder / f"{t}.{part}.jsonl.gz"), "format": "superni"} for t in tasks]
    replay = {"selector": "random", "per_task": per_task} if len(tasks) > 1 else {"selector": "none"}
    build({"tasks": named, "replay": replay, "seed": seed, "out": str(folder / name)})
    return folder / name


def train_arm(arm: str, folder: Path, start: str, seed: int, steps: int) -> tuple[list[str], list[float]]:
    """(its checkpoints, the last KL to the reference of each stage)."""
    found, kls = [start], list[float]()
    for stage in (1, 2):
        out = folder / f"{arm}-{stage}"
        words = [f"model={found[-1]}", f"data={folder / f'stage-{stage}'}", f"out={out}", f"seed={seed}",
                 f"max_steps={steps}", "per_device_train_batch_size=64", "save_strategy=no", "learning_rate=3e-4",
                 "lr_scheduler_type=constant", "reward=exact", "too_long=drop", "logging_steps=1", "kl.most=1e6",
                 "rollouts={prompts: 16, k: 4, max_new_tokens: 6, passes: 2}", "kl.coef=0.02", *ARMS[arm]]  # fmt: skip
        if stage == 2:
            words.append(f"mixture={{current: {0.8 if arm == 'ppo-replay' else 1}, "
                         f"replay: {0.2 if arm == 'ppo-replay' else 0}}}")  # fmt: skip
            if arm == "ppo-ewc":
                where = {"model": found[-1], "data": str(folder / "stage-1"), "out": str(folder / f"{arm}-fisher")}
                fisher(FisherConfig.model_validate(where))
                words.append(f"ewc={{weight: 100, fisher: [{where['out']}]}}")
        run("cppo", *load(CppoConfig, None, words), quiet=True)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        kls.append([line["kl_reference"] for line in lines if "kl_reference" in line][-1])
        found.append(str(out / "model"))
    return found, kls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--arms", default=",".join(ARMS))
    for name, value in (("seeds", 3), ("first", 0), ("steps", 80)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    results: dict[str, list[tuple[list[list[float]], list[float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(args.first, args.first + args.seeds):
            folder = Path(place) / str(seed)
            write_split(folder, args.folder, lambda text: len(tokenizer(text, verbose=False).input_ids), seed)
            warm = manifest(folder, "warm", TASKS, WARM, seed, "warm")
            words = [f"model={args.model}", f"data={warm}", f"out={folder / 'start'}", f"seed={seed}",
                     "num_train_epochs=2", "learning_rate=3e-4", "per_device_train_batch_size=16",
                     "save_strategy=no"]  # fmt: skip
            run("cft", *load(CftConfig, None, words), quiet=True)
            for stage in (1, 2):
                manifest(folder, "train", TASKS[:stage], TRAINED // 5, seed, f"stage-{stage}")
            test = manifest(folder, "test", TASKS, HELD_OUT, seed, "test")
            for arm in args.arms.split(","):
                began = time.monotonic()
                models, kls = train_arm(arm, folder, str(folder / "start/model"), seed, args.steps)
                given = {"models": models, "data": str(test), "out": str(folder / f"{arm}-eval"), "metric": "exact",
                         "max_new_tokens": 6, "batch_size": 64}  # fmt: skip
                evaluate(EvalConfig.model_validate(given))
                lines = (folder / f"{arm}-eval/matrix.csv").read_text().splitlines()
                order = [lines[0].split(",").index(task) for task in TASKS]
                r = [[float(line.split(",")[i]) for i in order] for line in lines[1:]]
                results.setdefault(arm, []).append((r, kls))
                shown = " · ".join(" ".join(f"{v:.2f}" for v in line) for line in r)
                print(f"seed {seed} {arm:<17} {time.monotonic() - began:4.0f} s  {shown}  "
                      f"KL {' '.join(f'{k:.2f}' for k in kls)}", flush=True)  # fmt: skip
    print("\n| arm | before | after stage 1 | after stage 2 | forgetting of the first | both | KL |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for arm, some in results.items():
        cells = [", ".join(_spread([r[i][j] for r, _ in some]) for j in (0, 1)) for i in (0, 1, 2)]
        lost = _spread([max(r[0][0], r[1][0]) - r[2][0] for r, _ in some])
        both, kl = (
            _spread([statistics.mean(r[2]) for r, _ in some]),
            [_spread(k) for k in zip(*(k for _, k in some), strict=True)],
        )
        print(f"| {arm} | {' | '.join(cells)} | {lost} | {both} | {', '.join(kl)} |")


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
