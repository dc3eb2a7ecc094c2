"""The runs of a stream as a tree of stages: what several runs have in common is one stage, done once.

A stage's folder is named after a hash of what decides its model: the settings of its build and its training, the stages
that it goes on from, and the bytes of all that these read (sources, the first model, references, functions). So a
changed setting is another stage, and an unchanged one is found done, wherever the folder lies. Scores and Fisher
information of a stage are folders in it, named after their own settings. Not in the hash, but in each stage's
`train/run.json`: versions of packages, and the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curate.errors import InputError
from curate.manifest import read
from curate.manifest.markdown import printable
from curate.manifest.schema import content_hash
from curate.readers import SourceId, identify
from train.stream.config import Recipe, StreamConfig
from train.stream.steps import Step, Steps, check

STAGES = "stages"
COMPARE, RANKED = ("copr", "dpo", "pbl"), ("ranking", "ranking_change")  # methods and metrics of several answers
EVERYTHING = {"selector": "random", "per_task": 10**9}  # all rows that the older tasks have


@dataclass
class Stage:
    """A folder with the commands that fill it, in their order.

    Attributes:
        folder: its name.
        kind: held_out, start, stage or joint.
        tasks: that its model was trained on, one after the other (joint: at once).
        steps: the commands by their kinds.
        needs: folders of the stages that it goes on from.
        key: hash of all that decides its results.
    """

    folder: str
    kind: str
    tasks: tuple[str, ...]
    steps: dict[str, Step]
    needs: tuple[str, ...]
    key: str

    @property
    def ordered(self) -> list[Step]:
        """The commands in their order."""
        return [self.steps[kind] for kind in ("build", "train", "fisher", "eval") if kind in self.steps]

    @property
    def scores(self) -> str:
        """Folder of its scores."""
        return str(self.steps["eval"].settings["out"])

    @property
    def title(self) -> str:
        """What a progress line says."""
        named = {"held_out": "held-out rows", "start": "the first model", "joint": "all tasks at once"}
        return named[self.kind] if self.kind in named else f"stage {len(self.tasks)}: {self.tasks[-1]}"


@dataclass(frozen=True)
class Run:
    """A path through the tree.

    Attributes:
        name: of its recipe; a task trained alone: its name.
        kind: run, single (a task alone) or joint.
        seed: of everything drawn.
        tasks: in the order of training.
        start: folder of the first model's scores.
        stages: folders, one a task; of a bound one.
        recipe: how it is made.
    """

    name: str
    kind: str
    seed: int
    tasks: tuple[str, ...]
    start: str
    stages: tuple[str, ...]
    recipe: Recipe


@dataclass
class Plan:
    """All stages by folder, each behind those that it needs, and the runs through them."""

    out: Path
    stages: dict[str, Stage] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    identities: dict[str, SourceId] = field(default_factory=dict)  # task → hashes of its files

    @property
    def sources(self) -> dict[str, str]:
        """Task → hash of its files."""
        return {name: content_hash(sorted(found.files.values())) for name, found in self.identities.items()}

    def folder(self, name: str) -> Path:
        """Where a stage lies."""
        return self.out / STAGES / name

    def users(self, name: str, most: int = 3) -> str:
        """The runs that a stage is of, so many of them by name."""
        kinds = {"run": "{name}, seed {seed}", "single": "alone, seed {seed}", "joint": "seed {seed}"}
        runs = [run for run in self.runs if name in run.stages]
        found = list(dict.fromkeys(kinds[r.kind].format(name=printable(r.name), seed=r.seed) for r in runs))
        return "; ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")

    def label(self, stage: Stage) -> str:
        """A stage and its runs, for a line."""
        users = self.users(stage.folder, 2)
        return printable(stage.title) + (f" · {users}" if users else "")

    def done(self, name: str) -> bool:
        """Whether all that a stage is for is there."""
        return all((self.folder(name) / step.leaves).exists() for step in self.stages[name].ordered)


def plan(config: StreamConfig) -> Plan:
    """The tree of a stream. Every setting of every stage is checked; nothing is written.

    Raises:
        InputError: a source, the model, the held-out manifest, a function or a setting cannot be used.
    """
    return _Planner(config).plan()


class _Planner:
    def __init__(self, config: StreamConfig) -> None:
        self.config, self.made = config, Plan(Path(config.out))
        self.names = tuple(task.name for task in config.tasks)
        self.made.identities = {task.name: identify(task, Path(config.base)) for task in config.tasks}
        self.here = (self.made.out / STAGES / "x").absolute()  # as deep as every stage
        self.steps = Steps(config, self.here, self.made.sources)
        self.ranked = any(t.format in ("ranked", "preference") or t.columns.candidates or t.columns.chosen
                          for t in config.tasks)  # fmt: skip

    def plan(self) -> Plan:
        config, own, recipes = self.config, self.config.recipe(self.config.name, "", {}), self.config.recipes()
        if config.baseline is not None and config.baseline not in [r.arm for r in recipes]:
            raise InputError(f"baseline: {config.baseline!r} is no arm of this stream",
                             remedy=f"there are {', '.join(repr(r.arm) for r in recipes)}")  # fmt: skip
        held_out = self._held_out()
        start = self._start(held_out)
        for recipe in recipes:
            for seed in config.seeds:
                order, stages = self._order(recipe, seed), list[Stage]()
                for n in range(1, len(order) + 1):
                    with _told(recipe):
                        stages.append(self._stage(recipe, order[:n], seed, start, stages, held_out))
                self._run(recipe.name, "run", seed, order, start, stages, recipe)
        for seed in config.seeds if config.bounds.single else ():
            alone = [self._stage(own, (task,), seed, start, [], held_out) for task in self.names]
            for task, stage in zip(self.names, alone, strict=True):
                self._run(task, "single", seed, (task,), start, [stage], own)
            if config.bounds.joint:
                joint = self._joint(own, alone, seed, start, held_out)
                self._run("all tasks at once", "joint", seed, self.names, start, [joint], own)
        return self.made

    def _run(self, name: str, kind: str, seed: int, tasks: tuple[str, ...], start: Stage, stages: list[Stage],
             recipe: Recipe) -> None:  # fmt: skip
        folders = tuple(stage.folder for stage in stages)
        self.made.runs.append(Run(name, kind, seed, tasks, start.folder, folders, recipe))

    def _order(self, recipe: Recipe, seed: int) -> tuple[str, ...]:
        if recipe.how.order == "random":
            return tuple(self.names[i] for i in np.random.default_rng(seed).permutation(len(self.names)))
        return self.names[:: -1 if recipe.how.order == "reverse" else 1]

    # --- stages ---

    def _add(self, kind: str, tasks: tuple[str, ...], steps: Sequence[Step], needs: Sequence[Stage | None]) -> Stage:
        """A stage by what decides it, whose settings are sound."""
        decide = [
            [step.command, self.steps.decides(step.settings)] for step in steps if step.kind in ("build", "train")
        ]
        key = content_hash([kind, decide, self.steps.weights])
        named = {"held_out": "held-out", "start": "0-start", "joint": "joint"}
        name = named[kind] if kind in named else f"{len(tasks)}-{tasks[-1]}"
        folder = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{key[:10]}"
        if folder not in self.made.stages:
            for step in steps:
                check(step, self.here)
            before = tuple(stage.folder for stage in needs if stage)
            self.made.stages[folder] = Stage(folder, kind, tasks, {s.kind: s for s in steps}, before, key)
        return self.made.stages[folder]

    def _held_out(self) -> Stage | None:
        """The rows that all stages are scored on; None where a manifest has them already."""
        given = self.config.evaluation.data
        if given is not None:
            there = read(self.config.path(given)).samples["task"].unique().to_list()
            if missing := next((task for task in self.names if task not in there), None):
                raise InputError(f"evaluation.data {given}: no row of task {missing!r}",
                                 remedy="build it from held-out rows of every task, under the same names")  # fmt: skip
            return None
        build = self.steps.build(self.names, EVERYTHING, {}, 0, self.config.evaluation.split)
        return self._add("held_out", self.names, [build], [])

    def _start(self, held_out: Stage | None) -> Stage:
        """The model before training, scored on all tasks."""
        metric = self.config.evaluation.metric
        if metric in RANKED and held_out and not self.ranked:
            raise InputError(
                f"evaluation.metric {metric}: it orders the answers of a prompt, and the tasks have one a prompt",
                remedy="tasks of format ranked or preference, or metric rouge_l, exact or contains",
            )
        scores = self._scores(self.steps.model, self.names, held_out)
        return self._add("start", (), [scores], [held_out])

    def _stage(self, recipe: Recipe, tasks: tuple[str, ...], seed: int, start: Stage, before: list[Stage],
               held_out: Stage | None) -> Stage:  # fmt: skip
        """A task behind older ones, which the stages `before` have trained."""
        how, folders, first = recipe.how, [stage.folder for stage in before], self.steps.model
        if how.method in COMPARE and not how.build.get("rollouts") and not self.ranked:
            raise InputError(
                f"method {how.method}: it compares the answers of a prompt, and the tasks have one a prompt",
                remedy="tasks of format ranked or preference, `build.rollouts` with a reward, or method cft",
            )
        replay = _replay(how.replay, first=not before)
        older, ahead = [first, first, *(f"../{folder}/train/model" for folder in folders)][-2:]
        sections = self.steps.sections(how.build, replay, ahead, older)
        build = self.steps.build(tasks, replay, sections, draws(seed, len(tasks), replay))
        train = self.steps.train(how, ["manifest"], seed, ahead, folders, replay["selector"] != "none")
        for stage in before if "ewc" in train.settings else ():
            self._estimate(stage, self.steps.fisher(how, seed))
        scored = self.names if self.config.evaluation.every_task else tasks
        scores = self._scores("train/model", scored, held_out)
        return self._add("stage", tasks, [build, train, scores], [held_out, start, *before])

    def _joint(self, recipe: Recipe, alone: list[Stage], seed: int, start: Stage, held_out: Stage | None) -> Stage:
        """All tasks at once: on the manifests of each alone, in which every row is of the newest task.

        Reinforcement learning takes one manifest, and old prompts as well as new ones: it gets all of them in one.
        """
        how, first, data, builds = recipe.how, self.steps.model, ["manifest"], list[Step]()
        if how.method in ("cppo", "grpo"):
            sections = self.steps.sections(how.build, EVERYTHING, first, first)
            builds.append(self.steps.build(self.names, EVERYTHING, sections, seed))
        else:
            data = [f"../{stage.folder}/manifest" for stage in alone]
        train = self.steps.train(how, data, seed, first, times=len(alone))  # as many steps as a run has in all
        scores = self._scores("train/model", self.names, held_out)
        return self._add("joint", self.names, [*builds, train, scores], [held_out, start, *alone])

    def _scores(self, model: str, tasks: tuple[str, ...], held_out: Stage | None) -> Step:
        return self.steps.eval(model, tasks, held_out.folder if held_out else None)

    def _estimate(self, stage: Stage, fisher: Step) -> None:
        """A stage leaves its Fisher information too."""
        if (other := stage.steps.setdefault("fisher", fisher)) != fisher:
            raise InputError(f"fisher: {stage.title} would be estimated with {other.settings} and {fisher.settings}",
                             remedy="one kind of Fisher information a stream")  # fmt: skip
        check(fisher, self.here)


@contextmanager
def _told(recipe: Recipe) -> Iterator[None]:
    """An error inside says whose settings are at fault."""
    try:
        yield
    except InputError as error:
        raise InputError(f"run {recipe.name!r}: {error}") from None
    except (ValueError, OverflowError) as error:  # NaN, infinity or a number without end
        raise InputError(f"run {recipe.name!r}: {str(error)[:200]}", remedy="give numbers that are finite") from None


def draws(seed: int, stage: int, replay: Mapping[str, Any]) -> int:
    """The seed of a stage's build: of its own, or the rows of an older task that came back once would every time.

    (What a build draws of a task does not depend on the tasks behind it.) Where nothing comes back it is the run's.
    """
    if replay["selector"] == "none":
        return seed
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


def _replay(replay: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """The section of a build. Where nothing comes back its other settings count for nothing: the same stage."""
    return {"selector": "none"} if first or replay.get("selector") == "none" else {"selector": "inscl", **replay}
