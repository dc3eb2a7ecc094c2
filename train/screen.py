"""What a person sees of a run: one line with steps, loss, tokens a second and the time left; and the log as a file."""

from __future__ import annotations

import json
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


class Progress(TrainerCallback):
    """Prints a live line on a terminal, plain lines elsewhere, and appends every log entry to `log.jsonl`."""

    def __init__(self, out: Path, quiet: bool = False) -> None:
        self.out, self.console = out, Console(stderr=True, quiet=quiet)
        self.bar: Bar | None = None
        self.line: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The live line."""
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
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}, sort_keys=True) + "\n")
        if "loss" not in logs:
            return
        words = [f"loss {logs['loss']:.4f}", f"{logs.get('tokens_per_second', 0):,.0f} tokens/s"]
        words += [f"MFU {logs['mfu']:.1%}"] if "mfu" in logs else []
        if self.bar is not None:
            self.bar.update(self.line, description=" · ".join(words))
        else:
            self.console.print(f"step {state.global_step:,} of {state.max_steps:,} · " + " · ".join(words),
                               highlight=False)  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The line stays as it is."""
        if self.bar is not None:
            self.bar.stop()
