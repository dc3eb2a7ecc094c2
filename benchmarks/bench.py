"""Every benchmark of this folder in one run, each against its peer, into a section of RESULTS.md for this machine.

    make bench [ONLY=prefix,dbscan] [DATA=FOLDER] [LIST=1]
    python benchmarks/bench.py [--only prefix,dbscan] [--data FOLDER] [--list] [--results benchmarks/RESULTS.md]

DATA holds superni/, hh/, pref/, ranked/ and conflict/, the full data that some benchmarks read. One benchmark runs at a
time, by this interpreter; what it prints is shown while it runs. What cannot run here is listed with the reason. One
that fails stops none of the others, and the status is then 1.

The section is written anew after each benchmark: what was run replaces its own entry, all else of the file keeps its
bytes (`sections.py`). Another version of Python or torch counts as another machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table
from sections import Sections, day_of, entry

from curate.errors import InputError

ROOT = Path(__file__).parent.parent
LAST_LINES = 20  # shown of a benchmark that failed


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and what it needs.

    Attributes:
        command: words behind the interpreter; {data} stands for DATA, {out} for runs/bench/NAME.
        minutes: rough, on two quiet cores (with `gpu`: on one of these).
        data: files or folders of DATA that it reads.
        modules: packages beside those that Rehearse itself depends on.
        prepare: words of a command that is run before it, whose time does not count.
    """

    name: str
    command: str
    measures: str
    minutes: float
    peer: str = "–"
    data: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    gpu: bool = False
    prepare: str = ""

    def words(self, command: str, data: str) -> list[str]:
        """Of a command of this benchmark, with its folders."""
        return [word.format(data=data, out=f"runs/bench/{self.name}") for word in command.split()]


CORPUS, PAIRS = "superni/mathematics.jsonl.gz", ("hh/harmless-base-train.jsonl.gz", "pref/pandalm_human_pairs.jsonl.gz")
RANKED = "ranked/qa_feedback_ranked.jsonl.gz"
DEMO = "-m curate.cli build examples/demo/config.yaml out={out}/demo"
BENCHMARKS = (
    Benchmark("pbl_divergence", "benchmarks/pbl_divergence.py",
              "PBL's literal and bounded term after 500 steps", 0.2, "the paper's literal term"),
    Benchmark("prefix", "benchmarks/prefix.py", "a prompt's answers in one row: seconds, memory", 2, "a row each"),
    Benchmark("embedding", "benchmarks/embedding.py", "texts embedded a second", 7,
              "sentence-transformers encode"),
    Benchmark("dbscan", "benchmarks/dbscan.py", "clustering of phrases: seconds, memory, labels", 6,
              "scikit-learn DBSCAN"),
    Benchmark("transport", "benchmarks/transport.py", "distances over centroids: seconds, error bound", 12,
              "POT emd2 (exact)"),
    Benchmark("logprobs", "benchmarks/logprobs.py", "log-probabilities and KL: memory, seconds", 7,
              "logits.log_softmax"),
    Benchmark("generation", "benchmarks/generation.py --prompts 96", "rollouts: tokens a second", 15,
              "transformers generate"),
    Benchmark("sft", "benchmarks/sft.py", "tokens a second of train cft", 8, "TRL SFTTrainer", modules=("trl",)),
    Benchmark("dpo", "benchmarks/dpo.py {data}", "pairs a second of train dpo", 5, "TRL DPOTrainer", data=PAIRS,
              modules=("trl",)),
    Benchmark("grpo", "benchmarks/grpo.py", "completions a second of train grpo", 5, "TRL GRPOTrainer",
              modules=("trl",)),
    Benchmark("engine", "benchmarks/engine.py", "engine: ray: seconds of a build, bytes", 20, "the local engine",
              modules=("ray",)),
    Benchmark("tags", "benchmarks/tags.py {data}/superni/superni_full_instructions.jsonl.gz",
              "whether tags say what a task is", 1, "TF-IDF and MiniLM of the whole text",
              data=("superni/superni_full_instructions.jsonl.gz",)),
    Benchmark("mutual_information", "benchmarks/mutual_information.py {data}/superni",
              "rewrites told from other texts: AUC", 2, "the paper's sum over counts",
              data=(CORPUS, "superni/superni_base_permissive.jsonl.gz")),
    Benchmark("superni", "benchmarks/superni.py {data}/superni", "build of Super-NaturalInstructions: seconds, memory",
              3, data=(CORPUS,)),
    Benchmark("million", "benchmarks/million.py", "build of a million rows: seconds, memory", 7),
    Benchmark("tables", "benchmarks/tables.py", "build, check, report of up to ten million rows: seconds, memory", 120),
    Benchmark("report", "benchmarks/report.py", "the page of 100,000 rows: seconds until it answers", 3,
              modules=("selenium",), programs=("chromium|chromium-browser|google-chrome", "chromedriver")),
    Benchmark("storage_kills", "benchmarks/storage_kills.py", "builds into S3, killed: never a wrong manifest", 5,
              modules=("boto3", "moto")),
    Benchmark("stream_kills", "benchmarks/stream_kills.py", "a stream, killed: the same bytes", 15),
    Benchmark("starter", "benchmarks/starter.py examples/starter", "what the starter model scores", 3),
    Benchmark("replay", "benchmarks/replay.py --manifest {out}/demo", "what older tasks lose", 6, "no replay",
              prepare=DEMO),
    Benchmark("preferences", "benchmarks/preferences.py {data} --out {out}", "three preference tasks in a row", 120,
              "SFT, DPO with and without replay", data=(*PAIRS, RANKED)),
    Benchmark("facts", "benchmarks/facts.py {data}/conflict --out {out}", "facts that changed, by PBL", 90,
              "CFT, KL, replay", data=("conflict/templama.jsonl.gz",)),
    Benchmark("cppo", "benchmarks/cppo.py {data}/superni --out {out}", "two rewarded tasks in a row, by CPPO", 150,
              "PPO with and without replay or EWC",
              data=("superni/sentiment_analysis.jsonl.gz", "superni/detection.jsonl.gz")),
    Benchmark("stream", "benchmarks/stream.py {data}/superni --out {out}", "six tasks in a row: which rows to replay",
              420, "random replay, none, InsCL's baselines", data=("superni/misc.jsonl.gz",)),
    Benchmark("gpu", "benchmarks/gpu.py", "CFT, COPR, CPPO of a billion weights: tokens a second, MFU", 30,
              "TRL's SFT, DPO, GRPO trainers", modules=("trl",), gpu=True),
    Benchmark("logprobs_gpu", "benchmarks/logprobs.py --device cuda", "log-probabilities and KL: memory, seconds", 2,
              "logits.log_softmax", gpu=True),
    Benchmark("dbscan_gpu", "benchmarks/dbscan.py --device cuda", "clustering of phrases: seconds, memory, labels", 3,
              "scikit-learn DBSCAN", gpu=True),
)  # fmt: skip


# --- what can run here ---


def unable(benchmark: Benchmark, data: Path | None) -> str:
    """Why it cannot run here; empty where it can."""
    if benchmark.gpu and not _gpus():
        return "no GPU"
    if benchmark.data and data is None:
        return f"needs DATA with {', '.join(benchmark.data)}"
    if absent := [name for name in benchmark.data if data and not (data / name).exists()]:
        return f"not in DATA: {', '.join(absent)}"
    if absent := [name for name in benchmark.modules if not importlib.util.find_spec(name)]:
        return f"not installed: {', '.join(absent)}"
    if absent := [names for names in benchmark.programs if not any(map(shutil.which, names.split("|")))]:
        return f"not installed: {', '.join(absent).replace('|', ' or ')}"
    return ""


def machine() -> str:
    """Cores, memory, processor, GPUs, system and versions: everything that figures depend on, but who has it."""
    import psutil  # type: ignore[import-untyped]
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = f"{platform.system()} {platform.release()}"
    gpus = [f"{n} × {name}" if n > 1 else name for name, n in Counter(_gpus()).items()]
    return ", ".join([
        f"{cores} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        named[1].strip() if named else platform.processor() or platform.machine(), *(gpus or ["no GPU"]), system,
        f"Python {'.'.join(platform.python_version_tuple()[:2])}", f"torch {torch.__version__}",
    ])  # fmt: skip


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# --- running ---


@dataclass(frozen=True)
class Run:
    """A command that has ended: its status, seconds, standard output, and last lines on either stream."""

    status: int
    seconds: float
    output: str
    last: list[str]


def ran(words: Sequence[str], root: Path) -> Run:
    """Run the words by this interpreter in `root`; both streams are passed on line by line and kept."""
    output, last, start = list[str](), deque[str](maxlen=LAST_LINES), time.perf_counter()

    def follow(stream: IO[str], screen: IO[str], kept: list[str]) -> None:
        for line in stream:
            screen.write(line)
            screen.flush()
            kept.append(line)
            last.append(line.rstrip("\n"))

    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen([sys.executable, *words], cwd=root, env=environment, encoding="utf-8", errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout and process.stderr
        beside = threading.Thread(target=follow, args=(process.stderr, sys.stderr, []))
        beside.start()
        follow(process.stdout, sys.stdout, output)
        beside.join()
    return Run(process.returncode, time.perf_counter() - start, "".join(output), list(last))


def measured(benchmark: Benchmark, data: Path | None, root: Path) -> Run:
    """Prepare it, run it, and remove its folder of runs where it succeeded: one that was killed may go on there."""
    folder = str(data.resolve()) if data else ""
    if benchmark.prepare and (before := ran(benchmark.words(benchmark.prepare, folder), root)).status:
        return before
    found = ran(benchmark.words(benchmark.command, folder), root)
    if not found.status:
        shutil.rmtree(root / "runs/bench" / benchmark.name, ignore_errors=True)
    return found


def minutes_left(rest: Iterable[Benchmark], done: Sequence[tuple[Benchmark, float]]) -> float:
    """Rough minutes of the rest, times seconds / rough seconds of what is done."""
    rough = sum(60 * benchmark.minutes for benchmark, _ in done)
    return sum(benchmark.minutes for benchmark in rest) * (sum(seconds for _, seconds in done) / rough if rough else 1)


# --- the command ---


def listing(benchmarks: Sequence[Benchmark], data: Path | None) -> Table:
    """All benchmarks with their minutes, and whether they can run here."""
    table = Table("benchmark", "measures", "against", "minutes", title="rough minutes on two quiet cores")
    table.add_column("here", overflow="fold")
    for each in benchmarks:
        table.add_row(each.name, each.measures, each.peer, f"{each.minutes:g}", unable(each, data) or "yes")
    return table


def main(words: Sequence[str] | None = None, benchmarks: Sequence[Benchmark] = BENCHMARKS, root: Path = ROOT) -> int:
    """Run what was asked for; 1 if something failed, or was named and cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--data", type=Path, help="the folder of the full data")
    parser.add_argument("--list", action="store_true", help="show all benchmarks and run none")
    parser.add_argument("--results", type=Path, default=root / "benchmarks/RESULTS.md")
    given = parser.parse_args(words)
    names = [each.name for each in benchmarks]
    only = given.only.split(",") if given.only else names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    if given.data and not given.data.is_dir():
        parser.error(f"--data {given.data}: no such folder")
    if given.list:
        Console().print(listing(benchmarks, given.data))
        return 0
    Sections.read(given.results)  # what cannot be written to later is refused now
    return _run([each for each in benchmarks if each.name in only], benchmarks, given, root)


def _run(asked: Sequence[Benchmark], benchmarks: Sequence[Benchmark], given: argparse.Namespace, root: Path) -> int:
    reasons = {each.name: unable(each, given.data) for each in benchmarks}
    able, where = [each for each in asked if not reasons[each.name]], machine()
    print(f"{where}: {len(able)} of {len(benchmarks)} benchmarks, about {minutes_left(able, []):.0f} min")
    for each in asked:
        if reasons[each.name]:
            print(f"cannot run here: {each.name}: {reasons[each.name]}")
    done, failed = list[tuple[Benchmark, float]](), list[tuple[Benchmark, Run]]()
    for i, each in enumerate(able):
        left = minutes_left(able[i:], done)
        print(f"\n[{i + 1} of {len(able)}] {each.name}, about {each.minutes:g} min; {left:.0f} min left", flush=True)
        found, new = measured(each, given.data, root), dict[str, str]()
        if found.status:
            failed.append((each, found))
            reasons[each.name] = "failed"
        else:
            done.append((each, found.seconds))
            new[each.name] = _entry(each, found, given.data, root)
        results = Sections.read(given.results)
        results.update(where, new, {name: why or "not run" for name, why in reasons.items()}, date.today())
        results.write(given.results)
    for each, found in failed:
        print(f"\n{each.name} failed with status {found.status} after {found.seconds:.0f} s:")
        print(textwrap.indent("\n".join(found.last), "  "))
    print(f"\n{len(done)} of {len(able)} measured in {sum(seconds for _, seconds in done) / 60:.1f} min")
    return int(bool(failed) or (given.only is not None and len(able) < len(asked)))


def _entry(benchmark: Benchmark, found: Run, data: Path | None, root: Path) -> str:
    measures = f"{benchmark.measures[0].upper()}{benchmark.measures[1:]}."
    title = measures if benchmark.peer == "–" else f"{measures} Peer: {benchmark.peer}."
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    command = shlex.join([*threads, "python", *benchmark.words(benchmark.command, "DATA")])
    folders = [root, *([data, data.resolve()] if data else [])]
    return entry(title, f"`{command}`: {found.seconds:,.0f} s, {day_of(date.today())}", found.output, folders)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(str(error))
