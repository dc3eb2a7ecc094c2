"""The rule of the buckets over whole tables, what `check` says of forged answers, and the numbers on the card."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from curate.manifest import Bucket, Manifest, sequence_logp
from curate.manifest.buckets import Rule
from curate.manifest.card_policy import policy_sections
from curate.manifest.check_policy import POLICY_RULES, answers, augmentations, buckets, sides, tokens
from curate.manifest.schema import SAMPLES, TABLES, sample_uid

BUCKETS = [str(b) for b in Bucket]

# --- the rule over a table ---

numbers = st.floats(-10, 10).map(lambda x: round(x, 2))
logps = st.one_of(st.none(), st.lists(st.floats(-10, 0).map(lambda x: round(x, 2)), max_size=3))
rollouts = st.lists(
    st.tuples(st.sampled_from(["t", "u"]), st.integers(0, 2), logps, st.one_of(st.none(), numbers)), max_size=20
)
rules = st.builds(Rule, k=st.sampled_from([0.0, 0.3, 1.0]), logp=st.sampled_from(["mean", "sum"]),
                  population=st.sampled_from(["task", "all", "batch"]))  # fmt: skip


def frame(rows):
    schema = {"task": pl.String, "batch": pl.Int32, "token_logps": pl.List(pl.Float32), "reward": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


@given(rollouts, rules, st.randoms())
def test_the_order_of_rows_changes_no_bucket_and_no_bit_of_the_statistics(rows, rule, rng):
    table, order = frame(rows), list(range(len(rows)))
    rng.shuffle(order)
    bucket, stats = rule.assign(table)
    shuffled, same = rule.assign(table[order])
    assert shuffled.to_list() == bucket[order].to_list()
    assert same == stats


@given(rollouts, rules, st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_of_reward_changes_no_bucket(rows, rule, scale):
    """By powers of two, which no rounding touches: so the last bit, too, is the same, and edges stay edges."""
    table = frame(rows)
    bucket, stats = rule.assign(table)
    other, scaled = rule.assign(table.with_columns(pl.col("reward") * scale))
    assert other.to_list() == bucket.to_list()
    assert all(scaled[name].reward_mean == s.reward_mean * scale for name, s in stats.items())


@given(rollouts, rules, st.floats(0.1, 10), st.floats(-5, 5))
def test_an_affine_change_of_reward_changes_no_bucket(rows, rule, scale, shift):
    table = frame(rows)
    bucket, stats = rule.assign(table)
    p = [sequence_logp(row, rule.logp) for row in table["token_logps"].to_list()]
    names = ["all"] * len(p) if rule.population == "all" else [str(n) for n in table[rule.population]]
    for name, logp, reward in zip(names, p, table["reward"], strict=True):
        if reward is None or math.isnan(logp):
            continue
        s = stats[name]
        assume(s.reward_std == 0 or s.reward_std > 1e-6)
        z = (reward - s.reward_mean) / s.reward_std if s.reward_std else 0.0
        assume(abs(abs(z) - rule.k) > 1e-6)  # at the edge the last bit decides
    other, _ = rule.assign(table.with_columns(pl.col("reward") * scale + shift))
    assert other.to_list() == bucket.to_list()


def test_rewards_on_the_edge_are_normal_in_every_unit():
    # 4 of 5 right: mean 0.8, deviation 0.4, so z_R of a right answer is 0.5 exactly, which is not above k = 0.5
    for unit in (1.0, 0.1, 3.0, 1e-6):
        rows = [("t", 0, [p], unit * r) for p, r in zip((-1.0, -9.0, -2.0, -3.0, -4.0), (1, 1, 1, 1, 0), strict=True)]
        bucket, _ = Rule(0.5).assign(frame(rows))
        assert bucket.to_list() == ["normal"] * 5


@given(rollouts, st.sampled_from(["mean", "sum"]))
def test_a_population_does_not_look_at_another(rows, logp):
    rule, table = Rule(0.3, logp, "task"), frame(rows)
    bucket, stats = rule.assign(table)
    for name in ("t", "u"):
        mine = table.filter(task=name)
        alone, only = rule.assign(mine)
        assert alone.to_list() == bucket.filter(table["task"] == name).to_list()
        assert only == {name: stats[name] for name in only}


def test_mean_and_sum_by_hand():
    # means −1, −1, −2, −2; sums −1, −4, −2, −8; rewards 1, −1, 1, −1
    rows = [("t", 0, [-1.0], 1.0), ("t", 0, [-1.0] * 4, -1.0), ("t", 0, [-2.0], 1.0), ("t", 0, [-2.0] * 4, -1.0)]
    bucket, stats = Rule(0.5, "mean").assign(frame(rows))
    assert bucket.to_list() == ["high_performance", "overfitting", "high_variance", "noisy"]
    assert (stats["t"].logp_mean, stats["t"].logp_std, stats["t"].n) == (-1.5, 0.5, 4)
    # mean −3.75, σ = √((2.75² + 0.25² + 1.75² + 4.25²)/4) = 2.68: z = 1.03, −0.09, 0.65, −1.59
    bucket, stats = Rule(0.5, "sum").assign(frame(rows))
    assert bucket.to_list() == ["high_performance", "normal", "high_performance", "noisy"]
    assert stats["t"].logp_std == pytest.approx((28.75 / 4) ** 0.5)


def test_a_batch_is_a_population_across_tasks():
    rows = [("t", 0, [-1.0], 1.0), ("u", 0, [-3.0], 0.0), ("u", 1, [-1.0], 1.0)]
    bucket, stats = Rule(0.5, population="batch").assign(frame(rows))
    assert bucket.to_list() == ["high_performance", "noisy", "normal"]  # batch 1 has one row: no deviation
    assert {name: s.n for name, s in stats.items()} == {"0": 2, "1": 1}
    assert Rule(0.5).assign(frame([]))[1] == {}


# --- what check says ---

PROMPT = [{"role": "user", "content": "q"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def sample(text="gold", parent=None, **more):
    uid = sample_uid("t", PROMPT, answer(text), [text if parent else "gold"], parent_uid=parent)
    return {**dict.fromkeys(SAMPLES.schema), "uid": uid, "task": "t", "stage": 1, "origin": "replay",
            "parent_uid": parent, "prompt": PROMPT, "completion": answer(text),
            "references": [text if parent else "gold"], "written_by": "gold", **more}  # fmt: skip


def completion(uid, reward, logp, **more):
    return {"uid": uid, "prompt_uid": sample()["uid"], "task": "t", "stage": 1, "origin": "policy", "text": uid,
            "token_ids": [5], "token_logps": [logp], "n_tokens": 1, "policy": "p", "tokenizer": "k", "batch": 0,
            "reward": reward, **more}  # fmt: skip


def rewrite(text, a, b, kept, **more):
    parent = sample()["uid"]
    score = None if a is None else a * b if a > 0 and b > 0 else 0.0
    uid = sample_uid("t", PROMPT, answer(text), [text], parent_uid=parent)
    return {"uid": uid, "parent_uid": parent, "task": "t", "stage": 1, "template": text, "prompt": PROMPT,
            "completion": answer(text), "mi_input": a, "mi_output": b, "score": score, "fault": None, "kept": kept,
            **more}  # fmt: skip


def sound(tmp_path=Path()):
    """A manifest of one prompt with four rollouts, one in each corner, and three rewrites."""
    rows = [completion("w", 4.0, -1.0, rank=1), completion("x", 1.0, -1.0, rank=3),
            completion("y", 4.0, -3.0, rank=1), completion("z", 1.0, -3.0, rank=3)]  # fmt: skip
    for row, similarity, bucket in zip(rows, (0.7, 0.69, None, -1.0), BUCKETS, strict=False):
        side = None if similarity is None else "align" if similarity >= 0.7 else "conflict"
        row |= {"similarity": similarity, "side": side, "bucket": bucket}
    rule = Rule(0.5)
    table = pl.DataFrame([{n: row.get(n) for n in TABLES["completions"].schema} for row in rows],
                         schema=TABLES["completions"].schema)  # fmt: skip
    _, stats = rule.assign(table)
    every = [rewrite("a", 0.5, 0.8, True), rewrite("b", 0.5, 0.2, False), rewrite("c", -0.5, -0.9, False),
             rewrite("d", None, None, False, fault="cut")]  # fmt: skip
    kept = sample("a", sample()["uid"], origin="augmented", mi_input=0.5, mi_output=0.8, augmentation="a",
                  written_by="policy")  # fmt: skip
    drops = [{"uid": r["uid"], "task": "t", "stage": 1, "step": "augment", "reason": "low"} for r in every[1:]]
    task = {"task": "t", "stage": 1, "rollouts": 4, "augmented": 1, **dict.fromkeys(BUCKETS, 1), "normal": 0}
    frames = {"samples": [sample(), kept], "tasks": [task], "augmentations": every, "drops": drops}
    made = {
        name: pl.DataFrame([{n: row.get(n) for n in TABLES[name].schema} for row in frames.get(name, [])],
                           schema=TABLES[name].schema)
        for name in TABLES
    } | {"completions": table}  # fmt: skip
    provenance = {
        "config": {"buckets": asdict(rule), "candidates": {"rank": True, "similarity": True, "threshold": 0.7},
                   "augment": {"theta": 0.2}},
        "buckets": {"rule": asdict(rule), "statistics": {n: asdict(s) for n, s in stats.items()}},
        "similarity": {"threshold": 0.7},
        "augment": {"theta": 0.2, "templates": {n: "{text}" for n in "abcd"}, "corpus": 9},
    }  # fmt: skip
    return Manifest(folder=tmp_path, provenance=provenance, **made)


def changed(table, column, value, uid=None):
    """The sound manifest with a column changed, in one row or in all."""
    m = sound()
    where = pl.lit(True) if uid is None else pl.col("uid") == uid
    new = getattr(m, table).with_columns(pl.when(where).then(value).otherwise(pl.col(column)).alias(column))
    return Manifest(**{**vars(m), table: new})


def test_a_sound_manifest_has_no_faults():
    m = sound()
    assert m.completions["bucket"].to_list() == BUCKETS[:4]
    assert [fault for rule in POLICY_RULES for fault in rule(m)] == []
    empty = Manifest(folder=Path(), provenance={"config": {}}, **{name: t.empty() for name, t in TABLES.items()})
    assert [fault for rule in POLICY_RULES for fault in rule(empty)] == []  # a build that asked no model


@pytest.mark.parametrize(
    ("rule", "column", "value", "words"),
    [
        (tokens, "token_ids", pl.lit([1, 2], pl.List(pl.Int32)), "2 token_ids, n_tokens is 1"),
        (tokens, "token_logps", pl.lit([], pl.List(pl.Float32)), "0 token_logps, n_tokens is 1"),
        (tokens, "token_logps", pl.lit([0.5], pl.List(pl.Float32)), "no log-probability"),
        (tokens, "token_logps", pl.lit([-math.inf], pl.List(pl.Float32)), "no log-probability"),
        (tokens, "policy", pl.lit(None, pl.String), "does not say whose"),
        (tokens, "tokenizer", pl.lit(None, pl.String), "does not say whose"),
        (buckets, "bucket", pl.lit("normal"), "bucket 'normal', rule and rollouts give 'overfitting'"),
        (buckets, "bucket", pl.lit(None, pl.String), "bucket None, rule and rollouts give 'overfitting'"),
        (buckets, "origin", pl.lit("human"), "a bucket, but the policy did not write it"),
        (answers, "rank", pl.lit(2, pl.Int32), "rank 2, its reward gives 3"),
        (answers, "rank", pl.lit(None, pl.Int32), "rank None, its reward gives 3"),
        (answers, "reward", pl.lit(9.0), "rank 3, its reward gives 1"),
        (answers, "reward", pl.lit(None, pl.Float64), "rank 3, its reward gives None"),
        (sides, "side", pl.lit("align"), "side 'align' at similarity 0.69, threshold 0.7"),
        (sides, "side", pl.lit(None, pl.String), "similarity 0.69, side None"),
        (sides, "similarity", pl.lit(None, pl.Float64), "similarity None, side conflict"),
    ],
)  # fmt: skip
def test_a_forged_answer_is_named(rule, column, value, words):
    faults = list(rule(changed("completions", column, value, "x")))
    assert any(fault.startswith("completions.parquet: uid x: ") and words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("kept", pl.lit(False), "kept False at score 0.4, θ 0.2"),
        ("score", pl.lit(0.5), "score 0.5, its factors give 0.4"),
        ("score", pl.lit(None, pl.Float64), "score None, its factors give 0.4"),
        ("mi_input", pl.lit(0.75), "score 0.4, its factors give 0.6"),
        ("mi_output", pl.lit(None, pl.Float64), "neither a score nor a fault"),
        ("fault", pl.lit("ugly"), "kept True at score 0.4, θ 0.2, fault 'ugly'"),
        ("template", pl.lit("b"), "column 'augmentation' is not that of augmentations.parquet"),
        ("template", pl.lit("z"), "template 'z', which the provenance does not have"),
        ("task", pl.lit("u"), "the row was edited"),
        ("uid", pl.lit("0"), "kept there, or in samples.parquet as augmented, but not both"),
    ],
)
def test_a_forged_rewrite_is_named(column, value, words):
    uid = sound().augmentations["uid"][0]
    faults = list(augmentations(changed("augmentations", column, value, uid)))
    assert any(words in fault for fault in faults), faults
    assert any(uid in fault for fault in faults), faults


def test_a_rewrite_that_is_not_kept_is_in_drops():
    m = sound()
    uid = m.augmentations["uid"][1]
    for drops in (m.drops.filter(pl.col("uid") != uid), m.drops.with_columns(step=pl.lit("sample"))):
        faults = list(augmentations(Manifest(**{**vars(m), "drops": drops})))
        assert any(fault.startswith(f"drops.parquet: uid {uid}") for fault in faults), faults


def with_facts(section, **more):
    m = sound()
    return Manifest(**{**vars(m), "provenance": {**m.provenance, section: {**m.provenance[section], **more}}})


@pytest.mark.parametrize(
    ("rule", "section", "more", "words"),
    [
        (buckets, "buckets", {"rule": asdict(Rule(0.6))}, "the rule of the buckets is"),
        (buckets, "buckets", {"statistics": {}}, "statistics of 't'"),
        (sides, "similarity", {"threshold": 0.5}, "threshold of similarity 0.5"),
        (augmentations, "augment", {"theta": 0.3}, "θ 0.3"),
    ],
)
def test_facts_that_are_not_the_configurations(rule, section, more, words):
    faults = list(rule(with_facts(section, **more)))
    assert any(fault.startswith("provenance.json: ") and words in fault for fault in faults), faults


@pytest.mark.parametrize(("section", "rule"), [("buckets", buckets), ("augment", augmentations)])
def test_facts_that_are_missing(section, rule):
    m = sound()
    facts = {key: value for key, value in m.provenance.items() if key != section}
    assert any("provenance.json has no" in fault for fault in rule(Manifest(**{**vars(m), "provenance": facts})))


@pytest.mark.parametrize("column", ["rollouts", *BUCKETS])
def test_counts_of_a_task(column):
    faults = list(buckets(changed("tasks", column, pl.lit(7, pl.Int64), None) if column else sound()))
    assert any(fault.startswith(f"tasks.parquet: task 't': {column} 7") for fault in faults), faults


def test_an_answer_of_the_policy_must_be_a_rollout_and_the_sources_must_be_kept():
    m = sound()
    swapped = sample("x", written_by="policy")
    samples = pl.DataFrame([swapped], schema=SAMPLES.schema)
    gold = {n: None for n in m.completions.columns} | {"uid": "g", "prompt_uid": swapped["uid"], "task": "t",
                                                       "stage": 1, "origin": "gold", "text": "gold"}  # fmt: skip
    alike = {"reward": pl.lit(1.0), "rank": pl.lit(1, dtype=pl.Int32)}
    rolled = m.completions.with_columns(prompt_uid=pl.lit(swapped["uid"]), **alike)
    whole = pl.concat([rolled, pl.DataFrame([gold], schema=rolled.schema)])
    assert list(answers(Manifest(**{**vars(m), "samples": samples, "completions": whole}))) == []
    [fault] = answers(Manifest(**{**vars(m), "samples": samples, "completions": rolled}))
    assert "the source's answer to prompt_uid" in fault and swapped["uid"] in fault
    other = whole.with_columns(text=pl.when(uid="x").then(pl.lit("words")).otherwise("text"))
    [fault] = answers(Manifest(**{**vars(m), "samples": samples, "completions": other}))
    assert "is no rollout in completions.parquet" in fault
    better = whole.with_columns(
        reward=pl.when(uid="x").then(0.5).otherwise("reward"),
        rank=pl.when(pl.col("uid") == "x").then(pl.col("rank").sum() + 0).otherwise("rank").cast(pl.Int32),
    )
    faults = list(answers(Manifest(**{**vars(m), "samples": samples, "completions": better})))
    assert any("its answer has reward 0.5, the best 1.0" in fault for fault in faults)


# --- the card ---

scores = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.05, 0.2, 0.25]), st.floats(0, 1)), max_size=12)


@given(scores, st.sampled_from([0.0, 0.05, 0.2, 0.33, 1.0]))
def test_the_curve_of_the_card_is_a_recount(values, theta):
    rows = [rewrite(str(i), v, 1.0, v is not None and v > theta, score=v, fault=None if v is not None else "cut")
            for i, v in enumerate(values)]  # fmt: skip
    every = pl.DataFrame(rows, schema=TABLES["augmentations"].schema)
    facts = {"theta": theta, "templates": {"a": "{text}"}, "corpus": 9, "requests": 1, "prompt_tokens": 2,
             "completion_tokens": 3}  # fmt: skip
    heading, text = policy_sections({"augmentations": every}, {"augment": facts})
    assert heading == "## Self-distilled augmentation"
    curve = {}
    for mark, at, kept, dropped in re.findall(r"^\| (\**)([\d.e-]+)\** \| (\d+) \| (\d+) \|", text, re.M):
        curve[float(at)] = (int(kept), int(dropped))
        assert bool(mark) == (float(at) == theta)
    assert theta in curve and len(curve) >= 11
    for at, (kept, dropped) in curve.items():
        assert kept == sum(v is not None and v > at for v in values)
        assert kept + dropped == len(values)
    assert f"{curve[theta][0]} of {len(values)} are kept" in text
    cut = sum(v is None for v in values)
    assert (f"| cut | {cut} |" in text) == bool(cut)


def test_the_table_of_buckets_on_the_card_is_the_manifests():
    m = sound()
    facts = {"k": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "reward": "rouge_l", "skipped": ["u"],
             "prompts": 99, "unfinished": 99, "no_reward": 99}  # fmt: skip
    table = m.completions.with_columns(finished=pl.col("uid") != "w")
    frames = {"completions": table, "tasks": m.tasks}
    on_policy = {"replaced": 2, "dropped": 3}
    [_, text] = policy_sections(frames, {"rollouts": facts, **m.provenance, "augment": None, "on_policy": on_policy})
    assert "4 completions of 1 prompts, 4 each" in text  # those that are in the table, not all that were made
    assert "(1 were cut there)" in text and "1 prompts are too long" in text
    assert "not a number" not in text
    assert "| t | 4 | 1 | 1 | 1 | 1 | 0 | 2.500 |" in text  # (4 + 1 + 4 + 1) / 4
    assert "1 align, 2 conflict" in text
    assert "2 replayed rows carry the policy's own best answer, 3 were left out" in text
