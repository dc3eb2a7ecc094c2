"""Three preference tasks in a row: what is still ordered as people ordered it? SFT, DPO + replay and COPR, some seeds.

    python benchmarks/preferences.py FOLDER [--model examples/starter] [--seeds 3] [--arms sft,copr] [--held-out]

FOLDER holds ranked/qa_feedback_ranked.jsonl.gz (four answers a question), hh/harmless-base-train.jsonl.gz and
pref/pandalm_human_pairs.jsonl.gz (pairs): all ranked by people. 100 questions and 150 prompts of each other task are
trained on, 60 of each are held out, those of one prompt on one side. A seed decides which prompts, their order and r_x;
the arms share them. `train stream` runs them. About fifteen rows of each older task come back in each later stage where
the arm replays, as a quarter of the rows; each current prompt is seen equally often by all arms.

`ranking_change`, on 60 prompts of each task that were trained on, or with --held-out on those that were not: the share
of pairs whose better answer has gained more of log π, summed over its tokens, since before training; 0.5 = nothing
learnt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from curate.build import build
from curate.settings import checked
from train.stream import StreamConfig, stream
from train.stream.results import written
from train.stream.screen import Terminal

ROOT = Path(__file__).parent.parent
TASKS = ("long_form_qa", "harmless", "instructions")
TRAINED, HELD_OUT, REPLAYED = {"long_form_qa": 100, "harmless": 150, "instructions": 150}, 60, 15
COPR = {  # sums over tokens change by tens of nats a step here: no square can be fitted
    "method": "copr",
    "train.reduction": "mean",
    "train.beta": 0.5,
    "train.reference": "measure",
    "train.keep": REPLAYED / 125,
}
DPO = {"method": "dpo", "train.reference": "measure"}
MIXTURE = {"train.mixture": {"current": 0.75, "replay": 0.25}}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": DPO,
    "dpo-replay": {**DPO, **MIXTURE, "replay": {"selector": "random", "per_task": REPLAYED}},
    "copr-none": {**COPR, "train.constraint": "none"},
    "copr-replay": {**COPR, **MIXTURE, "train.constraint": "replay"},
    "copr-fixed": {**COPR, **MIXTURE, "train.constraint": "fixed"},
    "copr": {**COPR, **MIXTURE},
}  # fmt: skip
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
    folder.mkdir(parents=True, exist_ok=True)
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


def tasks(folder: Path, side: str) -> list[dict[str, str]]:
    """The tasks of a stream, or of a manifest."""
    return [{"name": t, "path": str(folder / f"{t}.{side}.jsonl"), "format": "ranked", "ranked_by": "human"}
            for t in TASKS]  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--longest", type=int, default=200, help="tokens of a prompt with an answer")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/preferences-proof"))
    args = parser.parse_args()
    if odd := [arm for arm in args.arms.split(",") if arm not in ARMS]:
        parser.error(f"no arm {odd[0]!r}: there are {', '.join(ARMS)}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = lambda text: len(tokenizer(text, verbose=False).input_ids)  # noqa: E731
    rows = {t: [row for row in some if short(row, args.longest, tokens)] for t, some in read_rows(args.folder).items()}
    print(", ".join(f"{t}: {len(some)} rows" for t, some in rows.items()), flush=True)
    side, tables = "test" if args.held_out else "train", []
    for seed in range(args.first, args.first + args.seeds):
        folder = args.out / f"seed-{seed}"
        write_split(folder, rows, seed)
        build({"tasks": tasks(folder, side), "replay": {"selector": "random", "ratio": 1000}, "seed": seed,
               "out": str(folder / f"{side}-rows")})  # fmt: skip
        given = {
            "name": "three preference tasks", "model": args.model, "seeds": [seed], "tasks": tasks(folder, "train"),
            "replay": {"selector": "none"},
            "train": {"num_train_epochs": args.epochs, "per_device_train_batch_size": 16, "save_strategy": "no",
                      "learning_rate": 3e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
            "evaluation": {"data": str(folder / f"{side}-rows"), "metric": "ranking_change", "batch_size": 64,
                           "per_task": HELD_OUT, "every_task": True},
            "bounds": {"none": False, "single": False, "joint": False}, "workers": args.workers,
            "arms": {arm: ARMS[arm] for arm in args.arms.split(",")}, "out": str(folder / "stream"),
        }  # fmt: skip
        made = stream(checked(StreamConfig, given), screen=Terminal(Console(stderr=True)))
        tables.append(made.with_columns(where=pl.lit(str(folder / "stream/stages"))))
    table = pl.concat(tables)
    print(
        f"\n{side} prompts, ranking_change\n\n| arm | R after stage 1 | 2 | 3 | AP | BWT | forgetting | λ at the end |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for arm in table["run"].unique(maintain_order=True):
        stages = [table.filter(run=arm, stage=stage)["scores"].to_list() for stage in range(1, len(TASKS) + 1)]
        cells = [", ".join(written([r[j] for r in each], 2) for j in range(len(TASKS))) for each in stages]
        end = table.filter(run=arm, stage=len(TASKS))
        last = [written(end[name].to_list(), 2) for name in ("average_performance", "backward_transfer", "forgetting")]
        held = [_lambdas(Path(where) / folder) for where, folder in end.select("where", "folder").iter_rows()]
        last.append(
            ", ".join(written([each[task] for each in held], 2) for task in TASKS[:-1] if task in held[0]) or "–"
        )
        print(f"| {arm} | {' | '.join([*cells, *last])} |")


def _lambdas(stage: Path) -> dict[str, float]:
    """Older task → its λ after the last step; of COPR with a constraint alone."""
    found: dict[str, float] = {}
    for line in (stage / "train/log.jsonl").read_text().splitlines():
        found |= {key[7:]: value for key, value in json.loads(line).items() if key.startswith("lambda/")}
    return found


if __name__ == "__main__":
    main()
