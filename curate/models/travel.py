"""Models that go to where the work is: to the actors of a pool, as their description."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from curate.errors import InputError


class Travels:
    """A model that is pickled as its description: whatever it has loaded (cached properties) is loaded anew there.

    Where it arrives it must have the same `fingerprint`, that is, the same weights; arriving twice it is one object,
    so that several stages share what was loaded.
    """

    fingerprint: Any

    def luggage(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function and the arguments that it makes this object from."""
        kept = {
            name: value.absolute() if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }
        return _unpacked, (type(self), kept)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _arrived, (*self.luggage(), self.fingerprint)


_HERE: dict[bytes, Any] = {}
_MOST = 6  # objects that are kept: policy, reference, embedder, reward, tagger …


def _arrived(make: Callable[..., Any], arguments: tuple[Any, ...], fingerprint: str) -> Any:
    key = pickle.dumps((make, arguments))
    if key not in _HERE:
        found = make(*arguments)
        if found.fingerprint != fingerprint:
            raise InputError(
                f"{getattr(found, 'name', type(found).__name__)}: a worker finds other files than the build: "
                f"{found.fingerprint[:80]}, not {fingerprint[:80]}",
                remedy="put the same model at the same path on every node, or on a shared file system",
            )
        while len(_HERE) >= _MOST:
            del _HERE[next(iter(_HERE))]
        _HERE[key] = found
    return _HERE[key]


def _unpacked(kind: Any, state: dict[str, Any]) -> Any:
    found = object.__new__(kind)
    vars(found).update(state)
    return found
