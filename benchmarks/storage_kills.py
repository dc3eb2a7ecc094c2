"""A manifest on S3 whose builds are killed at random moments, and builds that begin at once: is it ever a wrong one?

    python benchmarks/storage_kills.py [--kills 24] [--races 3] [--seed 0]

A server on loopback speaks S3 (moto). A process builds two manifests in turn into one place, without a pause, and is
killed (SIGKILL) at a moment drawn uniformly from 1 to 3.5 s of its work. Then the place is read: one of both manifests,
hash by hash, or none. The next build must make it whole. A race is three processes, each with a cache of its own, that
build three manifests into one place at once: one may, the others are told of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from curate.build import build
from curate.manifest import ManifestError, read

BUCKET = "bucket"
PLACE = f"s3://{BUCKET}/runs/place"
ALTERNATE = """
import json, sys
from curate.build import build
one, other = json.loads(sys.argv[1])
print("begun", flush=True)
while True:
    build(one)
    build(other)
"""
ONCE = """
import json, sys
from curate.build import build
sys.stdin.readline()
build(json.loads(sys.argv[1]))
"""


def served() -> tuple[ThreadedMotoServer, dict[str, str]]:
    """A server, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return server, {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
                    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


def config(budget: int, out: str, cache: Path) -> dict[str, object]:
    """A stream of two tasks of 20 rows."""
    tasks = [{"name": n, "path": f"s3://{BUCKET}/in/{n}.jsonl", "format": "alpaca"} for n in "ab"]
    replay = {"selector": "uniform", "budget": budget}
    return {"tasks": tasks, "replay": replay, "out": out, "cache": str(cache)}


def killed(after: float, configs: list[dict[str, object]]) -> None:
    """Build in turn, and be killed."""
    process = subprocess.Popen([sys.executable, "-c", ALTERNATE, json.dumps(configs)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    process.kill()
    process.communicate()


def found(wanted: dict[int, object]) -> str:
    """What lies at the place."""
    try:
        outputs = read(PLACE).provenance["outputs"]
    except ManifestError as error:
        return "none" if "no provenance.json" in str(error) else f"refused: {error}"
    return next((f"manifest {n}" for n, each in wanted.items() if each == outputs), "WRONG")


def race(folder: Path, number: int) -> Counter[str]:
    """Three builds at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONCE, json.dumps(config(5 + n, PLACE, folder / "stages"))],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "REHEARSE_CACHE": str(folder / f"copies-{number}-{n}")},
        )
        for n in range(3)
    ]  # fmt: skip
    time.sleep(8)  # all have started Python
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[1] for process in processes]
    return Counter("built" if p.returncode == 0 else "refused" if "another build is at work" in text else text[-300:]
                   for p, text in zip(processes, said, strict=True))  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--races", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, (server, environment) = random.Random(args.seed), served()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(environment, REHEARSE_CACHE=str(folder / "copies"))
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        for task in "ab":
            rows = [{"instruction": f"{task} {n % 3}", "input": str(n), "output": f"{task}{n}"} for n in range(20)]
            s3.put_object(Bucket=BUCKET, Key=f"in/{task}.jsonl", Body="\n".join(map(json.dumps, rows)).encode())
        both = [config(n, PLACE, folder / "stages") for n in (3, 4)]
        wanted = {n: build(config(n, str(folder / f"local-{n}"), folder / "stages")).provenance["outputs"]
                  for n in (3, 4)}  # fmt: skip
        seen, healed = Counter[str](), 0
        for kill in range(args.kills):
            killed(rng.uniform(1, 3.5), both)
            seen[found(wanted)] += 1
            build(both[kill % 2])
            healed += found(wanted) == f"manifest {3 + kill % 2}"
        print(f"{args.kills} kills: {dict(seen)}; whole again with the next build: {healed}", flush=True)
        for number in range(args.races):
            print(f"race {number + 1}: {dict(race(folder, number))}; then {read(PLACE)!r}", flush=True)
    server.stop()


if __name__ == "__main__":
    main()
