"""Markdown of a data card: tables, and text of the data made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is a dash."""
    lines = [header, ["---"] * len(header), *([("–" if c is None else str(c)) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def real(value: float | None, digits: int = 4) -> str | None:
    """A number with so many digits; None stays None."""
    return None if value is None else f"{value:.{digits}f}"


def bound(value: float | None) -> str | None:
    """The largest possible error of a number."""
    return "exact" if value == 0 else real(value)


def printable(text: str) -> str:
    """Text of the data as one line without control and direction characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def code(text: str) -> str:
    """Text of the data as a code span, in which Markdown decodes nothing."""
    return "`" + printable(text).replace("`", "'").replace("|", "¦") + "`"


def own(text: str) -> str:
    """Text of ours for a cell: plain Markdown, whose pipes are not the table's."""
    return text.replace("|", "\\|")


def escape(text: str) -> str:
    """Text of the data, harmless in Markdown and in the HTML that it becomes. (Without brackets, () make no link.)"""
    return "".join(f"&#{ord(c)};" if c in "&<>|`[]!*_\\~#" else c for c in printable(text))
