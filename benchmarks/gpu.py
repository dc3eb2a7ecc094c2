"""A GPU kept full? CFT, COPR and CPPO on a Llama of a billion weights, each beside TRL's nearest trainer.

    pip install -e '.[bench]'
    python benchmarks/gpu.py [--shape 1b] [--batch 8] [--length 2048] [--pairs 16] [--prompts 16] [--k 8] [--tokens 256]
    python benchmarks/gpu.py --shape tiny --device cpu --length 256 --tokens 8 --steps 4       # that the command runs

Random weights: what is measured is how fast they are trained. Every run is a process of its own, ours and TRL's in
turns, `rounds` times; the first two of its `steps` are not counted. Weights in float32, products in bfloat16 on a GPU.

- CFT against SFTTrainer: packs of `length` tokens of the shipped SuperNI rows, TRL's packing as it is by default.
- COPR against DPOTrainer: the best and the worst answer of `pairs` shipped questions; log π_ref from before the start.
- CPPO (advantages=group) against GRPOTrainer: `k` answers of `tokens` tokens to each of `prompts` prompts are drawn,
  judged and trained on once. Drawing is in the time.

A token counts as often as it stands in samples: prompts of pairs twice, whether a trainer computes them once or twice;
padding counts nothing. MFU = tokens/s · (6 N + 6 L d s) / peak: N weights without the table that is looked up, L layers
of width d, s = mean of squared lengths / mean length (causal attention, 2 s² d a layer forward, thrice that in all).
What drawing and measuring take is no work of the model in it, so CPPO's MFU is that of the update over the whole step.
Memory is the most that tensors held on a GPU; on a CPU the most that the process did.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from clock import Clock, against, count
from datasets import Dataset
from dpo import pairs_of
from grpo import REWARD
from sft import manifest, tokens_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from curate.build import build
from curate.manifest import read
from train.run import CONFIGS, run
from train.settings import load
from train.trainer import RehearseTrainer

ROOT = Path(__file__).parent.parent
STARTER = ROOT / "examples/starter"
SHAPES: dict[str, dict[str, Any]] = {  # 1b: Llama 3.2 1B's; the tokenizer knows fewer tokens, which costs nothing less
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 6144},
}  # fmt: skip
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second, by a part of the device's name (SXM where there are several)."""
PEERS = {"cft": "SFTTrainer", "copr": "DPOTrainer", "cppo": "GRPOTrainer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--peak", type=float, help="operations a second of the device, where its name tells none")
    parser.add_argument("--attention", default="sdpa", help="of both: sdpa, flash_attention_2, flex_attention")
    parser.add_argument("--compile", action="store_true", help="torch_compile of both")
    parser.add_argument("--methods", default=",".join(PEERS))
    for name, value in (("steps", 12), ("rounds", 3), ("batch", 8), ("length", 2048), ("pairs", 16), ("prompts", 16),
                        ("k", 8), ("tokens", 256)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=2, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: --shape tiny --device cpu runs everything, for its own sake")
    if args.steps < 3:
        parser.error("--steps: the first two are not counted")
    if args.one:
        print(json.dumps(measured(args, *args.one[0].split(":"), Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as place:
        compared(args, Path(place))


# --- the parent: data, model, table ---


def compared(args: Any, place: Path) -> None:
    """Prints the table."""
    made = prepared(args, place)
    peak = args.peak or next((v for k, v in PEAKS.items() if k in device_name(args)), None)
    print(f"{device_name(args)}, {made['weights']:,} weights, trl {trl.__version__}, transformers "
          f"{transformers.__version__}, torch {torch.__version__}, {args.attention}\n")  # fmt: skip
    print("| method | trainer | tokens a second, median | MFU | memory, GB | ours against it: median (min to max) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in args.methods.split(","):
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
        for _ in range(args.rounds):
            for who, kept in runs.items():
                kept.append(apart(f"{method}:{who}", place))
        rates = {who: [each["units"] / each["seconds"] * made[method]["tokens"] for each in of]
                 for who, of in runs.items()}  # fmt: skip
        for who, of in runs.items():
            rate, name = statistics.median(rates[who]), f"train {method}" if who == "ours" else PEERS[method]
            mfu = f"{rate * made[method]['operations'] / peak:.1%}" if peak else "–"
            memory = max(each["memory"] for each in of) / 1e9
            ratio = against(rates["ours"], rates["trl"]) if who == "trl" else "–"
            print(f"| {method.upper()} | {name} | {rate:,.0f} | {mfu} | {memory:.2f} | {ratio} |", flush=True)


def device_name(args: Any) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"


def prepared(args: Any, place: Path) -> dict[str, Any]:
    """Writes model, manifests and rows; by method the tokens of a unit, and the operations of a token."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        **SHAPES[args.shape], max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    weights, config = model.num_parameters(), model.config
    manifest(place)
    with gzip.open(ROOT / "examples/ranked/qa_feedback.jsonl.gz", "rt", encoding="utf-8") as file:
        ranked = [row for row in map(json.loads, file) if row["split"] == "train"]
    rows = []
    for row in ranked:
        answers = sorted(row["candidates"], key=lambda each: each["rank"])
        if answers[0]["rank"] < answers[-1]["rank"]:
            rows.append({"prompt": row["question"], "candidates": [answers[0], answers[-1]]})
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    none = {"selector": "none"}
    build({"tasks": [{"name": "pairs", "path": str(place / "pairs.jsonl"), "format": "ranked"}], "replay": none,
           "out": str(place / "ranked")})  # fmt: skip
    path = str(ROOT / "examples/superni/sentiment_analysis.jsonl.gz")
    build({"tasks": [{"name": "asked", "path": path, "format": "superni", "split": "train"}], "replay": none,
           "out": str(place / "asked")})  # fmt: skip
    (place / "letters.py").write_text(REWARD)
    (place / "run.yaml").write_text("{}")
    (place / "args.json").write_text(json.dumps(vars(args)))

    def length(*texts: str) -> int:
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=len(turns) == 1, return_dict=True)["input_ids"]
        return len(ids)

    def of(lengths: list[int], samples: int) -> dict[str, float]:
        s = sum(n * n for n in lengths) / sum(lengths)
        return {"tokens": samples * statistics.mean(lengths),
                "operations": 6 * weights + 6 * config.num_hidden_layers * config.hidden_size * s}  # fmt: skip

    shown = read(place / "all").samples
    sft = [length(*(m["content"] for m in (*row["prompt"], *row["completion"]))) for row in shown.to_dicts()]
    pairs = [length(row["prompt"], each["text"]) for row in rows for each in row["candidates"]]
    prompts = [length(prompt[0]["content"]) + args.tokens for prompt in read(place / "asked").samples["prompt"]]
    return {"weights": weights, "cft": {**of([n for n in sft if n <= args.length], 1), "tokens": 1.0},
            "copr": of(pairs, 2), "cppo": of(prompts, 1)}  # fmt: skip


def apart(which: str, place: Path) -> dict[str, float]:
    """A run in a process of its own: units, seconds, memory."""
    args = json.loads((place / "args.json").read_text())
    words = [f"--{k}={v}" for k, v in args.items() if v is not None and not isinstance(v, bool)]
    words += ["--compile"] if args["compile"] else []
    done = subprocess.run(
        [sys.executable, __file__, *words, "--one", which, str(place)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{which}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"<!-- {which}: {found['units']:.0f} units in {found['seconds']:.2f} s -->", file=sys.stderr, flush=True)
    return found


# --- a child: one run ---


def measured(args: Any, method: str, who: str, place: Path) -> dict[str, float]:
    units = {"cft": tokens_of, "copr": pairs_of, "cppo": answers_of}[method]
    peer = {"cft": SFTTrainer, "copr": DPOTrainer, "cppo": GRPOTrainer}[method]
    count(RehearseTrainer if who == "ours" else peer, units)
    torch.manual_seed(0)
    (ours if who == "ours" else theirs)(args, method, place)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else _resident()
    return {"units": Clock.units, "seconds": Clock.seconds, "memory": peak}


def answers_of(inputs: Any) -> int:
    return len(inputs["row"] if "row" in inputs else inputs["completion_ids"])


def _resident() -> int:
    """The most bytes that this process held; macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shared(args: Any, method: str) -> dict[str, Any]:
    batch = {"cft": args.batch, "copr": args.pairs, "cppo": args.prompts * args.k}[method]
    return {"max_steps": args.steps, "per_device_train_batch_size": batch, "learning_rate": 1e-6, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1000, "bf16": args.device == "cuda", "disable_tqdm": True,
            "use_cpu": args.device == "cpu", "torch_compile": args.compile}  # fmt: skip


def ours(args: Any, method: str, place: Path) -> None:
    how: dict[str, list[str]] = {
        "cft": [f"data={place / 'all'}", f"max_length={args.length}", "too_long=drop", "packing=true"],
        "copr": [f"data={place / 'ranked'}", "reference=measure", f"max_length={args.length}", "too_long=drop"],
        "cppo": [f"data={place / 'asked'}", "advantages=group", "kl.coef=0.04", "missing_end=0", "too_long=drop",
                 f"rollouts={{prompts: {args.prompts}, k: {args.k}, max_new_tokens: {args.tokens}, passes: 1}}",
                 f"rollouts.batch_size={args.prompts * args.k}", "reward={kind: python, function: 'letters:lower'}"],
    }  # fmt: skip
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shared(args, method).items()]
    words += [f"model={place / 'model'}", f"out={place / 'ours'}", "resume=false", "dtype=float32",
              f"attention={args.attention}"]  # fmt: skip
    run(method, *load(CONFIGS[method], place / "run.yaml", words + how[method]), quiet=True)


def theirs(args: Any, method: str, place: Path) -> None:
    made: dict[str, Callable[..., Any]] = {"cft": _sft, "copr": _dpo, "cppo": _grpo}
    out, model = str(place / "trl"), str(place / "model")
    more = {"gradient_checkpointing": False, **shared(args, method),
            "model_init_kwargs": {"dtype": "float32", "attn_implementation": args.attention}}  # fmt: skip
    made[method](args, place, out, model, more).train()


def _sft(args: Any, place: Path, out: str, model: str, more: Any) -> Any:
    rows = read(place / "all").samples.select("prompt", "completion").to_dicts()
    config = SFTConfig(out, max_length=args.length, packing=True, **more)
    return SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(model))


def _dpo(args: Any, place: Path, out: str, model: str, more: Any) -> Any:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    with (place / "pairs.jsonl").open(encoding="utf-8") as file:
        every = [json.loads(line) for line in file]
    rows = [{"prompt": said("user", row["prompt"]), **{
        name: said("assistant", answer["text"])
        for name, answer in zip(("chosen", "rejected"), row["candidates"], strict=True)
    }} for row in every]  # fmt: skip
    config = DPOConfig(out, max_length=args.length, precompute_ref_log_probs=True, **more)
    return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(model))


def _grpo(args: Any, place: Path, out: str, model: str, more: Any) -> Any:
    def lower(completions: list[Any], **_: Any) -> list[float]:
        texts = [some[0]["content"] for some in completions]
        return [sum(c.islower() for c in text) / max(1, len(text)) for text in texts]

    rows = [{"prompt": prompt} for prompt in read(place / "asked").samples["prompt"].to_list()]
    config = GRPOConfig(out, num_generations=args.k, max_completion_length=args.tokens, steps_per_generation=1,
                        beta=0.04, temperature=1.0, **more)  # fmt: skip
    return GRPOTrainer(model, reward_funcs=lower, args=config, train_dataset=Dataset.from_list(rows),
                       processing_class=_tokenizer(model))  # fmt: skip


def _tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


if __name__ == "__main__":
    main()
