"""How a manifest shows itself: a line for a terminal, a compact table for a notebook. Text of the data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from curate.manifest.buckets import Bucket
from curate.manifest.markdown import printable, real
from curate.manifest.schema import TABLES, Origin
from curate.manifest.tables import counts

if TYPE_CHECKING:
    from curate.manifest.io import Manifest

MOST = 40  # tasks that a notebook shows


def line(manifest: Manifest) -> str:
    """One line: the folder, its tasks and samples by origin, what the other tables hold."""
    origins = counts(manifest.scan("samples"), "origin")
    held = ", ".join(f"{n:,} {origin}" for (origin,), n in origins.items()) or "no samples"
    more = [(manifest.height("completions"), "completions"), (manifest.height("drops"), "left out")]
    rest = "".join(f", {n:,} {what}" for n, what in more if n)
    return f"Manifest({str(manifest.folder)!r}: {manifest.tasks.height} tasks, {held}{rest})"


def html(manifest: Manifest) -> str:
    """A summary without scripts: tasks with quotas, samples by origin and buckets, then every table's size."""
    name = manifest.provenance["config"].get("name", manifest.folder.name)
    tables = ", ".join(f"<code>{t}</code>&nbsp;{manifest.height(t):,}" for t in TABLES)
    return (
        f"<div><p><strong>{_text(name)}</strong>: {_text(str(manifest.folder))}<br>{_selector(manifest)}</p>"
        f"{_tasks(manifest)}<p>Rows of each table: {tables}</p></div>"
    )


def _selector(manifest: Manifest) -> str:
    replay = manifest.provenance["replay"]
    return f"Selector {_text(replay.get('selector'))}, schema {_text(manifest.provenance.get('schema_version'))}."


def _tasks(manifest: Manifest) -> str:
    tasks = manifest.tasks.sort("stage")
    found = counts(manifest.scan("samples"), "task", "origin")
    origins = [o for o in Origin if any(origin == o for _, origin in found)]
    buckets = [b for b in Bucket if tasks["rollouts"].is_not_null().any()]
    header = [
        "stage",
        "task",
        "rows",
        "distance",
        "quota",
        "granted",
        *origins,
        *(b.replace("_", " ") for b in buckets),
    ]
    rows = [
        [t["stage"], t["task"], t["rows"], real(t["distance"]), t["quota"], t["granted"],
         *(found.get((t["task"], o), 0) for o in origins), *(t[b] for b in buckets)]
        for t in tasks.head(MOST).iter_rows(named=True)
    ]  # fmt: skip
    more = f"<p>… and {tasks.height - MOST:,} tasks more.</p>" if tasks.height > MOST else ""
    return _table(header, rows) + more


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    """A cell: numbers with thousands separators, None as a dash, text without control characters or markup."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else escape(printable(str(value)))
