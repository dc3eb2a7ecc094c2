"""One model on several processes: what launchers (torchrun, accelerate) ask for, and what a run does not do under it.

FSDP2 is asked for by accelerate's environment or by TrainingArguments' `fsdp`. Must not know: methods, losses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from accelerate import DistributedType, PartialState  # type: ignore[import-untyped]
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import strtobool

from curate.errors import InputError

Found = TypeVar("Found")


def sharded(arguments: Any) -> bool:
    """Whether FSDP is asked for."""
    return bool(arguments.fsdp) or _told("ACCELERATE_USE_FSDP")


def zero3(arguments: Any) -> bool:
    """Whether DeepSpeed is asked to shard the parameters."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def load_whole(arguments: Any) -> None:
    """Models are loaded whole in each process, also where ZeRO-3 shards the policy later on, as FSDP2 does.

    transformers would give every model of the process a share of its weights, whatever `zero3_init_flag` says: also a
    reference or a reward, which no engine gathers.
    """
    if zero3(arguments):
        unset_hf_deepspeed_config()


def check_installed(keys: Mapping[str, Any]) -> None:
    """TrainingArguments' own words for it are hard to read.

    Raises:
        InputError: DeepSpeed is asked for and not there.
    """
    if (keys.get("deepspeed") or _told("ACCELERATE_USE_DEEPSPEED")) and find_spec("deepspeed") is None:
        raise InputError("deepspeed is asked for, but not installed",
                         remedy="pip install deepspeed, or use FSDP2: examples/accelerate/fsdp2.yaml")  # fmt: skip


def check(arguments: Any) -> None:
    """What a sharded run needs.

    Raises:
        InputError: FSDP 1, one process alone, or weights that only the first process would load.
    """
    if not sharded(arguments):
        return
    version = arguments.fsdp_config.get("version", 2) if arguments.fsdp else os.environ.get("FSDP_VERSION", "1")
    if int(version) != 2:
        raise InputError("FSDP 1 is not supported", remedy="set fsdp_version: 2")
    if arguments.world_size < 2:
        raise InputError("FSDP needs several processes, and this is one alone",
                         remedy="start with `accelerate launch --num_processes N …`, or leave fsdp out")  # fmt: skip
    if _told("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise InputError("fsdp_cpu_ram_efficient_loading: only the first process would have weights before the start, "
                         "but each one needs them",
                         remedy="set fsdp_cpu_ram_efficient_loading: false")  # fmt: skip


@contextmanager
def shards_on_cpus(arguments: Any) -> Iterator[None]:
    """While accelerate is set up: FSDP on CPU processes, where it would fall back to DDP without a word."""
    state = PartialState()
    before, pretended = state.distributed_type, DistributedType.MULTI_GPU  # it shards on accelerators only
    if sharded(arguments) and before == DistributedType.MULTI_CPU:
        state.distributed_type = pretended
    try:
        yield
    finally:
        if state.distributed_type == pretended:
            state.distributed_type = before


class Whole:
    """Parameters of a sharded model as if they were not: each is gathered when it is asked for, with its gradient.

    Taken before the first forward pass, which leaves some modules gathered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of the parameters that are trained."""
        for name, p in self._trained.items():
            yield name, p.full_tensor() if isinstance(p, DTensor) else p


def together(work: Callable[[], Found]) -> list[Found]:
    """What `work` gives in each process, in their order; it must fit into the memory of each.

    Raises:
        InputError: of the first process where it is raised, in all of them: none waits for another that has stopped.
    """
    try:
        own: tuple[Any, str | None] = (work(), None)
    except InputError as error:
        if not distributed.is_initialized():
            raise
        own = (None, str(error))
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [own[0]]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    for _, said in every:
        if said is not None:
            raise InputError(said)
    return [found for found, _ in every]


def share(n: int) -> slice:
    """Which of n things are this process's: shares of like size, in order."""
    if not distributed.is_initialized():
        return slice(0, n)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return slice(rank * n // world, (rank + 1) * n // world)


def first() -> bool:
    """Whether this is the process that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def compile_layers(model: nn.Module, backend: str | None, mode: str | None) -> None:
    """Compile each layer of the decoder in its place: the head is another in every call (see train.logprobs)."""
    how: Mapping[str, Any] = {"backend": backend or "inductor", "mode": mode}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(**how)


def _told(name: str) -> bool:
    return bool(strtobool(os.environ.get(name, "false")))
