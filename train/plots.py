"""Plots of training results, as SVG that opens anywhere. It knows no file formats but its own and no metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def heat_map(
    scores: NDArray[np.float64], checkpoints: list[str], tasks: list[str], metric: str, path: Path
) -> None:  # fmt: skip
    """R as a picture: a row a checkpoint, a column a task, the score in each cell.   scores [checkpoints, tasks].

    The same scores give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = scores.shape
    numbers = columns <= 20 and rows <= 40
    with matplotlib.rc_context({"svg.hashsalt": "rehearse", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(2.5 + 0.55 * columns, 1.6 + 0.32 * rows), layout="constrained")
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
        figure.colorbar(image, ax=axes, label=metric)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _short(name: str) -> str:
    """The end of a long name: checkpoints are paths.

    >>> _short("runs/a/very/long/path/to/some/checkpoint-100/model")
    '…to/some/checkpoint-100/model'
    """
    return name if len(name) <= 29 else "…" + name[-28:]
