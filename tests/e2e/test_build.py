"""The whole build through the real command line, on the shipped data and on small streams made for one purpose."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from commands import called

from curate.build import build
from curate.cli import main
from curate.config import BuildConfig
from curate.errors import InputError
from curate.manifest import TABLES, check, read
from curate.plan import Step, plan_table
from curate.sample import SELECTORS

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples/superni/config.yaml"


def curate(*arguments, cwd=None):
    return called(main, *arguments, cwd=cwd)


def process(*arguments, cwd=None):
    """The same in a process of its own, which hashes in another order and has imported nothing."""
    command = [sys.executable, "-m", "curate.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def bytes_of(run: Path) -> dict[str, str]:
    """sha256 of every file of a manifest."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.iterdir()) if f.is_file()}


def fails(done, *words, code=1):
    """The command failed as a user should see it: its exit code, the words that help, and no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in: {done.stderr}"
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped example, built once by the command line; the folder that it was built in."""
    folder = tmp_path_factory.mktemp("shipped")
    done = process("build", EXAMPLE, f"out={folder}/run", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


# --- the shipped example ---


def test_the_example_builds_and_is_sound(shipped):
    folder, summary = shipped
    manifest = read(folder / "run")
    assert check(folder / "run") == []
    assert summary["replay"] == 200 == (manifest.samples["origin"] == "replay").sum()
    assert manifest.tasks["granted"].sum() == 200
    assert manifest.tasks.height == 16
    # α*_j = W_j / Σ W · 200
    previous = manifest.tasks.filter(pl.col("quota").is_not_null())
    share = previous["distance"] / previous["distance"].sum() * 200
    assert (share - previous["share"]).abs().max() < 1e-9
    assert ((previous["quota"] - share).abs() < 1).all()
    assert (previous["distance_bound"] == 0).all()


def test_what_the_example_leaves_out_is_listed(shipped):
    manifest = read(shipped[0] / "run")
    assert manifest.samples.height + manifest.drops.height == manifest.tasks["rows"].sum()
    assert set(manifest.drops["reason"]) == {"not drawn"}


def test_another_working_directory_gives_the_same_bytes(shipped, tmp_path):
    copy = tmp_path / "elsewhere" / "data"
    shutil.copytree(EXAMPLE.parent, copy)
    done = curate("build", "data/config.yaml", "--quiet", cwd=copy.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert bytes_of(copy.parent / "runs/superni") == bytes_of(shipped[0] / "run")


def test_another_budget_embeds_nothing_again(shipped, monkeypatch):
    folder, _ = shipped

    def refuse(*_):
        raise AssertionError("a text was embedded again")

    monkeypatch.setattr("curate.models.embedder.SentenceModel.encode", refuse)
    config = BuildConfig.load(EXAMPLE, [f"out={folder}/other", "replay.budget=400"])
    assert build(config).tasks["granted"].sum() == 400


def test_a_larger_budget_keeps_most_of_the_smaller_ones_rows(shipped):
    folder, _ = shipped
    config = BuildConfig.load(EXAMPLE, [f"out={folder}/larger", "replay.budget=300"])
    small = read(folder / "run").samples.filter(origin="replay")["uid"]
    assert small.is_in(build(config).samples["uid"].to_list()).mean() > 0.95


def test_a_second_build_changes_no_file(shipped):
    folder, _ = shipped
    before = {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()}
    done = curate("build", EXAMPLE, f"out={folder}/run")
    assert done.returncode == 0, done.stderr
    assert "cached" in done.stderr
    assert {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()} == before


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_other_orders_of_the_stream(shipped, order):
    folder, _ = shipped
    done = curate(
        "build", EXAMPLE.with_name(f"{order}.yaml"), f"out={folder}/{order}", f"cache={folder}/.curate-cache", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert check(folder / order) == []
    tasks = read(folder / order).tasks
    assert tasks["granted"].sum() == 200
    assert tasks.sort("stage")["task"].to_list() != read(folder / "run").tasks.sort("stage")["task"].to_list()


@pytest.mark.parametrize(
    "selector",
    ["random", "uniform", "none", "dynamic_only", "insinfo_only", "prototype_instruction", "diverse_instruction"],
)
def test_every_selector(shipped, selector):
    folder, _ = shipped
    config = BuildConfig.load(
        EXAMPLE, [f"out={folder}/{selector}", f"replay.selector={selector}", f"cache={folder}/.curate-cache"]
    )
    manifest = build(config)
    assert check(folder / selector) == []
    assert manifest.tasks["granted"].sum() == (0 if selector == "none" else 200)


def test_tag_clusters_as_unit(shipped):
    folder, _ = shipped
    build(
        BuildConfig.load(
            EXAMPLE, [f"out={folder}/clusters", "replay.unit=tag_cluster", f"cache={folder}/.curate-cache"]
        )
    )
    assert check(folder / "clusters") == []


def test_systematic_rounding(tmp_path):
    """Six rows of some dozen instructions, four seeds: largest remainders go to the same ones, chance meets more."""
    tasks = [{"name": n, "path": str(EXAMPLE.parent / f"{n}.jsonl.gz"), "format": "superni", "split": "train"}
             for n in ("detection", "misc", "code")]  # fmt: skip

    def made(rounding, seed, cache="cache"):
        out = tmp_path / f"{rounding}-{seed}-{cache}"
        build({"tasks": tasks, "replay": {"budget": 6, "rounding": rounding}, "seed": seed, "out": str(out),
               "cache": str(tmp_path / cache)})  # fmt: skip
        assert check(out) == [] and read(out).tasks["granted"].sum() == 6
        return out

    met = {}
    for rounding in ("largest_remainder", "systematic"):
        drawn = [set(read(made(rounding, seed)).instructions.filter(pl.col("granted") > 0)["uid"]) for seed in range(4)]
        met[rounding] = len(set.union(*drawn))
        assert all(some == drawn[0] for some in drawn) == (rounding == "largest_remainder")
    assert met["systematic"] > met["largest_remainder"]
    again, before = bytes_of(made("systematic", 3, "other")), bytes_of(tmp_path / "systematic-3-cache")
    assert all(again[f"{table}.parquet"] == before[f"{table}.parquet"] for table in TABLES)
    said = curate("diff", tmp_path / "largest_remainder-3-cache", tmp_path / "systematic-3-cache")
    assert "replay.rounding" in said.stdout, said.stdout


def test_the_hugging_face_way_of_loading(shipped, tmp_path):
    from datasets import load_dataset

    data = load_dataset(str(shipped[0] / "run"), "samples", split="train", cache_dir=str(tmp_path))
    assert data.num_rows == read(shipped[0] / "run").samples.height
    assert set(data[0]["prompt"][0]) == {"role", "content"}


def test_explain_a_row_that_is_in_and_one_that_is_not(shipped):
    run = shipped[0] / "run"
    manifest = read(run)
    inside = manifest.samples.filter(origin="replay").row(0, named=True)
    done = curate("explain", run, inside["uid"][:12])
    assert done.returncode == 0, done.stderr
    for word in ("is in the set, as replay", inside["task"], "Quota: a share of", "Tags:", "InsInfo:", "Draw:"):
        assert word in done.stdout
    assert f"{inside['insinfo']:.4f} nats" in done.stdout
    outside = curate("explain", run, manifest.drops["uid"][0])
    assert "is not in the set" in outside.stdout
    assert "this one was not" in outside.stdout or "none of the instruction's" in outside.stdout
    current = manifest.samples.filter(origin="current")["uid"][0]
    assert "belongs to the newest task" in curate("explain", run, current).stdout
    fails(curate("explain", run, "0123456789abcdef"), "is in none of samples.parquet, completions.parquet")


def test_dry_run_does_nothing_else(shipped, tmp_path):
    done = curate("build", EXAMPLE, f"out={tmp_path}/run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "about 1,178 rows" in done.stdout
    assert list(tmp_path.iterdir()) == []
    folder, _ = shipped
    steps = json.loads(curate("build", EXAMPLE, f"out={folder}/run", "--dry-run", "--json").stdout)["plan"]
    by_stage = {step["stage"]: step for step in steps}
    assert by_stage["read"]["cached"] == 16
    assert by_stage["embed"]["cached"] == by_stage["embed"]["results"]


def test_the_plans_total_is_that_of_its_rows():
    seconds = [0.0, None, 0.2, 0.3, 1.4, 1.4, 1.4, 9.6]
    about = list(plan_table([Step("s", 1, 0, "", s) for s in seconds]).columns[-1].cells)
    assert about == ["0 s", "–", "< 1 s", "< 1 s", "1 s", "1 s", "1 s", "10 s", "14 s"]  # 13 and two below one
    assert list(plan_table([Step("s", 1, 0, "", 0.1)]).columns[-1].cells) == ["< 1 s", "< 1 s"]


# --- killed, twice at once ---


VERBS, NOUNS = ("Sort", "Count", "Translate", "Summarise"), ("words", "sums", "poems")


def stream(write_jsonl, tmp_path, sizes=(30, 20, 10), instructions=4, **replay):
    """A small stream of alpaca tasks, as the path of its config."""
    tasks = []
    for t, size in enumerate(sizes):
        rows = [
            {
                "instruction": f"{VERBS[i % instructions]} the {NOUNS[t % 3]}",
                "input": f"item {t} {i}",
                "output": f"answer {i}",
            }
            for i in range(size)
        ]
        write_jsonl(f"t{t}.jsonl", rows)
        tasks.append({"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca"})
    config = {"name": "small", "tasks": tasks, "replay": replay or {"budget": 12}, "out": str(tmp_path / "run")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


# Everything is imported once, and no thread has begun by then, so that each fork is a fresh process in no time.
KILLER = """
import os, signal, sys, time
import curate.blocks, curate.build, curate.cli, curate.tags, sentence_transformers

moments, sys.argv = map(float, sys.argv[1].split()), ["curate", *sys.argv[2:]]
for moment in moments:
    if not (process := os.fork()):
        try:
            curate.cli.main()
        finally:
            os._exit(int(getattr(sys.exc_info()[1], "code", 99) or 0))
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def test_killed_anywhere_it_ends_with_the_same_bytes(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    assert curate("build", config, f"out={tmp_path}/whole/run").returncode == 0
    rng = random.Random(0)
    moments = " ".join(str(rng.uniform(0.05, 0.7)) for _ in range(6))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, moments, "build", str(config), f"out={tmp_path}/killed/run", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.splitlines()]
    assert len(codes) == 6 and set(codes) <= {0, -signal.SIGKILL}, done.stderr
    assert -signal.SIGKILL in codes, "the build was never caught running"
    done = curate("build", config, f"out={tmp_path}/killed/run")
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "killed/run") == bytes_of(tmp_path / "whole/run")
    assert not [p for p in (tmp_path / "killed/.curate-cache").glob("*/.*")], "half-written results were left behind"


@pytest.mark.parametrize("stage", ["read", "embed", "distance", "tags", "score", "sample", "manifest"])
def test_stopped_inside_each_stage_it_resumes(write_jsonl, tmp_path, monkeypatch, stage):
    config = stream(write_jsonl, tmp_path)
    build(BuildConfig.load(config, [f"out={tmp_path}/whole/run"]))
    place = {
        "read": "curate.build.ingest",
        "embed": "curate.embed._embed",
        "distance": "curate.distance.task_distance",
        "tags": "curate.build.tag",
        "score": "curate.build.score",
        "sample": "curate.draw._per_instruction",
        "manifest": "curate.manifest.io.sync",
    }[stage]
    calls = 0

    def stop(*_, **__):
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        with pytest.raises(KeyboardInterrupt):
            build(BuildConfig.load(config, [f"out={tmp_path}/stopped/run"]))
    assert calls == 1
    assert not (tmp_path / "stopped/run/provenance.json").exists()
    build(BuildConfig.load(config, [f"out={tmp_path}/stopped/run"]))
    assert bytes_of(tmp_path / "stopped/run") == bytes_of(tmp_path / "whole/run")


def test_the_second_build_in_one_folder_is_refused(write_jsonl, tmp_path):
    from filelock import FileLock

    config = stream(write_jsonl, tmp_path)
    with FileLock(tmp_path / ".run.lock"):
        fails(curate("build", config), "another build is running in this folder")
    assert curate("build", config).returncode == 0


def test_a_changed_result_in_the_store_is_made_again(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    build(BuildConfig.load(config))
    before = bytes_of(tmp_path / "run")
    for file in (tmp_path / ".curate-cache").glob("*/*/*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    shutil.rmtree(tmp_path / "run")
    build(BuildConfig.load(config))
    assert bytes_of(tmp_path / "run") == before


# --- the sense of what is drawn ---


def test_the_order_of_rows_in_a_file_does_not_matter(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    first = build(BuildConfig.load(config))
    for file in tmp_path.glob("t*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        file.write_text("".join(lines))
    second = build(BuildConfig.load(config))
    assert second.samples.drop("row").equals(first.samples.drop("row"))


def test_another_seed_draws_other_rows(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    first, second = (build(BuildConfig.load(config, [f"seed={s}", f"out={tmp_path}/s{s}"])) for s in (0, 1))
    assert first.tasks.equals(second.tasks)
    assert set(first.samples["uid"]) != set(second.samples["uid"])


def test_no_row_of_a_later_task_has_a_say(write_jsonl, tmp_path):
    """The manifest of stage 2 is the same, whether a third task exists or not: nothing is known of the future."""
    config = stream(write_jsonl, tmp_path)
    data = yaml.safe_load(config.read_text())
    data["tasks"] = data["tasks"][:2]
    config.write_text(yaml.safe_dump(data))
    manifest = build(BuildConfig.load(config))
    assert set(manifest.samples["task"]) == {"t0", "t1"}
    assert manifest.tasks.filter(stage=2)["quota"].is_null().all()


def test_a_small_pool_gives_its_excess_to_the_others(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path, sizes=(3, 40, 10), selector="uniform", budget=20)
    tasks = build(BuildConfig.load(config)).tasks
    # equal shares of 20 are 10 and 10; t0 has 3 rows, so 7 go to t1
    assert tasks["quota"].to_list() == [10, 10, None]
    assert tasks["granted"].to_list() == [3, 17, None]
    assert tasks["reason"].to_list() == [
        "the task has only 3 rows",
        "7 more: the excess of tasks that are smaller than their quota",
        None,
    ]


@pytest.mark.parametrize(("size", "asked"), [({"per_task": 4}, 8), ({"ratio": 0.5}, 5), ({"budget": 7}, 7)])
def test_three_ways_to_give_the_budget(write_jsonl, tmp_path, size, asked):
    manifest = build(BuildConfig.load(stream(write_jsonl, tmp_path, selector="random", **size)))
    assert manifest.tasks["granted"].sum() == asked


def test_preference_and_ranked_rows_become_completions(write_jsonl, tmp_path):
    write_jsonl("p.jsonl", [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)])
    write_jsonl(
        "r.jsonl",
        [
            {
                "prompt": f"r{i}",
                "candidates": [{"text": "a", "score": 0.1}, {"text": "b", "score": 0.9}, {"text": "c", "score": 0.9}],
            }
            for i in range(4)
        ],
    )
    config = {
        "tasks": [
            {"name": "p", "path": "p.jsonl", "format": "preference"},
            {"name": "r", "path": "r.jsonl", "format": "ranked"},
        ],
        "replay": {"selector": "random", "budget": 3},
        "out": str(tmp_path / "run"),
        "base": str(tmp_path),
    }
    manifest = build(config)
    assert check(tmp_path / "run") == []
    pairs = manifest.completions.filter(task="p")
    assert pairs.height == 6
    assert set(pairs.filter(rank=1)["text"].str.head(4)) == {"good"}
    ranked = manifest.completions.filter(task="r")
    assert sorted(ranked.filter(prompt_uid=ranked["prompt_uid"][0])["rank"]) == [1, 1, 3]


def test_tool_calls_are_kept(write_jsonl, tmp_path):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"1+{i}"},
                {"role": "assistant", "content": "", "tool_calls": call},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
                {"role": "assistant", "content": f"{i}"},
            ]
        }
        for i in range(5)
    ]
    write_jsonl("a.jsonl", rows)
    write_jsonl("b.jsonl", [{"instruction": "say", "output": f"{i}"} for i in range(5)])
    config = {
        "tasks": [
            {"name": "a", "path": "a.jsonl", "format": "chat"},
            {"name": "b", "path": "b.jsonl", "format": "alpaca"},
        ],
        "replay": {"selector": "random", "budget": 5},
        "out": str(tmp_path / "run"),
        "base": str(tmp_path),
    }
    samples = build(config).samples
    assert check(tmp_path / "run") == []
    prompt = samples.filter(task="a")["prompt"][0].to_list()
    assert json.loads(prompt[1]["tool_calls"]) == call
    assert prompt[2]["tool_call_id"] == "x"


def test_a_text_stream_is_cut_into_blocks_of_time(write_jsonl, tmp_path):
    rows = [{"text": f"story {i} of the year", "date": f"{2019 + i % 3}-05-01"} for i in range(30)]
    write_jsonl("news.jsonl", rows)
    task = {"name": "news", "path": "news.jsonl", "format": "text", "columns": {"time": "date"}, "blocks": "year"}
    manifest = build({"tasks": [task], "replay": {"budget": 4}, "out": str(tmp_path / "run"), "base": str(tmp_path)})
    assert check(tmp_path / "run") == []
    assert manifest.tasks["task"].to_list() == ["news-2019", "news-2020", "news-2021"]
    assert manifest.samples.filter(origin="current").height == 10
    assert manifest.samples["prompt"].list.len().max() == 0


# --- bad input ---


def test_hand_edited_manifest(shipped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shipped[0] / "run", run)
    samples = pl.read_parquet(run / "samples.parquet")
    edited = samples.with_columns(stage=pl.when(pl.int_range(pl.len()) == 3).then(99).otherwise("stage").cast(pl.Int32))
    edited.write_parquet(run / "samples.parquet")
    done = curate("check", run)
    fails(done, "samples.parquet: changed since the build", "row 3: stage 99")
    fails(curate("explain", run, samples["uid"][0]), "changed since the build")
    edited = samples.with_columns(references=pl.col("references").list.concat(pl.lit(["more"])))
    edited.write_parquet(run / "samples.parquet")
    fails(curate("check", run), "row 0: uid", "is not the hash of its content", "more like the last one")
    edited = samples.drop("tags")
    edited.write_parquet(run / "samples.parquet")
    fails(curate("check", run), "column 'tags' is missing")


@pytest.mark.parametrize("table", list(TABLES))
def test_a_lost_row_is_noticed(shipped, tmp_path, table):
    if table in ("completions", "augmentations"):  # the example has none
        return
    run = tmp_path / "run"
    shutil.copytree(shipped[0] / "run", run)
    frame = pl.read_parquet(run / f"{table}.parquet")
    frame.tail(-1).write_parquet(run / f"{table}.parquet")
    provenance = json.loads((run / "provenance.json").read_text())  # a careful forger mends the hash, too
    provenance["outputs"][f"{table}.parquet"] = hashlib.sha256((run / f"{table}.parquet").read_bytes()).hexdigest()
    (run / "provenance.json").write_text(json.dumps(provenance))
    assert check(run), f"nobody missed the first row of {table}"


def test_a_newer_schema_is_refused(shipped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shipped[0] / "run", run)
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**provenance, "schema_version": "2.0"}))
    fails(curate("check", run), "schema version 2.0", "upgrade")
    (run / "provenance.json").unlink()
    fails(curate("check", run), "not a finished manifest")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("replay.budget=0", ["replay.budget", "greater than 0"]),
        ("replay.budget=-3", ["replay.budget", "greater than 0"]),
        ("replay.budget=51", ["replay.budget 51 is above the 50 rows", "set replay.budget to 50 or less"]),
        ("replay.bugdet=5", ["replay.bugdet", "did you mean 'replay.budget'"]),
        ("tasks.1.name=t0", ["tasks 1 and 2 have the same name"]),
        ("tasks.1.name=a/b", ["not usable as a file name"]),
        ("tasks.1.name=..", ["not usable as a file name"]),
        (f"tasks.1.name={'x' * 300}", ["at most 100 characters, this one has 300"]),
        ("tasks.9.name=x", ["is not a place in a list of 3"]),
        ("tasks.0.path=gone.jsonl", ["gone.jsonl", "no such file"]),
        ("embed.model=./nowhere/at-all", ["embed.model", "neither a folder nor a model"]),
        ("embed.model=examples/startr", ["neither a folder", "; did you mean 'examples/starter'?"]),
        ("tags.tagger=column", ["tags.tagger is 'column'", "columns: {tags: NAME}"]),
        ("replay.selector=best", ["replay.selector", "inscl"]),
    ],
)
def test_bad_configuration(write_jsonl, tmp_path, override, words):
    config = stream(write_jsonl, tmp_path)
    fails(curate("build", config, override), *words)
    assert not (tmp_path / "run").exists(), "something was written"


def test_usage_errors(tmp_path):
    assert curate("build").returncode == 2
    fails(curate("build", "x.yaml", "replay.budget"), "key=value", code=2)
    fails(curate("build", tmp_path / "gone.yaml"), "no such file")
    assert "curate init" in curate("build", "--help").stdout + curate("--help").stdout
    help = [line.strip() for line in curate("build", "--help").stdout.splitlines()]
    assert "• curate build config.yaml replay.budget=400 replay.selector=uniform out=runs/uniform" in help


def test_one_task_only(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path, sizes=(10,))
    fails(curate("build", config), "only task", "replay.selector=none")
    manifest = build(BuildConfig.load(config, ["replay.selector=none"]))
    assert manifest.samples.height == 10
    assert check(tmp_path / "run") == []
    assert build(BuildConfig.load(config, ["replay.per_task=5"])).samples.height == 10
    assert check(tmp_path / "run") == []


def test_identical_instructions_everywhere(write_jsonl, tmp_path):
    for t in range(3):
        write_jsonl(f"t{t}.jsonl", [{"instruction": "Do it.", "input": f"{t} {i}", "output": "x"} for i in range(20)])
    config = {
        "tasks": [{"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca"} for t in range(3)],
        "replay": {"budget": 10},
        "out": str(tmp_path / "run"),
        "base": str(tmp_path),
    }
    manifest = build(config)
    assert manifest.tasks["distance"].to_list() == [0.0, 0.0, None]
    assert manifest.tasks["granted"].to_list() == [5, 5, None]
    assert check(tmp_path / "run") == []


def test_instructions_without_tags(write_jsonl, tmp_path):
    for t in range(2):
        write_jsonl(f"t{t}.jsonl", [{"instruction": f"the {i % 3} of {t}", "output": f"{i}"} for i in range(9)])
    config = {
        "tasks": [{"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca"} for t in range(2)],
        "replay": {"budget": 6},
        "out": str(tmp_path / "run"),
        "base": str(tmp_path),
    }
    manifest = build(config)
    assert manifest.tasks["granted"].to_list() == [6, None]
    assert check(tmp_path / "run") == []


def test_precomputed_vectors(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    texts = sorted(
        {json.loads(line)["instruction"] for f in tmp_path.glob("t*.jsonl") for line in f.read_text().splitlines()}
    )
    vectors = [[float(i), 1.0, 2.0] for i in range(len(texts))]
    given = ["embed.backend=precomputed", "embed.path=v.parquet", "tags.cluster=false"]
    pl.DataFrame({"text": texts, "embedding": vectors}).write_parquet(tmp_path / "v.parquet")
    assert curate("build", config, *given, "--quiet").returncode == 0
    vectors[4][1] = float("nan")
    pl.DataFrame({"text": texts, "embedding": vectors}).write_parquet(tmp_path / "v.parquet")
    fails(curate("build", config, *given), "v.parquet: row 5", "'embedding'", "NaN")
    pl.DataFrame({"text": texts[1:], "embedding": vectors[1:]}).write_parquet(tmp_path / "v.parquet")
    fails(curate("build", config, *given), "v.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_output(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(curate("build", config, f"out={tmp_path}/locked/run"), "cannot be written", "out=FOLDER")


def test_output_that_cannot_be_a_folder(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    (tmp_path / "file").touch()
    fails(curate("build", config, f"out={tmp_path}/file/run"), "cannot be written", "out=FOLDER")
    fails(curate("build", config, f"out={tmp_path}"), "other files than a manifest")
    assert (tmp_path / "t0.jsonl").exists()


def test_a_full_disk(write_jsonl, tmp_path):
    """A file-size limit stands for a full disk: a write fails in the middle, and nothing half-written is published."""
    config = stream(write_jsonl, tmp_path, sizes=(3000, 20, 10))
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv = sys.argv[1:];"
        "from curate.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "curate", "build", str(config)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    fails(done, "make room")
    assert not (tmp_path / "run/provenance.json").exists()
    assert curate("build", config).returncode == 0
    assert check(tmp_path / "run") == []


def test_init_writes_a_config_that_builds(write_jsonl, tmp_path):
    stream(write_jsonl, tmp_path)
    (tmp_path / "config.yaml").unlink()
    done = curate("init", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "config.yaml").read_text()
    assert text.count("format: alpaca") == 3
    assert text.count("#") > 5
    done = curate("build", tmp_path / "config.yaml", f"out={tmp_path}/run", "replay.per_task=5", "--quiet")
    assert done.returncode == 0, done.stderr
    fails(curate("init", tmp_path), "is there already")
    fails(curate("init", tmp_path / "gone"), "not a folder")


def test_rows_that_are_held_out_are_not_trained_on_unasked(write_jsonl, tmp_path):
    def put(name, *splits):
        write_jsonl(name, [{"instruction": f"say {i}", "output": str(i), "split": s} for i, s in enumerate(splits)])

    put("a.jsonl", "train", "test", "train", "dev\n  - x"), put("b.jsonl", "test", "dev"), put("c.jsonl", "train")
    assert curate("init", tmp_path).returncode == 0
    text = (tmp_path / "config.yaml").read_text()
    assert "  # rows of other splits are left out: test, dev" in text and text.count("split: train") == 1
    assert "  # all rows are taken; to take one of its splits add `split`: test, dev\n" in text
    quick = [f"out={tmp_path}/run", "replay={selector: uniform, per_task: 1}"]
    for _ in range(2):  # the second build reads nothing again
        done = curate("build", tmp_path / "config.yaml", *quick)
        assert done.returncode == 0, done.stderr
        assert "b: rows of splits test, dev; no `split` given" in done.stderr and "a: rows" not in done.stderr
    assert pl.read_parquet(tmp_path / "run/tasks.parquet").sort("stage")["rows"].to_list() == [2, 2, 1]


# --- what attackers found ---


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_a_stream_of_one_task_with_every_selector(write_jsonl, tmp_path, selector):
    config = stream(write_jsonl, tmp_path, sizes=(6,))
    overrides = [f"replay.selector={selector}", "replay.per_task=5", "tags.cluster=false"]
    overrides += [f"{model}.model={ROOT / 'examples/starter'}" for model in ("policy", "reference")]
    assert build(BuildConfig.load(config, overrides)).samples.height == 6
    assert check(tmp_path / "run") == []


def test_every_rejected_answer_of_a_prompt_is_kept(write_jsonl, tmp_path):
    write_jsonl("p.jsonl", [{"prompt": "q", "chosen": "good", "rejected": f"bad {i}"} for i in range(3)])
    task = {"name": "p", "path": "p.jsonl", "format": "preference"}
    manifest = build(
        {"tasks": [task], "replay": {"selector": "none"}, "out": str(tmp_path / "run"), "base": str(tmp_path)}
    )
    assert manifest.drops.height == 0
    assert sorted(manifest.completions.filter(rank=2)["text"]) == ["bad 0", "bad 1", "bad 2"]
    assert check(tmp_path / "run") == []


def test_a_source_that_changes_while_it_is_read(write_jsonl, tmp_path, monkeypatch):
    from curate import ingest

    config = stream(write_jsonl, tmp_path)

    def tamper(task, base, folder, done):
        ingest.ingest(task, base, folder, done)
        (tmp_path / "t0.jsonl").write_text('{"instruction": "a", "output": "b"}\n')

    with monkeypatch.context() as patch:
        patch.setattr("curate.build.ingest", tamper)
        with pytest.raises(InputError, match="changed while it was read"):
            build(BuildConfig.load(config, ["replay.selector=random"]))
    assert not list((tmp_path / ".curate-cache/read").glob("*"))


def test_brackets_in_a_path_are_no_pattern(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    for out in ("x1", "x[1]"):
        build(BuildConfig.load(config, ["replay.selector=random", f"out={tmp_path}/p[12]/{out}", f"seed={len(out)}"]))
    assert read(tmp_path / "p[12]/x[1]").provenance["config"]["seed"] == 4
    assert read(tmp_path / "p[12]/x1").provenance["config"]["seed"] == 2


def test_data_cannot_speak_to_terminal_or_card(write_jsonl, tmp_path):
    write_jsonl(
        "a.jsonl", [{"instruction": "\x1b[2Jhi [/red] <b>", "output": "x", "lic": "![t](http://evil) <script>"}]
    )
    task = {"name": "a", "path": "a.jsonl", "format": "alpaca", "columns": {"license": "lic"}}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "[/red] | x", "tasks": [task], "replay": {"selector": "none"}}))
    done = curate("build", path, f"out={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "run/README.md").read_text()
    assert "<script>" not in card
    assert "](http" not in card
    told = curate("explain", tmp_path / "run", read(tmp_path / "run").samples["uid"][0])
    assert "\x1b" not in told.stdout
    assert "[/red]" in told.stdout


def test_output_inside_a_source_is_refused(write_jsonl, tmp_path):
    config = stream(write_jsonl, tmp_path)
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "t0.jsonl", tmp_path / "folder")
    fails(
        curate("build", config, "tasks.0.path=folder", f"out={tmp_path}/folder/run"), "lies inside the source of task"
    )


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("tasks", pl.col("share") * 2),
        ("tasks", pl.when(stage=1).then(pl.col("distance") / 10).otherwise("distance").alias("distance")),
        ("tasks", pl.lit(None, pl.Int64).alias("granted")),
        ("tasks", (pl.col("covered") - 1).alias("covered")),
        ("tags", pl.lit(0, pl.Int64).alias("pool")),
        ("tags", (pl.col("count") * 2).alias("count")),
        ("instructions", (pl.col("rows") + 1).alias("rows")),
        ("instructions", pl.lit(None, pl.Float64).alias("insinfo")),
        ("samples", pl.lit(-1.0).alias("weight")),
        ("samples", pl.lit(["x"]).alias("tags")),
        ("samples", pl.lit("augmented").alias("origin")),
    ],
)
def test_forged_tables_with_mended_hashes(shipped, tmp_path, table, change):
    run = tmp_path / "run"
    shutil.copytree(shipped[0] / "run", run)
    file = run / f"{table}.parquet"
    pl.read_parquet(file).with_columns(change).write_parquet(file)
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["outputs"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (run / "provenance.json").write_text(json.dumps(provenance))
    fails(curate("check", run), table)
