"""The command line `train`. Training methods come with their own issues; the metrics of a finished run are here now."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from train import metrics

app = typer.Typer(name="train", no_args_is_help=True, add_completion=False, help="Train on a manifest, and measure it.")


@app.callback()
def _group() -> None:
    """Keep `train metrics` a subcommand while it is the only one."""


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
    app()


if __name__ == "__main__":
    main()
