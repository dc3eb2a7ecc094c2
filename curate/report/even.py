"""Sampling for the eye: as evenly as possible from every stratum, so that what is rare stays visible."""

from __future__ import annotations

import polars as pl

from curate.manifest.tables import GROUP, Rows, batches, height


def evenly(rows: Rows, strata: list[str], most: int) -> pl.DataFrame:
    """At most `most` rows: one of each stratum, then a second one of each, and so on, in the order of their uids.

    A uid is a hash of the row's content, so within a stratum it is a random order that is the same everywhere. Of a
    LazyFrame `most` rows of each stratum and a batch are held.
    """
    turn = pl.int_range(pl.len()).over(strata)
    if height(rows) <= most:
        return rows.lazy().collect()
    kept, more, n = pl.DataFrame(schema=rows.lazy().collect_schema()), list[pl.DataFrame](), 0
    for batch in batches(rows):
        more.append(batch)
        n += batch.height
        if n >= 4 * GROUP + kept.height:
            kept, more, n = pl.concat([kept, *more]).sort("uid").filter(turn < most), [], 0
    order = pl.concat([kept, *more]).sort("uid").with_columns(__turn=turn)
    return order.sort("__turn", "uid").head(most).drop("__turn")
