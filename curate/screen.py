"""What a person sees while a build runs: one progress line a stage with the time left, and a table at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import polars as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from curate.manifest import Bucket, Manifest
from curate.manifest.markdown import bound, printable

if TYPE_CHECKING:
    from curate.export import Exported

Advance = Callable[[int], None]


class Screen(Protocol):
    """Where a build reports to."""

    def stage(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """A context that yields `advance(n)`; total None = not known beforehand."""

    def cached(self, name: str, what: str) -> None:
        """A stage that had nothing to do."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Silent:
    """Says nothing: for `--quiet`, `--json`, and for calls from Python."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Counts nothing."""
        yield lambda n: None

    def cached(self, name: str, what: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""


class Terminal:
    """One live line a stage on a terminal, one plain line a stage elsewhere (a log file, CI)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """A progress line, which stays on the screen with its time when the stage is done."""
        columns = [
            SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24), TaskProgressColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        ]  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            line = progress.add_task(f"{name:<9}", total=total)
            done, start = 0, time.monotonic()

            def advance(n: int) -> None:
                nonlocal done
                done += n
                progress.advance(line, n)

            yield advance
            progress.update(line, total=max(done, 1), completed=max(done, 1))
        if not self.console.is_terminal:
            self.console.print(f"✓ {name:<9} {done:,} {unit} in {time.monotonic() - start:.1f} s", highlight=False)

    def cached(self, name: str, what: str) -> None:
        """A line for a stage whose result is already there."""
        self.console.print(Text.assemble(("✓ ", "green"), (f"{name:<9} ", "bold"), (f"cached: {what}", "dim")))

    def note(self, text: str) -> None:
        """A line with a sign in front."""
        self.console.print(Text.assemble(("! ", "yellow"), text))


def task_table(manifest: Manifest) -> Table:
    """What the build did, one row a task."""
    table = Table(
        title=Text(f"{printable(manifest.provenance['config']['name'])}: replay for {current_task(manifest)!r}"),
        title_style="bold",
    )
    table.add_column("stage", justify="right")
    table.add_column("task")
    for name in ("rows", "distance", "± bound", "quota", "granted", "instructions", "mean InsInfo"):
        table.add_column(name, justify="right")
    for t in manifest.tasks.iter_rows(named=True):
        covered = f"{t['instructions']}" if t["covered"] is None else f"{t['covered']} of {t['instructions']}"
        title = Text(t["task"], style="bold" if t["quota"] is None else "")
        table.add_row(
            str(t["stage"]), title, f"{t['rows']:,}", _number(t["distance"], 4),
            bound(t["distance_bound"]) or "–", _number(t["quota"]),
            _number(t["granted"]), covered,
            _number(t["insinfo"], 2),
        )  # fmt: skip
    total = manifest.tasks["granted"].sum()
    table.add_section()
    table.add_row("", "replay", "", "", "", f"{manifest.tasks['quota'].sum():,}", f"{total:,}", "", "")
    return table


def policy_table(manifest: Manifest) -> Table | None:
    """What the policy did, one row a task; None where it did nothing."""
    found = manifest.tasks.filter(pl.col("rollouts").is_not_null() | pl.col("augmented").is_not_null())
    if not found.height:
        return None
    buckets = [str(b) for b in Bucket]
    table = Table(title="what the policy wrote, and CPPO's five buckets", title_style="bold")
    table.add_column("task")
    for name in ("rollouts", *buckets, "rewrites kept"):
        table.add_column(name.replace("_", " "), justify="right")
    for t in found.sort("stage").iter_rows(named=True):
        table.add_row(Text(t["task"]), *(_number(t[name]) for name in ("rollouts", *buckets, "augmented")))
    table.add_section()
    total = found.select(pl.col("rollouts", *buckets, "augmented").sum()).row(0, named=True)
    table.add_row("in all", *(_number(n) for n in total.values()))
    return table


def export_lines(done: Exported) -> Iterator[Text]:
    """What an export wrote, what it could not write and why, and what to know of it."""
    yield Text.assemble((str(done.file), "bold"), f": {done.rows:,} rows")
    for reason, n in sorted(Counter(each.reason for each in done.skipped).items(), key=lambda r: (-r[1], r[0])):
        yield Text.assemble(("! ", "yellow"), f"{n:,} left out: {reason}")
    if done.skipped_file:
        yield Text(f"  each with its uid and reason: {done.skipped_file}")
    for note in done.notes:
        yield Text.assemble(("! ", "yellow"), note)


def current_task(manifest: Manifest) -> str:
    """Name of the newest task."""
    return str(manifest.tasks.sort("stage")["task"][-1])


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
