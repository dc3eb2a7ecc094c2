"""The folder of a run, under attack: what is not ours stays, what is damaged is told, what is secret is not written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest
import torch
from commands import called
from safetensors.torch import load_file
from test_run import ROOT, STARTER, TINY, same, settings, trained, weights

from curate.errors import InputError
from curate.manifest import read
from train.cli import main
from train.config import CftConfig
from train.data import Examples
from train.folder import alone, checkpoints, fault
from train.models import open_tokenizer
from train.run import run
from train.settings import load


def command(*words):
    return called(main, "cft", *words)


@pytest.fixture
def finished(place, plain, tmp_path):
    """A copy of a finished run with the checkpoints 4 and 6."""
    shutil.copytree(place / "plain", tmp_path / "run")
    return tmp_path / "run"


# --- whose folder it is ---


def test_starting_anew_removes_what_a_run_left_and_nothing_else(place, finished):
    (finished / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"other files than this command writes, as 'thesis\.tex'"):
        trained(place, finished, "resume=false")
    (finished / "thesis.tex").unlink()
    trained(place, finished, "resume=false", "max_steps=2")
    assert [c.name for c in checkpoints(finished)] == ["checkpoint-2"]


def test_inputs_inside_the_folder_are_not_removed(place, finished):
    shutil.copytree(place / "data", finished / "buffer")
    with pytest.raises(InputError, match="which is read, lies in it"):
        trained(place, finished, f"data={finished / 'buffer'}", "resume=false")
    with pytest.raises(InputError, match="which is read, lies in it"):
        trained(place, finished, "resume=false", model=finished / "model")
    assert (finished / "buffer/samples.parquet").is_file() and (finished / "model/model.safetensors").is_file()


@pytest.mark.parametrize("words", [["learning_rate=-1"], ["report_to=foo"], ["lr_scheduler_kwargs.foo=1"]])
def test_a_run_is_not_removed_before_the_arguments_are_known_to_be_good(place, finished, words):
    with pytest.raises(InputError):
        trained(place, finished, "resume=false", *words)
    assert [c.name for c in checkpoints(finished)] == ["checkpoint-4", "checkpoint-6"]
    assert (finished / "model/model.safetensors").is_file()


def test_two_runs_do_not_write_into_one_folder(place, tmp_path):
    with alone(tmp_path / "out"), pytest.raises(InputError, match="another run is writing into it"):
        trained(place, tmp_path / "out")
    trained(place, tmp_path / "out", "max_steps=1")  # a lock that was let go is none


def test_a_file_a_link_and_a_folder_without_room(place, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a file, not a folder"):
        trained(place, tmp_path / "file")
    with pytest.raises(InputError, match="choose another folder"):
        trained(place, tmp_path / "file/out")
    with pytest.raises(InputError, match="a file, not a folder"):  # where it points to is nowhere
        trained(place, tmp_path / "link")


# --- checkpoints ---


@pytest.mark.parametrize("damage", ["cut", "gone", "state", "mark"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_goes_on(place, plain, finished, damage):
    late = finished / "checkpoint-6"
    if damage == "cut":
        (late / "optimizer.pt").write_bytes((late / "optimizer.pt").read_bytes()[:-9])
    elif damage == "gone":
        (late / "rng_state.pth").unlink()
    elif damage == "state":  # of the same size
        text = (late / "trainer_state.json").read_text()
        (late / "trainer_state.json").write_text(text.replace('"global_step": 6', '"global_step": 9'))
    else:
        (late / "rehearse.json").write_text("{")
    shutil.rmtree(finished / "model")
    done = command(*settings(place, finished))
    assert done.returncode == 0, done.stderr
    assert "checkpoint-6" in done.stderr and "going on from checkpoint-4" in done.stderr
    assert same(plain, weights(finished / "model"))
    assert fault(late) is None, "it was written anew"


def test_a_run_whose_facts_are_broken_is_told(place, finished):
    for checkpoint in checkpoints(finished):
        shutil.rmtree(checkpoint)
    (finished / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        trained(place, finished)


def test_no_step_is_taken_that_would_spoil_the_weights(place, tmp_path):
    # The loss of step 2 is finite, its gradient is not: the last checkpoint must hold numbers.
    with pytest.raises(InputError, match=r"step \d: the .*(loss|gradient).* (nan|inf)"):
        trained(place, tmp_path / "out", "learning_rate=1e30", "save_steps=1", "logging_steps=1", "max_grad_norm=0",
                "lr_scheduler_type=constant")  # fmt: skip
    for checkpoint in checkpoints(tmp_path / "out"):
        assert all(torch.isfinite(w).all() for w in load_file(checkpoint / "model.safetensors").values())
    for line in (tmp_path / "out/log.jsonl").read_text().splitlines() if (tmp_path / "out/log.jsonl").exists() else ():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# --- code, secrets, values ---


def test_code_of_a_model_folder_is_not_run_whatever_is_answered(place, start, tmp_path):
    shutil.copytree(start, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    words = settings(place, tmp_path / "out", model=tmp_path / "m")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "train.cli", "cft", *words, f"tokenizer={STARTER}"], env=env,
                          input="y\n" * 9, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_token_is_written_nowhere(place, tmp_path):
    trained(place, tmp_path / "out", "max_steps=1", "hub_token=hf_SECRET")
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"hf_SECRET" not in file.read_bytes(), file


@pytest.mark.parametrize(("word", "match"), [
    ("learning_rate=.nan", "no number"), ("weight_decay=.inf", "no number"), ("max_steps=abc", "no number"),
    ("max_steps=1.5", "no whole number"), ("max_steps=true", "no number"), ("per_device_train_batch_size=0", "between"),
    ("seed=99999999999999999999", "between"), ("save_total_limit=-1", "between"), ("num_train_epochs=1e9", "between"),
    ("use_cpu=maybe", "neither true nor false"), ("metric_for_best_model=foo", "not measured"),
])  # fmt: skip
def test_values_that_training_arguments_do_not_look_at(place, tmp_path, word, match):
    more = ["load_best_model_at_end=true", f"eval_data={place / 'data'}", "eval_strategy=steps", "eval_steps=2"]
    with pytest.raises(InputError, match=match):
        trained(place, tmp_path / "out", word, *(more if "metric" in word else ()))
    assert not (tmp_path / "out/run.json").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(place, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({**TINY, "vocab_size": 6000}))
    words = [w for w in settings(place, tmp_path / "out") if not w.startswith("init")]
    with pytest.raises(InputError, match="6,144 tokens, the model embeddings for 6,000"):
        run("cft", *load(CftConfig, None, [*words, f"init={tmp_path / 'small.json'}"]), quiet=True)


def test_weights_of_nothing_are_refused(place, tmp_path):
    manifest = read(place / "data")
    tokenizer = open_tokenizer(load(CftConfig, None, settings(place, tmp_path))[0])
    for value, match in ((0.0, "all weights are 0"), (1e300, "float32 does not hold")):
        changed = replace(manifest, samples=manifest.samples.with_columns(weight=pl.lit(value)))
        with pytest.raises(InputError, match=match):
            Examples.of(changed, tokenizer)


def test_keys_that_stand_twice_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1\ndata: d\nlearning_rate: 2\n")
    with pytest.raises(InputError, match=r"run\.yaml.*'learning_rate' stands twice"):
        load(CftConfig, tmp_path / "run.yaml")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
@pytest.mark.parametrize("room", [10, 300, 1500])
def test_a_disk_that_is_full_from_the_start(place, tmp_path, room):
    import resource

    words = settings(place, tmp_path / "out", "max_steps=1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        full = command(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.returncode == 1 and "Traceback" not in full.stderr and "make room" in full.stderr
    assert command(*words).returncode == 0, "the same command begins again"
