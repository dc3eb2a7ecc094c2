import pytest
import yaml

from curate.config import BuildConfig
from curate.errors import InputError

TASK = {"name": "a", "path": "a.jsonl", "format": "alpaca"}


def load(tmp_path, data, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return BuildConfig.load(path, overrides)


def test_the_smallest_config(tmp_path):
    config = load(tmp_path, {"tasks": [TASK]})
    assert config.replay.selector == "inscl"
    assert config.replay.per_task == 200
    assert config.resolve("a.jsonl") == tmp_path / "a.jsonl"


def test_overrides_are_typed_yaml(tmp_path):
    config = load(tmp_path, {"tasks": [TASK]}, "seed=7", "replay.budget=4", "tasks.0.split=train", "tags.cluster=false",
                  "tasks.0.columns={input: context}", "name=a=b")  # fmt: skip
    assert (config.seed, config.replay.budget, config.replay.per_task) == (7, 4, None)
    assert config.tasks[0].split == "train"
    assert config.tags.cluster is False
    assert config.tasks[0].columns.input == "context"
    assert config.name == "a=b"


def test_one_size_replaces_another(tmp_path):
    config = load(tmp_path, {"tasks": [TASK], "replay": {"budget": 10}}, "replay.ratio=0.5")
    assert config.replay.budget is None
    assert config.replay.ratio == 0.5


@pytest.mark.parametrize(
    ("data", "override", "words"),
    [
        ({"tasks": [TASK], "sed": 1}, None, "did you mean 'seed'? Known here: name, "),
        ({"tasks": [TASK], "replay": False}, None, "replay: a section with keys of its own is wanted (selector, "),
        ({"tasks": [TASK]}, "tasks.0.pth=x", "did you mean 'tasks.0.path'"),
        ({"tasks": [TASK]}, "replay.selektor=x", "did you mean 'replay.selector'"),
        ({"tasks": [TASK], "replay": {"budget": 1, "ratio": 0.5}}, None, "give one of budget, per_task and ratio"),
        ({"tasks": []}, None, "tasks: List should have at least 1 item"),
        ({}, None, "tasks: Field required"),
        ({"tasks": [{"name": "a", "path": "x"}]}, None, "needs a format"),
        ({"tasks": [{**TASK, "blocks": "year"}]}, None, "belong together"),
        ({"tasks": [TASK]}, "seed=-1", "seed"),
        ({"tasks": [TASK]}, "seed=[", "not valid YAML"),
        ({"tasks": [TASK], "seed": 0}, "seed.deep=1", "single value"),
        ({"tasks": [TASK, {**TASK, "name": "A"}]}, None, "tasks 1 and 2 have the same name"),
        ("- a\n- b\n", None, "must be a mapping"),
        ("a: [", None, "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", None, "not valid YAML"),
        ("", None, "must be a mapping"),
        ({"tasks": [TASK], "embed": {"backend": "precomputed"}}, None, "embed.path"),
    ],
)
def test_refusals(tmp_path, data, override, words):
    with pytest.raises(InputError) as caught:
        load(tmp_path, data, *([override] if override else []))
    assert words in str(caught.value)
    assert "config.yaml" in str(caught.value) or override
