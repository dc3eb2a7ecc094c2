"""`stream`: plan, files, the stages that are not done, the table and the page."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from curate.build import Build
from curate.config import BuildConfig
from curate.errors import InputError
from curate.models.weights import model_folder
from curate.report.parts import plural
from curate.screen import Silent as Quiet
from train.folder import LOCK, alone, refuse_foreign
from train.stream import page, pool, results
from train.stream.config import StreamConfig
from train.stream.plan import STAGES, Plan, Stage, plan
from train.stream.stage import write_files
from train.stream.steps import CACHE

OWN = (STAGES, CACHE, results.FILE, f".{results.FILE}", page.FILE, f".{page.FILE}.*", page.CURVES, f".{page.CURVES}",
       LOCK)  # fmt: skip


class Screen(Protocol):
    """Where a stream reports to."""

    def note(self, text: str) -> None:
        """A line."""

    def begin(self, stages: int, done: int, workers: int) -> None:
        """So many stages, some of them done before."""

    def start(self, stage: str) -> None:
        """A stage has been given to a process."""

    def finish(self, stage: str, seconds: float, scores: str) -> None:
        """A stage is done."""

    def end(self) -> None:
        """No stage is left, or one has failed."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def begin(self, stages: int, done: int, workers: int) -> None:
        """Says nothing."""

    def start(self, stage: str) -> None:
        """Says nothing."""

    def finish(self, stage: str, seconds: float, scores: str) -> None:
        """Says nothing."""

    def end(self) -> None:
        """Says nothing."""


def stream(config: StreamConfig, stage: int | None = None, screen: Screen | None = None) -> pl.DataFrame:
    """Every run of a stream; returns the table that lies in `out/results.parquet`.

    Args:
        config: what is run.
        stage: begin again with this stage, counted from 1: it and those behind it are removed first, in all runs.
        screen: where progress goes; nowhere by default.

    Raises:
        InputError: something cannot be used, found before any work wherever it can be; or a stage has failed. What is
            done stays, and the table and the page are made of it.
    """
    screen = screen or Silent()
    made = prepared(config)
    with alone(made.out):
        again = [] if stage is None else _again(made, stage, len(config.tasks))
        for each in made.stages.values():
            write_files(made, each)
        if others := results.of_others(made):
            screen.note(f"{made.out / results.FILE} holds {plural(others, 'stage')} of another configuration, and will "
                        "hold those of this one; all stages stay, and the other one gives its table back")  # fmt: skip
        if left := {name for name in made.stages if name in again or not made.done(name)}:
            _read_ahead(made, left, config, screen)
        if stage is not None:
            _remove(made, again)
            screen.note(f"{plural(len(again), 'stage')} removed, from stage {stage} on: to be made again")
        folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
        allowed = pool.workers_for(pool.bytes_of(folder), config.workers)
        threads = config.threads or (max(1, pool.cores() // config.workers) if config.workers else 1)
        workers = min(max(1, len(left)), allowed)
        base = Path(config.base)
        stages = (
            pool.in_order(made, left, workers, threads, base, lambda s: screen.start(made.label(s))) if left else ()
        )
        try:
            screen.begin(len(made.stages), len(made.stages) - len(left), workers)
            for done, took in stages:
                screen.finish(made.label(done), took, _scores(made, done))
        except BaseException as error:  # Ctrl-C too
            kept = [name for name in made.stages if made.done(name)]
            if any(made.stages[name].kind == "stage" for name in kept):
                with suppress(Exception):  # the stage's own error is what there is to say
                    _publish(made, config)
            if isinstance(error, KeyboardInterrupt):
                screen.note(f"{len(kept)} of {len(made.stages)} stages are done and stay")
            raise
        finally:  # Ctrl-C too: no live line stays
            screen.end()
        return _publish(made, config)


def _read_ahead(made: Plan, left: Collection[str], config: StreamConfig, screen: Screen) -> None:
    """Every row of every task, and every budget, before the first stage: a fault in the last one waits for no hours.

    The builds of the stages find what is read here in their cache.
    """
    shown, rows = {task.name: task.path for task in config.tasks}, dict[str, Any]()
    for stage in made.stages.values():
        if stage.folder not in left or "build" not in stage.steps:
            continue
        here = {"base": str(made.folder(stage.folder)), "cache": str(made.out / CACHE)}
        reader = Build(BuildConfig.parse({**stage.steps["build"].settings, **here}, stage.title), Quiet())
        tasks = []
        for task, _ in reader.stream:
            path, there, source = shown[task.name], task.config.path, made.identities[task.name]
            if there != path:  # neither a URL nor of the hub: rows are kept under the path in the stage's file
                files = {there.rstrip("/") + f.removeprefix(path.rstrip("/")): h for f, h in source.files.items()}
                source = replace(source, files=files)
            try:
                if (key := reader.read_key(task, source)) not in rows:
                    if not reader.store.has("read", key):
                        screen.note(f"reading {path}" + (f", split {task.config.split}" if task.config.split else ""))
                    rows[key] = reader.read_task(task, source, lambda n: None)
            except InputError as error:
                raise InputError(f"{stage.title}: {str(error).replace(there, path)}") from None
            tasks.append(rows[key])
        try:
            reader.budget(tasks)
        except InputError as error:
            raise InputError(f"{stage.title}: {error}") from None


def _publish(made: Plan, config: StreamConfig) -> pl.DataFrame:
    """The table and the page of what is done."""
    table = results.collect(made)
    try:
        results.write(made, table)
        page.write(made, table, config)
    except OSError as error:
        raise InputError(
            f"{made.out}: the table or the page cannot be written: {error.strerror or error}",
            remedy="make room, or move away what is in their place; the stages are done",
        ) from None
    return table


def by_hand(config: StreamConfig) -> Plan:
    """Write the files of all stages and begin none; returns the plan.

    Raises:
        InputError: as `stream`.
    """
    made = prepared(config)
    with alone(made.out):
        for each in made.stages.values():
            write_files(made, each)
    return made


def prepared(config: StreamConfig) -> Plan:
    """The plan of a stream, into whose folder nothing else is written; no stage is begun.

    Raises:
        InputError: as `stream`.
    """
    given = [config.evaluation.data] if config.evaluation.data is not None else []
    inputs = [config.path(name) for name in [*(task.path for task in config.tasks), config.model, *given]]
    refuse_foreign(Path(config.out), OWN, [path for path in inputs if path.exists()])
    out = Path(config.out).resolve()
    if inside := next((path for path in inputs if path.is_dir() and path.resolve() in (out, *out.parents)
                       and path.resolve() != Path.cwd()), None):  # fmt: skip
        raise InputError(f"out {config.out}: inside {inside}, which is read", remedy="choose another folder")
    return plan(config)


def _again(made: Plan, stage: int, tasks: int) -> list[str]:
    """Folders that are there of the stages of all runs from one on, the last ones first."""
    if not 1 <= stage <= tasks:
        raise InputError(f"--stage {stage}: there are stages 1 to {tasks}")
    again = {name for run in made.runs if run.kind == "run" for name in run.stages[stage - 1 :]}
    return [name for name in reversed(made.stages) if name in again and made.folder(name).is_dir()]


def _remove(made: Plan, again: Collection[str]) -> None:
    """What they have made, and first what says that they are done: a kill leaves no half."""
    for name in again:
        for step in reversed(made.stages[name].ordered):
            (made.folder(name) / step.leaves).unlink(missing_ok=True) if step.kind != "train" else None
    for name in again:
        shutil.rmtree(made.folder(name))
        write_files(made, made.stages[name])


def _scores(made: Plan, stage: Stage) -> str:
    """What a line says of a stage that is done: the mean score of its own task, and of all that were scored."""
    if stage.kind == "held_out":
        return ""
    found = results.scores(made, stage.folder)
    mean = sum(value for value, _ in found.values()) / len(found)
    task = stage.tasks[-1] if stage.kind == "stage" else ""
    own = f"{found[task][0]:.3f} here, " if task in found else ""
    shown = f"{own}{mean:.3f} over {len(found)} tasks" if len(found) > 1 else f"{mean:.3f}"
    asked, granted = results.replayed(made, stage.folder)
    return shown + (f" · {granted:,} of {asked:,} rows to replay" if granted < asked else "")
