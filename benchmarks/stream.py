"""Does measured replay beat guessed replay? Six tasks in a row, every selector, several seeds, through `train stream`.

    python benchmarks/stream.py SUPERNI_FOLDER [--out FOLDER]
        [--parts main,selectors,budgets,rounding,orders,categories,methods]

SUPERNI_FOLDER holds <category>.jsonl.gz; `examples/stream/select_rows.py` takes short rows with few different answers
of six categories (110 for training and 40 held out, of each). `categories` is the paper's whole stream: sixteen in its
curriculum order, rows of up to 200 tokens with open answers of up to 24, budget 50 %. Starter model, all parameters,
2 passes, batches of 8, peak rate 2e-3, linear decay, bfloat16 autocast; Rouge-L of greedy answers. At this rate a model
without replay keeps next to nothing, so selectors can differ. Stages that parts share are trained once; a run that was
killed goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console

from curate.settings import checked
from train.stream import StreamConfig, stream
from train.stream.results import difference, ends, spread, written
from train.stream.screen import Terminal

ROOT = Path(__file__).parent.parent


class Rows(NamedTuple):
    """What a stream is of: its categories, what a row may be (`select_rows.Limits`), and the budget as a share."""

    tasks: list[str]
    longest: int
    answer: int
    labels: float
    ratio: float


SIX = Rows(["misc", "text_quality_evaluation", "sentiment_analysis", "comprehension", "detection", "classification"],
           120, 6, 26, 0.05)  # fmt: skip
SIXTEEN = Rows(
    ["classification", "text_quality_evaluation", "code", "detection", "sentiment_analysis", "comprehension",
     "closed_qa", "extraction", "dialogue", "program_execution", "rewriting", "open_qa", "misc", "generation",
     "summarization", "mathematics"], 200, 24, float("inf"), 0.5)  # fmt: skip
ON_POLICY = {
    "replay.selector": "uniform", "replay.completions": "policy", "replay.min_reward": 0.5,
    "build.rollouts": {"k": 8, "max_new_tokens": 6, "origins": ["replay"], "reward": "exact"},
}  # fmt: skip
SELECTORS = ("none", "random", "inscl", "uniform", "dynamic_only", "insinfo_only", "prototype_data",
             "prototype_instruction", "diverse_instruction", "highest_loss", "perplexity_ratio")  # fmt: skip
LORA = {"train.lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, "train.learning_rate": 5e-3}
NONE, RANDOM = {"replay.selector": "none"}, {"replay.selector": "random"}


def both(name: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A method without and with replay."""
    return {name: {**NONE, **settings}, f"{name} + replay": {**RANDOM, **settings}}


PARTS: dict[str, dict[str, Any]] = {
    "main": {"arms": {name: {"replay.selector": name} for name in ("none", "random", "inscl")}},
    "selectors": {"arms": {**{name: {"replay.selector": name} for name in SELECTORS}, "on-policy": ON_POLICY}},
    "budgets": {"arms": {name: {"replay.selector": name} for name in ("random", "inscl")},
                "grid": {"replay.ratio": [0.01, 0.1, 0.5]}},
    "rounding": {"arms": {**{name: {"replay.selector": name} for name in ("random", "inscl")},
                          "inscl systematic": {"replay.selector": "inscl", "replay.rounding": "systematic"}},
                 "grid": {"replay.ratio": [0.05, 0.1]}},
    "orders": {"arms": {name: {"replay.selector": name} for name in ("none", "random", "inscl")},
               "grid": {"order": ["reverse", "random"]}},
    "categories": {"arms": {name: {"replay.selector": name} for name in ("none", "random", "inscl")},
                   "name": "sixteen tasks in a row"},
    "methods": {"arms": {
        **both("CFT", {}), **both("CFT + KL 0.1", {"train.kl.weight": 0.1}),
        **both("CFT + EWC 100", {"train.ewc.weight": 100}), **both("LoRA", LORA),
        **both("O-LoRA", {**LORA, "train.o_lora.weight": 0.5}),
    }},
}  # fmt: skip


def config(part: str, rows: Rows, seeds: list[int], data: Path, out: Path, workers: int | None) -> StreamConfig:
    """The stream of a part."""
    given = {
        "name": "six tasks in a row", "model": str(ROOT / "examples/starter"), "seeds": seeds,
        "tasks": [{"name": t, "path": str(data / f"{t}.jsonl.gz"), "format": "superni", "split": "train"}
                  for t in rows.tasks],
        "replay": {"selector": "random", "ratio": rows.ratio},
        "train": {"learning_rate": 2e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8, "bf16": True,
                  "lr_scheduler_type": "linear", "save_strategy": "no"},
        "fisher": {"samples": 60},
        "evaluation": {"split": "test", "metric": "rouge_l", "max_new_tokens": rows.answer, "batch_size": 64},
        "out": str(out), "workers": workers, **PARTS[part],
    }  # fmt: skip
    return checked(StreamConfig, given)


def covered(table: pl.DataFrame, name: str, stages: Path) -> str:
    """Distinct instructions that a run replays at all, of how many there were to choose from; mean over seeds."""
    found = []
    for seed in table.filter(run=name, kind="run")["seed"].unique():
        mine = table.filter(pl.col("run") == name, pl.col("kind") == "run", pl.col("seed") == seed, pl.col("stage") > 1)
        rows = [pl.read_parquet(stages / f / "manifest/samples.parquet", columns=["task", "instruction", "origin"])
                for f in mine["folder"]]  # fmt: skip
        found.append(pl.concat(rows).filter(pl.col("origin") == "replay").unique(["task", "instruction"]).height)
        every = pl.concat([pl.read_parquet(stages / f / "manifest/tasks.parquet") for f in mine["folder"]])
    older = every.filter(pl.col("quota").is_not_null()).unique("task")["instructions"].sum()
    return f"{sum(found) / len(found):.0f} of {older}"


def dose(table: pl.DataFrame, stages: Path) -> None:
    """The final score of an older task's instruction by how many of its rows came back over the whole run."""
    (held,) = stages.glob("held-out-*")
    asked = pl.read_parquet(held / "manifest/samples.parquet", columns=["uid", "task", "instruction"])
    found, seen = [], set[str]()
    for name, seed in ends(table).select("run", "seed").iter_rows():
        mine = table.filter(pl.col("run") == name, pl.col("kind") == "run", pl.col("seed") == seed, pl.col("stage") > 1)
        replayed = pl.concat(
            pl.read_parquet(stages / f / "manifest/samples.parquet", columns=["task", "instruction", "origin"])
            for f in mine["folder"]
        ).filter(pl.col("origin") == "replay").group_by("task", "instruction").len("rows")  # fmt: skip
        last = stages / mine.sort("stage")["folder"][-1]
        items = pl.read_parquet(next(last.glob("eval*/items.parquet"))).filter(pl.col("task") != mine["tasks"][0][-1])
        scores = items.join(asked, on=["uid", "task"]).group_by("task", "instruction").agg(pl.col("score").mean())
        mine = scores.join(replayed, on=["task", "instruction"], how="left").sort("task", "instruction")
        if (content := mine.write_json()) in seen:
            continue  # the same rows under another name: one observation
        seen.add(content)
        found.append(mine.with_columns(pl.col("rows").fill_null(0), run=pl.lit(name)))
    every = pl.concat(found)
    print("\n| rows of an instruction that came back | instructions | its score at the end | …of them by InsCL |")
    print("| --- | --- | --- | --- |")
    for low, high in ((0, 0), (1, 1), (2, 2), (3, 4), (5, 99)):
        some = every.filter(pl.col("rows").is_between(low, high))
        if some.height:
            scores = some["score"].to_list()
            n = some.filter(pl.col("run").str.starts_with("inscl")).height
            error = spread(scores)[1] / len(scores) ** 0.5
            shown = f"{low}" if low == high else f"{low} to {high}" if high < 99 else f"{low} and more"
            print(f"| {shown} | {some.height} | {spread(scores)[0]:.3f} ± {error:.3f} | {n} |")


def favoured(table: pl.DataFrame, stages: Path) -> None:
    """What becomes of the instructions that InsInfo favours: older ones above and below their task's median of it."""
    (held,) = stages.glob("held-out-*")
    asked = pl.read_parquet(held / "manifest/samples.parquet", columns=["uid", "task", "instruction"])

    def scores(rows: pl.DataFrame, older: bool) -> pl.DataFrame:
        found = []
        for last, tasks, seed in rows.select("folder", "tasks", "seed").iter_rows():
            items = pl.read_parquet(next((stages / last).glob("eval*/items.parquet")))
            mine = items.filter(pl.col("task").is_in(tasks[:-1] if older else tasks)).with_columns(seed=pl.lit(seed))
            found.append(mine.join(asked, on=["uid", "task"]))
        return pl.concat(found).group_by("seed", "task", "instruction").agg(pl.col("score").mean())

    last = ends(table).filter(selector="inscl")["folder"][0]
    known = pl.read_parquet(stages / last / "manifest/instructions.parquet", columns=["task", "instruction", "insinfo"])
    known = known.drop_nulls().with_columns(high=pl.col("insinfo") > pl.col("insinfo").median().over("task"))
    arms = {"alone": (table.filter(kind="single", stage=1), False)}
    arms |= {run: (ends(table).filter(run=run), True) for run in ends(table)["run"].unique(maintain_order=True)}
    print("\n| InsInfo in its task | instructions | " + " | ".join(arms) + " |\n| --- | --- |" + " --- |" * len(arms))
    found = {arm: scores(rows, older).join(known, on=["task", "instruction"]) for arm, (rows, older) in arms.items()}
    for high in (True, False):
        some = [frame.filter(high=high).group_by("seed").agg(pl.col("score").mean()).sort("seed")["score"].to_list()
                for frame in found.values()]  # fmt: skip
        n = known.filter(high=high).height
        print(f"| {'above' if high else 'at or below'} the median | {n} | {' | '.join(written(v, 3) for v in some)} |")


def show(part: str, table: pl.DataFrame, seeds: list[int], stages: Path) -> None:
    """A part's table in Markdown: how its runs ended, and what they have more than random replay.

    In relative gain; in AP (times 100) where there is none, as a task alone scores 0.
    """
    names = table.filter(kind="run")["run"].unique(maintain_order=True).to_list()
    last = ends(table)
    print(f"\n### {part}, seeds {', '.join(map(str, seeds))}\n")
    print("| run | relative gain, % | AP | BWT | rows, instructions replayed | more than random | more than none |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        mine = last.filter(run=name)
        if not mine.height:
            continue
        cells = [written(mine[c].drop_nulls().to_list(), d) for c, d in (
            ("relative_gain", 1), ("average_performance", 3), ("backward_transfer", 3))]  # fmt: skip
        replayed = table.filter(run=name, kind="run").group_by("seed").agg(pl.col("replay").sum())["replay"].to_list()
        beside = [_difference(table, name, "random"), _difference(table, name, "none")]
        rows = f"{sum(replayed) / len(replayed):.0f}, {covered(table, name, stages)}"
        print(f"| {name} | {' | '.join(cells)} | {rows} | {' | '.join(beside)} |")
    for kind, what in (("single", "alone"), ("joint", "all at once")):
        found = table.filter(pl.col("kind") == kind, pl.col("stage") == 1)
        scores: dict[str, list[float]] = {}
        for tasks, values in found.select("tasks", "scores").iter_rows():
            for task, value in zip(tasks, values, strict=True):
                scores.setdefault(task, []).append(value)
        print(f"\n{what}: " + ", ".join(f"{task} {written(some, 2)}" for task, some in scores.items()))


def _difference(table: pl.DataFrame, name: str, other: str) -> str:
    """Beside the run of the other selector with the same grid."""
    cell = name.split(" · ")[1:]
    there = ends(table)["run"].to_list()
    names = (" · ".join([other, *cell]), other, {"none": "CFT", "random": "CFT + replay"}[other])
    against = next((each for each in names if each in there), "")
    if name == against or not against:
        return "–"
    gain = difference(table, name, against)
    found, unit = (gain, 1) if gain else (difference(table, name, against, "average_performance"), 100)
    if found is None:
        return "–"
    interval = " [{:+.1f}, {:+.1f}]".format(*(unit * end for end in found["interval"])) if found["interval"] else ""
    return f"{unit * found['mean']:+.1f}{interval}"


def main() -> None:
    """The command line."""
    sys.path.insert(0, str(ROOT / "examples/stream"))
    from select_rows import Limits, write  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, help="of a part; by default 5 of main and rounding, 3 of the others")
    parser.add_argument("--tasks", help="other categories than the part's, comma-separated")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/stream-proof"))
    args = parser.parse_args()
    for part in args.parts.split(","):
        rows = SIXTEEN if part == "categories" else SIX
        if args.tasks:
            rows = rows._replace(tasks=args.tasks.split(","))
        data = args.out.parent / f"{args.out.name}-rows-{len(rows.tasks)}"
        limits = Limits(rows.longest, rows.answer, rows.labels)
        write(args.folder, data, rows.tasks, limits, {"train": 110, "test": 40}, False)
        seeds = list(range(args.seeds or (5 if part in ("main", "rounding") else 3)))
        given = config(part, rows, seeds, data, args.out, args.workers)
        table = stream(given, screen=Terminal(Console(stderr=True)))
        show(part, table, seeds, args.out / "stages")
        if part in ("main", "selectors", "budgets", "rounding", "categories"):
            dose(table, args.out / "stages")
            favoured(table, args.out / "stages")


if __name__ == "__main__":
    main()
