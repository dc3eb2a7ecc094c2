"""Step time of `train grpo` against TRL's GRPOTrainer: one model, prompts, group size and lengths, in one process.

    pip install -e '.[bench]'
    python benchmarks/grpo.py [--model examples/starter] [--steps 8] [--prompts 4] [--k 8] [--tokens 32] [--rounds 3]

Prompts: the sentiment rows of examples/superni. Each step draws `k` completions of at most `tokens` tokens of each of
`prompts` prompts, judges them (the share of lower-case letters, the same function for both), and takes one update, with
the KL to the model before training. Float32, temperature 1. A figure is completions a second over all steps but the
first two of each run, drawing, judging and measuring included. Ours also writes each step's rollouts as a manifest.
Completions end where the model ends them, so their lengths are printed: they must be alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from clock import Clock, against, count
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig as PeerConfig
from trl import GRPOTrainer

from curate.build import build
from curate.manifest import read
from train.config import GrpoConfig
from train.run import run
from train.settings import load
from train.trainer import RehearseTrainer

ROOT = Path(__file__).parent.parent
REWARD = """
def lower(prompts, completions, references):
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/starter"))
    for name, value in (("steps", 8), ("prompts", 4), ("k", 8), ("tokens", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    count(RehearseTrainer, lambda inputs: len(inputs["row"]))
    count(GRPOTrainer, lambda inputs: len(inputs["completion_ids"]))
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


def measure(args: Any, place: Path) -> None:
    """Prints the table."""
    (place / "letters.py").write_text(REWARD)
    (place / "run.yaml").write_text("{}")
    path = ROOT / "examples/superni/sentiment_analysis.jsonl.gz"
    task = {"name": "sentiment", "path": str(path), "format": "superni", "split": "train"}
    build({"tasks": [task], "replay": {"selector": "none"}, "out": str(place / "data")})
    prompts = [{"prompt": prompt} for prompt in read(place / "data").samples["prompt"].to_list()]
    batch = args.prompts * args.k
    shared = {"max_steps": args.steps, "per_device_train_batch_size": batch, "learning_rate": 1e-5,
              "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False,
              "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}  # fmt: skip

    def ours() -> float:
        words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shared.items()]
        settings = [f"model={args.model}", f"data={place / 'data'}", f"out={place / 'ours'}", "resume=false",
                    f"rollouts={{prompts: {args.prompts}, k: {args.k}, max_new_tokens: {args.tokens}, passes: 1}}",
                    "reward={kind: python, function: 'letters:lower'}", "kl.coef=0.04", "missing_end=0",
                    "too_long=drop"]  # fmt: skip
        run("grpo", *load(GrpoConfig, place / "run.yaml", settings + words), quiet=True)
        lines = [json.loads(line) for line in (place / "ours/log.jsonl").read_text().splitlines()]
        return statistics.mean(line["length"] for line in lines if "length" in line)

    def peer() -> float:
        def lower(completions: list[Any], **_: Any) -> list[float]:
            texts = [some[0]["content"] for some in completions]
            return [sum(c.islower() for c in text) / max(1, len(text)) for text in texts]

        config = PeerConfig(
            str(place / "trl"), num_generations=args.k, max_completion_length=args.tokens, steps_per_generation=1,
            beta=0.04, temperature=1.0, loss_type="grpo", gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"}, **shared,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = GRPOTrainer(args.model, reward_funcs=lower, args=config, train_dataset=Dataset.from_list(prompts),
                              processing_class=tokenizer)  # fmt: skip
        trainer.train()
        key = "completions/mean_length"
        return statistics.mean(line[key] for line in trainer.state.log_history if key in line)

    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        for kept, go in zip(rates, (ours, peer), strict=True):
            torch.manual_seed(0)
            length = go()
            kept.append(Clock.units / Clock.seconds)
            done = f"{Clock.units} completions in {Clock.seconds:.1f} s, mean length {length:.1f}"
            print(f"<!-- {go.__name__}: {done} -->", flush=True)
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}\n")  # fmt: skip
    print(
        "| | completions a second, median | ours against it, pair by pair: median (min to max) |\n| --- | --- | --- |"
    )
    print(f"| train grpo | {statistics.median(rates[0]):.2f} | – |")
    print(f"| TRL | {statistics.median(rates[1]):.2f} | {against(*rates)} |")


if __name__ == "__main__":
    main()
