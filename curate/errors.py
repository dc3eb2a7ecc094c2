"""The one exception for input that a user can mend. The command line prints it without a traceback and exits with 1."""


def of_system(error: BaseException) -> bool:
    """True for what the system refused (no room, no right, no such place), also where polars has wrapped it."""
    words = ("os error", "IO error", "transport error")
    wrapped = type(error).__module__.startswith("polars") and any(word in str(error) for word in words)
    return isinstance(error, OSError) or wrapped


class InputError(ValueError):
    """Something that the user gave cannot be used. The message names the file, row and column, and the remedy."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)
