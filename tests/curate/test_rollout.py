"""Rollouts, ranks, sides, losses and on-policy replay as arithmetic on tables: no model, no torch."""

import math
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.candidates import brought, compared, measured, ranks, sides, similarity, with_uids
from curate.config import BuildConfig, RolloutsConfig
from curate.errors import InputError
from curate.ingest import ROWS
from curate.losses import deciding, losses
from curate.manifest.schema import completion_uid, sample_uid
from curate.models.base import Completion, Prompt
from curate.policy import on_policy, usage
from curate.rollout import best, in_batches, rewards, rollouts, sampling_of, some_rows, that_fit
from curate.store import Store


def rolled(*rows):
    """source_uid, text, reward, token_logps, finished; numbered as they stand."""
    names = ("source_uid", "text", "reward", "token_logps", "finished")
    found = [{**dict(zip(names, row, strict=False)), "number": number} for number, row in enumerate(rows)]
    schema = {"source_uid": pl.String, "text": pl.String, "reward": pl.Float64, "token_logps": pl.List(pl.Float32),
              "finished": pl.Boolean, "number": pl.Int32}  # fmt: skip
    return pl.DataFrame(found, schema=schema)


def messages(*pairs):
    extras = dict.fromkeys(("tool_calls", "tool_call_id", "name"))
    return [{"role": role, "content": text, **extras} for role, text in pairs]


def rows(*given, task="t", stage=1, origin="replay"):
    """Rows of a build: (uid, question) each, or (uid, None) for a document."""
    found = [
        {
            **dict.fromkeys(ROWS), "uid": uid, "row": number, "instruction_uid": f"i-{uid}", "instruction": "q",
            "prompt": [] if question is None else messages(("user", question)),
            "completion": messages(("assistant", f"gold {uid}")), "references": [f"gold {uid}", "other"],
            "candidates": [], "task": task, "stage": stage, "origin": origin, "ranked_by": "annotated",
        }
        for number, (uid, question) in enumerate(given, 1)
    ]  # fmt: skip
    more = {"task": pl.String, "stage": pl.Int32, "origin": pl.String, "ranked_by": pl.String}
    return pl.DataFrame(found, schema={**ROWS, **more})


# --- the best rollout ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("a", "low", 0.1, [-1.0], True), ("a", "high", 0.9, [-9.0], True)], "high"),
        ([("a", "rare", 0.5, [-2.0], True), ("a", "likely", 0.5, [-1.0], True)], "likely"),
        # mean log-probability, not the sum: −1 a token beats −1.5, though −3 in all is less than −1.5
        ([("a", "long", 0.5, [-1.0, -1.0, -1.0], True), ("a", "short", 0.5, [-1.5], True)], "long"),
        ([("a", "first", 0.5, [-1.0], True), ("a", "second", 0.5, [-1.0], True)], "first"),
        ([("a", "not told", 0.5, None, True), ("a", "measured", 0.5, [-50.0], True)], "measured"),
        ([("a", "first", 0.5, None, True), ("a", "second", 0.5, None, True)], "first"),
        ([("a", "cut", 0.9, [-1.0], False), ("a", "whole", 0.1, [-1.0], True)], "whole"),
        ([("a", "unknown end", 0.9, [-1.0], None), ("a", "whole", 0.1, [-1.0], True)], "unknown end"),
        ([("a", " \n", 0.9, [-1.0], True), ("a", "words", 0.1, [-1.0], True)], "words"),
        ([("a", "unjudged", None, [-1.0], True), ("a", "judged", -3.0, [-1.0], True)], "judged"),
    ],
)
def test_the_best_rollout(given, expected):
    assert best(rolled(*given), None) == {"a": expected}


def test_no_rollout_is_good_enough():
    given = rolled(("a", "x", 0.5, [-1.0], True), ("b", "y", 0.49, [-1.0], True), ("c", "z", None, [-1.0], True))
    assert best(given, 0.5) == {"a": "x"}  # reward ≥ min_reward
    assert best(given, None) == {"a": "x", "b": "y"}
    assert best(given.clear(), None) == {}


few = st.sampled_from([0.0, 0.5, 1.0])
logps = st.one_of(st.none(), st.lists(st.sampled_from([-1.0, -2.0]), min_size=1, max_size=2))
some = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", ""]), st.one_of(st.none(), few), logps,
              st.sampled_from([True, False, None])),
    max_size=8,
)  # fmt: skip


@given(some, st.randoms(), st.one_of(st.none(), few))
def test_the_order_of_rollouts_has_no_say_in_which_is_best(given, rng, least):
    table = rolled(*given)
    order = list(range(table.height))
    rng.shuffle(order)
    assert best(table[order], least) == best(table, least)


# --- ranks and sides ---


@given(some)
def test_a_rank_is_one_and_the_number_of_better_ones(given):
    table = rolled(*given)
    pairs = table.select("source_uid", "reward").rows()
    for (uid, reward), rank in zip(pairs, ranks(table), strict=True):
        better = sum(u == uid and r is not None and reward is not None and r > reward for u, r in pairs)
        assert rank == (None if reward is None else 1 + better)


@given(some, st.floats(0.5, 2), st.floats(-5, 5))
def test_ranks_ignore_the_unit_of_reward(given, scale, shift):
    table = rolled(*given)
    assert ranks(table.with_columns(pl.col("reward") * scale + shift)).to_list() == ranks(table).to_list()


def test_sides_by_hand():
    cosine = pl.Series("cosine", [0.71, 0.7, 0.69, -1.0, None], dtype=pl.Float64)
    assert sides(cosine, 0.7).to_list() == ["align", "align", "conflict", "conflict", None]
    assert sides(pl.Series([None, None], dtype=pl.Float64), 0.7).to_list() == [None, None]


class Vectors:
    """Embeddings that are two numbers a text."""

    def __init__(self, **known):
        self.known = known

    def of(self, texts):
        return np.array([self.known[text] for text in texts], np.float32)


def test_similarity_is_the_cosine_to_the_first_reference():
    given = rows(("a", "q"), ("b", "q"))
    table = rolled(("b", "same"), ("a", "same"), ("a", " "), ("a", "far"))
    assert compared(table, given) == (["same", "same", " ", "far"], ["gold b", "gold a", "gold a", "gold a"])
    unit = {"same": (0.6, 0.8), "far": (-1.0, 0.0), "gold a": (1.0, 0.0), "gold b": (0.6, 0.8)}
    found = similarity(table, given, Vectors(**unit)).to_list()
    # 0.6² + 0.8² is above 1 in float32: a cosine is not
    assert found == [pytest.approx(1), pytest.approx(0.6), None, pytest.approx(-1)]
    assert found[0] <= 1
    assert similarity(table.clear(), given, Vectors()).to_list() == []


# --- answers that the data brings ---


def test_brought_answers_come_by_prompt_rank_and_text():
    ranked = [{"text": "z", "rank": 2, "score": None}, {"text": "b", "rank": 1, "score": 3.0},
              {"text": "a", "rank": 1, "score": 3.0}]  # fmt: skip
    given = rows(("b", "q"), ("a", "q"), ("none", "q")).with_columns(
        candidates=pl.Series([ranked, ranked, []], dtype=ROWS["candidates"])
    )
    found = brought(given)
    assert found["source_uid"].to_list() == ["a"] * 3 + ["b"] * 3
    assert found["text"].to_list() == ["a", "b", "z"] * 2
    scored = [Completion("", [1, 2], [-0.5, -1.0], 2), None] * 3
    logps = measured(found, scored)
    assert logps["token_logps"].to_list()[:2] == [[-0.5, -1.0], None]
    assert logps["n_tokens"].to_list()[:2] == [2, None]


def test_equal_completions_of_a_prompt_are_told_apart():
    table = pl.DataFrame({"source_uid": ["a", "a", "a", "b"], "origin": ["policy", "policy", "gold", "policy"],
                          "text": ["x", "x", "x", "x"]})  # fmt: skip
    found = with_uids(table, {"a": "A", "b": "b"})
    assert found["prompt_uid"].to_list() == ["A", "A", "A", "b"]
    assert found["uid"].to_list() == [
        completion_uid("A", "policy", "x", 0), completion_uid("A", "policy", "x", 1),
        completion_uid("A", "gold", "x", 0), completion_uid("b", "policy", "x", 0),
    ]  # fmt: skip


# --- which rows are asked ---


def many(n=12, **more):
    return rows(*((f"{more.get('task', 't')}{i:02d}", "q" * (i % 5 + 1)) for i in range(n)), **more)


@given(st.randoms(), st.integers(1, 14))
def test_the_order_of_rows_has_no_say_in_which_are_asked(rng, per_task):
    table = pl.concat([many(), many(task="u", stage=2, origin="current")])
    order = list(range(table.height))
    rng.shuffle(order)
    found = some_rows(table, ("current", "replay"), per_task, 0, "rollouts")
    assert some_rows(table[order], ("current", "replay"), per_task, 0, "rollouts").equals(found)
    assert found.group_by("task").len().sort("task")["len"].to_list() == [min(per_task, 12)] * 2
    assert in_batches(table[order]) == in_batches(table)


def test_one_task_has_no_say_in_what_is_asked_of_another():
    mine, other = many(), many(task="u", stage=2)
    alone = some_rows(mine, ("replay",), 4, 0, "rollouts")
    assert some_rows(pl.concat([other, mine]), ("replay",), 4, 0, "rollouts").filter(task="t").equals(alone)


def test_seed_and_purpose_draw_other_rows():
    draws = [set(some_rows(many(50), ("replay",), 8, *how)["uid"]) for how in ((0, "a"), (1, "a"), (0, "b"))]
    assert len(set(map(frozenset, draws))) == 3


def test_documents_and_other_origins_are_not_asked():
    table = pl.concat([rows(("a", "q"), ("b", None)), rows(("c", "q"), task="u", stage=2, origin="current")])
    assert some_rows(table, ("replay",), None, 0, "x")["uid"].to_list() == ["a"]
    assert some_rows(table, ("current",), 5, 0, "x")["uid"].to_list() == ["c"]
    assert some_rows(table.filter(uid="b"), ("replay",), 5, 0, "x").height == 0


def test_prompts_of_like_length_stand_side_by_side():
    table = rows(("long", "qqqq"), ("b", "q"), ("a", "q"), ("middle", "qq"))
    assert [p.uid for p in in_batches(table)] == ["a", "b", "middle", "long"]


class Room:
    """A policy with so much room behind each prompt."""

    def __init__(self, *left):
        self.left = left

    def room(self, prompts):
        return list(self.left)


def test_a_prompt_without_room_is_named_or_skipped():
    table = rows(("a", "q"), ("b", "q"), ("c", "q"))
    prompts = [Prompt(f"{uid}/paraphrase", []) for uid in "cab"]
    room = Room(8, None, 7)  # exactly enough; not told; one too few
    assert that_fit(table, prompts, room, 8, "skip", "an answer") == ([0, 1], ["b/paraphrase"])
    with pytest.raises(InputError, match=r"task 't': row 2: its prompt leaves the policy room for 7 tokens, an answer"):
        that_fit(table, prompts, room, 8, "error", "an answer")
    with pytest.raises(InputError, match="room for 0 tokens"):  # a prompt that does not fit itself
        that_fit(table, prompts, Room(8, 8, -90), 8, "error", "an answer")


class Parrot:
    """A policy that answers with the uid and the number; keeps the sizes of what it was asked."""

    def __init__(self):
        self.asked = []

    def sized(self, size):
        return self

    def generate(self, prompts, sampling, done):
        self.asked.append(([p.uid for p in prompts], sampling))
        return [[Completion(f"{p.uid} {j}", [1], [-1.0], 1, True, 3) for j in range(sampling.k)] for p in prompts]


def test_rollouts_are_numbered_and_know_their_batch():
    config = RolloutsConfig(k=2, block=2, temperature=0.5, top_p=0.9, max_new_tokens=7)
    parrot = Parrot()
    table = rollouts(parrot, [Prompt(uid, []) for uid in "abc"], config, 5, lambda n: None)
    assert table["source_uid"].to_list() == list("aabbcc")
    assert table["number"].to_list() == [0, 1] * 3
    assert table["batch"].to_list() == [0, 0, 0, 0, 1, 1]
    assert table["text"].to_list()[:2] == ["a 0", "a 1"]
    how = sampling_of(config, 5)
    assert (how.k, how.temperature, how.top_p, how.max_new_tokens, how.seed) == (2, 0.5, 0.9, 7, 5)
    assert parrot.asked == [(list("abc"), how)]


class Length:
    """A reward that is the length of a text, and not a number where it is three."""

    fingerprint = "length"

    def __init__(self):
        self.asked = 0

    def __call__(self, prompts, completions, references):
        self.asked += len(completions)
        assert all(r == [f"gold {p.uid}", "other"] for p, r in zip(prompts, references, strict=True))
        return [math.nan if len(text) == 3 else float(len(text)) for text in completions]


def test_rewards_are_measured_once(tmp_path):
    table = rolled(*((uid, "x" * n) for uid in "ba" for n in range(300)))
    reward, told, store = Length(), [], Store(tmp_path)
    found = rewards(table, rows(("a", "q"), ("b", "q")), reward, store, told.append)
    expected = [None if n == 3 else float(n) for n in range(300)] * 2
    assert found.to_list() == expected
    assert told == [256, 256, 88]  # in blocks of 256: what a kill can lose
    assert rewards(table, rows(("b", "q"), ("a", "q")), reward, store).to_list() == expected
    assert reward.asked == 600
    assert rewards(table.clear(), rows(("a", "q")), reward, store).to_list() == []


# --- on-policy replay ---


def config(**replay):
    return BuildConfig.parse(
        {"tasks": [{"name": "t", "path": "t", "format": "alpaca"}], "policy": {"model": "m"}, "rollouts": {},
         "replay": {"completions": "policy", "min_reward": 0, **replay}}
    )  # fmt: skip


def ready(table):
    return table.with_columns(source_uid="uid", written_by=pl.lit("gold"))


def test_a_rollout_takes_the_place_of_the_answer():
    given = ready(pl.concat([rows(("a", "q"), ("b", "q")), rows(("c", "q"), task="u", stage=2, origin="current")]))
    table = rolled(("a", "mine", 1.0, [-1.0], True), ("b", "cut", 1.0, [-1.0], False), ("c", "c", 1.0, [-1.0], True))
    kept, gold, drops = on_policy(given, table, config())
    new = sample_uid("t", [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "mine"}],
                     ["gold a", "other"])  # fmt: skip
    assert kept["uid"].to_list() == [new, "b", "c"]  # the current task's answers are never replaced
    assert kept["source_uid"].to_list() == ["a", "b", "c"]
    assert kept["written_by"].to_list() == ["policy", "gold", "gold"]
    assert kept["completion"][0][0]["content"] == "mine"
    assert gold.rows() == [("a", "gold a")]
    assert drops.height == 0
    assert kept.schema == given.schema


def test_rows_without_a_good_rollout_are_dropped_with_their_reason():
    given = ready(rows(("a", "q"), ("b", "q"), ("c", "q"), ("d", None), ("e", "q")))
    table = rolled(("a", "x", 0.7, [-1.0], True), ("b", "x", 0.4, [-1.0], True), ("b", "y", 0.6, [-1.0], False),
                   ("e", "x", None, [-1.0], True))  # fmt: skip
    kept, gold, drops = on_policy(given, table, config(min_reward=0.5, fallback="drop"))
    assert (kept["source_uid"].to_list(), gold["source_uid"].to_list()) == (["a"], ["a"])
    good = "no rollout is finished and not empty with a reward ≥ 0.5"
    assert drops.select("uid", "row", "step", "reason", "score", "instruction_uid").rows() == [
        ("b", 2, "rollout", good, 0.6, "i-b"),  # the best reward, though that one was cut
        ("c", 3, "rollout", "its prompt was too long for a rollout", None, "i-c"),
        ("d", 4, "rollout", "plain text: there is no prompt that the policy could answer", None, "i-d"),
        ("e", 5, "rollout", good, None, "i-e"),
    ]


def test_nothing_to_replace():
    given = ready(rows(("a", "q"))).clear()
    kept, gold, drops = on_policy(given, rolled(), config())
    assert kept.height == gold.height == drops.height == 0
    assert kept.schema == given.schema


# --- losses, costs ---


def test_what_a_selector_goes_by():
    assert deciding(2.5, None, ratio=False) == 2.5
    assert deciding(2.5, 1.5, ratio=True) == pytest.approx(math.e)
    assert math.isnan(deciding(None, 1.0, ratio=True))
    assert math.isnan(deciding(1.0, None, ratio=True))
    assert math.isnan(deciding(None, None, ratio=False))
    assert math.isfinite(deciding(10_000.0, 0.0, ratio=True))


def test_a_loss_is_the_mean_over_tokens():
    class Scores:
        def score(self, pairs, done):
            return [Completion("x", [1, 2], [-1.0, -3.0], 2), None][: len(pairs)]

    pairs = [(Prompt(uid, []), []) for uid in "ab"]
    assert losses(pairs, Scores()).rows() == [("a", 2.0), ("b", None)]  # (1 + 3) / 2
    assert losses([], Scores()).height == 0


@pytest.mark.parametrize(
    ("prices", "cost"), [({}, None), ({"price_in": 2.0}, 2.0), ({"price_in": 2.0, "price_out": 10.0}, 7.0)]
)
def test_costs(prices, cost):
    model = config().policy.model_copy(update=prices)
    found = usage(3, 1_000_000, 500_000, model)  # one million at 2, half a million at 10
    assert found.get("cost") == cost
    assert (found["requests"], found["prompt_tokens"], found["completion_tokens"]) == (3, 1_000_000, 500_000)


def test_random_is_only_used_through_seeds():
    random.seed(0)
    before = some_rows(many(), ("replay",), 3, 0, "x")
    random.seed(1)
    np.random.seed(1)
    assert some_rows(many(), ("replay",), 3, 0, "x").equals(before)
