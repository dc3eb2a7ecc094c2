"""What a stream is: one YAML file. Arms and the grid are settings of the stream itself, by their dotted names."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from curate.config import TaskConfig
from curate.errors import InputError
from curate.settings import Section, checked, override
from train.scores import Metric

Order = Literal["curriculum", "reverse", "random"]
Method = Literal["cft", "copr", "dpo", "pbl", "cppo", "grpo"]
RECIPE = ("order", "replay", "build", "method", "train", "fisher")
"""What arms and the grid may change."""
OWN_BUILD = ("name", "tasks", "seed", "replay", "out", "cache")
OWN_TRAIN = ("model", "data", "out", "seed", "resume", "init")
OWN_FISHER = ("model", "data", "out", "seed")
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
    """Upper bounds, trained as the stream says without its arms and grid; `replay.selector: none` is the lower one."""

    single: bool = Field(True, description="each task alone: what relative gain is divided by")
    joint: bool = Field(True, description="all tasks at once")


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
        default_factory=dict, description="dotted.key → values: every combination is run, of every arm"
    )
    baseline: str | None = Field(None, description="arm that the others are compared with; by default the first")
    workers: int | None = Field(None, gt=0, description="processes; by default as many as cores and memory allow")
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
        for section, own in (("build", OWN_BUILD), ("train", OWN_TRAIN), ("fisher", OWN_FISHER)):
            if wrong := next((key for key in own if key in getattr(self, section)), None):
                where = "a key of the stream itself" if wrong in ("replay", "tasks", "model") else "set by the stream"
                raise ValueError(f"{section}.{wrong}: {where}; leave it out here")
        for arm in self.arms:
            if not _ARM.match(arm) or len(arm) > 60:
                raise ValueError(f"arms: {arm!r}: a name has letters, digits, space and . _ + - (at most 60)")
        for where, key in [*((f"arms.{a}", k) for a, keys in self.arms.items() for k in keys),
                           *(("grid", k) for k in self.grid)]:  # fmt: skip
            if key.partition(".")[0] not in RECIPE:
                raise ValueError(f"{where}: {key!r} is not in {', '.join(RECIPE)} (`seeds` is a list of its own)")
        if empty := next((key for key, values in self.grid.items() if not values), None):
            raise ValueError(f"grid.{empty}: no values")
        return self

    def path(self, name: str) -> Path:
        """A path of the file: relative to it where it is there, else to the working directory."""
        beside = Path(self.base) / name
        return beside if beside.exists() else Path(name)

    def recipes(self) -> Iterator[Recipe]:
        """What is run, once a seed: every arm with every combination of the grid.

        Raises:
            InputError: a setting that leads nowhere, or two recipes of one name.
        """
        seen = set[str]()
        for arm, changes in (self.arms or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                chosen = dict(zip(self.grid, values, strict=True))
                shown = {k.rpartition(".")[2]: v for k, v in chosen.items() if len(self.grid[k]) > 1}
                words = [f"{v}" if isinstance(v, str) else f"{k} {json.dumps(v)}" for k, v in shown.items()]
                name = " · ".join([*([arm] if arm else []), *words]) or self.name
                if name in seen:
                    raise InputError(f"grid: two runs are called {name!r}", remedy="a value stands twice in a list")
                seen.add(name)
                yield self.recipe(name, {**changes, **chosen})

    def recipe(self, name: str, changes: Mapping[str, Any]) -> Recipe:
        """The stream's own settings with some changed."""
        data = copy.deepcopy(self.model_dump(include=set(RECIPE)))
        for key, value in changes.items():
            override(data, f"{key}={json.dumps(value)}", [("replay.budget", "replay.per_task", "replay.ratio")])
        settings = checked(_Recipe, data, f"run {name!r}")
        return Recipe(name, settings, dict(changes))


class _Recipe(Section):
    """The part of a stream that arms and the grid change."""

    order: Order
    replay: dict[str, Any]
    build: dict[str, Any]
    method: Method
    train: dict[str, Any]
    fisher: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a run is made, whatever its seed.

    Attributes:
        name: unique in the stream.
        how: its settings.
        changes: which of them an arm or the grid gave.
    """

    name: str
    how: _Recipe
    changes: dict[str, Any]
