"""Tables larger than memory: the same bytes, faults and rows, however the table comes and however it is cut."""

import hashlib
import os
import subprocess
import sys

import polars as pl
import pytest

from curate import assemble, ingest
from curate.build import build
from curate.config import TaskConfig
from curate.manifest import TABLES, check, read
from curate.manifest.schema import content_hash
from curate.manifest.tables import GROUP, batches, streamed, validate, write_parquet
from curate.report import write_report
from curate.report.even import evenly

LARGE = ("samples", "completions", "drops")  # tables that a large build need not hold


def drops(n):
    """n rows of drops.parquet; every seventh has no instruction."""
    rows = pl.DataFrame({"row": range(1, n + 1)}).with_columns(
        uid=pl.col("row").cast(pl.String).str.zfill(32), task=pl.lit("t"), stage=pl.lit(1), step=pl.lit("sample"),
        reason=pl.lit("not drawn"), instruction_uid=pl.when(pl.col("row") % 7 > 0).then(pl.lit("i")),
        score=pl.col("row") / 3,
    )  # fmt: skip
    return TABLES["drops"].fit(rows)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- one writer ---


def test_the_bytes_are_those_of_the_rows(tmp_path):
    rows = drops(2 * GROUP + 100)
    pieces = [rows[:5], rows[5:5], rows[5:20_000], rows[20_000:]]
    forms = {
        "whole": rows,
        "chunks": pl.concat(pieces, rechunk=False),
        "lazy": rows.lazy().filter(pl.col("row") > 0),
        "streamed": streamed(lambda: pieces, rows.schema),
    }
    for name, form in forms.items():
        write_parquet(form, tmp_path / name, "drops")
    assert len({sha256(tmp_path / name) for name in forms}) == 1
    assert pl.read_parquet(tmp_path / "whole").equals(rows)
    import pyarrow.parquet as pq

    found = pq.ParquetFile(tmp_path / "whole").metadata
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [GROUP, GROUP, 100]


def test_threads_do_not_change_the_bytes(tmp_path):
    drops(2 * GROUP + 100).write_parquet(tmp_path / "rows", row_group_size=3_000)
    code = (
        "import sys; from pathlib import Path; import polars as pl; from curate.manifest.tables import write_parquet\n"
        "rows = pl.scan_parquet(sys.argv[1]).filter(pl.col('row') % 5 > 0)\n"
        "write_parquet(rows, Path(sys.argv[2]), 'drops')"
    )
    for threads in ("1", "4"):
        subprocess.run([sys.executable, "-c", code, tmp_path / "rows", tmp_path / threads], check=True,
                       env={**os.environ, "POLARS_MAX_THREADS": threads})  # fmt: skip
    assert sha256(tmp_path / "1") == sha256(tmp_path / "4")


def test_a_stream_is_made_anew_and_obeys_what_is_asked_of_it():
    table = streamed(lambda: (drops(10)[i : i + 4] for i in (0, 4, 8)), drops(1).schema)
    assert table.collect().equals(drops(10)) and table.collect().equals(drops(10))
    assert table.filter(pl.col("row") > 3).select("row").head(2).collect()["row"].to_list() == [4, 5]
    assert [b.height for b in batches(drops(GROUP + 1))] == [GROUP, 1]


# --- validation ---


def test_a_fault_of_a_later_batch_has_its_row():
    n = 2 * GROUP + 10
    late = pl.col("row") > 2 * GROUP + 5  # rows are numbered from 0, so the first one is 2 * GROUP + 5
    faulty = drops(n).with_columns(
        score=pl.when(late).then(float("nan")).otherwise("score"),
        stage=pl.when(late).then(-1).otherwise("stage").cast(pl.Int32),
        step=pl.when(late).then(None).otherwise("step"),
    )
    assert validate(TABLES["drops"], faulty.lazy()) == [
        f"drops.parquet: row {2 * GROUP + 5}: column 'stage' is -1, it must not be negative",
        f"drops.parquet: row {2 * GROUP + 5}: column 'step' is null, which is not allowed",
        f"drops.parquet: row {2 * GROUP + 5}: column 'score' is not a finite number",
    ]


def test_rows_of_one_key_are_found_across_batches():
    rows = drops(GROUP + 10)
    assert validate(TABLES["drops"], rows) == []
    twice = pl.concat([rows, rows[3:5]])
    key = ["t", 4, "4".zfill(32)]
    assert validate(TABLES["drops"], twice) == [
        f"drops.parquet: 4 rows share ['task', 'row', 'uid'] with another, first {key}"
    ]


# --- rows that are read ---


def test_bins_do_not_change_what_is_read(write_jsonl, tmp_path, monkeypatch):
    rows = [{"instruction": f"say {i % 9}", "output": str(i)} for i in range(500)]
    write_jsonl("t.jsonl", [*rows, rows[7]])
    task = ingest.Task(TaskConfig(name="t", path="t.jsonl", format="alpaca"), "t", 1)
    found = []
    for name, limits in (("one", ingest.SORTED), ("several", (60, 1 << 26)), ("small", (500, 1 << 12))):
        monkeypatch.setattr(ingest, "SORTED", limits)
        (tmp_path / name).mkdir()
        ingest.ingest(task, tmp_path, tmp_path / name)
        found.append(ingest.TaskRows(task, tmp_path / name, name))
    one, several, small = (each.scan().collect() for each in found)
    assert one["uid"].is_sorted() and one.height == 500
    assert sorted(one["row"]) == list(range(1, 501))
    assert several.equals(one) and small.equals(one)
    files = [len(list(each.folder.glob("rows-*"))) for each in found]
    assert files[:2] == [1, 1 + 500 // 60] and files[2] > 1
    assert all(each.drops["row"].to_list() == [501] and each.summary["rows"] == 500 for each in found)
    assert not list(tmp_path.glob("*/.unsorted"))


# --- a build of rows that are not loaded ---


@pytest.fixture
def config(write_jsonl, tmp_path):
    """A stream with unreadable rows between those that are drawn and those that are not."""
    old = [{"instruction": f"say {i % 5}", "output": str(i) if i % 4 else ""} for i in range(60)]
    write_jsonl("old.jsonl", old)
    write_jsonl("new.jsonl", [{"instruction": "count", "output": str(i)} for i in range(30)])
    tasks = [{"name": n, "path": f"{n}.jsonl", "format": "alpaca", "bad_rows": "drop"} for n in ("old", "new")]
    return {"tasks": tasks, "replay": {"selector": "uniform", "budget": 20}, "base": str(tmp_path),
            "cache": str(tmp_path / "cache")}  # fmt: skip


def test_slices_of_drops_do_not_change_the_manifest(config, tmp_path, monkeypatch):
    whole = build({**config, "out": str(tmp_path / "whole")})
    assert whole.drops.equals(whole.drops.sort("stage", "row", "uid"))
    assert set(whole.drops["step"]) == {"read", "sample"} and whole.drops.height == 15 + 45 - 20
    monkeypatch.setattr(assemble, "SLICE", 3)
    cut = build({**config, "out": str(tmp_path / "cut")})
    assert cut.provenance["outputs"] == whole.provenance["outputs"]


def test_large_tables_are_not_loaded(config, tmp_path):
    manifest = build({**config, "out": str(tmp_path / "run")})
    write_report(manifest)
    assert [name for name in LARGE if isinstance(vars(manifest)[name], pl.DataFrame)] == []
    assert repr(manifest) == f"Manifest({str(tmp_path / 'run')!r}: 2 tasks, 30 current, 20 replay, 40 left out)"
    assert manifest.scan("samples").filter(origin="replay").collect().height == 20
    assert manifest.height("samples") == manifest.samples.height == 50
    assert isinstance(vars(manifest)["samples"], pl.DataFrame)


def test_a_manifest_outlives_the_next_build(config, tmp_path):
    first = build({**config, "out": str(tmp_path / "run")})
    second = build({**config, "out": str(tmp_path / "run"), "replay": {"selector": "uniform", "budget": 10}})
    assert [m.scan("samples").filter(origin="replay").collect().height for m in (first, second)] == [20, 10]
    assert first.provenance["outputs"]["samples.parquet"] != second.provenance["outputs"]["samples.parquet"]
    assert check(tmp_path / "run") == [] and read(tmp_path / "run").samples.equals(second.samples)


# --- the page ---


def test_an_even_choice_of_many_rows_is_that_of_all_at_once():
    n, most = 10 * GROUP, 50
    rows = pl.DataFrame({"i": range(n)}).with_columns(
        uid=pl.col("i").map_elements(lambda i: content_hash(i), pl.String),
        kind=pl.when(pl.col("i") % 1000 == 0).then(pl.lit("rare")).otherwise(pl.lit("often")),
    )
    turn = pl.int_range(pl.len()).over("kind")
    at_once = rows.sort("uid").with_columns(turn=turn).sort("turn", "uid").head(most).drop("turn")
    assert evenly(rows.lazy(), ["kind"], most).equals(at_once)
    assert at_once["kind"].value_counts().sort("kind").rows() == [("often", 25), ("rare", 25)]
