"""The generated sections of RESULTS.md, one a machine, and what of a benchmark's output may be published in them.

A section stands between `<!-- bench: MACHINE -->` and `<!-- /bench -->`. It begins with a heading, the machine and the
day, and what was not measured there; then one `### NAME` a benchmark. New sections come last.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import platform
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path, PurePosixPath

from curate.errors import InputError
from curate.files import replace_text

CLOSE = "<!-- /bench -->\n"


class Sections:
    """The text of RESULTS.md."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def read(cls, path: Path) -> Sections:
        """Of a file; where there is none, an empty one. InputError where the marks of sections are not pairs."""
        text = path.read_bytes().decode() if path.exists() else "# Measured\n"
        marks = re.findall(r"^<!-- (/?)bench\b.*-->\n", text, re.MULTILINE)
        if marks != ["", "/"] * (len(marks) // 2):
            raise InputError(f"{path.name}: the first or last line of a section is missing", remedy="each begins with "
                             f"`<!-- bench: MACHINE -->` and ends with `{CLOSE.strip()}`")  # fmt: skip
        return cls(text)

    def update(self, machine: str, new: Mapping[str, str], reasons: Mapping[str, str], day: date) -> None:
        """Put entries into the section of a machine, in place of those of the same name; all else keeps its bytes.

        Args:
            machine: its description; whatever differs in it is another machine.
            new: by the name of the benchmark.
            reasons: of every benchmark, why it has no entry if it has none. Entries are in this order; those of other
                names stay, and come last.
            day: for the heading.
        """
        opening = f"<!-- bench: {re.sub(r'[^a-z0-9.]+', '-', machine.lower()).strip('-')} -->\n"
        before, found, rest = self.text.partition(opening)
        old, _, after = rest.partition(f"\n{CLOSE}")
        entries = {**_entries(old), **{name: f"### {name}\n\n{text}\n\n" for name, text in new.items()}}
        if not entries:
            return
        while not found and not before.endswith("\n\n"):
            before += "\n"
        left: dict[str, list[str]] = {}
        for name in [each for each in reasons if each not in entries]:
            left.setdefault(reasons[name], []).append(name)
        why = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in left.items())
        note = f" Not measured here: {why}." if why else ""
        order = [*(name for name in reasons if name in entries), *(name for name in entries if name not in reasons)]
        head = f"## {machine}; {day_of(day)}\n\nWritten by `make bench`.{note}\n\n"
        self.text = f"{before}{opening}{head}{''.join(entries[name] for name in order)}{CLOSE}{after}"

    def write(self, path: Path) -> None:
        """The whole file or nothing."""
        replace_text(path, self.text)


def _entries(section: str) -> dict[str, str]:
    parts = re.split(r"^(?=### )", section, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("### "): f"{part.rstrip()}\n\n" for part in parts}


def day_of(day: date) -> str:
    """As RESULTS.md writes it: 29 November 2026."""
    return f"{day.day} {day:%B %Y}"


# --- an entry ---


def entry(title: str, how: str, output: str, folders: Iterable[Path]) -> str:
    """What was measured, the command with seconds and day, and what it printed.

    Args:
        title: what was measured, and the peer.
        how: command, seconds and day.
        output: as printed.
        folders: of this machine that the output may name.
    """
    return f"{title}\n\n{how}.\n\n{markdown(without_names(output, folders))}".rstrip()


def markdown(output: str) -> str:
    """Tables as they are, other lines as indented text; without comments and the log lines of trainers."""
    lines = [line.rstrip() for line in output.splitlines()]
    lines = [line for line in lines if not re.fullmatch(r"<!--.*-->|\{.*\}", line)]
    blocks = []
    for table, some in itertools.groupby(lines, lambda line: line.startswith("|")):
        block = "\n".join(some).strip("\n")
        if block:
            blocks.append(block if table else textwrap.indent(block, "    "))
    return "\n\n".join(blocks)


def without_names(text: str, folders: Iterable[Path] = ()) -> str:
    """A text in which an absolute path is its last part, and neither the host nor the user of this process is named.

    Args:
        text: what a benchmark has printed.
        folders: known as one path even where a name has a space; those of the user and for temporary files are known.
    """
    mine = [*folders, Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)]
    known = "|".join(re.escape(str(f)) for f in sorted(mine, key=lambda f: -len(str(f))) if len(f.parts) > 1)
    part = r"/[^\s/|]+"
    path = rf"(?:file://|(?<![\w.~/-]))(?:(?:{known or '(?!)'})(?:{part})*|(?:{part}){{2,}})/?"
    text = re.sub(path, lambda found: PurePosixPath(found[0]).name, text)
    for host in (platform.node(), platform.node().split(".")[0]):
        if host and host != "localhost":
            text = re.sub(rf"\b{re.escape(host)}\b", "host", text)
    with contextlib.suppress(OSError, KeyError):  # a process whose user has no name
        text = re.sub(rf"\b{re.escape(getpass.getuser())}@", "user@", text)
    return text
