"""`--dry-run`: what a build would do, what of it is cached, and about how long it takes. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from curate.embed import Embeddings
from curate.ingest import TaskRows

if TYPE_CHECKING:
    from curate.build import Build

BYTES_A_ROW = 160  # of a gzipped source, where the rows are not counted yet
ROWS_A_SECOND = 15_000  # read, and once more written: measured on two cores
TEXTS_A_SECOND = 120  # MiniLM, instructions of about 60 tokens, two cores
PAIRS_A_SECOND = 1_500_000  # exact transport, pairs of instructions


@dataclass(frozen=True)
class Step:
    """A stage of the plan: how many results it has, how many are there, what it works on, and for how many seconds."""

    stage: str
    results: int | None
    cached: int | None
    size: str
    seconds: float | None


def plan(build: Build) -> list[Step]:
    """The steps of a build. What stands behind a stage that has not run is unknown: its keys need that result."""
    sources = build.sources()
    if build.needs_vectors:
        _ = build.embedder.fingerprint
    keyed = [(task, build.read_key(task, sources[index])) for task, index in build.stream]
    there = [TaskRows(t, build.store.path("read", k), k) for t, k in keyed if build.store.has("read", k)]
    n_bytes = sum(s.n_bytes for s in sources)
    todo = 0.0 if len(there) == len(keyed) else n_bytes / BYTES_A_ROW / ROWS_A_SECOND
    steps = [Step("read", len(keyed), len(there), f"{n_bytes / 1e6:,.1f} MB", todo)]
    if len(there) < len(keyed):
        return [*steps, *_unknown(build, len(keyed))]
    asked = build.budget(there)  # a budget that cannot be met is found out here, too
    rows = sum(t.summary["rows"] for t in there)
    return [*steps, *_measurements(build, there), Step("sample", 1, None, f"{asked:,} of {rows:,} rows", 0.1),
            Step("manifest", 1, None, str(build.out), rows / ROWS_A_SECOND)]  # fmt: skip


def _unknown(build: Build, tasks: int) -> list[Step]:
    needs = build.selector.needs
    names = ["embed"] if build.needs_vectors else []
    names += ["distance"] if "distance" in needs else []
    names += ["tags", "score"] if "insinfo" in needs else []
    return [Step(n, None, None, "known after read", None) for n in [*names, "sample"]] + [
        Step("manifest", 1, None, str(build.out), None)
    ]


def _measurements(build: Build, tasks: list[TaskRows]) -> list[Step]:
    needs, steps = build.selector.needs, []
    sizes = [t.summary["instructions"] for t in tasks]
    if needs & {"distance", "vectors"}:
        embeddings = Embeddings(build.store, build.embedder)
        for task in tasks:
            embeddings.extend(task.instructions["instruction"].to_list())
        missing = sum(len(b.texts) for b in embeddings.missing())
        steps.append(Step("embed", len(embeddings.blocks), len(embeddings.blocks) - len(embeddings.missing()),
                          f"{missing:,} of {sum(sizes):,} instructions", missing / TEXTS_A_SECOND))  # fmt: skip
    if "distance" in needs:
        most = build.config.distance.max_points
        pairs = sum(min(n, most) * min(sizes[-1], most) for n in sizes[:-1])
        steps.append(Step("distance", len(tasks) - 1, None, f"{pairs:,} pairs", pairs / PAIRS_A_SECOND))
    if "row_vectors" in needs:
        rows = sum(t.summary["rows"] for t in tasks[:-1])
        steps.append(Step("embed", None, None, f"{rows:,} rows", rows / TEXTS_A_SECOND))
    if "insinfo" in needs:
        steps += [Step(n, 1, None, f"{sum(sizes):,} instructions", sum(sizes) / 2000) for n in ("tags", "score")]
    return steps


def plan_table(steps: list[Step]) -> Table:
    """The plan as a table."""
    table = Table(title="plan (nothing is done)", title_style="bold")
    for name in ("stage", "results", "cached", "size", "about"):
        table.add_column(name, justify="left" if name in ("stage", "size") else "right")
    for s in steps:
        about = "–" if s.seconds is None else "0 s" if s.seconds == 0 else f"{max(1, round(s.seconds)):,} s"
        table.add_row(s.stage, _or_dash(s.results), _or_dash(s.cached), s.size, about)
    return table


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
