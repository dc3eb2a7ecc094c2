"""`LocalModel` against one plain float64 pass a row, on the shipped model and on tiny ones of every kind of cache."""

import copy
import functools
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from curate.config import ModelConfig
from curate.errors import InputError
from curate.models import decode as decoding
from curate.models.base import Prompt, Sampling
from curate.models.chat import answer_ids, plain_message, prompt_ids
from curate.models.local import LocalModel, tokenizer_fingerprint

ROOT = Path(__file__).parent.parent.parent
STARTER = ROOT / "examples" / "starter"
END = 1  # <|end|> of the starter
MIXED = Sampling(k=3, temperature=0.7, top_p=0.9, max_new_tokens=12, seed=5)

SPECIAL = ["<end>", "<stop>", "<pad>", "<begin>"]  # tokens 0 to 3 of the tiny models; the bytes follow
ENDS = [0, 1, *range(40, 64)]  # a tenth of the 260 tokens, so that random completions end at different times
OURS = dict(vocab_size=260, bos_token_id=None, eos_token_id=0, pad_token_id=None)
SMALL = dict(OURS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
             num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3)  # fmt: skip
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
KINDS = {
    "llama": SMALL,  # 4 query heads on 2 key-value heads
    "gpt2": dict(OURS, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3),  # learned positions
    "mistral": dict(SMALL, sliding_window=6),
    "gemma3_text": dict(SMALL, num_hidden_layers=4, sliding_window=6, sliding_window_pattern=2,
                        query_pre_attn_scalar=8),  # a window in every second layer
    "qwen3_5_text": dict(SMALL, num_hidden_layers=4, **LINEAR),  # three recurrent layers, then attention
    "falcon_h1": dict(SMALL, **MAMBA),  # both in one layer
    "mamba": dict(SMALL, state_size=8),  # a recurrent state and no attention
    "bloom": dict(OURS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),  # ALiBi: takes no positions
    "bart": dict(OURS, d_model=32, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
                 max_position_embeddings=96, init_std=0.3, is_encoder_decoder=False),  # counts positions itself
    "rwkv": dict(OURS, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),  # takes no cache
}  # fmt: skip


# --- models and texts ---


def opened(folder, **config):
    return LocalModel(ModelConfig(model=str(folder), device="cpu", dtype="float32", **config))


def sized(model, batch_size):
    """The same model, `batch_size` sequences a pass."""
    other = opened(model.folder, batch_size=batch_size)
    other.model, other.tokenizer = model.model, model.tokenizer
    return other


@pytest.fixture(scope="module")
def starter():
    return opened(STARTER)


@pytest.fixture(scope="module")
def starter64():
    return AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float64).eval()


def byte_tokenizer(**settings):
    """One token a byte; no pad token, no template, unless `settings` says so."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "<end>", **settings})


def write_tiny(folder, kind="llama", ends=ENDS, tokenizer=None, **changed):
    """A random model with its tokenizer."""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**KINDS[kind], **changed}))
    net.generation_config.eos_token_id = ends
    net.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(kind) -> a random model of that architecture, without pad token and chat template."""

    @functools.cache
    def make(kind="llama"):
        return opened(write_tiny(tmp_path_factory.mktemp(kind), kind), batch_size=5)

    return make


def ask(text, uid=None, **more):
    return Prompt(uid or f"uid-{text}", [{"role": "user", "content": text}], **more)


def answer(text):
    return [{"role": "assistant", "content": text}]


@functools.cache
def real_rows(n, most=450):
    """(question, answer) of n rows of examples/superni, evenly from all of them, of at most so many characters × 4."""
    rows = []
    for path in sorted((ROOT / "examples/superni").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [(f"{r['definition']}\n\n{r['input']}", r["outputs"][0]) for r in map(json.loads, file)]
    rows = [row for row in rows if len(row[0]) + len(row[1]) <= 4 * most]
    return rows[:: len(rows) // n][:n]


SHORT = [ask(text, f"row-{i}") for i, (text, _) in enumerate(real_rows(10, 110))]
BYTES = [ask("abcdefghij klmnop qrstuvwxyz"[:n], f"row-{n}") for n in (1, 9, 17, 28, 5, 9)]


def tokens(drawn):
    return [[c.token_ids for c in some] for some in drawn]


@torch.inference_mode()
def reference(net64, prompt, ids, temperature=1.0, top_p=1.0):
    """Log-probabilities of tokens `ids` behind tokens `prompt`: one float64 pass of one row, the nucleus by hand."""
    logits = net64(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    for row in p if top_p < 1 else ():
        order = np.argsort(-row, kind="stable")
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= top_p]] = 0  # the nucleus: fewest tokens whose probabilities reach top_p
        row /= row.sum()
    with np.errstate(divide="ignore"):
        return np.log(p[range(len(ids)), ids])


# --- the scorer ---


def test_scores_are_those_of_a_plain_pass_over_the_row(starter, starter64):
    rows = real_rows(40, 300)
    found = starter.score([(ask(question), answer(text)) for question, text in rows])
    lengths = set()
    for (question, text), completion in zip(rows, found, strict=True):
        prompt = starter.tokenizer(f"<|user|>\n{question}<|end|>\n<|assistant|>\n")["input_ids"]
        ids = starter.tokenizer(f"{text}<|end|>")["input_ids"]
        assert completion.token_ids == ids and ids[-1] == END and ids.count(END) == 1
        assert completion.token_logps == pytest.approx(reference(starter64, prompt, ids), abs=1e-4)
        assert (completion.text, completion.n_tokens, completion.finished) == (text, len(ids), None)
        lengths.add(len(prompt) + len(ids))
    assert max(lengths) > 4 * min(lengths)


def test_batches_and_order_change_no_score(starter):
    pairs = [(ask(question), answer(text)) for question, text in real_rows(20, 150)]
    expected = starter.score(pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    for size in (1, 7, 32):
        found = sized(starter, size).score([pairs[i] for i in order])
        for i, completion in zip(order, found, strict=True):
            assert completion.token_ids == expected[i].token_ids
            assert completion.token_logps == pytest.approx(expected[i].token_logps, abs=1e-5)


def test_logits_are_never_held_for_more_than_the_limit(starter, monkeypatch):
    pairs = [(ask(question), answer(text)) for question, text in real_rows(12, 110)]
    expected = starter.score(pairs)
    monkeypatch.setattr("curate.models.local.LOGITS", 3 * 6144)  # batches are halved down to three positions, or a row
    for one, other in zip(starter.score(pairs), expected, strict=True):
        assert one.token_logps == pytest.approx(other.token_logps, abs=1e-5)


def test_what_does_not_fit_has_no_score(tiny):
    # No template: "x" * n + "\n\n" and the answer with its end token: n + 2 + 3 tokens of a context of 96.
    fits, too_long = (ask("x" * 91), answer("ab")), (ask("x" * 92), answer("ab"))
    found = tiny().score([too_long, fits, too_long])
    assert found[0] is None and found[2] is None
    assert found[1].n_tokens == 3
    assert tiny().score([]) == []


def test_empty_prompts_and_answers(starter, starter64, tiny):
    empty, nothing = starter.score([(ask("Say nothing."), answer("")), (Prompt("u", []), answer("Some text"))])
    head = starter.tokenizer("<|user|>\nSay nothing.<|end|>\n<|assistant|>\n")["input_ids"]
    assert empty.token_ids == [END]
    assert empty.token_logps == pytest.approx(reference(starter64, head, [END]), abs=1e-4)
    ids = [*starter.tokenizer("Some text")["input_ids"], END]  # plain text begins behind the end token: there is no bos
    assert nothing.token_ids == ids
    assert nothing.token_logps == pytest.approx(reference(starter64, [END], ids), abs=1e-4)
    [bare] = tiny().score([(Prompt("u", []), answer(""))])
    assert bare.token_ids == [0] and bare.token_logps[0] < 0
    [[drawn]] = starter.generate([Prompt("u", [])], Sampling(max_new_tokens=3))
    assert drawn.prompt_tokens == 1


def test_without_a_token_to_begin_with(tmp_path):
    folder = write_tiny(tmp_path, tokenizer=byte_tokenizer(eos_token=None))
    model = opened(folder)
    [scored] = model.score([(Prompt("u", []), answer("abc"))])
    assert scored.token_ids == model.tokenizer("bc")["input_ids"]  # nothing predicts the first token
    with pytest.raises(InputError, match="row u: an empty prompt"):
        model.generate([Prompt("u", [])], Sampling())


# --- the generator ---


NUCLEUS, PLAIN, GREEDY = {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0}, {"temperature": 0.0}


@pytest.mark.parametrize("how", [NUCLEUS, PLAIN, GREEDY], ids=["nucleus", "plain", "greedy"])
def test_log_probabilities_are_those_of_the_distribution_drawn_from(starter, starter64, how):
    sampling = Sampling(k=2, max_new_tokens=9, seed=3, **how)
    finished = set()
    for prompt, some in zip(SHORT, starter.generate(SHORT, sampling), strict=True):
        head = prompt_ids(starter.tokenizer, prompt)
        assert len(some) == 2
        for c in some:
            expected = reference(starter64, head, c.token_ids, how["temperature"] or 1, how.get("top_p", 1))
            assert c.token_logps == pytest.approx(expected, abs=1e-4)  # −∞ would be a token outside the nucleus
            assert c.finished == (c.token_ids[-1] == END)
            assert END not in c.token_ids[:-1]
            assert c.finished or len(c.token_ids) == 9
            assert (c.n_tokens, c.prompt_tokens) == (len(c.token_ids), len(head))
            assert c.text == starter.tokenizer.decode([t for t in c.token_ids if t != END])
            finished.add(c.finished)
    assert finished == {True, False}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rwkv"])
def test_every_kind_of_cache_gives_what_a_plain_pass_gives(tiny, kind, monkeypatch):
    model, net64 = tiny(kind), copy.deepcopy(tiny(kind).model).double()
    expected = model.generate(BYTES, MIXED)
    heads = [model.tokenizer(f"{p.messages[0]['content']}\n\n")["input_ids"] for p in BYTES]
    for head, some in zip(heads, expected, strict=True):
        for c in some:
            assert c.token_logps == pytest.approx(reference(net64, head, c.token_ids, 0.7, 0.9), abs=1e-4)
            assert c.finished == (c.token_ids[-1] in ENDS) and not set(ENDS) & set(c.token_ids[:-1])
            assert c.finished or len(c.token_ids) == 12
    assert len({c.n_tokens for some in expected for c in some}) > 3  # rows end at different times
    for size in (1, 32):
        assert tokens(sized(model, size).generate(BYTES, MIXED)) == tokens(expected)
    for compact, room in ((0.0, 64), (1.0, 64), (0.8, 1)):
        monkeypatch.setattr(decoding, "COMPACT", compact)  # ended rows stay to the end; leave at once
        monkeypatch.setattr(decoding, "ROOM", room)  # the cache is copied at every second token
        assert tokens(model.generate(BYTES, MIXED)) == tokens(expected)
    pairs = [(p, answer("xy z" * i)) for i, p in enumerate(BYTES)]
    for head, (_, text), c in zip(heads, pairs, model.score(pairs), strict=True):
        assert c.token_ids == [*model.tokenizer(text[0]["content"])["input_ids"], 0]
        assert c.token_logps == pytest.approx(reference(net64, head, c.token_ids), abs=1e-4)


def test_draws_depend_on_nothing_but_seed_uid_and_number(starter):
    sampling = Sampling(k=3, temperature=0.8, top_p=0.95, max_new_tokens=7, seed=1)
    expected = tokens(starter.generate(SHORT, sampling))
    order = np.random.default_rng(1).permutation(len(SHORT))
    for size in (1, 5):
        found = tokens(sized(starter, size).generate([SHORT[i] for i in order], sampling))
        assert found == [expected[i] for i in order]
    for k in (1, 5):
        found = tokens(starter.generate(SHORT[:5], Sampling(k, 0.8, 0.95, 7, 1)))
        assert [some[:3] for some in found] == [some[:k] for some in expected[:5]]
    shorter = tokens(starter.generate(SHORT[:5], Sampling(3, 0.8, 0.95, 4, 1)))
    assert shorter == [[ids[:4] for ids in some] for some in expected[:5]]
    other = tokens(starter.generate(SHORT, Sampling(3, 0.8, 0.95, 7, 2)))
    assert sum(a != b for a, b in zip(other, expected, strict=True)) > len(SHORT) / 2
    twins = [Prompt("twin", SHORT[0].messages), SHORT[0]]
    one, same = tokens(starter.generate(twins, sampling))
    assert one != same and same == expected[0]


def test_greedy_is_what_transformers_generates(starter):
    prompts = [ask(text) for text, _ in real_rows(20, 150)]
    ids = [prompt_ids(starter.tokenizer, p) for p in prompts]
    batch = starter.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    out = starter.model.generate(**batch, do_sample=False, max_new_tokens=20)[:, batch["input_ids"].shape[1] :].tolist()
    found = starter.generate(prompts, Sampling(temperature=0, max_new_tokens=20))
    for row, [c] in zip(out, found, strict=True):
        assert c.token_ids == row[: len(c.token_ids)]
        assert set(row[len(c.token_ids) :]) <= {0}  # what generate writes behind an ended row


@pytest.mark.parametrize("how", [NUCLEUS, PLAIN], ids=["nucleus", "plain"])
def test_the_first_token_has_the_distribution_of_the_softmax(tiny, how):
    draws = 4000
    model, head = sized(tiny(), 1000), tiny().tokenizer("abc\n\n")["input_ids"]
    [some] = model.generate([ask("abc")], Sampling(k=draws, max_new_tokens=1, seed=7, **how))
    counts = np.bincount([c.token_ids[0] for c in some], minlength=260)
    net64 = copy.deepcopy(tiny().model).double()
    p = np.array([math.exp(reference(net64, head, [token], **how)[0]) for token in range(260)])
    assert p.sum() == pytest.approx(1) and counts[p == 0].sum() == 0
    expected = draws * p
    often = expected >= 5  # Pearson's rule; the rare ones are one cell
    cells = [(o, e) for o, e in zip(counts[often], expected[often], strict=True)]
    if (rest := expected[~often].sum()) > 0:
        cells.append((counts[~often].sum(), rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    # χ² with one degree of freedom less than cells: a right sampler exceeds the bound for one seed in a thousand.
    assert len(cells) > 8 and statistic < chi2.ppf(0.999, len(cells) - 1)


@given(st.data())
def test_a_draw_inverts_the_cumulative_distribution(data):
    n, v = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 50))
    row = st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=v, max_size=v)
    logits = data.draw(st.lists(row.filter(lambda row: max(row) > -math.inf), min_size=n, max_size=n))
    u = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=n, max_size=n))
    how = Sampling(1, data.draw(st.sampled_from([0.3, 1, 2.0])), data.draw(st.sampled_from([0.1, 0.6, 1.0])))
    token, logp = decoding._draw(torch.tensor(logits), torch.tensor(u, dtype=torch.float64), how)
    p = torch.exp(decoding._processors(how)(None, torch.tensor(logits).clone()).double().log_softmax(-1)).numpy()
    for row, number, t, lp in zip(p, u, token.tolist(), logp.tolist(), strict=True):
        assert row[t] > 0 and lp == pytest.approx(math.log(row[t]), abs=1e-4)
        assert row[:t].sum() - 1e-5 <= number <= row[: t + 1].sum() + 1e-5


@given(st.lists(st.lists(st.integers(4, 259), min_size=1, max_size=20), min_size=1, max_size=5), st.integers(0, 7))
@settings(max_examples=15)
def test_left_padding_gives_the_logits_of_the_unpadded_row(tiny, rows, more):
    for kind in ("llama", "gpt2", "mistral"):
        net = tiny(kind).model
        ids, mask = decoding.padded(rows, 9, "cpu")
        ids, mask = (torch.nn.functional.pad(x, (more, 0)) for x in (ids, mask))
        with torch.inference_mode():
            logits = net(input_ids=ids, **decoding.step_inputs(net, mask, ids.shape[1])).logits
            for row, padded in zip(rows, logits, strict=True):
                plain = net(input_ids=torch.tensor([row])).logits[0]
                assert torch.allclose(padded[-len(row) :], plain, atol=1e-4)


def test_a_model_may_have_many_ends(tmp_path):
    # config.json names none, so it holds LlamaConfig's default, 2; generation_config.json is what counts.
    folder = write_tiny(tmp_path, ends=[1, 70, 71], eos_token_id=2)
    model = opened(folder)
    assert model._ends == [0, 1, 70, 71]  # the tokenizer's own is one too
    for some in model.generate(BYTES, Sampling(k=8, max_new_tokens=60, temperature=2)):
        for c in some:
            assert c.finished == (c.token_ids[-1] in model._ends)
            body = c.token_ids[:-1] if c.finished else c.token_ids
            assert not set(body) & set(model._ends)
            assert c.text == model.tokenizer.decode(body, skip_special_tokens=True)  # 70 and 71 are no special tokens
    (folder / "generation_config.json").unlink()
    assert opened(folder)._ends == [0, 2]


def test_one_new_token_and_one_completion(starter):
    [[c]] = starter.generate(SHORT[:1], Sampling(max_new_tokens=1))
    assert len(c.token_ids) == len(c.token_logps) == c.n_tokens == 1
    assert starter.generate([], Sampling()) == []


# --- memory ---


def short_of_memory(monkeypatch, model, most):
    """Forward passes of more than `most` rows find no memory; the sizes that were tried."""
    forward, tried = model.model.forward, []

    @functools.wraps(forward)
    def limited(*args, **kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    return tried


@pytest.mark.parametrize("most", [1, 2, 7])
def test_too_little_memory_halves_the_batch(tiny, monkeypatch, most):
    model, sampling = sized(tiny(), 32), Sampling(k=4, max_new_tokens=8)
    pairs = [(p, answer("x" * i)) for i, p in enumerate(BYTES)]
    expected, scores = model.generate(BYTES, sampling), model.score(pairs)
    tried = short_of_memory(monkeypatch, model, most)
    assert tokens(model.generate(BYTES, sampling)) == tokens(expected)  # the completions of one prompt part, too
    for one, other in zip(model.score(pairs), scores, strict=True):
        assert one.token_logps == pytest.approx(other.token_logps, abs=1e-5)
    assert max(tried) > most


def test_too_little_memory_for_one_row_is_an_error(tiny, monkeypatch):
    model = sized(tiny(), 32)
    short_of_memory(monkeypatch, model, 0)
    for work in (lambda: model.generate(BYTES, MIXED), lambda: model.score([(BYTES[0], answer("x"))])):
        with pytest.raises(InputError, match=r"(?s)policy\.model: .*not enough memory for a single sequence.*remedy"):
            work()


def test_no_pass_holds_more_sequences_than_batch_size(tiny, monkeypatch):
    model = sized(tiny(), 5)
    tried = short_of_memory(monkeypatch, model, 1000)
    model.generate(BYTES, Sampling(k=8, max_new_tokens=3))
    assert max(tried) == 5
    assert sum(n for n in tried) >= 6 * 8


# --- what cannot be used ---


def test_a_prompt_that_is_too_long_is_named(tiny):
    long = ask("x" * 90, "row-17")
    # 90 + 2 tokens, and 4 new ones: 96
    assert tiny().generate([long], Sampling(max_new_tokens=4))
    with pytest.raises(InputError, match=r"(?s)row row-17: a prompt of 92 tokens and 5 new ones.*96.*remedy.*too_long"):
        tiny().generate([BYTES[0], long], Sampling(max_new_tokens=5))
    assert tiny().room([long, ask("x" * 95), BYTES[0]]) == [4, -1, 93]


def test_the_context_is_the_architectures_where_the_config_names_none(tmp_path):
    boundless = opened(write_tiny(tmp_path / "whole", "bloom"))

    def context(kind, **changed):
        config = {"architectures": ["XForCausalLM"], "model_type": kind, **changed}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        return opened(tmp_path).context

    assert context("llama") == 2048 and context("gpt2") == 1024 and context("gpt2", n_positions=96) == 96
    nested = {"model_type": "gemma3_text", "hidden_size": 32}
    assert context("gemma3", text_config=nested) == 131072
    assert context("mamba") is None
    assert boundless.room([ask("x" * 1000)]) == [None]


def test_no_causal_language_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for config, message in [
        ({"architectures": ["BertForMaskedLM"]}, r"not a causal language model \(BertForMaskedLM\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "an encoder-decoder"),
        ({}, r"not a causal language model \(no config\)"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            opened(tmp_path)
    with pytest.raises(InputError, match=r"policy\.model '.*nowhere': neither a folder nor a model"):
        opened(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["XForCausalLM"], "model_type": "unheard-of"}))
    with pytest.raises(InputError, match=r"no usable config\.json"):
        assert opened(tmp_path).context


def test_a_model_without_a_shared_cache_can_score_only(tiny):
    model = tiny("rwkv")
    pairs = [(p, answer("xyz")) for p in BYTES]
    net64 = copy.deepcopy(model.model).double()
    for (p, _), c in zip(pairs, model.score(pairs), strict=True):
        expected = reference(net64, prompt_ids(model.tokenizer, p), c.token_ids)
        assert c.token_logps == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match=r"RwkvForCausalLM .* can score, but not generate"):
        model.generate(BYTES, MIXED)


def test_weights_that_cannot_be_used(tmp_path):
    whole = write_tiny(tmp_path / "whole")
    pickled = shutil.copytree(whole, tmp_path / "pickled")
    torch.save(load_file(whole / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"(?s)pickled weights.*remedy.*save_pretrained"):
        opened(pickled)
    cut = shutil.copytree(whole, tmp_path / "cut")
    data = (whole / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    lacking = shutil.copytree(whole, tmp_path / "lacking")
    weights = load_file(whole / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    for folder, message in (
        (cut, f"policy.model '{cut}' cannot be loaded: .*"),
        (lacking, r"lack the weights model\.layers\.1\.mlp\.up_proj\.weight"),
    ):
        model = opened(folder)
        assert len(model.fingerprint) == 64
        with pytest.raises(InputError, match=message):
            model.generate(BYTES, MIXED)
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no usable tokenizer"):
        opened(broken).room(BYTES)
    with pytest.raises(InputError, match="cannot be loaded"):
        assert LocalModel(ModelConfig(model=str(whole), device="no-such-device")).model


def test_the_tokenizer_of_another_model(tmp_path):
    more = byte_tokenizer()
    more.add_tokens(["<one more>"])
    folder = write_tiny(tmp_path / "more", tokenizer=more)
    with pytest.raises(InputError, match=r"(?s)the tokenizer has token 260, the model knows 260 tokens.*remedy"):
        opened(folder).generate(BYTES, MIXED)
    folder = write_tiny(tmp_path / "end", ends=[270], vocab_size=300)
    with pytest.raises(InputError, match=r"with token \[270\], which its tokenizer does not have .*with 0\)"):
        opened(folder).score([(BYTES[0], answer("x"))])


# --- templates ---


CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def templated(tmp_path, template):
    tokenizer = byte_tokenizer(chat_template=template)
    return opened(write_tiny(tmp_path, ends=[1], tokenizer=tokenizer, max_position_embeddings=300))


def test_an_answer_ends_with_the_token_that_the_template_writes(tmp_path):
    model = templated(tmp_path, CHATML)  # ends turns with <stop>; the tokenizer's own end token is <end>
    text = model.tokenizer
    assert prompt_ids(text, ask("hi")) == text("[user]hi<stop>\n[assistant]")["input_ids"]
    [c] = model.score([(ask("hi"), answer("yo"))])
    assert c.token_ids == text("yo<stop>")["input_ids"] and c.token_ids[-1] == 1  # without the line break behind it
    turns = [*answer(""), {"role": "tool", "content": "4"}, *answer("four")]
    [c] = model.score([(ask("2+2"), turns)])
    assert c.token_ids == text("<stop>\n[tool]4<stop>\n[assistant]four<stop>")["input_ids"]
    bare = byte_tokenizer(chat_template=CHATML.replace("<stop>\n", "|"))
    assert answer_ids(bare, ask("hi"), answer("yo"), [0, 1]) == [*bare("yo|")["input_ids"], 0]  # none: the tokenizer's
    quoted = answer_ids(bare, ask("hi"), answer("a<stop>b"), [0, 1])
    assert quoted == [*bare("a<stop>b|")["input_ids"], 0]  # an end token inside an answer cuts nothing off


def test_tools_reach_the_template(tmp_path, starter):
    model = templated(tmp_path, CHATML)
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    shown = model.tokenizer.decode(prompt_ids(model.tokenizer, ask("2+2", tools=tools)))
    assert shown.startswith('<tools>[{"type": "function"') and shown.endswith("[user]2+2<stop>\n[assistant]")
    call = [{"role": "assistant", "content": None, "tool_calls": json.dumps([{"function": {"name": "add"}}])}]
    [c] = model.score([(ask("2+2", tools=tools), call)])
    assert model.tokenizer.decode(c.token_ids) == '[{"function": {"name": "add"}}]<stop>'
    assert c.text == ""
    # The starter's template knows no tools: it is the same prompt.
    assert prompt_ids(starter.tokenizer, ask("2+2", tools=tools)) == prompt_ids(starter.tokenizer, ask("2+2"))


def test_messages_without_content(starter, tiny):
    for nothing in ({"role": "user", "content": None}, {"role": "user"}):
        assert plain_message(nothing) == {"role": "user", "content": ""}
        prompt, empty = Prompt("u", [nothing]), [{**nothing, "role": "assistant"}]
        for model in (starter, tiny()):
            assert prompt_ids(model.tokenizer, prompt) == prompt_ids(model.tokenizer, ask(""))
            [c], [e] = model.score([(prompt, empty)]), model.score([(ask(""), answer(""))])
            assert (c.text, c.token_ids, c.token_logps) == ("", e.token_ids, e.token_logps)
    call = {"role": "assistant", "content": None, "tool_calls": '[{"function": {"name": "f"}}]'}
    with pytest.raises(InputError, match=r"(?s)row u: the chat template refuses .*remedy.*without content"):
        starter.room([Prompt("u", [call])])  # content + '<|end|>' of null


def test_a_template_that_refuses(tmp_path):
    model = templated(tmp_path, "{% for m in messages %}{{ raise_exception('no role ' ~ m.role) }}{% endfor %}")
    with pytest.raises(InputError, match=r"(?s)row r7: the chat template refuses its messages: no role system.*remedy"):
        model.generate([Prompt("r7", [{"role": "system", "content": "x"}])], Sampling())
    model = templated(tmp_path, CHATML)
    with pytest.raises(InputError, match="row r8: the chat template refuses"):
        model.room([Prompt("r8", [{"content": "no role"}], tools="not JSON")])


def test_a_template_that_rewrites_the_prompt(tmp_path):
    model = templated(tmp_path, "({{ messages | length }}){% for m in messages %}{{ m.content }}<stop>{% endfor %}")
    with pytest.raises(InputError, match=r"(?s)row r9: the chat template writes the prompt differently.*remedy"):
        model.score([(ask("hi", "r9"), answer("yo"))])
    assert model.generate([ask("hi")], Sampling(max_new_tokens=2))  # that it can


# --- fingerprints ---


def test_tokenizer_fingerprint(tmp_path, starter):
    expected = starter.tokenizer_fingerprint
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer(["a", "b b b b b"], padding=True, truncation=True, max_length=3, return_tensors="pt")
    tokenizer.padding_side = "right"
    assert tokenizer_fingerprint(tokenizer) == expected
    folder = shutil.copytree(STARTER, tmp_path / "again")
    tokenizer.save_pretrained(folder)
    again = opened(folder)
    assert again.tokenizer_fingerprint == expected
    assert again.fingerprint != starter.fingerprint  # which is over bytes of files, and names the weights
    seen = {expected}
    for change in (
        lambda t: setattr(t, "chat_template", t.chat_template + " "),
        lambda t: t.add_tokens(["<one more>"]),
        lambda t: setattr(t, "eos_token", "<|user|>"),
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.NFC()),
    ):
        other = AutoTokenizer.from_pretrained(STARTER)
        change(other)
        assert tokenizer_fingerprint(other) not in seen
        seen.add(tokenizer_fingerprint(other))
        other.save_pretrained(tmp_path / "kept")
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "kept")) in seen
        shutil.rmtree(tmp_path / "kept")


def test_fingerprint_names_the_weights(tmp_path):
    one, same = (opened(write_tiny(tmp_path / name)) for name in "ab")
    assert one.fingerprint == same.fingerprint and one.tokenizer_fingerprint == same.tokenizer_fingerprint
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    other = opened(tmp_path / "b")
    assert other.fingerprint != one.fingerprint and other.tokenizer_fingerprint == one.tokenizer_fingerprint


def test_weights_that_are_not_numbers_are_an_error(tmp_path):
    shutil.copytree(STARTER, tmp_path / "nan")
    weights = load_file(tmp_path / "nan/model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], math.nan)
    save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
    model = LocalModel(ModelConfig(model=str(tmp_path / "nan")))
    prompt = Prompt("row-1", [{"role": "user", "content": "Say hello."}])
    for sampling in (Sampling(max_new_tokens=4), Sampling(temperature=0, max_new_tokens=4)):
        with pytest.raises(InputError, match="logits are not numbers"):
            model.generate([prompt], sampling)
    with pytest.raises(InputError, match="logits are not numbers"):
        model.score([(prompt, [{"role": "assistant", "content": "hello"}])])
