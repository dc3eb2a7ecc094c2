"""Who computes what is missing: this process, or a pool of Ray actors. The stages do not know which.

A stage hands over a function that can be pickled and parts of its work, each with a key; results come back in any
order. What decides the bits of a result (the parts, the settings, the threads of a forward pass) is the same in both
engines, so both give the same manifest. Results go into the store here, on the machine that runs the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from curate.config import EngineConfig
from curate.models.threads import limited

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a function over parts of work."""

    def map(self, make: Callable[[Item], Result], parts: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Result]]:
        """(key, make(item)) of every (key, item), as they are done. `parts` is read no faster than it is worked off."""

    def check(self) -> None:
        """Find out before any work whether there will be somebody to do it.

        Raises:
            InputError: there will not.
        """

    def close(self) -> None:
        """Let go of what was started."""


class Local:
    """This process, one part after the other.

    Args:
        threads: of a forward pass on a CPU; None = as many as torch takes by itself.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def map(self, make: Callable[[Item], Result], parts: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Result]]:
        """In the order of `parts`."""
        for key, item in parts:
            with limited(self.threads):
                result = make(item)
            yield key, result

    def check(self) -> None:
        """This process is there."""

    def close(self) -> None:
        """Nothing was started."""


def open_engine(config: EngineConfig) -> Engine:
    """The engine of a configuration; Ray is reached for at its first part of work.

    Raises:
        InputError: Ray is asked for and not installed.
    """
    if config.kind == "local":
        return Local(config.threads)
    from curate.ray_engine import RayEngine

    return RayEngine(config)
