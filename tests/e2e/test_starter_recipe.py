"""The recipe of the starter model, on a few shipped rows and for a few steps: every command of its card."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "examples/starter"


def test_every_command_of_the_card(tmp_path):
    rows = []
    for name in ("misc", "open_qa", "program_execution"):
        with gzip.open(ROOT / f"examples/superni/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += file.readlines()
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(rows)

    def done(*words):
        run = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout

    data = tmp_path / "data"
    told = done(STARTER / "prepare.py", tmp_path / "rows.jsonl.gz", data)
    with gzip.open(data / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    assert {row["category"] for row in kept} == {"Misc", "Open_QA"}, "a stream over Program_Execution stays new"
    held = sum(row["split"] == "test" for row in kept)
    assert told.strip() == f"{len(kept) - held:,} rows to train on, {held:,} held out"
    assert 0 < held < len(kept) / 10
    for name, out in (("data", "train"), ("held_out", "held")):
        done("-m", "curate.cli", "build", STARTER / f"{name}.yaml", f"tasks.0.path={data / 'rows.jsonl.gz'}",
             f"out={tmp_path / out}")  # fmt: skip
    done("-m", "train.cli", "cpt", "--config", STARTER / "recipe.yaml", f"tokenizer={data / 'tokenizer'}",
         f"data={tmp_path / 'train'}", f"eval_data={tmp_path / 'held'}", f"out={tmp_path / 'out'}", "max_steps=2",
         "per_device_train_batch_size=2", "eval_steps=2", "save_steps=2")  # fmt: skip
    made, shipped = (load_file(f / "model.safetensors") for f in (tmp_path / "out/model", STARTER))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
    assert {v.dtype for v in made.values()} == {torch.bfloat16}
