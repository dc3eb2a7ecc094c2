"""The rows that a page holds: which ones, and each with its lineage.

A page holds all samples of a small set and an even choice of a large one (`even.py`), within a number of bytes. What
rows share (a task's story, an instruction's) is held once.
"""

from __future__ import annotations

import json
from typing import Any

import polars as pl

from curate.explain import Row, Story, decision
from curate.manifest import Manifest, sequence_logp
from curate.report.even import evenly
from curate.report.parts import cut, real

MOST_ROWS = 5_000
MOST_BYTES = 6_000_000  # of the rows' JSON
MOST_OF_EACH = 12  # messages of a conversation, references of a row, completions of a prompt
MOST_TAGS = 40


def rows(m: Manifest) -> dict[str, Any]:
    """The page's rows, with the tasks, instructions and tags that they name by number."""
    rolled = m.scan("completions").filter(pl.col("origin") == "policy", pl.col("bucket").is_not_null())
    order = rolled.group_by("bucket").len().collect().sort("len", "bucket").select("bucket").with_row_index("rarity")
    rarity = pl.col("bucket").replace_strict(dict(order.select("bucket", "rarity").iter_rows()), return_dtype=pl.UInt32)
    samples = m.scan("samples").select("uid", "task", "origin")
    if order.height:
        rarest = rolled.select("prompt_uid", rarity=rarity).group_by("prompt_uid").agg(pl.col("rarity").min())
        samples = samples.join(rarest, left_on="uid", right_on="prompt_uid", how="left", maintain_order="left")
    else:
        samples = samples.with_columns(rarity=pl.lit(None, dtype=pl.UInt32))
    chosen = evenly(samples, ["task", "origin", "rarity"], MOST_ROWS)
    shown = m.scan("samples").join(chosen.lazy().select("uid"), on="uid", how="semi").collect()
    return Rows(m, chosen.select("uid").join(shown, on="uid", how="left", maintain_order="left")).page()


def to_json(value: Any) -> str:
    r"""JSON that is safe inside a script element: no `<`, `>`, `&`, and none of the separators that end a line.

    >>> to_json("</script>&")
    '"\\u003c/script\\u003e\\u0026"'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class Rows:
    """Some samples of a manifest as JSON values."""

    def __init__(self, manifest: Manifest, samples: pl.DataFrame) -> None:
        m, uids = manifest, samples["uid"].to_list()
        self.samples, self.total, self.story = samples, m.height("samples"), Story(m)
        self.theta = (m.provenance.get("augment") or {}).get("theta")
        self.reduce = ((m.provenance.get("buckets") or {}).get("rule") or {}).get("logp", "mean")
        self.of_task = {t["task"]: t for t in m.tasks.sort("stage").iter_rows(named=True)}
        self.place = {task: i for i, task in enumerate(self.of_task)}
        self.rewrites = {r["uid"]: r for r in m.augmentations.filter(pl.col("kept"), pl.col("uid").is_in(uids))
                         .sort("template").iter_rows(named=True)}  # fmt: skip
        here = samples.lazy().select("uid")
        answers = m.scan("completions").join(here, left_on="prompt_uid", right_on="uid", how="semi").collect()
        answers = answers.sort("origin", "rank", "uid", descending=[True, False, False], nulls_last=True)
        self.answers = {str(uid): frame for (uid,), frame in answers.group_by("prompt_uid", maintain_order=True)}
        drawn = m.instructions.join(samples, on=["task", "instruction"], how="semi")
        self.of_instruction = {(r["task"], r["instruction"]): r for r in drawn.iter_rows(named=True)}
        self.instructions: dict[tuple[str, str], int] = {}
        self.texts: list[dict[str, Any]] = []
        self.tags: dict[str, int] = {}
        self.room = MOST_BYTES

    def page(self) -> dict[str, Any]:
        """The rows by stage and uid, as many of the choice as there is room for."""
        found = list[tuple[int, str, dict[str, Any]]]()
        for sample in self.samples.iter_rows(named=True):
            row = self.row(sample)
            self.room -= len(to_json(row).encode())
            if self.room < 0:
                break
            found.append((sample["stage"], sample["uid"], row))
        found.sort(key=lambda each: each[:2])
        tasks = [{"name": cut(name, "tasks.parquet", 200), "why": self.why_task(task)}
                 for name, task in self.of_task.items()]  # fmt: skip
        return {
            "total": self.total,
            "tasks": tasks,
            "instructions": self.texts,
            "tags": [cut(tag, "tags.parquet", 200) for tag in self.tags],
            "rows": [row for *_, row in found],
        }

    def row(self, s: Row) -> dict[str, Any]:
        """One sample; what it has not is left out."""
        answers = self.answers.get(s["uid"])
        row = {
            "uid": s["uid"], "task": self.place[s["task"]], "origin": s["origin"], "row": s["row"],
            "instruction": self.instruction(s), "tags": [self.tag(t) for t in (s["tags"] or [])[:MOST_TAGS]],
            "insinfo": _round(s["insinfo"]), "prompt": _messages(s["prompt"]), "completion": _messages(s["completion"]),
            "references": _few([cut(r) for r in s["references"][:MOST_OF_EACH]], len(s["references"])),
            "tools": cut(s["tools"]) if s["tools"] else None, "license": s["license"] and cut(s["license"], most=200),
            "written_by": s["written_by"], "weight": None if s["weight"] == 1 else s["weight"],
            "parent": s["parent_uid"], "template": s["augmentation"], "why": self.why(s),
        }  # fmt: skip
        if answers is not None:
            row |= {"answers": [self.answer(a) for a in answers.head(MOST_OF_EACH).iter_rows(named=True)],
                    "of": answers.height, "reward": _round(answers.filter(origin="policy")["reward"].max()),  # type: ignore[arg-type]
                    "buckets": sorted(answers["bucket"].drop_nulls().unique())}  # fmt: skip
        return {key: value for key, value in row.items() if value is not None and value != []}

    def instruction(self, s: Row) -> int:
        """Number of a sample's instruction."""
        key = s["task"], s["instruction"]
        if key not in self.instructions:
            self.instructions[key] = len(self.texts)
            found = self.of_instruction.get(key)
            why = list(self.story.instruction(found)) if found and found["quota"] is not None else []
            self.texts.append(
                {"text": cut(s["instruction"]), "why": [cut(each, "instructions.parquet") for each in why]}
            )
            self.room -= len(to_json(self.texts[-1]).encode())
        return self.instructions[key]

    def tag(self, tag: str) -> int:
        """Number of a tag."""
        if tag not in self.tags:
            self.room -= 4 * min(len(tag), 200)
        return self.tags.setdefault(tag, len(self.tags))

    def why_task(self, task: Row) -> list[str]:
        """What all replayed rows of a task share."""
        return [] if task["quota"] is None else [cut(each, "tasks.parquet") for each in self.story.task(task)]

    def why(self, s: Row) -> list[str]:
        """What is said of this row alone: its own part of `curate explain`."""
        task = self.of_task[s["task"]]
        if s["origin"] == "augmented":
            rewrite = self.rewrites.get(s["uid"])
            return [decision(rewrite, self.theta)] if rewrite and self.theta is not None else []
        if s["origin"] == "current":
            return [self.story.current(task)]
        instruction = self.of_instruction.get((s["task"], s["instruction"]))
        return list(self.story.draw(s, task, instruction)) if instruction else []

    def answer(self, a: Row) -> dict[str, Any]:
        """A completion of a sample's prompt."""
        logp = sequence_logp(a["token_logps"], self.reduce)
        row = {"text": cut(a["text"], "completions.parquet"), "origin": a["origin"], "bucket": a["bucket"],
               "logp": _round(logp if logp == logp else None), "reward": _round(a["reward"]), "rank": a["rank"],
               "side": a["side"] and f"{a['side']} ({real(a['similarity'], 3)})"}  # fmt: skip
        return {key: value for key, value in row.items() if value is not None}


def _messages(messages: list[Row]) -> list[list[str]]:
    """[role, text] of each message; a message's tool calls stand as their JSON."""
    texts = [
        [m["role"], cut("\n".join(filter(None, [m["content"], m.get("tool_calls")])))] for m in messages[:MOST_OF_EACH]
    ]
    return _few(texts, len(messages), ["…", f"{len(messages) - MOST_OF_EACH:,} messages more, in samples.parquet"])


def _few(shown: list[Any], n: int, remark: Any = None) -> list[Any]:
    more = f"… {n - MOST_OF_EACH:,} more, in samples.parquet"
    return [*shown, remark or more] if n > MOST_OF_EACH else shown


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
