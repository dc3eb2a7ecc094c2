"""What runs of several files start from."""

import json

import pytest
import torch
from test_run import ROOT, STARTER, TINY, trained

from curate.build import build


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a manifest of real rows (30 replayed) and the configuration of a tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    tasks = [{"name": n, "path": str(ROOT / f"examples/superni/{n}.jsonl.gz"), "format": "superni", "split": "train"}
             for n in ("sentiment_analysis", "misc")]  # fmt: skip
    build({"tasks": tasks, "replay": {"selector": "uniform", "budget": 30}, "out": str(folder / "data")})
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def start(place):
    """The tiny model with seeded random weights, saved: a start that several runs share."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    model.save_pretrained(place / "start")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(place / "start")
    return place / "start"


@pytest.fixture(scope="module")
def plain(place):
    """Six steps of plain fine-tuning from seeded random weights."""
    return trained(place, place / "plain")
