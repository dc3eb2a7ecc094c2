"""Sampling for the eye: as evenly as possible from every stratum, so that what is rare stays visible."""

from __future__ import annotations

import polars as pl


def evenly(frame: pl.DataFrame, strata: list[str], most: int) -> pl.DataFrame:
    """At most `most` rows: one of each stratum, then a second one of each, and so on, in the order of their uids.

    A uid is a hash of the row's content, so within a stratum it is a random order that is the same everywhere.
    """
    if frame.height <= most:
        return frame
    order = frame.sort("uid").with_columns(__turn=pl.int_range(pl.len()).over(strata))
    return order.sort("__turn", "uid").head(most).drop("__turn")
