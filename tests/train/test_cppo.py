"""CPPO and GRPO: whole runs through the real trainer, on real prompts, against closed forms and plain loops."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_run import ROOT, STARTER, TINY, same, weights
from tokenizers.normalizers import Lowercase

from curate.build import build
from curate.diff import diff
from curate.diff_view import page, screen
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import TABLES, Rule, check, part, read, write
from curate.models.reward import rouge_l
from train.config import CppoConfig, GrpoConfig
from train.folder import checkpoints
from train.losses.cppo import heuristic_weights
from train.methods.cppo import Cppo
from train.phases import Phases
from train.reinforce import read_prompts
from train.rollouts import Rollouts
from train.run import run
from train.settings import load

CONFIGS = {"cppo": CppoConfig, "grpo": GrpoConfig}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prompts of two real tasks, six of them replayed, and a tiny model with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("cppo")
    tasks = [{"name": n, "path": str(ROOT / f"examples/superni/{n}.jsonl.gz"), "format": "superni", "split": "train"}
             for n in ("misc", "sentiment_analysis")]  # fmt: skip
    build({"tasks": tasks, "replay": {"selector": "random", "budget": 6}, "out": str(folder / "data")})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "start")
    (folder / "length.py").write_text(
        "import os\n"
        "def few(prompts, completions, references):\n"
        "    how = os.environ.get('REWARD')\n"
        "    if how == 'raises': raise RuntimeError('no server')\n"
        "    found = [1.0 - len(c) / 40 for c in completions]\n"
        "    if how == 'nan': found[3] = float('nan')\n"
        "    if how == 'none': found[3] = None\n"
        "    if how == 'huge': found[3] = 1e300\n"
        "    return found[:-1] if how == 'count' else found\n"
        "def vowels(prompts, completions, references):\n"
        "    return [sum(c in 'aeiou' for c in text) / max(1, len(text)) for text in completions]\n"
    )
    return folder


def words(place, out, *more):
    return [f"model={place / 'start'}", f"data={place / 'data'}", f"out={out}", "max_steps=4", "optim=sgd",
            "per_device_train_batch_size=4", "learning_rate=0.1", "logging_steps=1", "save_steps=1",
            "save_total_limit=9", "lr_scheduler_type=constant", "max_grad_norm=100", "rollouts.prompts=8",
            "rollouts.max_new_tokens=6", "rollouts.passes=1", "too_long=drop",
            "reward={kind: python, function: 'length:few'}", *more]  # fmt: skip


def trained(place, out, *more, name="cppo"):
    (place / "run.yaml").write_text("{}")
    run(name, *load(CONFIGS[name], place / "run.yaml", words(place, out, *more)), quiet=True)
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def plain(place):
    """Two phases of two steps, with everything on."""
    return trained(place, place / "plain", "rollouts.temperature=0.7", "rollouts.k=1")


def held(out, phase=0):
    return load_file(out / f"rollouts/phase-{phase:05d}/samples.safetensors")


# --- phases ---


class Rows:
    """A mixture that counts."""

    length = 10

    def order(self, start, stop):
        return np.arange(start, stop)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 40), st.integers(0, 40))
def test_the_order_of_samples_is_that_of_their_prompts(prompts, k, passes, start, n):
    phases = Phases(Rows(), prompts, k, passes, seed=3)
    order = phases.order(start, start + n).tolist()
    for position, row in zip(range(start, start + n), order, strict=True):
        phase, sample = phases.sample(position)
        assert phase == position // (prompts * k * passes)
        assert phases.rows(phase)[sample] == row == phase * prompts + sample // k
    whole = [phases.sample(i)[1] for i in range(phases.size)]
    for turn in range(passes):
        assert sorted(whole[turn * phases.samples : (turn + 1) * phases.samples]) == list(range(phases.samples))


def test_an_epoch_answers_each_prompt():
    # ten prompts in phases of four: three phases of 4 · 2 samples, twice each
    assert Phases(Rows(), 4, 2, 2, 0).length == 3 * 16


def test_steps_that_straddle_phases_are_refused(place, tmp_path):
    with pytest.raises(InputError, match="a phase has 6 samples, which steps of 4 do not divide"):
        trained(place, tmp_path / "out", "rollouts.prompts=6")


# --- what is measured ---


def test_a_phase_is_a_sound_manifest_that_says_what_was_drawn(place, plain, tmp_path):
    for phase in (0, 1):
        folder = place / f"plain/rollouts/phase-{phase:05d}"
        assert check(folder) == []
        manifest, samples = read(folder), held(place / "plain", phase)
        rows = manifest.completions
        assert rows.height == 8 and set(rows["batch"]) == {phase}
        expected = [1.0 - len(text) / 40 for text in rows["text"]]
        assert rows["reward"].to_list() == pytest.approx(expected)
        assert len(load_dataset(str(folder), "completions", split="train", cache_dir=str(tmp_path))) == 8
        told = explain(manifest, rows["prompt_uid"][0]), explain(manifest, rows["uid"][0])
        assert f"rollouts of phase {phase} asked it" in told[0] and "Bucket: " in told[1]
        lacks = diff(read(place / "data"), manifest)
        assert set(lacks.rows["why"]) == {"part"} and screen(lacks) and "which lacks it" in page(lacks)
        bucket, _ = Rule(0.5, "mean", "all").assign(rows)
        assert bucket.to_list() == rows["bucket"].to_list()
        assert sorted(samples["score"].tolist()) == pytest.approx(sorted(expected))
        stored = sorted(sum(r) for r in rows["token_logps"].to_list())
        assert sorted((samples["logps"] * samples["mask"]).sum(1).tolist()) == pytest.approx(stored, rel=1e-5)


def test_log_probabilities_are_those_of_the_distribution_drawn_from(place, plain):
    # phase 1 is drawn by the policy of checkpoint-2: a pass of it by hand, logits / 0.7
    from transformers import AutoModelForCausalLM

    from train.data import Examples
    from train.models import end_tokens, open_tokenizer

    config, _ = load(CppoConfig, None, words(place, "x"))
    tokenizer = open_tokenizer(config)
    examples = Examples.of(read(place / "data"), tokenizer, ends=end_tokens(config, tokenizer))
    prompts = {u: examples.row_tokens(i)[: examples.first_target[i]].tolist() for i, u in enumerate(examples.uid)}
    folder = place / "plain"
    for phase, model_at in ((0, place / "start"), (1, folder / "checkpoint-2")):
        model = AutoModelForCausalLM.from_pretrained(model_at, dtype=torch.float32).eval()
        for row in read(folder / f"rollouts/phase-{phase:05d}").completions.iter_rows(named=True):
            prompt, answer = prompts[row["prompt_uid"]], row["token_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
            found = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert row["token_logps"] == pytest.approx(found.tolist(), abs=1e-4)


def test_the_first_step_of_a_phase_is_a_zero_update(plain):
    # steps 1 and 3 meet the policy that drew their samples; in phase 2 it has left its anchor
    for line in (plain[0], plain[2]):
        assert line["clip_fraction"] == 0
        assert abs(line["kl_k1"]) < 1e-5 and abs(line["kl_k3"]) < 1e-5
    assert abs(plain[0]["kl_reference"]) < 1e-5 and abs(plain[0]["kl_previous"]) < 1e-5 and plain[0]["retention"] < 1e-9
    assert abs(plain[2]["kl_reference"]) > 1e-4 and plain[2]["retention"] > 1e-9


def test_half_precision_measures_as_it_trains(place, tmp_path):
    """Rounding alone, log π ≈ −9 with 8 bits: 2⁻⁸ · 9 ≈ 0.04 a token if one of the two passes were in float32."""
    lines = trained(place, tmp_path / "out", "bf16=true", "max_steps=1", "weights.kind=none")
    assert lines[0]["clip_fraction"] == 0 and abs(lines[0]["kl_k3"]) < 1e-5


def test_the_loss_of_a_step_by_a_reference_of_its_own(place, plain):
    """Step 1 in plain loops: V = 0, ratio 1, so L = −Σ α A / N + c_V Σ ½ G² / N."""
    samples = {k: v.double() for k, v in held(place / "plain").items()}
    mask, n = samples["mask"] != 0, len(samples["row"])
    rewards, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    alpha, _ = heuristic_weights(samples["z_p"], samples["z_r"], k=0.5, lb=0.5, ub=2.5)
    for i in range(n):
        tokens = int(mask[i].sum())
        for t in range(tokens):  # kl.coef 0.05, of a policy that is its reference: 0
            rewards[i, t] = -0.05 * float(samples["logps"][i, t] - samples["reference"][i, t])
        rewards[i, tokens - 1] += float(samples["score"][i]) + (0 if samples["ended"][i] else -1.0)
        after = 0.0
        for t in reversed(range(tokens)):  # V = 0: A_t = r_t + γλ A_{t+1}, γ = 1, λ = 0.95
            after = rewards[i, t] + 0.95 * after
            returns[i, t] = after
    valid = mask.numpy()
    whitened = (returns - returns[valid].mean()) / returns[valid].std()
    phases = Phases(Rows(), 8, 1, 1, 42)
    step = [phases.sample(position)[1] for position in range(4)]
    tokens = int(valid[step].sum())
    policy = sum(-float(alpha[i]) * whitened[i][valid[i]].sum() for i in step) / tokens
    value = sum(0.5 * (returns[i][valid[i]] ** 2).sum() for i in step) / tokens
    assert plain[0]["policy"] == pytest.approx(policy, abs=1e-4)
    assert plain[0]["value"] == pytest.approx(value, rel=1e-4)
    assert plain[0]["loss"] == pytest.approx(policy + 0.1 * value, abs=1e-4)
    assert plain[0]["reward"] == pytest.approx(samples["score"][step].mean().item(), rel=1e-5)


def test_rollouts_of_another_start_are_not_trained_on(place, plain, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(place / "plain/rollouts", tmp_path / "out/rollouts")
    trained(place, tmp_path / "out", "max_steps=1", "seed=7")
    trained(place, tmp_path / "fresh", "max_steps=1", "seed=7")
    assert same(held(tmp_path / "out"), held(tmp_path / "fresh"))
    assert not (tmp_path / "out/rollouts/phase-00001").exists()


def test_a_prompt_that_a_phase_asks_twice_is_drawn_anew(place, tmp_path):
    """Eighty-three prompts in a phase of a hundred: seventeen come twice."""
    trained(place, tmp_path / "out", "max_steps=1", "rollouts={prompts: 100, max_new_tokens: 6, passes: 1}")
    samples = held(tmp_path / "out")
    twice = [(samples["row"] == row).nonzero()[:, 0].tolist() for row in samples["row"].unique()]
    pairs = [places for places in twice if len(places) == 2]
    assert pairs and all(not torch.equal(samples["tokens"][a], samples["tokens"][b]) for a, b in pairs)
    assert check(tmp_path / "out/rollouts/phase-00000") == []


# --- identities ---


def test_weights_of_one_without_retention_are_plain_ppo_bit_for_bit(place, tmp_path):
    trained(place, tmp_path / "ones", "weights={lb: 1, ub: 1}", "retention.weight=0")
    trained(place, tmp_path / "none", "weights.kind=none", "retention={weight: 0, anchor: rollout}")
    assert same(weights(tmp_path / "ones/model"), weights(tmp_path / "none/model"))
    trained(place, tmp_path / "five", "weights={k: 0.1}", "retention.weight=0")
    assert not same(weights(tmp_path / "ones/model"), weights(tmp_path / "five/model"))


def test_accumulation_changes_nothing(place, tmp_path):
    trained(place, tmp_path / "whole", "max_steps=2")
    trained(place, tmp_path / "parts", "max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=2")
    a, b = weights(tmp_path / "whole/model"), weights(tmp_path / "parts/model")
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-6
    a, b = (load_file(tmp_path / f"{name}/value.safetensors") for name in ("whole", "parts"))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-6 and float(a["bias"].abs()) > 1e-3


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_run_goes_on_with_the_same_bits(place, tmp_path, step):
    more = ("kl={target: 0.001, horizon: 10}", "weights.kind=learned", "rollouts.passes=1")
    trained(place, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for late in checkpoints(tmp_path / "again")[step:]:
        shutil.rmtree(late)
    shutil.rmtree(tmp_path / "again/model")
    if step < 2:
        shutil.rmtree(tmp_path / "again/rollouts/phase-00001")
    trained(place, tmp_path / "again", *more)
    assert same(weights(tmp_path / "whole/model"), weights(tmp_path / "again/model"))
    a, b = (load_file(tmp_path / f"{n}/checkpoint-4/method.safetensors") for n in ("whole", "again"))
    assert same(a, b) and a["head.weight"].abs().sum() > 0
    assert a["phase"][1] != 0.05, "the coefficient has moved towards its target"


def test_group_advantages_and_their_closed_form(place, tmp_path):
    lines = trained(place, tmp_path / "out", "rollouts={prompts: 2, k: 4}", "max_steps=2", "level=sequence",
                    "retention={weight: 0.5}", name="grpo")  # fmt: skip
    samples = held(tmp_path / "out")
    whole = samples["score"]  # grpo: nothing for a missing end
    groups = whole.reshape(2, 4)
    z = ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True, unbiased=False)).flatten()
    z = torch.where(z.isfinite(), z, 0)
    phases = Phases(Rows(), 2, 4, 1, 42)
    step = [phases.sample(position)[1] for position in range(4)]
    assert lines[0]["policy"] == pytest.approx(-z[step].mean().item(), abs=1e-5)  # ratio 1; a mean over samples
    assert not (tmp_path / "out/value.safetensors").exists() and "value" not in lines[0]
    assert lines[1]["retention"] > 0 and abs(lines[0]["kl_reference_k3"]) < 1e-9


def test_training_raises_the_reward_and_retention_holds_it_back(place, tmp_path):
    fixed = ("max_steps=20", "optim=adamw_torch", "learning_rate=0.05", "kl={coef: 0, most: 1000000}", "missing_end=0",
             "rollouts={prompts: 16, k: 2, max_new_tokens: 6, passes: 1}", "per_device_train_batch_size=32",
             "save_strategy=no", "reward.function='length:vowels'", "value.clip=10", "weights.kind=none")  # fmt: skip
    free = trained(place, tmp_path / "free", *fixed, "retention.weight=0")
    first, last = (np.mean([line["reward"] for line in part]) for part in (free[:4], free[-4:]))
    assert last > first + 0.1
    tied = trained(place, tmp_path / "tied", *fixed, "retention.weight=1")
    assert tied[-1]["kl_reference"] < free[-1]["kl_reference"] / 2


def test_an_adapter_is_its_own_anchor(place, tmp_path):
    lines = trained(place, tmp_path / "out", "lora={r: 2, target_modules: all-linear}", "max_steps=4")
    assert abs(lines[0]["kl_reference"]) < 1e-5 and lines[3]["retention"] > 0
    assert (tmp_path / "out/model/adapter_model.safetensors").is_file()


def test_an_anchor_of_another_model_is_asked(place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "start", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "older")
    shutil.copy(place / "start/tokenizer.json", tmp_path / "older")
    shutil.copy(place / "start/tokenizer_config.json", tmp_path / "older")
    lines = trained(
        place, tmp_path / "out", f"retention.model={tmp_path / 'older'}", "max_steps=1", "retention.weight=2"
    )
    samples = held(tmp_path / "out")
    gap = ((samples["logps"] - samples["anchor"]) ** 2)[samples["mask"] != 0]
    assert gap.max() > 1e-4 and lines[0]["retention"] > 1e-5
    assert lines[0]["loss"] > lines[0]["policy"] and abs(lines[0]["kl_reference"]) < 1e-5


def test_ewc_holds_the_weights(place, tmp_path):
    from train.fisher import FisherConfig, fisher

    fisher(FisherConfig.model_validate({"model": str(place / "start"), "data": str(place / "data"), "samples": 8,
                                        "out": str(tmp_path / "fisher"), "max_length": 512}))  # fmt: skip
    trained(place, tmp_path / "zero", f"ewc={{weight: 0, fisher: [{tmp_path / 'fisher'}]}}", "max_steps=2")
    trained(place, tmp_path / "none", "max_steps=2")
    assert same(weights(tmp_path / "zero/model"), weights(tmp_path / "none/model"))
    lines = trained(place, tmp_path / "held", f"ewc={{weight: 1000, fisher: [{tmp_path / 'fisher'}]}}",
                    "learning_rate=0.0001", "max_steps=3")  # fmt: skip
    assert lines[0]["ewc"] == 0 and lines[2]["ewc"] > 0


def test_a_critic_of_its_own_learns(place, tmp_path):
    trained(place, tmp_path / "out", f"value.model={place / 'start'}", "max_steps=2")
    state = load_file(tmp_path / "out/checkpoint-2/method.safetensors")
    before = weights(place / "start")
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(state[f"critic.{key}"], before[key])
    assert torch.equal(weights(tmp_path / "out/value")[key], state[f"critic.{key}"])
    again = trained(place, tmp_path / "next", f"value={{model: {tmp_path / 'out/value'}, head: "
                    f"{tmp_path / 'out/value.safetensors'}}}", "max_steps=1")  # fmt: skip
    assert again[0]["explained_variance"] != 0, "the next stage begins with what was learned"


def test_a_phase_can_be_trained_on_alone(place, plain, tmp_path):
    """Offline: the same samples, so the same first step but for the order of completions."""
    data = place / "plain/rollouts/phase-00000"
    lines = trained(place, tmp_path / "out", f"data={data}", "rollouts.offline=true", "rollouts.temperature=0.7",
                    "max_steps=2", "reward=exact")  # fmt: skip
    a, b = held(place / "plain"), held(tmp_path / "out")
    assert sorted(a["score"].tolist()) == sorted(b["score"].tolist())
    assert sorted((a["logps"] * a["mask"]).sum(1).tolist()) == pytest.approx(
        sorted((b["logps"] * b["mask"]).sum(1).tolist()))  # fmt: skip
    assert lines[0]["clip_fraction"] == 0
    assert check(tmp_path / "out/rollouts/phase-00000") == []


def test_offline_takes_rollouts_as_they_were_drawn_and_judged(place, plain, tmp_path):
    """Other temperatures and rules are refused; the stored policy and reward stay the rollouts'; each comes round."""
    data = f"data={place / 'plain/rollouts/phase-00000'}"
    with pytest.raises(InputError, match=r"drawn at temperature 0\.7; .*\n.*set rollouts\.temperature=0\.7"):
        trained(place, tmp_path / "warm", data, "rollouts.offline=true")
    offline = (data, "rollouts.offline=true", "rollouts.temperature=0.7", "reward=exact")
    with pytest.raises(InputError, match=r"set weights\.k=0\.5"):
        trained(place, tmp_path / "rule", *offline, "weights.k=1.5")
    with pytest.raises(InputError, match=r"set weights\.k=0\.5"):  # new rollouts of these prompts too
        trained(place, tmp_path / "rule", data, "weights.k=1.5")
    trained(place, tmp_path / "out", *offline, "max_steps=1")
    before, after = (read(f) for f in (place / "plain/rollouts/phase-00000", tmp_path / "out/rollouts/phase-00000"))
    for column in ("reward_id", "temperature", "policy", "tokenizer"):
        assert set(before.completions[column]) == set(after.completions[column]), column
    phases = Phases(Rows(), 10, 2, 1, 0)
    stored = {"a": [{"uid": i} for i in range(5)]}
    rollouts = SimpleNamespace(phases=phases, sampling=SimpleNamespace(k=2), stored=stored)
    seen = [[row["uid"] for row in Rollouts._kept_rows(rollouts, n, ["a", "a"])] for n in range(3)]
    assert seen == [[0, 1], [2, 3], [4, 0]]


def test_random_weights_are_their_own_reference(place, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    lines = trained(place, tmp_path / "out", "model=null", f"init={tmp_path / 'tiny.json'}", "max_steps=1",
                    f"tokenizer={STARTER}")  # fmt: skip
    assert abs(lines[0]["kl_reference"]) < 1e-5 and lines[0]["retention"] < 1e-9


def test_a_reference_with_a_window_is_measured_within_it(place, tmp_path):
    """A block mask would take its window away: samples stand in rows of their own then."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    fixed = {k: v for k, v in TINY.items() if k != "model_type"}
    MistralForCausalLM(MistralConfig(**fixed, sliding_window=16)).save_pretrained(tmp_path / "window")
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer.save_pretrained(tmp_path / "window")
    trained(place, tmp_path / "out", f"kl={{reference: {tmp_path / 'window'}, most: 1000}}", "max_steps=1",
            "rollouts={prompts: 4, k: 2}")  # fmt: skip
    samples = held(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "window", dtype=torch.float32).eval()
    config, _ = load(CppoConfig, place / "run.yaml", words(place, "x"))
    kept = read_prompts(config, tokenizer, {1}, 1024).rows
    for i in range(8):
        row = int(samples["row"][i])
        prompt = kept.row_tokens(row)[: kept.first_target[row]].tolist()
        answer = samples["tokens"][i][samples["mask"][i] != 0].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(samples["reference"][i][: len(answer)], found, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_judged_may_have_a_worth(place, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD", "nan")
    trained(place, tmp_path / "out", "max_steps=1", "unjudged=-3")
    assert (held(tmp_path / "out")["score"] == -3).sum() == 1


def test_an_edited_reward_is_another_run(place, tmp_path):
    trained(place, tmp_path / "out", "max_steps=2")
    text = (place / "length.py").read_text()
    try:
        (place / "length.py").write_text(text + "# edited\n")
        with pytest.raises(InputError, match="another run"):
            trained(place, tmp_path / "out", "max_steps=4")
    finally:
        (place / "length.py").write_text(text)


def test_damaged_samples_are_told(place, tmp_path):
    trained(place, tmp_path / "out", "max_steps=2")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    (tmp_path / "out/rollouts/phase-00000/samples.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"samples.safetensors: not the samples of this run's phase"):
        trained(place, tmp_path / "out", "max_steps=2")


def test_a_bucket_by_hand_is_trained_on(place, plain, tmp_path):
    """Offline: a sample that a person put into a bucket lies there, at its nearest point, and weighs as that."""
    manifest = read(place / "plain/rollouts/phase-00000")
    rows = manifest.completions
    uid, was = next((u, b) for u, b in rows.select("uid", "bucket").iter_rows() if b != "high_performance")
    frames = {name: getattr(manifest, name) for name in TABLES}
    frames["completions"] = rows.with_columns(
        bucket=pl.when(pl.col("uid") == uid).then(pl.lit("high_performance")).otherwise("bucket")
    )
    frames["tasks"] = part(manifest, set(rows["prompt_uid"]), frames["completions"], "again")[0]["tasks"]
    facts = {**manifest.provenance["buckets"], "overrides": {uid: "high_performance"}}
    write(tmp_path / "data", frames, {**manifest.provenance, "buckets": facts}, "# By hand\n")
    assert check(tmp_path / "data") == []
    trained(place, tmp_path / "out", f"data={tmp_path / 'data'}", "rollouts.offline=true", "rollouts.temperature=0.7",
            "max_steps=2")  # fmt: skip
    phase = read(tmp_path / "out/rollouts/phase-00000")
    assert check(phase.folder) == []
    assert dict(phase.completions.select("uid", "bucket").iter_rows())[uid] == "high_performance" != was
    samples, before = held(tmp_path / "out"), held(place / "plain")
    at = phase.completions["uid"].to_list()
    moved = [(float(p), float(r)) for p, r in zip(samples["z_p"], samples["z_r"], strict=True)]
    other = [(float(p), float(r)) for p, r in zip(before["z_p"], before["z_r"], strict=True)]
    new = [pair for pair in moved if all(abs(pair[0] - o[0]) + abs(pair[1] - o[1]) > 1e-6 for o in other)]
    assert len(new) == 1 and min(new[0]) >= 0.5 and len(at) == 8
    (old,) = [o for o in other if all(abs(o[0] - m[0]) + abs(o[1] - m[1]) > 1e-6 for m in moved)]
    assert new[0] == pytest.approx((max(old[0], 0.5), max(old[1], 0.5)), abs=1e-5)


def test_rewards_against_references(place, tmp_path):
    trained(place, tmp_path / "out", "reward=rouge_l", "max_steps=2")
    manifest = read(tmp_path / "out/rollouts/phase-00000")
    references = dict(manifest.samples.select("uid", "references").iter_rows())
    for uid, text, reward in manifest.completions.select("prompt_uid", "text", "reward").iter_rows():
        assert reward == pytest.approx(rouge_l(text, references[uid]))


# --- bad input ---


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("nan", r"no finite number for a completion of uid [0-9a-f]{32}"),
        ("none", r"no finite number for a completion of uid [0-9a-f]{32}"),
        ("count", "8 completions .* gave 7 numbers"),
        ("raises", "no server"),
    ],
)
def test_a_reward_that_cannot_be_used_stops_the_run_before_the_step(place, tmp_path, monkeypatch, how, match):
    monkeypatch.setenv("REWARD", how)
    with pytest.raises(InputError, match=match):
        trained(place, tmp_path / "out")
    assert not checkpoints(tmp_path / "out") and not (tmp_path / "out/rollouts/phase-00000/provenance.json").exists()
    monkeypatch.delenv("REWARD")
    assert len(trained(place, tmp_path / "out")) == 4, "the same command then goes on"


def test_a_policy_that_runs_away_is_stopped(place, tmp_path):
    """Phase 2 has moved by step 4, and nobody knows what step 3 did: checkpoint-2 is where it was still near."""
    with pytest.raises(InputError, match=r"step 4: within phase 2 .* nats a sample, kl.most is 0\.06") as info:
        trained(place, tmp_path / "out", "kl.most=0.06", "learning_rate=1", "max_steps=6", "max_grad_norm=1000",
                "lr_scheduler_type=constant_with_warmup", "warmup_steps=6")  # fmt: skip
    assert "checkpoint-2 is from before" in str(info.value)


def test_the_last_sound_checkpoint_outlives_newer_ones(place, tmp_path):
    """Two phases of eight steps; the second begins at 8 and is sound, so 8 stays while 15 and 16 come."""
    trained(place, tmp_path / "out", "max_steps=16", "save_total_limit=2", "rollouts={prompts: 8, passes: 4}")
    assert [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-8", "checkpoint-15", "checkpoint-16"]


def test_a_policy_that_runs_away_within_a_phase_is_stopped(place, tmp_path):
    with pytest.raises(InputError, match=r"(?s)step 2: within phase 1 .*there is no checkpoint"):
        trained(place, tmp_path / "out", "max_steps=2", "learning_rate=30", "save_strategy=no", "max_grad_norm=1000",
                "kl.most=1")  # fmt: skip
    assert not (tmp_path / "out/model").exists()


def test_what_the_last_step_ruins_is_not_published(place, tmp_path):
    with pytest.raises(InputError, match=r"within phase 1 the policy has moved by"):
        trained(place, tmp_path / "out", "max_steps=1", "learning_rate=30", "max_grad_norm=1000", "kl.most=1")
    assert not (tmp_path / "out/model").exists()


def test_what_was_trained_before_a_judge_was_gone_is_kept(place, tmp_path, monkeypatch):
    """No checkpoint was due, yet the two steps of the first phase need not be taken again; and they give the same."""
    wanted = ("save_steps=500", "weights.kind=learned", "optim=adamw_torch", "learning_rate=0.001")
    trained(place, tmp_path / "whole", *wanted)
    phase, plain = Rollouts.phase, []

    def gone(self, number, *more):
        plain.append(number)
        if number == 1:
            monkeypatch.setenv("REWARD", "raises")
        return phase(self, number, *more)

    monkeypatch.setattr(Rollouts, "phase", gone)
    with pytest.raises(InputError, match="no server"):
        trained(place, tmp_path / "out", *wanted)
    monkeypatch.undo()
    assert plain == [0, 1] and [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    again = trained(place, tmp_path / "out", *wanted)
    assert same(weights(tmp_path / "out/model"), weights(tmp_path / "whole/model")) and len(again) == 4


def test_a_reward_beyond_reason_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD", "huge")
    with pytest.raises(InputError, match=r"1e\+300 for a completion of uid [0-9a-f]{32}"):
        trained(place, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["packing=true"], "samples here are fresh"),
        (["eval_data=FOLDER/data"], "train eval"),
        (["advantages=group"], "rollouts.k is 2 or more"),
        (["level=sequence"], "GSPO's, whose samples have one advantage each"),
        (["retention={anchor: rollout, model: FOLDER/start}"], "is the anchor `previous_task`"),
        (["kl.reference=FOLDER/other"], "an anchor speaks of the same tokens"),
        (["retention.model=FOLDER/short"], "positions for 64 tokens, the longest sample may have"),
        (["value.model=FOLDER/short"], "positions for 64 tokens"),
        (["kl.reference=FOLDER/words"], "its tokenizer is another one"),
        (["kl={coef: 0, target: 1}"], "`target` multiplies `coef`"),
        (["kl={target: 1, horizon: 1}"], "`kl.horizon` is in samples"),
        (["model=FOLDER/dropout"], "dropout"),
        (["rollouts.offline=true"], "no sample with a prompt and 1 rollouts of known reward"),
        (["rollouts.max_new_tokens=2000"], "no sample with a prompt"),
        (["rollouts.max_new_tokens=1000", "too_long=error"], "leave no room for 1000 tokens in 1024"),
        (["value.head=FOLDER/start/model.safetensors"], "no value head of 32 numbers"),
    ],
)
def test_bad_settings(place, tmp_path, more, match):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    fixed = {k: v for k, v in TINY.items() if k != "model_type"}
    for name, changed in (("other", {"vocab_size": 7000}), ("dropout", {"attention_dropout": 0.1}),
                          ("short", {"max_position_embeddings": 64}), ("words", {})):  # fmt: skip
        if any(f"/{name}" in word for word in more):
            LlamaForCausalLM(LlamaConfig(**fixed | changed)).save_pretrained(place / name)
            tokenizer = AutoTokenizer.from_pretrained(STARTER)
            if name == "words":
                tokenizer.backend_tokenizer.normalizer = Lowercase()
            tokenizer.save_pretrained(place / name)
    with pytest.raises(InputError, match=match):
        trained(place, tmp_path / "out", *(word.replace("FOLDER", str(place)) for word in more))
    assert not (tmp_path / "out/model").exists()


def test_the_state_of_a_phase_survives(place):
    from torch import nn

    one = Cppo(rollouts=None, head=nn.Linear(2, 1))
    one.number, one.kl, one.met = 3, 0.25, math.pi
    other = Cppo(rollouts=None, head=nn.Linear(2, 1))
    other.load_state_dict(one.state_dict())
    assert (other.number, other.kl, other.met) == (3, 0.25, math.pi)
    assert torch.equal(one.head.weight, other.head.weight)
