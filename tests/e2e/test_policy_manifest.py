"""Manifests of the policy stages afterwards: forged ones are found, θ is moved, other versions are read."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from policy_runs import BUCKETS, FACTS, RANKED, asked, at, forged, good, server, settings, task
from test_build import ROOT, bytes_of, curate, fails

from curate.build import build
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import TABLES, ManifestError, check, read
from curate.refilter import refilter

# --- forgeries ---


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("bucket", pl.when(pl.col("bucket") == "normal").then(pl.lit("noisy")).otherwise(pl.lit("normal")), "bucket"),
        ("bucket", pl.lit(None, pl.String), "bucket"),
        ("rank", pl.col("rank") + 1, "rank"),
        ("rank", pl.lit(None, pl.Int32), "rank"),
        ("side", pl.when(side="align").then(pl.lit("conflict")).otherwise(pl.lit("align")), "side"),
        ("side", pl.lit(None, pl.String), "side"),
        ("similarity", pl.col("similarity") + 1, "similarity"),
        ("token_logps", pl.col("token_logps").list.eval(-pl.element() + 1), "token_logps"),
        ("token_logps", pl.col("token_logps").list.head(1), "token_logps"),
        ("token_ids", pl.col("token_ids").list.concat(pl.lit([7], pl.List(pl.Int32))), "token_ids"),
        ("policy", pl.lit(None, pl.String), "policy"),
        ("tokenizer", pl.lit(None, pl.String), "tokenizer"),
        ("text", pl.lit("other words"), "hash of its content"),
        ("task", pl.lit("facts"), "stage"),
    ],
)
def test_a_forged_completion_is_named(compared, tmp_path, column, value, words):
    rolled = compared.completions.filter(pl.col("n_tokens") > 2, task="poem", side="conflict")
    uid = rolled["uid"][0]
    run = forged(compared.folder, tmp_path / "run", "completions", at(uid, column, value))
    faults = check(run)
    where = uid if column != "task" else f"row {compared.completions['uid'].to_list().index(uid)}"
    assert any(where in fault and words in fault for fault in faults), faults


def test_forged_numbers_that_could_be_true_do_not_fit_the_statistics(compared, tmp_path):
    uid = compared.completions.filter(task="poem")["uid"][0]
    change = at(uid, "token_logps", pl.col("token_logps").list.eval(pl.element() * 2))
    faults = check(forged(compared.folder, tmp_path / "a", "completions", change))
    assert any("statistics of 'poem'" in fault for fault in faults), faults

    def other_mean(facts):
        facts["buckets"]["statistics"]["tense"]["reward_mean"] += 1e-6

    faults = check(forged(compared.folder, tmp_path / "b", provenance=other_mean))
    assert any("statistics of 'tense'" in fault for fault in faults), faults


@pytest.mark.parametrize("bucket", ["rollouts", *BUCKETS])
def test_a_forged_count_is_named(compared, tmp_path, bucket):
    change = pl.when(task="tense").then(pl.col(bucket) + 1).otherwise(pl.col(bucket)).alias(bucket)
    faults = check(forged(compared.folder, tmp_path / "run", "tasks", change))
    assert any(f"task 'tense': {bucket} " in fault for fault in faults), faults


def set_in(section, key, value):
    def change(facts):
        facts[section][key] = value

    return change


def set_in_rule(key, value):
    return lambda facts: facts["buckets"]["rule"].update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in_rule("k", 0.50001), "the configuration says another"),
        (set_in_rule("population", "all"), "the configuration says another"),
        (set_in("similarity", "threshold", 0.9), "threshold"),
        (lambda facts: facts.pop("buckets"), "no rule for them"),
        (lambda facts: facts.pop("similarity"), "threshold"),
    ],
)
def test_a_forged_rule_is_noticed(compared, tmp_path, change, words):
    faults = check(forged(compared.folder, tmp_path / "run", provenance=change))
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kept", ~pl.col("kept")),
        ("score", pl.col("score") / 2),
        ("mi_input", pl.col("mi_input") / 2),
        ("fault", pl.lit("it is ugly")),
        ("template", pl.lit("other")),
        ("completion", pl.col("completion").list.eval(pl.struct(role=pl.lit("assistant"), content=pl.lit("x")))),
    ],
)
def test_a_forged_rewrite_is_named(rewritten, tmp_path, column, value):
    manifest = read(rewritten["out"])
    uid = manifest.augmentations.filter(pl.col("score") > 0.1)["uid"][0]
    faults = check(forged(manifest.folder, tmp_path / "run", "augmentations", at(uid, column, value)))
    assert any(uid in fault for fault in faults), faults


def test_a_forged_theta_is_noticed(rewritten, tmp_path):
    manifest = read(rewritten["out"])
    scores = manifest.augmentations.filter("kept")["score"].sort()
    faults = check(forged(manifest.folder, tmp_path / "a", provenance=set_in("augment", "theta", scores[0])))
    named = manifest.augmentations.filter(score=scores[0])["uid"]
    assert any(named[0] in fault and "kept" in fault for fault in faults), faults
    between = 0.1 + (scores[0] - 0.1) / 2  # decides alike, but it is not what the configuration says
    faults = check(forged(manifest.folder, tmp_path / "b", provenance=set_in("augment", "theta", between)))
    assert any("θ" in fault or "theta" in fault for fault in faults), faults


def test_a_rewrite_and_its_row_in_drops_belong_together(rewritten, tmp_path):
    manifest = read(rewritten["out"])
    uid = manifest.drops.filter(step="augment")["uid"][0]
    faults = check(forged(manifest.folder, tmp_path / "run", "drops", at(uid, "step", pl.lit("other"))))
    assert any(f"drops.parquet: uid {uid}" in fault for fault in faults), faults


# --- refilter ---


def parts_of(run):
    """Hashes of all but the provenance, which says how the manifest came to be."""
    return {name: digest for name, digest in bytes_of(run).items() if name != "provenance.json"}


@pytest.fixture(scope="module")
def thetas(folder, rewritten):
    """Fresh builds for thresholds that keep all, most, some and no rewrites. No server is there: all is cached."""
    fresh = {}
    for theta in (0.0, 0.1, 0.7, 1.0):
        augment = {**rewritten["augment"], "theta": theta}
        fresh[theta] = build({**rewritten, "augment": augment, "out": str(folder / f"theta-{theta}")})
    kept = [int(m.augmentations["kept"].sum()) for m in fresh.values()]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4 and kept[-1] == 0, kept
    return fresh


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.7, 1.0])
def test_refilter_gives_the_bytes_of_a_fresh_build(rewritten, thetas, tmp_path, theta):
    done = curate("refilter", rewritten["out"], f"theta={theta}", f"out={tmp_path}/moved")
    assert done.returncode == 0, done.stderr
    fresh = thetas[theta]
    assert f"{int(fresh.augmentations['kept'].sum())} of 27 rewrites kept" in done.stdout
    assert check(tmp_path / "moved") == []
    assert parts_of(tmp_path / "moved") == parts_of(fresh.folder)
    moved = read(tmp_path / "moved").provenance
    same = ("config", "augment", "models", "rows", "outputs", "buckets", "rollouts")
    assert {key: moved[key] for key in same} == {key: fresh.provenance[key] for key in same}


def test_refilter_in_place_up_and_down_again(thetas, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(thetas[0.1].folder, run)
    for theta in (1.0, 0.0, 0.7, 0.1):
        refilter(run, theta)
        assert parts_of(run) == parts_of(thetas[theta].folder)
    assert check(run) == []


def test_a_build_after_refilter_has_its_own_theta_again(rewritten, thetas, tmp_path):
    shutil.copytree(thetas[0.1].folder, tmp_path / "run")
    refilter(tmp_path / "run", 0.7)
    again = build({**rewritten, "out": str(tmp_path / "run")})
    assert bytes_of(again.folder) == bytes_of(thetas[0.1].folder)


def test_refusals_of_refilter(rewritten, folder, compared, tmp_path):
    fails(curate("refilter", compared.folder, "theta=0.1"), "no rewrites to decide about", "augment.per_task")
    fails(curate("refilter", rewritten["out"], "theta=high"), "is not a number", code=2)
    for theta in (-0.1, 1.5, math.nan, math.inf):
        with pytest.raises(InputError, match="must be within 0 and 1"):
            refilter(rewritten["out"], theta)
    with pytest.raises(InputError, match="other files than a manifest"):
        refilter(rewritten["out"], 0.1, folder)
    with pytest.raises(ManifestError, match="no such folder"):
        refilter(tmp_path / "gone", 0.1)
    run = forged(Path(rewritten["out"]), tmp_path / "run")
    (run / "README.md").write_text("other words")
    with pytest.raises(ManifestError, match="changed since the build"):
        refilter(run, 0.1)


CUT = """
import os, signal, sys
import curate.manifest.io as io

write, seen = io.write_parquet, []

def cut(rows, path, table, faults):
    write(rows, path, table, faults)
    seen.append(table)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

io.write_parquet = cut
from curate.refilter import refilter
refilter(sys.argv[2], 0.7)
"""


@pytest.mark.parametrize("tables", [1, 7])
def test_the_old_manifest_is_whole_where_refilter_is_killed(thetas, tmp_path, tables):
    run = tmp_path / "run"
    shutil.copytree(thetas[0.1].folder, run)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CUT, str(tables), str(run)], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert bytes_of(run) == bytes_of(thetas[0.1].folder)
    assert check(run) == []
    refilter(run, 0.7)
    assert parts_of(run) == parts_of(thetas[0.7].folder)
    assert {f.name for f in run.iterdir()} == {f.name for f in thetas[0.7].folder.iterdir()}


def test_the_old_manifest_is_whole_where_refilter_fails(thetas, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(thetas[0.1].folder, run)

    def no_room(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("curate.manifest.io.sync", no_room)
        with pytest.raises(OSError, match="No space"):
            refilter(run, 0.7)
    assert bytes_of(run) == bytes_of(thetas[0.1].folder)
    assert {f.name for f in run.iterdir()} == {f.name for f in thetas[0.1].folder.iterdir()}


# --- other versions of the schema ---


def as_version(run, to, version, change):
    """A copy of a manifest as another version of the library would have written it: `change(frames, provenance)`."""
    shutil.copytree(run, to)
    facts = json.loads((to / "provenance.json").read_text())
    frames = {name: pl.read_parquet(to / f"{name}.parquet") for name in TABLES}
    change(frames, facts)
    for name in TABLES:
        (to / f"{name}.parquet").unlink()
        facts["outputs"].pop(f"{name}.parquet")
        facts["rows"].pop(name)
    for name, frame in frames.items():
        file = to / f"{name}.parquet"
        frame.write_parquet(file)
        facts["outputs"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        facts["rows"][name] = frame.height
    facts["schema_version"] = version
    (to / "provenance.json").write_text(json.dumps(facts))
    return to


NEW_IN_1_1 = {"samples": ["written_by", "loss", "reference_loss"], "completions": ["top_p", "finished", "batch"],
              "tags": ["explanation"]}  # fmt: skip


def test_a_manifest_of_schema_1_0_is_read_and_checked(folder, tmp_path):
    tasks = [task("ranked", **RANKED), task("facts", **FACTS)]
    selector = {"selector": "insinfo_only", "budget": 3}
    new = build(settings(folder, "without", tasks=tasks, policy=None, replay=selector, tags={"cluster": False}))

    def back(frames, facts):
        del frames["augmentations"]
        for name, columns in NEW_IN_1_1.items():
            frames[name] = frames[name].drop(columns)
        for key in ("policy", "reference", "too_long", "rollouts", "buckets", "candidates", "augment"):
            del facts["config"][key]
        del facts["models"]

    old = as_version(new.folder, tmp_path / "old", "1.0", back)
    assert "sound" in curate("check", old).stdout
    manifest = read(old)
    assert manifest.augmentations.height == 0 and manifest.augmentations.columns == new.augmentations.columns
    assert manifest.samples["written_by"].is_null().all()
    assert manifest.samples.drop("written_by").equals(new.samples.drop("written_by"))
    assert manifest.completions.height == 12 and manifest.completions.equals(new.completions)
    assert "is in the set, as replay" in explain(manifest, manifest.samples.filter(origin="replay")["uid"][0])
    with pytest.raises(InputError, match="no rewrites to decide about"):
        refilter(old, 0.1)
    # its promises are still held against it
    frame = pl.read_parquet(old / "samples.parquet")
    words = pl.lit(["other words"])
    assert check(forged(old, tmp_path / "forged", "samples", at(frame["uid"][0], "references", words)))


def test_a_column_of_a_newer_minor_version_is_left_out(compared, tmp_path):
    def forward(frames, facts):
        frames["samples"] = frames["samples"].with_columns(mood=pl.lit("calm"))

    newer = as_version(compared.folder, tmp_path / "newer", "1.9", forward)
    assert check(newer) == []
    assert read(newer).samples.equals(compared.samples)
    assert as_version(compared.folder, tmp_path / "2", "2.0", forward)
    fails(curate("check", tmp_path / "2"), "schema version 2.0", "upgrade rehearse")
    lost = as_version(
        compared.folder, tmp_path / "lost", "1.9", lambda frames, _: frames["samples"].drop_in_place("uid")
    )
    assert any("samples.parquet: column 'uid' is missing" in fault for fault in check(lost))


def test_a_table_of_a_newer_minor_version_is_left_out(compared, tmp_path):
    def forward(frames, facts):
        frames["moods"] = pl.DataFrame({"mood": ["calm"]})

    assert check(as_version(compared.folder, tmp_path / "newer", "1.9", forward)) == []


def test_explain_of_a_text_that_two_templates_gave(folder):
    def says(body):
        rest = asked(body).partition("\n\nTask:\n")[2]
        return good(" ".join(rest.split(" ")[:-1]) if rest else "Present")

    with server(says) as (model, _):
        stream = [task("tense"), task("facts", **FACTS)]
        manifest = build(settings(folder, "twice", tasks=stream, policy=model, augment={"theta": 0.1}))
    assert check(manifest.folder) == []
    kept = manifest.augmentations.filter("kept")
    doubles = manifest.augmentations.filter(pl.col("uid").is_in(kept["uid"].to_list()))
    assert doubles.height == 3 * kept.height > 0
    for uid in kept["uid"]:
        story = explain(manifest, uid)
        assert "is in the set, as augmented" in story and "is above θ" in story, story
