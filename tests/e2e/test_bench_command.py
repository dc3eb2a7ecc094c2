"""`make bench`: its list is all there is, and RESULTS.md changes where it should and nowhere else."""

import getpass
import platform
import re
import runpy
import sys
from datetime import date
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import called

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))

import bench  # noqa: E402
from bench import BENCHMARKS, Benchmark  # noqa: E402
from sections import Sections, markdown, without_names  # noqa: E402

from curate.errors import InputError  # noqa: E402

FILES = sorted({each.command.split()[0] for each in BENCHMARKS})
HAND = "# Measured\n\nBy hand: ½ — `1e-3`\r\n\n## An older machine\n\n| a |\n| --- |\n| 1 |\n"
DAY = date(2026, 11, 5)


def test_list_names_every_benchmark():
    with_main = {f"benchmarks/{f.name}" for f in FOLDER.glob("*.py") if "__main__" in f.read_text(encoding="utf-8")}
    assert set(FILES) == with_main - {"benchmarks/bench.py"}
    assert len({each.name for each in BENCHMARKS}) == len(BENCHMARKS)


@pytest.mark.parametrize("file", FILES)
def test_each_answers_help_and_knows_its_options(file):
    done = called(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"), "--help")
    assert (done.returncode, done.stdout[:6]) == (0, "usage:")
    options = {w for each in BENCHMARKS if each.command.startswith(file) for w in each.command.split() if w[:2] == "--"}
    assert options <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_sections_are_replaced_entry_by_entry():
    text, names = Sections(HAND), ("first", "second")
    text.update("2 cores, A", {"second": "of A"}, dict.fromkeys(names, "no GPU"), DAY)
    a = (f"{HAND}\n<!-- bench: 2-cores-a -->\n## 2 cores, A; 5 November 2026\n\nWritten by `make bench`. Not measured "
         "here: first (no GPU).\n\n### second\n\nof A\n\n<!-- /bench -->\n")  # fmt: skip
    assert text.text == a
    text.update("8 cores, B", {"second": "of B", "first": "of B"}, dict.fromkeys(names, ""), DAY)
    b = ("\n<!-- bench: 8-cores-b -->\n## 8 cores, B; 5 November 2026\n\nWritten by `make bench`.\n\n### first\n\n"
         "of B\n\n### second\n\nof B\n\n<!-- /bench -->\n")  # fmt: skip
    assert text.text == a + b
    later = date(2026, 12, 1)  # one entry of the first machine anew, one that has left the list: it stays
    text.update("2 cores, A", {"first": "new"}, {"first": ""}, later)
    assert text.text == (
        f"{HAND}\n<!-- bench: 2-cores-a -->\n## 2 cores, A; 1 December 2026\n\nWritten by `make bench`.\n\n"
        f"### first\n\nnew\n\n### second\n\nof A\n\n<!-- /bench -->\n{b}"
    )


@pytest.mark.parametrize("damage", ["<!-- /bench -->\n", "<!-- bench: 2-cores -->\n"])
def test_damaged_marks_are_refused_before_anything_runs(tmp_path, damage):
    text = Sections(HAND)
    text.update("2 cores", {"a": "1"}, {}, DAY)
    results = tmp_path / "RESULTS.md"
    results.write_text(text.text.replace(damage, ""), encoding="utf-8")
    with pytest.raises(InputError, match=r"RESULTS\.md: the first or last line of a section is missing"):
        bench.main(["--results", str(results)], [], tmp_path)


def test_output_becomes_tables_and_text():
    printed = "| a |\n| --- |\n<!-- ours: 3 -->\n| 1 |\n\n### 16 of 16\n  won\n{'loss': 1.0}\n"
    assert markdown(printed) == "| a |\n| --- |\n| 1 |\n\n    ### 16 of 16\n      won"


@pytest.mark.parametrize(("printed", "published"), [
    ("1.2G\t/opt/made/million-1/runs", "1.2G\truns"),
    ("in '/opt/x/rows.jsonl', file:///opt/x/y.py:12", "in 'rows.jsonl', y.py:12"),
    ("/home/a b/data/superni/misc.gz and --out=/home/a b/data/", "misc.gz and --out=data"),
    ("tokens/s, 3/4, a / b, positive/negative, s3://bucket/a/b, http://localhost:80/v1/x", None),
    (f"{platform.node()}-1: {getpass.getuser()}@{platform.node()}", "host-1: user@host"),
])  # fmt: skip
def test_nothing_of_the_machine_is_published(printed, published):
    assert without_names(printed, [Path("/home/a b/data")]) == (printed if published is None else published)


@pytest.fixture
def made(tmp_path):
    """made({name: (source, Benchmark's arguments)}) -> the list, its scripts written; tmp_path/RESULTS.md is there."""
    (tmp_path / "RESULTS.md").write_text(HAND, encoding="utf-8", newline="")

    def write(scripts):
        for name, (source, _) in scripts.items():
            (tmp_path / f"{name}.py").write_text(source)
        return [Benchmark(name, more.pop("command", f"{name}.py"), f"what {name} does", 1, **more)
                for name, (_, more) in scripts.items()]  # fmt: skip

    return write


def run(root, benchmarks, *words):
    return called(lambda: sys.exit(bench.main(["--results", str(root / "RESULTS.md"), *words], benchmarks, root)))


def test_a_run(tmp_path, made):
    """One of each kind: measured, failed, without its data, without its package, without a GPU, with a preparation."""
    data = tmp_path / "the data"
    data.mkdir()
    (data / "rows").write_text("7")
    benchmarks = made({
        "good": ("import sys\nprint('| n |\\n| --- |')\nprint('|', open(sys.argv[1] + '/rows').read(), '|')\n"
                 "print(sys.argv[1], __file__)", {"command": "good.py {data}", "peer": "another", "data": ("rows",)}),
        "bad": ("import sys\nprint('| half |')\nprint('at the end', file=sys.stderr)\nsys.exit(3)", {}),
        "no_rows": ("", {"data": ("rows", "more")}),
        "no_package": ("", {"modules": ("json", "not_there")}),
        "no_program": ("", {"programs": ("python3|sh", "not-there|nor-this")}),
        "prepared": ("import os, sys\nprint(os.listdir(sys.argv[1]))",
                     {"command": "prepared.py {out}", "prepare": "make.py {out}/made"}),
    })  # fmt: skip
    (tmp_path / "make.py").write_text("import os, sys\nos.makedirs(sys.argv[1])")
    with patch("bench._gpus", return_value=["NVIDIA H200", "NVIDIA H200"]):
        done = run(tmp_path, benchmarks, "--data", str(data))
    assert done.returncode == 1
    for said in ("3 of 6 benchmarks, about 3 min", "cannot run here: no_rows: not in DATA: more",
                 "cannot run here: no_package: not installed: not_there", "[3 of 3] prepared, about 1 min",
                 "cannot run here: no_program: not installed: not-there or nor-this", "2 of 3 measured in",
                 "bad failed with status 3 after", "  | half |\n"):  # fmt: skip
        assert said in done.stdout
    assert re.search(r"bad failed(.|\n)*  at the end\n", done.stdout)
    assert not (tmp_path / "runs/bench/prepared").exists()
    text = (tmp_path / "RESULTS.md").read_bytes().decode()
    assert text.startswith(HAND)
    today = date.today()
    assert re.search(rf"## \d+ cores, \d+ GiB, .+, 2 × NVIDIA H200, .+, Python 3\.\d+, torch .+; {today.day} ", text)
    assert ("Not measured here: bad (failed); no_rows (not in DATA: more); no_package (not installed: not_there); "
            "no_program (not installed: not-there or nor-this).\n") in text  # fmt: skip
    good = text.partition("### good\n\n")[2].partition("### prepared\n\nWhat prepared does.\n")[0]
    command = r"`(OMP_NUM_THREADS=\d+ )?python good\.py DATA`: \d s, .+\."
    table = r"\| n \|\n\| --- \|\n\| 7 \|"
    assert re.fullmatch(rf"What good does\. Peer: another\.\n\n{command}\n\n{table}\n\n    the data good\.py\n\n", good)
    assert "    ['made']\n" in text
    assert str(tmp_path) not in text and "half" not in text


def test_a_failure_keeps_the_older_entry(tmp_path, made):
    benchmarks = made({"turns": ("print('fine')", {}), "other": ("print('of the other')", {})})
    assert run(tmp_path, benchmarks).returncode == 0
    before = (tmp_path / "RESULTS.md").read_bytes()
    (tmp_path / "turns.py").write_text("raise SystemExit('broken')")
    done = run(tmp_path, benchmarks, "--only", "turns")
    assert done.returncode == 1 and "  broken" in done.stdout
    assert (tmp_path / "RESULTS.md").read_bytes() == before and b"fine" in before and b"of the other" in before
    assert [f.name for f in tmp_path.glob(".RESULTS*")] == []  # nothing half written


def test_what_is_named_must_be_there(tmp_path, made):
    benchmarks = made({"gpu": ("", {"gpu": True})})
    with patch("bench._gpus", return_value=[]):
        assert run(tmp_path, benchmarks).returncode == 0  # nothing failed
        asked = run(tmp_path, benchmarks, "--only", "gpu")
        assert asked.returncode == 1 and "cannot run here: gpu: no GPU" in asked.stdout
    wrong = run(tmp_path, benchmarks, "--only", "gpus")
    assert wrong.returncode == 2 and "no benchmark gpus; there are gpu" in wrong.stderr
    assert "no such folder" in run(tmp_path, benchmarks, "--data", str(tmp_path / "none")).stderr
    listed = run(tmp_path, benchmarks, "--list").stdout
    assert "what gpu does" in listed
    assert (tmp_path / "RESULTS.md").read_bytes().decode() == HAND


def test_minutes_left_follow_what_was_measured():
    """Two of 1 and 3 rough minutes took 8 in all, twice as long; the rest of 5 and 2 then takes 2 · 7."""
    of = [Benchmark("", "", "", minutes) for minutes in (1, 3, 5, 2)]
    assert bench.minutes_left(of, []) == 11
    assert bench.minutes_left(of[2:], [(of[0], 60.0), (of[1], 420.0)]) == 14
