import json
import math
import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from curate.config import EmbedConfig, RewardConfig
from curate.errors import InputError
from curate.models.base import Prompt
from curate.models.embedder import open_embedder
from curate.models.memory import halving
from curate.models.reward import contains, exact_match, open_reward, rouge_l
from curate.models.weights import MINILM, model_folder

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "examples" / "starter"
PROMPTS = [Prompt(f"row-{i}", [{"role": "user", "content": f"Question {i}: add {i} and {i}."}]) for i in range(4)]
ANSWERS = ["Two.", "the answer is four, and not five", "six", ""]


@pytest.fixture(scope="module")
def embedder():
    return open_embedder(EmbedConfig.model_validate({}))


def judge(reward, completions, references, prompts=None):
    return reward(prompts or [Prompt(f"u{i}", []) for i in range(len(completions))], completions, references)


# --- texts ---


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the cat sat on the mat", ["the cat was on a mat"], 2 / 3),  # LCS the-cat-on-mat = 4; P = R = 4/6
        ("a b c", ["a x b y z"], 0.5),  # LCS a-b = 2; P = 2/3, R = 2/5; 2PR/(P + R) = (8/15) / (16/15)
        ("The gunman kill police", ["police killed the gunman"], 0.5),  # Lin 2004: LCS the-gunman = 2; P = R = 2/4
        ("Police kills, the gunman!", ["police killed the gunman"], 1),  # kills and killed: one stem
        ("a b", ["x y", "a b c", "a"], 0.8),  # the best of 0, LCS 2: P = 1, R = 2/3, and LCS 1: P = 1/2, R = 1 -> 2/3
        ("", ["a"], 0),
        ("a", [""], 0),
        ("Привет мир", ["привет, МИР!"], 1),
        ("今天天气好", ["今天天气很好"], 10 / 11),  # characters: LCS 5; P = 5/5, R = 5/6; (5/3) / (11/6)
        ("नमस्ते दुनिया", ["नमस्ते"], 2 / 3),  # marks belong to their letters: words; P = 1/2, R = 1
        ("cafe\u0301", ["café"], 1),
        ("+", ["+"], 1),
        ("+", ["-"], 0),
    ],
)
def test_rouge_l(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected)


@given(st.text(), st.lists(st.text(), min_size=1, max_size=4))
def test_rouge_l_is_a_share_that_ignores_the_order_of_references(prediction, references):
    score = rouge_l(prediction, references)
    assert 0 <= score <= 1
    assert score == rouge_l(prediction, references[::-1]) == max(rouge_l(prediction, [r]) for r in references)
    assert rouge_l(prediction, [*references, prediction]) == (1 if prediction.strip() else 0)
    assert score == rouge_l(prediction.upper().lower(), references) or not prediction.isascii()


@given(*[st.text(st.sampled_from(string.ascii_letters[:6] + "gins1 -'.,"), max_size=60)] * 2)
def test_ascii_texts_score_as_the_package_scores_them(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    assume(any(c.isalnum() for c in prediction) and any(c.isalnum() for c in reference))
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, [reference]) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "inside"),
    [
        ("Yes.", ["no", " yes"], 1, 1),
        ("The  answer\nis: 42!", ["the answer is 42"], 1, 1),
        ("the answer", ["answer"], 0, 1),  # articles stay; a substring is inside
        ("100", ["1"], 0, 1),  # a substring need not be a word
        ("Paris", ["It is Paris"], 0, 0),
        ("-5", ["5"], 1, 1),  # Natural Instructions drops punctuation, the minus too
        ("+", ["-"], 0, 0),  # but where nothing else is there, it counts
        ("a + b", ["+"], 0, 1),
        ("", ["+"], 0, 0),
        ("anything", [""], 0, 0),
        (" ", [""], 1, 1),
        ("ДА", ["да"], 1, 1),
    ],
)
def test_exact_and_contains(prediction, references, exact, inside):
    assert (exact_match(prediction, references), contains(prediction, references)) == (exact, inside)


@given(st.text(), st.text(), st.text())
def test_what_is_equal_is_inside(before, text, after):
    assert exact_match(text, [text]) == contains(text, [text]) == 1
    bare = "".join(c for c in text if c not in string.punctuation).strip()
    assert not bare or contains(f"{before}{text}{after}".lower(), [text.lower()]) == 1


@pytest.mark.parametrize(
    ("kind", "expected"), [("rouge_l", [0.5, 1, 0]), ("exact", [0, 1, 0]), ("contains", [1, 1, 0])]
)
def test_rewards_against_references(kind, expected, embedder, tmp_path):
    reward = open_reward(RewardConfig(kind=kind), tmp_path, embedder)
    assert reward.fingerprint == kind
    found = judge(reward, ["b a c", "Same", "x", "x"], [["a"], ["same"], ["y"], []])  # LCS 1: P = 1/3, R = 1
    assert found[:3] == expected
    assert math.isnan(found[3])
    assert judge(reward, [], []) == []


# --- similarity ---


def test_similarity(embedder, tmp_path):
    reward = open_reward(RewardConfig(kind="similarity"), tmp_path, embedder)
    assert reward.fingerprint == f"similarity:{embedder.fingerprint}"
    completions = ["A cat sat down.", "A cat sat down.", "The market fell.", "", "x", "y"]
    stocks, cat = "Stocks lost value.", "The cat sits."
    references = [[stocks, cat], ["A cat sat down."], [stocks], ["a"], [], [" "]]
    found = judge(reward, completions, references)
    a, b, c = embedder.encode(["A cat sat down.", cat, stocks]).astype(float)
    assert found[0] == pytest.approx(max(a @ b, a @ c), abs=1e-5)
    assert a @ b > 0.7 > 0.3 > a @ c
    assert found[1] == pytest.approx(1, abs=1e-6)
    assert found[1] <= 1
    assert 0.3 < found[2] < 1
    assert np.isnan(found[3:]).all()
    order = [4, 2, 0, 5, 1, 3]
    again = judge(reward, [completions[i] for i in order], [references[i][::-1] for i in order])
    assert np.array_equal(again, [found[i] for i in order], equal_nan=True)


def test_similarity_embeds_each_text_once(tmp_path):
    class Counting:
        fingerprint = "counting"
        seen: list[list[str]] = []  # noqa: RUF012 - of this test only

        def encode(self, texts):
            self.seen.append(list(texts))
            return np.array([[1, 0] if t == "b" else [0.6, 0.8] for t in texts], np.float32)

    counting = Counting()
    reward = open_reward(RewardConfig(kind="similarity"), tmp_path, counting)
    assert judge(reward, ["b", "b", "c"], [["c"], ["c", "b"], ["c"]]) == pytest.approx([0.6, 1, 1])
    assert np.isnan(judge(reward, ["", "b"], [["c"], []])).all()
    assert counting.seen == [["b", "c"], ["b", "c"]]


def test_similarity_needs_an_embedder_of_new_texts(tmp_path):
    (tmp_path / "v.parquet").touch()
    stored = open_embedder(EmbedConfig(backend="precomputed", path="v.parquet"), tmp_path)
    with pytest.raises(InputError, match=r"rollouts\.reward\.kind similarity.*precomputed"):
        open_reward(RewardConfig(kind="similarity"), tmp_path, stored)


# --- a reward model ---


def write_model(folder, *, labels=1, template=True, pad=True, limit=64, **head):
    """A tiny random Llama with a classification head, and the starter's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.pad_token = tokenizer.pad_token if pad else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=limit, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    if "value" in head:
        model.score.weight.data.fill_(head["value"])
    model.save_pretrained(folder)
    return model.eval(), tokenizer


def open_model(folder, batch_size=32):
    return open_reward(RewardConfig(kind="model", model=folder.name, batch_size=batch_size), folder.parent, None)


def by_hand(model, ids):
    """The head at the last token of one sequence without padding."""
    with torch.inference_mode():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_a_batch_is_judged_as_its_rows_are(tmp_path, template, pad):
    model, tokenizer = write_model(tmp_path / "m", template=template, pad=pad)
    reward = open_model(tmp_path / "m")
    together = judge(reward, ANSWERS, [[]] * 4, PROMPTS)
    if template:
        texts = [f"<|user|>\n{p.messages[0]['content']}<|end|>\n<|assistant|>\n{a}<|end|>\n"
                 for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # fmt: skip
    else:
        texts = [f"{p.messages[0]['content']}\n\n{a}".rstrip("\n") for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert together == pytest.approx([by_hand(model, tokenizer(t)["input_ids"]) for t in texts], abs=1e-5)
    assert len({round(r, 3) for r in together}) == 4
    alone = [judge(reward, [a], [[]], [p])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx(judge(open_model(tmp_path / "m", 3), ANSWERS, [[]] * 4, PROMPTS), abs=1e-5)
    order = random.Random(0).sample(range(4), 4)
    shuffled = judge(reward, [ANSWERS[i] for i in order], [[]] * 4, [PROMPTS[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_what_is_too_long_loses_its_beginning(tmp_path):
    model, tokenizer = write_model(tmp_path / "m", limit=32)
    long = [Prompt(u, [{"role": "user", "content": f"{u} {'one two three ' * 40}"}]) for u in ("apple", "pear")]
    first, second = judge(open_model(tmp_path / "m"), ["four", "four"], [[], []], long)
    text = f"<|user|>\n{long[0].messages[0]['content']}<|end|>\n<|assistant|>\nfour<|end|>\n"
    assert first == second == pytest.approx(by_hand(model, tokenizer(text)["input_ids"][-32:]), abs=1e-5)


def test_an_encoder_keeps_its_first_and_last_token(tmp_path):
    """Its head reads at [CLS]: what is cut on the left is cut behind it."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    AutoTokenizer.from_pretrained(model_folder(MINILM, tmp_path)[0]).save_pretrained(tmp_path / "m")
    model = BertForSequenceClassification(
        BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
                   max_position_embeddings=8, initializer_range=0.5)
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    prompts = [Prompt("long", [{"role": "user", "content": "one two " * 20}]), Prompt("short", [])]
    found = judge(open_model(tmp_path / "m"), ["cat", "dog"], [[], []], prompts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    with torch.inference_mode():
        for reward, text in zip(found, ["two one two one two cat", "dog"], strict=True):  # 6 words, [CLS] and [SEP]
            assert reward == pytest.approx(model(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-5)


def test_plain_text_and_tools_reach_the_model(tmp_path):
    model, tokenizer = write_model(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{{ tools[0]['name'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    prompts = [Prompt("plain", []), Prompt("tools", [{"role": "user", "content": "ask"}], '[{"name": "search"}]')]
    found = judge(open_model(tmp_path / "m"), ["text", "answer"], [[], []], prompts)
    assert found == pytest.approx([by_hand(model, tokenizer(t)["input_ids"]) for t in ("text", "searchaskanswer")])


def test_memory_that_runs_out_changes_no_reward(tmp_path, monkeypatch):
    write_model(tmp_path / "m")
    reward, small = open_model(tmp_path / "m"), open_model(tmp_path / "m")
    run, sizes = small._outputs, []

    def tight(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return run(rows)

    monkeypatch.setattr(small, "_outputs", tight)
    expected = judge(reward, ANSWERS, [[]] * 4, PROMPTS)
    assert judge(small, ANSWERS, [[]] * 4, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert sizes == [4, 2, 2]


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / name, value=value)
    a, b, c = (open_model(tmp_path / name).fingerprint for name in "abc")
    assert a.startswith("model:")
    assert a == b != c


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_nan(tmp_path, value):
    write_model(tmp_path / "m", value=value)
    assert np.isnan(judge(open_model(tmp_path / "m"), ANSWERS, [[]] * 4, PROMPTS)).all()


def test_models_that_are_no_rewards_are_refused(tmp_path):
    for labels in (2, 3):  # transformers writes no labels where there are two
        write_model(tmp_path / "many", labels=labels)
        with pytest.raises(InputError, match=rf"reward\.model 'many': {labels} labels, .*LABEL_1.*\n.*num_labels=1"):
            open_model(tmp_path / "many")
    with pytest.raises(InputError, match=r"not a sequence classifier \(LlamaForCausalLM\)"):
        open_model(STARTER)
    (tmp_path / "pickle").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / "pickle" / "config.json").write_text("{}")
        (tmp_path / "pickle" / name).touch()
        with pytest.raises(InputError, match=rf"rollouts\.reward\.model 'pickle'.*{name}.*\n.*save_pretrained"):
            open_model(tmp_path / "pickle")
        (tmp_path / "pickle" / name).unlink()
    with pytest.raises(InputError, match=r"rollouts\.reward\.model 'pickle'.*no \*\.safetensors"):
        open_model(tmp_path / "pickle")


def test_broken_models_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "score.weight"}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"lack the weights score\.weight"):
        judge(open_model(tmp_path / "m"), ["a"], [[]])
    weights.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"rollouts\.reward\.model 'm' cannot be loaded"):
        judge(open_model(tmp_path / "m"), ["a"], [[]])


def test_a_tokenizer_without_any_end_judges_one_by_one(tmp_path):
    write_model(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    del settings["pad_token"], settings["eos_token"]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="neither a pad nor an end token"):
        judge(open_model(tmp_path / "m"), ANSWERS, [[]] * 4, PROMPTS)
    assert np.isfinite(judge(open_model(tmp_path / "m", 1), ANSWERS, [[]] * 4, PROMPTS)).all()


# --- memory ---


def test_halving_goes_on_with_smaller_parts():
    sizes = []

    def run(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item * 10 for item in items]

    assert halving(list(range(10)), run) == [item * 10 for item in range(10)]
    assert sizes == [10, 5, 2, 3, 5, 2, 3]  # 10 = 5 + 5, 5 = 2 + 3
    assert halving([], run) == []


def test_halving_ends_at_one_item():
    def never(items):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(InputError, match=r"policy\.model: .*single sequence: CUDA out of memory") as info:
        halving([1, 2, 3], never, "policy.model")
    assert "remedy: " in str(info.value)


def test_halving_passes_other_errors_on():
    def wrong(items):
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):
        halving([1, 2], wrong)


def test_a_reward_model_with_another_models_tokenizer_is_refused(tmp_path):
    _, tokenizer = write_model(tmp_path / "m")
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="the tokenizer has token 6144, the model knows 6144 tokens"):
        judge(open_model(tmp_path / "m"), ["a"], [[]], PROMPTS[:1])
