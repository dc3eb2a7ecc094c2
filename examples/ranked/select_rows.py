"""Make the shipped set of ranked answers from the human feedback of QA-Feedback (Fine-Grained RLHF).

    python examples/ranked/select_rows.py SOURCE [OUT]

SOURCE is dev_feedback.json of allenai/FineGrainedRLHF (the commit stands in the card), or a conversion of it to gzipped
JSONL with the fields id, question, passages, gold, candidates and consistent; both give the same bytes. OUT is
qa_feedback.jsonl.gz beside this script. Prints the card's table of rows. Nothing is drawn but by a hash of the row's
id. The rule, and what it cannot do, stands in data_cards/qa_feedback.md.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SEED = 0
TRAIN_ROWS, TEST_ROWS = 48, 12
MAX_CHARS = 400  # of each answer
MAX_COPIED = 30  # words in a row that an answer, or the gold, may share with a passage

TASK = "long_form_qa"
LICENSE = "Apache-2.0"
FIELDS = ("id", "task", "question", "candidates", "gold", "license", "split")

# Left out after reading the selection.
EXCLUDED_IDS = {"qa_feedback/dev/351": "the bombs on Hiroshima and Nagasaki called tests"}


def convert(number: int, entry: Row) -> Row:
    """One entry of dev_feedback.json. A candidate's score is its wins less its losses; equal scores share a rank.

    The source compares 1-2, 1-3, 1-4, 2-3, 2-4, 3-4: 1 = the first is better, 2 = the second, 0 = neither. A row is
    consistent when every comparison agrees with the scores.
    """
    pairs = list(itertools.combinations(range(4), 2))
    verdicts = [{0: 0, 1: 1, 2: -1}[verdict] for verdict in entry["preference"]]
    scores = [0, 0, 0, 0]
    for (a, b), verdict in zip(pairs, verdicts, strict=True):
        scores[a] += verdict
        scores[b] -= verdict
    levels = sorted(set(scores), reverse=True)
    return {
        "id": f"qa_feedback/dev/{number}",
        "question": entry["question"],
        "passages": [{"title": title, "text": " ".join(sentences)} for title, *sentences in entry["passages"]],
        "gold": entry["gold"].strip(),
        "candidates": [
            {"text": entry[f"prediction {place}"].strip(), "score": score, "rank": 1 + levels.index(score)}
            for place, score in enumerate(scores, 1)
        ],
        "consistent": all(
            (scores[a] > scores[b]) - (scores[a] < scores[b]) == verdict
            for (a, b), verdict in zip(pairs, verdicts, strict=True)
        ),
    }


def read(path: Path) -> Iterator[Row]:
    """Rows of gzipped JSONL, or of the original JSON."""
    if path.suffix != ".gz":
        yield from itertools.starmap(convert, enumerate(json.loads(path.read_text(encoding="utf-8"))))
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def copied_words(text: str, passages: Iterable[str]) -> int:
    """The longest run of words of a text that stands in a passage too; case and punctuation do not count.

    >>> copied_words("It rose: the SUN, early.", ["He saw that the sun early was red."])
    3
    """
    sources = [f" {' '.join(_words(passage))} " for passage in passages]
    words, longest = _words(text), 0
    for start in range(len(words)):
        while start + longest < len(words):
            run = f" {' '.join(words[start : start + longest + 1])} "
            if not any(run in source for source in sources):
                break
            longest += 1
    return longest


def drop_reason(row: Row) -> str | None:
    """Why a row is not shipped, or None."""
    answers = [candidate["text"] for candidate in row["candidates"]]
    if not row["consistent"]:
        return "inconsistent"
    if row["id"] in EXCLUDED_IDS:
        return "excluded row"
    if max(map(len, answers)) > MAX_CHARS:
        return "long"
    if len(set(answers)) < len(answers):
        return "equal answers"
    passages = [passage["text"] for passage in row["passages"]]
    return "copied" if max(copied_words(text, passages) for text in [*answers, row["gold"]]) > MAX_COPIED else None


def choose(rows: Iterable[Row]) -> list[Row]:
    """The shipped rows, by their number in the source; no question occurs twice."""
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: _hash(f"{SEED} {row['id']}")):
        if drop_reason(row) is None:
            kept.setdefault(row["question"], row)
    chosen = [
        {**row, "task": TASK, "license": LICENSE, "split": "test" if place < TEST_ROWS else "train"}
        for place, row in enumerate(itertools.islice(kept.values(), TEST_ROWS + TRAIN_ROWS))
    ]
    return sorted(chosen, key=lambda row: int(row["id"].rsplit("/", 1)[1]))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Gzipped JSONL without a time stamp or file name, so that the same rows give the same bytes."""
    lines = (json.dumps({field: row[field] for field in FIELDS}, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write("".join(lines).encode())


def card_table(rows: Iterable[Row]) -> str:
    """The card's table of rows: ranks, and the Wikipedia pages of the passages that the answers were written from."""
    lines = ["| number | split | ranks | Wikipedia pages |", "| --- | --- | --- | --- |"]
    for row in rows:
        ranks = " ".join(str(candidate["rank"]) for candidate in row["candidates"])
        pages = "; ".join(dict.fromkeys(html.unescape(passage["title"]) for passage in row["passages"])) or "none"
        lines.append(f"| {row['id'].rsplit('/', 1)[1]} | {row['split']} | {ranks} | {pages} |")
    return "\n".join(lines)


def main(source: Path, out: Path) -> None:
    """Write the file and print the table of its card."""
    rows = choose(read(source))
    write(out, rows)
    print(card_table(rows))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python select_rows.py SOURCE [OUT]")
    out = Path(sys.argv[2] if len(sys.argv) == 3 else Path(__file__).with_name("qa_feedback.jsonl.gz"))
    main(Path(sys.argv[1]), out)
