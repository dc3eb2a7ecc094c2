"""The page's numbers against the Parquet tables, hostile data, and what the page says of absent sections."""

import base64
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_manifest import hostile, made, plain

from curate.build import build
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import TABLES, Bucket, Manifest, Stats, check, part, read, write
from curate.manifest.card_policy import CURVE
from curate.report import is_current, report, write_report
from curate.report.even import evenly
from curate.report.page import contents, page
from curate.report.parts import INVISIBLE, cut, label

BUCKETS = [str(b) for b in Bucket]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A made manifest with every section."""
    return made(tmp_path_factory.mktemp("report") / "run").folder


@pytest.fixture(scope="module")
def data(run):
    return shown(report(run))


def shown(path: Path):
    """The JSON that a page carries."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def frame(run, name) -> pl.DataFrame:
    return pl.read_parquet(run / f"{name}.parquet")


def section(data, name):
    return next(s for s in data["sections"] if s["id"] == name)


def plot(data, name):
    return next(p for s in data["sections"] for p in s["parts"] if p.get("id") == name)


def table(data, name, start):
    return next(p for p in section(data, name)["parts"] if "caption" in p and p["caption"].startswith(start))["rows"]


# --- every number, recomputed ---


def test_the_summary(run, data):
    samples, drops, completions = frame(run, "samples"), frame(run, "drops"), frame(run, "completions")
    origins = Counter(samples["origin"])
    left = len([s for s in drops["step"] if s != "augment"])
    assert [t[0] for t in data["tiles"]] == [
        f"{n:,}" for n in (4, origins["current"], origins["replay"], origins["augmented"], completions.height, left)
    ]
    tasks = frame(run, "tasks").sort("distance", descending=True, nulls_last=True)
    asked, granted = tasks["quota"].sum(), tasks["granted"].sum()
    noisy = (completions["bucket"] == "noisy").sum()
    said = " ".join(data["says"])
    assert f"{origins['current']:,} rows of it, and {origins['replay']:,} rows of the tasks before it" in said
    assert f"with {origins['augmented']:,} rewrites" in said
    assert f"lie {tasks['distance'][0]:.4f} from" in said and f"is nearest ({tasks['distance'][2]:.4f})" in said
    pool = tasks.filter(pl.col("quota").is_not_null())["rows"].sum()
    assert f"{granted:,} of {asked:,} rows asked, of {pool:,} that" in said
    assert f"The most, {tasks['granted'].max():,}, are" in said
    assert f"{noisy:,} of {completions.height:,} are noisy" in said
    assert f"({100 * noisy / completions.height:.1f} %)" in said
    assert f"{(completions['bucket'] == 'high_performance').sum():,} are likely and well rewarded" in said


def test_distances_and_map(run, data):
    tasks, instructions = frame(run, "tasks").sort("stage"), frame(run, "instructions")
    heat = plot(data, "distances")
    distances = tasks["distance"].drop_nulls().to_list()
    assert heat["traces"][0]["z"] == [[d] for d in distances]
    assert [r[4] for r in heat["table"]["rows"]] == [f"{d:.4f}" for d in distances] + ["–"]
    assert [r[2:4] for r in heat["table"]["rows"]] == [
        [f"{r:,}", f"{n:,}"] for r, n in tasks.select("rows", "instructions").iter_rows()
    ]
    assert [r[5] for r in heat["table"]["rows"]] == ["0.0500", "exact", "0.0500", "–"]
    newest, drawn = pl.col("task") == tasks["task"][-1], pl.col("granted").fill_null(0) > 0
    groups = [instructions.filter(~newest & ~drawn), instructions.filter(~newest & drawn), instructions.filter(newest)]
    on_map = plot(data, "map")
    assert [r[1:] for r in on_map["table"]["rows"]] == [
        [f"{g.height:,}", f"{g['rows'].sum():,}", f"{g['granted'].sum():,}"] for g in groups
    ]
    for trace, group in zip(on_map["traces"], groups, strict=True):
        assert sorted(zip(trace["x"], trace["y"], strict=True)) == sorted(
            (round(x, 4), round(y, 4)) for x, y in group.select("x", "y").iter_rows()
        )


def test_quotas_and_reasons(run, data):
    tasks = frame(run, "tasks").sort("stage").filter(pl.col("quota").is_not_null())
    bars = plot(data, "quota")
    assert [t["x"] for t in bars["traces"]] == [tasks["quota"].to_list(), tasks["granted"].to_list()]
    for row, t in zip(bars["table"]["rows"], tasks.iter_rows(named=True), strict=True):
        assert row[1:6] == [f"{t['share']:,.2f}", f"{t['quota']:,}", f"{t['granted']:,}",
                            f"{t['covered']:,} of {t['instructions']:,}", f"{t['insinfo']:,.2f}"]  # fmt: skip
    assert [row[6] for row in bars["table"]["rows"]] == ["it is small", "as asked", "as asked"]
    assert "1 task gave another number" in section(data, "quotas")["says"][1]


def test_tags_and_insinfo(run, data):
    tags, instructions = frame(run, "tags"), frame(run, "instructions")
    pool = tags["pool"][0]
    count = dict(tags.select("canonical", "count").iter_rows())
    sizes = Counter(cluster for cluster in tags["cluster"] if cluster >= 0)
    said = section(data, "tags")["says"][0]
    assert (
        f"{tags.height:,} raw tags count as {len(count):,} tags; {len(sizes)} clusters hold {sizes.total():,}" in said
    )
    for start, sign in (("The rarest", 1), ("The most frequent", -1)):
        first = sorted((sign * n, t) for t, n in count.items() if n)[:20]
        expected = [[t, f"{sign * n:,}", f"{math.log(pool / (sign * n)):.2f}"] for n, t in first]
        assert [row[1:] for row in table(data, "tags", start)] == [row[1:] for row in expected]
    clusters = plot(data, "clusters")
    assert sorted(clusters["traces"][0]["x"], reverse=True) == clusters["traces"][0]["x"] == list(sizes.values())
    scored = instructions.filter(pl.col("insinfo").is_not_null())
    bins = plot(data, "insinfo")
    edges = np.linspace(scored["insinfo"].min(), scored["insinfo"].max(), 25)
    which = np.clip(np.searchsorted(edges, scored["insinfo"], side="right") - 1, 0, 23)
    for trace, drawn in zip(bins["traces"], (True, False), strict=True):
        counts = Counter(which[(scored["granted"] > 0).to_numpy() == drawn].tolist())
        assert trace["y"] == [counts[i] for i in range(24)]
    assert f"mean {scored['insinfo'].mean():.2f}, median {scored['insinfo'].median():.2f} nats" in bins["note"]


def test_what_was_drawn_and_left(run, data):
    samples, drops, tasks = frame(run, "samples"), frame(run, "drops"), frame(run, "tasks").sort("stage")
    kept = samples.filter(pl.col("parent_uid").is_null())
    left = drops.filter(pl.col("step") == "sample")
    assert f"{kept.height:,} source rows are in the set, {left.height:,} rows were" in section(data, "drawn")["says"][0]
    for i, task in enumerate(tasks["task"]):
        numbers = [kept.filter(task=task, origin="current").height, kept.filter(task=task, origin="replay").height,
                   left.filter(task=task).height]  # fmt: skip
        assert plot(data, "rows")["table"]["rows"][i][1:] == [f"{n:,}" for n in numbers]
        assert [t["x"][i] for t in plot(data, "rows")["traces"]] == numbers
    why = Counter(drops.select("step", "reason").iter_rows())
    found = table(data, "drawn", "Why")
    assert [int(n.replace(",", "")) for *_, n in found] == sorted(why.values(), reverse=True)
    assert {row[0] for row in found} == {"sample", "augment"}


def test_rewrites_that_share_a_uid_are_all_counted(run):
    manifest, kept = read(run), pl.col("kept")
    again = manifest.augmentations.filter(~kept).with_columns(
        template=pl.lit("another"), fault=pl.lit("the same as the rewrite of another template")
    )  # drops.parquet tells rows by their uid, and so has each of them once
    every = pl.concat([manifest.augmentations, again])
    found = table({"sections": contents(Manifest(**{**vars(manifest), "augmentations": every}))["sections"]}, "drawn",
                  "Why")  # fmt: skip
    assert sum(int(n) for step, _, n in found if step == "augment") == every.filter(~kept).height
    assert ["augment", "the same as the rewrite of another template", str(again.height)] in found


def test_the_curve_of_rewrites(run, data):
    every, theta = frame(run, "augmentations"), 0.2
    scores = [s for s, fault in every.select("score", "fault").iter_rows() if fault is None]
    curve = plot(data, "curve")
    for x, y in zip(curve["traces"][0]["x"], curve["traces"][0]["y"], strict=True):
        assert y == pytest.approx(sum(s > x for s in scores) / every.height, abs=1e-6)
    assert theta in curve["traces"][0]["x"] and curve["layout"]["shapes"][0]["x0"] == theta
    for row, x in zip(curve["table"]["rows"], sorted({*CURVE, theta}), strict=True):
        kept = sum(s > x for s in scores)
        assert row == [f"{x:g}" + " (chosen)" * (x == theta), f"{kept}", f"{every.height - kept}",
                       f"{100 * kept / every.height:.1f} %"]  # fmt: skip
    rows = table(data, "augmentations", "Rewrites by template")
    for row, (_, mine) in zip(rows, sorted(every.group_by("template"), key=lambda g: g[0]), strict=True):
        faulty, kept = mine["fault"].is_not_null().sum(), mine["kept"].sum()
        numbers = [f"{kept}", f"{mine.height - kept - faulty}", f"{faulty}", f"{100 * kept / mine.height:.1f} %"]
        assert row[1:] == numbers
    faults = Counter(every["fault"].drop_nulls())
    assert [row[1] for row in table(data, "augmentations", "Not usable")] == [str(n) for _, n in faults.most_common()]


def test_the_five_buckets(run, data):
    completions, tasks = frame(run, "completions"), frame(run, "tasks").sort("stage")
    facts = json.loads((run / "provenance.json").read_text())["buckets"]
    plane, counts = plot(data, "plane"), Counter(completions["bucket"])
    n = completions.height
    assert [row[2:] for row in plane["table"]["rows"]] == [
        [f"{counts[b]:,}", f"{100 * counts[b] / n:.1f} %"] for b in BUCKETS
    ]
    assert len(plane["layout"]["shapes"]) == 4 and {abs(s.get("x0")) for s in plane["layout"]["shapes"][:2]} == {0.5}
    rows, uids = data["samples"]["rows"], {}
    for i, row in enumerate(rows):
        uids[row["uid"]] = i
    for bucket, trace in zip(BUCKETS, plane["traces"], strict=True):
        expected = []
        for row in completions.filter(bucket=bucket).iter_rows(named=True):
            s = Stats(**facts["statistics"][row["task"]])
            p = sum(row["token_logps"]) / 4
            point = ((p - s.logp_mean) / s.logp_std, (row["reward"] - s.reward_mean) / s.reward_std)
            expected.append((uids[row["prompt_uid"]], *point))
        found = sorted(zip(trace["customdata"], trace["x"], trace["y"], strict=True))
        assert np.allclose(np.array(found), np.array(sorted(expected)), atol=6e-5)
        assert trace["name"].endswith(f"({counts[bucket]:,})")
    for row, task in zip(table(data, "buckets", "Buckets of each"), tasks["task"], strict=True):
        mine = completions.filter(task=task)
        numbers = [mine.height, *((mine["bucket"] == b).sum() for b in BUCKETS)]
        sides = Counter(mine["side"])
        assert row[1:] == [
            *(f"{x:,}" for x in numbers),
            f"{mine['reward'].mean():.3f}",
            f"{sides['align']:,} / {sides['conflict']:,}",
        ]


def test_every_sample_with_its_lineage(run, data):
    samples, completions, held = frame(run, "samples"), frame(run, "completions"), data["samples"]
    assert held["total"] == samples.height == len(held["rows"])
    by_uid = {row["uid"]: row for row in held["rows"]}
    for s in samples.iter_rows(named=True):
        row = by_uid[s["uid"]]
        assert held["tasks"][row["task"]]["name"] == s["task"]
        assert held["instructions"][row["instruction"]]["text"] == s["instruction"]
        assert [held["tags"][t] for t in row["tags"]] == s["tags"]
        assert [m for _, m in row["prompt"]] == [m["content"] for m in s["prompt"]]
        assert row["references"] == s["references"] and row.get("parent") == s["parent_uid"]
        mine = completions.filter(prompt_uid=s["uid"])
        assert [a["text"] for a in row.get("answers", [])] == mine.sort("rank")["text"].to_list()
        assert row.get("reward", 0) == round(mine["reward"].max() or 0, 6)
        assert row.get("buckets", []) == sorted(set(mine["bucket"]))
        assert row.get("insinfo") == (None if s["insinfo"] is None else round(s["insinfo"], 6))


def test_a_row_says_what_explain_says(run, data):
    manifest, held = read(run), data["samples"]
    for origin in ("current", "replay", "augmented"):
        row = next(r for r in held["rows"] if r["origin"] == origin)
        why = row["why"]
        if origin == "replay":
            why = held["tasks"][row["task"]]["why"] + held["instructions"][row["instruction"]]["why"] + why
        told = explain(manifest, row["uid"]).split("\n")
        assert why and [line for line in told if line in why] == why


# --- large sets ---


def test_what_a_sample_shows_of_the_whole_is_stated(run, monkeypatch):
    monkeypatch.setattr("curate.report.rows.MOST_ROWS", 40)
    monkeypatch.setattr("curate.report.stream.MOST_POINTS", 12)
    found, completions = contents(read(run)), frame(run, "completions")
    held, whole = found["samples"], frame(run, "samples").height
    assert (len(held["rows"]), held["total"]) == (40, whole)
    points = sum(len(t["x"]) for t in plot(found, "plane")["traces"])
    assert 0 < points < completions.height
    assert f"Drawn are {points:,} of {completions.height:,} rollouts" in plot(found, "plane")["note"]
    assert f"Drawn are 12 of {frame(run, 'instructions').height:,}" in plot(found, "map")["note"]
    assert {r["origin"] for r in held["rows"]} == {"current", "replay", "augmented"}
    assert {r["task"] for r in held["rows"]} == {0, 1, 2, 3}
    assert {b for r in held["rows"] for b in r.get("buckets", [])} == set(BUCKETS)
    uids = {r["uid"] for r in held["rows"]}
    opens = {held["rows"][i]["uid"] for t in plot(found, "plane")["traces"] for i in t["customdata"]}
    assert opens <= uids
    counts = Counter(completions["bucket"])  # aggregates are of all rows whatever is drawn
    assert [row[2] for row in plot(found, "plane")["table"]["rows"]] == [f"{counts[b]:,}" for b in BUCKETS]


def test_the_rows_stay_within_their_bytes(run, monkeypatch):
    monkeypatch.setattr("curate.report.rows.MOST_BYTES", 20_000)
    held = contents(read(run))["samples"]
    assert 0 < len(held["rows"]) < held["total"]
    assert len(json.dumps(held["rows"], separators=(",", ":"))) < 20_000


@given(st.lists(st.sampled_from("aaaaaaab"), min_size=1, max_size=60), st.integers(1, 30), st.randoms())
def test_an_even_choice_keeps_what_is_rare_and_knows_no_order(kinds, most, random):
    rows = pl.DataFrame({"uid": [f"{i * 7919 % 101:03}" for i in range(len(kinds))], "kind": kinds})
    chosen = evenly(rows, ["kind"], most)
    assert chosen.height == min(most, rows.height)
    assert set(chosen["uid"]) <= set(rows["uid"]) and chosen["uid"].n_unique() == chosen.height
    if most >= 2 and "b" in kinds and "a" in kinds:
        assert set(chosen["kind"]) == {"a", "b"}
    # the rare kind is never thinned while the frequent one has more
    n, have = Counter(chosen["kind"]), Counter(kinds)
    assert n["b"] == min(have["b"], n["b"]) and (n["b"] == have["b"] or n["b"] >= n["a"] - 1)
    order = list(range(rows.height))
    random.shuffle(order)
    assert set(evenly(rows[order], ["kind"], most)["uid"]) == set(chosen["uid"])


# --- hostile data ---


class Elements(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A page whose every text is an attack."""
    manifest = made(tmp_path_factory.mktemp("hostile") / "run", samples=200, text=hostile)
    return report(manifest.folder)


def test_hostile_text_adds_no_element(attacked, run, data):
    harmless, found = Elements(), Elements()
    harmless.feed(report(run).read_text())
    found.feed(attacked.read_text())
    assert found.tags == harmless.tags and found.tags.count("script") == 3
    assert [(t, n) for t, n, _ in found.attributes] == [(t, n) for t, n, _ in harmless.attributes]
    assert not [n for _, n, _ in found.attributes if n.startswith("on") or n in ("src", "srcdoc", "action")]
    title = re.search("<title>(.*?)</title>", attacked.read_text())
    assert title and not INVISIBLE.search(title[1])
    [block] = re.findall(r'id="data">(.*?)</script>', attacked.read_text(), re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(block)


def test_labels_of_plots_hold_no_markup_of_the_data(attacked):
    ours, labels = re.compile(r"</?b>|<br>"), []

    def walk(value, key=""):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(each, dict | list):
                walk(each, name if isinstance(name, str) else key)
            elif isinstance(each, str):
                labels.append(each)

    for s in shown(attacked)["sections"]:
        for p in s["parts"]:
            if "traces" in p:
                walk(p["traces"])
                walk(p["layout"])
    assert any("&lt;" in text for text in labels), "the attack reaches the labels"
    for text in labels:
        bare = ours.sub("", text)
        assert not set("<>") & set(bare) and not INVISIBLE.search(bare), text


def test_long_cells_are_cut_and_say_so(attacked):
    held = shown(attacked)["samples"]
    cells = [m for row in held["rows"] for _, m in row["prompt"]]
    assert max(map(len, cells)) < 3000
    assert any(re.search(r"… 1,0\d\d,\d\d\d characters in all, whole in samples.parquet$", c) for c in cells)
    assert attacked.stat().st_size < 15_000_000


def test_the_policy_names_the_very_scripts(run):
    text = report(run).read_text()
    [content] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    policy = dict(each.split(" ", 1) for each in content.split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in policy["script-src"] and "connect-src" not in policy
    scripts = re.findall(r'<script(?: type="text/plain" id="plotly")?>(.*?)</script>', text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert policy["script-src"].split() == [f"'sha256-{h}'" for h in hashes] and len(hashes) == 2


@given(st.text())
def test_a_label_is_short_visible_and_without_markup(text):
    shown = label(text, 20)
    assert not set("<>") & set(shown) and not INVISIBLE.search(shown) and len(shown) <= 60
    assert cut(text, most=5).startswith(text[:5])


def test_figures_are_what_plotly_takes(data):
    graph = pytest.importorskip("plotly.graph_objects")

    def painted(value):
        if isinstance(value, dict):
            return {k: painted(v) for k, v in value.items()}
        if isinstance(value, list):
            return [painted(v) for v in value]
        return (
            {"@sequential": "Viridis"}.get(value, "#123456") if isinstance(value, str) and value[:1] == "@" else value
        )

    for s in data["sections"]:
        for p in s["parts"]:
            if "traces" in p:
                graph.Figure(painted(p["traces"]), painted(p["layout"]))


# --- the same bytes, absent sections, where the page lies ---


def test_the_same_manifest_gives_the_same_bytes(run, tmp_path):
    first = report(run).read_bytes()
    shutil.copytree(run, tmp_path / "elsewhere")
    (tmp_path / "elsewhere/report.html").unlink()
    assert report(tmp_path / "elsewhere").read_bytes() == first == page(read(run)).encode()


def emptied(manifest: Manifest, folder: Path, *tables: str, **facts) -> Manifest:
    """The manifest without the rows of some tables, and other facts (None: without)."""
    frames = {name: getattr(manifest, name).clear() if name in tables else getattr(manifest, name) for name in TABLES}
    provenance = {
        k: v for k, v in {**manifest.provenance, **facts}.items() if v is not None and k not in ("rows", "outputs")
    }
    write(folder, frames, provenance, "# card\n")
    return read(folder)


def test_sections_without_data_say_why(run, tmp_path):
    manifest = read(run)
    whole = ("completions", "tags", "augmentations", "instructions", "drops")
    bare = emptied(manifest, tmp_path / "bare", *whole, buckets=None, augment=None, map=None)
    found = contents(bare)
    says = {s["id"]: " ".join(s["says"]) for s in found["sections"]}
    assert "No map" in says["stream"] and "No tags" in says["tags"]
    assert "No rewrites" in says["augmentations"] and "No rollouts" in says["buckets"]
    assert len(found["samples"]["rows"]) == manifest.samples.height
    assert report(bare.folder).is_file()
    none = ("quota", "granted", "distance", "distance_bound", "share", "reason")
    alone = manifest.tasks.with_columns(pl.lit(None, manifest.tasks.schema[name]).alias(name) for name in none)
    one = Manifest(**{**vars(bare), "tasks": alone.tail(1), "samples": bare.samples.filter(origin="current")})
    says = {s["id"]: " ".join(s["says"]) for s in contents(one)["sections"]}
    assert "No quotas" in says["quotas"] and "No distances" in says["stream"]
    nothing = Manifest(**{**vars(bare), "samples": bare.samples.clear()})
    assert contents(nothing)["samples"] | {"tasks": []} == {
        "total": 0,
        "tasks": [],
        "instructions": [],
        "tags": [],
        "rows": [],
    }


def test_an_unknown_rule_leaves_plain_axes(run, tmp_path):
    plane = plot(contents(emptied(read(run), tmp_path / "run", buckets=None)), "plane")
    assert plane["layout"]["xaxis"]["title"]["text"] == "P, nats" and plane["layout"]["shapes"] == []
    completions = frame(run, "completions")
    assert sorted(r for t in plane["traces"] for r in t["y"]) == sorted(round(r, 4) for r in completions["reward"])


def test_a_phase_of_training_has_a_page(run, tmp_path):
    manifest = read(run)
    uids = manifest.samples.filter(origin="replay")["uid"].head(5).to_list()
    completions = manifest.completions.filter(pl.col("prompt_uid").is_in(uids))
    frames, provenance = part(manifest, uids, completions, "rollouts of phase 3")
    write(tmp_path / "phase", frames, {**provenance, "buckets": manifest.provenance["buckets"]}, "# card\n")
    found = shown(report(tmp_path / "phase"))
    assert "rollouts of phase 3" in found["says"][0]
    assert [s["id"] for s in found["sections"]] == ["buckets"]
    assert len(found["samples"]["rows"]) == 5 and sum(len(t["x"]) for t in plot(found, "plane")["traces"]) == 10


def test_a_page_elsewhere_and_what_is_in_its_way(run, tmp_path):
    assert report(run, tmp_path / "page.html").read_bytes() == report(run).read_bytes()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is there already"):
        report(run, tmp_path / "folder", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        report(run, tmp_path / "file/page.html")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def small(tmp_path, write_jsonl):
    """The config of a build that needs no model."""
    tasks = []
    for t in range(3):
        rows = [{"instruction": f"Count to {t} {i % 3}", "input": f"{i}", "output": f"answer {i}"} for i in range(9)]
        tasks.append({"name": f"t{t}", "path": str(write_jsonl(f"t{t}.jsonl", rows)), "format": "alpaca"})
    return {
        "name": "small",
        "tasks": tasks,
        "replay": {"selector": "random", "budget": 6},
        "out": str(tmp_path / "run"),
    }


def test_a_build_ends_with_its_page_also_where_it_was_killed_before(tmp_path, write_jsonl, monkeypatch):
    config, out = small(tmp_path, write_jsonl), tmp_path / "run/report.html"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("curate.report.page", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert check(tmp_path / "run") == [] and not out.exists()
    manifest = build(config)
    made_at = out.stat().st_mtime_ns
    assert is_current(manifest) and check(tmp_path / "run") == []
    assert len(shown(out)["samples"]["rows"]) == manifest.samples.height == 9 + 6
    build(config)
    assert out.stat().st_mtime_ns == made_at, "a page that is current is left alone"
    before = out.read_bytes()
    build({**config, "replay": {"selector": "random", "budget": 8}})
    assert len(shown(out)["samples"]["rows"]) == 9 + 8 and out.read_bytes() != before


def test_a_new_manifest_never_lies_beside_an_old_page(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert (tmp_path / "run/report.html").is_file()
    emptied(read(run), tmp_path / "run", "tags")
    assert not (tmp_path / "run/report.html").exists()


def test_an_old_page_stays_where_a_new_one_fails(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    old = (tmp_path / "run/report.html").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("curate.files.sync", full)
    with pytest.raises(InputError, match="No space"):
        write_report(read(tmp_path / "run"))
    assert (tmp_path / "run/report.html").read_bytes() == old
    assert not list((tmp_path / "run").glob(".report.html*"))


def test_texts_of_the_made_manifest_differ():
    assert plain("answer", 1) != plain("answer", 2)


def test_a_page_elsewhere_takes_nothing_with_it(run, tmp_path):
    """Not a table of the manifest, not a file of the user's, nor one that is named like a half-written page."""
    whole = {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()}
    for name in ("samples.parquet", "provenance.json", "sub/page.html"):
        with pytest.raises(InputError, match="inside the manifest"):
            report(run, run / name)
    notes, hidden = tmp_path / "notes.txt", tmp_path / ".notes.txt"
    notes.write_text("mine")
    hidden.write_text("mine too")
    with pytest.raises(InputError, match="is there already"):
        report(run, notes)
    assert notes.read_text() == "mine" and report(run, notes, force=True) == notes
    assert notes.read_text().startswith("<!DOCTYPE html>") and hidden.read_text() == "mine too"
    assert {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()} == whole


def test_a_page_that_was_cut_is_made_anew(run):
    page = report(run)
    assert is_current(read(run))
    page.write_bytes(page.read_bytes()[:2000])
    assert not is_current(read(run))
    report(run)
    assert is_current(read(run))
