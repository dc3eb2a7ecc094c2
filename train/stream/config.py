"""What a stream is: one YAML file. Arms and the grid are settings of the stream itself, by their dotted names."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from curate.config import TaskConfig
from curate.errors import InputError
from curate.settings import Section, checked
from train.scores import Metric

Order = Literal["curriculum", "reverse", "random"]
Method = Literal["cft", "copr", "dpo", "pbl", "cppo", "grpo"]
RECIPE = ("order", "replay", "build", "method", "train", "fisher")
"""What arms and the grid may change."""
BUDGETS = ("budget", "per_task", "ratio")
OWN_BUILD = ("name", "tasks", "seed", "replay", "out", "cache", "base")
OWN_TRAIN = ("model", "data", "out", "seed", "resume", "init", "base", "buffers")
HANDED_ON = (("ewc", "fisher"), ("o_lora", "previous"))
"""Keys within sections of training that name what older stages left."""
OWN_FISHER = ("model", "data", "out", "seed", "base")
_ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*\Z")


class Evaluation(Section):
    """What is scored after every stage."""

    split: str | None = Field(None, description="held-out rows: this split of the tasks' own sources")
    data: str | None = Field(None, description="or a manifest with the held-out rows of all tasks")
    metric: Metric = Field("rouge_l", description="score of an item, as in `train eval`")
    max_new_tokens: int = Field(64, gt=0, description="longest answer in tokens")
    reduction: Literal["sum", "mean"] = Field("sum", description="log-probability of a ranked answer: over its tokens")
    per_task: int | None = Field(None, gt=0, description="items a task at most: the first by uid")
    batch_size: int = Field(32, gt=0, description="sequences a forward pass")
    every_task: bool = Field(False, description="score tasks to come as well, for forward transfer")

    @model_validator(mode="after")
    def _one_source(self) -> Evaluation:
        if (self.split is None) == (self.data is None):
            raise ValueError("give one of `split` (held-out rows of the tasks' sources) and `data` (a manifest)")
        return self


class Bounds(Section):
    """Lower and upper bounds, trained as the stream says without its arms and grid."""

    none: bool = Field(True, description="no replay, where no run of the stream is without; COPR without its buffers")
    single: bool = Field(True, description="each task alone: what relative gain is divided by")
    joint: bool = Field(True, description="all tasks at once; needs `single`, whose rows it takes")

    @model_validator(mode="after")
    def _rows_of_single(self) -> Bounds:
        if self.joint and not self.single:
            raise ValueError("`bounds.joint` trains on the rows of `bounds.single`: switch both on, or joint off")
        return self


class StreamConfig(Section):
    """A stream, and the runs over it."""

    name: str = Field("stream", max_length=100, description="title of the page")
    model: str = Field(description="folder or hub name of the model that every run begins with")
    tasks: list[TaskConfig] = Field(min_length=2, description="as in a build, in curriculum order")
    order: Order = Field("curriculum", description="curriculum: as listed; reverse; random: drawn by the run's seed")
    seeds: list[int] = Field([0], min_length=1, description="a run each: draws of rows, their order, dropout")
    replay: dict[str, Any] = Field(
        default_factory=lambda: {"selector": "inscl"}, description="section of a build: selector, budget, per_task, …"
    )
    build: dict[str, Any] = Field(
        default_factory=dict, description="other sections of a build (embed, tags, rollouts, …); `policy` is the "
        "checkpoint of the stage before, `reference` the one before that, where nothing else is said"
    )  # fmt: skip
    method: Method = Field("cft", description="of training")
    train: dict[str, Any] = Field(
        default_factory=dict, description="its settings; `mixture` counts where something is replayed, `ewc`, `o_lora` "
        "and COPR's buffers from the second stage on: what they hold is named by the stream"
    )  # fmt: skip
    fisher: dict[str, Any] = Field(default_factory=dict, description="settings of `train fisher`, for `train.ewc`")
    evaluation: Evaluation = Field(Evaluation(split="test"), description="what is scored after every stage")  # type: ignore[call-arg]
    bounds: Bounds = Field(Bounds(), description="upper bounds")  # type: ignore[call-arg]
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="runs that differ in several settings: name → {dotted.key: value}"
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="dotted.key → values: every combination is run, of every arm (what is "
        "scored is the same for all: another `evaluation` is another stream, in the same `out`, trained once)",
    )
    baseline: str | None = Field(
        None, description="arm that the others are compared with, in the same place of the grid; by default the first"
    )
    workers: int | None = Field(
        None, gt=0, le=1024, description="processes; by default as many as cores and memory allow"
    )
    threads: int | None = Field(
        None, gt=0, le=1024, description="of each process; by default 1, or the cores' share where `workers` is given. "
        "Another number can change a last bit"
    )  # fmt: skip
    out: str = Field("runs/stream", description="folder of the stages and results, relative to the working directory")
    base: str = Field(".", exclude=True, description="folder that paths are relative to")

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if wrong := next((s for s in seeds if not 0 <= s < 2**32), None):
            raise ValueError(f"{wrong} is not between 0 and 2^32 - 1")
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice: two runs of one seed are one run")
        return seeds

    @model_validator(mode="after")
    def _usable(self) -> StreamConfig:
        names = [task.name.casefold() for task in self.tasks]
        if double := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"tasks: two are named {double!r}")
        if cut := next((t.name for t in self.tasks if t.blocks), None):
            raise ValueError(f"tasks: {cut!r} has `blocks`; give each block of time as a task of its own")
        if self.evaluation.split is not None:
            for number, task in enumerate(self.tasks):
                if task.split is None:
                    raise ValueError(
                        f"tasks.{number}.split: name the split that is trained on; without it {task.name!r} would be "
                        f"trained on the rows of {self.evaluation.split!r} that it is scored by"
                    )
                if task.split == self.evaluation.split:
                    raise ValueError(f"tasks.{number}.split: {task.split!r} is what `evaluation.split` holds out")
        _refuse_own(self)
        for arm in self.arms:
            if not _ARM.match(arm) or len(arm) > 60:
                raise ValueError(f"arms: {arm!r}: a name has letters, digits, space and . _ + - (at most 60)")
        for where, key in [*((f"arms.{a}", k) for a, keys in self.arms.items() for k in keys),
                           *(("grid", k) for k in self.grid)]:  # fmt: skip
            if key.partition(".")[0] not in RECIPE:
                raise ValueError(f"{where}: {key!r} is not in {', '.join(RECIPE)} (`seeds` is a list of its own)")
        for arm, keys in self.arms.items():
            every = [*keys, *self.grid]
            for key in every:
                if other := next((o for o in every if o.startswith(f"{key}.")), None):
                    raise ValueError(f"arms.{arm}: {key!r} holds {other!r}, which is given as well; give one of them "
                                     f"(on a command line: 'arms.{arm}={{replay.selector: …}}')")  # fmt: skip
            if twice := next((key for key in keys if key in self.grid), None):
                raise ValueError(f"arms.{arm}: {twice!r} is in the grid as well, which would take its place")
            sizes = {key for key in every if key.removeprefix("replay.") in BUDGETS and key.startswith("replay.")}
            if len(sizes) > 1:
                raise ValueError(f"arms.{arm}: give one of {' and '.join(sorted(sizes))}")
        if len([key for key in self.grid if key.removeprefix("replay.") in BUDGETS]) > 1:
            raise ValueError("grid: give one of replay.budget, replay.per_task and replay.ratio")
        if empty := next((key for key, values in self.grid.items() if not values), None):
            raise ValueError(f"grid.{empty}: no values")
        return self

    def path(self, name: str) -> Path:
        """A path of the file: relative to it where it is there, else to the working directory."""
        beside = Path(self.base) / name
        return beside if beside.exists() else Path(name)

    def recipes(self) -> list[Recipe]:
        """What is run, once a seed: every arm with every combination of the grid, and without replay in any case.

        Raises:
            InputError: a setting that leads nowhere, or two recipes of one name.
        """
        found: list[Recipe] = []
        names = _labels([key for key, values in self.grid.items() if len(values) > 1])
        for arm, changes in (self.arms or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                chosen = dict(zip(self.grid, values, strict=True))
                own = self.recipe(arm or self.name, "", {**changes, **chosen}).how
                idle = "replay." if own.replay.get("selector") == "none" else "-"  # no budget makes another run of it
                telling = [k for k in names if not k.startswith(idle) or k == "replay.selector"]
                words = [v if isinstance(v := chosen[k], str) else f"{names[k]} {json.dumps(v)}" for k in telling]
                cell = " · ".join(words)
                made = self.recipe(arm or ("" if cell else self.name), cell, {**changes, **chosen})
                same = [r for r in found if (r.arm, r.cell) == (made.arm, made.cell)]
                if not same:
                    found.append(made)
                elif idle == "-":
                    raise InputError(
                        f"grid: two runs are called {made.name!r}", remedy="a value stands twice in a list"
                    )
        if self.bounds.none and not any(r.how.replay.get("selector") == "none" for r in found):
            without = {"replay.selector": "none"} | ({"train.constraint": "none"} if self.method == "copr" else {})
            taken = {r.name for r in found}
            free = next(n for n in ("none", "no replay", "bound: no replay") if n not in taken)
            found.append(self.recipe(free, "", without))
        return found

    def recipe(self, arm: str, cell: str, changes: Mapping[str, Any]) -> Recipe:
        """The stream's own settings with some changed."""
        data = copy.deepcopy(self.model_dump(include=set(RECIPE)))
        name = " · ".join(word for word in (arm, cell) if word)
        for key, value in changes.items():
            place(data, key, value, f"run {name!r}")
        return Recipe(arm, cell, name, checked(_Recipe, data, f"run {name!r}"), dict(changes))


def place(data: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set a value by its dotted name, in place; of a budget's three forms the newest counts.

    Raises:
        InputError: its path leads into a single value.
    """
    *parents, last = dotted.split(".")
    node = data
    for key in parents:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise InputError(f"{where}: {dotted!r}: {key!r} is a single value and has no key {last!r}")
    for other in BUDGETS if parents == ["replay"] and last in BUDGETS else ():
        node.pop(other, None)
    node[last] = copy.deepcopy(value)


def _labels(keys: list[str]) -> dict[str, str]:
    """Key → the shortest end of it that no other key has.

    >>> _labels(["train.kl.weight", "train.ewc.weight", "order"])
    {'train.kl.weight': 'kl.weight', 'train.ewc.weight': 'ewc.weight', 'order': 'order'}
    """
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next(e for e in ends if [k for k in keys if k == e or k.endswith(f".{e}")] == [key])
    return found


def _refuse_own(settings: Any) -> None:
    """Raises ValueError where a section holds what the stream sets."""
    for section, own in (("build", OWN_BUILD), ("train", OWN_TRAIN), ("fisher", OWN_FISHER)):
        given = getattr(settings, section)
        if wrong := next((key for key in own if key in given), None):
            where = "a key of the stream itself" if wrong in ("replay", "tasks", "model") else "set by the stream"
            raise ValueError(f"{section}.{wrong}: {where}; leave it out here")
        if odd := next((key for key in ("ewc", "o_lora", "kl", "value", "policy", "reference", "tags", "rollouts")
                        if given.get(key) is not None and not isinstance(given[key], dict)
                        and not (key == "reference" and section == "train")), None):  # fmt: skip
            raise ValueError(f"{section}.{odd}: a mapping of its settings is needed, not {str(given[odd])[:50]!r}")
    if named := next((f"{part}.{key}" for part, key in HANDED_ON if key in (settings.train.get(part) or {})), None):
        raise ValueError(f"train.{named}: set by the stream; leave it out here")


class _Recipe(Section):
    """The part of a stream that arms and the grid change."""

    order: Order
    replay: dict[str, Any]
    build: dict[str, Any]
    method: Method
    train: dict[str, Any]
    fisher: dict[str, Any]

    @model_validator(mode="after")
    def _own(self) -> _Recipe:
        _refuse_own(self)
        return self


@dataclass(frozen=True)
class Recipe:
    """How a run is made, whatever its seed.

    Attributes:
        arm: name of its arm; empty where there are none.
        cell: its place in the grid, in words.
        name: both, unique in the stream.
        how: its settings.
        changes: which of them an arm or the grid gave.
    """

    arm: str
    cell: str
    name: str
    how: _Recipe
    changes: dict[str, Any]
