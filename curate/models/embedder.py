"""Texts to unit vectors: sentence-transformers, a causal language model, a server, or vectors that the user brings.

torch and the model itself are loaded at the first `encode`, so that a rebuild that finds everything cached stays quick.
`fingerprint` is known before: it hashes weight files, not tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate.config import EmbedConfig
from curate.errors import InputError
from curate.manifest.io import sha256_file
from curate.manifest.remote import is_url
from curate.models.http import Request, Server
from curate.models.travel import Travels
from curate.models.weights import architectures, model_folder, quiet, weights_hash
from curate.storage import located

Vectors = NDArray[np.float32]

ANOTHER_MODEL = "another model is behind the server now, or was before: name its weights by another embed.revision"


class Embedder(Protocol):
    """Turns texts into L2-normalised float32 vectors [n, d]."""

    @property
    def fingerprint(self) -> str:
        """Names weights and pooling: equal fingerprints embed alike."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, d] of n texts, in their order."""


def open_embedder(config: EmbedConfig, base: Path = Path(), requests: Path | None = None) -> Embedder:
    """The embedder that a configuration asks for; relative paths are relative to `base`.

    `requests`: where answers of a server are kept, so that none is paid for twice.

    Raises:
        InputError: the model or the file cannot be used (before any text is embedded).
    """
    if config.backend == "precomputed":
        path = str(config.path)
        return Precomputed(located(base, path), path if is_url(path) else None)
    if config.backend == "api":
        return ServerEmbedder(config, requests)
    folder, name = model_folder(config.model, base, whole=True)
    if config.backend == "lm":
        return LanguageModel(folder, name, config)
    return SentenceModel(folder, name, config)


class SentenceModel(Travels):
    """A sentence-transformers model; vectors are normalised by us, whatever the model does."""

    def __init__(self, folder: Path, name: str, config: EmbedConfig) -> None:
        self.folder, self.name, self.config = folder, name, config

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights and the module configuration, which holds the pooling."""
        return f"sentence-transformers:{weights_hash(self.folder)}:{_how(self.config)}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, d]; the model's own pooling and truncation."""
        vectors = self._model.encode(list(texts), batch_size=self.config.batch_size, show_progress_bar=False)
        return _unit(np.asarray(vectors, np.float32), texts, self.name)

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        quiet()
        try:
            return SentenceTransformer(str(self.folder), device=self.config.device, local_files_only=True,
                                       model_kwargs={"use_safetensors": True, "dtype": self.config.dtype})  # fmt: skip
        except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
            raise InputError(f"embed.model {self.name!r} cannot be loaded: {str(error)[:500]}") from None


class LanguageModel(Travels):
    """InsCL's way: the mean of a causal LM's input embeddings, or of its last hidden states, over the tokens."""

    def __init__(self, folder: Path, name: str, config: EmbedConfig) -> None:
        self.folder, self.name, self.config = folder, name, config
        kinds = architectures(folder)
        if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            raise InputError(
                f"embed.model {name!r}: not a causal language model ({', '.join(kinds) or 'no config.json'})",
                remedy="use embed.backend=sentence-transformers for it, or name a causal model",
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights and tokenizer, with the pooling."""
        return f"lm:{self.config.pooling}:{weights_hash(self.folder)}:{_how(self.config)}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, d]; sorted by length inside, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        parts = [order[at : at + self.config.batch_size] for at in range(0, len(order), self.config.batch_size)]
        pooled = np.concatenate([self._pool([texts[i] for i in part]) for part in parts])
        vectors = np.empty_like(pooled)
        vectors[order] = pooled
        return _unit(vectors, texts, self.name)

    def _pool(self, texts: list[str]) -> Vectors:
        import torch

        model, tokenizer = self._loaded
        limit = getattr(model.config, "max_position_embeddings", None) or 1024
        batch = tokenizer(texts, padding=True, truncation=True, max_length=min(limit, 1024), return_tensors="pt")
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        with torch.inference_mode():
            if self.config.pooling == "input_embeddings":
                states = model.get_input_embeddings()(ids)
            else:
                states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
            weight = mask.unsqueeze(-1).float()  # [b, t, 1]
            mean = (states.float() * weight).sum(1) / weight.sum(1).clamp_min(1)  # [b, d]
        return np.asarray(mean.cpu().numpy(), np.float32)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet()
        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True, use_safetensors=True,
                                                              dtype=self.config.dtype)  # fmt: skip
        except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
            raise InputError(f"embed.model {self.name!r} cannot be loaded: {str(error)[:500]}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"  # then the positions of a text do not depend on what it is padded to
        return model.to(device).eval(), tokenizer


class ServerEmbedder(Server[Vectors]):
    """A model behind an OpenAI-compatible server; a request is `batch_size` texts. It may refuse a long text.

    Which texts share a request depends on their block alone, and vectors stand in the order of texts, whichever request
    is answered first; only the server itself may differ in a last bit from one time to another. Its answers are kept
    beside the blocks of `curate.embed`: a block is lost where a build is killed before it is whole, and is made anew
    with another version of torch, and neither is to be paid for.
    """

    path = "embeddings"
    mend = (
        "mend what it names: a text that is too long (TEI cuts it with --auto-truncate), embed.batch_size, or the "
        "model's name"
    )

    def __init__(self, config: EmbedConfig, cache: Path | None, pause: float = 0.5) -> None:
        super().__init__(config, cache, pause)
        self.batch_size = config.batch_size
        self._dimension: int | None = None  # of the first answer

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, d]; the server's own pooling. What is cached needs neither key nor network.

        Raises:
            InputError: the server refuses a request, or gives no usable answer in all tries.
        """
        parts = [list(texts[at : at + self.batch_size]) for at in range(0, len(texts), self.batch_size)]
        return np.concatenate(self._answers([self._batch(part) for part in parts]))

    def _batch(self, texts: list[str]) -> Request:
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        body = {"model": self.config.model, "input": texts, "encoding_format": "float"}
        return self._request(f"text {texts[0][:80]!r}{more}", body)

    def _create(self, client: Any) -> Any:
        return client.embeddings.with_raw_response.create

    def _read(self, request: Request, response: Any) -> Vectors:
        """The vector of each text, by `index`, of one length for as long as this object lives."""
        texts = request.body["input"]
        try:
            found = {each["index"]: _numbers(each["embedding"]) for each in response["data"]}
            vectors = [found[i] for i in range(len(texts))]
        except (LookupError, TypeError):
            raise ValueError(f"no vector with its index for each of {len(texts)} texts") from None
        if len(response["data"]) != len(texts):
            raise ValueError(f"{len(response['data'])} vectors for {len(texts)} texts")
        dimension = self._dimension or len(vectors[0])
        if odd := {len(vector) for vector in vectors} - {dimension}:
            raise InputError(f"{self.base_url}: {self.config.model!r} gives vectors of {dimension} and of {odd.pop()} "
                             "numbers", remedy=ANOTHER_MODEL)  # fmt: skip
        unit = _unit(np.stack(vectors), texts, f"{self.base_url}: {self.config.model!r}")
        self._dimension = dimension
        return unit

    def _kept(self, response: Any) -> Any:
        """The vectors alone, in the base64 that this API knows too: a third of the digits."""
        data = response["data"]
        texts = [base64.b64encode(_numbers(each["embedding"]).tobytes()).decode() for each in data]
        return {"data": [{"index": each["index"], "embedding": text} for each, text in zip(data, texts, strict=True)]}


class Precomputed:
    """Vectors from a Parquet file with columns `text` (string) and `embedding` (list of floats)."""

    def __init__(self, path: Path, url: str | None = None) -> None:
        self.path, self.where = path, f"embed.path {url or path}"  # of a URL, `path` is the local copy
        if not path.is_file():
            raise InputError(f"{self.where}: no such file", remedy="give a Parquet file with text and embedding")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return f"precomputed:{sha256_file(self.path)}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """The stored vectors of these texts, normalised."""
        rows, vectors = self._table  # [texts of the file, d]
        missing = next((t for t in texts if t not in rows), None)
        if missing is not None:
            raise InputError(
                f"{self.where}: no row with text {missing[:80]!r}",
                remedy="store a vector for every distinct instruction (and tag, where tags are clustered)",
            )
        return vectors[[rows[t] for t in texts]]

    @cached_property
    def _table(self) -> tuple[dict[str, int], Vectors]:
        known, frame = self.fingerprint, self._read()
        if f"precomputed:{sha256_file(self.path)}" != known:
            raise InputError(f"{self.where}: changed while the build was running", remedy="build again")
        texts = frame["text"].to_list()
        vectors = np.asarray(frame["embedding"].list.to_array(len(frame["embedding"][0])).to_numpy(), np.float32)
        if (bad := ~np.isfinite(vectors).all(axis=1)).any():
            raise InputError(
                f"{self.where}: row {int(bad.argmax()) + 1}: column 'embedding' holds NaN or infinity",
                remedy="embed that text again, or leave the row out together with its text",
            )
        rows = {text: row for row, text in enumerate(texts)}
        if len(rows) != len(texts):
            double = next(t for row, t in enumerate(texts) if rows[t] != row)
            raise InputError(f"{self.where}: text {double[:80]!r} has two rows", remedy="keep one")
        return rows, _unit(vectors, texts, self.where)

    def _read(self) -> pl.DataFrame:
        try:
            frame = pl.read_parquet(self.path, glob=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{self.where}: not readable as Parquet: {error}") from None
        for column in ("text", "embedding"):
            if column not in frame.columns:
                raise InputError(f"{self.where}: no column {column!r}; it has {', '.join(frame.columns)}")
        if frame["embedding"].dtype.is_nested() and hasattr(frame["embedding"].dtype, "shape"):
            frame = frame.with_columns(pl.col("embedding").arr.to_list())
        if frame.height == 0:
            raise InputError(f"{self.where}: no rows")
        kind = frame["embedding"].dtype
        if frame["text"].dtype != pl.String or not isinstance(kind, pl.List) or not kind.inner.is_numeric():
            raise InputError(f"{self.where}: `text` must be strings and `embedding` lists of numbers")
        if frame.null_count().sum_horizontal().item() or frame["embedding"].list.len().n_unique() != 1:
            raise InputError(f"{self.where}: every row needs a text and a vector of one common length")
        return frame.select("text", "embedding")


def _unit(vectors: Vectors, texts: Sequence[str], name: str) -> Vectors:
    """L2-normalised; a vector that has no direction is an error that names its text."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (bad := ~(np.isfinite(norms) & (norms > 0))).any():
        text = texts[int(bad.argmax())]
        raise InputError(f"{name}: the vector of {text[:80]!r} has length {float(norms[bad.argmax(), 0])}",
                         remedy="empty texts and NaN cannot be embedded; mend the row or the model")  # fmt: skip
    return np.asarray(vectors / norms, np.float32)


def _numbers(given: Any) -> Vectors:
    """A vector as a server writes it: a list of numbers, or the base64 of float32."""
    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given, validate=True), "<f4")
    if not all(type(number) in (int, float) for number in given):
        raise ValueError("a vector holds something else than numbers")
    with np.errstate(over="ignore"):  # infinite then, and reported as that
        return np.asarray(given, "<f4")


def _how(config: EmbedConfig) -> str:
    """What else decides the last bit of a vector: the batch, the device and the weights' type."""
    how = f"batch {config.batch_size} on {config.device or 'default device'}"
    return how if config.dtype == "float32" else f"{how}, {config.dtype}"
