"""Rollouts by a real server that holds the policy's weights, and by one that has not taken them up."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_run import ROOT, STARTER, same, weights

from curate.build import build
from curate.errors import InputError
from curate.manifest import check, read
from curate.models import Completion, LocalModel, ModelConfig, Prompt, Sampling
from train.folder import checkpoints
from train.methods.cppo import Cppo
from train.run import CONFIGS, run
from train.server import Server, gap, told
from train.settings import load

SYNC = """
import json, urllib.request

def push(folder, phase):
    data = json.dumps({"folder": str(folder)}).encode()
    urllib.request.urlopen(urllib.request.Request("URL/load", data=data)).read()

def length(prompts, completions, references):
    return [len(text) / 10 for text in completions]

def wrong(folder, phase):
    raise RuntimeError("no such pod")
"""


class Policy:
    """Answers chat requests with the model of a folder, one draw a request, as its seed says."""

    def __init__(self, folder: Path):
        self.lock, self.requests, self.down = threading.Lock(), 0, False
        self.ids = False  # whether tokens are named by their ids
        self.loads, self.by = 0, []  # of each answer how many weights had been loaded until then
        self.load(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    found = outer.take_up(Path(body["folder"])) if self.path == "/load" else outer.answer(body)
                data = json.dumps(found).encode()
                self.send_response(503 if outer.down else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # closing waits for the answer that is being computed
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def load(self, folder: Path):
        self.model = LocalModel(ModelConfig(model=str(folder), dtype="float32"))
        return {}

    def take_up(self, folder: Path):
        self.loads += 1
        return self.load(folder)

    def answer(self, body):
        self.requests += 1
        self.by.append(self.loads)
        drawn = self.model.generate(
            [Prompt("a", body["messages"])], Sampling(1, body["temperature"], 1.0, body["max_tokens"], body["seed"])
        )[0][0]
        text = self.model.tokenizer.decode
        told = [{"token": f"token_id:{token}" if self.ids else text([token]), "logprob": p}
                for token, p in zip(drawn.token_ids, drawn.token_logps, strict=True)]  # fmt: skip
        choice = {"index": 0, "finish_reason": "stop" if drawn.finished else "length", "logprobs": {"content": told},
                  "message": {"role": "assistant", "content": drawn.text}}  # fmt: skip
        return {"id": "1", "object": "chat.completion", "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": drawn.n_tokens}}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    task = {"name": "misc", "path": str(ROOT / "examples/superni/misc.jsonl.gz"), "format": "superni", "split": "train"}
    build({"tasks": [task], "replay": {"selector": "none"}, "out": str(folder / "data")})
    shutil.copytree(STARTER, folder / "start")
    (folder / "run.yaml").write_text("{}")
    return folder


@pytest.fixture
def policy(place, monkeypatch):
    found = Policy(place / "start")
    (place / "syncing.py").write_text(SYNC.replace("URL", found.url))
    yield found
    found.http.shutdown()
    found.http.server_close()


def words_of(place, out, policy, *more):
    server = f"{{backend: api, base_url: '{policy.url}/v1', model: tiny, retries: 0, concurrency: 1}}"
    return [f"model={place / 'start'}", f"data={place / 'data'}", f"out={out}", "max_steps=4", "optim=sgd",
             "per_device_train_batch_size=4", "learning_rate=0.1", "logging_steps=1", "save_steps=1", "too_long=drop",
             "rollouts={prompts: 8, max_new_tokens: 6, passes: 1}", f"rollouts.server={server}", 
             "max_grad_norm=100", "save_total_limit=9", "lr_scheduler_type=constant", "reward=rouge_l",
             *more]  # fmt: skip


def trained(place, out, policy, *more, method="cppo"):
    run(method, *load(CONFIGS[method], place / "run.yaml", words_of(place, out, policy, *more)))
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def test_a_server_that_takes_up_the_weights_draws_from_the_policy(place, policy, tmp_path, capsys):
    """Words of a trained model tokenise as they were drawn; those of random weights would not."""
    lines = trained(place, tmp_path / "out", policy, "rollouts.sync=syncing:push")
    assert policy.requests == 16  # two phases of eight samples
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("phase") and "reward" in line]
    assert len(said) == 2 and all("the server is 0.000 nats a token from the policy" in line for line in said), said
    assert not any("has it the weights" in line for line in said)
    for phase in (0, 1):
        folder = tmp_path / f"out/rollouts/phase-{phase:05d}"
        assert check(folder) == [] and set(read(folder).completions["origin"]) == {"policy"}
    assert lines[0]["clip_fraction"] == lines[2]["clip_fraction"] == 0
    held = weights(tmp_path / "out/rollouts/policy")  # phase 2 was drawn by what the first two steps made
    assert same(held, weights(tmp_path / "out/checkpoint-2")) and not same(held, weights(tmp_path / "out/model"))


def test_stale_weights_are_seen(place, policy, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    older = AutoModelForCausalLM.from_pretrained(place / "start", dtype=torch.float32)
    with torch.no_grad():
        older.model.norm.weight.mul_(3)
    older.save_pretrained(tmp_path / "older")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "older" / name).write_bytes((place / "start" / name).read_bytes())
    policy.load(tmp_path / "older")
    trained(place, tmp_path / "out", policy, "max_steps=1")
    said = capsys.readouterr().err
    assert "nats a token from the policy: has it the weights of this step?" in said


def test_a_server_that_dies_stops_the_run_which_then_goes_on(place, policy, tmp_path):
    whole = trained(place, tmp_path / "whole", policy, "rollouts.sync=syncing:push")
    policy.load(place / "start")
    answered = policy.requests

    plain, count = policy.answer, iter(range(99))

    def answer(body):
        policy.down = next(count) >= 11  # three answers of the second phase
        return plain(body)

    policy.answer = answer
    with pytest.raises(InputError, match="no usable answer from http://127"):
        trained(place, tmp_path / "out", policy, "rollouts.sync=syncing:push")
    assert [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "out/rollouts/phase-00001").exists()
    policy.down, policy.answer, before = False, plain, policy.requests
    again = trained(place, tmp_path / "out", policy, "rollouts.sync=syncing:push")
    assert policy.requests - before == 5, "three of eight are on the disk"
    assert before - answered >= 11
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    assert same(weights(tmp_path / "out/model"), weights(tmp_path / "whole/model"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["rollouts.sync=syncing:wrong"], r"rollouts.sync raised RuntimeError before phase 1: no such pod"),
        (["rollouts.sync=syncing:gone"], "has no such function"),
        (["rollouts={sync: 'syncing:push', prompts: 8, server: null}"], "there is none"),
        (["rollouts.offline=true"], "nothing for a `server` to do"),
        (["rollouts.server={model: FOLDER/start}"], "without a server the policy itself draws"),
        (["rollouts={staleness: 1, prompts: 8, server: null}"], "draws while the policy is trained, and there is none"),
        (["rollouts.staleness=1"], "no `sync` publishes have no age that could be bounded"),
        (["rollouts.staleness=1", "rollouts.sync=syncing:push", "rollouts.temperature=0.5"], "of temperature 1"),
    ],
)
def test_bad_settings(place, policy, tmp_path, more, match):
    with pytest.raises(InputError, match=match):
        trained(place, tmp_path / "out", policy, *(word.replace("FOLDER", str(place)) for word in more))
    assert not (tmp_path / "out/model").exists() and policy.requests == 0


def test_tokens_of_a_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    server = Server(None, tokenizer, {tokenizer.eos_token_id}, Path())
    ids = tokenizer("a word", add_special_tokens=False).input_ids
    asked = Prompt("u", [{"role": "user", "content": "?"}])
    whole = server._of(asked, Completion("a word", finished=True, token_logps=[-1.0] * len(ids)), 9)
    assert whole.token_ids == [*ids, tokenizer.eos_token_id] and whole.finished and whole.token_logps is not None
    cut = server._of(asked, Completion("a word", finished=False), 9)
    assert cut.token_ids == ids and not cut.finished
    long = server._of(asked, Completion("a word " * 9, finished=True, token_logps=[-1.0]), 4)
    assert len(long.token_ids) == 4 and not long.finished and long.token_logps is None
    for names, kept_ in (([tokenizer.decode([i]) for i in ids], True), (["x"] * len(ids), False)):
        found = Completion("a word", finished=True, token_logps=[-1.0] * len(ids), names=names)
        assert (server._of(asked, found, 9).token_logps is not None) == kept_, "other tokens, other log-probabilities"
    odd = [ids[0], *ids]  # not the tokens of the text
    found = Completion("a word", finished=True, token_logps=[-1.0] * len(odd), names=[f"token_id:{i}" for i in odd])
    assert server._of(asked, found, 9).token_ids == [*odd, tokenizer.eos_token_id]
    cut = server._of(asked, replace(found, finished=False), len(odd))
    assert cut.token_ids == odd and cut.token_logps == [-1.0] * len(odd) and not cut.finished
    empty = server._of(asked, Completion("", finished=False), 4)
    assert empty.token_ids == [tokenizer.eos_token_id] and not empty.finished


def test_gap():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0]])
    drawn = [Completion("a", token_logps=[-1.5, -2.0]), Completion("b", token_logps=None)]
    assert gap(drawn, logps, mask) == pytest.approx(0.25)  # (0.5 + 0) / 2 tokens
    drawn[1] = Completion("b", token_logps=[-9.0])
    assert gap(drawn, logps, mask) == pytest.approx((0.25 + 4) / 2)  # the median of two is their mean
    assert gap([Completion("a")], logps[:1], mask[:1]) is None


# --- asynchronous ---

AHEAD = ("rollouts.sync=syncing:push", "max_steps=6", "reward={kind: python, function: 'syncing:length'}")
"""Three phases of two steps, and a reward that no two samples share."""


def kept(out, phase):
    return load_file(out / f"rollouts/phase-{phase:05d}/samples.safetensors")


def weights_of(held, clip=2.0):
    """exp(log π_prox − log μ), at most c, of the tokens that the server told."""
    return (held["logps"] - held["behaviour"])[held["behaviour"].isfinite()].exp().clamp(max=clip)


@pytest.mark.parametrize("method", ["cppo", "grpo"])
def test_a_phase_is_drawn_while_the_one_before_is_trained_on(place, policy, tmp_path, monkeypatch, method):
    steps, policy.ids = [], method == "grpo"

    def after_step(self, total):
        """The last step of a phase waits, with the optimizer's work done, until the next phase is being drawn."""
        steps.append(self.number)
        until = time.monotonic() + 60
        while steps.count(self.number) == 2 and self.number < 2 and policy.requests <= 8 * (self.number + 1):
            assert time.monotonic() < until, f"phase {self.number + 1} is not asked for before this one ends"
            time.sleep(0.01)

    monkeypatch.setattr(Cppo, "after_step", after_step)
    more = ("rollouts.prompts=4", "rollouts.k=2", "learning_rate=0.02") if method == "grpo" else ()
    lines = trained(place, tmp_path / "out", policy, *AHEAD, "rollouts.staleness=1", *more, method=method)
    assert steps == [0, 0, 1, 1, 2, 2]
    # version p is published where phase p begins: 0 draws phases 0 and 1, 1 draws phase 2; nobody would ask the last
    assert policy.by == [1] * 8 + [1] * 8 + [2] * 8 and policy.loads == 2
    held = [kept(tmp_path / "out", phase) for phase in range(3)]
    assert [h["version"].unique().tolist() for h in held] == [[0], [0], [1]]
    assert [line["staleness"] for line in lines] == [line["staleness_max"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert float((weights_of(held[0]) - 1).abs().max()) < 1e-3, "the weights that drew are those that are trained"
    assert float((weights_of(held[1]) - 1).abs().max()) > 1e-2, "they have moved since"
    if policy.ids:
        assert all(torch.equal(h["behaviour"].isfinite(), h["mask"]) for h in held)
    for phase, h in enumerate(held):  # its two steps see each sample once; a token that was not told counts as 1
        two = lines[2 * phase : 2 * phase + 2]
        mean = sum(x["importance"] * x["length"] for x in two) / sum(x["length"] for x in two)
        told_, all_, lost = h["behaviour"].isfinite(), h["mask"], ~h["behaviour"].isfinite().any(1)
        ones = int((all_ & ~told_)[~lost].sum())
        assert mean == pytest.approx((float(weights_of(h).sum()) + ones) / int(all_.sum()), rel=1e-4)
        assert two[0]["clip_fraction"] == 0, "r is to the policy where the phase begins, not to the one that drew"


def test_weights_that_stand_still_give_the_synchronous_run(place, policy, tmp_path):
    still, policy.ids = (*AHEAD, "learning_rate=0"), True
    lines = trained(place, tmp_path / "async", policy, *still, "rollouts.staleness=1")
    for phase in range(3):  # a draw depends on seed, row and phase
        assert float((weights_of(kept(tmp_path / "async", phase)) - 1).abs().max()) < 1e-3
    other = trained(place, tmp_path / "sync", policy, *still)
    assert len(lines) == len(other) == 6
    for a, b in zip(lines, other, strict=True):
        for key in ("loss", "policy", "reward", "gain", "value"):
            assert a[key] == pytest.approx(b[key], abs=1e-3), key
    assert "importance" not in other[0] and "version" not in kept(tmp_path / "sync", 0)


def test_two_processes_draw_ahead_as_one_does(place, policy, tmp_path):
    """By the shipped settings of DDP: each asks for its share, and one publishes when both have what they asked."""
    policy.ids, more = True, (*AHEAD, "rollouts.staleness=1", "use_cpu=true")
    trained(place, tmp_path / "one", policy, *more)
    loads = policy.loads
    words = words_of(place, tmp_path / "two", policy, *more, "per_device_train_batch_size=2")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["accelerate.commands.launch", "--config_file", "examples/accelerate/ddp.yaml", "-m", "train.cli", "cppo"]
    done = subprocess.run([sys.executable, "-m", *launch, "--config", place / "run.yaml", "--quiet", *words],
                          env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert policy.by[24:] == [loads + 1] * 16 + [loads + 2] * 8
    for phase in range(3):
        a, b = kept(tmp_path / "one", phase), kept(tmp_path / "two", phase)
        assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["version"], b["version"])
        torch.testing.assert_close(a["behaviour"], b["behaviour"], rtol=1e-3, atol=1e-3, equal_nan=True)
    for key, value in weights(tmp_path / "one/model").items():
        torch.testing.assert_close(weights(tmp_path / "two/model")[key], value, rtol=1e-3, atol=1e-3)


def test_a_bound_of_two_phases_holds(place, policy, tmp_path):
    server = f"{{backend: api, base_url: '{policy.url}/v1', model: tiny, retries: 0, concurrency: 2}}"
    lines = trained(place, tmp_path / "out", policy, "rollouts.sync=syncing:push", "rollouts.staleness=2",
                    "rollouts.prompts=4", f"rollouts.server={server}")  # fmt: skip
    assert len(policy.by) == 16 and len(lines) == 4
    for phase in range(4):
        asked, drew = kept(tmp_path / "out", phase)["version"], [by - 1 for by in policy.by[4 * phase : 4 * phase + 4]]
        assert int(asked.min()) >= phase - 2 and min(drew) >= int(asked.min())  # newer ones may have come in between
        assert lines[phase]["staleness"] == pytest.approx(phase - float(asked.float().mean()))
        assert lines[phase]["staleness_max"] == phase - int(asked.min())


def test_an_asynchronous_run_that_was_stopped_goes_on_with_the_same_bits(place, policy, tmp_path):
    more = (*AHEAD, "rollouts.staleness=1")
    whole = trained(place, tmp_path / "whole", policy, *more)
    plain, count = policy.answer, iter(range(99))

    def answer(body):
        policy.down = next(count) >= 19  # three answers of the third phase, while the second is trained on
        return plain(body)

    policy.answer = answer
    with pytest.raises(InputError, match="no usable answer from http://127"):
        trained(place, tmp_path / "begins", policy, *more)
    assert checkpoints(tmp_path / "begins")[-1].name == "checkpoint-4", "what could be trained was"
    shutil.copytree(tmp_path / "begins", tmp_path / "within")
    shutil.rmtree(tmp_path / "within/checkpoint-4")
    policy.down, policy.answer = False, plain
    for out in ("begins", "within"):  # where a phase begins; within one, as if killed a step earlier
        before = policy.requests
        policy.load(place / "start")  # the server begins anew too
        again = trained(place, tmp_path / out, policy, *more)
        assert policy.requests - before == 5, "three of eight are on the disk"
        assert [line["loss"] for line in again] == [line["loss"] for line in whole]
        assert same(weights(tmp_path / out / "model"), weights(tmp_path / "whole/model"))
        for phase in range(3):
            a, b = ({k: v.nan_to_num(1) for k, v in kept(tmp_path / o, phase).items()} for o in (out, "whole"))
            assert same(a, b)


def test_a_server_that_tells_no_log_probabilities_cannot_be_corrected(place, policy, tmp_path):
    plain = policy.answer

    def answer(body):
        found = plain(body)
        del found["choices"][0]["logprobs"]
        return found

    policy.answer = answer
    with pytest.raises(InputError, match="tells no log-probabilities of the tokens that it draws"):
        trained(place, tmp_path / "out", policy, *AHEAD, "rollouts.staleness=1")
    assert not (tmp_path / "out/rollouts/phase-00000").exists()


def test_a_run_that_fails_leaves_no_request_behind(place, policy, tmp_path):
    """The reward of the first phase fails while the second is being drawn: the run does not wait for that."""
    answer, hold, late = policy.answer, threading.Event(), []

    def slow(body):
        found = answer(body)
        if policy.requests > 8:  # of the second phase
            hold.wait(20)
            late.append(policy.requests)
        return found

    policy.answer = slow
    (place / "failing.py").write_text(
        "def fails(prompts, completions, references):\n    raise ValueError('no judge')\n"
    )
    with pytest.raises(InputError, match="no judge"):
        trained(place, tmp_path / "out", policy, *AHEAD, "rollouts.staleness=1",
                "reward={kind: python, function: 'failing:fails', retries: 0}")  # fmt: skip
    waited = list(late)
    hold.set()
    assert not waited and not [t.name for t in threading.enumerate() if t.name.startswith("rollouts")]


def test_what_a_server_has_told():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    drawn = [Completion("a", token_logps=[-1.0, -2.0]), Completion("b", token_logps=None)]  # no end token; other tokens
    found = told(drawn, mask)
    assert found[0, :2].tolist() == [-1, -2] and found[0, 2].isnan() and found[1].isnan().all()
    method = SimpleNamespace(importance_clip=2.0, level="token")
    samples = SimpleNamespace(mask=mask, logps=torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -1.0, 0.0]]))
    w = Cppo._importance(method, samples, found)
    assert w[0].tolist() == pytest.approx([math.exp(-0.5), 2, 1]) and w[1, :2].tolist() == [0, 0]
