"""Self-distilled augmentation as tables: what is asked, what can be used, how it is scored, what is left out."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.assemble import counted, with_augmentations
from curate.augment import (
    TEMPLATES,
    corpus,
    decided,
    information,
    last_user,
    questions,
    rewritable,
    rewrites,
    rewritten,
    templates_of,
    usable,
    why_dropped,
)
from curate.config import AugmentConfig
from curate.ingest import ROWS
from curate.manifest.schema import AUGMENTATIONS, COMPLETIONS, DROPS, INSTRUCTIONS, SAMPLES, TASKS, sample_uid
from curate.models.base import Completion
from curate.policy import finish_augmentations
from curate.score import MutualInformation
from curate.store import Store


def message(role, content, **more):
    return {"role": role, "content": content, "tool_calls": None, "tool_call_id": None, "name": None, **more}


def row(uid, *prompt, answer="a red cat", tools=None):
    return {**dict.fromkeys(ROWS), "uid": uid, "prompt": list(prompt), "completion": [message("assistant", answer)],
            "references": [answer], "tools": tools, "candidates": []}  # fmt: skip


def table(*given):
    return pl.DataFrame(list(given), schema=ROWS)


def config(**templates):
    return AugmentConfig(templates=templates or {"say": "Say it again: {text}"})


# --- what is asked ---


@pytest.mark.parametrize("text", ["{text}", "{", "}{}", "{0} {text!r} {a[b]}", "%s %(text)s", "\\1 \\g<0>", "$text"])
def test_braces_of_the_data_are_its_own(text):
    [(_, name, prompt)] = questions(table(row("u", message("user", text))), config(say="A {b} {text} {text} {{text}}"))
    assert name == "say"
    assert prompt.messages[0]["content"] == f"A {{b}} {text} {text} {{{text}}}"
    answer = rewritten((row("u", message("user", "old")), "say", prompt), Completion(text))
    assert answer.messages[0]["content"] == text


def test_the_last_user_message_is_rewritten_and_the_others_stay():
    turns = [message("system", "be kind"), message("user", "first"), message("assistant", "yes"),
             message("user", "second")]  # fmt: skip
    given_row = row("u", *turns)
    [question] = questions(table(given_row), config())
    assert question[2].uid == "u/say"
    assert question[2].messages == [{"role": "user", "content": "Say it again: second"}]
    answer = rewritten(question, Completion("  third \n"))
    assert answer.uid == "u/say/answer"
    assert [(m["role"], m["content"]) for m in answer.messages] == [
        ("system", "be kind"), ("user", "first"), ("assistant", "yes"), ("user", "third"),
    ]  # fmt: skip
    assert question[0]["prompt"][-1]["content"] == "second", "the row itself was changed"
    assert last_user(turns) == 3
    assert last_user(turns[:1]) == last_user([]) == -1


def test_rows_that_cannot_be_rewritten_are_not_asked():
    call = message("assistant", "", tool_calls='[{"type": "function"}]')
    able = rewritable(
        table(
            row("document"),
            row("no user", message("system", "be kind")),
            row("no words", message("user", " \n")),
            row("null", message("user", None)),
            row("tools", message("user", "q"), tools="[]"),
            row("called", message("user", "q"), call, message("tool", "2"), message("user", "and?")),
            row("fine", message("user", "q")),
        ).lazy()
    )
    assert able.collect()["uid"].to_list() == ["fine"]


def test_questions_of_like_length_stand_side_by_side():
    given_rows = table(row("b", message("user", "xx")), row("a", message("user", "x")), row("c", message("user", "x")))
    asked = questions(given_rows, config(short="{text}", long="longer {text}"))
    assert [q[2].uid for q in asked] == ["a/short", "c/short", "b/short", "a/long", "c/long", "b/long"]
    assert questions(given_rows.reverse(), config(short="{text}", long="longer {text}")) == asked


def test_templates_by_name():
    assert list(templates_of(AugmentConfig.model_validate({}))) == ["background", "expansion", "paraphrase"]
    assert all(text.count("{text}") == 1 for text in TEMPLATES.values())
    assert list(templates_of(config(b="{text}", a="{text}"))) == ["a", "b"]


# --- what can be used ---


def test_what_can_be_used():
    assert usable(Completion("words", finished=True), "rewrite") is None
    assert usable(Completion("words", finished=None), "rewrite") is None  # a server that does not tell
    assert usable(Completion("words", finished=False), "rewrite") == "the rewrite was cut at the length limit"
    assert usable(Completion(" \n\t", finished=True), "answer") == "the answer is empty"


GOOD = Completion("a new question", finished=True)
YES = Completion(" Yes ", finished=True)


@pytest.mark.parametrize(
    ("rewrite", "answer", "fault"),
    [
        (GOOD, YES, None),
        (Completion("cut", finished=False), None, "the rewrite was cut at the length limit"),
        (Completion("", finished=True), None, "the rewrite is empty"),
        (GOOD, Completion("cut", finished=False), "the answer was cut at the length limit"),
        (GOOD, Completion(" ", finished=True), "the answer is empty"),
        (GOOD, "the rewrite leaves no room for an answer", "the rewrite leaves no room for an answer"),
        (Completion(" old question\n", finished=True), YES, "the rewrite is the prompt itself"),
    ],
)
def test_faults(rewrite, answer, fault):
    asked = questions(table(row("u", message("system", "s"), message("user", "old question "))), config())
    [found] = rewrites(asked, [rewrite], {} if answer is None else {"u/say": answer}).to_dicts()
    assert found["fault"] == fault
    assert (found["parent_uid"], found["template"]) == ("u", "say")
    assert (found["x"], found["y"]) == ("old question ", "a red cat")
    assert found["x_hat"] == rewrite.text.strip() == found["prompt"][-1]["content"]
    assert found["prompt"][0] == {"role": "system", "content": "s"}
    y_hat = answer.text.strip() if isinstance(answer, Completion) else ""
    assert found["y_hat"] == y_hat
    assert found["completion"] == [{"role": "assistant", "content": y_hat}]


def test_of_equal_rewrites_one_is_used():
    both = table(row("u", message("user", "q")), row("v", message("user", "q")))
    asked = questions(both, config(a="{text}", b=".{text}"))
    same = [Completion("new", finished=True)] * 4
    found = rewrites(asked, same, {q[2].uid: YES for q in asked})
    assert found.select("parent_uid", "template", "fault").rows() == [
        ("u", "a", None), ("u", "b", "the same as the rewrite of another template"),
        ("v", "a", None), ("v", "b", "the same as the rewrite of another template"),
    ]  # fmt: skip
    # another answer makes it another pair
    other = {q[2].uid: Completion(q[2].uid, finished=True) for q in asked}
    assert rewrites(asked, same, other)["fault"].is_null().all()


def test_a_rewrite_that_cannot_be_used_does_not_stand_in_the_way_of_an_equal_one():
    asked = questions(table(row("u", message("user", "q"))), config(a="{text}", b=".{text}"))
    answers = {"u/a": Completion("Yes", finished=False), "u/b": Completion("Yes", finished=True)}
    found = rewrites(asked, [Completion("new", finished=True)] * 2, answers)
    assert found["fault"].to_list() == ["the answer was cut at the length limit", None]


def test_no_questions_no_rewrites():
    assert rewrites([], [], {}).height == 0
    assert questions(table(), config()) == []


# --- the texts that word statistics are from ---

texts = st.lists(st.sampled_from([f"text {i}" for i in range(12)]), max_size=12)


@given(texts, st.integers(1, 14), st.randoms())
def test_neither_the_order_of_rows_nor_of_tasks_changes_the_corpus(words, most, rng):
    rows = [row(f"{i}", message("user", w), answer=f"answer {w}") for i, w in enumerate(words)]
    halves = [rows[::2], rows[1::2]]
    found = corpus([table(*half).lazy() for half in halves], most)
    for half in halves:
        rng.shuffle(half)
    assert corpus([table(*half).lazy() for half in reversed(halves)], most) == found
    every = {w for w in words} | {f"answer {w}" for w in words}
    assert len(found) == min(most, len(every)) and set(found) <= every and found == sorted(set(found))


def test_a_smaller_corpus_is_part_of_a_larger_one():
    tasks = [table(*(row(f"{i}", message("user", f"question {i}")) for i in range(40))).lazy()]
    sizes = [set(corpus(tasks, n)) for n in (5, 10, 41, 100)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    assert len(sizes[3]) == 41  # 40 questions and one answer


def test_the_corpus_is_of_last_questions_and_first_answers():
    given_row = row("u", message("user", "first"), message("assistant", "so"), message("user", "last"), answer="yes")
    document = row("d", answer="a whole document")
    assert corpus([table(given_row, document, row("n", message("user", None), answer="no")).lazy()], 9) == [
        "a whole document", "last", "no", "yes",
    ]  # fmt: skip


# --- scores ---

CORPUS = ["a red cat", "a red dog", "the blue cat", "42 is a number"]


def pairs(*given):
    asked = [(row(f"{i}", message("user", x), answer=y), "say", None) for i, (x, _, y, _) in enumerate(given)]
    found = []
    for (parent, _, _), (_, x_hat, _, y_hat) in zip(asked, given, strict=True):
        prompt = questions(table(parent), config())[0]
        found.append(rewrites([prompt], [Completion(x_hat, finished=True)], {prompt[2].uid: Completion(y_hat)}))
    return pl.concat(found)


def test_scores_are_kept_and_faults_have_none(tmp_path, monkeypatch):
    frame = pairs(("the red cat", "the cat is red", "yes", "yes"), ("a blue dog", "cut", "yes", ""))
    store, told = Store(tmp_path), []
    found = information(frame, CORPUS, store, told.append)
    mi = MutualInformation.fit(CORPUS)
    assert found["mi_input"].to_list() == [mi.score("the red cat", "the cat is red"), None]
    assert found["mi_output"].to_list() == [1.0, None]
    assert told == [2]
    assert found.select(frame.columns).equals(frame)

    def refuse(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(MutualInformation, "fit", refuse)
    assert information(frame, CORPUS, store).equals(found)
    with pytest.raises(AssertionError, match="scored again"):
        information(frame, CORPUS[:3], store)  # other word statistics, other scores


def test_no_rewrites_no_scores(tmp_path):
    assert information(pairs(("q", "r", "y", "z")).clear(), CORPUS, Store(tmp_path)).height == 0


def test_kept_is_strictly_above_theta():
    frame = pl.DataFrame({"score": [0.0, 0.2, 0.2000001, 1.0, None, 0.9], "fault": [None] * 5 + ["cut"]},
                         schema={"score": pl.Float64, "fault": pl.String})  # fmt: skip
    assert decided(frame, 0.2)["kept"].to_list() == [False, False, True, True, False, False]
    assert decided(frame, 0.0)["kept"].to_list() == [False, True, True, True, False, False]
    assert decided(frame, 1.0)["kept"].sum() == 0
    assert why_dropped(None, 0.2) == "MI(x, x̂) · MI(y, ŷ) is not above θ = 0.2"
    assert why_dropped("cut", 0.2) == "cut"


# --- from rewrites to tables ---


def manifest_of(frame, theta):
    """samples, drops and the other tables of a stream of one parent a row of `frame`."""
    uids = frame["parent_uid"].unique().sort().to_list()
    parents = pl.DataFrame({"uid": uids, "task": "t", "stage": 1}, schema={"uid": pl.String, "task": pl.String,
                                                                           "stage": pl.Int32})  # fmt: skip
    every = finish_augmentations(frame, parents, theta)
    plain = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "y"}]}
    sample = {**dict.fromkeys(SAMPLES.schema), "task": "t", "stage": 1, "origin": "replay", "instruction": "q", **plain,
              "references": ["y"], "license": "MIT", "tags": ["x"], "insinfo": 1.5, "weight": 1.0}  # fmt: skip
    samples = pl.DataFrame([{**sample, "uid": uid} for uid in uids], schema=SAMPLES.schema)
    instructions = [{**dict.fromkeys(INSTRUCTIONS.schema), "uid": "i", "task": "t", "stage": 1, "instruction": "q"}]
    tasks = pl.DataFrame([{**dict.fromkeys(TASKS.schema), "task": "t", "stage": 1}], schema=TASKS.schema)
    frames = {"samples": samples, "drops": DROPS.empty(), "augmentations": every, "tasks": tasks,
              "completions": COMPLETIONS.empty(),
              "instructions": pl.DataFrame(instructions, schema=INSTRUCTIONS.schema)}  # fmt: skip
    frames = augmented(frames, theta)
    return {**frames, "tasks": counted(frames)}


def augmented(frames, theta):
    return {name: frame.lazy().collect() for name, frame in with_augmentations(frames, theta).items()}


def scored(frame, *scores):
    columns = {"mi_input": [s if s is None else 1.0 for s in scores], "mi_output": list(scores)}
    return frame.with_columns(pl.Series(n, v, dtype=pl.Float64) for n, v in columns.items())


def test_kept_rewrites_are_samples_and_the_others_are_drops():
    frame = scored(pairs(("q", "one", "y", "a"), ("q", "two", "y", "b"), ("q", "three", "y", "")), 0.5, 0.1, None)
    made = manifest_of(frame, 0.2)
    assert made["augmentations"].schema == pl.Schema(AUGMENTATIONS.schema)
    assert made["augmentations"]["score"].to_list() == [0.5, 0.1, None]
    [new] = made["samples"].filter(origin="augmented").to_dicts()
    prompt, completion = [{"role": "user", "content": "one"}], [{"role": "assistant", "content": "a"}]
    assert new["uid"] == sample_uid("t", prompt, completion, ["a"], parent_uid="0")
    assert (new["prompt"], new["completion"], new["references"]) == (prompt, completion, ["a"])
    assert (new["parent_uid"], new["augmentation"], new["written_by"], new["row"]) == ("0", "say", "policy", None)
    assert (new["mi_input"], new["mi_output"], new["weight"]) == (1.0, 0.5, 1.0)
    assert (new["instruction"], new["license"], new["tags"], new["insinfo"]) == ("q", "MIT", ["x"], 1.5)
    assert made["drops"].sort("reason").select("step", "reason", "score", "instruction_uid", "row").rows() == [
        ("augment", "MI(x, x̂) · MI(y, ŷ) is not above θ = 0.2", 0.1, "i", None),
        ("augment", "the answer is empty", None, "i", None),
    ]
    assert made["tasks"]["augmented"].to_list() == [1]


def test_another_theta_replaces_what_was_there():
    frame = scored(pairs(("q", "one", "y", "a"), ("q", "two", "y", "b")), 0.5, 0.1)
    for before in (0.0, 0.2, 1.0):
        made = manifest_of(frame, before)
        for after in (0.0, 0.2, 1.0):
            again = {**made, "augmentations": decided(made["augmentations"], after)}
            moved, fresh = augmented(again, after), manifest_of(frame, after)
            assert moved["samples"].equals(fresh["samples"])
            assert moved["drops"].equals(fresh["drops"])
            assert counted(moved).equals(fresh["tasks"])


def test_equal_rewrites_of_a_row_are_one_drop():
    asked = questions(table(row("u", message("user", "q"))), config(a="{text}", b=".{text}", c="..{text}"))
    frame = rewrites(asked, [Completion("new", finished=True)] * 3, {q[2].uid: YES for q in asked})
    made = manifest_of(scored(frame, 0.1, None, None), 0.2)
    assert made["augmentations"]["uid"].n_unique() == 1
    assert made["drops"].height == 1
    made = manifest_of(scored(frame, 0.3, None, None), 0.2)  # one of them is kept: its uid is in samples, not in drops
    assert made["drops"].height == 0
    assert made["samples"].filter(origin="augmented").height == 1


def test_two_negative_factors_do_not_keep_a_pair():
    frame = pairs(("q", "one", "y", "a")).with_columns(mi_input=pl.lit(-0.9), mi_output=pl.lit(-0.9))
    made = manifest_of(frame, 0.0)
    assert made["augmentations"].select("score", "kept").rows() == [(0.0, False)]
