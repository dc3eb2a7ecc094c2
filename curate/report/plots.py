"""Plots that several sections share. Places along an axis of names are numbers, so no name is taken for a date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curate.report.parts import Plot, Table, label

SHORT = 26  # characters of a name beside a plot


def names_axis(names: Sequence[str]) -> dict[str, Any]:
    """A vertical axis of names of the data, the first one on top."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [label(name, SHORT) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def height(n: int, one: int = 26) -> int:
    """Pixels of a plot that has a line for each of n names."""
    return 90 + one * max(2, n)


def bars(
    name: str,
    title: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[int], str]],
    unit: str,
    table: Table,
    note: str = "",
    mode: str = "stack",
) -> Plot:
    """Horizontal bars: a line for each of `names`, a colour for each of `series` (its name, values, colour)."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": what,
            "x": list(values),
            "y": list(range(len(names))),
            "marker": {"color": colour},
            "hovertext": [f"{label(n)}: {v:,} {what}" for n, v in zip(names, values, strict=True)],
            "hoverinfo": "text",
        }
        for what, values, colour in series
    ]
    layout = {
        "height": height(len(names), 30 if mode == "group" else 26),
        "barmode": mode,
        "showlegend": len(series) > 1,
        "yaxis": names_axis(names),
        "xaxis": {"title": {"text": unit}, "rangemode": "tozero"},
    }
    alt = f"{title}: bars of {unit}, {len(names)} of them: {', '.join(what for what, *_ in series)}."
    return Plot(name, title, alt, traces, layout, table, note)
