"""`engine: ray`: the work of a build on a pool of Ray actors, on this machine or a cluster.

One pool serves all stages of a build, and each of its actors loads a model once. That is why this is not Ray Data,
which starts a new pool, with its imports and weights, for every data set: a build has up to ten stages, some of them
short. An actor holds at most two parts at a time, so that it neither waits nor piles up work. One that dies, alone or
with its node, gives its parts back to the others, and another is started where there is room; a part that three actors
died of ends the build.

Actors need this package, its libraries in the same versions, and models at the same paths.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar, cast

from curate.config import EngineConfig
from curate.errors import InputError
from curate.models import threads

Item = TypeVar("Item")
Result = TypeVar("Result")

HELD = 2  # parts that an actor has: the one under way, and the next
TRIES = 3  # actors that a part may cost
PACKAGES = ("torch", "transformers", "sentence-transformers", "numpy", "polars", "scikit-learn", "POT", "rehearse")


@dataclass(eq=False)
class _Part:
    key: str
    item: Any
    tries: int = 0


class RayEngine:
    """A pool of actors. `map` starts it at its first part; `close` ends it."""

    def __init__(self, config: EngineConfig) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default an actor yields to everything else that runs
        try:
            import ray
        except ImportError:
            raise InputError("`engine: ray` needs the package ray", remedy="pip install 'rehearse[ray]'") from None
        self.ray, self.config = ray, config
        self._mine = False
        self._kind: Any = None  # the actor class with its options
        self._starting: dict[Any, Any] = {}  # reference of its greeting -> actor
        self._ready: dict[Any, list[_Part]] = {}  # actor -> parts that it holds, the one under way first
        self._failed = 0  # actors in a row that died before they were ready
        self._size = 0

    # --- work ---

    def map(self, make: Callable[[Item], Result], parts: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Result]]:
        """As `Engine.map`.

        Raises:
            InputError: what `make` raises; no actor can be started; a part ends every actor that takes it.
        """
        source, back, running = iter(parts), deque[_Part](), dict[Any, tuple[Any, _Part]]()
        first = next(source, None)
        if first is None:
            return
        self._connect()
        self._call_up()
        back.append(_Part(*first))
        # as bytes, so that what a model finds wrong where it arrives is the error of the part
        function, idle = self.ray.put(self.ray.cloudpickle.dumps(make)), time.monotonic()
        while True:
            self._hire()
            while (actor := self._free()) is not None and (part := _next(back, source)) is not None:
                running[actor.run.remote([function], part.item)] = actor, part
                self._ready[actor].append(part)
            if not running and not back:
                return
            found, _ = self.ray.wait([*running, *self._starting], num_returns=1, timeout=5)
            if found or self._ready:
                idle = time.monotonic()
            elif time.monotonic() - idle > self.config.patience:
                raise InputError(
                    f"engine: no actor was started within {self.config.patience:.0f} s",
                    remedy="look at `ray status`; lower engine.workers, engine.gpus or engine.cpus",
                )
            for reference in found:
                if reference in self._starting:
                    self._greeted(reference)
                    continue
                actor, part = running.pop(reference)
                try:
                    result = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, Exception) and not isinstance(error.cause, self.ray.exceptions.RayError):
                        raise error.cause from None  # what the local engine would raise
                    raise
                except (
                    self.ray.exceptions.RayError,
                    OSError,
                ) as error:  # it, or its node, died, and its result with it
                    self._lost(actor, error)
                    back.append(part)
                    continue
                if actor in self._ready:
                    self._ready[actor].remove(part)
                yield part.key, result

    def _lost(self, actor: Any, error: BaseException) -> None:
        """An actor is gone: the part that it was at may be why, those behind it are not."""
        for part in self._ready.pop(actor, [])[:1]:
            part.tries += 1
            if part.tries == TRIES:
                raise InputError(
                    f"engine: {TRIES} actors died at one part of the work: {_line(error)}",
                    remedy="memory is the usual cause (or code that ends the process): lower batch sizes, or give an "
                    "actor more of a node (engine.cpus, engine.gpus)",
                ) from None

    def check(self) -> None:
        """Connect to a cluster, and see whether it is large enough. Ray on this machine starts with the first part."""
        if self.config.address or "RAY_ADDRESS" in os.environ or self.config.gpus:
            self._connect()

    def close(self) -> None:
        """End the actors, and Ray itself where it was started here."""
        for actor in (*self._ready, *self._starting.values()):
            self.ray.kill(actor)
        self._ready, self._starting = {}, {}
        if self._mine and self.ray.is_initialized():
            self.ray.shutdown()
        self._kind = None

    # --- actors ---

    def _connect(self) -> None:
        if self._kind is not None:
            return
        config, ray = self.config, self.ray
        per_actor = config.threads or threads.number()  # the local engine's number, so that bits are the same
        cpus = config.cpus if config.cpus is not None else 1.0 if config.gpus else float(per_actor)
        if ray.is_initialized():
            if config.address not in (None, "auto", ray.get_runtime_context().gcs_address):
                raise InputError(
                    f"engine.address {config.address!r}: this process is connected to the Ray cluster at "
                    f"{ray.get_runtime_context().gcs_address} already",
                    remedy="leave engine.address out, or call ray.shutdown() first",
                )
        else:
            self._mine = True
            kwargs: dict[str, Any] = {"address": config.address} if config.address else {}
            if not config.address and "RAY_ADDRESS" not in os.environ:
                room = max(os.cpu_count() or 1, math.ceil((config.workers or 1) * cpus))
                kwargs = {"address": "local", "num_cpus": room, "include_dashboard": False}
            try:
                _answers(config.address or os.environ.get("RAY_ADDRESS", ""))
                ray.init(log_to_driver=False, logging_level="ERROR", **kwargs)
            except Exception as error:  # Ray has no common class for what may go wrong here
                raise InputError(
                    f"engine.address {config.address or os.environ.get('RAY_ADDRESS', 'local')!r}: no Ray cluster can "
                    f"be reached: {_line(error)}",
                    remedy="start one (`ray start --head`), correct engine.address, or leave it out: Ray then starts "
                    "on this machine. (A cluster that asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN)",
                ) from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = {name: need for name, need in (("CPU", cpus), ("GPU", config.gpus)) if need}
        room = sum(math.floor(min((n.get(k, 0.0) / v for k, v in needs.items()), default=1) + 1e-9) for n in nodes)
        self._size = config.workers or max(1, room)
        if room < self._size:
            asked = " and ".join(f"{need:g} {name}s" for name, need in needs.items())
            there = ", ".join(" and ".join(f"{n.get(name, 0.0):g} {name}s" for name in needs) for n in nodes[:8])
            raise InputError(
                f"engine: {self._size} workers with {asked} each; the cluster has room for {room} (its nodes: {there})",
                remedy="lower engine.workers, engine.gpus or engine.cpus, or add nodes",
            )
        variables = {"OMP_NUM_THREADS": str(per_actor), "MKL_NUM_THREADS": str(per_actor)}
        if self._size * per_actor > sum(n.get("CPU", 0.0) for n in nodes):
            variables["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the core to another actor's
        self._kind = ray.remote(_Actor).options(
            num_cpus=cpus, num_gpus=config.gpus, scheduling_strategy="SPREAD", max_restarts=0,
            runtime_env={"env_vars": variables},
        )  # fmt: skip

    def _call_up(self) -> None:
        """Ask the actors that are left whether they are still there: one that died idle says nothing of a part."""
        for actor in self._ready:
            self._starting[actor.hello.remote()] = actor
        self._ready = {}

    def _hire(self) -> None:
        """Start the actors that are missing."""
        for _ in range(self._size - len(self._ready) - len(self._starting)):
            actor = self._kind.remote()
            self._starting[actor.hello.remote()] = actor

    def _greeted(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            versions = self.ray.get(reference)
        except (self.ray.exceptions.RayError, OSError) as error:
            self._failed += 1
            if self._failed > TRIES * self._size:
                raise InputError(
                    f"engine: no actor stays alive: {_line(error)}",
                    remedy="is this package installed on every node, in the same Python environment?",
                ) from None
            return
        self._failed = 0
        if odd := [f"{n} {versions[n]} (here {mine})" for n, mine in _versions().items() if versions[n] != mine]:
            raise InputError(
                f"engine: a node has other versions: {', '.join(odd)}",
                remedy="install the same versions on every node: results could differ in their last bits",
            )
        self._ready[actor] = []

    def _free(self) -> Any:
        """The actor with the fewest parts, None where all have enough."""
        actor = min(self._ready, key=lambda a: len(self._ready[a]), default=None)
        return actor if actor is not None and len(self._ready[actor]) < HELD else None


class _Actor:
    """Runs functions. The last one stays; what its models have loaded stays for the next ones (`travel`)."""

    def __init__(self) -> None:
        self._name, self._function = "", cast("Callable[[Any], Any]", None)

    def hello(self) -> dict[str, str]:
        """Versions of what decides results."""
        return _versions()

    def run(self, function: list[Any], item: Any) -> Any:
        """function(item); in a list, so that Ray hands over its reference and not, each time, another copy."""
        import ray

        if self._name != (name := function[0].hex()):
            self._function = cast("Callable[[Any], Any]", None)  # what it holds is let go of first
            self._function, self._name = ray.cloudpickle.loads(ray.get(function[0])), name
        return self._function(item)


def _next(back: deque[_Part], source: Iterator[tuple[str, Any]]) -> _Part | None:
    if back:
        return back.popleft()
    found = next(source, None)
    return None if found is None else _Part(*found)


def _answers(address: str) -> None:
    """Ask whether anybody listens at HOST:PORT: Ray itself would try for minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else f'{text[:150]} … {text[-250:]}'}"
