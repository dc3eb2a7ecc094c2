import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.manifest import Bucket, Rule, Stats, classify

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40)


def test_golden(golden):
    g = golden["buckets"]
    stats = Stats.of(g["logp"], g["reward"])
    z_p, z_r = stats.z(g["logp"], g["reward"])
    assert np.allclose(z_p, g["z_p"], atol=1e-9, rtol=0)
    assert np.allclose(z_r, g["z_r"], atol=1e-9, rtol=0)
    assert classify(g["logp"], g["reward"], stats, g["k"]).tolist() == g["bucket"]


def test_moments_by_hand():
    # mean (1 + 2 + 6)/3 = 3, variance ((−2)² + (−1)² + 3²)/3 = 14/3: the divisor is n
    stats = Stats.of([1, 2, 6], [0, 0, 0])
    assert stats.logp_mean == 3
    assert stats.logp_std == pytest.approx((14 / 3) ** 0.5, abs=1e-12)
    assert stats.reward_std == 0


def test_inequalities_are_strict():
    # σ = 1, μ = 0: z is the value itself; z = k is normal on either axis
    unit = Stats(0.0, 1.0, 0.0, 1.0, 2)
    assert classify([0.5, 0.51, 0.51, -0.5], [0.51, 0.5, 0.51, -0.51], unit, 0.5).tolist() == [
        "normal", "normal", "high_performance", "normal",
    ]  # fmt: skip


def test_all_five_by_hand():
    unit = Stats(0.0, 1.0, 0.0, 1.0, 5)
    got = classify([1, 1, -1, -1, 0], [1, -1, 1, -1, 5], unit, 0.5)
    assert got.tolist() == ["high_performance", "overfitting", "high_variance", "noisy", "normal"]
    assert {Bucket(b) for b in got} == set(Bucket)


@pytest.mark.parametrize("value", [np.nan, None])
def test_what_cannot_be_judged_is_normal(value):
    logp, reward = [value, -1.0, -2.0, -9.0], [1.0, value, 2.0, -9.0]
    stats = Stats.of(logp, reward)
    assert stats.n == 2  # rows 3 and 4
    assert classify(logp, reward, stats, 0.0)[:2].tolist() == ["normal", "normal"]


@pytest.mark.parametrize(
    ("logp", "reward"), [([-1.0], [2.0]), ([0.1] * 3, [1.0, 2.0, 3.0]), ([], []), ([np.nan], [np.nan])]
)
def test_no_deviation_is_normal(logp, reward):
    # 3 × 0.1 does not have a mean of exactly 0.1 in floating point: σ must still be exactly 0
    assert set(classify(logp, reward, Stats.of(logp, reward), 0.0)) <= {"normal"}


@given(pairs, st.floats(0.1, 10), st.floats(-5, 5), st.floats(0, 2))
def test_the_unit_of_reward_does_not_matter(rows, scale, shift, k):
    logp, reward = np.array(rows).T
    other = reward * scale + shift
    stats, z = Stats.of(logp, reward), Stats.of(logp, reward).z(logp, reward)
    if stats.reward_std < 1e-6 or min(np.abs(np.abs(z[1]) - k)) < 1e-6:  # at the edge the last bit decides
        return
    same = classify(logp, other, Stats.of(logp, other), k)
    assert same.tolist() == classify(logp, reward, stats, k).tolist()


@given(pairs, st.randoms(), st.floats(0, 2))
def test_the_order_of_rows_does_not_matter(rows, random, k):
    order = list(range(len(rows)))
    random.shuffle(order)
    logp, reward = np.array(rows).T
    bucket = classify(logp, reward, Stats.of(logp, reward), k)
    shuffled = classify(logp[order], reward[order], Stats.of(logp[order], reward[order]), k)
    assert shuffled.tolist() == bucket[order].tolist()


def test_refusals():
    with pytest.raises(ValueError, match="one length"):
        Stats.of([1, 2], [1])
    with pytest.raises(ValueError, match="k must"):
        classify([1], [1], Stats.of([1], [1]), -1)
    with pytest.raises(ValueError, match="k must"):
        classify([1], [1], Stats.of([1], [1]), float("nan"))


def test_z_is_where_the_rule_sorts_by():
    # task a: P −1 and −3 (mean −2, σ 1), R 0 and 4 (2, 2); task b: one row, so no deviation; no reward: NaN, and normal
    rows = pl.DataFrame({
        "task": ["a", "b", "a", "a"], "token_logps": [[-1.0, -1.0], [-9.0], [-3.0], [-2.0]],
        "reward": [0.0, 5.0, 4.0, None],
    })  # fmt: skip
    z = Rule(k=0.5).z(rows)
    assert z.rows()[:3] == [(1.0, -1.0), (0.0, 0.0), (-1.0, 1.0)]
    assert z["z_p"][3] == 0.0 and np.isnan(z["z_r"][3])
    # the sum counts two tokens twice: −2, −9, −3, −2, and the population is everything with a reward
    every = Rule(k=0.5, logp="sum", population="all")
    assert z.equals(Rule(k=0.5).z(rows, Rule(k=0.5).assign(rows)[1]))
    p, r = np.array([-2.0, -9.0, -3.0]), np.array([0.0, 5.0, 4.0])
    got = every.z(rows)
    assert np.allclose(got["z_p"][:3], (p - p.mean()) / p.std()) and np.allclose(got["z_r"][:3], (r - 3) / r.std())
    bucket, stats = every.assign(rows)
    assert bucket.to_list()[:3] == classify(p, r, stats["all"], 0.5).tolist() and bucket[3] == "normal"


def test_z_of_other_moments_and_of_nothing():
    rows = pl.DataFrame({"task": ["a"], "token_logps": [[-1.0]], "reward": [3.0]})
    assert Rule(k=0.5).z(rows, {"a": Stats(-3.0, 2.0, 1.0, 4.0, 9)}).rows() == [(1.0, 0.5)]  # (−1 + 3)/2, (3 − 1)/4
    assert Rule(k=0.5).z(rows.clear()).height == 0
    with pytest.raises(KeyError, match="a"):
        Rule(k=0.5).z(rows, {"b": Stats(0.0, 1.0, 0.0, 1.0, 2)})


@pytest.mark.parametrize(("p", "r"), [(np.inf, 1.0), (1.0, -np.inf), (-np.inf, np.inf), (np.nan, 1.0)])
def test_what_is_not_finite_cannot_be_judged(p, r):
    assert classify([p], [r], Stats(0.0, 1.0, 0.0, 1.0, 4), 0.5).tolist() == ["normal"]


def test_rounding_is_no_spread():
    """0.1 + 0.2 differs from 0.3 by 6e-17: z_R of the first would be √3, of σ = 2.4e-17."""
    rewards, logps = [0.1 + 0.2, 0.3, 0.3, 0.3], [-1.0, -2.0, -3.0, -1.0]
    stats = Stats.of(logps, rewards)
    assert stats.reward_std == 0
    assert classify(logps, rewards, stats, 0.5).tolist() == ["normal"] * 4
