"""What a person sees of a stream: a line a stage, a live line with the time left, and a table at the end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from curate.manifest.markdown import printable
from train.stream.plan import Plan
from train.stream.results import ends, written


class Terminal:
    """Lines for a person; the live one on a terminal only."""

    def __init__(self, console: Console) -> None:
        self.console, self.total, self.done, self.first = console, 0, 0, 0
        self.running: list[str] = []
        self.began = time.monotonic()
        self.progress: Progress | None = None

    def note(self, text: str) -> None:
        """A line."""
        self.console.print(Text.assemble(("· ", "dim"), text))

    def begin(self, stages: int, done: int, workers: int) -> None:
        """What there is to do."""
        self.total, self.done, self.first, self.began = stages, done, done, time.monotonic()
        found = f", {done} of them done" if done else ""
        self.console.print(f"stream: {stages} stages{found} · {workers} process{'es' if workers > 1 else ''}",
                           highlight=False)  # fmt: skip
        if self.console.is_terminal and done < stages:
            self.progress = Progress(TextColumn("[bold]stream"), BarColumn(bar_width=24), MofNCompleteColumn(),
                                     TextColumn("stages"), TextColumn("{task.description}"), TimeElapsedColumn(),
                                     TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
                                     console=self.console)  # fmt: skip
            self.line = self.progress.add_task("", total=stages, completed=done)
            self.progress.start()

    def start(self, stage: str) -> None:
        """What runs now."""
        self.running.append(stage)
        self._show()

    def finish(self, stage: str, seconds: float, scores: str) -> None:
        """A stage is done, and how far all is."""
        self.running.remove(stage)
        self.done += 1
        left = ""
        if self.progress is None and self.done < self.total:
            each = (time.monotonic() - self.began) / (self.done - self.first)
            left = f" · about {_time(each * (self.total - self.done))} left"
        shown = f" · {scores}" if scores else ""
        text = Text.assemble(("✓ ", "green"), f"{self.done} of {self.total} · {stage} · {seconds:.0f} s{shown}{left}")
        self.console.print(text, soft_wrap=True)
        self._show()

    def end(self) -> None:
        """The live line goes."""
        if self.progress is not None:
            self.progress.stop()

    def _show(self) -> None:
        if self.progress is not None:
            self.progress.update(self.line, completed=self.done, description=" + ".join(self.running[:2]))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def ends_table(table: pl.DataFrame) -> Table:
    """How runs ended, mean ± standard deviation over seeds."""
    found = Table(title="after the last stage: mean ± standard deviation over seeds", title_style="bold",
                  title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))  # fmt: skip
    found.add_column("run", overflow="fold")
    columns = (("relative_gain", "relative\ngain, %", 1), ("average_performance", "AP", 3),
               ("backward_transfer", "BWT", 3))  # fmt: skip
    for name in (*(name for _, name, _ in columns), "replayed", "seeds"):
        found.add_column(name, justify="right", no_wrap=True)
    last = ends(table)
    for name in last["run"].unique(maintain_order=True):
        part = last.filter(run=name)
        mine = table.filter(pl.col("run") == name, pl.col("kind") == "run", pl.col("stage") > 0,
                            pl.col("seed").is_in(part["seed"].implode()))  # fmt: skip
        rows = "–" if mine["replay"].null_count() else f"{mine['replay'].sum() / part.height:,.0f}"
        cells = [written(part[column].drop_nulls().to_list(), digits) for column, _, digits in columns]
        found.add_row(Text(printable(name)), *cells, rows, str(part.height))
    return found


def commands(plan: Plan) -> Iterator[str]:
    """Lines for a shell that carry out every stage, in an order in which each finds what it needs."""
    for name, stage in plan.stages.items():
        yield f"# {plan.label(stage)}"
        if needs := [need for need in stage.needs if need in plan.stages]:
            yield f"# behind {', '.join(needs)}"
        yield f"cd {shlex.quote(str(plan.folder(name).absolute()))}"
        yield from (step.by_hand for step in stage.ordered)
        yield ""
