import copy
import inspect
import os
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train import logprobs
from train.head import causal_of
from train.logprobs import (
    AdapterOff,
    keeps_samples_apart,
    sequence_logps,
    token_entropy,
    token_kl,
    token_logps,
    token_values,
)

V = 53  # a prime that no other dimension has
SIZES = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
LLAMA = dict(model_type="llama", intermediate_size=24, num_key_value_heads=2, **SIZES)

CONFIGS: dict[str, dict] = {
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama untied": LLAMA | {"tie_word_embeddings": False},
    "gpt2": dict(model_type="gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **SIZES),
    "gemma2 (soft cap)": LLAMA | dict(model_type="gemma2", head_dim=4, final_logit_softcapping=0.5),
    "cohere (scale)": LLAMA | dict(model_type="cohere", logit_scale=3.0),
    "granite (division)": LLAMA | dict(model_type="granite", logits_scaling=0.25),
    "hyperclovax (the same key, multiplied)": LLAMA | dict(model_type="hyperclovax", logits_scaling=4.0),
    "qwen2": LLAMA | dict(model_type="qwen2"),
    "phi (bias)": LLAMA | dict(model_type="phi", num_key_value_heads=4),
    "opt (its decoder lies deeper)": dict(model_type="opt", ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, **SIZES),
    "mixtral (experts)": LLAMA | dict(model_type="mixtral", num_local_experts=4, experts_implementation="eager"),
}


def build(name: str, **more) -> PreTrainedModel:
    """A tiny model in float64 with weights large enough that everything matters."""
    torch.manual_seed(0)
    keys = dict(CONFIGS[name] | more)
    implementation = {k: keys.pop(k) for k in ("attn_implementation", "experts_implementation") if k in keys}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys), **implementation).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@cache
def shared(name: str) -> PreTrainedModel:
    """A model that nobody changes."""
    return build(name)


@cache
def in_float32(name: str) -> PreTrainedModel:
    return build(name).float()


def lora(model: PreTrainedModel, *targets: str, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied heads
        return get_peft_model(model, LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False, **more)).eval()


def other_than(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


def batch_of(b: int = 3, t: int = 9, seed: int = 0, targets: float = 0.6) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=draw) < targets
    mask[:, 0] = False
    return {"input_ids": torch.randint(3, V, (b, t), generator=draw), "loss_mask": mask}


def naive(logits: torch.Tensor, batch: dict, temperature: float = 1.0, reference: torch.Tensor | None = None) -> dict:
    """The dense formulas, [b, t, v] in memory."""
    logp = (logits / temperature).log_softmax(-1)
    p = logp.exp()
    found = {
        "logps": logp[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0],
        "entropy": -(p * logp).sum(-1)[:, :-1],
    }
    if reference is not None:
        logq = (reference / temperature).log_softmax(-1).detach()
        found["kl"] = (p * (logp - logq)).sum(-1)[:, :-1]
    return {k: nn.functional.pad(v, (1, 0)) * batch["loss_mask"] for k, v in found.items()}


def gradients(model: nn.Module, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of Σ w·values with fixed w of both signs, by the names of the parameters."""
    model.zero_grad(set_to_none=True)
    (values * torch.linspace(-1, 2, values.numel()).view_as(values)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict, expected: dict, atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


# ---- the values and their gradients are those of the plain forward --------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_plain_forward(name):
    model, batch = build(name), batch_of()
    reference = other_than(model)
    dense = naive(model(batch["input_ids"]).logits, batch, 1.3, reference(batch["input_ids"]).logits)
    ours = token_values(model, batch, ("logps", "entropy", "kl"), reference=reference, temperature=1.3, chunk=4)
    assert_same(ours, dense)
    for measure in dense:
        assert dense[measure].abs().max() > 0.1  # the formula is put to the test at all
        again = token_values(model, batch, (measure,), reference=reference, temperature=1.3, chunk=4)
        assert_same(gradients(model, again[measure]), gradients(model, dense[measure]))
        dense = naive(model(batch["input_ids"]).logits, batch, 1.3, reference(batch["input_ids"]).logits)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize(
    ("base", "targets", "more"),
    [
        ("llama untied", ["q_proj", "v_proj"], {}),
        ("llama untied", ["q_proj", "lm_head"], {}),
        ("llama untied", ["q_proj", "lm_head"], {"use_dora": True}),
        ("llama untied", ["q_proj"], {"modules_to_save": ["lm_head"]}),
        ("llama tied", ["lm_head"], {}),
        ("llama tied", ["q_proj"], {"trainable_token_indices": [5, 6, 7]}),
        ("gemma2 (soft cap)", ["q_proj", "lm_head"], {}),
    ],
)
def test_lora_and_its_reference(base, targets, more):
    model, batch = lora(build(base), *targets, **more), batch_of()
    model.double()
    with model.disable_adapter():
        reference = model(batch["input_ids"]).logits
    dense = naive(model(batch["input_ids"]).logits, batch, reference=reference)
    assert dense["kl"].max() > 1e-3 or "trainable_token_indices" in more  # which start at the old embeddings
    for other in (AdapterOff(model), model.disable_adapter):
        ours = token_values(model, batch, ("logps", "kl"), reference=other, chunk=4)
        assert_same(ours, {"logps": dense["logps"], "kl": dense["kl"]})
    dense = naive(model(batch["input_ids"]).logits, batch, reference=reference)
    for measure in ("logps", "kl"):
        ours = token_values(model, batch, (measure,), reference=AdapterOff(model), chunk=4)
        expected = gradients(model, dense[measure])
        assert expected
        assert_same(gradients(model, ours[measure]), expected)
        dense = naive(model(batch["input_ids"]).logits, batch, reference=reference)


def test_one_of_two_adapters_is_off():
    model, batch = lora(build("llama untied"), "q_proj", "lm_head"), batch_of()
    model.add_adapter("new", LoraConfig(r=2, target_modules=["v_proj", "lm_head"], init_lora_weights=False))
    model.double().eval()
    model.base_model.set_adapter("default")
    old = model(batch["input_ids"]).logits
    model.base_model.set_adapter(["default", "new"])
    for name, p in model.named_parameters():
        p.requires_grad_(".new." in name)
    dense = naive(model(batch["input_ids"]).logits, batch, reference=old)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert_same({"kl": token_kl(model, AdapterOff(model, "new"), batch, chunk=4)}, {"kl": dense["kl"]})
    # PEFT's disable_adapter would have made the older adapter trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    with pytest.raises(ValueError, match="no active adapter other"):
        AdapterOff(model, "other")


def test_adapters_that_cannot_be_switched_off():
    with pytest.raises(ValueError, match="no active adapter at all"):
        AdapterOff(shared("llama tied"))
    model = lora(build("llama untied"), "q_proj")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        AdapterOff(model)


def test_prompt_tuning_puts_positions_in_front():
    model = get_peft_model(build("llama untied"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.double().eval()
    batch = batch_of()
    dense = naive(model(batch["input_ids"]).logits[:, 3:], batch)["logps"]
    ours = token_logps(model, batch, chunk=4)
    assert_same({"logps": ours}, {"logps": dense})
    assert_same(gradients(model, ours), gradients(model, dense))


def test_gradient_checkpointing():
    model, batch = build("llama tied"), batch_of()
    expected = gradients(model, token_logps(model, batch))
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(gradients(model, token_logps(model, batch, chunk=4)), expected)


def test_gradcheck():
    tiny = dict(vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = build("gpt2", **tiny)  # Llama's norm is computed in float32 whatever the model, too coarse for this
    reference = other_than(model)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5]]),
        "loss_mask": torch.tensor([[False, True, True, False, True]]),
    }

    def values(*_):  # gradcheck moves the parameters in place
        return torch.stack(
            [*token_values(model, batch, ("logps", "entropy", "kl"), reference=reference, chunk=2).values()]
        )

    assert torch.autograd.gradcheck(values, tuple(model.parameters()), fast_mode=True)


def test_dropout_on_the_head_falls_the_same_way_twice():
    model, batch = lora(build("gpt2", tie_word_embeddings=False), "lm_head", lora_dropout=0.5), batch_of()
    model.double().train()
    weight = next(p for n, p in model.named_parameters() if "lora_A" in n)
    step = torch.randn_like(weight)

    def value() -> torch.Tensor:
        torch.manual_seed(3)
        return token_logps(model, batch, chunk=4).sum()

    value().backward()
    after = torch.get_rng_state()
    value()
    assert torch.equal(after, torch.get_rng_state())  # the backward pass left no trace
    ends = []
    for side in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(side * step)
            ends.append(value())
            weight.sub_(side * step)
    assert (weight.grad * step).sum().item() == pytest.approx(((ends[0] - ends[1]) / 2e-5).item(), rel=1e-6)


# ---- precision ------------------------------------------------------------------------------------------------------


def test_bfloat16_is_summed_in_float32():
    model, batch = build("llama untied").bfloat16(), batch_of(8, 40, targets=0.9)
    ours = token_logps(model, batch, chunk=7)
    assert ours.dtype == torch.float32
    dense = naive(model(batch["input_ids"]).logits.float(), batch)["logps"]
    torch.testing.assert_close(ours, dense, atol=2e-6, rtol=1e-6)  # far finer than bfloat16's 2^-8
    one, many = (gradients(model, token_logps(model, batch, chunk=c))["lm_head.weight"].float() for c in (10_000, 1))
    # 280 summands of a chunk each, and still not more than the last bit of the result: bfloat16 sums would drift
    assert (one - many).abs().max() <= one.abs().max() * 2**-8


def test_autocast():
    model, batch = build("llama untied").float(), batch_of()
    kinds, linear = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden: (kinds.append((y := linear(hidden)).dtype), y)[1]
    with torch.autocast("cpu", torch.bfloat16):
        dense = naive(model(batch["input_ids"]).logits.float(), batch)["logps"]
        values = token_values(model, batch, ("logps", "kl"), reference=model, chunk=4)
    ours = values["logps"]
    assert ours.dtype == torch.float32
    assert values["kl"].abs().max() < 1e-6
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    found, expected = gradients(model, ours), gradients(model, dense)
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= 0.03 * scale, name
    assert len(kinds) > 10
    assert set(kinds) == {torch.bfloat16}  # in the backward pass too, which is run outside


class Rounds(nn.Module):
    """What accelerate's FSDP2 policy does to outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits.bfloat16()
        return out


def test_a_wrapper_that_rounds_outputs_rounds_no_value():
    model, batch = build("llama tied").float(), batch_of()
    exact = token_logps(model, batch)
    through = token_logps(Rounds(model), batch)
    assert torch.equal(exact, through)
    for name, gradient in gradients(model, through).items():
        torch.testing.assert_close(gradient, gradients(model, token_logps(model, batch))[name], atol=0.05, rtol=0.02)


# ---- invariances ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 4), st.sampled_from(["left", "right"]), st.integers(1, 40),
       st.sampled_from(["llama tied", "gpt2", "gemma2 (soft cap)"]), st.integers(0, 99))  # fmt: skip
def test_padding_and_chunks_change_nothing(b, t, extra, side, chunk, name, seed):
    model, batch = in_float32(name), batch_of(b, t, seed)
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b,), generator=draw)
    values, shape = [], (b, t + extra)
    ids, attention = torch.randint(3, V, shape, generator=draw), torch.zeros(shape, dtype=torch.long)  # pads: any token
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        real = slice(0, n) if side == "right" else slice(t + extra - n, t + extra)
        ids[row, real], attention[row, real] = batch["input_ids"][row, :n], 1
        mask[row, real] = batch["loss_mask"][row, :n]
        alone = {"input_ids": batch["input_ids"][None, row, :n], "loss_mask": batch["loss_mask"][None, row, :n]}
        values.append((row, real, token_values(model, alone, ("logps", "entropy"))))
    padded = {"input_ids": ids, "attention_mask": attention, "loss_mask": mask}
    found = token_values(model, padded, ("logps", "entropy"), chunk=chunk)
    for measure in ("logps", "entropy"):
        assert (found[measure][~mask] == 0).all()
        for row, real, alone in values:
            torch.testing.assert_close(found[measure][row, real], alone[measure][0], atol=10 * FLOAT32, rtol=1e-5)


def packed(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one sample each, one behind the other in one row."""
    row = {k: torch.cat([b[k] for b in batches], dim=1) for k in ("input_ids", "loss_mask")}
    return row | {"position_ids": torch.cat([torch.arange(b["input_ids"].shape[1]) for b in batches])[None]}


# Inside a float64 model some norms and the softmax of eager attention are float32 nevertheless.
FLOAT32 = 2e-6
SAMPLES = [batch_of(1, t, seed=t) for t in (5, 1, 7, 3)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["llama tied", "gpt2", "gemma2 (soft cap)", "cohere (scale)", "qwen2", "mixtral (experts)"]
)
def test_a_packed_row_is_its_samples(name, implementation):
    if name.startswith("gemma2") and implementation == "sdpa":
        implementation = "eager"  # the only one that knows its soft cap on scores
    model = build(name, attn_implementation=implementation)
    model.config.use_cache = True  # the default, with which transformers would take the row for one sample
    assert keeps_samples_apart(model)
    alone = torch.cat([token_logps(model, sample) for sample in SAMPLES], dim=1)
    together = token_logps(model, packed(SAMPLES), chunk=4)
    torch.testing.assert_close(together, alone, atol=FLOAT32, rtol=0)
    assert_same(gradients(model, together), gradients(model, alone), atol=10 * FLOAT32)


def test_where_samples_are_not_kept_apart_a_block_mask_does_it():
    model, row = shared("opt (its decoder lies deeper)"), packed(SAMPLES)
    assert not keeps_samples_apart(model)
    alone = torch.cat([token_logps(model, sample) for sample in SAMPLES], dim=1)
    assert (token_logps(model, row) - alone).abs().max() > 0.01
    sample = torch.tensor([0] * 5 + [1] * 1 + [2] * 7 + [3] * 3)
    block = (sample[:, None] == sample[None]).tril()[None, None]  # [1, 1, t, t] bool for SDPA, True = may look at
    torch.testing.assert_close(token_logps(model, row | {"attention_mask": block}), alone, atol=1e-10, rtol=0)


@given(st.floats(0.05, 20))
def test_temperature_divides_the_logits(temperature):
    model, batch = shared("llama untied"), batch_of()
    dense = naive(model(batch["input_ids"]).logits, batch, temperature)
    ours = token_values(model, batch, ("logps", "entropy"), temperature=temperature)
    assert_same(ours, dense, atol=1e-8)


@settings(max_examples=25)
@given(st.integers(0, 500), st.floats(0.3, 3))
def test_kl_is_positive_and_zero_for_equal_models(seed, temperature):
    model, batch = shared("gpt2"), batch_of(seed=seed)
    torch.manual_seed(seed)
    kl = token_kl(model, other_than(model), batch, temperature=temperature)
    assert (kl[batch["loss_mask"]] > 0).all()
    assert (kl[~batch["loss_mask"]] == 0).all()
    same = token_kl(model, copy.deepcopy(model), batch, temperature=temperature)
    assert (same == 0).all()
    assert all(g.abs().max() < 1e-12 for g in gradients(model, same).values())  # where it is 0 it is at its minimum
    model.zero_grad(set_to_none=True)


def test_excluded_tokens_add_nothing():
    model, batch = build("phi (bias)"), batch_of()
    reference = other_than(model)
    for each in (model, reference):
        each.lm_head.bias.data[:3] = -torch.inf  # targets are 3 and above
    values = token_values(model, batch, ("logps", "entropy", "kl"), reference=reference)
    assert all(v.isfinite().all() for v in values.values())
    assert (values["kl"][batch["loss_mask"]] > 0).all()
    found = gradients(model, sum(values.values()))
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("name", ["llama tied", "granite (division)"])
def test_no_target_is_zero_with_a_graph(name):
    model, batch = build(name), batch_of(targets=0)
    values = token_values(model, batch, ("logps", "entropy", "kl"), reference=copy.deepcopy(model))
    assert all((v == 0).all() for v in values.values())
    found = gradients(model, sum(values.values()))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all((g == 0).all() for g in found.values())
    assert token_logps(model, batch_of(2, 1)).tolist() == [[0], [0]]  # rows of one token hold no target either


# ---- memory, and what is run ----------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """The shapes of everything that is computed, the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", ["llama tied", "gemma2 (soft cap)", "phi (bias)"])
def test_no_tensor_of_all_tokens_by_the_vocabulary(name):
    model, batch, chunk = build(name).bfloat16(), batch_of(6, 30), 8
    reference = other_than(model)
    with Shapes() as shapes:
        values = token_values(model, batch, ("logps", "entropy", "kl"), reference=reference, chunk=chunk)
        sum(values.values()).sum().backward()
    wide = {shape for shape in shapes.seen if V in shape}
    weights = {(V, 16), (16, V), (V,), (1, V)}
    assert any(shape[-2:] == (chunk, V) for shape in wide)  # the probe sees what it should
    assert all(torch.Size(shape).numel() <= chunk * V for shape in wide - weights), wide


def test_only_positions_before_targets_reach_the_head():
    model, batch = build("llama untied"), batch_of()
    rows = []
    linear = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (rows.append(hidden.shape), linear(hidden))[1]
    with torch.no_grad():
        token_logps(model, batch, chunk=4)
    assert sum(shape[-2] for shape in rows) == batch["loss_mask"].sum()


def test_one_pass_of_the_decoder_for_all_measures():
    model, batch = build("llama untied"), batch_of()
    calls: list[None] = []
    model.model.register_forward_hook(lambda *_: calls.append(None))
    reference = copy.deepcopy(model)
    reference.model._forward_hooks.clear()
    token_values(model, batch, ("logps", "entropy", "kl"), reference=reference, chunk=2)["kl"].sum().backward()
    assert len(calls) == 1


def test_the_model_is_left_as_it_was():
    model, batch = build("llama untied"), batch_of()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)  # accelerate leaves such a one
    modules = (model, model.lm_head, model.model)
    before = [dict(m.__dict__) for m in modules]
    token_logps(model, batch).sum().backward()
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_logps(model, batch)
    hook.remove()
    assert [dict(m.__dict__) for m in modules] == before
    assert torch.equal(model(batch["input_ids"]).logits, own(batch["input_ids"]).logits)


def test_without_gradients_there_is_no_graph():
    with torch.no_grad():
        assert not token_logps(shared("gpt2"), batch_of()).requires_grad
    assert token_entropy(shared("gpt2"), batch_of()).requires_grad


def test_a_head_alone_may_be_trained():
    model, batch = build("llama untied"), batch_of()
    model.model.requires_grad_(False)
    found = gradients(model, token_logps(model, batch, chunk=4))
    assert_same(found, gradients(model, naive(model(batch["input_ids"]).logits, batch)["logps"]))
    assert found.keys() == {"lm_head.weight"}


class Sum(nn.Module):
    """A head of two summands, whose gradients autograd hands out as one tensor."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(linear.weight.detach() / 3), nn.Parameter(linear.weight.detach() * 2 / 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.one + self.two).mT


def test_any_module_may_be_the_head():
    model, batch = build("llama untied"), batch_of()
    model.lm_head = Sum(model.lm_head)
    expected = gradients(model, naive(model(batch["input_ids"]).logits, batch)["logps"])
    assert_same(gradients(model, token_logps(model, batch, chunk=2)), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers():
    model, batch = build("llama tied"), batch_of()
    expected = gradients(model, token_logps(model, batch))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert_same(gradients(model, token_logps(model, batch, chunk=4)), expected)


# ---- several processes ----------------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    base = causal_of(model)
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)  # its head is gone after the forward, and comes when asked


def fsdp_with_the_head_apart(model: nn.Module) -> nn.Module:
    fully_shard(causal_of(model).lm_head, reshard_after_forward=True)
    return fsdp(model)


CASES: list[tuple[Callable[[nn.Module], nn.Module], str, bool]] = [
    (ddp, "llama tied", False),
    (ddp, "llama untied", True),
    (fsdp, "llama tied", False),
    (fsdp_with_the_head_apart, "llama untied", False),
    (fsdp_with_the_head_apart, "llama untied", True),
]


def objective(model: nn.Module, batch: dict, inner: nn.Module, adapted: bool) -> torch.Tensor:
    if not adapted:
        return token_logps(model, batch, chunk=2).sum()
    values = token_values(model, batch, ("logps", "kl"), reference=AdapterOff(inner), chunk=2)
    return (values["logps"] - values["kl"]).sum()


def worker(rank: int, file: str) -> None:
    """Each process has one row, with other numbers of targets: many, and one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    batch = batch_of(2, 9)
    batch["loss_mask"][1] = torch.arange(9) == 4
    mine = {k: v[rank : rank + 1] for k, v in batch.items()}
    for wrap, name, adapted in CASES:
        plain, inner = (lora(build(name), "q_proj", "lm_head") if adapted else build(name) for _ in range(2))
        if adapted:
            plain.double(), inner.double()
        expected = objective(plain, batch, plain, adapted)
        expected.backward()
        model = wrap(inner)
        for _ in range(2):  # twice: after the first pass everything has been gathered and let go once
            model.zero_grad()
            value = objective(model, mine, inner, adapted)
            value.backward()
        total = value.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach())
        for (title, p), q in zip(inner.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), title
            if p.grad is not None:
                whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(2 * whole, q.grad, msg=lambda m, n=title: f"{n}: {m}")  # both average
    dist.barrier()
    os._exit(0)  # all has been compared; gloo's threads can abort a process that takes itself apart


@pytest.mark.filterwarnings("ignore")
def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(worker, (str(tmp_path / "rendezvous"),), nprocs=2)


# ---- samples --------------------------------------------------------------------------------------------------------


def test_sequence_logps_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [True, True, True, False]])
    segment = torch.tensor([[0, 0, 0, 2], [2, -1, 1, 1]])  # sample 2 spans rows, one token belongs to nobody
    sums = sequence_logps(logps, mask, segment, 4)
    assert sums.tolist() == [-1 - 2, -7, -4 - 5, 0]
    assert sequence_logps(logps, mask, segment, 4, reduction="mean").tolist() == [-1.5, -7, -4.5, 0]
    sums.sum().backward()
    assert logps.grad.tolist() == [[1, 1, 0, 1], [1, 0, 1, 0]]


def test_packed_samples_sum_as_rows_do():
    model, row = shared("llama tied"), packed(SAMPLES)
    segment = torch.cat([torch.full((s["input_ids"].shape[1],), i) for i, s in enumerate(SAMPLES)])[None]
    sums = sequence_logps(token_logps(model, row), row["loss_mask"], segment, len(SAMPLES))
    alone = torch.stack([token_logps(model, sample).sum() for sample in SAMPLES])
    torch.testing.assert_close(sums, alone, atol=1e-10, rtol=0)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refusals():
    model, good = shared("llama tied"), batch_of()
    row = packed(SAMPLES)
    ones = torch.ones_like(row["input_ids"])
    first = row["loss_mask"].clone()
    first[0, 6] = True  # the third sample's first token
    left = {"attention_mask": torch.tensor([[0, 0, 1, 1]]), "input_ids": torch.tensor([[9, 9, 5, 6]])}
    for batch, message in [
        (good | {"loss_mask": torch.ones_like(good["loss_mask"])}, r"loss_mask\[0, 0\] is a target"),
        (row | {"loss_mask": first}, r"loss_mask\[0, 6\] is a target"),
        (left | {"loss_mask": torch.tensor([[False, False, True, True]])}, r"loss_mask\[0, 2\] is a target"),
        (row | {"attention_mask": ones}, "packed rows need attention_mask absent"),
        (good | {"loss_mask": good["loss_mask"].long()}, "bool of the same shape"),
        (good | {"loss_mask": good["loss_mask"][:, 1:]}, "bool of the same shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_logps(model, batch)
    for change in ({"temperature": 0.0}, {"temperature": float("nan")}, {"chunk": 0}):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_logps(model, good, **change)
    for of, message in [((), "at most once"), (("logps", "logps"), "at most once"), (("kl",), "needs a reference")]:
        with pytest.raises(ValueError, match=message):
            token_values(model, good, of)
    with pytest.raises(ValueError, match="Linear holds no causal language model"):
        token_logps(nn.Linear(2, 2), good)
    with pytest.raises(ValueError, match="three tensors of one shape"):
        sequence_logps(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="sum or mean"):
        sequence_logps(
            torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1).long(), 1, reduction="max"
        )


def test_defaults_are_one():
    signatures = [inspect.signature(f).parameters for f in (token_values, token_logps, token_kl, token_entropy)]
    assert {(s["temperature"].default, s["chunk"].default) for s in signatures} == {(1.0, logprobs.CHUNK)}
