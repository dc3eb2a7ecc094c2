"""The walls between the rooms, held by the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted([*ROOT.glob("curate/**/*.py"), *ROOT.glob("train/**/*.py")])


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with `from a import b` as both a and a.b."""
    names: set[str] = set()
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(
                filter(None, [*(package.split(".")[: -node.level + 1 or None] if node.level else []), node.module])
            )
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_walls(path):
    where, names = path.relative_to(ROOT).as_posix(), imported(path)
    if where.startswith("curate/"):
        assert not [n for n in names if within(n, "train")], "curate never imports train"
    if where.startswith("curate/manifest/"):
        ours = [n for n in names if within(n, "curate") and not within(n, "curate.manifest")]
        assert not ours, f"the contract imports nothing of ours outside itself: {ours}"
    if where.startswith("curate/") and not where.startswith("curate/models/"):
        heavy = [n for n in names if within(n, "torch", "transformers", "sentence_transformers", "httpx", "requests")]
        assert not heavy, f"only curate/models touches torch or HTTP: {heavy}"
    if where in ("curate/errors.py", "curate/settings.py"):
        assert not [n for n in names if within(n, "curate") and not within(n, "curate.errors")], "common ground"
    if where.startswith("train/"):
        shared = ("curate.manifest", "curate.models", "curate.errors", "curate.settings")
        stream = ("curate.build", "curate.config", "curate.readers", "curate.files", "curate.report", "curate.screen")
        allowed = shared + (stream if where.startswith("train/stream/") else ())  # it runs builds, and has a page
        wrong = [n for n in names if within(n, "curate") and n != "curate" and not within(n, *allowed)]
        assert not wrong, f"train imports contract, models and common ground only: {wrong}"
    if where.startswith("train/losses/"):
        wrong = [n for n in names if within(n, "train") and not within(n, "train.losses", "train.logprobs")]
        assert not wrong, f"losses import torch and train.logprobs only: {wrong}"


def test_the_walker_sees_nested_and_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "curate" / "models" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "def f():\n    import train.losses\n    from ..sample import allocate\n    from . import embedder\n"
    )
    assert {"train.losses", "curate.sample", "curate.sample.allocate", "curate.models.embedder"} <= imported(file)


def test_there_is_something_to_walk():
    assert len(FILES) > 20


@pytest.mark.parametrize("module", ["curate.manifest", "curate.cli"])
def test_light_imports(module):
    code = (
        f"import sys, {module}; "
        "heavy = sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'sklearn', 'spacy', 'ot', 'transformers', "
        "'sentence_transformers', 'scipy', 'datasets'}); sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
