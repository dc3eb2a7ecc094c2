"""Rows and tokenizer of the starter model, from rows of permissive licence only.

    python examples/starter/prepare.py superni_base_permissive.jsonl.gz runs/starter-data

The input has one Super-NaturalInstructions row a line: task, category, definition, input, outputs, instance_license
(data_cards/starter.md says how it was selected). Writes rows.jsonl.gz, which data.yaml and held_out.yaml read, and
tokenizer/. The same input gives the same bytes: what is drawn is drawn by a hash of the row.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LEFT_OUT = {"Program_Execution"}  # its 29 rows are in examples/superni: a stream over those must be new to the model
HELD_OUT = 0.02  # share of each task's rows that is only measured on
WHOLE = 0.4  # share of the rows with the whole definition; the others have its first two sentences
VOCABULARY = 6144
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows that are taken, with their split and their definition."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["category"] in LEFT_OUT:
                continue
            if drawn(row, "definition") >= WHOLE:
                row["definition"] = " ".join(re.split(r"(?<=[.!?])\s+", row["definition"])[:2])
            row["split"] = "test" if drawn(row, "split") < HELD_OUT else "train"
            yield row


def drawn(row: dict[str, Any], what: str) -> float:
    """A number in [0, 1) that depends on the row alone, and is another for each purpose."""
    text = "\n".join((what, row["task"], row["input"]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def tokenizer_of(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left", model_max_length=1024,
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False, chat_template=TEMPLATE,
    )  # fmt: skip


def main(source: str, target: str) -> None:
    """Write rows.jsonl.gz and tokenizer/."""
    out = Path(target)
    out.mkdir(parents=True, exist_ok=True)
    taken = list(rows(source))
    with (out / "rows.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.writelines((json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode() for row in taken)
    train = [row for row in taken if row["split"] == "train"]
    definitions = dict.fromkeys(row["definition"] for row in train)  # each once, or they alone would make the merges
    texts = [*definitions, *(text for row in train for text in (row["input"], row["outputs"][0]))]
    tokenizer_of(iter(texts)).save_pretrained(out / "tokenizer")
    print(f"{len(train):,} rows to train on, {len(taken) - len(train):,} held out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
