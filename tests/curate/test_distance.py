import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from curate.config import DistanceConfig
from curate.distance import side, wasserstein
from curate.distance import task_distance as between


def task_distance(a, b, wa, wb, config, seed):
    return between(side(a, wa, config, seed), side(b, wb, config, seed))


def cloud(seed, n, d=5):
    return np.random.default_rng(seed).normal(size=(n, d))


seeds, sizes = st.integers(0, 10_000), st.integers(1, 12)


def test_golden(golden):
    for case in golden["wasserstein"]:
        weighted = wasserstein(case["a"], case["b"], case["weights_a"], case["weights_b"])
        assert weighted == pytest.approx(case["value"], abs=1e-9)
        assert wasserstein(case["a"], case["b"]) == pytest.approx(case["uniform"], abs=1e-9)


def test_by_hand():
    # half of the mass at (1, 0) stays; half goes from (0, 1) to (1, 0) at a cost of 1 − 0 = 1
    assert wasserstein([[1, 0], [0, 1]], [[1, 0]]) == 0.5
    # weights 3 : 1 leave a quarter to move; the sum of the weights does not matter
    assert wasserstein([[1, 0], [0, 1]], [[1, 0]], weights_a=[3, 1]) == 0.25
    # opposite vectors: 1 − (−1) = 2, the largest value
    assert wasserstein([[1, 0]], [[-3, 0]]) == 2
    # on a line: {0, 1} to {2, 5}, the order stays: (2 + 4)/2
    assert wasserstein([[0.0], [1.0]], [[2.0], [5.0]], metric="euclidean") == pytest.approx(3, abs=1e-12)


@given(seeds, sizes)
def test_to_itself_it_is_exactly_zero(seed, n):
    a = cloud(seed, n)
    assert wasserstein(a, a) == 0
    assert wasserstein(a, a[::-1] * 7.3) < 1e-12  # neither order nor length of a vector matters


@given(seeds, sizes, sizes)
def test_symmetric_and_in_range(seed, n, m):
    a, b = cloud(seed, n), cloud(seed + 1, m)
    assert wasserstein(a, b) == pytest.approx(wasserstein(b, a), abs=1e-12)
    assert 0 <= wasserstein(a, b) <= 2


@given(seeds, sizes)
def test_equals_the_best_assignment(seed, n):
    a, b = cloud(seed, n), cloud(seed + 1, n)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    cost = 1 - unit[0] @ unit[1].T
    assert wasserstein(a, b) == pytest.approx(cost[linear_sum_assignment(cost)].mean(), abs=1e-9)


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=6), sizes)
def test_weights_are_repetition(seed, times, m):
    a, b = cloud(seed, len(times)), cloud(seed + 1, m)
    assert wasserstein(a, b, times) == pytest.approx(wasserstein(np.repeat(a, times, axis=0), b), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(20, 60), st.integers(20, 60), st.integers(2, 15))
def test_the_bound_holds(seed, n, m, k):
    a, b = cloud(seed, n), cloud(seed + 1, m) + 0.5
    wa, wb = np.random.default_rng(seed).integers(1, 9, n), np.random.default_rng(seed + 2).integers(1, 9, m)
    exact = wasserstein(a, b, wa, wb)
    got = task_distance(a, b, wa, wb, DistanceConfig(max_points=16, centroids=k), seed)
    assert got.method == "centroids"
    assert abs(got.value - exact) <= got.bound + 1e-9


def test_exact_up_to_the_limit():
    a, b = cloud(0, 16), cloud(1, 16)
    got = task_distance(a, b, np.ones(16), np.ones(16), DistanceConfig(max_points=16), 0)
    assert got.method == "exact"
    assert got.bound == 0
    assert got.value == wasserstein(a, b)


def test_as_many_centroids_as_points_lose_nothing():
    a, b = cloud(0, 20), cloud(1, 10)
    got = task_distance(a, b, np.ones(20), np.ones(10), DistanceConfig(max_points=12, centroids=20), 0)
    assert got.value == pytest.approx(wasserstein(a, b), abs=1e-6)


def test_quantised_twice_is_the_same():
    a, b = cloud(0, 300), cloud(1, 300)
    both = [
        task_distance(a, b, np.ones(300), np.ones(300), DistanceConfig(max_points=64, centroids=32), 7) for _ in "ab"
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("a", "b", "more", "match"),
    [([[np.nan, 1]], [[1, 1]], {}, "a: row 0 holds NaN"), ([[1, 1]], [[0, 0]], {}, "b: row 0 is zero"),
     ([[1, 1]], [[1, 1, 1]], {}, "one dimension"), ([], [[1]], {}, "at least one row"),
     ([[1, 1]], [[1, 1]], {"weights_a": [0]}, "not all 0"), ([[1, 1]], [[1, 1]], {"weights_a": [-1]}, "≥ 0"),
     ([[1, 1]], [[1, 1]], {"weights_b": [1, 2]}, "shape"), ([[1, 1]], [[1, 1]], {"metric": "cosin"}, "metric")],
)  # fmt: skip
def test_refusals(a, b, more, match):
    with pytest.raises(ValueError, match=match):
        wasserstein(a, b, **more)


def test_a_truncated_solve_is_an_error(monkeypatch):
    monkeypatch.setattr("curate.distance.MAX_ITERATIONS", 1)
    with pytest.raises(RuntimeError, match="did not prove optimality"):
        wasserstein(cloud(0, 50), cloud(1, 50))


def test_masses_whose_sum_is_infinite():
    x, y = np.eye(2), np.array([[1.0, 0.0]])
    assert wasserstein(x, y, weights_a=[1e308, 1e308]) == wasserstein(x, y) == 0.5  # half the mass at distance 1
