"""A stream of 1,000,000 rows with 100,000 distinct instructions: time and memory of everything but embedding.

    python benchmarks/million.py [--rows 1000000] [--instructions 100000]

The text is synthetic (words drawn by rank, so that tags are as skewed as in real text); the vectors are made here
beforehand, a random direction a word averaged over the text, and given to the build as `embed.backend: precomputed`,
for the instructions and for the tags.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from curate.config import TagsConfig
from curate.manifest.schema import instruction_uid
from curate.vocabulary import phrases_of, tag

TASKS, DIMENSION, VOCABULARY = 16, 384, 20_000


def words(rng: np.random.Generator) -> list[str]:
    """A vocabulary of pronounceable words."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < VOCABULARY:
        found["".join(rng.choice(syllables, rng.integers(2, 5)))] = None
    return list(found)


def instructions(rng: np.random.Generator, n: int, vocabulary: list[str]) -> list[list[str]]:
    """Distinct instructions, n in all, split over the tasks; each task prefers its own region of the vocabulary."""
    weight = 1 / np.arange(1, VOCABULARY + 1)
    tasks = []
    for t in range(TASKS):
        p = np.roll(weight, t * VOCABULARY // TASKS) + 0.2 * weight
        size = n // TASKS + (t < n % TASKS)
        drawn = rng.choice(VOCABULARY, (size, 12), p=p / p.sum())
        tasks.append([f"{' '.join(vocabulary[w] for w in row)} {t} {i}." for i, row in enumerate(drawn)])
    return tasks


def write_tasks(folder: Path, texts: list[list[str]], rows: int) -> list[dict[str, str]]:
    """The sources: every instruction with its share of the rows."""
    tasks = []
    for t, mine in enumerate(texts):
        size = rows // TASKS + (t < rows % TASKS)
        with (folder / f"t{t}.jsonl").open("w") as file:
            for i in range(size):
                row = {
                    "instruction": mine[i % len(mine)],
                    "input": f"instance {i} of task {t}",
                    "output": f"answer {i}",
                }
                file.write(json.dumps(row) + "\n")
        tasks.append({"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca"})
    return tasks


def embed(texts: Iterable[str], directions: dict[str, int], table: np.ndarray) -> np.ndarray:
    """Mean of the words' directions; what is not a word has the last direction."""
    return np.stack(
        [table[[directions.get(w, VOCABULARY) for w in t.strip(".").split()] or [-1]].mean(0) for t in texts]
    )


def tags_of(texts: list[list[str]], folder: Path) -> list[str]:
    """The phrases that the build is going to cluster, from the build's own tagger."""
    rows = [(instruction_uid(f"t{t}", text), f"t{t}", text) for t, mine in enumerate(texts) for text in mine]
    frame = pl.DataFrame(rows, schema=["uid", "task", "instruction"], orient="row")
    tag(frame, TagsConfig(), folder, lambda n: None)
    return phrases_of(folder)


def main() -> None:
    """Make the stream, run the build, print time, memory and the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--instructions", type=int, default=100_000)
    given = parser.parse_args()
    rng, folder = np.random.default_rng(0), Path(tempfile.mkdtemp(prefix="million-"))
    try:
        vocabulary = words(rng)
        texts = instructions(rng, given.instructions, vocabulary)
        tasks = write_tasks(folder, texts, given.rows)
        everything = sorted({t for mine in texts for t in mine} | set(tags_of(texts, folder)))
        table = rng.normal(size=(VOCABULARY + 1, DIMENSION)).astype(np.float32)
        vectors = embed(everything, {w: i for i, w in enumerate(vocabulary)}, table)
        pl.DataFrame({"text": everything, "embedding": vectors}).write_parquet(folder / "vectors.parquet")
        config = {"tasks": tasks, "replay": {"budget": given.rows // 20}, "out": str(folder / "runs/million"),
                  "embed": {"backend": "precomputed", "path": "vectors.parquet"}}  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        del vectors, everything, texts
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "curate.cli", "build", str(folder / "config.yaml")])
        _, status, usage = os.wait4(process.pid, 0)
        print(f"status {status}, {time.perf_counter() - start:.0f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB")
        done = pl.read_parquet(folder / "runs/million/tasks.parquet")
        print(done.select("task", "rows", "instructions", "distance", "distance_bound", "quota", "granted"))
        print(f"tags: {pl.scan_parquet(folder / 'runs/million/tags.parquet').select(pl.len()).collect().item():,}")
        subprocess.run(["du", "-sh", str(folder / "runs")], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
