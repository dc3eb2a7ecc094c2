"""Whole streams through the real command line: a tiny Llama, real rows, two tasks, three stages deep at most."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from browser import MISSING, cut_off, js, unreadable, until, visit
from commands import called
from rich.console import Console
from test_run import ROOT, STARTER
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.errors import InputError
from curate.settings import checked
from train import metrics
from train.cli import main
from train.data import Examples
from train.evaluate import read_matrix
from train.stream.config import StreamConfig
from train.stream.pool import queue
from train.stream.results import difference, spread
from train.stream.run import prepared
from train.stream.screen import ends_table
from train.stream.stage import carry_out, write_files

TASKS = ("sentiment_analysis", "misc", "detection")
CLI = [sys.executable, "-m", "train.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with short real rows of three tasks, a tiny model, and the configuration of a stream of them."""
    folder = tmp_path_factory.mktemp("stream")
    for name in TASKS:
        with gzip.open(ROOT / f"examples/superni/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = sorted((json.loads(line) for line in file), key=lambda row: len(row["definition"] + row["input"]))
        kept = [r for split, n in (("train", 12), ("test", 4)) for r in [x for x in rows if x["split"] == split][:n]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(STARTER)  # its first layer: real embeddings, and quick
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "start")
    config = {
        "name": "tiny", "model": "start", "workers": 1, "seeds": [0],
        "tasks": [{"name": n, "path": f"{n}.jsonl", "format": "superni", "split": "train"} for n in TASKS[:2]],
        "replay": {"selector": "random", "budget": 4},
        "train": {"learning_rate": 0.003, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 1,
                  "max_length": 256, "too_long": "truncate"},
        "evaluation": {"split": "test", "metric": "rouge_l", "max_new_tokens": 4},
        "arms": {"none": {"replay.selector": "none"}, "random": {}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def done(place):
    """The stream, through: what the command said."""
    return called(main, "stream", "--config", "config.yaml", "out=out", cwd=place)


def digest(out):
    return hashlib.sha256((out / "results.parquet").read_bytes()).hexdigest()


def models(out):
    return {f.parent.parent.parent.name: hashlib.sha256(f.read_bytes()).hexdigest()
            for f in out.glob("stages/*/train/model/model.safetensors")}  # fmt: skip


def scored(stage):
    (folder,) = stage.glob("eval-*")
    return folder


def folders(out):
    return sorted(f.name for f in (out / "stages").iterdir())


def test_a_stream_from_end_to_end(place, done):
    assert done.returncode == 0, done.stderr
    assert "stream: 7 stages · 1 process" in done.stderr
    assert "7 of 7" in done.stderr and "left" in done.stderr, "how far it is, and how long it will take"
    table = pl.read_parquet(place / "out/results.parquet")
    assert sorted(set(table["run"])) == ["all tasks at once", "misc", "none", "random", "sentiment_analysis"]
    assert table.filter(kind="run").height == 2 * 3, "before training, and two stages, of two runs"
    last = table.filter(pl.col("kind") == "run", pl.col("stage") == 2)
    assert dict(last.select("run", "replay").iter_rows()) == {"none": 0, "random": 4}
    assert set(last["current"]) == {12}
    joint = table.filter(kind="joint", stage=1)
    assert joint["steps"].to_list() == [12] and joint["current"].to_list() == [24] and joint["task"].to_list() == [None]
    assert set(table.filter(pl.col("stage") > 0, pl.col("kind") != "joint")["steps"]) == {6}
    assert max(v for row in table["scores"].to_list() for v in row if v is not None) > 0, "something is learnt"
    for word in ("none", "random", "relative", "gain, %", "seeds"):
        assert word in done.stdout
    for name in ("stream.html", "curves.svg"):
        assert (place / "out" / name).stat().st_size > 1000


def test_tokens_are_those_of_the_rows_that_were_seen(place, done):
    table = pl.read_parquet(place / "out/results.parquet").filter(pl.col("stage") > 0)
    tokenizer = AutoTokenizer.from_pretrained(place / "start")
    for folder, tokens in table.unique("folder").select("folder", "tokens").iter_rows():
        stage = place / "out/stages" / folder
        said = json.loads((stage / "train/run.json").read_bytes())["settings"]["data"]
        rows = Examples.read([stage / data for data in said], tokenizer, max_length=256, too_long="truncate")
        length = dict(zip(rows.uids(range(len(rows))), rows.lengths.tolist(), strict=True))
        seen = pl.read_parquet(stage / "train/lineage.parquet")["uid"]
        assert len(seen) in (6 * 4, 12 * 4) and tokens == sum(length[uid] for uid in seen)


def test_metrics_are_those_of_the_scores(place, done):
    table = pl.read_parquet(place / "out/results.parquet")
    for name in ("none", "random"):
        rows = table.filter(run=name).sort("stage")
        r = np.array([[np.nan if v is None else v for v in scores] for scores in rows["scores"].to_list()])
        assert np.isnan(r[1, 1]), "a task to come is not scored"
        for stage, scores in enumerate(r):  # the items themselves
            items = pl.read_parquet(scored(place / "out/stages" / rows["folder"][stage]) / "items.parquet")
            for task, value in zip(TASKS[:2], scores, strict=True):
                mine = items.filter(task=task)["score"]
                assert np.isnan(value) if not mine.len() else value == pytest.approx(mine.mean(), abs=1e-12)
        end = rows.row(-1, named=True)
        alone = [table.filter(kind="single", run=task, stage=1)["scores"][0][0] for task in TASKS[:2]]
        assert end["upper"] == pytest.approx(alone)
        assert end["average_performance"] == pytest.approx(r[2].mean())
        assert end["backward_transfer"] == pytest.approx(r[2, 0] - r[1, 0])  # T - 1 = 1 older task
        assert end["forgetting"] == pytest.approx(r[1, 0] - r[2, 0])
        if alone[0] > 1e-9:
            assert end["relative_gain"] == pytest.approx(100 * r[2, 0] / alone[0])
        assert end["forward_transfer"] is None
        first, last = (pl.read_parquet(scored(place / "out/stages" / rows["folder"][stage]) / "items.parquet")
                       for stage in (0, 2))  # fmt: skip
        both = first.join(last, on="uid")
        right = both.filter("correct")
        assert end["ACC"] == pytest.approx(both["correct_right"].mean())
        assert end["KRR"] == (pytest.approx(right["correct_right"].mean()) if right.height else None)
        wrong = both.filter(~pl.col("correct"))
        assert end["KGR"] == (pytest.approx(wrong["correct_right"].mean()) if wrong.height else None)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(("width", "dark"), [(320, False), (1440, True)])
def test_the_page_in_a_browser(place, done, width, dark):
    """From a file, with the network off: plots are drawn, figures are the table's, nothing is wider than the window."""
    pytest.importorskip("selenium")
    table = pl.read_parquet(place / "out/results.parquet")
    ends = table.filter(pl.col("kind") == "run", pl.col("stage") == 2)
    with visit(place / "out/stream.html", width=width, dark=dark) as chrome:
        n = js(chrome, "return document.querySelectorAll('.canvas').length")
        assert n == 4, "gain, difference, and a matrix a run"
        for i in range(n):
            plot = f"document.querySelectorAll('.canvas')[{i}]"
            js(chrome, f"{plot}.scrollIntoView({{behavior: 'instant'}})")
            until(partial(js, chrome, f"return !!{plot}.querySelector('.main-svg')"))
        assert js(chrome, "return document.documentElement.scrollWidth") <= width
        assert unreadable(chrome) == [] and cut_off(chrome) == []
        rows = js(chrome, "return [...document.querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => "
                          "c.textContent))")  # fmt: skip
        for run in ends.iter_rows(named=True):
            (mine,) = [r for r in rows if r[0] == run["run"] and len(r) == 8 and r[-1] == "1"]
            shown = [(run[name], digits) for name, digits in (("relative_gain", 1), ("average_performance", 3),
                                                              ("backward_transfer", 3), ("forgetting", 3))]  # fmt: skip
            assert mine[1:5] == ["–" if v is None else f"{v:.{digits}f}" for v, digits in shown]


def test_what_is_read_ahead_is_what_the_builds_take(place, done):
    assert "reading sentiment_analysis.jsonl, split train" in done.stderr
    assert len([*(place / "out/cache/read").glob("*/summary.json")]) == 2 * 2, "each task's two splits, read once"


def test_what_is_done_is_not_done_again(place, done):
    before = {f: f.stat().st_mtime_ns for f in (place / "out/stages").rglob("model.safetensors")}
    was = digest(place / "out")
    again = called(main, "stream", "--config", "config.yaml", "out=out", "--quiet", cwd=place)
    assert again.returncode == 0 and not again.stdout + again.stderr
    assert {f: f.stat().st_mtime_ns for f in (place / "out/stages").rglob("model.safetensors")} == before
    assert digest(place / "out") == was


def test_a_stage_by_hand_is_the_streams(place, done, tmp_path):
    """The commands that --by-hand prints, run in the folders in their order, give the same table."""
    shutil.copytree(place, tmp_path / "p", ignore=shutil.ignore_patterns("out"))
    shown = called(main, "stream", "--config", "config.yaml", "out=out", "--by-hand", "arms={random: {}}",
                   "bounds={single: false, joint: false, none: false}", cwd=tmp_path / "p")  # fmt: skip
    assert shown.returncode == 0 and "train cft --config train.yaml" in shown.stdout, shown.stderr
    from curate.cli import main as curate

    assert shown.stdout.count("# behind held-out-") == 3 and "· random, seed 0" in shown.stdout
    where = None
    for line in filter(None, shown.stdout.splitlines()):
        program, *words = shlex.split(line, comments=True) or ["#"]
        if program == "cd":
            (where,) = words
        elif program != "#":
            made = called(curate if program == "curate" else main, *words, cwd=where)
            assert made.returncode == 0, made.stderr
    end = called(main, "stream", "--config", "config.yaml", "out=out", "arms={random: {}}",
                 "bounds={single: false, joint: false, none: false}", cwd=tmp_path / "p")  # fmt: skip
    assert "5 of them done" not in end.stderr and "4 stages, 4 of them done" in end.stderr
    columns = ["run", "seed", "stage", "task", "folder", "scores", "average_performance", "steps", "tokens", "replay"]
    mine, theirs = (pl.read_parquet(p / "results.parquet").filter(run="random").select(columns)
                    for p in (tmp_path / "p/out", place / "out"))  # fmt: skip
    assert mine.equals(theirs), "in another folder, by hand"


def test_again_from_a_stage(place, done, tmp_path):
    shutil.copytree(place, tmp_path / "p")
    out, was = tmp_path / "p/out", digest(place / "out")
    seconds = [f for f in folders(out) if f.startswith("2-")]
    assert len(seconds) == 2
    marks = [out / "stages" / name / "mine" for name in folders(out)]
    for mark in marks:
        mark.touch()
    again = called(main, "stream", "--config", "config.yaml", "out=out", "--stage", "2", cwd=tmp_path / "p")
    assert "2 stages removed, from stage 2 on: to be made again" in again.stderr, again.stderr
    assert [m.parent.name for m in marks if not m.exists()] == seconds, "those and no others"
    assert digest(out) == was
    wrong = called(main, "stream", "--config", "config.yaml", "out=out", "--stage", "1", "tasks.1.split=nope",
                   cwd=tmp_path / "p")  # fmt: skip
    assert wrong.returncode == 1 and "no row of split 'nope'" in wrong.stderr
    assert len(models(out)) == len(models(place / "out")), "nothing is removed before all is read"
    wrong = called(main, "stream", "--config", "config.yaml", "out=out", "--stage", "3", cwd=tmp_path / "p")
    assert wrong.returncode == 1 and "there are stages 1 to 2" in wrong.stderr


def ended(process, patience=60):
    try:
        process.wait(patience)
    finally:
        process.kill()


def test_killed_and_resumed_it_ends_with_the_same_table(place, done, tmp_path):
    """Twice: the process that plans, and so the one that trains, at moments drawn by a seed."""
    shutil.copytree(place, tmp_path / "p", ignore=shutil.ignore_patterns("out"))
    rng, out = random.Random(1), tmp_path / "p/out"
    words = [*CLI, "stream", "--config", "config.yaml", "out=out", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for kills in range(2):
        process = subprocess.Popen(words, cwd=tmp_path / "p", env=environment)
        start, reached = time.monotonic(), len(list(out.glob("stages/*/eval-*/metrics.json")))
        while len(list(out.glob("stages/*/eval-*/metrics.json"))) <= reached and time.monotonic() - start < 120:
            time.sleep(0.05)  # at least one stage further, then a moment inside the next
        time.sleep(rng.uniform(0, 1.5))
        assert process.poll() is None or kills, "killed while it runs"
        process.send_signal(signal.SIGKILL)
        ended(process)
    after = called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p")
    assert after.returncode == 0, after.stderr
    assert "of them done" in after.stderr
    assert digest(out) == digest(place / "out")
    assert models(out) == models(place / "out"), "bit for bit"


def test_a_stage_that_fails_says_which_and_what_is_done_stays(place, done, tmp_path):
    shutil.copytree(place, tmp_path / "p")
    out = tmp_path / "p/out"
    broken = next(f for f in folders(out) if f.startswith("2-"))
    shutil.rmtree(out / "stages" / broken / "train")
    (out / "stages" / broken / "seconds.json").unlink()
    shutil.rmtree(scored(out / "stages" / broken))
    (out / "stages" / broken / "train").write_text("a file in the way")
    failed = called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p")
    assert failed.returncode == 1
    assert f"stages/{broken}: out train: a file, not a folder" in failed.stderr
    assert re.search(r"^error: stage 2: misc · (none|random), seed 0: ", failed.stderr, re.M)
    table = pl.read_parquet(out / "results.parquet")
    ended_ = table.filter(pl.col("kind") == "run", pl.col("stage") == 2)
    assert ended_.height == 1, "the run that is through is in the table, the other as far as it came"
    (out / "stages" / broken / "train").unlink()
    assert called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p").returncode == 0
    assert digest(out) == digest(place / "out")


def test_stopped_by_ctrl_c_there_is_a_table_of_what_is_done(place, done, tmp_path):
    shutil.copytree(place, tmp_path / "p")
    out = tmp_path / "p/out"
    for folder in [*(out / "stages").glob("2-*"), *(out / "stages").glob("joint-*")]:
        shutil.rmtree(folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*CLI, "stream", "--config", "config.yaml", "out=out"], cwd=tmp_path / "p", env=env,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    assert process.stderr is not None
    said = ""
    while "4 of them done" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "of 7 stages are done and stay" in rest, rest
    table = pl.read_parquet(out / "results.parquet")
    assert table.filter(kind="run", stage=1).height == 2 and (out / "stream.html").is_file()


def test_the_table_of_another_configuration_is_not_replaced_in_silence(place, done, tmp_path):
    """A stream of one arm has not the other's second stage; a mistake without a stage replaces nothing."""
    shutil.copytree(place, tmp_path / "p")
    words = ("stream", "--config", "config.yaml", "out=out")
    changed = called(main, *words, "arms={none: {replay.selector: none}}", cwd=tmp_path / "p")
    assert changed.returncode == 0 and "holds 1 stage of another configuration" in changed.stderr, changed.stderr
    assert pl.read_parquet(tmp_path / "p/out/results.parquet")["arm"].drop_nulls().unique().to_list() == ["none"]
    back = called(main, *words, cwd=tmp_path / "p")
    assert back.returncode == 0 and "another configuration" not in back.stderr
    assert digest(tmp_path / "p/out") == digest(place / "out")
    wrong = called(main, *words, "train.max_length=20", "train.too_long=error", cwd=tmp_path / "p")
    assert wrong.returncode == 1 and digest(tmp_path / "p/out") == digest(place / "out")


def test_the_table_at_the_end_fits_a_narrow_terminal(done):
    """Also with a deviation in every cell."""
    columns = ("relative_gain", "average_performance", "backward_transfer")
    same = {"run": "inscl · ratio 0.05", "kind": "run", "stage": 2, "tasks": ["a", "b"], "replay": 1234}
    rows = [{**same, "seed": seed, **{name: (-88.8, -0.888)[name != "relative_gain"] + seed / 10 for name in columns}}
            for seed in (0, 1, 2)]  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(ends_table(pl.DataFrame(rows)))
    shown = console.file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^ *inscl .*  -88.7 ± 0.1 +-0.788 ± 0.100 +-0.788 ± 0.100 +1,234 +3", shown, re.M), shown


def test_a_file_in_the_way_is_one_line(place, tmp_path):
    for name in ("cache", "stages"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        made = called(main, "stream", "--config", "config.yaml", f"out={out}", cwd=place)
        assert made.returncode == 1 and "Traceback" not in made.stderr
        assert re.search(rf"^error: .*{out}/{name}.*\n  remedy: mend the path", made.stderr, re.M), made.stderr


def test_two_streams_at_one_place(place, done, tmp_path):
    from filelock import FileLock

    shutil.copytree(place, tmp_path / "p")
    with FileLock(tmp_path / "p/out/.lock"):
        second = called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p")
    assert second.returncode == 1 and "another run is writing into it" in second.stderr
    (tmp_path / "p/out/mine.txt").touch()
    foreign = called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p")
    assert foreign.returncode == 1 and "'mine.txt'" in foreign.stderr


def test_ewc_and_every_task(place, tmp_path):
    """Fisher of stage 1 is held in stage 2, and scores of tasks to come give forward transfer."""
    shutil.copytree(place, tmp_path / "p", ignore=shutil.ignore_patterns("out"))
    words = ["arms={ewc: {train.ewc.weight: 10}}", "evaluation.every_task=true", "evaluation.per_task=2",
             "bounds={single: false, joint: false, none: false}", "fisher.samples=4", "workers=2"]  # fmt: skip
    made = called(main, "stream", "--config", "config.yaml", "out=out", *words, cwd=tmp_path / "p")
    assert made.returncode == 0, made.stderr
    (second,) = (tmp_path / "p/out/stages").glob("2-*")
    said = json.loads((second / "train/run.json").read_bytes())
    (first,) = (tmp_path / "p/out/stages").glob("1-*")
    (fisher,) = first.glob("fisher-*")
    assert said["settings"]["ewc"] == {"weight": 10.0, "fisher": [f"../{first.name}/{fisher.name}"]}
    assert (fisher / "fisher.safetensors").is_file() and not [*second.glob("fisher-*")]
    table = pl.read_parquet(tmp_path / "p/out/results.parquet").sort("stage")
    r = table["scores"].to_list()
    assert table["forward_transfer"][2] == pytest.approx(r[1][1] - r[0][1])
    assert table["relative_gain"].null_count() == 3, "no task alone, no upper bound"
    assert table["average_performance"][2] == pytest.approx(metrics.average_performance(r))


@pytest.mark.parametrize(
    ("old", "new", "words", "says"),
    [
        ('"definition"', '"definition', (), r"held-out rows: misc.jsonl: row 2: not JSON"),
        (
            '"split": "test"',
            '"split": "train"',
            (),
            "held-out rows: .*misc.jsonl: no row of split 'test'; it has train",
        ),
        ("", "", ("arms={random: {replay.budget: 13}}",), "stage 2: misc: replay.budget 13 is above the 12 rows"),
    ],
)
def test_a_fault_in_the_last_task_is_found_before_the_first_is_trained(place, tmp_path, old, new, words, says):
    shutil.copytree(place, tmp_path / "p", ignore=shutil.ignore_patterns("out"))
    first, *others = (tmp_path / "p/misc.jsonl").read_text().splitlines()
    (tmp_path / "p/misc.jsonl").write_text("\n".join([first, *(line.replace(old, new) for line in others)]))
    made = called(main, "stream", "--config", "config.yaml", "out=out", *words, cwd=tmp_path / "p")
    assert made.returncode == 1 and re.search(says, made.stderr), made.stderr
    assert not [*(tmp_path / "p/out").glob("stages/*/*/")], "nothing was built, trained or scored"


def test_every_arm_begins_before_one_goes_on(place, tmp_path):
    """Two arms, two seeds, three tasks: of the first seed stage 1 of both, tasks alone, stage 2 of both; then the rest.

    The first task alone is stage 1 of the arm whose settings are the stream's own.
    """
    arms = {"none": {"replay.selector": "none"}, "slow": {"train.learning_rate": 1e-4}}
    given = yaml.safe_load((place / "config.yaml").read_text())
    given |= {"base": str(place), "out": str(tmp_path / "o"), "seeds": [3, 4], "arms": arms}
    given["tasks"] = [{**given["tasks"][0], "name": n, "path": f"{n}.jsonl"} for n in TASKS]
    made = prepared(checked(StreamConfig, given))
    none, none_4, slow, _ = [run.stages for run in made.runs if run.kind == "run"]
    alone = [run.stages[0] for run in made.runs if run.kind == "single" and run.seed == 3]
    assert alone[0] == none[0]
    found = [stage.folder for stage in queue(made, set(made.stages))]
    assert found[:6] == [none[0], slow[0], *alone[1:], none[1], slow[1]]
    rest = [folder for folder in made.stages if folder not in found[:6]]
    assert found[6:] == rest and rest.index(none[2]) < rest.index(none_4[0]) < rest.index(slow[2])
    assert [stage.folder for stage in queue(made, {slow[2], slow[1]})] == [slow[1], slow[2]]


def test_rows_that_an_arm_cannot_take_are_seen_before_another_arm_goes_on(place, tmp_path):
    """And without a stage that is through no table is written: the one of a mistake would take another's place."""
    arms = "arms={none: {replay.selector: none}, short: {train.max_length: 20, train.too_long: error}}"
    made = called(main, "stream", "--config", "config.yaml", f"out={tmp_path / 'out'}", arms, "seeds=[0, 1]", cwd=place)
    said = r"^error: stage 1: sentiment_analysis · short, seed 0: .*/stages/1-.* are longer than max_length=20"
    assert made.returncode == 1 and re.search(said, made.stderr, re.M), made.stderr
    trained = [f.parent.parent.name for f in tmp_path.glob("out/stages/*/train/model")]
    assert [name[:2] for name in trained] == ["1-"], "the first stage of the first arm alone"


def test_bits_do_not_depend_on_what_is_left_to_do(place, done, tmp_path):
    """With two processes each has one thread, though a single stage is left for one of them."""
    shutil.copytree(place, tmp_path / "p", ignore=shutil.ignore_patterns("out"))
    words = ["stream", "--config", "config.yaml", "out=out", "--quiet", "workers=2",
             "bounds={single: false, joint: false}"]  # fmt: skip
    assert called(main, *words, cwd=tmp_path / "p").returncode == 0
    out = tmp_path / "p/out"
    was = models(out)
    assert len(was) == 3
    shutil.rmtree(next(out.glob("stages/2-*")))
    assert called(main, *words, cwd=tmp_path / "p").returncode == 0
    assert models(out) == was


def test_a_source_that_changes_under_a_stream_is_not_taken_for_the_old_one(place, done, tmp_path):
    shutil.copytree(place, tmp_path / "p")
    made = prepared(checked(StreamConfig, {**yaml.safe_load((place / "config.yaml").read_text()),
                                           "base": str(tmp_path / "p"), "out": str(tmp_path / "p/out")}))  # fmt: skip
    stage = next(s for s in made.stages.values() if s.folder.startswith("1-misc"))
    folder = made.folder(stage.folder)
    shutil.rmtree(folder)
    write_files(made, stage)
    text = (tmp_path / "p/misc.jsonl").read_text()
    (tmp_path / "p/misc.jsonl").write_text(text.replace("analog", "anal0g", 1) + text.splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"1-misc.*task 'misc': its source has changed"):
        carry_out(str(folder), [(s.command, s.kind, s.leaves) for s in stage.ordered])
    assert not (folder / "manifest").exists()


def test_costs_that_are_lost_are_no_numbers(place, done, tmp_path):
    shutil.copytree(place, tmp_path / "p")
    for folder in (tmp_path / "p/out/stages").glob("2-*"):
        (folder / "train/lineage.parquet").unlink()
        (folder / "train/log.jsonl").unlink()
    again = called(main, "stream", "--config", "config.yaml", "out=out", cwd=tmp_path / "p")
    assert again.returncode == 0 and "7 of them done" in again.stderr
    table = pl.read_parquet(tmp_path / "p/out/results.parquet").filter(pl.col("kind") == "run", pl.col("stage") == 2)
    assert table["replay"].to_list() == table["tokens"].to_list() == [None, None]
    assert again.stdout.count("–") == 2, "rows replayed of both runs"


def test_a_difference_of_pairs():
    """Gains 50, 60, 70 against 40, 55, 58: differences 10, 5, 12; mean 9, sd √13; t(0.975, 2) = 4.3027."""
    rows = {"run": ["a"] * 3 + ["b"] * 3, "seed": [0, 1, 2] * 2, "relative_gain": [50.0, 60, 70, 40, 55, 58]}
    frame = pl.DataFrame(rows).with_columns(kind=pl.lit("run"), stage=1, tasks=pl.lit(["t"]))
    found = difference(frame, "a", "b")
    assert found["mean"] == pytest.approx(9)
    half = 4.302653 * (13**0.5) / 3**0.5  # (1 + 16 + 9) / 2 = 13
    assert found["interval"] == pytest.approx([9 - half, 9 + half], abs=1e-5)
    assert difference(frame.filter(pl.col("seed") == 0), "a", "b")["interval"] is None
    assert difference(frame, "a", "none") is None
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_a_matrix_of_a_stage_can_be_read(place, done):
    """What a stage leaves is what `train eval` leaves."""
    (first, *_) = Path(place / "out/stages").glob("1-sentiment*")
    (r,) = read_matrix(scored(first) / "matrix.csv")
    table = pl.read_parquet(place / "out/results.parquet").filter(pl.col("folder") == first.name)
    assert table["scores"][0][0] == r[0]
