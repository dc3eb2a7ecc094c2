import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from train import metrics
from train.cli import app
from train.evaluate import read_matrix, write_matrix

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


def test_the_version_and_an_example_a_command():
    assert CliRunner().invoke(app, ["--version"]).output.startswith("rehearse ")
    for command, example in (("stream", "train.learning_rate=1e-3"), ("eval", "metric=exact"), ("fisher", "samples=")):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert f"{example}" in shown and "data=runs/superni learning_rate=1e-5" not in shown


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


def asked(*words):
    return CliRunner().invoke(app, ["metrics", *map(str, words)])


def test_what_eval_writes_and_bare_numbers_are_the_same_matrix(tmp_path):
    named, bare = tmp_path / "matrix.csv", tmp_path / "bare.csv"
    write_matrix(named, ["start", "=1+1", "a,b\nc", "@d"], ["x", "-y", 'z,"q'], np.array(R))
    bare.write_text("\ufeff" + "\n".join(" , ".join(map(str, line)) for line in R) + "\n\n", encoding="utf-8")
    assert named.read_text().startswith('checkpoint,x,\'-y,"z,""q"\nstart,') and "\n'=1+1," in named.read_text()
    assert read_matrix(named) == read_matrix(bare) == R
    found = [json.loads(asked(file, "--upper", "1,0.8,1", "--json").stdout) for file in (named, bare)]
    assert found[0] == found[1] and found[0]["relative_gain"] == pytest.approx([50, 42.5])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\nnan\n", "line 2, column 1: 'nan'"),
        ("0,1\n1,-inf\n1,1\n", "line 2, column 2: '-inf'"),
        ("checkpoint,x\na,0\nb,much\n", "line 3, column 2: 'much'"),
        ("0\n1_0\n", "line 2, column 1: '1_0'"),
        ("0,1\n1,1\n1\n", "line 3: 1 cells, and the first line has 2"),
        ("0,1\n1,\n1,1\n", "line 2, column 2: ''"),
        ("", "no scores"),
        ("checkpoint,x\n", "not of shape"),
        ("1,2\n3,4\n", "not of shape"),
        ("0," + "9" * 200_000, "field larger"),
        ("\x1b[2J\n1\n", r"'\x1b[2J'"),
        ("0,0\n1e308,0\n-1e308,0\n", "backward_transfer is beyond"),  # -1e308 - 1e308
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, text, said):
    file = tmp_path / "r.csv"
    file.write_text(text)
    before = csv.field_size_limit(131_072)  # Python's own; datasets, which other tests import, lifts it
    done = asked(file, "--json")
    csv.field_size_limit(before)
    assert done.exit_code == 1 and said in done.stderr and not done.stdout


def test_bytes_that_are_no_text_and_no_file(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "r.csv", tmp_path, tmp_path / "none.csv"):
        done = asked(path)
        assert done.exit_code == 1 and "cannot be read as CSV" in done.stderr


@pytest.mark.parametrize("upper", ["0", "nan", "inf", "x", "", "1,1", "-1"])
def test_upper_is_looked_at_with_one_task_too(tmp_path, upper):
    (tmp_path / "r.csv").write_text("0\n1\n")
    done = asked(tmp_path / "r.csv", "--upper", upper)
    assert done.exit_code == 1 and "not 1 positive numbers" in done.stderr
    assert asked(tmp_path / "r.csv", "--upper", "0.5").exit_code == 0


@pytest.mark.parametrize("metric", [metrics.knowledge_gain_ratio, metrics.knowledge_retention_ratio])
def test_an_answer_is_right_or_wrong(metric):
    assert metric([0, 1], [1, 1]) == 1.0
    for before, after, named in (([math.nan, 0], [1, 1], "before"), ([1, 0], [0.5, 1], "after")):
        with pytest.raises(ValueError, match=f"{named} must hold right"):
            metric(before, after)
