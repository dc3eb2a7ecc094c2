"""A language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or a paid service.

One request a completion (`n` is not widely known), each with its own seed. An answer is on the disk before anything
else happens, so that what was answered is not paid for again, after a kill or by a later build with the same cache.
(What is under way at a kill, or asked by two builds at once, is.)

What a server decides, and we cannot see:

- Log-probabilities: a server's are those of the plain distribution, so they are asked for only where that was sampled
  from (temperature 1 or 0, top-p 1). Elsewhere `token_logps` is None, rather than another quantity.
- Top-k and penalties come from `generation_config.json` on the server. `transformers serve` (5.23) samples only where
  that file says `"do_sample": true`, else it is greedy at any temperature; and its draws repeat at concurrency 1 only.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from curate.config import ModelConfig
from curate.errors import InputError
from curate.manifest.schema import content_hash
from curate.models.base import Completion, Message, Prompt, Sampling
from curate.models.chat import plain_message

LONGEST_PAUSE = 120.0  # seconds between two tries at most, whatever the server asks for


@dataclass(frozen=True)
class _Request:
    uid: str  # of the prompt, for errors
    key: str  # names the kept answer
    body: dict[str, Any]


class _Fault(Exception):
    """Why there is no usable answer. A refusal has the status of one; any other fault may pass, `after` seconds."""

    def __init__(self, text: str, refusal: int | None = None, after: float = 0.0) -> None:
        super().__init__(text)
        self.refusal, self.after = refusal, after


class ServerModel:
    """A `Generator` over HTTP. `cache`: folder of answers (None keeps none). `pause`: seconds before the second try."""

    def __init__(self, config: ModelConfig, cache: Path | None, pause: float = 0.5) -> None:
        self.config, self.cache, self.pause = config, cache, pause
        self.base_url = str(config.base_url).rstrip("/")
        self._logprobs: bool | None = None  # whether the server takes the field; None = not known yet
        self._closed = threading.Event()

    @property
    def fingerprint(self) -> str:
        """Address and name; a server does not tell which weights are behind them."""
        revision = f"@{self.config.revision}" if self.config.revision else ""
        return f"api:{self.base_url}#{self.config.model}{revision}"

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
        asked = [[self._request(prompt, sampling, j) for j in range(sampling.k)] for prompt in prompts]
        requests = {request.key: request for row in asked for request in row}
        done = {key: found for key in requests if (found := self._cached(key))}
        if missing := [request for key, request in requests.items() if key not in done]:
            done |= self._run(missing)
        return [[done[request.key] for request in row] for row in asked]

    def _request(self, prompt: Prompt, sampling: Sampling, number: int) -> _Request:
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
        return _Request(prompt.uid, content_hash([self.fingerprint, "chat/completions", body]), body)

    def _run(self, requests: Sequence[_Request]) -> dict[str, Completion]:
        """In the event loop of a new thread, since this one may have a loop: a notebook. Ctrl-C here cancels there."""
        try:
            import openai
            from anyio.from_thread import start_blocking_portal  # what openai runs on
        except ImportError:
            raise InputError("`backend: api` needs the package openai", remedy="pip install 'rehearse[api]'") from None
        client = self._client(openai)
        with start_blocking_portal() as portal:
            answers = portal.start_task_soon(self._ask_all, client, requests)
            while wait([answers], timeout=0.2).not_done:
                # awake now and then: where another thread gets the signal, a sleeping one would not hear Ctrl-C
                if self._closed.is_set():
                    answers.cancel()
            return answers.result()

    def close(self) -> None:
        """Give up what another thread has asked for: `CancelledError` there. What was answered is kept."""
        self._closed.set()

    def _client(self, openai: Any) -> Any:
        variable = self.config.api_key_env
        here = bool(re.fullmatch(r"localhost|127(\.\d+){3}|::1", urlsplit(self.base_url).hostname or ""))
        key = self._key or ("none" if here else "")
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(
                f"{self.base_url}: the environment variable {variable} {'holds no valid key' if key else 'is not set'}",
                remedy=f"export {variable}=… (any word, for a server that asks for no key)",
            )
        # a proxy does not know our localhost; a redirect would carry prompts to a host that nobody named
        http = openai.DefaultAsyncHttpxClient(trust_env=not here, follow_redirects=False)
        return openai.AsyncOpenAI(
            base_url=self.base_url, api_key=key, max_retries=0, timeout=self.config.timeout, http_client=http
        )

    @property
    def _key(self) -> str:
        """Read where it is needed and held nowhere: it cannot be printed or pickled with this object."""
        return os.environ.get(self.config.api_key_env, "").strip()

    def _hide(self, text: str, shortest: int = 1) -> str:
        """A server may answer with the key that it was sent."""
        return text.replace(self._key, "***") if len(self._key) >= shortest else text

    async def _ask_all(self, client: Any, requests: Sequence[_Request]) -> dict[str, Completion]:
        done: dict[str, Completion] = {}
        todo = iter(requests)  # shared by all workers: each takes the next

        async def work() -> None:
            for request in todo:  # another process may have asked since
                done[request.key] = self._cached(request.key) or await self._ask(client, request)

        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(requests))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:  # the others are cancelled by then; one cause is enough
            raise errors.exceptions[0] from None
        return done

    async def _ask(self, client: Any, request: _Request) -> Completion:
        """Ask until there is a usable answer, and keep it."""
        body, tries = dict(request.body), 0
        while True:
            if self._logprobs is False:
                body.pop("logprobs", None)
            try:
                response, completion = await self._post(client, body)
            except _Fault as fault:
                named = "logprob" in str(fault).lower()
                if "logprobs" in body and not self._logprobs and (fault.refusal in (400, 422) or named):
                    del body["logprobs"]  # perhaps that is what it refuses; a 403 has other reasons, and may pass
                    continue
                tries += 1
                if fault.refusal or tries > self.config.retries:
                    raise self._error(request, fault, tries) from None
                await asyncio.sleep(min(max(self.pause * 2 ** (tries - 1), fault.after), LONGEST_PAUSE))
            else:
                self._keep(request.key, response)  # no await before it: nothing comes between an answer and its file
                if "logprobs" in request.body:
                    self._logprobs = "logprobs" in body
                return completion

    async def _post(self, client: Any, body: dict[str, Any]) -> tuple[Any, Completion]:
        """One try: the response, and what it says."""
        import openai

        try:
            async with asyncio.timeout(self.config.timeout):  # the client's own starts anew with every byte
                raw = await client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            status, answer = error.status_code, _brief(self._hide(error.response.content.decode("utf-8", "replace")))
            passing = status in (408, 409, 429) or status >= 500
            after = _retry_after(error.response.headers.get("retry-after", ""))
            raise _Fault(f"status {status}, {answer}", None if passing else status, after) from None
        except (TimeoutError, openai.APITimeoutError):
            raise _Fault(f"nothing within {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Fault(f"no connection, {_brief(self._hide(str(error.__cause__ or error)))}") from None
        try:
            response = self._masked(json.loads(raw.content.decode()))  # after parsing: an escape may hide the key
            return response, _completion(response)
        except (ValueError, RecursionError, OverflowError) as error:
            said = raw.content.decode("utf-8", "replace")
            raise _Fault(f"{_brief(self._hide(str(error)))}, in {_brief(self._hide(said))}") from None

    def _masked(self, value: Any) -> Any:
        """A parsed answer without the key; keys of fewer than 8 characters are words ("none", "EMPTY") and stay."""
        if isinstance(value, str):
            return self._hide(value, shortest=8)
        if isinstance(value, list):
            return [self._masked(each) for each in value]
        if isinstance(value, dict):
            return {self._hide(name, shortest=8): self._masked(each) for name, each in value.items()}
        return value

    def _error(self, request: _Request, fault: _Fault, tries: int) -> InputError:
        model, variable = self.config.model, self.config.api_key_env
        kept = "what was answered is cached: " if self.cache else ""
        remedies = {
            None: f"{kept}run again when the server is well; or raise timeout or retries, or lower concurrency",
            401: f"put a valid key into the environment variable {variable}",
            403: f"the key in the environment variable {variable} must be allowed to use the model {model!r}",
            404: f"name a model that the server knows instead of {model!r}; base_url ends in /v1 on most servers",
        }
        return InputError(
            f"prompt {request.uid}: no usable answer from {self.base_url} (tries: {tries}): {fault}",
            remedy=remedies.get(fault.refusal, "mend what it names: the prompt, max_new_tokens, or the model's name"),
        )

    def _cached(self, key: str) -> Completion | None:
        """The kept answer; None where there is none, or none that can be used."""
        try:
            return _completion(json.loads((self.cache / f"{key}.json").read_bytes())) if self.cache else None
        except (OSError, ValueError, RecursionError, OverflowError):
            return None

    def _keep(self, key: str, response: Any) -> None:
        if self.cache is None:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = self.cache / f".{key}.{uuid.uuid4().hex[:8]}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(response, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.cache / f"{key}.json")
        finally:
            temporary.unlink(missing_ok=True)


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


def _brief(text: str) -> str:
    """The start of what a server said, on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())[:300] or "empty"


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header: a number, or a date."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        date = parsedate_tz(value)
        return mktime_tz(date) - time.time() if date else 0.0
    except (ValueError, OverflowError, TypeError):
        return 0.0
