import gc
import gzip
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# Workers of pytest-xdist share the cores: threads of one would wait for those of another. Set before torch is imported,
# and inherited by every process that a test starts, so that bits that depend on the number of threads agree.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell puts into the background does not hear Ctrl-C, and what a test starts would not hear it either.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Worked values, computed by an independent NumPy reference."""
    return json.loads((ROOT / "tests/golden/golden.json").read_text())


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(name, rows) -> path of a JSONL file, gzipped where the name says so."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
        return path

    return write


settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


# Files that take half a minute or more of one core, the longest first.
LONG = (
    "test_engine",
    "test_stream",
    "test_notebooks",
    "test_distributed",
    "test_build",
    "test_rollout_server",
    "test_policy",
    "test_preferences",
    "test_cppo",
    "test_run",
    "test_report_page",
    "test_folder",
    "test_local_model",
    "test_server",
    "test_logprobs",
    "test_evaluate",
)


def pytest_configure(config):
    """Files are begun in the order of `pytest_collection_modifyitems`, not by how many tests they have."""
    config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file go to one worker, for they share what its fixtures make.

    Whatever `--dist` says: groups by `xdist_group` are none with pytest 9.2 and pytest-xdist 3.8, which says nothing of
    it, and every worker would make every fixture.
    """
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """A long file begins early: at the end it would keep one worker busy, and the others would have nothing to do."""
    place = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """What is imported stays: nobody looks through all of it again, as each run of a trainer would in the end."""
    gc.collect()
    gc.freeze()
