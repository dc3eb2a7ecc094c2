"""A stream's settings and its tree of stages: nothing is trained here."""

import json
import shutil

import polars as pl
import pytest
import yaml
from test_run import STARTER

from curate.build import Build, build
from curate.config import BuildConfig
from curate.errors import InputError
from curate.manifest import ManifestError
from curate.screen import Silent as Quiet
from curate.settings import checked
from train.stream.config import StreamConfig
from train.stream.page import _against
from train.stream.plan import plan
from train.stream.run import Silent, _read_ahead, prepared
from train.stream.stage import write_files

TASKS, ROLLOUTS = ("a", "b", "c"), {"k": 2, "reward": "exact"}


@pytest.fixture
def base(tmp_path):
    """A stream of three tasks with two rows for training and one held out each; plan(...) of it with changes."""
    for name in TASKS:
        rows = [{"instruction": f"Say {name}.", "input": str(i), "output": name, "split": "test" if i == 2 else "train"}
                for i in range(3)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(STARTER), "out": str(tmp_path / "out"), "base": str(tmp_path),
        "tasks": [{"name": n, "path": f"{n}.jsonl", "format": "alpaca", "split": "train"} for n in TASKS],
        "replay": {"selector": "random", "budget": 1}, "train": {"max_steps": 1}, "bounds": {"none": False},
    }  # fmt: skip


def planned(base, **changes):
    return plan(checked(StreamConfig, {**base, **changes}))


def runs(made, kind="run"):
    return [run for run in made.runs if run.kind == kind]


def step(made, folder, command):
    return next(s.settings for s in made.stages[folder].ordered if s.command == command)


def joint_of(made):
    return runs(made, "joint")[0].stages[0]


def test_what_runs_share_is_one_stage(base):
    arms = {"none": {"replay.selector": "none"}, "random": {}, "uniform": {"replay.selector": "uniform"}}
    made = planned(base, arms=arms)
    firsts = {run.stages[0] for run in runs(made)}
    assert len(firsts) == 1, "nothing is replayed in a first stage, whatever the selector"
    assert {run.stages[0] for run in runs(made, "single") if run.tasks == ("a",)} == firsts
    # held-out rows, the first model, the shared stage 1, stages 2 and 3 of three arms, b and c alone, all at once
    assert len(made.stages) == 1 + 1 + 1 + 2 * 3 + 2 + 1
    places = {folder: at for at, folder in enumerate(made.stages)}
    assert all(places[need] < places[s.folder] for s in made.stages.values() for need in s.needs)


def test_a_budget_makes_no_second_run_without_replay(base):
    made = planned(base, grid={"replay.selector": ["none", "random"], "replay.ratio": [0.5, 1.0]})
    by_name = {run.name: run.stages for run in runs(made)}
    assert list(by_name) == ["none", "random · ratio 0.5", "random · ratio 1.0"]
    assert by_name["random · ratio 0.5"][0] == by_name["random · ratio 1.0"][0]
    assert by_name["random · ratio 0.5"][1:] != by_name["random · ratio 1.0"][1:]
    assert step(made, by_name["random · ratio 0.5"][1], "build")["replay"] == {"selector": "random", "ratio": 0.5}


def test_orders(base):
    made = planned(base, grid={"order": ["curriculum", "reverse", "random"]}, seeds=list(range(8)))
    orders = {}
    for run in runs(made):
        orders.setdefault(run.name, []).append(run.tasks)
    assert set(orders["curriculum"]) == {("a", "b", "c")}
    assert set(orders["reverse"]) == {("c", "b", "a")}
    assert len(set(orders["random"])) > 1, "drawn by the seed"
    assert all(sorted(tasks) == ["a", "b", "c"] for tasks in orders["random"])
    again = planned(base, grid={"order": ["curriculum", "reverse", "random"]}, seeds=list(range(8)))
    assert list(again.stages) == list(made.stages)


def test_a_stage_is_its_tasks_so_far_and_goes_on_from_the_one_before(base):
    made = planned(base)
    first, second, third = runs(made)[0].stages
    assert [t["name"] for t in step(made, third, "build")["tasks"]] == ["a", "b", "c"]
    assert step(made, first, "cft")["model"].endswith("examples/starter")
    assert step(made, third, "cft")["model"] == f"../{second}/train/model"
    assert step(made, third, "eval")["models"] == ["train/model"]
    assert step(made, second, "eval")["tasks"] == ["a", "b"]
    assert step(made, second, "eval")["data"] == f"../{made.stages[second].needs[0]}/manifest"
    alone = next(run for run in runs(made, "single") if run.tasks == ("c",))
    assert step(made, alone.stages[0], "eval")["tasks"] == ["c"]
    (joint,) = runs(made, "joint")
    singles = [run.stages[0] for run in runs(made, "single")]
    assert step(made, joint.stages[0], "cft")["data"] == [f"../{folder}/manifest" for folder in singles]
    assert step(made, joint.stages[0], "cft")["max_steps"] == 3, "a step a task, as a run has in all"
    assert "max_steps" not in step(planned(base, train={}), joint_of(planned(base, train={})), "cft")


def test_every_path_is_relative_to_the_stage(base, tmp_path):
    made = planned(base)
    place = tmp_path / "out/stages/x"
    place.mkdir(parents=True)
    for stage in made.stages.values():
        for each in stage.ordered:
            text = json.dumps(each.settings)
            assert str(tmp_path) not in text, "so that the tree can move with its sources"
    path = step(made, runs(made)[0].stages[0], "build")["tasks"][0]["path"]
    assert (place / path).resolve() == tmp_path / "a.jsonl"


def test_a_stage_is_named_after_all_that_decides_it(base, tmp_path):
    was = planned(base)
    names = set(was.stages)
    assert not set(planned(base, train={"max_steps": 2}).stages) & names - {n for n in names if n[0] in "h0"}
    for idle in (
        {"name": "another title"}, {"workers": 3}, {"out": str(tmp_path / "deep/er/out")},
        {"train": {"max_steps": 1, "logging_steps": 1}}, {"evaluation": {"split": "test", "per_task": 1}},
    ):  # fmt: skip
        assert set(planned(base, **idle).stages) == names, idle
    again = planned(base, evaluation={"split": "test", "per_task": 1})
    first = runs(was)[0].stages[0]
    assert again.stages[first].scores != was.stages[first].scores, "trained once, scored in another folder"
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace("Say b", "Tell b"))
    before, after = runs(was)[0].stages, runs(planned(base))[0].stages
    assert after[0] == before[0] and after[1] != before[1], "other bytes of a task: other stages from it on"


def test_what_is_read_beside_the_sources_decides_too(base, tmp_path):
    (tmp_path / "judge.py").write_text("def one(prompts, completions, references):\n    return [1.0] * len(prompts)\n")
    shutil.copytree(STARTER, tmp_path / "reference")
    for changes, file in (
        (
            {"method": "cppo", "train": {"max_steps": 1, "reward": {"kind": "python", "function": "judge:one"}}},
            "judge.py",
        ),
        ({"train": {"max_steps": 1, "kl": {"weight": 0.1, "reference": "reference"}}}, "reference/config.json"),
    ):
        was = runs(planned(base, **changes))[0].stages
        assert runs(planned(base, **changes))[0].stages == was
        (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
        assert not set(runs(planned(base, **changes))[0].stages) & set(was), file


def test_what_is_read_ahead_is_what_the_builds_of_stages_find(base, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.jsonl").rename(tmp_path / "folder/b.jsonl")
    tasks = [base["tasks"][0], {**base["tasks"][1], "path": "folder/"}, base["tasks"][2]]
    config = checked(StreamConfig, {**base, "tasks": tasks})
    made = prepared(config)
    for stage in made.stages.values():
        write_files(made, stage)
    _read_ahead(made, made.stages, config, Silent())
    there = {f.parent.name for f in made.out.glob("cache/read/*/summary.json")}
    assert len(there) == 2 * 3, "two splits of three tasks"
    keys = set()
    for name in made.stages:
        if (made.folder(name) / "build.yaml").is_file():
            monkeypatch.chdir(made.folder(name))
            here = Build(BuildConfig.load("build.yaml"), Quiet())
            keys |= {here.read_key(task, here.sources()[i]) for task, i in here.stream}
    assert keys == there


def test_a_stream_does_not_write_into_what_it_is_scored_on(base, tmp_path):
    tasks = [{**task, "split": "test"} for task in base["tasks"]]
    build({"tasks": tasks, "replay": {"selector": "random"}, "out": str(tmp_path / "held"), "base": str(tmp_path)})
    for out in ("held/inner", "held"):
        config = {**base, "out": str(tmp_path / out), "evaluation": {"data": str(tmp_path / "held")}}
        with pytest.raises(InputError, match=r"which is read|not of this command|of other"):
            prepared(checked(StreamConfig, config))
    assert not (tmp_path / "held/inner").exists()


def test_a_held_out_manifest_decides_the_scores(base, tmp_path):
    tasks = [{**task, "path": str(tmp_path / task["path"]), "split": "test"} for task in base["tasks"]]
    for rows in (["a", "b", "c"], ["a", "b", "c", "d"]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(
            {"instruction": "Say.", "input": row, "output": row, "split": "test"}) + "\n" for row in rows))  # fmt: skip
        build({"tasks": tasks, "replay": {"selector": "random", "per_task": 9}, "out": str(tmp_path / "held")})
        (tmp_path / "a.jsonl").write_text(
            json.dumps({"instruction": "Say.", "input": "x", "output": "a", "split": "train"})
        )
        made = planned(base, evaluation={"data": "held"})
        first = runs(made)[0].stages[0]
        if rows[-1] == "c":
            was = first, made.stages[first].scores
    assert first == was[0] and made.stages[first].scores != was[1], "the same model, scored on other rows"
    with pytest.raises(InputError, match="no row of task 'z'"):
        planned(base, evaluation={"data": "held"}, tasks=[{**base["tasks"][0], "name": "z"}, *base["tasks"][1:]])


def test_without_replay_there_is_a_run_in_any_case(base):
    made = planned(base, bounds={}, arms={"random": {}, "uniform": {"replay.selector": "uniform"}})
    assert [run.name for run in runs(made)] == ["random", "uniform", "none"]
    without = next(run for run in runs(made) if run.name == "none")
    assert all(step(made, f, "build")["replay"] == {"selector": "none"} for f in without.stages)
    assert [run.name for run in runs(planned(base, bounds={}, replay={"selector": "none"}))] == ["stream"]
    copr = planned(base, bounds={}, method="copr", build={"policy": {}, "rollouts": ROLLOUTS})
    last = next(run for run in runs(copr) if run.name == "none").stages[-1]
    assert "buffers" not in step(copr, last, "copr") and step(copr, last, "copr")["constraint"] == "none"


def test_the_bound_has_a_name_of_its_own(base):
    random, uniform = {"replay.selector": "random"}, {"replay.selector": "uniform"}
    for name, arms, bound in (("s", {}, "none"), ("none", {}, "no replay"), ("s", {"none": random}, "no replay"),
                              ("s", {"none": random, "no replay": uniform}, "bound: no replay")):  # fmt: skip
        made = planned(base, name=name, arms=arms, bounds={"single": False, "joint": False})
        assert [run.name for run in runs(made)] == [*(arms or [name]), bound]


ARM, NONE = {"replay.selector": "random"}, {"replay.selector": "none"}


@pytest.mark.parametrize(
    ("arms", "grid", "against"),
    [
        ({"x": ARM, "y": ARM}, {}, {"y": "x"}),
        ({"x": ARM, "y": ARM}, {"order": ["curriculum", "reverse"]},
         {"y · curriculum": "x · curriculum", "y · reverse": "x · reverse"}),
        # without replay a budget makes no other run: it is beside every one
        ({"none": NONE, "y": ARM}, {"order": ["curriculum", "reverse"], "replay.budget": [1, 2]},
         {f"y · {order} · budget {n}": f"none · {order}" for order in ("curriculum", "reverse") for n in (1, 2)}),
        ({"none": NONE, "y": ARM}, {"replay.budget": [1, 2]}, {"y · budget 1": "none", "y · budget 2": "none"}),
        ({}, {"replay.selector": ["random", "uniform"]}, {"uniform": "random"}),
    ],
)  # fmt: skip
def test_what_a_run_is_compared_with(base, arms, grid, against):
    config = checked(StreamConfig, {**base, "arms": arms, "grid": grid, "bounds": {"single": False, "joint": False}})
    made = plan(config)
    rows = [{"run": r.name, "arm": r.recipe.arm, "cell": r.recipe.cell, "kind": r.kind} for r in runs(made)]
    found = _against(pl.DataFrame(rows), config)
    assert {run: other for run, other in found.items() if run != "none"} == against


def test_the_joint_bound_has_the_steps_of_all_stages(base):
    for given in (2, "2"):
        made = planned(base, train={"max_steps": given})
        assert step(made, joint_of(made), "cft")["max_steps"] == 2 * 3


def test_what_a_method_holds_is_named_stage_by_stage(base):
    ewc = planned(base, train={"max_steps": 1, "ewc": {"weight": 10}}, fisher={"samples": 1})
    first, second, third = runs(ewc)[0].stages
    assert "ewc" not in step(ewc, first, "cft")
    out = step(ewc, second, "fisher")["out"]
    assert step(ewc, third, "cft")["ewc"] == {"weight": 10, "fisher": [f"../{f}/{out}" for f in (first, second)]}
    assert step(ewc, second, "fisher")["samples"] == 1
    assert "fisher" not in ewc.stages[third].steps, "nobody needs that of the last stage"
    plain = runs(planned(base))[0].stages
    assert plain[0] == first and plain[1] != second, "the same model, whether its Fisher information is wanted or not"
    o_lora = planned(base, train={"max_steps": 1, "lora": {"r": 2}, "o_lora": {"weight": 0.5}})
    first, second, third = runs(o_lora)[0].stages
    assert "o_lora" not in step(o_lora, first, "cft")
    assert step(o_lora, third, "cft")["o_lora"]["previous"] == [f"../{second}/train/model"]
    assert step(o_lora, third, "cft")["model"] == step(o_lora, first, "cft")["model"], "adapters beside the first model"
    cppo = planned(base, method="cppo", train={"max_steps": 1, "reward": "exact"})
    first, second, _ = runs(cppo)[0].stages
    assert step(cppo, second, "cppo")["value"] == {"head": f"../{first}/train/value.safetensors"}
    assert "value" not in step(cppo, first, "cppo")
    assert step(cppo, joint_of(cppo), "cppo")["data"] == ["manifest"], "RL takes one"
    assert step(cppo, joint_of(cppo), "build")["replay"]["per_task"] == 10**9, "with all rows of all tasks"


def test_buffers_of_copr_and_the_policy_of_a_build(base):
    copr = planned(base, method="copr", replay={"selector": "none"},
                   build={"policy": {"batch_size": 4}, "rollouts": ROLLOUTS},
                   train={"max_steps": 1, "mixture": {"current": 0.75, "replay": 0.25}})  # fmt: skip
    first, second, third = runs(copr)[0].stages
    assert step(copr, third, "copr")["buffers"] == [f"../{first}/train/buffer", f"../{second}/train/buffer"]
    assert "mixture" not in step(copr, first, "copr")
    assert step(copr, second, "copr")["mixture"] == {"current": 0.75, "replay": 0.25}
    assert step(copr, third, "build")["policy"] == {"batch_size": 4, "model": f"../{second}/train/model"}


def test_what_comes_back_is_drawn_anew_in_every_stage(base):
    made = planned(base, seeds=[0, 1], arms={"none": {"replay.selector": "none"}, "random": {}})
    seeds = {run.name: [step(made, f, "build")["seed"] for f in run.stages] for run in runs(made) if run.seed == 1}
    assert seeds["none"] == [1, 1, 1]
    assert seeds["random"][0] == 1 and len(set(seeds["random"])) == 3
    assert all(step(made, f, "cft")["seed"] == run.seed for run in runs(made) for f in run.stages)


def test_selectors_that_ask_the_model_ask_the_checkpoint(base):
    made = planned(base, replay={"selector": "perplexity_ratio", "budget": 1})
    first, second, third = runs(made)[0].stages
    assert "policy" not in step(made, first, "build")
    assert step(made, third, "build")["policy"] == {"model": f"../{second}/train/model"}
    assert step(made, second, "build")["reference"]["model"].endswith("examples/starter")
    assert step(made, third, "build")["reference"]["model"] == f"../{first}/train/model", "before the newest stage"


def test_tags_by_the_model_itself_ask_the_checkpoint(base):
    """In the first stage, where nothing is replayed, and without replay too: its section is one of a build's."""
    made = planned(base, build={"tags": {"tagger": "llm"}}, arms={"inscl": {"replay.selector": "inscl"},
                                                                  "none": {"replay.selector": "none"}})  # fmt: skip
    for run in runs(made):
        asked = [step(made, folder, "build")["policy"]["model"] for folder in run.stages]
        assert asked[0].endswith("examples/starter")
        assert asked[1:] == [f"../{folder}/train/model" for folder in run.stages[:-1]]
    other = planned(base, build={"tags": {"tagger": "llm", "model": {"model": str(STARTER)}}})
    assert not any("policy" in step(other, folder, "build") for folder in runs(other)[0].stages)


def test_a_mixture_counts_where_something_comes_back(base):
    mixture = {"current": 0.5, "replay": 0.5}
    made = planned(base, train={"max_steps": 1, "mixture": mixture},
                   arms={"none": {"replay.selector": "none"}, "random": {}})  # fmt: skip
    none, random = runs(made)
    assert "mixture" not in step(made, none.stages[2], "cft")
    assert step(made, random.stages[1], "cft")["mixture"] == mixture
    assert "mixture" not in step(made, random.stages[0], "cft")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"x": {"seeds": [1]}}}, r"arms\.x: 'seeds' is not in order, replay"),
        ({"grid": {"replay.ratio": []}}, r"grid\.replay\.ratio: no values"),
        ({"grid": {"replay.ratio": [0.5, 0.5]}}, "two runs are called"),
        ({"grid": {"replay.ratio": [0.5], "replay.budget": [1]}}, "grid: give one of"),
        (
            {"arms": {"x": {"replay.budget": 2}}, "grid": {"replay.budget": [1]}},
            "'replay.budget' is in the grid as well",
        ),
        ({"arms": {"x": {"replay.budget": 2, "replay": {"selector": "random"}}}}, "'replay' holds 'replay.budget'"),
        ({"grid": {"train.seed": [1, 2]}}, r"run .*train\.seed: set by the stream"),
        ({"arms": {"x": {"build.tasks": []}}}, r"run 'x'.*build\.tasks"),
        ({"train": {"max_steps": 1, "ewc": "x"}}, r"train\.ewc: a mapping"),
        ({"train": {"learning_rate": float("nan")}}, "run 'stream'.*finite"),
        ({"train": {"learning_rate": 10**400}}, "learning_rate.*no number"),
        ({"arms": {"x": {"method.a": 1}}}, "'method' is a single value"),
        ({"arms": {"x": {"train.learning_rat": 1}}}, "run 'x': unknown key 'learning_rat'"),
        ({"train": {"reward": {"kind": "python", "function": "nowhere:one"}}, "method": "cppo"}, "nowhere"),
        ({"grid": {"train.learning_rat": [1]}}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"grid": {"order": ["backwards"]}}, "run 'stream'.*order"),
        ({"arms": {"a/b": {}}}, "a name has letters"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"seeds": [-1]}, "-1 is not between 0"),
        ({"train": {"out": "x"}}, r"train\.out: set by the stream"),
        ({"train": {"ewc": {"weight": 1, "fisher": ["x"]}}}, r"train\.ewc\.fisher: set by the stream"),
        ({"arms": {"a": {"train.o_lora.previous": ["x"]}}}, r"train\.o_lora\.previous: set by the stream"),
        ({"train": {"buffers": ["x"]}}, r"train\.buffers: set by the stream"),
        ({"build": {"replay": {}}}, r"build\.replay: a key of the stream itself"),
        ({"replay": {"selector": "inscl", "budgett": 3}}, r"unknown key 'replay\.budgett'"),
        ({"evaluation": {"split": "train"}}, r"tasks\.0\.split: 'train' is what"),
        ({"evaluation": {"data": "nowhere"}}, "nowhere"),
        ({"evaluation": {}}, "give one of `split`"),
        ({"baseline": "inscl"}, "baseline: 'inscl' is no arm of this stream.*\n.*'stream'"),
        ({"bounds": {"single": False}}, "bounds.*switch both on"),
        ({"model": "no/such-model-here"}, "no/such-model-here"),
        ({"train": {"max_steps": 1, "kl": {"weight": -1}}}, r"kl\.weight"),
        ({"method": "sft"}, "method"),
        ({"method": "copr"}, "run 'stream': method copr: it compares.*\n.*`build.rollouts` with a reward"),
        ({"arms": {"none": {}, "x": {"method": "dpo"}}}, "run 'x': method dpo: it compares the answers of a prompt"),
        ({"evaluation": {"split": "test", "metric": "ranking"}}, "metric ranking: it orders.*\n.*rouge_l"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_work(base, tmp_path, changes, says):
    with pytest.raises((InputError, ManifestError), match=rf"(?s){says}"):
        planned(base, **changes)
    assert not (tmp_path / "out").exists()


def test_tasks_that_leak_or_are_cut(base):
    tasks = [{k: v for k, v in task.items() if k != "split"} for task in base["tasks"]]
    with pytest.raises(InputError, match=r"tasks\.0\.split: name the split that is trained on"):
        planned(base, tasks=tasks)
    with pytest.raises(InputError, match="two are named 'a'"):
        planned(base, tasks=[base["tasks"][0], {**base["tasks"][1], "name": "A"}])
    missing = [{**base["tasks"][0], "path": "none.jsonl"}, base["tasks"][1]]
    with pytest.raises(InputError, match=r"none\.jsonl"):
        planned(base, tasks=missing)


def test_the_shipped_example_is_a_stream(tmp_path):
    from train.stream.config import StreamConfig

    file = STARTER.parent / "stream.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    made = plan(checked(StreamConfig, {**data, "base": str(file.parent), "out": str(tmp_path / "out")}))
    assert {run.name for run in runs(made)} >= {"none", "random", "inscl"}
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
