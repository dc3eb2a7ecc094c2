"""Inputs and manifests on S3, through the command lines and a server on loopback that speaks its protocol (moto)."""

import gzip
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import polars as pl
import pytest
import yaml
from commands import called
from moto.server import ThreadedMotoServer

from curate import claim
from curate.claim import claimed
from curate.cli import main
from curate.manifest import TABLES, read
from curate.manifest.remote import Remote

ROOT = Path(__file__).parent.parent.parent
SECRET = "not-to-be-seen"
CATEGORIES = ("sentiment_analysis", "misc")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A client of the server; the environment says where it is, to this process and those that it starts."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "AKIATEST",
                            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
                            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                            "REHEARSE_CACHE": str(tmp_path_factory.mktemp("copies"))}.items():  # fmt: skip
            patch.setenv(name, value)
        patch.setattr(claim, "PAUSE", 0.2)
        yield boto3.client("s3")
    server.stop()


@pytest.fixture
def bucket(s3, request):
    """A bucket that keeps versions, with two categories of the shipped data in it."""
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    s3.create_bucket(Bucket=name)
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    for category in CATEGORIES:
        s3.upload_file(str(ROOT / f"examples/superni/{category}.jsonl.gz"), name, f"in/{category}.jsonl.gz")
    return name


def config_of(folder, sources, out, budget=20):
    """A config whose tasks lie below `sources`, a folder or a URL."""
    tasks = [{"name": c, "path": f"{sources}/{c}.jsonl.gz", "format": "superni", "split": "train"} for c in CATEGORIES]
    path = folder / f"config-{budget}.yaml"
    replay = {"selector": "uniform", "budget": budget}
    path.write_text(
        yaml.safe_dump({"tasks": tasks, "replay": replay, "out": str(out), "cache": str(folder / "stages")})
    )
    return path


def curate(*words, cwd):
    done = called(main, *words, cwd=cwd)
    assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def versions(s3, bucket, prefix):
    """Key -> how often it was written or deleted."""
    found = s3.list_object_versions(Bucket=bucket, Prefix=prefix)
    every = [each["Key"] for each in (*found.get("Versions", ()), *found.get("DeleteMarkers", ()))]
    return {key: every.count(key) for key in every if not key.endswith(claim.LOCK)}


def keys(s3, bucket, prefix):
    return {o["Key"].removeprefix(prefix) for o in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())}


def test_a_run_of_the_commands_on_s3(s3, bucket, tmp_path):
    run = f"s3://{bucket}/runs/demo"
    local = curate("build", config_of(tmp_path, ROOT / "examples/superni", tmp_path / "run"), "--quiet", cwd=tmp_path)
    config = config_of(tmp_path, f"s3://{bucket}/in", run)
    done = curate("build", config, "--json", cwd=tmp_path)
    assert (local.returncode, done.returncode) == (0, 0), local.stderr + done.stderr
    assert json.loads(done.stdout)["manifest"] == run

    mine, theirs = read(tmp_path / "run"), read(run)
    for table in TABLES.values():
        assert s3.get_object(Bucket=bucket, Key=f"runs/demo/{table.file}")["Body"].read() == \
            (tmp_path / "run" / table.file).read_bytes()  # fmt: skip
    data = (ROOT / "examples/superni/misc.jsonl.gz").read_bytes()
    assert theirs.provenance["inputs"][1]["files"] == {
        f"s3://{bucket}/in/misc.jsonl.gz": hashlib.sha256(data).hexdigest()
    }
    text = json.dumps(theirs.provenance)
    assert SECRET not in text and "AKIATEST" not in text and os.environ["REHEARSE_CACHE"] not in text
    wanted = {"provenance.json", "README.md", "report.html", *(t.file for t in TABLES.values())}
    assert keys(s3, bucket, "runs/demo/") == wanted  # no lock is left

    before = versions(s3, bucket, "runs/")
    assert set(before.values()) == {1}
    again = curate("build", config, cwd=tmp_path)
    assert again.returncode == 0 and f"cached: {run}" in again.stderr
    assert versions(s3, bucket, "runs/") == before

    uid = mine.samples["uid"][0]
    words = {("check", run): "sound", ("explain", run, uid): uid, ("diff", run, tmp_path / "run"): "",
             ("export", run, "--to", "trl-sft"): "", ("report", run): f"{run}/report.html"}  # fmt: skip
    for command, word in words.items():
        done = curate(*command, cwd=tmp_path)
        assert done.returncode == 0 and word in done.stdout, done.stderr
    assert len((tmp_path / "demo.trl-sft.jsonl").read_text().splitlines()) == mine.samples.height
    assert versions(s3, bucket, "runs/demo/report")["runs/demo/report.html"] == 2
    unknown = curate("explain", f"s3://{bucket}/runs/none", uid, cwd=tmp_path)
    assert unknown.returncode == 1 and f"s3://{bucket}/runs/none: no provenance.json" in unknown.stderr


def test_a_changed_object_is_fetched_anew(s3, bucket, tmp_path):
    run = f"s3://{bucket}/runs/demo"
    config = config_of(tmp_path, f"s3://{bucket}/in", run)
    assert curate("build", config, "--quiet", cwd=tmp_path).returncode == 0
    first = read(run)
    key = "in/misc.jsonl.gz"
    lines = gzip.decompress(s3.get_object(Bucket=bucket, Key=key)["Body"].read()).splitlines(keepends=True)
    shorter = gzip.compress(b"".join(lines[:-30]), mtime=0)
    s3.put_object(Bucket=bucket, Key=key, Body=shorter)
    assert curate("build", config, "--quiet", cwd=tmp_path).returncode == 0
    second = read(run)
    gone = first.tasks["rows"] - second.tasks["rows"]
    assert gone[0] == 0 and 0 < gone[1] <= 30  # the last 30 rows, of which some are of another split
    assert [*second.provenance["inputs"][1]["files"].values()] == [hashlib.sha256(shorter).hexdigest()]


DYING = """
import os, signal, sys
from s3fs import S3FileSystem
from curate.cli import main

put, left = S3FileSystem._put_file, [int(sys.argv.pop(1))]

async def dying(self, *arguments, **how):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    await put(self, *arguments, **how)

S3FileSystem._put_file = dying
main()
"""


def test_killed_while_it_publishes_it_leaves_no_manifest_and_the_next_build_makes_it(s3, bucket, tmp_path):
    run = f"s3://{bucket}/runs/demo"
    for budget in (20, 30):
        assert curate("build", config_of(tmp_path, f"s3://{bucket}/in", tmp_path / f"run-{budget}", budget), "-q",
                      cwd=tmp_path).returncode == 0  # fmt: skip
    old = config_of(tmp_path, f"s3://{bucket}/in", run, 20)
    assert curate("build", old, "-q", cwd=tmp_path).returncode == 0
    new = config_of(tmp_path, f"s3://{bucket}/in", run, 30)
    command = [sys.executable, "-c", DYING, "3", "build", str(new), "-q"]
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert "provenance.json" not in keys(s3, bucket, "runs/demo/") and ".lock" in keys(s3, bucket, "runs/demo/")
    unfinished = curate("check", run, cwd=tmp_path)
    assert unfinished.returncode == 1 and "not a finished manifest" in unfinished.stderr

    done = curate("build", new, cwd=tmp_path)
    assert done.returncode == 0 and "took over the lock" in done.stderr, done.stderr
    for file in (tmp_path / "run-30").iterdir():
        if file.suffix == ".parquet":
            assert s3.get_object(Bucket=bucket, Key=f"runs/demo/{file.name}")["Body"].read() == file.read_bytes()
    assert ".lock" not in keys(s3, bucket, "runs/demo/")


def test_two_builds_of_one_place(s3, bucket, tmp_path):
    run = f"s3://{bucket}/runs/demo"
    config = config_of(tmp_path, f"s3://{bucket}/in", run)
    with claimed(Remote.of(run), print):
        done = curate("build", config, cwd=tmp_path)
        assert done.returncode == 1
        for word in ("another build is at work there", f"process {os.getpid()} on", f"{run}/.lock", "remedy: wait"):
            assert word in done.stderr
        assert not (tmp_path / "stages").exists()  # found before any work
        with pytest.raises(FileExistsError):  # the server itself refuses: the precondition of the request
            remote = Remote.of(run)
            remote.fs.pipe_file(remote.at(claim.LOCK), b"", mode="create")
    assert curate("build", config, "-q", cwd=tmp_path).returncode == 0


def test_what_the_storage_refuses_is_said_before_any_work(s3, bucket, tmp_path, monkeypatch):
    def refused(*overrides):
        config = config_of(tmp_path, ROOT / "examples/superni", f"s3://{bucket}/runs/demo")
        done = curate("build", config, *overrides, cwd=tmp_path)
        assert done.returncode == 1 and not (tmp_path / "stages").exists()
        return done.stderr

    said = refused(f"out=s3://{bucket}-none/run")
    assert f"there is no bucket s3://{bucket}-none" in said and "remedy" in said
    said = refused(f"tasks.0.path=s3://{bucket}/in/none.jsonl")
    assert f"s3://{bucket}/in/none.jsonl: no such object" in said
    said = refused(f"out=s3://AKIATEST:{SECRET}@{bucket}/run")  # `curate` looks for the secret in what is said
    assert "no user, password or query" in said
    with monkeypatch.context() as patch:
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.delenv("AWS_ACCESS_KEY_ID")
        said = refused()
        assert f"no credentials for s3://{bucket}" in said and "AWS_SECRET_ACCESS_KEY" in said
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        assert f"s3://{bucket} cannot be reached" in refused()


def test_training_reads_a_manifest_on_s3(s3, bucket, tmp_path):
    from train.cli import main as train

    run = f"s3://{bucket}/runs/demo"
    assert curate("build", config_of(tmp_path, f"s3://{bucket}/in", run), "-q", cwd=tmp_path).returncode == 0
    words = ["cft", f"model={ROOT}/examples/starter", "learning_rate=1e-3", "max_steps=2", "max_length=512",
             "too_long=drop", "per_device_train_batch_size=2", f"data={run}"]  # fmt: skip
    done = called(train, *words, f"out={tmp_path}/trained", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "trained/run.json").read_text())
    body = s3.get_object(Bucket=bucket, Key="runs/demo/provenance.json")["Body"].read()
    assert facts["data"] == {run: hashlib.sha256(body).hexdigest()}
    seen = pl.read_parquet(tmp_path / "trained/lineage.parquet")
    assert seen["uid"].explode().is_in(read(run).samples["uid"].to_list()).all()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("s3")]
    refused = called(train, *words, f"out={run}-model", cwd=tmp_path)
    assert refused.returncode == 1 and "choose a folder" in refused.stderr
