"""Alpaca, LLaMA-Factory's ShareGPT and OpenAI's fine-tuning format: fixed keys and nothing beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curate.export.base import Call, Inexpressible, Row, Skipped, calls, functions, needs_prompt, samples, uses_tools
from curate.manifest import Manifest

OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")


def alpaca(manifest: Manifest) -> Iterator[Row | Skipped]:
    """{instruction, input, output, system, history}; history: [[user, assistant], …] of the turns before.

    `input` is what follows the instruction and an empty line in the last question; a trainer joins the two in a way of
    its own (LLaMA-Factory with one line break), so prompts differ a little from the manifest's.

    Cannot be expressed: tools, plain documents, completions of several messages, turns that do not alternate, a system
    message within the conversation.
    """
    for row in samples(manifest):
        try:
            needs_prompt(row)
            if uses_tools(row):
                raise Inexpressible("it uses tools")
            if len(row["completion"]) != 1:
                raise Inexpressible(f"its completion has {len(row['completion'])} messages, Alpaca has one output")
            system, turns = _turns([*row["prompt"], *row["completion"]])
            (question, answer), history = turns[-1], turns[:-1]
            head = f"{row['instruction']}\n\n"
            split = question.startswith(head) and not history and len(question) > len(head)
            instruction, given = (row["instruction"], question[len(head) :]) if split else (question, "")
            yield {"instruction": instruction, "input": given, "output": answer, "system": system,
                   "history": [list(turn) for turn in history]}  # fmt: skip
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def _turns(messages: Sequence[Row]) -> tuple[str, list[tuple[str, str]]]:
    """The system message ("" = none) and (user, assistant) of every turn."""
    if any("name" in m for m in messages):
        raise Inexpressible("a message names its speaker")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in rest] != ["user", "assistant"] * (len(rest) // 2) or not rest:
        raise Inexpressible("its turns are not user, assistant, user, assistant …")
    return system, [(a["content"], b["content"]) for a, b in zip(rest[::2], rest[1::2], strict=True)]


def llamafactory(manifest: Manifest) -> Iterator[Row | Skipped]:
    """{conversations: [{from, value}, …], system, tools}, ShareGPT as LLaMA-Factory reads it.

    Questions and tool results (human, observation) take the odd places, answers and calls (gpt, function_call) the even
    ones; what does not fit into that order cannot be expressed, nor can an answer that has text beside its call.
    """
    for row in samples(manifest):
        try:
            needs_prompt(row)
            yield _sharegpt(row)
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def _sharegpt(row: Row) -> Row:
    messages = [*row["prompt"], *row["completion"]]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = [_turn(m) for m in (messages[1:] if messages[0]["role"] == "system" else messages)]
    asks, answers = ("human", "observation"), ("gpt", "function_call")
    fits = all(turn["from"] in (answers if place % 2 else asks) for place, turn in enumerate(turns))
    if not fits or len(turns) % 2 or not turns:
        raise Inexpressible("its turns do not alternate between a question or tool result and an answer or tool call")
    tools = functions(row["tools"])
    return {"conversations": turns, "system": system,
            "tools": json.dumps(tools, ensure_ascii=False) if tools else ""}  # fmt: skip


def _turn(message: Row) -> Row:
    if "name" in message and message["role"] != "tool":
        raise Inexpressible("a message names its speaker")
    if found := calls(message):
        if message["content"]:
            raise Inexpressible("an answer has text beside its tool call")
        each = [{"name": c.name, "arguments": c.arguments} for c in found]
        value = json.dumps(each[0] if len(each) == 1 else each, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    roles = {"user": "human", "assistant": "gpt", "tool": "observation"}
    if message["role"] not in roles:
        raise Inexpressible(f"a message of the role {message['role']!r} within the conversation")
    return {"from": roles[message["role"]], "value": message["content"]}


def dataset_info(file: str) -> Row:
    """What LLaMA-Factory's dataset_info.json says of a file that `llamafactory` wrote."""
    return {
        "file_name": file,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
        "tags": {
            "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
            "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
        },
    }  # fmt: skip


def openai(manifest: Manifest) -> Iterator[Row | Skipped]:
    """{messages, tools}: OpenAI's chat format for fine-tuning.

    Answers of the prompt have weight 0, so that the loss is on the completion, as in the manifest.
    """
    for row in samples(manifest):
        try:
            needs_prompt(row)
            messages = [*row["prompt"], *row["completion"]]
            written = [_openai(m, place >= len(row["prompt"])) for place, m in enumerate(messages)]
            if written[-1]["role"] != "assistant":
                raise Inexpressible("its last message is not the assistant's")
            _check_ids(written)
            tools = [{"type": "function", "function": f} for f in functions(row["tools"])]
            yield {"messages": written} | ({"tools": tools} if tools else {})
        except Inexpressible as reason:
            yield Skipped(row["uid"], row["task"], str(reason))


def _openai(message: Row, trained: bool) -> Row:
    role = message["role"]
    if role not in OPENAI_ROLES:
        raise Inexpressible(f"OpenAI has no role {role!r}")
    found = calls(message)
    out = {"role": role, "content": message["content"] or (None if found else "")}
    if found:
        out["tool_calls"] = [_openai_call(c, f"call_{n}") for n, c in enumerate(found, 1)]
    if role == "tool":
        out["tool_call_id"] = message.get("tool_call_id")
    elif "name" in message:
        out["name"] = message["name"]
    return out | ({} if trained or role != "assistant" else {"weight": 0})


def _openai_call(call: Call, otherwise: str) -> Row:
    arguments = json.dumps(call.arguments, ensure_ascii=False)  # text, as OpenAI wants it
    return {"id": call.id or otherwise, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _check_ids(messages: Sequence[Mapping[str, Any]]) -> None:
    """Every tool result names a call that came before it, and every call but the last message's has its result."""
    asked = list[str]()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in asked:
                raise Inexpressible("a tool's answer does not name the id of its call")
            asked.remove(message["tool_call_id"])
        elif asked:
            raise Inexpressible("a tool call has no answer")
        asked += [c["id"] for c in message.get("tool_calls", [])]
