"""Asynchronous rollouts: phases that a server is asked for while older ones are trained on.

Version p of the weights is what the policy is where phase p begins; then it is published, and phases up to p + n are
asked for. So the weights that draw phase q are of version q − n at least: the bound holds since nobody asks earlier.

- n = 1: version q − 1 draws all of phase q, as the next one is published when the last answer has come. Such a run
  repeats as a synchronous one does.
- n ≥ 2: weights are published while answers are under way, and how fast those come decides who draws what. A sample's
  version is that of when it was asked for: its tokens may be by newer weights, and their log μ is by those.

A run that goes on gives the server the last published weights again. Phases that are on the disk are kept, answers of a
phase that is not whole too (they are within the bound), and the rest is asked for. A step that a checkpoint has seen is
not taken again; one after it is, by the same samples.

The manifest of an asynchronous phase holds log-probabilities of the policy where the phase begins, as its label says;
those of the weights that drew are beside it in `samples.safetensors`. (`rollouts.offline` does not know them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from curate.errors import InputError
from curate.models import Completion, Prompt, Sampling
from train.parallel import first, together
from train.server import Server

Answers = list[tuple[int, list[Completion]]]  # of each prompt: version of the weights when it was asked, what came back


@dataclass
class Ahead:
    """Asks for phases ahead.

    Attributes:
        server: draws.
        prompts: those of a phase that are this process's.
        sampling: of the completions.
        most: n, versions by which the weights that draw may be older than the policy.
        phases: of the run; no later one is asked for.
    """

    server: Server
    prompts: Callable[[int], list[Prompt]]
    sampling: Sampling
    most: int
    phases: int
    version: int = field(default=-1, init=False)
    _asked: dict[int, tuple[list[Prompt], Future[Answers]]] = field(default_factory=dict, init=False)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rollouts"), init=False)

    def begin(self, number: int, policy: Any, wanted: bool) -> list[tuple[int, Completion]]:
        """(version that drew it, completion) of a whole phase; later phases are under way then.

        Args:
            number: of the phase that begins.
            policy: as it is now.
            wanted: whether the phase must be drawn, for it is not on the disk.

        Raises:
            InputError: the server gives no usable answer in all its tries, or no log-probabilities; `sync` fails.
        """
        oldest: int | None = None
        if self.version < 0 and wanted and not number:
            self._publish(0, policy)
        elif self.version < 0:  # this process goes on: another one has published, and perhaps asked
            together(lambda: self.server.again(policy, number - wanted) if first() else None)
            self.version, oldest = number - wanted, self.most
        if wanted:
            self._ask(number, oldest)
        asked = self._asked.pop(number, None)
        drawn = [each for own in together(lambda: self._taken(asked) if wanted and asked else []) for each in own]
        if wanted and not any(each.token_logps for _, each in drawn):
            raise InputError(
                "rollouts.server tells no log-probabilities of the tokens that it draws, by which stale ones are "
                "corrected",
                remedy="serve the policy with its own tokenizer and log-probabilities on, or set rollouts.staleness=0",
            )
        if self.version < number < self.phases - 1:
            self._publish(number, policy)
        for later in range(number + 1, min(number + self.most, self.phases - 1) + 1):
            self._ask(later, oldest)
        return drawn

    def _taken(self, asked: tuple[list[Prompt], Future[Answers]]) -> list[tuple[int, Completion]]:
        prompts, answers = asked[0], asked[1].result()
        drawn = self.server.read(prompts, [said for _, said in answers], self.sampling)
        return list(zip([version for version, said in answers for _ in said], drawn, strict=True))

    def _publish(self, version: int, policy: Any) -> None:
        together(lambda: self.server.refresh(policy, version) if first() else None)
        self.version = version

    def _ask(self, number: int, oldest: int | None) -> None:
        """In the thread, behind what was asked for before. `oldest`: answers may be kept ones, of this age at most."""
        if number not in self._asked:
            prompts = self.prompts(number)
            version = None if oldest is None else max(0, number - oldest)
            self._asked[number] = prompts, self._thread.submit(self._draw, prompts, version)

    def _draw(self, prompts: Sequence[Prompt], version: int | None) -> Answers:
        found, model = Answers(), self.server.model
        some = max(1, model.config.concurrency // self.sampling.k) if self.most > 1 else max(1, len(prompts))
        for start in range(0, len(prompts), some):
            by = self.version if version is None else version
            found += [(by, said) for said in model.generate(prompts[start : start + some], self.sampling)]
        return found

    def close(self) -> None:
        """Give up what is under way."""
        self.server.model.close()
        self._thread.shutdown(cancel_futures=True)
