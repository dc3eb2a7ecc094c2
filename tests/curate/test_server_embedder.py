"""`embed.backend: api` against real servers on loopback: as told, and with the shipped model behind one."""

import contextlib
import itertools
import json
import logging
import pickle
import sys
import threading
import time
from zlib import crc32

import numpy as np
import polars as pl
import pytest
import yaml
from commands import called
from test_server import KEY, VARIABLE, ChatServer, refusal

from curate.cli import main
from curate.config import BuildConfig, EmbedConfig
from curate.embed import Embeddings
from curate.errors import InputError
from curate.manifest import TABLES, check, read
from curate.models import open_embedder
from curate.models.embedder import ServerEmbedder
from curate.models.reward import Similarity
from curate.rollout import rewards
from curate.store import Store

TEXTS = [f"text {i}" for i in range(10)]


def raw(text):
    """What the server says of a text: float32, like a model's."""
    return (np.random.default_rng(crc32(text.encode())).standard_normal(8) * 3).astype(np.float32).tolist()


def unit(texts):
    found = np.array([raw(text) for text in texts], np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def said(vectors, **more):
    """(status, headers, body) of an answer."""
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    return 200, {}, json.dumps({"object": "list", "data": data, **more}).encode()


def well(body, n=0):
    return said([raw(text) for text in body["input"]])


@contextlib.contextmanager
def serving(answer=well):
    with ChatServer(answer) as server:
        yield server


def of(server, cache=None, **config):
    given = {"model": "tiny", "revision": "1", "timeout": 5, "api_key_env": VARIABLE, "batch_size": 4, **config}
    return ServerEmbedder(EmbedConfig(backend="api", base_url=server.url, **given), cache, pause=0.01)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)


# --- what is sent, what comes back ---


def test_requests_and_vectors():
    with serving() as server:
        model = of(server, concurrency=1)
        found = model.encode(TEXTS)
        assert server.bodies == [
            {"model": "tiny", "input": TEXTS[at : at + 4], "encoding_format": "float"} for at in (0, 4, 8)
        ]
        assert set(server.keys) == {f"Bearer {KEY}"} and set(server.paths) == {"/v1/embeddings"}
        assert found.dtype == np.float32 and (found == unit(TEXTS)).all()
        assert model.fingerprint == f"api:{server.url}#tiny@1"


def test_order_is_that_of_the_texts_whoever_answers_first():
    def answer(body, n):
        time.sleep(0.03 if n % 3 == 0 else 0.005)  # answers overtake each other
        status, headers, data = well(body)
        rows = json.loads(data)["data"]
        return status, headers, json.dumps({"data": rows[::-1]}).encode()  # `index` says whose a vector is

    with serving(answer) as server:
        for concurrency in (1, 3, 16):
            assert (of(server, concurrency=concurrency, batch_size=1).encode(TEXTS) == unit(TEXTS)).all()
        assert 3 < server.most <= 10
        assert (of(server).encode(["a", "a", "b"] * 2) == unit(["a", "a", "b"] * 2)).all()


def test_equal_requests_are_one():
    with serving() as server:
        of(server, batch_size=2).encode(["a", "b"] * 3)
        assert len(server.bodies) == 1


def test_base64_is_an_answer_too():
    from base64 import b64encode

    with serving(
        lambda body, n: said([b64encode(np.array(raw(t), "<f4").tobytes()).decode() for t in body["input"]])
    ) as s:
        assert (of(s).encode(TEXTS) == unit(TEXTS)).all()


def test_the_shipped_model_behind_a_server_gives_its_own_bits():
    local = open_embedder(EmbedConfig.model_validate({}))
    with serving(lambda body, n: said(local._model.encode(body["input"]).tolist())) as server:
        texts = ["Add two numbers.", "Sum two numbers.", "Write a poem."]
        assert (of(server).encode(texts) == local.encode(texts)).all()


# --- faults ---

UNUSABLE = {
    "500": refusal(500),
    "429": refusal(429, Retry_After="0"),
    "dropped": None,
    "half": (200, {}, b'{"data": [{"ind'),
    "no-data": (200, {}, b'{"error": {"message": "overloaded"}}'),
    "a-list": (200, {}, b"[1]"),
    "none": said([]),
    "too-few": said([[1, 2]]),
    "too-many": said([[1, 2]] * 3),
    "twice": (200, {}, json.dumps({"data": [{"index": 0, "embedding": [1, 2]}] * 2}).encode()),
    "no-index": (200, {}, json.dumps({"data": [{"embedding": [1, 2]}] * 2}).encode()),
    "null": said([[1, None], [1, 2]]),
    "words": said([["1", "2"], [1, 2]]),
    "bools": said([[True, False], [1, 2]]),
    "nested": said([[[1, 2]], [[1, 2]]]),
    "a-number": said([1, 2]),
    "bad-base64": said(["%%%", "AAAA"]),
    "huge": said([[10**400, 1], [1, 2]]),
}


@pytest.mark.parametrize("reply", UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_no_answer_is_asked_again_and_not_kept(reply, tmp_path):
    with serving(lambda body, n: reply if n < 2 else well(body)) as server:
        assert (of(server, tmp_path).encode(["a", "b"]) == unit(["a", "b"])).all()
        assert len(server.bodies) == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("reply, words", [
    (UNUSABLE["500"], "status 500"), (UNUSABLE["too-few"], "no vector with its"), (UNUSABLE["no-data"], "overloaded"),
    (UNUSABLE["too-many"], "3 vectors for 2 texts"), (UNUSABLE["dropped"], "no connection"),
])  # fmt: skip
def test_giving_up_says_which_texts_which_server_and_what_it_answered(reply, words, tmp_path):
    with serving(lambda body, n: reply) as server, pytest.raises(InputError) as error:
        of(server, tmp_path, retries=1).encode(["first words", "b"])
    assert len(server.bodies) == 2 and list(tmp_path.iterdir()) == []
    for part in ("text 'first words' and 1 more:", server.url, "tries: 2", words, "run again"):
        assert part in str(error.value)


@pytest.mark.parametrize("status, words", [
    (400, ["too long", "embed.batch_size"]), (401, [f"environment variable {VARIABLE}"]), (403, [VARIABLE, "'tiny'"]),
    (404, ["'tiny'", "/v1"]), (413, ["embed.batch_size"]),
])  # fmt: skip
def test_a_refusal_is_final(status, words, tmp_path):
    with serving(lambda body, n: refusal(status, "too long")) as server, pytest.raises(InputError) as error:
        of(server, tmp_path).encode(["a"])
    assert len(server.bodies) == 1
    for part in ("text 'a':", server.url, f"status {status}", *words):
        assert part in str(error.value)


def test_retry_after_is_waited_for():
    times = []

    def answer(body, n):
        times.append(time.monotonic())
        return [refusal(500), refusal(429, Retry_After="0.4"), well(body)][n]

    with serving(answer) as server:
        of(server).encode(["a"])
    first, second = (after - before for before, after in itertools.pairwise(times))
    assert first >= 0.01 and 0.4 <= second < 3


@pytest.mark.parametrize("odd, length", [([0.0, 0.0], "0.0"), ([float("nan"), 1.0], "nan"), ([1e300, 1.0], "inf"),
                                         ([], "0.0")])  # fmt: skip
def test_a_vector_without_direction_names_its_text(odd, length, tmp_path):
    like = [1.0] * len(odd)
    with (
        serving(lambda body, n: said([odd if text == "bad" else like for text in body["input"]])) as server,
        pytest.raises(InputError, match=f"http://.*'tiny': the vector of '(bad|a)' has length {length}\n"),
    ):
        of(server, tmp_path).encode(["a", "bad"])
    assert len(server.bodies) == 1 and list(tmp_path.iterdir()) == []  # asked once: it would say the same


def test_vectors_of_two_lengths_are_refused(tmp_path):
    sizes = iter([2, 2, 3])
    with serving(lambda body, n: said([[1.0] * k for k, _ in zip(itertools.repeat(next(sizes)), body["input"])])) as s:
        with pytest.raises(InputError, match=r"http://.*'tiny' gives vectors of 2 and of 3 numbers\n.*embed\.revision"):
            of(s, tmp_path, concurrency=1).encode(TEXTS)
        assert len(list(tmp_path.iterdir())) == 2  # the odd one is not kept
        s.answer = lambda body, n: said([[1.0] * 2 for _ in body["input"]])
        assert of(s, tmp_path).encode(TEXTS).shape == (10, 2) and len(s.bodies) == 4
        s.answer = lambda body, n: said([[1.0, 2.0], [1.0]])
        with pytest.raises(InputError, match="of 2 and of 1 numbers"):
            of(s).encode(["a", "b"])


def test_vectors_of_two_lengths_in_blocks_of_two_builds(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.embed.BLOCK", 2)
    with serving() as server:
        first = Embeddings(Store(tmp_path), of(server))
        first.extend(["a", "b"])
        first.compute()
        server.answer = lambda body, n: said([[1.0, 2.0]] * len(body["input"]))
        second = Embeddings(Store(tmp_path), of(server))  # another process
        second.extend(["a", "b", "c"])
        second.compute()
        with pytest.raises(InputError, match=r"api:http://.*#tiny@1: vectors of 2 and of 8 numbers\n.*embed\.revision"):
            second.of(["a", "c"])


# --- the cache ---


def test_what_was_answered_is_never_asked_again(tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "cache"
    with serving() as server:
        first = of(server, cache).encode(TEXTS)
        assert len(server.bodies) == 3 and len(list(cache.glob("*.json"))) == 3
        monkeypatch.delenv(VARIABLE)
        monkeypatch.setitem(sys.modules, "openai", None)  # neither key nor package is needed
        assert (of(server, cache).encode(TEXTS) == first).all()
    assert (of(server, cache).encode(TEXTS) == first).all()  # nor the server
    assert len(server.bodies) == 3


def test_other_weights_are_asked_anew(tmp_path):
    with serving() as server:
        for more in ({}, {"revision": "2"}, {"model": "other"}, {}):
            of(server, tmp_path, **more).encode(["a"])
        assert len(server.bodies) == 3


@pytest.mark.parametrize("damage", [b"", b"null", b'{"data": []}', b'{"data": [{"index": 0, "embedding": "AAA"}]}'])
def test_a_damaged_answer_is_asked_again(damage, tmp_path):
    with serving() as server:
        of(server, tmp_path).encode(["a"])
        [file] = tmp_path.iterdir()
        file.write_bytes(damage)
        assert (of(server, tmp_path).encode(["a"]) == unit(["a"])).all() and len(server.bodies) == 2


def test_a_fault_inside_a_block_keeps_what_was_answered(tmp_path):
    down = threading.Event()
    down.set()
    with serving(lambda body, n: refusal(401) if down.is_set() and n == 2 else well(body)) as server:
        embeddings = Embeddings(Store(tmp_path), of(server, tmp_path / "requests", concurrency=1))
        embeddings.extend(TEXTS)
        with pytest.raises(InputError, match="401"):
            embeddings.compute()
        assert len(server.bodies) == 3 and len(embeddings.missing()) == 1
        down.clear()
        embeddings.compute()
        assert len(server.bodies) == 4 and (embeddings.of(TEXTS) == unit(TEXTS)).all()


# --- the key, the engine ---


def test_the_key_is_nowhere(tmp_path, caplog, capfd):
    def tattle(body, n):
        if body["input"] == ["ok"]:
            return said([raw("ok")], model=f"your key is {KEY}", usage={KEY: KEY})
        return {"refuse": refusal(401, KEY), "fail": refusal(500, KEY), "babble": (200, {}, KEY.encode())}[
            body["input"][0]
        ]

    errors = []
    with caplog.at_level(logging.DEBUG), serving(tattle) as server:
        model = of(server, tmp_path, retries=1)
        model.encode(["ok"])
        for text in ("refuse", "fail", "babble"):
            with pytest.raises(InputError) as error:
                model.encode([text])
            errors += [str(error.value), repr(error.value.__cause__)]
    files = [file.name + file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    everything = "\n".join([*errors, *files, repr(vars(model)), model.fingerprint, caplog.text, *capfd.readouterr()])
    assert len(files) == 1 and "***" in everything and KEY not in everything


def test_without_the_extra_or_a_key(monkeypatch):
    config = EmbedConfig(backend="api", base_url="http://example.invalid/v1", model="m", revision="1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="environment variable OPENAI_API_KEY is not set"):
        open_embedder(config).encode(["a"])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'rehearse\[api\]'"):
        open_embedder(config).encode(["a"])


class Elsewhere:
    """An engine to which nothing may go."""

    def map(self, make, parts):
        raise AssertionError("work has left this process")


def test_a_server_is_asked_from_here_whatever_the_engine(tmp_path):
    rolled = pl.DataFrame({"source_uid": ["u", "u"], "text": ["yes", "no"]})
    rows = pl.DataFrame({"uid": ["u"], "prompt": [[{"role": "user", "content": "?"}]], "tools": [None],
                         "references": [["yes"]]})  # fmt: skip
    with serving() as server:
        model, store = of(server), Store(tmp_path, Elsewhere())
        embeddings = Embeddings(store, model)
        embeddings.extend(TEXTS)
        embeddings.compute()
        assert (embeddings.of(TEXTS) == unit(TEXTS)).all()
        found = rewards(rolled, rows, Similarity(model), store)
        assert found.to_list() == pytest.approx([1, float(unit(["yes"])[0] @ unit(["no"])[0])], abs=1e-6)
        with pytest.raises(TypeError):
            pickle.dumps(model)
    with pytest.raises(AssertionError):
        rewards(rolled, rows, Similarity(open_embedder(EmbedConfig.model_validate({}))), Store(tmp_path, Elsewhere()))


# --- a build ---


@pytest.fixture
def config(write_jsonl, tmp_path):
    """The path of a small stream's config."""
    for t, noun in enumerate(("shelf", "garden", "letter")):
        verbs = ("count", "paint", "mend", "sell", "describe")
        write_jsonl(
            f"t{t}.jsonl", [{"instruction": f"{verbs[i % 5]} the {noun}", "output": f"{t} {i}"} for i in range(15)]
        )
    tasks = [{"name": f"t{t}", "path": f"t{t}.jsonl", "format": "alpaca"} for t in range(3)]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks, "replay": {"budget": 8}, "tags": {"cluster": False}}))
    return path


def settings(server):
    return f"embed={{backend: api, base_url: '{server.url}', model: tiny, revision: '1', api_key_env: {VARIABLE}}}"


def tables(run):
    assert check(run) == []
    return {table.file: (run / table.file).read_bytes() for table in TABLES.values() if (run / table.file).exists()}


def test_a_build_is_the_same_as_with_the_model_here(config, tmp_path):
    def build(run, *words, cache="cache"):
        return called(main, "build", config, f"out={tmp_path / run}", f"cache={tmp_path / cache}", *words, "--quiet")

    local, stored = open_embedder(EmbedConfig.model_validate({})), {}

    def embed(body, n):
        vectors = local._model.encode(body["input"]).tolist()
        assert not stored.keys() & set(body["input"])  # no text is paid for twice
        stored.update(zip(body["input"], vectors, strict=True))
        return said(vectors)

    with serving(embed) as server:
        there = settings(server)
        for run, words in (("here", []), ("there", [there])):
            done = build(run, *words, cache=f"cache-{run}")
            assert done.returncode == 0, done.stderr
        assert len(server.bodies) == 3 and len(stored) == 15  # a block a task
        again = build("again", there, cache="cache-there")  # blocks
        (tmp_path / "cache-there" / "embed").rename(tmp_path / "blocks")
        anew = build("anew", there, cache="cache-there")  # the kept answers
        assert again.returncode == anew.returncode == 0 and len(server.bodies) == 3
    frame = pl.DataFrame({"text": list(stored), "embedding": list(stored.values())})
    frame.write_parquet(tmp_path / "v.parquet")
    assert build("stored", "embed={backend: precomputed, path: v.parquet}", cache="cache-stored").returncode == 0
    found = {run: tables(tmp_path / run) for run in ("here", "there", "again", "anew", "stored")}
    assert "samples.parquet" in found["here"] and all(each == found["here"] for each in found.values())
    assert read(tmp_path / "there").provenance["embedder"] == f"api:{server.url}#tiny@1"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_a_plan_asks_nothing_and_states_no_time(config, tmp_path):
    with serving() as server:
        there = settings(server)
        words = ("build", config, f"out={tmp_path}/run", f"cache={tmp_path}/cache", there)
        assert called(main, *words, "--quiet", "replay.selector=random").returncode == 0  # rows are read
        done = called(main, *words, "--dry-run")
        [line] = [line for line in done.stdout.splitlines() if "embed" in line]
        assert "15 of 15 instructions" in line and line.rstrip(" │").endswith("–") and server.bodies == []


def test_a_server_that_refuses_ends_the_build_in_words(config, tmp_path):
    with serving(lambda body, n: refusal(404, "no such model")) as server:
        there = settings(server)
        done = called(main, "build", config, f"out={tmp_path}/run", there)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "run/provenance.json").exists()
    assert server.url in done.stderr and "no such model" in done.stderr and "remedy" in done.stderr


# --- the config ---

API = {"backend": "api", "base_url": "http://localhost:8000/v1", "model": "m", "revision": "1"}


@pytest.mark.parametrize("embed, words", [
    ({**API, "base_url": None}, "`base_url` is given with `backend: api`"),
    ({"base_url": "http://a/v1"}, "`base_url` is given with `backend: api`, and only then"),
    ({**API, "base_url": "http://user:secret@a/v1"}, "`base_url` must hold no user"),
    ({**API, "base_url": "localhost:8000"}, "must begin with http"),
    ({**API, "revision": None}, "`embed.revision` is needed with `embed.backend: api`"),
    ({"revision": "1"}, "`revision` belongs to `backend: api`"),
    ({k: v for k, v in API.items() if k != "model"}, "needs `embed.model`: the name that the server knows"),
    ({**API, "path": "v.parquet"}, "`embed.path` is given with `embed.backend: precomputed`"),
    ({**API, "device": "cuda"}, "`embed.device` has no meaning with `embed.backend: api`"),
    ({**API, "dtype": "bfloat16"}, "`embed.dtype` has no meaning"),
    ({"retries": 2}, "`embed.retries` has no meaning with `embed.backend: sentence-transformers`"),
    ({**API, "concurrency": 0}, "embed.concurrency"),
    ({**API, "api_key_env": "sk-1 2"}, "NAME of an environment variable"),
])  # fmt: skip
def test_refused_settings(embed, words):
    with pytest.raises(InputError) as error:
        BuildConfig.parse({"tasks": [{"name": "a", "path": "a", "format": "alpaca"}], "embed": embed})
    assert words in str(error.value) and "secret" not in str(error.value) and "sk-1" not in str(error.value)


def test_settings_that_were_written_out_are_read_again():
    for config in (EmbedConfig.model_validate(API), EmbedConfig.model_validate({})):
        assert EmbedConfig.model_validate(config.model_dump()) == config
