import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.losses.pbl import preference_bias_loss

NEGATIVES = ["bounded", "literal"]
LN3 = math.log(3)


def answers(n: int, j: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π_θ with gradient, log π_ref, aligned, mask of n prompts; all [n, j], float64."""
    draw = torch.Generator().manual_seed(seed)
    logps = -10 * torch.rand(2, n, j, generator=draw, dtype=torch.float64)
    aligned, mask = torch.rand(2, n, j, generator=draw) < 0.6
    return logps[0].requires_grad_(), logps[1], aligned, mask


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


sets = {"n": st.integers(1, 4), "j": st.integers(1, 5), "seed": st.integers(0, 9999)}
weights = {"alpha": st.floats(0, 3), "beta": st.floats(0, 3), "b": st.floats(0.05, 20)}


@pytest.mark.parametrize("negative", NEGATIVES)
def test_golden(golden, negative):
    g = golden["pbl"]
    logps, ref = (torch.tensor(g[name], dtype=torch.float64) for name in ("logps", "ref_logps"))
    aligned, mask = torch.tensor(g["aligned"]), torch.tensor(g["mask"])
    loss = preference_bias_loss(logps, ref, aligned, mask, g["alpha"], g["beta"], negative, g["b"])
    torch.testing.assert_close(loss, torch.tensor(g[negative], dtype=torch.float64), rtol=0, atol=1e-9)


def test_by_hand():
    # ρ = 1 and 2 on the align side, ln 3 and −ln 3 on the other
    ref = torch.tensor([[-5.0, -6, -7, -8]], dtype=torch.float64)
    logps = ref + torch.tensor([1, 2, LN3, -LN3])
    aligned = torch.tensor([[True, True, False, False]])
    literal = preference_bias_loss(logps, ref, aligned, None, 0.5, 0.3, "literal")
    assert literal.item() == pytest.approx(-0.5 * (1 + 2) + 0.3 * (LN3 - LN3))
    # −ln σ(−ρ) = ln(1 + e^ρ): ln 4 and ln 4/3, each times 2/b = 2
    bounded = preference_bias_loss(logps, ref, aligned, None, 0.5, 0.3)
    assert bounded.item() == pytest.approx(-1.5 + 0.3 * 2 * (math.log(4) + math.log(4 / 3)))
    # at b = 2: e^2ρ = 9 and 1/9, times 2/b = 1
    sharper = preference_bias_loss(logps, ref, aligned, None, 0.5, 0.3, "bounded", 2.0)
    assert sharper.item() == pytest.approx(-1.5 + 0.3 * (math.log(10) + math.log(10 / 9)))


@given(**sets, **weights)
def test_at_the_reference_bounded_has_the_literal_gradient(n, j, seed, alpha, beta, b):
    logps, _, aligned, mask = answers(n, j, seed)
    bounded, literal = (
        gradient(preference_bias_loss(logps, logps, aligned, mask, alpha, beta, negative, b), logps)
        for negative in NEGATIVES
    )
    torch.testing.assert_close(bounded, literal)
    torch.testing.assert_close(literal, torch.where(aligned, -alpha, beta).double() * mask)


@given(**sets, **weights, shift=st.floats(-5, 5))
def test_the_reference_steers_the_bounded_term_only(n, j, seed, alpha, beta, b, shift):
    logps, ref, aligned, mask = answers(n, j, seed)

    def slope(reference, negative):
        return gradient(preference_bias_loss(logps, reference, aligned, mask, alpha, beta, negative, b), logps)

    torch.testing.assert_close(slope(ref + shift, "literal"), slope(ref, "literal"))
    # by hand: 2 β σ(bρ) on conflicts, −α where answers align
    conflict = 2 * beta / (1 + torch.exp(-b * (logps - ref - shift)))
    torch.testing.assert_close(slope(ref + shift, "bounded"), torch.where(aligned, -alpha, conflict).detach() * mask)


@given(**sets, **weights, far=st.sampled_from([10.0, 1e3, 1e6]))
def test_bounded_has_a_floor_and_literal_has_none(n, j, seed, alpha, beta, b, far):
    logps, ref, aligned, mask = answers(n, j, seed)
    away = logps - far * ~aligned  # conflicts get ever less likely
    floor = alpha * (ref * (aligned & mask)).sum(1)
    assert bool((preference_bias_loss(away, ref, aligned, mask, alpha, beta, "bounded", b) >= floor - 1e-9).all())
    fall = far * beta * (~aligned & mask).sum(1)
    literal = [preference_bias_loss(x, ref, aligned, mask, alpha, beta, "literal") for x in (logps, away)]
    torch.testing.assert_close(literal[0] - literal[1], fall.double())


def test_descent_on_conflicts_ends_for_one_and_never_for_the_other():
    """A tabular policy over six answers, three of which conflict; 300 steps of gradient descent."""
    start = torch.log_softmax(torch.tensor([0.5, 1.0, -0.3, 0.2, 0.0, -1.0], dtype=torch.float64), dim=0)
    conflicts = torch.tensor([[0, 1, 2]])
    losses: dict[str, list[float]] = {}
    for negative in NEGATIVES:
        theta, losses[negative] = start.clone().requires_grad_(), []
        for _ in range(300):
            logps = torch.log_softmax(theta, dim=0)
            loss = preference_bias_loss(
                logps[conflicts], start[conflicts], torch.zeros(1, 3, dtype=torch.bool), None, 1.0, 1.0, negative
            )
            losses[negative].append(loss.item())
            theta = (theta - 0.2 * gradient(loss, theta)).detach().requires_grad_()
    # once conflicts are rare, each of their logits falls by 0.2 a step and the others rise by as much in all, so a
    # log-probability falls by at least 0.2, for ever: 3 · 0.2 = 0.6 a step
    last = [losses["literal"][step] - losses["literal"][step + 1] for step in (150, 200, 298)]
    assert min(last) > 0.6
    assert max(last) - min(last) < 1e-6
    assert 0 < losses["bounded"][-1] < losses["bounded"][0] == pytest.approx(3 * 2 * math.log(2))
    assert losses["bounded"][200] - losses["bounded"][-1] < 0.1


@pytest.mark.parametrize("negative", NEGATIVES)
@given(**sets, extra=st.integers(0, 3), junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_masked_is_never_looked_at(negative, n, j, seed, extra, junk):
    logps, ref, aligned, mask = answers(n, j, seed)

    def padded(values, fill):
        return torch.nn.functional.pad(values.masked_fill(~mask, fill), (0, extra), value=fill)

    plain = preference_bias_loss(logps, ref, aligned, mask, 1.0, 0.5, negative)
    spoilt = preference_bias_loss(
        padded(logps, junk), padded(ref, junk), padded(aligned, True), padded(mask, False), 1.0, 0.5, negative
    )
    torch.testing.assert_close(spoilt, plain)
    torch.testing.assert_close(gradient(spoilt, logps), gradient(plain, logps))


@pytest.mark.parametrize("negative", NEGATIVES)
def test_rows_of_padding_cost_nothing(negative):
    logps = torch.full((1, 2), math.nan, requires_grad=True)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    loss = preference_bias_loss(logps, torch.full((1, 2), -math.inf), nothing, nothing, 1.0, 1.0, negative)
    assert loss.tolist() == [0]
    assert gradient(loss, logps).tolist() == [[0, 0]]


@pytest.mark.parametrize("negative", NEGATIVES)
def test_gradcheck_and_none_for_the_reference(negative):
    logps, ref, aligned, mask = answers(3, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: preference_bias_loss(x, ref, aligned, mask, 0.7, 0.4, negative, 1.3), (logps,)
    )
    moving = ref.clone().requires_grad_()
    preference_bias_loss(logps, moving, aligned, mask, 0.7, 0.4, negative).sum().backward()
    assert moving.grad is None


def test_half_precision_is_summed_in_float32():
    logps, ref = torch.full((1, 300), -2.0, dtype=torch.bfloat16), torch.full((1, 300), -3.0, dtype=torch.bfloat16)
    aligned = torch.ones(1, 300, dtype=torch.bool)
    loss = preference_bias_loss(logps, ref, aligned, None, 1.0, 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == -300  # bfloat16 has no 299


def test_refusals():
    values, flags = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"aligned must be bool, not torch.float32"):
        preference_bias_loss(values, values, values, None, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"ref_logps \(2, 1\)"):
        preference_bias_loss(values, values[:, :1], flags, None, 1.0, 1.0)
    with pytest.raises(ValueError, match="need a bool mask"):
        preference_bias_loss(values, values, flags, values, 1.0, 1.0)
    with pytest.raises(ValueError, match="negative must be bounded or literal, not 'hinge'"):
        preference_bias_loss(values, values, flags, None, 1.0, 1.0, "hinge")
    for alpha, beta, b in ((-1, 1, 1), (1, -1, 1), (1, 1, 0), (1, 1, math.inf), (math.nan, 1, 1), (1, 1, math.nan)):
        with pytest.raises(ValueError, match="need alpha >= 0, beta >= 0 and b > 0"):
            preference_bias_loss(values, values, flags, None, alpha, beta, "bounded", b)


def test_a_difference_is_not_rounded_in_half_precision():
    """−0.5 − (−130) = 129.5, which no bfloat16 is: its neighbours are 129 and 130."""
    logps, ref = torch.tensor([[-0.5]]).bfloat16(), torch.tensor([[-130.0]]).bfloat16()
    found = preference_bias_loss(logps, ref, torch.tensor([[True]]), None, 1.0, 1.0)
    assert found.item() == -129.5 and found.dtype == torch.float32
