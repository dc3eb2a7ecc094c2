"""Peak memory and time of per-token log-probs, forward and backward, against the naive path, on the same batch.

    python benchmarks/logprobs.py [--vocabulary 150000] [--batch 4] [--length 512] [--hidden 256] [--device cpu]

Naive: `model(ids).logits.float().log_softmax(-1)` and a gather; for KL the dense formula with the logits of a second
model. Memory is what lives at the worst moment beside what lived before (so without weights, with their gradients):
on a CPU the storages of all tensors, seen by a dispatch mode, and beside them the growth of the process's resident set,
which also sees temporaries inside kernels; on a GPU the allocator's own peak. Time is the best of three runs, on a CPU
in seconds of the processor. Each path runs in its own process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from train.logprobs import CHUNK, token_kl, token_logps


class Live(TorchDispatchMode):
    """Bytes of all storages that were made inside and still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in old | self._known.keys():
                key, size = storage._cdata, storage.nbytes()
                self._known[key] = weakref.ref(storage, lambda _, k=key, s=size: self._gone(k, s))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def naive_logps(model: Any, batch: dict[str, Tensor], _: Any) -> Tensor:
    logps = model(batch["input_ids"], use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, batch["input_ids"][:, 1:, None]) * batch["loss_mask"][:, 1:, None]


def naive_kl(model: Any, batch: dict[str, Tensor], reference: Any) -> Tensor:
    with torch.no_grad():
        logq = reference(batch["input_ids"], use_cache=False).logits[:, :-1].float().log_softmax(-1)
    logp = model(batch["input_ids"], use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1) * batch["loss_mask"][:, 1:]


PATHS: dict[str, Callable[..., Tensor]] = {
    "log-probs, naive": naive_logps,
    "log-probs, ours": lambda model, batch, _: token_logps(model, batch),
    "KL, naive": naive_kl,
    "KL, ours": lambda model, batch, reference: token_kl(model, reference, batch),
}


def set_up(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Tensor]]:
    """Two models and a batch whose first quarter is prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    models = [LlamaForCausalLM(config).to(args.device, dtype) for _ in range(2)]
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, args.length // 4 :] = True
    return models[0], models[1], {"input_ids": ids, "loss_mask": mask}


def measure(name: str, dtype: torch.dtype, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Peak of live storages and growth of the process in MiB, seconds, and the value for comparison."""
    torch.set_num_threads(args.threads)
    model, reference, batch = set_up(args, dtype)

    def once() -> float:
        model.zero_grad(set_to_none=True)
        value = PATHS[name](model, batch, reference).sum()
        value.backward()
        return value.item()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = once()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    model.zero_grad(set_to_none=True)
    if args.device == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        peak = torch.cuda.max_memory_allocated() - start
    else:
        with Live() as live:
            once()
        peak = live.peak
    return peak / 2**20, grown, min(timed(once, args.device) for _ in range(3)), value


def timed(once: Callable[[], float], device: str) -> float:
    """Seconds; on a CPU those that the process got, for the machine may be shared."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    once()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 150_000), ("batch", 4), ("length", 512), ("hidden", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tokens = args.batch * (args.length - args.length // 4)
    print(
        f"{args.batch} × {args.length} tokens, {tokens} of them targets, vocabulary {args.vocabulary:,}, chunk {CHUNK}"
    )
    print("\n| | weights | peak MiB | of naive | resident MiB | of naive | seconds | value |\n" + "| --- " * 8 + "|")
    for dtype in (torch.float32, torch.bfloat16):
        base = (1.0, 1.0)
        for name in PATHS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, grown, seconds, value = pool.apply(measure, (name, dtype, args))
            base = (peak, grown) if name.endswith("naive") else base
            parts = [f"{x:,.0f} | {100 * x / y:.0f}%" for x, y in zip((peak, grown), base, strict=True)]
            cells = (name, str(dtype).removeprefix("torch."), *parts, f"{seconds:.1f}", f"{value:.1f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
