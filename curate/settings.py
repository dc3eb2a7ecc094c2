"""Settings from a YAML file and `dotted.path=value` words, checked against a pydantic model with errors that teach.

Common ground of `curate` and `train`, like `errors.py`: it knows neither a build nor a training run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from curate.errors import InputError

FUNCTION = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
"""`package.module:function`, where a user names one."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Section)


def read_settings(
    model: type[Settings],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    start: str = "",
    exclusive: Sequence[Sequence[str]] = (),
) -> Settings:
    """The settings of a YAML file with overrides (values are YAML; lists are indexed by number).

    Args:
        model: what they are checked against; its field `base` gets the file's folder.
        path: the file.
        overrides: words `dotted.path=value`.
        start: how one gets a first file, for the error where there is none.
        exclusive: groups of dotted paths of which an override replaces the others.

    Raises:
        InputError: the file or a word cannot be used; every fault is listed with its dotted path.
    """
    data = read_yaml(path, start)
    for word in overrides:
        override(data, word, exclusive)
    return checked(model, {**data, "base": str(Path(path).parent)}, where=str(path))


class _Once(yaml.SafeLoader):
    """The safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys stand once."""
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value!r} stands twice, in line {key.start_mark.line + 1}")
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(path: str | Path, start: str = "") -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        InputError: there is no such file, or it holds anything else.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", remedy=start) from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a config file", remedy=start.replace("FOLDER", str(path))) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {str(error)[:500]}") from None
    except OSError as error:
        raise InputError(f"{str(path)[:200]}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: the config must be a mapping of keys, not {type(data).__name__}")
    return data


def checked(model: type[Settings], data: dict[str, Any], where: str = "config") -> Settings:
    """Validate a mapping; every fault is listed with its dotted path.

    Raises:
        InputError: it does not fit the model.
    """
    try:
        if "\0" in json.dumps(data, ensure_ascii=False, default=str).encode().decode().replace("\\u0000", "\0"):
            raise InputError(f"{where}: a value holds the character NUL")
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise InputError(f"{where}: " + "; ".join([*lines[:10], *more])) from None
    except (UnicodeEncodeError, RecursionError) as error:
        raise InputError(f"{where}: a value is not valid text: {error}") from None


def override(data: dict[str, Any], word: str, exclusive: Sequence[Sequence[str]] = ()) -> None:
    """Set one `dotted.path=value` of a nested mapping in place.

    Raises:
        InputError: the word has no value, or its path leads nowhere.
    """
    dotted, _, text = word.partition("=")
    if not text.strip():
        raise InputError(f"{word}: there is no value behind the =", remedy="write null for the default")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{word[:200]}: the value is not valid YAML: {str(error)[:500]}") from None
    *parents, last = dotted.split(".")
    node: Any = data
    for key in parents:
        node = _child(node, key, word)
    if isinstance(node, list):
        _child(node, last, word)
        node[int(last)] = value
    elif isinstance(node, dict):
        for other in (name for group in exclusive if dotted in group for name in group):
            node.pop(other.rpartition(".")[2], None)
        node[last] = value
    else:
        raise InputError(f"{word}: {'.'.join(parents)} is a single value and has no key {last!r}")


def _child(node: Any, key: str, word: str) -> Any:
    if isinstance(node, list):
        if not (key.isascii() and key.isdecimal()) or int(key) >= len(node):
            raise InputError(f"{word}: {key!r} is not a place in a list of {len(node)} (the first is 0)")
        return node[int(key)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise InputError(f"{word}: a single value has no key {key!r}")


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One validation error as a sentence, with the nearest known key for an unknown one."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        near = _nearest(error["loc"], known, model)
        return f"unknown key {place!r}{near}{'' if near.endswith('?') else '.'} Known here: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        keys = _keys_at(model, error["loc"])
        message = f"a section with keys of its own is wanted ({', '.join(keys)}), as in {place}.{keys[0]}=VALUE"
    given = error.get("input")
    if place.endswith("api_key_env"):
        return f"{place}: give the NAME of an environment variable; what was given is not shown, it may be a key"
    plain = isinstance(given, str | int | float | bool) and "://" not in str(given)  # a URL may hold a secret
    shown = f" (given: {repr(given)[:100]})" if plain else ""
    return f"{place}: {message}{shown}" if place else message


def _nearest(location: Sequence[str | int], known: list[str], model: type[BaseModel]) -> str:
    """The nearest key in the same section, else one of that name in another section."""
    key = str(location[-1])
    prefix = "".join(f"{part}." for part in location[:-1])
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"; did you mean {prefix + near[0]!r}?"
    for section in model.model_fields if not prefix else ():
        if key in (inside := _keys_at(model, [section])) and inside != known:
            return f"; did you mean {section + '.' + key!r}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"; the nearest is {prefix + near[0]!r}" if near else ""


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        if part not in model.model_fields:  # the number of an item, or a kind of a union
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return [name for name in model.model_fields if name != "base"]
