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


def printable(text: str) -> str:
    """Text of the data as one line without control and direction characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def code(text: str) -> str:
    """Text of the data as a code span, in which Markdown decodes nothing."""
    return "`" + printable(text).replace("`", "'").replace("|", "¦") + "`"


def escape(text: str) -> str:
    """Text of the data, harmless in Markdown and in the HTML that it becomes."""
    return "".join(f"&#{ord(c)};" if c in "&<>|`[]()!*_\\~#" else c for c in printable(text))
