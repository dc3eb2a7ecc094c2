import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.score import insinfo

tag_sets = st.lists(st.sets(st.sampled_from("abcdef")), min_size=1, max_size=20)


def test_golden(golden):
    g = golden["insinfo"]
    assert np.allclose(insinfo(g["tags"]), g["own"], atol=1e-9, rtol=0)
    assert np.allclose(insinfo(g["tags"], g["pool"]), g["in_pool"], atol=1e-9, rtol=0)


def test_by_hand():
    # N = 4; f(code) = 2, f(sql) = 1: log(4/2) + log(4/1) = log 8
    got = insinfo([{"code", "sql"}, {"code"}, set(), {"maths"}])
    assert got.tolist() == pytest.approx([math.log(8), math.log(2), 0, math.log(4)], abs=1e-12)


def test_a_tag_everywhere_tells_nothing():
    assert insinfo([{"x"}, {"x"}]).tolist() == [0, 0]


def test_repeats_count_once():
    assert insinfo([["a", "a"], ["b"]]).tolist() == insinfo([{"a"}, {"b"}]).tolist()


@given(tag_sets)
def test_never_negative_and_zero_without_tags(tags):
    got = insinfo(tags)
    assert np.all(got >= 0)
    assert all(value == 0 for value, one in zip(got, tags, strict=True) if not one)


@given(tag_sets, st.integers(2, 4))
def test_a_pool_repeated_gives_the_same(tags, times):
    assert np.allclose(insinfo(tags, tags * times), insinfo(tags), atol=1e-12)


@given(tag_sets)
def test_a_subset_of_tags_never_tells_more(tags):
    less = [set(sorted(one)[:-1]) for one in tags]
    assert np.all(insinfo(less, tags) <= insinfo(tags) + 1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="'b' is not in the pool"):
        insinfo([{"b"}], [{"a"}])
    with pytest.raises(ValueError, match="not of strings"):
        insinfo(["code"])
    assert insinfo([]).tolist() == []
