"""Three preference tasks in a row: what is still ordered as people ordered it? SFT, DPO + replay and COPR, some seeds.

    python benchmarks/preferences.py FOLDER [--model examples/starter] [--seeds 3] [--arms sft,copr]

FOLDER holds ranked/qa_feedback_ranked.jsonl.gz (four answers a question), hh/harmless-base-train.jsonl.gz and
pref/pandalm_human_pairs.jsonl.gz (pairs): all ranked by people. 100 questions and 150 prompts of each other task are
trained on, 60 of each are held out, those of one prompt on one side. A seed decides which prompts, their order and r_x;
the arms share them.

Each arm runs through `train` as a user would run it, stage by stage from the model before. Fifteen rows of each older
task come back in each later stage where the arm replays, as a quarter of the rows; each current prompt is seen equally
often by all arms. `train eval` scores every checkpoint. `ranking`: the share of pairs whose better answer has the
larger log π(y|x), summed over its tokens; `ranking_change`: the same of log π − log π of the model before training, so
that 0.5 = nothing learnt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curate.build import build
from train.config import CftConfig, CoprConfig, DpoConfig
from train.evaluate import EvalConfig, evaluate
from train.run import run
from train.settings import load

ROOT = Path(__file__).parent.parent
TASKS = ("long_form_qa", "harmless", "instructions")
TRAINED, HELD_OUT, REPLAYED = {"long_form_qa": 100, "harmless": 150, "instructions": 150}, 60, 15
CONFIGS = {"cft": CftConfig, "dpo": DpoConfig, "copr": CoprConfig}
COPR = ["reduction=mean", "beta=0.5"]  # sums over tokens change by tens of nats a step here: no square can be fitted
ARMS: dict[str, tuple[str, list[str]]] = {
    "sft": ("cft", []),
    "dpo": ("dpo", []),
    "dpo-replay": ("dpo", []),
    "copr-none": ("copr", [*COPR, "constraint=none"]),
    "copr-replay": ("copr", [*COPR, "constraint=replay"]),
    "copr-fixed": ("copr", [*COPR, "constraint=fixed"]),
    "copr": ("copr", COPR),
}
REPLAYING = ("dpo-replay", "copr-replay", "copr-fixed", "copr")
Row = dict[str, Any]


def read_rows(folder: Path) -> dict[str, list[Row]]:
    """Rows of each task as `ranked` rows: prompt and candidates."""

    def lines(name: str) -> list[Row]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def pair(row: Row) -> Row:
        ranked = [{"text": row["chosen"], "rank": 1}, {"text": row["rejected"], "rank": 2}]
        return {"prompt": row["prompt"], "candidates": ranked}

    qa = [row for row in lines("ranked/qa_feedback_ranked.jsonl.gz") if row["consistent"]]
    return {
        "long_form_qa": [
            {"prompt": row["question"], "candidates": row["candidates"]}
            for row in qa
            if len({c["rank"] for c in row["candidates"]}) > 1
        ],
        "harmless": [pair(row) for row in lines("hh/harmless-base-train.jsonl.gz")],
        "instructions": [pair(row) for row in lines("pref/pandalm_human_pairs.jsonl.gz")],
    }


def short(row: Row, longest: int, tokens: Callable[[str], int]) -> bool:
    """Whether every answer fits behind the prompt."""
    return tokens(row["prompt"]) + max(tokens(c["text"]) for c in row["candidates"]) + 8 <= longest


def write_split(folder: Path, rows: dict[str, list[Row]], seed: int) -> None:
    """<task>.train.jsonl and <task>.test.jsonl of a seed; rows of one prompt stay together."""
    folder.mkdir(parents=True)
    for task, some in rows.items():
        prompts = sorted({row["prompt"] for row in some})
        random.Random(f"{seed}/{task}").shuffle(prompts)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        ordered = sorted(some, key=lambda row: place[row["prompt"]])
        held = {row["prompt"] for row in ordered[:HELD_OUT]}
        sides = {"test": [r for r in ordered if r["prompt"] in held][:HELD_OUT],
                 "train": [r for r in ordered if r["prompt"] not in held][: TRAINED[task]]}  # fmt: skip
        for side, mine in sides.items():
            text = "".join(json.dumps(row) + "\n" for row in mine)
            (folder / f"{task}.{side}.jsonl").write_text(text, encoding="utf-8")


def manifest(folder: Path, side: str, tasks: tuple[str, ...], per_task: int, seed: int, name: str) -> Path:
    """A manifest of the stream up to its last task, so many rows of each earlier one."""
    named = [{"name": t, "path": str(folder / f"{t}.{side}.jsonl"), "format": "ranked", "ranked_by": "human"}
             for t in tasks]  # fmt: skip
    replay = {"selector": "random", "per_task": per_task} if len(tasks) > 1 else {"selector": "none"}
    build({"tasks": named, "replay": replay, "seed": seed, "out": str(folder / name)})
    return folder / name


def train_arm(arm: str, folder: Path, model: str, seed: int, words: list[str], first: dict[Any, Path]) -> list[str]:
    """Its checkpoints, one a stage. Arms of one method and settings share the first stage, which replays nothing."""
    method, own = ARMS[arm]
    found, buffers = [model], list[Path]()
    for stage in range(1, len(TASKS) + 1):
        out = folder / f"{arm}-{stage}"
        replays = arm in REPLAYING and stage > 1
        if stage == 1 and (method, *words) in first:
            out = first[method, *words]
            found, buffers = [model, str(out / "model")], [out / "buffer"]
            continue
        # rows in steps: the current ones as often in each arm, a quarter more of replayed ones beside them
        mixture = "{current: 0.75, replay: 0.25}" if replays else "{current: 1, replay: 0}"
        given = [f"model={found[-1]}", f"data={folder / f'stage-{stage}'}", f"out={out}", f"seed={seed}", *words, *own]
        if method == "copr":
            given += [f"keep={REPLAYED / TRAINED[TASKS[stage - 1]]}"]
            if replays:
                given += [f"buffers=[{','.join(map(str, buffers))}]", f"mixture={mixture}"]
        else:
            given += [f"mixture={mixture}"] if stage > 1 else []
        if method != "cft":
            given += ["reference=measure"]
        run(method, *load(CONFIGS[method], None, given), quiet=True)
        if stage == 1:
            first[method, *words] = out
        found.append(str(out / "model"))
        buffers.append(out / "buffer")
    return found


def measured(models: list[str], data: Path, out: Path, metric: str) -> tuple[list[list[float]], dict[str, Any]]:
    """(R, its metrics)."""
    given = {
        "models": models,
        "data": str(data),
        "out": str(out),
        "metric": metric,
        "batch_size": 64,
        "per_task": HELD_OUT,
    }
    found = evaluate(EvalConfig.model_validate(given))
    lines = (out / "matrix.csv").read_text().splitlines()
    order = lines[0].split(",")[1:]
    table = [dict(zip(order, map(float, line.split(",")[1:]), strict=True)) for line in lines[1:]]
    return [[row[t] for t in TASKS] for row in table], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--arms", default="sft,dpo-replay,copr-none,copr")
    parser.add_argument("--longest", type=int, default=200, help="tokens of a prompt with an answer")
    parser.add_argument("--epochs", default="3")
    parser.add_argument(
        "--set", action="append", default=[], metavar="ARM:KEY=VALUE", help="a setting of arms that begin so"
    )
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = lambda text: len(tokenizer(text, verbose=False).input_ids)  # noqa: E731
    rows = {t: [row for row in some if short(row, args.longest, tokens)] for t, some in read_rows(args.folder).items()}
    print(", ".join(f"{t}: {len(some)} rows" for t, some in rows.items()), flush=True)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(args.first, args.first + args.seeds):
            folder = Path(place) / str(seed)
            write_split(folder, rows, seed)
            for stage in range(1, len(TASKS) + 1):
                manifest(folder, "train", TASKS[:stage], REPLAYED, seed, f"stage-{stage}")
            test = manifest(folder, "test", TASKS, HELD_OUT, seed, "test")
            seen = manifest(folder, "train", TASKS, HELD_OUT, seed, "seen")
            first: dict[Any, Path] = {}
            for arm in args.arms.split(","):
                words = [f"num_train_epochs={args.epochs}", "per_device_train_batch_size=16", "save_strategy=no",
                         "learning_rate=3e-4", "lr_scheduler_type=linear", "warmup_steps=0.1"]  # fmt: skip
                words += [word.split(":", 1)[1] for word in args.set if arm.startswith(word.split(":", 1)[0])]
                start = time.monotonic()
                models = train_arm(arm, folder, args.model, seed, words, first)
                took = time.monotonic() - start
                for side, data, metrics in (("held out", test, ("ranking", "ranking_change")),
                                            ("trained on", seen, ("ranking_change",))):  # fmt: skip
                    for metric in metrics:
                        r, found = measured(models, data, folder / f"{arm}-{side}-{metric}", metric)
                        results.setdefault(f"{side}, {metric}, {arm}", []).append({"R": r, **found})
                        shown = " · ".join(" ".join(f"{v:.3f}" for v in line) for line in r)
                        print(f"seed {seed} {arm:<12} {side:<10} {metric:<14} {took:4.0f} s  {shown}", flush=True)
    print("\n| rows, score, arm | R after stage 1 | 2 | 3 | AP | BWT | forgetting |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, some in results.items():
        stages = [" ".join(_spread([each["R"][i][j] for each in some]) for j in range(len(TASKS))) for i in (1, 2, 3)]
        ends = [_spread([each[key]["value"] for each in some])
                for key in ("average_performance", "backward_transfer", "forgetting")]  # fmt: skip
        print(f"| {name} | {' | '.join([*stages, *ends])} |")


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
