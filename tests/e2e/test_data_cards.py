"""Every file of data that is shipped has one card, and the card says of it what is so."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCardData

from curate.manifest.card import SIZES
from curate.manifest.licences import limits

ROOT = Path(__file__).parents[2]
CARDS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "data_cards").glob("*.md"))}
OURS = {".py", ".yaml", ".json"}  # scripts and configurations, made here
MODEL = ROOT / "examples/starter"
SECTIONS = ("Where it comes from", "Fields", "Selection rule", "Known problems", "Citation")


def files_of(card):
    """The data files that a card's line `File: …` or `Files: …` names; <…> stands for any name."""
    line = re.search(r"^Files?: `(examples/[^`]+)`", CARDS[card], flags=re.MULTILINE)
    assert line, f"{card}: no line that names its files"
    return sorted(ROOT.glob(re.sub("<[^>]+>", "*", line[1])))


def rows_of(card):
    return [json.loads(line) for path in files_of(card) for line in gzip.open(path, "rt", encoding="utf-8")]


def front_matter(card):
    head = CARDS[card].split("---\n")[1]
    return yaml.safe_load(head)


DATA = [card for card in CARDS if card != "starter"]


def test_every_shipped_file_has_exactly_one_card():
    shipped = [path for path in (ROOT / "examples").rglob("*") if path.is_file() and path.suffix not in OURS]
    shipped = [path for path in shipped if not {"__pycache__", "accelerate"} & {*path.parts}]  # launchers are no data
    data = Counter(path for card in DATA for path in files_of(card))
    assert {path for path in shipped if MODEL not in path.parents} == set(data)
    assert set(data.values()) == {1}
    assert all(f"| {path.name} |" in CARDS["starter"] for path in MODEL.iterdir() if path.is_file()
               and path.name not in ("prepare.py", "data.yaml", "held_out.yaml", "recipe.yaml"))  # fmt: skip


@pytest.mark.parametrize("card", DATA)
def test_front_matter_is_complete(card):
    facts = front_matter(card)
    DatasetCardData(**facts)  # the hub's own reader takes it
    for key in ("pretty_name", "language", "license", "license_details", "annotations_creators", "language_creators",
                "size_categories", "source_datasets", "task_categories", "tags"):  # fmt: skip
        assert facts.get(key), key
    assert facts["license"] != "other" or facts["license_name"]
    n = len(rows_of(card))
    assert facts["size_categories"] == [next(name for most, name in SIZES if n < most)]


@pytest.mark.parametrize("card", DATA)
def test_counts_and_fields_are_those_of_the_data(card):
    rows = rows_of(card)
    splits = Counter(row["split"] for row in rows)
    assert re.search(rf"^{len(rows):,} English \w+ \({splits['train']:,} train, {splits['test']:,} test\)", CARDS[card],
                     flags=re.MULTILINE)  # fmt: skip
    fields = CARDS[card].split("\n## Fields\n")[1].split("\n## ")[0]
    named = {
        name.strip() for line in fields.splitlines() if line.startswith("|") for name in line.split("|")[1].split(",")
    }
    assert set().union(*rows) == named - {"field", "---"}


@pytest.mark.parametrize("card", DATA)
def test_licences_are_those_of_the_rows_and_forbid_nothing(card):
    stated = set()
    for row in rows_of(card):
        value = row.get("instance_license", row.get("license"))
        stated |= set(value if isinstance(value, list) else [value])
    assert stated and [name for name in stated if limits(name)] == []
    assert all(name.split(" (")[0] in CARDS[card] for name in stated)


@pytest.mark.parametrize("card", DATA)
def test_sections(card):
    found = re.findall("^## (.+)$", CARDS[card], flags=re.MULTILINE)
    assert all(any(name.startswith(section) for name in found) for section in SECTIONS)
    origin = CARDS[card].split("\n## Where it comes from")[1].split("\n## ")[0]
    assert re.search(r"\b[0-9a-f]{40}\b", origin), "the commit of the source"
