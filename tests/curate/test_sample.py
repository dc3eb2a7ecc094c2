import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.sample import (
    SELECTORS,
    Context,
    Pool,
    allocate,
    draw_highest,
    draw_insinfo,
    draw_uniform,
    generator,
    shares,
)

scores = st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=1, max_size=30)


def test_golden(golden):
    for case in golden["allocate"]:
        got = allocate(case["scores"], case["total"], case["capacity"])
        assert got.sum() == case["granted"]
        assert np.allclose(shares(case["scores"], case["total"], case["capacity"]), case["share"], atol=1e-9, rtol=0)
        assert np.all(np.abs(got - case["share"]) < 1)
        assert case["capacity"] is None or np.all(got <= case["capacity"])


def test_largest_remainder_by_hand():
    # 7 rows over 3 : 2 : 1 = 3.5, 2.333, 1.167; floors 3 + 2 + 1 = 6, the last row goes to the remainder .5
    assert allocate([3, 2, 1], 7).tolist() == [4, 2, 1]


def test_equal_remainders_go_to_the_earlier():
    # 1/3 each; one row
    assert allocate([1, 1, 1], 1).tolist() == [1, 0, 0]


def test_systematic_rounding_by_hand():
    """7 rows over 3 : 2 : 1 = 3.5, 2.333, 1.167; floors 3, 2, 1; one row left, by the remainders .5, .333, .167.

    4,000 generators: the standard error of a mean quota is √(.5 · .5 / 4000) = 0.008 at most.
    """
    got = np.array([allocate([3, 2, 1], 7, rng=np.random.default_rng(seed)) for seed in range(4000)])
    assert np.unique(got, axis=0).tolist() == [[3, 2, 2], [3, 3, 1], [4, 2, 1]]
    assert np.allclose(got.mean(axis=0), [7 / 2, 7 / 3, 7 / 6], atol=0.03, rtol=0)


def test_systematic_rounding_below_a_row():
    """3 rows over 7 equal items: each gets one in 3 of 7 draws; by largest remainder the first three in all of them."""
    got = np.array([allocate([1] * 7, 3, rng=np.random.default_rng(seed)) for seed in range(4000)])
    assert np.allclose(got.mean(axis=0), 3 / 7, atol=0.03, rtol=0) and set(got.flat) == {0, 1}
    assert allocate([1] * 7, 3).tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_excess_flows_in_proportion_more_than_once():
    # 60 over 4 : 2 : 1 : 1 = 30, 15, 7.5, 7.5. The first is full at 6: 54 over 2 : 1 : 1 = 27, 13.5, 13.5.
    # Now the second is full at 20: 34 over 1 : 1 = 17, 17.
    assert allocate([4, 2, 1, 1], 60, [6, 20, 100, 100]).tolist() == [6, 20, 17, 17]


def test_zero_scores_are_served_last():
    # the second takes all it can hold (4), the first only what remains
    assert allocate([0, 1], 10, [50, 4]).tolist() == [6, 4]


@given(scores, st.integers(0, 5000), st.none() | st.integers(0, 2**32), st.data())
def test_sums_exactly_within_capacity_and_within_one(score, total, seed, data):
    capacity = data.draw(st.none() | st.lists(st.integers(0, 300), min_size=len(score), max_size=len(score)))
    rounding = None if seed is None else np.random.default_rng(seed)
    got, real = allocate(score, total, capacity, rounding), shares(score, total, capacity)
    assert got.sum() == (total if capacity is None else min(total, sum(capacity)))
    assert np.all(got >= 0)
    assert capacity is None or np.all(got <= capacity)
    assert np.all(np.abs(got - real) < 1 + 1e-6)


@given(scores, st.integers(0, 500), st.floats(1e-3, 1e3))
def test_only_proportions_matter(score, total, scale):
    assert np.allclose(shares(np.array(score) * scale, total), shares(score, total), atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize(
    ("scores_", "total", "capacity", "match"),
    [([1, -1], 2, None, "≥ 0"), ([1, np.nan], 2, None, "number 1 is nan"), ([1, np.inf], 2, None, "finite"),
     ([1], -1, None, "total"), ([1], 1.5, None, "total"), ([1], 2, [1, 2], "shape"), ([1], 2, [-1], "capacity"),
     ([1], 2, [0.5], "capacity"), ([[1]], 2, None, "vector")],
)  # fmt: skip
def test_refusals(scores_, total, capacity, match):
    with pytest.raises(ValueError, match=match):
        allocate(scores_, total, capacity)


def test_nothing_to_allocate():
    assert allocate([], 10).tolist() == []
    assert allocate([1, 2], 0).tolist() == [0, 0]


# --- draws ---


def pool(counts, **more):
    return Pool("t", np.repeat(np.arange(len(counts)), counts), **more)


def rng(seed=0):
    return generator(seed, 1, "t")


def test_insinfo_draw_by_hand():
    # 10 rows over InsInfo 3 : 1 : 1 are 6, 2, 2, and instruction 0 has only 4: the 2 too many go 1 : 1 to the others
    got = draw_insinfo(pool([4, 9, 9], scores=np.array([3.0, 1.0, 1.0])), 10, rng(), Context())
    assert got.quota.tolist() == got.granted.tolist() == [4, 3, 3]
    assert len(set(got.rows.tolist())) == 10


def test_all_zero_scores_are_uniform_over_instructions():
    got = draw_insinfo(pool([10, 10], scores=np.zeros(2)), 6, rng(), Context())
    assert got.granted.tolist() == [3, 3]


def test_clusters_share_by_their_mean():
    # clusters {0, 1} and {2}: mean InsInfo (1 + 3)/2 = 2 and 4, so 9 rows are 3 and 6
    p = pool([10, 10, 10], scores=np.array([1.0, 3.0, 4.0]), clusters=np.array([0, 0, 1]))
    got = draw_insinfo(p, 9, rng(), Context())
    assert got.granted[:2].sum() == 3
    assert got.granted[2] == 6


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 5))
def test_every_draw_keeps_its_promises(counts, n, seed):
    d = np.random.default_rng(seed).normal(size=(len(counts), 4)).astype(np.float32)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    rows = np.random.default_rng(seed).normal(size=(sum(counts), 4)).astype(np.float32)
    losses = np.where(rows[:, 0] > 1, np.nan, rows[:, 0])  # some could not be measured
    p = pool(counts, vectors=d, row_vectors=rows, scores=np.arange(len(counts), dtype=float), row_scores=losses)
    for name, selector in SELECTORS.items():
        got = selector.draw(p, min(n, p.rows), rng(seed), Context(d[:1], seed))
        assert len(got.rows) == (0 if name == "none" else min(n, p.rows))
        assert len(np.unique(got.rows)) == len(got.rows), "without replacement"
        assert np.bincount(p.instruction_of[got.rows], minlength=len(counts)).tolist() == got.granted.tolist()
        again = selector.draw(p, min(n, p.rows), rng(seed), Context(d[:1], seed))
        assert again.rows.tolist() == got.rows.tolist()


def test_the_highest_losses_are_drawn_and_unmeasured_rows_last():
    p = pool([3, 2], row_scores=np.array([1.0, np.nan, 3.0, 2.0, 3.0]))
    assert draw_highest(p, 3, rng(), Context()).rows.tolist() == [2, 3, 4]  # 3, 3 and 2
    assert draw_highest(p, 5, rng(), Context()).rows.tolist() == [0, 1, 2, 3, 4]
    assert draw_highest(p, 2, rng(), Context()).granted.tolist() == [1, 1]


def test_tasks_share_by_their_perplexity_ratio():
    # geometric means of the measured rows: √(1 · 4) = 2 and 4; a task without any lost nothing: 1
    pools = [pool([3], row_scores=np.array([1.0, 4.0, np.nan])), pool([1], row_scores=np.array([4.0])),
             pool([1], row_scores=np.array([np.nan]))]  # fmt: skip
    assert SELECTORS["perplexity_ratio"].shares(pools, None).tolist() == pytest.approx([2.0, 4.0, 1.0])


def test_a_larger_budget_keeps_the_smaller_ones_rows():
    p = pool([30, 30])
    small, large = (set(draw_uniform(p, n, rng(), Context()).rows.tolist()) for n in (10, 20))
    assert small < large


def test_uniform_is_uniform():
    # 2,000 draws of 2 out of 8: each row is expected 500 times; a binomial's deviation is √(2000·¼·¾) = 19.4
    hits = np.zeros(8)
    for seed in range(2000):
        hits[draw_uniform(pool([5, 3]), 2, rng(seed), Context()).rows] += 1
    assert np.all(np.abs(hits - 500) < 5 * 19.4)


def test_seed_stage_and_task_make_the_generator():
    first = [generator(*key).integers(1 << 60) for key in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]]
    assert len(set(first)) == 4
    assert generator(0, 1, "a").integers(1 << 60) == first[0]


def test_diverse_instruction_takes_the_least_alike_first():
    # cosine to the current (1, 0): 1, 0 and −1; five rows are the 3 of the last one and 2 of the second
    v = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    got = SELECTORS["diverse_instruction"].draw(pool([3, 3, 3], vectors=v), 5, rng(), Context(v[:1]))
    assert got.granted.tolist() == [0, 2, 3]


def test_prototype_data_takes_what_is_nearest_to_a_centre():
    # two clusters of rows at 0° and 90°, each with one straggler at 20°; centres lie near the pairs
    angle = np.radians([0, 0, 0, 25, 90, 90, 90, 65])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    got = SELECTORS["prototype_data"].draw(pool([4, 4], row_vectors=x), 6, rng(), Context())
    assert got.rows.tolist() == [0, 1, 2, 4, 5, 6]


def test_prototype_instruction_finds_the_two_groups():
    # two tight groups of three instructions; the middle one of each is nearest to its centre
    angle = np.radians([0, 5, 10, 90, 95, 100])
    v = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    got = SELECTORS["prototype_instruction"].draw(pool([4] * 6, vectors=v), 8, rng(), Context())
    assert got.granted.tolist() == [0, 4, 0, 0, 4, 0]


def test_task_shares():
    pools = [pool([3]), pool([5, 1])]
    distances = np.array([0.2, 0.6])
    assert SELECTORS["inscl"].shares(pools, distances).tolist() == [0.2, 0.6]
    assert SELECTORS["random"].shares(pools, None).tolist() == [3, 6]
    assert SELECTORS["uniform"].shares(pools, None).tolist() == [1, 1]
