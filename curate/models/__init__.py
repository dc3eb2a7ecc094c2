"""Models that measure: the only place of `curate` that touches torch or a server."""

from __future__ import annotations

from pathlib import Path

from curate.config import EmbedConfig, ModelConfig, RewardConfig
from curate.models.base import Completion, Generator, Prompt, Reward, Sampling, Scorer
from curate.models.embedder import Embedder, open_embedder
from curate.models.function import open_function
from curate.models.local import LocalModel
from curate.models.reward import open_reward
from curate.models.server import ServerModel

__all__ = [
    "Completion",
    "EmbedConfig",
    "Embedder",
    "Generator",
    "LocalModel",
    "ModelConfig",
    "Prompt",
    "Reward",
    "RewardConfig",
    "Sampling",
    "Scorer",
    "ServerModel",
    "open_embedder",
    "open_function",
    "open_generator",
    "open_reward",
]


def open_generator(
    config: ModelConfig, base: Path = Path(), where: str = "policy.model", requests: Path | None = None
) -> Generator:
    """The language model that a configuration asks for.

    Args:
        config: which model.
        base: what a relative folder is relative to.
        where: the configuration key that errors name.
        requests: where answers of a server are kept, so that none is paid for twice.

    Raises:
        InputError: the model cannot be used (before it is asked anything).
    """
    if config.backend == "api":
        return ServerModel(config, requests)
    return LocalModel(config, base, where)
