"""The one exception for input that a user can mend. The command line prints it without a traceback and exits with 1."""


class InputError(ValueError):
    """Something that the user gave cannot be used. The message names the file, row and column, and the remedy."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)
