"""Readers: every kind of file, every format, every fault, on real files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
import tracemalloc
from datetime import date, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.config import TaskConfig
from curate.errors import InputError
from curate.readers import (
    BadRow,
    Candidate,
    Row,
    SourceId,
    detect_format,
    detect_splits,
    identify,
    read,
    split_counts,
    time_blocks,
)

ALPACA = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
SUPERNI = {"definition": "Add.", "input": "1 + 2", "outputs": ["3", "three"], "instance_license": ["MIT", "CC0"]}


def task(path: str | Path = "data.jsonl", format: str | None = "alpaca", **rest: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "path": str(path), "format": format, **rest})


def jsonl(folder: Path, *rows: Any, name: str = "data.jsonl") -> None:
    """Write rows; a str or bytes is a line as it is."""
    lines = [r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode() for r in rows]
    data = b"".join(line + b"\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def rows(folder: Path, config: TaskConfig, block: str | None = None) -> list[Row]:
    got = list(read(config, folder, block))
    assert all(isinstance(row, Row) for row in got)
    return got  # type: ignore[return-value]


def one(folder: Path, record: Any, format: str | None = "alpaca", **rest: Any) -> Row:
    jsonl(folder, record)
    (row,) = rows(folder, task(format=format, **rest))
    return row


def fault(folder: Path, config: TaskConfig, block: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        list(read(config, folder, block))
    return str(caught.value)


def row_fault(folder: Path, record: Any, format: str = "alpaca", **rest: Any) -> str:
    jsonl(folder, record)
    return fault(folder, task(format=format, **rest))


def says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------ kinds of files


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark, as Excel writes
        out = csv.writer(file, delimiter=delimiter)
        out.writerow(ALPACA)
        out.writerow(ALPACA.values())
        out.writerow(["Say", 'a "b",\nc\td', "é"])


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "array.json", "array.json.gz", "a.parquet", "a.csv", "a.csv.gz",
     "a.tsv", "a.tsv.gz"],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    second = {"instruction": "Say", "input": 'a "b",\nc\td', "output": "é"}
    plain = tmp_path / name.removesuffix(".gz")
    if name == "a.parquet":
        pl.DataFrame([ALPACA, second]).write_parquet(plain)
    elif ".csv" in name or ".tsv" in name:
        write_csv(plain, "\t" if "tsv" in name else ",")
    elif "array" in name:
        plain.write_text("\ufeff \n" + json.dumps([ALPACA, second], indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        plain.write_text("\ufeff" + json.dumps(ALPACA) + "\r\n" + json.dumps(second), encoding="utf-8")
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    got = rows(tmp_path, task(name))
    assert [(r.row, r.prompt, r.references) for r in got] == [
        (1, [user("Add.\n\n1 + 2")], ["3"]),
        (2, [user('Say\n\na "b",\nc\td')], ["é"]),
    ]
    assert detect_format(tmp_path / name) == "alpaca"


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    jsonl(tmp_path, "", ALPACA, "  \t", ALPACA)
    assert [r.row for r in rows(tmp_path, task())] == [2, 4]


def test_an_array_longer_than_a_window_is_read_element_by_element(tmp_path: Path) -> None:
    # elements above and below the 64 KiB window, cut at every kind of place; é and 😀 cut bytes, too
    data = [{"instruction": "é😀" * n, "output": [1.5, True, '\n\\"'], "z": None} for n in (1, 30_000, 7, 90_000, 3)]
    data += [{"instruction": f"i{n}", "output": "😀" * (n % 11) + "x"} for n in range(9_000)]
    (tmp_path / "a.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(data), encoding="utf-8")
    for name in ("a.json", "b.json"):
        got = rows(tmp_path, task(name))
        assert [r.instruction for r in got] == [d["instruction"] for d in data]
        assert got[0].references == ["1.5", "true", '\n\\"']


def test_a_folder_of_data_files_has_the_splits_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder, ALPACA, ALPACA, name="train.jsonl")
    jsonl(folder, {**ALPACA, "output": "4"}, name="test.jsonl")
    assert [r.references for r in rows(tmp_path, task("set"))] == [["3"], ["3"]]
    assert [(r.row, r.references) for r in rows(tmp_path, task("set", split="test"))] == [(1, ["4"])]
    says(fault(tmp_path, task("set", split="dev")), "set: no split 'dev'", "train", "test", "remedy")
    assert detect_format(folder) == "alpaca"


def test_a_saved_dataset_is_read_with_and_without_splits(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{**ALPACA, "split": "a"}, {**ALPACA, "split": "b", "output": "4"}])
    data.save_to_disk(str(tmp_path / "flat"))
    assert len(rows(tmp_path, task("flat"))) == 2
    assert [(r.row, r.references) for r in rows(tmp_path, task("flat", split="b"))] == [(2, ["4"])]
    datasets.DatasetDict({"x": data, "y": data}).save_to_disk(str(tmp_path / "dict"))
    says(fault(tmp_path, task("dict")), "which split", "x, y")
    datasets.DatasetDict({"x": data}).save_to_disk(str(tmp_path / "single"))
    assert len(rows(tmp_path, task("single"))) == 2
    assert identify(task("flat"), tmp_path).files.keys() >= {"flat/state.json", "flat/data-00000-of-00001.arrow"}


def test_null_fields_that_arrow_adds_to_messages_vanish(tmp_path: Path) -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    talk = [user("q"), {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "r", "tool_call_id": "1"}, assistant("a")]  # fmt: skip
    pl.DataFrame({"messages": [talk]}).write_parquet(tmp_path / "a.parquet")
    (row,) = rows(tmp_path, task("a.parquet", "chat"))
    assert row.prompt[0] == user("q") and row.completion == [assistant("a")]
    assert row.prompt[1] == {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}


def test_an_empty_or_odd_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    says(fault(tmp_path, task("none")), "none: cannot be read", "remedy")
    with pytest.raises(InputError, match="no files"):
        identify(task("none"), tmp_path)


def test_a_hub_id_is_looked_up_and_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Any:
        asked.update(path=path, **options)
        return datasets.IterableDatasetDict({"train": datasets.Dataset.from_list([ALPACA]).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(rows(tmp_path, task("owner/name", subset="s", revision="abc"))) == 1
    assert asked == {"path": "owner/name", "name": "s", "revision": "abc", "streaming": True}


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    says(
        fault(tmp_path, task("owner/name")), "owner/name", "Couldn't reach", "no such file or folder", "HF_HUB_OFFLINE"
    )


@pytest.mark.parametrize("name", ["owner/name.jsonl", "owner/name.csv.gz", "owner/name.parquet", "nothing", "x.gz"])
def test_a_missing_file_is_no_hub_id(tmp_path: Path, name: str) -> None:
    says(fault(tmp_path, task(name)), f"{name}: no such file", "remedy")


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    says(fault(tmp_path, task("x" * 300 + ".jsonl")), "File name too long", "remedy")
    says(fault(tmp_path, task("~nobody-here/a.jsonl")), "home directory", "remedy")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    jsonl(tmp_path, ALPACA, name="train.jsonl")
    says(fault(tmp_path, task("trian.jsonl")), "did you mean 'train.jsonl'?")


# ------------------------------------------------------------------------------------------------------- formats


def test_superni(tmp_path: Path) -> None:
    row = one(tmp_path, SUPERNI, "superni")
    assert row == Row(
        row=1, instruction="Add.", prompt=[user("Add.\n\n1 + 2")], completion=[assistant("3")],
        references=["3", "three"], tools=None, license="MIT; CC0", tags=None, candidates=[],
        split=None,
    )  # fmt: skip


def test_superni_takes_the_first_definition_and_either_name_of_the_outputs(tmp_path: Path) -> None:
    row = one(tmp_path, {"definition": ["One.", "Two."], "input": "", "output": "3"}, "superni")
    assert (row.instruction, row.prompt, row.references) == ("One.", [user("One.")], ["3"])


def test_alpaca_without_input_and_with_several_answers(tmp_path: Path) -> None:
    row = one(tmp_path, {"instruction": "Go.", "output": ["", " a ", None, "b", "a"]})
    assert row.prompt == [user("Go.")]
    assert row.references == [" a ", "b", "a"], "white space is kept, empty answers are not"
    assert row.completion == [assistant(" a ")]


def test_the_input_stands_in_for_an_empty_instruction(tmp_path: Path) -> None:
    row = one(tmp_path, {"instruction": "", "input": "1 + 2?", "output": "3"})
    assert (row.instruction, row.prompt) == ("1 + 2?", [user("1 + 2?")])


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (False, "false"), (3, "3"), (1.5, "1.5"), (0, "0")])
def test_numbers_and_booleans_as_answers_have_their_json_spelling(tmp_path: Path, value: Any, text: str) -> None:
    assert one(tmp_path, {**ALPACA, "output": value}).references == [text]


def test_chat(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "S"}, user("q"), assistant("a"), user("r"), assistant("b"), assistant("c")]
    row = one(tmp_path, {"messages": talk, "tools": [{"name": "é"}], "license": "MIT"}, "chat")
    assert (row.prompt, row.completion) == (talk[:4], talk[4:])
    assert (row.instruction, row.references, row.tools, row.license) == ("q", ["b\nc"], '[{"name": "é"}]', "MIT")


def test_chat_answers_after_a_tool_and_with_a_tool(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f", "extra": 1}
    row = one(tmp_path, {"messages": [user("q"), call, result, assistant("a")]}, "chat")
    assert row.completion == [assistant("a")]
    assert row.prompt[1:] == [
        {"role": "assistant", "content": "", "tool_calls": '[{"id": "1"}]'},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f"},
    ]
    row = one(tmp_path, {"messages": [user("q"), call]}, "chat")
    assert row.references == ['[{"id": "1"}]'], "an answer that only calls tools is stood for by its calls"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_sharegpt_and_parts_of_text(tmp_path: Path, column: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "r"},
        user("s"),
        {**assistant(""), "content": parts},
    ]
    row = one(tmp_path, {column: talk}, "chat")
    assert row.prompt == [user("q"), assistant("r"), user("s")]
    assert row.completion == [assistant("ab")]


def test_a_csv_holds_messages_as_json(tmp_path: Path) -> None:
    pl.DataFrame({"messages": [json.dumps([user("q"), assistant("a")])], "tools": ["[1]"]}).write_csv(
        tmp_path / "a.csv"
    )
    (row,) = rows(tmp_path, task("a.csv", "chat"))
    assert (row.completion, row.tools) == ([assistant("a")], "[1]")


def test_preference_of_texts(tmp_path: Path) -> None:
    hh = "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    row = one(tmp_path, {"prompt": hh, "chosen": "good", "rejected": "bad"}, "preference")
    assert (row.instruction, row.prompt, row.completion) == (hh, [user(hh)], [assistant("good")])
    assert row.references == ["good"]
    assert row.candidates == [Candidate("good", 1, None), Candidate("bad", 2, None)]


def test_preference_of_messages(tmp_path: Path) -> None:
    row = one(
        tmp_path,
        {"prompt": [{"role": "system", "content": "S"}, user("q")], "chosen": [assistant("good")],
         "rejected": [assistant("bad")]},
        "preference",
    )  # fmt: skip
    assert (row.instruction, row.prompt[1], row.completion) == ("q", user("q"), [assistant("good")])


@pytest.mark.parametrize("extra", [{}, {"prompt": "r"}])
def test_preference_of_whole_conversations_splits_off_what_they_share(tmp_path: Path, extra: dict[str, str]) -> None:
    start = [user("q"), assistant("a"), user("r")]
    record = {"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")], **extra}
    row = one(tmp_path, record, "preference")
    assert (row.prompt, row.completion, row.instruction) == (start, [assistant("good")], "q")
    assert [c.text for c in row.candidates] == ["good", "bad"]


def test_preference_needs_a_prompt_or_conversations(tmp_path: Path) -> None:
    says(row_fault(tmp_path, {"chosen": "a", "rejected": "b"}, "preference", bad_rows="drop"), "no column 'prompt'")
    early = {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]}
    says(row_fault(tmp_path, early, "preference"), "row 1", "differ in the final assistant turn only")


def test_ranked(tmp_path: Path) -> None:
    candidates = [
        {"text": "c", "rank": 2, "score": 1, "model": "m"},
        {"text": "a", "rank": 1},
        {"text": "b", "rank": 1},
    ]
    row = one(tmp_path, {"question": "q", "candidates": candidates}, "ranked")
    assert row.candidates == [Candidate("c", 3, 1.0), Candidate("a", 1, None), Candidate("b", 1, None)]
    assert (row.prompt, row.completion, row.references) == ([user("q")], [assistant("a")], ["a"])


def test_ranks_follow_from_scores_and_ties_share_the_smallest(tmp_path: Path) -> None:
    candidates = [{"text": t, "score": s} for t, s in [("a", 0.5), ("b", 2), ("c", 0.5), ("d", -1)]]
    row = one(tmp_path, {"prompt": "q", "candidates": candidates}, "ranked")
    assert [c.rank for c in row.candidates] == [2, 1, 2, 4]


def test_ranked_with_a_gold_answer(tmp_path: Path) -> None:
    record = {"prompt": "q", "gold": ["g", "h"], "candidates": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}
    row = one(tmp_path, record, None, columns={"candidates": "candidates", "output": "gold"})
    assert (row.completion, row.references, len(row.candidates)) == ([assistant("g")], ["g", "h"], 2)


def test_text(tmp_path: Path) -> None:
    text = "x" * 1500
    row = one(tmp_path, {"text": text}, "text")
    assert (row.prompt, row.completion, row.references) == ([], [assistant(text)], [text])
    assert row.instruction == "x" * 1000
    row = one(tmp_path, {"text": text, "title": "T"}, "text", columns={"instruction": "title"})
    assert row.instruction == "T"


@pytest.mark.parametrize("format", ["chat", "preference", "ranked"])
def test_a_mapped_instruction_counts_in_every_format(tmp_path: Path, format: str) -> None:
    record = {
        "messages": [user("q"), assistant("a")], "prompt": "q", "chosen": "a", "rejected": "b", "topic": "T",
        "candidates": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}],
    }  # fmt: skip
    assert one(tmp_path, record, format, columns={"instruction": "topic"}).instruction == "T"


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        ({"messages": "m"}, {"m": [user("q"), assistant("a")]}),
        ({"chosen": "c", "rejected": "r"}, {"prompt": "q", "c": "a", "r": "b"}),
        ({"candidates": "c"}, {"prompt": "q", "c": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}),
        ({"text": "t"}, {"t": "a"}),
        ({"output": "o", "instruction": "i", "input": "n"}, {"i": "q", "o": "a", "n": ""}),
    ],
)
def test_the_column_map_tells_the_format(tmp_path: Path, columns: dict[str, str], record: dict[str, Any]) -> None:
    assert one(tmp_path, record, None, columns=columns).completion == [assistant("a")]


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        ("definition input outputs", "superni"), ("definition input output", "superni"),
        ("instruction input output", "alpaca"), ("instruction output", "alpaca"), ("messages", "chat"),
        ("conversations", "chat"), ("prompt chosen rejected", "preference"), ("chosen rejected", "preference"),
        ("prompt candidates", "ranked"), ("question candidates", "ranked"), ("text", "text"),
        ("text instruction output", "alpaca"), ("question answer", None), ("definition category", None),
    ],
)  # fmt: skip
def test_detect_format(tmp_path: Path, keys: str, format: str | None) -> None:
    jsonl(tmp_path, dict.fromkeys(keys.split(), ""))
    assert detect_format(tmp_path / "data.jsonl") == format


def test_detect_format_of_other_files_is_none_and_of_broken_ones_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert detect_format(tmp_path / "notes.txt") is None
    jsonl(tmp_path, "{")
    with pytest.raises(InputError, match=r"data\.jsonl: row 1: not JSON"):
        detect_format(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("value", "tags"),
    [(["a", " b "], ["a", "b"]), ("a, b;c;", ["a", "b", "c"]), ([], []), (None, None), ([1], ["1"])],
)
def test_tags(tmp_path: Path, value: Any, tags: list[str] | None) -> None:
    assert one(tmp_path, {**ALPACA, "labels": value}, columns={"tags": "labels"}).tags == tags


def test_a_column_that_merely_is_called_tags_counts_only_where_it_fits(tmp_path: Path) -> None:
    odd = {**ALPACA, "tags": {"a": 1}, "license": {"b": 2}}
    assert one(tmp_path, odd).tags is None
    says(row_fault(tmp_path, odd, columns={"tags": "tags"}), "column 'tags'", "a list of tags", "an object")


# ------------------------------------------------------------------------------------------------- time blocks


DATED = [
    {"text": "a", "when": "2020-03-01T10:00:00Z"}, {"text": "b", "when": "2019-12-31"},
    {"text": "c", "when": "2020-03-02"}, {"text": "d", "when": "2019-12-31 23:59:59+00:00"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "blocks", "block", "texts"),
    [
        ("year", ["2019", "2020"], "2020", ["a", "c"]),
        ("month", ["2019-12", "2020-03"], "2019-12", ["b", "d"]),
        ("day", ["2019-12-31", "2020-03-01", "2020-03-02"], "2020-03-02", ["c"]),
    ],
)
def test_blocks(tmp_path: Path, unit: str, blocks: list[str], block: str, texts: list[str]) -> None:
    jsonl(tmp_path, *DATED)
    config = task(format="text", blocks=unit, columns={"time": "when"})
    assert time_blocks(config, tmp_path) == blocks
    assert [r.references[0] for r in rows(tmp_path, config, block)] == texts
    assert [r.references[0] for r in rows(tmp_path, config)] == ["a", "b", "c", "d"]
    parts = [r.row for b in blocks for r in rows(tmp_path, config, b)]
    assert sorted(parts) == [1, 2, 3, 4], "the blocks are a partition"


@pytest.mark.parametrize(
    "value", [2019, 2019.0, "2019", "2019-05", " 2019-05-06 ", date(2019, 5, 6), datetime(2019, 1, 2)]
)
def test_years_are_read_from_any_value_and_in_any_format(tmp_path: Path, value: Any) -> None:
    pl.DataFrame([{**ALPACA, "t": value}]).write_parquet(tmp_path / "a.parquet")
    config = task("a.parquet", blocks="year", columns={"time": "t"})
    assert time_blocks(config, tmp_path) == ["2019"]
    assert len(rows(tmp_path, config, "2019")) == 1


@pytest.mark.parametrize(
    ("value", "unit", "why"),
    [("2019", "month", "2019 names no month"), ("soon", "year", "'soon' is not an ISO date"), (None, "year", "null"),
     ("2019-13", "year", "not an ISO date"), (1_600_000_000, "year", "1600000000"), (True, "year", "a boolean")],
)  # fmt: skip
def test_a_time_that_is_none(tmp_path: Path, value: Any, unit: str, why: str) -> None:
    jsonl(tmp_path, {"text": "a", "when": value})
    config = task(format="text", blocks=unit, columns={"time": "when"})
    with pytest.raises(InputError, match="row 1: column 'when'") as caught:
        time_blocks(config, tmp_path)
    says(str(caught.value), why, "remedy")


def test_a_row_without_a_block_is_in_one_block_only(tmp_path: Path) -> None:
    jsonl(tmp_path, "{1", DATED[0], "{2", DATED[1], {"text": "", "when": "2019"}, {"text": "x", "when": "?"})
    config = task(format="text", blocks="year", columns={"time": "when"}, bad_rows="drop")
    assert time_blocks(config, tmp_path) == ["2019", "2020"]
    bad = {b: [r.row for r in read(config, tmp_path, b) if isinstance(r, BadRow)] for b in ("2019", "2020")}
    assert bad == {"2020": [1, 3], "2019": [5, 6]}


def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    jsonl(tmp_path, *DATED)
    says(
        fault(tmp_path, task(format="text", blocks="year", columns={"time": "when"}), "1999"), "no row of block '1999'"
    )
    says(fault(tmp_path, task(format="text"), "2019"), "no time blocks", "columns.time")
    with pytest.raises(InputError, match="no column 'wen'; did you mean 'when'"):
        time_blocks(task(format="text", blocks="year", columns={"time": "wen"}, bad_rows="drop"), tmp_path)


# ------------------------------------------------------------------------------------------------------- splits


def test_rows_of_other_splits_are_left_out_and_not_looked_at(tmp_path: Path) -> None:
    jsonl(tmp_path, {"split": "test", "instruction": "no output"}, {**ALPACA, "split": "train"}, {"split": "test"})
    assert [r.row for r in rows(tmp_path, task(split="train"))] == [2]
    assert split_counts(task(), tmp_path) == {"test": 2, "train": 1}
    assert detect_splits(tmp_path / "data.jsonl") == ["test", "train"]


def test_splits_of_a_file_without_such_a_column(tmp_path: Path) -> None:
    jsonl(tmp_path, ALPACA, {**ALPACA, "split": "train"})
    assert detect_splits(tmp_path / "data.jsonl") == []


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    jsonl(tmp_path, {**ALPACA, "part": "a"}, {**ALPACA, "part": "b"}, {**ALPACA, "part": "a"})
    config = task(split="dev", columns={"split": "part"})
    says(fault(tmp_path, config), "data.jsonl: no row of split 'dev'", "a (2 rows), b (1 rows)", "remedy")
    says(fault(tmp_path, task(split="a", bad_rows="drop")), "row 1: no column 'split'", "columns: {split: ")


# ------------------------------------------------------------------------------------------------ faults of a file


def test_truncated_gzip(tmp_path: Path) -> None:
    noise = [{**ALPACA, "input": hashlib.sha256(str(n).encode()).hexdigest()} for n in range(8_000)]
    jsonl(tmp_path, *noise, name="a.jsonl.gz")
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    config = task("a.jsonl.gz", bad_rows="drop")
    assert isinstance(next(read(config, tmp_path)), Row)
    says(fault(tmp_path, config), "a.jsonl.gz: the gzip file is truncated", "after row ", "remedy: ")
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(middle)
    says(fault(tmp_path, task("a.jsonl.gz", bad_rows="drop")), "a.jsonl.gz: the gzip file is damaged")


def test_not_gzip_and_gzip_unnamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text(json.dumps(ALPACA))
    says(fault(tmp_path, task("a.jsonl.gz")), "a.jsonl.gz: not a gzip file", "remedy")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(json.dumps(ALPACA).encode()))
    says(fault(tmp_path, task("a.jsonl")), "is packed with gzip", "ends in .gz")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"", "the file is empty"), ("a.parquet", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"), ("a.json", b"[]", "no rows"),
        ("a.csv", b"a,b\n", "no rows"),
        ("a.txt", b"x", "not a known kind of file"), ("a.jsonl", b"[\n{}\n]", "a JSON array, not one object a line"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.json", b'[{"a": 1}, {"a": }]', "row 2: not JSON"), ("a.json", b'[{"a": 1}', "row 2: not JSON"),
        ("a.json", b'[{"a": 1} {}]', "row 2: not JSON: Expecting ','"), ("a.json", b'[{"a": 1}] x', "Extra data"),
        ("a.json", b'[1', "not JSON"), ("a.json", b"[" * 100_000, "not usable JSON"),
        ("a.json", b'[{"a": "\xff"}]', "byte offset 8 of the file"),
        ("a.json", b'[{"a": "\xc3', "byte offset 8 of the file"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2: invalid UTF-8 at byte offset 2"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', "row 2: not valid CSV"), ("a.csv", b'a,b\n"1"x,2\n', "row 1: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
    ],
)  # fmt: skip
def test_faults_of_a_file_stop_even_with_drop(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    config = task(name, "text", columns={"text": "a"}, bad_rows="drop")
    says(fault(tmp_path, config), f"{name}: ", why, "remedy: ")


def test_parquet_that_is_damaged_inside(tmp_path: Path) -> None:
    frame = pl.DataFrame({"text": [hashlib.sha256(str(n).encode()).hexdigest() for n in range(20_000)]})
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=2_000)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    half = len(data) // 2
    data[half : half + 80_000] = bytes(80_000)
    (tmp_path / "a.parquet").write_bytes(data)
    got = []
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file after row \d+"):
        got.extend(read(task("a.parquet", "text"), tmp_path))


# ------------------------------------------------------------------------------------------------- faults of a row


def test_a_missing_column_names_the_nearest_one_and_the_map(tmp_path: Path) -> None:
    text = row_fault(tmp_path, {"instructions": "Add.", "answer": "3"}, bad_rows="drop")
    says(text, "data.jsonl: row 1: no column 'instruction'; did you mean 'instructions'?", "instructions, answer",
         "remedy: columns: {instruction: instructions}")  # fmt: skip
    text = row_fault(tmp_path, {"instruction": "Add.", "reply": "3"}, bad_rows="drop")
    says(text, "no column 'output'", "remedy: columns: {output: <name>}")


@pytest.mark.parametrize("key", ["input", "tags", "license", "tools", "split"])
def test_a_mapped_column_must_be_in_the_first_row(tmp_path: Path, key: str) -> None:
    says(row_fault(tmp_path, ALPACA, columns={key: "nope"}, bad_rows="drop"), "row 1: no column 'nope'", f"{{{key}: ")


def test_a_mapped_column_that_the_format_does_not_read(tmp_path: Path) -> None:
    says(row_fault(tmp_path, ALPACA, columns={"messages": "instruction"}), "format alpaca has no column `messages`")


def test_a_column_missing_later_is_a_fault_of_that_row(tmp_path: Path) -> None:
    jsonl(tmp_path, ALPACA, {"instruction": "Add."})
    says(fault(tmp_path, task()), "row 2: no column 'output'")
    says(fault(tmp_path, task()), "remedy: mend the row, or leave such rows out with `bad_rows: drop`")
    good, bad = read(task(bad_rows="drop"), tmp_path)
    assert isinstance(good, Row) and isinstance(bad, BadRow)
    says(bad.reason, "no column 'output'")


def test_the_first_rows_may_lack_what_others_have(tmp_path: Path) -> None:
    jsonl(tmp_path, {"instruction": "Add."}, {"output": "3"}, {"instruction": "Add."}, {**ALPACA, "tags": ["sum"]})
    says(fault(tmp_path, task()), "row 1: no column 'output'", "remedy: mend the row, or leave")
    for config in (task(bad_rows="drop"), task(bad_rows="drop", columns={"tags": "tags"})):
        assert [(r.row, type(r)) for r in read(config, tmp_path)] == [(1, BadRow), (2, BadRow), (3, BadRow), (4, Row)]
    says(fault(tmp_path, task(bad_rows="drop", columns={"tags": "tag"})), "no column 'tag'", "columns: {tags: ")


TWO = [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]
TALK = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], '
FAULTS: list[tuple[str, Any, list[str]]] = [
    ("alpaca", "{", ["not JSON: Expecting property name", "at column 2", "'{'"]),
    ("alpaca", '{"instruction": "a', ["not JSON: Unterminated string at column 17: "]),
    ("alpaca", '{"instruction": "a", "output" 1}', ["not JSON", "at column 31", '"output" 1}']),
    ("alpaca", "[1, 2]", ["not a JSON object but a list", "'[1, 2]'"]),
    ("alpaca", '"text"', ["not a JSON object but a text"]),
    ("alpaca", b'{"instruction": "\xff"}', ["invalid UTF-8 at byte offset 17 of the line"]),
    ("alpaca", b'{"instruction": "\xed\xa0\x80"}', ["invalid UTF-8 at byte offset 17"]),  # an encoded surrogate
    ("alpaca", "[" * 100_000, ["not usable JSON"]),
    ("alpaca", '{"a": ' + "9" * 5_000 + "}", ["not usable JSON"]),
    ("alpaca", {**ALPACA, "output": None}, ["column 'output': no answer"]),
    ("alpaca", {**ALPACA, "output": " \n"}, ["column 'output': no answer"]),
    ("alpaca", {**ALPACA, "output": []}, ["no answer"]),
    ("alpaca", {**ALPACA, "output": {"a": 1}}, ["column 'output': a text was expected, found an object"]),
    ("alpaca", {**ALPACA, "output": [["a"]]}, ["a text was expected, found a list"]),
    ("alpaca", {**ALPACA, "instruction": None}, ["column 'instruction': a text was expected, found null"]),
    ("alpaca", {**ALPACA, "instruction": "", "input": ""}, ["column 'instruction': no instruction"]),
    ("alpaca", {**ALPACA, "input": ["a"]}, ["column 'input'", "found a list"]),
    ("alpaca", '{"instruction": "a", "output": "\\ud800"}', ["column 'output': a lone surrogate (\\ud800)"]),
    ("alpaca", '{"instruction": "a", "output": NaN}', ["column 'output': nan is not"]),
    ("alpaca", '{"instruction": "a", "output": -Infinity}', ["column 'output': -inf is not"]),
    ("alpaca", '{"instruction": "a", "output": 1e999}', ["column 'output': inf is not"]),
    ("superni", {**SUPERNI, "outputs": ["", " "]}, ["column 'outputs': no answer"]),
    ("superni", {**SUPERNI, "definition": []}, ["column 'definition'", "found an empty list"]),
    ("chat", {"messages": [user("q")]}, ["column 'messages'", "does not end with an assistant message"]),
    ("chat", {"messages": []}, ["found an empty list"]),
    ("chat", {"messages": "hello"}, ["a list of messages was expected, found a text"]),
    ("chat", {"messages": "[broken"}, ["column 'messages': not JSON"]),
    ("chat", {"messages": ["q", "a"]}, ["a message {role, content} was expected, found a text"]),
    ("chat", {"messages": [{"content": "q"}]}, ["a message has no role"]),
    ("chat", {"messages": [assistant("a")]}, ["no user message before the answer"]),
    ("chat", {"messages": [user("q"), assistant(" ")]}, ["no answer"]),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["'image_url'", "only text"]),
    ("chat", {"messages": [{"role": "user", "content": {"a": 1}}]}, ["a text was expected, found an object"]),
    ("chat", {"messages": [user("q"), {**assistant(""), "function_call": {}}]}, ["function_call", "tool_calls"]),
    ("chat", {"messages": [user("q"), {**assistant("a"), "tool_calls": 5}]}, ["a list was expected"]),
    ("chat", TALK + '"tools": [NaN]}',
     ["column 'tools': cannot be stored as JSON"]),
    ("chat", TALK + '"tools": ["\\udfff"]}',
     ["column 'tools': a lone surrogate"]),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, ["column 'rejected': no answer"]),
    ("preference", {"prompt": "", "chosen": "a", "rejected": "b"}, ["column 'prompt': the prompt is empty"]),
    ("preference", {"prompt": "q", "chosen": None, "rejected": "b"}, ["column 'chosen'", "found null"]),
    ("ranked", {"prompt": "q", "candidates": TWO[:1]}, ["at least 2 candidates are needed, found 1"]),
    ("ranked", {"question": "", "candidates": TWO}, ["column 'question': the prompt is empty"]),
    ("ranked", {"prompt": "q", "candidates": ["a", "b"]}, ["a list of {text, rank} or {text, score} was expected"]),
    ("ranked", {"prompt": "q", "candidates": [*TWO, {"text": " ", "rank": 3}]}, ["a candidate's text is empty"]),
    ("ranked", {"prompt": "q", "candidates": [*TWO, {"text": "c"}]}, ["every candidate needs a rank"]),
    ("ranked", {"prompt": "q", "candidates": [*TWO, {"text": "c", "rank": 0}]}, ["whole numbers from 1"]),
    ("ranked", {"prompt": "q", "candidates": [*TWO, {"text": "c", "rank": 2.5}]}, ["whole numbers from 1"]),
    ("ranked", {"prompt": "q", "candidates": [*TWO, {"text": "c", "rank": "1"}]}, ["rank '1' is not a finite number"]),
    ("ranked", '{"prompt": "q", "candidates": [{"text": "a", "score": NaN}, {"text": "b", "score": 1}]}',
     ["column 'candidates': score nan is not a finite number"]),
    ("ranked", {"prompt": "q", "candidates": [{"text": "a", "score": 10**400}, TWO[0]]}, ["not a finite number"]),
    ("text", {"text": "\n"}, ["column 'text': no answer: the text is empty"]),
]  # fmt: skip
GOOD: dict[str, Any] = {
    "alpaca": ALPACA, "superni": SUPERNI, "chat": {"messages": [user("q"), assistant("a")]}, "text": {"text": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"}, "ranked": {"prompt": "q", "candidates": TWO},
}  # fmt: skip


@pytest.mark.parametrize(("format", "record", "parts"), FAULTS)
def test_faults_of_a_row(tmp_path: Path, format: str, record: Any, parts: list[str]) -> None:
    jsonl(tmp_path, record, GOOD[format])
    text = fault(tmp_path, task(format=format))
    says(text, "data.jsonl: row 1: ", "remedy: mend the row", "bad_rows: drop", *parts)
    assert len(text) < 400, "an excerpt, not the row"
    bad, good = read(task(format=format, bad_rows="drop"), tmp_path)
    assert isinstance(bad, BadRow) and isinstance(good, Row)
    assert (bad.row, good.row) == (1, 2)
    says(bad.reason, *parts)
    line = (tmp_path / "data.jsonl").read_bytes().split(b"\n")[0]
    assert bad.digest == blake2b(line, digest_size=16).hexdigest()


def test_what_is_not_in_the_output_may_be_odd(tmp_path: Path) -> None:
    jsonl(tmp_path, '{"instruction": "a", "output": "b", "x": NaN, "y": "\\ud800"}')
    assert len(rows(tmp_path, task())) == 1


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    jsonl(tmp_path, '{"instruction": "a", "output": "\\ud83d\\ude00"}')
    assert rows(tmp_path, task())[0].references == ["😀"]


def test_digests_of_records_are_those_of_their_canonical_json(tmp_path: Path) -> None:
    pl.DataFrame({"output": ["", "b"], "instruction": ["é", "a"]}).write_parquet(tmp_path / "a.parquet")
    bad, _ = read(task("a.parquet", bad_rows="drop"), tmp_path)
    assert isinstance(bad, BadRow)
    assert bad.digest == blake2b('{"instruction":"é","output":""}'.encode(), digest_size=16).hexdigest()
    (tmp_path / "a.csv").write_text("instruction,output\na\nb,c\n")
    bad, good = read(task("a.csv", bad_rows="drop"), tmp_path)
    assert isinstance(bad, BadRow) and isinstance(good, Row)
    assert (bad.row, bad.reason, good.row) == (1, "has 1 fields, the header has 2", 2)


def test_an_element_of_an_array_that_is_no_object_is_a_fault_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ALPACA, 12345, "x", ALPACA]))
    got = list(read(task("a.json", bad_rows="drop"), tmp_path))
    assert [(type(r), r.row) for r in got] == [(Row, 1), (BadRow, 2), (BadRow, 3), (Row, 4)]


def test_a_source_whose_rows_are_all_bad_is_an_error(tmp_path: Path) -> None:
    says(row_fault(tmp_path, {**ALPACA, "output": ""}, bad_rows="drop"), "no row can be used; row 1: column 'output'")


# ---------------------------------------------------------------------------------------- streaming and identity


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_rows_come_before_the_end_is_looked_at(tmp_path: Path, name: str) -> None:
    if name == "a.json":
        (tmp_path / name).write_text("[" + json.dumps(ALPACA) + ", {broken")
    else:
        jsonl(tmp_path, ALPACA, "{broken", name=name)
    stream = read(task(name), tmp_path)
    assert next(stream).row == 1
    with pytest.raises(InputError, match="row 2"):
        next(stream)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    line = json.dumps({"instruction": "i", "output": "x" * 4_000})
    body = {"a.jsonl.gz": f"{line}\n" * 4_000, "a.json.gz": "[" + ",".join([line] * 4_000) + "]",
            "a.csv.gz": "instruction,output\n" + f"i,{'x' * 4_000}\n" * 4_000}[name]  # fmt: skip
    (tmp_path / name).write_bytes(gzip.compress(body.encode(), 1))
    size = len(body)
    del body
    list(itertools.islice(read(task(name), tmp_path), 10))  # imports
    tracemalloc.start()
    assert sum(1 for _ in read(task(name), tmp_path)) == 4_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 15e6 and peak < 3e6


def test_identify_hashes_files_as_the_config_names_them(tmp_path: Path) -> None:
    jsonl(tmp_path, ALPACA)
    data = (tmp_path / "data.jsonl").read_bytes()
    expected = {"./data.jsonl": hashlib.sha256(data).hexdigest()}
    assert identify(task("./data.jsonl"), tmp_path) == SourceId(expected, len(data))
    folder = tmp_path / "f" / "sub"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(data)
    (tmp_path / "f" / ".cache").write_bytes(b"x")
    assert identify(task("f/"), tmp_path) == SourceId({"f/sub/b.jsonl": expected["./data.jsonl"]}, len(data))


def test_identify_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        identify(task("gone.jsonl"), tmp_path)


def test_a_pinned_hub_data_set_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789abcdef" * 2 + "01234567"
    assert identify(task("o/n", revision=commit), tmp_path) == SourceId({f"hub:o/n@{commit}": commit}, 0)

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(InputError, match=r"o/n: no such file.*offline"):
        identify(task("o/n"), tmp_path)


def test_importing_the_readers_is_light() -> None:
    code = (
        "import sys, curate.readers; print([m for m in ('datasets', 'pyarrow', 'polars', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


ANSWER = st.text(min_size=1).filter(lambda t: not t.isspace())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    data=st.lists(
        st.tuples(ANSWER, st.text(), st.lists(ANSWER, min_size=1, max_size=3)), min_size=1, max_size=5
    ),
    ascii=st.booleans(),
    name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json"]),
)  # fmt: skip
def test_what_is_written_is_what_is_read(tmp_path: Path, data: list[Any], ascii: bool, name: str) -> None:
    records = [{"instruction": i, "input": n, "output": o} for i, n, o in data]
    lines = [json.dumps(r, ensure_ascii=ascii) for r in records]
    raw = ("[" + ", ".join(lines) + "]" if name == "a.json" else "\n".join(lines)).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    got = rows(tmp_path, task(name))
    assert [(r.row, r.instruction, r.references) for r in got] == [(k, i, o) for k, (i, _, o) in enumerate(data, 1)]
    for row, (instruction, given_input, outputs) in zip(got, data, strict=True):
        blank = not given_input.strip()
        assert row.prompt == [user(instruction if blank else f"{instruction}\n\n{given_input}")]
        assert row.completion == [assistant(outputs[0])]
