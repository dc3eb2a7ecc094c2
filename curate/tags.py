"""Tags of instructions: raw keyphrases, their normal form, and the clusters that InsInfo counts.

Owns the offline tagger (`keyphrases`), the normal form of a tag (`normalise`) and DBSCAN over phrase vectors
(`cluster`). It loads no model and knows neither tasks nor files: vectors come in, names come out. Pool counts and
InsInfo itself are `curate.score`'s.

Departures from InsCL (NAACL 2024):

- The default tagger is not GPT-4: it ranks the text's own words and word pairs by corpus statistics, so it is free,
  offline and repeatable, and it cannot name an intent that the text does not spell out.
- Phrases are embedded by a sentence embedder (MiniLM by default), not by phrase-BERT.
- Order does not matter: phrases are sorted first. InsCL clusters in the order of its file.
- No cluster is lost: InsCL's code skips its last one, and noise stays itself here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import spacy
from numpy.typing import NDArray
from spacy.lookups import load_lookups

from curate.engine import Engine, Local
from curate.models.neighbours import NONE, Counted, Near, count, joined, lowest, merge

Ints = NDArray[np.int64]

LONGEST = 2  # words in a phrase
FLOOR = 3  # tags that a text gets even where it shares none of them with another text
LEAD = 10.0  # words after which a phrase's position starts to count against it
LONGEST_WORD = 40  # letters; above it, it is a blob (base64, unspaced script), not a word
ROUNDING = 5e-7  # a float32 dot product of unit vectors is off by less; keeps the radius inclusive

_SOFT = frozenset('-‐‑*`"“”„«»‘_~')  # may stand inside a phrase: "open-ended", "the **main** idea"
_APOSTROPHES = frozenset("'’")
_BREAK = "|"
_NEGATIONS = frozenset("no not non nor never none neither without".split())
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


# --- words ---


class _Letters(dict[int, str]):
    """A `str.translate` table, filled as characters are met. Marks count as letters: Hindi vowels, Arabic points."""

    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = self._image(char)
        return self[code]

    def _image(self, char: str) -> str:
        if char.isalpha() or unicodedata.category(char) in ("Mn", "Mc"):
            return char
        if not self.breaks or char.isspace() or char in _SOFT:
            return " "
        return "'" if char in _APOSTROPHES else f" {_BREAK} "


@lru_cache(maxsize=2)
def _letters(breaks: bool) -> _Letters:
    return _Letters(breaks=breaks)


@lru_cache(maxsize=1)
def _english() -> Any:
    nlp = spacy.blank("en")
    nlp.add_pipe("lemmatizer", config={"mode": "lookup"})
    nlp.initialize()
    return nlp


@lru_cache(maxsize=1)
def _empty_words() -> frozenset[str]:
    """Words that no tag may hold: spaCy's stop words, and adverbs that are not nouns too (WordNet, in the lookups)."""
    parts = load_lookups("en", ["lemma_index"]).get_table("lemma_index")
    return frozenset(_english().Defaults.stop_words) | (frozenset(parts["adv"]) - frozenset(parts["noun"]))


@lru_cache(maxsize=1 << 18)
def _lemma(word: str) -> str:
    """Lemma(s) of one lower-case word. spaCy splits at blanks first, so word by word equals the whole phrase.

    The table writes ordinals as digits ("second" -> "2", the unit of time too): those words stay as they are.
    """
    lemma = " ".join(token.lemma_ for token in _english()(word))
    return word if any(map(str.isdigit, lemma)) else lemma


@lru_cache(maxsize=1 << 18)
def _content(token: str) -> tuple[str, str] | None:
    """(word as written, lemma) of a word that may stand in a tag, None where a phrase has to end."""
    word = token.strip("'")
    if word.endswith("n't"):
        return None
    word = word.partition("'")[0]
    if not any(map(str.isalpha, word)) or len(word) > LONGEST_WORD or (len(word) == 1 and word.isascii()):
        return None
    lemma = _lemma(word)
    return None if {word, lemma} & _empty_words() else (word, lemma)


def normalise(tag: str) -> str:
    """NFKC, lower case, non-letters to spaces, spaCy's lookup lemmas, single spaces; "" where nothing is left.

    Letters are Unicode's, with the marks that belong to them. Lower case comes before the lemmas, since the lookup
    table is case-sensitive. Not idempotent, as the table is not: "founded" -> "found", "found" -> "find".

    >>> normalise("Summarizing  NEWS-articles!"), normalise("C++"), normalise("①")
    ('summarize news article', 'c', '')
    """
    words = unicodedata.normalize("NFKC", tag).lower().translate(_letters(False)).split()
    return " ".join(_lemma(word) for word in words if any(map(str.isalpha, word)))


@lru_cache(maxsize=1 << 18)
def _telling(token: str) -> str | None:
    """Lemma of a word that `content_lemmas` keeps, None of another."""
    content = _content(token)
    if content:
        return content[1]
    word = token.strip("'")
    if word.endswith("n't") or word == "cannot":
        return "not"
    letter = len(word) == 1 and word.isalpha() and not {token, word} & _empty_words()
    return word if letter or word in _NEGATIONS else None


def content_lemmas(text: str) -> list[str]:
    """Lemmas of the words that carry what a text says, in its order, then its numbers; repeats stay.

    Words are taken as for tags: NFKC, lower case, without stop words, adverbs and blobs. Kept beside them, since an
    answer may differ from another one in nothing else: numbers (with their sign, without thousands separators),
    negations ("n't" and "cannot" are "not") and single letters but "a" and "i". Without numbers 3.8% of the different
    short answers of a task have the same lemmas ("Option B", "Option D"; "plausible", "not plausible"), with numbers
    2.3%, with all three under 0.05%; on paraphrases they do not move the AUC (benchmarks/mutual_information.py).

    Returns:
        [] where nothing of this is left: "", "It is the one.", "+".

    Lemmas and stop words are English; other languages keep theirs, and a script without blanks yields whole clauses.

    >>> content_lemmas("The 1,000 dogs aren't barking"), content_lemmas("Option B"), content_lemmas("-5°")
    (['dog', 'not', 'bark', '1000'], ['option', 'b'], ['-5'])
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    words = [_telling(token) for token in plain.translate(_letters(True)).split()]
    numbers = _NUMBER.findall(plain.replace("−", "-"))
    return [word for word in words if word] + [number.replace(",", "") for number in numbers]


# --- keyphrases ---


@dataclass(frozen=True)
class _Corpus:
    """All texts as one row of words; a row's end and whatever ends a phrase has lemma −1."""

    words: list[str]  # as written, lower case
    lemmas: Ints  # [w] index of the lemma, −1 = a break
    text: Ints  # [w] index of the text
    start: Ints  # [n] where each text begins


def _read(texts: Sequence[str]) -> _Corpus:
    table, known = _letters(True), dict[str, int]()
    words, lemmas, start = list[str](), list[int](), list[int]()
    for text in texts:
        start.append(len(words))
        for token in unicodedata.normalize("NFKC", text).lower().translate(table).split():
            content = None if token == _BREAK else _content(token)
            words.append(content[0] if content else "")
            lemmas.append(known.setdefault(content[1], len(known)) if content else -1)
        words.append("")
        lemmas.append(-1)
    begin = np.asarray(start, dtype=np.int64)
    sizes = np.diff(np.append(begin, len(words)))
    return _Corpus(words, np.asarray(lemmas, dtype=np.int64), np.repeat(np.arange(len(texts)), sizes), begin)


@dataclass(frozen=True)
class _Candidates:
    """One row a (text, phrase): where the phrase first stands, its words, its count there and its score."""

    text: Ints
    first: Ints
    size: Ints
    count: Ints
    score: NDArray[np.float64]
    shared: NDArray[np.bool_]  # at least one other text has the phrase


def _of_size(corpus: _Corpus, size: int, ids: Ints) -> _Candidates:
    """Candidates of `size` words; ids [w] numbers the phrase that starts at each word, −1 = none."""
    at = np.flatnonzero(ids >= 0)
    terms = int(ids.max(initial=0)) + 1
    _, head, count = np.unique(corpus.text[at] * terms + ids[at], return_index=True, return_counts=True)
    first = at[head]
    text, n_texts = corpus.text[first], len(corpus.start)
    df = np.bincount(ids[first], minlength=terms)[ids[first]]
    lead = 1 + np.log1p((first - corpus.start[text]) / LEAD) / 2
    score = (1 + np.log(count)) * np.log1p(n_texts / df) * np.sqrt(size) / lead
    return _Candidates(text, first, np.full(len(first), size), count, score, df >= min(2, n_texts))


def _candidates(corpus: _Corpus) -> _Candidates:
    """All phrases of 1 to LONGEST content words, best first within a text; ties: the earlier, then the longer one."""
    ids, parts = corpus.lemmas, list[_Candidates]()
    vocabulary = int(corpus.lemmas.max(initial=0)) + 1
    for size in range(1, LONGEST + 1):
        parts.append(_of_size(corpus, size, ids))
        following = np.append(corpus.lemmas[size:], np.full(min(size, len(ids)), -1))
        pairs = np.where((ids >= 0) & (following >= 0), ids * vocabulary + following, -1)
        distinct, ids = np.unique(pairs, return_inverse=True)
        ids = ids.astype(np.int64) - np.count_nonzero(distinct < 0)  # −1 sorts first, so "none" stays −1
    columns = [np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)]
    text, first, size_, _, score, shared = columns
    order = np.lexsort((-size_, first, -np.round(score, 9), ~shared, text))
    return _Candidates(*(column[order] for column in columns))


def _pick(corpus: _Corpus, found: _Candidates, rows: range, max_tags: int) -> list[str]:
    """The best rows of one text: shared phrases, then others up to FLOOR; no word that a better phrase covers."""
    tags, covered = list[str](), dict[int, int]()  # covered: lemma -> how often the phrases taken so far hold it
    for row in rows:
        if len(tags) == max_tags or (len(tags) >= FLOOR and not found.shared[row]):
            break
        first, size, count = int(found.first[row]), int(found.size[row]), int(found.count[row])
        inside = corpus.lemmas[first : first + size].tolist()
        if size == 1 and count <= covered.get(inside[0], 0):
            continue
        for lemma in inside:
            covered[lemma] = max(count, covered.get(lemma, 0))
        tags.append(" ".join(corpus.words[first : first + size]))
    return tags


def keyphrases(texts: Sequence[str], max_tags: int = 12) -> list[list[str]]:
    """Offline tagger: raw tags of each text, at most max_tags, most informative first, no duplicates.

    A candidate is a run of one or two content words (see `_empty_words`) that no punctuation, digit or empty word
    interrupts. Phrases with the same lemmas are one candidate; it is written as the text first writes it, in lower
    case. With c its count in the text, f the texts that have it, n the distinct texts, p the words before it:

        score = (1 + ln c) · ln(1 + n/f) · √words / (1 + ½ ln(1 + p/10))

    Phrases of a single text say nothing about its likeness to others: they only fill a text up to 3 tags (all of them
    count where there is one text only). A word that stands in a better phrase needs to occur more often than that
    phrase. Ties: the earlier, then the longer phrase. Repeated texts count once, and order does not matter.

    Args:
        texts: instructions; statistics are taken over all of them, so pass the whole pool.
        max_tags: most tags a text gets, ≥ 1.

    Returns:
        A list for each text, empty where it holds no content word. `normalise` of a tag is never "".

    Raises:
        ValueError: max_tags < 1.

    Source: TF-IDF keyphrases; figures and what was tried: benchmarks/tags.py. Stop words and lemmas are English; other
    languages keep their stop words, and a script without blanks yields whole clauses.

    >>> keyphrases(["Answer the question. The answer is short.", "Is the answer right?"], max_tags=2)
    [['answer', 'question'], ['answer', 'answer right']]
    """
    if max_tags < 1:
        raise ValueError(f"max_tags must be at least 1, got {max_tags}")
    unique = sorted(set(texts))
    corpus = _read(unique)
    found = _candidates(corpus)
    ends = np.searchsorted(found.text, np.arange(len(unique) + 1)).tolist()
    tags = {text: _pick(corpus, found, range(ends[i], ends[i + 1]), max_tags) for i, text in enumerate(unique)}
    return [list(tags[text]) for text in texts]


# --- clusters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """One entry a phrase, in the order that `cluster` was given."""

    labels: Ints  # −1 = noise; else 0, 1, … in the alphabetical order of the clusters' names
    canonical: list[str]  # the cluster's name; a noise phrase's own


def cluster(
    phrases: Sequence[str],
    vectors: NDArray[np.float32],
    counts: Sequence[int],
    eps: float = 0.1,
    min_samples: int = 5,
    engine: Engine | None = None,
    device: str = "cpu",
) -> Clusters:
    """DBSCAN over unique phrases; a cluster is named after its most frequent member, ties alphabetical.

    Two phrases are neighbours where 1 − x·y/(|x||y|) ≤ eps (inclusive; 5e-7 for rounding). A core phrase has at least
    min_samples neighbours, itself among them; counts do not enter there, they only decide the name. Clusters are the
    connected core phrases and their neighbours. A border phrase that several clusters reach goes to the one with the
    alphabetically first core phrase: scikit-learn's rule, after sorting. So the order of phrases has no effect.

    Args:
        phrases: [n] distinct.
        vectors: [n, d], none zero; any length.
        counts: [n] how often each phrase is used.
        eps: cosine distance, 0 to 2.
        min_samples: ≥ 1.
        engine: computes the blocks of the radius graph; None = this process.
        device: where it does.

    Raises:
        ValueError: sizes differ, a phrase comes twice, a vector is zero or not finite, eps or min_samples is off.

    Time O(n² d); memory O(n d), and at most some KB a phrase for near pairs, however dense a cluster is: scikit-learn's
    own needs 21 GB for one cluster of 40,000. Source: InsCL (eps 0.1, min_samples 5).

    >>> cluster(["cat", "cats", "dog"], np.float32([[1, 0], [1, 0.01], [0, 1]]), [1, 2, 9], min_samples=2).canonical
    ['cats', 'cats', 'dog']
    """
    units = _unit_vectors(phrases, vectors, counts)
    if not 0 <= eps <= 2 or min_samples < 1:
        raise ValueError(f"eps must be within 0 and 2 and min_samples at least 1, got {eps} and {min_samples}")
    order = np.array(sorted(range(len(phrases)), key=lambda i: phrases[i]), dtype=np.int64)
    groups = np.empty(len(phrases), dtype=np.int64)
    groups[order] = _dbscan(Near(units[order], 1 - eps - ROUNDING, device), min_samples, engine or Local())
    names = dict[int, str]()
    for i in sorted(range(len(phrases)), key=lambda i: (-counts[i], phrases[i])):
        names.setdefault(int(groups[i]), phrases[i])
    names.pop(-1, None)
    number = {group: k for k, group in enumerate(sorted(names, key=lambda group: names[group]))} | {-1: -1}
    labels = np.array([number[group] for group in groups.tolist()], dtype=np.int64)
    return Clusters(labels, [names.get(group, phrase) for group, phrase in zip(groups.tolist(), phrases, strict=True)])


def _unit_vectors(phrases: Sequence[str], vectors: NDArray[np.float32], counts: Sequence[int]) -> NDArray[np.float32]:
    if len(counts) != len(phrases):
        raise ValueError(f"{len(phrases)} phrases but {len(counts)} counts; give one a phrase")
    if len(phrases) == 0:
        return np.empty((0, 1), dtype=np.float32)
    if np.ndim(vectors) != 2 or len(vectors) != len(phrases):
        raise ValueError(f"vectors must be [{len(phrases)}, d], one row a phrase, got {list(np.shape(vectors))}")
    if len(set(phrases)) < len(phrases):
        twice = next(phrase for phrase, times in Counter(phrases).items() if times > 1)
        raise ValueError(f"phrase {twice!r} comes more than once; give each phrase once, with its count")
    norms = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=1, keepdims=True)
    for fault, rows in (("is not finite", ~np.isfinite(norms[:, 0])), ("is zero", norms[:, 0] == 0)):
        if rows.any():
            row = int(rows.argmax())
            raise ValueError(f"the vector of phrase {phrases[row]!r} (row {row}) {fault}; it has no direction")
    return np.asarray(vectors / norms, dtype=np.float32)


def _dbscan(near: Near, min_samples: int, engine: Engine) -> Ints:
    """Cluster of each row, −1 = noise, numbered by their first core row."""
    n = len(near)
    degree, blocks = np.zeros(n, np.int64), list[Counted]()
    for _, block in engine.map(partial(count, near), near.blocks):
        degree[block.rows[0] : block.rows[1]] += block.own
        degree[block.rows[1] :] += block.others
        blocks.append(block)
    core = degree >= min_samples
    pairs = np.concatenate([np.zeros((0, 2), np.int32), *(block.pairs for block in blocks)])
    dense = [(str(b.rows[0]), replace(b, pairs=pairs[:0])) for b in sorted(blocks, key=lambda b: b.rows) if b.dense]
    component = merge(np.arange(n), pairs[core[pairs].all(axis=1)])
    groups = np.arange(component.max(initial=-1) + 1)
    for _, ends in engine.map(partial(joined, near, core, component), dense):
        groups = merge(groups, ends)
    cores = np.flatnonzero(core)
    first, place = np.unique(groups[component[cores]], return_index=True, return_inverse=True)[1:]
    labels = np.full(n, NONE)
    labels[cores] = np.argsort(np.argsort(first))[place]  # components by their first core row
    found = labels.copy()
    for here, there in (pairs.T, pairs.T[::-1]):
        np.minimum.at(found, here, labels[there])
    for _, sides in engine.map(partial(lowest, near, labels), dense):
        for at, least in sides:
            found[at : at + len(least)] = np.minimum(found[at : at + len(least)], least)
    labels = np.where(core, labels, found)
    return np.where(labels == NONE, -1, labels)
