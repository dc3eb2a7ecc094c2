"""Buckets that a person gave: a file of JSON lines that a notebook writes and a build honours (`buckets.overrides`).

    {"uid": "8ecb97fb…", "bucket": "normal", "note": "the reference is wrong, not the answer"}

`uid` is a completion's, which stays the same as long as the prompt and the text do. The rule of the other rollouts and
its statistics are not touched: an override says what one answer is taken for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from curate.errors import InputError
from curate.files import replace_text
from curate.manifest import Bucket
from curate.storage import located

KEYS = {"uid", "bucket", "note"}


def read_overrides(path: str | Path) -> dict[str, str]:
    """Bucket by uid of a completion, from a file or from a URL of one.

    Raises:
        InputError: no such file, or a line that is no override, with its number.
    """
    try:
        lines = (
            located(Path(), str(path)).read_text(encoding="utf-8").split("\n")
        )  # not splitlines: a note may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}", remedy="name the file in buckets.overrides") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("uid"), str) or not row.keys() <= KEYS:
            raise InputError(f"{where}: no override", remedy='a line is {"uid": …, "bucket": …, "note": …}')
        if row.get("bucket") not in list(Bucket):
            raise InputError(f"{where}: bucket {row.get('bucket')!r}", remedy=f"one of {', '.join(Bucket)}")
        if found.setdefault(row["uid"], row["bucket"]) != row["bucket"]:
            raise InputError(f"{where}: uid {row['uid']} has another bucket above", remedy="keep one of the two lines")
    return found


def write_overrides(path: str | Path, buckets: Mapping[str, str], note: str = "") -> Path:
    """Add overrides to a file, sorted by uid; what it says of other completions stays, of the same ones is replaced.

    Args:
        path: JSON lines; made where it is not there.
        buckets: bucket by uid of a completion.
        note: why.

    Raises:
        InputError: a bucket that is none of the five, or a file that holds something else.
    """
    path = Path(path)
    if wrong := next((b for b in buckets.values() if b not in list(Bucket)), None):
        raise InputError(f"bucket {wrong!r}", remedy=f"one of {', '.join(Bucket)}")
    rows: dict[str, dict[str, str]] = {}
    if path.exists():
        read_overrides(path)
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = {row["uid"]: row for row in (json.loads(line) for line in lines if line.strip())}
    rows |= {uid: {"uid": uid, "bucket": str(b), **({"note": note} if note else {})} for uid, b in buckets.items()}
    replace_text(path, "".join(json.dumps(rows[uid], ensure_ascii=False) + "\n" for uid in sorted(rows)))
    return path
