"""One stage: its files, and its commands carried out in its folder, in this process.

A command is done when its last file is there (`Step.leaves`), whoever did it. `seconds.json` says how long those took
that the stream carried out.
"""

from __future__ import annotations

import json
import os
import shutil
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
from curate.manifest import ManifestError
from curate.manifest.schema import content_hash
from curate.settings import checked, read_yaml
from train.evaluate import EvalConfig, evaluate
from train.fisher import FisherConfig, fisher
from train.run import CONFIGS, run
from train.settings import load
from train.stream.plan import Plan, Stage

LEAVE_MORE = ("copr", "cppo", "grpo")  # a buffer or a value function, behind the model
SECONDS, LOG, FACTS = "seconds.json", "stage.log", "stage.json"
PATIENCE = 20.0  # seconds until a process that is being ended has let go of a stage


def write_files(plan: Plan, stage: Stage) -> None:
    """The configs of a stage's commands, and what it is."""
    folder = plan.folder(stage.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for step in stage.ordered:
        text = yaml.safe_dump(step.settings, sort_keys=False, allow_unicode=True, width=120)
        _write(folder / f"{step.kind}.yaml", f"# {step.by_hand}    (in this folder)\n{text}")
    facts = {"kind": stage.kind, "tasks": stage.tasks, "key": stage.key, "needs": stage.needs,
             "sources": {task: plan.sources[task] for task in stage.tasks} if "build" in stage.steps else {},
             "commands": [step.by_hand for step in stage.ordered]}  # fmt: skip
    _write(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    """Unless it is there already: a stream of many stages is looked at in a moment."""
    try:
        if file.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    replace_text(file, text)


def seconds(folder: Path) -> dict[str, float]:
    """Folder of a command's results → seconds, of those that the stream has carried out."""
    try:
        found = json.loads((folder / SECONDS).read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def carry_out(folder: str, steps: list[tuple[str, str, str]]) -> float:
    """The commands of a stage that are not done yet, in its folder; returns the seconds that they took.

    The process changes into the folder, and its output goes to `stage.log` there.

    Args:
        folder: of the stage.
        steps: (command, kind, what it leaves) of each.

    Raises:
        InputError: what a command says of its input, with the stage's folder before it.
    """
    begin, here, back = time.monotonic(), Path(folder), Path.cwd()
    lock = FileLock(here / ".stage.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise InputError(f"{here}: another process is at this stage", remedy="wait for it") from None
    try:
        os.chdir(here)
        with _logged(here / LOG):
            took = seconds(here)
            for command, kind, leaves in steps:
                name = leaves.partition("/")[0]
                if (here / leaves).exists() and (name in took or command not in LEAVE_MORE):
                    continue
                start = time.monotonic()
                DO[kind]() if kind in DO else run(command, *load(CONFIGS[command], "train.yaml"))
                if kind == "build":
                    _as_planned()
                took[name] = round(time.monotonic() - start, 2)
                replace_text(here / SECONDS, json.dumps(took) + "\n")
    except (InputError, ManifestError) as error:
        raise InputError(f"{here}: {error}") from None
    except OSError as error:
        raise InputError(f"{here}: {error.strerror or error}",
                         remedy="make room, or mend the path; the same command goes on") from None  # fmt: skip
    finally:
        os.chdir(back)
        lock.release()
    return time.monotonic() - begin


def _build() -> None:
    build(BuildConfig.load("build.yaml"), page=False)


def _as_planned() -> None:
    """Whether the manifest here is of the sources that the stage was planned with; else it goes."""
    wanted = json.loads(Path(FACTS).read_bytes())["sources"]
    provenance = json.loads(Path("manifest/provenance.json").read_bytes())
    read = {each["task"]: content_hash(sorted(each["files"].values())) for each in provenance["inputs"]}
    if wrong := next((task for task in wanted if read.get(task) != wanted[task]), None):
        shutil.rmtree("manifest")
        raise InputError(f"task {wrong!r}: its source has changed since the stream began",
                         remedy="the same command plans anew, and keeps what is of unchanged sources")  # fmt: skip


def _fisher() -> None:
    fisher(checked(FisherConfig, read_yaml("fisher.yaml"), "fisher.yaml"), print)


def _eval() -> None:
    evaluate(checked(EvalConfig, read_yaml("eval.yaml"), "eval.yaml"), print)


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
