"""The stages of a plan in several processes: each as soon as those that it needs are done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from curate.errors import InputError
from train.stream.plan import Plan, Stage
from train.stream.stage import carry_out

BYTES_A_WEIGHT = 16  # float32 weights, gradients and two moments
BESIDE = 2 << 30  # bytes of a process for libraries, activations and an embedder


def workers_for(weights: int, wanted: int | None) -> int:
    """How many processes: what the user says, one where there is a GPU, else what cores and free memory allow.

    Args:
        weights: bytes of the model's weights on disk, taken to be bfloat16 or float32 numbers, the smaller.
        wanted: number that was asked for.
    """
    if wanted is not None:
        return wanted
    if torch.accelerator.is_available():
        return 1
    each = BESIDE + weights // 2 * BYTES_A_WEIGHT
    return max(1, min(cores(), psutil.virtual_memory().available // each))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def queue(plan: Plan, stages: Collection[str]) -> list[Stage]:
    """Stages in the order in which they are begun.

    Of the first seed the first stage of each run, each task alone, and the second stage of each run, which is the first
    that replays; then run after run. So what an arm cannot do (rows that its method does not take, a batch that memory
    does not hold) and what is wrong with a task (a row of too many tokens) is seen before the hours of the others.
    """
    rank: dict[str, int] = {}
    for run in plan.runs:
        if run.seed == plan.runs[0].seed and run.kind != "joint":
            for n, folder in enumerate(run.stages[:2]):
                rank[folder] = min(rank.get(folder, 3), 1 if run.kind == "single" else 2 * n)
    left = (stage for stage in plan.stages.values() if stage.folder in stages)
    return sorted(left, key=lambda stage: rank.get(stage.folder, 3))


def in_order(
    plan: Plan, stages: Collection[str], workers: int, threads: int, modules: Path, begin: Callable[[Stage], None]
) -> Iterator[tuple[Stage, float]]:
    """Carry out stages; yields each with its seconds when it is done.

    Args:
        plan: what they belong to.
        stages: folders of those that are not done.
        workers: processes.
        threads: of each, whatever is left to do: their number can decide a last bit.
        modules: folder that the user's functions are imported from.
        begin: called when a stage is given to a process.

    Raises:
        InputError: a stage cannot be done. Those that run at that moment are finished first.
    """
    waiting = queue(plan, stages)
    left = set(stages)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare, (os.getpid(), threads, str(modules.absolute()))) as pool:
        running: dict[Future[float], Stage] = {}
        error: Exception | None = None
        try:
            while waiting or running:
                ready = [] if error else [s for s in waiting if not left & set(s.needs)]
                for stage in ready[: workers - len(running)]:
                    waiting.remove(stage)
                    begin(stage)
                    steps = [(step.command, step.kind, step.leaves) for step in stage.ordered]
                    with _unstoppable():  # a process that it starts inherits this
                        future = pool.submit(carry_out, str(plan.folder(stage.folder).absolute()), steps)
                    running[future] = stage
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    try:
                        took = future.result()
                    except BrokenProcessPool:
                        error = InputError(
                            f"{plan.folder(stage.folder)}: its process was ended from outside, perhaps for want of "
                            "memory",
                            remedy="workers=1, or a smaller batch; the same command goes on",
                        )
                    except InputError as raised:
                        error = error or InputError(f"{plan.label(stage)}: {raised}")
                    except Exception as raised:
                        raised.add_note(f"in {plan.label(stage)}: {plan.folder(stage.folder)}")
                        error = error or raised
                    else:
                        left.discard(stage.folder)
                        yield stage, took
        except BaseException:  # Ctrl-C: nobody waits for a stage's end
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        if error:
            raise error


@contextmanager
def _unstoppable() -> Iterator[None]:
    """Inside, and in processes that are started inside, Ctrl-C does nothing: the first process alone answers it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare(parent: int, threads: int, modules: str) -> None:
    """A process's share of the cores; and it ends with the one that started it, however that ends."""
    sys.path.insert(0, modules)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def bytes_of(folder: Path) -> int:
    """Size of a model's weights."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
