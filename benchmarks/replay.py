"""Does replay keep what was known? `train cft` on the demo's manifest with and without its replayed rows, three seeds.

    make demo                                # builds runs/demo
    python benchmarks/replay.py [--manifest runs/demo] [--model examples/starter] [--seeds 3] [--epochs 8] [--rate 1e-3]

Both arms see each current row equally often; the arm with replay takes as many replayed rows beside them. Measured
before and after on rows that nobody trained on: NLL per answer token of the test rows of the sixteen SuperNI
categories, each a task that was replayed. What a task lost is its NLL after training minus that before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from curate.build import build
from train.config import CftConfig
from train.run import run
from train.settings import load

ROOT = Path(__file__).parent.parent
ARMS = {"with replay": "{current: 0.5, replay: 0.5, augmented: 0}", "without": "{current: 1, replay: 0, augmented: 0}"}


def held_out(folder: Path) -> Path:
    """The test rows of the sixteen categories as one manifest."""
    paths = sorted((ROOT / "examples/superni").glob("*.jsonl.gz"))
    tasks = [{"name": p.name.split(".")[0], "path": str(p), "format": "superni", "split": "test"} for p in paths]
    build({"tasks": tasks, "replay": {"selector": "random", "per_task": 77}, "out": str(folder / "held-out")})
    return folder / "held-out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="runs/demo")
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", default="1e-3")
    args = parser.parse_args()
    lost: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    print("| seed | arm | steps | training loss, first to last | all old tasks: before | after | lost |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        measured = held_out(Path(place))
        for seed in range(args.seeds):
            for arm, mixture in ARMS.items():
                out = Path(place) / f"{arm}-{seed}"
                words = [f"model={args.model}", f"data={args.manifest}", f"eval_data={measured}", f"out={out}",
                         f"mixture={mixture}", f"seed={seed}", f"num_train_epochs={args.epochs}",
                         f"learning_rate={args.rate}", "per_device_train_batch_size=16", "lr_scheduler_type=linear",
                         "logging_steps=2", "eval_strategy=steps", "eval_steps=0.999", "eval_on_start=true",
                         "save_strategy=no", "max_length=512", "too_long=drop",
                         "per_device_eval_batch_size=16"]  # fmt: skip
                run("cft", *load(CftConfig, None, words), quiet=True)
                lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                losses = [line["loss"] for line in lines if "loss" in line]
                before, *_, after = [line for line in lines if "eval_loss" in line]
                keys = [k for k in before if k.startswith("eval_loss_task/")]
                lost[arm].append({k.split("/")[1]: after[k] - before[k] for k in keys})
                print(f"| {seed} | {arm} | {after['step']} | {losses[0]:.2f} to {losses[-1]:.2f} | "
                      f"{before['eval_loss']:.3f} | {after['eval_loss']:.3f} | "
                      f"{after['eval_loss'] - before['eval_loss']:+.3f} |", flush=True)  # fmt: skip
    print("\n| task | lost with replay | lost without |\n| --- | --- | --- |")
    wins = 0
    for task in lost["without"][0]:
        a, b = (statistics.mean(each[task] for each in lost[arm]) for arm in ARMS)
        wins += a < b
        print(f"| {task} | {a:+.3f} | {b:+.3f} |")
    print(f"\n{wins} of {len(lost['without'][0])} tasks lose less with replay (means of {args.seeds} seeds).")


if __name__ == "__main__":
    main()
