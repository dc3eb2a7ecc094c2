"""Messages to tokens: the one place that knows how a prompt and its answer become what a causal language model sees.

With a chat template the template decides. Without one the contents are joined by blank lines. Prompt and answer are
tokenised apart, as in generation, so that a scored answer has the tokens that a sampled one would have had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from curate.errors import InputError
from curate.models.base import Message, Prompt


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt up to where its answer begins; of an empty prompt the token that begins a text."""
    if not prompt.messages:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [] if start is None else [start]
    if tokenizer.chat_template is None:
        return list(tokenizer(_plain(prompt.messages))["input_ids"])
    return _tokens(tokenizer, render(tokenizer, prompt, [], add_generation_prompt=True))


def answer_ids(tokenizer: Any, prompt: Prompt, answer: Sequence[Message]) -> list[int]:
    """Tokens of an answer behind `prompt_ids`, up to and with the token that ends it.

    Raises:
        InputError: the chat template does not continue what it gives for the prompt alone.
    """
    text = "\n\n".join(str(m["content"] or "") for m in answer)
    if not prompt.messages or tokenizer.chat_template is None:
        return [*_tokens(tokenizer, text), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    before = render(tokenizer, prompt, [], add_generation_prompt=True)
    whole = render(tokenizer, prompt, answer, add_generation_prompt=False)
    if not whole.startswith(before):
        raise InputError(
            f"row {prompt.uid}: the chat template writes the prompt differently once an answer follows, so the "
            "answer's log-probability cannot be told apart",
            remedy="use a tokenizer whose chat_template begins every answer with its generation prompt",
        )
    ids = _tokens(tokenizer, whole[len(before) :])
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[: ends[-1] + 1] if ends else ids  # templates put a line break behind the end token; nobody samples it


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(messages: Sequence[Message]) -> str:
    return "\n\n".join(str(m["content"] or "") for m in messages) + "\n\n"


def render(tokenizer: Any, prompt: Prompt, answer: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation as the chat template writes it.

    Raises:
        InputError: the template refuses it.
    """
    messages = [plain_message(m) for m in (*prompt.messages, *answer)]
    tools = json.loads(prompt.tools) if prompt.tools else None
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except Exception as error:  # a template is a program of the model's author; it may raise anything
        raise InputError(
            f"row {prompt.uid}: the chat template refuses its messages: {str(error)[:300]}",
            remedy="roles must be those that the template knows; see chat_template.jinja beside the model",
        ) from None


def plain_message(message: Message) -> dict[str, Any]:
    """A manifest's message as servers and templates take it: no null fields, tool calls as objects."""
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    if isinstance(found.get("tool_calls"), str):
        found["tool_calls"] = json.loads(found["tool_calls"])
    return found
