"""The checklist of reinforcement learning code, item by item, on the path that training takes: model, layout, method.

Where an item is held elsewhere: pure terms and random shapes in `test_losses_cppo.py`, temperature in
`test_cppo.py::test_log_probabilities_are_those_of_the_distribution_drawn_from`, resume in `test_a_killed_run_goes_on…`,
accumulation in `test_accumulation_changes_nothing`, world size and weights under data parallelism in
`test_distributed.py`, left padding of what is drawn in `tests/curate/test_local_model.py`.
"""

import copy
import json
import shutil
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cppo import held, place, same, trained, weights
from torch import nn

from curate.errors import InputError
from curate.manifest import TABLES, Rule, read, write
from train.layout import Layout, of_samples
from train.logprobs import token_values
from train.methods.cppo import Cppo
from train.rollouts import BUCKETS, ON_DISK, Samples

__all__ = ["place"]  # a fixture
VOCABULARY, WIDTH = 40, 16


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    ).double().eval()  # fmt: skip


def method(level="token", advantages="gae", retention=0.3, **more):
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, 1).double() if advantages == "gae" else None
    rollouts = SimpleNamespace(sampling=SimpleNamespace(temperature=0.7), layout=Layout(), anchor=object())
    return Cppo(rollouts=rollouts, head=head, level=level, advantages=advantages, retention=retention, **more)


def phase(lengths, prompts, k, seed):
    """Samples of random tokens as a phase has them; k of a prompt stand together."""
    draw = torch.Generator().manual_seed(seed)
    n, t = len(lengths), max(lengths)
    mask = torch.arange(t)[None] < torch.tensor(lengths)[:, None]

    def some(low=0.0):
        return torch.where(mask, torch.rand(n, t, generator=draw, dtype=torch.float64) * -2 + low, 0)

    rows = torch.arange(n) // k
    texts = {int(r): torch.randint(3, VOCABULARY, (prompts[r % len(prompts)],), generator=draw).numpy() for r in rows}
    z = torch.randn(2, n, generator=draw, dtype=torch.float64)
    bucket = [BUCKETS[int(i)] for i in torch.randint(0, 5, (n,), generator=draw)]
    tokens = torch.where(mask, torch.randint(3, VOCABULARY, (n, t), generator=draw), 0)
    return Samples(
        [texts[int(r)].astype("int32") for r in rows], tokens, mask, some(-3), some(-3), some(-3), some(), rows,
        torch.randn(n, generator=draw, dtype=torch.float64), (torch.rand(n, generator=draw) < 0.5).double(), z[0], z[1],
        bucket,
    )  # fmt: skip


def wider(samples, extra, garbage):
    """The same phase with columns of padding that hold anything."""
    out = copy.copy(samples)
    for name in ("tokens", "logps", "reference", "anchor", "values"):
        old = getattr(samples, name)
        filled = torch.full((len(old), extra), 5 if name == "tokens" else garbage).to(old.dtype)
        setattr(out, name, torch.cat([old, filled], dim=1))
    out.mask = torch.cat([samples.mask, torch.zeros(len(samples.mask), extra, dtype=torch.bool)], dim=1)
    return out


def padded(batch, extra):
    """Columns of padding behind the rows of the forward pass."""
    if batch["attention_mask"].dim() != 2:
        return batch
    more = {"input_ids": 7, "position_ids": 0, "segment": -1, "loss_mask": False, "attention_mask": 0}
    return {
        k: torch.cat([v, torch.full((len(v), extra), more[k]).to(v.dtype)], dim=1) if k in more else v
        for k, v in batch.items()
    }


def step(cppo, model, samples, at, extra=0, whole=None):
    """(loss, gradients, what is logged) of samples `at` of a phase."""
    cppo.samples, cppo.number = samples, 0
    cppo.made = {k: v.double() if v.is_floating_point() else v for k, v in cppo._worth(samples).items()}
    batch = padded(cppo._batch(at), extra)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    normaliser = cppo.size(batch).double() if whole is None else whole
    model.zero_grad()
    loss, logged = cppo.loss(model, batch, normaliser)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss.detach(), grads, logged


shapes = {
    "lengths": st.lists(st.integers(1, 6), min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0),
    "prompts": st.lists(st.integers(1, 5), min_size=1, max_size=3),
    "seed": st.integers(0, 9999),
}
kinds = pytest.mark.parametrize(("level", "advantages"), [("token", "gae"), ("token", "group"), ("sequence", "group")])


@kinds
@settings(max_examples=20, deadline=None)
@given(**shapes, extra=st.integers(1, 5), garbage=st.sampled_from([0.0, -7.0, 1e30, float("nan")]))
def test_padding_changes_no_loss_gradient_or_logged_value(
    model, level, advantages, lengths, prompts, seed, extra, garbage
):
    cppo, samples = method(level, advantages, weights="heuristic"), phase(lengths, prompts, 2, seed)
    at = list(range(len(lengths)))
    loss, grads, logged = step(cppo, model, samples, at)
    other, others, said = step(cppo, model, wider(samples, extra, garbage), at, extra)
    assert other == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert logged.keys() == said.keys() and {"entropy", "clip_fraction", "kl_k3", "length", "reward"} <= logged.keys()
    for name in logged:
        torch.testing.assert_close(logged[name], said[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@kinds
@settings(max_examples=15, deadline=None)
@given(**shapes, cut=st.integers(1, 5))
def test_passes_of_a_step_add_up_and_weights_stay_with_their_samples(
    model, level, advantages, lengths, prompts, seed, cut
):
    """One pass over a phase, or two over parts of it in another order: each sample has its own α, β and advantage."""
    cppo, samples = method(level, advantages, weights="heuristic"), phase(lengths, prompts, 2, seed)
    at = list(range(len(lengths)))
    loss, grads, _ = step(cppo, model, samples, at)
    whole = cppo.size(cppo._batch(at)).double()
    turned = at[::-1]
    cut = min(cut, len(at) - 1)
    parts = [step(cppo, model, samples, some, whole=whole) for some in (turned[:cut], turned[cut:])]
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    for a, b, c in zip(grads, *(p[1] for p in parts), strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_weights_and_advantages_do_not_depend_on_the_order_of_a_phase(lengths, prompts, seed):
    cppo, samples = method(weights="heuristic"), phase(lengths, prompts, 2, seed)
    made = cppo._worth(samples)
    turn = torch.arange(len(lengths) - 1, -1, -1)
    other = copy.copy(samples)
    for name in ON_DISK:
        setattr(other, name, getattr(samples, name)[turn])
    for name, value in cppo._worth(other).items():
        torch.testing.assert_close(value, made[name][turn], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=15, deadline=None)
@given(**shapes)
def test_the_reward_of_the_whole_is_on_the_last_real_token(lengths, prompts, seed):
    """γ = λ = 1, no KL, V = 0: the return of every token is the reward of the whole, −1 where the end is missing."""
    samples = phase(lengths, prompts, 2, seed)
    samples.values = torch.zeros_like(samples.values)
    made = method(gamma=1.0, lam=1.0, kl=0.0)._worth(samples)
    whole = samples.score - (1 - samples.ended)
    expected = torch.where(samples.mask, whole[:, None], 0).float()
    torch.testing.assert_close(made["returns"].float(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(**shapes, scale=st.floats(0.1, 100), shift=st.floats(-5, 5))
def test_the_unit_of_a_reward_changes_no_bucket(lengths, prompts, seed, scale, shift):
    samples = phase(lengths, prompts, 2, seed)
    listed = [row[m].tolist() for row, m in zip(samples.logps, samples.mask, strict=True)]

    def buckets(scores):
        frame = pl.DataFrame({"token_logps": listed, "reward": scores, "task": "a", "batch": [0] * len(listed)})
        return Rule(0.5, "mean", "batch").assign(frame)[0].to_list()

    assert buckets(samples.score.tolist()) == buckets((samples.score * scale + shift).tolist())


def test_no_update_has_ratio_1_and_nothing_to_hold(model):
    """Old log π, anchor and reference are the policy's own: ratio 1, KL 0, retention 0, nothing clipped."""
    cppo, samples = method(weights="heuristic", kl=0.1), phase([3, 1, 4, 2], [2, 5], 2, 3)
    at = [0, 1, 2, 3]
    cppo.samples, cppo.made = samples, cppo._worth(samples)
    batch = cppo._batch(at)
    with torch.no_grad():
        own = of_samples(token_values(model, batch, ("logps",), temperature=0.7)["logps"], batch, samples.mask)
    samples.logps = samples.anchor = samples.reference = own
    _, _, logged = step(cppo, model, samples, at)
    value = {k: float(v[0] / v[1]) for k, v in logged.items() if v.dim() == 1 and len(v) == 2}
    assert value["clip_fraction"] == 0 and abs(value["kl_k1"]) < 1e-12 and abs(value["kl_k3"]) < 1e-12
    assert value["retention"] < 1e-20 and float(logged["kl_reference"][0].abs().max()) == 0


# --- whole runs ---


def test_an_end_token_that_is_also_the_padding_is_an_end(place, tmp_path):
    """Masks come from lengths: a tokenizer whose pad token is its end token takes the same step.

    But for that token's own embedding: nn.Embedding(padding_idx) gives it no gradient where it is read.
    """
    shutil.copytree(place / "start", tmp_path / "start")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = tmp_path / "start" / name
        held = json.loads(file.read_text())
        if "pad_token_id" in held or name != "tokenizer_config.json":
            held["pad_token_id"] = held["eos_token_id"]
        else:
            held["pad_token"] = held["eos_token"]
        file.write_text(json.dumps(held))
    for name, model in (("apart", place / "start"), ("same", tmp_path / "start")):
        trained(place, tmp_path / name, f"model={model}", "max_steps=1")
    a, b = weights(tmp_path / "apart/model"), weights(tmp_path / "same/model")
    for found in (a, b):
        found["model.embed_tokens.weight"][:2] = 0  # 0 = padding, 1 = end
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-6 and not same(a, weights(place / "start"))


def test_the_coefficient_follows_the_kl_to_the_reference(place, tmp_path):
    """Not to the policy that drew the samples, which is 0 before every phase."""
    trained(place, tmp_path / "out", "kl={target: 0.001, horizon: 10}", "max_steps=4")
    state = load_file(tmp_path / "out/checkpoint-4/method.safetensors")["phase"]
    samples = held(tmp_path / "out", 1)
    met = float(((samples["logps"] - samples["reference"]) * samples["mask"]).sum() / 8)
    assert float(state[2]) == pytest.approx(met, rel=1e-6) and abs(met) > 1e-3
    # after phase 0, whose KL is 0: error clip(0 / 0.001 − 1, ±0.2) = −0.2, so 0.05 · (1 − 0.2 · 8 / 10)
    assert float(state[1]) == pytest.approx(0.05 * (1 - 0.2 * 8 / 10), rel=1e-4)


def test_rewards_of_two_scales_are_no_phase(place, tmp_path):
    """Offline: moments over rollouts that different rewards judged would mean nothing."""
    trained(place, tmp_path / "one", "max_steps=1")
    folder = tmp_path / "one/rollouts/phase-00000"
    manifest = read(folder)
    frames = {name: getattr(manifest, name) for name in TABLES}
    rows = frames["completions"]
    ids = [f"{v}-again" if i % 2 else v for i, v in enumerate(rows["reward_id"])]
    frames["completions"] = rows.with_columns(reward_id=pl.Series(ids))
    write(tmp_path / "mixed", frames, manifest.provenance, "# Mixed\n")
    with pytest.raises(InputError, match="rollouts judged by 2 rewards"):
        trained(place, tmp_path / "two", f"data={tmp_path / 'mixed'}", "rollouts.offline=true", "max_steps=1")
