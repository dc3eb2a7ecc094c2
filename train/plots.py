"""Plots of training results, as SVG that opens anywhere. It knows no file formats but its own and no metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def heat_map(
    scores: NDArray[np.float64], checkpoints: list[str], tasks: list[str], metric: str, path: Path
) -> None:  # fmt: skip
    """R as a picture: a row a checkpoint, a column a task, the score in each cell.   scores [checkpoints, tasks].

    The same scores give the same bytes. Names are shown as they are: `$` begins no formula.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: a notebook's own figures go on being shown

    rows, columns = scores.shape
    numbers = columns <= 20 and rows <= 40
    with matplotlib.rc_context({"svg.hashsalt": "rehearse", "svg.fonttype": "none", "font.size": 9,
                                "text.parse_math": False, "figure.constrained_layout.use": False}):  # fmt: skip
        width, height = max(0.6 * columns, 1.8), max(0.34 * rows, 0.7)  # inches of the cells; labels come beside them
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        low, high = 0.0, max(1e-9, float(scores.max()))
        image = axes.imshow(scores, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(columns), [_short(t) for t in tasks], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(rows), [f"{_short(name)} · {i}" for i, name in enumerate(checkpoints)])
        axes.set_xlabel("task")
        axes.set_ylabel("checkpoint")
        axes.set_title(f"{metric} of each task by each checkpoint", loc="left")
        for i, j in np.ndindex(rows, columns) if numbers else ():
            ink = "black" if scores[i, j] > 0.6 * high else "white"
            axes.text(j, i, f"{scores[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=8)
        figure.colorbar(image, cax=figure.add_axes((1 + 0.15 / width, 0, 0.12 / width, 1)), label=metric)
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)


_NOT_XML = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _short(name: str) -> str:
    """The end of a long name: checkpoints are paths. What XML may not hold is shown as �.

    >>> _short("runs/a/very/long/path/to/some/checkpoint-100/model")
    '…to/some/checkpoint-100/model'
    """
    name = _NOT_XML.sub("\ufffd", name)
    return name if len(name) <= 29 else "…" + name[-28:]


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float]]], x: str, y: str, path: Path
) -> None:
    """Lines with a band around each: (name, x, mean, half width of the band) of every line.

    The same values give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.hashsalt": "rehearse", "svg.fonttype": "none", "font.size": 9,
                                "text.parse_math": False}):  # fmt: skip
        figure = Figure(figsize=(7.2, 3.8), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        colours = [*(f"C{n}" for n in range(10)), "black", "goldenrod"]
        for number, (name, at, mean, half) in enumerate(lines):
            colour, mark = colours[number % len(colours)], "osD^v"[number // len(colours) % 5]
            low, high = np.subtract(mean, half), np.add(mean, half)
            axes.fill_between(at, low, high, color=colour, alpha=0.15 if len(lines) <= 6 else 0.05, linewidth=0)
            axes.plot(at, mean, color=colour, marker=mark, markersize=4, linewidth=1.6, label=_short(name))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if lines:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
