"""TRL's data sets: prompt–completion for SFTTrainer, preference pairs for DPOTrainer, prompts for GRPOTrainer.

`uid`, `task`, `origin` and `weight` stand beside what a trainer reads: SFTTrainer and DPOTrainer leave them out,
GRPOTrainer hands them to the reward functions. Tools are JSON text, which TRL decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from curate.export.base import Call, Inexpressible, Row, Skipped, calls, needs_prompt, samples, uses_tools
from curate.manifest import Manifest


def sft(manifest: Manifest) -> Iterator[Row | Skipped]:
    """{prompt, completion}: the loss is on the completion. A set of plain documents alone becomes {text}."""
    documents = (manifest.samples["prompt"].list.len() == 0).all()
    offered = manifest.samples["tools"].is_not_null().any()
    for row in samples(manifest):
        try:
            if documents:
                yield {"text": "".join(m["content"] for m in row["completion"]), **_facts(row)}
                continue
            if not row["prompt"]:
                raise Inexpressible("a plain document among conversations: TRL takes one kind of rows in a file")
            tools = {"tools": row["tools"]} if offered else {}
            yield {**{k: [_message(m) for m in row[k]] for k in ("prompt", "completion")}, **tools, **_facts(row)}
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def prompts(manifest: Manifest) -> Iterator[Row | Skipped]:
    """{prompt, references}: GRPOTrainer writes the completions, a reward function gets the references."""
    for row in samples(manifest):
        try:
            needs_prompt(row)
            if uses_tools(row):
                raise Inexpressible("it uses tools, which GRPOTrainer takes as Python functions, not from the data")
            prompt = [_message(m) for m in row["prompt"]]
            yield {"prompt": prompt, "references": row["references"], **_facts(row)}
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def dpo(manifest: Manifest, pairs: str = "rank") -> Iterator[Row | Skipped]:
    """{prompt, chosen, rejected}.

    `rank`: every best answer of a prompt against each worse one of the same origin (rollouts with rollouts, ranked
    answers with ranked answers); a tie gives no pair. `side`: every answer that aligns with the target (PBL) against
    each that conflicts with it. Both orders of a pair never stand in one file.
    """
    answers = manifest.completions.filter(pl.col(pairs).is_not_null()).sort("prompt_uid", "origin", "rank", "uid")
    offered = manifest.samples["tools"].is_not_null().any()
    of: dict[str, dict[str, list[Row]]] = {}
    for answer in answers.select("uid", "prompt_uid", "origin", "text", "rank", "side").iter_rows(named=True):
        of.setdefault(answer["prompt_uid"], {}).setdefault(answer["origin"], []).append(answer)
    for row in samples(manifest):
        try:
            needs_prompt(row)
            prompt = [_message(m) for m in row["prompt"]]
            groups = of.get(row["uid"], {})
            found = [(origin, *pair) for origin, group in groups.items() for pair in _pairs(group, pairs)]
            if not found:
                raise Inexpressible(_why_no_pair(groups, pairs))
            tools = {"tools": row["tools"]} if offered else {}
            for origin, chosen, rejected in found:
                yield {"prompt": prompt, "chosen": _answer(chosen), "rejected": _answer(rejected), **tools,
                       **_facts(row), "by": pairs, "answers": origin, "chosen_uid": chosen["uid"],
                       "rejected_uid": rejected["uid"]}  # fmt: skip
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def _pairs(group: list[Row], by: str) -> list[tuple[Row, Row]]:
    """(chosen, rejected) of the answers of one prompt and origin."""
    if by == "rank":
        best = min(answer["rank"] for answer in group)
        good, bad = [a for a in group if a["rank"] == best], [a for a in group if a["rank"] > best]
    else:
        good, bad = ([a for a in group if a["side"] == side] for side in ("align", "conflict"))
    seen, found = set[tuple[str, str]](), []
    for pair in ((g, b) for g in good for b in bad):
        texts = (pair[0]["text"], pair[1]["text"])
        if texts[0] != texts[1] and texts not in seen:  # rollouts may say the same
            seen.add(texts)
            found.append(pair)
    return found


def _why_no_pair(groups: Mapping[str, list[Row]], by: str) -> str:
    every = [answer for group in groups.values() for answer in group]
    if not every:
        return "no ranked answers" if by == "rank" else "no answers with a side"
    if len(every) == 1:
        return "only one answer"
    return "all its answers share one rank" if by == "rank" else f"all its answers {every[0]['side']}"


def _answer(answer: Mapping[str, Any]) -> list[Row]:
    return [{"role": "assistant", "content": answer["text"]}]


def _facts(row: Mapping[str, Any]) -> Row:
    return {key: row[key] for key in ("uid", "task", "origin", "weight")}


def _message(message: Row) -> Row:
    found = calls(message)
    return {**message, "tool_calls": [_call(c) for c in found]} if found else message


def _call(call: Call) -> Row:
    function = {"name": call.name, "arguments": call.arguments}  # an object, as chat templates want it
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}
