"""How many threads a forward pass takes on a CPU, and where it runs by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def number() -> int:
    """Threads that torch takes in this process."""
    import torch

    return torch.get_num_threads()


@contextmanager
def limited(n: int | None) -> Iterator[None]:
    """Take n threads inside; None changes nothing."""
    if n is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device() -> str:
    """A GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
