"""The shipped demo data keeps the promises of its card. Nothing outside the repository is read."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from curate.config import BuildConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "superni"
CARD = (ROOT / "data_cards" / "superni.md").read_text(encoding="utf-8")

Row = dict[str, Any]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select_rows = _load(FOLDER / "select_rows.py")
CATEGORIES: tuple[str, ...] = select_rows.CATEGORIES
FEWER = {"program_execution": 29}  # the exception that the card states


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Row]]:
    return {category: list(select_rows.read(FOLDER / f"{category}.jsonl.gz")) for category in CATEGORIES}


@pytest.fixture(scope="module")
def rows(shipped: dict[str, list[Row]]) -> list[Row]:
    return [row for category in CATEGORIES for row in shipped[category]]


def _card_table(heading: str) -> list[dict[str, str]]:
    """The Markdown table under a heading of the card, one mapping a line."""
    section = CARD.split(f"\n### {heading}\n", 1)[1].split("\n### ", 1)[0]
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def test_the_folder_holds_the_sixteen_files() -> None:
    assert {path.name for path in FOLDER.glob("*.gz")} == {f"{category}.jsonl.gz" for category in CATEGORIES}
    assert len(CATEGORIES) == 16
    assert sum(path.stat().st_size for path in FOLDER.glob("*.gz")) < 700_000


@pytest.mark.parametrize("category", CATEGORIES)
def test_gzip_has_neither_time_nor_file_name(category: str) -> None:
    header = (FOLDER / f"{category}.jsonl.gz").read_bytes()[:8]
    assert header[:2] == b"\x1f\x8b"
    assert header[3] == 0  # FLG: no FNAME
    assert header[4:8] == bytes(4)  # MTIME


@pytest.mark.parametrize("category", CATEGORIES)
def test_size_and_splits_of_a_category(shipped: dict[str, list[Row]], category: str) -> None:
    here = shipped[category]
    if category in FEWER:
        assert len(here) == FEWER[category]
        assert f"**{category} has {len(here)} rows" in CARD
    else:
        assert 60 <= len(here) <= 100
    assert {row["category"].lower() for row in here} == {category}
    assert {row["split"] for row in here} == {"train", "test"}
    assert 0.75 <= sum(row["split"] == "train" for row in here) / len(here) <= 0.85
    assert len({row["input"] for row in here}) == len(here)


def test_every_licence_is_permissive_and_nothing_offends(rows: list[Row]) -> None:
    refused = [(row["id"], select_rows.drop_reason(row)) for row in rows if select_rows.drop_reason(row)]
    assert refused == []
    stated = {licence for row in rows for licence in row["instance_license"]}
    assert stated and not [name for name in stated if re.search(r"SA|NC|ND|GPL|Unknown|http(?!s://librivox)", name)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instance_license": ["CC BY-SA 4.0"]}, "licence"),
        ({"instance_license": ["MIT", "Unknown"]}, "licence"),
        ({"instance_license": []}, "licence"),
        ({"superni_category": "Stereotype Detection"}, "offensive task"),
        ({"task": "task904_hate_speech_offensive_classification"}, "offensive task"),
        ({"definition": "Say whether the post is toxic."}, "offensive task"),
        ({"task": "task1290_xsum_summarization"}, "excluded task"),
        ({"input": "x" * 701}, "long"),
        ({"outputs": ["fine", "x" * 701]}, "long"),
        ({"input": "He was MURDERED."}, "content"),
        ({"input": "O, damnit!"}, "content"),  # by hash
        ({"outputs": ["fine", "mail jo.do@example.org"]}, "content"),
        ({"input": "call (415) 555-0100"}, "content"),
        ({"input": "call 4155550100"}, "content"),
        ({"input": "see www.example.org"}, "content"),
        ({"input": "thanks @some_body"}, "content"),
    ],
)
def test_the_filter_refuses(rows: list[Row], change: Row, reason: str) -> None:
    assert select_rows.drop_reason({**rows[0], **change}) == reason


@pytest.mark.parametrize("text", ["Sussex", "a skilled worker", "whatever I do", "3 @ 5 rs", "1 2 3 4 5 6 7 8 9 10 11"])
def test_the_filter_knows_word_boundaries(rows: list[Row], text: str) -> None:
    assert select_rows.drop_reason({**rows[0], "definition": text, "input": text}) is None


def test_rows_have_their_fields_and_unique_ids(rows: list[Row]) -> None:
    assert all(tuple(row) == select_rows.FIELDS for row in rows)
    assert all(row["definition"].strip() and row["input"].strip() and row["outputs"][0].strip() for row in rows)
    assert [name for name, count in Counter(row["id"] for row in rows).items() if count > 1] == []


@pytest.mark.parametrize(
    ("heading", "column", "key"),
    [
        ("By category", "category", lambda row: row["category"]),
        ("By licence", "licence", lambda row: ", ".join(row["instance_license"])),
        ("By source: attributions", "source", lambda row: ", ".join(row["source"])),
        ("By task", "task", lambda row: row["task"]),
    ],
)
def test_counts_of_the_card(rows: list[Row], heading: str, column: str, key: Callable[[Row], str]) -> None:
    card = {line[column]: tuple(int(line[k]) for k in ("rows", "train", "test")) for line in _card_table(heading)}
    total, splits = Counter(map(key, rows)), Counter((key(row), row["split"]) for row in rows)
    assert card == {name: (n, splits[name, "train"], splits[name, "test"]) for name, n in total.items()}


def test_definitions_and_attributions_of_the_card(shipped: dict[str, list[Row]], rows: list[Row]) -> None:
    for line in _card_table("By category"):
        here = shipped[line["category"].lower()]
        assert int(line["definitions"]) == len({row["definition"] for row in here})
        assert int(line["tasks"]) == len({row["task"] for row in here})
    stated = {
        line["source"]: (line["licence, as SuperNI states it"], line["address"])
        for line in _card_table("By source: attributions")
    }
    for row in rows:
        licence, address = stated[", ".join(row["source"])]
        assert ", ".join(row["instance_license"]) in licence
        assert address.startswith("http")


def test_totals_in_the_card(rows: list[Row]) -> None:
    train = sum(row["split"] == "train" for row in rows)
    tasks = len({row["task"] for row in rows})
    assert f"{len(rows):,} English rows ({train:,} train, {len(rows) - train} test) of {tasks} " in CARD


@pytest.mark.parametrize("name", ["config.yaml", "reverse.yaml", "random.yaml"])
def test_configs_load_and_name_the_sixteen_files(name: str) -> None:
    config = BuildConfig.load(FOLDER / name)
    order = [task.name for task in config.tasks]
    assert sorted(order) == sorted(CATEGORIES)
    assert all(task.path == f"{task.name}.jsonl.gz" and config.resolve(task.path).is_file() for task in config.tasks)
    assert {(task.format, task.split) for task in config.tasks} == {("superni", "train")}
    assert (config.seed, config.replay.selector, config.replay.budget) == (0, "inscl", 200)
    expected = {"config.yaml": list(CATEGORIES), "reverse.yaml": list(CATEGORIES)[::-1]}
    assert order == expected.get(name, order)
    if name == "random.yaml":
        assert order not in expected.values()


def _write(path: Path, rows: list[Row]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_script_is_deterministic_and_idempotent(tmp_path: Path, shipped: dict[str, list[Row]]) -> None:
    """From the shipped rows themselves, in another order, the script selects the same rows again."""
    for category, here in shipped.items():
        _write(tmp_path / f"{category}.jsonl.gz", [] if category in FEWER else here[::-1])
    base = [{k: row[k] for k in ("task", "category", "definition", "input", "outputs", "instance_license")}
            for row in shipped["program_execution"][::-1]]  # fmt: skip
    _write(tmp_path / "superni_base_permissive.jsonl.gz", base)
    first = shipped["program_execution"][0]
    about = {"name": first["task"], "superni_categories": [first["superni_category"]], "url": ["http://example.org"]}
    _write(tmp_path / "superni_full_instructions.jsonl.gz", [{**about, **{k: first[k] for k in ("source", "domains")}}])
    select_rows.main(tmp_path, tmp_path / "out")
    for category in CATEGORIES:
        assert list(select_rows.read(tmp_path / "out" / f"{category}.jsonl.gz")) == shipped[category]
