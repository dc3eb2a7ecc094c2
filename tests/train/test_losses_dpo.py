import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.losses.copr import advantages, fit_loss, optimal_logps
from train.losses.dpo import dpo_loss, ipo_loss

LOSSES = [dpo_loss, ipo_loss]
LN2, LN3 = math.log(2), math.log(3)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranked(n: int, j: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π_θ with gradient, log π_ref, ranks with ties, mask of n prompts; all [n, j]."""
    draw = torch.Generator().manual_seed(seed)
    logps = 3 * torch.randn(2, n, j, generator=draw, dtype=torch.float64) - 20
    ranks = torch.randint(1, j + 1, (n, j), generator=draw)
    return logps[0].requires_grad_(), logps[1], ranks, torch.rand(n, j, generator=draw) < 0.7


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


sets = {"n": st.integers(1, 4), "j": st.integers(1, 5), "seed": st.integers(0, 9999)}


def test_by_hand():
    # Δ = 1 and −2 for the better and the worse: a margin of 3
    logps, ref = float64([[-7, -4]]), float64([[-5, -5]])
    ranks = torch.tensor([[2, 1]])
    assert dpo_loss(logps, ref, ranks, LN3 / 3).item() == pytest.approx(math.log(1 + 1 / 3))  # −ln σ(ln 3)
    # ε = ¼: ¾ · −ln σ(ln 3) + ¼ · −ln σ(−ln 3) = ¾ ln 4/3 + ¼ ln 4
    smooth = dpo_loss(logps, ref, ranks, LN3 / 3, label_smoothing=0.25)
    assert smooth.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert ipo_loss(logps, ref, ranks, 0.1).item() == pytest.approx((3 - 5) ** 2)


def test_pairs_by_hand():
    # Δ = 0, 1, 3; ranks 1, 2, 2: the pairs are (0, 1) and (0, 2), of margins −1 and −3. 1/(2β) = 1.
    logps, ref = float64([[-9, -8, -6, -1]]), float64([[-9, -9, -9, -9]])
    ranks, mask = torch.tensor([[1, 2, 2, 3]]), torch.tensor([[True, True, True, False]])
    assert ipo_loss(logps, ref, ranks, 0.5, mask).item() == pytest.approx(((-1 - 1) ** 2 + (-3 - 1) ** 2) / 2)
    expected = (math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(1.5))) / 2
    assert dpo_loss(logps, ref, ranks, 0.5, mask).item() == pytest.approx(expected)


@given(n=st.integers(1, 5), seed=st.integers(0, 9999), beta=st.floats(0.01, 5), smoothing=st.floats(0, 0.49))
def test_trl(n, seed, beta, smoothing):
    """TRL 1.16's own lines for `sigmoid` and `ipo` (DPOTrainer), in NumPy: the losses of batches of pairs.

    Its IPO divides the log-ratio of each answer by its number of tokens, ours takes what it is given.
    """
    draw = np.random.default_rng(seed)
    chosen, rejected, ref_chosen, ref_rejected = draw.normal(-30, 5, (4, n))
    chosen_tokens, rejected_tokens = draw.integers(1, 40, (2, n))
    chosen_scores, rejected_scores = chosen - ref_chosen, rejected - ref_rejected
    delta = chosen_scores - rejected_scores
    sigmoid = np.log1p(np.exp(-beta * delta))
    flipped = np.log1p(np.exp(beta * delta))
    averaged = chosen_scores / chosen_tokens - rejected_scores / rejected_tokens
    ipo = (averaged - 1 / (2 * beta)) ** 2
    robust = ((1 - smoothing) * sigmoid - smoothing * flipped) / (1 - 2 * smoothing)

    logps, ref = (torch.from_numpy(np.stack(pair, 1)) for pair in ((chosen, rejected), (ref_chosen, ref_rejected)))
    tokens = torch.from_numpy(np.stack([chosen_tokens, rejected_tokens], 1))
    ranks = torch.tensor([[1, 2]]).expand(n, 2)
    torch.testing.assert_close(dpo_loss(logps, ref, ranks, beta), torch.from_numpy(sigmoid))
    torch.testing.assert_close(ipo_loss(logps / tokens, ref / tokens, ranks, beta), torch.from_numpy(ipo))
    # `robust` from ours without smoothing, w and l as they are and the other way round
    both = [dpo_loss(logps, ref, order, beta) for order in (ranks, ranks.flip(1))]
    unbiased = ((1 - smoothing) * both[0] - smoothing * both[1]) / (1 - 2 * smoothing)
    torch.testing.assert_close(unbiased, torch.from_numpy(robust))
    smooth = dpo_loss(logps, ref, ranks, beta, label_smoothing=smoothing)
    torch.testing.assert_close(smooth, (1 - smoothing) * both[0] + smoothing * both[1])


@given(**sets, beta=st.floats(0.01, 5))
def test_at_the_reference(n, j, seed, beta):
    logps, _, ranks, mask = ranked(n, j, seed)
    paired = torch.tensor([len(ranks[row, mask[row]].unique()) > 1 for row in range(n)])
    torch.testing.assert_close(dpo_loss(logps, logps, ranks, beta, mask), LN2 * paired.double())
    torch.testing.assert_close(ipo_loss(logps, logps, ranks, beta, mask), paired.double() / (2 * beta) ** 2)


@pytest.mark.parametrize("loss", LOSSES)
@given(**sets)
def test_a_set_is_the_mean_of_its_pairs(loss, n, j, seed):
    logps, ref, ranks, mask = ranked(n, j, seed)
    whole = loss(logps, ref, ranks, 0.3, mask)
    for row in range(n):
        better = [
            (i, k)
            for i in range(j)
            for k in range(j)
            if mask[row, i] and mask[row, k] and ranks[row, i] < ranks[row, k]
        ]
        alone = [loss(logps[row, [p]], ref[row, [p]], torch.tensor([[1, 2]]), 0.3).item() for p in map(list, better)]
        assert whole[row].item() == pytest.approx(sum(alone) / max(len(alone), 1), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@given(**sets, extra=st.integers(0, 3), junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_masked_is_never_looked_at(loss, n, j, seed, extra, junk):
    logps, ref, ranks, mask = ranked(n, j, seed)

    def padded(values, fill):
        return torch.nn.functional.pad(values.masked_fill(~mask, fill), (0, extra), value=fill)

    plain = loss(logps, ref, ranks, 0.3, mask)
    spoilt = loss(padded(logps, junk), padded(ref, junk), padded(ranks, 0), 0.3, padded(mask, False))
    torch.testing.assert_close(spoilt, plain)
    torch.testing.assert_close(gradient(spoilt, logps), gradient(plain, logps))


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_prefer_costs_nothing(loss):
    logps, ref, ranks = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2), torch.tensor([[1, 1], [1, 2], [2, 1]])
    value = loss(logps, ref, ranks, 0.3, torch.tensor([[True, True], [True, False], [False, False]]))
    assert value.tolist() == [0, 0, 0]
    assert not gradient(value, logps).any()


def test_an_answer_that_became_impossible_spoils_no_gradient():
    # −∞ for the worse one: a margin of ∞ costs nothing and pulls nowhere; beside itself it is −∞ + ∞, but makes no pair
    logps = torch.tensor([[-3.0, -math.inf, -4.0]], requires_grad=True)
    ranks, mask = torch.tensor([[1, 2, 1]]), torch.tensor([[True, True, False]])
    loss = dpo_loss(logps, torch.full((1, 3), -3.0), ranks, 0.5, mask)
    assert loss.item() == 0
    assert gradient(loss, logps).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_and_none_for_the_reference(loss):
    logps, ref, ranks, mask = ranked(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, ranks, 0.3, mask), (logps,))
    moving = ref.clone().requires_grad_()
    loss(logps, moving, ranks, 0.3, mask).sum().backward()
    assert moving.grad is None


def test_gradcheck_of_label_smoothing():
    logps, ref, ranks, mask = ranked(3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, ref, ranks, 0.3, mask, 0.2), (logps,))


def minimiser(loss, start: torch.Tensor) -> torch.Tensor:
    """log π of a tabular policy over answers, of which `loss` sees the log-probabilities, after gradient descent."""
    theta = start.clone().requires_grad_()
    for _ in range(1500):
        theta = (theta - 0.2 * gradient(loss(torch.log_softmax(theta, 0)[None]), theta)).detach().requires_grad_()
    return torch.log_softmax(theta.detach(), dim=0)


@pytest.mark.parametrize(("j", "r", "beta"), [(2, 0.7, 0.8), (2, 0.2, 0.5), (3, 0.6, 0.5), (4, 0.45, 0.6)])
def test_ipo_ends_where_copr_does(j, r, beta):
    """Over six answers, j of which are ranked. J = 2: IPO at β/(4r); J: at β (J − 1)/(2 J r)."""
    start = torch.log_softmax(float64([0.3, -0.8, 0.8, 0.0, 0.5, 1.0]), dim=0)
    ref, ranks = start[None, :j], torch.arange(1, j + 1)[None]
    best = optimal_logps(ref, advantages(ranks, float64([r])), beta)
    copr = minimiser(lambda logps: fit_loss(logps[:, :j], best), start)
    ipo = minimiser(lambda logps: ipo_loss(logps[:, :j], ref, ranks, beta * (j - 1) / (2 * j * r)), start)
    margins = [-(end - start)[:j].diff() for end in (copr, ipo)]
    torch.testing.assert_close(*margins, rtol=0, atol=1e-6)
    # neighbours differ by 2 r/((J − 1) β): at J = 2 that is 2 r/β = 1/(2 · β/(4r))
    torch.testing.assert_close(margins[0], torch.full_like(margins[0], 2 * r / (j - 1) / beta), rtol=0, atol=1e-6)


def test_label_smoothing_gives_dpo_an_end():
    # −(1 − ε) ln σ(βm) − ε ln σ(−βm): stationary where σ(βm) = 1 − ε; β = ½, ε = ¼: m = 2 ln 3
    start = torch.log_softmax(float64([0.3, -0.8, 0.8]), dim=0)
    ranks = torch.tensor([[1, 2]])
    end = minimiser(lambda logps: 4 * dpo_loss(logps[:, :2], start[None, :2], ranks, 0.5, label_smoothing=0.25), start)
    assert ((end - start)[0] - (end - start)[1]).item() == pytest.approx(2 * LN3, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss):
    logps, ref, ranks = torch.tensor([[-20.0, -21.0]]), torch.tensor([[-21.0, -21.0]]), torch.tensor([[1, 2]])
    narrow = loss(logps.bfloat16(), ref.bfloat16(), ranks, 0.1)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, loss(logps, ref, ranks, 0.1))


@pytest.mark.parametrize("loss", LOSSES)
def test_refusals(loss):
    values, ranks = torch.zeros(1, 2), torch.tensor([[1, 2]])
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            loss(values, values, ranks, beta)
    with pytest.raises(ValueError, match="candidate 1 of row 0 has no rank: 0"):
        loss(values, values, torch.tensor([[1, 0]]), 0.1)
    with pytest.raises(ValueError, match=r"ranks \(2,\)"):
        loss(values, values, ranks[0], 0.1)
    with pytest.raises(ValueError, match="need a bool mask"):
        loss(values, values, ranks, 0.1, ranks)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, math.nan])
def test_smoothing_must_leave_a_preference(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        dpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1, 2]]), 0.1, label_smoothing=smoothing)
