"""Embedding against sentence-transformers' default `encode`: the same model, the same texts of mixed lengths, in turns.

    python benchmarks/embedding.py [--texts 2000] [--rounds 3] [--repeats 0.5]

Texts: inputs of the shipped Super-NaturalInstructions rows, cut to lengths from a few words to some hundred tokens, all
distinct; and the same where a share of them comes twice, as instructions do. Ours is what a build does (`Embeddings`:
distinct texts, sorted by length, in blocks, into a store), with float32 and with `embed.dtype: bfloat16`. Cosine is to
the peer's vectors, the least of all texts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from curate.config import EmbedConfig
from curate.embed import Embeddings
from curate.models import open_embedder
from curate.store import Store

ROOT = Path(__file__).parent.parent


def texts(n: int) -> list[str]:
    """Distinct texts of mixed lengths, shuffled."""
    rng, found = random.Random(0), dict[str, None]()
    rows = [json.loads(line) for file in sorted((ROOT / "examples/superni").glob("*.jsonl.gz"))
            for line in gzip.open(file, "rt", encoding="utf-8")]  # fmt: skip
    words = [f"{row['definition']} {row['input']}".split() for row in rows]
    while len(found) < n:
        some = rng.choice(words)
        start = rng.randrange(max(1, len(some) - 8))
        found[" ".join(some[start : start + round(2 ** rng.uniform(2, 8))])] = None
    order = list(found)
    rng.shuffle(order)
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=float, default=0.5, help="share of the texts that comes twice")
    args = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    from curate.models.weights import model_folder

    distinct = texts(args.texts)
    twice = distinct + distinct[: round(args.repeats * len(distinct))]
    random.Random(1).shuffle(twice)
    peer = SentenceTransformer(
        str(model_folder(EmbedConfig.model_validate({}).model, Path())[0]), local_files_only=True
    )
    ours = {dtype: open_embedder(EmbedConfig.model_validate({"dtype": dtype})) for dtype in ("float32", "bfloat16")}
    for model in (peer, *ours.values()):
        model.encode(distinct[:64])
    print("| texts | ours | texts a second | sentence-transformers `encode` | ratio, pair by pair | least cosine |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, some in (
        (f"{len(distinct):,} distinct", distinct),
        (f"{len(twice):,}, {len(distinct):,} distinct", twice),
    ):
        for dtype, model in ours.items():
            ratios, speeds, theirs, least = [], [], [], 1.0
            for _ in range(args.rounds):
                start = time.perf_counter()
                expected = peer.encode(some)
                middle = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    embeddings = Embeddings(Store(Path(folder)), model)
                    embeddings.extend(some)
                    embeddings.compute()
                    found = embeddings.of(some)
                end = time.perf_counter()
                expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
                least = min(least, float((expected * found).sum(axis=1).min()))
                ratios.append((middle - start) / (end - middle))
                speeds.append(len(some) / (end - middle))
                theirs.append(len(some) / (middle - start))
            print(f"| {name} | {dtype} | {statistics.median(speeds):,.0f} | {statistics.median(theirs):,.0f} | "
                  f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {least:.4f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
