"""The loss of every row of the older tasks: what selectors that ask the model go by.

loss = −(1/T) Σ_t log π(y_t | x, y_<t) over the tokens of the source's answer, in nats. The perplexity ratio of a row is
exp(loss − reference_loss): above 1 the policy has lost what the reference, the model before it went on, still knew.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from curate.blocks import Advance
from curate.ingest import TaskRows
from curate.manifest import sequence_logp
from curate.rollout import prompt_of

LOSSES = {"uid": pl.String, "loss": pl.Float64}


def pairs(task: TaskRows) -> list[Any]:
    """(prompt, the source's answer) of every row of a task, by uid."""
    rows = task.scan().select("uid", "prompt", "completion", "tools").collect()
    return [(prompt_of(row), row["completion"]) for row in rows.iter_rows(named=True)]


def losses(found: list[Any], model: Any, done: Advance = lambda n: None) -> pl.DataFrame:
    """uid, loss of every pair; null where prompt and answer do not fit the context. `model` is a Cached Scorer."""
    scored = model.score(found, done)
    values = [None if c is None else -sequence_logp(c.token_logps) for c in scored]
    rows = [(prompt.uid, value) for (prompt, _), value in zip(found, values, strict=True)]
    return pl.DataFrame(rows, schema=LOSSES, orient="row")


def deciding(loss: float | None, reference_loss: float | None, ratio: bool) -> float:
    """What a selector goes by: the loss, or the perplexity ratio; NaN where it could not be measured.

    >>> deciding(2.0, None, ratio=False), round(deciding(2.0, 1.0, ratio=True), 4)  # e^(2 - 1)
    (2.0, 2.7183)
    """
    if loss is None or (ratio and reference_loss is None):
        return math.nan
    if not ratio:
        return loss
    return math.exp(min(loss - reference_loss, 700.0))  # type: ignore[operator]
