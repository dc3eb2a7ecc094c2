"""How many threads a forward pass takes on a CPU, and where it runs by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from curate.errors import InputError


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
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with threadpool_limits(n):  # NumPy's
            yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str, where: str) -> None:
    """See whether there is such a device.

    Raises:
        InputError: there is none, or torch knows no such name; named as the key `where`.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError and others
        raise InputError(
            f"{where} {device!r}: {str(error).splitlines()[0][:200]}",
            remedy="use cpu, or a device that this machine has; by default it is found out",
        ) from None


def default_device() -> str:
    """A GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
