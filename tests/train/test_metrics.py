import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import metrics

# Three tasks. Row 0 = before training.
R = [[0.1, 0.2, 0.3], [0.9, 0.4, 0.3], [0.5, 0.8, 0.1], [0.6, 0.2, 0.7]]


def test_golden(golden):
    g, k = golden["metrics"], golden["knowledge"]
    for name in ("average_performance", "backward_transfer", "forgetting", "forward_transfer"):
        assert getattr(metrics, name)(g["R"]) == pytest.approx(g[name], abs=1e-9)
    assert np.allclose(metrics.relative_gain(g["R"], g["upper"]), g["relative_gain"], atol=1e-9, rtol=0)
    assert metrics.knowledge_gain_ratio(k["before"], k["after"]) == pytest.approx(k["kgr"], abs=1e-9)
    assert metrics.knowledge_retention_ratio(k["before"], k["after"]) == pytest.approx(k["krr"], abs=1e-9)


def test_by_hand():
    assert metrics.average_performance(R) == pytest.approx((0.6 + 0.2 + 0.7) / 3)
    assert metrics.backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.2 - 0.8)) / 2)
    assert metrics.forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.2)) / 2)
    # task 2 before its stage: R[1][2] − R[0][2] = 0.4 − 0.2; task 3: R[2][3] − R[0][3] = 0.1 − 0.3
    assert metrics.forward_transfer(R) == pytest.approx((0.2 - 0.2) / 2)
    # against training alone: R[2][2] − 0.7 and R[3][3] − 0.9, so (0.1 − 0.2)/2
    assert metrics.forward_transfer_single_task(R, [1, 0.7, 0.9]) == pytest.approx(-0.05)
    # stage 2: 100·0.5/1; stage 3: 100·(0.6/1 + 0.2/0.8)/2
    assert metrics.relative_gain(R, [1, 0.8, 1]).tolist() == pytest.approx([50, 42.5])


@given(st.integers(2, 5), st.integers(0, 1000))
def test_forgetting_bounds_backward_transfer(t, seed):
    r = np.random.default_rng(seed).random((t + 1, t))
    assert metrics.forgetting(r) >= -metrics.backward_transfer(r) - 1e-12  # the best is at least the own stage's


def test_empty_sides_are_nan():
    assert math.isnan(metrics.knowledge_gain_ratio([True], [True]))
    assert math.isnan(metrics.knowledge_retention_ratio([False], [True]))


def test_refusals():
    for bad in ([[1, 2], [3, 4]], [1, 2], [[1], [2], [3]]):
        with pytest.raises(ValueError, match=r"\[T\+1, T\]"):
            metrics.average_performance(bad)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.forgetting([[0], [1]])
    with pytest.raises(ValueError, match="positive"):
        metrics.relative_gain(R, [1, 0, 1])
    with pytest.raises(ValueError, match="3 scores"):
        metrics.forward_transfer_single_task(R, [1, 1])
    with pytest.raises(ValueError, match="one length"):
        metrics.knowledge_gain_ratio([True], [True, False])


def test_command_line(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text("\n".join(",".join(map(str, line)) for line in R))
    done = subprocess.run([sys.executable, "-m", "train.cli", "metrics", str(file), "--upper", "1,0.8,1"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "forgetting                    0.4500" in done.stdout
    assert "forward transfer, zero-shot   0.0000" in done.stdout
    assert "50.00, 42.50" in done.stdout
    file.write_text("1,2\n3")
    bad = subprocess.run([sys.executable, "-m", "train.cli", "metrics", str(file)], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
