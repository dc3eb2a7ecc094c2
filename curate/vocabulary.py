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
from curate.engine import Engine
from curate.errors import InputError
from curate.llm_tags import Tagged, tag_with_model
from curate.manifest.schema import TAGS
from curate.models.embedder import Vectors
from curate.score import frequencies, insinfo

VERSION = 2

Advance = Callable[[int], None]


def tag(
    instructions: pl.DataFrame, config: TagsConfig, folder: Path, done: Advance, model: Any = None, seed: int = 0
) -> None:
    """Stage tags: `tagged.parquet` (uid, task, raw tags, fault) and `phrases.parquet` (raw tag, phrase, raw_count).

    `usage.parquet` counts the requests and tokens that the tags took.

    Args:
        instructions: uid, task, instruction, tags (of the data's own column).
        config: the tagger.
        folder: where the result goes.
        done: told of every n instructions.
        model: a Generator, for the tagger `llm`.
        seed: of the model's answers.
    """
    from curate.tags import normalise  # spaCy takes seconds to import, and a cached build does not need it

    texts = sorted(set(instructions["instruction"]))
    found = _tags_of(texts, instructions, config, model, seed)
    raw = [found[key].tags for key in instructions[_key_of(config)]]
    fault = [found[key].fault for key in instructions[_key_of(config)]]
    tagged = instructions.select("uid", "task").with_columns(
        raw=pl.Series(raw, dtype=pl.List(pl.String)), fault=pl.Series(fault, dtype=pl.String)
    )
    counts, why = frequencies(raw), _explanations(found)
    phrases = [(tag, normalise(tag) or tag.strip().lower() or tag, counts[tag], why.get(tag)) for tag in sorted(counts)]
    tagged.sort("uid").write_parquet(folder / "tagged.parquet")
    schema = {"tag": pl.String, "phrase": pl.String, "raw_count": pl.Int64, "explanation": pl.String}
    pl.DataFrame(phrases, schema=schema, orient="row").write_parquet(folder / "phrases.parquet")
    spent = {name: sum(getattr(t, name) for t in found.values())
             for name in ("requests", "prompt_tokens", "completion_tokens")}  # fmt: skip
    pl.DataFrame([spent]).write_parquet(folder / "usage.parquet")
    done(len(raw))


def _key_of(config: TagsConfig) -> str:
    """What a tag belongs to: an instruction of one task where the data brings tags, else the text."""
    return "uid" if config.tagger == "column" else "instruction"


def _tags_of(
    texts: list[str], instructions: pl.DataFrame, config: TagsConfig, model: Any, seed: int
) -> dict[str, Tagged]:
    if config.tagger == "column":
        raw = {uid: sorted(set(tags or ())) for uid, tags in instructions.select("uid", "tags").iter_rows()}
        if not any(raw.values()):
            raise InputError(
                "tags.tagger is 'column', but no row of any task has tags",
                remedy="name the column in each task: columns: {tags: NAME}; or use tags.tagger=keyphrase",
            )
        return {uid: _free(tags) for uid, tags in raw.items()}
    if config.tagger == "keyphrase":
        from curate.tags import keyphrases

        return {t: _free(tags) for t, tags in zip(texts, keyphrases(texts, config.max_tags), strict=True)}
    found = tag_with_model(texts, model, config.max_tags, config.max_new_tokens, seed)
    if all(t.fault for t in found):
        raise InputError(
            f"tags.tagger is 'llm', but the model gave no usable tags for any of {len(texts):,} instructions; the "
            f"first: {found[0].fault}",
            remedy="name a model that can write JSON in tags.model, or use tags.tagger=keyphrase",
        )
    return dict(zip(texts, found, strict=True))


def _free(tags: list[str]) -> Tagged:
    return Tagged(tags, [], None, 0, 0, 0)


def _explanations(found: dict[str, Tagged]) -> dict[str, str]:
    """Raw tag -> the model's words for it, of the first instruction that has it."""
    why: dict[str, str] = {}
    for key in sorted(found):
        for tag, explanation in zip(found[key].tags, found[key].explanations, strict=False):
            if explanation:
                why.setdefault(tag, explanation)
    return why


def phrases_of(tagged: Path) -> list[str]:
    """The distinct phrases of a stream, sorted: what is embedded and clustered."""
    return sorted(set(pl.read_parquet(tagged / "phrases.parquet", glob=False)["phrase"]))


def score(
    tagged: Path,
    vectors: Vectors | None,
    config: TagsConfig,
    left_out: str | None,
    folder: Path,
    done: Advance,
    engine: Engine | None = None,
    device: str | None = None,
) -> None:
    """Stage score: `instructions.parquet` (uid, tags, insinfo, rarest, fault) and `tags.parquet` (the manifest's).

    An instruction that could not be tagged (fault) has neither tags nor InsInfo, and is not in the pool.

    Args:
        tagged: folder of the stage `tag`.
        vectors: [phrases, d] in the order of `phrases_of`; None = tags are not merged.
        config: radius and density of the clusters, smallest frequency.
        left_out: a task whose instructions are not in the pool and are not scored (the current one), or None.
        folder: where the result goes.
        done: told of every n tags.
        engine: computes the radius graph; None = this process.
        device: where it does unless the configuration says; None = what this machine has.
    """
    phrases = pl.read_parquet(tagged / "phrases.parquet", glob=False)
    phrases = phrases.join(
        _clusters(phrases, vectors, config, engine, device), on="phrase", how="left", maintain_order="left"
    )
    canonical_of = dict(phrases.select("tag", "canonical").iter_rows())
    rows = pl.read_parquet(tagged / "tagged.parquet", glob=False)
    tags = [sorted({canonical_of[t] for t in raw}) for raw in rows["raw"].to_list()]
    in_pool = [task != left_out and fault is None for task, fault in rows.select("task", "fault").iter_rows()]
    count = frequencies(each for each, inside in zip(tags, in_pool, strict=True) if inside)
    if config.min_frequency > 1:
        tags = [[t for t in each if count[t] >= config.min_frequency] for each in tags]
    pool = [each for each, inside in zip(tags, in_pool, strict=True) if inside]
    values = iter(insinfo(pool).tolist())
    rows.select("uid").with_columns(
        tags=pl.Series(
            [None if fault else each for each, fault in zip(tags, rows["fault"], strict=True)],
            dtype=pl.List(pl.String),
        ),
        fault=rows["fault"],
        insinfo=pl.Series([next(values) if inside else None for inside in in_pool], dtype=pl.Float64),
        rarest=pl.Series([min(each, key=lambda t: (count[t], t)) if each else None for each in tags], dtype=pl.String),
    ).write_parquet(folder / "instructions.parquet")
    phrases.with_columns(
        count=pl.Series([count[t] for t in phrases["canonical"]], dtype=pl.Int64),
        pool=pl.lit(len(pool), dtype=pl.Int64),
    ).select(list(TAGS.schema)).cast(pl.Schema(TAGS.schema)).write_parquet(folder / "tags.parquet")
    done(phrases.height)


def _clusters(
    phrases: pl.DataFrame, vectors: Vectors | None, config: TagsConfig, engine: Engine | None, device: str | None
) -> pl.DataFrame:
    """Phrase -> canonical, cluster."""
    counts: dict[Any, Any] = dict(phrases.group_by("phrase").agg(pl.col("raw_count").sum()).iter_rows())
    unique = sorted(counts)
    if vectors is None:
        return pl.DataFrame(
            {"phrase": unique, "canonical": unique, "cluster": [-1] * len(unique)},
            schema={"phrase": pl.String, "canonical": pl.String, "cluster": pl.Int64},
        )
    from curate.models.threads import default_device
    from curate.tags import cluster

    where = config.device or device or default_device()
    found = cluster(unique, vectors, [counts[p] for p in unique], config.eps, config.min_samples, engine, where)
    return pl.DataFrame({"phrase": unique, "canonical": found.canonical, "cluster": found.labels})
