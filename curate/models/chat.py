"""Messages to tokens: the one place that knows how a prompt and its answer become what a causal language model sees.

With a chat template the template decides. Without one the contents are joined by blank lines. Prompt and answer are
tokenised apart, as in generation, so that a scored answer has the tokens that a sampled one would have had.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from curate.errors import InputError
from curate.models.base import Message, Prompt


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt up to where its answer begins; of an empty prompt the token that begins a text."""
    if not prompt.messages:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [] if start is None else [start]
    if tokenizer.chat_template is None:
        return list(tokenizer(contents(prompt.messages) + "\n\n")["input_ids"])
    return _tokens(tokenizer, render(tokenizer, prompt, [], add_generation_prompt=True))


def answer_ids(tokenizer: Any, prompt: Prompt, answer: Sequence[Message], ends: Collection[int]) -> list[int]:
    """Tokens of an answer behind `prompt_ids`, up to and with the token that ends it.

    Args:
        tokenizer: the model's.
        prompt: what is answered.
        answer: one message, or several where tools are called.
        ends: tokens that end an answer of the model; `tokenizer.eos_token_id` is written where the template has none.

    Raises:
        InputError: the chat template does not continue what it gives for the prompt alone.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not prompt.messages or tokenizer.chat_template is None:
        return [*_tokens(tokenizer, contents(answer)), *end]
    before = render(tokenizer, prompt, [], add_generation_prompt=True)
    whole = render(tokenizer, prompt, answer, add_generation_prompt=False)
    if not whole.startswith(before):
        raise InputError(
            f"row {prompt.uid}: the chat template writes the prompt differently once an answer follows, so the "
            "answer's log-probability cannot be told apart",
            remedy="use a tokenizer whose chat_template begins every answer with its generation prompt",
        )
    ids = _tokens(tokenizer, whole[len(before) :])
    last = max((i for i, token in enumerate(ids) if token in ends), default=-1)
    if last >= 0 and not tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1]  # templates put a line break behind the end token; nobody samples it
    return [*ids, *end]


def contents(messages: Sequence[Message]) -> str:
    """The texts of messages, joined by blank lines."""
    return "\n\n".join(str(m.get("content") or "") for m in messages)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Any, prompt: Prompt, answer: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation as the chat template writes it.

    Raises:
        InputError: the template refuses it, or its tools are not JSON.
    """
    try:
        messages = [plain_message(m) for m in (*prompt.messages, *answer)]
        tools = json.loads(prompt.tools) if prompt.tools else None
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except Exception as error:  # a template is a program of the model's author; it may raise anything
        raise InputError(
            f"row {prompt.uid}: the chat template refuses its messages: {str(error)[:300]}",
            remedy="its roles, tools and messages without content must be such as the template knows; see "
            "chat_template.jinja beside the model",
        ) from None


def plain_message(message: Message) -> dict[str, Any]:
    """A manifest's message as servers and templates take it: no null fields, tool calls as objects.

    Content is null only where tools are called instead, as is the custom; elsewhere no content is an empty text.
    """
    found = {key: value for key, value in message.items() if value is not None}
    if isinstance(found.get("tool_calls"), str):
        found["tool_calls"] = json.loads(found["tool_calls"])
    found.setdefault("content", None if found.get("tool_calls") else "")
    return found
