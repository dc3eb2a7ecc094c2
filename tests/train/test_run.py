"""Whole runs through the real trainer: a tiny Llama, real rows, the real command line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import called
from safetensors.torch import load_file

from curate.errors import InputError
from train.cli import main
from train.config import CftConfig, CptConfig
from train.data import Examples
from train.folder import checkpoints
from train.lineage import seen
from train.methods import Cft
from train.mixing import Mixture
from train.models import end_tokens, open_tokenizer
from train.packing import Collator, Items, Packing
from train.run import run
from train.settings import load

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "examples/starter"
TINY = {"model_type": "llama", "vocab_size": 6144, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}  # fmt: skip


def settings(place, out, *words, model=None):
    start = [f"model={model}"] if model else [f"init={place / 'tiny.json'}", f"tokenizer={STARTER}"]
    fixed = ["max_steps=6", "per_device_train_batch_size=4", "learning_rate=0.01", "logging_steps=2", "save_steps=2",
             "lr_scheduler_type=linear", "max_length=512", "too_long=truncate"]  # fmt: skip
    return [*start, f"data={place / 'data'}", f"out={out}", *fixed, *words]


def trained(place, out, *words, model=None, config=CftConfig, name="cft"):
    ours, theirs = load(config, None, settings(place, out, *words, model=model))
    return weights(run(name, ours, theirs, quiet=True))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, tolerance):
    return max(float((a[k] - b[k]).abs().max()) for k in a) <= tolerance


# --- what a run leaves behind ---


def test_a_run_folder_says_what_was_done(place, plain):
    out = place / "plain"
    facts = json.loads((out / "run.json").read_text())
    assert facts["method"] == "cft"
    assert facts["training"]["learning_rate"] == 0.01
    assert list(facts["data"]) == [str(place / "data")]
    assert len(facts["data"][str(place / "data")]) == 64
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss", "nll", "loss_origin/current", "loss_origin/replay", "tokens_per_second"} <= lines[0].keys()
    assert not list(out.rglob("training_args.bin")), "no pickle of ours"
    assert not list(out.rglob("*.bin"))


def test_the_model_loads_elsewhere_and_has_learned(place, plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "plain/model", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(place / "plain/model")
    assert model.config.vocab_size == 6144 and tokenizer.eos_token_id == 1
    lines = [json.loads(line) for line in (place / "plain/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


def test_every_step_tells_its_rows(place, plain):
    samples = pl.read_parquet(place / "data/samples.parquet")
    steps = [seen(place / "plain", k) for k in range(1, 7)]
    assert [s.height for s in steps] == [4] * 6
    every = pl.concat(steps)
    assert every.join(samples, on=["uid", "task", "origin"], how="semi").height == 24
    assert every["uid"].n_unique() == 24, "an epoch is longer than this run: no row came twice"
    done = called(main, "lineage", place / "plain", 6, "--json")
    assert [json.loads(line)["uid"] for line in done.stdout.splitlines()] == steps[5]["uid"].to_list()
    with pytest.raises(InputError, match="steps 1 to 6"):
        seen(place / "plain", 7)
    with pytest.raises(InputError, match="name the folder of a run"):
        seen(place / "data", 1)


def test_the_table_of_steps_is_what_the_loss_saw(place, tmp_path, monkeypatch):
    met = []
    plain_loss = Cft.loss

    def loss(self, model, batch, normaliser):
        met.append(batch["row"].tolist())
        return plain_loss(self, model, batch, normaliser)

    monkeypatch.setattr(Cft, "loss", loss)
    trained(place, tmp_path / "out", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "max_steps=3",
            "packing=true", "mixture={current: 0.7, replay: 0.3}")  # fmt: skip
    from transformers import AutoTokenizer

    examples = Examples.read(place / "data", AutoTokenizer.from_pretrained(STARTER))
    for step in range(3):
        rows = met[2 * step] + met[2 * step + 1]
        assert seen(tmp_path / "out", step + 1)["uid"].to_list() == examples.uids(rows)


def test_evaluation_is_a_mean_over_tokens_by_task_and_the_best_checkpoint_is_kept(place, start, tmp_path):
    # The rate is far too high, so the loss before the first evaluation is never reached again.
    words = (f"eval_data={place / 'data'}", "eval_strategy=steps", "eval_steps=2", "load_best_model_at_end=true",
             "save_total_limit=1", "learning_rate=1.0", "max_grad_norm=0", "lr_scheduler_type=constant",
             "per_device_eval_batch_size=7")  # fmt: skip
    found = trained(place, tmp_path / "out", *words, model=start)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    measured = {line["step"]: line for line in lines if "eval_loss" in line}
    assert sorted(measured) == [2, 4, 6]
    best = min(measured, key=lambda k: measured[k]["eval_loss"])
    kept = sorted(int(c.name[11:]) for c in checkpoints(tmp_path / "out"))
    assert best in kept and same(found, weights(tmp_path / f"out/checkpoint-{best}"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    examples = Examples.read(place / "data", AutoTokenizer.from_pretrained(start), max_length=512, too_long="truncate")
    items, sums = Items(examples, Mixture(examples)), {}
    for k in range(len(items)):  # one row at a time: Σ −log π over all targets of a task / their number
        batch = Collator(0)([items[k]])
        mask = batch["loss_mask"][0, 1:]
        with torch.no_grad():
            logp = model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        nll = -logp.gather(1, batch["input_ids"][0, 1:, None])[mask].sum().item()
        for key in ("loss", "loss_task/" + examples.task_names[examples.task[batch["row"][0]]]):
            total, n = sums.get(key, (0.0, 0))
            sums[key] = total + nll, n + int(mask.sum())
    for key, (total, n) in sums.items():
        assert measured[best][f"eval_{key}"] == pytest.approx(total / n, rel=1e-4), key
    assert len(sums) == 3


def test_the_final_model_can_be_saved_in_half_precision(place, plain):
    shutil.copytree(place / "plain", place / "half")
    half = trained(place, place / "half", "save_dtype=bfloat16")  # goes on from the last step: only the end is anew
    assert {v.dtype for v in half.values()} == {torch.bfloat16}
    assert same(half, {k: v.to(torch.bfloat16) for k, v in plain.items()})
    assert json.loads((place / "half/model/config.json").read_text())["dtype"] == "bfloat16"


# --- identities ---


def test_terms_of_weight_0_are_plain_fine_tuning_bit_for_bit(place, plain):
    assert same(plain, trained(place, place / "zero", "kl.weight=0"))


def test_accumulation_changes_nothing_but_rounding(place):
    # 4 × 1 against 1 × 4: the normaliser is that of the whole step. By plain gradients: Adam divides them by their own
    # size, so that a rounding error of a vanishing one becomes a whole step.
    plain = ("optim=sgd", "learning_rate=1.0")
    whole = trained(place, place / "whole", *plain)
    split = trained(place, place / "split", *plain, "per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    assert close(whole, split, 1e-6)
    still = trained(place, place / "still", *plain, "max_steps=1", "warmup_steps=9")
    assert not close(whole, still, 1e-3), "the weights have moved by a thousand times that"


def test_packing_changes_nothing_but_rounding(place, start):
    # the same samples as padded rows, as packs in rows and as packs in one row: the same loss, the same gradients
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(start)
    examples = Examples.read(place / "data", AutoTokenizer.from_pretrained(start), max_length=512, too_long="truncate")
    mixture = Mixture(examples)
    packs = Items(examples, mixture, packing=Packing(512, 1))
    held = packs.rows(range(3))
    assert len(held) > 4 and (np.bincount([packs[k].rows.size for k in range(3)])[2:]).sum(), "some pack has several"
    singles = Items(examples, mixture)
    assert singles.rows(range(len(held))).tolist() == held.tolist(), "window 1 keeps the order"
    found = []
    for items, n, one_row in ((singles, len(held), False), (packs, 3, False), (packs, 3, True)):
        batch = Collator(0, one_row=one_row)([items[k] for k in range(n)])
        model.zero_grad()
        loss, _ = Cft().loss(model, batch, batch["loss_mask"].sum()[None])
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (padded, a), *others = found
    for packed, b in others:
        assert torch.isclose(padded, packed, atol=1e-5)
        assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) < 1e-5


def test_a_heavy_kl_term_keeps_the_reference(place, start):
    before = weights(start)
    free = trained(place, place / "free", model=start)
    held = trained(place, place / "held", "kl.weight=1000", "max_grad_norm=1000", "learning_rate=0.0001", model=start)
    loose = trained(place, place / "loose", "learning_rate=0.0001", model=start)
    moved = {name: sum(float((w[k] - before[k]).pow(2).sum()) for k in before) for name, w in
             (("free", free), ("held", held), ("loose", loose))}  # fmt: skip
    assert moved["held"] < moved["loose"] < moved["free"]


# --- resume ---


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_goes_on_ends_with_the_same_bits(place, plain, step):
    out = place / f"again{step}"
    shutil.copytree(place / "plain", out)
    shutil.rmtree(out / "model")
    for folder in out.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    if not list(out.glob("checkpoint-*")):  # only the last two are kept, so make the early one
        shutil.rmtree(out)
        ours, theirs = load(CftConfig, None, settings(place, out, "save_total_limit=9"))
        run("cft", ours, theirs, quiet=True)
        shutil.rmtree(out / "model")
        for folder in out.glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
    assert same(plain, trained(place, out))


def test_killed_at_any_moment_and_started_again(place, plain):
    out = place / "killed"
    command = ["cft", "--quiet", *settings(place, out, "save_steps=1")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([sys.executable, "-m", "train.cli", *command], env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*/rehearse.json")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    half = out / "checkpoint-9999"  # what a kill inside a save leaves: a folder without its mark
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    done = called(main, *command)
    assert done.returncode == 0, done.stderr
    assert same(plain, weights(out / "model"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
@pytest.mark.parametrize("room", [300_000, 1_200_000])  # neither the weights fit, or the optimizer's state does not
def test_a_full_disk_leaves_the_last_good_checkpoint(place, plain, tmp_path, room):
    out = tmp_path / "out"
    shutil.copytree(place / "plain", out)
    for late in ("checkpoint-6", "model"):
        shutil.rmtree(out / late)
    assert [c.name for c in checkpoints(out)] == ["checkpoint-4"]
    limited = (f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY)); "
               "from train.cli import main; main()")  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = settings(place, out)
    full = subprocess.run([sys.executable, "-c", limited, "cft", *words], env=env, capture_output=True, text=True)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "checkpoint-6: could not be written" in full.stderr and "make room" in full.stderr
    assert [c.name for c in out.glob("checkpoint-*")] == ["checkpoint-4"]
    again = called(main, "cft", *words)
    assert again.returncode == 0, again.stderr
    assert same(plain, weights(out / "model"))


def test_a_checkpoint_of_another_run_is_refused_and_the_run_left_as_it_was(place, plain):
    out = place / "other"
    shutil.copytree(place / "plain", out)
    before = {name: (out / name).read_bytes() for name in ("run.json", "lineage.parquet", "log.jsonl")}
    for _ in range(2):
        with pytest.raises(InputError, match=r"another run: learning_rate is 0\.01, here 0\.02"):
            trained(place, out, "learning_rate=0.02")
        assert {name: (out / name).read_bytes() for name in before} == before
        for checkpoint in checkpoints(out):  # then what is finished tells by itself
            shutil.rmtree(checkpoint)


def test_the_log_goes_on_where_the_run_does(place, plain):
    out = place / "log"
    shutil.copytree(place / "plain", out)
    shutil.rmtree(out / "checkpoint-6")
    trained(place, out)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 6], "the last one is the summary of the run"


def test_epochs_are_the_datas_and_not_the_librarys(place, tmp_path):
    # 107 rows in batches of 32: 3.3 steps an epoch, 7 in two
    words = ("max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=32", "save_strategy=epoch",
             "logging_strategy=epoch", "save_total_limit=9")  # fmt: skip
    trained(place, tmp_path / "out", *words)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 7][: len(lines) - 1]
    assert [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-7"]
    assert lines[-1]["epoch"] == pytest.approx(2)


def test_kl_of_random_weights_is_to_the_same_random_weights(place, tmp_path):
    trained(place, tmp_path / "out", "kl.weight=0.1", "max_steps=1", "logging_steps=1")
    first = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-6


# --- methods ---


def test_the_answer_ends_where_the_model_says(place, start, tmp_path):
    # A chat template that ends a turn with a token of its own, which generation_config.json names, as Gemma's does.
    shutil.copytree(start, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(
        "{% for m in messages %}<|user|>{{ m['content'] }}<|system|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    ours, _ = load(CftConfig, None, [f"model={tmp_path / 'm'}", f"data={place / 'data'}", "out=x"])
    tokenizer = open_tokenizer(ours)
    assert end_tokens(ours, tokenizer) == {1, 4}
    examples = Examples.read(place / "data", tokenizer, ends=end_tokens(ours, tokenizer))
    assert {int(examples.row_tokens(k)[-1]) for k in range(len(examples))} == {4}, "the turn's end, nothing behind it"


def test_a_batch_without_a_target_is_no_loss_and_no_gradient(start):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "loss_mask": torch.zeros(1, 3, dtype=torch.bool),
        "row": torch.zeros(1),
        "weight": torch.ones(1),
        "segment": torch.zeros(1, 3, dtype=torch.long),
    }
    loss, _ = Cft().loss(model, batch, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_sample_longer_than_the_context_is_named(place, tmp_path):
    short = {**TINY, "max_position_embeddings": 64}
    (tmp_path / "short.json").write_text(json.dumps(short))
    words = [
        f"init={tmp_path / 'short.json'}",
        f"tokenizer={STARTER}",
        f"data={place / 'data'}",
        f"out={tmp_path / 'o'}",
    ]
    with pytest.raises(InputError, match=r"86 of 107 rows are longer than max_length=64 .*the model's context"):
        run("cft", *load(CftConfig, None, words), quiet=True)
    blocks = [*words, "max_steps=1", "pack_length=65"]
    with pytest.raises(InputError, match="positions for 64 tokens"):
        run("cpt", *load(CptConfig, None, blocks), quiet=True)
    assert not (tmp_path / "o").exists()


def test_cpt_trains_on_all_tokens(place):
    ours, theirs = load(CptConfig, None, [w for w in settings(place, place / "cpt", "pack_length=128", "packing=true")
                                          if not w.startswith(("max_length", "too_long"))])  # fmt: skip
    folder = run("cpt", ours, theirs, quiet=True)
    assert (folder / "model.safetensors").is_file()
    first = seen(place / "cpt", 1)
    assert first.height > 4, "blocks of 128 tokens hold several rows or pieces"


def test_cpt_from_random_weights_begins_at_a_uniform_guess_and_mixes_domains(place):
    # nats a token of a uniform guess over 6,144: ln 6144 = 8.72; small random weights are near it
    words = ["pack_length=128", "packing=true", "mixture={current: 0.9, replay: 0.1}", "max_steps=2", "logging_steps=1"]
    kept = [w for w in settings(place, place / "cpt2", *words) if not w.startswith(("max_length", "too_long"))]
    ours, theirs = load(CptConfig, None, kept)
    run("cpt", ours, theirs, quiet=True)
    first = json.loads((place / "cpt2/log.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - math.log(6144)) < 0.1
    rows = pl.read_parquet(place / "cpt2/lineage.parquet")
    assert 0 < rows.filter(origin="replay").height / rows.height < 0.25


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        (["output_dir=x"], "sets it itself"),
        (["data=nowhere"], "no such folder"),
        (["model=nowhere"], "give `model`"),
        (["mixture={current: 0.5, replay: 0.3, augmented: 0.2}"], "augmented"),
        (["eval_strategy=steps"], "eval_data"),
        (["lora.rank=3"], "peft.LoraConfig"),
        (["o_lora.previous=[x]"], "needs `lora`"),
        (["too_long=error", "max_length=40"], "tokens"),
        (["pack_length=100"], "packing"),
        (["ewc={weight: 1, fisher: [x]}", "lora.r=2"], "EWC holds the weights"),
        (["label_smoothing_factor=0.1"], "the loss is the method's"),
        (["auto_find_batch_size=true"], "planned before the first"),
        (["accelerator_config={split_batches: true}"], "split_batches"),
    ],
)
def test_bad_settings_are_found_before_the_first_step(place, tmp_path, words, match):
    with pytest.raises(ValueError, match=match):
        trained(place, tmp_path / "out", *words)
    assert not (tmp_path / "out/log.jsonl").exists()


def test_yaml_words_mean_what_training_arguments_mean(place, tmp_path):
    (tmp_path / "run.yaml").write_text("save_strategy: no\nlearning_rate: 1e-5\nweight_decay: 0.1\nreport_to: none\n")
    _, theirs = load(CftConfig, tmp_path / "run.yaml", ["model=m", "data=d", "out=o"])
    _, named = load(CftConfig, None, ["model=m", "data=d", "out=o", "run_name=infinity"])
    assert named == {"run_name": "infinity"}
    assert theirs == {"save_strategy": "no", "learning_rate": 1e-5, "weight_decay": 0.1, "report_to": "none"}


def test_a_loss_that_is_no_number_stops_with_its_rows(place, tmp_path):
    with pytest.raises(
        InputError, match=r"step \d+: the (loss|norm of the gradient) is (nan|inf); the (batch|step) held [0-9a-f]{32}"
    ):
        trained(place, tmp_path / "out", "learning_rate=1e30", "max_grad_norm=0", "lr_scheduler_type=constant")


def test_a_folder_with_other_files_is_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="other files"):
        trained(place, tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").read_text() == "x"


# --- EWC ---


def test_ewc_without_information_is_plain_and_with_much_holds_the_weights(place, start, tmp_path):
    from safetensors.torch import save_file

    before = weights(start)
    for name, value in (("nothing", 0.0), ("much", 1.0)):
        (tmp_path / name).mkdir()
        save_file({k: torch.full_like(v, value) for k, v in before.items()}, tmp_path / name / "fisher.safetensors")
        save_file(before, tmp_path / name / "anchor.safetensors")
    slow = ("learning_rate=0.0001", "max_grad_norm=0")
    save_file({"other.weight": torch.ones(2)}, tmp_path / "fisher.safetensors")
    save_file({"other.weight": torch.ones(2)}, tmp_path / "anchor.safetensors")
    with pytest.raises(InputError, match="of another model"):
        trained(place, tmp_path / "other", f"ewc={{weight: 1, fisher: [{tmp_path}]}}", model=start)
    free = trained(place, tmp_path / "free", *slow, model=start)
    none = trained(place, tmp_path / "none", *slow, f"ewc={{weight: 1, fisher: [{tmp_path}/nothing]}}", model=start)
    held = trained(place, tmp_path / "held", *slow, f"ewc={{weight: 1e4, fisher: [{tmp_path}/much]}}", model=start)
    assert same(free, none)
    moved = [max(float((w[k] - before[k]).abs().max()) for k in before) for w in (held, free)]
    assert moved[0] < moved[1]
