"""What a causal language model thinks of given tokens, without ever holding [tokens, vocabulary] in float32.

Owns: log-probabilities, entropy and KL of single tokens, for any causal LM of transformers (PEFT, DDP, FSDP2 around it
or not), and their sums over samples. Must not know: losses, methods, where the tokens come from.

How: `train.head` calls the wrapped model with another head, which takes the positions before targets a chunk at a time,
computes what is wanted of their logits and forgets them. The backward pass computes each chunk again.

Packed rows (several samples in one row) are kept apart by transformers where `position_ids` start anew with each
sample, `attention_mask` is absent, and no cache is made. The first two are asked of the caller and checked, the third
is seen to here. Not every architecture obeys: `keeps_samples_apart(model)` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from train.head import ToLogits, attribute, with_head

CHUNK = 256  # tokens whose logits live at once: 256 · 150,000 · 4 bytes = 154 MB, held two to five times

Measure = Literal["logps", "entropy", "kl", "values"]
Reference = nn.Module | Callable[[], AbstractContextManager[Any]]


def token_logps(
    model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Log π(token | all before it in its sample) at targets, 0 elsewhere.   [b, t], nats, with gradient.

    For `batch` and errors see `token_values`.
    """
    return token_values(model, batch, ("logps",), temperature=temperature, chunk=chunk)["logps"]


def token_entropy(
    model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """H = -Σ_v π(v) log π(v) of the distribution that each target was drawn from, 0 elsewhere.   [b, t], nats."""
    return token_values(model, batch, ("entropy",), temperature=temperature, chunk=chunk)["entropy"]


def token_kl(
    model: nn.Module,
    reference: Reference,
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """KL(π_θ ‖ π_ref) = Σ_v π_θ(v) log(π_θ(v)/π_ref(v)) over the whole vocabulary, exact.   [b, t], nats, ≥ 0.

    At targets, 0 elsewhere. Gradient through π_θ only. For `reference`, `batch` and errors see `token_values`.
    """
    return token_values(model, batch, ("kl",), reference=reference, temperature=temperature, chunk=chunk)["kl"]


def token_values(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    of: Sequence[Measure],
    *,
    reference: Reference | None = None,
    value_head: nn.Module | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> dict[Measure, Tensor]:
    """Several measures of the same tokens, for the price of one forward pass of the model.

    Args:
        model: a causal LM of transformers, or anything around one that is called like it.
        batch: `input_ids` [b, t]; `loss_mask` [b, t] bool, True where the token is a target: it is predicted from the
            position before it, so a sample's first token never is one; optionally `attention_mask` ([b, t], or 4-D:
            bool, True = may see, or as the attention implementation wants it) and `position_ids` [b, t]. Where
            positions are missing and padding is on the left they are counted along the mask, so that padding changes
            nothing, on either side. For packed rows give `position_ids` that start anew and no `attention_mask`. Other
            keys are ignored.
        of: which measures: "logps", "entropy", "kl", "values".
        reference: π_ref of "kl": another model, or a callable that returns a context in which `model` itself is the
            reference, such as `AdapterOff(model)`. Dropout is off in `AdapterOff`, else the caller's to switch off. If
            it is sharded by FSDP2, its root must not be resharded after forward (torch's default).
        value_head: of "values": V of the state before each target, [n, d] -> [n, 1], of the last hidden state there, in
            the head's own type. It is trained together with what is below it.
        temperature: logits are divided by it, those of the reference too.
        chunk: tokens whose logits are held at once.

    Returns:
        A [b, t] tensor for each measure, 0 where there is no target; float32 (float64 for a float64 model). With no
        target at all everything is 0, with a graph, so that distributed training does not hang.

    Raises:
        ValueError: a target that nothing precedes; packed rows with a 2-D mask; temperature or chunk ≤ 0; "kl" without
            a reference; "values" without a head; a model without an output head.
    """
    _check(batch, of, reference, temperature, chunk)
    if ("values" in of) != (value_head is not None):
        raise ValueError("values and a value_head go together")
    of, wanted = [name for name in of if name != "values"], of
    target = batch["loss_mask"][:, 1:]
    tokens = batch["input_ids"][:, 1:][target]  # [n]
    to_reference = None
    if reference is not None and "kl" in of:
        to_reference = _reference_logps(model, reference, batch, target, temperature)

    def work(to_logits: ToLogits, hidden: Tensor) -> Tensor:
        def values(at: slice, rows: Tensor) -> Tensor:
            found = []
            if of:
                logq = None if to_reference is None else to_reference(at)
                found.append(_Measures.apply(to_logits(rows), logq, tokens[at], of, temperature))
            if value_head is not None:
                kind = next(value_head.parameters()).dtype
                found.append(value_head(rows.to(kind)).to(found[0].dtype if found else kind))
            return torch.cat(found, dim=-1)

        return _by_chunks(values, _before(target, hidden), chunk)

    found = with_head(model, batch, work)  # [n, len(of)]
    columns = dict(zip([*of, *(["values"] if value_head is not None else [])], found.unbind(-1), strict=True))
    mask = batch["loss_mask"]
    return {name: columns[name].new_zeros(mask.shape).masked_scatter(mask, columns[name]) for name in wanted}


def sequence_logps(
    logps: Tensor, mask: Tensor, segment: Tensor, n: int, *, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Σ or mean of log π over the masked tokens of each sample.   [b, t] three times -> [n], nats.

    `segment` [b, t] holds the sample's number 0 … n-1 (-1 = no sample), so samples may share rows or span them. A
    sample without a masked token gets 0.

    >>> sequence_logps(torch.tensor([[0.0, -1.0, -2.0, -4.0]]), torch.tensor([[False, True, True, True]]),
    ...                torch.tensor([[0, 0, 0, 1]]), 2).tolist()
    [-3.0, -4.0]

    Raises:
        ValueError: unlike shapes, or another reduction.
    """
    if not logps.shape == mask.shape == segment.shape or reduction not in ("sum", "mean"):
        raise ValueError(
            f"need three tensors of one shape, not {[*map(tuple, (logps.shape, mask.shape, segment.shape))]}, "
            f"and reduction sum or mean, not {reduction!r}"
        )
    counted = mask & (segment >= 0)
    index, values = segment[counted], logps[counted]
    sums = logps.new_zeros(n).index_add(0, index, values)
    if reduction == "sum":
        return sums
    return sums / logps.new_zeros(n).index_add(0, index, torch.ones_like(values)).clamp_min(1)


class AdapterOff:
    """A reference for `token_kl`: the same PEFT model as if the named adapters (default: all) were not there.

    It is in eval mode there: a reference has no dropout, of older adapters or of the base.

    For O-LoRA, name the new adapter only: then the reference is the base with the adapters of the older tasks.
    Preferred to PEFT's `disable_adapter`, which makes frozen adapters trainable when it ends, and takes 0.1 s a call on
    224 layers (measured, 0.21).

    Raises:
        ValueError: the model has no such adapter, or it is merged into the weights.
    """

    def __init__(self, model: nn.Module, *adapters: str) -> None:
        self._adapters = adapters
        self._modules = list(model.modules())
        self._layers: list[Any] = [m for m in self._modules if hasattr(m, "_active_adapter")]
        active = {name for layer in self._layers for name in layer.active_adapters}
        if not active or not active.issuperset(adapters):
            raise ValueError(
                f"no active adapter {', '.join(adapters) or 'at all'} in the model; it has {sorted(active)}"
            )
        if any(getattr(layer, "merged", False) for layer in self._layers):
            raise ValueError("the adapter is merged into the weights: call unmerge_adapter() first")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the adapters and all dropout are off."""
        training = [m for m in self._modules if m.training]  # not by eval() and train(): thousands of modules, often
        off = {
            layer: [a for a in layer.active_adapters if self._adapters and a not in self._adapters]
            for layer in self._layers
        }
        with ExitStack() as stack:
            for layer, rest in off.items():
                stack.enter_context(attribute(layer, "_active_adapter", rest))
            for module in training:
                module.__dict__["training"] = False
            try:
                yield
            finally:
                for module in training:
                    module.__dict__["training"] = True


@torch.no_grad()
def keeps_samples_apart(model: nn.Module, rows: int = 1) -> bool:
    """Whether this model, as it is configured, keeps the samples of a packed row apart: four tiny forward passes.

    `rows`: packed rows of a batch; flash attention keeps samples apart where there is one row alone. Recurrent models
    carry their state over, and some architectures know no packing. Dropout must be off.
    """
    device = next(model.parameters()).device
    both = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [4, 3, 2, 1, 5, 6, 7, 8]], device=device)  # another first sample
    mask = torch.tensor([[False] * 5 + [True] * 3], device=device).expand(rows, -1)

    def changes(positions: Tensor) -> float:
        batch = {"position_ids": positions.expand(rows, -1), "loss_mask": mask}
        one, other = (token_logps(model, {"input_ids": row.expand(rows, -1), **batch}) for row in both)
        return (one - other).abs().max().item()

    packed, joined = changes(torch.arange(4, device=device).repeat(2)), changes(torch.arange(8, device=device))
    return packed < 0.01 * joined  # not 0: mixtures of experts compute other groups of tokens, and round differently


# ---- the reference, and the positions that count --------------------------------------------------------------------


def _before(target: Tensor, hidden: Tensor) -> Tensor:
    """Hidden states at the positions before targets.   target [b, t-1], hidden [b, t, d] -> [n, d].

    Counted from the end, for prompt tuning puts positions of its own in front.
    """
    return hidden[:, -target.shape[1] - 1 : -1][target]


@torch.no_grad()
def _reference_logps(
    model: nn.Module, reference: Reference, batch: Mapping[str, Tensor], target: Tensor, temperature: float
) -> Callable[[slice], Tensor]:
    """Runs the decoder of the reference once; what comes back makes log π_ref at some of the targets, [n, v]."""
    other, inside = (reference, nullcontext) if isinstance(reference, nn.Module) else (model, reference)
    kept: list[tuple[ToLogits, Tensor]] = []

    def work(to_logits: ToLogits, hidden: Tensor) -> Tensor:
        kept.append((to_logits, _before(target, hidden)))
        return hidden.new_zeros(())

    with inside():
        with_head(other, batch, work)
    torch.clear_autocast_cache()  # older torch would hand weights that were cast without a graph to the policy
    to_logits, rows = kept[-1]

    def logps(at: slice) -> Tensor:
        with torch.no_grad(), inside():
            return _log_softmax(to_logits(rows[at]), temperature)

    return logps


# ---- a chunk at a time ----------------------------------------------------------------------------------------------


def _by_chunks(values: Callable[[slice, Tensor], Tensor], rows: Tensor, chunk: int) -> Tensor:
    """values(at, rows[at]) -> [n_at, k] for chunks of the rows [n, d], one behind the other: [n, k], differentiable."""
    now, leaves = _Now(rows), list[Tensor]()
    if torch.is_grad_enabled():  # one row tells which parameters take part: head, its LoRA, tied embeddings, a scale …
        with now.again():
            leaves = list(_leaves(values(slice(0, 1), rows[:1].detach())))
    return _Chunked.apply(values, chunk, now, rows, *leaves)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The trainable leaves that a tensor was computed from."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


class _Chunked(torch.autograd.Function):
    """Like torch.utils.checkpoint on each chunk, but gradients of parameters add up over chunks in float32.

    The leaves are arguments only so that autograd, and with it DDP and FSDP2, sees that they take part.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Callable[[slice, Tensor], Tensor], chunk: int, now: _Now, rows: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.values, ctx.chunk, ctx.then = values, chunk, now
        ctx.save_for_backward(rows, *leaves)
        return torch.cat([values(at, rows[at]) for at in _slices(len(rows), chunk)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *leaves = ctx.saved_tensors
        sums: list[Tensor | None] = [None] * len(leaves)
        of_rows = torch.zeros_like(rows)
        with ctx.then.again(), torch.enable_grad():
            for at in _slices(len(rows), ctx.chunk):
                piece = rows[at].detach().requires_grad_()
                found = torch.autograd.grad(
                    ctx.values(at, piece), [piece, *leaves], gradients[0][at], allow_unused=True
                )
                of_rows[at] = found[0]
                sums = [_add(total, more) for total, more in zip(sums, found[1:], strict=True)]
        given = [None if s is None else s.to(leaf.dtype) for s, leaf in zip(sums, leaves, strict=True)]
        return None, None, None, of_rows, *given


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    if total is None:
        return more.to(torch.promote_types(more.dtype, torch.float32), copy=True)  # two leaves may share a gradient
    return total.add_(more)


def _slices(n: int, chunk: int) -> list[slice]:
    """At least one, for without any target the graph must still lead to every parameter."""
    return [slice(i, min(i + chunk, n)) for i in range(0, max(n, 1), chunk)]


class _Now:
    """Autocast and random numbers as they are now, for another time (LoRA on the head may have dropout)."""

    def __init__(self, rows: Tensor) -> None:
        kind = self._kind = rows.device.type
        self._autocast: dict[str, Any] = {
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        self._cpu, (self._devices, self._states) = torch.get_rng_state(), get_device_states(rows)

    @contextmanager
    def again(self) -> Iterator[None]:
        forked = {} if self._kind == "cpu" else {"device_type": self._kind}
        with torch.random.fork_rng(self._devices, **forked), torch.autocast(self._kind, **self._autocast):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, device_type=self._kind)
            yield


# ---- one chunk ------------------------------------------------------------------------------------------------------


class _Measures(torch.autograd.Function):
    """Measures of some targets from their logits.   [n, v], log π_ref [n, v] or None, [n] -> [n, len(of)].

    With the gradient ∂f/∂z_v = π_v · s_v (+ 1 at the target itself for log π) in closed form, which takes half of the
    memory that autograd would.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, logq: Tensor | None, tokens: Tensor, of: Sequence[Measure], temperature: float
    ) -> Tensor:
        logp = _log_softmax(logits, temperature)
        found = torch.stack([_VALUES[name](logp, logq, tokens) for name in of], dim=-1)
        ctx.save_for_backward(logp, logq, tokens, found)
        ctx.of, ctx.temperature, ctx.dtype = of, temperature, logits.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logp, logq, tokens, found = ctx.saved_tensors
        columns = zip(ctx.of, found.split(1, -1), gradients[0].split(1, -1), strict=True)
        slope = reduce(torch.add, [_SLOPES[name](logp, logq, value).mul_(g) for name, value, g in columns])
        p = logp.exp_()  # in its place: it served for the last time
        if slope.shape == p.shape:
            slope.masked_fill_(p == 0, 0)  # excluded tokens
        onward = p.mul_(slope)
        if "logps" in ctx.of:
            onward.scatter_add_(-1, tokens[:, None], gradients[0][:, ctx.of.index("logps"), None])
        return onward.div_(ctx.temperature).to(ctx.dtype), None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        wide = wide / temperature
    return torch.log_softmax(wide, dim=-1)


def _expected(logp: Tensor, of: Tensor) -> Tensor:
    """Σ_v π(v) of(v), in the place of `of`; a token that the model excludes (logit -inf) adds 0, not 0 · ∞."""
    p = logp.exp()
    return of.masked_fill_(p == 0, 0).mul_(p).sum(-1)


_VALUES: dict[Measure, Callable[..., Tensor]] = {
    "logps": lambda logp, _, tokens: logp.gather(-1, tokens[:, None]).squeeze(-1),
    "entropy": lambda logp, *_: _expected(logp, -logp),
    "kl": lambda logp, logq, _: _expected(logp, logp - logq),
}
_SLOPES: dict[Measure, Callable[..., Tensor]] = {  # s of the measure f, [n, v] or [n, 1]
    "logps": lambda logp, _, f: -torch.ones_like(f),
    "entropy": lambda logp, _, f: (-logp).sub_(f),
    "kl": lambda logp, logq, f: (logp - logq).sub_(f),
}


# ---- what a batch must be -------------------------------------------------------------------------------------------


def _check(
    batch: Mapping[str, Tensor], of: Sequence[Measure], reference: Reference | None, temperature: float, chunk: int
) -> None:
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature must be positive and chunk at least 1, not {temperature} and {chunk}")
    if not of or not {*_VALUES, "values"} >= set(of) or len(set(of)) < len(of):
        raise ValueError(f"measures are {', '.join(_VALUES)}, values, each at most once, not {list(of)}")
    if "kl" in of and reference is None:
        raise ValueError("kl needs a reference: a model, or AdapterOff(model)")
    ids, mask = batch["input_ids"], batch["loss_mask"]
    if ids.dim() != 2 or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"input_ids must be [b, t] and loss_mask bool of the same shape, not {tuple(ids.shape)} and "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    attention = batch.get("attention_mask")
    if attention is None or attention.dim() == 2:  # a 4-D mask says itself what precedes what
        _check_starts(mask, attention, batch.get("position_ids"))


def _check_starts(mask: Tensor, attention: Tensor | None, positions: Tensor | None) -> None:
    """No target may be the first token of its sample, and packing must be packing that transformers recognises."""
    nothing = torch.zeros_like(mask)
    nothing[:, :1] = True
    if positions is not None:
        nothing[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
    if attention is not None:
        both = attention[:, 1:].bool() & attention[:, :-1].bool()
        if bool((nothing[:, 1:] & both).any()):
            raise ValueError("position_ids start anew inside a row: packed rows need attention_mask absent")
        nothing[:, 1:] |= ~attention[:, :-1].bool()
    wrong = (nothing & mask).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(f"loss_mask[{row}, {column}] is a target, but nothing in its sample precedes that token")
