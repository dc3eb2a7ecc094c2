"""The user's own functions as rewards."""

import math
import os
import sys

import numpy as np
import pytest

from curate.config import RewardConfig
from curate.errors import InputError
from curate.models import function as module
from curate.models.base import Prompt
from curate.models.reward import open_reward


def judge(reward, completions, references, prompts=None):
    return reward(prompts or [Prompt(f"u{i}", []) for i in range(len(completions))], completions, references)


def write_function(folder, body, name="my_reward"):
    (folder / f"{name}.py").write_text(f"import math\n\n\ndef score(prompts, completions, references):\n    {body}\n")
    return open_reward(RewardConfig(kind="python", function=f"{name}:score"), folder, None)


def test_a_function_of_the_user(tmp_path):
    path = list(sys.path)
    reward = write_function(
        tmp_path,
        "return [len(c) + len(r) + (p[0]['content'] == 'hi') for p, c, r in zip(prompts, completions, references)]",
    )
    prompts = [Prompt("a", [{"role": "user", "content": "hi"}]), Prompt("b", [{"role": "user", "content": "ho"}])]
    assert reward(prompts, ["xx", "y"], [["r"], []]) == [4.0, 1.0]  # 2 + 1 + 1, 1 + 0 + 0
    assert reward([], [], []) == []
    kind, name, rest = reward.fingerprint.split(":")
    assert (kind, name, rest[:6], len(rest)) == ("python", "my_reward", "score@", 6 + 64)
    assert sys.path == path


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [None, float('nan'), math.inf, 10 ** 400]", [math.nan] * 4),
        ("return [True, False, -1, 0.5]", [1, 0, -1, 0.5]),
        ("import numpy; return numpy.arange(4)", [0, 1, 2, 3]),
        ("import numpy; return [numpy.float32(0.5), numpy.int8(1), numpy.bool_(1), None]", [0.5, 1, 1, math.nan]),
        ("import torch; return (torch.tensor(0.5), 1, 2, 3)", [0.5, 1, 2, 3]),
    ],
)
def test_what_a_function_may_give(tmp_path, body, expected):
    found = judge(write_function(tmp_path, body), list("abcd"), [[]] * 4)
    assert all(type(value) is float for value in found)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("raise KeyError('lost')", "raised KeyError: 'lost'"),
        ("return [1.0]", "gave 1 numbers"),
        ("return None", "gave NoneType instead of a list"),
        ("return 1.0", "gave float instead of a list"),
        ("return {'a': 1, 'b': 2}", "gave dict instead of a list"),
        ("yield 1", "gave generator instead of a list"),
        ("return ['1', 2]", r"gave '1' \(str\), no number"),
        ("return [[1], [2]]", r"gave '\[1\]' \(list\), no number"),
        ("return [1, 2j]", "no number"),
    ],
)
def test_what_a_function_may_not_give(tmp_path, body, match):
    reward = write_function(tmp_path, body)
    with pytest.raises(InputError, match=match) as info:
        judge(reward, ["a", "b"], [[], []], [Prompt("row-7", []), Prompt("row-8", [])])
    assert all(part in str(info.value) for part in ("rollouts.reward.function 'my_reward:score'", "row-7", "remedy: "))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        ("my_reward:scores", r"my_reward\.py has no such function\n.*it has score"),
        ("my_reward:number", r"my_reward\.py has no such function"),
        ("no_such_module:score", r"cannot be imported: ModuleNotFoundError.*no_such_module"),
        ("my_broken:score", r"cannot be imported: ZeroDivisionError"),
        ("math.nothing:score", r"cannot be imported: ModuleNotFoundError"),
        ("sys:exit", "no source file"),
    ],
)
def test_functions_that_are_not_there(tmp_path, function, match):
    (tmp_path / "my_reward.py").write_text("number = 1\n\n\ndef score(*_):\n    return []\n")
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    path = list(sys.path)
    with pytest.raises(InputError, match=match) as info:
        open_reward(RewardConfig(kind="python", function=function), tmp_path, None)
    assert f"rollouts.reward.function '{function}'" in str(info.value)
    assert sys.path == path


def test_a_function_is_that_of_its_own_folder_and_time(tmp_path, monkeypatch):
    """Two builds in one process may name their modules alike, and a module may be edited between two builds."""
    for name in ("one", "two"):
        (tmp_path / name / "rewards").mkdir(parents=True)
        (tmp_path / name / "helper.py").write_text(f"VALUE = {len(name) + (name == 'two')}\n")
        (tmp_path / name / "rewards" / "best.py").write_text(
            "import helper\nimport elsewhere\n\n\ndef score(p, c, r):\n    return [helper.VALUE] * len(c)\n"
        )
    (tmp_path / "one" / "env").mkdir()
    (tmp_path / "one" / "env" / "elsewhere.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "one" / "env")
    config = RewardConfig(kind="python", function="rewards.best:score")
    one, two = (open_reward(config, tmp_path / name, None) for name in ("one", "two"))
    assert (judge(one, ["a"], [[]]), judge(two, ["a"], [[]])) == ([3], [4])
    assert one.fingerprint == two.fingerprint
    assert not {"helper", "rewards", "rewards.best"} & set(sys.modules)
    assert "elsewhere" in sys.modules  # an environment inside the folder is none of the folder's modules
    (tmp_path / "one" / "rewards" / "best.py").write_text("def score(p, c, r):\n    return [5] * len(c)\n")
    edited = open_reward(config, tmp_path / "one", None)
    assert judge(edited, ["a"], [[]]) == [5]
    assert edited.fingerprint != one.fingerprint


@pytest.mark.parametrize("file", ["my_reward.py", "helper.py", "mine/helper.py", "mine/__init__.py"])
def test_an_edit_within_a_second_counts(tmp_path, monkeypatch, file):
    """Python's bytecode is up to date where size and second are the same; a function is what its file says."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "mine").mkdir()
    texts = {"my_reward.py": "import helper, mine, mine.helper\nVALUE = 1\n"
             "def score(p, c, r):\n    return [VALUE, helper.VALUE, mine.VALUE, mine.helper.VALUE]\n",
             **dict.fromkeys(("helper.py", "mine/helper.py", "mine/__init__.py"), "VALUE = 1\n")}  # fmt: skip
    found = []
    for value in (1, 2):
        for name, text in texts.items():
            (tmp_path / name).write_text(text.replace("VALUE = 1", f"VALUE = {value}") if name == file else text)
            os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
        reward = open_reward(RewardConfig(kind="python", function="my_reward:score"), tmp_path, None)
        found.append(judge(reward, list("abcd"), [[]] * 4))
    assert [sum(numbers) for numbers in found] == [4, 5], found  # four ones; one of them became 2
    assert not list(tmp_path.rglob("*.pyc"))  # nothing is written beside the user's files


def test_a_module_of_a_package_elsewhere_is_not_the_folders(tmp_path, monkeypatch):
    (tmp_path / "lib" / "shared").mkdir(parents=True)
    (tmp_path / "lib/shared/__init__.py").touch()
    (tmp_path / "lib/shared/part.py").write_text("VALUE = 7\n")
    (tmp_path / "own" / "shared").mkdir(parents=True)
    (tmp_path / "own/shared/part.py").write_text("VALUE = 8\n")  # no package: lib's is one
    (tmp_path / "own/rewards.py").write_text(
        "from shared.part import VALUE\ndef score(p, c, r):\n    return [VALUE] * len(c)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "lib")
    reward = open_reward(RewardConfig(kind="python", function="rewards:score"), tmp_path / "own", None)
    assert judge(reward, ["a"], [[]]) == [7]


def test_a_function_that_leaves_does_not_end_the_build(tmp_path):
    (tmp_path / "leaving.py").write_text("import sys\n\n\ndef score(*_):\n    sys.exit(0)\n")
    (tmp_path / "gone.py").write_text("import sys\n\nsys.exit(0)\n")
    reward = open_reward(RewardConfig(kind="python", function="leaving:score"), tmp_path, None)
    with pytest.raises(InputError, match=r"leaving:score.*raised SystemExit"):
        reward([Prompt("row-1", [])], ["a"], [["a"]])
    with pytest.raises(InputError, match="cannot be imported: SystemExit"):
        open_reward(RewardConfig(kind="python", function="gone:score"), tmp_path, None)


@pytest.mark.parametrize(
    ("raised", "tries"),
    [
        ("ConnectionError('refused')", 4),  # the first and three more
        ("TimeoutError()", 4),
        ("httpx.ConnectError('refused')", 4),
        ("ValueError('wrong')", 2),  # the function's own fault: asked once more, about this completion alone
        ("SystemExit(1)", 2),
    ],
)
def test_what_may_pass_is_tried_again(tmp_path, monkeypatch, raised, tries):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    reward = write_function(tmp_path, f"import httpx; open({str(tmp_path / 'log')!r}, 'a').write('.'); raise {raised}")
    with pytest.raises(InputError, match=r"in each of 4 tries" if tries == 4 else "raised"):
        judge(reward, ["a"], [[]])
    assert (tmp_path / "log").read_text() == "." * tries


def test_the_completion_that_a_function_raises_at_is_named(tmp_path):
    reward = write_function(tmp_path, "return [1 / (c != 'bad') for c in completions]")
    with pytest.raises(InputError, match=r"called with the completion 'bad' of row u3, raised ZeroDivisionError"):
        judge(reward, ["a", "b", "c", "bad", "e"], [[]] * 5)


def test_a_server_that_comes_back_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    log = str(tmp_path / "log")
    reward = write_function(
        tmp_path, f"open({log!r}, 'a').write('.')\n    if len(open({log!r}).read()) < 3: raise OSError\n    return [7]"
    )
    assert judge(reward, ["a"], [[]]) == [7] and (tmp_path / "log").read_text() == "..."
