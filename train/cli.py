"""The command line `train`: thin. It parses, calls, prints, and turns errors into exit codes.

0 = done, 1 = bad input, 2 = wrong usage, 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from train import metrics

app = typer.Typer(name="train", no_args_is_help=True, add_completion=False, help="Train on a manifest, and measure it.")


Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of the run")]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings: data=runs/superni learning_rate=1e-5")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")]


@app.command()
def cft(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """Continual fine-tuning: weighted NLL on current and replayed rows; KL, LoRA, O-LoRA and EWC by settings.

    Keys are ours (see train/config.py) and all of transformers.TrainingArguments by their own names.

    Examples:
        train cft model=examples/starter data=runs/demo out=runs/cft learning_rate=1e-3 num_train_epochs=1

        train cft --config run.yaml data=runs/superni kl.weight=0.1 lora.r=16
    """
    _train("cft", config, settings, quiet)


@app.command()
def cpt(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """Continued pre-training: the loss is on all tokens of packed blocks; old domains come back by `mixture`."""
    _train("cpt", config, settings, quiet)


def _train(name: str, config: Path | None, settings: list[str] | None, quiet: bool) -> None:
    with _errors():
        from train.config import load
        from train.run import CONFIGS, run

        words = settings or []
        if wrong := next((w for w in words if "=" not in w or w.startswith("=")), None):
            raise typer.BadParameter(f"{wrong!r} is not of the form key=value, as in learning_rate=1e-5")
        ours, theirs = load(CONFIGS[name], config, words)
        model = run(name, ours, theirs, quiet)
        if not quiet:
            sys.stdout.write(f"model: {model}\n")


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is one message and exit code 1; the rest keeps its traceback."""
    from curate.errors import InputError
    from curate.manifest import ManifestError

    try:
        yield
    except (InputError, ManifestError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        raise typer.Exit(130) from None


@app.command(name="metrics")
def metrics_(
    matrix: Annotated[Path, typer.Argument(help="CSV of R: T+1 lines of T numbers, line 1 = before training")],
    upper: Annotated[str | None, typer.Option(help="scores of each task trained alone: 0.9,0.8,…")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """AP, backward transfer, forgetting, zero-shot forward transfer and relative gain of an R matrix."""
    try:
        with matrix.open(newline="", encoding="utf-8") as file:
            r = [[float(cell) for cell in line] for line in csv.reader(file) if line]
        found: dict[str, object] = {"average_performance": metrics.average_performance(r)}
        if len(r[0]) > 1:
            found |= {
                name: getattr(metrics, name)(r) for name in ("backward_transfer", "forgetting", "forward_transfer")
            }
        if upper is not None:
            found["relative_gain"] = metrics.relative_gain(r, [float(u) for u in upper.split(",")]).tolist()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {matrix}: {error}\n")
        raise typer.Exit(1) from None
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for name, value in found.items():
        shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.4f}"
        sys.stdout.write(f"{name.replace('_', ' '):<22}{shown}\n")


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
