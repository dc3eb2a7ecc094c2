"""PBL where everything conflicts: 500 steps with the literal and the bounded term. One falls for ever, one does not.

    python benchmarks/pbl_divergence.py [--steps 500] [--plot pbl_divergence.svg]

The policy is a table of bigrams over 16 tokens, in float64: log π(y) = Σ_t log p(y_t | y_{t−1}), and starts at a random
reference π_ref. 32 answers of 12 tokens are drawn from π_ref, and all count as conflicts; no gold answer, no KL,
α = β = b = 1, the mean over answers. At some steps, in nats:

- loss
- rho: log π_θ/π_ref of the conflicts, the mean over them.
- slope: norm of the gradient. A term that has had its way lets go.
- drift: KL(π_ref‖π_θ) of a token, the mean over contexts: what all other answers pay, as they share the table.

With gradient descent and with Adam, whose steps do not shrink in proportion to the gradient.

Ends with status 1 unless the literal loss still falls at the end with a gradient no smaller than halfway (no minimum is
near), while the bounded one stays in [0, its start] and its gradient shrinks.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from train.losses.pbl import preference_bias_loss

TOKENS, LENGTH, ANSWERS = 16, 12, 32
Negative = Literal["literal", "bounded"]
OPTIMISERS = {"descent": (torch.optim.SGD, 0.5), "Adam": (torch.optim.Adam, 0.05)}


@dataclass(frozen=True)
class Point:
    """What is seen before a step."""

    loss: float
    rho: float
    slope: float
    drift: float


def reference(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits [v + 1, v] of p(next | last), the last row for the beginning, and answers of that policy [a, t]."""
    logits = torch.randn(TOKENS + 1, TOKENS, generator=draw, dtype=torch.float64)
    last, steps = torch.full((ANSWERS,), TOKENS), []
    for _ in range(LENGTH):
        last = torch.multinomial(logits[last].softmax(1), 1, generator=draw)[:, 0]
        steps.append(last)
    return logits, torch.stack(steps, 1)


def answer_logps(logits: Tensor, answers: Tensor) -> Tensor:
    """Of each answer, log π(y): [v + 1, v], [a, t] -> [a]."""
    before = torch.cat([answers.new_full((len(answers), 1), TOKENS), answers[:, :-1]], 1)
    return torch.log_softmax(logits, 1)[before, answers].sum(1)


def run(negative: Negative, optimiser: str, steps: int, seed: int) -> list[Point]:
    """Train on the conflicts alone."""
    start, answers = reference(torch.Generator().manual_seed(seed))
    ref_logps, ref = answer_logps(start, answers)[:, None], torch.log_softmax(start, 1)
    theta = start.clone().requires_grad_()
    kind, lr = OPTIMISERS[optimiser]
    step, seen = kind([theta], lr=lr), []
    none = torch.zeros_like(ref_logps, dtype=torch.bool)
    for _ in range(steps + 1):
        logps = answer_logps(theta, answers)[:, None]
        loss = preference_bias_loss(logps, ref_logps, none, None, 1.0, 1.0, negative).mean()
        (slope,) = torch.autograd.grad(loss, theta)
        drift = (ref.exp() * (ref - torch.log_softmax(theta, 1))).sum(1).mean()
        rho = (logps - ref_logps).mean()
        seen.append(Point(*(x.item() for x in (loss, rho, slope.norm(), drift))))
        theta.grad = slope
        step.step()
    return seen


def diverges(seen: list[Point]) -> bool:
    """Falls to the end, with a gradient that does not shrink (rounding aside)."""
    half = seen[len(seen) // 2]
    return seen[-1].loss < seen[-2].loss < half.loss < seen[0].loss and seen[-1].slope >= 0.999 * half.slope


def settles(seen: list[Point]) -> bool:
    """Never leaves [0, its start], with a gradient that shrinks."""
    return all(0 <= point.loss <= seen[0].loss for point in seen) and seen[-1].slope < seen[len(seen) // 2].slope


def plot(runs: dict[tuple[str, str], list[Point]], path: Path) -> None:
    """Loss and drift over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (optimiser, negative), seen in runs.items():
        style = {"color": "C3" if negative == "literal" else "C0", "linestyle": "-" if optimiser == "descent" else "--"}
        left.plot([point.loss for point in seen], label=f"{negative}, {optimiser}", **style)
        right.plot([point.drift for point in seen], **style)
    left.set_yscale("symlog")
    left.set_title("PBL on conflicts alone: loss, nats")
    right.set_title("KL(π_ref‖π_θ) a token, nats")
    for axes in (left, right):
        axes.set_xlabel("step")
    left.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="also draw it: a path ending in .svg or .png")
    args = parser.parse_args()
    runs = {(o, n): run(n, o, args.steps, args.seed) for o in OPTIMISERS for n in ("literal", "bounded")}
    print("| optimiser | term | step | loss | rho | slope | drift |\n| --- | --- | --- | --- | --- | --- | --- |")
    for (optimiser, negative), seen in runs.items():
        for step in sorted({*range(0, args.steps + 1, max(args.steps // 5, 1)), args.steps // 50, args.steps}):
            p = seen[step]
            figures = f"{p.loss:.4g} | {p.rho:.2f} | {p.slope:.2g} | {p.drift:.3f}"
            print(f"| {optimiser} | {negative} | {step} | {figures} |")
    if args.plot:
        plot(runs, args.plot)
    verdicts = [diverges(seen) if negative == "literal" else settles(seen) for (_, negative), seen in runs.items()]
    print(f"\nliteral diverges, bounded does not: {'yes' if all(verdicts) else 'NO'}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
