"""`build`: the graph of stages from source files to a manifest.

    read (a task) ── embed (blocks of texts) ── distance (a previous task) ─┐
        ├────────── tags ── clusters ── InsInfo ────────────────────────────┼─ sample ── policy stages ── manifest
        └────────── losses (where the selector goes by them) ───────────────┘

The policy stages (rollouts, rewards, candidates, buckets, augmentation) are in `policy.py`. A stage's result lies in
the store under a key of its inputs' keys, its own configuration and its code version, so a rebuild redoes what changed
and a killed build goes on where it stopped. A stage runs only where the selector or the configuration asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from curate.assemble import assemble, picked
from curate.cached import Cached
from curate.config import BuildConfig, EmbedConfig, ModelConfig, RewardConfig
from curate.distance import FILE, Distance, ToCurrent
from curate.draw import Pools
from curate.embed import Embeddings
from curate.engine import open_engine
from curate.errors import InputError
from curate.folder import locked
from curate.ingest import VERSION as READ_VERSION
from curate.ingest import Task, TaskRows, ingest, row_texts
from curate.losses import losses, pairs
from curate.manifest import Manifest, ManifestError, read, write
from curate.manifest.card import card
from curate.manifest.io import REPORT, read_provenance
from curate.manifest.licences import warning
from curate.manifest.markdown import printable
from curate.manifest.schema import SCHEMA_VERSION
from curate.map import coordinates
from curate.models import Embedder, open_embedder, open_generator, open_reward
from curate.models.threads import check_device
from curate.overrides import read_overrides
from curate.policy import PolicyStages, PolicyWork, usage
from curate.readers import SourceId, identify, time_blocks
from curate.report import is_current, write_report
from curate.sample import SELECTORS
from curate.screen import Advance, Screen, Silent
from curate.storage import Place
from curate.store import Store, key_of
from curate.vocabulary import VERSION as TAGS_VERSION
from curate.vocabulary import phrases_of, score, tag

Placed = TypeVar("Placed", EmbedConfig, ModelConfig, RewardConfig)

DISTANCE_VERSION = 1
SAMPLE_VERSION = 2
MANIFEST_VERSION = 4


def build(
    config: BuildConfig | Mapping[str, Any] | str | Path, screen: Screen | None = None, page: bool = True
) -> Manifest:
    """Run a build and return its manifest, which lies in `config.out`.

    Args:
        config: a BuildConfig, a mapping of its keys, or the path of a YAML file.
        screen: where progress goes; nowhere by default.
        page: write report.html too; `curate report` can make it later.

    Raises:
        InputError: the configuration or a source cannot be used; nothing was written to `out`.
    """
    if isinstance(config, str | Path):
        config = BuildConfig.load(config)
    elif not isinstance(config, BuildConfig):
        config = BuildConfig.parse(dict(config))
    made = Build(config, screen or Silent())
    try:
        return made.run(page)
    finally:
        made.store.engine.close()


class Build:
    """One build: the stages in order, each a method that takes what it needs from the one before."""

    def __init__(self, config: BuildConfig, screen: Screen) -> None:
        self.config, self.screen = config, screen
        self.base = Path(config.base)
        self.place = Place(config.out)
        self.out = self.place.folder
        self.store = Store(config.cache_dir, open_engine(config.engine))
        self.selector = SELECTORS[config.replay.selector]

    def run(self, page: bool = True) -> Manifest:
        """All stages; the manifest is published at the very end, and its page behind it."""
        with self.place.claimed({task.name: task.path for task in self.config.tasks}, self.screen.note):
            return self._run(page)

    def _run(self, page: bool) -> Manifest:
        sources = self.sources()
        self.check_models()
        self.store.engine.check()
        places = {task.name: self.base / task.path for task in self.config.tasks}
        with locked(self.out, self.store.root, places):
            self.store.sweep()
            tasks = self.read(sources)
            asked = self.budget(tasks)
            key, made = self.select(tasks, asked)
            work = self.ask_policy(tasks, made)
            manifest = self.publish(tasks, sources, asked, key, made, work)
            if page:
                self.report(manifest)
            self.upload()
            return manifest

    def check_models(self) -> None:
        """A model that cannot be used is found out before the first row is read."""
        if self.needs_vectors:
            _ = self.embedder.fingerprint
        for model in (self.policy, self.reference if "reference_loss" in self.selector.needs else None, self.tagger):
            _ = model and (model.fingerprint, model.tokenizer_fingerprint)  # a tokenizer of another model shows here
        if self.policy and self.reference and "reference_loss" in self.selector.needs:
            if self.policy.tokenizer_fingerprint != self.reference.tokenizer_fingerprint:
                raise InputError(
                    "policy and reference have different tokenizers, so their losses a token cannot be compared",
                    remedy="name as reference an earlier checkpoint of the same model",
                )
        if self.config.tags.device and "insinfo" in self.selector.needs and not self._workers:
            check_device(self.config.tags.device, "tags.device")
        if self.config.buckets.overrides is not None:
            read_overrides(self.config.resolve(self.config.buckets.overrides))
        if self.config.rollouts:
            _ = open_reward(self._placed(self.config.rollouts.reward, self._gpu), self.base, self.embedder).fingerprint

    # --- sources and rows ---

    def sources(self) -> list[SourceId]:
        """Identity (hashes) of every task's source; a missing file is found here, before any work."""
        return [identify(task, self.base) for task in self.config.tasks]

    @cached_property
    def stream(self) -> list[tuple[Task, int]]:
        """The tasks in stream order, a source that is cut by time being several; with the index of their source."""
        stream: list[tuple[Task, int]] = []
        for index, config in enumerate(self.config.tasks):
            for block in time_blocks(config, self.base) if config.blocks else [None]:
                name = f"{config.name}-{block}" if block else config.name
                stream.append((Task(config, name, len(stream) + 1, block), index))
        names = [task.name for task, _ in stream]
        if double := next((n for n in names if names.count(n) > 1), None):
            raise InputError(f"two tasks are named {double!r} once the time blocks are cut", remedy="rename one source")
        return stream

    def read_key(self, task: Task, source: SourceId) -> str:
        """Key of a task's rows: names and bytes of the source's files, and how they are read."""
        how = task.config.model_dump(exclude={"path"})
        return key_of("read", READ_VERSION, sorted(source.files.items()), how, task.name, task.block)

    def read(self, sources: list[SourceId]) -> list[TaskRows]:
        """Stage read: every task's rows as Parquet."""
        keyed = [(task, self.read_key(task, sources[index])) for task, index in self.stream]
        if all(self.store.has("read", key) for _, key in keyed):
            self.screen.cached("read", f"{len(keyed)} tasks")
        with self._stage_unless_cached("read", [k for _, k in keyed], "rows") as advance:
            tasks = [self.read_task(task, sources[index], advance) for task, index in self.stream]
        splits: dict[str, dict[str, None]] = {}  # of a task of the configuration, whose blocks are tasks here
        for each in tasks:
            if n := each.summary["dropped"]:
                self.screen.note(f"{each.task.name}: {n:,} rows left out; drops.parquet lists each with its reason")
            splits.setdefault(each.task.config.name, {}).update(dict.fromkeys(each.splits))
        for name, found in splits.items():
            if len(found) > 1:
                named = ", ".join(printable(split)[:40] for split in [*found][:5]) + (", …" if len(found) > 5 else "")
                self.screen.note(f"{name}: rows of splits {named}; no `split` given, so all of them are taken")
        return tasks

    def read_task(self, task: Task, source: SourceId, advance: Advance) -> TaskRows:
        """A task's rows as Parquet."""
        key = self.read_key(task, source)
        return TaskRows(task, self.store.get("read", key, partial(self._ingest, task, source, advance)), key)

    def _ingest(self, task: Task, source: SourceId, advance: Advance, folder: Path) -> None:
        ingest(task, self.base, folder, advance)
        if identify(task.config, self.base) != source:  # its rows must not be kept under the hash of other bytes
            raise InputError(f"{task.config.path}: changed while it was read", remedy="build again")

    def budget(self, tasks: list[TaskRows]) -> int:
        """α in rows. A total above all pools together is refused; a derived one is granted as far as it goes."""
        replay, (*previous, current) = self.config.replay, tasks
        if replay.selector == "none":
            return 0
        if replay.budget is None:
            if replay.per_task is not None:
                return replay.per_task * len(previous)
            asked = round((replay.ratio or 0) * current.summary["rows"])
            if previous and asked == 0:
                raise InputError(
                    f"replay.ratio {replay.ratio} of {current.summary['rows']} rows is less than one row",
                    remedy="raise replay.ratio, or give replay.budget",
                )
            return asked if previous else 0
        if not previous:
            raise InputError(
                f"tasks: {current.task.name!r} is the only task, so there is nothing to replay",
                remedy="put the earlier tasks before it, or set replay.selector=none for the current task alone",
            )
        pool = sum(t.summary["rows"] for t in previous)
        if replay.budget > pool:
            raise InputError(
                f"replay.budget {replay.budget} is above the {pool} rows that all previous tasks have together",
                remedy=f"set replay.budget to {pool} or less",
            )
        return replay.budget

    # --- measurements ---

    @property
    def needs_vectors(self) -> bool:
        """True where the selector needs the embedder."""
        needs, rollouts = self.selector.needs, self.config.rollouts
        return (
            bool(needs & {"distance", "vectors", "row_vectors"})
            or ("insinfo" in needs and self.config.tags.cluster)
            or (rollouts is not None and (self.config.candidates.similarity or rollouts.reward.kind == "similarity"))
        )

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder of the configuration."""
        return open_embedder(self._placed(self.config.embed, self._gpu), self.base, self.store.root / "requests")

    @cached_property
    def policy(self) -> Cached | None:
        """The model that is being trained."""
        return self._model(self.config.policy, "policy.model")

    @cached_property
    def reference(self) -> Cached | None:
        """The policy before it forgot."""
        return self._model(self.config.reference, "reference.model")

    @cached_property
    def tagger(self) -> Cached | None:
        """The model that gives tags."""
        if self.config.tags.tagger != "llm" or "insinfo" not in self.selector.needs:
            return None
        return self._model(self.config.tags.model, "tags.model") or self.policy

    def _model(self, config: ModelConfig | None, where: str) -> Cached | None:
        if config is None:
            return None
        config = self._placed(config, self._workers)
        return Cached(open_generator(config, self.base, where, self.store.root / "requests"), self.store)

    @property
    def _workers(self) -> str | None:
        """Device of the actors of a pool; None where this process computes, and takes what there is."""
        engine = self.config.engine
        return None if engine.kind == "local" else "cuda" if engine.gpus else "cpu"

    @property
    def _gpu(self) -> str | None:
        """The same of models that do not record a device of their own: on a CPU they are those of this process."""
        return "cuda" if self._workers == "cuda" else None

    def _placed(self, config: Placed, device: str | None) -> Placed:
        """A model's section with the device on which it is, where it names none."""
        return config if config.device or device is None else config.model_copy(update={"device": device})

    @cached_property
    def embeddings(self) -> Embeddings:
        """The vectors of this build."""
        return Embeddings(self.store, self.embedder)

    def embed(self, texts: list[list[str]], what: str) -> list[str]:
        """Stage embed: vectors of several lists of texts; returns a key for each list's vectors."""
        keys = [self.embeddings.extend(each) for each in texts]
        missing = self.embeddings.missing()
        if not missing:
            self.screen.cached("embed", f"{sum(map(len, texts)):,} {what}")
        else:
            with self.screen.stage("embed", sum(len(b.texts) for b in missing), what) as advance:
                self.embeddings.compute(advance)
        return keys

    def distances(self, tasks: list[TaskRows], vectors: list[str]) -> tuple[list[str], list[Distance]]:
        """Stage distance: W(previous task, current task) for each previous task."""
        *previous, current = tasks
        keys = self.distance_keys(tasks, vectors)
        with self._stage_unless_cached("distance", keys, "tasks", total=len(previous)) as advance:
            if missing := self.store.missing("distance", zip(keys, previous, strict=True)):
                make = ToCurrent(*self._masses(current), self.config.distance, self.config.seed)
                self.store.fill("distance", FILE, missing, make, lambda _: advance(1), self._masses)
        paths = [self.store.path("distance", key) / FILE for key in keys]
        return keys, [Distance(**pl.read_parquet(path, glob=False).row(0, named=True)) for path in paths]

    def distance_keys(self, tasks: list[TaskRows], vectors: list[str]) -> list[str]:
        """Keys of the distances; the seed matters only where a side is quantised."""
        most, current = self.config.distance.max_points, tasks[-1]
        return [
            key_of("distance", DISTANCE_VERSION, self.config.distance.model_dump(), [t.key, current.key],
                   [v, vectors[-1]], self.config.seed if max(t.size, current.size) > most else None)
            for t, v in zip(tasks[:-1], vectors, strict=False)
        ]  # fmt: skip

    def _masses(self, task: TaskRows) -> tuple[Any, Any]:
        """Vectors and masses of a task's instructions."""
        found = task.instructions
        mass = found["rows"].to_numpy() if self.config.distance.weights == "frequency" else np.ones(found.height)
        return self.embeddings.of(found["instruction"].to_list()), mass

    def tags(self, tasks: list[TaskRows]) -> tuple[str, Path]:
        """Stages tags and score: a key, and the folder with canonical tags, InsInfo and the tags table."""
        cfg, raw_key, left_out = self.config.tags, self.raw_tags_key(tasks), self._left_out(tasks)
        frame = pl.concat([t.instructions.with_columns(task=pl.lit(t.task.name)) for t in tasks])
        with self._stage_unless_cached("tags", [raw_key], "instructions", frame.height) as advance:
            raw = self.store.get("tags", raw_key, lambda folder: tag(frame, cfg, folder, advance, self.tagger,
                                                                     self.config.seed))  # fmt: skip
        phrases = phrases_of(raw)
        merge = cfg.cluster and bool(phrases)
        vectors_key = self.embed([phrases], "tags")[0] if merge else None
        key = self.score_key(raw_key, vectors_key, tasks)
        with self._stage_unless_cached("score", [key], "tags", len(phrases)) as advance:
            folder = self.store.get("score", key, lambda folder: score(
                raw, self.embeddings.of(phrases) if merge else None, cfg, left_out, folder, advance,
                self.store.engine, self._workers))  # fmt: skip
        return key, folder

    def raw_tags_key(self, tasks: list[TaskRows]) -> str:
        """Key of the raw tags: the instructions of all tasks, in any order, and the tagger."""
        cfg = self.config.tags
        asked = [self.tagger.fingerprint, cfg.max_new_tokens, self.config.seed] if self.tagger else []
        return key_of("tags", TAGS_VERSION, cfg.tagger, cfg.max_tags, asked, sorted(t.key for t in tasks))

    def score_key(self, raw_key: str, vectors_key: str | None, tasks: list[TaskRows]) -> str:
        """Key of canonical tags and InsInfo."""
        cfg = self.config.tags.model_dump(exclude={"model", "max_new_tokens", "device"})
        return key_of("score", TAGS_VERSION, raw_key, vectors_key, cfg, self._left_out(tasks))

    def _left_out(self, tasks: list[TaskRows]) -> str | None:
        """The task that is not in the pool of InsInfo, and is not scored."""
        return tasks[-1].task.name if self.config.score.pool == "previous" else None

    # --- the draw ---

    def select(self, tasks: list[TaskRows], asked: int) -> tuple[str, dict[str, Any]]:
        """Everything that decides which rows come back; returns a key of it and what it is made of."""
        needs, keys, made = self.needs(tasks), list[str](), dict[str, Any]()
        if "insinfo" in needs:
            tags_key, made["tags"] = self.tags(tasks)
            keys.append(tags_key)
        if needs & {"distance", "vectors"}:
            vectors = self.embed([t.instructions["instruction"].to_list() for t in tasks], "instructions")
            keys += vectors
        if "distance" in needs:
            distance_keys, made["distances"] = self.distances(tasks, vectors)
            keys += distance_keys
        if "row_vectors" in needs:
            keys += self.embed([row_texts(t) for t in tasks[:-1]], "rows")
        if "loss" in needs:
            keys.append(self.losses_key())
            made["losses"] = self.losses(tasks[:-1])
        key = self.sample_key(tasks, keys, asked)
        pools = Pools(self.config, lambda: self.embeddings, made)
        with self._stage_unless_cached("sample", [key], "rows") as advance:
            made["sample"] = self.store.get("sample", key, partial(pools.draw, tasks, asked))
            advance(pl.read_parquet(made["sample"] / "rows.parquet", glob=False).height)
        return key, made

    def needs(self, tasks: list[TaskRows]) -> frozenset[str]:
        """What the selector has to know of this stream: nothing is far from, or like, a task that stands alone."""
        return self.selector.needs if len(tasks) > 1 else self.selector.needs & {"insinfo"}

    def sample_key(self, tasks: list[TaskRows], keys: list[str], asked: int) -> str:
        """Key of the draw: the rows, every measurement, the selector and the seed."""
        answers = {"completions", "min_reward", "fallback"}  # decided after the draw
        rows, cfg = [t.key for t in tasks], self.config.replay.model_dump(exclude=answers)
        return key_of("sample", SAMPLE_VERSION, rows, keys, cfg, self.config.seed, asked)

    def losses_key(self) -> str:
        """Names the models that rows are scored by; their rows are in the key of the draw already."""
        models = [self.policy, self.reference if "reference_loss" in self.selector.needs else None]
        return key_of("loss", 1, [m and [m.fingerprint, m.how] for m in models], self.config.too_long)

    def losses(self, previous: list[TaskRows]) -> pl.DataFrame:
        """Stage losses: uid, loss, reference_loss of every row of the previous tasks."""
        assert self.policy is not None
        every = [pair for task in previous for pair in pairs(task)]
        named = {"loss": self.policy}
        if "reference_loss" in self.selector.needs:
            assert self.reference is not None
            named["reference_loss"] = self.reference
        found = pl.DataFrame({"uid": [prompt.uid for prompt, _ in every]}, schema={"uid": pl.String})
        for name, model in named.items():
            left = model.to_score(every)
            with self.screen.stage(name, left, "rows") if left else self._known(name, len(every)) as advance:
                found = found.with_columns(losses(every, model, advance)["loss"].alias(name))
        if unmeasured := found[list(named)].null_count().sum_horizontal().item():
            if self.config.too_long == "error":
                uid = found.filter(pl.any_horizontal(pl.col(list(named)).is_null()))["uid"][0]
                task = next(t for t in previous if uid in set(t.scan().select("uid").collect()["uid"]))
                row = task.scan().filter(uid=uid).select("row").collect().item()
                raise InputError(
                    f"task {task.task.name!r}: row {row}: prompt and answer do not fit the context of "
                    f"{self.config.policy.model if self.config.policy else ''!r}, so its loss cannot be measured",
                    remedy="shorten the row, or set too_long: skip (such rows are drawn last)",
                )
            self.screen.note(f"{unmeasured:,} losses could not be measured: those rows do not fit the context")
        return found.with_columns(pl.lit(None, dtype=pl.Float64).alias(n) for n in {"reference_loss"} - named.keys())

    @contextmanager
    def _known(self, stage: str, n: int) -> Iterator[Advance]:
        self.screen.cached(stage, f"{n:,} rows")
        yield lambda n: None

    def ask_policy(self, tasks: list[TaskRows], made: Mapping[str, Any]) -> PolicyWork:
        """The stages between the draw and the manifest."""
        drawn = pl.read_parquet(made["sample"] / "rows.parquet", glob=False)
        rows = pl.concat([picked(task, drawn, last=task is tasks[-1]) for task in tasks])  # not loaded
        rollouts = self.config.rollouts
        reward = rollouts and self._placed(rollouts.reward, self._gpu)
        stages = PolicyStages(
            self.config, self.policy,
            lambda: open_reward(reward, self.base, self.embedder) if reward else None,  # type: ignore
            lambda: self.embeddings, self.store, self.screen,
        )  # fmt: skip
        return stages.run(rows, tasks)

    # --- the manifest ---

    def publish(
        self,
        tasks: list[TaskRows],
        sources: list[SourceId],
        asked: int,
        sample_key: str,
        made: dict[str, Any],
        work: PolicyWork,
    ) -> Manifest:
        """Stage manifest: the tables, unless `out` holds exactly these already."""
        facts = {
            "config": self.config.model_dump(exclude={"out", "cache", "engine"}),
            "inputs": _inputs(self.stream, sources, tasks),
            "replay": {"asked": asked, "selector": self.config.replay.selector, "about": self.selector.about},
            "embedder": self.embedder.fingerprint if self.needs_vectors else None,
            "solver": sorted({d.method for d in made.get("distances", [])}),
            "models": self.models(),
            **work.facts,
        }
        if self.tagger is not None:
            spent = pl.read_parquet(self.store.path("tags", self.raw_tags_key(tasks)) / "usage.parquet", glob=False)
            config = self.config.tags.model or self.config.policy
            assert config is not None
            n, n_in, n_out = spent.row(0)
            facts["tagging"] = usage(n, n_in, n_out, config)
        key = key_of("manifest", MANIFEST_VERSION, SCHEMA_VERSION, sample_key, facts)
        if (manifest := self._published(key, facts)) is not None:
            self.screen.cached("manifest", self.place.shown)
        else:
            with self.screen.stage("manifest", None, "rows") as advance:
                if self.needs(tasks) & {"distance", "vectors"}:
                    made["map"] = self.map(tasks)
                frames, provenance = assemble(tasks, made, work, {"build_key": key, **facts})
                write(self.out, frames, provenance, partial(card, provenance=provenance))
                manifest = read(self.out)
                advance(manifest.height("samples"))
        if (granted := int(manifest.tasks["granted"].sum())) < asked:
            self.screen.note(f"{granted:,} of {asked:,} rows granted; `reason` in tasks.parquet says why for each task")
        if restricted := warning(manifest.scan("samples")):
            self.screen.note(restricted)
        return manifest

    def report(self, manifest: Manifest) -> None:
        """Stage report: the page, unless the one of this manifest lies there already."""
        if is_current(manifest):
            self.screen.cached("report", REPORT)
            return
        with self.screen.stage("report", None, "rows") as advance:
            write_report(manifest)
            advance(manifest.height("samples"))

    def upload(self) -> None:
        """Stage upload, where `out` is a URL: what does not lie there yet."""
        if self.place.remote is not None:
            with self.screen.stage("upload", None, "files") as advance:
                advance(self.place.publish())

    def map(self, tasks: list[TaskRows]) -> tuple[pl.DataFrame, list[float]]:
        """Each instruction's place on the map of the stream, and the share of the variance that both axes hold."""
        frame = pl.concat([t.instructions.select("uid", "instruction") for t in tasks])
        places, variance = coordinates(self.embeddings.of(frame["instruction"].to_list()))
        return frame.select("uid").with_columns(x=pl.Series(places[:, 0]), y=pl.Series(places[:, 1])), variance

    def models(self) -> dict[str, Any]:
        """The language models that this build asks, each with the hash of its weights."""
        reference = self.reference if "reference_loss" in self.selector.needs else None
        asked = {"policy": self.policy, "reference": reference, "tagger": self.tagger}
        return {
            name: {"fingerprint": model.fingerprint, "tokenizer": model.tokenizer_fingerprint, "how": model.how}
            for name, model in asked.items()
            if model is not None
        }

    def _published(self, key: str, facts: Mapping[str, Any]) -> Manifest | None:
        try:
            found = read_provenance(self.out)
            if found.get("build_key") == key and all(
                found.get(k) == v for k, v in json.loads(json.dumps(facts)).items()
            ):
                return read(self.out)
        except (ManifestError, OSError):
            pass  # whatever lies there is replaced
        return None

    @contextmanager
    def _stage_unless_cached(self, stage: str, keys: list[str], unit: str, total: int | None = None) -> Iterator[Any]:
        """A progress line, or one word where every result is there already."""
        if all(self.store.has(stage, key) for key in keys):
            if stage != "read":
                self.screen.cached(stage, "unchanged")
            yield lambda n: None
        else:
            with self.screen.stage(stage, total, unit) as advance:
                yield advance


def _inputs(stream: list[tuple[Task, int]], sources: list[SourceId], tasks: list[TaskRows]) -> list[dict[str, Any]]:
    return [
        {"task": task.name, "path": task.config.path, "files": sources[index].files, "bytes": sources[index].n_bytes,
         **rows.summary}
        for (task, index), rows in zip(stream, tasks, strict=True)
    ]  # fmt: skip
