"""The stages that ask a model, through the whole build: real shipped rows, the real starter model, real processes.

Builds of one module share a folder and its cache, so that each prompt is answered once. Where a test needs a model that
says what it is told (rewrites that mean the same, broken tags, empty answers), a server on loopback stands in for it.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from test_build import ROOT, bytes_of, curate, fails

from curate.build import build
from curate.config import ModelConfig
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import TABLES, Bucket, check, read, sequence_logp
from curate.manifest.schema import completion_uid, sample_uid
from curate.models import LocalModel, Prompt, open_embedder
from curate.refilter import refilter
from curate.screen import Silent

STARTER = ROOT / "examples/starter"
KEY, VARIABLE = "sk-very-secret-0123456789", "REHEARSE_TEST_KEY"
BUCKETS = [str(b) for b in Bucket]


# --- real rows, and builds of them ---


def real(file, n, **where):
    """The first n rows of a shipped file's training split, `column="value"` for those that begin so."""
    with gzip.open(ROOT / f"examples/{file}.jsonl.gz", "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    return [r for r in rows if all(r[c].startswith(v) for c, v in where.items())][:n]


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FACTS = {"format": "alpaca", "columns": {"instruction": "question", "output": "new_answer"}}
RANKED = {"format": "ranked", "columns": {"prompt": "question", "output": "gold"}, "ranked_by": "human"}


def task(name, file=None, **more):
    return {"name": name, "path": f"{file or name}.jsonl", **({"format": "superni"} if not more else more)}


STREAM = [task("poem"), task("tense"), task("facts", **FACTS)]
ROLLOUTS = {"k": 3, "max_new_tokens": 6, "block": 6}
AUGMENT = {"per_task": 2, "max_new_tokens": 24, "block": 6, "theta": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The last bit of a number may depend on the number of threads: here and in every process it is one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(VARIABLE, KEY)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real rows as small tasks, and the starter model beside them."""
    folder = tmp_path_factory.mktemp("policy")
    put(folder / "poem.jsonl", real("superni/sentiment_analysis", 12, task="task833"))
    put(folder / "tense.jsonl", real("superni/text_quality_evaluation", 9, task="task429"))
    put(folder / "facts.jsonl", real("conflict/templama", 6))
    put(folder / "older.jsonl", real("conflict/templama", 14)[6:])
    put(folder / "ranked.jsonl", real("ranked/qa_feedback", 5))
    put(folder / "code.jsonl", real("superni/code", 4, task="task868"))
    pairs = []
    for row in real("ranked/qa_feedback", 10)[5:]:
        answers = sorted(row["candidates"], key=lambda c: c["rank"])
        pairs.append({"prompt": row["question"], "chosen": answers[0]["text"], "rejected": answers[-1]["text"]})
    put(folder / "pairs.jsonl", pairs)
    (folder / "starter").symlink_to(STARTER)
    return folder


def settings(folder, out, *, tasks=STREAM, **sections):
    """A configuration as `build` takes it: rows at random, the starter as the policy."""
    replay = {"selector": "random", "budget": 8, **sections.pop("replay", {})}
    return {"name": "small", "tasks": tasks, "replay": replay, "policy": {"model": "starter"}, **sections,
            "base": str(folder), "out": str(folder / out), "cache": str(folder / ".curate-cache")}  # fmt: skip


def as_file(settings, path):
    """The same for the command line."""
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "base"}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def small(folder):
    """8 replayed and 6 current rows, 3 rollouts each, 12 rewrites: the build that nobody disturbed."""
    return build(settings(folder, "small", rollouts=ROLLOUTS, augment=AUGMENT))


@pytest.fixture(scope="module")
def compared(folder, small):
    """The same with the rollouts beside their targets."""
    wanted = settings(folder, "compared", rollouts=ROLLOUTS, candidates={"similarity": True, "threshold": 0.2})
    return build(wanted)


class Notes(Silent):
    """A screen that keeps what it is told."""

    def __init__(self):
        self.notes, self.cached_stages = [], []

    def note(self, text):
        self.notes.append(text)

    def cached(self, name, what):
        self.cached_stages.append(name)


# --- a server that says what it is told ---


def good(text, reason="stop", logps=None, tokens=3):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    if logps:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": p} for p in logps]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": len(logps) if logps else tokens}}


@contextlib.contextmanager
def server(answer):
    """An OpenAI-compatible server over `answer(body) -> response`; gives its configuration, and the bodies it saw."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            assert self.headers["authorization"] == f"Bearer {KEY}"
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            data = json.dumps(answer(body)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield {"backend": "api", "base_url": url, "model": "scripted", "api_key_env": VARIABLE}, bodies
    finally:
        http.shutdown()
        http.server_close()


def asked(body):
    return body["messages"][-1]["content"]


def holds_the_key(*folders):
    return [f for folder in folders for f in folder.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def rewriter(body):
    """A policy that rewrites: all words and more (background), two thirds (expansion), a third (paraphrase).

    Its answer to everything is "Past", which is right for about half of the rows of `tense`. Rewrites of the words
    "begged" and "ran" are cut, empty or the prompt itself, so that every fault is seen.
    """
    text = asked(body)
    template, _, rest = text.partition("\n\nTask:\n")
    if not rest:
        return good("Past", logps=[-0.25, -0.5])
    words = rest.split(" ")
    if "background" in template:
        return good(f"{rest} Think of grammar first.")
    if "more detail" in template:
        return good(" ".join(words[: len(words) * 2 // 3]))
    return good(" ".join(words[: len(words) // 3]))


@pytest.fixture(scope="module")
def rewritten(folder):
    """A build whose rewrites have scores from 0 to nearly 1, since a server wrote them. The server is gone by then."""
    with server(rewriter) as (model, bodies):
        wanted = settings(
            folder, "rewritten", tasks=[task("tense"), task("facts", **FACTS)], policy=model,
            replay={"budget": 9}, rollouts={"k": 2, "per_task": 4}, augment={"theta": 0.1},
        )  # fmt: skip
        build(wanted)
        assert len(bodies) == 16 + 27 + 27  # 8 prompts twice, 9 rows by 3 templates, an answer to each
    return wanted


# --- 1. the demo, and builds that are cut off ---


FEW = ["rollouts.per_task=2", "rollouts.k=2", "rollouts.max_new_tokens=6", "augment.per_task=1",
       "augment.max_new_tokens=12", "augment.block=256", "replay.budget=34", "tags.max_tags=1"]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = curate("build", ROOT / "examples/demo/config.yaml", *FEW, f"out={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_demo_builds_and_is_sound(demo):
    folder, done = demo
    for stage in ("rollouts", "rewards", "score", "rewrite", "MI"):
        assert f"✓ {stage}" in done.stderr
    assert "five buckets" in done.stdout
    assert "sound" in curate("check", folder / "run").stdout
    manifest = read(folder / "run")
    assert all(getattr(manifest, name).height for name in TABLES)
    assert set(manifest.completions["origin"]) == {"policy", "human"}
    assert manifest.augmentations.height == 17 * 3  # a row of each older task, three templates


def test_the_demo_loads_with_datasets(demo, tmp_path):
    from datasets import load_dataset

    run = demo[0] / "run"
    data = load_dataset(str(run), "completions", split="train", cache_dir=str(tmp_path))
    assert data.num_rows == read(run).completions.height
    assert data["uid"] == read(run).completions["uid"].to_list()


def test_the_demo_again_is_cached_and_changes_nothing(demo):
    folder, _ = demo
    before = {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()}
    done = curate("build", ROOT / "examples/demo/config.yaml", *FEW, f"out={folder}/run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached") == len([line for line in done.stderr.splitlines() if line.startswith("✓")])
    assert {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()} == before


# Everything is imported once, and no thread has begun by then, so that each fork is a fresh process in no time.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import curate.blocks, curate.build, curate.cli, curate.models.decode, curate.tags, rouge_score.rouge_scorer
import transformers.models.llama.modeling_llama

write, seen = curate.blocks._write, []

def until(stage, number):
    def wrapped(make, items, folder):
        seen.append(folder.parent.name)
        if folder.parent.name == stage and seen.count(stage) == number:
            (folder / curate.blocks.RESULT).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(make, items, folder)
    curate.blocks._write = wrapped

moments, cache = json.loads(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["curate", *sys.argv[3:]]
for moment in [*moments, None]:
    if not (process := os.fork()):
        if moment:
            until(*moment)
        try:
            curate.cli.main()
        finally:
            os._exit(int(getattr(sys.exc_info()[1], "code", 99) or 0))
    _, status = os.waitpid(process, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), len(list(cache.glob("generate/[!.]*")))]))
"""


@pytest.fixture(scope="module")
def killed(small, folder, tmp_path_factory):
    """A build that is killed five times, each time in a later stage, in another folder: what each process left."""
    elsewhere = tmp_path_factory.mktemp("killed")
    for file in folder.glob("*.jsonl"):
        shutil.copy(file, elsewhere)
    (elsewhere / "starter").symlink_to(STARTER)
    wanted = settings(elsewhere, "run", rollouts=ROLLOUTS, augment=AUGMENT)
    as_file({**wanted, "out": "runs/a", "cache": "cache"}, elsewhere / "config.yaml")
    # in the second block of rollouts, in the rewards, in the second block of rewrites, in the answers, in the scores
    moments = [("generate", 2), ("reward", 1), ("generate", 2), ("generate", 2), ("mi", 1)]
    command = [sys.executable, "-c", KILLER, json.dumps(moments), "cache", "build", "config.yaml", "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return elsewhere, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_in_every_stage_it_ends_with_the_same_bytes(killed, small):
    elsewhere, steps = killed
    assert [code for code, _ in steps] == [-signal.SIGKILL] * 5 + [0]
    # 14 prompts in blocks of 6 are 3 blocks, 12 rewrites are 2: each process has kept what the ones before it did
    assert [kept for _, kept in steps][:4] == [1, 3, 4, 5]
    assert bytes_of(elsewhere / "runs/a") == {**bytes_of(small.folder)}


@pytest.mark.xfail(reason="Store.sweep does not know the stages of the policy")
def test_nothing_half_written_stays_in_the_cache(killed):
    assert not list((killed[0] / "cache").glob("*/.*"))


# --- 2. buckets ---


def moments(values):
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def expected_buckets(rolled, population, logp, k):
    """CPPO's Table 1, by hand: z of the log-probability and of the reward over the population."""
    rows = rolled.to_dicts()
    found = {}
    for row in rows:
        others = [r for r in rows if population == "all" or r[population] == row[population]]
        z = []
        for of in (lambda r: sequence_logp(r["token_logps"], logp), lambda r: r["reward"]):
            mean, deviation = moments([of(r) for r in others])
            z.append((of(row) - mean) / deviation if deviation > 1e-12 else 0.0)
        p, r = z
        name = {(1, 1): "high_performance", (1, -1): "overfitting", (-1, 1): "high_variance", (-1, -1): "noisy"}
        found[row["uid"]] = name.get(((p > k) - (p < -k), (r > k) - (r < -k)), "normal")
    return found


@pytest.mark.parametrize(("population", "logp"), [("task", "mean"), ("all", "mean"), ("batch", "mean"), ("all", "sum")])
def test_buckets_and_their_counts_are_a_recount(folder, small, population, logp):
    out = f"buckets-{population}-{logp}"
    manifest = build(settings(folder, out, rollouts={**ROLLOUTS, "reward": {"kind": "python", "function": "by_length:rate"}}, buckets={"k": 0.3, "population": population, "logp": logp}))
    rolled = manifest.completions.filter(origin="policy")
    assert check(folder / out) == []
    assert rolled.height == 14 * 3
    assert rolled["batch"].n_unique() == 3
    expected = expected_buckets(rolled, population, logp, 0.3)
    assert dict(rolled.select("uid", "bucket").iter_rows()) == expected
    assert len(set(expected.values())) > 2, "the rows show nothing"
    for row in manifest.tasks.iter_rows(named=True):
        mine = rolled.filter(task=row["task"])["bucket"].to_list()
        assert [row[b] for b in BUCKETS] == [mine.count(b) for b in BUCKETS]
        assert row["rollouts"] == len(mine) == sum(row[b] for b in BUCKETS)


