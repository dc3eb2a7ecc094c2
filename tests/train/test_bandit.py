"""A problem whose answer is known: a contextual bandit with a table for a policy, PPO and CPPO beside its optimum.

With −β log(π/π_ref) in the reward the best policy is π* ∝ π_ref · exp(r/β). There the whole reward of all actions is
the same, so every advantage is 0, and so is every gradient, whatever α weighs it with: CPPO without retention has PPO's
optimum. Retention pulls to its anchor.
"""

import pytest
import torch

from train.losses.cppo import gae, heuristic_weights, policy_loss, retention_loss, token_rewards

BETA, N = 0.5, 600


@pytest.fixture(scope="module")
def bandit():
    """Three contexts, four actions: rewards in [0, 1], a reference, and the optimum."""
    draw = torch.Generator().manual_seed(1)
    reward, reference = torch.rand(3, 4, generator=draw), torch.randn(3, 4, generator=draw).log_softmax(1)
    return reward, reference, (reference + reward / BETA).log_softmax(1)


def standard(values):
    return (values - values.mean()) / values.std(unbiased=False).clamp_min(1e-9)


def trained(bandit, weighted, retention, steps=400, lead="reward"):
    """log π after steps of one update each, from the reference."""
    reward, reference, _ = bandit
    table = reference.clone().requires_grad_()
    adam, draw = torch.optim.Adam([table], lr=0.03), torch.Generator().manual_seed(2)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        now = table.detach().log_softmax(1)
        x = torch.arange(N) % 3
        a = torch.multinomial(now[x].exp(), 1, generator=draw)[:, 0]
        old, mask, score = now[x, a][:, None], torch.ones(N, 1, dtype=torch.bool), reward[x, a]
        whole = (now.exp() * (reward - BETA * (now - reference))).sum(1)  # V of each context, exactly
        paid = token_rewards(score, old, reference[x, a][:, None], mask, torch.ones(N), BETA, 0.0)
        advantage, _ = gae(paid, whole[x][:, None], mask, 1.0, 0.95)
        alpha = beta = torch.ones(N)
        if weighted:
            alpha, beta = heuristic_weights(standard(old[:, 0]), standard(score), k=0.5, lb=0.5, ub=2.5, lead=lead)
        logps = table.log_softmax(1)[x, a][:, None]
        loss = policy_loss(logps, old, advantage, mask, alpha, 0.2)
        loss = loss + retention * retention_loss(logps, reference[x, a][:, None], mask, beta)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return table.detach().log_softmax(1)


def divergence(a, b):
    return (a.exp() * (a - b)).sum(1).max().item()


def test_the_optimum_is_where_no_advantage_is_left(bandit):
    reward, reference, best = bandit
    whole = reward - BETA * (best - reference)
    assert (whole - whole.mean(1, keepdim=True)).abs().max() < 1e-6
    assert divergence(best, reference) > 0.05, "there is something to learn"


@pytest.mark.parametrize(("weighted", "lead"), [(False, "reward"), (True, "reward"), (True, "probability")])
def test_ppo_and_cppo_find_the_optimum(bandit, weighted, lead):
    found = trained(bandit, weighted, 0.0, lead=lead)
    assert divergence(found, bandit[2]) < 0.002 < divergence(bandit[1], bandit[2])


def test_retention_holds_to_the_anchor(bandit):
    apart = [divergence(trained(bandit, True, weight, 150), bandit[1]) for weight in (0.0, 0.3, 30.0)]
    assert apart[0] > 1.5 * apart[1] > 0 and apart[2] < 0.02 * apart[0]
