"""A Diff as tables for the screen, and as a page that opens offline: the report's, where all of it is text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from curate.diff import CAUSES, Diff
from curate.manifest.markdown import printable
from curate.report.page import shell
from curate.report.parts import Section as Part
from curate.report.parts import Table as Figures
from curate.report.parts import plural

MOST = 5_000  # rows that a page lists
LONGEST = 300  # characters of a setting or a detail


@dataclass(frozen=True)
class Section:
    """A titled table; cells are text, numbers or None (a dash)."""

    id: str
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
    return Section("settings", "What was set, read and run otherwise", ["kind", "key", "a", "b"], rows)


def _tasks(diff: Diff) -> Section:
    header = ["task", "rows a", "rows b", "distance a", "distance b", "quota a", "quota b", "granted a", "granted b",
              "kept", "out", "in"]  # fmt: skip
    columns = diff.tasks.select(header[0], *(name.replace(" ", "_") for name in header[1:9]), *header[9:])
    note = "Samples of a task: kept + out in a, kept + in in b. A dash: not in that stream, or the current task."
    total = ["in all", *[None] * 8, *columns.select(pl.col("kept", "out", "in").sum()).row(0)]
    rows = [*map(list, columns.iter_rows()), total] if columns.height else []
    return Section("quotas", "Quotas side by side", header, rows, note)


def _causes(diff: Diff) -> Section:
    counts = diff.rows.group_by("move", "why").agg(pl.len(), pl.col("uid").first(), pl.col("detail").first())
    order = {cause: place for place, cause in enumerate(CAUSES)}
    rows = sorted(counts.iter_rows(), key=lambda r: (r[0] != "out", order[r[1]]))
    return Section(
        "why",
        "Rows out and in, and why",
        ["move", "cause", "rows", "what it means", "for example"],
        [[move, why, n, CAUSES[why], f"{uid[:12]}: {_short(detail)}"] for move, why, n, uid, detail in rows],
    )


def _changed(diff: Diff) -> Section:
    rows = [[column, n] for column, n in sorted(diff.changed.items())]
    return Section("changed", "Rows that stayed, with another value", ["column", "rows"], rows)


def _moves(diff: Diff) -> Section:
    note = "Completions that both have, by their bucket in a and in b."
    return Section("buckets", "Buckets", ["bucket a", "bucket b", "completions"], list(diff.moves.iter_rows()), note)


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


def page(diff: Diff) -> str:
    """One self-contained HTML file."""
    parts = []
    for section in (*sections(diff), *_listed(diff)):
        numbers = [i for i, only in enumerate(section.numeric()) if only]
        cells = [[_cell(value) for value in row] for row in section.rows]
        table = Figures(f"{plural(len(cells), 'line')}.", list(section.header), cells, numbers)
        parts.append(asdict(Part(section.id, section.title, [section.note] if section.note else [], [table])))
    tiles = [(f"{diff.kept:,}", "rows kept", "in a and in b"), (f"{diff.count('out'):,}", "rows out", "in a alone"),
             (f"{diff.count('in'):,}", "rows in", "in b alone")]  # fmt: skip
    return shell({
        "name": f"{printable(diff.a)} → {printable(diff.b)}", "kicker": "Rehearse · what changed between two manifests",
        "tiles": tiles, "says": [f"{summary(diff)}.", *map(printable, diff.notes)], "sections": parts,
        "note": "a is the first of the two, b the second. `curate explain RUN UID` says more of a row.",
    })  # fmt: skip


def _listed(diff: Diff) -> Iterator[Section]:
    """Every row that moved, as far as a page takes them."""
    if diff.rows.height:
        note = f"The first {MOST:,} of {diff.rows.height:,}; `--json` has all." if diff.rows.height > MOST else ""
        shown = diff.rows.head(MOST).select("uid", "move", "why", "detail", "task", "row", "origin")
        rows = [[uid[:12], move, why, _short(detail), *rest] for uid, move, why, detail, *rest in shown.iter_rows()]
        yield Section("rows", "Every row", ["uid", "move", "cause", "detail", "task", "row", "origin"], rows, note)
