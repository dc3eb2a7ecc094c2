"""The user's own functions, `module:function`: a reward, or what a training run calls."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_exponential

from curate.errors import InputError
from curate.manifest.io import sha256_file
from curate.models.base import Prompt
from curate.models.travel import Travels

LOG = logging.getLogger(__name__)  # says that a function is asked again
PAUSE = 1.0  # seconds before the second try; each further pause is twice as long


def open_function(name: str, base: Path, where: str) -> tuple[Callable[..., Any], Path]:
    """(`module:function`, the module's file); modules of `base` come first. Errors begin with `where`.

    Raises:
        InputError: the module cannot be imported, has no source file, or no such function.
    """
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name, base, where)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise InputError(f"{where}: {module.__file__} has no such function", remedy=f"it has {known}")
    return function, Path(str(module.__file__))


class Function(Travels):
    """A reward: function(prompts, completions, references) -> a list of as many numbers.

    Prompts are lists of {role, content} messages. None, NaN and infinities are NaN, True and False 1 and 0.
    The fingerprint hashes the module's own file, not what it imports. What may pass (a connection, a timeout: any
    OSError, or an exception of a library) is tried again, `retries` times with growing pauses.
    """

    def __init__(self, name: str, base: Path, key: str, retries: int = 3) -> None:
        self.where, self.retries = f"{key}.function {name!r}", retries
        self._named = name, base.absolute(), key, retries
        self.function, file = open_function(name, base, self.where)
        self.fingerprint = f"python:{name}@{sha256_file(file)}"

    def luggage(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """By name: the module is imported where the function is called."""
        return Function, self._named

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """What the function says, one number a completion.

        Raises:
            InputError: it raises, or gives something other than as many numbers.
        """
        if not completions:
            return []
        where = f"{self.where}, called with {len(completions)} completions from row {prompts[0].uid} on"
        messages = [[dict(m) for m in p.messages] for p in prompts]
        tries = Retrying(
            stop=stop_after_attempt(1 + self.retries), wait=wait_exponential(PAUSE, max=60),
            retry=retry_if_exception(_may_pass), reraise=True, before_sleep=before_sleep_log(LOG, logging.WARNING),
        )  # fmt: skip
        try:
            found = tries(self.function, messages, list(completions), [list(r) for r in references])
        except (Exception, SystemExit) as error:  # the user's code may raise anything, or leave
            again = f" in each of {1 + self.retries} tries" if self.retries and _may_pass(error) else ""
            if not again and (row := self._culprit(messages, completions, references)) is not None:
                where = f"{self.where}, called with the completion {completions[row][:80]!r} of row {prompts[row].uid}"
            raise InputError(
                f"{where}, raised {type(error).__name__}{again}: {_said(error)}",
                remedy="mend the function, or what it asks; it may give None for a completion that it cannot judge",
            ) from error
        remedy = "return a list with one number, or None, for every completion, in their order"
        found = found.tolist() if hasattr(found, "tolist") else found  # NumPy and torch
        if not isinstance(found, list | tuple):
            raise InputError(f"{where}, gave {type(found).__name__} instead of a list", remedy=remedy)
        if len(found) != len(completions):
            raise InputError(f"{where}, gave {len(found)} numbers", remedy=remedy)
        numbers = [value.item() if getattr(value, "ndim", None) == 0 else value for value in found]
        wrong = next((value for value in numbers if not isinstance(value, int | float | None)), None)
        if wrong is not None:
            raise InputError(f"{where}, gave {str(wrong)[:80]!r} ({type(wrong).__name__}), no number", remedy=remedy)
        return [math.nan if value is None else finite(value) for value in numbers]

    def _culprit(self, messages: Any, completions: Sequence[str], references: Sequence[Sequence[str]]) -> int | None:
        """Which completion the function raises at when it is asked about it alone; None: at none."""
        low, high = 0, len(completions)
        while high - low > 1:
            middle = (low + high) // 2
            some = slice(low, middle)
            if _raises(self.function, messages[some], list(completions[some]), [list(r) for r in references[some]]):
                high = middle
            else:
                low = middle
        alone = slice(low, low + 1)
        raised = _raises(self.function, messages[alone], list(completions[alone]), [list(r) for r in references[alone]])
        return low if raised else None


def _raises(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        function(*arguments)
    except (Exception, SystemExit):  # as above
        return True
    return False


def _may_pass(error: BaseException) -> bool:
    """Python's own errors, OSError aside, say that the function is wrong; those of libraries may be a server's."""
    return isinstance(error, OSError) or (isinstance(error, Exception) and type(error).__module__ != "builtins")


def _said(error: BaseException) -> str:
    try:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)[:300])  # a terminal obeys some
    except Exception:  # an exception of the user's code may fail to say what it is
        return "(it cannot be printed)"


def _imported(name: str, base: Path, where: str) -> Any:
    try:
        with _importable(base):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module that is executed may raise anything, or leave
        raise InputError(
            f"{where}: module {name!r} cannot be imported: {type(error).__name__}: {_said(error)}",
            remedy=f"it must lie in {base.resolve()} or be installed, and import without an error",
        ) from error
    if getattr(module, "__file__", None) is None:  # built in, or a folder
        raise InputError(f"{where}: module {name!r} has no source file", remedy="name a module of your own")
    return module


@contextmanager
def _importable(base: Path) -> Iterator[None]:
    """Modules of a folder can be imported. Afterwards neither the folder nor its modules are known any more.

    Otherwise a second build, or one after the function was edited, would silently get the module of the first.
    """
    own, path, modules = _OwnModules(base.resolve()), list(sys.path), set(sys.modules)
    sys.path.insert(0, str(own.folder))
    sys.meta_path.insert(sys.meta_path.index(PathFinder), own)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.meta_path.remove(own)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if own.holds(name, sys.modules[name]):
                del sys.modules[name]


class _OwnModules:
    """Finds a folder's own modules; they are compiled from what their files say now.

    Bytecode that Python keeps counts as up to date where the file has the same size and the same second: an edit
    from 0.5 to 0.6 would run as 0.5, under the fingerprint of 0.6.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, name: str) -> tuple[Path, Path]:
        """Where the module may lie: not simply below the folder, that may be a whole environment."""
        place = self.folder.joinpath(*name.split("."))
        return place / "__init__.py", place.with_name(f"{place.name}.py")

    def holds(self, name: str, module: Any) -> bool:
        """Whether a module was found here; of a package without a file, whether a part of it was."""
        package, _ = files = self.files(name)
        if (file := getattr(module, "__file__", None)) is not None:
            return Path(file) in files
        return str(package.parent) in getattr(module, "__path__", ())

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """The module's spec; None, and the other finders go on, where the folder has no such file."""
        package, module = self.files(name)
        if path is not None and str(module.parent) not in path:  # of a package that lies elsewhere
            return None
        for file in (package, module):
            if file.is_file():
                return spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
        return None


class _FromSource(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def finite(value: float) -> float:
    """The number; NaN where it is infinite or too large for a float."""
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
