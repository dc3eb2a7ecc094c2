import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.losses.cft import ewc_penalty, kl_penalty, orthogonality, weighted_nll

REDUCTIONS = [weighted_nll, kl_penalty]


def tokens(b: int, t: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π or KL [b, t] with gradient, mask, whole weights 0 … 3 a row [b, 1]."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(b, t, generator=draw, dtype=torch.float64).requires_grad_()
    return values, torch.rand(b, t, generator=draw) < 0.6, torch.randint(0, 4, (b, 1), generator=draw)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_by_hand():
    logps = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -4.0, -9.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    weight = torch.tensor([[1.0], [3.0]])
    assert weighted_nll(logps, mask).item() == pytest.approx((1 + 2 + 4) / 3)
    assert weighted_nll(logps, mask, weight).item() == pytest.approx((1 + 2 + 3 * 4) / (1 + 1 + 3))
    assert weighted_nll(logps, mask, weight, 10.0).item() == pytest.approx((1 + 2 + 3 * 4) / 10)
    assert kl_penalty(-logps, mask, weight).item() == pytest.approx((1 + 2 + 3 * 4) / (1 + 1 + 3))
    by_token = torch.tensor([[7.0, 0.5, 2.0], [7.0, 1.0, 7.0]])
    assert weighted_nll(logps, mask, by_token).item() == pytest.approx((0.5 * 1 + 2 * 2 + 4) / (0.5 + 2 + 1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(b=st.integers(1, 4), t=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_weight_is_a_repetition(reduction, b, t, seed):
    values, mask, weight = tokens(b, t, seed)
    repeated = [row for row, times in enumerate(weight[:, 0].tolist()) for _ in range(times)]
    weighted = reduction(values, mask, weight)
    stacked = reduction(values[repeated], mask[repeated])
    torch.testing.assert_close(weighted, stacked)
    torch.testing.assert_close(gradient(weighted, values), gradient(stacked, values))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(b=st.integers(2, 6), t=st.integers(1, 5), seed=st.integers(0, 999), cut=st.integers(1, 5))
def test_passes_of_a_step_add_up(reduction, b, t, seed, cut):
    values, mask, weight = tokens(b, t, seed)
    total = (weight * mask).sum()
    parts = [slice(0, min(cut, b)), slice(min(cut, b), b)]
    summed = sum(reduction(values[p], mask[p], weight[p], total) for p in parts)
    whole = reduction(values, mask, weight)
    torch.testing.assert_close(summed, whole)
    torch.testing.assert_close(gradient(summed, values), gradient(whole, values))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(b=st.integers(1, 3), t=st.integers(1, 4), extra=st.integers(0, 3), seed=st.integers(0, 999))
def test_what_is_masked_is_never_looked_at(reduction, b, t, extra, seed):
    values, mask, weight = tokens(b, t, seed)
    bad = torch.nn.functional.pad(values.masked_fill(~mask, torch.nan), (0, extra), value=-torch.inf)
    padded = reduction(bad, torch.nn.functional.pad(mask, (0, extra)), weight)
    plain = reduction(values, mask, weight)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(gradient(padded, values), gradient(plain, values))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normaliser", [None, 0, torch.tensor(0), 5.0])
def test_nothing_to_learn_from_is_zero_with_a_graph(reduction, normaliser):
    for mask, weight in [(False, 1.0), (True, 0.0)]:
        values = torch.full((2, 3), -torch.inf if not mask else -1.0, requires_grad=True)
        loss = reduction(values, torch.full((2, 3), mask), weight, normaliser)
        assert loss.item() == 0
        assert gradient(loss, values).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_float16_weights_and_whole_numbers_are_taken_as_numbers():
    values, mask, weight = tokens(3, 4, seed=1)
    mask[0, 0] = True
    results = [weighted_nll(values, mask, weight.to(kind) + 1) for kind in (torch.long, torch.float16, torch.float64)]
    assert results[0] == results[1] == results[2]


def test_refusals_of_shapes():
    values, mask = torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"weight must be a number, \[b, 1\] or \(3, 3\), not \(3,\)"):
        weighted_nll(values, mask, torch.ones(3))  # would weigh tokens where rows are meant
    with pytest.raises(ValueError, match="need a bool mask"):
        weighted_nll(values, mask.float())
    with pytest.raises(ValueError, match="need a bool mask"):
        kl_penalty(values, mask[:, 1:])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_the_means(reduction):
    values, mask, weight = tokens(3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda v: reduction(v, mask, weight, 7.0), (values,))


# ---- orthogonality --------------------------------------------------------------------------------------------------


def test_orthogonality_by_hand():
    old = [torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[2.0, -1]])]
    new = [torch.tensor([[3.0, -4, 5]]), torch.tensor([[1.0, 1], [0, 2]])]
    # layer 1: |3| + |−4|; layer 2: |2 − 1| + |−2|
    assert orthogonality(old, new).item() == 3 + 4 + 1 + 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_orthogonal_directions_cost_nothing(r_old, r_new, seed):
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64)).Q
    mix = torch.randn(r_new, r_new, generator=draw, dtype=torch.float64)
    old, new = basis[:r_old], mix @ basis[r_old : r_old + r_new]
    assert orthogonality([old], [new]).item() == pytest.approx(0, abs=1e-12)
    assert orthogonality([old], [new + old[:1]]).item() == pytest.approx(r_new, rel=1e-9)  # each row overlaps by 1


def test_only_the_new_adapter_moves():
    old, new = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    orthogonality([old, old], [new, new]).backward()
    assert old.grad is None
    assert new.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda a: orthogonality([old], [a]), (new,))


def test_orthogonality_without_older_tasks_and_refusals():
    assert orthogonality([], []).item() == 0
    empty = orthogonality([torch.zeros(0, 4)], [torch.ones(2, 4, requires_grad=True)])  # no old direction yet
    assert empty.item() == 0
    assert empty.requires_grad
    for old, new in ([torch.ones(1, 3)], [torch.ones(1, 4)]), ([torch.ones(1, 3)], []):
        with pytest.raises(ValueError, match="must be pairs"):
            orthogonality(old, new)


# ---- EWC ------------------------------------------------------------------------------------------------------------


def test_ewc_by_hand():
    moved = [torch.tensor([1.0, 2.0]), torch.tensor([[5.0]])]
    anchors = [torch.tensor([0.0, 4.0]), torch.tensor([[5.0]])]
    fisher = [torch.tensor([3.0, 0.5]), torch.tensor([[100.0]])]
    # ½ (3·1² + 0.5·2² + 100·0²)
    assert ewc_penalty(moved, anchors, fisher).item() == 0.5 * (3 + 2)


@given(st.integers(0, 999))
def test_ewc_without_information_or_movement_is_zero(seed):
    torch.manual_seed(seed)
    here, there = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    assert ewc_penalty(here, there, [torch.zeros(3, 2), torch.zeros(4)]).item() == 0
    assert ewc_penalty(here, here, [torch.rand(3, 2), torch.rand(4)]).item() == 0
    assert ewc_penalty(here, there, [torch.rand(3, 2), torch.rand(4)]).item() > 0


def test_ewc_pulls_back_in_proportion():
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    anchor, fisher = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(gradient(ewc_penalty([theta], [anchor], [fisher]), theta), fisher * (theta - anchor))
    assert torch.autograd.gradcheck(lambda p: ewc_penalty([p], [anchor], [fisher]), (theta,))


def test_ewc_of_half_precision_is_summed_in_float32():
    theta, anchor, fisher = (torch.full((3,), x, dtype=torch.bfloat16) for x in (1.0078125, 1.0, 0.5))  # 1 + 2^-7
    penalty = ewc_penalty([theta, theta], [anchor, -anchor], [fisher, fisher])
    assert penalty.dtype == torch.float32
    # ½ · 3 · ½ · (2^-14 + (2 + 2^-7)²): in bfloat16 the sum would be 2 and its square 4
    assert penalty.item() == pytest.approx(0.75 * (2**-14 + (2 + 2**-7) ** 2), rel=1e-6)


def test_ewc_refuses_another_model():
    one, two = [torch.ones(2)], [torch.ones(3)]
    for lists in ((one, one, two), (one, two, one), (one, one, []), ([], one, one)):
        with pytest.raises(ValueError, match="pairwise one shape"):
            ewc_penalty(*lists)
    assert ewc_penalty([], [], []).item() == 0


def test_a_normaliser_is_not_rounded_in_half_precision():
    """2,006 nats by 1,003 tokens are 2; the nearest bfloat16 of 1,003 is 1,004."""
    logps, mask = torch.full((1, 1003), -2.0).bfloat16(), torch.ones(1, 1003, dtype=torch.bool)
    found = weighted_nll(logps, mask, 1.0, 1003)
    assert found.item() == 2.0 and found.dtype == torch.float32
