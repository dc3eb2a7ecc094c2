"""The model of a run: loaded or made from random weights, with its adapters; safetensors only, no remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curate.errors import InputError
from curate.models.weights import model_folder, quiet
from train.config import OLoraConfig, RunConfig
from train.methods.cft import Fisher


def open_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of a run."""
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    assert name is not None
    folder = config.path(name)
    if not folder.is_dir():
        folder, _ = model_folder(name, Path(config.base), "tokenizer" if config.tokenizer else "model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken file raises, the tokenizer cannot be used
        raise InputError(f"tokenizer {name!r} cannot be loaded: {str(error)[:500]}") from None


def end_tokens(config: RunConfig, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's files name (Gemma's `<end_of_turn>`)."""
    from transformers import AutoConfig, GenerationConfig

    found = [tokenizer.eos_token_id]
    if config.model is not None:
        folder, _ = model_folder(str(config.path(config.model)), Path(config.base), "model")
        for kind in (AutoConfig, GenerationConfig):
            try:
                named = kind.from_pretrained(folder, local_files_only=True).eos_token_id
            except (OSError, ValueError, AttributeError):  # no such file, or a config that open_model will tell of
                continue
            found += named if isinstance(named, list) else [named]
    return {token for token in found if token is not None}


def open_model(config: RunConfig, name: str | None = None, where: str = "model") -> Any:
    """A causal language model with its weights, or with random ones of the run's seed where `init` is given.

    Raises:
        InputError: no such model, or weights that are not safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    frozen = config.lora is not None or where != "model"  # a reference takes no steps
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and frozen and torch.cuda.is_available())
    how: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32}
    if config.attention:
        how["attn_implementation"] = config.attention
    name = name or config.model
    try:
        if name is None:
            file = config.path(str(config.init))
            settings = AutoConfig.for_model(**json.loads(file.read_bytes()))
            return AutoModelForCausalLM.from_config(settings, **how)
        folder, _ = model_folder(str(config.path(name)), Path(config.base), where)
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, **how)
    except InputError:
        raise
    except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
        raise InputError(f"{where} {name or config.init!r} cannot be loaded: {str(error)[:500]}") from None


def with_adapter(model: Any, config: RunConfig, old: OLoraConfig | None = None) -> tuple[Any, dict[str, list[Tensor]]]:
    """(the model with a fresh LoRA adapter, the frozen A matrices of older ones by the new parameter's name).

    Older adapters stay on the model, frozen, so that it starts as the sum of what they learned (O-LoRA).
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", **(config.lora or {}))
    found: Any = get_peft_model(model, settings)
    if old is None:
        return found, {}
    names = []
    for number, folder in enumerate(old.previous):
        path = config.path(folder)
        if not (path / "adapter_model.safetensors").is_file():
            raise InputError(f"o_lora.previous {folder}: no adapter_model.safetensors", remedy="name an adapter folder")
        found.load_adapter(str(path), adapter_name=f"old{number}", is_trainable=False)
        names.append(f"old{number}")
    found.base_model.set_adapter(["default", *names])
    every = dict(found.named_parameters())
    frozen: dict[str, list[Tensor]] = {}
    for name, parameter in every.items():
        parameter.requires_grad_(".default." in name)  # set_adapter makes all active ones trainable
        if ".lora_A.default." in name:
            olds = (every.get(name.replace(".default.", f".{o}.")) for o in names)
            frozen[name] = [o.detach().clone() for o in olds if o is not None]
    return found, frozen


def read_fisher(folder: Path) -> Fisher:
    """What `train fisher` wrote.

    Raises:
        InputError: no Fisher folder.
    """
    from safetensors.torch import load_file

    try:
        return Fisher(load_file(folder / "fisher.safetensors"), load_file(folder / "anchor.safetensors"))
    except (OSError, ValueError) as error:
        raise InputError(f"ewc.fisher {folder}: not a Fisher folder: {error}",
                         remedy="`train fisher model=CHECKPOINT data=RUN out=FOLDER` writes one") from None  # fmt: skip
