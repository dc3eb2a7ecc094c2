"""One stage: its files, and its commands carried out in its folder, in this process.

`eval/metrics.json` (of the held-out rows: the manifest's provenance) is the last thing that a stage writes: with it the
stage is done, whoever did it. `seconds.json` says which commands were done by the stream, and how long they took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from curate.build import build
from curate.config import BuildConfig
from curate.errors import InputError
from curate.files import replace_text
from curate.settings import checked, read_yaml
from train.evaluate import EvalConfig, evaluate
from train.fisher import FisherConfig, fisher
from train.run import CONFIGS, run
from train.settings import load
from train.stream.plan import Plan, Stage

SECONDS, LOG, FACTS = "seconds.json", "stage.log", "stage.json"
PATIENCE = 20.0  # seconds until a process that is being ended has let go of a stage


def write_files(plan: Plan, stage: Stage) -> None:
    """The configs of a stage's commands, and what it is."""
    folder = plan.folder(stage.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for step in stage.steps:
        text = yaml.safe_dump(step.settings, sort_keys=False, allow_unicode=True, width=120)
        replace_text(folder / step.file, f"# {step.by_hand}    (in this folder)\n{text}")
    facts = {"kind": stage.kind, "number": stage.number, "task": stage.task, "key": stage.key, "needs": stage.needs,
             "commands": [step.by_hand for step in stage.steps]}  # fmt: skip
    replace_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def is_done(folder: Path, kind: str) -> bool:
    """Whether all of a stage's results are there."""
    return (folder / LEAVES["build" if kind == "held_out" else "eval"]).is_file()


def seconds(folder: Path) -> dict[str, float]:
    """Command → seconds, of those that the stream has carried out."""
    try:
        found = json.loads((folder / SECONDS).read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def carry_out(folder: str, commands: list[str]) -> float:
    """The commands of a stage that are not done yet, in its folder; returns the seconds that they took.

    The process changes into the folder, and its output goes to `stage.log` there.

    Raises:
        InputError: what a command says of its input, with the stage's folder before it.
    """
    begin, here = time.monotonic(), Path(folder)
    lock = FileLock(here / ".stage.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise InputError(f"{here}: another process is at this stage", remedy="wait for it") from None
    back = Path.cwd()
    try:
        os.chdir(here)
        with _logged(here / LOG):
            took = seconds(here)
            for command in commands:
                name = command if command in DO else "train"
                if name in took and (here / LEAVES[name]).exists():
                    continue
                start = time.monotonic()
                DO[name]() if name in DO else run(command, *load(CONFIGS[command], "train.yaml"))
                took[name] = round(time.monotonic() - start, 2)
                replace_text(here / SECONDS, json.dumps(took) + "\n")
    except InputError as error:
        raise InputError(f"{here}: {error}") from None
    finally:
        os.chdir(back)
        lock.release()
    return time.monotonic() - begin


def _build() -> None:
    build(BuildConfig.load("build.yaml"), page=False)


def _fisher() -> None:
    fisher(checked(FisherConfig, read_yaml("fisher.yaml"), "fisher.yaml"), print)


def _eval() -> None:
    evaluate(checked(EvalConfig, read_yaml("eval.yaml"), "eval.yaml"), print)


LEAVES = {"build": "manifest/provenance.json", "train": "train/model", "fisher": "fisher/fisher.json",
          "eval": "eval/metrics.json"}  # fmt: skip
"""What is there when a command is done."""
DO: dict[str, Callable[[], None]] = {"build": _build, "fisher": _fisher, "eval": _eval}


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What is printed inside, by libraries too, goes to the end of a file."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for saved, number in zip(kept, (1, 2), strict=True):
                os.dup2(saved, number)
                os.close(saved)
