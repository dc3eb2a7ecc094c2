"""What changed between two builds: counts that add up, a cause for every row, a page that shows data as text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from browser import MISSING, cut_off, js, visit
from commands import called
from hypothesis import given
from hypothesis import strategies as st

from curate.build import build
from curate.cli import main
from curate.diff import CAUSES, diff
from curate.diff_view import MOST, page, sections, summary
from curate.manifest import Manifest
from curate.manifest.schema import AUGMENTATIONS, COMPLETIONS, DROPS, INSTRUCTIONS, SAMPLES, TAGS, TASKS

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=y>\n\u202e\x00 & ' \" | ` ---"


def curate(*words, cwd=None):
    return called(main, *words, cwd=cwd)


def adds_up(found, a, b):
    """The identity: rows of a = kept + out, rows of b = kept + in, in all and in every task."""
    out, new = found.count("out"), found.count("in")
    assert (a.samples.height, b.samples.height) == (found.kept + out, found.kept + new)
    gone, come = set(a.samples["uid"]) - set(b.samples["uid"]), set(b.samples["uid"]) - set(a.samples["uid"])
    assert set(found.rows.filter(move="out")["uid"]) == gone and set(found.rows.filter(move="in")["uid"]) == come
    for manifest, move in ((a, "out"), (b, "in")):
        counts = dict(manifest.samples.group_by("task").len().iter_rows())
        held = {t: k + m for t, k, m in found.tasks.select("task", "kept", move).iter_rows() if k + m}
        assert held == counts
    assert found.rows["why"].is_in(list(CAUSES)).all() and found.rows["uid"].is_unique().all()


@pytest.fixture
def run(write_jsonl, tmp_path):
    """run(folder, {task: rows}, setting=…) -> manifest of tasks whose rows are {instruction, output, tags}."""

    def make(place, tasks, *, replay=None, **more):
        listed = []
        for task, rows in tasks.items():
            write_jsonl(f"{place}-{task}.jsonl", rows)
            listed.append(
                {"name": task, "path": f"{place}-{task}.jsonl", "format": "alpaca", "columns": {"tags": "tags"}}
            )
        config = {
            "name": "set", "tasks": listed, "replay": replay or {"selector": "uniform", "budget": 4},
            "tags": {"tagger": "column", "cluster": False}, **more,
        }  # fmt: skip
        where = {"base": str(tmp_path), "out": str(tmp_path / place), "cache": str(tmp_path / "cache")}
        return build(config | where)

    return make


def rows(n, text="old", instructions=2, tags="ab"):
    kind = [i % instructions for i in range(n)]
    return [{"instruction": f"{text} {k}", "output": str(i), "tags": [tags[k]]} for i, k in enumerate(kind)]


CURRENT = [{"instruction": "new", "output": "n", "tags": ["c"]}]


def causes(found):
    return {(move, why): n for move, why, n in found.rows.group_by("move", "why").len().iter_rows()}


# --- builds ---


def test_the_same_build_twice_is_no_difference(run):
    a, b = (run(name, {"old": rows(8), "new": CURRENT}) for name in "ab")
    found = diff(a, a)
    adds_up(found, a, a)
    assert found.rows.height == found.settings.height == 0 and found.notes == ["all tables are the same, byte for byte"]
    # another file name is a setting; the source is the same
    assert set(diff(a, b).settings["key"]) == {"tasks.old.path", "tasks.new.path"}


def test_a_larger_budget(run):
    a = run("x", {"old": rows(8), "new": CURRENT})
    b = run("x", {"old": rows(8), "new": CURRENT}, replay={"selector": "uniform", "budget": 6})
    found = diff(a, b)
    adds_up(found, a, b)
    # 4 of 8 rows, then 6: two came in, and more only where the draw itself turned
    new, out = found.count("in"), found.count("out")
    assert new - out == 2
    assert causes(found)["in", "quota"] == new
    assert found.settings.rows() == [("setting", "replay.budget", "4", "6")]
    task = found.tasks.row(0, named=True)
    assert (task["task"], task["quota_a"], task["quota_b"], task["granted_a"], task["granted_b"]) == ("old", 4, 6, 4, 6)
    assert "rows granted to its task: 4 → 6" in set(found.rows["detail"])
    back = diff(b, a)
    assert causes(back)["out", "quota"] == new and "rows granted to its task: 6 → 4" in set(back.rows["detail"])


def test_another_seed_and_another_selector(run):
    a = run("x", {"old": rows(40), "new": CURRENT}, replay={"selector": "uniform", "budget": 20})
    b = run("x", {"old": rows(40), "new": CURRENT}, replay={"selector": "uniform", "budget": 20}, seed=1)
    found = diff(a, b)
    adds_up(found, a, b)
    assert found.count("in") == found.count("out") > 0
    assert set(causes(found)) == {("in", "seed"), ("out", "seed")} and set(found.rows["detail"]) == {"seed: 0 → 1"}
    c = run("x", {"old": rows(40), "new": CURRENT}, replay={"selector": "insinfo_only", "budget": 20})
    found = diff(a, c)
    adds_up(found, a, c)
    assert set(causes(found)) <= {("in", "setting"), ("out", "setting")}
    assert set(found.rows["detail"]) <= {"replay.selector: uniform → insinfo_only"}


def test_rows_that_vanish_appear_or_change_at_the_source(run):
    old = rows(6)
    a = run("a", {"old": old, "new": CURRENT}, replay={"selector": "uniform", "budget": 6})
    changed = [*old[:4], {**old[4], "output": "edited"}, *rows(3, "more")]  # row 5 edited, row 6 gone, three more
    b = run("b", {"old": changed, "new": CURRENT}, replay={"selector": "uniform", "budget": 8})
    found = diff(a, b)
    adds_up(found, a, b)
    # rows 5 and 6 have other texts in b (5 is edited, 6 is one of the new ones); 7 and 8 have no number in a
    assert causes(found) == {("out", "source"): 2, ("in", "source"): 4}
    details = found.rows.filter(move="in")["detail"].to_list()
    assert sorted(details) == ["row 5 reads otherwise in the other source", "row 6 reads otherwise in the other source",
                               "the other source has no such row", "the other source has no such row"]  # fmt: skip
    assert {r[1] for r in found.settings.filter(kind="source").rows()} == {"old"}


def test_a_stream_that_goes_on(run):
    """The current task becomes an older one: its rows stay as replay, or are out because of its role."""
    first, second = rows(3), rows(10, "two")
    a = run("a", {"old": first, "mid": second}, replay={"selector": "uniform", "budget": 3})
    b = run("b", {"old": first, "mid": second, "new": CURRENT}, replay={"selector": "uniform", "budget": 8})
    found = diff(a, b)
    adds_up(found, a, b)
    shown = causes(found)
    assert shown["in", "task"] == 1  # the one row of the new task
    drawn = b.samples.filter(task="mid").height
    assert shown["out", "role"] == 10 - drawn
    assert set(found.rows.filter(why="role")["detail"]) == {f"rows drawn: all → {drawn}"}
    assert found.changed["origin"] == drawn  # current in a, replay in b
    assert any(note.startswith("different streams") for note in found.notes)
    assert "the current task is 'mid' and 'new'" in found.notes


def test_streams_without_a_common_task(run):
    a, b = run("a", {"one": rows(5), "two": CURRENT}), run("b", {"three": rows(5), "four": CURRENT})
    found = diff(a, b)
    adds_up(found, a, b)
    assert found.kept == 0 and set(found.rows["why"]) == {"task"}
    assert found.notes[0] == "different streams: they have no task in common"


def test_other_tags_move_rows(run):
    """Two instructions with equal InsInfo get two rows each; a tag more for the second gives it more."""
    old = rows(12)
    replay = {"selector": "insinfo_only", "budget": 6}
    a = run("a", {"old": old, "new": CURRENT}, replay=replay)
    # log(2/1) each: 3 and 3 of 6. With a second tag of its own the other has 2 log 2: shares 2 and 4
    b = run("b", {"old": [r | {"tags": [*r["tags"], *("z" if r["tags"] == ["b"] else "")]} for r in old],
                  "new": CURRENT}, replay=replay)  # fmt: skip
    assert a.instructions.filter(task="old").sort("instruction")["granted"].to_list() == [3, 3]
    assert b.instructions.filter(task="old").sort("instruction")["granted"].to_list() == [2, 4]
    found = diff(a, b)
    # tags belong to the source's rows, not to their content hash, so a row with another tag is the same row
    adds_up(found, a, b)
    assert found.count("in") - found.count("out") == 0
    assert causes(found)["in", "tags"] >= 1
    assert set(found.rows.filter(why="tags")["detail"]) == {"+ z"}
    assert causes(found)["out", "score"] >= 1  # the other instruction's share fell, its own tags being the same
    assert set(found.rows.filter(why="score")["detail"]) == {"other instructions of its task have another InsInfo"}


# --- causes and buckets that need a policy: tables by hand ---


def manifest(folder="runs/x", samples=(), rewrites=(), completions=(), drops=(), settings=None):
    """A manifest in memory with the task `t`, of which 2 rows are granted, and the current task `now`."""

    def frame(table, given):
        return table.fit(pl.DataFrame(list(given))) if given else table.empty()

    tasks = [{"task": "t", "stage": 1, "rows": 9, "granted": 2, "quota": 2}, {"task": "now", "stage": 2, "rows": 1}]
    config = {"name": "x", "seed": 0, "tasks": [{"name": "t"}, {"name": "now"}], "replay": {"selector": "inscl"}}
    samples = [{"task": "t", "stage": 1, "origin": "replay", "row": 1, "instruction": "i", "written_by": "gold",
                **s} for s in samples]  # fmt: skip
    return Manifest(
        folder=Path(folder), samples=frame(SAMPLES, samples), completions=frame(COMPLETIONS, completions),
        tasks=frame(TASKS, tasks), instructions=INSTRUCTIONS.empty(), tags=TAGS.empty(),
        augmentations=frame(AUGMENTATIONS, rewrites), drops=frame(DROPS, drops),
        provenance={"config": config | (settings or {}), "replay": {"selector": "inscl"}, "outputs": {folder: ""}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"samples": [{"uid": "q", "written_by": "policy"}]}, ("answer", "written by: gold → policy")),
        ({"drops": [{"uid": "u", "task": "t", "step": "rollout", "reason": "no good rollout"}]},
         ("unusable", "no good rollout")),
        ({"drops": [{"uid": "u", "task": "t", "step": "sample", "reason": "not drawn"}]},
         ("draw", "other rows of its task were drawn")),
        ({}, ("source", "the other source has no such row")),
    ],
)  # fmt: skip
def test_causes_of_a_drawn_row(there, expected):
    a, b = manifest(samples=[{"uid": "u"}]), manifest(**there)
    found = diff(a, b)
    adds_up(found, a, b)
    assert found.rows.filter(move="out").select("why", "detail").row(0) == expected


REWRITE = {"uid": "r", "parent_uid": "p", "origin": "augmented", "row": None, "written_by": "policy"}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"samples": []}, ("parent", "it rewrites p")),
        ({"samples": [{"uid": "p"}]}, ("setting", "augment: rewrites → none")),
        ({"samples": [{"uid": "p"}], "settings": {"augment": {"theta": 0.1}}},
         ("rewrite", "the other build has no such rewrite")),
        ({"samples": [{"uid": "p"}], "rewrites": [{"uid": "r", "kept": False, "score": 0.15}],
          "settings": {"augment": {"theta": 0.2}}}, ("setting", "augment.theta: 0.1000 → 0.2000")),
        ({"samples": [{"uid": "p"}], "rewrites": [{"uid": "r", "kept": False, "score": 0.05}],
          "settings": {"augment": {"theta": 0.1}}}, ("score", "MI(x, x̂) · MI(y, ŷ) is 0.0500 there")),
        ({"samples": [{"uid": "p"}], "rewrites": [{"uid": "r", "kept": False, "fault": "it is empty"}],
          "settings": {"augment": {"theta": 0.2}}}, ("score", "it is empty")),
    ],
)  # fmt: skip
def test_causes_of_a_rewrite(there, expected):
    a = manifest(samples=[{"uid": "p"}, REWRITE], settings={"augment": {"theta": 0.1}})
    b = manifest(**there)
    found = diff(a, b)
    adds_up(found, a, b)
    assert found.rows.filter(uid="r").select("why", "detail").row(0) == expected


def test_buckets_of_completions_that_both_have():
    a, b = (
        manifest(completions=[{"uid": uid, "bucket": bucket} for uid, bucket in given.items()])
        for given in ({"1": "noisy", "2": "noisy", "3": "normal", "4": None},
                      {"1": "normal", "2": "noisy", "3": "normal", "5": "noisy"})
    )  # fmt: skip
    moves = diff(a, b).moves
    # 4 and 5 are in one build only
    assert moves.rows() == [("noisy", "noisy", 1), ("noisy", "normal", 1), ("normal", "normal", 1)]


ROW = st.sampled_from([f"{i:02x}" for i in range(12)])
SIDE = st.lists(ROW, unique=True)


@given(SIDE, SIDE, SIDE)
def test_counts_add_up_whatever_the_rows_are(first, second, dropped):
    drops = [{"uid": uid, "task": "t", "step": "sample", "reason": "not drawn"} for uid in dropped if uid not in second]
    a = manifest(samples=[{"uid": uid, "row": int(uid, 16)} for uid in first])
    b = manifest(samples=[{"uid": uid, "row": int(uid, 16)} for uid in second], drops=drops)
    found = diff(a, b)
    adds_up(found, a, b)
    assert found.kept == len(set(first) & set(second))
    mirrored = diff(b, a)
    assert (mirrored.count("in"), mirrored.count("out")) == (found.count("out"), found.count("in"))


def test_settings_by_their_paths():
    one = {"rollouts": {"k": 4}, "tasks": [{"name": "t", "split": "train"}, {"name": "now"}]}
    two = {"rollouts": None, "tasks": [{"name": "now"}, {"name": "t", "split": "test"}]}
    found = diff(manifest(settings=one), manifest(settings=two)).settings
    assert found.rows() == [
        ("setting", "rollouts", None, "null"),
        ("setting", "rollouts.k", "4", None),
        ("setting", "tasks", '["t", "now"]', '["now", "t"]'),
        ("setting", "tasks.t.split", '"train"', '"test"'),
    ]


# --- the page ---


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        [self.text] = re.findall('id="data">(.*?)</script>', text, re.DOTALL)
        self.data = json.loads(self.text)
        self.cells = [
            cell for each in self.data["sections"] for p in each["parts"] for row in p["rows"] for cell in row
        ]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_runs_only_its_own_script_and_says_it_all(run):
    a = run("x", {"old": rows(8), "new": CURRENT})
    b = run("x", {"old": rows(8), "new": CURRENT}, replay={"selector": "uniform", "budget": 6},
            name=HOSTILE.replace("\x00", ""))  # fmt: skip
    found = diff(replace(a, folder=Path("runs/<b>a")), b)
    text = page(found)
    parsed = Page(text)
    tags = [tag for tag, _ in parsed.tags]
    assert set(tags) == {"html", "head", "meta", "title", "style", "body", "a", "div", "noscript", "p", "script"}
    assert tags.count("script") == 2 and not [n for _, each in parsed.tags for n in each if n.startswith("on")]
    assert not set("<>&\u202e\x00") & set(parsed.text) and 'id="plotly"' not in text
    policy = next(each["content"] for tag, each in parsed.tags if each.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 1
    assert f"{summary(found)}." in parsed.data["says"] and parsed.data["name"].startswith("runs/<b>a → ")
    assert any("alert(1)" in cell for cell in parsed.cells)  # the hostile name, as text
    assert {uid[:12] for uid in found.rows["uid"]} <= set(parsed.cells)
    titles = [each["title"] for each in parsed.data["sections"]]
    assert titles == [*(s.title for s in sections(found)), "Every row"]
    assert titles[:2] == ["What was set, read and run otherwise", "Quotas side by side"]


def test_hostile_rows_stay_text():
    a = manifest(folder=HOSTILE.replace("\x00", ""), samples=[{"uid": HOSTILE, "row": None}])
    b = manifest(drops=[{"uid": HOSTILE, "task": "t", "step": "read", "reason": HOSTILE}])
    parsed = Page(page(diff(a, b)))
    assert "img" not in {tag for tag, _ in parsed.tags} and [tag for tag, _ in parsed.tags].count("script") == 2
    assert parsed.text.count("alert(1)") > 2


def test_a_page_of_many_rows_is_cut_and_says_so():
    n = MOST + 1
    a = manifest(samples=[{"uid": f"{i:032x}", "row": i} for i in range(n)])
    parsed = Page(page(diff(a, manifest())))
    assert parsed.data["sections"][-1]["says"] == [f"The first {MOST:,} of {n:,}; `--json` has all."]
    assert parsed.cells.count("out") == MOST + 1  # and the line of their cause


def test_a_page_of_no_difference():
    assert Page(page(diff(manifest(), manifest()))).data["tiles"][0] == ["0", "rows kept", "in a and in b"]


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_page_in_a_browser(tmp_path):
    pytest.importorskip("selenium")
    a = manifest(folder=HOSTILE.replace("\x00", ""), samples=[{"uid": f"{i:032x}", "row": i} for i in range(30)])
    (tmp_path / "page.html").write_text(page(diff(a, manifest())), encoding="utf-8")
    with visit(tmp_path / "page.html", width=320) as chrome:
        heads = js(chrome, "return [...document.querySelectorAll('#rows tbody th')].map((n) => n.textContent)")
        assert len(heads) == 30 and cut_off(chrome) == []
        assert js(chrome, "return document.documentElement.scrollWidth") <= 320
        assert js(chrome, "return window.hacked") is None


def test_the_command_line_on_shipped_rows(tmp_path):
    names = ("classification", "code", "mathematics")
    tasks = [{"name": n, "path": str(ROOT / f"examples/superni/{n}.jsonl.gz"), "format": "superni", "split": "train"}
             for n in names]  # fmt: skip
    config = {"tasks": tasks, "base": str(tmp_path), "cache": str(tmp_path / "cache")}
    a = build({**config, "replay": {"budget": 20}, "out": str(tmp_path / "a")})
    b = build({**config, "replay": {"budget": 30}, "tags": {"max_tags": 4}, "out": str(tmp_path / "b")})
    adds_up(diff(a, b), a, b)
    done = curate("diff", "a", "b", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(diff(a, b)) in done.stdout and "page.html" in done.stdout
    assert "replay.budget" in done.stdout and "tags.max_tags" in done.stdout
    again = curate("diff", "a", "b", "--html", "page.html", cwd=tmp_path)
    assert again.returncode == 1 and "--force" in again.stderr and not again.stdout
    told = json.loads(curate("diff", "a", "b", "--json", cwd=tmp_path).stdout)
    assert told["kept"] + told["in"] == b.samples.height == 77 + 30
    assert told["kept"] + told["out"] == a.samples.height == 77 + 20
    assert len(told["rows"]) == told["in"] + told["out"]
    wrong = curate("diff", "a", "nothing", cwd=tmp_path)
    assert wrong.returncode == 1 and "nothing: no such folder" in wrong.stderr and "Traceback" not in wrong.stderr
    assert re.search("usage", curate("diff", "a", cwd=tmp_path).stderr, re.IGNORECASE)
