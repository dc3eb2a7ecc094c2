"""An OpenAI-compatible server, as whatever is behind one is asked: requests side by side, each until it is answered.

An answer is on the disk before anything else happens, so that what was answered is not paid for again, after a kill or
by a later build with the same cache. (What is under way at a kill, or asked by two builds at once, is.)
"""

from __future__ import annotations

import asyncio
import json
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
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import urlsplit

from curate.config import ServerConfig
from curate.errors import InputError
from curate.manifest.schema import content_hash

LONGEST_PAUSE = 120.0  # seconds between two tries at most, whatever the server asks for

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Request:
    """What one answer is asked for with."""

    what: str  # for errors
    key: str  # names the kept answer
    body: dict[str, Any]


class Fault(Exception):
    """Why there is no usable answer. A refusal has the status of one; any other fault may pass, `after` seconds."""

    def __init__(self, text: str, refusal: int | None = None, after: float = 0.0) -> None:
        super().__init__(text)
        self.refusal, self.after = refusal, after


class Server(Generic[Answer]):
    """What all models behind a server share; each says what it posts to and what a response means.

    It does not travel: requests are sent from the process that has the key in its environment.

    Args:
        config: the server.
        cache: folder of answers; None keeps none.
        pause: seconds before the second try.
    """

    path: ClassVar[str]  # behind base_url
    mend: ClassVar[str]  # the remedy where a request is refused for another reason than its key and its path

    def __init__(self, config: ServerConfig, cache: Path | None, pause: float = 0.5) -> None:
        self.config, self.cache, self.pause = config, cache, pause
        self.base_url = str(config.base_url).rstrip("/")
        self._closed = threading.Event()

    @property
    def fingerprint(self) -> str:
        """Address and name; a server does not tell which weights are behind them."""
        revision = f"@{self.config.revision}" if self.config.revision else ""
        return f"api:{self.base_url}#{self.config.model}{revision}"

    def close(self) -> None:
        """Give up what another thread has asked for: `CancelledError` there. What was answered is kept."""
        self._closed.set()

    def _request(self, what: str, body: dict[str, Any]) -> Request:
        return Request(what, content_hash([self.fingerprint, self.path, body]), body)

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer of each. What is cached needs neither key nor network; equal requests are one.

        Raises:
            InputError: the server refuses a request, or gives no usable answer in all tries.
        """
        distinct = {request.key: request for request in requests}
        done = {key: found for key, request in distinct.items() if (found := self._cached(request)) is not None}
        if missing := [request for key, request in distinct.items() if key not in done]:
            done |= self._run(missing)
        return [done[request.key] for request in requests]

    # --- what is behind the server ---

    def _create(self, client: Any) -> Any:
        """The client's function that posts to `path`."""
        raise NotImplementedError

    def _read(self, request: Request, response: Any) -> Answer:
        """What a response says; ValueError where that is nothing usable, InputError where another try is no use."""
        raise NotImplementedError

    def _kept(self, response: Any) -> Any:
        """What is stored of a usable response: `_read` finds the same in it."""
        return response

    # --- requests ---

    def _run(self, requests: Sequence[Request]) -> dict[str, Answer]:
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

    async def _ask_all(self, client: Any, requests: Sequence[Request]) -> dict[str, Answer]:
        done: dict[str, Answer] = {}
        todo = iter(requests)  # shared by all workers: each takes the next

        async def work() -> None:
            for request in todo:  # another process may have asked since
                found = self._cached(request)
                done[request.key] = await self._ask(client, request) if found is None else found

        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(requests))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:  # the others are cancelled by then; one cause is enough
            raise errors.exceptions[0] from None
        return done

    async def _ask(self, client: Any, request: Request) -> Answer:
        """Ask until there is a usable answer, and keep it."""
        body, tries = dict(request.body), 0
        while True:
            try:
                response, answer = await self._post(client, request, body)
            except Fault as fault:
                tries += 1
                if fault.refusal or tries > self.config.retries:
                    raise self._error(request, fault, tries) from None
                await asyncio.sleep(min(max(self.pause * 2 ** (tries - 1), fault.after), LONGEST_PAUSE))
            else:
                self._keep(request.key, self._kept(response))  # no await before it: nothing comes between
                return answer

    async def _post(self, client: Any, request: Request, body: dict[str, Any]) -> tuple[Any, Answer]:
        """One try: the response, and what it says. What is changed in `body` is changed for the tries behind it."""
        import openai

        try:
            async with asyncio.timeout(self.config.timeout):  # the client's own starts anew with every byte
                raw = await self._create(client)(**body)
        except openai.APIStatusError as error:
            status, answer = error.status_code, _brief(self._hide(error.response.content.decode("utf-8", "replace")))
            passing = status in (408, 409, 429) or status >= 500
            after = _retry_after(error.response.headers.get("retry-after", ""))
            raise Fault(f"status {status}, {answer}", None if passing else status, after) from None
        except (TimeoutError, openai.APITimeoutError):
            raise Fault(f"nothing within {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Fault(f"no connection, {_brief(self._hide(str(error.__cause__ or error)))}") from None
        try:
            response = self._masked(json.loads(raw.content.decode()))  # after parsing: an escape may hide the key
            return response, self._read(request, response)
        except InputError:
            raise
        except (ValueError, RecursionError, OverflowError) as error:
            said = raw.content.decode("utf-8", "replace")
            raise Fault(f"{_brief(self._hide(str(error)))}, in {_brief(self._hide(said))}") from None

    def _masked(self, value: Any) -> Any:
        """A parsed answer without the key; keys of fewer than 8 characters are words ("none", "EMPTY") and stay."""
        if isinstance(value, str):
            return self._hide(value, shortest=8)
        if isinstance(value, list):
            return [self._masked(each) for each in value]
        if isinstance(value, dict):
            return {self._hide(name, shortest=8): self._masked(each) for name, each in value.items()}
        return value

    def _error(self, request: Request, fault: Fault, tries: int) -> InputError:
        model, variable = self.config.model, self.config.api_key_env
        kept = "what was answered is cached: " if self.cache else ""
        remedies = {
            None: f"{kept}run again when the server is well; or raise timeout or retries, or lower concurrency",
            401: f"put a valid key into the environment variable {variable}",
            403: f"the key in the environment variable {variable} must be allowed to use the model {model!r}",
            404: f"name a model that the server knows instead of {model!r}; base_url ends in /v1 on most servers",
        }
        return InputError(
            f"{request.what}: no usable answer from {self.base_url} (tries: {tries}): {fault}",
            remedy=remedies.get(fault.refusal, self.mend),
        )

    # --- the cache ---

    def _cached(self, request: Request) -> Answer | None:
        """The kept answer; None where there is none, or none that can be used."""
        if self.cache is None:
            return None
        try:
            return self._read(request, json.loads((self.cache / f"{request.key}.json").read_bytes()))
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
