"""The command lines, called in the test's own process: a process of its own would import torch for many seconds.

What only another process can show (a kill, a full disk, bytes whatever the seed of hashes) starts one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch


def called(main: Callable[[], None], *words: Any, cwd: Path | None = None) -> CompletedProcess[str]:
    """What the entry point of a console script says and its exit code, as `subprocess.run` gives them.

    An error that the command does not turn into a message is raised.
    """
    command, out, err, code = ["command", *map(str, words)], io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", command))
        stack.enter_context(patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return CompletedProcess(command, code, out.getvalue(), err.getvalue())
