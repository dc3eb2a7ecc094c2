"""Tags: normal forms, keyphrases, and DBSCAN against scikit-learn's."""

from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from curate.models import neighbours
from curate.tags import _english, cluster, keyphrases, normalise

TEXTS = [
    "Translate the English sentence into French. The French sentence should be fluent.",
    "Translate the German sentence into English; keep named entities.",
    "Classify the sentiment of the movie review as positive or negative.",
    "Given a movie review, decide whether its sentiment is positive.",
    "Answer the question from the paragraph, don't copy the paragraph.",
]


def at_angles(*degrees: float) -> NDArray[np.float32]:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


# --- normalise ---


@pytest.mark.parametrize(
    ("tag", "normal"),
    [
        ("Summarizing", "summarize"),  # lower case first: the table knows "summarizing" only
        ("  Question   Answering\n", "question answer"),
        ("Q&A!!", "q a"),
        ("①", ""),  # NFKC: the digit 1
        ("C++", "c"),
        ("Émotions", "émotions"),  # a letter, kept; not in the English table
        ("E\u0301motions", "émotions"),  # composed
        ("ﬁnding_names-2x", "find name x"),  # ligature; underscore and digit are no letters
        ("Second sentence", "second sentence"),  # the table's "2" would vanish
        ("हिन्दी", "हिन्दी"),  # vowel signs are marks, not letters, and belong to the word
        ("\u0301", ""),
        ("", ""),
        ("…—!", ""),
    ],
)
def test_normal_form(tag: str, normal: str) -> None:
    assert normalise(tag) == normal


@given(st.text(max_size=40))
def test_normal_form_holds_only_letters_and_single_spaces(tag: str) -> None:
    normal = normalise(tag)
    assert normal == " ".join(normal.split())
    assert all(c.isalpha() or c == " " or unicodedata.category(c) in ("Mn", "Mc") for c in normal)


def test_word_by_word_equals_the_whole_phrase() -> None:
    for phrase in ("cannot be answered questions", "dont know im sure gonna", "given two analyses of sentences"):
        assert normalise(phrase) == " ".join(token.lemma_ for token in _english()(phrase))


# --- keyphrases ---


def test_shared_phrase_is_ranked_by_its_score() -> None:
    # n = 3. "haiku": c = 2, f = 1 but only its own text has it; "poem": c = 1, f = 2, p = 0 words before it.
    # Shared phrases come first, then the others up to three tags in all: "haiku" (1 + ln 2) ln 4 / lead(6 before)
    # = 1.693 · 1.386 / (1 + ½ ln 1.6) = 1.900; "poem short" does not beat it: 1 · ln 4 · √2 / lead(0)= 1.961 does.
    assert (1 + math.log(2)) * math.log(4) / (1 + 0.5 * math.log(1.6)) < math.log(4) * math.sqrt(2)
    tags = keyphrases(["Poem short. As for the haiku: haiku.", "A poem.", "Sum numbers."])
    assert tags[0] == ["poem", "poem short", "haiku"]


def test_word_inside_a_better_phrase_needs_to_occur_more_often() -> None:
    texts = ["capital city", "capital city", "the capital city; name the capital"]
    assert keyphrases(texts)[0] == ["capital city"]  # "capital" and "city" occur once each, inside it
    assert "capital" in keyphrases(texts)[2]  # twice, once outside
    assert "city" not in keyphrases(texts)[2]


def test_one_text_alone_gets_its_phrases() -> None:
    (tags,) = keyphrases(["Summarize the court ruling in plain English."])
    assert {normalise(tag) for tag in tags} >= {"summarize", "court rule", "plain english"}


def test_own_phrases_fill_up_to_three_only() -> None:
    texts = ["alpha, beta, gamma, delta, epsilon", "zebra"]
    assert len(keyphrases(texts)[0]) == 3


@pytest.mark.parametrize("text", ["", " \n", "the of and", "123 + 456?", "a b c", "don't can't", "'''", "x" * 10_000])
def test_nothing_to_tag(text: str) -> None:
    assert keyphrases([text, "movie review"]) == [[], ["movie review"]]


def test_empty_word_is_no_tag() -> None:
    tags = {tag for tags in keyphrases(TEXTS) for tag in tags}
    assert not tags & {"the", "given", "don", "t", "should", "whether"}


def test_other_languages_do_not_fail() -> None:
    for text in ("你好世界，今天天气很好", "हिन्दी भाषा में अनुवाद करें", "Écrivez un résumé", "اكتب ملخصا", "🙂🙂", "İI ıi"):
        for tag in keyphrases([text])[0]:
            assert normalise(tag)


def test_no_texts_and_no_room() -> None:
    assert keyphrases([]) == []
    with pytest.raises(ValueError, match="max_tags"):
        keyphrases(TEXTS, max_tags=0)


def test_repeats_and_order_have_no_effect() -> None:
    tags = dict(zip(TEXTS, keyphrases(TEXTS), strict=True))
    again = [TEXTS[i] for i in (4, 1, 1, 0, 3, 2, 2, 2)]
    assert keyphrases(again) == [tags[text] for text in again]
    assert keyphrases(["movie review"] * 3) == keyphrases(["movie review"]) * 3


WORDS = st.sampled_from(
    "the movie reviews review Sentence answers question; . 2nd don't é 你好 - classify quickly".split()
)


@settings(deadline=None)
@given(st.lists(st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=30), max_size=8), st.integers(1, 5))
def test_tags_are_few_distinct_and_have_a_normal_form(texts: list[str], most: int) -> None:
    for tags in keyphrases(texts, most):
        normal = [normalise(tag) for tag in tags]
        assert len(tags) <= most and all(normal) and len(set(normal)) == len(normal)
    fewer = keyphrases(texts, 1)
    assert fewer == [tags[:1] for tags in keyphrases(texts, most)]


# --- cluster ---


def test_worked_example() -> None:
    # cosine distance of 1° is 1 − cos 1° = 0.00015, of 60° 0.5: three phrases at 0°, 1°, 2° and one far away.
    found = cluster(["beta", "alpha", "gamma", "far"], at_angles(0, 1, 2, 62), [3, 5, 1, 9], eps=0.001, min_samples=3)
    assert found.labels.tolist() == [0, 0, 0, -1]
    assert found.canonical == ["alpha", "alpha", "alpha", "far"]  # 5 uses > 3 > 1; noise stays itself
    assert found.labels.dtype == np.int64


def test_name_ties_are_alphabetical_and_numbers_follow_names() -> None:
    found = cluster(["z", "y", "b", "a"], at_angles(0, 1, 90, 91), [2, 2, 1, 1], min_samples=2)
    assert found.canonical == ["y", "y", "a", "a"]
    assert found.labels.tolist() == [1, 1, 0, 0]


def test_counts_do_not_make_a_phrase_core() -> None:
    assert cluster(["a", "b"], at_angles(0, 1), [100, 100], min_samples=3).labels.tolist() == [-1, -1]


def test_radius_is_inclusive() -> None:
    # (1, 0)·(0.6, 0.8) = 0.6: distance 0.4 exactly
    vectors = np.array([[1, 0], [0.6, 0.8]], dtype=np.float32)
    assert cluster(["a", "b"], vectors, [1, 1], eps=0.4, min_samples=2).labels.tolist() == [0, 0]
    assert cluster(["a", "b"], vectors, [1, 1], eps=0.399, min_samples=2).labels.tolist() == [-1, -1]
    assert cluster(["a", "b"], 7 * vectors, [1, 1], eps=0.4, min_samples=2).labels.tolist() == [0, 0]  # length is free
    same = np.ones((2, 3), dtype=np.float32)
    assert cluster(["a", "b"], same, [1, 1], eps=0, min_samples=2).labels.tolist() == [0, 0]


def test_border_phrase_goes_to_the_alphabetically_first_core() -> None:
    # Two trios 0° 1° 2° and 8° 9° 10°; radius 3.2° (1 − cos = 0.00156). 5° touches 2° and 8° only: 3 neighbours with
    # itself, 4 are needed. Each trio is made core by a fourth at 1.5° and 8.5°.
    names, angles = ["p", "q", "r", "s", "m", "a", "b", "c", "d"], [0, 1, 1.5, 2, 5, 8, 8.5, 9, 10]
    found = cluster(names, at_angles(*angles), [1] * 9, eps=1 - math.cos(math.radians(3.2)), min_samples=4)
    assert found.labels.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]


def blobs(seed: int, n: int, width: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(8, 4))[rng.integers(0, 8, n)] + width * rng.normal(size=(n, 4))).astype(np.float32)


def off_the_boundary(distances: NDArray[np.float64], eps: float) -> float:
    """A radius near eps in the widest gap between pairs, so that rounding decides nothing."""
    near = np.sort(distances[np.abs(distances - eps) < eps / 5])
    if len(near) < 2:
        return eps
    gap = int(np.argmax(np.diff(near)))
    assert near[gap + 1] - near[gap] > 2e-6
    return float(near[gap] + near[gap + 1]) / 2


@pytest.mark.parametrize("seed", range(12))
def test_equals_scikit_learn(seed: int) -> None:
    n, least = (1, 40, 700)[seed % 3], (1, 2, 5, 8)[seed % 4]
    vectors = blobs(seed, n, 0.05 * (1 + seed % 4))
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    eps = off_the_boundary((1 - unit @ unit.T)[np.triu_indices(n, 1)], (0.01, 0.03, 0.1)[seed // 4])
    phrases = [f"p{i:04d}" for i in range(n)]  # sorted, so that both see the same order
    expected = DBSCAN(eps=eps, min_samples=least, metric="cosine").fit(unit).labels_
    found = cluster(phrases, vectors, [1] * n, eps=eps, min_samples=least)
    pairs = set(zip(found.labels.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(set(expected.tolist())) == len(set(found.labels.tolist()))  # one to one
    assert all((ours == -1) == (theirs == -1) for ours, theirs in pairs)


@pytest.mark.parametrize("few", [0, 3, 20, 10_000])  # near pairs of a tile that are listed: all tiles dense … none
@pytest.mark.parametrize("seed", range(6))
def test_tiles_of_any_density_give_the_same_labels(seed: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, phrases = blobs(seed, 90, 0.05 * (1 + seed % 4)), [f"p{i:04d}" for i in range(90)]
    whole = cluster(phrases, vectors, [1] * 90, eps=0.03, min_samples=4)  # 90 rows are one tile, and its pairs listed
    for name, value in (("BLOCK", 16), ("TILE", 24), ("FEW", few), ("MOST", 4 * few)):
        monkeypatch.setattr(neighbours, name, value)
    assert cluster(phrases, vectors, [1] * 90, eps=0.03, min_samples=4).labels.tolist() == whole.labels.tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.permutations(range(60)))
def test_order_has_no_effect(seed: int, order: list[int]) -> None:
    vectors, phrases = blobs(seed, 60, 0.2), [f"p{i * 37 % 60}" for i in range(60)]
    counts = np.random.default_rng(seed).integers(1, 4, 60).tolist()
    plain = cluster(phrases, vectors, counts, eps=0.05, min_samples=4)
    mixed = cluster([phrases[i] for i in order], vectors[order], [counts[i] for i in order], eps=0.05, min_samples=4)
    assert mixed.labels.tolist() == plain.labels[order].tolist()
    assert mixed.canonical == [plain.canonical[i] for i in order]


def test_none_and_one() -> None:
    empty = cluster([], np.empty((0, 384), dtype=np.float32), [])
    assert empty.labels.tolist() == [] and empty.canonical == []
    assert cluster(["a"], at_angles(0), [3]).labels.tolist() == [-1]
    assert cluster(["a"], at_angles(0), [3], min_samples=1).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("phrases", "vectors", "counts", "message"),
    [
        (["a", "b"], at_angles(0), [1, 1], r"\[2, d\]"),
        (["a", "b"], np.ones(2, dtype=np.float32), [1, 1], r"\[2, d\]"),
        (["a", "b"], at_angles(0, 1), [1], "2 phrases but 1 counts"),
        (["a", "b", "a"], at_angles(0, 1, 2), [1, 1, 1], "'a' comes more than once"),
        (["a", "b"], np.array([[1, 0], [np.nan, 0]], dtype=np.float32), [1, 1], r"'b' \(row 1\) is not finite"),
        (["a", "b"], np.array([[1, 0], [0, 0]], dtype=np.float32), [1, 1], r"'b' \(row 1\) is zero"),
    ],
)
def test_bad_input_is_named(phrases: list[str], vectors: NDArray[np.float32], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(phrases, vectors, counts)


@pytest.mark.parametrize(("eps", "least"), [(-0.1, 5), (2.5, 5), (math.nan, 5), (0.1, 0)])
def test_bad_radius_is_refused(eps: float, least: int) -> None:
    with pytest.raises(ValueError, match="eps"):
        cluster(["a"], at_angles(0), [1], eps=eps, min_samples=least)
