"""Short rows with few different answers, so that a stream of tasks runs, and visibly forgets, on two cores.

    python examples/stream/select_rows.py SUPERNI_FOLDER OUT_FOLDER sentiment_analysis comprehension … [--permissive]

SUPERNI_FOLDER holds <category>.jsonl.gz. Of each category named, a row stays where it and its answer have at most
--longest tokens of the starter model (120), its first answer at most --answer (6), and its definition at most --labels
different first answers (26), not all of them yes and no (but in `classification`). Definitions with fewer than 20 such
rows for training are left out; of the others at most 22 rows are trained on and 10 held out, and at most --rows and
--items of a category.
--permissive applies the rule for licence and content of examples/superni/select_rows.py. The same input gives the same
bytes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
LEAST, PER_DEFINITION = 20, {"train": 22, "test": 10}
FIELDS = ("id", "task", "category", "superni_category", "source", "definition", "domains", "instance_license", "split",
          "input", "outputs")  # fmt: skip
NOT_SHIPPED = {  # read and left out with --permissive, beside what the content filter finds
    "task428-99f5c8db": "a dead body", "task429-028b489e": "sexual", "task516-16ced605": "wants to die",
    "task493-e547d347": "about murderers",
}  # fmt: skip
Row = dict[str, Any]


class Limits(NamedTuple):
    """What a row may be: tokens of the whole and of its first answer, different first answers of its definition."""

    longest: int = 120
    answer: int = 6
    labels: float = 26


def length(row: Row, tokenizer: Any) -> tuple[int, int]:
    """(tokens of the whole row as it is trained on, tokens of its first answer)."""
    asked = [{"role": "user", "content": f"{row['definition']}\n\n{row['input']}"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answer = len(tokenizer(row["outputs"][0]).input_ids)
    return len(tokenizer(text).input_ids) + answer + 2, answer


def select(file: Path, tokenizer: Any, limits: Limits, most: dict[str, int], permissive: bool) -> list[Row]:
    """The rows of a category, those for training first."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[row["definition"]].add(row["outputs"][0].strip().lower())
    vague = set() if file.name.startswith("classification.") else {"yes", "no"}
    if permissive:
        refused = _rule().drop_reason
        rows = [row for row in rows if refused(row) is None and row["id"][:16] not in NOT_SHIPPED]
    kept: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {"train": [], "test": []})
    for row in rows:
        labels = answers[row["definition"]]
        if len(labels) > limits.labels or labels <= vague:
            continue
        whole, answer = length(row, tokenizer)
        if whole <= limits.longest and answer <= limits.answer:
            kept[row["definition"]][row["split"]].append(row)
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for definition in sorted(d for d, sides in kept.items() if len(sides["train"]) >= LEAST):
        for side, some in kept[definition].items():
            random.Random(f"{definition}/{side}").shuffle(some)
            found[side] += some[: PER_DEFINITION[side]]
    for side, some in found.items():
        if len(some) > most[side]:
            found[side] = random.Random(f"{file.name}/{side}").sample(some, most[side])
    return found["train"] + found["test"]


def _rule() -> Any:
    """The module that decides what may be shipped."""
    spec = importlib.util.spec_from_file_location("superni_rows", ROOT / "examples/superni/select_rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(
    folder: Path, out: Path, categories: list[str], limits: Limits, most: dict[str, int], permissive: bool
) -> None:
    """<category>.jsonl.gz of each category, and a line about it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/starter")
    out.mkdir(parents=True, exist_ok=True)
    for category in categories:
        rows = select(folder / f"{category}.jsonl.gz", tokenizer, limits, most, permissive)
        kept = [{name: row[name] for name in FIELDS} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        (out / f"{category}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        train = [row for row in rows if row["split"] == "train"]
        mean = sum(length(row, tokenizer)[0] for row in train) / max(1, len(train))
        print(f"{category}: {len(train)} train, {len(rows) - len(train)} test, "
              f"{len({row['definition'] for row in train})} definitions, {mean:.0f} tokens a row")  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("categories", nargs="+")
    parser.add_argument("--longest", type=int, default=120)
    parser.add_argument("--answer", type=int, default=6)
    parser.add_argument("--labels", type=float, default=26, help="inf: any answers")
    parser.add_argument("--rows", type=int, default=110)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--permissive", action="store_true")
    args = parser.parse_args()
    most = {"train": args.rows, "test": args.items}
    limits = Limits(args.longest, args.answer, args.labels)
    write(args.folder, args.out, args.categories, limits, most, args.permissive)


if __name__ == "__main__":
    main()
