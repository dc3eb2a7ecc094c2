"""PBL, DPO and COPR: real ranked answers, the starter's first layer as the policy, whole runs by the real trainer."""

import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from test_run import ROOT, same, weights

from curate.build import build
from curate.errors import InputError
from curate.manifest import TABLES, check, read, write
from curate.manifest.io import sha256_file
from train.buffers import chosen, read_buffer
from train.config import CoprConfig, DpoConfig, PblConfig
from train.folder import checkpoints
from train.losses.copr import advantages, draw_scale
from train.methods.answers import Grid, ordered
from train.methods.copr import Copr
from train.models import end_tokens, open_model, open_tokenizer
from train.preferences import collator, fill, measure, method_of, read_sets, read_stage
from train.run import run
from train.settings import described, load

STARTER = ROOT / "examples/starter"
CONFIGS = {"pbl": PblConfig, "dpo": DpoConfig, "copr": CoprConfig}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Twelve questions with four answers ranked by people, and rollouts of the policy with similarities."""
    folder = tmp_path_factory.mktemp("ranked")
    import gzip

    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(STARTER, num_hidden_layers=1, dtype=torch.float32)
    policy.save_pretrained(folder / "policy")  # no claim needs the other five layers, and they take most of the time
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "policy")

    with gzip.open(ROOT / "examples/ranked/qa_feedback.jsonl.gz", "rt") as file:
        rows = [line for line in file if json.loads(line)["split"] == "train"][:12]
    (folder / "rows.jsonl").write_text("".join(rows))
    task = {"name": "qa", "path": str(folder / "rows.jsonl"), "format": "ranked", "ranked_by": "human",
            "columns": {"prompt": "question", "output": "gold"}}  # fmt: skip
    build({"tasks": [task], "replay": {"selector": "none"}, "policy": {"model": str(folder / "policy")},
           "rollouts": {"k": 3, "max_new_tokens": 12, "reward": {"kind": "rouge_l"}},
           "candidates": {"similarity": True, "threshold": 0.5}, "out": str(folder / "data")})  # fmt: skip
    return folder


def settings(ranked, out, *words):
    return [f"model={ranked / 'policy'}", f"data={ranked / 'data'}", f"out={out}", "max_steps=3",
            "per_device_train_batch_size=4", "learning_rate=0.0005", "logging_steps=1", "save_steps=1",
            "save_total_limit=9", "too_long=drop", "lr_scheduler_type=constant", *words]  # fmt: skip


def trained(name, ranked, out, *words):
    run(name, *load(CONFIGS[name], None, settings(ranked, out, *words)), quiet=True)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def sets_of(name, ranked, *words):
    config, _ = load(CONFIGS[name], None, settings(ranked, "x", *words))
    tokenizer = open_tokenizer(config)
    return config, read_sets(name, config, config.data, tokenizer, end_tokens(config, tokenizer), 1024)


# --- sets ---


def test_sets_are_the_ranked_answers_of_people_with_the_stored_log_probabilities(ranked):
    _, sets = sets_of("copr", ranked)
    manifest = read(ranked / "data")
    human = manifest.completions.filter(origin="human")
    assert len(sets) == human["prompt_uid"].n_unique() == 12
    assert sorted(sets.uid) == sorted(human["uid"])
    stored = {row["uid"]: row for row in human.iter_rows(named=True)}
    for k, uid in enumerate(sets.uid):
        assert sets.rank[k] == stored[uid]["rank"]
        assert sets.tokens[k].tolist() == stored[uid]["token_ids"]
        assert sets.logps[k] == pytest.approx(sum(stored[uid]["token_logps"]))


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_model_measures_what_the_manifest_has(ranked, layout):
    # curate scored the answers one a row; here they share their prompt's row
    config, sets = sets_of("copr", ranked, f"layout={layout}")
    model = open_model(config)
    found = measure(model, sets, collator(config, model, 0, False, [sets]), batch_size=3)
    np.testing.assert_allclose(found, sets.logps, rtol=1e-4)


def test_log_probabilities_of_another_policy_are_refused_or_measured(ranked, tmp_path):
    shutil.copytree(ranked / "policy", tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text("{}")  # another hash
    with pytest.raises(InputError, match="measured under another"):
        sets_of("copr", ranked, f"model={tmp_path / 'other'}")
    config, sets = sets_of("copr", ranked, f"model={tmp_path / 'other'}", "reference=measure")
    model, stored = open_model(config), sets.logps.copy()
    fill(config, sets, model, collator(config, model, 0, False, [sets]), 4, seed=0)
    np.testing.assert_allclose(sets.logps, stored, rtol=1e-4)
    config, sets = sets_of("copr", ranked)
    sets.logps[5] = -math.inf
    with pytest.raises(InputError, match=f"1 of {len(sets.logps)} answers is missing or infinite.*{sets.uid[5]}"):
        fill(config, sets, model, None, 4, seed=0)


def test_answers_that_cannot_be_used_are_listed(ranked):
    manifest = read(ranked / "data")
    human = manifest.completions.filter(origin="human").sort("prompt_uid", "uid")
    prompts = human["prompt_uid"].unique(maintain_order=True).to_list()
    first = human.filter(prompt_uid=prompts[0])
    twin = first.row(0, named=True)
    changed = pl.concat([
        human.filter(~pl.col("prompt_uid").is_in(prompts[:3])),
        # a twin of the first answer with a worse rank; one answer alone; one of no tokens
        first, pl.DataFrame([{**twin, "uid": "0" * 32, "rank": 9}], schema=human.schema),
        human.filter(prompt_uid=prompts[1]).head(1),
        human.filter(prompt_uid=prompts[2]).with_columns(
            token_ids=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit([], pl.List(pl.Int32))).otherwise("token_ids")),
    ])  # fmt: skip
    from dataclasses import replace as with_

    from train.sets import Sets

    tokenizer = open_tokenizer(load(CoprConfig, None, settings(ranked, "x"))[0])
    sets = Sets.of(with_(manifest, completions=changed), tokenizer, kind="ranked", ends={1})
    why = {(row["prompt_uid"], row["reason"].split(" of ")[0] if "0 tokens" not in row["reason"] else "0 tokens")
           for row in sets.left_out.iter_rows(named=True)}  # fmt: skip
    assert (prompts[2], "0 tokens") in why
    assert any(p == prompts[0] and "the same tokens as answer" in r for p, r in why)
    assert any(p == prompts[1] and "nothing to compare" in r for p, r in why)
    assert len(sets) == 11 and prompts[1] not in list(sets.rows.uid)
    kept = list(sets.rows.uid).index(prompts[0])
    assert len(sets.answers(kept)) == first.height


def test_a_grid_by_hand():
    batch = {"prompt": torch.tensor([0, 0, 1, 1, 1, 3]), "row": torch.zeros(4)}
    grid = Grid.of(batch, torch.tensor([True, True, True, False, True, True]))
    assert grid(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [[1, 2], [3, 4], [0, 0], [5, 0]]
    assert grid.mask.tolist() == [[True, True], [True, True], [False, False], [True, False]]


def test_ordered_pairs_by_hand():
    # ranks 1, 2, 2, 3: five pairs of unlike rank; the first is less likely than the second, and as likely as the last
    right, all_ = ordered(torch.tensor([[-2.0, -1.0, -3.0, -2.0]]), torch.tensor([[1, 2, 2, 3]]),
                          torch.ones(1, 4, dtype=torch.bool))  # fmt: skip
    assert (right.tolist(), all_.tolist()) == ([0 + 1 + 0.5 + 1 + 0], [5])


# --- methods ---


def test_dpo_begins_at_ln_2_and_learns(ranked, tmp_path):
    lines = trained("dpo", ranked, tmp_path / "out", "kl.weight=0.01")
    first, last = lines[0], lines[-2]
    assert first["preference"] == pytest.approx(math.log(2), abs=1e-5)  # π_θ = π_ref
    assert abs(first["kl"]) < 1e-6
    assert last["accuracy_of_change"] > 0.5


def test_ipo_begins_at_its_closed_form(ranked, tmp_path):
    # (0 − 1/(2β))² = 25 at β = 0.1
    first, *_ = trained("dpo", ranked, tmp_path / "out", "loss=ipo", "max_steps=1")
    assert first["preference"] == pytest.approx(25, rel=1e-4)


def test_pbl_begins_at_its_closed_form(ranked, tmp_path):
    # ρ = 0: nothing from the agreeing answers, (2/b) ln 2 from each conflicting one
    first, *_ = trained("pbl", ranked, tmp_path / "out", "max_steps=1", "threshold=1.0", "b=2", "beta=3",
                        "per_device_train_batch_size=12")  # fmt: skip
    manifest = read(ranked / "data")
    n = manifest.completions.filter(pl.col("similarity").is_not_null(), origin="policy").height
    _, sets = sets_of("pbl", ranked)
    assert n >= len(sets.tokens) > 12
    assert first["bias"] == pytest.approx(3 * (2 / 2) * math.log(2) * len(sets.tokens) / 12, rel=1e-4)
    assert abs(first["rho_conflict"]) < 1e-4 and first["nll"] > 0


def test_copr_begins_at_its_closed_form_and_leaves_a_buffer(ranked, tmp_path):
    lines = trained("copr", ranked, tmp_path / "out", "beta=0.5", "per_device_train_batch_size=12", "keep=0.25",
                    "learning_rate=0.00001")  # fmt: skip
    config, sets = sets_of("copr", ranked, "beta=0.5")
    closed = []
    for row in range(len(sets)):
        at = slice(int(sets.bounds[row]), int(sets.bounds[row + 1]))
        ref = torch.from_numpy(sets.logps[at]).log_softmax(0)
        r = torch.tensor([draw_scale(sets.rows.uid[row], len(ref), 42)], dtype=torch.float64)
        a = advantages(torch.from_numpy(sets.rank[at].astype(np.int64))[None], r)[0] / 0.5
        closed.append((a - torch.logsumexp(ref + a, 0)).square().mean().item())  # log P_ref − log P*
    assert lines[0]["fit"] == pytest.approx(np.mean(closed), rel=1e-3)
    assert lines[2]["fit"] < lines[0]["fit"]
    facts = json.loads((tmp_path / "out/buffer/buffer.json").read_text())
    assert facts["task"] == "qa" and facts["beta"] == 0.5
    buffer = read(tmp_path / "out/buffer")
    assert buffer.samples.height == 3, "a quarter of twelve prompts"
    tokenizer = open_tokenizer(config)
    task, kept = read_buffer(tmp_path / "out/buffer", tokenizer, 0.5, "sum", ends={1})
    assert task == "qa" and len(kept) == 3
    for row in range(3):
        at = slice(int(kept.bounds[row]), int(kept.bounds[row + 1]))
        assert np.exp(kept.target[at]).sum() == pytest.approx(1)
    for words, match in (((0.4, "sum"), "beta 0.5, this run has 0.4"), ((0.5, "mean"), "reduction")):
        with pytest.raises(InputError, match=match):
            read_buffer(tmp_path / "out/buffer", tokenizer, *words, ends={1})
    with pytest.raises(InputError, match="not a buffer"):
        read_buffer(tmp_path / "out", tokenizer, 0.5, "sum", ends={1})


@pytest.mark.parametrize(("fit", "reduction", "gamma"), [("kl", "sum", 1), ("mse", "mean", 1), ("mse", "sum", 0)])
def test_ablations_begin_at_their_closed_forms(ranked, tmp_path, fit, reduction, gamma):
    first, *_ = trained("copr", ranked, tmp_path / "out", f"fit={fit}", f"reduction={reduction}", f"gamma={gamma}",
                        "beta=0.5", "per_device_train_batch_size=12", "max_steps=1", "keep=0")  # fmt: skip
    _, sets = sets_of("copr", ranked)
    closed = []
    for row in range(len(sets)):
        at = slice(int(sets.bounds[row]), int(sets.bounds[row + 1]))
        n = np.array([len(t) for t in sets.tokens[at]]) if reduction == "mean" else 1
        ref = torch.from_numpy(sets.logps[at] / n).log_softmax(0)
        r = torch.tensor([draw_scale(sets.rows.uid[row], len(ref), 42)], dtype=torch.float64)
        a = advantages(torch.from_numpy(sets.rank[at].astype(np.int64))[None], r)[0] / 0.5
        best = (ref + a).log_softmax(0)  # P*
        gap = ref - best
        closed.append((gap.square().mean() if fit == "mse" else -(best.exp() * gap).sum()).item())
    assert first["fit"] == pytest.approx(np.mean(closed), rel=1e-3)
    assert first["loss"] == pytest.approx(np.mean(closed) + gamma * first["nll"], rel=1e-3)
    assert not (tmp_path / "out/buffer").exists(), "keep=0"


@pytest.fixture(scope="module")
def first_stage(ranked, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage") / "one"
    trained("copr", ranked, out, "keep=0.5", "beta=0.5")
    return out


def second(ranked, out, first_stage, *words):
    return trained("copr", ranked, out, f"model={first_stage / 'model'}", "reference=measure", "beta=0.5",
                   f"buffers=[{first_stage / 'buffer'}]", "mixture={current: 0.5, replay: 0.5}", *words)  # fmt: skip


def test_a_constraint_begins_satisfied_and_moves_its_lambda(ranked, first_stage, tmp_path):
    lines = [
        e
        for e in second(ranked, tmp_path / "out", first_stage, "rate=1", "per_device_train_batch_size=4")
        if "loss" in e
    ]
    assert lines[0]["lambda/qa"] == 1.0
    # two of the buffer's six prompts, whose fits are unlike: less their own d_x they are 0 before the first update
    assert abs(lines[0]["constraint/qa"]) < 1e-3 < abs(lines[1]["constraint/qa"])
    sigma = 0.0
    for k, line in enumerate(lines, 1):  # ln λ ← ln λ + lr · λ · J^C
        sigma = min(5.0, max(-5.0, sigma + 1.0 * math.exp(sigma) * line["constraint/qa"]))
        state = load_file(tmp_path / f"out/checkpoint-{k}/method.safetensors")
        assert state["log_lambda"].item() == pytest.approx(sigma, abs=1e-4)


def test_d_is_the_fit_of_each_prompt_under_the_initial_parameters(ranked, first_stage, tmp_path):
    config, _ = load(CoprConfig, None, settings(
        ranked, "x", f"model={first_stage / 'model'}", "reference=measure", "beta=0.5",
        f"buffers=[{first_stage / 'buffer'}]"))  # fmt: skip
    tokenizer = open_tokenizer(config)
    stage = read_stage("copr", config, tokenizer, end_tokens(config, tokenizer), 1024)
    assert stage.tasks == ["qa"] and (stage.sets.source == 1).sum() == 6
    model = open_model(config)
    collate = collator(config, model, 0, False, [stage.sets])
    fill(config, stage.sets, model, collate, 4, seed=42)
    method_of(config, stage, model, None, collate, 4)
    for row in np.flatnonzero(stage.sets.source == 1):
        at = slice(int(stage.sets.bounds[row]), int(stage.sets.bounds[row + 1]))
        now = torch.from_numpy(stage.sets.logps[at]).log_softmax(0).numpy()  # measured under the same model
        assert stage.sets.start[row] == pytest.approx(((now - stage.sets.target[at]) ** 2).mean(), rel=1e-3)
    assert not stage.sets.start[stage.sets.source == 0].any()


def test_lambda_stays_while_the_policy_does(ranked, first_stage, tmp_path):
    """Steps that hold other rows of the buffer, of other fits and weights, do not move it: the learning rate is 0."""
    buffer = tmp_path / "buffer"
    shutil.copytree(first_stage / "buffer", buffer)
    manifest = read(buffer)
    weight = pl.Series("weight", [9.0, 1.0, 9.0, 1.0, 9.0, 1.0], dtype=manifest.samples["weight"].dtype)
    frames = {name: getattr(manifest, name) for name in TABLES}
    kept = {k: v for k, v in manifest.provenance.items() if k not in ("schema_version", "rows", "outputs")}
    write(buffer, frames | {"samples": manifest.samples.with_columns(weight)}, kept, "weights")
    facts = json.loads((buffer / "buffer.json").read_text())
    facts["manifest"] = sha256_file(buffer / "provenance.json")
    (buffer / "buffer.json").write_text(json.dumps(facts))
    lines = second(ranked, tmp_path / "out", first_stage, f"buffers={buffer}", "rate=1", "learning_rate=0",
                   "max_steps=6", "per_device_train_batch_size=2")  # fmt: skip
    found = [line["lambda/qa"] for line in lines if "lambda/qa" in line]
    # of fits of tens of nats², less d in place of each d_x, one step would make e^20 of it
    assert found == pytest.approx([1.0] * 6, abs=0.02)


def test_the_best_answer_is_the_best_of_those_that_are_there(ranked):
    config, sets = sets_of("copr", ranked)
    sets.rank[:] = np.where(sets.rank == 1, 7, sets.rank)
    model = open_model(config)
    batch = collator(config, model, 0, False, [sets]).batch(sets, [0, 1])
    for prompt in (0, 1):
        mine = batch["prompt"] == prompt
        ranks, best = batch["rank"][mine], batch["best"][mine]
        assert best.sum() == 1 and ((best > 0) == (ranks == ranks.min())).all()


def test_the_dual_resumes_bit_for_bit(ranked, first_stage, tmp_path):
    second(ranked, tmp_path / "whole", first_stage, "rate=1")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for late in checkpoints(tmp_path / "again")[1:]:
        shutil.rmtree(late)
    shutil.rmtree(tmp_path / "again/model")
    second(ranked, tmp_path / "again", first_stage, "rate=1")
    assert same(weights(tmp_path / "whole/model"), weights(tmp_path / "again/model"))
    a, b = (load_file(tmp_path / f"{n}/checkpoint-3/method.safetensors") for n in ("whole", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a) and a["log_lambda"].item() != 0


def test_what_buffers_are_for(ranked, first_stage, tmp_path):
    def logged(constraint, *words):
        lines = second(ranked, tmp_path / constraint, first_stage, f"constraint={constraint}", "rate=1", *words)
        return [line for line in lines if "loss" in line]

    fixed, replay = logged("fixed", "initial=2"), logged("replay")
    assert [line["lambda/qa"] for line in fixed] == [2, 2, 2]
    # L = (J + λ J^C)/(1 + λ) at every step
    for line in fixed:
        expected = (line["fit"] + line["nll"] + 2 * line["constraint/qa"]) / 3
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert not any(key.startswith(("lambda", "constraint")) for line in replay for key in line)
    assert all(line["loss"] == pytest.approx(line["fit"] + line["nll"], rel=1e-4) for line in replay)
    assert all("loss_origin/replay" in line for line in replay), "they are trained on"
    # none: as if there were no buffers
    words = (f"model={first_stage / 'model'}", "reference=measure", "beta=0.5")
    none = trained("copr", ranked, tmp_path / "none", *words, f"buffers={first_stage / 'buffer'}", "constraint=none")
    bare = trained("copr", ranked, tmp_path / "bare", *words)
    assert [line.get("loss") for line in none] == [line.get("loss") for line in bare]
    assert same(weights(tmp_path / "none/model"), weights(tmp_path / "bare/model"))


def test_violated_grows_satisfied_shrinks_and_steps_without_rows_leave_lambda_alone():
    def stepped(met, seen):
        method = Copr(tasks=["a"], log_lambda=torch.zeros(1), rate=0.5)
        method._met, method._seen = torch.tensor([met]), torch.tensor([seen])
        method.after_step(lambda value: 2 * value)  # two processes that met the same
        return method.log_lambda.item()

    assert stepped(0.1, True) == pytest.approx(0.5 * 0.2)
    assert stepped(-0.1, True) == pytest.approx(-0.1)
    assert stepped(0.1, False) == 0


def test_the_buffer_is_drawn_by_seed_and_uid_alone():
    uids = [f"{i:032x}" for i in range(40)]
    picked = {uids[i] for i in chosen(uids, 0.25, 3)}
    assert len(picked) == 10
    turned = uids[::-1]
    assert {turned[i] for i in chosen(turned, 0.25, 3)} == picked
    assert {uids[i] for i in chosen(uids, 0.25, 4)} != picked
    assert len(chosen(uids, 0.001, 0)) == 1 and chosen(uids, 0, 0) == []


@pytest.mark.parametrize(("name", "words", "match"), [
    ("copr", ["packing=true"], "`layout` decides"), ("dpo", ["too_long=truncate"], "too_long"),
    ("dpo", ["max_length=60", "too_long=error"], "do not fit into 60 tokens beside their prompt"),
    ("copr", ["buffers=[nowhere]"], "not a buffer"), ("copr", ["clamp=[5,-5]"], "must be an interval"),
    ("copr", ["initial=1000"], "must be an interval"), ("copr", ["buffers=[a,a]"], "one is named twice"),
    ("pbl", ["max_length=60", "too_long=error"], "a target of .* tokens|do not fit into 60 tokens"),
    ("dpo", ["attention=flex_attention"], "flex_attention has no backward pass without a GPU"),
])  # fmt: skip
def test_bad_settings(ranked, tmp_path, name, words, match):
    with pytest.raises(ValueError, match=match):
        trained(name, ranked, tmp_path / "out", *words)


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t.with_columns(log_target=pl.lit(float("nan"))), "no log-probability"),
    (lambda t: t.with_columns(log_target=pl.lit(3.0)), "no log-probability"),
    (lambda t: pl.concat([t, t.head(1)]), "not one log_target for each uid"),
    (lambda t: t.with_columns(more=pl.lit(1)), "not one log_target for each uid"),
    (lambda t: t.tail(-1), "has no row for completion"),
])  # fmt: skip
def test_a_buffer_is_read_strictly(ranked, first_stage, tmp_path, change, match):
    buffer = tmp_path / "buffer"
    shutil.copytree(first_stage / "buffer", buffer)
    change(pl.read_parquet(buffer / "targets.parquet")).write_parquet(buffer / "targets.parquet")
    with pytest.raises(InputError, match=r"targets.parquet"):  # edited
        second(ranked, tmp_path / "out", first_stage, f"buffers={buffer}")
    facts = json.loads((buffer / "buffer.json").read_text())
    facts["targets"] = sha256_file(buffer / "targets.parquet")
    (buffer / "buffer.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=match):  # and signed again
        second(ranked, tmp_path / "out", first_stage, f"buffers={buffer}")


def test_buffers_that_would_hold_nothing_are_refused(ranked, first_stage, tmp_path):
    shutil.copytree(first_stage / "buffer", tmp_path / "copy")
    for words, match in (
        ([f"buffers=[{first_stage / 'buffer'},{tmp_path / 'copy'}]"], "are the same"),
        ([f"buffers={first_stage}"], "did you mean .*buffer"),
        (["mixture={current: 1, replay: 0}"], "nothing would hold the older tasks"),
        (["constraint=none"], "COPR's replay are its `buffers`"),
        (["max_length=40", "too_long=drop", f"data={ranked / 'data'}"], "fit|fits"),
    ):
        with pytest.raises(InputError, match=match):
            second(ranked, tmp_path / "out", first_stage, *words)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("checkpoint-*"))
    assert check(first_stage / "buffer") == []


def test_what_stands_where_the_buffer_goes_is_refused(ranked, first_stage, tmp_path):
    for name in ("file", "link"):
        (tmp_path / name).mkdir()
    (tmp_path / "file/buffer").write_text("mine")
    (tmp_path / "link/buffer").symlink_to(first_stage)
    for name in ("file", "link"):
        with pytest.raises(InputError, match="buffer in it is no folder of a run"):
            trained("copr", ranked, tmp_path / name)


@pytest.fixture(scope="module")
def mixed(ranked):
    """A stream of the ranked questions and rows without ranked answers; and one of tied answers."""
    rows = [{"instruction": f"Say {w}.", "output": w} for w in ("yes", "no", "maybe")]
    (ranked / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tied = [{"prompt": f"Say {w}.", "candidates": [{"text": w, "rank": 1}, {"text": w + w, "rank": 1}]} for w in "abc"]
    (ranked / "tied.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tied))
    qa = {"name": "qa", "path": str(ranked / "rows.jsonl"), "format": "ranked", "columns": {"prompt": "question"}}
    plain = {"name": "plain", "path": str(ranked / "plain.jsonl"), "format": "alpaca"}
    ties = {"name": "tied", "path": str(ranked / "tied.jsonl"), "format": "ranked"}
    for name, tasks in (("last", [qa, plain]), ("first", [plain, qa]), ("tied", [ties]), ("some", [qa, ties])):
        replay = {"selector": "random", "ratio": 100} if len(tasks) > 1 else {"selector": "none"}
        build({"tasks": tasks, "replay": replay, "out": str(ranked / f"m-{name}")})
    return ranked


def test_prompts_without_ranked_answers_are_listed_or_the_run_refused(mixed, tmp_path):
    with pytest.raises(InputError, match="no prompt of the current task has two ranked answers"):
        trained("dpo", mixed, tmp_path / "last", f"data={mixed / 'm-last'}", "reference=measure")
    trained("dpo", mixed, tmp_path / "first", f"data={mixed / 'm-first'}", "reference=measure", "max_steps=1")
    listed = pl.read_parquet(tmp_path / "first/left_out.parquet")
    assert listed.filter(task="plain").height == 3
    assert listed["reason"].str.contains("0 usable answers").any()


def test_tied_answers_make_no_pair_and_count_nothing(mixed, tmp_path):
    with pytest.raises(InputError, match="the answers of every prompt are tied"):
        trained("dpo", mixed, tmp_path / "tied", f"data={mixed / 'm-tied'}", "reference=measure")
    first, *_ = trained("dpo", mixed, tmp_path / "some", f"data={mixed / 'm-some'}", "reference=measure", "max_steps=1",
                        "per_device_train_batch_size=15")  # fmt: skip
    assert first["preference"] == pytest.approx(math.log(2), abs=1e-4)  # not ln 2 · 12/15
    lines = trained("copr", mixed, tmp_path / "copr", f"data={mixed / 'm-tied'}", "reference=measure", "max_steps=1")
    assert lines[0]["fit"] == pytest.approx(0, abs=1e-6)  # P* is the normalised reference


def test_copr_evaluates_old_tasks_too(mixed, ranked, tmp_path):
    lines = trained("copr", ranked, tmp_path / "out", f"eval_data={mixed / 'm-some'}", "eval_strategy=steps",
                    "eval_steps=1", "max_steps=1", "reference=measure")  # fmt: skip
    assert {"eval_loss_task/qa", "eval_loss_task/tied", "eval_accuracy"} <= {k for line in lines for k in line}


def test_settings_are_listed_with_what_they_mean():
    rows = {name: (default, what) for name, default, what in described("copr")}
    assert rows["beta"][0] == "0.1" and "P*" in rows["beta"][1] and rows["data"][0] == "…"
    assert all(what for _, what in rows.values())
    assert "kl.weight" in {name for name, *_ in described("dpo")} and "metric" in {n for n, *_ in described("eval")}
    with pytest.raises(KeyError, match="copr"):
        described("ppo")
    for words, match in ((["lr=1"], "learning_rate"), (["keep=1"], "it belongs to train copr")):
        with pytest.raises(InputError, match=match):
            load(DpoConfig, None, ["model=a", "data=b", "out=c", *words])


def test_a_manifest_without_sets_is_told(place, tmp_path):
    for name, match in (("copr", "no prompt has two ranked answers"), ("pbl", "no answer has a similarity")):
        words = [f"model={STARTER}", f"data={place / 'data'}", f"out={tmp_path / 'o'}"]
        with pytest.raises(InputError, match=match):
            run(name, *load(CONFIGS[name], None, words), quiet=True)
