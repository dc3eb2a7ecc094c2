"""The data card of a manifest: README.md, written from the tables and the provenance alone.

Its YAML front matter follows the Hugging Face conventions, so `datasets.load_dataset(folder, "samples")` works.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import polars as pl

from curate.manifest.card_policy import policy_sections
from curate.manifest.card_terms import citation, considerations, licences
from curate.manifest.licences import hub_ids
from curate.manifest.markdown import bound, code, escape, own, printable, real, table
from curate.manifest.schema import MESSAGE, TABLES, Table
from curate.manifest.tables import Rows, counts, height, value

SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"),
)  # fmt: skip

USES = """\
For fine-tuning a language model on the newest task without losing the older ones, and for asking why each row is here.
`samples` is in the conversational prompt–completion layout:

```python
from datasets import load_dataset

samples = load_dataset("PATH/OF/THIS/FOLDER", "samples", split="train")
```

Not for evaluation: the rows were drawn to be trained on, and their numbers are not those of the sources."""


def card(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    """The whole card as Markdown. Of tables that may be large only figures are taken."""
    config, tasks = provenance["config"], frames["tasks"].lazy().collect()
    parts = [
        _front_matter(frames, provenance),
        f"# {escape(config['name'])}",
        _summary(frames["samples"], tasks, provenance),
        "## Uses",
        USES,
        "## The stream",
        _stream(tasks),
        "## Structure",
        _structure(frames),
        "## How rows were chosen",
        _method(frames["tags"].lazy().collect(), tasks, provenance),
        *policy_sections(frames, provenance),
        "## What was left out",
        _left_out(frames["drops"]),
        "## Considerations",
        considerations(frames, provenance),
        "## Licences",
        licences(frames["samples"]),
        "## Provenance",
        _again(provenance),
        "## Citation",
        citation(frames, provenance),
    ]
    return "\n\n".join(parts) + "\n"


def part_card(title: str, text: str, frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    """The card of some prompts of a manifest: so much that `datasets` loads it."""
    return f"{_front_matter(frames, provenance)}\n\n# {escape(title)}\n\n{escape(text)}\n"


def _front_matter(frames: Mapping[str, Rows], provenance: Mapping[str, Any]) -> str:
    """The YAML block of the hub's conventions: what tables and provenance know, and nothing that they do not.

    The language is not among it. JSON is YAML, so a name of the data is quoted as JSON.
    """
    samples, completions = frames["samples"], frames["completions"]
    stated = [name for (name,) in counts(samples, "license")]
    names = [name for name in stated if name is not None]
    ids = sorted({each for name in stated for each in hub_ids(name)})
    written = ("policy",) in counts(samples, "written_by") or ("policy",) in counts(completions, "origin")
    judged = height(frames["tags"]) or value(completions, pl.col("bucket").count())
    hubs = {n.removeprefix("hub:").split("@")[0] for i in provenance["inputs"] for n in i["files"] if n[:4] == "hub:"}
    facts: dict[str, Any] = {"pretty_name": provenance["config"]["name"]}
    if ids:
        facts["license"] = ids[0] if len(ids) == 1 else ids
    if "other" in ids:
        facts |= {"license_name": "as-stated-by-the-sources", "license_details": "; ".join(names)[:1000]}
    facts |= {
        "annotations_creators": ["found", "machine-generated"] if judged else ["found"],
        "language_creators": ["found", "machine-generated"] if written else ["found"],
        "size_categories": [_size(height(samples))],
        **({"source_datasets": [f"extended|{name}" for name in sorted(hubs)]} if hubs else {}),
        "task_categories": ["text-generation"],
        "tags": ["continual-learning", "replay", "instruction-tuning", *_kinds(completions)],
    }
    lines = [f"{key}: {_quoted(value)}" for key, value in facts.items()] + ["configs:"]
    for each in TABLES.values():
        if height(frames[each.name]):
            lines += [f"- config_name: {each.name}", f"  data_files: {each.file}"]
            lines += ["  default: true"] if each.name == "samples" else []
    return "\n".join(["---", *lines, "---"])


def _kinds(completions: Rows) -> list[str]:
    found = [
        ("preference", value(completions, pl.col("rank").count())),
        ("rollouts", ("policy",) in counts(completions, "origin")),
    ]
    return [name for name, there in found if there]


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_quoted, value)) + "]"
    text = json.dumps(printable(value), ensure_ascii=False)
    return re.sub(r"[<>\[\]()]", lambda found: f"\\u{ord(found[0]):04x}", text)  # the same text, and no markup


def _size(n: int) -> str:
    return next((name for limit, name in SIZES if n < limit), "n>1B")


def _summary(samples: Rows, tasks: pl.DataFrame, provenance: Mapping[str, Any]) -> str:
    found, tasks = counts(samples, "origin"), tasks.sort("stage")
    origins = {name: found.get((name,), 0) for name in ("current", "replay", "augmented")}
    return (
        f"Training data for the task **{escape(tasks['task'][-1])}**, number {tasks.height} of a stream: "
        f"{origins['current']:,} rows of it, and {origins['replay']:,} rows of the tasks before it, replayed so that "
        f"they are not forgotten"
        + (f", with {origins['augmented']:,} augmented rows" if origins["augmented"] else "")
        + f". Made by `curate build` (rehearse {provenance['rehearse']})."
    )


def _stream(tasks: pl.DataFrame) -> str:
    header = ["stage", "task", "rows", "instructions", "distance", "± bound", "share", "quota", "granted", "covered",
              "mean InsInfo", "why granted differs"]  # fmt: skip
    rows = [
        [t["stage"], escape(t["task"]), t["rows"], t["instructions"], real(t["distance"]), bound(t["distance_bound"]),
         real(t["share"], 2), t["quota"], t["granted"], t["covered"], real(t["insinfo"], 3), t["reason"]]
        for t in tasks.sort("stage").iter_rows(named=True)
    ]  # fmt: skip
    note = (
        "Distance: Wasserstein-1 between the instruction embeddings of the task and of the current one, cosine cost "
        "(0 = the same, 2 = opposite); the bound is the largest possible error. InsInfo in nats."
    )
    return table(header, rows) + "\n\n" + note


def _method(tags: pl.DataFrame, tasks: pl.DataFrame, provenance: Mapping[str, Any]) -> str:
    config, replay = provenance["config"], provenance["replay"]
    lines = [
        f"- Selector `{replay['selector']}`: {replay['about']}.",
        f"- Budget: {replay['asked']:,} rows asked, {tasks['granted'].sum():,} granted.",
        f"- Seed: {config['seed']}.",
    ]
    if provenance["embedder"]:
        name = config["embed"]["path"] or config["embed"]["model"]
        lines.append(f"- Embedder: {code(name)} ({code(provenance['embedder'])}).")
    if provenance["solver"]:
        lines.append(f"- Transport solver: {', '.join(provenance['solver'])}; optimality proven.")
    if tags.height:
        clusters = tags.filter(pl.col("cluster") >= 0)["cluster"].n_unique()
        lines.append(
            f"- Tags: tagger `{config['tags']['tagger']}`, {tags.height:,} raw tags, "
            f"{tags['canonical'].n_unique():,} after lemmas and {clusters:,} clusters; InsInfo over a pool of "
            f"{tags['pool'][0]:,} instructions."
        )
    return "\n".join(lines)


def _left_out(drops: Rows) -> str:
    rows = [[step, escape(reason), n] for (step, reason), n in counts(drops, "step", "reason").items()]
    if not rows:
        return "Nothing: every source row is in `samples.parquet`."
    return table(["step", "reason", "rows"], rows) + "\n\nEach row is in `drops.parquet`."


def _structure(frames: Mapping[str, Rows]) -> str:
    """The files, and every column of those that have rows."""
    rows = [[f"`{t.file}`", own(t.row), f"{height(frames[t.name]):,}"] for t in TABLES.values()]
    parts = [table(["file", "one row a", "rows"], rows)]
    parts += ["A file is a configuration, with one split, `train`. Files without rows have none."]
    for each in TABLES.values():
        if height(frames[each.name]):
            parts += [f"### {each.name}", _columns(each)]
    return "\n\n".join(parts)


def _columns(of: Table) -> str:
    rows = [[f"`{name}`", _type(c.dtype), own(c.meaning), own(c.null) or None] for name, c in of.columns.items()]
    return table(["column", "type", "meaning", "null means"], rows)


def _type(dtype: Any) -> str:
    if isinstance(dtype, pl.List):
        return "list of " + ("messages" if dtype == pl.List(MESSAGE) else _type(dtype.inner))
    return str(dtype).lower()


def _again(provenance: Mapping[str, Any]) -> str:
    inputs = [
        [escape(i["task"]), escape(name), f"`{digest[:16]}…`"]
        for i in provenance["inputs"]
        for name, digest in sorted(i["files"].items())
    ]
    return (
        "`provenance.json` holds the whole configuration, the hash of every input and output, and the versions of all "
        "packages. The same inputs, configuration and seed give these bytes again.\n\n"
        + table(["task", "source", "sha256"], inputs)
    )
