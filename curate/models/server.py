"""A language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or a paid service.

One request a completion (`n` is not widely known), each with its own seed.

What a server decides, and we cannot see:

- Log-probabilities: a server's are those of the plain distribution, so they are asked for only where that was sampled
  from (temperature 1 or 0, top-p 1). Elsewhere `token_logps` is None, rather than another quantity.
- Top-k and penalties come from `generation_config.json` on the server. `transformers serve` (5.23) samples only where
  that file says `"do_sample": true`, else it is greedy at any temperature; and its draws repeat at concurrency 1 only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.config import ModelConfig
from curate.errors import InputError
from curate.manifest.schema import content_hash
from curate.models.base import Completion, Message, Prompt, Sampling
from curate.models.chat import plain_message
from curate.models.http import Fault, Request, Server


class ServerModel(Server[Completion]):
    """A `Generator` over HTTP. `cache`: folder of answers (None keeps none). `pause`: seconds before the second try."""

    path = "chat/completions"
    mend = "mend what it names: the prompt, max_new_tokens, or the model's name"

    def __init__(self, config: ModelConfig, cache: Path | None, pause: float = 0.5) -> None:
        super().__init__(config, cache, pause)
        self._logprobs: bool | None = None  # whether the server takes the field; None = not known yet

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """None: a server does not tell."""
        return None

    def room(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """None for every prompt: a server does not tell."""
        return [None] * len(prompts)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.k` completions of every prompt, in order. What is cached needs neither key nor network.

        Raises:
            InputError: a prompt is plain text, the server refuses a request, or gives no usable answer in all tries.
        """
        found = self._answers([self._completion(prompt, sampling, j) for prompt in prompts for j in range(sampling.k)])
        return [found[at : at + sampling.k] for at in range(0, len(found), sampling.k)]

    def _completion(self, prompt: Prompt, sampling: Sampling, number: int) -> Request:
        if not prompt.messages:
            raise InputError(
                f"prompt {prompt.uid}: plain text cannot be continued by a chat server ({self.base_url})",
                remedy="use `backend: transformers` for plain documents, or leave their tasks out of this step",
            )
        body: dict[str, Any] = {"model": self.config.model, "messages": [_wire(m) for m in prompt.messages],
                                "max_tokens": sampling.max_new_tokens, "temperature": float(sampling.temperature),
                                "top_p": float(sampling.top_p)}  # fmt: skip
        if prompt.tools:
            body["tools"] = json.loads(prompt.tools)
        if sampling.temperature > 0:  # greedy decoding draws nothing: without a seed, equal prompts are one request
            body["seed"] = int(content_hash([sampling.seed, prompt.uid, number])[:8], 16) >> 1  # 31 bits: all take it
        if sampling.temperature == 0 or (sampling.temperature == 1 and sampling.top_p == 1):
            body["logprobs"] = True
        return self._request(f"prompt {prompt.uid}", body)

    def _create(self, client: Any) -> Any:
        return client.chat.completions.with_raw_response.create

    def _read(self, request: Request, response: Any) -> Completion:
        return _completion(response)

    async def _post(self, client: Any, request: Request, body: dict[str, Any]) -> tuple[Any, Completion]:
        """One try; a server that does not take the field `logprobs` is asked without it."""
        if self._logprobs is False:
            body.pop("logprobs", None)
        try:
            found = await super()._post(client, request, body)
        except Fault as fault:
            named = "logprob" in str(fault).lower()
            if "logprobs" not in body or self._logprobs or not (fault.refusal in (400, 422) or named):
                raise
            del body["logprobs"]  # perhaps that is what it refuses; a 403 has other reasons, and may pass
            found = await super()._post(client, request, body)
        if "logprobs" in request.body:
            self._logprobs = "logprobs" in body
        return found


def _wire(message: Message) -> dict[str, Any]:
    """A message as servers take it: without null fields; arguments of tool calls are JSON text."""
    found = {key: value for key, value in plain_message(message).items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = json.loads(json.dumps(found["tool_calls"]))  # a copy: the caller's stays as it is
    for call in found.get("tool_calls", ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {})
    return found


def _completion(response: Any) -> Completion:
    """What a response says; ValueError where that is nothing usable."""
    try:
        choice, usage = response["choices"][0], response.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        message, reason = choice["message"], choice.get("finish_reason")
        text, calls = message.get("content"), message.get("tool_calls")
        counts = [usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no choice") from None
    if text is None and (reason == "length" or calls):
        text = ""  # all tokens went into reasoning, or into a call
    if not isinstance(text, str):
        raise ValueError(f"no content (finish_reason {reason!r})")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character where it was cut
    n_tokens, prompt_tokens = (count if type(count) is int and 0 <= count < 2**31 else None for count in counts)
    finished = {"stop": True, "tool_calls": True, "length": False}.get(str(reason))
    logps = _logps(choice, n_tokens)
    return Completion(text, None, logps, n_tokens, finished, prompt_tokens, _names(choice) if logps else None)


def _logps(choice: dict[str, Any], n_tokens: int | None) -> list[float] | None:
    """A natural log a token; None where the server gave none, or another number of them."""
    try:
        given = [token["logprob"] for token in choice["logprobs"]["content"]]
        logps = [math.nan if isinstance(value, bool) else float(value) for value in given]
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return logps if len(logps) == n_tokens and all(-3e38 < p <= 1e-4 for p in logps) else None


def _names(choice: dict[str, Any]) -> list[str] | None:
    """Of the tokens; None where one has none."""
    named = [token.get("token") for token in choice["logprobs"]["content"]]
    return named if all(isinstance(name, str) for name in named) else None
