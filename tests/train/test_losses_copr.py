import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from train.losses.copr import advantages, draw_scale, dual_ascent, fit_loss, lagrangian, optimal_logps

DISTANCES = ["mse", "kl"]
LN2, LN3 = math.log(2), math.log(3)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prompts(b: int, j: int, seed: int) -> dict[str, torch.Tensor]:
    """Ranks with ties, r, log-probabilities and a mask of at least two candidates a prompt."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, j, generator=draw) < 0.6
    mask[:, :2] = True
    logps = 5 * torch.randn(2, b, j, generator=draw, dtype=torch.float64) - 20
    return {
        "ranks": torch.randint(1, j + 1, (b, j), generator=draw),
        "r": torch.rand(b, generator=draw, dtype=torch.float64),
        "ref": logps[0],
        "logps": logps[1].requires_grad_(),
        "mask": mask[:, torch.randperm(j, generator=draw)],
    }


def target(of: dict[str, torch.Tensor], beta: float = 0.3) -> torch.Tensor:
    return optimal_logps(of["ref"], advantages(of["ranks"], of["r"], of["mask"]), beta, of["mask"])


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def descend(loss, theta: torch.Tensor, lr: float, steps: int) -> torch.Tensor:
    """Plain gradient descent on the logits of a tabular policy."""
    for _ in range(steps):
        theta = (theta - lr * gradient(loss(theta), theta)).detach().requires_grad_()
    return theta.detach()


sets = {"b": st.integers(1, 4), "j": st.integers(2, 6), "seed": st.integers(0, 9999)}


def test_golden(golden):
    g = golden["copr"]
    adv = advantages(torch.tensor(g["ranks"]), float64(g["r"]))
    ref, logps = float64(g["ref_logps"]), float64(g["logps"])
    best = optimal_logps(ref, adv, g["beta"])
    moved = dual_ascent(float64(g["log_lambda"]), float64(g["constraint"]), g["lr"])
    for ours, theirs in [
        (adv, g["advantages"]), (best, g["log_p_star"]), (fit_loss(logps, best), g["fit"]),
        (moved, g["next_log_lambda"]),
    ]:  # fmt: skip
        torch.testing.assert_close(ours, float64(theirs), rtol=0, atol=1e-9)


# ---- r_x ------------------------------------------------------------------------------------------------------------


def test_scale_depends_on_seed_uid_and_candidates_alone():
    uids = [f"{number:032x}" for number in range(50)]
    forth = [draw_scale(uid, 4, seed=7) for uid in uids]
    back = [draw_scale(uid, 4, seed=7) for uid in reversed(uids)][::-1]
    assert forth == back
    code = f"from train.losses.copr import draw_scale; print(draw_scale({uids[3]!r}, 4, seed=7).hex())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == forth[3].hex()  # another process, with another hash seed
    assert not {draw_scale(uid, 4, seed=8) for uid in uids} & set(forth)
    assert all(
        r <= draw_scale(uid, 5, seed=7) for r, uid in zip(forth, uids, strict=True)
    )  # one number more to be above


def test_scale_is_the_second_largest_of_j_uniform_numbers():
    # by hand from the same hash: J = 2 takes the smaller of two, J = 3 the middle one of these and a third
    from hashlib import blake2b

    u = [
        ((int(blake2b(f"5/{i}/x".encode(), digest_size=8, person=b"copr r_x").hexdigest(), 16) >> 12) + 0.5) / 2**52
        for i in range(3)
    ]
    assert draw_scale("x", 2, seed=5) == min(u[:2])
    assert draw_scale("x", 3, seed=5) == sorted(u)[1]


@pytest.mark.parametrize("j", [2, 3, 4, 9])
def test_scale_is_beta(j):
    drawn = [draw_scale(str(uid), j, seed=0) for uid in range(4000)]
    assert all(0 < r < 1 for r in drawn)
    assert stats.kstest(drawn, stats.beta(j - 1, 2).cdf).pvalue > 0.001
    # mean a/(a + b) = (J − 1)/(J + 1); its standard error is below ½/√4000 = 0.008
    assert sum(drawn) / len(drawn) == pytest.approx((j - 1) / (j + 1), abs=0.02)


@pytest.mark.parametrize("candidates", [0, 1])
def test_scale_needs_two_candidates(candidates):
    with pytest.raises(ValueError, match=f"prompt abc has {candidates} candidates: a preference needs two"):
        draw_scale("abc", candidates, seed=0)


# ---- advantages -----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    r = float64([0.6, 0.6, 0.6, 0.6, 0.6])
    ranks = torch.tensor([[1, 2, 3, 4], [1, 1, 3, 4], [1, 1, 2, 3], [2, 2, 2, 2], [4, 1, 1, 1]])
    expected = [
        [0.6, 0.2, -0.2, -0.6],  # 0.6 (2j − 5)/3 at j = 4, 3, 2, 1
        [0.4, 0.4, -0.2, -0.6],  # the first two share j = (4 + 3)/2: 0.6 (7 − 5)/3
        [0.4, 0.4, -0.2, -0.6],  # ranks without gaps mean the same
        [0, 0, 0, 0],  # j = (1 + 2 + 3 + 4)/4 = 2.5: 2j − 5 = 0
        [-0.6, 0.2, 0.2, 0.2],  # the other three share j = (4 + 3 + 2)/3 = 3: 0.6 (6 − 5)/3
    ]
    torch.testing.assert_close(advantages(ranks, r), float64(expected))


def test_advantages_where_j_differs():
    ranks = torch.tensor([[2, 0, 1], [1, 3, 2], [0, 0, 0]])
    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    # J = 2: ±r; J = 3: r (2j − 4)/2 = r, −r, 0 for ranks 1, 3, 2; a row of padding
    expected = [[-0.5, 0, 0.5], [0.25, -0.25, 0], [0, 0, 0]]
    assert advantages(ranks, torch.tensor([0.5, 0.25, 0.9]), mask).tolist() == expected


@given(**sets)
def test_advantages_sum_to_zero_keep_the_order_and_see_ranks_as_order(b, j, seed):
    case = prompts(b, j, seed)
    ranks, r, mask = case["ranks"], case["r"], case["mask"]
    adv = advantages(ranks, r, mask)
    torch.testing.assert_close(adv.sum(1), torch.zeros(b, dtype=torch.float64))
    assert bool((adv.abs() <= r[:, None] + 1e-12).all())
    assert not adv[~mask].any()
    assert torch.equal(advantages(3 * ranks + 4, r, mask), adv)
    assert torch.equal(advantages(ranks.double() ** 2, r, mask), adv)
    for row in range(b):
        a, k = adv[row, mask[row]], ranks[row, mask[row]]
        assert torch.equal((a[:, None] > a), (k[:, None] < k))


def test_advantages_are_not_rounded_below_float32():
    adv = advantages(torch.tensor([[1, 2, 3, 4]]), torch.tensor([0.5], dtype=torch.bfloat16))
    assert adv.dtype == torch.float32
    assert adv[0, 1].item() == pytest.approx(0.5 / 3, rel=1e-6)


def test_advantages_refuse():
    ranks, r = torch.tensor([[1, 2], [1, 2]]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"r must be one number a prompt, \(2,\), not \(2, 1\)"):
        advantages(ranks, r[:, None])
    with pytest.raises(ValueError, match="row 1 has one candidate: a preference needs two"):
        advantages(ranks, r, torch.tensor([[True, True], [False, True]]))
    for unranked in (torch.tensor([[1, 2], [0, 1]]), torch.tensor([[1, 2], [math.nan, 1]])):
        with pytest.raises(ValueError, match="candidate 0 of row 1 has no rank"):
            advantages(unranked, r)
    with pytest.raises(ValueError, match=r"need \[b, j\] of one shape, not ranks \(2,\)"):
        advantages(ranks[0], r)


# ---- P* -------------------------------------------------------------------------------------------------------------


def test_optimum_by_hand():
    # π_{t−1} = 1/2, 1/6 (not normalised: other answers exist); Adv/β = ±(ln 2)/2, so the odds go from 3 to 3 · 2 = 6
    ref, adv = float64([[0.5, 1 / 6]]).log(), float64([[LN2, -LN2]]) / 4
    torch.testing.assert_close(optimal_logps(ref, adv, 0.5).exp(), float64([[6 / 7, 1 / 7]]))


@given(**sets)
def test_without_preference_or_with_infinite_beta_the_optimum_is_the_reference(b, j, seed):
    case = prompts(b, j, seed)
    ref, mask = case["ref"], case["mask"]
    normalised = torch.log_softmax(ref.masked_fill(~mask, -torch.inf), dim=1)
    tied = advantages(torch.full((b, j), 2), case["r"], mask)
    assert not tied.any()
    torch.testing.assert_close(optimal_logps(ref, tied, 0.1, mask), normalised)
    torch.testing.assert_close(optimal_logps(ref, torch.full_like(ref, 0.7), 0.1, mask), normalised)
    assert torch.equal(target(case, beta=math.inf), normalised)
    # within |Adv|·2/β of it: here 2e-9
    torch.testing.assert_close(target(case, beta=1e9), normalised, rtol=0, atol=2e-9)


@given(**sets, shift=st.floats(-100, 100))
def test_optimum_is_a_distribution_over_the_candidates_of_one_prompt(b, j, seed, shift):
    case = prompts(b, j, seed)
    best, mask = target(case), case["mask"]
    torch.testing.assert_close(best.exp().sum(1), torch.ones(b, dtype=torch.float64))
    assert bool((best[~mask] == -torch.inf).all())
    torch.testing.assert_close(target(case | {"ref": case["ref"] + shift}), best)
    alone = [target({name: each[row : row + 1] for name, each in case.items()}) for row in range(b)]
    torch.testing.assert_close(torch.cat(alone), best)


def test_optimum_refuses():
    ref, adv = torch.full((2, 2), -3.0), torch.zeros(2, 2)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            optimal_logps(ref, adv, beta)
    for missing in (math.nan, -math.inf):
        broken = torch.tensor([[-3.0, -3.0], [-3.0, missing]])
        with pytest.raises(ValueError, match=f"candidate 1 of row 1 has log-probability {missing} .* must be finite"):
            optimal_logps(broken, adv, 0.5)
        assert optimal_logps(broken, adv, 0.5, broken.isfinite())[1].tolist() == [0, -math.inf]
    with pytest.raises(ValueError, match=r"ref_logps \(2, 2\), adv \(2, 1\)"):
        optimal_logps(ref, adv[:, :1], 0.5)


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_fit_by_hand():
    # P_θ = ½, ½ from log-probabilities of any level; P* = ¾, ¼. Gaps ln(½ ÷ ¾) = ln ⅔ and ln(½ ÷ ¼) = ln 2.
    logps, best = float64([[-7, -7]]), float64([[0.75, 0.25]]).log()
    assert fit_loss(logps, best).item() == pytest.approx((math.log(2 / 3) ** 2 + LN2**2) / 2)
    # ¾ ln(¾ ÷ ½) + ¼ ln(¼ ÷ ½)
    assert fit_loss(logps, best, distance="kl").item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * LN2)


@given(**sets, beta=st.floats(0.05, 10))
def test_fit_at_the_old_policy_is_its_closed_form(b, j, seed, beta):
    case = prompts(b, j, seed)
    ref, mask = case["ref"], case["mask"]
    at_start = fit_loss(ref, target(case, beta), mask)
    for row in range(b):
        # log P − log P* = log P − (log P + a − log Σ P e^a) = log E_P[e^a] − a
        p = torch.softmax(ref[row, mask[row]], dim=0)
        a = advantages(case["ranks"], case["r"], mask)[row, mask[row]] / beta
        assert at_start[row].item() == pytest.approx(((a - (p @ a.exp()).log()) ** 2).mean().item(), rel=1e-9)


def test_fit_at_the_old_policy_by_hand():
    # two answers as likely as each other, a = ±r/β = ±ln 3: E_P[e^a] = (3 + ⅓)/2 = 5/3
    ref, adv = float64([[-4, -4]]), float64([[LN3, -LN3]]) / 2
    expected = ((LN3 - math.log(5 / 3)) ** 2 + (-LN3 - math.log(5 / 3)) ** 2) / 2
    assert fit_loss(ref, optimal_logps(ref, adv, 0.5)).item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", DISTANCES)
@given(**sets, shift=st.floats(-100, 100))
def test_fit_is_zero_at_the_optimum_only_and_ignores_a_constant(distance, b, j, seed, shift):
    case = prompts(b, j, seed)
    case["ref"] /= 10  # so that no candidate is too unlikely for KL to see it
    best, mask = target(case), case["mask"]
    there = (best.masked_fill(~mask, 0) + shift).requires_grad_()
    loss = fit_loss(there, best, mask, distance)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(gradient(loss, there), torch.zeros_like(there))
    away = there + mask.cumsum(1) * mask  # margins moved by whole nats
    assert bool((fit_loss(away, best, mask, distance) > 1e-6).all())


@pytest.mark.parametrize("distance", DISTANCES)
@given(**sets, extra=st.integers(0, 3), junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_masked_is_never_looked_at(distance, b, j, seed, extra, junk):
    case = prompts(b, j, seed)

    def loss(of):
        return fit_loss(of["logps"], target(of), of["mask"], distance)

    def spoilt(name, value):
        return torch.nn.functional.pad(case[name].masked_fill(~case["mask"], value), (0, extra), value=value)

    mask = torch.nn.functional.pad(case["mask"], (0, extra))
    padded = {"logps": spoilt("logps", junk), "ref": spoilt("ref", junk), "ranks": spoilt("ranks", 0), "mask": mask}
    torch.testing.assert_close(loss(case | padded), loss(case))
    torch.testing.assert_close(gradient(loss(case | padded), case["logps"]), gradient(loss(case), case["logps"]))
    dropped = fit_loss(padded["logps"], target(case | padded).masked_fill(~mask, junk), mask, distance)
    torch.testing.assert_close(dropped, loss(case))


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_of_padding_cost_nothing(distance):
    logps = torch.full((1, 3), -math.inf, requires_grad=True)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():  # no NaN on the way either
        loss = fit_loss(logps, torch.full((1, 3), math.nan), torch.zeros(1, 3, dtype=torch.bool), distance)
        assert loss.tolist() == [0]
        assert gradient(loss, logps).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("distance", DISTANCES)
@given(**sets)
def test_candidates_may_stand_in_any_order(distance, b, j, seed):
    case = prompts(b, j, seed)
    order = torch.randperm(j, generator=torch.Generator().manual_seed(seed))
    turned = case | {name: case[name][:, order] for name in ("ranks", "ref", "logps", "mask")}
    torch.testing.assert_close(
        fit_loss(turned["logps"], target(turned), turned["mask"], distance),
        fit_loss(case["logps"], target(case), case["mask"], distance),
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_of_the_fit_and_none_for_the_target(distance):
    case = prompts(3, 4, seed=3)
    best = target(case)
    assert torch.autograd.gradcheck(lambda x: fit_loss(x, best, case["mask"], distance), (case["logps"],))
    moving = best.clone().requires_grad_()
    fit_loss(case["logps"], moving, case["mask"], distance).sum().backward()
    assert moving.grad is None


def test_gradcheck_of_the_optimum():
    case = prompts(3, 4, seed=4)
    adv, mask = advantages(case["ranks"], case["r"], case["mask"]), case["mask"]
    inputs = (case["logps"], adv.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, a: optimal_logps(x, a, 0.3, mask).masked_fill(~mask, 0), inputs)


def test_half_precision_is_fitted_in_float32():
    logps = torch.tensor([[-20.0, -21.0]], dtype=torch.bfloat16)
    best = optimal_logps(logps, torch.tensor([[0.5, -0.5]]), 1.0)
    loss = fit_loss(logps, best)
    assert best.dtype == loss.dtype == torch.float32
    # margins: 1 as it is, 1 + 2 · 0.5/1 = 2 at the optimum
    gaps = [math.log1p(math.exp(-2)) - math.log1p(math.exp(-1)), math.log1p(math.exp(2)) - math.log1p(math.exp(1))]
    assert loss.item() == pytest.approx(sum(g * g for g in gaps) / 2, rel=1e-5)


def test_fit_refuses():
    logps = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="distance must be mse or kl, not 'l1'"):
        fit_loss(logps, logps, distance="l1")
    with pytest.raises(ValueError, match=r"logps \(2, 3\), target \(3,\)"):
        fit_loss(logps, logps[0])
    with pytest.raises(ValueError, match=r"need a bool mask of shape \(2, 3\), not torch.float32"):
        fit_loss(logps, logps, torch.ones(2, 3))
    with pytest.raises(ValueError, match="need a bool mask"):
        fit_loss(logps, logps, torch.ones(2, 2, dtype=torch.bool))


# ---- what gradient descent on it finds ------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("r", "beta"), [(0.3, 0.5), (0.8, 0.4), (0.05, 2.0)])
def test_two_candidates_shift_the_margin_by_2r_over_beta(distance, r, beta):
    """A tabular policy over five answers, of which two are compared."""
    start = torch.log_softmax(float64([0.3, -1.2, 0.8, 0.0, 2.0]), dim=0)
    pair, ranks = [1, 4], torch.tensor([[1, 2]])  # the one that is less likely is preferred
    best = optimal_logps(start[None, pair], advantages(ranks, float64([r])), beta)

    def loss(theta):
        return fit_loss(torch.log_softmax(theta, dim=0)[None, pair], best, distance=distance)

    end = torch.log_softmax(descend(loss, start.clone().requires_grad_(), lr=0.5, steps=600), dim=0)
    margins = [(policy[1] - policy[4]).item() for policy in (start, end)]
    assert margins[1] - margins[0] == pytest.approx(2 * r / beta, abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_more_candidates_end_at_the_optimum(distance):
    start = torch.log_softmax(float64([0.3, -1.2, 0.8, 0.0, 0.5]), dim=0)
    # ranks 1, 2, 3, 4 and r = 0.6: advantages 0.6, 0.2, −0.2, −0.6; β = 0.4: the margins grow by 0.4/0.4 = 1 each
    best = optimal_logps(start[None, :4], advantages(torch.tensor([[1, 2, 3, 4]]), float64([0.6])), 0.4)

    def loss(theta):
        return fit_loss(torch.log_softmax(theta, dim=0)[None, :4], best, distance=distance)

    end = torch.log_softmax(descend(loss, start.clone().requires_grad_(), lr=0.5, steps=1500), dim=0)
    torch.testing.assert_close(-(end - start)[:4].diff(), float64([1, 1, 1]), rtol=0, atol=1e-6)


# ---- the Lagrangian and its dual ------------------------------------------------------------------------------------


def test_lagrangian_by_hand():
    loss, constraints, log_lambda = float64(5), float64([2, -1]), float64([3, 0.5]).log().requires_grad_()
    inputs = [each.requires_grad_() for each in (loss, constraints)]
    value = lagrangian(loss, constraints, log_lambda)
    # λ = 3, ½: Λ = 1 + 3.5; (5 + 3 · 2 − ½ · 1)/4.5
    assert value.item() == pytest.approx((5 + 6 - 0.5) / 4.5)
    grads = torch.autograd.grad(value, [*inputs, log_lambda], allow_unused=True)
    assert grads[0].item() == pytest.approx(1 / 4.5)
    assert grads[1].tolist() == pytest.approx([3 / 4.5, 0.5 / 4.5])
    assert grads[2] is None


def test_lagrangian_of_a_first_task_and_of_huge_duals():
    assert lagrangian(torch.tensor(5.0), torch.zeros(0), torch.zeros(0)).item() == 5
    assert lagrangian(torch.tensor(5.0), torch.tensor([2.0]), torch.tensor([1e4])).item() == 2  # exp(1e4) = ∞
    with pytest.raises(ValueError, match="need a scalar"):
        lagrangian(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="need a scalar"):
        lagrangian(torch.tensor(0.0), torch.zeros(2), torch.zeros(1))


def test_dual_by_hand():
    # 0 + 0.1 · 1 · 2; ln 4 − 0.1 · 4 · 3; ln ½ + 0
    moved = dual_ascent(float64([1, 4, 0.5]).log(), float64([2, -3, 0]), 0.1)
    assert moved.tolist() == pytest.approx([0.2, math.log(4) - 1.2, -LN2])


@given(
    st.lists(st.tuples(st.floats(-4.9, 4.9), st.floats(-1e3, 1e3)), min_size=1, max_size=5), st.floats(1e-4, 1e2)
)  # fmt: skip
def test_dual_grows_where_violated_shrinks_where_satisfied_within_its_limits(pairs, lr):
    before, constraint = float64(pairs).unbind(1)
    after = dual_ascent(before, constraint, lr)
    assert bool((after.abs() <= 5).all())
    assert bool(torch.where(constraint > 0, after >= before, after <= before).all())
    step = lr * before.exp() * constraint
    inside = (before + step).abs() < 5
    torch.testing.assert_close((after - before)[inside], step[inside])


def test_dual_is_held_by_its_clamp():
    log_lambda = float64([0, 0])
    for _ in range(400):  # without it, 1/λ = 1 − 0.1 n: infinite at the tenth step or so
        log_lambda = dual_ascent(log_lambda, float64([1, -1]), 0.1, low=-2, high=3)
    assert log_lambda.tolist() == [3, -2]
    assert dual_ascent(log_lambda, float64([-1, 1]), 0.1, low=-2, high=3).tolist() == pytest.approx(
        [3 - 0.1 * math.exp(3), -2 + 0.1 * math.exp(-2)]  # and it comes back
    )


def test_dual_has_no_graph_and_leaves_its_arguments_alone():
    log_lambda, constraint = torch.zeros(1), torch.ones(1, requires_grad=True)
    assert not dual_ascent(log_lambda, 2 * constraint, 0.1).requires_grad
    assert log_lambda.item() == 0
    assert dual_ascent(log_lambda.double(), constraint, 0.1).dtype == torch.float64
    assert dual_ascent(torch.zeros(0), torch.zeros(0), 0.1).tolist() == []


def test_dual_refuses():
    zero = torch.zeros(2)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="constraints must be finite"):
            dual_ascent(zero, torch.tensor([0.0, broken]), 0.1)
    with pytest.raises(ValueError, match=r"need \[n\] and \[n\], not \(2,\) and \(\)"):
        dual_ascent(zero, torch.tensor(0.0), 0.1)
    for wrong in ({"lr": -0.1}, {"lr": math.nan}, {"lr": 0.1, "low": 1, "high": 0}):
        with pytest.raises(ValueError, match="need low <= high and lr >= 0"):
            dual_ascent(zero, zero, **wrong)


def test_constrained_descent_keeps_the_old_task():
    """One number pulled by two tasks: alone the new one wins, with the constraint the dual finds the balance."""

    def run(constrained: bool) -> tuple[float, float]:
        theta, log_lambda = torch.zeros((), dtype=torch.float64, requires_grad=True), float64([0])
        for _ in range(2000):
            # old: (θ − 0)² ≤ 0.25; new: (θ − 2)²
            new, old = (theta - 2) ** 2, theta**2 - 0.25
            constraints = old[None] if constrained else old[None][:0]
            step = gradient(lagrangian(new, constraints, log_lambda[: len(constraints)]), theta)
            log_lambda = dual_ascent(log_lambda, old[None], 0.02)
            theta = (theta - 0.05 * step).detach().requires_grad_()
        return theta.item(), log_lambda.exp().item()

    assert run(constrained=False)[0] == pytest.approx(2, abs=1e-6)
    theta, multiplier = run(constrained=True)
    assert theta == pytest.approx(0.5, abs=1e-3)  # θ² = 0.25
    assert multiplier == pytest.approx(3, abs=0.02)  # stationary: 2(θ − 2) + λ·2θ = 0, so λ = 1.5/0.5


def test_an_advantage_is_not_rounded_away_in_half_precision():
    """Beside −130 a bfloat16 has steps of 1: an advantage of 0.3 would be lost before the softmax.

    The margin is −130 + 0.3 − (−131 − 0.3) = 1.6; log softmax of (1.6, 0) is −ln(1 + e^−1.6) = −0.1840.
    """
    ref, adv = torch.tensor([[-130.0, -131.0]]).bfloat16(), torch.tensor([[0.3, -0.3]]).bfloat16()
    found = optimal_logps(ref, adv, 1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, optimal_logps(ref.float(), adv.float(), 1.0))
    assert found[0, 0].item() == pytest.approx(-math.log1p(math.exp(-1.6)), abs=2e-3)
