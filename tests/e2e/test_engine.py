"""`engine: ray`: the same bytes as the local engine, whatever dies; what is wrong with a cluster is said at once."""

import os
import pickle
import shutil
import signal
import sys
from contextlib import contextmanager
from functools import partial

import pytest
from policy_runs import AUGMENT, ROLLOUTS, STARTER, put, real, settings, task

from curate.build import build
from curate.cached import _scores
from curate.config import BuildConfig, EngineConfig, ModelConfig
from curate.engine import Local, open_engine
from curate.errors import InputError
from curate.models import open_generator
from curate.models.function import Function
from curate.screen import Silent

ray = pytest.importorskip("ray")
BLOCKS = {
    "rollouts": {**ROLLOUTS, "block": 2, "reward": {"kind": "python", "function": "kills:once"}},
    "augment": {**AUGMENT, "block": 2},
}  # 7 blocks of rollouts, 6 of rewrites
POOL = {"kind": "ray", "workers": 2, "cpus": 1}
KILLS = """
import os, signal
def once(prompts, completions, references):
    try:
        os.remove("{armed}")
    except FileNotFoundError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(c) for c in completions]
def always(prompts, completions, references):
    if os.getpid() != {driver}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    put(folder / "poem.jsonl", real("superni/sentiment_analysis", 12, task="task833"))
    put(folder / "facts.jsonl", real("conflict/templama", 6))
    (folder / "starter").symlink_to(STARTER)
    (folder / "kills.py").write_text(KILLS.format(armed=folder / "armed", driver=os.getpid()))
    return folder


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine: what a build runs on is neither of them."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # or its actors yield to the tests of every other worker
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield found
    ray.shutdown()
    found.shutdown()


def made(folder, name, *, screen=None, **sections):
    """The bytes of a build with a cache of its own."""
    stream = [task("poem"), task("facts", format="alpaca", columns={"instruction": "question", "output": "new_answer"})]
    given = {**settings(folder, name, tasks=stream, **sections), "cache": str(folder / f"cache-{name}")}
    build(given, screen)
    return {file.name: file.read_bytes() for file in sorted((folder / name).iterdir())}


@pytest.fixture(scope="module")
def local(folder):
    return made(folder, "local", **BLOCKS)


class AtHalf(Silent):
    """Does something once when half of the rollouts are there."""

    def __init__(self, act):
        self.act, self.seen = act, 0

    def stage(self, name, total, unit):
        if name != "rollouts":
            return super().stage(name, total, unit)
        return self._counted(total)

    @contextmanager
    def _counted(self, total):
        def advance(n):
            before, self.seen = self.seen, self.seen + n
            if before < total / 2 <= self.seen:
                self.act()

        yield advance


def test_a_pool_gives_the_same_bytes_also_when_an_actor_and_a_node_die(folder, cluster, local):
    node = cluster.add_node(num_cpus=1)
    engine = {**POOL, "address": cluster.address}
    alive = lambda: sum(n["Alive"] for n in ray.nodes())  # noqa: E731
    nodes = []

    def kill():
        nodes.append(alive())
        cluster.remove_node(node, allow_graceful=False)

    (folder / "armed").touch()  # the first reward kills the actor that computes it
    screen = AtHalf(kill)
    found = made(folder, "pool", screen=screen, engine=engine, **BLOCKS)
    assert not (folder / "armed").exists()
    assert nodes == [2] and screen.seen == 14  # 8 replayed and 6 current prompts, each counted once
    assert found == local  # provenance.json too: where a build was computed is no part of it


def test_work_that_kills_every_actor_ends_the_build(folder, cluster):
    rollouts = {**BLOCKS["rollouts"], "reward": {"kind": "python", "function": "kills:always"}}
    engine = {**POOL, "workers": 1, "address": cluster.address}  # one after the other
    with pytest.raises(
        InputError, match=r"3 actors died at one part of the work(?s:.*)remedy: memory is the usual cause"
    ):
        made(folder, "always", engine=engine, rollouts=rollouts)
    assert not (folder / "always/provenance.json").exists()


def test_actors_that_died_idle_cost_nothing(cluster):
    engine = open_engine(EngineConfig(kind="ray", workers=2, cpus=0.5, address=cluster.address))

    def pid(_):
        return os.getpid()

    try:
        for who in {who for _, who in engine.map(pid, [(str(i), i) for i in range(8)])}:
            os.kill(who, signal.SIGKILL)
        found = dict(engine.map(abs, [("a", -1)]))  # one part: three dead actors would be too many for it
        assert found == {"a": 1}
    finally:
        engine.close()


# --- what is wrong is said at once ---


def test_a_cluster_that_is_not_there(folder):
    with pytest.raises(
        InputError, match=r"engine.address '127.0.0.1:9': no Ray cluster can be reached(?s:.*)ray start"
    ):
        made(folder, "nowhere", engine={"kind": "ray", "address": "127.0.0.1:9"})
    assert not (folder / "nowhere").exists() and not (folder / "cache-nowhere/read").exists()


def test_a_cluster_that_is_too_small(folder, cluster):
    with pytest.raises(InputError, match=r"2 workers with 1 CPUs and 1 GPUs each; the cluster has room for 0"):
        made(folder, "gpus", engine={**POOL, "gpus": 1, "address": cluster.address})
    assert not (folder / "gpus").exists()


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs the package ray(?s:.*)pip install 'rehearse\[ray\]'"):
        made(folder, "without", engine="ray")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"workers": 2}, "`engine.workers` belongs to `engine.kind: ray`"),
        ("spark", "engine.kind"),
        ({"kind": "ray", "gpus": -1}, "engine.gpus"),
        ({"kind": "ray", "gpus": 1.5}, "`engine.gpus` is a whole number, or a share of one GPU"),
        ({"patience": 5}, "`engine.patience` belongs to `engine.kind: ray`"),
    ],
)
def test_a_wrong_section(engine, message):
    with pytest.raises(InputError, match=message):
        BuildConfig.parse({"tasks": [{"name": "a", "path": "a.jsonl", "format": "text"}], "engine": engine})


# --- models travel as their description ---


def test_a_model_arrives_without_what_it_has_loaded_and_once():
    model = open_generator(ModelConfig(model=str(STARTER)))
    _ = model.model  # 6.7 million parameters
    packed = pickle.dumps(model)
    assert len(packed) < 4096
    first, second = pickle.loads(packed), pickle.loads(packed)
    assert first is second and first is not model and "model" not in vars(first)
    assert first.fingerprint == model.fingerprint and first.how == model.how
    assert vars(first)["place"] == model.place  # found out where the key was made, not where it arrives


def test_other_weights_are_refused_where_it_arrives(tmp_path):
    shutil.copytree(STARTER, tmp_path / "policy")
    packed = pickle.dumps(open_generator(ModelConfig(model=str(tmp_path / "policy"))))
    file = tmp_path / "policy/config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match=r"a worker finds other files than the build(?s:.*)same path on every node"):
        pickle.loads(packed)


def test_a_users_function_arrives_by_name(tmp_path):
    (tmp_path / "arrives.py").write_text(
        "def judge(prompts, completions, references):\n    return [2.0] * len(completions)\n"
    )
    reward = Function("arrives:judge", tmp_path, "rollouts.reward")
    arrived = pickle.loads(pickle.dumps(reward))
    assert isinstance(arrived, Function) and arrived([], [], []) == []
    assert arrived.fingerprint == reward.fingerprint


def test_threads_are_limited_inside_and_restored():
    import torch
    from threadpoolctl import threadpool_info

    def taken(_):
        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        return torch.get_num_threads(), blas

    before = torch.get_num_threads()
    assert [n for _, n in Local(3).map(taken, [("a", 0)])] == [(3, {3})]  # NumPy's too: distances are its
    assert torch.get_num_threads() == before


# --- one actor ---


@pytest.fixture(scope="module")
def one(cluster):
    """For the tests from here on: those above have the cluster, and their connection, to themselves."""
    engine = open_engine(EngineConfig(kind="ray", workers=1, address=cluster.address))
    yield engine
    engine.close()


def test_what_a_part_raises_is_raised_here(one):
    def odd(n):
        if n == 7:
            raise InputError("row 7 is odd")
        return n * n

    with pytest.raises(InputError, match="row 7 is odd"):
        list(one.map(odd, [(str(i), i) for i in range(9)]))
    assert sorted(one.map(odd, [(str(i), i) for i in range(7)])) == [(str(i), i * i) for i in range(7)]


def test_a_model_that_is_another_one_there(one, tmp_path):
    shutil.copytree(STARTER, tmp_path / "policy")
    model = open_generator(ModelConfig(model=str(tmp_path / "policy")))
    _ = model.fingerprint
    file = tmp_path / "policy/config.json"
    file.write_text(file.read_text() + " ")  # what an actor finds, then, is not what the build has seen
    with pytest.raises(InputError, match=r"a worker finds other files than the build(?s:.*)remedy: put the same"):
        list(one.map(partial(_scores, model), [("a", [])]))


def test_parts_are_read_no_faster_than_they_are_done(one):
    read = []

    def parts():
        for i in range(20):
            read.append(i)
            yield str(i), i

    for done, _ in enumerate(one.map(abs, parts()), 1):
        assert len(read) <= done + 2  # two are held by the one actor
