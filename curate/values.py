"""The values of a source row: looked up by role, checked, and turned into what a sample can store.

Owns the words for what is wrong with a row. Knows nothing of formats (which columns belong together) or files.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]
Message = dict[str, Any]
Names = Mapping[str, tuple[str, ...]]
"""Key of `columns` -> the source's column of that role; where the format has several names, the first one found."""


class RowFault(ValueError):
    """A row that cannot be used. `key` is the role of the column (`output`), if one is to blame."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key
        self.column: str | None = None

    def at(self, record: Record, names: Names) -> RowFault:
        """The fault with the name that the column to blame has in this record."""
        if self.key is not None:
            self.column = next((name for name in names[self.key] if name in record), self.key)
        return self

    def where(self) -> str:
        """The start of a message about this fault."""
        return f"column {self.column!r}: " if self.column else ""


class MissingColumn(RowFault):
    """A row without a column that its format needs."""

    def __init__(self, key: str, name: str, record: Record) -> None:
        near = difflib.get_close_matches(name, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = ", ".join(map(str, record)) or "no columns"
        super().__init__(f"no column {name!r}{hint} (the row has: {has})")
        self.missing = key
        self.remedy = f"columns: {{{key}: {near[0] if near else '<name>'}}}"


def required(record: Record, names: Names, key: str) -> Any:
    """The value of a column that the row must have."""
    for name in names[key]:
        if name in record:
            return record[name]
    raise MissingColumn(key, names[key][0], record)


def optional(record: Record, names: Names, key: str) -> Any:
    """The value of a column that the row may have, else None."""
    for name in names[key]:
        if name in record:
            return record[name]
    return None


def as_text(value: Any, key: str) -> str:
    """A text that can be stored. Numbers and booleans get their JSON spelling."""
    if isinstance(value, str):
        if not value.isascii():
            _check_encodable(value, key)
        return value
    if isinstance(value, bool | int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise RowFault(f"{value} is not a value that can be stored", key)
        return json.dumps(value)
    raise RowFault(f"a text was expected, found {kind_of(value)}", key)


def as_messages(value: Any, key: str) -> list[Message]:
    """Messages {role, content, …} of a list, or of its JSON text."""
    value = parsed_list(value, key)
    if not isinstance(value, list) or not value:
        raise RowFault(f"a list of messages was expected, found {kind_of(value)}", key)
    return [_message(item, key) for item in value]


def as_json_list(value: Any, key: str) -> str | None:
    """A list as JSON text; JSON text of a list stays as it is, what is empty is None."""
    if value is None or value == "" or value == []:
        return None
    if not isinstance(parsed_list(value, key), list):
        raise RowFault(f"a list was expected, found {kind_of(value)}", key)
    if isinstance(value, str):
        return as_text(value, key)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowFault(f"cannot be stored as JSON: {error}", key) from None
    return as_text(text, key)


def as_license(value: Any) -> str | None:
    """A licence, or several joined by '; '."""
    values = value if isinstance(value, list) else [value]
    return "; ".join(as_text(v, "license") for v in values if v is not None and v != "") or None


def as_tags(value: Any) -> list[str] | None:
    """Tags of a list, or of one text split at commas and semicolons."""
    if value is None:
        return None
    parts = re.split("[,;]", value) if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise RowFault(f"a list of tags was expected, found {kind_of(value)}", "tags")
    return [tag for part in parts if (tag := as_text(part, "tags").strip())]


_SHAREGPT = {"human": "user", "gpt": "assistant"}


def _message(item: Any, key: str) -> Message:
    if not isinstance(item, dict):
        raise RowFault(f"a message {{role, content}} was expected, found {kind_of(item)}", key)
    role, content = item.get("role"), item.get("content")
    if role is None and item.get("from") is not None:
        role, content = as_text(item["from"], key), item.get("value")
        role = _SHAREGPT.get(role, role)
    if role is None:
        raise RowFault("a message has no role", key)
    if item.get("function_call") is not None:
        raise RowFault("a message has the old function_call; write it as tool_calls", key)
    message = {"role": as_text(role, key), "content": _content(content, key)}
    if calls := as_json_list(item.get("tool_calls"), key):
        message["tool_calls"] = calls
    for extra in ("tool_call_id", "name"):
        if item.get(extra) is not None:
            message[extra] = as_text(item[extra], key)
    return message


def _content(value: Any, key: str) -> str:
    if value is None:
        return ""
    return "".join(_part(part, key) for part in value) if isinstance(value, list) else as_text(value, key)


def _part(part: Any, key: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return as_text(part.get("text"), key)
    kind = repr(part.get("type")) if isinstance(part, dict) else kind_of(part)
    raise RowFault(f"content part of type {kind}; only text can be trained on", key)


def parsed_list(value: Any, key: str) -> Any:
    """The list that a JSON text holds (a CSV has no lists); any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"not JSON: {error}", key) from None


def is_blank(text: str) -> bool:
    """True for nothing but white space."""
    return not text or text.isspace()


def _check_encodable(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(f"a lone surrogate (\\u{ord(text[error.start]):04x}) is not valid text", key) from None


def kind_of(value: Any) -> str:
    """A value's kind in the words of an error."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {type(None): "null", dict: "an object", str: "a text", bool: "a boolean"}
    return names.get(type(value), f"a {type(value).__name__}")
