"""Manifest to batches: which tokens, in which order, which of them are learnt, and that Trainer is fed just that."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.build import build
from curate.config import BuildConfig
from curate.errors import InputError
from curate.manifest import ManifestError, read
from curate.manifest.schema import COMPLETIONS
from curate.models import Prompt
from curate.models.chat import answer_ids, prompt_ids
from curate.models.local import tokenizer_fingerprint
from train.data import LISTED, Examples, check_fingerprints, truncated
from train.mixing import Mixture, Turns
from train.packing import Collator, Items, Packing, step_rows

ROOT = Path(__file__).parent.parent.parent
SUPERNI = ROOT / "examples/superni"
END, PAD = 1, 0  # of the starter's tokenizer

# a template with tools and messages without content, as tool callers have it
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}call {{ c | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [("user", "Name a colour."), ("assistant", "Red."), ("user", "Another one?"), ("assistant", "Dark blue.")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
DOCUMENT = "The river rises in the hills, and nobody there has ever measured how deep it is."


def tokenizer_of(**changed):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/starter", local_files_only=True)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tokenizer_of()


def built(folder, tasks, **replay):
    return build(
        BuildConfig.model_validate(
            {"name": "data", "tasks": tasks, "replay": {"selector": "uniform", **replay}, "out": str(folder / "run"),
             "cache": str(folder / "cache"), "base": str(folder)}
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """Real rows: mathematics as the current task, 30 rows of two older ones."""
    names = ("classification", "code", "mathematics")
    tasks = [{"name": n, "path": str(SUPERNI / f"{n}.jsonl.gz"), "format": "superni", "split": "train"} for n in names]
    return built(tmp_path_factory.mktemp("shipped"), tasks, budget=30)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """A conversation of several turns, one that calls a tool, and a document; the document is the current task."""
    folder = tmp_path_factory.mktemp("mixed")
    called = [{"role": "user", "content": "How is Oslo?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rows = {
        "talk": {"messages": [{"role": role, "content": text} for role, text in TALK]},
        "tools": {"messages": called, "tools": [TOOL]},
        "news": {"text": DOCUMENT},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    tasks = [{"name": n, "path": f"{n}.jsonl", "format": "text" if n == "news" else "chat"} for n in rows]
    return built(folder, tasks, budget=2)


@pytest.fixture(scope="session")
def real(shipped, tokenizer):
    return Examples.of(shipped, tokenizer)


def toy(lengths, origins=None, weights=None, first=None):
    """Examples without a manifest: token k of row i is 1000 i + k, and its uid is the number i."""
    lengths, n = np.array(lengths), len(lengths)
    origins = origins or ["current"] * n
    names = tuple(sorted(set(origins)))
    codes = np.array([names.index(o) for o in origins], np.int32)
    return Examples(
        tokens=np.concatenate([1000 * i + np.arange(t) for i, t in enumerate(lengths)]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        first_target=np.ones(n, np.int32) if first is None else np.array(first, np.int32),
        weights=np.array(weights or np.arange(n) / 8, np.float32), task=codes, task_names=names, origin=codes,
        origin_names=names, uid=pl.Series([str(i) for i in range(n)]), too_long=no_long_rows(), sources=("toy",),
    )  # fmt: skip


def flat(lists):
    return list(chain.from_iterable(lists))


def no_long_rows():
    return pl.DataFrame(schema={"origin": pl.String, "task": pl.String, "outcome": pl.String})


def row_of(examples, uid):
    return examples.uid.to_list().index(uid)


def learnt(examples, row):
    """Tokens that the loss is on."""
    return examples.row_tokens(row)[examples.first_target[row] :].tolist()


# --- tokens, and which of them are learnt ---


def test_real_rows_have_the_tokens_that_the_policy_scores(shipped, real, tokenizer):
    assert len(real) == shipped.samples.height > 60
    assert real.uid.to_list() == sorted(shipped.samples["uid"])
    for row in shipped.samples.iter_rows(named=True):
        i, prompt = row_of(real, row["uid"]), Prompt(row["uid"], row["prompt"], row["tools"])
        question, answer = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, row["completion"], [END])
        assert real.row_tokens(i).tolist() == question + answer
        assert learnt(real, i) == answer
        assert (real.task_names[real.task[i]], real.origin_names[real.origin[i]]) == (row["task"], row["origin"])
        assert real.weights[i] == row["weight"]


def test_the_loss_is_on_the_answer_and_its_end_token_alone(shipped, real, tokenizer):
    for row in shipped.samples.iter_rows(named=True):
        i = row_of(real, row["uid"])
        assert tokenizer.decode(learnt(real, i)) == row["completion"][0]["content"] + "<|end|>"
        before = real.row_tokens(i)[: real.first_target[i]]
        said = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in row["prompt"])
        assert tokenizer.decode(before) == said + "<|assistant|>\n"


def test_turns_tools_and_documents(mixed):
    tokenizer = tokenizer_of(chat_template=TOOLS_TEMPLATE)
    examples = Examples.of(mixed, tokenizer)
    uid = dict(mixed.samples.select("task", "uid").iter_rows())
    talk, tools, news = (row_of(examples, uid[name]) for name in ("talk", "tools", "news"))
    assert tokenizer.decode(learnt(examples, talk)) == "Dark blue.<|end|>"
    earlier = (
        "<|user|>\nName a colour.<|end|>\n<|assistant|>\nRed.<|end|>\n<|user|>\nAnother one?<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.decode(examples.row_tokens(talk)) == earlier + "Dark blue.<|end|>"
    assert tokenizer.decode(learnt(examples, tools)) == f"call {json.dumps(CALL)}<|end|>"
    assert tokenizer.decode(examples.row_tokens(tools)).startswith(f"<|system|>\n{json.dumps([TOOL])}<|end|>\n<|user|>")
    # a document: the token that begins a text (this tokenizer has only an end), then all of it is learnt
    assert tokenizer.decode(learnt(examples, news)) == DOCUMENT + "<|end|>"
    assert examples.row_tokens(news)[: examples.first_target[news]].tolist() == [END]


def test_loss_on_all_tokens(shipped, real, tokenizer):
    examples = Examples.of(shipped, tokenizer, loss_on="all")
    assert np.array_equal(examples.tokens, real.tokens)
    assert set(examples.first_target) == {1}


def test_without_a_chat_template(shipped):
    tokenizer = tokenizer_of(chat_template=None)
    examples = Examples.of(shipped, tokenizer)
    row = shipped.samples.row(0, named=True)
    i = row_of(examples, row["uid"])
    whole = row["prompt"][0]["content"] + "\n\n" + row["completion"][0]["content"] + "<|end|>"
    assert tokenizer.decode(examples.row_tokens(i)) == whole


def test_a_row_without_a_token_to_learn_is_refused(mixed):
    tokenizer = tokenizer_of(eos_token=None)
    empty = pl.Series([[{"role": "assistant", "content": ""}]], dtype=mixed.samples.schema["completion"])
    samples = mixed.samples.filter(task="news").with_columns(completion=empty)
    with pytest.raises(InputError, match=r"task 'news', row 1 .*no token to learn"):
        Examples.of(replace(mixed, samples=samples), tokenizer)


def test_row_order_of_the_parquet_does_not_matter(shipped, real, tokenizer):
    other = Examples.of(replace(shipped, samples=shipped.samples.sample(fraction=1, shuffle=True, seed=5)), tokenizer)
    for name in ("tokens", "offsets", "first_target", "weights", "task", "origin"):
        assert np.array_equal(getattr(other, name), getattr(real, name)), name
    assert other.uid.equals(real.uid)
    ratios = {"current": 0.75, "replay": 0.25}
    assert np.array_equal(Mixture(other, ratios).order(0, 200), Mixture(real, ratios).order(0, 200))


def test_several_manifests(shipped, mixed, tokenizer):
    plain = replace(mixed, samples=mixed.samples.filter(pl.col("task") != "tools"))  # messages of another layout
    both = Examples.of([shipped, plain], tokenizer)
    assert len(both) == shipped.samples.height + 2
    assert both.uid.to_list() == sorted([*shipped.samples["uid"], *plain.samples["uid"]])
    swapped = Examples.of([plain, shipped], tokenizer)
    assert np.array_equal(both.tokens, swapped.tokens)
    assert both.sources == (str(shipped.folder), str(mixed.folder))
    assert np.array_equal(Examples.read([shipped.folder], tokenizer).tokens, Examples.of(shipped, tokenizer).tokens)
    assert len(Examples.read(shipped.folder, tokenizer)) == shipped.samples.height
    with pytest.raises(InputError, match="no manifest"):
        Examples.of([], tokenizer)


def test_chunks_do_not_show(shipped, real, tokenizer, monkeypatch):
    monkeypatch.setattr("train.data.CHUNK", 7)
    assert np.array_equal(Examples.of(shipped, tokenizer).tokens, real.tokens)


def test_another_major_version_is_refused(shipped, tokenizer, tmp_path):
    copy = shutil.copytree(shipped.folder, tmp_path / "run")
    file = copy / "provenance.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": "2.0"}))
    with pytest.raises(ManifestError, match=r"schema version 2\.0.*upgrade rehearse"):
        Examples.read(copy, tokenizer)


# --- rows that are too long ---


def test_too_long_is_an_error_that_teaches(shipped, real, tokenizer):
    longest = int(real.lengths.argmax())
    n = int((real.lengths > 100).sum())
    row = shipped.samples.filter(uid=real.uid[longest]).row(0, named=True)
    with pytest.raises(InputError) as error:
        Examples.of(shipped, tokenizer, max_length=100)
    answer = int(real.lengths[longest] - real.first_target[longest])
    for words in (f"{n} of {len(real)} rows", f"task {row['task']!r}, row {row['row']} (uid {row['uid']})",
                  f"{real.first_target[longest]} tokens of prompt and {answer} of answer", str(shipped.folder),
                  f"max_length={real.lengths[longest]}", "too_long: truncate"):  # fmt: skip
        assert words in str(error.value)
    assert len(Examples.of(shipped, tokenizer, max_length=int(real.lengths.max()))) == len(real)  # ≤ is fine
    with pytest.raises(InputError, match="max_length must be at least 2"):
        Examples.of(shipped, tokenizer, max_length=1)


def test_too_long_is_truncated(shipped, real, tokenizer, tmp_path):
    short = Examples.of(shipped, tokenizer, max_length=40, too_long="truncate")
    assert len(short) == len(real)
    cut = Counter()
    for i in range(len(real)):
        whole, answer = real.row_tokens(i).tolist(), learnt(real, i)
        kept = short.row_tokens(i).tolist()
        if len(answer) > 40:  # the answer alone is too long: its start, and no end token
            assert kept == answer[:40] and kept[-1] != END and short.first_target[i] == 1
            cut["answer"] += 1
        else:
            assert kept == whole[-40:]
            assert learnt(short, i) == answer if len(answer) < 40 else kept[1:]
            cut["prompt"] += len(whole) > 40
    assert cut["answer"] and cut["prompt"], "the rows show nothing"
    assert short.too_long.height == sum(cut.values())
    assert set(short.too_long["outcome"]) == {"truncated"}
    listed = pl.read_parquet(short.write_left_out(tmp_path))
    sizes = dict(listed.select("uid", pl.col("prompt_tokens") + pl.col("answer_tokens")).iter_rows())
    assert sizes == {real.uid[i]: t for i, t in enumerate(real.lengths.tolist()) if t > 40}


def test_too_long_is_dropped_listed_and_counted(shipped, real, tokenizer, tmp_path):
    short = Examples.of(shipped, tokenizer, max_length=100, too_long="drop")
    keep = real.lengths <= 100
    assert 0 < len(short) == keep.sum() < len(real)
    assert short.uid.to_list() == real.uid.filter(pl.Series(keep)).to_list()
    assert np.array_equal(short.weights, real.weights[keep])
    assert [short.row_tokens(i).tolist() for i in range(len(short))] == [
        real.row_tokens(i).tolist() for i in np.flatnonzero(keep)
    ]
    assert short.write_left_out(tmp_path) == tmp_path / LISTED
    listed = pl.read_parquet(tmp_path / LISTED)
    assert set(listed["uid"]) == set(real.uid) - set(short.uid)
    assert set(listed["outcome"]) == {"dropped"} and set(listed["manifest"]) == {str(shipped.folder)}
    assert f"{listed.height} dropped as too long" in repr(short)
    assert real.write_left_out(tmp_path / "none") is None


def test_truncation_by_hand():
    assert truncated([1, 2, 3], [7, 8], 5) == ([1, 2, 3], [7, 8])
    assert truncated([1, 2, 3], [7, 8], 4) == ([2, 3], [7, 8])
    assert truncated([1, 2, 3], [7, 8], 2) == ([], [7, 8])
    assert truncated([1, 2, 3], [7, 8, 9], 2) == ([], [7, 8])


# --- fingerprints ---


def with_completion(manifest, **values):
    row = {"uid": "c1", "prompt_uid": "p", "task": "code", "stage": 1, "origin": "policy", "text": "x", **values}
    frame = pl.DataFrame([row], schema_overrides=COMPLETIONS.schema)
    return replace(manifest, completions=pl.concat([COMPLETIONS.empty(), frame], how="diagonal"))


def test_tokens_and_log_probabilities_of_something_else_are_refused(shipped, tokenizer):
    mine = tokenizer_fingerprint(tokenizer)
    made = {"token_ids": [3, 4], "token_logps": [-1.0, -2.0], "policy": "w1"}
    good = with_completion(shipped, **made, tokenizer=mine)
    check_fingerprints(shipped, tokenizer, "w1")  # nothing stored, nothing to refuse
    check_fingerprints(good, tokenizer)
    check_fingerprints(good, tokenizer, "w1")
    with pytest.raises(InputError, match=r"policy.*'w1' in the completion c1 of task 'code'; the model's is w2"):
        check_fingerprints(good, tokenizer, "w2")
    with pytest.raises(InputError, match=r"another tokenizer.*'other' in the completion c1(.|\n)*remedy"):
        check_fingerprints(with_completion(shipped, **made, tokenizer="other"), tokenizer, "w1")
    with pytest.raises(InputError, match="another tokenizer"):  # the same vocabulary, but other tokens for a prompt
        check_fingerprints(good, tokenizer_of(chat_template=TOOLS_TEMPLATE))
    check_fingerprints(with_completion(shipped, policy="w1", tokenizer="other"), tokenizer, "w2")  # neither is stored


# --- order ---


def test_turns_by_hand():
    # 4/5 and 1/5, a period of 5. b may come from the start (0 < 1/5) and is due at ⌈1/(1/5)⌉ = 5, a's rows at
    # ⌈1.25⌉, ⌈2.5⌉, ⌈3.75⌉, 5: so a, a, a; a's fourth may come from ⌊3.75⌋ = 3 and ties with b: a by its number; b
    assert Turns([Fraction(4, 5), Fraction(1, 5)]).at(0, 10).tolist() == [0, 0, 0, 0, 1] * 2
    # thirds: each is due at 3, ties by number
    assert Turns([Fraction(1, 3)] * 3).at(0, 6).tolist() == [0, 1, 2] * 2


shares = st.lists(st.integers(1, 200), min_size=1, max_size=12).map(lambda a: [Fraction(x, sum(a)) for x in a])


def off_by(order, shares):
    """Largest |count - n · share| over all n and groups."""
    counts = np.cumsum([order == g for g in range(len(shares))], axis=1)
    n = np.arange(1, len(order) + 1)
    return max(
        abs(int(c) - int(t) * s) for s, row in zip(shares, counts, strict=True) for c, t in zip(row, n, strict=True)
    )


@given(shares)
def test_every_count_is_within_one_at_every_position(shares):
    assert off_by(Turns(shares).at(0, 300), shares) < 1


def test_largest_deficit_alone_would_not_do():
    """The departure in mixing.py: five groups that the simple rule serves too late, and this one does not."""
    shares = [Fraction(a, 380) for a in (1, 3, 192, 183, 1)]
    done, naive = [0] * 5, []
    for n in range(380):
        naive.append(max(range(5), key=lambda g: ((n + 1) * shares[g] - done[g], -g)))
        done[naive[-1]] += 1
    assert off_by(np.array(naive), shares) > 1 > off_by(Turns(shares).at(0, 380), shares)


@given(shares, st.integers(0, 3000), st.integers(0, 200))
def test_turns_of_any_stretch(shares, start, n):
    turns = Turns(shares)
    assert turns.at(start, start + n).tolist() == Turns(shares).at(0, start + n)[start:].tolist()
    assert turns.counts(start) == [int((Turns(shares).at(0, start) == g).sum()) for g in range(len(shares))]
    if n:
        group = int(turns.at(start, start + 1)[0])
        assert turns.position(group, turns.counts(start)[group]) == start


groups = st.fixed_dictionaries(
    {"current": st.integers(1, 9), "replay": st.integers(1, 9), "augmented": st.integers(1, 3)}
)


@given(groups, st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any), st.integers(0, 5), st.integers(0, 99))
def test_mixtures(sizes, parts, seed, start):
    origins = [name for name, n in sizes.items() for _ in range(n)]
    examples = toy([2] * len(origins), origins=origins)
    ratios = {name: part / sum(parts) for name, part in zip(sizes, parts, strict=True)}
    order = Mixture(examples, ratios, seed).order(0, 150)
    assert np.array_equal(Mixture(examples, ratios, seed).order(start, 150), order[start:])  # resumed
    for name, n in sizes.items():
        mine = [int(i) for i in order if origins[i] == name]
        for k, count in enumerate(np.cumsum([origins[i] == name for i in order]), 1):
            assert abs(count - k * ratios[name]) < 1 + 1e-9
        for at in range(0, len(mine) - n + 1, n):  # each of its passes has every row once
            assert len(set(mine[at : at + n])) == n
    assert Mixture(examples, ratios, seed).counts(150) == {
        name: sum(origins[i] == name for i in order) for name in sorted(sizes) if ratios[name]
    }


@given(st.integers(1, 30), st.integers(0, 9), st.integers(0, 60))
def test_without_ratios_every_row_comes_once_an_epoch(n, seed, start):
    mixture = Mixture(toy([2] * n), seed=seed)
    order = mixture.order(0, 3 * n)
    assert mixture.length == n
    assert [sorted(order[e * n : (e + 1) * n]) for e in range(3)] == [list(range(n))] * 3
    assert np.array_equal(mixture.order(min(start, 3 * n), 3 * n), order[start:])


def test_crooked_ratios_and_far_positions():
    tasks = [task for i, task in enumerate("abcdef") for _ in range(i + 1)]
    parts = [math.sqrt(p) for p in (2, 3, 5, 7, 11, 13)]
    ratios = {task: part / sum(parts) for task, part in zip("abcdef", parts, strict=True)}
    mixture = Mixture(toy([2] * len(tasks), origins=tasks), ratios)
    assert mixture._turns.period > 1 << 64
    order = mixture.order(0, 5000)
    for n in range(1, 5001, 7):
        for name, count in mixture.counts(n).items():
            assert abs(count - n * ratios[name]) < 1 + 1e-6
            assert count == sum(tasks[i] == name for i in order[:n])
    examples = toy([2] * 10, origins=["current"] * 5 + ["replay"] * 3 + ["augmented"] * 2)
    far = Mixture(examples, {"current": 0.8, "replay": 0.15, "augmented": 0.05})  # a period of 20
    assert far.counts(10**15) == {"augmented": 5 * 10**13, "current": 8 * 10**14, "replay": 15 * 10**13}
    assert len(set(far.order(10**15, 10**15 + 20))) == 9  # all current and replay rows, and one that is augmented


def test_shuffles_differ_by_pass_seed_and_group():
    examples = toy([2] * 60, origins=["current"] * 30 + ["replay"] * 30)
    order = Mixture(examples, {"current": 0.5, "replay": 0.5}).order(0, 120).reshape(2, 30, 2)
    assert order[0, :, 0].tolist() != order[1, :, 0].tolist()
    assert (order[0, :, 0] != order[0, :, 1] - 30).any()
    assert Mixture(examples, seed=1).order(0, 60).tolist() != Mixture(examples, seed=2).order(0, 60).tolist()


def test_length_of_an_epoch():
    origins = ["current"] * 8 + ["replay"] * 100 + ["augmented"] * 2
    examples = toy([2] * 110, origins=origins)
    mixture = Mixture(examples, {"current": 0.8, "replay": 0.2, "augmented": 0})
    # current, replay: c c c c r (see test_turns_by_hand): the eighth current row is the ninth of all
    assert mixture.length == 9
    order = mixture.order(0, 9)
    assert sorted(i for i in order if i < 8) == list(range(8)) and (order < 108).all()
    # without current rows: until the slowest group is through, 2 rows of 1/2 and 100 of 1/2, replay is second
    assert Mixture(examples, {"current": 0, "replay": 0.5, "augmented": 0.5}).length == 200
    assert Mixture(examples).length == 110


def test_real_mixture_by_task(real):
    ratios = {"mathematics": 0.6, "code": 0.3, "classification": 0.1}
    mixture = Mixture(real, ratios)
    names = [real.task_names[real.task[i]] for i in mixture.order(0, 1000)]
    assert Counter(names) == {"mathematics": 600, "code": 300, "classification": 100}
    size = int((real.origin == real.origin_names.index("current")).sum())
    assert mixture.counts(mixture.length)["mathematics"] == size
    assert mixture.counts(mixture.length - 1)["mathematics"] == size - 1


def test_ratios_that_cannot_be_met(real, shipped, tokenizer):
    where = str(shipped.folder)
    with pytest.raises(InputError) as error:
        Mixture(real, {"current": 0.8, "replay": 0.15, "augmented": 0.05})
    assert f"no augmented rows in {where}, yet the mixture asks for 5% of them" in str(error.value)
    assert "remedy: give it the ratio 0" in str(error.value)
    no_replay = Examples.of(replace(shipped, samples=shipped.samples.filter(origin="current")), tokenizer)
    with pytest.raises(InputError, match=r"no replay rows in .*asks for 15% of them"):
        Mixture(no_replay, {"current": 0.85, "replay": 0.15})
    with pytest.raises(
        InputError, match=r"no task 'sums' rows in (.|\n)*there are 'classification', 'code', 'mathematics'"
    ):
        Mixture(real, {"mathematics": 0.5, "sums": 0.5})
    with pytest.raises(InputError, match=r"rows of replay, which the mixture does not name"):
        Mixture(real, {"current": 1})
    for ratios, words in [({"current": 0.5, "replay": 0.4}, "their sum is 0.9"), ({"current": -1, "replay": 2}, "-1"),
                          ({"current": math.nan, "replay": 1}, "nan"), ({}, "their sum is 0")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            Mixture(real, ratios)
    with pytest.raises(InputError, match="seed"):
        Mixture(real, seed=-1)
    with pytest.raises(ValueError, match="start"):
        Mixture(real).order(5, 4)
    with pytest.raises(InputError, match="no rows to train on"):
        Mixture(Examples.of(replace(shipped, samples=shipped.samples.clear()), tokenizer))
    shortest = int(real.lengths[real.groups("task")["code"]].min())
    dropped = Examples.of(shipped, tokenizer, max_length=shortest - 1, too_long="drop")
    if len(dropped):
        with pytest.raises(InputError, match=r"\d+ were dropped as too long"):
            Mixture(dropped, {"code": 1 - 1e-3, "mathematics": 1e-3})


def test_a_ratio_of_zero_leaves_out():
    examples = toy([2] * 4, origins=["current"] * 2 + ["replay"] * 2)
    assert sorted(Mixture(examples, {"current": 1, "replay": 0, "augmented": 0}).order(0, 2)) == [0, 1]


# --- packs ---

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=60)


@given(lengths, st.integers(12, 40), st.integers(1, 5), st.integers(0, 3))
def test_packs_hold_every_sample_whole_once_and_in_order(lengths, capacity, window, seed):
    examples = toy(lengths)
    mixture = Mixture(examples, seed=seed)
    items = Items(examples, mixture, packing=Packing(capacity, window))
    order = mixture.order(0, len(lengths)).tolist()
    packs = [items.rows([i]).tolist() for i in range(len(items))]
    assert sorted(flat(packs)) == list(range(len(lengths)))
    at = [[order.index(row) for row in pack] for pack in packs]
    for i, pack in enumerate(packs):
        item = items[i]
        assert len(item.tokens) == sum(lengths[row] for row in pack) <= capacity
        assert item.tokens.tolist() == [t for row in pack for t in examples.row_tokens(row)]
        assert item.lengths.tolist() == [lengths[row] for row in pack] and item.rows.tolist() == pack
        assert at[i] == sorted(at[i])
        # the first i packs: all positions before the first one of pack i, and later ones in the last window - 1 only
        assert set(range(at[i][0])) <= {p for earlier in at[:i] for p in earlier}
        assert all(p < at[i][0] for earlier in at[: max(0, i - window + 1)] for p in earlier)
    if window == 1:
        assert flat(packs) == order


def test_packs_by_hand():
    # order 0 1 2 …, packs of 10, two open: 6 | 6 5? no: 6+6 > 10 opens pack 1; 3 goes to pack 0, 4 to pack 1;
    # 5 fits nowhere (rooms 1, 0): pack 0 closes, pack 2 opens; 1: pack 1 is full, so pack 2
    examples = toy([6, 6, 3, 4, 5, 1])
    mixture = Mixture(examples)
    mixture.order = lambda start, stop: np.arange(start, stop)
    items = Items(examples, mixture, packing=Packing(10, window=2))
    assert [items.rows([i]).tolist() for i in range(len(items))] == [[0, 2], [1, 3], [4, 5]]


@given(lengths, st.integers(12, 30), st.integers(1, 4), st.booleans(), st.integers(1, 7))
def test_a_longer_run_begins_as_a_shorter_one(lengths, capacity, window, split, per_step):
    examples = toy(lengths)
    packing = Packing(capacity, window, split)
    for how in (packing, None):
        runs = [Items(examples, Mixture(examples), packing=how, max_steps=n, items_per_step=per_step) for n in (2, 5)]
        assert [len(run) for run in runs] == [2 * per_step, 5 * per_step]
        for i in range(2 * per_step):
            for name in ("tokens", "positions", "loss", "lengths", "rows", "weights"):
                assert np.array_equal(getattr(runs[0][i], name), getattr(runs[1][i], name))
        exact = Items(examples, Mixture(examples), packing=how, epochs=2)
        whole = Items(examples, Mixture(examples), packing=how, epochs=2, items_per_step=per_step)
        assert len(whole) == per_step * -(-len(exact) // per_step)
        for i in range(len(exact)):  # a whole last step only adds: in the packs that were still open, or the last block
            assert set(exact[i].rows) <= set(whole[i].rows)


@given(lengths, st.integers(2, 30), st.integers(1, 3))
def test_blocks_use_every_token_without_padding(lengths, length, epochs):
    examples = toy(lengths)
    mixture = Mixture(examples)
    items = Items(examples, mixture, packing=Packing(length, split=True), epochs=epochs)
    text = [t for row in mixture.order(0, epochs * len(lengths)) for t in examples.row_tokens(row).tolist()]
    blocks = [items[i].tokens.tolist() for i in range(len(items))]
    assert flat(blocks) == text
    assert {len(block) for block in blocks[:-1]} <= {length} and 1 <= len(blocks[-1]) <= length
    for i in range(len(items)):
        item, at = items[i], 0
        for row, n in zip(item.rows, item.lengths, strict=True):
            assert set(item.tokens[at : at + n] // 1000) == {row}
            assert item.positions[at : at + n].tolist() == list(range(n))
            assert item.loss[at : at + n].tolist() == [False] + [True] * (n - 1)
            at += n


def test_blocks_keep_the_loss_off_the_prompt():
    examples = toy([10], first=[6])
    items = Items(examples, Mixture(examples), packing=Packing(4, split=True))
    # 0 1 2 3 | 4 5 6 7 | 8 9: targets are 6 7, and 9 (8 begins a block: nothing predicts it)
    assert [items[i].loss.tolist() for i in range(3)] == [[False] * 4, [False, False, True, True], [False, True]]


def test_part_of_an_epoch_and_refusals():
    examples = toy([3] * 10)
    mixture = Mixture(examples)
    assert len(Items(examples, mixture, epochs=0.25)) == 3  # ⌈2.5⌉
    assert Items(examples, mixture, epochs=2.5).rows(range(25)).tolist() == mixture.order(0, 25).tolist()
    with pytest.raises(InputError, match=r"a pack holds 2 tokens, the row with uid 0 has 3"):
        Items(examples, mixture, packing=Packing(2))
    for wrong in ({"epochs": 0}, {"max_steps": 0}, {"items_per_step": 0}):
        with pytest.raises(InputError, match="nothing to do"):
            Items(examples, mixture, **wrong)
    with pytest.raises(InputError, match="window"):
        Packing(8, 0)
    with pytest.raises(IndexError):
        Items(examples, mixture)[10]


# --- batches ---


@given(lengths, st.integers(12, 40), st.sampled_from(["padded", "packs", "blocks"]), st.integers(1, 4), st.booleans())
def test_weights_and_rows_stay_with_their_samples(lengths, capacity, mode, size, one_row):
    examples = toy(lengths, weights=[(7 * i % 5) / 4 for i in range(len(lengths))])
    packing = {"packs": Packing(capacity), "blocks": Packing(capacity, split=True)}.get(mode)
    items = Items(examples, Mixture(examples, seed=3), packing=packing)
    collate, seen = Collator(one_row=one_row), []
    for start in range(0, len(items), size):
        numbers = range(start, min(start + size, len(items)))
        batch = collate([items[i] for i in numbers])
        assert batch["row"].tolist() == items.rows(numbers).tolist()
        assert batch["weight"].tolist() == [examples.weights[row] for row in batch["row"].tolist()]
        for j, row in enumerate(batch["row"].tolist()):
            mine = batch["input_ids"][batch["segment"] == j].tolist()
            assert mine == examples.row_tokens(row).tolist() or mode == "blocks"
            assert {t // 1000 for t in mine} == {row}
            seen += mine
    assert sorted(seen) == sorted(examples.tokens.tolist())


def test_a_padded_batch_by_hand():
    examples = toy([3, 1, 4], first=[2, 1, 1], weights=[1.0, 0.5, 2.0])
    items = [Items(examples, Mixture(examples))[i] for i in range(3)]
    items.sort(key=lambda item: item.rows[0])
    batch = Collator(pad=9, multiple_of=3)(items)
    assert batch["input_ids"].tolist() == [
        [0, 1, 2, 9, 9, 9], [1000, 9, 9, 9, 9, 9], [2000, 2001, 2002, 2003, 9, 9]]  # fmt: skip
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert batch["loss_mask"].int().tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6, [0, 1, 1, 1, 0, 0]]
    assert batch["segment"].tolist() == [[0, 0, 0, -1, -1, -1], [1, -1, -1, -1, -1, -1], [2, 2, 2, 2, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert batch["weight"].tolist() == [1.0, 0.5, 2.0] and batch["row"].tolist() == [0, 1, 2]
    types = {name: tensor.dtype for name, tensor in batch.items()}
    assert types == {"input_ids": torch.int64, "position_ids": torch.int64, "attention_mask": torch.int64,
                     "loss_mask": torch.bool, "segment": torch.int64, "weight": torch.float32,
                     "row": torch.int64}  # fmt: skip


def test_a_batch_in_one_row_by_hand():
    examples = toy([3, 1, 4], first=[2, 1, 1])
    items = [Items(examples, Mixture(examples))[i] for i in range(3)]
    items.sort(key=lambda item: item.rows[0])
    batch = Collator(one_row=True)(items)
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[0, 1, 2, 1000, 2000, 2001, 2002, 2003]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["loss_mask"].int().tolist() == [[0, 0, 1, 0, 0, 1, 1, 1]]
    assert batch["segment"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]


def test_a_batch_of_packs_by_hand():
    examples = toy([3, 2, 4, 1], weights=[1.0, 0.5, 2.0, 0.25])
    first, second = examples_as_item(examples, [0, 1]), examples_as_item(examples, [2])
    batch = Collator(pad=9)([first, second])
    assert "attention_mask" not in batch, "transformers sees packs by their positions alone"
    assert batch["input_ids"].tolist() == [[0, 1, 2, 1000, 1001], [2000, 2001, 2002, 2003, 9]]
    # padding is a sample of its own, of no more positions than the longest has: models may have no others
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["loss_mask"].int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]]
    assert batch["segment"].tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
    assert batch["weight"].tolist() == [1.0, 0.5, 2.0] and batch["row"].tolist() == [0, 1, 2]


def test_positions_of_padding_are_positions_of_a_sample():
    examples = toy([3] * 9)
    long, short = examples_as_item(examples, list(range(8))), examples_as_item(examples, [8])
    batch = Collator()([long, short])
    assert batch["input_ids"].shape == (2, 24)
    assert batch["position_ids"][1].tolist() == [0, 1, 2] * 8
    assert batch["segment"][1].tolist() == [8] * 3 + [-1] * 21


def examples_as_item(examples, rows):
    """A pack of these rows, by the library's own reading of an order that holds nothing else."""
    mixture = Mixture(examples)
    mixture.order = lambda start, stop: np.resize(rows, stop)[start:]
    return Items(examples, mixture, packing=Packing(int(examples.lengths[rows].sum())), max_steps=1)[0]


@pytest.mark.parametrize("pad", [PAD, END])
def test_the_padding_token_may_be_the_end_token(real, tokenizer, pad):
    items = Items(real, Mixture(real), packing=None)
    batch = Collator(pad=pad)([items[i] for i in range(8)])
    for j, row in enumerate(batch["row"].tolist()):
        targets = batch["input_ids"][batch["loss_mask"] & (batch["segment"] == j)].tolist()
        assert targets == learnt(real, row) and targets[-1] == END
    assert not (batch["loss_mask"] & (batch["segment"] < 0)).any()
    assert (batch["input_ids"][batch["segment"] < 0] == pad).all()
    assert not batch["loss_mask"][batch["position_ids"] == 0].any()


# --- what a model makes of a batch, and what Trainer feeds ---


@pytest.fixture(scope="session")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=6144, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def nll(model, batch):
    """[n] summed over each sample's targets."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    on = batch["loss_mask"][:, 1:]
    found = torch.zeros(len(batch["row"]))
    return found.index_add(0, batch["segment"][:, 1:][on], loss[on])


def test_padding_and_packing_change_no_loss(real, model):
    short = np.flatnonzero(real.lengths < 200)[:8]
    mixture = Mixture(real)
    mixture.order = lambda start, stop: np.resize(short, stop)[start:]
    singles = Items(real, mixture, max_steps=1, items_per_step=8)
    with torch.no_grad():
        alone = torch.cat([nll(model, Collator(multiple_of=1)([singles[i]])) for i in range(8)])
        for collate in (Collator(), Collator(pad=END, multiple_of=64), Collator(one_row=True)):
            torch.testing.assert_close(nll(model, collate([singles[i] for i in range(8)])), alone, rtol=1e-4, atol=1e-3)
        packs = Items(real, mixture, packing=Packing(int(real.lengths.max())), max_steps=1, items_per_step=2)
        for one_row in (False, True):
            batch = Collator(one_row=one_row)([packs[0], packs[1]])
            expected = torch.stack([alone[list(short).index(row)] for row in batch["row"].tolist()])
            torch.testing.assert_close(nll(model, batch), expected, rtol=1e-4, atol=1e-3)


def fed(tmp_path, model, items, collate, *, resume=None, **arguments):
    """What the real Trainer feeds: {global step: rows, micro-batch by micro-batch}."""
    from transformers import Trainer, TrainingArguments

    seen = {}

    class Recorder(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.setdefault(self.state.global_step, []).extend(inputs["row"].tolist())
            return nll(model, inputs).mean()

    args = TrainingArguments(
        str(tmp_path), train_sampling_strategy="sequential", num_train_epochs=1, use_cpu=True, learning_rate=0.0,
        disable_tqdm=True, logging_steps=1000, **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    Recorder(model, args, data_collator=collate, train_dataset=items).train(resume_from_checkpoint=resume)
    return seen


def all_steps(items, batch, accumulation):
    steps = -(-len(items) // (batch * accumulation))
    return {s: step_rows(items, s, batch, accumulation).tolist() for s in range(steps)}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_sees_the_rows_that_step_rows_tells(tmp_path, real, model, accumulation, packed):
    examples = toy([5 + i % 7 for i in range(41)], origins=["current"] * 21 + ["replay"] * 20)
    examples = replace(examples, tokens=examples.tokens % 6000)
    mixture = Mixture(examples, {"current": 0.6, "replay": 0.4}, seed=4)
    items = Items(examples, mixture, packing=Packing(16, 3) if packed else None, epochs=1.5)
    seen = fed(tmp_path, model, items, Collator(one_row=packed), per_device_train_batch_size=2,
               gradient_accumulation_steps=accumulation)  # fmt: skip
    assert len(items) % (2 * accumulation) or accumulation == 1, "the last step is not short"
    assert seen == all_steps(items, 2, accumulation)
    assert len(flat(seen.values())) == math.ceil(1.5 * mixture.length)
    assert examples.uids(seen[0]) == [str(row) for row in seen[0]]
    with pytest.raises(IndexError, match="step"):
        step_rows(items, len(seen), 2, accumulation)


def test_workers_and_steps_and_resume(tmp_path, model):
    examples = toy([5 + i % 7 for i in range(30)])
    examples = replace(examples, tokens=examples.tokens % 6000)
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    items = Items(examples, Mixture(examples), packing=Packing(24), max_steps=6, items_per_step=4)
    whole = fed(tmp_path / "a", model, items, Collator(one_row=True), dataloader_num_workers=1, **how)
    assert whole == all_steps(items, 2, 2)
    assert len(whole) == 6
    fed(tmp_path / "b", model, items, Collator(one_row=True), save_strategy="steps", save_steps=4, **how)
    rest = fed(tmp_path / "b", model, items, Collator(one_row=True), resume=tmp_path / "b/checkpoint-4", **how)
    assert rest == {step: whole[step] for step in (4, 5)}


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_processes_share_the_order_as_accelerate_cuts_it(n, batch, accumulation, world):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    examples = toy([2] * n)
    items = Items(examples, Mixture(examples))
    order = items.rows(range(n))
    sampler = BatchSampler(SequentialSampler(range(n)), batch, drop_last=False)
    shards = [list(BatchSamplerShard(sampler, world, rank)) for rank in range(world)] if world > 1 else [list(sampler)]
    steps = -(-len(shards[0]) // accumulation)
    for step in range(steps):
        micro = [shard[step * accumulation : (step + 1) * accumulation] for shard in shards]
        expected = [i for parts in zip(*micro, strict=True) for part in parts for i in part]
        assert step_rows(items, step, batch, accumulation, world).tolist() == order[expected].tolist()
    with pytest.raises(IndexError):
        step_rows(items, steps, batch, accumulation, world)


def test_a_run_of_whole_steps_repeats_nothing():
    examples = toy([2] * 10)
    items = Items(examples, Mixture(examples), items_per_step=2 * 2 * 2)
    assert len(items) == 16
    fed = [step_rows(items, step, 2, 2, 2) for step in range(2)]
    assert np.concatenate(fed).tolist() == Mixture(examples).order(0, 16).tolist()


def test_reading_is_deterministic_across_processes(shipped, tokenizer, real):
    again = Examples.of(read(shipped.folder), tokenizer)
    for packing in (None, Packing(2048), Packing(512, split=True)):
        one, two = (Items(e, Mixture(e, {"current": 0.7, "replay": 0.3}), packing=packing) for e in (real, again))
        assert len(one) == len(two)
        assert all(np.array_equal(one[i].tokens, two[i].tokens) for i in range(len(one)))
