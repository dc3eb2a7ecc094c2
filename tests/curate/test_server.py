"""`ServerModel` against real servers on loopback: one that misbehaves as told, and `transformers serve`."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curate.config import ModelConfig
from curate.errors import InputError
from curate.models.base import Prompt, Sampling
from curate.models.http import _retry_after
from curate.models.server import ServerModel, _completion

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-very-secret-0123456789"
VARIABLE = "REHEARSE_TEST_KEY"


def good(text="fine", tokens=3, reason="stop", logps=None, **message):
    """(status, headers, body) of a sound answer."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
    if logps is not None:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": p} for p in logps]}
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return 200, {}, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def refusal(status, text="no", **headers):
    return status, headers, json.dumps({"error": {"message": text}}).encode()


class ChatServer:
    """Answers request number n (from 0) with `answer(body, n)`: (status, headers, body), or None to drop the line."""

    def __init__(self, answer: Callable):
        self.answer, self.lock = answer, threading.Lock()
        self.bodies, self.keys, self.paths, self.under_way, self.most = [], [], [], 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the head

            def do_POST(self):
                outer.serve(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def serve(self, request):
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(request.headers["authorization"])
            self.paths.append(request.path)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            reply = self.answer(body, number)
        finally:
            with self.lock:
                self.under_way -= 1
        with contextlib.suppress(OSError):  # a client that was killed, or has given up
            if reply is None:
                request.close_connection = True
                return request.connection.shutdown(socket.SHUT_RDWR)
            status, headers, data = reply
            request.send_response(status)
            if isinstance(data, bytes):
                headers = {"content-length": str(len(data)), **headers}
            for name, value in {"content-type": "application/json", **headers}.items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            for part in [data] if isinstance(data, bytes) else data:
                request.wfile.write(part)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def model(self, cache=None, **config):
        config = {"timeout": 5, "api_key_env": VARIABLE, "model": "tiny", **config}
        return ServerModel(ModelConfig(backend="api", base_url=self.url, **config), cache, pause=0.01)


def prompt(text, uid=None, **more):
    return Prompt(uid or f"uid-{text}", [{"role": "user", "content": text}], **more)


def asked(body):
    return body["messages"][-1]["content"]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)


# --- what is sent, what comes back ---


def test_request_and_completion():
    with ChatServer(lambda body, n: good("four", 2, logps=[-0.5, -0.25])) as server:
        model = server.model()
        tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
        call = json.dumps([{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}])
        messages = [
            {"role": "user", "content": "2+2? {braces}", "tool_calls": None, "name": None},
            {"role": "assistant", "content": "", "tool_calls": call, "tool_call_id": None},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": "", "tool_calls": ["odd", {"function": "odd"}]},
        ]
        [[found]] = model.generate([Prompt("u", messages, tools)], Sampling(max_new_tokens=9, seed=3))
    [body] = server.bodies
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": "2+2? {braces}"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": "", "tool_calls": ["odd", {"function": "odd"}]},  # for the server to judge
        ],
        "tools": json.loads(tools),
        "max_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": True,
    }
    assert (found.text, found.n_tokens, found.prompt_tokens, found.finished) == ("four", 2, 7, True)
    assert found.token_logps == [-0.5, -0.25] and found.token_ids is None
    assert server.keys == [f"Bearer {KEY}"] and server.paths == ["/v1/chat/completions"]
    assert model.fingerprint == f"api:{server.url}#tiny" and model.tokenizer_fingerprint is None
    assert model.room([prompt("a"), prompt("b")]) == [None, None]


@pytest.mark.parametrize(
    "reply, text, finished, logps",
    [
        (good("cut", 3, "length", [-1, -2, -3]), "cut", False, [-1.0, -2.0, -3.0]),
        (good("", 0), "", True, None),  # an empty answer is an answer
        (good("a", 3, logps=[-1, -2]), "a", True, None),  # not one a token
        (good("a", 1, logps=[float("-inf")]), "a", True, None),
        (good("a", 1, logps=[None]), "a", True, None),
        (good(None, 5, "length"), "", False, None),  # all of it was reasoning
        (good(None, 5, "tool_calls", tool_calls=[{"id": "1"}]), "", True, None),
        (good("half \ud83d", 1), "half \ufffd", True, None),  # cut inside a character
        ((200, {"content-type": "text/plain"}, good("a", 1)[2]), "a", True, None),
    ],
)
def test_what_counts_as_an_answer(reply, text, finished, logps):
    with ChatServer(lambda body, n: reply) as server:
        [[found]] = server.model().generate([prompt("a")], Sampling())
    assert (found.text, found.finished, found.token_logps) == (text, finished, logps)
    assert len(server.bodies) == 1


def test_a_server_that_counts_nothing():
    def answer(body, n):
        return 200, {}, json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}).encode()

    with ChatServer(answer) as server:
        [[found]] = server.model().generate([prompt("a")], Sampling())
    assert found.text == "a" and found.n_tokens is None and found.prompt_tokens is None


@pytest.mark.parametrize("temperature, top_p, wanted", [(1, 1, True), (0, 0.9, True), (0.7, 1, False), (1, 0.9, False)])
def test_logprobs_only_where_the_plain_distribution_was_sampled_from(temperature, top_p, wanted):
    with ChatServer(lambda body, n: good()) as server:
        server.model().generate([prompt("a")], Sampling(temperature=temperature, top_p=top_p))
    assert [body.get("logprobs", False) for body in server.bodies] == [wanted]


def test_plain_text_is_refused_before_anything_is_sent():
    with ChatServer(lambda body, n: good()) as server, pytest.raises(InputError, match="prompt u: plain text cannot"):
        server.model().generate([prompt("a"), Prompt("u", [])], Sampling())
    assert server.bodies == []


# --- faults that pass ---

HALF = good()[2][:40]
PASSING = {
    "429": refusal(429, "slow down", Retry_After="0"),
    "429-date": refusal(429, "slow down", Retry_After=formatdate(0, usegmt=True)),
    "429-nonsense": refusal(429, "slow down", Retry_After="soon"),
    "408": refusal(408),
    "409": refusal(409),
    "500": (500, {}, b""),
    "503-html": (503, {"content-type": "text/html"}, b"<html>\nbusy</html>"),
    "half-json": (200, {}, HALF),
    "half-body": (200, {"content-length": "4000", "connection": "close"}, HALF),
    "not-utf8": (200, {}, b'{"choices": "\xff"}'),
    "deep": (200, {}, b"[" * 100_000),
    "a-list": (200, {}, b"[1]"),
    "no-choices": (200, {}, b'{"choices": []}'),
    "error-in-200": (200, {}, b'{"error": {"message": "overloaded"}}'),
    "null-choice": (200, {}, b'{"choices": [null]}'),
    "null-content": good(None),
    "content-filter": good(None, reason="content_filter"),
    "content-parts": good(["a"]),
    "dropped": None,
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_a_passing_fault_is_asked_again(reply, tmp_path):
    with ChatServer(lambda body, n: reply if n < 2 else good("at last")) as server:
        [[found]] = server.model(tmp_path).generate([prompt("a")], Sampling())
    assert found.text == "at last" and len(server.bodies) == 3
    assert len(set(map(json.dumps, server.bodies))) == 1  # the same request each time: a retry changes no draw
    assert len(list(tmp_path.iterdir())) == 1  # nothing of what was unusable is kept


@pytest.mark.parametrize("reply, said", [
    (PASSING["429"], "status 429, {\"error\": {\"message\": \"slow down\"}}"), (PASSING["500"], "status 500, empty"),
    (PASSING["half-json"], "in {\"id\": \"1\""), (PASSING["no-choices"], "no choice, in {\"choices\": []}"),
    (PASSING["error-in-200"], "overloaded"), (PASSING["null-content"], "no content (finish_reason 'stop')"),
    (PASSING["dropped"], "no connection, Server disconnected"), (PASSING["503-html"], "<html> busy</html>"),
])  # fmt: skip
def test_giving_up_says_which_prompt_which_server_and_what_it_answered(reply, said, tmp_path):
    with ChatServer(lambda body, n: reply) as server, pytest.raises(InputError) as error:
        server.model(tmp_path, retries=2).generate([prompt("a", "row-17")], Sampling())
    assert len(server.bodies) == 3
    for part in ("prompt row-17:", server.url, "tries: 3", said, "what was answered is cached: run again"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_hangs_and_one_that_trickles():
    def slow(body, n):
        status, headers, data = good("awake")
        if n == 0:
            time.sleep(0.6)
        return status, {**headers, "content-length": str(len(data))}, trickle(data) if n == 1 else data

    def trickle(data):  # a byte every 50 ms: no single read is ever late
        for byte in data:
            time.sleep(0.05)
            yield bytes([byte])

    with ChatServer(slow) as server:
        [[found]] = server.model(timeout=0.3).generate([prompt("a")], Sampling())
        assert found.text == "awake" and len(server.bodies) == 3
        server.answer = lambda body, n: time.sleep(0.5)
        with pytest.raises(InputError, match=r"prompt uid-b: .*nothing within 0\.2 s"):
            server.model(timeout=0.2, retries=1).generate([prompt("b")], Sampling())


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        config = ModelConfig(backend="api", model="tiny", base_url=url, retries=2, api_key_env=VARIABLE)
        with pytest.raises(InputError, match=r"tries: 3\): no connection, All connection attempts failed"):
            ServerModel(config, None, pause=0.01).generate([prompt("a")], Sampling())


def test_pauses_double_and_respect_retry_after():
    times = []

    def answer(body, n):
        times.append(time.monotonic())
        return [refusal(500), refusal(500), refusal(429, Retry_After="0.5"), good()][n]

    with ChatServer(answer) as server:
        ServerModel(server.model().config, None, pause=0.1).generate([prompt("a")], Sampling())
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert all(pause >= least for least, pause in zip([0.1, 0.2, 0.5], pauses, strict=True)), pauses
    assert sum(pauses) < 5


# --- faults that stay ---


@pytest.mark.parametrize(
    "status, parts",
    [
        (400, ["status 400", "too long", "mend what it names"]),
        (401, ["status 401", f"environment variable {VARIABLE}"]),
        (402, ["status 402"]),
        (403, ["status 403", f"environment variable {VARIABLE}", "'tiny'"]),
        (404, ["status 404", "'tiny'", "/v1"]),
    ],
)
def test_a_refusal_is_final(status, parts, tmp_path):
    with ChatServer(lambda body, n: refusal(status, "too long")) as server, pytest.raises(InputError) as error:
        server.model(tmp_path).generate([prompt("a", "row-17")], Sampling(temperature=0.5))
    assert len(server.bodies) == 1
    for part in ["prompt row-17:", server.url, *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_server_without_logprobs_is_asked_without(status, tmp_path):
    def answer(body, n):
        return refusal(status, "logprobs: unknown field") if "logprobs" in body else good(asked(body))

    with ChatServer(answer) as server:
        model = server.model(tmp_path, concurrency=4)
        prompts = [prompt(str(i)) for i in range(12)]
        found = model.generate(prompts, Sampling())
        assert [row[0].text for row in found] == [str(i) for i in range(12)]
        refused = sum("logprobs" in body for body in server.bodies)
        assert 1 <= refused <= 4 and len(server.bodies) == 12 + refused  # those under way at once, and no more
        model.generate([prompt("another")], Sampling())
        assert len(server.bodies) == 13 + refused  # it is remembered
        server.model(tmp_path).generate(prompts, Sampling())
        assert len(server.bodies) == 13 + refused  # and found in the cache, logprobs or not


def test_a_bad_request_is_asked_once_without_logprobs_and_then_final():
    with ChatServer(lambda body, n: refusal(400, "prompt too long")) as server:
        with pytest.raises(InputError, match="prompt too long"):
            server.model().generate([prompt("a")], Sampling())
        assert ["logprobs" in body for body in server.bodies] == [True, False]
    with ChatServer(lambda body, n: good() if n == 0 else refusal(400)) as server:
        model = server.model()
        model.generate([prompt("a")], Sampling())  # takes logprobs, so they are not at fault afterwards
        with pytest.raises(InputError):
            model.generate([prompt("b")], Sampling())
        assert len(server.bodies) == 2


# --- order, draws, concurrency ---


def test_order_seeds_and_the_bound_on_concurrency(tmp_path):
    def answer(body, n):
        time.sleep(0.03 if n % 3 else 0.06)  # answers overtake each other
        return good(f"{asked(body)}/{body['seed']}")

    prompts = [prompt(f"p{i}") for i in range(10)]
    with ChatServer(answer) as server:
        first = server.model(concurrency=3).generate(prompts, Sampling(k=2, seed=1))
        assert server.most == 3 and len(server.bodies) == 20
        second = server.model(concurrency=16).generate(prompts[::-1], Sampling(k=3, seed=1))
        third = server.model(concurrency=16).generate(prompts, Sampling(k=2, seed=2))
        assert 3 < server.most <= 16
    texts = [[c.text for c in row] for row in first]
    assert all(c.startswith(f"p{i}/") for i, row in enumerate(texts) for c in row)
    assert len({c for row in texts for c in row}) == 20  # every draw has a seed of its own
    assert [[c.text for c in row[:2]] for row in second[::-1]] == texts  # whatever shares the call
    assert not {c for row in texts for c in row} & {c.text for row in third for c in row}


def test_seeds_are_the_same_on_every_machine():
    with ChatServer(lambda body, n: good()) as server:
        server.model(concurrency=1).generate([prompt("a", "u")], Sampling(k=2, seed=5))
    from hashlib import blake2b

    digests = [blake2b(f'[5,"u",{j}]'.encode(), digest_size=16).digest() for j in range(2)]
    assert [body["seed"] for body in server.bodies] == [int.from_bytes(d[:4], "big") >> 1 for d in digests]


def test_equal_requests_are_one():
    with ChatServer(lambda body, n: good(f"answer {n}")) as server:
        twice = server.model().generate([prompt("a", "u"), prompt("a", "u")], Sampling(temperature=0.5))
        assert len(server.bodies) == 1 and twice[0] == twice[1]
        greedy = server.model().generate([prompt("a", "u"), prompt("a", "v")], Sampling(k=2, temperature=0))
        assert len(server.bodies) == 2 and "seed" not in server.bodies[1]  # nothing is drawn
        assert len({c.text for row in greedy for c in row}) == 1


def test_inside_a_running_loop():
    async def notebook():
        return server.model().generate([prompt("a")], Sampling())

    with ChatServer(lambda body, n: good("here")) as server:
        assert asyncio.run(notebook())[0][0].text == "here"


def test_nothing_to_do_sends_nothing():
    config = ModelConfig(backend="api", model="tiny", base_url="http://nowhere.invalid/v1", api_key_env="UNSET_KEY")
    assert ServerModel(config, None).generate([], Sampling()) == []


# --- the cache ---


def test_what_was_answered_is_never_asked_again(tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "cache"
    with ChatServer(lambda body, n: good(f"{asked(body)} {n}")) as server:
        prompts = [prompt(f"p{i}") for i in range(5)]
        first = server.model(cache).generate(prompts, Sampling(k=2))
        assert len(server.bodies) == 10 and len(list(cache.glob("*.json"))) == 10
        monkeypatch.delenv(VARIABLE)
        monkeypatch.setitem(sys.modules, "openai", None)  # neither key nor package is needed
        assert server.model(cache).generate(prompts, Sampling(k=2)) == first
        assert len(server.bodies) == 10
    assert server.model(cache).generate(prompts, Sampling(k=2)) == first  # nor the server


@pytest.mark.parametrize("more", [{"seed": 9}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 3}])
def test_another_request_is_another_answer(more, tmp_path):
    with ChatServer(lambda body, n: good(f"answer {n}")) as server:
        server.model(tmp_path).generate([prompt("a")], Sampling())
        server.model(tmp_path).generate([prompt("a")], Sampling(**more))
        server.model(tmp_path, model="other").generate([prompt("a")], Sampling())
        assert len(server.bodies) == 3


@pytest.mark.parametrize("damage", [b"", HALF, b"\xff\x00", b"null", b'{"choices": []}', b"[" * 100_000])
def test_a_damaged_answer_is_asked_again(damage, tmp_path):
    with ChatServer(lambda body, n: good(f"answer {n}")) as server:
        server.model(tmp_path).generate([prompt("a")], Sampling())
        [file] = tmp_path.iterdir()
        file.write_bytes(damage)
        [[found]] = server.model(tmp_path).generate([prompt("a")], Sampling())
        assert found.text == "answer 1" and json.loads(file.read_bytes())["choices"]


def test_a_fault_keeps_what_was_answered_and_cancels_the_rest(tmp_path):
    gate = threading.Event()

    def answer(body, n):
        if asked(body) == "bad":
            while len(list(tmp_path.glob("*.json"))) < 3:
                time.sleep(0.01)
            return refusal(404)
        if asked(body).startswith("slow"):
            gate.wait(20)
        return good(asked(body))

    names = ["a", "b", "c", "slow 1", "bad", "slow 2", "later 1", "later 2"]
    with ChatServer(answer) as server:
        started = time.monotonic()
        with pytest.raises(InputError, match="prompt uid-bad"):
            server.model(tmp_path, concurrency=3).generate([prompt(n) for n in names], Sampling())
        assert time.monotonic() - started < 5  # the slow ones are not waited for
        gate.set()
        assert len(list(tmp_path.glob("*.json"))) == 3 and not list(tmp_path.glob(".*"))
        sent = len(server.bodies)
        server.answer = lambda body, n: good(asked(body))
        found = server.model(tmp_path).generate([prompt(n) for n in names], Sampling())
        assert [row[0].text for row in found] == names and len(server.bodies) == sent + 5


CHILD = f"""
import json, sys
from pathlib import Path
from curate.config import ModelConfig
from curate.models.base import Prompt, Sampling
from curate.models.server import ServerModel
config = ModelConfig(backend="api", model="tiny", base_url=sys.argv[1], concurrency=2, api_key_env="{VARIABLE}")
prompts = [Prompt(f"u{{i}}", [{{"role": "user", "content": f"p{{i}}"}}]) for i in range(8)]
found = ServerModel(config, Path(sys.argv[2])).generate(prompts, Sampling())
print(json.dumps([row[0].text for row in found]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_loses_no_answer(how, tmp_path):
    gate = threading.Event()

    def answer(body, n):
        if n >= 5 and not gate.is_set():
            gate.wait(30)
            return None
        return good(asked(body))

    def child():
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with ChatServer(answer) as server:
        process = child()
        while len(list(tmp_path.glob("*.json"))) < 5 or len(server.bodies) < 7:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(how)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == -how
        assert errors.count("Traceback") <= 1 and "never retrieved" not in errors and "Unclosed" not in errors, errors
        gate.set()
        again = child()
        out, errors = again.communicate(timeout=30)
        assert again.returncode == 0, errors
        assert json.loads(out) == [f"p{i}" for i in range(8)]
        under_way, later = server.bodies[5:7], server.bodies[7:]
        assert sorted(map(asked, later)) == sorted([*map(asked, under_way), "p7"])


def test_two_processes_share_a_cache(tmp_path):
    def answer(body, n):
        time.sleep(0.01)
        return good(asked(body))

    with ChatServer(answer) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path)]
        both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outs = [process.communicate(timeout=30)[0] for process in both]
        assert outs[0] == outs[1] and json.loads(outs[0]) == [f"p{i}" for i in range(8)]
        assert len(list(tmp_path.iterdir())) == 8


def test_what_another_process_answered_in_the_meantime_is_not_asked(tmp_path):
    def answer(body, n):
        if n == 0:
            server.model(tmp_path).generate([prompt("b")], Sampling())
        return good(asked(body))

    with ChatServer(answer) as server:
        found = server.model(tmp_path, concurrency=1).generate([prompt("a"), prompt("b")], Sampling())
        assert [row[0].text for row in found] == ["a", "b"] and [asked(body) for body in server.bodies] == ["a", "b"]


# --- the key ---


def test_the_key_is_nowhere(tmp_path, caplog, capfd):
    def tattle(body, n):
        if asked(body) == "refuse":
            return refusal(401, f"wrong key {KEY} {'x' * 235} {KEY}")  # the second one where the answer is shortened
        if asked(body) == "fail":
            return refusal(500, f"wrong key {KEY}")
        if asked(body) == "babble":
            return 200, {}, f"your key is {KEY}".encode()
        return good(f"your key is {KEY}", 5)

    said = []
    with caplog.at_level(logging.DEBUG), ChatServer(tattle) as server:
        model = server.model(tmp_path, retries=1)
        [[found]] = model.generate([prompt("ok")], Sampling())
        for text in ("refuse", "fail", "babble"):
            with pytest.raises(InputError) as error:
                model.generate([prompt(text)], Sampling())
            said += [str(error.value), repr(error.value), repr(error.value.__cause__)]
        assert server.keys[0] == f"Bearer {KEY}"
    files = [file.name + file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    held = [repr(model), repr(vars(model)), model.fingerprint, found.text]
    everything = "\n".join([*said, *files, *held, caplog.text, *capfd.readouterr()])
    assert "wrong key ***" in everything and found.text == "your key is ***"
    assert KEY not in everything and "sk-v" not in everything


def test_another_key_finds_the_same_answers(tmp_path, monkeypatch):
    with ChatServer(lambda body, n: good()) as server:
        server.model(tmp_path).generate([prompt("a")], Sampling())
        monkeypatch.setenv(VARIABLE, "another-key-of-mine")
        server.model(tmp_path).generate([prompt("a")], Sampling())
        assert len(server.bodies) == 1


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_without_a_key_loopback_is_asked_and_others_are_not(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value) if value is not None else monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # the client would take it by itself
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    with ChatServer(lambda body, n: good("none of them")) as server:
        assert server.model().generate([prompt("a")], Sampling())[0][0].text == "none of them"
        assert server.keys == ["Bearer none"]
    for host in ("example.invalid", "127.0.0.1.example.invalid", "10.0.0.1"):
        config = ModelConfig(backend="api", model="tiny", base_url=f"http://{host}/v1", api_key_env=VARIABLE)
        with pytest.raises(InputError, match=f"environment variable {VARIABLE} is not set\n.*export {VARIABLE}="):
            ServerModel(config, None, pause=0.01).generate([prompt("a")], Sampling())


@pytest.mark.parametrize("value", ["sk-one\nsk-two", "schlüssel", "a\x01b"])
def test_a_key_that_no_header_can_hold(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with ChatServer(lambda body, n: good()) as server, pytest.raises(InputError, match="holds no valid key") as error:
        server.model().generate([prompt("a")], Sampling())
    assert value not in str(error.value) and server.bodies == []


def test_the_extra_is_named_where_openai_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with (
        ChatServer(lambda body, n: good()) as server,
        pytest.raises(InputError, match=r"pip install 'rehearse\[api\]'"),
    ):
        server.model().generate([prompt("a")], Sampling())


# --- a real server ---


@pytest.fixture
def transformers_serve(tmp_path_factory):
    """(base_url, model name) of the starter model, told by its generation_config to sample."""
    folder = tmp_path_factory.mktemp("starter")
    for file in (ROOT / "examples" / "starter").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    settings = json.loads((ROOT / "examples" / "starter" / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "top_k": 0}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def test_transformers_serve(transformers_serve, tmp_path):
    url, name = transformers_serve
    config = ModelConfig(backend="api", model=name, base_url=url, concurrency=1, retries=0, api_key_env="UNSET_KEY")
    prompts = [prompt(text) for text in ("Name a colour.", "Translate to French: cat", "What is 2 + 3?")]
    sampling = Sampling(k=2, max_new_tokens=12, seed=4)
    found = ServerModel(config, tmp_path / "cache").generate(prompts, sampling)
    assert [len(row) for row in found] == [2, 2, 2] and len(list((tmp_path / "cache").iterdir())) == 6
    for completion in (c for row in found for c in row):
        assert completion.text and completion.prompt_tokens and completion.prompt_tokens > 5
        assert 1 <= completion.n_tokens <= 12 and completion.token_logps is None
        assert completion.finished == (completion.n_tokens < 12)
    assert all(row[0].text != row[1].text for row in found)  # it samples, each completion by its own seed
    assert ServerModel(config, tmp_path / "other").generate(prompts, sampling) == found  # asked anew: seeds repeat it
    assert ServerModel(config, tmp_path / "cache").generate(prompts, sampling) == found

    greedy = Sampling(temperature=0, max_new_tokens=6)
    first, second = (ServerModel(config, None).generate(prompts[:1], greedy) for _ in range(2))
    assert first == second and first[0][0].n_tokens == 6 and first[0][0].finished is False
    wrong = ServerModel(config.model_copy(update={"model": "other"}), None)
    with pytest.raises(InputError, match=r"prompt uid-Name a colour\.: .*status 400.*Server is pinned to"):
        wrong.generate(prompts[:1], sampling)


@pytest.mark.parametrize("count", [-3, 2**31, 10**30, True, "many", None])
def test_a_token_count_that_is_none_is_not_stored(count):
    answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
              "usage": {"completion_tokens": count, "prompt_tokens": count}}  # fmt: skip
    found = _completion(answer)
    assert (found.text, found.n_tokens, found.prompt_tokens) == ("yes", None, None)
    assert _completion({**answer, "usage": "lots"}).text == "yes"


@pytest.mark.parametrize("value", [0.5, True, -1e300, -(10**400), float("nan"), "x"])
def test_a_number_that_is_no_log_probability_is_not_stored(value):
    answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop",
                           "logprobs": {"content": [{"logprob": value}]}}],
              "usage": {"completion_tokens": 1}}  # fmt: skip
    assert _completion(answer).token_logps is None


@pytest.mark.parametrize("value", ["Thu, 01 Jan 99999 00:00:00 GMT", "soon", "", "nan"])
def test_odd_pauses_are_no_pauses(value):
    assert _retry_after(value) == 0.0
