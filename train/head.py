"""One call of a causal language model in which something else takes the place of its output head.

Owns: how a model of transformers (PEFT, DDP, FSDP2 around it or not) is called so that [tokens, vocabulary] is never
made. Must not know: what is computed of the logits, losses, where the tokens come from.

How: the wrapped model is called as always, so that every hook of every wrapper fires; only its head is replaced, for
that call. What a model does to its logits behind the head (a scale, a cap, a bias) is never guessed from its config:
its own forward is run on the rows that are asked for, with the decoder's answer repeated. (Compile the decoder's
layers, not the whole model: a head that is new in every call would be compiled in every call.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ToLogits = Callable[[Tensor], Tensor]  # [n, d] -> [n, v], as the model's own forward would make them
Call = Callable[..., Any]


def with_head(model: nn.Module, batch: Mapping[str, Tensor], work: Callable[[ToLogits, Tensor], Tensor]) -> Tensor:
    """One call of the model, in which `work(to_logits, hidden [b, t, d])` takes the place of its head's forward.

    What it returns travels out through the model and all its wrappers, as logits do: DDP and FSDP2 hang their hooks on
    the tensors that they see.
    """
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    plain_forward, plain_head = causal.forward, head.forward
    exact, found = list[Tensor](), list[Tensor]()  # what work returned, and what is left of it behind the head's hooks

    def forward(*args: Any, **kwargs: Any) -> CausalLMOutput:
        said: dict[nn.Module, Any] = {}  # by each part of the model
        answers: dict[nn.Module, Call] = {}  # the same, of the parts that were asked before the head

        def to_logits(rows: Tensor) -> Tensor:
            """The model's own forward, but every part says what it said, and the head speaks of these rows."""
            with _calls(answers | {head: _constant(plain_head(rows[None]))}):
                return plain_forward(*args, **kwargs).logits[0]

        def instead(hidden: Tensor) -> Tensor:
            exact.append(work(to_logits, hidden))
            return exact[-1]

        def call(hidden: Tensor) -> Tensor:
            answers.update({part: _constant(output) for part, output in said.items()})
            found.append(head._call_impl(hidden))  # with its hooks: FSDP2 may gather the head's weights in them
            return hidden.new_zeros(1, 1, 1)  # for the rest of the forward, whose result nobody reads

        ours = _recorders(causal, head, said) | {head: call}
        with attribute(head, "forward", instead), _calls(ours):
            plain_forward(*args, **kwargs)
        return CausalLMOutput(logits=found[-1])

    with attribute(causal, "forward", forward), _autocast_as_before(batch["input_ids"].device.type):
        out = model(**_inputs(causal, batch)).logits
    value = exact[-1]
    if out.dtype == value.dtype:
        return out
    # A wrapper has rounded it (accelerate's FSDP2 casts outputs): the value from here, the gradient through there.
    return value.detach() + (out - out.detach()).to(value.dtype)


@contextmanager
def _autocast_as_before(kind: str) -> Iterator[None]:
    """The forward that accelerate makes enters one autocast object; entered again inside itself it stays on."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def causal_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a wrapped one.

    Raises:
        ValueError: there is none that has an output head.
    """
    for module in model.modules():  # the outermost first
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(f"{type(model).__name__} holds no causal language model of transformers with an output head")


def _recorders(causal: PreTrainedModel, head: nn.Module, said: dict[nn.Module, Any]) -> dict[nn.Module, Call]:
    """For the parts of the model beside the head: a call that keeps in `said` what the part returned."""

    def recorder(part: nn.Module) -> Call:
        plain = part._compiled_call_impl or part._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            said[part] = plain(*args, **kwargs)
            return said[part]

        return call

    parts = {*causal.children(), causal.base_model, causal.get_decoder()} - {causal}
    return {part: recorder(part) for part in parts if head not in part.modules()}


def _constant(output: Any) -> Call:
    return lambda *_, **__: output


@contextmanager
def attribute(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, for a while; what was there (accelerate leaves its own forward) comes back."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]


@contextmanager
def _calls(instead: Mapping[nn.Module, Call]) -> Iterator[None]:
    """Modules that are called differently for a while, past their hooks; by the door that Module.compile() uses."""
    with ExitStack() as stack:
        for module, call in instead.items():
            stack.enter_context(attribute(module, "_compiled_call_impl", call))
        yield


def _inputs(causal: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model is called with: the batch, positions counted along a mask, and no cache."""
    accepted = inspect.signature(
        type(causal).forward
    ).parameters  # of the class: accelerate may have wrapped the method
    given: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool and _is_eager(causal):
        given["attention_mask"] = torch.zeros_like(mask, dtype=causal.dtype).masked_fill(
            ~mask, torch.finfo(causal.dtype).min
        )
    if mask is not None and mask.dim() == 4 and causal.config._attn_implementation == "flex_attention":
        given["attention_mask"] = _blocks(mask)
    uncounted = given.get("position_ids") is None and "position_ids" in accepted
    if uncounted and mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all()):
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        given["use_cache"] = False  # not for speed alone: with a cache transformers takes a packed row for one sample
    return given


def _blocks(mask: Tensor) -> Any:
    """A bool mask [b, 1, t, t] as FlexAttention takes it: blocks that nothing sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    (b, _, t, _), seen = mask.shape, mask[:, 0]
    return create_block_mask(lambda row, _, q, k: seen[row, q, k], b, None, t, t, device=mask.device)


def _is_eager(causal: PreTrainedModel) -> bool:
    """Its attention adds the mask to the scores, where others take a bool one."""
    return causal.config._attn_implementation == "eager"
