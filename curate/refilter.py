"""`refilter`: another θ for the rewrites of a manifest, decided from their stored scores. No model is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from curate.assemble import counted, with_augmentations
from curate.augment import decided
from curate.errors import InputError
from curate.folder import locked
from curate.manifest import Manifest, read, write
from curate.manifest.card import card
from curate.manifest.schema import TABLES, content_hash
from curate.report import write_report
from curate.storage import Place

DERIVED = ("schema_version", "rows", "outputs")  # what `write` adds to a provenance


def refilter(run: str | os.PathLike[str], theta: float, out: str | os.PathLike[str] | None = None) -> Manifest:
    """The manifest with the rewrites that pass `theta`: the Parquet bytes that a build with that θ would have given.

    Args:
        run: folder of a manifest with augmentations, or its URL.
        theta: a rewrite stays where MI(x, x̂) · MI(y, ŷ) > theta, 0 to 1.
        out: where the new manifest goes; None = in place of the old one, which stays whole until the new one is
            written and its files are renamed. (A kill within those few renames leaves an unfinished manifest; the same
            build makes it again from its cache.)

    Raises:
        InputError: the manifest has no rewrites, or theta is not within 0 and 1.
        ManifestError: `run` is not a sound manifest.
    """
    if not 0 <= theta <= 1:
        raise InputError(f"theta {theta:g}: it must be within 0 and 1 (identity scores 1)")
    manifest = read(run)
    facts = manifest.provenance.get("augment")
    if not facts:
        raise InputError(
            f"{run}: no rewrites to decide about", remedy="build with an `augment` section: augment.per_task=100"
        )
    place = Place(out if out is not None else run)
    with place.claimed({}), locked(place.folder, None, {}):
        frames, provenance = _decided(manifest, float(theta))
        write(place.folder, frames, provenance, partial(card, provenance=provenance))
        moved = read(place.folder)
        write_report(moved)
        place.publish()
    return moved


def _decided(manifest: Manifest, theta: float) -> tuple[dict[str, Any], Mapping[str, Any]]:
    frames: dict[str, Any] = {name: manifest.scan(name) for name in TABLES}
    frames["augmentations"] = decided(manifest.augmentations, theta)
    frames = with_augmentations(frames, theta)
    frames["tasks"] = counted(frames)
    kept = {key: value for key, value in manifest.provenance.items() if key not in DERIVED}
    config = {**kept["config"], "augment": {**kept["config"]["augment"], "theta": theta}}
    key = content_hash([kept.get("build_key"), "refilter", theta])
    return frames, {**kept, "config": config, "augment": {**kept["augment"], "theta": theta}, "build_key": key}
