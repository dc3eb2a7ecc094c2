"""Manifests of any size, with every section, made without a build: what tests and the benchmark of the page look at.

Every text column goes through `text(kind, i)`, so that a test can put whatever it likes into all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.manifest import TABLES, Manifest, Rule, read, write
from curate.manifest.schema import completion_uid, content_hash, instruction_uid, sample_uid

Text = Callable[[str, int], str]
WORDS = "name the word that fits best and say why it does so in one short line of plain text".split()


def plain(kind: str, i: int) -> str:
    """Words that differ by i."""
    return f"{kind} {i} " + " ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(12))


ATTACKS = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    '<img src=x onerror="window.hacked = 1">',
    '<a href="javascript:window.hacked = 1">javascript:window.hacked = 1</a>',
    '" onmouseover="window.hacked = 1" x="',
    "'; window.hacked = 1; //",
    "<svg onload=window.hacked=1><style>*{display:none}</style>",
    "{{constructor.constructor('window.hacked = 1')()}} ${window.hacked = 1} %{x} $x$",
    "&lt;script&gt;window.hacked = 1&lt;/script&gt;",
    "\u202egnp.exe\u202c \u2066left\u2069 \u200bzero\ufeff",
    "NUL \0 bell \a escape \x1b[31m red \u2028 line \u2029 paragraph",
    "__proto__",
    "2026-11-24",
)


def hostile(kind: str, i: int) -> str:
    """An attack that differs by kind and i; a megabyte of text in two cells of the prompts."""
    text = f"{ATTACKS[(i + len(kind)) % len(ATTACKS)]} {kind} {i}"
    return text + " long" * 200_000 if kind == "input" and i % 100 == 50 else text


def made(
    folder: Path, samples: int = 300, tasks: int = 4, text: Text = plain, seed: int = 0, k: int = 2, per: int = 10
) -> Manifest:
    """A manifest of about `samples` rows: half of them of the newest task, k rollouts each, a tenth rewritten.

    Args:
        folder: where it is written.
        samples: rows of the set.
        tasks: of the stream.
        text: makes every text of it.
        seed: of all that is drawn.
        k: rollouts of a prompt.
        per: rows of an instruction.
    """
    rng = np.random.default_rng(seed)
    names = [text("task", t) for t in range(tasks)]
    vocabulary = [text("tag", i) for i in range(max(40, samples // 100))]
    canonical = [vocabulary[i - i % 4] if i % 8 < 4 else tag for i, tag in enumerate(vocabulary)]
    frames: dict[str, Any] = {"tags": [], "drops": []}
    frames["instructions"] = instructions = _instructions(rng, samples, names, canonical, text, per)
    frames["samples"] = rows = _samples(instructions, names[-1], text)
    frames["augmentations"] = rewrites = _rewrites(rng, rows[:: max(2, len(rows) // (samples // 10))], text)
    theta = 0.2
    for a in rewrites:
        kept = a["kept"] = a["fault"] is None and a["score"] > theta
        drop = {"uid": a["uid"], "task": a["task"], "stage": a["stage"], "row": None, "step": "augment",
                "reason": a["fault"] or text("reason", 1), "instruction_uid": None, "score": a["score"]}  # fmt: skip
        frames["drops"] += [] if kept else [drop]
    parents = {row["uid"]: row for row in rows}
    rows += [_rewritten(parents[a["parent_uid"]], a) for a in rewrites if a["kept"]]
    frames["completions"] = completions = _completions(rng, rows[: len(parents)], text, k)
    frames["drops"] += _left(instructions, names[-1], text)
    count = Counter(tag for each in instructions for tag in each["tags"])
    frames["tags"] = [
        {"tag": tag, "canonical": canonical[i], "cluster": i // 4 if i % 8 < 4 else -1,
         "raw_count": count[canonical[i]] // 2,
         "count": count[canonical[i]], "pool": len(instructions), "explanation": text("why", i)}
        for i, tag in enumerate(vocabulary)
    ]  # fmt: skip
    tables = {name: TABLES[name].fit(_frame(frames[name], name)) for name in frames}
    rule = Rule(k=0.5, population="task")
    bucket, statistics = rule.assign(tables["completions"])
    tables["completions"] = tables["completions"].with_columns(bucket)
    tables["tasks"] = _tasks(rng, names, tables)
    facts = {
        "config": {"name": text("name", 0), "seed": seed, "augment": {"theta": theta}},
        "replay": {
            "asked": int(tables["tasks"]["quota"].sum()),
            "selector": "inscl",
            "about": "by distance and InsInfo",
        },
        "buckets": {"rule": asdict(rule), "statistics": {name: asdict(s) for name, s in statistics.items()}},
        "augment": {"theta": theta, "templates": {}},
        "map": {"variance": [0.31, 0.12]},
        "rehearse": "0.1.0",
        "inputs": [],
    }
    assert len(completions) == k * len(parents)
    write(folder, tables, facts, "# A made manifest\n")
    return read(folder)


def _frame(rows: list[dict[str, Any]], table: str) -> pl.DataFrame:
    schema = TABLES[table].schema
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def _instructions(
    rng: np.random.Generator, samples: int, names: list[str], canonical: list[str], text: Text, per: int
) -> list[dict[str, Any]]:
    """As many of the newest task as of all others together; a fifth of an older task's rows is drawn."""
    found, newest = [], samples // 2 // per
    for t, task in enumerate(names):
        last = t == len(names) - 1
        for i in range(newest if last else max(1, math.ceil(5 * samples / 2 / per / (len(names) - 1)))):
            instruction, granted = text("instruction", 1000 * t + i), None if last else 2
            tags = sorted({canonical[j] for j in rng.integers(0, len(canonical), 4)})
            found.append({
                "uid": instruction_uid(task, instruction), "task": task, "stage": t + 1, "instruction": instruction,
                "rows": per, "tags": tags, "insinfo": None if last else float(rng.gamma(4, 5)), "quota": granted,
                "granted": granted, "x": float(rng.normal(t)), "y": float(rng.normal()),
            })  # fmt: skip
    return found


def _samples(instructions: list[dict[str, Any]], newest: str, text: Text) -> list[dict[str, Any]]:
    found = []
    for each in instructions:
        origin = "current" if each["task"] == newest else "replay"
        for i in range(each["rows"] if origin == "current" else each["granted"]):
            number = len(found)
            prompt = [{"role": text("role", 0), "content": f"{each['instruction']}\n\n{text('input', number)}"}]
            completion, references = (
                [{"role": "assistant", "content": text("answer", number)}],
                [text("reference", number)],
            )
            found.append({
                "uid": sample_uid(each["task"], prompt, completion, references), "task": each["task"],
                "stage": each["stage"], "origin": origin, "row": i + 1, "instruction": each["instruction"],
                "prompt": prompt, "completion": completion, "references": references, "license": text("license", 0),
                "tools": text("tools", 0), "tags": each["tags"], "insinfo": each["insinfo"], "weight": 1.0,
                "written_by": "gold",
            })  # fmt: skip
    return found


def _rewrites(rng: np.random.Generator, rows: list[dict[str, Any]], text: Text) -> list[dict[str, Any]]:
    found = []
    for n, row in enumerate(rows):
        prompt = [{"role": "user", "content": text("rewrite", n)}]
        completion = [{"role": "assistant", "content": text("its answer", n)}]
        fault = text("fault", n % 2) if n % 7 == 6 else None
        mi_input, mi_output = (None, None) if fault else (float(rng.random()), float(rng.random()))
        uid = sample_uid(row["task"], prompt, completion, [text("its answer", n)], parent_uid=row["uid"])
        found.append({
            "uid": uid, "parent_uid": row["uid"], "task": row["task"], "stage": row["stage"],
            "template": text("template", n % 3), "prompt": prompt, "completion": completion, "mi_input": mi_input,
            "mi_output": mi_output, "score": None if fault else mi_input * mi_output, "fault": fault,
        })  # fmt: skip
    return found


def _rewritten(parent: dict[str, Any], a: dict[str, Any]) -> dict[str, Any]:
    same = ("uid", "parent_uid", "prompt", "completion", "mi_input", "mi_output")
    return {**parent, **{name: a[name] for name in same}, "origin": "augmented", "row": None,
            "augmentation": a["template"], "written_by": "policy"}  # fmt: skip


def _completions(rng: np.random.Generator, rows: list[dict[str, Any]], text: Text, k: int) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        for j in range(k):
            n = len(found)
            logps = (-rng.exponential(1.5, 4)).astype(np.float32).tolist()
            similarity = float(rng.random())
            found.append({
                "uid": completion_uid(row["uid"], "policy", text("rollout", n), j), "prompt_uid": row["uid"],
                "task": row["task"], "stage": row["stage"], "origin": "policy", "text": text("rollout", n),
                "token_ids": [1, 2, 3, 4], "token_logps": logps, "n_tokens": 4, "policy": text("policy", 0),
                "tokenizer": "t", "temperature": 1.0, "top_p": 1.0, "finished": True, "batch": 0,
                "reward": float(rng.random() ** 3), "reward_id": text("reward", 0), "rank": j + 1,
                "similarity": similarity, "side": "align" if similarity >= 0.7 else "conflict",
            })  # fmt: skip
    return found


def _left(instructions: list[dict[str, Any]], newest: str, text: Text) -> list[dict[str, Any]]:
    return [
        {"uid": content_hash([each["uid"], i]), "task": each["task"], "stage": each["stage"], "row": i + 1,
         "step": "sample",
         "reason": text("reason", 0), "instruction_uid": each["uid"], "score": each["insinfo"]}
        for each in instructions if each["task"] != newest
        for i in range(each["granted"], each["rows"])
    ]  # fmt: skip


def _tasks(rng: np.random.Generator, names: list[str], tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    rows = []
    distance = rng.uniform(0.6, 1.1, len(names) - 1)
    for t, task in enumerate(names):
        mine = tables["instructions"].filter(task=task)
        row = {"task": task, "stage": t + 1, "rows": mine["rows"].sum(), "instructions": mine.height}
        if t < len(names) - 1:
            granted = mine["granted"].sum()
            row |= {"distance": distance[t], "distance_bound": 0.0 if t % 2 else 0.05, "share": granted + 0.25,
                    "quota": granted + (t == 0), "granted": granted, "reason": "it is small" if t == 0 else None,
                    "covered": mine.filter(pl.col("granted") > 0).height,
                    "insinfo": mine["insinfo"].mean()}  # fmt: skip
        rows.append(row)
    return TABLES["tasks"].fit(_frame(rows, "tasks"))
