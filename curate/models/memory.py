"""A batch that does not fit into the device's memory is halved until it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from curate.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def halving(
    items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]], where: str = "the model"
) -> list[Result]:
    """`run(items)`; where the device's memory runs out, the results of its two halves, in order.

    Args:
        items: a batch.
        run: one result an item; called again with fewer items, so it must change nothing before it is through.
        where: what needs the memory, for the error: a key of the configuration.

    Raises:
        InputError: there is no memory for a single item.
    """
    import torch

    try:
        return list(run(items))
    except torch.OutOfMemoryError as error:
        if len(items) <= 1:
            raise InputError(
                f"{where}: the device has not enough memory for a single sequence: {str(error)[:200]}",
                remedy="allow fewer tokens, or use a smaller model, another dtype or another device (cpu)",
            ) from None
    # Here, not in the handler: while an exception is handled, its traceback keeps the failed pass's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return halving(items[:middle], run, where) + halving(items[middle:], run, where)
