"""What the formats of `curate export` share: rows in and out, and messages in the layouts that trainers read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from curate.manifest import Manifest

Row = dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """A row of the manifest that the format cannot express, and why."""

    uid: str
    task: str
    reason: str


class Inexpressible(Exception):
    """Says why a row cannot be written in a format; `each` turns it into a Skipped."""


@dataclass(frozen=True)
class Call:
    """One call of a tool: arguments are an object."""

    id: str | None
    name: str
    arguments: dict[str, Any]


def samples(manifest: Manifest) -> Iterator[Row]:
    """The samples in their order, messages without null fields."""
    for row in manifest.samples.iter_rows(named=True):
        yield row | {name: [_plain(m) for m in row[name]] for name in ("prompt", "completion")}


def _plain(message: Mapping[str, Any]) -> Row:
    return {key: value for key, value in message.items() if value is not None}


def calls(message: Mapping[str, Any]) -> list[Call]:
    """The calls of an assistant's message, written in OpenAI's way or as bare {name, arguments}."""
    found = []
    for each in json.loads(message.get("tool_calls", "[]")):
        each = each if isinstance(each, dict) else {}
        function = each.get("function", each)
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise Inexpressible("a tool call is not of the form {name, arguments}")
        found.append(Call(each.get("id"), function["name"], arguments))
    return found


def functions(tools: str | None) -> list[Row]:
    """The tools that a conversation offers, as bare functions {name, description, parameters}."""
    found = [t.get("function", t) if isinstance(t, dict) else t for t in json.loads(tools or "[]")]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in found):
        raise Inexpressible("a tool is not of the form {name, description, parameters}")
    return found


def uses_tools(row: Mapping[str, Any]) -> bool:
    """True where a row offers tools, calls one, or holds what one answered."""
    every = [*row["prompt"], *row["completion"]]
    return row["tools"] is not None or any("tool_calls" in m or m["role"] == "tool" for m in every)


def needs_prompt(row: Mapping[str, Any]) -> None:
    """Refuses a plain document."""
    if not row["prompt"]:
        raise Inexpressible("a plain document: it has no prompt")
