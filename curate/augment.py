"""Self-distilled augmentation: the policy rewrites a prompt, answers its rewrite, and both must still mean the same.

x̂ ~ π(·|template(x)), ŷ ~ π(·|x̂); the pair stays if MI(x, x̂) · MI(y, ŷ) > θ. x is the last user message of a sample,
y its answer; the other messages stay as they are. Source: PBL / self-distillation / dynamic selection (NAACL Findings
2025, 303). Departures: the mutual information is normalised and taken from probabilities (`curate.score` says why);
the three templates are ours, since the paper's are not public; what the length limit cut is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import polars as pl

from curate.blocks import Advance, Blocks
from curate.config import AugmentConfig
from curate.manifest.schema import MESSAGE, content_hash, sample_uid
from curate.models.base import Completion, Message, Prompt, Sampling
from curate.store import Store

Question: TypeAlias = tuple[dict[str, Any], str, Prompt]
"""A row, the name of a template, and what the policy is asked."""

MI_VERSION = 1
MI: dict[str, Any] = {"mi_input": pl.Float64, "mi_output": pl.Float64}
PAIRS = 1024  # rewrites whose scores are kept together

TEMPLATES = {
    "background": "Rewrite the task below so that it also states the background knowledge that is needed to solve it. "
    "Keep its meaning, every fact in it and its answer. Write the rewritten task only.\n\nTask:\n{text}",
    "expansion": "Rewrite the task below in more detail, with steps or explanations that are logically compatible with "
    "it. Keep its meaning, every fact in it and its answer. Write the rewritten task only.\n\nTask:\n{text}",
    "paraphrase": "Paraphrase the task below: say the same in other words. Keep every fact in it and its answer. Write "
    "the rewritten task only.\n\nTask:\n{text}",
}  # fmt: skip
"""Background knowledge, logic-compatible expansion, paraphrase: the paper's three kinds, in our words."""

REWRITES: dict[str, Any] = {
    "parent_uid": pl.String,
    "template": pl.String,
    "prompt": pl.List(MESSAGE),
    "completion": pl.List(MESSAGE),
    "x": pl.String,
    "x_hat": pl.String,
    "y": pl.String,
    "y_hat": pl.String,
    "fault": pl.String,
}


def templates_of(config: AugmentConfig) -> dict[str, str]:
    """The templates of a configuration, by name, in the order of their names."""
    return dict(sorted((config.templates or TEMPLATES).items()))


def sampling_of(config: AugmentConfig, seed: int) -> Sampling:
    """How rewrites and answers are drawn."""
    return Sampling(1, config.temperature, config.top_p, config.max_new_tokens, seed)


def last_user(messages: Sequence[Message]) -> int:
    """Place of the last user message; −1 where there is none."""
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def rewritable(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows with a user message that is not blank, and without tools: a rewrite holds {role, content} only."""
    message, blank = pl.element().struct, r"^\s*$"
    tool = pl.col("prompt").list.eval(message.field("tool_calls").is_not_null() | (message.field("role") == "tool"))
    users = pl.col("prompt").list.eval(pl.element().filter(message.field("role") == "user").struct.field("content"))
    text = users.list.last()
    return rows.filter(pl.col("tools").is_null(), tool.list.any().not_(), text.is_not_null(),
                       text.str.contains(blank).not_())  # fmt: skip


def questions(rows: pl.DataFrame, config: AugmentConfig) -> list[Question]:
    """What is asked for every rewrite, questions of like length side by side."""
    found = []
    for row in rows.iter_rows(named=True):
        text = row["prompt"][last_user(row["prompt"])]["content"]
        for name, template in templates_of(config).items():
            asked = template.replace("{text}", text)  # not str.format: a prompt may hold braces
            found.append((row, name, Prompt(f"{row['uid']}/{name}", [{"role": "user", "content": asked}])))
    return sorted(found, key=lambda q: (len(q[2].messages[0]["content"]), q[2].uid))


def rewritten(question: Question, rewrite: Completion) -> Prompt:
    """The prompt with x̂ in the place of x."""
    row, name, _ = question
    messages = [dict(m) for m in row["prompt"]]
    messages[last_user(messages)]["content"] = rewrite.text.strip()
    return Prompt(f"{row['uid']}/{name}/answer", messages)


def usable(completion: Completion, what: str) -> str | None:
    """Why a rewrite or an answer cannot be used; None where it can."""
    if completion.finished is False:
        return f"the {what} was cut at the length limit"
    if not completion.text.strip():
        return f"the {what} is empty"
    return None


def rewrites(
    questions_: Sequence[Question],
    found: Sequence[Completion],
    answers: dict[str, Completion | str],
) -> pl.DataFrame:
    """The table REWRITES: one row a question, with its rewrite, its answer or a fault.

    Args:
        questions_: what was asked.
        found: the rewrite of each.
        answers: by the uid of the question: the answer to the rewrite, or why there is none.
    """
    rows, seen = [], set()
    for question, rewrite in zip(questions_, found, strict=True):
        row, name, prompt = question
        fault, answer = usable(rewrite, "rewrite"), answers.get(prompt.uid)
        if isinstance(answer, str):
            fault, answer = fault or answer, None
        if fault is None and answer is not None:
            fault = usable(answer, "answer")
        messages = rewritten(question, rewrite).messages
        y_hat = answer.text.strip() if answer else ""
        same = (row["uid"], messages[last_user(messages)]["content"], y_hat)
        if fault is None and same[1] == row["prompt"][last_user(row["prompt"])]["content"].strip():
            fault = "the rewrite is the prompt itself"
        if fault is None and same in seen:
            fault = "the same as the rewrite of another template"
        if fault is None:
            seen.add(same)
        rows.append(
            {
                "parent_uid": row["uid"],
                "template": name,
                "prompt": [{"role": m["role"], "content": m["content"]} for m in messages],
                "completion": [{"role": "assistant", "content": y_hat}],
                "x": row["prompt"][last_user(row["prompt"])]["content"] or "",
                "x_hat": rewrite.text.strip(),
                "y": "\n\n".join(m["content"] or "" for m in row["completion"]),
                "y_hat": y_hat,
                "fault": fault,
            }
        )
    return pl.DataFrame(rows, schema=REWRITES).sort("parent_uid", "template")


def corpus(tasks: Iterable[pl.LazyFrame], most: int) -> list[str]:
    """Texts that word statistics are taken from: last user messages and first answers of all tasks' rows, distinct.

    Above `most`, those whose hashes come first: a sample that no order of rows or tasks changes.
    """
    last = pl.col("prompt").list.eval(
        pl.element().filter(pl.element().struct.field("role") == "user").struct.field("content")
    )
    texts: set[str] = set()
    for rows in tasks:
        frame = rows.select(x=last.list.last(), y=pl.col("references").list.first()).collect()
        texts |= {t for column in ("x", "y") for t in frame[column].drop_nulls()}
    if len(texts) <= most:
        return sorted(texts)
    return sorted(sorted(texts, key=content_hash)[:most])


def information(
    frame: pl.DataFrame, texts: Sequence[str], store: Store, done: Advance = lambda n: None
) -> pl.DataFrame:
    """`frame` with mi_input = MI(x, x̂) and mi_output = MI(y, ŷ), null where there is a fault."""
    frames = mi_blocks(frame, texts, store).frames(Information(texts), done)
    return pl.concat([frame, pl.concat([pl.DataFrame(schema=MI), *frames])], how="horizontal")


class Information:
    """Both scores of rewrites against a corpus, which is counted at the first of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __call__(self, items: Sequence[dict[str, Any]]) -> pl.DataFrame:
        """mi_input, mi_output of every rewrite."""
        score = self._fitted.score
        found = [(None, None) if i["fault"] else (score(i["x"], i["x_hat"]), score(i["y"], i["y_hat"])) for i in items]
        return pl.DataFrame(found, schema=MI, orient="row")

    @cached_property
    def _fitted(self) -> Any:
        from curate.score import MutualInformation

        return MutualInformation.fit(self.texts)


def mi_blocks(frame: pl.DataFrame, texts: Sequence[str], store: Store) -> Blocks[dict[str, Any]]:
    """The scores of rewrites as work in blocks."""
    items = list(frame.iter_rows(named=True))
    names = [content_hash([i["x"], i["x_hat"], i["y"], i["y_hat"], i["fault"]]) for i in items]
    return Blocks(store, "mi", [MI_VERSION, content_hash(list(texts))], items, names, PAIRS)


def decided(frame: pl.DataFrame, theta: float) -> pl.DataFrame:
    """`frame` with kept: score > θ and no fault. Score and decision are apart, so θ moves without generating again."""
    return frame.with_columns(kept=pl.col("fault").is_null() & (pl.col("score") > theta).fill_null(False))


def why_dropped(fault: str | None, theta: float) -> str:
    """The reason of a rewrite that is not kept, as drops.parquet gives it."""
    return fault or f"MI(x, x̂) · MI(y, ŷ) is not above θ = {theta:g}"


def rewrite_uid(task: str, row: dict[str, Any]) -> str:
    """Uid of a rewrite as a sample."""
    answer = row["completion"][0]["content"]
    return sample_uid(task, row["prompt"], row["completion"], [answer], parent_uid=row["parent_uid"])
