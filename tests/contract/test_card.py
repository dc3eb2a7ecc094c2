"""The data card: front matter that the hub and `datasets` read, licences with what they forbid, hostile text."""

import re

import polars as pl
import pytest
import yaml
from datasets import load_dataset

from curate.build import build
from curate.manifest import TABLES, read
from curate.manifest.card import card
from curate.manifest.licences import LIMITS, hub_ids, limits, warning

HOSTILE = "<script>alert(1)</script>\n---\nlicense: mit\n| a | `b` | [x](http://evil) \x1b[2J \u202e 😀 \" ' # * _ ~"


def front_matter(text):
    """(mapping, the rest): what stands between the first two lines of three dashes."""
    assert text.startswith("---\n")
    head, _, body = text[4:].partition("\n---\n")
    return yaml.safe_load(head), body


@pytest.fixture
def small(write_jsonl, tmp_path):
    """small(licences of the older task, …) -> manifest of two tasks of so many rows each, built without a model."""

    def make(*licences, **more):
        rows = [{"instruction": f"say {i}", "output": str(i), "license": each} for i, each in enumerate(licences)]
        write_jsonl("old.jsonl", rows)
        write_jsonl("new.jsonl", [{"instruction": "say hello", "output": "hello", "license": "MIT"}])
        tasks = [{"name": n, "path": f"{n}.jsonl", "format": "alpaca"} for n in ("old", "new")]
        replay = {"selector": "uniform", "budget": len(rows)}
        config = {"name": "small", "tasks": tasks, "replay": replay, "base": str(tmp_path), **more}
        return build({**config, "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache")})

    return make


@pytest.mark.parametrize(
    ("name", "ids", "forbids"),
    [
        ("MIT", ["mit"], []),
        ("The MIT License", ["mit"], []),
        ("Apache License, Version 2.0", ["apache-2.0"], []),
        ("Apache-2.0 AND CC0-1.0", ["apache-2.0", "cc0-1.0"], []),
        ("CC0: Public Domain", ["cc0-1.0"], []),
        ("CC BY", ["cc"], []),
        ("CC BY-NC 4.0", ["cc-by-nc-4.0"], ["non-commercial"]),
        ("cc-by-nc-nd-4.0", ["cc-by-nc-nd-4.0"], ["non-commercial", "no derivatives"]),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", ["cc-by-nc-sa-4.0"],
         ["non-commercial", "share-alike"]),
        ("https://creativecommons.org/licenses/by-sa/4.0/", ["cc-by-sa-4.0"], ["share-alike"]),
        ("CC BY-SA 4.0; MIT", ["cc-by-sa-4.0", "mit"], ["share-alike"]),
        ("GPL-3.0-or-later OR MIT", ["mit"], []),
        ("GPLv3", ["gpl-3.0"], ["share-alike"]),
        ("(MIT OR Apache-2.0) AND CC-BY-SA-4.0", ["apache-2.0", "cc-by-sa-4.0", "mit"], ["share-alike"]),
        ("bigscience-openrail-m", ["openrail"], ["restricted use"]),
        ("for research only", ["other"], ["non-commercial", "unknown"]),
        ("academic use", ["other"], ["non-commercial", "unknown"]),
        ("MIT, proprietary", ["mit", "other"], ["unknown"]),
        ("MIT-like", ["other"], ["unknown"]),
        (None, ["unknown"], ["unknown"]),
    ],
)  # fmt: skip
def test_licences_by_their_names(name, ids, forbids):
    assert hub_ids(name) == ids
    assert list(limits(name)) == forbids
    assert set(forbids) <= LIMITS.keys()


@pytest.mark.parametrize(
    ("name", "forbids"),
    [
        ("CC BY-NC-ND 4.0; Apache-2.0", ["non-commercial", "no derivatives"]),
        ("CC BY-NC-SA 4.0 AND MIT", ["non-commercial", "share-alike"]),
        ("https://creativecommons.org/licenses/by-nc-nd/4.0/legalcode", ["non-commercial", "no derivatives"]),
        ("CC BY-NC-SA 3.0 US", ["non-commercial", "share-alike"]),
        ("https://creativecommons.org/licenses/by-nd/4.0/legalcode", ["no derivatives"]),
        ("GPL-3.0 OR CC-BY-NC-4.0", ["share-alike"]),
        ("CC-BY-NC-4.0 OR GPL-3.0", ["share-alike"]),
    ],
)
def test_nothing_that_one_of_several_forbids_is_lost(name, forbids):
    assert list(limits(name)) == forbids and "other" not in hub_ids(name)


def test_a_warning_for_each_use_that_a_licence_forbids(small):
    manifest = small("CC BY-NC-SA 4.0", "CC BY-NC 4.0", "MIT", None)
    text = (manifest.folder / "README.md").read_text()
    # of 4 old rows and 1 new one: two non-commercial, one of them share-alike too, one without a licence
    assert "**Warning: non-commercial** (2 of 5 rows)" in text
    assert "**Warning: share-alike** (1 of 5 rows)" in text
    assert "**Warning: unknown** (1 of 5 rows)" in text
    assert "no derivatives" not in text
    assert front_matter(text)[0]["license"] == ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "unknown"]
    assert "non-commercial 2, share-alike 1, unknown 1" in (warning(manifest.samples) or "")


def test_the_build_says_so_on_the_screen(small, monkeypatch):
    notes = []
    monkeypatch.setattr("curate.screen.Silent.note", lambda self, text: notes.append(text))
    small("CC BY-ND 4.0", "MIT")
    assert notes == [
        "licences of the sources restrict the use of rows: no derivatives 1; the card (README.md) tells which"
    ]
    small("MIT", "Apache-2.0")
    assert len(notes) == 1


def test_free_licences_give_no_warning(small):
    manifest = small("MIT", "MIT")
    text = (manifest.folder / "README.md").read_text()
    assert "Warning" not in text and warning(manifest.samples) is None
    assert front_matter(text)[0]["license"] == "mit"


def test_the_front_matter_keeps_the_hubs_conventions(small):
    facts, body = front_matter((small("MIT").folder / "README.md").read_text())
    assert facts["size_categories"] == ["n<1K"]
    assert facts["task_categories"] == ["text-generation"]
    assert facts["annotations_creators"] == facts["language_creators"] == ["found"]
    assert [c["config_name"] for c in facts["configs"]] == ["samples", "tasks", "instructions"]
    assert [c["config_name"] for c in facts["configs"] if c.get("default")] == ["samples"]
    sections = re.findall("^## (.+)$", body, flags=re.MULTILINE)
    assert {"Uses", "Structure", "Considerations", "Licences", "Provenance", "Citation"} <= set(sections)
    for column in TABLES["samples"].columns:
        assert f"| `{column}` |" in body
    assert (
        "| file | one row a | rows |" in body
        and "| `augmentations.parquet` | rewrite of a sample, kept or not |" in body
    )
    assert "BLAKE2b-128 (see `sample_uid`)" in body and "largest possible \\|distance - exact distance\\|" in body
    assert "&#" not in body, "our own texts are plain"


def test_every_table_with_rows_loads_by_its_name(small):
    manifest = small("MIT", "MIT", tags={"cluster": False}, replay={"selector": "insinfo_only", "budget": 1})
    loaded = {c["config_name"] for c in front_matter((manifest.folder / "README.md").read_text())[0]["configs"]}
    assert loaded == {"samples", "tasks", "instructions", "tags", "drops"}
    for name in loaded:
        frame = getattr(manifest, name)
        data = load_dataset(str(manifest.folder), name, split="train", cache_dir=str(manifest.folder.parent / "hf"))
        assert data.num_rows == frame.height
        assert data.column_names == frame.columns
        assert data[0][frame.columns[0]] == frame[0, 0]


def test_hostile_text_stays_text(small):
    manifest = small(HOSTILE, name=HOSTILE)
    text = (manifest.folder / "README.md").read_text()
    facts, body = front_matter(text)
    shown = "<script>alert(1)</script> --- license: mit | a | `b` | [x](http://evil)  [2J   😀 \" ' # * _ ~"
    assert facts["pretty_name"] == shown
    assert facts["license_details"] == f"{shown}; MIT"
    assert facts["license"] == ["mit", "other"]
    assert "<script" not in text and "](http" not in text and "\x1b" not in text and "\u202e" not in text
    line = next(line for line in body.splitlines() if "license: mit" in line and line.startswith("|"))
    assert line.count("|") == 5  # four cells, whatever the text holds


def test_the_card_comes_from_tables_and_provenance_alone(small):
    manifest = small("MIT")
    frames = {name: getattr(read(manifest.folder), name) for name in TABLES}
    assert card(frames, manifest.provenance) == (manifest.folder / "README.md").read_text()
    more = frames | {"samples": frames["samples"].with_columns(license=pl.lit("ODbL"))}
    assert front_matter(card(more, manifest.provenance))[0]["license"] == "odbl"
    hub = {"task": "old", "files": {"hub:owner/name@0123abc": "0123abc"}}
    facts = front_matter(card(frames, manifest.provenance | {"inputs": [hub]}))[0]
    assert facts["source_datasets"] == ["extended|owner/name"]
