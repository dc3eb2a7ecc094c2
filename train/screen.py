"""What a person sees of a run: one line with steps, loss, tokens a second and the time left; and the log as a file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)
from transformers import TrainerCallback

LOG = "log.jsonl"


class Progress(TrainerCallback):
    """Prints a live line on a terminal, plain lines elsewhere, and appends every log entry to `log.jsonl`."""

    def __init__(self, out: Path, epochs: float, quiet: bool = False) -> None:
        self.out, self.epochs, self.console = out, epochs, Console(stderr=True, quiet=quiet)
        self.bar: Bar | None = None
        self.line: Any = None

    def tell(self, text: str) -> None:
        """A line of the first process."""
        if os.environ.get("RANK", "0") == "0":
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The live line; and a log without what came after the checkpoint that a run goes on from."""
        if state.is_world_process_zero:
            self._trim(state.global_step)
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Bar(TextColumn("[bold]train"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("steps"),
                       TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left"),
                       TimeRemainingColumn(), console=self.console)  # fmt: skip
        self.line = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(self.line, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Values into the line and the file."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **logs}
        if "epoch" in line:
            line["epoch"] *= self.epochs  # the library counts the whole run as one
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _number(v) for k, v in line.items()}, sort_keys=True, allow_nan=False) + "\n")
        if "eval_loss" in logs:
            self.tell(
                f"step {state.global_step:,} · evaluation: loss {logs['eval_loss']:.4f}"
                + _parts(logs, "eval_loss_")
                + _others({k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")})
            )
        if "loss" not in logs:
            return
        words = [
            f"loss {logs['loss']:.4f}{_parts(logs, 'loss_')}{_others(logs)}",
            f"{logs.get('tokens_per_second', 0):,.0f} tokens/s",
        ]
        words += [f"MFU {logs['mfu']:.1%}"] if "mfu" in logs else []
        if self.bar is not None:
            self.bar.update(self.line, description=" · ".join(words))
        else:
            self.console.print(f"step {state.global_step:,} of {state.max_steps:,} · " + " · ".join(words),
                               highlight=False, soft_wrap=True)  # fmt: skip

    def _trim(self, step: int) -> None:
        file = self.out / LOG
        if not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= step and "train_runtime" not in entry:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # cut by a full disk
                continue
        temporary = self.out / f".{LOG}"
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, file)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The line stays as it is."""
        if self.bar is not None:
            self.bar.stop()


def _parts(logs: dict[str, Any], start: str) -> str:
    """The loss of each origin, where there are several."""
    origins = {k.removeprefix(f"{start}origin/"): v for k, v in logs.items() if k.startswith(f"{start}origin/")}
    return f" ({', '.join(f'{k} {v:.4f}' for k, v in origins.items())})" if len(origins) > 1 else ""


SHOWN = {"fit": "fit", "bias": "bias", "nll": "NLL", "kl": "KL", "reward": "reward", "accuracy": "in order",
         "accuracy_of_change": "gained in order", "rho_align": "ρ agree", "rho_conflict": "ρ conflict",
         "kl_reference": "KL", "entropy": "entropy",
         "retention": "retention", "clip_fraction": "clipped"}  # fmt: skip


def _others(logs: dict[str, Any]) -> str:
    """What a method's own values say, by short names; a constraint and its λ for each older task."""
    found = [f"{word} {logs[name]:.3f}" for name, word in SHOWN.items() if name in logs]
    tasks = [name.removeprefix("lambda/") for name in logs if name.startswith("lambda/")]
    found += [f"{task}: J {logs[f'constraint/{task}']:+.3f}, λ {logs[f'lambda/{task}']:.3f}" for task in tasks
              if f"constraint/{task}" in logs]  # fmt: skip
    return "".join(f" · {each}" for each in found)


def _number(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
