"""A causal language model that runs here: generates and scores. Any architecture of transformers, safetensors only.

torch and the weights are loaded at the first use, so that a rebuild that finds everything cached stays quick;
`fingerprint` hashes files and is known before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.config import ModelConfig
from curate.errors import InputError
from curate.manifest.schema import content_hash
from curate.models.base import Completion, Message, Prompt, Sampling
from curate.models.chat import answer_ids, contents, prompt_ids
from curate.models.memory import halving
from curate.models.travel import Travels
from curate.models.weights import (
    architectures,
    load_causal,
    model_folder,
    quiet,
    refuse_foreign_tokens,
    stack,
    tokenizer_folder,
    weights_hash,
)

LOGITS = 1 << 26  # logits that are held at once: 256 MiB in float32


class LocalModel(Travels):
    """Generator and Scorer over one causal language model, or an adapter merged into one.

    Args:
        config: which model, where it runs, and how many sequences a forward pass holds.
        base: what a relative folder is relative to.
        where: the configuration key that errors name.

    Raises:
        InputError: no such model, not a causal language model, or weights that are not safetensors.
    """

    def __init__(self, config: ModelConfig, base: Path = Path(), where: str = "policy.model") -> None:
        self.config, self.where = config, where
        self.folder, self.name = model_folder(config.model, base, where)
        self._whole = stack(self.folder, f"{where} {self.name!r}")[0]
        kinds = architectures(self._whole)
        if not any(kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for kind in kinds):
            raise InputError(f"{where} {self.name!r}: not a causal language model ({', '.join(kinds) or 'no config'})")
        if json.loads((self._whole / "config.json").read_bytes()).get("is_encoder_decoder"):
            raise InputError(f"{where} {self.name!r}: an encoder-decoder, not a causal language model ({kinds[0]})")

    @classmethod
    def around(cls, model: Any, tokenizer: Any, name: str, batch_size: int) -> LocalModel:
        """A model that is in memory and may be changing, in training: its `fingerprint` cannot be asked."""
        found = cls.__new__(cls)
        found.config = ModelConfig.model_validate({"model": name, "batch_size": batch_size})
        found.where, found.name = "model", name
        found.__dict__ |= {"model": model, "tokenizer": tokenizer, "_settings": model.config}
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer and chat template."""
        return weights_hash(self.folder)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of what the tokenizer does, not of how its files are laid out: saving it again changes nothing."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def how(self) -> str:
        """What else decides the last bit of a number: device, dtype and what shares a forward pass."""
        device, dtype = self.place
        return f"{dtype} on {device}, {self.config.batch_size} at once"

    def luggage(self) -> tuple[Any, tuple[Any, ...]]:
        """With its place, which is part of the key of every answer: where it arrives nothing is decided anew."""
        make, (kind, state) = super().luggage()
        return make, (kind, {**state, "place": self.place})

    @cached_property
    def place(self) -> tuple[str, str]:
        """(device, dtype), with what "by default" and "auto" mean on this machine."""
        import torch

        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        half = self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and device.startswith("cuda"))
        return device, "bfloat16" if half else "float32"

    # --- what can be asked ---

    def room(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tokens that fit behind each prompt; negative where the prompt alone is longer than the context."""
        context = self.context
        return [None if context is None else context - len(prompt_ids(self.tokenizer, p)) for p in prompts]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.k` completions of every prompt, in order. Prompts of like length share a batch.

        Raises:
            InputError: a prompt leaves less than `sampling.max_new_tokens` of the context, memory is too small for a
                single sequence, or completions cannot share the state of this architecture.
        """
        from curate.models.decode import cache_name

        ids = [prompt_ids(self.tokenizer, p) for p in prompts]
        for prompt, row in zip(prompts, ids, strict=True):
            if not row:
                raise InputError(f"row {prompt.uid}: an empty prompt, and {self.name!r} has no token to begin a text")
            if self.context is not None and len(row) + sampling.max_new_tokens > self.context:
                raise InputError(
                    f"row {prompt.uid}: a prompt of {len(row)} tokens and {sampling.max_new_tokens} new ones are more "
                    f"than the {self.context} that {self.name!r} takes",
                    remedy="shorten the prompt, lower max_new_tokens, or leave such rows out with too_long: skip",
                )
        if cache_name(self.model) is None:
            raise InputError(
                f"{self.where} {self.name!r}: {type(self.model).__name__} keeps its state where completions "
                "cannot share it: it can score, but not generate"
            )
        found: dict[tuple[int, int], Completion] = {}
        for part in self._parts(ids, sampling.k):
            drawn = halving(part, lambda some: self._decode(ids, prompts, some, sampling), self.where)
            found |= dict(zip(part, drawn, strict=True))
        return [[found[i, j] for j in range(sampling.k)] for i in range(len(prompts))]

    def score(self, pairs: Sequence[tuple[Prompt, Sequence[Message]]]) -> list[Completion | None]:
        """Log-probability of every token of each answer, temperature 1; None where prompt and answer do not fit.

        log π(y|x) per token: log softmax of the logits that stand before it, in float32.
        """
        rows = [(prompt_ids(self.tokenizer, p), answer_ids(self.tokenizer, p, a, self._ends)) for p, a in pairs]
        rows = [(p, a) if p else (a[:1], a[1:]) for p, a in rows]  # nothing predicts a first token without a start
        fits = [i for i, (p, a) in enumerate(rows) if a and (self.context is None or len(p) + len(a) <= self.context)]
        found: dict[int, Completion] = {}
        for part in self._parts([[*rows[i][0], *rows[i][1]] for i in fits]):
            some = [fits[i] for i, _ in part]
            logps = halving(some, lambda these: self._logps([rows[i] for i in these]), self.where)
            for i, logp in zip(some, logps, strict=True):
                found[i] = Completion(contents(pairs[i][1]), rows[i][1], logp, len(logp))
        return [found.get(i) for i in range(len(pairs))]

    # --- the model ---

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        folder = tokenizer_folder(self.folder, self.where)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file raises, the tokenizer cannot be used
            raise InputError(f"{self.where} {self.name!r}: no usable tokenizer: {str(error)[:500]}") from None
        tokenizer.model_max_length = 1 << 62  # lengths are checked here, row by row; its own warning names no row
        return tokenizer

    @cached_property
    def context(self) -> int | None:
        """Longest sequence in tokens; None where the architecture has no limit."""
        limit = getattr(self._settings.get_text_config(), "max_position_embeddings", None)
        return limit if limit and limit > 0 else None

    @cached_property
    def _settings(self) -> Any:
        """config.json with the defaults of the architecture, which it may leave out."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self._whole, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file raises, the model cannot be used
            raise InputError(f"{self.where} {self.name!r}: no usable config.json: {str(error)[:500]}") from None

    @cached_property
    def model(self) -> Any:
        """The model in eval mode on its device."""
        import torch

        quiet()
        device, dtype = self.place
        try:
            where = f"{self.where} {self.name!r}"
            model = load_causal(self.folder, where, dtype=getattr(torch, dtype)).to(device)
        except InputError:
            raise
        except Exception as error:  # whatever a broken file or a missing device raises, the model cannot be used
            raise InputError(f"{self.where} {self.name!r} cannot be loaded: {str(error)[:500]}") from None
        self._check_tokenizer(model)
        return model.eval()

    def _check_tokenizer(self, model: Any) -> None:
        """A tokenizer of another model gives tokens that this one has no embedding for, or never ends."""
        highest = refuse_foreign_tokens(model, self.tokenizer, f"{self.where} {self.name!r}")
        named, own = _named_ends(model), self.tokenizer.eos_token_id
        if named and own is not None and own not in named and not any(e <= highest for e in named):
            raise InputError(
                f"{self.where} {self.name!r}: the model ends a text with token {sorted(named)}, which its tokenizer "
                f"does not have (it ends with {own}): it is not this model's tokenizer",
                remedy="put the tokenizer files that the model was trained with into its folder",
            )

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's, and its tokenizer's."""
        own = self.tokenizer.eos_token_id
        return sorted(_named_ends(self.model) | ({own} - {None}))

    def _parts(self, rows: Sequence[Sequence[int]], copies: int = 1) -> list[list[tuple[int, int]]]:
        """Batches of (row, copy) of like length, the longest first: what does not fit into memory shows at once."""
        from curate.models.decode import pads

        mixed, size = pads(self.model), self.config.batch_size
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), tuple(rows[i]), i))
        found = []
        for _, like in groupby(order, key=lambda i: mixed or len(rows[i])):
            some = [(i, j) for i in like for j in range(copies)]
            found += [some[at : at + size] for at in range(0, len(some), size)]
        return found

    def _decode(
        self, ids: list[list[int]], prompts: Sequence[Prompt], part: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Completion]:
        """Completions (row, number) of one batch."""
        from curate.models.decode import decode

        here = list(dict.fromkeys(i for i, _ in part))
        numbers = np.stack([_uniforms(prompts[i].uid, j, sampling) for i, j in part])
        drawn = decode(self.model, [ids[i] for i in here], [here.index(i) for i, _ in part], numbers, sampling,
                       self._ends, _pad(self.tokenizer))  # fmt: skip
        texts = [self.tokenizer.decode(d.tokens[: len(d.tokens) - d.finished], skip_special_tokens=True) for d in drawn]
        return [
            Completion(text, d.tokens, d.logps, len(d.tokens), d.finished, len(ids[i]))
            for text, d, (i, _) in zip(texts, drawn, part, strict=True)
        ]

    def _logps(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities of the answers of rows (prompt, answer) of like length."""
        import torch

        from curate.models.decode import padded, step_inputs

        ids, mask = padded([[*p, *a] for p, a in rows], _pad(self.tokenizer), self.model.device)
        most = max(len(a) for _, a in rows)
        with torch.inference_mode():
            if len(rows) > 1 and len(rows) * most * self._settings.get_text_config().vocab_size > LOGITS:
                half = len(rows) // 2
                return self._logps(rows[:half]) + self._logps(rows[half:])
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=most + 1,
                                **step_inputs(self.model, mask, ids.shape[1])).logits  # [b, most + 1, v]  # fmt: skip
            found = []
            for i, (_, answer) in enumerate(rows):
                n = len(answer)
                logp = torch.log_softmax(logits[i, -n - 1 : -1].float(), -1)  # [n, v]: left padding, so the end is last
                target = torch.tensor(answer, device=logp.device)
                found.append(logp.gather(-1, target[:, None]).squeeze(1).tolist())
                if not all(map(math.isfinite, found[-1])):
                    raise InputError(
                        f"{self.where} {self.name!r}: its logits are not numbers, so nothing can be measured",
                        remedy="look at its weights: NaN or infinity there (a run that diverged?)",
                    )
        return found


def tokenizer_fingerprint(tokenizer: Any, template: bool = True) -> str:
    """Hash of what a tokenizer does: its model, normaliser and added tokens, special tokens, chat template.

    Without `template`: of what text becomes alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("padding", None)  # both are state of the last call, not of the tokenizer
        body.pop("truncation", None)
    else:
        body = dict(tokenizer.get_vocab())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return content_hash([body, special, tokenizer.chat_template] if template else body)


def _pad(tokenizer: Any) -> int:
    """Any token will do: the mask hides it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _named_ends(model: Any) -> set[int]:
    """The end tokens of generation_config.json, else of config.json (which may hold an architecture's default)."""
    for config in (model.generation_config, model.config):
        if (value := getattr(config, "eos_token_id", None)) is not None:
            return set(value) if isinstance(value, list | tuple) else {value}
    return set()


def _uniforms(uid: str, number: int, sampling: Sampling) -> NDArray[np.float64]:
    """[max_new_tokens] numbers of one completion of a prompt: the same whatever k or the length limit is."""
    return np.random.default_rng([sampling.seed, number, *uid.encode()]).random(sampling.max_new_tokens)
