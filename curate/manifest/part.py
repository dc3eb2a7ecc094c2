"""A part of a manifest as a manifest: some of its prompts with some completions, as training leaves them behind.

What a whole build states of its sources, draws and scores does not hold for a part, so those tables are empty, and
`check` holds it to the rules of rows and completions alone: `provenance["part"]` tells it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import polars as pl

from curate.manifest.buckets import Bucket
from curate.manifest.io import Manifest
from curate.manifest.schema import TABLES, content_hash


def part(manifest: Manifest, uids: Collection[str], completions: pl.DataFrame, what: str) -> tuple[dict[str, Any], Any]:
    """(frames, provenance) of some prompts, for `write`.

    Args:
        manifest: the whole.
        uids: of the prompts.
        completions: theirs, in the columns of the table; those of the policy are its rollouts.
        what: says what the part is.
    """
    frames = {name: getattr(manifest, name).clear() for name in TABLES}
    frames["samples"] = manifest.samples.filter(pl.col("uid").is_in(list(uids)))
    frames["completions"] = completions
    rolled = completions.filter(origin="policy")
    tasks = manifest.tasks.filter(pl.col("task").is_in(frames["samples"]["task"].unique().to_list()))
    counts = {name: [rolled.filter(task=t, bucket=str(name)).height for t in tasks["task"]] for name in Bucket}
    total = [rolled.filter(task=t).height for t in tasks["task"]]
    judged = rolled["bucket"].is_not_null().any()
    columns = {"rollouts": total} | ({str(k): v for k, v in counts.items()} if judged else {})
    kinds = TABLES["tasks"].columns
    none = {str(b): pl.Series([None] * tasks.height, dtype=pl.Int64) for b in Bucket}
    frames["tasks"] = tasks.with_columns(
        **none | {"rollouts": pl.Series([None] * tasks.height, dtype=pl.Int64)}
        | ({k: pl.Series(v, dtype=kinds[k].dtype) for k, v in columns.items()} if rolled.height else {})
    )  # fmt: skip
    dropped = ("schema_version", "rows", "outputs", "buckets")
    kept = {key: value for key, value in manifest.provenance.items() if key not in dropped}
    return frames, {**kept, "part": {"what": what, "of": content_hash(manifest.provenance.get("outputs"))}}
