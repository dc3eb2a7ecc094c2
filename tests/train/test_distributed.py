"""Whole runs on two processes, DDP and FSDP2, against one process; compiled layers, and activations computed again."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from curate.build import build
from curate.errors import InputError
from train import parallel
from train.folder import checkpoints
from train.run import CONFIGS, run
from train.settings import load

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "examples/starter"
TINY = {"model_type": "llama", "vocab_size": 6144, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}  # fmt: skip
EVALUATED = ("eval_strategy=steps", "eval_steps=10", "load_best_model_at_end=true", "per_device_eval_batch_size=8")
ADAPTER = ("lora.r=2", "lora.target_modules=all-linear")
SHORT = {  # name -> command and settings; three steps, a process and two sharded ones
    "ewc": ("cft", "gradient_accumulation_steps=2", "kl.weight=0.5", "ewc={weight: 5, fisher: [FOLDER/fisher]}"),
    "lora": ("cft", *ADAPTER, "kl.weight=1"),
    "o_lora": ("cft", *ADAPTER, "o_lora={weight: 0.5, previous: [FOLDER/old/model]}"),
    "cpt": ("cpt", "pack_length=128", "packing=true", "gradient_checkpointing=true"),
    "half": ("cft", "save_dtype=bfloat16"),
    "bf16": ("cft", "bf16=true", "kl.weight=1"),
    "copr": ("copr", "model=FOLDER/first/model", "data=FOLDER/ranked", "buffers=FOLDER/first/buffer", "optim=sgd",
             "rate=1",
             "reference=measure", "gradient_accumulation_steps=2", "eval_data=FOLDER/ranked", "eval_strategy=steps",
             "eval_steps=3", "per_device_eval_batch_size=4"),
    "cppo": ("cppo", "optim=sgd", "too_long=drop", "reward=similarity", "max_grad_norm=100",
             "rollouts={prompts: 5, k: 2, max_new_tokens: 6, passes: 2}", "gradient_accumulation_steps=1",
             "per_device_train_batch_size=EACH", "learning_rate=0.1", "max_steps=4", "advantages=group"),
}  # fmt: skip
PAIR = """
import json, os, sys
from pathlib import Path
from torch.distributed import destroy_process_group
from curate.errors import InputError
from train.settings import load
from train.run import CONFIGS, run

for name, sharded, command, *words in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded)
    try:
        run(command, *load(CONFIGS[command], None, words), quiet=True)
    except InputError as error:
        Path(sys.argv[2], f"{name}.{os.environ['RANK']}").write_text(str(error))
destroy_process_group()
"""
SRUN = """#!/bin/bash
[[ $1 == --* ]] && shift
for machine in 0 1; do SLURM_NODEID=$machine "$@" & done
wait -n && wait -n
"""
"""Slurm's command where there is no Slurm: both machines are this one."""
BROKEN = """
import os
from train.cli import main
from train.methods import Cft

plain = Cft.loss

def loss(self, *args):
    found, logged = plain(self, *args)
    return (found * float("nan") if os.environ["RANK"] == "1" else found), logged

Cft.loss = loss
main()
"""


@pytest.fixture(autouse=True)
def environment():
    """TrainingArguments leaves its settings there, for the next run; nothing else may be left."""
    with patch.dict(os.environ):
        yield
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a manifest of real rows, a tiny model, its adapter and a Fisher folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("runs")
    tasks = [{"name": n, "path": str(ROOT / f"examples/superni/{n}.jsonl.gz"), "format": "superni", "split": "train"}
             for n in ("sentiment_analysis", "misc")]  # fmt: skip
    build({"tasks": tasks, "replay": {"selector": "uniform", "budget": 30}, "out": str(folder / "data")})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "start")
    before = load_file(folder / "start/model.safetensors")
    (folder / "fisher").mkdir()
    save_file({k: torch.rand_like(v) for k, v in before.items()}, folder / "fisher/fisher.safetensors")
    save_file(before, folder / "fisher/anchor.safetensors")
    trained(folder, "old", "cft", *ADAPTER, "max_steps=2")
    with gzip.open(ROOT / "examples/ranked/qa_feedback.jsonl.gz", "rt") as file:
        (folder / "ranked.jsonl").write_text("".join([line for line in file if '"train"' in line][:13]))
    task = {"name": "qa", "path": str(folder / "ranked.jsonl"), "format": "ranked", "columns": {"prompt": "question"}}
    build({"tasks": [task], "replay": {"selector": "none"}, "out": str(folder / "ranked")})
    trained(folder, "first", "copr", f"data={folder / 'ranked'}", "reference=measure", "keep=0.4", "max_steps=2")
    return folder


def settings(place, out, command, *words, each=4):
    fixed = [f"model={place / 'start'}", f"data={place / 'data'}", f"out={place / out}", "max_steps=3",
             f"per_device_train_batch_size={each}", "learning_rate=0.01", "logging_steps=1", "save_steps=10",
             "lr_scheduler_type=linear", "use_cpu=true"]  # fmt: skip
    fixed += ["max_length=512", "too_long=truncate"] if command == "cft" else []
    return [*fixed, *(word.replace("FOLDER", str(place)).replace("=EACH", f"={each * 5 // 2}") for word in words)]


def trained(place, out, command, *words):
    return weights(run(command, *load(CONFIGS[command], None, settings(place, out, command, *words)), quiet=True))


def weights(folder):
    return load_file(next(f for f in Path(folder).iterdir() if f.name.endswith("model.safetensors")))


def log(folder, key):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def apart(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def launched(config, *command):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
              str(ROOT / f"examples/accelerate/{config}.yaml")]  # fmt: skip
    return executed(*launch, *command)


def executed(*command, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
           "CUDA_VISIBLE_DEVICES": "", **more}  # fmt: skip
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def one(place):
    """Twenty steps on one process, evaluated twice."""
    return trained(place, "one", "cft", "max_steps=20", f"eval_data={place / 'data'}", *EVALUATED)


@pytest.fixture(scope="module")
def fsdp(place):
    """The same on two processes that share the model, by the command that the README names."""
    words = settings(place, "fsdp", "cft", "max_steps=20", f"eval_data={place / 'data'}", *EVALUATED, each=2)
    done = launched("fsdp2", "-m", "train.cli", "cft", "--quiet", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return weights(place / "fsdp/model")


@pytest.fixture(scope="module")
def pairs(place, fsdp):
    """Many runs in one pair of processes, for starting them takes longer than the runs do; their refusals."""
    shutil.copytree(place / "fsdp", place / "resumed")
    shutil.rmtree(place / "resumed/model")
    shutil.rmtree(place / "resumed/checkpoint-20")
    (place / "resumed/log.jsonl").unlink()
    twenty = ("cft", "max_steps=20", f"eval_data={place / 'data'}", *EVALUATED)
    runs = [
        ("ddp", False, *twenty),
        ("copr_ddp", False, *SHORT["copr"]),
        ("cppo_ddp", False, *SHORT["cppo"]),
        ("gae_ddp", False, *SHORT["cppo"], "advantages=gae"),
        ("gae2", True, *SHORT["cppo"], "advantages=gae"),
        ("no_reward", False, *SHORT["cppo"], "reward={kind: python, function: 'second:fails', retries: 0}"),
        ("resumed", True, *twenty),
        ("merged", True, "cft", *ADAPTER, "merge=true"),
    ]
    runs += [(f"{name}2", True, *words) for name, words in SHORT.items()]
    (place / "runs.json").write_text(json.dumps(
        [(out, sharded, name, *settings(place, out, name, *words, each=2)) for out, sharded, name, *words in runs]
    ))  # fmt: skip
    (place / "pair.py").write_text(PAIR)
    (place / "refused").mkdir()
    (place / "second.py").write_text(
        "import os\ndef fails(prompts, completions, references):\n"
        "    if os.environ['RANK'] == '1': raise ConnectionError('no judge')\n    return [0.0] * len(prompts)\n"
    )
    done = launched("fsdp2", place / "pair.py", place / "runs.json", place / "refused")
    assert done.returncode == 0, done.stderr[-3000:]
    return {f.name: f.read_text() for f in (place / "refused").iterdir()}


# --- two processes are one ---


@pytest.mark.parametrize("out", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(place, one, pairs, out):
    # 2 processes × 2 items are the 4 items of one process, and the loss is normalised over all of them. Adam divides
    # by the size of a gradient, so that rounding shows in steps: 0.01 · 20 · 1e-4 = 2e-5.
    assert apart(one, weights(place / out / "model")) < 1e-4
    for key in ("loss", "nll", "loss_origin/replay", "loss_task/misc", "eval_loss", "eval_loss_origin/replay"):
        assert log(place / out, key) == pytest.approx(log(place / "one", key), rel=1e-4), key
    assert len(log(place / out, "loss")) == 20 and len(log(place / out, "eval_loss")) == 2


def test_a_sharded_run_that_goes_on_ends_with_the_same_bits(place, fsdp, pairs):
    assert apart(fsdp, weights(place / "resumed/model")) == 0
    assert log(place / "resumed", "loss") == log(place / "fsdp", "loss")[10:]


def test_the_model_is_whole_and_checkpoints_are_in_shards(place, fsdp):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(place / "fsdp/model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, fsdp["model.embed_tokens.weight"])
    last = checkpoints(place / "fsdp")[-1]
    assert {p.name[:4] for p in (last / "pytorch_model_fsdp_0").glob("*.distcp")} == {"__0_", "__1_"}


@pytest.mark.parametrize("name", SHORT)
def test_the_terms_of_a_sharded_run_are_those_of_a_whole_one(place, pairs, name):
    found = trained(place, name, *SHORT[name])
    shared = weights(place / f"{name}2/model")
    step = 2**-7 if name == "half" else 0  # bfloat16 keeps 8 bits: where rounding falls otherwise, the last one differs
    assert found.keys() == shared.keys()
    for key, value in found.items() if name != "bf16" else ():  # whose products round otherwise, and Adam takes signs
        torch.testing.assert_close(shared[key], value, rtol=step, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    for key in ("loss", "kl", "ewc", "orthogonality", "constraint/qa"):
        assert log(place / f"{name}2", key) == pytest.approx(log(place / name, key), rel=1e-3, abs=1e-4), key
    assert json.loads((place / f"{name}2/run.json").read_text())["training"]["sharded"]


def test_two_processes_agree_on_the_dual(place, pairs):
    # DDP with each process its own copy of lambda, FSDP2, and one process: the same constraint, so the same lambda
    trained(place, "copr", *SHORT["copr"])
    alone = load_file(checkpoints(place / "copr")[-1] / "method.safetensors")
    assert abs(alone["log_lambda"].item()) > 1e-3, "it has moved"
    for out in ("copr2", "copr_ddp"):
        found = load_file(checkpoints(place / out)[-1] / "method.safetensors")
        assert found["log_lambda"].item() == pytest.approx(alone["log_lambda"].item(), rel=1e-3)
        for key in ("fit", "constraint/qa", "lambda/qa", "accuracy", "eval_loss", "eval_accuracy"):
            # (thirteen prompts are evaluated in batches of four: what the library repeats to fill the last counts once)
            assert log(place / out, key) == pytest.approx(log(place / "copr", key), rel=1e-3, abs=1e-5), (out, key)


def test_two_processes_draw_judge_and_measure_the_same_samples(place, pairs):
    # DDP: each its share of the five prompts; FSDP2: both all. Phase 2 is drawn by what two steps of both have made.
    trained(place, "gae", *SHORT["cppo"], "advantages=gae")
    trained(place, "cppo", *SHORT["cppo"])
    for out, alone in (("cppo2", "cppo"), ("cppo_ddp", "cppo"), ("gae_ddp", "gae")):
        for phase in (0, 1):
            a, b = (load_file(place / f"{o}/rollouts/phase-{phase:05d}/samples.safetensors") for o in (alone, out))
            for key in ("tokens", "row", "bucket", "ended"):
                assert torch.equal(a[key], b[key]), (out, phase, key)
            for key in ("logps", "reference", "anchor", "values", "score"):
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
        assert apart(weights(place / alone / "model"), weights(place / out / "model")) < 2e-5
        for key in ("loss", "reward", "kl_reference", "clip_fraction", "entropy", "value", "explained_variance"):
            assert log(place / out, key) == pytest.approx(log(place / alone, key), rel=1e-3, abs=1e-4), (out, key)
    heads = [load_file(place / o / "value.safetensors") for o in ("gae", "gae_ddp")]
    assert apart(*heads) < 1e-5 and float(heads[0]["bias"].abs()) > 1e-4, "it has learned"


# --- other launchers ---


def test_two_machines_of_slurm_give_what_one_process_gives(place, plain, tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    (tmp_path / "accelerate").write_text(
        f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.launch "${{@:2}}"\n'
    )
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    told = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": str(os.getpid()),
            "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    done = executed("bash", "examples/accelerate/slurm.sh", "cft", "--quiet",
                    *settings(place, "slurm", "cft", each=2), **told)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((place / "slurm/run.json").read_text())["training"]
    assert facts["processes"] == 2 and facts["sharded"]
    assert apart(plain, weights(place / "slurm/model")) < 2e-5


def test_the_settings_of_deepspeed_are_those_of_the_libraries(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(ROOT)  # the path inside is relative to it
    found = load_config_from_file("examples/accelerate/deepspeed_zero3.yaml")
    assert found.distributed_type == "DEEPSPEED" and not found.deepspeed_config["zero3_init_flag"]
    file = json.loads(Path(found.deepspeed_config["deepspeed_config_file"]).read_text())
    assert file["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("name", ["plain", "lora", "cppo"])
def test_two_processes_of_deepspeed_give_what_one_gives(place, name):
    command, *words = SHORT.get(name, ("cft", "kl.weight=0.5", "packing=true"))
    found = trained(place, f"{name}_alone", command, *words)
    done = launched("deepspeed_zero3", "-m", "train.cli", command, "--quiet",
                    *settings(place, f"{name}_zero3", command, *words, each=2))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert apart(found, weights(place / f"{name}_zero3/model")) < 5e-5
    assert log(place / f"{name}_zero3", "loss") == pytest.approx(log(place / f"{name}_alone", "loss"), rel=1e-3)


# --- what stops ---


def test_a_loss_that_is_no_number_in_one_process_stops_both(place):
    (place / "broken.py").write_text(BROKEN)
    done = launched("ddp", place / "broken.py", "cft", "--quiet", *settings(place, "broken", "cft", each=2))
    assert done.returncode == 1
    assert "step 1: the loss is nan; the batch held" in done.stderr
    assert not (place / "broken/model").exists()


def test_a_sharded_run_refuses_what_no_process_can_do(pairs, place):
    assert {name.split(".")[0] for name in pairs} == {"gae2", "merged", "no_reward"} and len(pairs) == 6
    for rank in (0, 1):  # a judge that fails in one process is no reason for the other to wait
        assert "raised ConnectionError: no judge" in pairs[f"no_reward.{rank}"]
    assert not checkpoints(place / "no_reward") and not (place / "no_reward/rollouts/phase-00000").exists()
    assert "no process has the whole model" in pairs["merged.0"]
    assert "not the value function" in pairs["gae2.1"]
    assert not (place / "merged").exists() and not (place / "gae2").exists()


@pytest.mark.parametrize(
    ("told", "words", "match"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, (), "FSDP 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, (), "several processes"),
        ({}, ("fsdp=true",), "several processes"),
        ({}, ("deepspeed={zero_optimization: {stage: 3}}",), "deepspeed is asked for, but not installed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "deepspeed is asked for, but not installed"),
    ],
)
def test_what_cannot_work_is_found_before_data_is_read(place, monkeypatch, told, words, match):
    monkeypatch.setattr(parallel, "find_spec", lambda _: None)
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=match):
        trained(place, "nothing", "cft", "data=nowhere", *words)


def test_weights_that_one_process_alone_would_load_are_refused(monkeypatch):
    for key in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(key, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="fsdp_cpu_ram_efficient_loading: false"):
        parallel.check(SimpleNamespace(fsdp=None, world_size=2))


# --- memory and speed ---


@pytest.fixture(scope="module")
def plain(place):
    """Three steps."""
    return trained(place, "plain", "cft")


def test_activations_may_be_computed_again(place, plain):
    assert apart(plain, trained(place, "again", "cft", "gradient_checkpointing=true")) < 1e-6


def compiler():
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_same_and_are_compiled_once(place, plain, monkeypatch):
    counters.clear()
    found = trained(place, "compiled", "cft", "torch_compile=true")
    assert apart(plain, found) < 2e-4  # Adam divides by the size of a gradient: rounding shows in steps of 0.01
    assert log(place / "compiled", "loss")[:2] == pytest.approx(log(place / "plain", "loss")[:2], abs=1e-5)
    # one graph for the first batch's length, one for any: not one a layer, and not one a step
    assert counters["stats"]["unique_graphs"] == 2
