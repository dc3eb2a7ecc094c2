"""The runs of a stream as a tree of stages: what several runs have in common is one stage, done once.

A stage's folder is named after a hash of what decides its model: the settings of its build and its training, the stages
that it goes on from, and the bytes of all that these read (sources, the first model, references, functions). So a
changed setting is another stage, and an unchanged one is found done, wherever the folder lies. Scores and Fisher
information of a stage are folders in it, named after their own settings. Not in the hash, but in each stage's
`train/run.json`: versions of packages, and the device.

All paths in a stage's files are relative to its folder.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curate.config import BuildConfig, TaskConfig
from curate.errors import InputError
from curate.manifest import read
from curate.manifest.io import sha256_file
from curate.manifest.schema import content_hash
from curate.models.function import open_function
from curate.models.weights import model_folder, stack, weights_hash
from curate.readers import SourceId, identify
from curate.settings import FUNCTION, checked
from train.evaluate import EvalConfig
from train.facts import HOUSEKEEPING
from train.fisher import FisherConfig
from train.run import CONFIGS
from train.settings import parse
from train.stream.config import Recipe, StreamConfig

STAGES, CACHE = "stages", "cache"
EVERYTHING = {"selector": "random", "per_task": 10**9}  # all rows that the older tasks have
PATHS = ("model", "path", "reference", "overrides", "tokenizer", "head", "eval_data", "fsdp_config", "deepspeed")
"""Keys of a build and of training that may hold a path."""
WORDS = ("manifest", "measure")  # what `reference` may be instead
ASKS_POLICY = ("highest_loss", "perplexity_ratio")


@dataclass(frozen=True)
class Step:
    """A command of a stage, and the settings that its file holds."""

    command: str  # build, a method of training, fisher, eval
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """build, train, fisher or eval."""
        return self.command if self.command in ("build", "fisher", "eval") else "train"

    @property
    def by_hand(self) -> str:
        """The command line that does it, in the stage's folder."""
        program = "curate build" if self.command == "build" else f"train {self.command} --config"
        return f"{program} {self.kind}.yaml"

    @property
    def leaves(self) -> str:
        """What is in the stage's folder when it is done."""
        last = {"build": "provenance.json", "train": "model", "fisher": "fisher.json", "eval": "metrics.json"}
        return f"{self.settings['out']}/{last[self.kind]}"


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
        self.config, self.base = config, Path(config.base)
        self.made = Plan(Path(config.out))
        self.names = tuple(task.name for task in config.tasks)
        self.tasks = {task.name: task for task in config.tasks}
        self.here = (self.made.out / STAGES / "x").absolute()  # as deep as every stage
        self.inputs: dict[str, str] = {}  # text in a stage's settings → hash of what it names
        folder, _ = model_folder(str(config.path(config.model)), self.base, "model")
        for below in stack(folder.absolute(), "model")[:-1]:
            if not below.is_absolute():
                raise InputError(
                    f"model {config.model!r}: an adapter whose base {str(below)!r} is found from the working "
                    "directory alone",
                    remedy="merge it, or give its adapter_config.json the base's whole path as base_model_name_or_path",
                )
        self.weights = weights_hash(folder)
        self.model = self._path(config.model, self.weights)
        for task in config.tasks:
            self.made.identities[task.name] = identify(task, self.base)
            self._path(task.path, self.made.sources[task.name])

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
        decide = [[step.command, self._decides(step.settings)] for step in steps if step.kind in ("build", "train")]
        key = content_hash([kind, decide, self.weights])
        named = {"held_out": "held-out", "start": "0-start", "joint": "joint"}
        name = named[kind] if kind in named else f"{len(tasks)}-{tasks[-1]}"
        folder = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{key[:10]}"
        if folder not in self.made.stages:
            for step in steps:
                check(step, self.here)
            before = tuple(stage.folder for stage in needs if stage)
            self.made.stages[folder] = Stage(folder, kind, tasks, {s.kind: s for s in steps}, before, key)
        return self.made.stages[folder]

    def _decides(self, value: Any, key: str = "") -> Any:
        """Settings as they decide a result: contents instead of places, and nothing that changes none."""
        if isinstance(value, Mapping):
            idle = (*HOUSEKEEPING, "name", "out", "cache", "engine") if not key else ()
            return {name: self._decides(each, name) for name, each in value.items() if name not in idle}
        if isinstance(value, list | tuple):
            return [self._decides(each, key) for each in value]
        return self.inputs.get(value, value) if isinstance(value, str) else value

    def _held_out(self) -> Stage | None:
        """The rows that all stages are scored on; None where a manifest has them already."""
        given = self.config.evaluation.data
        if given is not None:
            there = read(self.config.path(given)).samples["task"].unique().to_list()
            if missing := next((task for task in self.names if task not in there), None):
                raise InputError(f"evaluation.data {given}: no row of task {missing!r}",
                                 remedy="build it from held-out rows of every task, under the same names")  # fmt: skip
            return None
        tasks = [{**self._task(name), "split": self.config.evaluation.split} for name in self.names]
        return self._add("held_out", self.names, [self._build(tasks, EVERYTHING, {}, 0)], [])

    def _start(self, held_out: Stage | None) -> Stage:
        """The model before training, scored on all tasks."""
        return self._add("start", (), [self._eval([self.model], self.names, held_out)], [held_out])

    def _stage(self, recipe: Recipe, tasks: tuple[str, ...], seed: int, start: Stage, before: list[Stage],
               held_out: Stage | None) -> Stage:  # fmt: skip
        """A task behind older ones, which the stages `before` have trained."""
        how = recipe.how
        replay = _replay(how.replay, first=not before)
        ahead = f"../{before[-1].folder}/train/model" if before else self.model
        older = f"../{before[-2].folder}/train/model" if len(before) > 1 else self.model
        asked = self._asked(how.build, replay, ahead, older)
        build = self._build([self._task(name) for name in tasks], replay, asked, draws(seed, len(tasks), replay))
        train = self._train(how, seed, ahead, before, replay["selector"] != "none")
        steps = [build, Step(how.method, {**train, "data": ["manifest"]}), self._score(tasks, held_out)]
        return self._add("stage", tasks, steps, [held_out, start, *before])

    def _joint(self, recipe: Recipe, alone: list[Stage], seed: int, start: Stage, held_out: Stage | None) -> Stage:
        """All tasks at once: on the manifests of each alone, in which every row is of the newest task.

        Reinforcement learning takes one manifest, and old prompts as well as new ones: it gets all of them in one.
        """
        how, steps = recipe.how, list[Step]()
        train = self._train(how, seed, self.model, [], False)
        if how.method in ("cppo", "grpo"):
            train["data"] = ["manifest"]
            asked = self._asked(how.build, EVERYTHING, self.model, self.model)
            steps.append(self._build([self._task(name) for name in self.names], EVERYTHING, asked, seed))
        else:
            train["data"] = [f"../{stage.folder}/manifest" for stage in alone]
        with suppress(TypeError, ValueError):  # what is no number is refused with the other settings
            if (most := int(train.get("max_steps", -1))) > 0:
                train["max_steps"] = most * len(alone)  # as many as a run has in all
        steps += [Step(how.method, train), self._score(self.names, held_out)]
        return self._add("joint", self.names, steps, [held_out, start, *alone])

    def _train(self, how: Any, seed: int, ahead: str, before: list[Stage], replays: bool) -> dict[str, Any]:
        """Settings of training, with what older stages hand on."""
        train = copy.deepcopy(self._relative(how.train))
        buffers = how.method == "copr" and train.get("constraint") != "none" and train.get("keep") != 0
        if not before or not (buffers if how.method == "copr" else replays):
            train.pop("mixture", None)  # nothing comes back
        for key in ("ewc", "o_lora"):
            if train.get(key) is None or not before:
                train.pop(key, None)
        if "ewc" in train:
            folders = [f"../{stage.folder}/{self._fisher(stage, how, seed)}" for stage in before]
            train["ewc"] = {**train["ewc"], "fisher": folders}
        if "o_lora" in train:  # the newest adapter holds the older ones too, beside the first model
            train["o_lora"] = {**train["o_lora"], "previous": [f"../{before[-1].folder}/train/model"]}
            ahead = self.model
        if before and buffers:
            train["buffers"] = [f"../{stage.folder}/train/buffer" for stage in before]
        advantages = train.get("advantages", {"cppo": "gae", "grpo": "group"}.get(how.method))
        if before and advantages == "gae":
            value = {**(train.get("value") or {}), "head": f"../{before[-1].folder}/train/value.safetensors"}
            if value.get("model"):
                value["model"] = f"../{before[-1].folder}/train/value"
            train["value"] = value
        return {**train, "model": ahead, "out": "train", "seed": seed}

    def _fisher(self, stage: Stage, how: Any, seed: int) -> str:
        """The folder of a stage's Fisher information, which it is given by this."""
        given = {**self._relative(how.fisher), "model": "train/model", "data": ["manifest"], "seed": seed}
        step = Step("fisher", {**given, "out": f"fisher-{content_hash(self._decides(given))[:8]}"})
        if (other := stage.steps.setdefault("fisher", step)) != step:
            raise InputError(f"fisher: {stage.title} would be estimated with {other.settings} and {step.settings}",
                             remedy="one kind of Fisher information a stream")  # fmt: skip
        check(step, self.here)
        return str(step.settings["out"])

    # --- steps ---

    def _build(self, tasks: list[dict[str, Any]], replay: Mapping[str, Any], more: dict[str, Any], seed: int) -> Step:
        replay = replay if len(tasks) > 1 else {"selector": "none"}
        return Step("build", {"name": self.config.name, **more, "tasks": tasks, "replay": dict(replay), "seed": seed,
                              "out": "manifest", "cache": f"../../{CACHE}"})  # fmt: skip

    def _asked(self, build: Mapping[str, Any], replay: Mapping[str, Any], ahead: str, older: str) -> dict[str, Any]:
        """Sections of a build, with the checkpoint as policy wherever one is asked or given settings.

        The reference of a perplexity ratio is the checkpoint before the newest stage: what that stage made it lose.
        """
        found = copy.deepcopy(self._relative(build))
        tags = found.get("tags") or {}
        by_llm = tags.get("tagger") == "llm" and not tags.get("model") and replay["selector"] != "none"
        asked = by_llm or replay["selector"] in ASKS_POLICY or any(found.get(k) for k in ("rollouts", "augment"))
        if asked or "policy" in found:
            found["policy"] = {**(found.get("policy") or {}), "model": ahead}
        if replay["selector"] == "perplexity_ratio":
            found.setdefault("reference", {**found["policy"], "model": older})
        return found

    def _score(self, tasks: Sequence[str], held_out: Stage | None) -> Step:
        """The scores of a stage's model on its tasks so far, or on all."""
        how = self.config.evaluation
        first = [self.model] if how.metric == "ranking_change" else []
        return self._eval([*first, "train/model"], self.names if how.every_task else tasks, held_out)

    def _eval(self, models: list[str], tasks: Sequence[str], held_out: Stage | None) -> Step:
        how = self.config.evaluation
        data = f"../{held_out.folder}/manifest" if held_out else self._path(str(how.data))
        given = how.model_dump(include={"metric", "max_new_tokens", "reduction", "per_task", "batch_size"})
        given |= {"models": models, "data": data, "tasks": sorted(tasks)}
        return Step("eval", {**given, "out": f"eval-{content_hash(self._decides(given))[:8]}"})

    def _task(self, name: str) -> dict[str, Any]:
        task: TaskConfig = self.tasks[name]
        return {**task.model_dump(exclude_defaults=True), "path": self._path(task.path)}

    # --- what is read ---

    def _path(self, name: str, digest: str | None = None) -> str:
        """A path of the stream's file as a stage's file has it; the name of what is no path (a hub id) as it is."""
        path = self.config.path(name)
        text = os.path.relpath(path.absolute(), self.here) if path.exists() else name
        if text not in self.inputs and (digest or path.exists()):
            self.inputs[text] = digest or _bytes(path)
        return text

    def _relative(self, value: Any, key: str = "") -> Any:
        """Settings whose paths are those that a stage's file has, and whose functions can be imported."""
        if isinstance(value, Mapping):
            return {name: self._relative(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [self._relative(each, key) for each in value]
        if isinstance(value, str) and key in ("function", "sync") and re.match(FUNCTION, value):
            _, file = open_function(value, self.base, f"{key} {value!r}")
            self.inputs[value] = f"{value}@{sha256_file(file)}"
        return self._path(value) if isinstance(value, str) and key in PATHS and value not in WORDS else value


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


def _bytes(path: Path) -> str:
    """Hash of what a path names: a file, a manifest, or a model."""
    if path.is_file():
        return sha256_file(path)
    provenance = path / "provenance.json"  # holds the hashes of a manifest's tables
    return sha256_file(provenance) if provenance.is_file() else weights_hash(path)


CHECKS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "build": lambda settings, base: BuildConfig.parse({**settings, "base": str(base)}, "build"),
    "fisher": lambda settings, base: checked(FisherConfig, settings, "fisher"),
    "eval": lambda settings, base: checked(EvalConfig, settings, "evaluation"),
}


def check(step: Step, base: Path) -> None:
    """Whether a command will take its settings.

    Raises:
        InputError: a key that it does not know, or a value that does not fit.
    """
    if step.kind != "train":
        CHECKS[step.kind](step.settings, base)
    else:
        parse(CONFIGS[step.command], step.settings, str(base), f"train ({step.command})")
