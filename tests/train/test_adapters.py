"""Adapters through whole runs: LoRA, O-LoRA, resume, what is exported, and an adapter's folder as a model."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_run import STARTER, same, settings, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from curate.config import ModelConfig
from curate.errors import InputError
from curate.models import LocalModel, Prompt
from curate.models.embedder import open_embedder
from curate.models.weights import load_causal, merged, model_folder, stack, weights_hash
from train.config import CftConfig
from train.evaluate import EvalConfig, evaluate
from train.fisher import FisherConfig, fisher
from train.folder import checkpoints
from train.logprobs import AdapterOff, token_kl, token_values
from train.models import open_model, read_fisher, with_adapter
from train.run import run
from train.settings import load

IDS = torch.tensor([[5, 6, 7, 300, 42, 9]])
OLD = ("lora={r: 2, lora_alpha: 6, use_rslora: true, target_modules: [q_proj, v_proj]}", "merge=true")
NEW = ("lora={r: 3, lora_alpha: 12, lora_dropout: 0.1, target_modules: [q_proj, up_proj, embed_tokens]}", "merge=true")


def cft(place, out, *words, model):
    return run("cft", *load(CftConfig, None, settings(place, out, *words, model=model)), quiet=True)


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def on(start, *folders):
    """The base with adapters, none of them merged, all of them on."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), folders[0])
    for folder in folders[1:]:
        model.load_adapter(folder, Path(folder).name)
    model.base_model.set_adapter(["default", *(Path(folder).name for folder in folders[1:])])
    return model


@pytest.fixture(scope="module")
def first(place, start):
    """A first task's adapter."""
    return cft(place, place / "first", *OLD, model=start)


@pytest.fixture(scope="module")
def second(place, start, first):
    """A second task's run, held off the first one's adapter; its checkpoints are all there."""
    words = (*NEW, f"o_lora.previous=[{first}]", "kl.weight=0.1", "save_total_limit=9")
    return cft(place, place / "second", *words, model=start)


# --- LoRA and O-LoRA ---


def test_lora_trains_the_adapter_only(place, start, tmp_path):
    words = ("lora.r=2", "lora.target_modules=all-linear", "kl.weight=0.1", "merge=true")
    folder = cft(place, tmp_path / "lora", *words, model=start)
    assert (folder / "adapter_model.safetensors").is_file()
    whole = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert torch.allclose(logits(on(start, folder)), whole, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(start)), whole, atol=1e-3)


def test_o_lora_leaves_the_old_adapter_alone_and_turns_away_from_it(place, start, first, second):
    lines = [json.loads(line) for line in (place / "second/log.jsonl").read_text().splitlines()]
    values = [line["orthogonality"] for line in lines if "orthogonality" in line]
    assert len(values) == 3 and values[-1] < values[0]
    for step in (2, 6):
        assert same(adapter(place / f"second/checkpoint-{step}/old0"), adapter(first))
    early, late = (adapter(place / f"second/checkpoint-{step}") for step in (2, 6))
    trained = {name for name in late if not torch.equal(early[name], late[name])}
    assert trained == {name for name in late if "lora_" in name}, "the embedding's matrices too"


def test_o_lora_exports_one_adapter_that_is_the_whole_model(place, start, first, second):
    assert not list(second.glob("old*"))
    apart = logits(on(start, place / "second/checkpoint-6", place / "second/checkpoint-6/old0"))
    found = logits(on(start, second))
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-5)
    assert (found - logits(on(start, place / "second/checkpoint-6"))).abs().max() > 1e-3, "the old one counts"
    merged_ = logits(AutoModelForCausalLM.from_pretrained(second / "merged"))
    torch.testing.assert_close(found, merged_, atol=1e-5, rtol=1e-5)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    new = adapter(place / "second/checkpoint-6")[name]
    assert torch.equal(adapter(second)[name], torch.cat([new, adapter(first)[name]])), "the old directions as they were"


def test_a_third_task_is_held_off_all_directions_before_it(place, start, first, second, tmp_path):
    def third(previous):
        words = settings(place, tmp_path / "third", *NEW, f"o_lora.previous={previous}", model=start)
        config, _ = load(CftConfig, None, words)
        return with_adapter(open_model(config), config, config.o_lora)

    model, olds = third(f"[{second}]")
    ranks = {name.split(".")[-4]: [len(a) for a in some] for name, some in olds.items() if "lora_A" in name}
    assert ranks == {"q_proj": [5], "up_proj": [5]}
    assert [len(a) for name, some in olds.items() if "embed_tokens" in name for a in some] == [5]
    torch.testing.assert_close(logits(model), logits(on(start, second)), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="hold the same adapter"):
        third(f"[{first},{second}]")
    with pytest.raises(InputError, match="several adapters"):
        third(f"[{place / 'second/checkpoint-6'}]")


@pytest.mark.parametrize("step", [2, 4])
def test_o_lora_goes_on_with_the_same_bits(place, start, first, second, step):
    out = place / f"again{step}"
    shutil.copytree(place / "second", out)
    shutil.rmtree(out / "model")
    for folder in checkpoints(out):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    words = (*NEW, f"o_lora.previous=[{first}]", "kl.weight=0.1", "save_total_limit=9")
    again = cft(place, out, *words, model=start)
    assert same(adapter(again), adapter(second))
    assert same(weights(again / "merged"), weights(second / "merged"))
    assert same(adapter(out / "checkpoint-6"), adapter(place / "second/checkpoint-6"))


# --- an adapter's folder is a model ---


def test_evaluation_of_an_adapter_is_that_of_the_merged_model(place, start, second, tmp_path):
    evaluate(EvalConfig.model_validate({"models": [str(second), str(second / "merged"), str(start)],
        "data": str(place / "data"), "out": str(tmp_path / "out"), "per_task": 4, "max_new_tokens": 8}))  # fmt: skip
    table = pl.read_parquet(tmp_path / "out/items.parquet").sort("uid")
    said = [table.filter(checkpoint=i)["prediction"].to_list() for i in range(3)]
    assert said[0] == said[1] != said[2]
    pair = [(Prompt("u", [{"role": "user", "content": "Is this good?"}]), [{"role": "assistant", "content": "It is."}])]
    found = [LocalModel(ModelConfig(model=str(f))).score(pair)[0] for f in (second, second / "merged", start)]
    assert found[0].token_logps == pytest.approx(found[1].token_logps, abs=1e-5)
    assert found[0].token_logps != pytest.approx(found[2].token_logps, abs=1e-2)


def test_fisher_of_an_adapter_is_that_of_the_merged_model(place, first, tmp_path):
    found = [read_fisher(fisher(FisherConfig.model_validate({"model": str(folder), "data": [str(place / "data")],
                                                             "out": str(tmp_path / str(k)), "samples": 2})))
             for k, folder in enumerate((first, first / "merged"))]  # fmt: skip
    assert found[0].fisher.keys() == found[1].fisher.keys()
    for kind in ("fisher", "anchor"):
        a, b = (getattr(each, kind) for each in found)
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-3)


def test_the_next_stage_starts_from_the_merged_weights(place, start, first, tmp_path):
    still = cft(place, tmp_path / "still", "learning_rate=0", "max_steps=1", model=first)
    assert same(weights(still), weights(first / "merged"))
    moved = cft(place, tmp_path / "moved", "max_steps=2", model=first)
    assert all(not torch.equal(a, b) for a, b in zip(weights(moved).values(), weights(still).values(), strict=True))
    further = cft(place, tmp_path / "further", "lora.r=2", "merge=true", "max_steps=2", model=first)
    assert stack(further, "model") == [start, first, further]
    whole = AutoModelForCausalLM.from_pretrained(further / "merged")
    torch.testing.assert_close(logits(load_causal(further, "model")), logits(whole), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="has it merged already"):
        cft(place, tmp_path / "twice", *NEW, f"o_lora.previous=[{first}]", model=first)


def test_one_of_two_tied_embeddings_is_merged_alone(start, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start),
                           LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))  # fmt: skip
    apart = logits(model)
    whole = merged(model)
    torch.testing.assert_close(logits(whole), apart, atol=1e-4, rtol=1e-4)
    whole.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), apart, atol=1e-4, rtol=1e-4)


def adapter_folder(folder, base, start, **more):
    """A fresh adapter, in a folder without a tokenizer, of a base by any name."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start),
                           LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **more}))  # fmt: skip
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def test_the_base_is_found_beside_the_adapter_and_is_part_of_the_fingerprint(start, tmp_path):
    shutil.copytree(start, tmp_path / "base")
    folder = adapter_folder(tmp_path / "a", "../base", start)
    model = LocalModel(ModelConfig(model=str(folder)))
    assert model.tokenizer.get_vocab() == LocalModel(ModelConfig(model=str(start))).tokenizer.get_vocab()
    shutil.copytree(folder, tmp_path / "b")
    assert weights_hash(tmp_path / "b") == weights_hash(folder) == model.fingerprint
    (tmp_path / "base/generation_config.json").write_text("{}")
    assert weights_hash(folder) != model.fingerprint
    own = tmp_path / "b/tokenizer_config.json"
    shutil.copy(STARTER / "tokenizer.json", tmp_path / "b/tokenizer.json")
    own.write_text(json.dumps({**json.loads((STARTER / "tokenizer_config.json").read_text()), "eos_token": "<|user|>"}))
    assert LocalModel(ModelConfig(model=str(tmp_path / "b"))).tokenizer.eos_token == "<|user|>"


def test_adapters_that_are_no_model(place, start, first, tmp_path):
    def opened(folder):
        return LocalModel(ModelConfig(model=str(folder)), where="models.0").model

    pickled = shutil.copytree(first, tmp_path / "pickled", ignore=shutil.ignore_patterns("merged"))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"(?s)models\.0 .*pickled weights.*remedy.*save_pretrained"):
        opened(pickled)
    nowhere = adapter_folder(tmp_path / "nowhere", str(tmp_path / "gone"), start)
    with pytest.raises(InputError, match=r"the base of .*gone': neither a folder nor a model"):
        opened(nowhere)
    with pytest.raises(InputError, match="names no base model"):
        opened(adapter_folder(tmp_path / "nameless", None, start))
    with pytest.raises(InputError, match="its own base"):
        opened(adapter_folder(tmp_path / "itself", str(tmp_path / "itself"), start))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=6144, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    other.save_pretrained(tmp_path / "other")
    shutil.copy(STARTER / "tokenizer.json", tmp_path / "other")
    with pytest.raises(InputError, match="cannot be loaded: Target modules"):
        opened(adapter_folder(tmp_path / "foreign", str(tmp_path / "other"), start))
    more = adapter_folder(tmp_path / "more", str(start), start)
    config = json.loads((more / "adapter_config.json").read_text())
    (more / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["k_proj"]}))
    with pytest.raises(InputError, match=r"no adapter of .*\d+ weights have no counterpart"):
        opened(more)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match="PROMPT_TUNING cannot be merged"):
        opened(tmp_path / "prompt")
    with pytest.raises(InputError, match="a whole model is needed"):
        model_folder(str(first), Path(), whole=True)
    with pytest.raises(InputError, match="a whole model is needed"):
        open_embedder(type("C", (), {"backend": "lm", "model": str(first)}))


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["lora={r: 2, task_type: CAUSAL_LM}"], "lora: .*multiple values for keyword argument 'task_type'"),
        (["lora={r: 2, target_modules: [no_proj]}"], r"lora: Target modules \{'no_proj'\} not found"),
        (["lora={r: 0}"], "lora: .*positive"),
        (["lora={r: 2, modules_to_save: [lm_head]}", "o_lora.previous=[FIRST]"], "lora: modules_to_save with `o_lora`"),
        (["lora={r: 2, init_lora_weights: pissa}", "o_lora.previous=[FIRST]"], "lora: init_lora_weights with `o_lora`"),
        (["lora={r: 2, target_modules: [up_proj]}", "o_lora.previous=[FIRST]"], "no layer in common"),
        (["lora.r=2", "o_lora.previous=[DORA]"], "o_lora.previous .*dora: use_dora with `o_lora`"),
        (["lora.r=2", "o_lora.previous=[BASE]"], "no adapter_model.safetensors"),
    ],
)
def test_adapters_that_cannot_be_trained(place, start, first, tmp_path, words, match):
    if "DORA" in words[-1]:
        adapter_folder(tmp_path / "dora", str(start), start, use_dora=True)
    there = {"FIRST": str(first), "DORA": str(tmp_path / "dora"), "BASE": str(start)}
    for name, folder in there.items():
        words = [word.replace(name, folder) for word in words]
    with pytest.raises(InputError, match=match):
        cft(place, tmp_path / "out", *words, model=start)
    assert not (tmp_path / "out").exists()


# --- the model without its adapter is a reference ---


@pytest.mark.parametrize("old", [False, True])
def test_a_reference_has_no_dropout_and_leaves_training_as_it_was(old):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
                        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)  # fmt: skip
    base = GPT2LMHeadModel(config)
    adapters = LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, init_lora_weights=not old)
    separate = GPT2LMHeadModel(config)
    separate.load_state_dict(base.state_dict())
    model = get_peft_model(base, adapters)
    if old:  # an older adapter stays on in the reference, its dropout does not
        model.add_adapter("new", adapters)
        model.base_model.set_adapter(["default", "new"])
        separate = get_peft_model(separate, adapters)
        separate.load_state_dict({k: v for k, v in model.state_dict().items() if ".new." not in k})
    separate.eval().requires_grad_(False)
    model.train()
    model.base_model.model.transformer.h[1].eval()  # as a caller may have left it
    flags = [module.training for module in model.modules()]
    off = AdapterOff(model, "new" if old else "default")
    batch = {"input_ids": torch.arange(24).view(2, 12) % 50, "loss_mask": torch.arange(12).expand(2, 12) > 0}
    torch.manual_seed(1)
    expected = token_kl(model, separate, batch, chunk=5)
    torch.manual_seed(1)
    found = token_kl(model, off, batch, chunk=5)
    assert torch.equal(found, expected) and found.abs().max() > 1e-4, "the policy's dropout is all that is between"
    assert [module.training for module in model.modules()] == flags
    with off(), torch.no_grad():
        before = torch.get_rng_state()
        inside = token_values(model, batch, ("logps",))["logps"]
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(module.training for module in model.modules())
    assert torch.equal(inside, token_values(separate, batch, ("logps",))["logps"])
    with pytest.raises(ZeroDivisionError), off():
        _ = 1 / 0
    assert [module.training for module in model.modules()] == flags
