"""Exports: each format holds the manifest's rows and no others, is loaded by its reader, and one step is trained."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import polars as pl
import pytest
from commands import called
from datasets import load_dataset

from curate.build import build
from curate.cli import export as command
from curate.cli import main
from curate.errors import InputError
from curate.export import FORMATS, export, rows_of
from curate.export.base import Skipped
from curate.manifest.schema import COMPLETIONS

ROOT = Path(__file__).parent.parent.parent
STARTER = str(ROOT / "examples/starter")
TALK = [("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Red."), ("user", "And another?"),
        ("assistant", "Dark blue.")]  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
HOSTILE = '<script>\n---\n| a | `b` \u2028 \u202e 😀 "quoted" \\ \x00 {{ x }} {% if y %}'


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def first(file, n):
    with gzip.open(ROOT / f"examples/{file}.jsonl.gz", "rt") as lines:
        return [row for row in map(json.loads, lines) if row["split"] == "train"][:n]


def built(folder, tasks, **replay):
    """A manifest of {name: (format, rows, more settings)}; everything is replayed."""
    listed = []
    for name, (kind, rows, more) in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed.append({"name": name, "path": f"{name}.jsonl", "format": kind, **more})
    replay = {"selector": "uniform", "ratio": 100} if len(tasks) > 1 else {"selector": "none"}
    return build({"name": "set", "tasks": listed, "replay": replay, "base": str(folder),
                  "out": str(folder / "run"), "cache": str(folder / "cache")})  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Shipped rows: 4 of SuperNI, then 6 questions with four ranked answers each."""
    ranked = {"columns": {"prompt": "question", "output": "gold"}, "ranked_by": "human"}
    tasks = {"sums": ("superni", first("superni/mathematics", 4), {}),
             "qa": ("ranked", first("ranked/qa_feedback", 6), ranked)}  # fmt: skip
    return built(tmp_path_factory.mktemp("real"), tasks)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """What formats differ in: several turns, tools, a call without text, a result of one, a document, hostile text."""
    asked, answered = (
        {**assistant(None), "tool_calls": [CALL]},
        {**assistant(None), "tool_calls": [{"id": "c1", **CALL}]},
    )
    result = {"role": "tool", "content": "Rain.", "tool_call_id": "c1"}
    tasks = {
        "talk": ("chat", [{"messages": [{"role": role, "content": text} for role, text in TALK]}], {}),
        "calls": ("chat", [{"messages": [user("How is Oslo?"), asked], "tools": [TOOL]}], {}),
        "results": ("chat", [{"messages": [user("Oslo?"), answered, result, assistant("Wet.")], "tools": [TOOL]}], {}),
        "hostile": ("alpaca", [{"instruction": HOSTILE, "output": HOSTILE}], {}),
        "news": ("text", [{"text": "The river rises in the hills."}], {}),
    }
    return built(tmp_path_factory.mktemp("odd"), tasks)


def split(rows):
    """(rows, {task: reason} of those left out)."""
    rows = list(rows)
    return [r for r in rows if not isinstance(r, Skipped)], {r.task: r.reason for r in rows if isinstance(r, Skipped)}


def messages_of(manifest):
    """Task -> the messages of its only sample, as the source gave them."""
    found = {}
    for row in manifest.samples.iter_rows(named=True):
        every = [{k: v for k, v in m.items() if v is not None} for m in [*row["prompt"], *row["completion"]]]
        found[row["task"]] = [
            m | ({"tool_calls": json.loads(m["tool_calls"])} if "tool_calls" in m else {}) for m in every
        ]
    return found


# --- no row is lost, and what is written says the same ---


def test_the_command_offers_every_format():
    hints = get_type_hints(command, include_extras=True)
    assert set(get_args(get_args(hints["to"])[0])) == FORMATS.keys()


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("which", ["real", "odd"])
def test_every_sample_is_written_or_named(request, which, to):
    manifest = request.getfixturevalue(which)
    if (which, to) == ("odd", "trl-dpo"):
        manifest = with_answers(manifest, [("talk", "a", 1, None), ("talk", "b", 2, None)])
    rows = list(rows_of(manifest, to))
    skipped = [r for r in rows if isinstance(r, Skipped)]
    prompts = len({r["uid"] for r in rows if not isinstance(r, Skipped)}) if to.startswith("trl") else 0
    written = prompts or len(rows) - len(skipped)
    assert written + len({s.uid for s in skipped}) == manifest.samples.height
    assert all(s.reason and s.uid in manifest.samples["uid"].to_list() for s in skipped)


def test_sft_rows_are_the_manifests_messages(odd):
    rows, skipped = split(rows_of(odd, "trl-sft"))
    expected = messages_of(odd)
    del expected["news"]
    assert {r["task"]: [*r["prompt"], *r["completion"]] for r in rows} == expected
    assert skipped == {"news": "a plain document among conversations: TRL takes one kind of rows in a file"}
    assert json.loads(next(r for r in rows if r["task"] == "calls")["tools"]) == [TOOL]


def test_documents_alone_are_text(tmp_path):
    manifest = built(tmp_path, {"news": ("text", [{"text": "One river."}, {"text": HOSTILE}], {})})
    rows, skipped = split(rows_of(manifest, "trl-sft"))
    assert not skipped and sorted(r["text"] for r in rows) == sorted(["One river.", HOSTILE])


def test_prompts_carry_their_references(odd):
    rows, skipped = split(rows_of(odd, "trl-prompts"))
    talk = next(r for r in rows if r["task"] == "talk")
    assert talk["prompt"] == messages_of(odd)["talk"][:-1] and talk["references"] == ["Dark blue."]
    assert set(skipped) == {"calls", "results", "news"}


def test_alpaca_says_the_same(odd, real):
    rows, skipped = split(rows_of(odd, "alpaca"))
    assert set(skipped) == {"calls", "results", "news"}
    talk, hostile = rows if rows[0]["history"] else rows[::-1]
    assert talk == {"instruction": "And another?", "input": "", "output": "Dark blue.", "system": "Be brief.",
                    "history": [["Name a colour.", "Red."]]}  # fmt: skip
    assert hostile["instruction"] == hostile["output"] == HOSTILE
    rows, skipped = split(rows_of(real, "alpaca"))
    assert not skipped and len(rows) == 10
    asked = {f"{r['instruction']}\n\n{r['input']}" if r["input"] else r["instruction"] for r in rows}
    assert asked == {p[0]["content"] for p in real.samples["prompt"].to_list()}
    # a definition and an instance in the rows of SuperNI, a question alone in the others
    assert sum(bool(r["input"]) for r in rows) == 4


def from_sharegpt(row):
    """Back to messages, by LLaMA-Factory's own rules: human and observation at odd places, the others at even ones."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    out = [{"role": "system", "content": row["system"]}] if row["system"] else []
    for place, turn in enumerate(row["conversations"]):
        assert turn["from"] in (("gpt", "function_call") if place % 2 else ("human", "observation"))
        message = {"role": roles[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call":
            message = {**assistant(""), "tool_calls": [{"type": "function", "function": json.loads(turn["value"])}]}
        out.append(message)
    return out


def without_ids(messages):
    messages = [{k: v for k, v in m.items() if k not in ("tool_call_id", "weight")} for m in messages]
    return [m | ({"tool_calls": [{k: v for k, v in c.items() if k != "id"} for c in m["tool_calls"]]}
                 if "tool_calls" in m else {}) for m in messages]  # fmt: skip


def test_sharegpt_says_the_same(odd):
    rows, skipped = split(rows_of(odd, "llamafactory"))
    assert set(skipped) == {"news"}
    expected = [without_ids(m) for task, m in messages_of(odd).items() if task != "news"]
    found = [from_sharegpt(row) for row in rows]
    assert len(found) == 4 and all(each in expected for each in found)
    assert Counter(row["tools"] for row in rows) == {"": 2, json.dumps([TOOL["function"]]): 2}


def from_openai(message):
    out = {**message, "content": message["content"] or ""}
    if "tool_calls" in message:
        out["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
            for c in message["tool_calls"]
        ]
    return out


def test_openai_says_the_same_and_trains_on_the_completion(odd):
    from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
    from pydantic import TypeAdapter

    rows, skipped = split(rows_of(odd, "openai"))
    assert set(skipped) == {"news"}
    expected = [without_ids(m) for task, m in messages_of(odd).items() if task != "news"]
    for row in rows:
        TypeAdapter(list[ChatCompletionMessageParam]).validate_python(row["messages"])
        TypeAdapter(list[ChatCompletionToolParam]).validate_python(row.get("tools", []))
        assert without_ids([from_openai(m) for m in row["messages"]]) in expected
        assert row["messages"][-1]["role"] == "assistant" and "weight" not in row["messages"][-1]
        assert all(m["weight"] == 0 for m in row["messages"][:-1] if m["role"] == "assistant")
        asked = [c["id"] for m in row["messages"] for c in m.get("tool_calls", [])]
        assert all(m["tool_call_id"] in asked for m in row["messages"] if m["role"] == "tool")


@pytest.mark.parametrize(
    ("messages", "reasons"),
    [
        ([user("a"), user("b"), assistant("c")], {"alpaca": "turns", "llamafactory": "alternate"}),
        ([user("a"), {"role": "system", "content": "s"}, assistant("c")],
         {"alpaca": "turns", "llamafactory": "role 'system'"}),
        ([user("a"), {**assistant("Well."), "tool_calls": [CALL]}],
         {"alpaca": "tools", "llamafactory": "text beside its tool call", "trl-prompts": "tools"}),
        ([user("a"), {**assistant(""), "tool_calls": [{"id": "1"}]}],
         {"alpaca": "tools", "trl-prompts": "tools",
          **dict.fromkeys(("trl-sft", "llamafactory", "openai"), "a tool call is not of the form {name, arguments}")}),
        ([user("a"), {**assistant(""), "tool_calls": [CALL]}, {"role": "tool", "content": "r"}, assistant("b")],
         {"alpaca": "tools", "trl-prompts": "tools", "openai": "a tool's answer does not name the id of its call"}),
        ([user("a"), {**assistant(""), "tool_calls": [{"id": "x", **CALL}]}, user("b"), assistant("c")],
         {"alpaca": "tools", "trl-prompts": "tools", "openai": "a tool call has no answer"}),
        ([{"role": "critic", "content": "x"}, user("a"), assistant("b")],
         {"openai": "OpenAI has no role 'critic'", "alpaca": "turns", "llamafactory": "role 'critic'"}),
        ([{**user("a"), "name": "Ann"}, assistant("b")],
         {"alpaca": "names its speaker", "llamafactory": "names its speaker"}),
    ],
)  # fmt: skip
def test_what_a_format_cannot_express_is_named(tmp_path, messages, reasons):
    rows = [{"messages": messages}, {"messages": [user("fine"), assistant("yes")]}]
    manifest = built(tmp_path, {"talk": ("chat", rows, {})})
    for to in FORMATS.keys() - {"trl-dpo"}:
        written, skipped = split(rows_of(manifest, to))
        assert len(written) == 2 - len(skipped)
        assert (to in reasons) == bool(skipped), (to, skipped)
        assert reasons.get(to, "") in skipped.get("talk", "")


# --- pairs ---


def with_answers(manifest, answers):
    """The manifest with completions (task, text, rank, side) of its first sample of that task, all rollouts."""
    uid = {row["task"]: row["uid"] for row in manifest.samples.sort("uid", descending=True).iter_rows(named=True)}
    rows = [{"uid": f"{n:032x}", "prompt_uid": uid[task], "task": task, "stage": 1, "origin": "policy", "text": text,
             "rank": rank, "side": side} for n, (task, text, rank, side) in enumerate(answers)]  # fmt: skip
    return replace(manifest, completions=COMPLETIONS.fit(pl.DataFrame(rows)))


def pairs_of(manifest, pairs):
    rows, skipped = split(rows_of(manifest, "trl-dpo", pairs=pairs))
    return sorted((r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows), skipped


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 2, 3], ["ab", "ac"]),  # the best against each worse one; b against c is no pair
        ([1, 1, 3], ["ac", "bc"]),  # both best ones; they tie, so they are no pair
        ([3, 1, 1], ["ba", "ca"]),
        ([2, 2, 2], "all its answers share one rank"),
        ([1, None, None], "only one answer"),
        ([None, None, None], "no ranked answers"),
    ],
)
def test_pairs_by_rank(odd, ranks, expected):
    answers = [("talk", text, rank, "align") for text, rank in zip("abc", ranks, strict=True)]
    found, skipped = pairs_of(with_answers(odd, answers), "rank")
    assert found == ([] if isinstance(expected, str) else [tuple(pair) for pair in expected])
    assert skipped.get("talk") == (expected if isinstance(expected, str) else None)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        (["align", "align", "conflict"], ["ac", "bc"]),
        (["conflict", "align", "conflict"], ["ba", "bc"]),
        (["align", None, None], "only one answer"),
        (["conflict"] * 3, "all its answers conflict"),
        ([None] * 3, "no answers with a side"),
    ],
)
def test_pairs_by_side(odd, sides, expected):
    answers = [("talk", text, 1, side) for text, side in zip("abc", sides, strict=True)]
    found, skipped = pairs_of(with_answers(odd, answers), "side")
    assert found == ([] if isinstance(expected, str) else [tuple(pair) for pair in expected])
    assert skipped.get("talk") == (expected if isinstance(expected, str) else None)


def test_equal_texts_are_one_pair_and_never_against_themselves(odd):
    answers = [("talk", "a", 1, None), ("talk", "a", 1, None), ("talk", "b", 3, None), ("talk", "a", 4, None)]
    assert pairs_of(with_answers(odd, answers), "rank")[0] == [("a", "b")]


def test_pairs_of_shipped_rankings(real):
    rows, skipped = split(rows_of(real, "trl-dpo"))
    source = {row["question"]: [c["rank"] for c in row["candidates"]] for row in first("ranked/qa_feedback", 6)}
    best = {question: ranks.count(1) for question, ranks in source.items()}
    # with four answers, b of them best: b · (4 − b) pairs
    expected = {question: b * (4 - b) for question, b in best.items() if b < 4}
    assert Counter(r["prompt"][0]["content"] for r in rows) == expected
    assert skipped == {"sums": "no ranked answers"}
    ranks = dict(real.completions.select("uid", "rank").iter_rows())
    assert all(ranks[r["chosen_uid"]] < ranks[r["rejected_uid"]] for r in rows)


# --- files ---


def test_files_are_whole_named_and_not_overwritten(real, tmp_path):
    done = export(real, "trl-dpo", tmp_path / "new/pairs.jsonl")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["pairs.jsonl", "pairs.skipped.jsonl"]
    assert done.rows == len((tmp_path / "new/pairs.jsonl").read_text().splitlines())
    named = [json.loads(line) for line in (tmp_path / "new/pairs.skipped.jsonl").read_text().splitlines()]
    assert len(named) == len(done.skipped) == 4 and {n["task"] for n in named} == {"sums"}
    before = (tmp_path / "new/pairs.jsonl").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        export(real, "trl-dpo", tmp_path / "new/pairs.jsonl")
    export(real, "trl-dpo", tmp_path / "new/pairs.jsonl", force=True)
    assert (tmp_path / "new/pairs.jsonl").read_bytes() == before  # the same rows, the same bytes
    export(real, "trl-sft", tmp_path / "new/pairs.jsonl", force=True)
    assert not (tmp_path / "new/pairs.skipped.jsonl").exists()  # of another export


def test_nothing_to_export_is_an_error_with_a_remedy(odd, tmp_path):
    with pytest.raises(InputError, match=r"as trl-dpo \(.*no ranked answers\)\n.*remedy: build with"):
        export(odd, "trl-dpo", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="try --pairs side"):
        export(with_answers(odd, [("talk", "a", None, "align")]), "trl-dpo", tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="choose other origins"):
        export(odd, "alpaca", tmp_path / "x.jsonl", origins=["augmented"])
    with pytest.raises(InputError, match="lies inside the manifest"):
        export(odd, "alpaca", odd.folder / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_origins_and_weights(real, odd, tmp_path):
    assert {r["origin"] for r in split(rows_of(real, "trl-sft", origins=["replay"]))[0]} == {"replay"}
    heavy = replace(odd, samples=odd.samples.with_columns(weight=pl.lit(2.0)))
    assert "5 rows have a weight other than 1" in export(heavy, "openai", tmp_path / "x.jsonl").notes[0]


def test_dataset_info_keeps_other_entries(real, tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    export(real, "llamafactory", tmp_path / "rows.jsonl")
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["mine"] == {"file_name": "mine.json"}
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert info["rows"]["file_name"] == "rows.jsonl" and info["rows"]["formatting"] == "sharegpt"
    assert set(info["rows"]["columns"].values()) == row.keys()
    (tmp_path / "dataset_info.json").write_text("[1]")
    with pytest.raises(InputError, match=r"not a dataset_info\.json"):
        export(real, "llamafactory", tmp_path / "rows.jsonl", force=True)


def test_the_command_line(real, tmp_path):
    def curate(*words):
        return called(main, *words, cwd=tmp_path)

    beside = real.folder.with_name("run.trl-dpo.jsonl")
    done = curate("export", real.folder, "--to", "trl-dpo")
    assert done.returncode == 0, done.stderr
    assert str(beside) in done.stdout and "4 left out: no ranked answers" in done.stdout
    again = curate("export", real.folder, "--to", "trl-dpo")
    assert again.returncode == 1 and "--force" in again.stderr and "Traceback" not in again.stderr
    done = curate("export", real.folder, "--to", "alpaca", "--out", "a.jsonl", "--origin", "replay", "--json")
    assert json.loads(done.stdout) == {"file": "a.jsonl", "rows": 4, "skipped": 0, "notes": [], "skipped_file": None}
    assert curate("export", real.folder, "--to", "alpaca", "--origin", "gold").returncode == 2
    assert curate("export", real.folder, "--to", "csv").returncode == 2
    assert curate("export", tmp_path, "--to", "alpaca", "--out", "b.jsonl").returncode == 1


# --- each one loaded and used for real ---


def loaded(manifest, to, tmp_path, **more):
    done = export(manifest, to, tmp_path / "rows.jsonl", **more)
    data = load_dataset("json", data_files=str(done.file), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.num_rows == done.rows
    return data


def trainer_of(kind, tmp_path, data, **more):
    """A trainer of TRL over the starter model, one step on the CPU."""
    trl = pytest.importorskip("trl", reason="TRL is in the extra `dev`: pip install -e '.[dev]'")
    from transformers import AutoTokenizer

    extra = more.pop("extra", {})
    config = getattr(trl, f"{kind}Config")(
        str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_steps=1,
        model_init_kwargs={"dtype": "float32"}, **extra,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    return getattr(trl, f"{kind}Trainer")(STARTER, args=config, train_dataset=data, processing_class=tokenizer, **more)


def test_sft_takes_a_step(real, tmp_path):
    data = loaded(real, "trl-sft", tmp_path)
    trainer = trainer_of("SFT", tmp_path, data)
    row = trainer.train_dataset[0]
    # the loss is on the completion and its end alone
    answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert data[0]["completion"][0]["content"] in trainer.processing_class.decode(answer)
    assert data[0]["prompt"][0]["content"] not in trainer.processing_class.decode(answer)
    assert trainer.train().training_loss > 0


def test_sft_takes_tools_and_documents(odd, tmp_path):
    data = loaded(odd, "trl-sft", tmp_path)
    calls = next(row for row in data if row["task"] == "calls")
    assert calls["completion"][0]["tool_calls"] == [CALL]  # as it was, whatever stands in other rows
    assert trainer_of("SFT", tmp_path, data).train().training_loss > 0
    documents = replace(odd, samples=odd.samples.filter(task="news"))
    (tmp_path / "news").mkdir()
    assert trainer_of("SFT", tmp_path, loaded(documents, "trl-sft", tmp_path / "news")).train().training_loss > 0


def test_dpo_takes_a_step(real, tmp_path):
    trainer = trainer_of("DPO", tmp_path, loaded(real, "trl-dpo", tmp_path))
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)  # −log σ(0): policy and reference are one


def test_grpo_takes_a_step_and_sees_the_references(real, tmp_path):
    seen = []

    def reward(completions, references, uid, **_):
        seen.extend(zip(uid, references, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    extra = {"num_generations": 2, "max_completion_length": 4, "steps_per_generation": 1}
    data = loaded(real, "trl-prompts", tmp_path)
    trainer_of("GRPO", tmp_path, data, reward_funcs=reward, extra=extra).train()
    references = {row["uid"]: row["references"] for row in real.samples.iter_rows(named=True)}
    assert len(seen) == 2 and all(references[uid] == given for uid, given in seen)


@pytest.mark.parametrize("to", ["alpaca", "llamafactory", "openai"])
def test_chat_formats_train_through_a_chat_template(real, tmp_path, to):
    def messages(row):
        if to == "openai":
            return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if to == "llamafactory":
            return from_sharegpt(row)
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        return [user(asked), assistant(row["output"])]

    data = loaded(real, to, tmp_path)
    talks = data.map(lambda row: {"messages": messages(row)}, remove_columns=data.column_names)
    expected = {json.dumps([*p, *c]) for p, c in real.samples.select("prompt", "completion").iter_rows()}
    assert {json.dumps([{k: m[k] for k in ("role", "content")} for m in row["messages"]]) for row in talks} == expected
    assert trainer_of("SFT", tmp_path, talks).train().training_loss > 0
