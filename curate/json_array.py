"""A JSON array of any length, parsed element by element.

Owns nothing but this: the standard library reads an array whole. Knows nothing of rows, files and what is done with
an error.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

_CHUNK = 1 << 16  # bytes that are read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def elements(stream: BinaryIO) -> Iterator[Any]:
    """The elements of the array that a stream of UTF-8 bytes holds, one by one.

    Raises:
        json.JSONDecodeError: not JSON; its `doc` and `pos` are those of the part that is in memory.
        UnicodeDecodeError: not UTF-8; its `reason` says where in the file.
    """
    window = _Window(_decoded(stream))
    window.peek()
    window.at += 1  # the bracket
    mark = window.peek()
    while mark != "]":
        yield window.value()
        mark = window.peek()
        if mark == ",":
            window.at += 1
            window.peek()  # a value starts right here; a bracket after a comma is no value
        elif mark != "]":
            raise window.fail("Expecting ',' or ']'")
    window.at += 1
    if window.peek():
        raise window.fail("Extra data after the array")


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """The stream's text in pieces, none of them empty, without a byte order mark."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = stream.read(_CHUNK)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            error.reason = f"{error.reason}, at byte offset {done - held + error.start} of the file"
            raise
        if text := text if done else text.removeprefix("\ufeff"):
            yield text
        if not chunk:
            return
        done += len(chunk)


class _Window:
    """The part of a long text that is being parsed, and the place in it."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks, self.text, self.at = chunks, "", 0

    def more(self) -> bool:
        """Forget what is parsed and read at least as much as is left: so a long element costs linear time."""
        parts, got = [self.text[self.at :]], 0
        while got <= len(parts[0]) and (chunk := next(self.chunks, "")):
            parts.append(chunk)
            got += len(chunk)
        self.text, self.at = "".join(parts), 0
        return got > 0

    def peek(self) -> str:
        """The next character that is not white space; '' at the end."""
        while True:
            self.at = cast(re.Match[str], _SPACE.match(self.text, self.at)).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Parse one JSON value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # an error at the end of the window may be the window's fault; a literal or escape has < 16 characters
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut and self.more():
                    continue
                raise
            if end == len(self.text) and isinstance(value, int | float) and self.more():
                continue  # a number may go on
            self.at = min(end, len(self.text))
            return value

    def fail(self, message: str) -> json.JSONDecodeError:
        """What to raise at this place."""
        return json.JSONDecodeError(message, self.text, self.at)
