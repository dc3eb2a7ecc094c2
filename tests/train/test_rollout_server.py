"""Rollouts by a real server that holds the policy's weights, and by one that has not taken them up."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_run import ROOT, STARTER, same, weights

from curate.build import build
from curate.errors import InputError
from curate.manifest import check, read
from curate.models import Completion, LocalModel, ModelConfig, Prompt, Sampling
from train.config import CppoConfig
from train.folder import checkpoints
from train.run import run
from train.server import Server, gap
from train.settings import load

SYNC = """
import json, urllib.request

def push(folder, phase):
    data = json.dumps({"folder": str(folder)}).encode()
    urllib.request.urlopen(urllib.request.Request("URL/load", data=data)).read()

def wrong(folder, phase):
    raise RuntimeError("no such pod")
"""


class Policy:
    """Answers chat requests with the model of a folder, one draw a request, as its seed says."""

    def __init__(self, folder: Path):
        self.lock, self.requests, self.down = threading.Lock(), 0, False
        self.load(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    found = outer.load(Path(body["folder"])) if self.path == "/load" else outer.answer(body)
                data = json.dumps(found).encode()
                self.send_response(503 if outer.down else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def load(self, folder: Path):
        self.model = LocalModel(ModelConfig(model=str(folder), dtype="float32"))
        return {}

    def answer(self, body):
        self.requests += 1
        drawn = self.model.generate(
            [Prompt("a", body["messages"])], Sampling(1, body["temperature"], 1.0, body["max_tokens"], body["seed"])
        )[0][0]
        told = [{"token": "?", "logprob": p} for p in drawn.token_logps]
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


def trained(place, out, policy, *more):
    server = f"{{backend: api, base_url: '{policy.url}/v1', model: tiny, retries: 0, concurrency: 1}}"
    words = [f"model={place / 'start'}", f"data={place / 'data'}", f"out={out}", "max_steps=4", "optim=sgd",
             "per_device_train_batch_size=4", "learning_rate=0.1", "logging_steps=1", "save_steps=1", "too_long=drop",
             "rollouts={prompts: 8, max_new_tokens: 6, passes: 1}", f"rollouts.server={server}", 
             "max_grad_norm=100", "save_total_limit=9", "lr_scheduler_type=constant", "reward=rouge_l",
             *more]  # fmt: skip
    run("cppo", *load(CppoConfig, place / "run.yaml", words))
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
