"""A manifest shows itself: what it says is what its tables hold, and text of the data stays text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from curate.manifest import TABLES, Manifest
from curate.manifest.schema import SCHEMA_VERSION
from curate.manifest.show import MOST

HOSTILE = "<script>alert(1)</script>\n<img src=x onerror=y>&\u202e\x00'\""


class Page(HTMLParser):
    """Tags with their attributes, and the cells of the table's rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data


def manifest(tasks, samples=(), rolled=False, name="set"):
    """A manifest in memory: tasks of (name, quota), samples of (task, origin)."""
    quotas = [{"task": t, "stage": i, "rows": 1200, "instructions": 2, "distance": None if q is None else 0.25,
               "quota": q, "granted": q, "rollouts": 5 if rolled else None,
               **{b: (n if rolled else None) for n, b in enumerate(
                   ["high_performance", "overfitting", "high_variance", "noisy", "normal"])}}
              for i, (t, q) in enumerate(tasks, 1)]  # fmt: skip
    rows = [{"uid": f"{i:032x}", "task": t, "origin": o} for i, (t, o) in enumerate(samples)]
    frames = {table: TABLES[table].empty() for table in TABLES}
    frames["tasks"] = TABLES["tasks"].fit(pl.DataFrame(quotas)) if quotas else frames["tasks"]
    frames["samples"] = TABLES["samples"].fit(pl.DataFrame(rows)) if rows else frames["samples"]
    provenance = {"config": {"name": name}, "replay": {"selector": "inscl"}, "schema_version": SCHEMA_VERSION}
    return Manifest(folder=Path("runs/x"), provenance=provenance, **frames)


def test_a_line_counts_what_is_there():
    samples = [("a", "replay"), ("b", "current"), ("b", "current"), ("b", "augmented")]
    shown = repr(manifest([("a", 1), ("b", None)], samples))
    assert shown == "Manifest('runs/x': 2 tasks, 1 augmented, 2 current, 1 replay)"
    assert repr(manifest([])) == "Manifest('runs/x': 0 tasks, no samples)"


def test_the_table_holds_quotas_origins_and_buckets():
    samples = [("a", "replay"), ("b", "current"), ("b", "current")]
    page = Page(manifest([("a", 3), ("b", None)], samples, rolled=True)._repr_html_())
    assert page.rows == [
        ["stage", "task", "rows", "distance", "quota", "granted", "current", "replay", "high performance",
         "overfitting", "high variance", "noisy", "normal"],
        ["1", "a", "1,200", "0.2500", "3", "3", "0", "1", "0", "1", "2", "3", "4"],
        ["2", "b", "1,200", "–", "–", "–", "2", "0", "0", "1", "2", "3", "4"],
    ]  # fmt: skip
    plain = Page(manifest([("a", 3)], samples)._repr_html_())
    assert "noisy" not in plain.rows[0]


@pytest.mark.parametrize("where", ["task", "name", "selector", "folder"])
def test_hostile_text_stays_text(where):
    shown = manifest([(HOSTILE if where == "task" else "a", 1)], name=HOSTILE if where == "name" else "set")
    if where == "selector":
        shown = replace(shown, provenance=shown.provenance | {"replay": {"selector": HOSTILE}})
    if where == "folder":
        shown = replace(shown, folder=Path(HOSTILE.replace("\x00", "")))
    text = shown._repr_html_()
    assert {tag for tag, _ in Page(text).tags} <= {
        "div", "p", "strong", "br", "table", "thead", "tbody", "tr", "th", "td", "code",
    }  # fmt: skip
    assert {name for _, attributes in Page(text).tags for name in attributes} <= {"scope"}
    assert "\u202e" not in text and "\x00" not in text and "&lt;script&gt;" in text
    assert "\n" not in repr(shown)


def test_a_long_stream_is_cut_and_says_so():
    text = manifest([(f"t{i}", 1) for i in range(MOST + 3)])._repr_html_()
    assert len(Page(text).rows) == 1 + MOST and "and 3 tasks more" in text


def test_every_table_is_counted():
    text = manifest([("a", 1)], [("a", "replay")])._repr_html_()
    counts = dict(re.findall(r"<code>(\w+)</code>&nbsp;(\d+)", text))
    assert counts == {name: "1" if name in ("tasks", "samples") else "0" for name in TABLES}
