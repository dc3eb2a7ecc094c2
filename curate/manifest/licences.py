"""What the licences of the sources forbid: a small table of SPDX ids and of the names that data sets use for them.

It reads names, not texts, and is no legal advice. What it does not know counts as unknown, never as free.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from curate.manifest.tables import Rows, counts

LIMITS = {
    "non-commercial": "commercial use is forbidden",
    "no derivatives": "changed copies may not be passed on: rewrites, excerpts, perhaps this set itself",
    "share-alike": "what is made from it keeps its licence when it is passed on",
    "restricted use": "the licence names uses that it forbids",
    "unknown": "the terms are not known here, or no licence is stated: read them at the source before use",
}
"""Name of a restriction -> what it means, the gravest first."""

_FREE: tuple[str, ...] = ()
_KNOWN: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # pattern of the spelling, the hub's identifier, limits
    (r"apache(-license)?(-version)?-?v?2(\.0)?", "apache-2.0", _FREE),
    (r"mit", "mit", _FREE),
    (r"bsd", "bsd", _FREE),
    (r"bsd-([23])-clause", r"bsd-\1-clause", _FREE),
    (r"isc", "isc", _FREE),
    (r"afl-3(\.0)?", "afl-3.0", _FREE),
    (r"unlicense|the-unlicense", "unlicense", _FREE),
    (r"(librivox-)?public-domain(-https?-librivox\.org-pages-public-domain)?", "other", _FREE),
    (r"pddl(-1\.0)?", "pddl", _FREE),
    (r"odc-by(-1\.0)?", "odc-by", _FREE),
    (r"cdla-permissive-(1|2)(\.0)?", r"cdla-permissive-\1.0", _FREE),
    (r"cdla-sharing-1(\.0)?", "cdla-sharing-1.0", ("share-alike",)),
    (r"odbl(-1\.0)?", "odbl", ("share-alike",)),
    (r"(a?gpl|lgpl)-?v?(\d\.\d)(-only|-or-later|\+)?", r"\1-\2", ("share-alike",)),
    (r"(a?gpl|lgpl)-?v?(\d)(-only|-or-later|\+)?", r"\1-\2.0", ("share-alike",)),
    (r"mpl-2(\.0)?", "mpl-2.0", ("share-alike",)),
    (r"gfdl(-1\.\d)?(-only|-or-later)?", "gfdl", ("share-alike",)),
    (r"(bigscience-|creativeml-|bigcode-)?open-?rail(-[a-z+-]+)?", "openrail", ("restricted use",)),
    (r"llama-?(\d(\.\d)?)?(-community)?(-agreement)?|gemma|c-uda(-1\.0)?", "other", ("restricted use",)),
)
_WORDS = (
    (r"https?://creativecommons\.org/licenses/", "cc-"),
    (r"https?://creativecommons\.org/publicdomain/zero/", "cc0-"),
    (r"creative[\s-]*commons", "cc"), (r"attribution", "by"), (r"non-?\s*commercial", "nc"),
    (r"share-?\s*alike", "sa"), (r"no-?\s*deriv(ative)?(s|e?s)?(-works)?", "nd"),
)  # fmt: skip
_CC = re.compile(
    r"cc-by(-nc)?(-sa|-nd)?(?:-v?(\d\.\d))?"
    r"(?:-(international|unported|generic|igo|deed(\.en)?|intl|legalcode(\.[a-z]+)?|[a-z]{2}))*"
)
_CC0 = re.compile(r"cc-?(0|zero)(-v?1\.0)?(-universal)?(-public-domain)?(-dedication)?")
_HUB_CC = {
    *(f"cc-by-{v}" for v in ("2.0", "2.5", "3.0", "4.0")), "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
}  # fmt: skip


def limits(name: str | None) -> tuple[str, ...]:
    """What a licence forbids, in the order of LIMITS; () = nothing that matters for training.

    Several licences, as `A; B` or `A AND B`, forbid what any of them does; of `A OR B` the freer one is taken.

    >>> limits("Apache-2.0 AND CC0-1.0"), limits("CC BY-NC-SA 4.0"), limits("GPL-3.0 OR MIT"), limits(None)
    ((), ('non-commercial', 'share-alike'), (), ('unknown',))
    """
    found = {limit for _, each in _read(name or "") for limit in each}
    return tuple(limit for limit in LIMITS if limit in found)


def hub_ids(name: str | None) -> list[str]:
    """The identifiers that the Hugging Face hub has for a licence: `other` where it has none, `unknown` for None.

    >>> hub_ids("CC BY 4.0; MIT"), hub_ids("Our own terms"), hub_ids(None)
    (['cc-by-4.0', 'mit'], ['other'], ['unknown'])
    """
    return sorted({identifier for identifier, _ in _read(name)}) if name else ["unknown"]


def warning(samples: Rows) -> str | None:
    """One line about the samples whose licence forbids a use; None where none does (an unknown one may: the card)."""
    found = Counter[str]()
    for (name,), n in counts(samples, "license").items():
        for limit in limits(name):
            found[limit] += n
    if not found.keys() - {"unknown"}:
        return None
    parts = [f"{limit} {found[limit]:,}" for limit in LIMITS if found[limit]]
    return f"licences of the sources restrict the use of rows: {', '.join(parts)}; the card (README.md) tells which"


@cache
def _read(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(identifier, limits) of every licence that a text names and that has to be kept to."""
    whole = _one(text)
    if "unknown" not in whole[1]:
        return (whole,)
    both = re.search(r"\bAND\b", text) and re.search(r"\bOR\b", text)
    if (options := re.split(r"\s+OR\s+", text.strip("() "))) and len(options) > 1 and not both:
        read = [_read(option) for option in options]
        return min(read, key=_weight)
    parts = [p for p in re.split(r"\s*;\s*|\s+AND\s+|\s+OR\s+|\s*,\s*", text) if p.strip("() ")]
    return tuple(_one(p.strip("()")) for p in parts) if len(parts) > 1 else (whole,)


def _weight(read: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[int, ...]:
    """How little a licence leaves: its limits by their place in LIMITS, the gravest first; more is worse."""
    gravity = list(LIMITS)
    found = {limit for _, each in read for limit in each}
    return tuple(sorted((len(gravity) - gravity.index(limit) for limit in found), reverse=True))


def _one(name: str) -> tuple[str, tuple[str, ...]]:
    text = name.strip().casefold()
    for pattern, short in _WORDS:
        text = re.sub(pattern, short, text)
    text = re.sub(r"[\s_:/(),-]+", "-", text).strip("-.")
    text = re.sub(r"^the-|-licen[sc]e$", "", text)
    if _CC0.fullmatch(text):
        return "cc0-1.0", _FREE
    if match := _CC.fullmatch(text):
        kinds, identifier = (match[1], match[2]), f"cc-by{match[1] or ''}{match[2] or ''}-{match[3]}"
        named = {"-nc": "non-commercial", "-sa": "share-alike", "-nd": "no derivatives"}
        return identifier if identifier in _HUB_CC else "cc", tuple(named[kind] for kind in kinds if kind)
    for pattern, identifier, found in _KNOWN:
        if match := re.fullmatch(pattern, text):
            return match.expand(identifier), found
    words = set(text.split("-")) if text.startswith("cc") else set()
    more = [limit for sign, limit in (("nd", "no derivatives"), ("sa", "share-alike")) if sign in words]
    if re.search(r"\bnc\b|research(-use)?-only|academic", text):
        return "other", ("non-commercial", *more, "unknown")
    if more:
        return "other", (*more, "unknown")
    return "other", ("unknown",)
