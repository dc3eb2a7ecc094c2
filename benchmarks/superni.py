"""The whole of Super-NaturalInstructions in sixteen tasks through the real command line: cold, warm, and elsewhere.

    python benchmarks/superni.py FOLDER        FOLDER holds the sixteen category files of examples/superni, in full

Prints seconds and peak memory of a cold build (embedding and model loading included), of a warm rebuild, of a rebuild
with another budget, and whether a build in another working directory gives the same bytes. Also the quotas of the three
orders of InsCL.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import yaml

CURRICULUM = (
    "classification text_quality_evaluation code detection sentiment_analysis comprehension closed_qa extraction "
    "dialogue program_execution rewriting open_qa misc generation summarization mathematics"
).split()


def config(folder: Path, order: list[str], budget: int) -> dict[str, object]:
    """A build over the category files; paths are relative to the config, as a user writes them."""
    tasks = [{"name": n, "path": f"data/{n}.jsonl.gz", "format": "superni"} for n in order]
    return {"name": "superni", "tasks": tasks, "replay": {"selector": "inscl", "budget": budget}, "out": "runs/superni"}


def workplace(parent: Path, source: Path, order: list[str]) -> Path:
    """A working directory with a link to the data and the config."""
    parent.mkdir(parents=True)
    (parent / "data").symlink_to(source)
    (parent / "config.yaml").write_text(yaml.safe_dump(config(source, order, 200 * (len(order) - 1)), sort_keys=False))
    return parent


def run(where: Path, *arguments: str) -> tuple[float, float]:
    """(seconds, peak GiB of the process and its children) of one `curate build`."""
    command = [sys.executable, "-m", "curate.cli", "build", "config.yaml", "--quiet", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=where)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the build failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def hashes(run: Path) -> dict[str, str]:
    """sha256 of every Parquet file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.glob("*.parquet"))}


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    source = parser.parse_args().folder.resolve()
    scratch = Path(tempfile.mkdtemp(prefix="superni-"))
    try:
        here = workplace(scratch / "here", source, CURRICULUM)
        print(f"{'':<34}{'seconds':>9}{'peak GiB':>10}")
        for name, arguments in (("cold build", []), ("warm rebuild", []), ("another budget", ["replay.budget=400"])):
            seconds, memory = run(here, *arguments)
            print(f"{name:<34}{seconds:>9.1f}{memory:>10.2f}", flush=True)
        first = run(here) and hashes(here / "runs/superni")
        there = workplace(scratch / "somewhere/else", source, CURRICULUM)
        seconds, memory = run(there)
        print(f"{'cold, other working directory':<34}{seconds:>9.1f}{memory:>10.2f}")
        print(f"same bytes: {hashes(there / 'runs/superni') == first}")
        shuffled = random.Random(0).sample(CURRICULUM, len(CURRICULUM))
        for name, order in (("curriculum", CURRICULUM), ("reverse", CURRICULUM[::-1]), ("random", shuffled)):
            place = workplace(scratch / name, source, order)
            run(place, f"cache={here}/runs/.curate-cache")
            tasks = pl.read_parquet(place / "runs/superni/tasks.parquet").sort("stage")
            quotas = ", ".join(f"{t} {g}" for t, g in tasks.select("task", "granted").head(-1).iter_rows())
            print(f"{name}, for {tasks['task'][-1]}: {quotas}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
