"""What a page is made of: sections with sentences, plots and tables; and how numbers and texts of the data are written.

Cells and sentences are plain text: the page puts them into the DOM as text only. Labels of plots are markup to the
library that draws them, so `label` alone may fill them.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from curate.manifest import Manifest

CELL = 2_000  # characters of a text of the data that the page shows
LABEL = 60
MOST_LINES = 500  # of a table
# control characters, marks of direction, zero-width and other invisible ones: shown by their number
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\U000e0000-\U000e01ef]"
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption. `numbers` are the columns that are aligned as numbers."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: list[int] = field(default_factory=list)
    half: bool = False  # of the page's width, where that is enough


@dataclass(frozen=True)
class Plot:
    """A figure of Plotly as plain data; a colour "@name" is one of the page's. `table` holds its figures."""

    id: str
    title: str
    alt: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    table: Table | None = None
    note: str = ""
    half: bool = False


@dataclass(frozen=True)
class Section:
    """A question with its answer; without parts it says in a sentence why there is nothing."""

    id: str
    title: str
    says: list[str]
    parts: list[Plot | Table] = field(default_factory=list)


def newest_task(m: Manifest) -> str:
    """Name of the current task; empty where a part of a manifest has no row of it."""
    tasks = m.tasks.filter(pl.col("quota").is_null()).sort("stage")["task"].to_list()
    return tasks[-1] if tasks else ""


def left_out(m: Manifest) -> pl.LazyFrame:
    """Source rows that are not in the set."""
    return m.scan("drops").filter(pl.col("step") != "augment")


def capped(rows: list[list[str]], file: str) -> tuple[list[list[str]], str]:
    """(as many rows as a table shows, a remark for its caption where some are left out)."""
    more = f" The first {MOST_LINES} of {len(rows):,}; {file} has all." if len(rows) > MOST_LINES else ""
    return rows[:MOST_LINES], more


def count(n: int | None) -> str:
    """A whole number; None is a dash."""
    return "–" if n is None else f"{n:,}"


def real(x: float | None, digits: int = 4) -> str:
    """A number with so many digits; None is a dash."""
    return "–" if x is None else f"{x:,.{digits}f}"


def percent(part: int, whole: int) -> str:
    """A share.

    >>> percent(1, 8)
    '12.5 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "–"


def plural(n: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> plural(1, "row"), plural(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def cut(text: str, file: str = "samples.parquet", most: int = CELL) -> str:
    """A text of the data, its end replaced by a remark where it is long."""
    if len(text) <= most:
        return text
    return f"{text[:most]} … {len(text):,} characters in all, whole in {file}"


def short(text: str, most: int = LABEL) -> str:
    """A text of the data as one short line."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1] + "…"


def visible(character: str) -> str:
    """A character as the eye can see it: an invisible one by its number."""
    return ("⟨NUL⟩" if character == "\0" else f"⟨U+{ord(character):04X}⟩") if INVISIBLE.match(character) else character


def label(text: str, most: int = LABEL) -> str:
    r"""A text of the data for a label of a plot, or for markup: short, invisible characters shown, and no markup.

    >>> label("<b>a\u202eb")
    '&lt;b&gt;a⟨U+202E⟩b'
    """
    line = ""
    for character in short(text, most):
        line += html.escape(visible(character), quote=False)
        if len(line) > 2 * most:  # what is shown by its number or its entity takes more
            return line + "…"
    return line
