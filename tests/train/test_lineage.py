"""The table of a run's steps: what is read back, and what is refused."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curate.errors import InputError
from train.cli import app
from train.lineage import FILE, SCHEMA, seen

EVIL = "a\x1b[2J\u202eb\x9b"


def stored(folder, steps=(1, 1, 2), task="t"):
    """A table of steps with uids 0, 1, …"""
    folder.mkdir(parents=True)
    n = len(steps)
    columns = [pa.array(steps, pa.int32()), [str(i) for i in range(n)], [task] * n, ["current"] * n]
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE, compression="zstd")
    return folder


def test_a_folder_is_named_as_it_is_and_no_pattern(tmp_path):
    stored(tmp_path / "run1", steps=(7,))
    run = stored(tmp_path / "run[1]*?")
    assert seen(run, 1)["uid"].to_list() == ["0", "1"] and seen(run, 2)["uid"].to_list() == ["2"]
    for step in (0, -1, 3, 2**70):
        with pytest.raises(InputError, match="steps 1 to 2"):
            seen(run, step)
    with pytest.raises(InputError, match="it has none"):
        seen(stored(tmp_path / "none", steps=()), 1)


def test_steps_across_row_groups(tmp_path):
    run = stored(tmp_path / "run")
    table = pq.read_table(run / FILE)
    pq.write_table(table, run / FILE, row_group_size=1)
    assert seen(run, 1)["uid"].to_list() == ["0", "1"]


def test_a_damaged_file_is_an_error_at_every_length(tmp_path):
    run = stored(tmp_path / "run")
    whole = (run / FILE).read_bytes()
    for length in range(len(whole)):
        (run / FILE).write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a Parquet file that can be read"):
            seen(run, 1)
    for at in range(0, len(whole), 3):  # a byte that is another: the same rows, other ones, or an error of ours
        (run / FILE).write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert seen(run, 1).columns == ["uid", "task", "origin"]
        except InputError:
            pass


@pytest.mark.parametrize(
    "table",
    [pl.DataFrame({"a": [1]}), pl.DataFrame({"step": ["1"], "uid": ["a"], "task": ["t"], "origin": ["o"]})],
)
def test_a_table_of_others_is_refused(tmp_path, table):
    pq.write_table(table.to_arrow(), tmp_path / FILE)
    with pytest.raises(InputError, match="not a table of a run's steps"):
        seen(tmp_path, 1)


def test_empty_cells_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array([1], pa.int32()), ["a"], [None], ["o"]], schema=SCHEMA), tmp_path / FILE)
    with pytest.raises(InputError, match="empty cells"):
        seen(tmp_path, 1)


def test_a_name_does_not_command_the_terminal(tmp_path):
    run = stored(tmp_path / "run", task=EVIL)
    plain, lines = (CliRunner().invoke(app, ["lineage", str(run), "2", *more]).stdout for more in ([], ["--json"]))
    assert plain == "2  a\\x1b[2J\\u202eb\\x9b  current\n"
    assert lines.isascii() and "\x1b" not in lines
    assert json.loads(lines) == {"uid": "2", "task": EVIL, "origin": "current"}
