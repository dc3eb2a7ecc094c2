"""The tag vocabulary of a stream: raw tags of every instruction, which tags are one, how often each occurs, InsInfo.

Two stages over tables; the algorithms are in `tags.py` and `score.py`. An instruction counts once a task that has it:
N is the number of rows of instructions.parquet that belong to the pool, f_t how many of them carry t.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from curate.config import TagsConfig
from curate.errors import InputError
from curate.manifest.schema import TAGS
from curate.models.embedder import Vectors
from curate.score import frequencies, insinfo

VERSION = 1

Advance = Callable[[int], None]


def tag(instructions: pl.DataFrame, config: TagsConfig, folder: Path, done: Advance) -> None:
    """Stage tags: `tagged.parquet` (uid, task, raw tags) and `phrases.parquet` (raw tag, phrase, raw_count).

    Args:
        instructions: uid, task, instruction, tags (of the data's own column).
        config: the tagger.
        folder: where the result goes.
        done: told of every n instructions.
    """
    from curate.tags import keyphrases, normalise  # spaCy takes seconds to import, and a cached build does not need it

    if config.tagger == "column":
        raw = [sorted(set(tags or ())) for tags in instructions["tags"].to_list()]
        if not any(raw):
            raise InputError(
                "tags.tagger is 'column', but no row of any task has tags",
                remedy="name the column in each task: columns: {tags: NAME}; or use tags.tagger=keyphrase",
            )
    else:
        texts = sorted(set(instructions["instruction"]))
        found = dict(zip(texts, keyphrases(texts, config.max_tags), strict=True))
        raw = [found[text] for text in instructions["instruction"]]
    tagged = instructions.select("uid", "task").with_columns(raw=pl.Series(raw, dtype=pl.List(pl.String)))
    counts = frequencies(raw)
    phrases = [(tag, normalise(tag) or tag.strip().lower() or tag, counts[tag]) for tag in sorted(counts)]
    tagged.sort("uid").write_parquet(folder / "tagged.parquet")
    schema = {"tag": pl.String, "phrase": pl.String, "raw_count": pl.Int64}
    pl.DataFrame(phrases, schema=schema, orient="row").write_parquet(folder / "phrases.parquet")
    done(len(raw))


def phrases_of(tagged: Path) -> list[str]:
    """The distinct phrases of a stream, sorted: what is embedded and clustered."""
    return sorted(set(pl.read_parquet(tagged / "phrases.parquet", glob=False)["phrase"]))


def score(
    tagged: Path, vectors: Vectors | None, config: TagsConfig, left_out: str | None, folder: Path, done: Advance
) -> None:
    """Stage score: `instructions.parquet` (uid, tags, insinfo, rarest) and `tags.parquet` (the manifest's table).

    Args:
        tagged: folder of the stage `tag`.
        vectors: [phrases, d] in the order of `phrases_of`; None = tags are not merged.
        config: radius and density of the clusters, smallest frequency.
        left_out: a task whose instructions are not in the pool and are not scored (the current one), or None.
        folder: where the result goes.
        done: told of every n tags.
    """
    phrases = pl.read_parquet(tagged / "phrases.parquet", glob=False)
    phrases = phrases.join(_clusters(phrases, vectors, config), on="phrase", how="left", maintain_order="left")
    canonical_of = dict(phrases.select("tag", "canonical").iter_rows())
    rows = pl.read_parquet(tagged / "tagged.parquet", glob=False)
    tags = [sorted({canonical_of[t] for t in raw}) for raw in rows["raw"].to_list()]
    in_pool = [task != left_out for task in rows["task"]]
    count = frequencies(each for each, inside in zip(tags, in_pool, strict=True) if inside)
    if config.min_frequency > 1:
        tags = [[t for t in each if count[t] >= config.min_frequency] for each in tags]
    pool = [each for each, inside in zip(tags, in_pool, strict=True) if inside]
    values = iter(insinfo(pool).tolist())
    rows.select("uid").with_columns(
        tags=pl.Series(tags, dtype=pl.List(pl.String)),
        insinfo=pl.Series([next(values) if inside else None for inside in in_pool], dtype=pl.Float64),
        rarest=pl.Series([min(each, key=lambda t: (count[t], t)) if each else None for each in tags], dtype=pl.String),
    ).write_parquet(folder / "instructions.parquet")
    phrases.with_columns(
        count=pl.Series([count[t] for t in phrases["canonical"]], dtype=pl.Int64),
        pool=pl.lit(len(pool), dtype=pl.Int64),
    ).select(list(TAGS.schema)).cast(pl.Schema(TAGS.schema)).write_parquet(folder / "tags.parquet")
    done(phrases.height)


def _clusters(phrases: pl.DataFrame, vectors: Vectors | None, config: TagsConfig) -> pl.DataFrame:
    """Phrase -> canonical, cluster."""
    counts: dict[Any, Any] = dict(phrases.group_by("phrase").agg(pl.col("raw_count").sum()).iter_rows())
    unique = sorted(counts)
    if vectors is None:
        return pl.DataFrame(
            {"phrase": unique, "canonical": unique, "cluster": [-1] * len(unique)},
            schema={"phrase": pl.String, "canonical": pl.String, "cluster": pl.Int64},
        )
    from curate.tags import cluster

    found = cluster(unique, vectors, [counts[p] for p in unique], config.eps, config.min_samples)
    return pl.DataFrame({"phrase": unique, "canonical": found.canonical, "cluster": found.labels})
