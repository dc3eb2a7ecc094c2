"""What the tests of the policy stages share: real shipped rows as small tasks, builds of them, forgeries, a server."""

import contextlib
import gzip
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import yaml
from test_build import ROOT

from curate.manifest import Bucket
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


JUDGE = """
def length(prompts, completions, references):
    return [len(text) % 7 for text in completions]

def nobody_knows(prompts, completions, references):
    return [None if len(text) % 2 else float("inf") if len(text) % 3 else 1 for text in completions]

def all_the_same(prompts, completions, references):
    return [0.1] * len(completions)
"""


def judged_by(function):
    return {**ROLLOUTS, "reward": {"kind": "python", "function": f"judge:{function}"}}


def settings(folder, out, *, tasks=STREAM, **sections):
    """A configuration as `build` takes it: rows at random, the starter as the policy."""
    replay = {"selector": "random", "budget": 8, **sections.pop("replay", {})}
    return {
        "name": "small", "tasks": tasks, "replay": replay, "policy": {"model": "starter"}, **sections,
        "base": str(folder), "out": str(folder / out), "cache": str(folder / ".curate-cache"),
    }  # fmt: skip


def as_file(settings, path):
    """The same for the command line."""
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "base"}, sort_keys=False))
    return path


class Notes(Silent):
    """A screen that keeps what it is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


# --- forgeries ---


def forged(run, to, table=None, change=None, provenance=lambda p: None):
    """A copy of a manifest with one table or the provenance changed, and the hashes mended."""
    shutil.copytree(run, to)
    facts = json.loads((to / "provenance.json").read_text())
    if table:
        file = to / f"{table}.parquet"
        pl.read_parquet(file).with_columns(change).write_parquet(file)
        facts["outputs"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    provenance(facts)
    (to / "provenance.json").write_text(json.dumps(facts))
    return to


def at(uid, column, value):
    """The column with another value in one row."""
    return pl.when(pl.col("uid") == uid).then(value).otherwise(pl.col(column)).alias(column)


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
        yield {"backend": "api", "base_url": url, "model": "scripted", "revision": "1", "api_key_env": VARIABLE}, bodies
    finally:
        http.shutdown()
        http.server_close()


def asked(body):
    return body["messages"][-1]["content"]


def holds_the_key(*folders):
    return [f for folder in folders for f in folder.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def rewriter(body):
    """A policy that rewrites: all words and more (background), two thirds (expansion), a third (paraphrase).

    Its answer to everything is "Present", which is right for seven of nine rows of `tense`. The row about the pig has
    every fault: its rewrites are cut, empty, and the prompt itself.
    """
    text = asked(body)
    template, _, rest = text.partition("\n\nTask:\n")
    if not rest:
        return good("Present", logps=[-0.25, -0.5])
    words, bad = rest.split(" "), "The pig" in rest
    if "background" in template:
        return good(f"{rest} Think of grammar first.", "length" if bad else "stop")
    if "more detail" in template:
        return good(" \n" if bad else " ".join(words[: len(words) * 2 // 3]))
    return good(rest if bad else " ".join(words[: len(words) // 3]))
