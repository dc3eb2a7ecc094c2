"""Stage sample: from measurements to the rows that come back. Arithmetic is in `sample.py`; here are the tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curate.config import BuildConfig
from curate.embed import Embeddings
from curate.ingest import TaskRows, row_texts
from curate.losses import deciding
from curate.sample import SELECTORS, Context, Draw, Pool, allocate, generator, shares

_EMPTY: dict[str, dict[str, Any]] = {
    "rows": {"uid": pl.String, "task": pl.String},
    "instructions": {"uid": pl.String, "quota": pl.Int64, "granted": pl.Int64},
}


class Pools:
    """The previous tasks as a draw sees them.

    Args:
        config: the build's.
        embeddings: vectors that were planned and computed; asked only where the selector needs them.
        made: `tags`: folder of the scores; `losses`: table of uid, loss, reference_loss; `distances`: of each task.
    """

    def __init__(self, config: BuildConfig, embeddings: Any, made: Mapping[str, Any]) -> None:
        self.config, self.made = config, made
        self.selector = SELECTORS[config.replay.selector]
        self._embeddings: Any = embeddings
        self.scored = pl.read_parquet(made["tags"] / "instructions.parquet", glob=False) if "tags" in made else None

    @property
    def embeddings(self) -> Embeddings:
        """The vectors of the build."""
        found: Embeddings = self._embeddings()
        return found

    def draw(self, tasks: list[TaskRows], asked: int, folder: Path) -> None:
        """Write `rows` (uid, task), `instructions` (uid, quota, granted) and `tasks` (task, share, quota)."""
        *previous, current = tasks
        pools = [self.of(t) for t in previous]
        distances = np.array([d.value for d in self.made["distances"]]) if "distances" in self.made else None
        weights = self.selector.shares([p for p, _ in pools], distances) if pools else np.zeros(0)
        capacity = [p.rows for p, _ in pools]
        systematic = self.config.replay.rounding == "systematic"
        context = Context(self.vectors(current) if previous else None, self.config.seed, systematic)
        share = shares(weights, asked)
        quota, granted = (
            allocate(weights, asked, most, generator(self.config.seed, 0, "") if systematic else None)
            for most in (None, capacity)
        )
        rows = [pl.DataFrame(schema=_EMPTY["rows"])]
        instructions = [pl.DataFrame(schema=_EMPTY["instructions"])]
        for place, (task, (pool, index)) in enumerate(zip(previous, pools, strict=True)):
            rng = generator(self.config.seed, task.task.stage, task.task.name)
            drawn = self.selector.draw(pool, int(granted[place]), rng, context)
            rows.append(index.select("uid")[drawn.rows].with_columns(task=pl.lit(task.task.name)))
            instructions.append(_per_instruction(task, drawn))
        pl.concat(rows).write_parquet(folder / "rows.parquet")
        pl.concat(instructions).write_parquet(folder / "instructions.parquet")
        pl.DataFrame(
            {"task": [t.task.name for t in previous], "share": share, "quota": quota},
            schema={"task": pl.String, "share": pl.Float64, "quota": pl.Int64},
        ).write_parquet(folder / "tasks.parquet")

    def of(self, task: TaskRows) -> tuple[Pool, pl.DataFrame]:
        """A task's pool, and its rows that can be drawn; both sorted by uid."""
        instructions = task.instructions.with_row_index("index")
        number = instructions.lazy().select("index", pl.col("uid").alias("instruction_uid"))
        rows = task.scan().select("uid", "instruction_uid")
        rows = rows.join(number, on="instruction_uid", how="left", maintain_order="left")
        index = rows.select("uid", "index").collect()
        scores = clusters = None
        if self.scored is not None:
            mine = instructions.join(self.scored, on="uid", how="left", maintain_order="left")
            scores = mine["insinfo"].fill_null(0.0).to_numpy()
            untagged = mine.filter(pl.col("fault").is_not_null())["index"]  # listed in drops with the tagger's reason
            index = index.filter(pl.col("index").is_in(untagged.to_list()).not_())
            if self.config.replay.unit == "tag_cluster":
                clusters = mine["rarest"].fill_null("").rank("dense").to_numpy().astype(np.int64) - 1
        of = index["index"].to_numpy().astype(np.int64)
        row_vectors = self.embeddings.of(row_texts(task)) if "row_vectors" in self.selector.needs else None
        pool = Pool(task.task.name, of, self.vectors(task), row_vectors, scores, clusters, self.row_scores(index),
                    instructions.height)  # fmt: skip
        return pool, index

    def vectors(self, task: TaskRows) -> Any:
        """[instructions, d], where the selector looks at them."""
        if "vectors" not in self.selector.needs:
            return None
        return self.embeddings.of(task.instructions["instruction"].to_list())

    def row_scores(self, index: pl.DataFrame) -> Any:
        """[rows] loss or perplexity ratio, where the selector goes by them."""
        if "losses" not in self.made:
            return None
        ratio = "reference_loss" in self.selector.needs
        mine = index.select("uid").join(self.made["losses"], on="uid", how="left", maintain_order="left")
        return np.array([deciding(a, b, ratio) for a, b in mine.select("loss", "reference_loss").iter_rows()])


def _per_instruction(task: TaskRows, draw: Draw) -> pl.DataFrame:
    return pl.DataFrame({"uid": task.instructions["uid"], "quota": draw.quota, "granted": draw.granted})
