"""What the starter model scores, beside another one: on rows held out from its own tasks, and on tasks it never saw.

    python benchmarks/starter.py examples/starter [OTHER_MODEL …] [--held-out runs/starter-held-out]

The held-out manifest is made by examples/starter/held_out.yaml. The other rows are the test rows of examples/superni.
Negative log-likelihood of the first accepted answer with its end token, in float32; a row longer than the context is
left out and counted. Models with unlike tokenizers are compared by nats a character of the answer. Exact match is of
greedy answers of at most 16 tokens against every accepted answer. Ends with what data_cards/starter.md shows.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from curate.manifest import read
from curate.models import LocalModel, ModelConfig, Prompt, Sampling

ROOT = Path(__file__).parent.parent
Row = tuple[str, Prompt, list[str], str]  # group, prompt, accepted answers, id


def shipped() -> list[Row]:
    """Test rows of examples/superni."""
    found: list[Row] = []
    for path in sorted((ROOT / "examples/superni").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["split"] == "test":
                    prompt = Prompt(row["id"], [{"role": "user", "content": f"{row['definition']}\n\n{row['input']}"}])
                    found.append((row["category"], prompt, row["outputs"], row["id"]))
    return found


def held_out(folder: str) -> list[Row]:
    """The samples of a manifest."""
    rows = read(folder).samples.sort("uid").iter_rows(named=True)
    return [("held out", Prompt(r["uid"], r["prompt"], r["tools"]), r["references"], r["uid"]) for r in rows]


def measured(model: LocalModel, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Group -> rows, left out, answer tokens, answer characters, nats, rows that are right."""
    scores = model.score([(prompt, [{"role": "assistant", "content": some[0]}]) for _, prompt, some, _ in rows])
    texts = answers(model, [prompt for _, prompt, _, _ in rows])
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0, 0.0, 0])
    for (group, _, some, _), score, text in zip(rows, scores, texts, strict=True):
        for key in (group, "all"):
            into = found[key]
            if score is None or score.token_logps is None:
                into[1] += 1
                continue
            own = [1, 0, len(score.token_logps), len(some[0]), -sum(score.token_logps)]
            right = text is not None and text.strip() in {a.strip() for a in some}
            found[key] = [a + b for a, b in zip(into, [*own, right], strict=True)]
    return dict(found)


def answers(model: LocalModel, prompts: list[Prompt]) -> list[str | None]:
    """Greedy answers of at most 16 tokens; None where there is no room for them."""
    room = model.room(prompts)
    fit = [p for p, r in zip(prompts, room, strict=True) if r is None or r >= 16]
    made = iter(model.generate(fit, Sampling(k=1, temperature=0, max_new_tokens=16)))
    return [next(made)[0].text if r is None or r >= 16 else None for r in room]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--held-out", default="runs/starter-held-out")
    args = parser.parse_args()
    sets = {"test rows of examples/superni": shipped()}
    if (Path(args.held_out) / "provenance.json").is_file():
        sets = {"held out": held_out(args.held_out), **sets}
    models = [LocalModel(ModelConfig.model_validate({"model": name}), Path(), name) for name in args.models]
    print("| rows | model | rows (left out) | nats an answer token | nats a character | exact match |")
    print("| --- | --- | --- | --- | --- | --- |")
    last: dict[str, list[float]] = {}
    for title, rows in sets.items():
        for name, model in reversed(list(zip(args.models, models, strict=True))):
            last = measured(model, rows)
            n, out, tokens, characters, nats, right = last["all"]
            figures = f"{nats / tokens:.3f} | {nats / characters:.4f} | {right / n:.1%}"
            print(f"| {title} | {name} | {n:,} ({out}) | {figures} |", flush=True)
    print("\n| category | rows | answer tokens | nats an answer token |\n| --- | --- | --- | --- |")
    for group, (n, _, tokens, _, nats, _) in sorted(last.items(), key=lambda pair: pair[0].lower()):
        print(f"| {group} | {n} | {tokens:,} | {nats / tokens:.2f} |")
    firsts = {group: (prompt, some, name) for group, prompt, some, name in reversed(shipped())}
    print("\n| row | accepted answer (the first) | what the model writes |\n| --- | --- | --- |")
    for group in sorted(firsts, key=str.lower):
        prompt, some, name = firsts[group]
        print(f"| {name} | {some[0].strip()} | {(answers(models[0], [prompt])[0] or '').strip()} |")


if __name__ == "__main__":
    main()
