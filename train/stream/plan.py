"""The runs of a stream as a tree of stages: what several runs have in common is one stage, done once.

A stage's folder is named after a hash of its commands' settings, the folders that it goes on from, and the bytes of its
sources and of the first model. So a changed setting is another stage, an unchanged one is found done, and results of
different settings are never mixed. All paths in a stage's files are relative to its folder: the whole tree can move.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curate.config import BuildConfig, TaskConfig
from curate.errors import InputError
from curate.manifest import read
from curate.manifest.schema import content_hash
from curate.models.weights import model_folder, weights_hash
from curate.readers import identify
from curate.settings import checked
from train.evaluate import EvalConfig
from train.fisher import FisherConfig
from train.run import CONFIGS
from train.settings import parse
from train.stream.config import Recipe, StreamConfig

STAGES, CACHE = "stages", "cache"
EVERYTHING = 1000.0  # × the rows of the newest task: all rows that the older ones have
PATHS = ("model", "path", "reference", "overrides", "tokenizer", "init", "head", "data", "eval_data", "fsdp_config",
         "deepspeed")  # fmt: skip
"""Keys of a build and of training that may hold a path."""
ASKS_POLICY = ("highest_loss", "perplexity_ratio")


@dataclass(frozen=True)
class Step:
    """A command of a stage, and the settings that its file holds."""

    command: str  # build, a method of training, fisher, eval
    settings: dict[str, Any]

    @property
    def file(self) -> str:
        """Name of the file, which names what is done."""
        return f"{self.command if self.command in ('build', 'fisher', 'eval') else 'train'}.yaml"

    @property
    def by_hand(self) -> str:
        """The command line that does it, in the stage's folder."""
        if self.command == "build":
            return f"curate build {self.file}"
        return f"train {self.command} --config {self.file}"


@dataclass(frozen=True)
class Stage:
    """A folder with the commands that fill it, in their order.

    Attributes:
        folder: its name.
        kind: held_out, start, stage or joint.
        number: tasks that its model was trained on, one after the other.
        task: the newest of them.
        steps: the commands.
        needs: folders of the stages that it goes on from.
        key: hash of all that decides its results.
    """

    folder: str
    kind: str
    number: int
    task: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]
    key: str

    @property
    def title(self) -> str:
        """What a progress line says."""
        return {"held_out": "held-out rows", "start": "the first model", "joint": "all tasks at once"}.get(
            self.kind, f"stage {self.number}: {self.task}"
        )


@dataclass(frozen=True)
class Run:
    """A path through the tree.

    Attributes:
        name: of its recipe; bounds have none.
        kind: run, single (a task alone) or joint.
        seed: of everything drawn.
        tasks: in the order of training.
        stages: folders, one a task, behind that of the first model; of a bound one.
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

    def folder(self, name: str) -> Path:
        """Where a stage lies."""
        return self.out / STAGES / name


def plan(config: StreamConfig) -> Plan:
    """The tree of a stream. Every setting of every stage is checked; nothing is written.

    Raises:
        InputError: a source, the model, the held-out manifest or a setting cannot be used.
    """
    return _Planner(config).plan()


class _Planner:
    def __init__(self, config: StreamConfig) -> None:
        self.config, self.base = config, Path(config.base)
        self.plan_ = Plan(Path(config.out))
        self.names = tuple(task.name for task in config.tasks)
        self.tasks = {task.name: task for task in config.tasks}
        self.here = (self.plan_.out / STAGES / "x").absolute()  # as deep as every stage
        folder, _ = model_folder(str(config.path(config.model)), self.base, "model")
        self.weights = weights_hash(folder)
        self.sources = {task.name: identify(task, self.base).files for task in config.tasks}
        self.model = self._path(config.model)

    def plan(self) -> Plan:
        config, base = self.config, self.config.recipe("", {})
        recipes = list(config.recipes())
        if config.baseline is not None and config.baseline not in [r.name for r in recipes]:
            raise InputError(f"baseline: {config.baseline!r} is no run of this stream",
                             remedy=f"there are {', '.join(repr(r.name) for r in recipes)}")  # fmt: skip
        held_out = self._held_out()
        start = self._start(held_out)
        for recipe in recipes:
            for seed in config.seeds:
                order = self._order(recipe, seed)
                stages: list[Stage] = []
                for n in range(1, len(order) + 1):
                    stages.append(self._stage(recipe, order[:n], seed, start, stages, held_out))
                folders = tuple(s.folder for s in stages)
                self.plan_.runs.append(Run(recipe.name, "run", seed, order, start.folder, folders, recipe))
        for seed in config.seeds:
            for task in self.names if config.bounds.single else ():
                alone = self._stage(base, (task,), seed, start, [], held_out)
                self.plan_.runs.append(Run(task, "single", seed, (task,), start.folder, (alone.folder,), base))
            if config.bounds.joint:
                joint = self._stage(base, self.names, seed, start, [], held_out, joint=True)
                self.plan_.runs.append(Run("", "joint", seed, self.names, start.folder, (joint.folder,), base))
        return self.plan_

    def _order(self, recipe: Recipe, seed: int) -> tuple[str, ...]:
        if recipe.how.order == "random":
            return tuple(self.names[i] for i in np.random.default_rng(seed).permutation(len(self.names)))
        return self.names[:: -1 if recipe.how.order == "reverse" else 1]

    # --- stages ---

    def _add(self, kind: str, tasks: Sequence[str], steps: Sequence[Step], needs: Sequence[str]) -> Stage:
        """A stage by what decides it, whose settings are sound."""
        says = [[step.command, step.settings] for step in steps]
        key = content_hash([kind, says, self.weights, {t: self.sources[t] for t in tasks}])
        named = {"held_out": "held-out", "start": "0-start", "joint": "joint"}
        name = named[kind] if kind in named else f"{len(tasks)}-{tasks[-1]}"
        folder = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{key[:10]}"
        stage = Stage(folder, kind, len(tasks), tasks[-1] if tasks else "", tuple(steps), tuple(needs), key)
        if folder not in self.plan_.stages:
            for step in steps:
                check(step, self.here)
            self.plan_.stages[folder] = stage
        return self.plan_.stages[folder]

    def _held_out(self) -> Stage | None:
        """The rows that all stages are scored on; None where a manifest has them already."""
        given = self.config.evaluation.data
        if given is not None:
            manifest = read(self.config.path(given))
            there = manifest.samples["task"].unique().to_list()
            if missing := next((task for task in self.names if task not in there), None):
                raise InputError(f"evaluation.data {given}: no row of task {missing!r}",
                                 remedy="build it from held-out rows of every task, under the same names")  # fmt: skip
            return None
        tasks = [{**self._task(name), "split": self.config.evaluation.split} for name in self.names]
        replay = {"selector": "random", "ratio": EVERYTHING}
        return self._add("held_out", self.names, [self._build(tasks, replay, {}, 0)], [])

    def _start(self, held_out: Stage | None) -> Stage:
        """The model before training, scored on all tasks."""
        steps = [self._eval([self.model], self.names, held_out)]
        return self._add("start", (), steps, [s.folder for s in (held_out,) if s])

    def _stage(self, recipe: Recipe, tasks: tuple[str, ...], seed: int, start: Stage, before: list[Stage],
               held_out: Stage | None, joint: bool = False) -> Stage:  # fmt: skip
        """A task behind older ones, which the stages `before` have trained; or all of them at once."""
        how, first = recipe.how, not before
        ahead = f"../{before[-1].folder}/train/model" if before else self.model
        replay = {"selector": "random", "ratio": EVERYTHING} if joint else _replay(how.replay, first)
        older = f"../{before[-2].folder}/train/model" if len(before) > 1 else self.model
        asked = self._asked(how.build, replay, ahead, older)
        build = self._build([self._task(name) for name in tasks], replay, asked, draws(seed, len(tasks), replay))
        train = self._train(how, seed, ahead, before, replay["selector"] != "none" and not joint)
        steps = [build, Step(how.method, train)]
        if how.train.get("ewc") is not None and not joint:
            given = {**_relative(how.fisher, self._path), "model": "train/model", "data": ["manifest"], "out": "fisher"}
            steps.append(Step("fisher", {**given, "seed": seed}))
        scored = self.names if self.config.evaluation.every_task else tasks
        models = [self.model] if self.config.evaluation.metric == "ranking_change" else []
        steps.append(self._eval([*models, "train/model"], scored, held_out))
        needs = [s.folder for s in (held_out, start, *before) if s]
        return self._add("joint" if joint else "stage", tasks, steps, needs)

    def _train(self, how: Any, seed: int, ahead: str, before: list[Stage], replays: bool) -> dict[str, Any]:
        """Settings of training, with what older stages hand on."""
        train = copy.deepcopy(_relative(how.train, self._path))
        buffers = how.method == "copr" and train.get("constraint") != "none"
        if not before or not (replays or buffers):
            train.pop("mixture", None)  # nothing comes back
        for key, holds in (("ewc", "fisher"), ("o_lora", "previous")):
            if train.get(key) is None:
                continue
            if not before:
                del train[key]
            elif key == "ewc":
                train[key] = {**train[key], holds: [f"../{stage.folder}/fisher" for stage in before]}
            else:  # the newest adapter holds the older ones too, beside the first model
                train[key], ahead = {**train[key], holds: [f"../{before[-1].folder}/train/model"]}, self.model
        if before and buffers:
            train["buffers"] = [f"../{stage.folder}/train/buffer" for stage in before]
        if before and how.method == "cppo" and train.get("advantages", "gae") == "gae":
            value = {**(train.get("value") or {}), "head": f"../{before[-1].folder}/train/value.safetensors"}
            if value.get("model"):
                value["model"] = f"../{before[-1].folder}/train/value"
            train["value"] = value
        return {**train, "model": ahead, "data": ["manifest"], "out": "train", "seed": seed}

    # --- steps ---

    def _build(self, tasks: list[dict[str, Any]], replay: dict[str, Any], more: dict[str, Any], seed: int) -> Step:
        replay = replay if len(tasks) > 1 else {"selector": "none"}
        return Step("build", {"name": self.config.name, **more, "tasks": tasks, "replay": replay, "seed": seed,
                              "out": "manifest", "cache": f"../../{CACHE}"})  # fmt: skip

    def _asked(self, build: Mapping[str, Any], replay: Mapping[str, Any], ahead: str, older: str) -> dict[str, Any]:
        """Sections of a build, with the checkpoint as policy wherever one is asked or given settings.

        The reference of a perplexity ratio is the checkpoint before the newest stage: what that stage made it lose.
        """
        found = copy.deepcopy(_relative(build, self._path))
        tags = found.get("tags") or {}
        by_llm = tags.get("tagger") == "llm" and not tags.get("model") and replay["selector"] != "none"
        asked = by_llm or replay["selector"] in ASKS_POLICY or any(found.get(k) for k in ("rollouts", "augment"))
        if asked or "policy" in found:
            found["policy"] = {**(found.get("policy") or {}), "model": ahead}
        if replay["selector"] == "perplexity_ratio":
            found.setdefault("reference", {**found["policy"], "model": older})
        return found

    def _eval(self, models: list[str], tasks: Sequence[str], held_out: Stage | None) -> Step:
        how = self.config.evaluation
        data = f"../{held_out.folder}/manifest" if held_out else self._path(str(how.data))
        given = how.model_dump(include={"metric", "max_new_tokens", "reduction", "per_task", "batch_size"})
        return Step("eval", {**given, "models": models, "data": data, "tasks": sorted(tasks), "out": "eval"})

    def _task(self, name: str) -> dict[str, Any]:
        task: TaskConfig = self.tasks[name]
        return {**task.model_dump(exclude_defaults=True), "path": self._path(task.path)}

    def _path(self, name: str) -> str:
        """A path of the stream's file as a stage's file has it; the name of what is no path (a hub id) as it is."""
        path = self.config.path(name)
        return os.path.relpath(path.absolute(), self.here) if path.exists() else name


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


def _relative(value: Any, path: Any, key: str = "") -> Any:
    """Settings whose paths are replaced by those that a stage's file has."""
    if isinstance(value, Mapping):
        return {name: _relative(each, path, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_relative(each, path, key) for each in value]
    return path(value) if isinstance(value, str) and key in PATHS else value


def check(step: Step, base: Path) -> None:
    """Whether a command will take its settings.

    Raises:
        InputError: a key that it does not know, or a value that does not fit.
    """
    if step.command == "build":
        BuildConfig.parse({**step.settings, "base": str(base)}, "build")
    elif step.command == "fisher":
        checked(FisherConfig, step.settings, "fisher")
    elif step.command == "eval":
        checked(EvalConfig, step.settings, "evaluation")
    else:
        parse(CONFIGS[step.command], step.settings, str(base), f"train ({step.command})")
