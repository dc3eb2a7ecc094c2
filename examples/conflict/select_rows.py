"""Make the shipped set of changed facts from TempLAMA, as the repository of IKE has it.

    python examples/conflict/select_rows.py SOURCE [OUT]

SOURCE is time_editing.json of Zce1112zslx/IKE (the commit stands in the card), or a conversion of it to gzipped JSONL
with the fields id, domain, relation, subject, question, old_answer, new_answer, old_date and new_date; both give the
same bytes. OUT is templama.jsonl.gz beside this script. Nothing is drawn but by a hash of the row's id. The rule, and
what it cannot do, stands in data_cards/templama.md.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SEED = 0
QUOTAS = {  # rows of a relation: train, test
    "P54": (20, 7),
    "P108": (20, 7),
    "P39": (20, 6),
}
MAX_SAME_ANSWER = 2  # rows with the same new answer

LICENSE = "Apache-2.0 AND CC0-1.0"  # TempLAMA's templates, Wikidata's facts
FIELDS = (
    "id", "domain", "relation", "question", "old_answer", "new_answer", "old_date", "new_date", "license", "split",
)  # fmt: skip

RELATIONS = {  # the end of the source's cloze, the question that it becomes, the domain
    "P54": (" plays for _X_.", "Which team does {} play for?", "sports"),
    "P108": (" works for _X_.", "Who does {} work for?", "people"),
    "P39": (" holds the position of _X_.", "What position does {} hold?", "politics"),
}


def convert(records: list[Row]) -> Iterator[Row]:
    """The changes of one subject: neighbouring dated records whose answers have nothing in common."""
    for old, new in itertools.pairwise(records):
        old_answers, new_answers = ([answer["name"] for answer in record["answer"]] for record in (old, new))
        if old["relation"] in RELATIONS and not set(old_answers) & set(new_answers):
            cloze, question, domain = RELATIONS[old["relation"]]
            subject = old["query"].removesuffix(cloze)
            yield {
                "id": f"templama/{old['id']}-{new['date']}",
                "domain": domain,
                "relation": old["relation"],
                "subject": subject,
                "question": question.format(subject),
                "old_answer": old_answers[0],
                "new_answer": new_answers[0],
                "old_date": old["date"],
                "new_date": new["date"],
            }


def read(path: Path) -> Iterator[Row]:
    """Rows of gzipped JSONL, or of the original JSON."""
    if path.suffix != ".gz":
        yield from itertools.chain.from_iterable(map(convert, json.loads(path.read_text(encoding="utf-8"))))
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def drop_reason(row: Row) -> str | None:
    """Why a row is not shipped, or None."""
    answers = (row["old_answer"], row["new_answer"])
    if not all(answer[0].isupper() or answer[0].isdigit() for answer in answers):
        return "common noun"  # "mayor", of what?
    old, new = (answer.casefold() for answer in answers)
    return "same" if old in new or new in old else None


def choose(rows: Iterable[Row]) -> list[Row]:
    """The shipped rows, by relation and id. A subject gives its last change alone, so its rows are in one split."""
    last: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["new_date"], row["old_date"], row["id"])):
        last[row["subject"]] = row
    turns: dict[str, list[Row]] = {relation: [] for relation in QUOTAS}
    answers: Counter[str] = Counter()
    for row in sorted(last.values(), key=lambda row: _hash(f"{SEED} {row['id']}")):
        here = turns[row["relation"]]
        if drop_reason(row) is None and len(here) < sum(QUOTAS[row["relation"]]):
            if answers[row["new_answer"]] < MAX_SAME_ANSWER:
                answers[row["new_answer"]] += 1
                here.append(row)
    chosen = [
        {**row, "license": LICENSE, "split": "test" if place < QUOTAS[relation][1] else "train"}
        for relation, here in turns.items()
        for place, row in enumerate(here)
    ]
    return sorted(chosen, key=lambda row: (list(QUOTAS).index(row["relation"]), row["id"]))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Gzipped JSONL without a time stamp or file name, so that the same rows give the same bytes."""
    lines = (json.dumps({field: row[field] for field in FIELDS}, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write("".join(lines).encode())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python select_rows.py SOURCE [OUT]")
    out = Path(sys.argv[2] if len(sys.argv) == 3 else Path(__file__).with_name("templama.jsonl.gz"))
    write(out, choose(read(Path(sys.argv[1]))))
