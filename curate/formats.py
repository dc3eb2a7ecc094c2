"""Layouts of a source row: one small function a format, from the row's columns to the fields of a sample.

Owns which columns a format has, what counts as its answer, and how a row tells its format. Knows nothing of files, row
numbers or what becomes of a bad row; `curate.readers` adds those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from curate.config import Format, TaskConfig
from curate.errors import InputError
from curate.values import (
    Message,
    Names,
    Record,
    RowFault,
    as_messages,
    as_text,
    is_blank,
    kind_of,
    optional,
    parsed_list,
    required,
)

INSTRUCTION_CHARS = 1000  # a document without an instruction column is stood for by its first characters


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several answers to a prompt. Rank 1 is the best, ties share a rank."""

    text: str
    rank: int
    score: float | None


class Fields(NamedTuple):
    """What a format makes of a row."""

    instruction: str
    prompt: list[Message]
    completion: list[Message]
    references: list[str]
    candidates: list[Candidate]


# ---------------------------------------------------------------------------------------------------------- formats


def superni(record: Record, names: Names) -> Fields:
    """Super-NaturalInstructions: definition, input, outputs. Of several definitions the first one counts."""
    definition = required(record, names, "instruction")
    if isinstance(definition, list) and definition:
        definition = definition[0]
    return _instruction_row(record, names, definition, required(record, names, "input"))


def alpaca(record: Record, names: Names) -> Fields:
    """Alpaca: instruction, perhaps an input, output (one answer or a list of accepted ones)."""
    return _instruction_row(record, names, required(record, names, "instruction"), optional(record, names, "input"))


def chat(record: Record, names: Names) -> Fields:
    """A conversation. The answer is the run of assistant messages that ends it; the prompt is all before that."""
    conversation = as_messages(required(record, names, "messages"), "messages")
    cut = len(conversation)
    while cut and conversation[cut - 1]["role"] == "assistant":
        cut -= 1
    prompt, completion = conversation[:cut], conversation[cut:]
    if not completion:
        raise RowFault("the conversation does not end with an assistant message", "messages")
    instruction = _instruction(record, names, prompt, "messages")
    return Fields(instruction, prompt, completion, [_answer_of(completion, "messages")], [])


def preference(record: Record, names: Names) -> Fields:
    """A prompt with a preferred and another answer: texts or messages; messages may repeat the prompt."""
    chosen = _turns(required(record, names, "chosen"), "chosen")
    rejected = _turns(required(record, names, "rejected"), "rejected")
    if chosen[0]["role"] == "assistant":
        prompt = _prompt(required(record, names, "prompt"))
    else:
        prompt = _common_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if any(m["role"] != "assistant" for m in turns):
            raise RowFault("chosen and rejected must differ in the final assistant turn only", key)
    texts = [_answer_of(chosen, "chosen"), _answer_of(rejected, "rejected")]
    candidates = [Candidate(text, rank, None) for rank, text in enumerate(texts, 1)]
    return Fields(_instruction(record, names, prompt, "prompt"), prompt, chosen, texts[:1], candidates)


def ranked(record: Record, names: Names) -> Fields:
    """A prompt with candidates {text, rank, score}. The answer is the best one, or the column `output`."""
    candidates = _candidates(required(record, names, "candidates"))
    prompt = _prompt(required(record, names, "prompt"))
    if names["output"]:
        references = _answers(required(record, names, "output"))
    else:
        references = [min(candidates, key=lambda c: c.rank).text]  # min takes the first of equals
    instruction = _instruction(record, names, prompt, "prompt")
    return Fields(instruction, prompt, [_assistant(references[0])], references, candidates)


def document(record: Record, names: Names) -> Fields:
    """Plain text: no prompt, all of it is learnt."""
    text = as_text(required(record, names, "text"), "text")
    if is_blank(text):
        raise RowFault("no answer: the text is empty", "text")
    instruction = text[:INSTRUCTION_CHARS]
    if names["instruction"]:
        instruction = as_text(required(record, names, "instruction"), "instruction")
    return Fields(instruction, [], [_assistant(text)], [text], [])


@dataclass(frozen=True)
class Layout:
    """A format: its function, the columns that it must have, those that it may have, and those that tell it apart."""

    fields: Callable[[Record, Names], Fields]
    needs: dict[str, tuple[str, ...]]
    may: dict[str, tuple[str, ...]]
    told_by: tuple[str, ...]


_PROMPT = ("prompt", "question")
_COMMON: dict[str, tuple[str, ...]] = {
    "tools": ("tools",), "license": ("license",), "tags": ("tags",), "split": ("split",), "time": (),
}  # fmt: skip

# In the order in which `detect` tries them: a row of an earlier format may have the columns of a later one, too.
FORMATS: dict[Format, Layout] = {
    "ranked": Layout(
        ranked, {"candidates": ("candidates",), "prompt": _PROMPT}, {"instruction": (), "output": ()},
        told_by=("candidates", "prompt"),
    ),
    "preference": Layout(
        preference, {"chosen": ("chosen",), "rejected": ("rejected",)}, {"instruction": (), "prompt": _PROMPT},
        told_by=("chosen", "rejected"),
    ),
    "chat": Layout(
        chat, {"messages": ("messages", "conversations")}, {"instruction": ()},
        told_by=("messages",),
    ),
    "superni": Layout(
        superni, {"instruction": ("definition",), "input": ("input",), "output": ("outputs", "output")},
        {"license": ("instance_license",)},
        told_by=("instruction", "input", "output"),
    ),
    "alpaca": Layout(
        alpaca, {"instruction": ("instruction",), "output": ("output",)}, {"input": ("input",)},
        told_by=("instruction", "output"),
    ),
    "text": Layout(
        document, {"text": ("text",)}, {"instruction": ()},
        told_by=("text",),
    ),
}  # fmt: skip

_MAPPED: dict[str, Format] = {
    "messages": "chat", "chosen": "preference", "candidates": "ranked", "text": "text", "output": "alpaca",
}  # fmt: skip


def format_of(task: TaskConfig) -> Format:
    """The format that the task states, or that its column map tells."""
    if task.format is not None:
        return task.format
    return next(found for key, found in _MAPPED.items() if getattr(task.columns, key) is not None)


def names_of(task: TaskConfig) -> Names:
    """The column names of a task: the format's own, with those that the task maps.

    Raises:
        InputError: a column is mapped that the format does not read.
    """
    layout = FORMATS[format_of(task)]
    known = _COMMON | layout.needs | layout.may
    mapped = {key: name for key, name in task.columns if name is not None}
    for key in mapped:
        if key not in known:
            raise InputError(
                f"task {task.name!r}: format {format_of(task)} has no column `{key}` to map",
                remedy=f"leave `columns.{key}` out, or map one of {', '.join(known)}",
            )
    return known | {key: (name,) for key, name in mapped.items()}


def detect(record: Record) -> Format | None:
    """The format whose columns a row has under their default names."""
    for name, layout in FORMATS.items():
        known = layout.needs | layout.may
        if all(any(column in record for column in known[key]) for key in layout.told_by):
            return name
    return None


# --------------------------------------------------------------------------------------------------- parts of a row


def _instruction_row(record: Record, names: Names, instruction: Any, given: Any) -> Fields:
    """The fields that superni and alpaca share. Without an instruction the input is what is asked."""
    instruction = as_text(instruction, "instruction")
    given = "" if given is None else as_text(given, "input")
    if is_blank(instruction):
        instruction, given = given, ""
    if is_blank(instruction):
        raise RowFault("no instruction", "instruction")
    references = _answers(required(record, names, "output"))
    text = instruction if is_blank(given) else f"{instruction}\n\n{given}"
    return Fields(instruction, [_user(text)], [_assistant(references[0])], references, [])


def _answers(value: Any) -> list[str]:
    """All answers that are not empty, as they are."""
    values = value if isinstance(value, list) else [value]
    found = [text for v in values if v is not None and not is_blank(text := as_text(v, "output"))]
    if not found:
        raise RowFault("no answer", "output")
    return found


def _instruction(record: Record, names: Names, prompt: list[Message], key: str) -> str:
    """The mapped instruction, or what the user says first."""
    if names["instruction"]:
        return as_text(required(record, names, "instruction"), "instruction")
    for message in prompt:
        if message["role"] == "user":
            return str(message["content"])
    raise RowFault("no user message before the answer", key)


def _answer_of(messages: list[Message], key: str) -> str:
    """The text of an answer; an answer that only calls tools is stood for by the calls."""
    text = "\n".join(m["content"] for m in messages if m["content"])
    if not is_blank(text):
        return text
    calls = [m["tool_calls"] for m in messages if "tool_calls" in m]
    if not calls:
        raise RowFault("no answer", key)
    return "\n".join(calls)


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, list):
        return as_messages(value, "prompt")
    text = as_text(value, "prompt")
    if is_blank(text):
        raise RowFault("the prompt is empty", "prompt")
    return [_user(text)]


def _turns(value: Any, key: str) -> list[Message]:
    return as_messages(value, key) if isinstance(value, list) else [_assistant(as_text(value, key))]


def _common_start(a: list[Message], b: list[Message]) -> list[Message]:
    """What two conversations share, so that each keeps at least its last message."""
    most = min(len(a), len(b)) - 1
    return a[: next((i for i in range(most) if a[i] != b[i]), most)]


def _candidates(value: Any) -> list[Candidate]:
    items = parsed_list(value, "candidates")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        of = f" of {kind_of(items[0])}" if isinstance(items, list) and items else ""
        raise RowFault(
            f"a list of {{text, rank}} or {{text, score}} was expected, found {kind_of(value)}{of}; make "
            '[{"text": "…", "rank": 1}, …] of parallel lists', "candidates",
        )  # fmt: skip
    if len(items) < 2:
        raise RowFault(f"at least 2 candidates are needed, found {len(items)}", "candidates")
    texts = [as_text(item.get("text"), "candidates") for item in items]
    if any(map(is_blank, texts)):
        raise RowFault("a candidate's text is empty", "candidates")
    scores = [_number(item.get("score"), "score") for item in items]
    ranks = _ranks([_number(item.get("rank"), "rank") for item in items], scores)
    return [Candidate(*parts) for parts in zip(texts, ranks, scores, strict=True)]


def _ranks(ranks: list[float | None], scores: list[float | None]) -> list[int]:
    """1 + the number of better candidates, by the given ranks (1, 1, 2 becomes 1, 1, 3), or else by their scores."""
    if all(rank is not None for rank in ranks):
        given = [int(rank) for rank in ranks if rank is not None]
        if any(rank != whole or not 1 <= whole < 2**31 for rank, whole in zip(ranks, given, strict=True)):
            raise RowFault("ranks must be whole numbers from 1 (the best)", "candidates")
        return [1 + sum(other < rank for other in given) for rank in given]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        raise RowFault("every candidate needs a rank, or every one a score", "candidates")
    return [1 + sum(other > score for other in known) for score in known]


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 < value < 1e308:
        raise RowFault(f"{name} {value!r:.40} is not a finite number", "candidates")
    return float(value)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
