"""A Diff as tables for the screen, and as a page that opens offline: no scripts, everything escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from curate.diff import CAUSES, Diff
from curate.manifest.markdown import printable

MOST = 5_000  # rows that a page lists
LONGEST = 300  # characters of a setting or a detail


@dataclass(frozen=True)
class Section:
    """A titled table; cells are text, numbers or None (a dash)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def numeric(self) -> list[bool]:
        """For each column: it holds numbers alone."""
        return [all(isinstance(row[i], int | float | None) for row in self.rows) for i in range(len(self.header))]


def summary(diff: Diff) -> str:
    """The counts, which add up."""
    out, new = diff.count("out"), diff.count("in")
    return (
        f"{diff.kept + out:,} rows = {diff.kept:,} kept + {out:,} out; "
        f"{diff.kept + new:,} rows = {diff.kept:,} kept + {new:,} in"
    )


def sections(diff: Diff) -> Iterator[Section]:
    """What a person asks, in this order; a section without rows is left out."""
    every = (_settings(diff), _tasks(diff), _causes(diff), _changed(diff), _moves(diff))
    yield from (section for section in every if section.rows)


def _settings(diff: Diff) -> Section:
    rows = [[_short(value) for value in row] for row in diff.settings.iter_rows()]
    return Section("What was set, read and run otherwise", ["kind", "key", "a", "b"], rows)


def _tasks(diff: Diff) -> Section:
    header = ["task", "rows a", "rows b", "distance a", "distance b", "quota a", "quota b", "granted a", "granted b",
              "kept", "out", "in"]  # fmt: skip
    columns = diff.tasks.select(header[0], *(name.replace(" ", "_") for name in header[1:9]), *header[9:])
    note = "Samples of a task: kept + out in a, kept + in in b. A dash: not in that stream, or the current task."
    total = ["in all", *[None] * 8, *columns.select(pl.col("kept", "out", "in").sum()).row(0)]
    rows = [*map(list, columns.iter_rows()), total] if columns.height else []
    return Section("Quotas side by side", header, rows, note)


def _causes(diff: Diff) -> Section:
    counts = diff.rows.group_by("move", "why").agg(pl.len(), pl.col("uid").first(), pl.col("detail").first())
    order = {cause: place for place, cause in enumerate(CAUSES)}
    rows = sorted(counts.iter_rows(), key=lambda r: (r[0] != "out", order[r[1]]))
    return Section(
        "Rows out and in, and why",
        ["move", "cause", "rows", "what it means", "for example"],
        [[move, why, n, CAUSES[why], f"{uid[:12]}: {_short(detail)}"] for move, why, n, uid, detail in rows],
    )


def _changed(diff: Diff) -> Section:
    rows = [[column, n] for column, n in sorted(diff.changed.items())]
    return Section("Rows that stayed, with another value", ["column", "rows"], rows)


def _moves(diff: Diff) -> Section:
    note = "Completions that both have, by their bucket in a and in b."
    return Section("Buckets", ["bucket a", "bucket b", "completions"], list(diff.moves.iter_rows()), note)


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def screen(diff: Diff) -> Iterator[Text | Table]:
    """Lines and tables for a terminal."""
    yield Text.assemble("a: ", (printable(diff.a), "bold"), "\nb: ", (printable(diff.b), "bold"))
    for note in diff.notes:
        yield Text.assemble(("! ", "yellow"), printable(note))
    yield Text(summary(diff), style="bold")
    for section in sections(diff):
        yield Text(f"\n{section.title}", style="bold")
        table = Table(caption=section.note or None, caption_justify="left")
        for name, numbers in zip(section.header, section.numeric(), strict=True):
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        yield table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable(value)


STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .25rem .7rem .25rem 0; }
th { text-align: left; } td { vertical-align: top; overflow-wrap: break-word; max-width: 36rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
"""


def page(diff: Diff) -> str:
    """One self-contained HTML file."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{_html(diff.a)} → {_html(diff.b)}"
    notes = "".join(f"<li>{_html(note)}</li>" for note in diff.notes)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>What changed: {title}</h1>\n<p><strong>{summary(diff)}</strong></p>\n"
        + (f"<ul>{notes}</ul>\n" if notes else "")
        + "".join(map(_section, (*sections(diff), *_listed(diff))))
        + "</main>\n</body>\n</html>\n"
    )


def _listed(diff: Diff) -> Iterator[Section]:
    """Every row that moved, as far as a page takes them."""
    if diff.rows.height:
        note = f"The first {MOST:,} of {diff.rows.height:,}; `--json` has all." if diff.rows.height > MOST else ""
        shown = diff.rows.head(MOST).select("move", "why", "detail", "task", "row", "origin", "uid")
        rows = [[move, why, _short(detail), *rest] for move, why, detail, *rest in shown.iter_rows()]
        yield Section("Every row", ["move", "cause", "detail", "task", "row", "origin", "uid"], rows, note)


def _section(section: Section) -> str:
    kinds = [' class="number"' if numbers else "" for numbers in section.numeric()]
    head = "".join(f'<th scope="col"{k}>{_html(name)}</th>' for name, k in zip(section.header, kinds, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{k}>{_html(_cell(v))}</td>" for v, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in section.rows
    )
    note = f"<p>{_html(section.note)}</p>\n" if section.note else ""
    return (
        f'<h2>{_html(section.title)}</h2>\n{note}<div class="wide" tabindex="0" role="region" '
        f'aria-label="{_html(section.title)}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def _html(text: str) -> str:
    return escape(printable(text))
