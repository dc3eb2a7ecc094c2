"""Tables larger than memory: seconds and peak memory of build, check and report at growing numbers of rows.

    python benchmarks/tables.py [--rows 100000,1000000,10000000] [--part stream|whole|buckets] [--keep FOLDER]

stream: nine previous tasks hold 80% of the rows, the current one 20%; a row is about 150 bytes of text, as short as
real instructions are; 3,600 distinct instructions with vectors made here. `build` runs each of its stages (no page), a
tenth of the previous rows is drawn, so most rows end in drops.parquet.

whole: the same with a budget above all there is, so that every row ends in samples.parquet.

buckets: a manifest of one task whose prompts have 4 rollouts each (log-probabilities of 16 tokens and rewards from a
generator, no model): `buckets` gives every rollout its bucket by the build's own rule and writes the manifest, then
check and report as above, with all their rules. The number of rows is that of the rollouts.

Every step runs in a process of its own; its peak memory is what the kernel counted (VmHWM). Seconds are of the clock,
and of the CPU (all threads), which other work on the machine does not move. The slope is log(t2/t1) / log(n2/n1): 1 is
linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from curate.build import Build
from curate.candidates import ranks
from curate.config import BuildConfig
from curate.manifest import TABLES, Rule, write
from curate.manifest.card import card
from curate.manifest.schema import completion_uid, instruction_uid, sample_uid
from curate.manifest.tables import height, streamed
from curate.screen import Advance, Silent
from curate.vocabulary import phrases_of, tag

TASKS, INSTRUCTIONS, DIMENSION, K, TOKENS = 10, 360, 64, 4, 16
WORDS = (
    "name sort rewrite translate explain count answer compare shorten complete check the line word text date price city"
)
PIECE = 65_536
PARTS = ("stream", "whole", "buckets")
ASKED = "What would you say?"


# --- the stream ---


def make_stream(folder: Path, rows: int, replay: dict[str, float]) -> None:
    """Sources, vectors and config.yaml of a stream."""
    rng, words, tasks, texts = np.random.default_rng(0), WORDS.split(), list[dict[str, str]](), set[str]()
    for t in range(TASKS):
        size = rows // 5 if t == TASKS - 1 else rows * 4 // 5 // (TASKS - 1)
        drawn = rng.integers(0, len(words), (INSTRUCTIONS, 6))
        mine = [f"{' '.join(words[w] for w in row).capitalize()}, kind {t}-{i}." for i, row in enumerate(drawn)]
        texts.update(mine)
        with (folder / f"t{t}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(size):
                given = f"Instance {i} of task {t}: what would you say, and why?"
                row = {
                    "instruction": mine[i % INSTRUCTIONS],
                    "input": given,
                    "output": f"It is answer {i * 7919 % 1009}.",
                }
                file.write(json.dumps(row) + "\n")
        tasks.append({"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca", "license": "MIT"})
    config = {"name": "tables", "tasks": tasks, "replay": replay, "out": str(folder / "run"),
              "embed": {"backend": "precomputed", "path": "vectors.parquet"}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    texts.update(_tags(folder, sorted(texts)))
    everything = sorted(texts)
    vectors = rng.normal(size=(len(everything), DIMENSION)).astype(np.float32)
    pl.DataFrame({"text": everything, "embedding": vectors}).write_parquet(folder / "vectors.parquet")


def _tags(folder: Path, texts: list[str]) -> list[str]:
    """The phrases that the build is going to cluster, from the build's own tagger."""
    frame = pl.DataFrame({"uid": texts, "task": "t", "instruction": texts})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tag(frame, BuildConfig.load(folder / "config.yaml").tags, Path(scratch), lambda n: None)
        return phrases_of(Path(scratch))


class Clock(Silent):
    """A screen that keeps the seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Time one stage."""
        start, cpu = time.perf_counter(), time.process_time()
        yield lambda n: None
        for key, seconds in ((name, time.perf_counter() - start), (f"{name}, CPU", time.process_time() - cpu)):
            self.seconds[key] = self.seconds.get(key, 0.0) + seconds


def build(folder: Path) -> dict[str, float]:
    """The build, without its page."""
    clock = Clock()
    Build(BuildConfig.load(folder / "config.yaml"), clock).run(page=False)
    return clock.seconds


# --- the rollouts ---


def _prompts(rows: int) -> Iterator[pl.DataFrame]:
    for at in range(0, rows // K, PIECE):
        found = []
        for i in range(at, min(at + PIECE, rows // K)):
            prompt = [{"role": "user", "content": f"Instance {i}: what would you say, and why?"}]
            completion = [{"role": "assistant", "content": f"It is {i}."}]
            found.append(
                (sample_uid("t", prompt, completion, [f"It is {i}."]), prompt, completion, [f"It is {i}."], i + 1)
            )
        frame = pl.DataFrame(found, schema=["uid", "prompt", "completion", "references", "row"], orient="row")
        frame = frame.with_columns(task=pl.lit("t"), stage=1, origin=pl.lit("current"), weight=1.0,
                                   instruction=pl.lit(ASKED), written_by=pl.lit("gold"))  # fmt: skip
        yield TABLES["samples"].fit(frame)


def _rollouts(samples: Path, rows: int) -> Iterator[pl.DataFrame]:
    for number, at in enumerate(range(0, rows // K, PIECE)):
        rng = np.random.default_rng([0, number])
        prompts = pl.scan_parquet(samples).select("uid").slice(at, PIECE).collect()["uid"].to_list()
        texts = [f"It may be {j} or so." for j in range(K)]
        uids = [completion_uid(prompt, "policy", text) for prompt in prompts for text in texts]
        n = len(uids)
        logps = -rng.exponential(1.5, (n, TOKENS)).astype(np.float32)
        ids = rng.integers(0, 30_000, (n, TOKENS)).astype(np.int32)
        frame = pl.DataFrame({
            "uid": uids, "source_uid": np.repeat(prompts, K).tolist(), "text": texts * len(prompts),
            "token_ids": pl.Series(ids).arr.to_list(), "token_logps": pl.Series(logps).arr.to_list(),
            "reward": rng.random(n).round(3), "task": ["t"] * n,
        })  # fmt: skip
        frame = frame.with_columns(stage=1, origin=pl.lit("policy"), n_tokens=TOKENS, policy=pl.lit("p"), batch=0,
                                   tokenizer=pl.lit("t"), temperature=1.0, top_p=1.0, finished=True,
                                   reward_id=pl.lit("made"))  # fmt: skip
        yield TABLES["completions"].fit(frame.with_columns(rank=ranks(frame)).rename({"source_uid": "prompt_uid"}))


def make_rollouts(folder: Path, rows: int) -> None:
    """Prompts and rollouts as Parquet files, in the order of their uids' prompts."""
    streamed(lambda: _prompts(rows), TABLES["samples"].schema).sink_parquet(folder / "prompts.parquet")
    made = streamed(lambda: _rollouts(folder / "prompts.parquet", rows), TABLES["completions"].schema)
    made.sink_parquet(folder / "rollouts.parquet")


def buckets(folder: Path) -> dict[str, float]:
    """Statistics and buckets of all rollouts, and the manifest of a build that they would be of."""
    start = time.perf_counter()
    rolled = pl.scan_parquet(folder / "rollouts.parquet")
    config = BuildConfig.parse(
        {"name": "rollouts", "tasks": [{"name": "t", "path": "t.jsonl", "format": "alpaca"}],
         "replay": {"selector": "none"}, "policy": {"model": "p"}, "rollouts": {"k": K}}
    )  # fmt: skip
    rule = Rule(config.buckets.k, config.buckets.logp, config.buckets.population)
    bucket, stats = rule.assign(rolled)
    classified = time.perf_counter()
    rolled = pl.concat([rolled.drop("bucket"), bucket.to_frame().lazy()], how="horizontal")
    samples = pl.scan_parquet(folder / "prompts.parquet")
    n = height(samples)
    task = {"task": "t", "stage": 1, "rows": n, "instructions": 1, "rollouts": len(bucket)}
    task |= dict(bucket.value_counts().iter_rows())
    instruction = {"uid": instruction_uid("t", ASKED), "task": "t", "stage": 1, "instruction": ASKED, "rows": n}
    frames: dict[str, Any] = {name: table.empty() for name, table in TABLES.items()} | {
        "samples": samples,
        "completions": TABLES["completions"].fit(rolled),
        "tasks": TABLES["tasks"].fit(pl.DataFrame([task])),
        "instructions": TABLES["instructions"].fit(pl.DataFrame([instruction])),
    }
    facts = {
        "config": config.model_dump(exclude={"out", "cache"}), "rehearse": "", "embedder": None, "solver": [],
        "inputs": [{"task": "t", "files": {}, "rows": n, "instructions": 1, "dropped": 0}],
        "replay": {"asked": 0, "selector": "none", "about": "no replay"},
        "models": {"policy": {"fingerprint": "p", "tokenizer": "t"}},
        "rollouts": {"k": K, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": TOKENS, "reward": "made",
                     "skipped": [], "requests": len(bucket), "prompt_tokens": 0, "completion_tokens": 0},
        "buckets": {"rule": asdict(rule), "statistics": {name: asdict(s) for name, s in stats.items()}},
    }  # fmt: skip
    write(folder / "run", frames, facts, partial(card, provenance=facts))
    return {"classify": classified - start, "write": time.perf_counter() - classified}


# --- processes ---


def check(folder: Path) -> dict[str, float]:
    """`curate check`; a fault is an error of the benchmark."""
    from curate.manifest import check as faults_of

    if faults := faults_of(folder / "run"):
        raise SystemExit("\n".join(faults))
    return {}


def report(folder: Path) -> dict[str, float]:
    """`curate report`."""
    from curate.report import report as make

    make(folder / "run")
    return {}


STEPS = {"build": build, "buckets": buckets, "check": check, "report": report}


def peak() -> float:
    """GiB that this process has held at most. (ru_maxrss of a child begins with what its parent held at the fork.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


def run(step: str, folder: Path) -> dict[str, float]:
    """Seconds of a step's stages, of its whole process (on the clock and of the CPU), and its peak GiB."""
    start = time.perf_counter()
    with (folder / f"{step}.json").open("w") as out:
        process = subprocess.Popen([sys.executable, __file__, "--step", step, "--keep", str(folder)], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{step} failed with status {status}")
    found = json.loads((folder / f"{step}.json").read_bytes())
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    stages = {f"{step}: {name}": s for name, s in found["stages"].items()}
    return {**stages, step: seconds, f"{step}, CPU": cpu, f"{step}, peak GiB": found["peak"]}


def measure(part: str, rows: int, folder: Path) -> dict[str, float]:
    """Seconds of every stage and step, and the peak of each process."""
    if part == "buckets":
        make_rollouts(folder, rows)
    else:
        make_stream(folder, rows, {"budget": rows * 4 // 5 // 10} if part == "stream" else {"ratio": 100})
    found: dict[str, float] = {"rows": rows}
    for step in ("buckets" if part == "buckets" else "build", "check", "report"):
        found |= (figures := run(step, folder))
        sys.stderr.write(f"{rows:,} { ({k: round(v, 2) for k, v in figures.items()}) }\n")
    return found


def table(found: list[dict[str, float]]) -> str:
    """Markdown: a line a figure, a column a number of rows, the slope from each to the next."""
    sizes = [f["rows"] for f in found]
    lines = [
        "| | " + " | ".join(f"{n:,.0f} rows" for n in sizes) + " | slope |",
        "| --- |" + " ---: |" * (len(sizes) + 1),
    ]
    for name in found[-1]:
        values = [f.get(name, math.nan) for f in found]
        slopes = [
            f"{math.log(b / a) / math.log(m / n):.2f}"
            for a, b, n, m in zip(values, values[1:], sizes, sizes[1:], strict=False)
            if a > 0 and b > 0
        ]
        unit = "" if "GiB" in name else " s"
        if name != "rows":
            lines.append(f"| {name} | " + " | ".join(f"{v:,.2f}{unit}" for v in values) + f" | {', '.join(slopes)} |")
    return "\n".join(lines)


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000,10000000")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--keep", type=Path, help="work here, and leave everything there")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        stages = STEPS[given.step](given.keep)
        sys.stdout.write(json.dumps({"stages": stages, "peak": peak()}))
        return
    for part in given.part or PARTS:
        found = []
        for rows in map(int, given.rows.split(",")):
            folder = given.keep / f"{part}-{rows}" if given.keep else Path(tempfile.mkdtemp(prefix="tables-"))
            folder.mkdir(parents=True, exist_ok=True)
            try:
                found.append(measure(part, rows, folder))
            finally:
                if not given.keep:
                    shutil.rmtree(folder)
        sys.stdout.write(f"{part}\n\n{table(found)}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
