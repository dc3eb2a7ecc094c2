"""The tables of a manifest: every column with its type, its unit and what null means.

This file is the contract between `curate`, which writes, and `train`, which reads. It owns names and types. It knows
nothing of where values come from, and it holds measurements and categorical decisions only: quantities of a loss
(α, β, log P*, λ) belong to an objective and are computed in `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Any, TypeVar

import polars as pl

Rows = TypeVar("Rows", pl.DataFrame, pl.LazyFrame)

SCHEMA_VERSION = "1.2"  # major.minor: a reader accepts its own major version, whatever the minor

MESSAGE = pl.Struct({"role": pl.String, "content": pl.String})
"""One message of a conversation. The layout that TRL and transformers call conversational."""

TOOL_MESSAGE = pl.Struct(
    {
        "role": pl.String,
        "content": pl.String,
        "tool_calls": pl.String,
        "tool_call_id": pl.String,
        "name": pl.String,
    }
)
"""A message of a set that has tool calls: `tool_calls` is the JSON of the list. Used for a table only where needed."""


class ManifestError(ValueError):
    """A manifest that cannot be used. The message names the file, the column or row, and the remedy."""


class Origin(StrEnum):
    """Where a training sample comes from."""

    CURRENT = "current"
    REPLAY = "replay"
    AUGMENTED = "augmented"


class Source(StrEnum):
    """Where a completion comes from: the policy, the data set's answer, a human's ranking, or another annotator."""

    POLICY = "policy"
    GOLD = "gold"
    HUMAN = "human"
    ANNOTATED = "annotated"


@dataclass(frozen=True)
class Column:
    """One column: its type, its meaning (with unit), and what null means ("" = null is not allowed)."""

    dtype: Any
    meaning: str
    null: str = ""
    values: tuple[str, ...] = ()

    def accepts(self, dtype: Any) -> bool:
        """True where `dtype` is this column's type (messages may carry the fields of tool calls)."""
        return bool(dtype == self.dtype) or (self.dtype == pl.List(MESSAGE) and dtype == pl.List(TOOL_MESSAGE))


@dataclass(frozen=True)
class Table:
    """One Parquet file of a manifest: what a row is, its columns in order, and which of them identify a row."""

    name: str
    row: str
    columns: Mapping[str, Column]
    key: tuple[str, ...]
    sizes: tuple[str, ...] = ()  # numeric columns that are never negative
    since: str = "1.0"  # the schema version that brought it

    @property
    def file(self) -> str:
        """The file's name in the manifest's folder."""
        return f"{self.name}.parquet"

    @property
    def schema(self) -> dict[str, Any]:
        """Column name -> polars type, in the order of the file."""
        return {name: column.dtype for name, column in self.columns.items()}

    def fit(self, rows: Rows) -> Rows:
        """The table's columns of a frame, in their order and types; columns that it lacks are null."""
        there = rows.lazy().collect_schema()
        absent = {name: pl.lit(None, dtype=dtype) for name, dtype in self.schema.items() if name not in there}
        wanted: Any = {name: dtype for name, dtype in self.schema.items() if dtype != pl.List(MESSAGE)}
        return rows.with_columns(**absent).select(list(self.schema)).cast(wanted)

    def empty(self) -> pl.DataFrame:
        """The table without rows."""
        return pl.DataFrame(schema=self.schema)


_STAGE = Column(pl.Int32, "position of the row's task in the stream, 1 = first")
_TASK = Column(pl.String, "name of the task that the row belongs to")
_UID = Column(pl.String, "content hash: 32 hexadecimal digits of BLAKE2b-128 (see `sample_uid`)")

SAMPLES = Table(
    "samples",
    "training example",
    {
        "uid": _UID,
        "task": _TASK,
        "stage": _STAGE,
        "origin": Column(
            pl.String,
            "current: the newest task; replay: drawn from an older one; augmented: made from `parent_uid`",
            values=tuple(Origin),
        ),
        "parent_uid": Column(pl.String, "uid of the sample that this one was made from", null="not augmented"),
        "row": Column(pl.Int64, "1-based number of the row in its source file", null="made here, not read"),
        "instruction": Column(pl.String, "the instruction that is embedded, tagged and counted"),
        "prompt": Column(pl.List(MESSAGE), "messages before the answer; empty for plain text"),
        "completion": Column(pl.List(MESSAGE), "the answer's messages: what the loss is on"),
        "references": Column(
            pl.List(pl.String),
            "every accepted answer, in the source's order; the first one is the text of the source's own answer",
        ),
        "tools": Column(pl.String, "JSON list of the tools that the conversation offers", null="no tools"),
        "license": Column(pl.String, "licence that the source states for this row", null="the source states none"),
        "tags": Column(pl.List(pl.String), "canonical tags of the instruction, sorted", null="not tagged"),
        "insinfo": Column(
            pl.Float64,
            "InsInfo of the instruction in nats: Σ_t log(N/f_t)",
            null="not scored (current task, or the selector needs no score)",
        ),
        "mi_input": Column(
            pl.Float64, "normalised mutual information of x and its rewrite, identity = 1", null="not augmented"
        ),
        "mi_output": Column(pl.Float64, "the same of y and the rewrite's answer", null="not augmented"),
        "augmentation": Column(pl.String, "template that made the rewrite", null="not augmented"),
        "weight": Column(pl.Float64, "sample weight in the loss, ≥ 0, 1 = plain"),
        "written_by": Column(
            pl.String,
            "who wrote the completion: the source (gold), or the policy (augmentation, on-policy replay)",
            null="a manifest of schema 1.0: the source",
            values=("gold", "policy"),
        ),
        "loss": Column(
            pl.Float64,
            "mean negative log-likelihood of the source's answer under the policy, nats a token",
            null="not measured (the selector does not ask for it), or the row does not fit the policy's context",
        ),
        "reference_loss": Column(
            pl.Float64, "the same under the reference; perplexity ratio = exp(loss - reference_loss)", null="as `loss`"
        ),
    },
    key=("uid",),
    sizes=("stage", "row", "insinfo", "weight", "loss", "reference_loss"),
)

COMPLETIONS = Table(
    "completions",
    "completion of a prompt",
    {
        "uid": _UID,
        "prompt_uid": Column(pl.String, "uid of the sample whose prompt was answered"),
        "task": _TASK,
        "stage": _STAGE,
        "origin": Column(
            pl.String,
            "policy: a rollout; gold: the source's own answer, where a rollout took its place; human, annotated: an "
            "answer of the source that people, or something else, ranked",
            values=tuple(Source),
        ),
        "text": Column(pl.String, "the completion as text"),
        "token_ids": Column(
            pl.List(pl.Int32), "its tokens under `tokenizer`", null="not tokenised, or the server does not tell"
        ),
        "token_logps": Column(
            pl.List(pl.Float32),
            "log-probability of each token in nats under `policy`. Rollouts: of the processed distribution that they "
            "were sampled from (temperature, top_p; greedy: the plain one). Answers of the data: of the plain one",
            null="not measured",
        ),
        "n_tokens": Column(pl.Int32, "number of tokens", null="not tokenised"),
        "policy": Column(
            pl.String,
            "weight hash of the model that wrote the completion or measured `token_logps`; of a server its address",
            null="the policy had nothing to do with it",
        ),
        "tokenizer": Column(pl.String, "fingerprint of the tokenizer", null="not tokenised"),
        "temperature": Column(pl.Float64, "sampling temperature, 0 = greedy", null="not sampled"),
        "top_p": Column(pl.Float64, "nucleus sampling: probability mass that was kept", null="not sampled"),
        "finished": Column(
            pl.Boolean, "the policy ended it; false = cut at the length limit", null="not sampled, or not told"
        ),
        "batch": Column(pl.Int32, "rollout batch that it was written in, 0 = first", null="not sampled"),
        "reward": Column(
            pl.Float64,
            "reward in the unit of `reward_id`; higher is better",
            null="no reward, or (where `reward_id` is not null) a reward that is not a number",
        ),
        "reward_id": Column(pl.String, "what measured the reward", null="no reward"),
        "rank": Column(
            pl.Int32,
            "place among its prompt's completions of one origin: 1 + the number of better ones, so ties share one",
            null="not ranked",
        ),
        "similarity": Column(
            pl.Float64,
            "cosine of sentence embeddings to the target answer, -1 to 1",
            null="not compared, or an empty completion",
        ),
        "side": Column(
            pl.String,
            "align: similarity ≥ the threshold in the provenance; conflict: below",
            null="as `similarity`",
            values=("align", "conflict"),
        ),
        "bucket": Column(
            pl.String,
            "CPPO's five-way class of (log-prob, reward)",
            null="not classified",
            values=("high_performance", "overfitting", "high_variance", "noisy", "normal"),
        ),
    },
    key=("uid",),
    sizes=("stage", "n_tokens", "temperature", "top_p", "batch", "rank"),
)

TASKS = Table(
    "tasks",
    "task of the stream",
    {
        "task": _TASK,
        "stage": _STAGE,
        "rows": Column(pl.Int64, "rows of the task that can be drawn or trained on"),
        "instructions": Column(pl.Int64, "distinct instructions among them"),
        "distance": Column(
            pl.Float64,
            "Wasserstein-1 distance to the current task, cosine cost, 0 to 2",
            null="the current task itself, or the selector needs no distance",
        ),
        "distance_bound": Column(
            pl.Float64, "largest possible |distance - exact distance|; 0 = exact", null="as `distance`"
        ),
        "share": Column(
            pl.Float64,
            "real-valued share of the budget before capacity and rounding, in rows",
            null="the current task itself",
        ),
        "quota": Column(
            pl.Int64,
            "rows asked of the task: its share, rounded as `replay.rounding` says",
            null="the current task itself",
        ),
        "granted": Column(pl.Int64, "rows drawn", null="the current task itself"),
        "reason": Column(pl.String, "why granted differs from quota", null="it does not"),
        "covered": Column(pl.Int64, "distinct instructions among the drawn rows", null="the current task itself"),
        "insinfo": Column(pl.Float64, "mean InsInfo over the drawn rows in nats", null="nothing drawn, or no scores"),
        "augmented": Column(pl.Int64, "augmented rows that were kept", null="no augmentation"),
        "rollouts": Column(pl.Int64, "completions that the policy wrote", null="no rollouts"),
        **{
            bucket: Column(pl.Int64, f"rollouts in the bucket {bucket}", null="no rollouts")
            for bucket in ("high_performance", "overfitting", "high_variance", "noisy", "normal")
        },
    },
    key=("task",),
    sizes=(
        "stage",
        "rows",
        "instructions",
        "distance",
        "distance_bound",
        "share",
        "quota",
        "granted",
        "covered",
        "insinfo",
        "augmented",
        "rollouts",
        "high_performance",
        "overfitting",
        "high_variance",
        "noisy",
        "normal",
    ),
)

INSTRUCTIONS = Table(
    "instructions",
    "distinct instruction of a task",
    {
        "uid": Column(pl.String, "content hash of task and instruction (see `instruction_uid`)"),
        "task": _TASK,
        "stage": _STAGE,
        "instruction": Column(pl.String, "its text"),
        "rows": Column(pl.Int64, "rows of the task that carry it"),
        "tags": Column(pl.List(pl.String), "canonical tags, sorted", null="not tagged"),
        "insinfo": Column(pl.Float64, "Σ_t log(N/f_t) in nats", null="not scored"),
        "quota": Column(pl.Int64, "rows asked of it by the draw", null="the current task"),
        "granted": Column(pl.Int64, "rows drawn", null="the current task"),
        "x": Column(
            pl.Float32,
            "place on the map of the stream: first principal component of all its instruction embeddings, 4 decimals",
            null="the selector needs no embeddings of instructions",
        ),
        "y": Column(pl.Float32, "second principal component", null="as `x`"),
    },
    key=("uid",),
    sizes=("stage", "rows", "insinfo", "quota", "granted"),
)

TAGS = Table(
    "tags",
    "raw tag",
    {
        "tag": Column(pl.String, "the tag as the tagger gave it"),
        "canonical": Column(pl.String, "the tag that it counts as: the most frequent member of its cluster"),
        "cluster": Column(pl.Int64, "cluster number, -1 = noise (the tag stays itself)"),
        "raw_count": Column(pl.Int64, "instructions of the stream that carry the raw tag"),
        "count": Column(pl.Int64, "f_t: instructions of the pool that carry the canonical tag"),
        "pool": Column(pl.Int64, "N: instructions in the pool"),
        "explanation": Column(
            pl.String, "why the tag fits, in the model's words (of its first instruction)", null="the tagger gives none"
        ),
    },
    key=("tag",),
    sizes=("raw_count", "count", "pool"),
)

DROPS = Table(
    "drops",
    "source row of the task's split and block that is not in samples",
    {
        "uid": _UID,
        "task": _TASK,
        "stage": _STAGE,
        "row": Column(pl.Int64, "1-based number of the row in its source file", null="made here, not read"),
        "step": Column(pl.String, "the stage of the build that left it out"),
        "reason": Column(pl.String, "why"),
        "instruction_uid": Column(pl.String, "uid of its instruction", null="the row has none"),
        "score": Column(
            pl.Float64,
            "the score that decided, in the unit of `step` (sample: InsInfo in nats, mean loss in nats a token, or "
            "perplexity ratio, as the selector goes by; rollout: best reward; augment: MI(x, x̂) · MI(y, ŷ))",
            null="no score was involved",
        ),
    },
    key=("task", "row", "uid"),
    sizes=("stage", "row"),
)

AUGMENTATIONS = Table(
    "augmentations",
    "rewrite of a sample, kept or not",
    {
        "uid": Column(
            pl.String,
            "uid that it has in samples, or would have (see `sample_uid`); not unique: two templates may have given "
            "the same rewrite of a row",
        ),
        "parent_uid": Column(pl.String, "uid of the sample that was rewritten"),
        "task": _TASK,
        "stage": _STAGE,
        "template": Column(pl.String, "what the policy was asked for"),
        "prompt": Column(pl.List(MESSAGE), "messages with the rewrite x̂ in the place of x"),
        "completion": Column(pl.List(MESSAGE), "the policy's answer ŷ to it"),
        "mi_input": Column(pl.Float64, "normalised mutual information of x and x̂, identity = 1", null="see `fault`"),
        "mi_output": Column(pl.Float64, "the same of y and ŷ", null="see `fault`"),
        "score": Column(
            pl.Float64, "mi_input · mi_output where both are positive, else 0: compared with θ", null="see `fault`"
        ),
        "fault": Column(pl.String, "why it cannot be used whatever θ is", null="it can"),
        "kept": Column(pl.Boolean, "score > θ and no fault: it is in samples"),
    },
    key=("parent_uid", "template"),
    sizes=("stage", "score"),
    since="1.1",
)

TABLES: dict[str, Table] = {t.name: t for t in (SAMPLES, COMPLETIONS, TASKS, INSTRUCTIONS, TAGS, AUGMENTATIONS, DROPS)}


# made once: json.dumps would make an encoder for every row; a value that holds itself is a RecursionError
_ENCODER = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN.

    >>> canonical_json({"b": 1, "a": "e"})
    b'{"a":"e","b":1}'
    """
    return _ENCODER.encode(value).encode()


def content_hash(value: Any) -> str:
    """BLAKE2b-128 of the canonical JSON, 32 hexadecimal digits: the same on every machine."""
    return blake2b(canonical_json(value), digest_size=16).hexdigest()


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its null fields, so that both layouts of a message hash alike."""
    return {key: value for key, value in message.items() if value is not None or key in ("role", "content")}


def sample_uid(
    task: str,
    prompt: Iterable[Mapping[str, Any]],
    completion: Iterable[Mapping[str, Any]],
    references: Iterable[str],
    tools: str | None = None,
    parent_uid: str | None = None,
    candidates: Iterable[tuple[str, int]] = (),
) -> str:
    """Uid of a sample: the hash of its task, messages, references; of tools, parent and ranked answers if any."""
    body: dict[str, Any] = {
        "task": task,
        "prompt": [plain_message(m) for m in prompt],
        "completion": [plain_message(m) for m in completion],
        "references": list(references),
    }
    if tools is not None:
        body["tools"] = tools
    if parent_uid is not None:
        body["parent_uid"] = parent_uid
    if ranked := sorted((rank, text) for text, rank in candidates):
        body["candidates"] = ranked
    return content_hash(body)


def instruction_uid(task: str, instruction: str) -> str:
    """Uid of a task's instruction."""
    return content_hash({"task": task, "instruction": instruction})


def completion_uid(prompt_uid: str, origin: str, text: str, index: int = 0) -> str:
    """Uid of a completion; `index` tells equal texts of one prompt apart (two rollouts may be the same)."""
    return content_hash({"prompt_uid": prompt_uid, "origin": origin, "text": text, "index": index})
