"""Does the filter's mutual information tell a rewrite from another text of the same task?

    python benchmarks/mutual_information.py FOLDER

FOLDER holds the sixteen category files of Super-NaturalInstructions and superni_base_permissive.jsonl.gz.

Pairs: the five tasks that ask to paraphrase a single sentence (PARAPHRASES), 60 rows each, the sentence freed of its
label ("Sentence: …"), with its first answer. Nothing was sorted out: about 10 of the 60 of task1614 (SICK) are no
paraphrases ("a jet is flying" / "A dog is barking"), and task1562 (ZEST) asks about three things only ("this national
park", "this dog breed", "this president"), so its random partners share words. Simplifications and elaborations
(RELATED) are printed beside them; they are no part of a bar.

Random partners: all other 59 answers of the task, so nothing is drawn. Products: those of two paraphrases against those
of one and a random partner. Identity: each of the 300 sentences against 200 texts drawn from the other 599. Unrelated:
each of the 300 sentences against 10 drawn from 300 texts (5 to 60 words) of other categories' tasks. Different short
answers: 30 drawn pairs of each task whose answers nearly all have at most 5 words. Corpus: 20,000 distinct inputs and
first answers of the sixteen files, without the tasks that pairs are taken from and without any text that is scored.

The kernel was chosen on 80 other rows of each of these tasks. Tried there: AUC of the five tasks, 8 random partners a
pair, and share of 600 pairs from two different tasks of PARAPHRASES and RELATED within ±0.05. All but the first two
rows are divided by √(K(a, a) K(b, b)). The standard error of an AUC is 0.003 to 0.004 (bootstrap over the benchmark's
pairs, run apart), that of the difference between two rows less:

| K, summed over the pairs of words | AUC | within ±0.05 |
| --- | --- | --- |
| the paper's N(w, ŵ) log(N(w, ŵ) / (N(w) N(ŵ))) | 0.119 | – |
| p(w, ŵ) log(p(w, ŵ) / (p(w) p(ŵ))) | 0.957 | – |
| the same, normalised | 0.975 | 0.925 |
| ... words that are not the same × 0.25 | 0.976 | 0.982 |
| log(p(w, ŵ) / (p(w) p(ŵ))) | 0.982 | 0.095 |
| ... positive terms only | 0.982 | 0.083 |
| ... discounted for rare words (Pantel & Lin 2002) | 0.985 | 0.178 |
| ... normalised by −log p(w, ŵ) (Bouma 2009), √(i i) | 0.985 | 0.178 |
| r, Pearson's correlation of two words in a text | 0.987 | 0.910 |
| i(w) r i(ŵ), i = −log p | 0.987 | 0.967 |
| √(i i) r | 0.987 | 0.942 |
| √(p i p i) r | 0.976 | 0.800 |
| √(i i) r, words that are not the same × 0 / 0.1 / 0.25 / 0.5 | 0.987 to 0.988 | 0.980 to 0.985 |

So the weights matter (p(w, ŵ) lets common words speak loudest), and what words come together does not measurably: these
paraphrases share words. It stays at a weight at which two labels that an instruction lists together are far apart.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import rankdata

import curate.score
from curate.score import MutualInformation
from curate.tags import content_lemmas, normalise

PARAPHRASES = ("task045_misc", "task770_pawsx", "task934_turk", "task1562_zest", "task1614_sick")
RELATED = ("task111_asset", "task933_wiki_auto", "task955_wiki_auto")
PAIRS, PARTNERS, CORPUS = 60, 200, 20_000
THETAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
LABELS = ("positive", "negative")
NEGATIONS = frozenset("no not non nor never none neither without".split())

Floats = NDArray[np.float64]
Rows = list[dict[str, Any]]
Likeness = Callable[[Sequence[tuple[str, str]]], Floats]


# --- data ---


def read(path: Path) -> Rows:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def sentence(text: str) -> str:
    """The sentence to rewrite, without its label, question and answer."""
    return text.rpartition("Sentence: ")[2].removeprefix("sentence_B_original: ").strip()


def pairs(rows: Rows, task: str) -> list[tuple[str, str]]:
    first = dict[str, str]()
    for row in rows:
        if row["task"].startswith(task):
            first.setdefault(sentence(row["input"]), row["outputs"][0].strip())
    found = sorted(first.items())
    random.Random(0).shuffle(found)
    return found[:PAIRS]


def short_answers(rows: Rows) -> list[tuple[str, str]]:
    """30 pairs of different answers of each task whose answers have at most 5 words (4 of 5 have)."""
    draw, found = random.Random(0), list[tuple[str, str]]()
    for _, group in itertools.groupby(rows, key=lambda row: row["task"]):
        answers = [row["outputs"][0].strip() for row in group]
        short = [answer for answer in answers if len(answer.split()) <= 5]
        distinct = sorted({re.sub(r"[\s.]+$", "", answer.lower()): answer for answer in short}.values())
        if len(distinct) > 1 and len(short) >= 0.8 * len(answers):
            found += [tuple(draw.sample(distinct, 2)) for _ in range(30)]
    return found


def taken(row: dict[str, Any]) -> bool:
    return row["task"].startswith(PARAPHRASES + RELATED)


def sample(texts: set[str]) -> list[str]:
    return random.Random(0).sample(sorted(texts), CORPUS)


# --- what is compared ---


class Counted:
    """The paper's sum over counts, and the plug-in sum over probabilities, of words in the texts of a fitted corpus."""

    def __init__(self, model: MutualInformation, texts: Sequence[str]) -> None:
        self.place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        sets = [sorted(set(content_lemmas(text)) & model.postings.keys()) for text in self.place]
        column = {lemma: j for j, lemma in enumerate(sorted(set().union(*sets)))}
        self.has = _indicator([[column[lemma] for lemma in one] for one in sets], len(column))
        corpus = _indicator([model.postings[lemma].tolist() for lemma in column], model.n)
        self.n, self.together = model.n, (corpus @ corpus.T).tocoo()

    def sums(self, *, literal: bool) -> Floats:
        """[texts, texts]."""
        c, one = self.together.data, self.together.tocsr().diagonal()
        expected = one[self.together.row] * one[self.together.col]
        terms = c * np.log(c / expected) if literal else c / self.n * np.log(c * self.n / expected)
        kernel = sp.csr_matrix((terms, (self.together.row, self.together.col)), shape=self.together.shape)
        return np.asarray((self.has @ kernel @ self.has.T).toarray())

    def likeness(self, matrix: Floats) -> Likeness:
        """Reads pairs of texts from what `sums` returned."""
        return lambda pairs: np.array([matrix[self.place[a], self.place[b]] for a, b in pairs])


def _indicator(rows: Sequence[Sequence[int]], columns: int) -> Any:
    ends = np.cumsum([0, *map(len, rows)])
    index = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return sp.csr_matrix((np.ones(len(index)), index, ends), shape=(len(rows), columns))


def normalised(matrix: Floats) -> Floats:
    own = np.sqrt(np.clip(np.diag(matrix), 0, None))
    return np.divide(matrix, np.outer(own, own), out=np.zeros_like(matrix), where=np.outer(own, own) > 0)


def ours(model: MutualInformation) -> Likeness:
    return lambda pairs: np.array([model.score(a, b) for a, b in pairs])


# --- measures ---


def auc(positive: Floats, negative: Floats) -> float:
    """P(a paraphrase scores higher than a random partner), ties half."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)].sum()
    return float((ranks - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def strangers(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(a, b) for (a, _), (_, b) in itertools.permutations(found, 2)]


def product_auc(positive: Floats, negative: Floats) -> float:
    """P(two paraphrases' product is higher than a paraphrase's with a random partner's), 20,000 drawn products each."""
    draw = np.random.default_rng(0)
    one, other, wrong = (draw.choice(values, 20_000) for values in (positive, positive, negative))
    return auc(one * other, draw.permutation(one) * wrong)


def identity(likeness: Likeness, partners: list[tuple[str, list[str]]]) -> float:
    """Share of texts that no partner beats."""
    own = likeness([(text, text) for text, _ in partners])
    best = [likeness([(text, other) for other in others]).max() for text, others in partners]
    return float(np.mean(own >= np.array(best)))


def table(head: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n| {head} |\n|{' --- |' * (head.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row)} |")


def thresholds(true: Floats, false: Floats, short: Floats) -> None:
    """Kept fractions for single factors, and for products of every factor with every other one."""

    def both(theta: float, left: Floats, right: Floats) -> float:
        positive, ordered = left[left > 0], np.sort(right[right > 0])
        above = len(ordered) - np.searchsorted(ordered, theta / positive, side="right")
        return float(above.sum() / (len(left) * len(right)))

    head = "θ | one factor: paraphrases | random partners | other short answers | "
    head += "product: both paraphrases | one, and a random partner | one, and another short answer | neither"
    mixtures = ((true, true), (true, false), (true, short), (false, false))
    singles = [[float(np.mean(column > theta)) for column in (true, false, short)] for theta in THETAS]
    products = [[both(theta, *two) for two in mixtures] for theta in THETAS]
    table(head, [(str(theta), *one, *two) for theta, one, two in zip(THETAS, singles, products, strict=True)])


def kept_words(corpus: Sequence[str], *judged: list[tuple[str, str]]) -> None:
    """What numbers, negations and single letters are worth: the same measures without them."""
    kinds: dict[str, Callable[[str], bool]] = {
        "numbers": lambda lemma: lemma[-1].isdigit(),
        "negations": lambda lemma: lemma in NEGATIONS,
        "single letters": lambda lemma: len(lemma) == 1 and lemma.isascii() and lemma.isalpha(),
    }
    (good, bad, answers), report = judged, list[tuple[object, ...]]()
    for kept in ([], ["numbers"], ["numbers", "negations"], ["numbers", "single letters"], list(kinds)):
        dropped = [test for name, test in kinds.items() if name not in kept]

        def lemmas(text: str, dropped: list[Callable[[str], bool]] = dropped) -> frozenset[str]:
            found = [lemma for lemma in content_lemmas(text) if not any(test(lemma) for test in dropped)]
            return frozenset(found or normalise(text).split() or text.split())

        with mock.patch.object(curate.score, "_lemmas", lemmas):
            score = ours(MutualInformation.fit(corpus))
            other = score(answers)
            measures = (auc(score(good), score(bad)), *(float(np.mean(other > above)) for above in (0.9999, 0.5, 0.1)))
        report.append((", ".join(kept) or "none of the three", *measures))
    table("kept beside words | AUC | different short answers: same lemmas | > 0.5 | > 0.1", report)


def speed(texts: set[str]) -> None:
    words = [word for text in sorted(texts) for word in text.split()]
    long = [" ".join(words[at : at + 60]) for at in range(0, 60 * CORPUS, 60)]
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # so that the peak is its own
        print(f"\n{alone.submit(timed, long).result()}")


def timed(texts: list[str]) -> str:
    start = time.perf_counter()
    model = MutualInformation.fit(texts)
    fitted = time.perf_counter()
    ours(model)(list(zip(texts[:10_000], texts[10_000:], strict=True)))
    scored, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"fit {len(texts)} texts of 60 words: {fitted - start:.1f} s, {len(model.postings)} lemmas; score 10000 pairs "
        f"of them: {scored - fitted:.1f} s; peak with all that the benchmark imports {peak:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder, begin, draw = parser.parse_args().folder, time.perf_counter(), random.Random(0)
    files = sorted(f for f in folder.glob("*.jsonl.gz") if not f.name.startswith("superni_"))
    rows = [row for path in files for row in read(path)]
    everything = rows + read(folder / "superni_base_permissive.jsonl.gz")

    by_task = {task: pairs(everything, task) for task in PARAPHRASES + RELATED}
    good = [pair for task in PARAPHRASES for pair in by_task[task]]
    bad = [pair for task in PARAPHRASES for pair in strangers(by_task[task])]
    scored = sorted({text for pair in good for text in pair})
    partners = [(a, draw.sample([text for text in scored if text != a], PARTNERS)) for a, _ in good]
    other = {row["input"] for row in rows if row["category"] != "rewriting" and 5 <= len(row["input"].split()) <= 60}
    aliens = draw.sample(sorted(other), len(good))
    unrelated = [(a, b) for a, _ in good for b in draw.sample(aliens, 10)]

    texts = {text for row in rows if not taken(row) for text in (row["input"], row["outputs"][0])}
    hidden = {text for found in by_task.values() for pair in found for text in pair} | set(aliens)
    corpus = sample(texts - hidden)
    answers, model = short_answers(rows), MutualInformation.fit(corpus)
    print(f"{len(good)} pairs, {len(bad)} random partners, {len(unrelated)} unrelated pairs, {len(answers)} pairs of")
    print(f"different short answers; corpus: {model.n} texts, {len(model.postings)} lemmas")

    counted = Counted(model, scored + aliens)
    literal, plain = counted.sums(literal=True), counted.sums(literal=False)
    methods: dict[str, tuple[Likeness, bool]] = {
        "the paper's sum over counts": (counted.likeness(literal), False),
        "plug-in probabilities": (counted.likeness(plain), False),
        "plug-in probabilities, normalised": (counted.likeness(normalised(plain)), True),
        "common words only (μ = 0)": (ours(replace(model, association=0.0)), True),
        "`MutualInformation`": (ours(model), True),
    }
    report = list[tuple[object, ...]]()
    for name, (likeness, has_scale) in methods.items():
        far = likeness(unrelated)
        low, high = np.quantile(far, (0.05, 0.95))
        spread = (f"{far.mean():+.3f}", f"{low:+.3f}", f"{high:+.3f}", float(np.mean(np.abs(far) <= 0.05)))
        true, false = likeness(good), likeness(bad)
        measured = (auc(true, false), product_auc(true, false), identity(likeness, partners))
        report.append((name, *measured, *(spread if has_scale else ["–"] * 4)))
    table("likeness | AUC | AUC of products | identity largest | unrelated: mean | 5% | 95% | within ±0.05", report)

    score = ours(model)
    lines = list[tuple[object, ...]]()
    for task, found in by_task.items():
        true, false = score(found), score(strangers(found))
        medians = (float(np.median(true)), float(np.quantile(true, 0.1)), float(np.median(false)))
        lines.append((task, len(found), auc(true, false), *medians))
    table("task | pairs | AUC | paraphrases: median | 10% | random partners: median", lines)
    thresholds(score(good), score(bad), score(answers))

    prompts = {f"{row['definition']}\n\n{row['input']}" for row in rows} | {row["outputs"][0] for row in rows}
    listed = MutualInformation.fit(sample(prompts))
    others = {
        f"the {model.n} texts above": model,
        "500 of them": MutualInformation.fit(corpus[:500]),
        f"{listed.n} whole prompts and answers, scored rows among them": listed,
    }
    lines = []
    for name, fitted in others.items():
        score = ours(fitted)
        lines.append((name, auc(score(good), score(bad)), float(np.mean(np.abs(score(unrelated)) <= 0.05))))
    table("corpus | AUC | unrelated within ±0.05", lines)
    undamped = normalised(Counted(listed, LABELS).sums(literal=False))[0, 1]
    print(f"\n{' / '.join(LABELS)}, corpus with the instructions: {listed.score(*LABELS):.3f}, with μ → ∞ ", end="")
    print(f"{replace(listed, association=1e9).score(*LABELS):.3f}, plug-in normalised {undamped:.3f}")
    kept_words(corpus, good, bad, answers)
    speed(texts)
    print(f"all of it: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
