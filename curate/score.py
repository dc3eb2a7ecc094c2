"""What a row is worth: InsInfo of an instruction, and how much of a text its rewrite keeps (mutual information).

InsInfo: how much an instruction's tags tell, given how common they are in a pool of instructions. Source: InsCL (NAACL
2024), Eq. 4. Departure: a tag counts once an instruction, as the paper says and its code does not (the code counts a
tag as often as the tagger repeats it).

Mutual information: a rewrite x̂ of (x, y) and its answer ŷ stay where MI(x′, x̂′) · MI(y, ŷ) > θ. Source: NAACL Findings
2025, 303 (self-distilled augmentation), with MI(a, b) = Σ_{w∈a} Σ_{ŵ∈b} N(w, ŵ) log(N(w, ŵ) / (N(w) N(ŵ))).
Departures:

- Probabilities, not counts: N(w, ŵ) ≤ N(w) N(ŵ), so no term of the paper's sum is ever positive, and the sum is the
  lower, the more alike the texts are. A product of two such sums is positive whatever they are, and so large or small,
  by the length of the texts and the frequency of their words, that no θ means anything.
- Probabilities are those of words within single texts of a corpus: a scored pair is no evidence for itself, else rare
  unrelated words look informative.
- Divided by √(MI(a, a) MI(b, b)), so length does not matter and identity is 1.
- The term of two words is made positive semi-definite, so that identity is the maximum, by Cauchy-Schwarz, and not only
  mostly: a word with itself has its pointwise mutual information log(p / p²) = −log p, two words have their correlation
  in its place. p(w, ŵ) does not weigh the terms, or a common word that two texts share counts more than a rare one.
- Words that come together, such as the labels that an instruction lists, do not mean the same: their correlation counts
  a tenth (`ASSOCIATION`). Undamped, "positive" and "negative" score 0.96 on SuperNI's prompts; damped, 0.09.
- A product counts only where both factors are positive (`filter_score`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ASSOCIATION = 0.1  # weight of words that come together, against 1 of a word that both texts hold


def frequencies(pool: Iterable[Iterable[str]]) -> Counter[str]:
    """f_t: how many instructions of the pool carry tag t."""
    return Counter(tag for tags in pool for tag in set(tags))


def insinfo(tags: Sequence[Iterable[str]], pool: Sequence[Iterable[str]] | None = None) -> NDArray[np.float64]:
    """InsInfo of every instruction: Σ_t log(N / f_t), natural log, in nats.   InsCL Eq. 4; [n] sets -> [n].

    Args:
        tags: the tags of each of n instructions; repeats count once.
        pool: the tags of each of N instructions that f_t and N are counted over; None = `tags` itself.

    Returns:
        [n] values ≥ 0; 0 for an instruction without tags, and for one whose tags are everywhere.

    Raises:
        ValueError: a tag that no instruction of the pool carries (log N/0), or a string where a set of tags belongs.

    >>> insinfo([{"code"}, {"code", "sql"}]).round(4).tolist()  # log(2/2), log(2/2) + log(2/1)
    [0.0, 0.6931]
    """
    pool = tags if pool is None else pool
    for place, given in (("tags", tags), ("pool", pool)):
        if any(isinstance(one, str) for one in given):
            raise ValueError(f"{place} must be a sequence of sets of tags, not of strings")
    count, n = frequencies(pool), len(pool)
    return np.array([_sum(set(one), count, n) for one in tags], np.float64)


def _sum(tags: set[str], count: Counter[str], n: int) -> float:
    unknown = sorted(t for t in tags if not count[t])
    if unknown:
        raise ValueError(f"tag {unknown[0]!r} is not in the pool, so its information is unbounded; add its instruction")
    return math.fsum(math.log(n / count[t]) for t in tags)


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """How much of one text another one says, by the words of a corpus: 1 = the same, about 0 = unrelated.

    With N distinct texts, c(w) of them with lemma w and c(w, ŵ) with both:

        p(w)    = (c(w) + ½) / (N + 1)                                          never 0 nor 1
        i(w)    = −log p(w)                                                     nats; MI of w with itself
        r(w, ŵ) = [c(w, ŵ)/N − c(w) c(ŵ)/N²] / √(p(w)(1 − p(w)) p(ŵ)(1 − p(ŵ)))     0 = independent, |r| ≤ 1
        K(a, b) = Σ_{w ∈ a ∩ b} i(w) + μ Σ_{w ∈ a} Σ_{ŵ ∈ b} √(i(w) i(ŵ)) r(w, ŵ)
        score   = K(a, b) / √(K(a, a) K(b, b))

    a and b are the sets of content lemmas (`curate.tags.content_lemmas`); a text without any has all its words instead
    ("no", "it is"), one without words its symbols. K is a sum of two Gram matrices (common words; covariance over the
    corpus's texts of Σ_w √(i(w) / (p(w)(1 − p(w)))), w in the text), so |score| ≤ 1. Two different words, each a whole
    text, score at most μ / (1 + μ) = 0.09. A text within one k times as informative scores about 1/√k.

    Fit it on texts of the kind that is scored: 500 do; without any it is a plain overlap of lemmas. That the scored
    texts are among them does no harm, since a pair is never counted as one text.
    Departures from the paper and their reasons: top of the file. Source: NAACL Findings 2025, 303; r is Pearson's φ.
    """

    n: int  # distinct texts
    postings: Mapping[str, NDArray[np.int32]] = field(repr=False)  # lemma -> [c] the texts that have it, ascending
    association: float = ASSOCIATION  # μ ≥ 0

    @classmethod
    def fit(cls, texts: Iterable[str]) -> MutualInformation:
        """Count the lemmas of the distinct texts; neither order nor repeats matter. Memory: 4 bytes a (text, lemma).

        Raises:
            ValueError: a string where texts belong.

        >>> MutualInformation.fit(["a red cat", "a red dog"])
        MutualInformation(n=2, association=0.1)
        """
        if isinstance(texts, str):
            raise ValueError("texts must be an iterable of texts, not one string")
        distinct, found = sorted(set(texts)), dict[str, list[int]]()
        for i, text in enumerate(distinct):
            for lemma in _lemmas(text):
                found.setdefault(lemma, []).append(i)
        return cls(len(distinct), {lemma: np.array(at, dtype=np.int32) for lemma, at in found.items()})

    def score(self, a: str, b: str) -> float:
        """Normalised mutual information of two texts, −1 to 1; symmetric; never NaN, for no text an error.

        1 for equal sets of lemmas (so also for two empty texts); 0 where just one text is empty. A lemma that the
        corpus lacks has c = 0: it tells most, log(2N + 2), and goes with no other word.

        >>> mi = MutualInformation.fit(["a red cat", "a red dog", "the blue cat", "42 is a number"])
        >>> mi.score("Cats!", "the cat"), round(mi.score("red cat", "blue cat"), 2), mi.score("42", "43")
        (1.0, 0.42, 0.0)
        """
        one, other = _lemmas(a), _lemmas(b)
        if one == other:
            return 1.0
        if not one or not other:
            return 0.0
        here, there = self._profile(one), self._profile(other)
        length = math.sqrt(self._kernel(one, one, here, here) * self._kernel(other, other, there, there))
        return min(1.0, max(-1.0, self._kernel(one, other, here, there) / length))

    def _probability(self, lemma: str) -> float:
        return (len(self.postings.get(lemma, ())) + 0.5) / (self.n + 1)

    def _profile(self, lemmas: frozenset[str]) -> NDArray[np.float64]:
        """[n] √(i(w) / (p(w)(1 − p(w)))) summed over those `lemmas` that a text of the corpus has, less the mean."""
        known = sorted(lemma for lemma in lemmas if lemma in self.postings)
        if not known:
            return np.zeros(self.n)
        p = np.array([self._probability(lemma) for lemma in known])
        at = [self.postings[lemma] for lemma in known]
        weights = np.repeat(np.sqrt(-np.log(p) / (p * (1 - p))), [len(texts) for texts in at])
        profile = np.bincount(np.concatenate(at), weights, minlength=self.n)
        return np.asarray(profile - profile.mean())

    def _kernel(
        self, a: frozenset[str], b: frozenset[str], at_a: NDArray[np.float64], at_b: NDArray[np.float64]
    ) -> float:
        common = math.fsum(-math.log(self._probability(lemma)) for lemma in a & b)
        # not `at_a @ at_b`: BLAS adds in an order that depends on the number of threads
        return common + self.association * float(np.sum(at_a * at_b)) / max(self.n, 1)


def _lemmas(text: str) -> frozenset[str]:
    from curate.tags import content_lemmas, normalise  # spaCy takes seconds, and InsInfo needs none of it

    return frozenset(content_lemmas(text) or normalise(text).split() or text.split())


def filter_score(mi_input: float, mi_output: float) -> float:
    """What is held against θ: MI(x′, x̂′) · MI(y, ŷ) where both are positive, else 0 (NaN too).

    Two negative factors say twice that the texts have nothing in common; their product must not keep the pair.

    >>> filter_score(0.5, 0.8), filter_score(-0.5, -0.8)
    (0.4, 0.0)
    """
    return mi_input * mi_output if mi_input > 0 and mi_output > 0 else 0.0
