"""`Cached` over the shipped model: nothing is asked twice, whatever happens in between."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.blocks import RESULT, Blocks
from curate.cached import Cached
from curate.config import ModelConfig
from curate.errors import InputError
from curate.models.base import Completion, Prompt, Sampling
from curate.models.local import LocalModel
from curate.store import CONTENTS, Store

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "examples" / "starter"
SAMPLING = Sampling(k=2, temperature=0.8, top_p=0.95, max_new_tokens=5, seed=4)
PROMPTS = [Prompt(f"row-{i}", [{"role": "user", "content": f"Name {i} animals."}]) for i in range(7)]
PAIRS = [(p, [{"role": "assistant", "content": "cat " * i}]) for i, p in enumerate(PROMPTS)]
SIZE = 3  # 7 prompts: blocks of 3, 3 and 1


class Counting(LocalModel):
    """Notes what is asked: (question, how many)."""

    def __init__(self, folder=STARTER, **config):
        super().__init__(ModelConfig(model=str(folder), device="cpu", dtype="float32", **config))
        self.asked = []

    def room(self, prompts):
        self.asked.append(("room", len(prompts)))
        return super().room(prompts)

    def generate(self, prompts, sampling):
        self.asked.append(("generate", len(prompts)))
        return super().generate(prompts, sampling)

    def score(self, pairs):
        self.asked.append(("score", len(pairs)))
        return super().score(pairs)

    @property
    def tokenizer_fingerprint(self):
        self.asked.append(("tokenizer", 1))
        return super().tokenizer_fingerprint


class Server:
    """A generator that tells little and cannot score, as one behind a server."""

    fingerprint, tokenizer_fingerprint = "api:tiny", None

    def room(self, prompts):
        return [None] * len(prompts)

    def generate(self, prompts, sampling):
        return [[Completion(f"{p.uid}, {j}", n_tokens=2) for j in range(sampling.k)] for p in prompts]


@pytest.fixture(scope="module")
def loaded():
    return Counting().model


def new(store, loaded=None, size=SIZE, **config):
    """A cache in front of a model that was asked nothing yet."""
    model = Counting(**config)
    if loaded is not None:
        model.model = loaded
    return Cached(model, store, size)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_nothing_is_asked_twice(store, loaded):
    first, told = new(store, loaded), []
    assert (first.to_generate(PROMPTS, SAMPLING), first.to_score(PAIRS)) == (7, 7)
    drawn = first.generate(PROMPTS, SAMPLING, told.append)
    assert [len(some) for some in drawn] == [2] * 7
    assert told == [3, 3, 1] and first.model.asked == [("generate", n) for n in told]
    scored, room = first.score(PAIRS, told.append), first.room(PROMPTS)
    fingerprint = first.tokenizer_fingerprint
    assert told[3:] == [7]  # answers are scored in blocks of 256

    second, told = new(store), []  # its weights are not even loaded
    assert (second.to_generate(PROMPTS, SAMPLING), second.to_score(PAIRS)) == (0, 0)
    assert second.generate(PROMPTS, SAMPLING, told.append) == drawn
    assert second.score(PAIRS, told.append) == scored
    assert second.room(PROMPTS) == room and second.tokenizer_fingerprint == fingerprint
    assert second.model.asked == [] and told == []
    assert not {"model", "tokenizer"} & vars(second.model).keys()


def test_what_is_kept_is_what_the_model_says(store, loaded):
    cached, model = new(store, loaded), Counting()
    model.model = loaded
    assert cached.generate(PROMPTS, SAMPLING) == [
        some for at in range(0, 7, SIZE) for some in model.generate(PROMPTS[at : at + SIZE], SAMPLING)
    ]
    too_long = (Prompt("long", [{"role": "user", "content": "word " * 2000}]), PAIRS[0][1])
    pairs = [too_long, *PAIRS, too_long]
    found = cached.score(pairs)
    assert found == model.score(pairs)
    assert found[0] is None and found[8] is None and all(c.token_logps for c in found[1:8])
    assert cached.score(pairs) == found
    assert cached.room([too_long[0], *PROMPTS]) == model.room([too_long[0], *PROMPTS])
    assert cached.room([too_long[0]])[0] < 0
    assert cached.fingerprint == model.fingerprint and cached.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert cached.generate([], SAMPLING) == cached.score([]) == cached.room([]) == []


def test_whatever_decides_an_answer_is_asked_anew(store, loaded, tmp_path):
    cached = new(store, loaded)
    expected = cached.generate(PROMPTS, SAMPLING)
    cached.score(PAIRS)
    for change in ({"k": 3}, {"temperature": 0.7}, {"top_p": 0.9}, {"max_new_tokens": 6}, {"seed": 5}):
        assert cached.to_generate(PROMPTS, replace(SAMPLING, **change)) == 7, change
    for change in (
        {"uid": "other"},  # seeds the draws
        {"messages": [{"role": "user", "content": "Name 0 animals!"}]},
        {"messages": [{"role": "system", "content": "Name 0 animals."}]},
        {"tools": "[]"},
    ):
        other = replace(PROMPTS[0], **change)
        assert cached.to_generate([other, *PROMPTS[1:]], SAMPLING) == 3, change  # the first block of three
        assert cached.to_score([(other, PAIRS[0][1]), *PAIRS[1:]]) == 7, change
    assert cached.to_score([*PAIRS[:6], (PROMPTS[6], PAIRS[0][1])]) == 7
    plain = replace(PROMPTS[0], messages=[{"role": "user", "content": "Name 0 animals.", "tool_calls": None}])
    assert cached.to_generate([plain, *PROMPTS[1:]], SAMPLING) == 0  # a null field says nothing
    assert cached.to_generate(PROMPTS[::-1], SAMPLING) == 7  # other blocks
    assert cached.sized(7).to_generate(PROMPTS, SAMPLING) == 7

    folder = shutil.copytree(STARTER, tmp_path / "other")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    for other in (new(store, folder=folder), new(store, batch_size=8)):  # what shares a pass decides the last bit
        assert (other.to_generate(PROMPTS, SAMPLING), other.to_score(PAIRS)) == (7, 7)

    told = []
    found = cached.generate([replace(PROMPTS[0], uid="other"), *PROMPTS[1:]], SAMPLING, told.append)
    assert told == [3] and found[3:] == expected[3:]
    assert [[c.token_ids for c in some] for some in found[1:3]] == [[c.token_ids for c in s] for s in expected[1:3]]


def test_changed_bytes_are_computed_again(store, loaded):
    cached = new(store, loaded)
    expected = cached.generate(PROMPTS, SAMPLING)
    blocks = sorted((store.root / "generate").iterdir())
    assert len(blocks) == 3
    data = bytearray((blocks[0] / RESULT).read_bytes())
    data[len(data) // 2] ^= 1
    (blocks[0] / RESULT).write_bytes(data)
    (blocks[1] / RESULT).unlink()
    again, told = new(store, loaded), []
    assert again.generate(PROMPTS, SAMPLING, told.append) == expected
    assert again.model.asked == [("generate", n) for n in told]
    assert len(told) == 2 and set(told) <= {1, 3}


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from curate.store import Store
sys.path.insert(0, sys.argv[1])
import test_cached as t
torch.set_num_threads(1)
class Killed(t.Counting):
    def generate(self, prompts, sampling):
        if len(self.asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(prompts, sampling)
model = Killed()
t.Cached(model, Store(Path(sys.argv[2])), 2).generate(t.PROMPTS, t.SAMPLING, lambda n: print(n, flush=True))
"""


def test_a_killed_process_goes_on_where_it_stopped(store, loaded, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(store.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == ["2", "2"]  # of blocks of 2, 2, 2 and 1 two were through
    folders = list((store.root / "generate").iterdir())
    assert len(folders) == 2  # the one under way has left nothing
    resumed, told = new(store, loaded, size=2), []
    assert resumed.to_generate(PROMPTS, SAMPLING) == 3
    found = resumed.generate(PROMPTS, SAMPLING, told.append)
    assert told == [2, 1] and resumed.model.asked == [("generate", 2), ("generate", 1)]
    assert found == new(Store(tmp_path / "undisturbed"), loaded, size=2).generate(PROMPTS, SAMPLING)


def test_a_model_that_cannot_score(store):
    cached = Cached(Server(), store)
    assert not cached.scores
    with pytest.raises(InputError, match=r"(?s)api:tiny: a server cannot measure .*remedy.*backend: transformers"):
        cached.score(PAIRS)
    for _ in range(2):  # what it does not tell stays unknown
        assert cached.room(PROMPTS) == [None] * 7 and cached.tokenizer_fingerprint is None
        assert cached.generate(PROMPTS, SAMPLING)[6] == [Completion(f"row-6, {j}", n_tokens=2) for j in range(2)]
        cached = Cached(Server(), store)
    assert Cached(Counting(), store).scores


def test_a_failure_keeps_what_was_through(store, loaded, monkeypatch):
    cached = new(store, loaded)
    with monkeypatch.context() as patch:
        counter = itertools.count()
        patch.setattr(LocalModel, "generate", lambda *_: 1 / 0 if next(counter) else [[Completion("a")] * 2] * 3)
        with pytest.raises(ZeroDivisionError):
            cached.generate(PROMPTS, SAMPLING)
    assert cached.to_generate(PROMPTS, SAMPLING) == 4
    assert [len(some) for some in cached.generate(PROMPTS, SAMPLING)] == [2] * 7
    assert list((store.root / "generate").glob(".*")) == []


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(1, 4), st.sets(st.integers(0, 8)), st.data())
@settings(max_examples=25)
def test_blocks_make_what_is_missing_or_damaged_and_nothing_else(tmp_path_factory, items, size, hurt, data):
    store, made, told = Store(tmp_path_factory.mktemp("blocks")), [], []

    def make(part):
        made.append(len(part))
        return pl.DataFrame({"x": [10 * i for i in part]}, schema={"x": pl.Int64})

    blocks = Blocks(store, "test", ["v"], items, [str(i) for i in items], size)
    parts = [tuple(items[at : at + size]) for at in range(0, len(items), size)]
    assert blocks.left == len(items) and len(blocks.keys) == len(parts)
    expected = [pl.DataFrame({"x": [10 * i for i in part]}, schema={"x": pl.Int64}) for part in parts]
    assert all(a.equals(b) for a, b in zip(blocks.frames(make, told.append), expected, strict=True))
    assert made == told == [len(part) for part in dict.fromkeys(parts)]  # equal blocks are made once
    assert blocks.left == 0

    made.clear()
    told.clear()
    damaged = {key: part for i, (key, part) in enumerate(blocks.parts) if i in hurt}
    for key in damaged:
        file = store.path("test", key) / data.draw(st.sampled_from([RESULT, CONTENTS]))
        if data.draw(st.booleans()):
            file.unlink()
        else:
            file.write_bytes(file.read_bytes() + b"\0")
    assert all(a.equals(b) for a, b in zip(blocks.frames(make, told.append), expected, strict=True))
    assert made == told and sorted(made) == sorted(len(part) for part in damaged.values())
