"""Models that say what they are told: behind a server on loopback; and prompts that no model has room for."""

import json
import math

import polars as pl
import pytest
from policy_runs import (
    FACTS,
    ROLLOUTS,
    Notes,
    good,
    holds_the_key,
    put,
    real,
    rewriter,
    server,
    settings,
    task,
)
from test_build import bytes_of, curate

from curate.build import build
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import check
from curate.models import LocalModel

# --- a policy and a tagger behind a server ---


def test_an_empty_answer_has_no_side(folder):
    def says(body):
        return good("" if body["seed"] % 2 else "Fenerbahçe", logps=[-1.0, -2.0])

    with server(says) as (model, _):
        wanted = settings(folder, "empty", tasks=[task("facts", **FACTS)], policy=model, replay={"selector": "none"},
                          rollouts={"k": 3}, candidates={"similarity": True})  # fmt: skip
        manifest = build(wanted)
    assert check(manifest.folder) == []
    empty = manifest.completions.filter(text="")
    assert 0 < empty.height < 18
    assert set(empty["similarity"]) == set(empty["side"]) == {None}
    assert empty["rank"].is_not_null().all()
    assert manifest.completions.filter(pl.col("text") != "")["side"].is_not_null().all()


@pytest.mark.parametrize("told", [True, False])
def test_rollouts_of_a_server(folder, told):
    def says(body):
        word = ["Past", "Present", "positive"][body["seed"] % 3]
        return good(word, logps=[-0.1 * (body["seed"] % 5 + 1)] * 2 if told else None)

    with server(says) as (model, bodies):
        wanted = settings(
            folder, f"server-{told}", policy={**model, "price_in": 1, "price_out": 2.5}, rollouts=ROLLOUTS
        )
        manifest = build(wanted)
        assert len(bodies) == 42
        assert {body["temperature"] for body in bodies} == {1.0}
    again = build({**wanted, "out": str(folder / f"server-{told}-again")})  # nobody listens any more
    assert bytes_of(again.folder) == bytes_of(manifest.folder)
    assert check(manifest.folder) == []
    rolled = manifest.completions
    assert rolled["token_ids"].is_null().all() and rolled["tokenizer"].is_null().all()
    assert rolled["token_logps"].is_null().all() != told
    assert set(rolled["policy"]) == {f"api:{model['base_url']}#scripted@1"}
    if not told:
        assert set(rolled["bucket"]) == {"normal"}
    facts = manifest.provenance["rollouts"]
    n_out = 42 * (2 if told else 3)
    assert (facts["requests"], facts["prompt_tokens"], facts["completion_tokens"]) == (42, 42 * 7, n_out)
    assert facts["cost"] == pytest.approx((42 * 7 * 1 + n_out * 2.5) / 1e6, abs=1e-9)
    assert holds_the_key(manifest.folder, folder / ".curate-cache") == []


def test_a_server_measures_no_losses(folder):
    with server(rewriter) as (model, bodies):
        wanted = settings(folder, "refused", policy=model, replay={"selector": "highest_loss"})
        with pytest.raises(InputError, match="backend: transformers"):
            build(wanted)
    assert bodies == []


TAGS = {
    "Which": [("Question", "It asks."), ("Sports", "Of a team.")],
    "In this task": [("Classification", "Of words.")],
}
OLD = [task("older", **FACTS), task("tense"), task("facts", **FACTS)]


def tagger_of(broken):
    """A tagger: JSON for all instructions but those with `broken` in them, which stay prose after a repair."""

    def says(body):
        said = " ".join(m["content"] for m in body["messages"])
        if broken in said:
            return good("I would rather not say.")
        word = next((w for w in TAGS if f"\n{w}" in said), "Which")
        return good(json.dumps([{"tag": tag, "explanation": why} for tag, why in TAGS[word]]))

    return says


def tagged(folder, out, model, **more):
    replay = {"selector": "insinfo_only", "budget": 8, **more}
    tags = {"tagger": "llm", "model": {**model, "price_in": 2, "price_out": 10}, "cluster": False}
    return settings(folder, out, tasks=OLD, policy=None, replay=replay, tags=tags)


def test_tags_from_a_model(folder):
    bad = real("conflict/templama", 14)[6:][2]["question"]
    with server(tagger_of(bad)) as (model, bodies):
        wanted = tagged(folder, "tagged", model)
        manifest = build(wanted)
        distinct = manifest.instructions["instruction"].n_unique()
        assert len(bodies) == distinct + 1  # one repair
        assert {body["temperature"] for body in bodies} == {0.0}
        # another budget asks nothing, and neither does a rebuild into another folder
        build({**wanted, "out": str(folder / "tagged-2"), "replay": {**wanted["replay"], "budget": 6}})
        again = build({**wanted, "out": str(folder / "tagged-3")})
        assert len(bodies) == distinct + 1
        assert bytes_of(again.folder) == bytes_of(manifest.folder)
    assert "sound" in curate("check", manifest.folder).stdout
    untagged = manifest.instructions.filter(instruction=bad).row(0, named=True)
    assert (untagged["tags"], untagged["insinfo"], untagged["granted"]) == (None, None, 0)
    rows = manifest.drops.filter(step="tags")
    assert set(rows["instruction_uid"]) == {untagged["uid"]} and rows.height == untagged["rows"]
    assert set(rows["reason"]) == {"its instruction has no tags: no JSON list of tags after one repair: "
                                   "no JSON list of tags in it"}  # fmt: skip
    assert bad not in set(manifest.samples["instruction"])
    assert manifest.tasks["granted"].sum() == 8
    explained = dict(manifest.tags.select("tag", "explanation").iter_rows())
    assert explained == dict(pair for pairs in TAGS.values() for pair in pairs)
    # InsInfo by hand: 7 + 1 instructions of the older tasks have tags; Question and Sports are those of 7 of them
    pool = manifest.instructions.filter(pl.col("task") != "facts", pl.col("tags").is_not_null())
    assert pool.height == 8
    got = dict(pool.group_by("task").agg(pl.col("insinfo").unique().first()).iter_rows())
    assert got == pytest.approx({"older": 2 * math.log(8 / 7), "tense": math.log(8)}, abs=1e-12)
    spent = manifest.provenance["tagging"]
    n = distinct + 1
    assert spent == {"requests": n, "prompt_tokens": 7 * n, "completion_tokens": 3 * n, "cost": n * (14 + 30) / 1e6}
    assert manifest.provenance["models"].keys() == {"tagger"}
    assert "could not be used (its instruction has no tags" in explain(manifest, rows["uid"][0])
    assert holds_the_key(manifest.folder, folder / ".curate-cache") == []


def test_all_rows_that_can_be_drawn(folder):
    """More rows asked than have tags: the reason tells of the instruction, not of a rounding."""
    bad = real("conflict/templama", 14)[6:][2]["question"]
    with server(tagger_of(bad)) as (model, _):
        manifest = build(tagged(folder, "tagged-all", model, budget=17))
    assert check(manifest.folder) == []
    older, tense, _ = manifest.tasks.iter_rows(named=True)
    assert (older["rows"], older["granted"]) == (8, 7)
    assert (tense["rows"], tense["granted"]) == (9, 9)
    assert "7" in older["reason"] and "tags" in older["reason"]


def test_a_tagger_that_never_gives_tags(folder):
    with server(tagger_of("")) as (model, _), pytest.raises(InputError) as error:
        build(tagged(folder, "prose", model))
    for words in ("gave no usable tags for any of", "no JSON list of tags in it", "tags.tagger=keyphrase"):
        assert words in str(error.value)
    assert not (folder / "prose").exists()


# --- prompts that are too long ---


LONG = [task("code"), task("facts", **FACTS)]


@pytest.mark.parametrize(
    "section", [{"rollouts": {"max_new_tokens": 512}}, {"augment": {"max_new_tokens": 512}},
                {"rollouts": {"max_new_tokens": 8}, "augment": {"max_new_tokens": 512}}]
)  # fmt: skip
def test_a_prompt_that_is_too_long_is_named_before_anything_is_generated(folder, section, monkeypatch):
    def refuse(*_):
        raise AssertionError("the policy was asked")

    monkeypatch.setattr(LocalModel, "generate", refuse)
    with pytest.raises(
        InputError, match=r"task 'code': row \d: its prompt leaves the policy room for \d+ tokens"
    ) as error:
        build(settings(folder, "long", tasks=LONG, replay={"budget": 4}, **section))
    assert "too_long: skip" in str(error.value)
    assert not (folder / "long").exists()


def test_prompts_that_are_too_long_are_skipped_and_listed(folder):
    screen = Notes()
    wanted = settings(
        folder, "skipped", tasks=LONG, too_long="skip", rollouts={"k": 1, "max_new_tokens": 512, "origins": ["replay"]},
        replay={"budget": 4, "completions": "policy", "min_reward": 0, "fallback": "drop"},
        augment={"max_new_tokens": 512},
    )  # fmt: skip
    manifest = build(wanted, screen)
    assert check(manifest.folder) == []
    dropped = manifest.drops.filter(step="rollout")
    assert dropped.height == 4 and set(dropped["reason"]) == {"its prompt was too long for a rollout"}
    assert dropped["score"].is_null().all()
    assert manifest.provenance["rollouts"]["skipped"] == sorted(dropped["uid"])
    assert "4 prompts are too long for rollouts (too_long: skip; the provenance lists them)" in screen.notes
    assert manifest.completions.height == manifest.augmentations.height == 0
    assert manifest.samples.height == 6
    assert manifest.tasks["granted"].to_list() == [4, None]
    assert "its prompt was too long for a rollout" in explain(manifest, dropped["uid"][0])
    # kept with the old answer instead: now the rewrites are too long
    kept = build(
        {**wanted, "out": str(folder / "skipped-2"), "replay": {**wanted["replay"], "fallback": "gold"}}, screen
    )
    assert check(kept.folder) == []
    assert kept.samples.filter(origin="replay")["written_by"].to_list() == ["gold"] * 4
    replayed = kept.samples.filter(origin="replay")["uid"]
    templates = ("background", "expansion", "paraphrase")
    assert kept.provenance["augment"]["skipped"] == sorted(f"{uid}/{t}" for uid in replayed for t in templates)
    assert screen.notes[-1].startswith("12 rewrites were not asked for")


def test_losses_of_rows_that_do_not_fit_are_null_and_drawn_last(folder):
    words = " and ".join(row["input"] for row in real("superni/code", 60))
    long = [{"instruction": f"Say it again, number {i}.", "input": words, "output": "no"} for i in range(2)]
    put(folder / "mixed.jsonl", [*long, {"instruction": "Say it again.", "input": "yes", "output": "yes"}])
    tasks = [task("mixed", format="alpaca"), task("facts", **FACTS)]
    wanted = settings(folder, "mixed", tasks=tasks, replay={"selector": "highest_loss", "budget": 2})
    with pytest.raises(InputError, match=r"task 'mixed': row [12]: prompt and answer do not fit the context"):
        build(wanted)
    screen = Notes()
    manifest = build({**wanted, "too_long": "skip"}, screen)
    assert check(manifest.folder) == []
    assert screen.notes == ["2 losses could not be measured: those rows do not fit the context"]
    drawn = {row: loss for row, loss in manifest.samples.filter(origin="replay").select("row", "loss").iter_rows()}
    assert drawn[3] is not None and len(drawn) == 2 and list(drawn.values()).count(None) == 1
    assert manifest.drops["score"].to_list() == [None]
