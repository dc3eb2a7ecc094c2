"""The stages that ask the policy, through the whole build: real shipped rows, the real starter, real processes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import polars as pl
import pytest
from policy_runs import (
    AUGMENT,
    BUCKETS,
    FACTS,
    RANKED,
    ROLLOUTS,
    STARTER,
    Notes,
    as_file,
    forged,
    judged_by,
    real,
    settings,
    task,
)
from test_build import ROOT, bytes_of, curate, fails

from curate.build import build
from curate.config import BuildConfig, EmbedConfig, ModelConfig
from curate.errors import InputError
from curate.explain import explain
from curate.manifest import TABLES, check, read, sequence_logp
from curate.manifest.schema import completion_uid, sample_uid
from curate.models import LocalModel, Prompt, open_embedder
from curate.overrides import write_overrides

# --- the demo, and builds that are cut off ---

FEW = ["rollouts.per_task=2", "rollouts.k=2", "rollouts.max_new_tokens=6", "replay.budget=34", "tags.cluster=false",
       "augment.per_task=1", "augment.max_new_tokens=12", "augment.templates.again=Say it again. {text}"]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = curate("build", ROOT / "examples/demo/config.yaml", *FEW, f"out={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_demo_builds_and_is_sound(demo):
    folder, done = demo
    for stage in ("rollouts", "rewards", "score", "rewrite", "MI"):
        assert f"✓ {stage}" in done.stderr
    assert "five buckets" in done.stdout
    assert "sound" in curate("check", folder / "run").stdout
    manifest = read(folder / "run")
    assert all(getattr(manifest, name).height for name in TABLES)
    assert set(manifest.completions["origin"]) == {"policy", "human"}
    assert manifest.augmentations.height == 17  # a row of each older task


def test_the_demo_loads_with_datasets(demo, tmp_path):
    from datasets import load_dataset

    run = demo[0] / "run"
    data = load_dataset(str(run), "completions", split="train", cache_dir=str(tmp_path))
    assert data.num_rows == read(run).completions.height
    assert data["uid"] == read(run).completions["uid"].to_list()


def test_the_demo_again_is_cached_and_changes_nothing(demo):
    folder, _ = demo
    before = {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()}
    done = curate("build", ROOT / "examples/demo/config.yaml", *FEW, f"out={folder}/run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cached") == len([line for line in done.stderr.splitlines() if line.startswith("✓")])
    assert {f: f.stat().st_mtime_ns for f in (folder / "run").iterdir()} == before


# Everything is imported once, and no thread has begun by then, so that each fork is a fresh process in no time.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import curate.blocks, curate.build, curate.cli, curate.models.decode, curate.tags, rouge_score.rouge_scorer
import transformers.models.llama.modeling_llama

write, seen = curate.store._write, []

def until(stage, number):
    def wrapped(*given):
        folder = given[-1]
        seen.append(folder.parent.name)
        if folder.parent.name == stage and seen.count(stage) == number:
            (folder / curate.blocks.RESULT).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(*given)
    curate.store._write = wrapped

moments, cache = json.loads(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["curate", *sys.argv[3:]]
for moment in [*moments, None]:
    if not (process := os.fork()):
        if moment:
            until(*moment)
        try:
            curate.cli.main()
        finally:
            os._exit(int(getattr(sys.exc_info()[1], "code", 99) or 0))
    _, status = os.waitpid(process, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), len(list(cache.glob("generate/[!.]*")))]))
"""


@pytest.fixture(scope="module")
def killed(small, folder, tmp_path_factory):
    """A build that is killed four times, each time in a later stage, in another folder: what each process left."""
    elsewhere = tmp_path_factory.mktemp("killed")
    for file in folder.glob("*.jsonl"):
        shutil.copy(file, elsewhere)
    (elsewhere / "starter").symlink_to(STARTER)
    wanted = settings(elsewhere, "run", rollouts=ROLLOUTS, augment=AUGMENT)
    as_file({**wanted, "out": "runs/a", "cache": "cache"}, elsewhere / "config.yaml")
    # in the second block of rollouts, in the second block of rewrites, in the first of answers, in the scores
    moments = [("generate", 2), ("generate", 4), ("generate", 2), ("mi", 1)]
    command = [sys.executable, "-c", KILLER, json.dumps(moments), "cache", "build", "config.yaml", "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return elsewhere, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_in_every_stage_it_ends_with_the_same_bytes(killed, small):
    elsewhere, steps = killed
    assert [code for code, _ in steps] == [-signal.SIGKILL] * 4 + [0]
    # 14 prompts in blocks of 6 are 3 blocks, 12 rewrites are 2: each process has kept what the ones before it did
    assert [kept for _, kept in steps][:3] == [1, 4, 5]
    assert bytes_of(elsewhere / "runs/a") == bytes_of(small.folder)


def test_nothing_half_written_stays_in_the_cache(killed):
    assert not list((killed[0] / "cache").glob("*/.*"))


# --- buckets ---


def moments(values):
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def expected_buckets(rolled, population, logp, k):
    """CPPO's Table 1, by hand: z of the log-probability and of the reward over the population."""
    rows = rolled.to_dicts()
    found = {}
    for row in rows:
        others = [r for r in rows if population == "all" or r[population] == row[population]]
        z = []
        for of in (lambda r: sequence_logp(r["token_logps"], logp), lambda r: r["reward"]):
            mean, deviation = moments([of(r) for r in others])
            z.append((of(row) - mean) / deviation if deviation > 1e-12 else 0.0)
        p, r = z
        name = {(1, 1): "high_performance", (1, -1): "overfitting", (-1, 1): "high_variance", (-1, -1): "noisy"}
        found[row["uid"]] = name.get(((p > k) - (p < -k), (r > k) - (r < -k)), "normal")
    return found


@pytest.mark.parametrize(("population", "logp"), [("task", "mean"), ("all", "mean"), ("batch", "mean"), ("all", "sum")])
def test_buckets_and_their_counts_are_a_recount(folder, small, population, logp):
    out = f"buckets-{population}-{logp}"
    rule = {"k": 0.3, "population": population, "logp": logp}
    manifest = build(settings(folder, out, rollouts=judged_by("length"), buckets=rule))
    rolled = manifest.completions.filter(origin="policy")
    assert check(folder / out) == []
    assert rolled.height == 14 * 3
    assert rolled["batch"].n_unique() == 3
    expected = expected_buckets(rolled, population, logp, 0.3)
    assert dict(rolled.select("uid", "bucket").iter_rows()) == expected
    assert len(set(expected.values())) > 2, "the rows show nothing"
    for row in manifest.tasks.iter_rows(named=True):
        mine = rolled.filter(task=row["task"])["bucket"].to_list()
        assert [row[b] for b in BUCKETS] == [mine.count(b) for b in BUCKETS]
        assert row["rollouts"] == len(mine) == sum(row[b] for b in BUCKETS)


def test_one_population_has_one_entry_in_the_provenance(folder, small):
    facts = small.provenance["buckets"]
    assert facts["rule"] == {"k": 0.5, "logp": "mean", "population": "task"}
    assert facts["statistics"].keys() == {"poem", "tense", "facts"}
    rolled = small.completions.filter(origin="policy", task="facts")
    mean, deviation = moments(rolled["reward"].to_list())
    stats = facts["statistics"]["facts"]
    assert stats["n"] == rolled.height == 18
    assert (stats["reward_mean"], stats["reward_std"]) == pytest.approx((mean, deviation), abs=1e-12)


# --- on-policy replay ---


def by_hand(rolled, least):
    """prompt uid -> the finished rollout with the highest reward ≥ least; of equals the likelier, then the first."""
    found = {}
    for uid in rolled["prompt_uid"].unique():
        rows = [r for r in rolled.filter(prompt_uid=uid).to_dicts() if r["finished"] and r["text"].strip()]
        rows = [r for r in rows if r["reward"] >= least]
        if rows:
            found[uid] = max(rows, key=lambda r: (r["reward"], sequence_logp(r["token_logps"])))["text"]
    return found


@pytest.fixture(scope="module")
def plain(folder, small):
    """Rollouts judged by their length, answers of the source: what on-policy replay starts from."""
    return build(settings(folder, "plain", rollouts=judged_by("length")))


@pytest.mark.parametrize("fallback", ["gold", "drop"])
def test_replayed_rows_carry_the_best_rollout(folder, plain, fallback):
    replay = {"completions": "policy", "min_reward": 4, "fallback": fallback}
    manifest = build(settings(folder, f"on-policy-{fallback}", rollouts=judged_by("length"), replay=replay))
    assert check(manifest.folder) == []
    old = {row["uid"]: row for row in plain.samples.filter(origin="replay").iter_rows(named=True)}
    rolled = plain.completions.filter(pl.col("prompt_uid").is_in(list(old)))
    best = by_hand(rolled, 4)
    assert 0 < len(best) < 8, "the rows show nothing"
    new = {(r["task"], r["row"]): r for r in manifest.samples.filter(origin="replay").iter_rows(named=True)}
    assert len(new) == (8 if fallback == "gold" else len(best))
    for uid, row in old.items():
        sample = new.get((row["task"], row["row"]))
        if uid in best:
            assert sample["completion"] == [{"role": "assistant", "content": best[uid]}]
            assert (sample["prompt"], sample["references"]) == (row["prompt"], row["references"])
            assert sample["uid"] == sample_uid(row["task"], row["prompt"], sample["completion"], row["references"])
            assert sample["written_by"] == "policy"
            answers = manifest.completions.filter(prompt_uid=sample["uid"])
            gold = answers.filter(origin="gold").to_dicts()
            assert [g["text"] for g in gold] == [row["references"][0]]
            assert gold[0]["uid"] == completion_uid(sample["uid"], "gold", row["references"][0])
            mine = rolled.filter(prompt_uid=uid).select("text", "reward", "token_logps", "rank").sort("text", "reward")
            assert answers.filter(origin="policy").select(mine.columns).sort("text", "reward").equals(mine)
        elif fallback == "gold":
            assert {**sample, "written_by": "gold"} == {**row, "written_by": "gold"}
            assert manifest.completions.filter(prompt_uid=uid, origin="gold").height == 0
        else:
            drop = manifest.drops.filter(uid=uid).row(0, named=True)
            assert (drop["step"], drop["row"], drop["task"]) == ("rollout", row["row"], row["task"])
            assert drop["reason"] == "no rollout is finished and not empty with a reward ≥ 4"
            assert drop["score"] == rolled.filter(prompt_uid=uid)["reward"].max()
    left_out = 0 if fallback == "gold" else 8 - len(best)
    assert manifest.drops.filter(step="rollout").height == left_out
    assert manifest.provenance["on_policy"] == {"replaced": len(best), "dropped": left_out}
    assert manifest.samples.filter(origin="current").equals(plain.samples.filter(origin="current"))
    gone = forged(manifest.folder, folder / f"forged-{fallback}", "completions",
                  pl.when(origin="gold").then(pl.lit("human")).otherwise("origin").alias("origin"))  # fmt: skip
    assert any("the source's answer to prompt_uid" in fault for fault in check(gone))
    card = (manifest.folder / "README.md").read_text()
    assert f"{len(best)} replayed rows carry the policy's own best answer, {left_out} were left out" in card
    rollouts = manifest.completions.filter(origin="policy")
    assert f"{rollouts.height} completions of {rollouts['prompt_uid'].n_unique()} prompts" in card


def test_explain_tells_of_on_policy_rows(folder, plain):
    replay = {"completions": "policy", "min_reward": 4, "fallback": "drop"}
    manifest = build(settings(folder, "told", rollouts=judged_by("length"), replay=replay))
    swapped = manifest.samples.filter(written_by="policy").row(0, named=True)
    story = explain(manifest, swapped["uid"])
    assert "the policy's own best finished rollout" in story and "Rollouts: 3 by the policy" in story
    dropped = manifest.drops.filter(pl.col("score") > 0, step="rollout").row(0, named=True)
    done = curate("explain", manifest.folder, dropped["uid"])
    assert (
        f"no rollout is finished and not empty with a reward ≥ 4; the best reward was {dropped['score']:g}"
        in done.stdout
    )


def test_on_policy_replay_of_ranked_rows_keeps_their_answers(folder):
    wanted = settings(
        folder, "on-policy-ranked", tasks=[task("ranked", **RANKED), task("facts", **FACTS)],
        replay={"budget": 3, "completions": "policy", "min_reward": 0}, augment={"max_new_tokens": 4},
        rollouts={"k": 2, "max_new_tokens": 16, "origins": ["current"]}, candidates={"score": False},
    )  # fmt: skip
    manifest = build(wanted)
    assert check(manifest.folder) == []
    swapped = manifest.samples.filter(written_by="policy", origin="replay")
    for uid in swapped["uid"]:
        origins = manifest.completions.filter(prompt_uid=uid)["origin"].to_list()
        assert sorted(origins) == ["gold"] + 4 * ["human"] + 2 * ["policy"]
    # rollouts.origins says current, but replayed prompts must be answered to be replaced
    assert set(manifest.completions.filter(origin="policy")["task"]) == {"ranked", "facts"}
    assert set(manifest.augmentations["parent_uid"]) <= set(manifest.samples["uid"])


# --- selectors that go by the loss ---


@pytest.fixture(scope="module")
def every_row(folder):
    """All rows of the older tasks, in samples."""
    return build(settings(folder, "every-row", replay={"budget": 21})).samples.filter(origin="replay")


@pytest.fixture(scope="module")
def noisy(folder):
    """A second model: the starter with a little seeded noise in every weight."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draws) * weight.std() * 0.05)
    model.save_pretrained(folder / "noisy")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "noisy")
    return folder / "noisy"


def losses_of(rows, model):
    """uid -> mean −log π a token, one row at a time."""
    scorer = LocalModel(ModelConfig(model=str(model), batch_size=1))
    scored = scorer.score([(Prompt(r["uid"], r["prompt"]), r["completion"]) for r in rows.iter_rows(named=True)])
    return {uid: -sum(c.token_logps) / len(c.token_logps) for uid, c in zip(rows["uid"], scored, strict=True)}


def most(rows, score, task, n):
    mine = [uid for uid in rows.filter(task=task)["uid"]]
    return set(sorted(mine, key=lambda uid: -score[uid])[:n])


def test_highest_loss(folder, every_row):
    wanted = settings(folder, "highest", replay={"selector": "highest_loss", "budget": 8})
    manifest = build(wanted)
    assert check(manifest.folder) == []
    loss = losses_of(every_row, STARTER)
    for name in ("poem", "tense"):
        drawn = manifest.samples.filter(origin="replay", task=name)
        assert set(drawn["uid"]) == most(every_row, loss, name, 4)
    replayed = manifest.samples.filter(origin="replay")
    assert dict(replayed.select("uid", "loss").iter_rows()) == pytest.approx(
        {u: loss[u] for u in replayed["uid"]}, abs=1e-4
    )
    assert replayed["reference_loss"].is_null().all()
    assert manifest.samples.filter(origin="current")["loss"].is_null().all()
    left = manifest.drops
    assert dict(left.select("uid", "score").iter_rows()) == pytest.approx({u: loss[u] for u in left["uid"]}, abs=1e-4)
    assert "Loss: " in explain(manifest, replayed["uid"][0])
    path = as_file(wanted, folder / "highest.yaml")
    done = curate("build", path, "--dry-run", "--json")
    steps = {step["stage"]: step for step in json.loads(done.stdout)["plan"]}
    assert steps["losses"]["size"] == "21 rows × 1 models"
    assert steps["sample"]["cached"] == 1


def test_perplexity_ratio(folder, every_row, noisy):
    replay = {"selector": "perplexity_ratio", "budget": 8}
    manifest = build(
        settings(folder, "ratio", replay=replay, policy={"model": "noisy"}, reference={"model": "starter"})
    )
    assert check(manifest.folder) == []
    loss, reference = losses_of(every_row, noisy), losses_of(every_row, STARTER)
    ratio = {uid: math.exp(loss[uid] - reference[uid]) for uid in loss}
    mean = {}
    for name in ("poem", "tense"):
        differences = [loss[uid] - reference[uid] for uid in every_row.filter(task=name)["uid"]]
        mean[name] = math.exp(sum(differences) / len(differences))  # exp(mean(after - before))
    tasks = {row["task"]: row for row in manifest.tasks.iter_rows(named=True)}
    for name in mean:
        assert tasks[name]["share"] == pytest.approx(8 * mean[name] / sum(mean.values()), abs=1e-3)
        drawn = manifest.samples.filter(origin="replay", task=name)
        assert set(drawn["uid"]) == most(every_row, ratio, name, tasks[name]["granted"])
    replayed = manifest.samples.filter(origin="replay")
    both = {u: (a, b) for u, a, b in replayed.select("uid", "loss", "reference_loss").iter_rows()}
    assert all(both[u] == pytest.approx((loss[u], reference[u]), abs=1e-4) for u in both)
    scores = dict(manifest.drops.select("uid", "score").iter_rows())
    assert scores == pytest.approx({u: ratio[u] for u in scores}, rel=1e-3)
    assert manifest.provenance["models"].keys() == {"policy", "reference"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"policy": None, "replay": {"selector": "highest_loss"}}, "`replay.selector: highest_loss` needs `policy"),
        ({"replay": {"selector": "perplexity_ratio"}}, "needs `reference"),
        ({"policy": None, "rollouts": {}}, "`rollouts` needs `policy"),
        ({"policy": None, "augment": {}}, "`augment` needs `policy"),
        ({"replay": {"completions": "policy", "min_reward": 0}}, "needs `rollouts`"),
        ({"replay": {"completions": "policy"}}, "needs `replay.min_reward`"),
        ({"replay": {"min_reward": 0.5}}, "belong to `replay.completions: policy`"),
        ({"candidates": {"similarity": True}}, "needs `rollouts`"),
        ({"rollouts": {"temperature": 0}}, "temperature 0 writes the same completion 4 times"),
        ({"policy": {"model": "nowhere"}, "rollouts": {}}, "policy.model 'nowhere'"),
        ({"policy": {"model": "poem.jsonl"}, "rollouts": {}}, "policy.model 'poem.jsonl'"),
        ({"policy": None, "tags": {"tagger": "llm"}, "replay": {"selector": "inscl"}}, "without `tags.model`"),
    ],
)
def test_what_a_stage_needs_is_said_before_anything_is_read(folder, sections, words):
    with pytest.raises(InputError) as caught:
        build(settings(folder, "refused", **sections))
    assert words in str(caught.value)
    assert not (folder / "refused").exists()


# --- ranked sets ---


def test_answers_that_people_ranked(folder):
    tasks = [task("ranked", **RANKED), task("pairs", format="preference"), task("facts", **FACTS)]
    manifest = build(settings(folder, "ranked", tasks=tasks, replay={"budget": 10}))
    assert check(manifest.folder) == []
    assert set(manifest.completions["bucket"]) == {None}
    human, pairs = (manifest.completions.filter(task=name) for name in ("ranked", "pairs"))
    assert (set(human["origin"]), set(pairs["origin"])) == ({"human"}, {"annotated"})
    source = real("ranked/qa_feedback", 10)[5:]
    assert any(len({c["rank"] for c in row["candidates"]}) < 4 for row in source), "no ties, the rows show nothing"
    asked = dict(manifest.samples.select("uid", pl.col("prompt").list.last().struct.field("content")).iter_rows())
    for row in source:
        uid = next(u for u, text in asked.items() if text == row["question"])
        mine = {t: (r, s) for t, r, s in human.filter(prompt_uid=uid).select("text", "rank", "reward").iter_rows()}
        given = [c["rank"] for c in row["candidates"]]  # the source counts on behind a tie, a manifest skips
        assert mine == {c["text"]: (1 + sum(o < c["rank"] for o in given), c["score"]) for c in row["candidates"]}
    assert pairs.group_by("prompt_uid").agg(pl.col("rank").sort())["rank"].to_list() == [[1, 2]] * 5
    assert set(human["reward_id"]) == {"source score"} and set(pairs["reward_id"]) == {None}
    # measured under the policy: what the model itself says, one answer at a time
    scorer = LocalModel(ModelConfig(model=str(STARTER), batch_size=1))
    prompts = {uid: Prompt(uid, prompt) for uid, prompt in manifest.samples.select("uid", "prompt").iter_rows()}
    rows = manifest.completions.sort("uid").gather_every(3).to_dicts()
    found = scorer.score([(prompts[r["prompt_uid"]], [{"role": "assistant", "content": r["text"]}]) for r in rows])
    for row, completion in zip(rows, found, strict=True):
        assert (row["token_ids"], row["n_tokens"]) == (completion.token_ids, completion.n_tokens)
        assert row["token_logps"] == pytest.approx(completion.token_logps, abs=1e-4)
        assert (row["policy"], row["tokenizer"]) == (scorer.fingerprint, scorer.tokenizer_fingerprint)
        assert row["temperature"] is row["finished"] is row["batch"] is None
    assert manifest.provenance["scored"] == {"answers": 30, "skipped": []}


def test_ranks_follow_rewards_and_share_ties(small):
    rolled = small.completions.filter(origin="policy")
    ties = 0
    for uid in rolled["prompt_uid"].unique():
        rewards = rolled.filter(prompt_uid=uid)["reward"].to_list()
        expected = [1 + sum(other > mine for other in rewards) for mine in rewards]
        assert rolled.filter(prompt_uid=uid)["rank"].to_list() == expected
        ties += len(set(expected)) < 3
    assert ties, "the rows show nothing"


def test_equal_rewards_everywhere(folder, small):
    manifest = build(settings(folder, "equal", rollouts=judged_by("all_the_same"), buckets={"population": "all"}))
    assert check(manifest.folder) == []
    assert set(manifest.completions["rank"]) == {1}
    assert set(manifest.completions["bucket"]) == {"normal"}
    assert manifest.provenance["buckets"]["statistics"]["all"]["reward_std"] == 0  # 42 × 0.1, to the last bit


def test_rewards_that_are_no_numbers(folder, small):
    wanted = settings(folder, "unknown", rollouts=judged_by("nobody_knows"))
    done = curate("build", as_file(wanted, folder / "unknown.yaml"))
    assert done.returncode == 0, done.stderr
    manifest = read(folder / "unknown")
    unknown = manifest.completions.filter(pl.col("reward").is_null())
    assert 0 < unknown.height < 42
    assert f"{unknown.height} rewards are not a number" in done.stderr
    assert unknown["rank"].is_null().all()
    assert set(unknown["bucket"]) == {"normal"}
    assert set(unknown["reward_id"]) == set(manifest.completions["reward_id"])
    assert manifest.provenance["rollouts"]["no_reward"] == unknown.height
    assert check(manifest.folder) == []
    assert f"{unknown.height} rewards are not a number" in (manifest.folder / "README.md").read_text()


def test_a_reward_model_with_three_labels_is_refused(folder, small):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    head = LlamaConfig(vocab_size=6144, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    for labels in (3, 1):
        head.num_labels = labels
        LlamaForSequenceClassification(head).save_pretrained(folder / f"labels-{labels}")
        AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / f"labels-{labels}")
    reward = {"kind": "model", "model": "labels-3"}
    refused = as_file(settings(folder, "labels", rollouts={**ROLLOUTS, "reward": reward}), folder / "labels.yaml")
    fails(curate("build", refused), "3 labels", "num_labels=1")
    assert not (folder / "labels").exists()
    one = build(settings(folder, "labels", rollouts={**ROLLOUTS, "reward": {**reward, "model": "labels-1"}}))
    assert check(one.folder) == []
    assert one.completions["reward"].n_unique() > 10


def test_one_rollout_a_prompt(folder):
    rollouts = {"k": 1, "temperature": 0, "per_task": 2, "max_new_tokens": 4}
    manifest = build(settings(folder, "one", rollouts=rollouts))
    assert check(manifest.folder) == []
    assert manifest.tasks["rollouts"].to_list() == [2, 2, 2]
    assert set(manifest.completions["rank"]) == {1}
    assert set(manifest.completions["temperature"]) == {0.0}


# --- align and conflict ---


def test_sides_follow_the_threshold(folder, compared):
    rolled = compared.completions.filter(origin="policy")
    target = dict(compared.samples.select("uid", pl.col("references").list.first()).iter_rows())
    embedder = open_embedder(EmbedConfig.model_validate({}))
    texts = sorted({*rolled["text"], *target.values()})
    vector = dict(zip(texts, embedder.encode(texts), strict=True))
    for row in rolled.iter_rows(named=True):
        if not row["text"].strip():
            assert row["similarity"] is row["side"] is None
            continue
        cosine = float(vector[row["text"]] @ vector[target[row["prompt_uid"]]])
        assert row["similarity"] == pytest.approx(cosine, abs=1e-5)
        assert row["side"] == ("align" if row["similarity"] >= 0.2 else "conflict")
    assert {"align", "conflict"} <= set(rolled["side"])


def test_another_threshold_moves_sides_and_embeds_nothing(folder, compared, monkeypatch):
    def refuse(*_):
        raise AssertionError("a text was embedded again")

    monkeypatch.setattr("curate.models.embedder.SentenceModel.encode", refuse)
    similarities = compared.completions["similarity"].drop_nulls().sort()
    threshold = similarities[len(similarities) // 2]  # one that is there: ≥ is align
    candidates = {"similarity": True, "threshold": threshold}
    manifest = build(settings(folder, "threshold", rollouts=ROLLOUTS, candidates=candidates))
    assert check(manifest.folder) == []
    moved = manifest.completions.filter(pl.col("similarity") == threshold)
    assert moved.height and set(moved["side"]) == {"align"}
    assert (manifest.completions["side"] == "align").sum() == (similarities >= threshold).sum()


# --- models behind a server ---


# --- buckets that a person gave ---


def test_a_bucket_by_hand_is_honoured_and_told(folder):
    """The rule and its statistics stay; one rollout is taken for something else, and everybody can see that."""
    first = build(settings(folder, "by-rule", rollouts=judged_by("length")))
    rolled = first.completions.filter(origin="policy")
    row = rolled.row(0, named=True)
    new = "noisy" if row["bucket"] != "noisy" else "normal"
    write_overrides(folder / "hand.jsonl", {row["uid"]: new, "0" * 32: "normal"}, "the judge was wrong")
    screen = Notes()
    second = build(BuildConfig.parse(settings(
        folder, "by-hand", rollouts=judged_by("length"), buckets={"overrides": "hand.jsonl"})), screen)  # fmt: skip
    assert any("1 of 2 overrides name no rollout of this build" in note for note in screen.notes)
    a, b = (dict(m.completions.select("uid", "bucket").iter_rows()) for m in (first, second))
    assert {uid for uid in a if a[uid] != b[uid]} == {row["uid"]} and b[row["uid"]] == new
    assert second.provenance["buckets"]["overrides"] == {row["uid"]: new}
    assert second.provenance["buckets"]["statistics"] == first.provenance["buckets"]["statistics"]
    assert check(folder / "by-hand") == []
    assert "given by hand (buckets.overrides): 1" in explain(second, row["prompt_uid"])
    assert f"Bucket: {new}, given by hand" in explain(second, row["uid"])
    told = explain(first, row["uid"])
    assert f"Reward: {row['reward']:g}" in told and f"Bucket: {row['bucket']}, as z_P = " in told
    assert row["prompt_uid"] in told and "a rollout of" in told
    task = second.tasks.filter(task=row["task"]).row(0, named=True)
    assert task[new] == first.tasks.filter(task=row["task"])[new].item() + 1
    bad = forged(folder / "by-hand", folder / "bad", provenance=lambda p: p["buckets"]["overrides"].clear())
    assert any("rule and rollouts give" in fault for fault in check(bad))
    write_overrides(folder / "hand.jsonl", {row["uid"]: row["bucket"]})
    third = build(settings(folder, "by-hand", rollouts=judged_by("length"), buckets={"overrides": "hand.jsonl"}))
    assert dict(third.completions.select("uid", "bucket").iter_rows()) == a, "an edited file builds anew"


def test_overrides_that_cannot_be_used_are_found_first(folder):
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read"):
        build(settings(folder, "x", rollouts=judged_by("length"), buckets={"overrides": "gone.jsonl"}))
    with pytest.raises(InputError, match=r"`buckets\.overrides` needs `rollouts`"):
        build(settings(folder, "x", buckets={"overrides": "gone.jsonl"}))
    assert not (folder / "x").exists()
