"""The page: its data as JSON, its style and scripts, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from curate.manifest import Manifest
from curate.manifest.schema import content_hash
from curate.report import stream, summary
from curate.report.buckets import buckets
from curate.report.parts import label, short
from curate.report.rewrites import augmentations
from curate.report.rows import rows, to_json
from curate.report.tags import tags

VERSION = 1
SHOWN = ("augment", "buckets", "config", "map", "part", "replay", "schema_version")  # of the provenance


def key_of(manifest: Manifest) -> str:
    """Names what the page shows, and the code that shows it."""
    shown = {name: manifest.provenance.get(name) for name in (*SHOWN, "outputs")}
    return content_hash(["report", VERSION, version("plotly"), _own("page.js"), _own("page.css"), shown])


def mark(key: str) -> str:
    """Where the page carries its key."""
    return f'<meta name="rehearse-report" content="{key}">'


def contents(m: Manifest) -> dict[str, Any]:
    """All that the page says, as JSON values."""
    held = rows(m)
    places = {row["uid"]: i for i, row in enumerate(held["rows"])}
    part = "part" in m.provenance  # without quotas, tags and drops of its own
    sections = [] if part else [stream.stream(m), stream.quotas(m), tags(m), stream.drawn(m), augmentations(m)]
    sections.append(buckets(m, places))
    return {
        "name": short(m.provenance["config"].get("name") or "manifest", 80),
        "kicker": "Rehearse · audit of a replay set",
        "tiles": summary.tiles(m), "says": summary.sentences(m),
        "sections": [asdict(section) for section in sections], "samples": held,
        "note": f"Written by rehearse {m.provenance.get('rehearse', '')} from a manifest of schema "
                f"{m.provenance['schema_version']}. README.md is its data card; provenance.json says how it was made.",
    }  # fmt: skip


def page(manifest: Manifest) -> str:
    """The whole page."""
    return shell(contents(manifest), mark(key_of(manifest)))


def shell(data: dict[str, Any], head: str = "") -> str:
    """A page of its data: name, kicker, tiles, says, sections, note, and samples where there are any.

    Args:
        data: JSON values; all texts in them are shown as text. Without plots, the page goes without their library.
        head: markup for its head, which is not escaped.
    """
    code, style = _own("page.js"), _own("page.css")
    plotly = _plotly() if any("traces" in part for each in data["sections"] for part in each["parts"]) else ""
    library = f'<script type="text/plain" id="plotly">{plotly}</script>\n' if plotly else ""
    first = "samples" if "samples" in data else next((each["id"] for each in data["sections"]), "summary")
    scripts = " ".join(_hash(each) for each in (code, plotly) if each)
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{head}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{label(data["name"], 80)} – Rehearse</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#{first}">Skip to the {first}</a>
<div id="page"></div>
<noscript><p>This page draws itself with its own scripts; the tables beside it hold what it shows.</p></noscript>
<script type="application/json" id="data">{to_json(data)}</script>
<script>{code}</script>
{library}</body>
</html>
"""


def _own(name: str) -> str:
    return (files("curate.report") / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """The plotting library, from the installed package."""
    text = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    assert "</script" not in text.lower()
    return text


def _hash(code: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'"
