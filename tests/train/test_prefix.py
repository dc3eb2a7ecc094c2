"""A prompt and its answers in one pass: the layout by hand, and the same numbers as one row an answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.logprobs import sequence_logps, token_logps
from train.prefix import Cost, batch_of, groups, plan, shares_prefixes


def ids(*tokens):
    return np.array(tokens, np.int32)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64)
    ).eval()  # fmt: skip


def test_two_answers_in_a_row_by_hand():
    batch = batch_of([ids(1, 2, 3)], [[ids(7, 8), ids(9)]], [[(0, [0, 1])]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 8, 3, 9]], "the prompt's last token stands before each answer"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["segment"].tolist() == [[-1, -1, -1, 0, 0, -1, 1]]
    assert batch["loss_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0, 1]]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_one_row_an_answer_needs_no_block_mask():
    batch = batch_of([ids(1, 2), ids(4)], [[ids(7)], [ids(8, 9), ids(5)]], [[(0, [0])], [(1, [0])], [(1, [1])]], pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 7], [4, 8, 9], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert batch["segment"].tolist() == [[-1, -1, 0], [-1, 1, 1], [-1, 2, -1]], "answers are counted over all prompts"


def test_two_prompts_in_a_row_by_hand():
    batch = batch_of([ids(1, 2), ids(4)], [[ids(7)], [ids(8), ids(5)]], [[(1, [0, 1]), (0, [0])]])
    assert batch["input_ids"].tolist() == [[4, 8, 4, 5, 1, 2, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2]]
    assert batch["segment"].tolist() == [[-1, 1, -1, 2, -1, -1, 0]], "answers are counted over all prompts"
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1],
    ]  # fmt: skip


def test_groups():
    assert groups(10, [5, 5, 5]) == [[0, 1, 2]]
    # 9 of the prompt + 6 + 6 = 21 fit into 21, a third answer does not; an answer that fits nowhere gets a row
    assert groups(10, [5, 5, 5], limit=21) == [[0, 1], [2]]
    assert groups(10, [50, 5, 5], limit=21) == [[0], [1, 2]]


def test_what_is_cheapest():
    cost = Cost(attention=1e-3, mask=2.0)
    assert plan([10], [[5, 5, 5]], "separate", cost) == [[(0, [0])], [(0, [1])], [(0, [2])]]
    assert plan([10], [[5, 5, 5]], "shared", cost) == [[(0, [0, 1, 2])]]
    assert plan([10], [[5]], "auto", cost) == [[(0, [0])]]
    # 256 and 4 × 64: shared 255 + 4 · 65 = 515 tokens, 515 + 2e-3 · 515² = 1,045; separate 4 · 422 = 1,690
    assert len(plan([256], [[64] * 4], "auto", cost)) == 1
    # 8 and 2 × 256: shared 521 + 2e-3 · 521² = 1,064; separate 2 · (264 + 1e-3 · 264²) = 667
    assert len(plan([8], [[256] * 2], "auto", cost)) == 2
    # 1 and 99, 20, 20, 20, 20: a row each is padded to 100, 5 · (100 + 1e-3 · 100²) = 550; behind one another they are
    # 100 and 4 · 21 = 84 tokens, 2 · (100 + 2e-3 · 100²) = 240; all in one, 99 + 4 · 20 + 5 = 184 + 2e-3 · 184² = 252
    assert plan([1], [[99, 20, 20, 20, 20]], "auto", cost) == [[(0, [0])], [(0, [1]), (0, [2]), (0, [3]), (0, [4])]]


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), max_size=4)), min_size=1, max_size=6),
       st.integers(40, 120) | st.none(), st.sampled_from(["auto", "shared", "separate"]))  # fmt: skip
def test_every_answer_has_one_place_and_rows_fit(shapes, limit, layout):
    prompts, answers = [p for p, _ in shapes], [some for _, some in shapes]
    rows = plan(prompts, answers, layout, Cost(), limit)
    places = sorted((k, i) for row in rows for k, some in row for i in some)
    assert places == [(k, i) for k, some in enumerate(answers) for i in range(len(some))]
    for row in rows if limit else ():
        size = sum(max(prompts[k] - 1, 0) + sum(answers[k][i] + 1 for i in some) for k, some in row)
        assert size <= max(limit, max(max(p - 1, 0) + n + 1 for p, some in shapes for n in some))


def logps_and_gradient(model, prompts, answers, rows):
    batch = batch_of(prompts, answers, rows)
    n = sum(map(len, answers))
    model.zero_grad()
    found = sequence_logps(token_logps(model, batch), batch["loss_mask"], batch["segment"], n)
    (found * torch.linspace(1, 2, n)).sum().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(8, 40), st.integers(0, 1000))
def test_shared_and_split_rows_say_what_separate_rows_say(model, shapes, limit, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 50, p).astype(np.int32) for p, _ in shapes]
    answers = [[rng.integers(1, 50, n).astype(np.int32) for n in some] for _, some in shapes]
    sizes = [p for p, _ in shapes], [some for _, some in shapes]
    how = {
        "separate": ("separate", None),
        "shared": ("shared", None),
        "split": ("shared", limit),
        "auto": ("auto", limit),
    }
    found = {
        name: logps_and_gradient(model, prompts, answers, plan(*sizes, layout, Cost(), most))
        for name, (layout, most) in how.items()
    }
    for name in ("shared", "split", "auto"):
        for a, b in zip(found[name], found["separate"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_padding_has_no_position_that_a_model_lacks():
    """GPT-2 with as many positions as the longest sequence needs: 39 + 13 = 52."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=52)).eval()
    rng = np.random.default_rng(0)
    lengths = [39, 35, 28, 29], [[2, 2], [11, 9], [8, 9, 13, 10], [8, 8, 13]]
    prompts = [rng.integers(1, 50, p).astype(np.int32) for p in lengths[0]]
    answers = [[rng.integers(1, 50, n).astype(np.int32) for n in some] for some in lengths[1]]
    found = [logps_and_gradient(model, prompts, answers, plan(*lengths, layout, Cost()))
             for layout in ("separate", "shared", "auto")]  # fmt: skip
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_window_that_the_mask_would_lose_is_found(model):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small = {name: getattr(model.config, name) for name in names} | {"num_key_value_heads": 1}
    windowed = MistralForCausalLM(MistralConfig(**small, sliding_window=8)).eval()
    assert shares_prefixes(windowed, longest=8) and not shares_prefixes(windowed, longest=9)
    # and within the window it is right
    prompts, answers = [ids(1, 2, 3)], [[ids(7, 8), ids(9, 4, 5)]]
    one, other = (logps_and_gradient(windowed, prompts, answers, plan([3], [[2, 3]], layout, Cost()))
                  for layout in ("shared", "separate"))  # fmt: skip
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_predicts_from_the_first_token_of_the_answer():
    batch = batch_of([ids()], [[ids(7, 8), ids(9, 5)]], [[(0, [0, 1])]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5]]
    assert batch["loss_mask"].int().tolist() == [[0, 1, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_models_that_do_not_obey_are_found(model):
    from transformers import MambaConfig, MambaForCausalLM

    assert shares_prefixes(model)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    assert not shares_prefixes(recurrent)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_implementations(model, kind):
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM._from_config(model.config, attn_implementation=kind).eval()
    assert shares_prefixes(other)
