"""The map of a stream: principal components whose sign and digits are fixed."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_manifest import made

from curate.manifest import Manifest, read, write
from curate.manifest.check import _map
from curate.map import coordinates


def points(seed, n=40, d=8):
    return (np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(3, 1, d)).astype(np.float32)


@given(st.integers(0, 50))
def test_they_are_the_first_two_principal_components(seed):
    x = points(seed)
    centred = x.astype(np.float64) - x.mean(axis=0)
    u, s, axes = np.linalg.svd(centred, full_matrices=False)
    places, variance = coordinates(x.copy())
    assert variance == pytest.approx((s**2 / (s**2).sum())[:2], abs=1e-3)
    for k in (0, 1):
        sign = np.sign(axes[k][np.abs(axes[k]).argmax()])  # the component of largest size is positive
        assert places[:, k] == pytest.approx(sign * u[:, k] * s[k], abs=2e-3)


def test_order_and_offset_change_nothing():
    x = points(1)
    places, variance = coordinates(x.copy())
    order = np.random.default_rng(0).permutation(len(x))
    moved, same = coordinates(x[order] + np.float32(0.5))
    assert np.allclose(moved, places[order], atol=2e-4) and same == pytest.approx(variance, abs=1e-4)


@pytest.mark.parametrize(
    "x", [np.zeros((0, 0)), np.zeros((3, 4)), np.ones((1, 4)), np.array([[1.0], [3.0]]), np.ones((5, 2))]
)
def test_what_has_no_extent_lies_in_the_middle(x):
    places, variance = coordinates(x.astype(np.float32))
    assert places.shape == (len(x), 2) and places.dtype == np.float32 and np.isfinite(places).all()
    assert len(variance) == 2 and all(0 <= v <= 1 for v in variance)
    if x.shape != (2, 1):
        assert not places.any() and variance == [0, 0]
    else:
        assert places[:, 0].tolist() == [-1, 1] and variance == [1, 0]


def test_check_knows_half_a_place_and_half_a_map(tmp_path):
    m = made(tmp_path / "run", samples=60)
    assert list(_map(m)) == []

    def without(column, rows):
        gone = pl.when(pl.int_range(pl.len()) < rows).then(None).otherwise(pl.col(column)).alias(column)
        return Manifest(**{**vars(m), "instructions": m.instructions.with_columns(gone)})

    assert any("one of its coordinates" in fault for fault in _map(without("y", 1)))
    assert any("is null for 2 of" in fault for fault in _map(without("x", 2)))


def test_a_manifest_of_schema_1_1_has_no_map(tmp_path, monkeypatch):
    m = made(tmp_path / "run", samples=60)
    frames = {name: getattr(m, name) for name in ("samples", "completions", "tasks", "instructions", "tags")}
    frames |= {"augmentations": m.augmentations, "drops": m.drops}
    write(tmp_path / "old", frames, {k: v for k, v in m.provenance.items() if k not in ("rows", "outputs")}, "# card\n")
    old = pl.read_parquet(tmp_path / "old/instructions.parquet").drop("x", "y")
    old.write_parquet(tmp_path / "old/instructions.parquet")
    path = tmp_path / "old/provenance.json"
    path.write_text(path.read_text().replace('"schema_version": "1.2"', '"schema_version": "1.1"'))
    assert read(tmp_path / "old", verify=False).instructions["x"].null_count() == old.height
