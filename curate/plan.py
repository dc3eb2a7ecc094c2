"""`--dry-run`: what a build would do, what of it is cached, and about how long it takes. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from curate.augment import templates_of
from curate.config import AugmentConfig, RolloutsConfig
from curate.ingest import TaskRows, row_texts
from curate.readers import Row
from curate.readers import read as read_rows
from curate.vocabulary import phrases_of

if TYPE_CHECKING:
    from curate.build import Build

SAMPLE = 1_000  # rows of a source that are looked at for an estimate
BYTES_A_ROW = 120  # of a gzipped source, where the rows are not counted yet
ROWS_A_SECOND = 15_000  # read or written; this and the rates below were measured on two cores
TEXTS_A_SECOND = 100  # MiniLM, instructions of about 60 tokens
TAGGED_A_SECOND = 3_000  # instructions
PAIRS_A_SECOND = 1_500_000  # exact transport, pairs of instructions
START = 10.0  # seconds until a model is loaded


@dataclass(frozen=True)
class Step:
    """A stage of the plan: how many results it has, how many are there, what it works on, and for how many seconds."""

    stage: str
    results: int | None
    cached: int | None
    size: str
    seconds: float | None


def plan(build: Build) -> list[Step]:
    """The steps of a build, in its order. Where rows are not read yet, their first 1,000 a task are looked at."""
    sources = build.sources()
    build.check_models()
    keyed = [(task, build.read_key(task, sources[index])) for task, index in build.stream]
    there = [TaskRows(t, build.store.path("read", k), k) for t, k in keyed if build.store.has("read", k)]
    n_bytes = sum(s.n_bytes for s in sources)
    if len(there) < len(keyed):
        rows, texts = _sampled(build, [sources[index].n_bytes for _, index in build.stream])
        read = Step("read", len(keyed), len(there), f"about {rows:,} rows", rows / ROWS_A_SECOND)
        guess = round(rows * (1 - 1 / max(1, len(keyed)))), round(rows / max(1, len(keyed)))
        return [read, *_estimated(build, texts, guess[0]), *_last(build, rows, None, None, guess[1])]
    asked = build.budget(there)  # a budget that cannot be met is found out here, too
    rows = sum(t.summary["rows"] for t in there)
    steps, keys = _measurements(build, there)
    done = build.store.has("sample", build.sample_key(there, keys, asked)) if keys is not None else False
    read = Step("read", len(keyed), len(keyed), f"{rows:,} rows, {n_bytes / 1e6:,.1f} MB", 0.0)
    return [read, *steps, *_last(build, rows, asked, done, there[-1].summary["rows"])]


def _last(build: Build, rows: int, asked: int | None, drawn: bool | None, current: int) -> list[Step]:
    size = f"{rows:,} rows" if asked is None else f"{asked:,} of {rows:,} rows"
    return [Step("sample", 1, int(bool(drawn)), size, 0.0 if drawn else rows / ROWS_A_SECOND / 10),
            *_policy(build, asked, current),
            Step("manifest", 1, None, build.place.shown, rows / ROWS_A_SECOND)]  # fmt: skip


def _policy(build: Build, asked: int | None, current: int) -> list[Step]:
    """What the policy will be asked. How long a model takes nobody knows beforehand, so no time is stated."""
    config, steps = build.config, list[Step]()
    replayed = (
        asked if asked is not None else config.replay.budget or (config.replay.per_task or 0) * (len(build.stream) - 1)
    )

    def rows_of(section: RolloutsConfig | AugmentConfig) -> int:
        found = {"current": current, "replay": replayed}
        n = sum(found[origin] for origin in section.origins)
        return n if section.per_task is None else min(n, section.per_task * len(build.stream))

    if config.rollouts is not None:
        n = rows_of(config.rollouts)
        if config.replay.completions == "policy":
            n = max(n, replayed)
        steps.append(Step("rollouts", None, None, f"at most {n:,} prompts × {config.rollouts.k} completions", None))
        steps.append(Step("rewards", None, None, f"{n * config.rollouts.k:,} by {config.rollouts.reward.kind}", None))
    if config.augment is not None:
        n = rows_of(config.augment) * len(templates_of(config.augment))
        steps.append(Step("rewrite", None, None, f"at most {n:,} rewrites, as many answers", None))
    return steps


def _sampled(build: Build, n_bytes: list[int]) -> tuple[int, list[int]]:
    """(rows of all tasks, distinct instructions of each), guessed from the first rows of each source."""
    rows, texts = 0, []
    for (task, _), size in zip(build.stream, n_bytes, strict=True):
        first = [r for r in islice(read_rows(task.config, build.base, task.block), SAMPLE) if isinstance(r, Row)]
        whole = len(first) < SAMPLE
        guess = len(first) if whole else max(len(first), size // BYTES_A_ROW)
        distinct = len({r.instruction for r in first})
        saturated = whole or distinct < len(first) / 4
        texts.append(distinct if saturated else round(distinct / len(first) * guess))
        rows += guess
    return rows, texts


def _losses(build: Build, rows: int) -> list[Step]:
    """The losses that the selector goes by."""
    models = len(build.selector.needs & {"loss", "reference_loss"})
    return [Step("losses", None, None, f"{rows:,} rows × {models} models", None)] if models else []


def _estimated(build: Build, texts: list[int], previous: int) -> list[Step]:
    """Stages behind rows that are not read yet: nothing of them can be known to be cached."""
    needs, n, steps = build.selector.needs, sum(texts), _losses(build, previous)
    if "insinfo" in needs:
        steps.append(Step("tags", 1, 0, f"about {n:,} instructions", n / TAGGED_A_SECOND))
        if build.config.tags.cluster:
            steps.append(Step("embed", None, None, "their tags", _embedding(build, 4 * n, 0.0)))
        steps.append(Step("score", 1, 0, "", n / TAGGED_A_SECOND))
    if needs & {"distance", "vectors"}:
        steps.append(Step("embed", None, None, f"about {n:,} instructions", _embedding(build, n)))
    if "distance" in needs:
        steps.append(_distance(build, texts, 0))
    return steps


def _distance(build: Build, texts: list[int], cached: int) -> Step:
    most = build.config.distance.max_points
    pairs = sum(min(n, most) * min(texts[-1], most) for n in texts[:-1])
    left = pairs * (1 - cached / max(1, len(texts) - 1))
    return Step("distance", len(texts) - 1, cached, f"{pairs:,} pairs", left / PAIRS_A_SECOND)


def _measurements(build: Build, tasks: list[TaskRows]) -> tuple[list[Step], list[str] | None]:
    """The stages between read and sample, and their keys where all of them can be known."""
    needs, steps, keys = build.needs(tasks), list[Step](), list[str]()
    sizes, known = [t.size for t in tasks], True
    if "insinfo" in needs:
        tag_steps, tag_key = _tags(build, tasks)
        steps += tag_steps
        known = tag_key is not None
        keys += [tag_key] if tag_key else []
    if needs & {"distance", "vectors"}:
        step, vectors = _embed(build, [t.instructions["instruction"].to_list() for t in tasks], "instructions")
        steps.append(step)
        keys += vectors
        if "distance" in needs:
            distances = build.distance_keys(tasks, vectors)
            steps.append(_distance(build, sizes, sum(build.store.has("distance", k) for k in distances)))
            keys += distances
    if "row_vectors" in needs:
        step, vectors = _embed(build, [row_texts(t) for t in tasks[:-1]], "rows")
        steps.append(step)
        keys += vectors
    if "loss" in needs:
        steps += _losses(build, sum(t.summary["rows"] for t in tasks[:-1]))
        keys.append(build.losses_key())
    return steps, keys if known else None


def _embed(build: Build, texts: list[list[str]], what: str) -> tuple[Step, list[str]]:
    before = {b.key for b in build.embeddings.blocks}
    keys = [build.embeddings.extend(each) for each in texts]
    blocks = [b for b in build.embeddings.blocks if b.key not in before]
    missing = [b for b in blocks if not build.store.has("embed", b.key)]
    n = sum(len(b.texts) for b in missing)
    size = f"{n:,} of {sum(map(len, texts)):,} {what}"
    return Step("embed", len(blocks), len(blocks) - len(missing), size, _embedding(build, n)), keys


def _embedding(build: Build, n: int, start: float = START) -> float | None:
    """Seconds for n texts; None where a server embeds them, which may be of any speed."""
    if n and build.config.embed.backend == "api":
        return None
    return n / TEXTS_A_SECOND + start * bool(n)


def _tags(build: Build, tasks: list[TaskRows]) -> tuple[list[Step], str | None]:
    """Tags, their vectors and InsInfo; the key of InsInfo where the raw tags are there."""
    n, raw_key = sum(t.size for t in tasks), build.raw_tags_key(tasks)
    tagging = Step("tags", 1, 0, f"{n:,} instructions", n / TAGGED_A_SECOND)
    if not build.store.has("tags", raw_key):
        return [tagging, Step("score", 1, 0, "", n / TAGGED_A_SECOND)], None
    steps = [replace(tagging, cached=1, seconds=0.0)]
    phrases, vectors = phrases_of(build.store.path("tags", raw_key)), None
    if build.config.tags.cluster and phrases:
        step, (vectors,) = _embed(build, [phrases], "tags")
        steps.append(step)
    key = build.score_key(raw_key, vectors, tasks)
    there = build.store.has("score", key)
    return [*steps, Step("score", 1, int(there), f"{len(phrases):,} tags", 0.0 if there else 1.0)], key


def plan_table(steps: list[Step]) -> Table:
    """The plan as a table."""
    table = Table(title="plan (nothing is done)", title_style="bold")
    for name in ("stage", "results", "cached", "size", "about"):
        table.add_column(name, justify="left" if name in ("stage", "size") else "right")
    for s in steps:
        about = "–" if s.seconds is None else _about(s.seconds)
        table.add_row(s.stage, _or_dash(s.results), _or_dash(s.cached), Text(s.size), about)
    table.add_section()
    whole = sum(round(s.seconds) if s.seconds >= 1 else s.seconds for s in steps if s.seconds)  # as the rows say
    table.add_row("in all", "", "", "", _about(whole))
    return table


def _about(seconds: float) -> str:
    return f"{round(seconds):,} s" if seconds >= 1 or seconds == 0 else "< 1 s"


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
