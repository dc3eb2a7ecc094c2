"""`build`: the graph of stages from source files to a manifest.

    read (a task) ── embed (blocks of texts) ── distance (a previous task) ─┐
        └────────── tags ── clusters ── InsInfo ────────────────────────────┴─ sample ── manifest

A stage's result lies in the store under a key of its inputs' keys, its own configuration and its code version, so a
rebuild redoes what changed and a killed build goes on where it stopped. A stage runs only where the selector needs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock, Timeout

from curate.assemble import assemble
from curate.config import BuildConfig
from curate.distance import Distance, Side, side, task_distance
from curate.embed import Embeddings
from curate.errors import InputError
from curate.ingest import VERSION as READ_VERSION
from curate.ingest import Task, TaskRows, ingest, row_texts
from curate.manifest import Manifest, ManifestError, read, write
from curate.manifest.io import CARD, PROVENANCE, STAGING, read_provenance
from curate.manifest.schema import SCHEMA_VERSION, TABLES
from curate.models import Embedder, open_embedder
from curate.readers import SourceId, identify, time_blocks
from curate.sample import SELECTORS, Context, Draw, Pool, allocate, generator, shares
from curate.screen import Advance, Screen, Silent
from curate.store import Store, key_of
from curate.vocabulary import VERSION as TAGS_VERSION
from curate.vocabulary import phrases_of, score, tag

DISTANCE_VERSION = SAMPLE_VERSION = MANIFEST_VERSION = 1


def build(config: BuildConfig | Mapping[str, Any] | str | Path, screen: Screen | None = None) -> Manifest:
    """Run a build and return its manifest, which lies in `config.out`.

    Args:
        config: a BuildConfig, a mapping of its keys, or the path of a YAML file.
        screen: where progress goes; nowhere by default.

    Raises:
        InputError: the configuration or a source cannot be used; nothing was written to `out`.
    """
    if isinstance(config, str | Path):
        config = BuildConfig.load(config)
    elif not isinstance(config, BuildConfig):
        config = BuildConfig.parse(dict(config))
    return Build(config, screen or Silent()).run()


class Build:
    """One build: the stages in order, each a method that takes what it needs from the one before."""

    def __init__(self, config: BuildConfig, screen: Screen) -> None:
        self.config, self.screen = config, screen
        self.base = Path(config.base)
        self.out = Path(config.out)
        self.store = Store(config.cache_dir)
        self.selector = SELECTORS[config.replay.selector]
        self._current: Side | None = None

    def run(self) -> Manifest:
        """All stages; the manifest is published at the very end."""
        sources = self.sources()
        if self.needs_vectors:
            _ = self.embedder.fingerprint  # a model that cannot be used is found out before the first row is read
        with self._locked():
            self.store.sweep()
            tasks = self.read(sources)
            asked = self.budget(tasks)
            key, made = self.select(tasks, asked)
            return self.publish(tasks, sources, asked, key, made)

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
            tasks = [
                TaskRows(task, self.store.get("read", key, partial(self._ingest, task, sources[index], advance)), key)
                for (task, key), (_, index) in zip(keyed, self.stream, strict=True)
            ]
        for each in tasks:
            if n := each.summary["dropped"]:
                self.screen.note(f"{each.task.name}: {n:,} rows left out; drops.parquet lists each with its reason")
        return tasks

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
        needs = self.selector.needs
        return bool(needs & {"distance", "vectors", "row_vectors"}) or ("insinfo" in needs and self.config.tags.cluster)

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder of the configuration."""
        return open_embedder(self.config.embed, self.base)

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
        keys, found = self.distance_keys(tasks, vectors), []
        with self._stage_unless_cached("distance", keys, "tasks", total=len(previous)) as advance:
            for task, key in zip(previous, keys, strict=True):
                path = self.store.get("distance", key, partial(self._write_distance, task, current))
                found.append(Distance(**pl.read_parquet(path / "distance.parquet", glob=False).row(0, named=True)))
                advance(1)
        return keys, found

    def distance_keys(self, tasks: list[TaskRows], vectors: list[str]) -> list[str]:
        """Keys of the distances; the seed matters only where a side is quantised."""
        most, current = self.config.distance.max_points, tasks[-1]
        return [
            key_of("distance", DISTANCE_VERSION, self.config.distance.model_dump(), [t.key, current.key],
                   [v, vectors[-1]], self.config.seed if max(t.size, current.size) > most else None)
            for t, v in zip(tasks[:-1], vectors, strict=False)
        ]  # fmt: skip

    def _write_distance(self, task: TaskRows, current: TaskRows, folder: Path) -> None:
        result = task_distance(self._side(task), self._current_side(current))
        pl.DataFrame([vars(result)]).write_parquet(folder / "distance.parquet")

    def _side(self, task: TaskRows) -> Side:
        found = task.instructions
        mass = found["rows"].to_numpy() if self.config.distance.weights == "frequency" else np.ones(found.height)
        points = self.embeddings.of(found["instruction"].to_list())
        return side(points, mass, self.config.distance, self.config.seed)

    def _current_side(self, current: TaskRows) -> Side:
        """The current task's side, which every distance of a build shares."""
        if self._current is None:
            self._current = self._side(current)
        return self._current

    def tags(self, tasks: list[TaskRows]) -> tuple[str, Path]:
        """Stages tags and score: a key, and the folder with canonical tags, InsInfo and the tags table."""
        cfg, raw_key, left_out = self.config.tags, self.raw_tags_key(tasks), self._left_out(tasks)
        frame = pl.concat([t.instructions.with_columns(task=pl.lit(t.task.name)) for t in tasks])
        with self._stage_unless_cached("tags", [raw_key], "instructions", frame.height) as advance:
            raw = self.store.get("tags", raw_key, lambda folder: tag(frame, cfg, folder, advance))
        phrases = phrases_of(raw)
        merge = cfg.cluster and bool(phrases)
        vectors_key = self.embed([phrases], "tags")[0] if merge else None
        key = self.score_key(raw_key, vectors_key, tasks)
        with self._stage_unless_cached("score", [key], "tags", len(phrases)) as advance:
            folder = self.store.get("score", key, lambda folder: score(
                raw, self.embeddings.of(phrases) if merge else None, cfg, left_out, folder, advance))  # fmt: skip
        return key, folder

    def raw_tags_key(self, tasks: list[TaskRows]) -> str:
        """Key of the raw tags: the instructions of all tasks, in any order, and the tagger."""
        cfg = self.config.tags
        return key_of("tags", TAGS_VERSION, cfg.tagger, cfg.max_tags, sorted(t.key for t in tasks))

    def score_key(self, raw_key: str, vectors_key: str | None, tasks: list[TaskRows]) -> str:
        """Key of canonical tags and InsInfo."""
        cfg = self.config.tags.model_dump()
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
        key = self.sample_key(tasks, keys, asked)
        with self._stage_unless_cached("sample", [key], "rows") as advance:
            made["sample"] = self.store.get("sample", key, partial(self._write_draw, tasks, asked, made))
            advance(pl.read_parquet(made["sample"] / "rows.parquet", glob=False).height)
        return key, made

    def needs(self, tasks: list[TaskRows]) -> frozenset[str]:
        """What the selector has to know of this stream: nothing is far from, or like, a task that stands alone."""
        return self.selector.needs if len(tasks) > 1 else self.selector.needs & {"insinfo"}

    def sample_key(self, tasks: list[TaskRows], keys: list[str], asked: int) -> str:
        """Key of the draw: the rows, every measurement, the selector and the seed."""
        rows, cfg = [t.key for t in tasks], self.config.replay.model_dump()
        return key_of("sample", SAMPLE_VERSION, rows, keys, cfg, self.config.seed, asked)

    def _write_draw(self, tasks: list[TaskRows], asked: int, made: dict[str, Any], folder: Path) -> None:
        *previous, current = tasks
        scored = pl.read_parquet(made["tags"] / "instructions.parquet", glob=False) if "tags" in made else None
        pools = [self._pool(t, scored) for t in previous]
        distances = np.array([d.value for d in made["distances"]]) if "distances" in made else None
        weights = self.selector.shares([p for p, _ in pools], distances) if pools else np.zeros(0)
        capacity = [p.rows for p, _ in pools]
        context = Context(self._vectors(current) if previous else None, self.config.seed)
        share = shares(weights, asked)
        quota, granted = allocate(weights, asked), allocate(weights, asked, capacity)
        rows, instructions = [], []
        for place, (task, (pool, index)) in enumerate(zip(previous, pools, strict=True)):
            rng = generator(self.config.seed, task.task.stage, task.task.name)
            draw = self.selector.draw(pool, int(granted[place]), rng, context)
            rows.append(index.select("uid")[draw.rows].with_columns(task=pl.lit(task.task.name)))
            instructions.append(_per_instruction(task, draw))
        pl.concat(rows or [pl.DataFrame(schema={"uid": pl.String, "task": pl.String})]).write_parquet(
            folder / "rows.parquet"
        )
        empty = pl.DataFrame(schema={"uid": pl.String, "quota": pl.Int64, "granted": pl.Int64})
        pl.concat(instructions or [empty]).write_parquet(folder / "instructions.parquet")
        pl.DataFrame(
            {"task": [t.task.name for t in previous], "share": share, "quota": quota},
            schema={"task": pl.String, "share": pl.Float64, "quota": pl.Int64},
        ).write_parquet(folder / "tasks.parquet")

    def _pool(self, task: TaskRows, scored: pl.DataFrame | None) -> tuple[Pool, pl.DataFrame]:
        """A task as the draw sees it, and its rows; both sorted by uid."""
        instructions = task.instructions.with_row_index("index")
        index = task.scan().select("uid", "instruction_uid").collect().sort("uid")
        index = index.join(instructions.select("index", pl.col("uid").alias("instruction_uid")), on="instruction_uid",
                           how="left", maintain_order="left")  # fmt: skip
        scores = clusters = None
        if scored is not None:
            mine = instructions.join(scored, on="uid", how="left", maintain_order="left")
            scores = mine["insinfo"].to_numpy()
            if self.config.replay.unit == "tag_cluster":
                clusters = mine["rarest"].fill_null("").rank("dense").to_numpy().astype(np.int64) - 1
        row_vectors = self.embeddings.of(row_texts(task)) if "row_vectors" in self.selector.needs else None
        pool = Pool(task.task.name, index["index"].to_numpy().astype(np.int64), self._vectors(task), row_vectors,
                    scores, clusters)  # fmt: skip
        return pool, index

    def _vectors(self, task: TaskRows) -> Any:
        if "vectors" not in self.selector.needs:
            return None
        return self.embeddings.of(task.instructions["instruction"].to_list())

    # --- the manifest ---

    def publish(
        self, tasks: list[TaskRows], sources: list[SourceId], asked: int, sample_key: str, made: dict[str, Any]
    ) -> Manifest:
        """Stage manifest: the tables, unless `out` holds exactly these already."""
        facts = {
            "config": self.config.model_dump(exclude={"out", "cache"}),
            "inputs": _inputs(self.stream, sources, tasks),
            "replay": {"asked": asked, "selector": self.config.replay.selector, "about": self.selector.about},
            "embedder": self.embedder.fingerprint if self.needs_vectors else None,
            "solver": sorted({d.method for d in made.get("distances", [])}),
        }
        key = key_of("manifest", MANIFEST_VERSION, SCHEMA_VERSION, sample_key, facts)
        if (manifest := self._published(key, facts)) is not None:
            self.screen.cached("manifest", str(self.out))
        else:
            with self.screen.stage("manifest", None, "rows") as advance:
                frames, provenance, card = assemble(tasks, made, {"build_key": key, **facts})
                write(self.out, frames, provenance, card)
                advance(frames["samples"].height)
            manifest = read(self.out)
        if (granted := int(manifest.tasks["granted"].sum())) < asked:
            self.screen.note(f"{granted:,} of {asked:,} rows granted; `reason` in tasks.parquet says why for each task")
        return manifest

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

    def _refuse_own_input(self) -> None:
        """A build that writes into one of its sources would read itself the next time."""
        for task in self.config.tasks:
            source = (self.base / task.path).resolve()
            for name, folder in (("out", self.out), ("cache", self.store.root)):
                if source.is_dir() and folder.resolve().is_relative_to(source):
                    raise InputError(f"{name} {folder}: lies inside the source of task {task.name!r} ({task.path})",
                                     remedy=f"choose another folder with {name}=FOLDER")  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The output folder and the store are writable, and the folder is this build's alone."""
        self._refuse_own_input()
        _refuse_foreign(self.out)
        for folder, key in (
            (self.out if self.out.exists() else self.out.absolute().parent, "out"),
            (self.store.root, "cache"),
        ):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".writable.{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise InputError(f"{key} {folder}: cannot be written: {error.strerror}",
                                 remedy=f"choose another folder with {key}=FOLDER") from None  # fmt: skip
        lock = FileLock(self.out.resolve().with_name(f".{self.out.resolve().name}.lock"))
        try:
            with lock.acquire(timeout=0):
                yield
        except Timeout:
            raise InputError(f"out {self.out}: another build is running in this folder",
                             remedy="wait for it, or choose another folder with out=FOLDER") from None  # fmt: skip

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


def _refuse_foreign(out: Path) -> None:
    """A folder that holds anything but a manifest is somebody else's: nothing there is touched."""
    ours = {STAGING, CARD, *(t.file for t in TABLES.values())}
    wrong = [n for n in (*ours, PROVENANCE) if (out / n).exists() and (out / n).is_dir() != (n == STAGING)]
    if (out.is_symlink() and not out.exists()) or wrong:
        raise InputError(f"out {out}: {wrong[0] if wrong else 'a link to nothing'} is in the way of the manifest",
                         remedy="remove it, or choose another folder with out=FOLDER")  # fmt: skip
    if out.is_dir() and not (out / PROVENANCE).is_file():
        if foreign := sorted(
            f.name for f in out.iterdir() if f.name not in ours and not f.name.startswith(".writable.")
        ):
            raise InputError(f"out {out}: the folder holds other files than a manifest ({foreign[0]!r})",
                             remedy="choose a new folder with out=FOLDER")  # fmt: skip


def _per_instruction(task: TaskRows, draw: Draw) -> pl.DataFrame:
    return pl.DataFrame({"uid": task.instructions["uid"], "quota": draw.quota, "granted": draw.granted})


def _inputs(stream: list[tuple[Task, int]], sources: list[SourceId], tasks: list[TaskRows]) -> list[dict[str, Any]]:
    return [
        {"task": task.name, "path": task.config.path, "files": sources[index].files, "bytes": sources[index].n_bytes,
         **rows.summary}
        for (task, index), rows in zip(stream, tasks, strict=True)
    ]  # fmt: skip
