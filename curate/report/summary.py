"""The top of the page: what will be forgotten, and what was picked against it, in figures and plain sentences."""

from __future__ import annotations

import polars as pl

from curate.manifest import Manifest
from curate.manifest.tables import counts, height, value
from curate.report.parts import count, left_out, newest_task, percent, plural, real, short


def tiles(m: Manifest) -> list[tuple[str, str, str]]:
    """(number, what it counts, a remark) of the figures at the top."""
    part, asked, rolled = "part" in m.provenance, m.provenance["replay"].get("asked"), _rollouts(m)
    n, n_rolled = _origins(m), height(rolled)
    found = [
        (count(m.tasks.height), "tasks", "with rows here" if part else "in the stream"),
        (count(n["current"]), "rows of the newest task", f"of {count(m.height('samples'))} in the set"),
        (count(n["replay"]), "rows replayed", "" if part else f"{count(asked)} asked"),
    ]
    if m.augmentations.height:
        found.append((count(n["augmented"]), "rewrites kept", f"of {count(m.augmentations.height)}"))
    if n_rolled:
        prompts = value(rolled, pl.col("prompt_uid").n_unique())
        found.append((count(n_rolled), "rollouts", f"of {plural(prompts, 'prompt')}"))
    if not part:
        found.append((count(height(left_out(m))), "rows left out", "each with its reason"))
    return found


def sentences(m: Manifest) -> list[str]:
    """What the page will show, in words."""
    tasks = m.tasks.sort("stage")
    if part := m.provenance.get("part"):
        says = [
            f"A part of a manifest, as training leaves it behind: {part.get('what', 'some of its prompts')}. It has no "
            "quotas, tags or drops of its own; those are in the manifest of the build."
        ]
    else:
        newest = newest_task(m)
        says = [*_risk(tasks, newest), _picked(m, tasks), _what(m, newest)]
    buckets = {bucket: n for (bucket,), n in counts(_rollouts(m), "bucket").items() if bucket is not None}
    if judged := sum(buckets.values()):
        noisy, good = (buckets.get(b, 0) for b in ("noisy", "high_performance"))
        says.append(
            f"Which rollouts are noise? {count(noisy)} of {count(judged)} are noisy: unlikely and poorly "
            f"rewarded ({percent(noisy, judged)}); {count(good)} are likely and well rewarded."
        )
    return [*says, "Why this row? Open any sample at the end of the page: it tells how it came to be there."]


def _rollouts(m: Manifest) -> pl.LazyFrame:
    return m.scan("completions").filter(origin="policy")


def _origins(m: Manifest) -> dict[str, int]:
    found = counts(m.scan("samples"), "origin")
    return {origin: found.get((origin,), 0) for origin in ("current", "replay", "augmented")}


def _what(m: Manifest, newest: str) -> str:
    current, replay, rewrites = _origins(m).values()
    return (
        f"Training data for the task “{short(newest)}”, number {m.tasks.height} of a stream: {plural(current, 'row')} "
        f"of it, and {plural(replay, 'row')} of the tasks before it, replayed so that they are not forgotten"
        + (f", with {plural(rewrites, 'rewrite')} of such rows." if rewrites else ".")
    )


def _risk(tasks: pl.DataFrame, newest: str) -> list[str]:
    far = tasks.filter(pl.col("distance").is_not_null()).sort("distance", "stage", descending=[True, False])
    if not far.height:
        return []
    first, last = far.row(0, named=True), far.row(-1, named=True)
    near = f"; “{short(last['task'])}” is nearest ({real(last['distance'])})" if far.height > 1 else ""
    return [
        f"What is most at risk? By distance, “{short(first['task'])}”: its instructions lie {real(first['distance'])} "
        f"from those of “{short(newest)}”, the farthest of {plural(far.height, 'task')}{near}."
    ]


def _picked(m: Manifest, tasks: pl.DataFrame) -> str:
    previous, replay = tasks.filter(pl.col("quota").is_not_null()), m.provenance["replay"]
    if not previous.height:
        return "Nothing was there to replay: the stream has one task."
    granted, rows = (int(previous[c].sum()) for c in ("granted", "rows"))
    most = previous.sort("granted", "stage", descending=[True, False]).row(0, named=True)
    return (
        f"What was picked? {count(granted)} of {count(replay['asked'])} rows asked, of {count(rows)} "
        f"that the older tasks have, by the selector {replay['selector']}: {replay['about']}."
        + (f" The most, {count(most['granted'])}, are of “{short(most['task'])}”." if granted else "")
    )
