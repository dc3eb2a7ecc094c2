import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.score import ASSOCIATION, MutualInformation, filter_score
from curate.tags import content_lemmas

FOUR = ["a red cat", "a red dog", "the blue cat", "42 is a number"]
WORDS = ["red", "cats", "dog", "blue", "the", "is", "no", "don't", "42", "-42", "Option", "B", "größer", "中文", "+"]
ln = math.log

sentences = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
corpora = st.lists(sentences, max_size=8)


def naive(corpus, a, b):
    """The formula word by word, over [w, ŵ] counts that are taken text by text."""
    texts = [set(content_lemmas(text)) for text in sorted(set(corpus))]
    n = max(len(texts), 1)

    def count(*words):
        return sum(all(word in text for word in words) for text in texts)

    def p(word):
        return (count(word) + 0.5) / (len(texts) + 1)

    def correlation(v, w):
        spread = math.sqrt(p(v) * (1 - p(v)) * p(w) * (1 - p(w)))
        return (count(v, w) / n - count(v) * count(w) / n**2) / spread

    def kernel(a, b):
        pairs = itertools.product(a, b)
        common = sum(-ln(p(w)) for w in a & b)
        return common + ASSOCIATION * sum(math.sqrt(ln(p(v)) * ln(p(w))) * correlation(v, w) for v, w in pairs)

    a, b = set(content_lemmas(a)), set(content_lemmas(b))
    return kernel(a, b) / math.sqrt(kernel(a, a) * kernel(b, b))


# --- content lemmas ---


@pytest.mark.parametrize(
    ("text", "lemmas"),
    [
        ("The dog's toys, the dog 's toys", ["dog", "toy", "dog", "toy"]),
        ("It is the one.", []),
        ("plausible / not plausible", ["plausible", "not", "plausible"]),
        ("Don't. Do n't. Cannot. Non-stop", ["not", "not", "not", "non", "stop"]),
        ("Completion A or B, I'd say", ["completion", "b"]),
        ("1,234.5 and 1,2,3", ["1234.5", "1", "2", "3"]),
        ("-5, −5, $-5 but 3-5 and COVID-19", ["covid", "-5", "-5", "-5", "3", "5", "19"]),
        ("größere Häuser ①", ["größere", "häuser", "1"]),
        ("", []),
    ],
)
def test_content_lemmas(text, lemmas):
    assert content_lemmas(text) == lemmas


# --- arithmetic ---


def test_by_hand():
    # N = 4; c(red) = c(cat) = 2, c(blue) = 1:  p = 2.5/5 = 1/2, 1/2, 1.5/5 = 3/10;  i = ln 2, ln 2, ln 10/3
    # r(w, ŵ) = (c(w, ŵ)/4 − c(w) c(ŵ)/16) / √(p(w)(1 − p(w)) p(ŵ)(1 − p(ŵ))):
    #   red, red and cat, cat: (2/4 − 4/16) / (1/4)  = 1          red, cat: (1/4 − 4/16) / …        = 0
    #   blue, blue:            (1/4 − 1/16) / (21/100) = 25/28    cat, blue: (1/4 − 2/16) / √(21/400) = s
    #                                                             red, blue: (0 − 2/16) / √(21/400)   = −s
    s = (1 / 8) / math.sqrt(21 / 400)
    both = math.sqrt(ln(2) * ln(10 / 3))
    cross = ln(2) + 0.1 * (both * -s + ln(2) * 0 + both * s + ln(2) * 1)  # {red, cat} × {blue, cat}
    own = 2 * ln(2) + 0.1 * ln(2) * (1 + 0 + 0 + 1)
    other = ln(2) + ln(10 / 3) + 0.1 * (ln(2) * 1 + ln(10 / 3) * 25 / 28 + 2 * both * s)
    mi = MutualInformation.fit(FOUR)
    assert mi.score("red cat", "blue cat") == pytest.approx(cross / math.sqrt(own * other), abs=1e-12)
    # never in one text: 0.1 √(ln 2 ln 10/3) (−s) over 1.1 ln 2 and ln 10/3 (1 + 0.1 · 25/28)
    apart = -0.1 * both * s / math.sqrt(1.1 * ln(2) * ln(10 / 3) * (1 + 2.5 / 28))
    assert mi.score("red", "blue") == pytest.approx(apart, abs=1e-12)


def test_unknown_words_tell_most_and_go_with_none():
    # c = 0: p = 0.5/5, i = ln 10, all r = 0;  known: K(cat, cat) = ln 2 (1 + 0.1 · 1)
    mi = MutualInformation.fit(FOUR)
    assert mi.score("kiwi plum", "kiwi pear") == pytest.approx(ln(10) / (2 * ln(10)), abs=1e-12)
    own = ln(10) + 1.1 * ln(2)
    assert mi.score("kiwi cat", "kiwi") == pytest.approx(ln(10) / math.sqrt(own * ln(10)), abs=1e-12)
    assert mi.score("kiwi", "cat") == 0


def test_without_texts_it_is_the_overlap_of_lemmas():
    # p = 1/2 for every word: 1 of 2 and 1 of 2
    assert MutualInformation.fit([]).score("red cat", "blue cat") == pytest.approx(1 / 2, abs=1e-12)


@given(corpora, sentences, sentences)
def test_equals_the_formula_word_by_word(corpus, a, b):
    if content_lemmas(a) and content_lemmas(b):
        corpus = [text for text in corpus if content_lemmas(text)]
        assert MutualInformation.fit(corpus).score(a, b) == pytest.approx(naive(corpus, a, b), abs=1e-9)


def test_a_word_in_every_text():
    mi = MutualInformation.fit(["cat one", "cat two", "cat dog"])
    assert mi.score("cat", "cat") == 1
    assert mi.score("cat", "dog") == pytest.approx(0, abs=1e-12)  # 1/3 − 3 · 1/9: independent


# --- properties ---


@given(corpora, sentences, sentences)
def test_bounded_symmetric_and_largest_for_identity(corpus, a, b):
    mi = MutualInformation.fit(corpus)
    assert mi.score(a, a) == mi.score(b, b) == 1
    assert mi.score(a, b) == mi.score(b, a)
    assert -1 <= mi.score(a, b) <= 1


@given(corpora, sentences, sentences, st.floats(0, 1e6))
def test_the_kernel_keeps_its_bound_at_every_weight(corpus, a, b, weight):
    # clipping hides a breach, so the kernel itself is held to Cauchy-Schwarz
    mi = replace(MutualInformation.fit(corpus), association=weight)
    one, other = frozenset(content_lemmas(a)), frozenset(content_lemmas(b))
    here, there = mi._profile(one), mi._profile(other)
    bound = math.sqrt(mi._kernel(one, one, here, here) * mi._kernel(other, other, there, there))
    assert abs(mi._kernel(one, other, here, there)) <= bound * (1 + 1e-9) + 1e-9


@given(corpora, st.sampled_from(["red", "cat", "dog", "42"]), st.sampled_from(["blue", "no", "43", "中文"]))
def test_two_different_words_stay_below_the_cap(corpus, a, b):
    assert MutualInformation.fit(corpus).score(a, b) <= ASSOCIATION / (1 + ASSOCIATION) + 1e-12


@given(corpora, st.randoms(use_true_random=False), sentences, sentences)
def test_order_and_repeats_of_texts_do_not_matter(corpus, random, a, b):
    shuffled = random.sample(corpus * 2, len(corpus) * 2)
    assert MutualInformation.fit(shuffled).score(a, b) == MutualInformation.fit(corpus).score(a, b)


@given(st.lists(st.text(max_size=12), max_size=4), st.text(max_size=12), st.text(max_size=12))
def test_any_text_has_a_score(corpus, a, b):
    mi = MutualInformation.fit(iter(corpus))
    assert mi.score(a, a) == 1
    assert math.isfinite(mi.score(a, b)) and mi.score(a, b) == mi.score(b, a)


def test_same_bits_in_another_process_and_no_spacy_before_it_is_needed():
    corpus = [f"red cat {i} dog{'s' * (i % 3)} tree blue house" for i in range(40)] + ["cat house"]
    a, b = "red cat 7 houses on a blue tree", "the dog 7 and a cat 9 in the tree"
    program = f"""
import sys
from curate.score import MutualInformation
assert not {{"spacy", "torch", "curate.tags"}} & set(sys.modules)
print(MutualInformation.fit({corpus!r}).score({a!r}, {b!r}).hex())
"""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.stderr, run.stdout.strip()) == ("", MutualInformation.fit(corpus).score(a, b).hex())


def test_words_that_come_at_random_are_unrelated():
    names = np.array([a + b for a in "bcdfghjk" for b in ("ax", "ex", "ix", "ox", "ux")])
    texts = [" ".join(row) for row in np.random.default_rng(0).choice(names, (500, 4))]
    mi = MutualInformation.fit(texts)
    scores = [mi.score(a, b) for a, b in itertools.pairwise(texts) if not set(a.split()) & set(b.split())]
    assert len(scores) > 200 and max(map(abs, scores)) < 0.05 and abs(float(np.mean(scores))) < 0.01


# --- short, empty and foreign texts ---


@pytest.fixture(scope="module")
def fitted():
    labels = [f"Is the review positive or negative? Review {i}: the {noun} was fine" for i, noun in enumerate(WORDS)]
    return MutualInformation.fit([*FOUR, *labels, "positive", "negative", "42", "Ответ верный"])


def test_labels_that_are_listed_together_are_far_apart(fitted):
    assert fitted.score("positive", "Positive.") == 1
    assert fitted.score("positive", "negative") < 0.1
    assert replace(fitted, association=1e9).score("positive", "negative") > 0.7  # why co-occurrence is damped


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("42", "42", 1),
        ("42", "42.", 1),
        ("1,000", "1000", 1),
        ("42", "43", 0),
        ("5", "-5", 0),
        ("", "", 1),
        (" \n", "", 1),
        ("", "cat", 0),
        ("", "the", 0),
        ("the", "the", 1),
        ("It is.", "is it", 1),
        ("No", "no.", 1),
        ("A", "a)", 1),
        ("A", "B", 0),
        ("yes", "no", 0),
        ("+", "+", 1),
        ("+", "-", 0),
        ("zyzzyva", "zyzzyva", 1),
        ("zyzzyva", "zymurgy", 0),
        ("Ответ верный", "ответ ВЕРНЫЙ", 1),
        ("答案是正确的", "答案是正确的", 1),
        ("答案是正确的", "猫", 0),
        ("🙂", "🙂", 1),
        ("x" * 100, "x" * 100, 1),
    ],
)
def test_edges(fitted, a, b, expected):
    assert fitted.score(a, b) == pytest.approx(expected, abs=0.02)
    assert fitted.score(b, a) == fitted.score(a, b)


def test_what_differs_in_one_sign_only_is_not_the_same(fitted):
    for a, b in [("Option B", "Option D"), ("plausible", "not plausible"), ("x is 5", "x is -5")]:
        assert 0 < fitted.score(a, b) < 0.9


def test_fit_refuses_one_string():
    with pytest.raises(ValueError, match="not one string"):
        MutualInformation.fit("one text")


# --- the filter, and the paper's formula ---


def test_filter_score():
    assert filter_score(0.5, 0.5) == 0.25
    assert filter_score(1.0, 1.0) == 1
    for left, right in [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.0, 1.0), (math.nan, 1.0), (1.0, math.nan)]:
        assert filter_score(left, right) == 0


def literal(corpus, a, b):
    """Σ Σ N(w, ŵ) log(N(w, ŵ) / (N(w) N(ŵ))): the paper's, over counts."""
    texts = [set(content_lemmas(text)) for text in corpus]
    total = 0.0
    for v, w in itertools.product(set(content_lemmas(a)), set(content_lemmas(b))):
        together = sum(v in text and w in text for text in texts)
        if together:
            total += together * ln(together / (sum(v in text for text in texts) * sum(w in text for text in texts)))
    return total


@given(corpora, sentences, sentences)
def test_the_literal_formula_is_never_positive(corpus, a, b):
    # N(w, ŵ) ≤ min(N(w), N(ŵ)) ≤ N(w) N(ŵ)
    assert literal(corpus, a, b) <= 0


def test_the_literal_formula_prefers_the_unrelated():
    # red cat × red cat: 2 ln(2/4) + 2 ln(2/4) + 2 · 1 ln(1/4) = −8 ln 2;  red cat × 42 number: nothing together, 0
    assert literal(FOUR, "red cat", "red cat") == pytest.approx(-8 * ln(2))
    assert literal(FOUR, "red cat", "42 number") == 0
    # red × cat: 1 ln(1/4), and two negative factors make a positive product
    assert literal(FOUR, "red", "cat") * literal(FOUR, "red", "cat") == pytest.approx(ln(4) ** 2)
    mi = MutualInformation.fit(FOUR)
    assert mi.score("red cat", "red cat") == 1 > 0.1 > abs(mi.score("red cat", "42 number"))
