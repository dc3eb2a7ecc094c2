import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from curate.manifest import Stats, classify
from train.losses.cppo import (
    adapt_kl,
    gae,
    group_advantages,
    heuristic_weights,
    importance_weights,
    learned_weights,
    policy_loss,
    ratios,
    retention_loss,
    statistics,
    token_rewards,
    value_loss,
    whiten,
)

LEADS, LEVELS = ["reward", "probability"], ["token", "sequence"]
LN2, LN3 = math.log(2), math.log(3)
CORNERS = ["high_performance", "overfitting", "high_variance", "noisy"]
# which corners have more than normal; the others have less
BY_REWARD, BY_PROBABILITY = {"high_performance", "high_variance"}, {"high_performance", "overfitting"}
ABOVE = {"reward": (BY_REWARD, BY_PROBABILITY), "probability": (BY_PROBABILITY, BY_REWARD)}
Case = dict[str, torch.Tensor]


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollouts(b: int, t: int, seed: int) -> Case:
    """Samples between padding on either side, some without a token. Scores, weights and groups are one a sample."""
    draw = seeded(seed)
    start, end = torch.randint(0, t + 1, (2, b, 1), generator=draw).sort(dim=0).values
    at = torch.arange(t)
    names = ("logps", "old", "ref", "advantages", "values", "old_values", "returns", "rewards")
    case: Case = dict(zip(names, torch.randn(len(names), b, t, generator=draw, dtype=torch.float64), strict=True))
    case["old"] = case["logps"] + 0.3 * case["old"]
    case |= {"mask": (start <= at) & (at < end)}
    case |= dict(zip(("alpha", "beta"), 2 * torch.rand(2, b, generator=draw, dtype=torch.float64), strict=True))
    case |= {
        "scores": torch.randn(b, generator=draw, dtype=torch.float64),
        "ended": torch.rand(b, generator=draw) < 0.5,
        "groups": torch.randint(0, 3, (b,), generator=draw),
    }
    for trained in ("logps", "values"):
        case[trained].requires_grad_()
    return case


def padded(case: Case, left: int, right: int, garbage: float) -> Case:
    """The same rollouts with more padding, and garbage in all of it."""
    new: Case = {}
    for name, each in case.items():
        new[name] = each.detach()
        if each.dim() == 2:
            fill = False if name == "mask" else garbage
            kept = each.detach() if name == "mask" else each.detach().masked_fill(~case["mask"], garbage)
            new[name] = torch.nn.functional.pad(kept, (left, right), value=fill)
    for trained in ("logps", "values"):
        new[trained].requires_grad_()
    return new


SCALARS = {  # n: the step's normaliser
    "policy": lambda c, n=None: policy_loss(
        c["logps"], c["old"], c["advantages"], c["mask"], c["alpha"], 0.2, normaliser=n
    ),
    "policy of samples": lambda c, n=None: policy_loss(
        c["logps"], c["old"], c["scores"], c["mask"], c["alpha"], 0.2, level="sequence", normaliser=n
    ),
    "retention": lambda c, n=None: retention_loss(c["logps"], c["ref"], c["mask"], c["beta"], normaliser=n),
    "value": lambda c, n=None: value_loss(c["values"], c["old_values"], c["returns"], c["mask"], 0.5, normaliser=n),
}
TOKENS = {  # and what they are where masked
    "advantages": (lambda c: gae(c["rewards"], c["values"], c["mask"], 0.97, 0.9)[0], 0),
    "returns": (lambda c: gae(c["rewards"], c["values"], c["mask"], 0.97, 0.9)[1], 0),
    "whitened": (lambda c: whiten(c["advantages"], c["mask"]), 0),
    "scaled": (lambda c: whiten(c["advantages"], c["mask"], shift_mean=False), 0),
    "rewards": (lambda c: token_rewards(c["scores"], c["old"], c["ref"], c["mask"], c["ended"], 0.1), 0),
    "ratios": (lambda c: ratios(c["logps"], c["old"], c["mask"]), 1),
    "ratios of samples": (lambda c: ratios(c["logps"], c["old"], c["mask"], "sequence"), 1),
}


def gradients(loss: torch.Tensor, case: Case) -> list[torch.Tensor]:
    """By log π_θ and values; 0 where one has no part."""
    inputs = [case["logps"], case["values"]]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


sizes = {"b": st.integers(1, 5), "t": st.integers(1, 6), "seed": st.integers(0, 9999)}
padding = {
    "left": st.integers(0, 3),
    "right": st.integers(0, 3),
    "garbage": st.sampled_from([math.nan, math.inf, -1e30]),
}
exactly = {"rtol": 1e-12, "atol": 1e-12}


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
def test_golden_weights(golden, lead):
    g = golden[f"weights_{lead}"]
    for take in (float64, list, np.array):
        weights = heuristic_weights(take(g["z_p"]), take(g["z_r"]), k=g["k"], lb=g["lb"], ub=g["ub"], lead=lead)
        for ours, theirs in zip(weights, (g["alpha"], g["beta"]), strict=True):
            torch.testing.assert_close(ours, float64(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_golden_losses(golden, kind):
    g = golden["gae"]
    mask = torch.tensor(g["mask"], dtype=kind)
    found = gae(float64(g["rewards"]), float64(g["values"]), mask, g["gamma"], g["lam"])
    for ours, theirs in zip(found, (g["advantages"], g["returns"]), strict=True):
        torch.testing.assert_close(ours, float64(theirs), rtol=0, atol=1e-9)
    g = golden["policy_loss"]
    logps, old, advantages, alpha = (float64(g[name]) for name in ("logps", "old_logps", "advantages", "alpha"))
    mask = torch.tensor(g["mask"], dtype=kind)
    assert policy_loss(logps, old, advantages, mask, alpha, g["clip"]).item() == pytest.approx(g["value"], abs=1e-9)
    g = golden["retention_loss"]
    logps, previous, beta = (float64(g[name]) for name in ("logps", "previous_logps", "beta"))
    mask = torch.tensor(g["mask"], dtype=kind)
    assert retention_loss(logps, previous, mask, beta).item() == pytest.approx(g["value"], abs=1e-9)


# ---- what holds of every function -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALARS)
@given(**sizes, **padding)
def test_padding_changes_no_loss_and_no_gradient(name, b, t, seed, left, right, garbage):
    case = rollouts(b, t, seed)
    more = padded(case, left, right, garbage)
    loss, same = SCALARS[name](case), SCALARS[name](more)
    torch.testing.assert_close(same, loss, **exactly)
    for before, after in zip(gradients(loss, case), gradients(same, more), strict=True):
        torch.testing.assert_close(after[:, left : left + t], before, **exactly)
        assert not after[~more["mask"]].any()  # exactly 0, neither NaN nor noise


@pytest.mark.parametrize("name", TOKENS)
@given(**sizes, **padding)
def test_padding_changes_no_token_and_stays_neutral(name, b, t, seed, left, right, garbage):
    of, neutral = TOKENS[name]
    case = rollouts(b, t, seed)
    more = padded(case, left, right, garbage)
    before, after = of(case), of(more)
    torch.testing.assert_close(after[:, left : left + t], before, **exactly)
    assert bool((after[~more["mask"]] == neutral).all())


@given(**sizes, **padding)
def test_padding_changes_no_statistic(b, t, seed, left, right, garbage):
    case = rollouts(b, t, seed)
    more = padded(case, left, right, garbage)
    before, after = (statistics(c["logps"], c["old"], c["mask"], 0.2) for c in (case, more))
    torch.testing.assert_close(after, before, **exactly)


@given(**sizes)
def test_the_order_of_samples_changes_nothing(b, t, seed):
    case = rollouts(b, t, seed)
    order = torch.randperm(b, generator=seeded(seed))
    shuffled = {name: each.detach()[order].requires_grad_(each.requires_grad) for name, each in case.items()}
    for of in SCALARS.values():
        loss, same = of(case), of(shuffled)
        torch.testing.assert_close(same, loss, **exactly)
        for before, after in zip(gradients(loss, case), gradients(same, shuffled), strict=True):
            torch.testing.assert_close(after, before[order], **exactly)
    for of, _ in TOKENS.values():
        torch.testing.assert_close(of(shuffled), of(case)[order], **exactly)
    grouped = [group_advantages(c["scores"], c["groups"]) for c in (case, shuffled)]
    torch.testing.assert_close(grouped[1], grouped[0][order], **exactly)


@pytest.mark.parametrize("name", SCALARS)
@given(**sizes, cut=st.integers(0, 5))
def test_passes_add_up_to_the_step(name, b, t, seed, cut):
    """Any split of a batch, with the whole step's normaliser, gives the loss and gradient of the whole batch."""
    case = rollouts(b, t, seed)
    mask = case["mask"]
    number = mask.any(dim=1).sum() if name == "policy of samples" else mask.sum()
    parts = [{k: v[rows] for k, v in case.items()} for rows in (slice(cut), slice(cut, None))]
    whole, split = SCALARS[name](case), sum(SCALARS[name](part, number) for part in parts)
    torch.testing.assert_close(split, whole, **exactly)
    for ours, theirs in zip(gradients(split, case), gradients(whole, case), strict=True):
        torch.testing.assert_close(ours, theirs, **exactly)


@pytest.mark.parametrize("name", SCALARS)
def test_no_token_at_all_is_zero_with_a_graph(name):
    case = rollouts(3, 4, seed=0)
    case["mask"] = torch.zeros_like(case["mask"])
    case = padded(case, 1, 0, math.nan)
    loss = SCALARS[name](case)
    assert loss.item() == 0
    assert loss.requires_grad
    assert not any(grad.any() for grad in gradients(loss, case))
    for of, neutral in TOKENS.values():
        assert bool((of(case) == neutral).all())
    assert statistics(case["logps"], case["old"], case["mask"], 0.2) == {"clip_fraction": 0, "kl_k1": 0, "kl_k3": 0}


@pytest.mark.parametrize("name", SCALARS)
def test_a_row_without_tokens_counts_nothing_whatever_its_weight(name):
    case = rollouts(4, 6, seed=1)
    case["mask"][0] = False
    case["mask"][1:, 2] = True
    rest = {key: each[1:] for key, each in case.items()}
    for of_sample in ("alpha", "beta", "scores"):
        case[of_sample] = case[of_sample].masked_fill(torch.tensor([True, False, False, False]), math.nan)
    loss = SCALARS[name](case)
    torch.testing.assert_close(loss, SCALARS[name](rest), **exactly)
    assert not any(grad[0].any() for grad in gradients(loss, case))


@pytest.mark.parametrize("name", ["policy", "retention", "value"])
@pytest.mark.parametrize("seed", range(4))
def test_gradcheck(name, seed):
    case = rollouts(3, 5, seed)
    trained = "values" if name == "value" else "logps"
    assert torch.autograd.gradcheck(lambda x: SCALARS[name](case | {trained: x}), (case[trained],))


def test_only_what_is_trained_gets_gradient():
    constants = ("old", "ref", "advantages", "old_values", "returns", "alpha", "beta", "scores")
    case = rollouts(3, 5, seed=2)
    for name in constants:
        case[name].requires_grad_()
    sum(of(case) for of in SCALARS.values()).backward()
    assert all(case[name].grad is None for name in constants)
    assert case["logps"].grad.any()
    assert case["values"].grad.any()
    assert not group_advantages(case["scores"], case["groups"]).requires_grad
    for name in ("rewards", "advantages", "whitened", "scaled"):
        assert not TOKENS[name][0](case).requires_grad
    assert not any(each.requires_grad for each in statistics(case["logps"], case["old"], case["mask"], 0.2).values())


def test_half_precision_is_computed_in_float32():
    case = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in rollouts(4, 6, seed=3).items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in case.items()}
    for of in [*SCALARS.values(), *(of for of, _ in TOKENS.values())]:
        assert of(case).dtype == torch.float32
        torch.testing.assert_close(of(case), of(wide), rtol=0, atol=0)
    assert group_advantages(case["scores"], case["groups"]).dtype == torch.float32


BROKEN = {  # constants of the batch, by the function that takes them
    "policy": ("old", "advantages"),
    "retention": ("ref",),
    "value": ("old_values", "returns"),
    "advantages": ("rewards", "values"),
    "whitened": ("advantages",),
    "rewards": ("old", "ref"),
}


@pytest.mark.parametrize(("name", "constant"), [(name, each) for name, many in BROKEN.items() for each in many])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_constant_that_is_missing_at_a_valid_token_is_refused(name, constant, value):
    case = rollouts(3, 4, seed=0)
    case["mask"][1, 2] = True
    case[constant] = case[constant].detach().index_put((torch.tensor(1), torch.tensor(2)), float64(value))
    of = SCALARS.get(name) or TOKENS[name][0]
    with pytest.raises(ValueError, match=rf"must be finite, not {value} \(row 1, token 2\)"):
        of(case)


def test_shapes_are_refused():
    case = rollouts(3, 4, seed=0)
    for of in [*SCALARS.values(), *(of for of, _ in TOKENS.values())]:
        for wrong in (case["mask"][:, :3], case["mask"][0], case["mask"][:, :, None]):
            with pytest.raises(ValueError, match=r"must be|need"):
                of(case | {"mask": wrong})
    logps, old, mask, one = case["logps"], case["old"], case["mask"], torch.ones(3)
    with pytest.raises(ValueError, match=r"\(3, 4\), \(3, 4\), \(3, 4\), \(2,\)"):
        policy_loss(logps, old, one[:2], mask, one, 0.2)
    for wrong in (one[:2], torch.ones(3, 1), torch.ones(4)):
        with pytest.raises(ValueError, match=r"weights must be a number or one a sample, \[3\]"):
            policy_loss(logps, old, case["advantages"], mask, wrong, 0.2)
        with pytest.raises(ValueError, match=r"weights must be a number or one a sample, \[3\]"):
            retention_loss(logps, old, mask, wrong)
    for scores, ended in ((one[:2], one), (one, one[:2]), (one, torch.ones(3, 4))):
        with pytest.raises(ValueError, match=r"scores and ended must be \[3\]"):
            token_rewards(scores, logps, old, mask, ended, 0.1)
    for rewards, groups in ((one, one[:2]), (one[None], one[None])):
        with pytest.raises(ValueError, match=r"rewards and groups must be \[b\]"):
            group_advantages(rewards, groups)


@pytest.mark.parametrize("clip", [0, -0.2, math.nan])
def test_a_clip_that_is_not_positive_is_refused(clip):
    x, mask = torch.zeros(1, 1), torch.ones(1, 1)
    for call in (
        lambda: policy_loss(x, x, x, mask, 1.0, clip),
        lambda: value_loss(x, x, x, mask, clip),
        lambda: statistics(x, x, mask, clip),
    ):
        with pytest.raises(ValueError, match="clip must be positive"):
            call()


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight):
    x, mask = torch.zeros(2, 1), torch.ones(2, 1)
    for weights in (weight, torch.tensor([1.0, weight])):
        with pytest.raises(ValueError, match="weights of samples must be finite and >= 0"):
            policy_loss(x, x, x, mask, weights, 0.2)
        with pytest.raises(ValueError, match="weights of samples must be finite and >= 0"):
            retention_loss(x, x, mask, weights)


# ---- the policy's loss ----------------------------------------------------------------------------------------------


def plain_ppo(logps, old, advantages, mask, clip):
    """As it stands in textbooks."""
    ratio = torch.exp(logps - old)
    loss = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip))
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(b=st.integers(1, 5), t=st.integers(1, 8), seed=st.integers(0, 9999), clip=st.floats(0.05, 0.5))
def test_alpha_1_is_plain_ppo_bit_for_bit(kind, b, t, seed, clip):
    case = {k: v.detach().to(kind) if v.is_floating_point() else v for k, v in rollouts(b, t, seed).items()}
    case["mask"][0, 0] = True
    logps = case["logps"].requires_grad_()
    arguments = (case["old"], case["advantages"], case["mask"])
    plain = plain_ppo(logps, *arguments, clip)
    for alpha in (1.0, torch.ones(b), torch.ones(b, dtype=torch.float64)):
        ours = policy_loss(logps, *arguments, alpha, clip)
        assert ours.dtype == kind
        assert torch.equal(ours, plain)
        assert torch.equal(*(torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, plain)))


def test_normal_weights_are_plain_ppo_bit_for_bit():
    case = rollouts(4, 6, seed=5)
    alpha, beta = heuristic_weights([0.1, 9, 0, math.nan], [0, 0.2, -9, 9], k=0.5, lb=0.5, ub=2.5)  # all normal
    arguments = (case["logps"], case["old"], case["advantages"], case["mask"])
    retention = retention_loss(case["logps"], case["ref"], case["mask"], beta)
    assert retention.item() > 0
    assert torch.equal(policy_loss(*arguments, alpha, 0.2) + 0 * retention, plain_ppo(*arguments, 0.2))


def test_policy_by_hand():
    # r = 2, ½, 2, ½, 1.1 at ε = 0.2, with A = 1, 1, −1, −1, 3:
    # −min(2, 1.2), −min(½, 0.8), −min(−2, −1.2), −min(−½, −0.8), −min(3.3, 3.3) = −1.2, −0.5, 2, 0.8, −3.3
    logps = float64([[LN2, -LN2, LN2, -LN2, math.log(1.1)]]).requires_grad_()
    advantages, mask = float64([[1, 1, -1, -1, 3]]), torch.ones(1, 5)
    loss = policy_loss(logps, torch.zeros(1, 5), advantages, mask, float64([0.5]), 0.2)
    assert loss.item() == pytest.approx(0.5 * (-1.2 - 0.5 + 2 + 0.8 - 3.3) / 5)
    # −α A r/5 where r is not clipped, 0 where it is
    slopes = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(slopes, float64([[0, -0.05, 0.2, 0, -0.33]]))


def test_alpha_weights_samples_and_the_count_stays_that_of_tokens():
    # r = 1: the loss is −Σ α A/3 = −(2 · (1 + 2) + ¼ · 4)/3
    mask = torch.tensor([[True, True], [True, False]])
    loss = policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), float64([[1, 2], [4, 9]]), mask, float64([2, 0.25]), 0.2)
    assert loss.item() == pytest.approx(-7 / 3)


@given(**sizes)
def test_no_update_has_the_gradient_of_the_policy_gradient(b, t, seed):
    case = rollouts(b, t, seed)
    mask, n = case["mask"], max(1, int(case["mask"].sum()))
    loss = policy_loss(case["logps"], case["logps"], case["advantages"], mask, case["alpha"], 0.2)
    expected = -case["alpha"][:, None] * case["advantages"] * mask / n
    torch.testing.assert_close(loss, expected.sum(), **exactly)
    torch.testing.assert_close(gradients(loss, case)[0], expected, **exactly)


def test_one_advantage_a_sample_is_that_of_each_token():
    case = rollouts(4, 4, seed=6)  # b = t: nothing must spread the wrong way
    spread = case["scores"][:, None].repeat(1, 4)
    pair = [
        policy_loss(case["logps"], case["old"], a, case["mask"], case["alpha"], 0.2) for a in (case["scores"], spread)
    ]
    assert torch.equal(*pair)
    assert pair[0].item() != 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_leaves_loss_and_gradient_finite(level, advantage):
    logps = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -300.0]])  # e^200 is infinite in float32
    loss = policy_loss(logps, old, torch.tensor([advantage]), torch.ones(1, 2), 1.0, 0.2, level=level)
    # clipped at 1.2 where A > 0; as e^40 where A < 0
    assert loss.item() == pytest.approx(-1.2 if advantage > 0 else math.exp(40), rel=1e-5)
    assert bool(torch.autograd.grad(loss, logps)[0].isfinite().all())
    assert all(each.isfinite() for each in statistics(logps, old, torch.ones(1, 2), 0.2, level).values())


# ---- ratios, samples and statistics ---------------------------------------------------------------------------------


def test_ratios_by_hand():
    logps, old = float64([[LN2, LN3, 5], [0, -2 * LN2, 5]]), torch.zeros(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(ratios(logps, old, mask), float64([[2, 3, 1], [1, 0.25, 1]]))
    # e^((ln 2 + ln 3)/2) = √6; e^(−2 ln 2/2) = ½
    root = math.sqrt(6)
    torch.testing.assert_close(ratios(logps, old, mask, "sequence"), float64([[root, root, 1], [0.5, 0.5, 1]]))


@given(**sizes)
def test_samples_have_the_value_and_gradient_of_plain_gspo(b, t, seed):
    """GSPO as in the paper: one ratio a sample, one clip, a mean over samples."""
    case = rollouts(b, t, seed)
    mask, rows = case["mask"], case["mask"].any(dim=1)
    gap = ((case["logps"] - case["old"]) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    s, a = gap.exp(), case["scores"]
    plain = torch.maximum(-a * s, -a * s.clamp(0.9, 1.1)) * case["alpha"] * rows
    plain = plain.sum() / rows.sum().clamp(min=1)
    ours = policy_loss(case["logps"], case["old"], a, mask, case["alpha"], 0.1, level="sequence")
    torch.testing.assert_close(ours, plain, **exactly)
    torch.testing.assert_close(gradients(ours, case)[0], gradients(plain, case)[0], **exactly)


def test_samples_count_once_whatever_their_length():
    # r = 1: tokens give −(2 · 1 + 1 · 4)/3, samples −(1 + 4)/2
    mask, zero = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2)
    for level, expected in (("token", -2), ("sequence", -2.5)):
        assert policy_loss(zero, zero, float64([1, 4]), mask, 1.0, 0.2, level=level).item() == pytest.approx(expected)


def test_samples_of_one_token_are_tokens():
    case = rollouts(5, 1, seed=3)
    assert case["mask"].any()
    pair = [
        policy_loss(case["logps"], case["old"], case["advantages"], case["mask"], case["alpha"], 0.2, level=level)
        for level in LEVELS
    ]
    torch.testing.assert_close(*pair, **exactly)


@pytest.mark.parametrize("level", LEVELS)
def test_no_update_leaves_every_measure_at_rest(level):
    case = rollouts(4, 6, seed=8)
    arguments = (case["logps"], case["logps"].detach(), case["mask"])
    assert torch.equal(ratios(*arguments, level), torch.ones(4, 6))
    assert statistics(*arguments, 0.2, level) == {"clip_fraction": 0, "kl_k1": 0, "kl_k3": 0}
    loss = retention_loss(*arguments, case["beta"])
    assert loss.item() == 0
    assert not gradients(loss, case)[0].any()


def test_statistics_by_hand():
    # r = 2, 1.1, ½, and one masked: two of three are more than 0.2 from 1
    logps = float64([[LN2, math.log(1.1)], [-LN2, 7]])
    found = statistics(logps, torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), 0.2)
    assert found["clip_fraction"].item() == pytest.approx(2 / 3)
    assert found["kl_k1"].item() == pytest.approx(-math.log(1.1) / 3)  # −(ln 2 + ln 1.1 − ln 2)/3
    assert found["kl_k3"].item() == pytest.approx((1 + 0.1 - 0.5 - math.log(1.1)) / 3)  # Σ (r − 1) − Σ ln r
    # of samples: s = √2.2 and ½, so all three tokens are outside
    whole = statistics(logps, torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), 0.2, "sequence")
    assert whole == {**found, "clip_fraction": 1}


def test_both_estimates_are_of_the_kl_divergence():
    """Over all tokens of a small vocabulary, each as often as π_old draws it, both are KL(π_old‖π_θ) exactly."""
    times = torch.tensor([1, 2, 5])
    old, new = (times / 8).log(), float64([0.5, 0.3, 0.2]).log()
    drawn = torch.arange(3).repeat_interleave(times)
    found = statistics(new[drawn][None], old.double()[drawn][None], torch.ones(1, 8), 0.2)
    kl = sum(p * math.log(p / q) for p, q in zip((1 / 8, 2 / 8, 5 / 8), (0.5, 0.3, 0.2), strict=True))
    assert found["kl_k1"].item() == pytest.approx(kl, rel=1e-6)
    assert found["kl_k3"].item() == pytest.approx(kl, rel=1e-6)


@given(**sizes)
def test_k3_is_never_negative(b, t, seed):
    case = rollouts(b, t, seed)
    assert statistics(case["logps"], case["old"], case["mask"], 0.2)["kl_k3"].item() >= 0


def test_importance_by_hand():
    # log π_prox − log μ = 0, ln 3, −ln 2, and padding: w = 1, min(2, 3), ½
    prox, drew = float64([[-1, -1, -2, math.nan]]), float64([[-1, -1 - LN3, -2 + LN2, 9]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert importance_weights(prox, drew, mask, 2.0).tolist() == [pytest.approx([1, 2, 0.5, 1])]
    assert importance_weights(prox, drew, mask, math.inf).tolist() == [pytest.approx([1, 3, 0.5, 1])]
    # a sample's: exp((0 + ln 3 − ln 2)/3) = 1.5^⅓
    assert importance_weights(prox, drew, mask, 2.0, "sequence").tolist() == [pytest.approx([1.5 ** (1 / 3)] * 3 + [1])]


@pytest.mark.parametrize("level", LEVELS)
@given(b=st.integers(1, 4), t=st.integers(1, 5), seed=st.integers(0, 2**16), clip=st.floats(1, 4))
def test_importance_is_1_on_policy_and_at_most_c(level, b, t, seed, clip):
    case = rollouts(b, t, seed)
    prox, mask = case["logps"].detach(), case["mask"]
    assert torch.equal(importance_weights(prox, prox, mask, clip, level), torch.ones_like(prox)), "bit for bit"
    w = importance_weights(prox, case["old"], mask, clip, level)
    assert float(w.max()) <= clip and float(w.min()) > 0 and bool((w[~mask] == 1).all())


def test_importance_turns_an_expectation_under_the_older_policy_into_one_under_the_newer():
    # two tokens: μ = (¼, ¾), π_prox = (¾, ¼), A = (1, −1), r = 1. Σ μ w (−A): w = (3, ⅓) gives −(¾ − ¼) = −½, which is
    # Σ π_prox (−A); truncated at 2 it is −¼ · 2 + ¾ · ⅓ = −¼; without weights −(¼ − ¾) = ½, the wrong way
    drew, prox, advantages = float64([[0.25], [0.75]]), float64([[0.75], [0.25]]), float64([[1], [-1]])
    mask = torch.ones(2, 1)

    def expected(w):
        of = [policy_loss(prox[i : i + 1].log(), prox[i : i + 1].log(), (w * advantages)[i : i + 1], mask[:1], 1.0, 0.2)
              for i in range(2)]  # fmt: skip
        return float(drew[0] * of[0] + drew[1] * of[1])

    for clip, value in ((math.inf, -0.5), (2.0, -0.25), (1.0, 0.0)):  # at most 1: −¼ + ¾ · ⅓
        assert expected(importance_weights(prox.log(), drew.log(), mask, clip)) == pytest.approx(value)
    assert expected(torch.ones(2, 1)) == 0.5


@given(b=st.integers(1, 4), t=st.integers(1, 5), seed=st.integers(0, 2**16), clip=st.floats(0.1, 2))
def test_weighted_advantages_are_the_decoupled_objective(b, t, seed, clip):
    """Mean over tokens of w · max(−A r, −A clip(r, 1 − ε, 1 + ε)), r to π_prox; no gradient flows through w."""
    case = rollouts(b, t, seed)
    new, mask = case["logps"], case["mask"]
    prox, drew, a = case["old"].clone().requires_grad_(), case["ref"].clone().requires_grad_(), case["advantages"]
    w = importance_weights(prox, drew, mask, 2.0)
    assert not w.requires_grad
    got = policy_loss(new, prox, a * w, mask, 1.0, clip)
    r = (new - prox.detach()).exp()
    each = torch.exp(prox - drew).detach().clamp(max=2) * torch.maximum(-a * r, -a * r.clamp(1 - clip, 1 + clip))
    want = each[mask].sum() / max(int(mask.sum()), 1)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(v, [new, prox, drew], allow_unused=True) for v in (got, want)), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)


def test_gradcheck_of_the_weighted_surrogate():
    case = rollouts(3, 4, 0)
    w = importance_weights(case["old"], case["ref"], case["mask"], 2.0)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, case["old"], case["advantages"] * w, case["mask"], case["alpha"], 0.2),
        (case["logps"],),
    )


@pytest.mark.parametrize("clip", [0.5, -1, math.nan])
def test_importance_refuses(clip):
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip must be at least 1"):
        importance_weights(one, one, one + 1, clip)
    with pytest.raises(ValueError, match="behaviour_logps must be finite, not nan"):
        importance_weights(one, one * math.nan, one + 1, 2.0)


def test_an_unknown_level_is_refused():
    x = torch.zeros(1, 1)
    for call in (lambda: ratios(x, x, x, "word"), lambda: policy_loss(x, x, x, x, 1.0, 0.2, level="word")):
        with pytest.raises(ValueError, match="level must be token or sequence, not 'word'"):
            call()


# ---- retention and values -------------------------------------------------------------------------------------------


def test_retention_by_hand():
    # gaps 1, −2 | 3 (and one masked), β = 2, ½: (2 · (1 + 4) + ½ · 9)/3
    logps = float64([[-1, -3], [-1, -50]]).requires_grad_()
    previous, mask = float64([[-2, -1], [-4, -1]]), torch.tensor([[True, True], [True, False]])
    loss = retention_loss(logps, previous, mask, float64([2, 0.5]))
    assert loss.item() == pytest.approx(14.5 / 3)
    # 2 β gap/3
    slopes = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(slopes, float64([[4 / 3, -8 / 3], [1, 0]]))
    assert retention_loss(logps, previous, mask, 1.0).item() == pytest.approx(14 / 3)


def test_value_by_hand():
    # V_old = 5, ε = 1; V = 8, G = 9: clipped 6, max(1, 9); V = 8, G = 5: max(9, 1); V = 5½, G = 7: (1.5)² twice
    values = float64([[8, 8, 5.5, 77]]).requires_grad_()
    returns, mask = float64([[9, 5, 7, 0]]), torch.tensor([[True, True, True, False]])
    loss = value_loss(values, torch.full((1, 4), 5.0), returns, mask, 1.0)
    assert loss.item() == pytest.approx(0.5 * (9 + 9 + 2.25) / 3)
    # V − G over 3, and 0 where the clipped one is worse
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], float64([[0, 1, -0.5, 0]]))


@given(**sizes)
def test_value_without_clip_is_half_the_square(b, t, seed):
    case = rollouts(b, t, seed)
    mask = case["mask"]
    loss = value_loss(case["values"], case["old_values"], case["returns"], mask, math.inf)
    square = ((case["values"] - case["returns"]).square() * mask).sum() / mask.sum().clamp(min=1)
    torch.testing.assert_close(loss, 0.5 * square, **exactly)


# ---- advantages -----------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # γ = ½, λ = ½; δ_2 = 4 − 2 = 2; δ_1 = 1 + ½ · 2 − 3 = −1, A_1 = −1 + ¼ · 2 = −½; δ_0 = 0 + ½ · 3 − 1 = ½,
    # A_0 = ½ + ¼ · (−½) = ⅜; the same between padding, and with padding inside, as the next valid token counts
    rewards, values = [0, 1, 4], [1, 3, 2]
    for at in ([0, 1, 2], [2, 3, 4], [0, 3, 5]):
        r, v = torch.full((2, 1, 6), math.nan, dtype=torch.float64)
        mask = torch.zeros(1, 6, dtype=torch.bool)
        r[0, at], v[0, at], mask[0, at] = float64(rewards), float64(values), True
        advantages, returns = gae(r, v, mask, 0.5, 0.5)
        assert advantages[0, at].tolist() == [0.375, -0.5, 2]
        assert returns[0, at].tolist() == [1.375, 2.5, 4]
        assert not advantages[~mask].any()
        assert not returns[~mask].any()


unit = st.floats(0, 1)


@given(**sizes, gamma=unit, lam=unit)
def test_gae_is_the_sum_over_later_errors(b, t, seed, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, row by row without padding; λ = 0 the error alone, λ = 1 the return less the value."""
    case = rollouts(b, t, seed)
    found, td, monte_carlo = (
        gae(case["rewards"], case["values"], case["mask"], gamma, x)[0] for x in (lam, 0, 1)
    )  # fmt: skip
    for row in range(b):
        here = case["mask"][row]
        r, v = (case[name].detach()[row, here].tolist() for name in ("rewards", "values"))
        n = len(r)
        delta = [r[i] + gamma * (v[i + 1] if i + 1 < n else 0) - v[i] for i in range(n)]
        expected = [sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, n)) for i in range(n)]
        discounted = [sum(gamma ** (j - i) * r[j] for j in range(i, n)) for i in range(n)]
        torch.testing.assert_close(found[row, here], float64(expected), **exactly)
        torch.testing.assert_close(td[row, here], float64(delta), **exactly)
        torch.testing.assert_close(monte_carlo[row, here], float64(discounted) - float64(v), **exactly)


@pytest.mark.parametrize(("gamma", "lam"), [(1.1, 0.9), (-0.1, 0.9), (0.9, 1.1), (0.9, math.nan)])
def test_gae_refuses(gamma, lam):
    with pytest.raises(ValueError, match=r"gamma and lam must lie in \[0, 1\]"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), gamma, lam)


def test_whiten_by_hand():
    # valid: 1, 3, 8: mean 4, variance (9 + 1 + 16)/3
    values, mask = float64([[1, 3, 100], [8, -5, 0]]), torch.tensor([[True, True, False], [True, False, False]])
    sigma = math.sqrt(26 / 3)
    expected = float64([[-3 / sigma, -1 / sigma, 0], [4 / sigma, 0, 0]])
    torch.testing.assert_close(whiten(values, mask), expected)
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), expected + 4 * mask)


@given(
    b=st.integers(2, 5), t=st.integers(2, 6), seed=st.integers(0, 9999), scale=st.floats(1e-9, 1e9),
    shift=st.floats(-1, 1),
)  # fmt: skip
def test_whitened_has_mean_0_and_deviation_1_in_any_unit(b, t, seed, scale, shift):
    case = rollouts(b, t, seed)
    mask = case["mask"].clone()
    mask[0, 0] = mask[1, 1] = True
    white = whiten(case["advantages"], mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(whiten((case["advantages"] + shift) * scale, mask), white)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_whiten_without_deviation(kind, n):
    # 3 × 0.1 does not have a mean of exactly 0.1 in floating point, and noise must not be blown up to 1
    values, mask = torch.full((2, 7), 0.1, dtype=kind), torch.zeros(2, 7, dtype=torch.bool)
    values[~mask] = 0.1
    mask[1, :n] = True
    assert not whiten(values, mask).any()
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), values * mask)


def test_token_rewards_by_hand():
    # gaps 1, 0, −2 | 4, 1 left-padded | no token; kl_coef ½; scores 3 | 10, cut off | —
    logps, ref = torch.zeros(3, 3), float64([[-1, 0, 2], [math.nan, -4, -1], [math.nan] * 3])
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    ended, scores = torch.tensor([True, False, False]), float64([3, 10, math.nan])
    found = token_rewards(scores, logps, ref, mask, ended, 0.5)
    assert found.tolist() == [[-0.5, 0, 1 + 3], [0, -2, -0.5 + 10 - 1], [0, 0, 0]]
    found = token_rewards(scores, logps, ref, mask, ended, 0.5, missing_end=-4.0)
    assert found[1].tolist() == [0, -2, -0.5 + 10 - 4]


@given(**sizes, kl_coef=st.floats(0, 2), missing_end=st.floats(-3, 3))
def test_token_rewards_sum_to_score_less_kl_less_what_the_missing_end_costs(b, t, seed, kl_coef, missing_end):
    case = rollouts(b, t, seed)
    mask, some = case["mask"], case["mask"].any(dim=1)
    found = token_rewards(case["scores"], case["old"], case["ref"], mask, case["ended"], kl_coef, missing_end)
    kl = ((case["old"] - case["ref"]) * mask).detach().sum(dim=1)
    expected = (case["scores"] + torch.where(case["ended"], 0.0, missing_end)) * some - kl_coef * kl
    torch.testing.assert_close(found.sum(dim=1), expected, **exactly)


def test_token_rewards_refuse():
    x, mask, one = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), torch.ones(2)
    for wrong in ({"kl_coef": -0.1}, {"kl_coef": math.nan}, {"kl_coef": 0.1, "missing_end": math.nan}):
        with pytest.raises(ValueError, match="need kl_coef >= 0 and a finite missing_end"):
            token_rewards(one, x, x, mask, one, **wrong)
    with pytest.raises(ValueError, match="scores must be finite, not nan"):
        token_rewards(torch.tensor([1.0, math.nan]), x, x, mask, one, 0.1)


def test_adapt_kl_by_hand():
    # 0.2 (1 + (7/6 − 1) · 256/10,000); beyond ±20% the error is cut
    assert adapt_kl(0.2, 7, 6, 10_000, 256) == pytest.approx(0.2 * (1 + 256 / 60_000))
    assert adapt_kl(0.2, 60, 6, 10_000, 256) == pytest.approx(0.2 * (1 + 0.2 * 0.0256))
    assert adapt_kl(0.2, 0, 6, 10_000, 256) == pytest.approx(0.2 * (1 - 0.2 * 0.0256))
    assert adapt_kl(0.2, 6, 6, 10_000, 256) == 0.2
    assert adapt_kl(0.2, 60, 6, 10_000, 0) == 0.2
    assert adapt_kl(0.2, -1, 6, 10_000, 256) == adapt_kl(0.2, 0, 6, 10_000, 256)  # an estimate may be negative


def test_adapt_kl_steers_to_the_target():
    """A policy whose KL is 1/coef is held at the target by coef = 1/target."""
    coef = 1.0
    for _ in range(2000):
        coef = adapt_kl(coef, 1 / coef, 4.0, 100, 10)
    assert coef == pytest.approx(0.25, rel=1e-6)


@given(
    coef=st.floats(1e-6, 1e3), kl=st.floats(-10, 1e6), target=st.floats(1e-3, 1e3), n=st.floats(0, 4.9),
)  # fmt: skip
def test_adapt_kl_moves_towards_the_target_and_stays_positive(coef, kl, target, n):
    moved = adapt_kl(coef, kl, target, 1.0, n)
    assert moved > 0
    assert moved >= coef if kl >= target else moved <= coef


@pytest.mark.parametrize(
    "wrong", [{"kl": math.nan}, {"kl": math.inf}, {"coef": 0}, {"target": 0}, {"horizon": 0}, {"n": -1}, {"n": 500}]
)
def test_adapt_kl_refuses(wrong):
    with pytest.raises(ValueError, match="need 0 <= n < 5 horizons"):
        adapt_kl(**{"coef": 0.1, "kl": 1.0, "target": 1.0, "horizon": 100, "n": 10, **wrong})


def test_group_advantages_by_hand():
    # group 7: 1, 2, 6: mean 3, variance (4 + 1 + 9)/3; group −1: equal; group 4: alone
    rewards, groups = float64([1, 0.1, 2, 9, 6, 0.1, 0.1]), torch.tensor([7, -1, 7, 4, 7, -1, -1])
    sigma = math.sqrt(14 / 3)
    torch.testing.assert_close(
        group_advantages(rewards, groups), float64([-2 / sigma, 0, -1 / sigma, 0, 3 / sigma, 0, 0])
    )
    assert group_advantages(rewards, groups, scale=False).tolist() == [-2, 0, -1, 0, 3, 0, 0]


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.floats(-10, 10).map(lambda x: round(x, 3))), max_size=20),
    st.floats(0.1, 10), st.floats(-5, 5),
)  # fmt: skip
def test_groups_are_centred_scaled_and_alone(samples, unit, shift):
    groups = torch.tensor([group for group, _ in samples], dtype=torch.long)
    rewards = float64([reward for _, reward in samples])
    found = group_advantages(rewards, groups)
    for group in set(groups.tolist()):
        here = groups == group
        several = len(set(rewards[here].tolist())) > 1
        assert found[here].mean().item() == pytest.approx(0, abs=1e-9)
        assert found[here].std(correction=0).item() == pytest.approx(1 if several else 0, abs=1e-9)
        # other groups have no part in it, nor has the group's unit
        alone = group_advantages(rewards[here] * unit + shift, groups[here])
        torch.testing.assert_close(found[here], alone, rtol=0, atol=1e-6)


def test_group_advantages_refuse_a_missing_reward():
    with pytest.raises(ValueError, match="reward 1 is not finite"):
        group_advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 1]))


# ---- heuristic weights ----------------------------------------------------------------------------------------------


def test_five_buckets_by_hand():
    # k = ½, z_P = ±1, z_R = ±0.8: f(1) = 1.5, f(−1) = ½, f(0.8) = 1.3, f(−0.8) = 0.7
    # high_performance, overfitting, high_variance, noisy, normal
    z_p, z_r = [1, 1, -1, -1, 0.3], [0.8, -0.8, 0.8, -0.8, 9]
    alpha, beta = heuristic_weights(z_p, z_r, k=0.5, lb=0, ub=2)
    assert alpha.tolist() == pytest.approx([1.3, 0.7, 1.3, 0.7, 1])
    assert beta.tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 1])
    alpha, beta = heuristic_weights(z_p, z_r, k=0.5, lb=0, ub=2, lead="probability")
    assert alpha.tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 1])
    assert beta.tolist() == pytest.approx([1.3, 0.7, 1.3, 0.7, 1])
    # z = ±9: 9.5 and −7.5, clipped; the official code's high_variance went below 0 here
    alpha, beta = heuristic_weights([-9.0], [9.0], k=0.5, lb=0.5, ub=2.5)
    assert (alpha.item(), beta.item()) == (2.5, 0.5)


scores = st.floats(-4, 4).map(lambda x: round(x, 2))
bounds = st.tuples(st.floats(0, 1), st.floats(1, 5))


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=30), st.sampled_from([0, 0.3, 0.5, 0.85]), bounds)
@pytest.mark.parametrize("lead", LEADS)
def test_weights_follow_the_buckets_of_the_contract(lead, z, k, limits):
    (lb, ub), (z_p, z_r) = limits, np.array(z).T
    buckets = classify(z_p, z_r, Stats(0.0, 1.0, 0.0, 1.0, 2), k)  # scores are the values themselves
    weights = heuristic_weights(z_p, z_r, k=k, lb=lb, ub=ub, lead=lead)
    for weight, above in zip(weights, ABOVE[lead], strict=True):
        assert bool(((lb <= weight) & (weight <= ub)).all())
        for bucket, w in zip(buckets, weight.tolist(), strict=True):
            if bucket == "normal":
                assert w == 1
            else:
                assert w > 1 or w == ub if bucket in above else w < 1 or w == lb


@pytest.mark.parametrize("lead", LEADS)
@given(k=st.floats(0, 2), near=st.floats(1e-8, 1e-6), other=st.floats(0.01, 3), signs=st.sampled_from([-1, 1]))
def test_weights_start_from_1_at_their_own_edge(lead, k, near, other, signs):
    edge, far = signs * (k + near), k + other  # just inside; the other score well inside
    z = (far, edge) if lead == "reward" else (edge, far)
    alpha, beta = heuristic_weights([z[0]], [z[1]], k=k, lb=0.1, ub=9)
    if lead == "reward":
        assert alpha.item() == pytest.approx(1, abs=2e-6)
        assert alpha.item() != 1
    else:
        assert beta.item() == pytest.approx(1, abs=2e-6)
        assert beta.item() != 1


def test_weights_jump_at_the_edge_of_the_other_score():
    """What the docstring owns up to: at z_P = k a good sample enters `normal`, where α is 1."""
    alpha, _ = heuristic_weights([0.5, 0.5 + 1e-6], [2.0, 2.0], k=0.5, lb=0.5, ub=3)
    assert alpha.tolist() == [1, 2.5]  # f(2) = 2 + 1 − ½


def test_inequalities_are_strict_at_nine_decimals():
    third = 0.1 + 0.2  # 0.30000000000000004
    for lead in LEADS:
        weights = heuristic_weights([third, 0.3, 0.301], [1, 1, 0.3], k=0.3, lb=0.5, ub=2.5, lead=lead)
        assert all(weight.tolist() == [1, 1, 1] for weight in weights)


def test_what_cannot_be_judged_weighs_1_and_infinity_is_clipped():
    nan, inf = math.nan, math.inf
    alpha, beta = heuristic_weights([nan, 2.0, nan, inf, -inf], [2.0, nan, nan, -inf, 1.0], k=0.5, lb=0.5, ub=2.5)
    assert alpha.tolist() == [1, 1, 1, 0.5, 1.5]
    assert beta.tolist() == [1, 1, 1, 2.5, 0.5]


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=20))
def test_the_leads_are_mirror_images(z):
    z_p, z_r = float64(z).T
    pair = heuristic_weights(z_p, z_r, k=0.4, lb=0.3, ub=2)
    mirrored = heuristic_weights(z_p, z_r, k=0.4, lb=0.3, ub=2, lead="probability")
    assert torch.equal(pair[0], mirrored[1])
    assert torch.equal(pair[1], mirrored[0])


def test_types_of_scores():
    z = [1.0, -1.0]
    for given_, kind in [
        (z, torch.float64), (np.array(z, dtype=np.float32), torch.float64), (torch.tensor(z), torch.float32),
        (float64(z), torch.float64), (torch.tensor(z, dtype=torch.bfloat16), torch.float32),
        (torch.tensor([1, -1]), torch.float32),
    ]:  # fmt: skip
        alpha, beta = heuristic_weights(given_, given_, k=0.5, lb=0.5, ub=2.5)
        assert alpha.dtype == beta.dtype == kind
        assert alpha.tolist() == beta.tolist() == [1.5, 0.5]
    assert [w.shape for w in heuristic_weights([], [], k=0.5, lb=0.5, ub=2.5)] == [(0,), (0,)]


def learned(*arguments, **options):
    return learned_weights(*arguments, generator=seeded(0), **options)


@pytest.mark.parametrize("weights", [heuristic_weights, learned])
def test_weights_refuse(weights):
    good = {"k": 0.5, "lb": 0.5, "ub": 2.5}
    for wrong in (
        {"k": -0.1}, {"k": math.nan}, {"lb": 1.1}, {"ub": 0.9}, {"lb": -0.1}, {"ub": math.inf}, {"lb": math.nan},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="need k >= 0 and 0 <= lb <= 1 <= ub < infinity"):
            weights([1.0], [1.0], **(good | wrong))
    with pytest.raises(ValueError, match="lead must be reward or probability, not 'rewards'"):
        weights([1.0], [1.0], **good, lead="rewards")
    with pytest.raises(ValueError, match=r"z_p and z_r must be of one shape, not \(2,\) and \(1,\)"):
        weights([1.0, 2.0], [1.0], **good)


# ---- learned weights ------------------------------------------------------------------------------------------------


def buckets_of(z_p, z_r, k):
    return classify(z_p.numpy(), z_r.numpy(), Stats(0.0, 1.0, 0.0, 1.0, 2), k)


def wrong_orders(weights, buckets, lead, margin=0.0) -> list[tuple[str, str]]:
    """Corners whose mean weight is on the wrong side of normal's, or not by the margin on the right one."""
    wrong = []
    for name, weight, above in zip(("alpha", "beta"), weights, ABOVE[lead], strict=True):
        mean = {bucket: weight[torch.from_numpy(buckets == bucket)].mean().item() for bucket in [*CORNERS, "normal"]}
        for corner in CORNERS:
            gap = mean[corner] - mean["normal"]
            wrong += [] if (gap if corner in above else -gap) > margin else [(name, corner)]
    return wrong


def random_batch(number: int):
    """Scores of a batch with all five buckets, and the options of a fit; three kinds of batches in turn."""
    draw = seeded(number)
    kind = ("correlated", "skewed", "binary")[number % 3]
    n = int(
        torch.randint(64, 129, (1,), generator=draw)
        if kind == "binary"
        else torch.randint(12, 41, (1,), generator=draw)
    )
    rho = float(torch.rand(1, generator=draw)) * 1.4 - 0.7
    k, (lb, ub) = (0.3, 0.5, 0.7)[number // 3 % 3], ((0.5, 2.5), (0.5, 1.5), (0.0, 3.0))[number // 9 % 3]
    while True:
        p, r = torch.randn(2, n, generator=draw, dtype=torch.float64)
        if kind == "correlated":
            r = rho * p + math.sqrt(1 - rho**2) * r
        elif kind == "skewed":  # as log-probabilities are: a long tail below
            p = -p.exp()
        else:
            r = (r > 0.3).double()
        z_p, z_r = ((x - x.mean()) / x.std(correction=0) for x in (p, r))
        if len(set(buckets_of(z_p, z_r, k))) == 5:
            return z_p, z_r, {"k": k, "lb": lb, "ub": ub, "lead": LEADS[number % 2], "power": 1 + number // 2 % 2}


def test_learned_weights_keep_the_orders_on_200_random_batches():
    for number in range(200):
        z_p, z_r, options = random_batch(number)
        weights = learned_weights(z_p, z_r, **options, generator=seeded(number))
        wrong = wrong_orders(weights, buckets_of(z_p, z_r, options["k"]), options["lead"])
        assert not wrong, (number, wrong)
        for weight in weights:
            assert bool(((options["lb"] <= weight) & (weight <= options["ub"])).all())
            assert 0.5 < weight.mean().item() < 1.5  # and the square keeps them near 1


@pytest.mark.parametrize("number", [72, 157])  # of the 200
def test_the_literal_sum_loses_orders_that_the_penalty_keeps(number):
    z_p, z_r, options = random_batch(number)
    buckets = buckets_of(z_p, z_r, options["k"])
    literal, ours = (
        learned_weights(z_p, z_r, **options, generator=seeded(0), penalty=penalty, steps=400) for penalty in (0, 10)
    )
    assert wrong_orders(literal, buckets, options["lead"])
    margin = (options["ub"] - options["lb"]) / 100
    assert not wrong_orders(ours, buckets, options["lead"], margin / 2)  # held at the margin, Adam's steps apart
    assert wrong_orders(ours, buckets, options["lead"], margin * 1.5)


def test_an_order_that_no_linear_score_has():
    """Rewards 0 or 1, and the only normal sample was rewarded: it lies between two corners that should be above it."""
    z_p, z_r = float64([[0.6, 0.6, -0.6, -0.6, 0], [1, -1, 1, -1, 1]])
    buckets = buckets_of(z_p, z_r, 0.5)
    assert buckets.tolist() == [*CORNERS, "normal"]
    weights = learned(z_p, z_r, k=0.5, lb=0.5, ub=2.5)
    assert wrong_orders(weights, buckets, "reward") in ([("alpha", "high_performance")], [("alpha", "high_variance")])
    high_performance, overfitting, high_variance, noisy, _ = weights[0].tolist()
    assert min(high_performance, high_variance) > max(overfitting, noisy)  # corners keep theirs


def shape_of(weight, lb, ub, power, x):
    """φ by least squares of logit(((w − lb)/(ub − lb))^(1/p)) on x, and what it leaves."""
    share = ((weight - lb) / (ub - lb)) ** (1 / power)
    logit = torch.logit(share)
    phi = torch.linalg.lstsq(x, logit[:, None]).solution[:, 0]
    return phi, (x @ phi - logit).abs().max().item()


@pytest.mark.parametrize("power", [1, 2])
def test_learned_weights_have_their_form(power):
    z_p, z_r = torch.randn(2, 50, generator=seeded(1), dtype=torch.float64)
    alpha, beta = learned(z_p, z_r, k=0.5, lb=0.5, ub=2.5, power=power)
    x = torch.stack([z_p, z_r, torch.ones(50)], dim=1)
    phi, rest = shape_of(alpha, 0.5, 2.5, 1, x)
    assert rest < 1e-9
    assert phi[1] > 2 * phi[0].abs()  # α follows the reward
    phi, rest = shape_of(beta, 0.5, 2.5, power, x)
    assert rest < 1e-9
    assert phi[0] > 2 * phi[1].abs()


@pytest.mark.parametrize(("lead", "power"), [("reward", 1), ("reward", 2), ("probability", 2)])
def test_learned_weights_are_where_another_optimiser_finds_the_minimum(lead, power):
    """The literal objective written out, where its orders hold by more than the penalty's margin."""
    lb, ub, tau, k = 0.5, 2.5, 0.1, 0.5
    z_p, z_r = torch.randn(2, 80, generator=seeded(3), dtype=torch.float64)
    x, buckets = np.stack([z_p, z_r, np.ones(80)], axis=1), buckets_of(z_p, z_r, k)

    def weights_at(phi):
        share = 1 / (1 + np.exp(-x @ phi.reshape(2, 3).T))
        return (ub - lb) * share[:, 0] + lb, (ub - lb) * share[:, 1] ** power + lb

    def objective(phi):
        total = 0.0
        for weight, above in zip(weights_at(phi), ABOVE[lead], strict=True):
            total += ((weight - 1) ** 2).mean()
            for corner in CORNERS:
                difference = weight[buckets == "normal"].mean() - weight[buckets == corner].mean()
                total += tau * (difference if corner in above else -difference)
        return total

    best = weights_at(minimize(objective, np.zeros(6), method="BFGS").x)
    ours = learned(z_p, z_r, k=k, lb=lb, ub=ub, lead=lead, power=power, tau=tau, steps=300)
    assert not wrong_orders(ours, buckets, lead)
    for mine, theirs in zip(ours, best, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=1e-3)


def test_learned_weights_depend_on_the_generator_alone_and_not_on_the_order():
    z_p, z_r, options = random_batch(0)
    options["steps"] = 30  # before all starts have come to one end

    def fit(seed, rows=slice(None)):
        return torch.stack(learned_weights(z_p[rows], z_r[rows], **options, generator=seeded(seed)))

    torch.manual_seed(1)
    first = fit(4)
    torch.manual_seed(2)
    assert torch.equal(fit(4), first)
    assert not torch.equal(fit(5), first)
    order = torch.randperm(len(z_p), generator=seeded(9))
    assert torch.equal(fit(4, order), first[:, order])  # to the last bit


def test_learned_weights_where_gradients_are_off():
    z_p, z_r, options = random_batch(3)
    expected = learned(z_p, z_r, **options)
    assert not any(weight.requires_grad for weight in expected)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert all(map(torch.equal, learned(z_p + 0, z_r + 0, **options), expected))
    leaf = z_p.clone().requires_grad_()
    assert all(map(torch.equal, learned(leaf, z_r, **options), expected))
    assert leaf.grad is None


def test_the_leads_of_learned_weights_are_mirror_images():
    z_p, z_r, options = random_batch(6)
    options |= {"lead": "reward"}
    there = learned(z_p, z_r, **options)
    back = learned(z_r, z_p, **(options | {"lead": "probability"}))
    assert all(map(torch.equal, there, back))


def test_scores_that_are_missing_have_no_part():
    z_p, z_r, options = random_batch(2)
    known = learned(z_p, z_r, **options)
    nan = float64([math.nan, 1, math.inf])
    more = learned(torch.cat([nan, z_p]), torch.cat([float64([1, math.nan, 1]), z_r]), **options)
    for weight, before in zip(more, known, strict=True):
        assert weight[:3].tolist() == [1, 1, 1]
        assert torch.equal(weight[3:], before)


def test_learned_weights_of_few_or_no_samples():
    options = {"k": 0.5, "lb": 0.5, "ub": 2.5}
    for z_p, z_r in (([], []), ([math.nan], [1.0])):
        assert [weight.tolist() for weight in learned(z_p, z_r, **options)] == [[1.0] * len(z_p)] * 2
    # normal alone: nothing pulls away from 1
    for weight in learned([0.1, -0.2, 0.3], [0.0, 0.0, 0.0], **options, steps=300):
        torch.testing.assert_close(weight, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)
    # overfitting and high_variance alone, with bounds as far from 1: normal stands at 1, so they move equally far
    for weight, (low, high) in zip(
        learned([1.0, -1.0], [-1.0, 1.0], k=0.5, lb=0.5, ub=1.5, power=1, steps=300), ([0, 1], [1, 0]), strict=True
    ):
        assert weight[low] < 0.95
        assert (weight[low] + weight[high]).item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("power", [1, 2])
def test_learned_weights_start_close_to_1_and_stay_there_without_tau(power):
    z_p, z_r, options = random_batch(0)
    for nothing, near in (({"steps": 0}, 0.1), ({"tau": 0, "steps": 300}, 1e-3)):
        for weight in learned(z_p, z_r, **(options | {"power": power} | nothing)):
            torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=near)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=12),
    bounds,
    st.sampled_from([1, 2]),
)
def test_learned_weights_stay_in_their_bounds(z, limits, power):
    z_p, z_r = float64(z).T
    lb, ub = limits
    for weight in learned(z_p, z_r, k=0.5, lb=lb, ub=ub, power=power, steps=30, lr=1.0):
        assert bool(((lb <= weight) & (weight <= ub)).all())


def test_bounds_hold_to_the_last_bit():
    assert (1.7 - 0.6) * 1.0 + 0.6 > 1.7  # in floating point
    for weight in learned([60.0], [60.0], k=0.5, lb=0.6, ub=1.7, lr=1, steps=3):  # σ is 1
        assert weight.item() == 1.7


def test_no_range_leaves_1():
    z_p, z_r, _ = random_batch(0)
    assert all(bool((weight == 1).all()) for weight in learned(z_p, z_r, k=0.5, lb=1, ub=1))


def test_learned_weights_keep_the_type():
    alpha, beta = learned(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]), k=0.5, lb=0.5, ub=2.5)
    assert alpha.dtype == beta.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"power": 3}, {"tau": -1}, {"lr": 0}, {"lr": math.nan}, {"steps": -1}, {"penalty": -1}, {"tau": math.nan}]
)
def test_learned_weights_refuse(wrong):
    with pytest.raises(ValueError, match="need power 1 or 2, lr > 0"):
        learned([1.0], [1.0], k=0.5, lb=0.5, ub=2.5, **wrong)
    with pytest.raises(ValueError, match=r"scores must be \[n\], not \(1, 1\)"):
        learned([[1.0]], [[1.0]], k=0.5, lb=0.5, ub=2.5)


@pytest.mark.parametrize(("kind", "noise"), [(torch.float64, 1e-16), (torch.float32, 3e-8)])
def test_rounding_is_no_spread(kind, noise):
    """0.1 + 0.2 is not 0.3 in float64, by 6e-17: a reward that adds up its terms has no better answer in that."""
    rewards = torch.tensor([0.3 + noise, 0.3, 0.3, 0.3], dtype=kind)
    assert rewards[0] != rewards[1]
    assert group_advantages(rewards, torch.zeros(4, dtype=torch.long)).abs().max() == 0
    assert whiten(rewards[None], torch.ones(1, 4, dtype=torch.bool)).abs().max() < 1e-7
    assert group_advantages(rewards + torch.arange(4), torch.zeros(4, dtype=torch.long)).abs().max() > 1


def test_a_token_that_the_policy_rules_out_has_no_gradient_by_samples():
    logps = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    ones = torch.ones(1, 2)
    loss = policy_loss(logps, -ones, ones, ones.bool(), 1.0, 0.2, level="sequence")
    loss.backward()
    assert loss.isfinite() and logps.grad is not None and logps.grad.isfinite().all()
