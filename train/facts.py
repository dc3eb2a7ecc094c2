"""What a run says of itself in `run.json`, and by which of it a later run tells that it is the same one.

Knows settings and the files that they name; nothing of models, data or training. No secret is written down.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from curate.manifest.io import sha256_file
from curate.manifest.schema import content_hash
from curate.models.weights import weights_hash
from train import parallel
from train.config import CppoConfig, RunConfig
from train.folder import FACTS

PACKAGES = ("torch", "transformers", "peft", "accelerate", "rehearse")
HOUSEKEEPING = (
    "save_dtype",
    "merge",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "logging_steps",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "log_level",
)  # may differ when a run goes on


def facts_of(name: str, config: RunConfig, theirs: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """Method, settings, hashes of all that is read, processes, git state and versions."""
    folders = [*config.data, *config.eval_data]
    data = {folder: sha256_file(config.path(folder) / "provenance.json") for folder in folders}
    kept = {"out", "resume", "base"}  # where, not what
    return {
        "method": name,
        "settings": {key: value for key, value in config.model_dump().items() if key not in kept},
        "training": {**{key: "…" if _secret(key) else value for key, value in theirs.items()},
                     "num_train_epochs": theirs.get("num_train_epochs", 3.0), "seed": arguments.seed,
                     "max_steps": arguments.max_steps, **_processes(arguments)},
        "data": data,
        "inputs": _inputs(config),
        "git": _git(),
        "packages": {package: version(package) for package in PACKAGES},
    }  # fmt: skip


def identity_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """The method, and a hash of all that decides what is learnt."""
    decides = {k: v for kind in ("settings", "training") for k, v in facts[kind].items() if k not in HOUSEKEEPING}
    return {"method": facts["method"], "settings": content_hash([decides, facts["data"], facts["inputs"]])}


def read_by(config: RunConfig) -> list[Path]:
    """Everything that a run reads."""
    kl, ewc, o_lora = (getattr(config, key, None) for key in ("kl", "ewc", "o_lora"))
    rl = (config.retention.model, config.value.model, config.value.head) if isinstance(config, CppoConfig) else ()
    names = [config.model, config.init, config.tokenizer, *config.data, *config.eval_data, kl and kl.reference, *rl,
             *(ewc.fisher if ewc else ()), *(o_lora.previous if o_lora else ()),
             *getattr(config, "buffers", ())]  # fmt: skip
    return [config.path(name) for name in names if name]


def _secret(key: str) -> bool:
    """A key whose value must not be written down: hub_token, push_to_hub_token, …"""
    return key.endswith("_token") or any(part in key for part in ("secret", "password", "api_key"))


def _inputs(config: RunConfig) -> dict[str, str]:
    """Hashes of the weights that a run begins with or is held by, by path; a hub model is named in `settings`."""
    data = {config.path(name) for name in (*config.data, *config.eval_data)}
    found = [path for path in read_by(config) if path not in data and path.exists()]
    return {str(path): weights_hash(path) if path.is_dir() else sha256_file(path) for path in found}


def _processes(arguments: Any) -> dict[str, Any]:
    """Which rows a step has, and what a checkpoint looks like, depends on them."""
    if arguments.world_size == 1:
        return {}
    return {"processes": arguments.world_size, "sharded": parallel.sharded(arguments)}


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether it has changes; None outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": head.stdout.strip(), "changes": bool(dirty.stdout.strip())}


def write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    """run.json, whole or as it was."""
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n"
    temporary = out / f".{FACTS}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out / FACTS)
