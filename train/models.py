"""The model of a run: loaded or made from random weights, with its adapters; safetensors only, no remote code."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from curate.errors import InputError
from curate.manifest.io import sha256_file
from curate.models.weights import load_causal, model_folder, quiet, stack, tokenizer_folder
from train.config import OLoraConfig, RunConfig
from train.methods.ewc import Fisher, plain_name

ADAPTER = "adapter_model.safetensors"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # else it asks, and runs at a "y"
HOLDS = "holds"  # metadata of it: hashes of older adapters' files that are part of this one


def open_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a run."""
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    assert name is not None
    folder = config.path(name)
    if not folder.is_dir():
        folder, _ = model_folder(name, Path(config.base), "tokenizer" if config.tokenizer else "model")
    folder = tokenizer_folder(folder, "model")
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # whatever a broken file raises, the tokenizer cannot be used
        raise InputError(f"tokenizer {name!r} cannot be loaded: {str(error)[:500]}") from None


def end_tokens(config: RunConfig, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's files name (Gemma's `<end_of_turn>`)."""
    from transformers import AutoConfig, GenerationConfig

    found = [tokenizer.eos_token_id]
    if config.model is not None:
        folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
        whole = stack(folder, "model")[0]
        for kind in (AutoConfig, GenerationConfig):
            try:
                named = kind.from_pretrained(whole, **LOCAL).eos_token_id
            except (OSError, ValueError, AttributeError):  # no such file, or a config that open_model will tell of
                continue
            found += named if isinstance(named, list) else [named]
    return {token for token in found if token is not None}


def open_model(config: RunConfig, name: str | None = None, where: str = "model") -> Any:
    """A causal language model with its weights, or with random ones of the run's seed where `init` is given.

    An adapter's folder gives its base with the adapter merged.

    Raises:
        InputError: no such model, or weights that are not safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    frozen = config.lora is not None or where not in ("model", "value.model")  # a reference takes no steps
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and frozen and torch.cuda.is_available())
    how: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32}
    if config.attention:
        if config.attention == "flex_attention" and not torch.cuda.is_available():
            raise InputError("attention: flex_attention has no backward pass without a GPU", remedy="attention=sdpa")
        how["attn_implementation"] = config.attention
    name = name or config.model
    try:
        if name is None:
            file = config.path(str(config.init))
            settings = AutoConfig.for_model(**json.loads(file.read_bytes()))
            return AutoModelForCausalLM.from_config(settings, **how)
        folder, _ = model_folder(str(config.path(name)), Path(config.base), where)
        return load_causal(folder, f"{where} {name!r}", **how)
    except InputError:
        raise
    except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
        raise InputError(f"{where} {name or config.init!r} cannot be loaded: {str(error)[:500]}") from None


def check_vocabulary(model: Any, tokenizer: Any, where: str) -> None:
    """Whether the model has an embedding for every token.

    Raises:
        InputError: it has fewer.
    """
    have, need = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if need > have:
        raise InputError(f"{where}: the tokenizer has {need:,} tokens, the model embeddings for {have:,}",
                         remedy="name the tokenizer that belongs to this model")  # fmt: skip


def with_adapter(model: Any, config: RunConfig, old: OLoraConfig | None = None) -> tuple[Any, dict[str, list[Tensor]]]:
    """(the model with a fresh LoRA adapter, the frozen A matrices of older ones by the new parameter's name).

    Older adapters stay on the model, frozen, so that it starts as the sum of what they learned (O-LoRA).

    Raises:
        InputError: what PEFT or O-LoRA cannot do; an older adapter that is not of this model, counts twice, or shares
            no layer with the new one.
    """
    from peft import LoraConfig, get_peft_model

    try:
        settings = LoraConfig(task_type="CAUSAL_LM", **(config.lora or {}))
        if old is not None:
            _refuse_all_but_matrices(settings, "lora")
        found: Any = get_peft_model(model, settings)
    except InputError:
        raise
    except Exception as error:  # whatever PEFT objects to
        raise InputError(f"lora: {str(error)[:500]}") from None
    if old is None:
        return found, {}
    paths = [config.path(folder) for folder in old.previous]
    _refuse_twice(paths, config)
    names = [f"old{number}" for number in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        _load_old(found, path, name)
    found.base_model.set_adapter(["default", *names])
    every = dict(found.named_parameters())
    frozen: dict[str, list[Tensor]] = {}
    for name, parameter in every.items():
        parts = name.split(".")
        parameter.requires_grad_("default" in parts)  # set_adapter makes all active ones trainable
        if "default" in parts and ("lora_A" in parts or "lora_embedding_A" in parts):
            olds = (every.get(".".join(o if part == "default" else part for part in parts)) for o in names)
            frozen[name] = [o.detach().clone() for o in olds if o is not None]
    if not any(frozen.values()):
        raise InputError("o_lora.previous: no layer in common with the new adapter, so there is nothing to hold it off",
                         remedy="set lora.target_modules to layers of the older adapters")  # fmt: skip
    return found, frozen


_PLAIN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
          "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights",
          "inference_mode", "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path",
          "revision", "eva_config"}  # fmt: skip


def _refuse_all_but_matrices(settings: Any, where: str) -> None:
    """O-LoRA adds adapters up, and joins them in the end: that is defined for the matrices A and B alone."""
    from peft import LoraConfig

    if not isinstance(settings, LoraConfig):
        raise InputError(f"{where}: an adapter of type {settings.peft_type}, and O-LoRA is of LoRA adapters")
    usual = LoraConfig().to_dict()
    beyond = [k for k, v in settings.to_dict().items() if k not in _PLAIN and v != usual.get(k)]
    if settings.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):  # the others change the base
        beyond.append("init_lora_weights")
    if beyond:
        raise InputError(f"{where}: {beyond[0]} with `o_lora`, which adds up the matrices of adapters and nothing else",
                         remedy="plain LoRA: r, lora_alpha, lora_dropout, target_modules, …")  # fmt: skip


def _refuse_twice(paths: list[Path], config: RunConfig) -> None:
    """An adapter that O-LoRA wrote holds those before it, and a `model` may hold some."""
    from safetensors import safe_open

    below = []
    if config.model is not None:
        folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
        below = [part.resolve() for part in stack(folder, "model")]
    seen: dict[str, Path] = {}
    for path in paths:
        where = f"o_lora.previous {path}"
        if not (path / ADAPTER).is_file():
            raise InputError(f"{where}: no {ADAPTER}", remedy="name an adapter folder")
        if path.resolve() in below:
            raise InputError(f"{where}: `model` has it merged already", remedy="name the base as `model`")
        if any(path.glob(f"*/{ADAPTER}")):
            raise InputError(f"{where}: a checkpoint of several adapters",
                             remedy="name the folder `model` of the finished run, which is one adapter")  # fmt: skip
        try:
            with safe_open(path / ADAPTER, "pt") as file:
                held = (file.metadata() or {}).get(HOLDS, "").split()
        except Exception as error:  # whatever a broken file raises
            raise InputError(f"{where}: {str(error)[:500]}") from None
        for digest in (sha256_file(path / ADAPTER), *held):
            if digest in seen:
                raise InputError(f"o_lora.previous: {seen[digest]} and {path} hold the same adapter",
                                 remedy="name the newer one: what O-LoRA wrote holds all before it")  # fmt: skip
            seen[digest] = path


def _load_old(model: Any, path: Path, name: str) -> None:
    from peft import PeftConfig

    where = f"o_lora.previous {path}"
    try:
        _refuse_all_but_matrices(PeftConfig.from_pretrained(str(path)), where)
        loaded = model.load_adapter(str(path), adapter_name=name, is_trainable=False, torch_device="cpu")
    except InputError:
        raise
    except Exception as error:  # whatever PEFT objects to
        raise InputError(f"{where}: {str(error)[:500]}") from None
    if lost := sorted([*loaded.missing_keys, *loaded.unexpected_keys]):  # PEFT would only warn
        raise InputError(f"{where}: an adapter of another model: {lost[0]!r} has no counterpart")


@contextmanager
def adapters_kept(model: Any) -> Iterator[None]:
    """Afterwards the adapters that were on are on again, and what was trained is trained."""
    keys = ("active_adapter", "_active_adapter")
    on = [(m, k, m.__dict__[k]) for m in model.modules() for k in keys if k in m.__dict__]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for module, key, value in on:
        module.__dict__[key] = value
    for parameter, flag in trained:
        parameter.requires_grad_(flag)


def join_adapters(folder: Path, model: Any, previous: list[Path]) -> None:
    """Make the adapters that PEFT has saved (the new one on top, old ones in subfolders) one that is their sum.

    Σ_i s_i B_i A_i = [s_1 B_1, s_2 B_2, …] [A_1; A_2; …]. Scalings go to B: the rows of A stay what the next stage is
    to be orthogonal to. A layer that only some have is filled up with zeros, so that there is one rank.

    Args:
        folder: of the saved adapters.
        model: what they were saved from.
        previous: folders of the old adapters.
    """
    from peft import LoraConfig
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    layers, found = dict(model.named_modules()), defaultdict[str, list[Tensor]](list)
    for name in model.peft_config:
        for key, tensor in load_file((folder if name == "default" else folder / name) / ADAPTER).items():
            layer, lora, matrix = key.rpartition(".lora_")  # else a copy of the base's embeddings
            if lora:
                scaled = tensor.float() * layers[layer].scaling[name] if "B" in matrix else tensor
                found[key].append(scaled.to(tensor.dtype))
    rank = max(sum(t.shape[0] for t in ts) for key, ts in found.items() if "A" in key.rpartition(".lora_")[2])
    joined = {}
    for key, tensors in found.items():
        along = 0 if "A" in key.rpartition(".lora_")[2] else 1
        whole = torch.cat(tensors, along)
        missing = rank - whole.shape[along]
        shape = (missing, whole.shape[1]) if along == 0 else (whole.shape[0], missing)
        joined[key] = torch.cat([whole, whole.new_zeros(shape)], along).contiguous()
    settings = LoraConfig.from_pretrained(str(folder))
    names = sorted({key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in joined})
    holds = set()
    for path in previous:
        with safe_open(path / ADAPTER, "pt") as file:
            holds |= {sha256_file(path / ADAPTER), *(file.metadata() or {}).get(HOLDS, "").split()}
    save_file(joined, folder / ADAPTER, {"format": "pt", HOLDS: " ".join(sorted(holds))})
    settings = replace(settings, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={},
                       target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None,
                       init_lora_weights=True)  # fmt: skip
    settings.save_pretrained(str(folder))
    for name in set(model.peft_config) - {"default"}:
        shutil.rmtree(folder / name)


def context_of(config: RunConfig) -> int | None:
    """Positions that the model has; None where its config does not tell."""
    from transformers import AutoConfig

    try:
        if config.model is None:
            settings: Any = AutoConfig.for_model(**json.loads(config.path(str(config.init)).read_bytes()))
        else:
            folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
            settings = AutoConfig.from_pretrained(stack(folder, "model")[0], **LOCAL)
    except InputError:
        raise
    except Exception as error:  # whatever a broken file raises, the model cannot be used
        raise InputError(
            f"model {config.model or config.init!r}: its config cannot be read: {str(error)[:500]}"
        ) from None
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def read_fishers(folders: list[Path], model: Any = None) -> list[Fisher]:
    """`read_fisher` of each folder.

    Raises:
        InputError: as `read_fisher`; a folder is named twice, and would hold the weights twice as much.
    """
    known: dict[Path, Path] = {}
    for folder in folders:
        if (real := folder.resolve()) in known:
            raise InputError(f"ewc.fisher: {known[real]} and {folder} are the same folder", remedy="name it once")
        known[real] = folder
    return [read_fisher(folder, model) for folder in folders]


def read_fisher(folder: Path, model: Any = None) -> Fisher:
    """What `train fisher` wrote; with a model, that it is of this one.

    Raises:
        InputError: no Fisher folder, one that is not finite, or of other parameters than those that are trained.
    """
    from safetensors.torch import load_file

    try:
        found = Fisher(load_file(folder / "fisher.safetensors"), load_file(folder / "anchor.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"ewc.fisher {folder}: not a Fisher folder: {error}",
                         remedy="`train fisher model=CHECKPOINT data=RUN out=FOLDER` writes one") from None  # fmt: skip
    for kind, tensors in (("fisher", found.fisher), ("anchor", found.anchor)):
        if bad := next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
            raise InputError(f"ewc.fisher {folder}: {kind}.safetensors: {bad!r} holds NaN or infinity",
                             remedy="estimate it again with `train fisher`")  # fmt: skip
    if model is not None:
        mine = {plain_name(name): p.shape for name, p in model.named_parameters() if p.requires_grad}
        for kind, tensors in (("fisher", found.fisher), ("anchor", found.anchor)):
            theirs = {name: tensor.shape for name, tensor in tensors.items()}
            if wrong := sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)):
                raise InputError(
                    f"ewc.fisher {folder}: {kind}.safetensors is of another model: {wrong[0]!r} is "
                    f"{_shape(theirs, wrong[0])} there and {_shape(mine, wrong[0])} here ({len(wrong)} differ)",
                    remedy="estimate it with `train fisher` on a checkpoint of this architecture",
                )
    return found


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "not there"
