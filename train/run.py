"""A training run from its settings to its folder: data, model, method, trainer, what was seen, the final model.

A run folder holds `run.json` (resolved settings, manifest hashes, git state, versions), `checkpoint-N/`, `model/` (the
final weights or adapter, loadable by transformers, PEFT and vLLM), `log.jsonl`, `lineage.parquet` (which rows each step
sees), and `too_long.parquet` where samples were cut or dropped. `run.json` is there before the first step, `model/`
only when the run is through.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from curate.errors import InputError
from curate.models.weights import merged
from train import lineage, parallel
from train.config import (
    AnswersConfig,
    CftConfig,
    CoprConfig,
    CppoConfig,
    CptConfig,
    DpoConfig,
    GrpoConfig,
    KlConfig,
    PblConfig,
    RunConfig,
)  # fmt: skip
from train.data import Examples
from train.facts import facts_of, identity_of, read_by, write_facts
from train.folder import FACTS, MODEL, RUN, alone, clear, refuse_foreign, resumable, whole
from train.logprobs import AdapterOff, keeps_samples_apart
from train.methods import Cft, Cpt, Method
from train.methods.cppo import Cppo
from train.mixing import Mixture
from train.models import (
    check_vocabulary,
    context_of,
    end_tokens,
    join_adapters,
    open_model,
    open_tokenizer,
    read_fishers,
    with_adapter,
)
from train.packing import Collator, Items, Packing
from train.phases import Phases, Slots
from train.phases import collate as collate_slots
from train.preferences import Stage, collator, fill, leave_buffer, method_of, read_sets, read_stage
from train.reinforce import VALUE, Prompts, cppo_of, read_prompts, write_value
from train.rollouts import FOLDER as ROLLOUTS
from train.screen import Progress
from train.sets import SetItems
from train.trainer import RehearseTrainer

CONFIGS: dict[str, type[RunConfig]] = {
    "cft": CftConfig, "cpt": CptConfig, "pbl": PblConfig, "dpo": DpoConfig, "copr": CoprConfig, "cppo": CppoConfig,
    "grpo": GrpoConfig,
}  # fmt: skip


def run(name: str, config: RunConfig, theirs: Mapping[str, Any], quiet: bool = False) -> Path:
    """Train by a method and return the folder of the final model.

    Args:
        name: a key of CONFIGS.
        config: our settings.
        theirs: keys for transformers.TrainingArguments.
        quiet: no progress line.

    Raises:
        InputError: something cannot be used; found before the first step wherever it can be.
    """
    out = Path(config.out)
    refuse_foreign(out, RUN, read_by(config))
    arguments = _arguments(config, theirs)
    if arguments.process_index:  # the first process alone owns the folder
        return _run(name, config, theirs, arguments, quiet)
    with alone(out):
        return _run(name, config, theirs, arguments, quiet)


def _run(name: str, config: RunConfig, theirs: Mapping[str, Any], arguments: Any, quiet: bool) -> Path:
    out = Path(config.out)
    tokenizer, context = open_tokenizer(config), context_of(config)
    stage = _stage(name, config, tokenizer, context)
    items, epochs = _items(name, config, stage, context, arguments, theirs)
    evaluated = _evaluated(name, config, tokenizer, context, arguments)
    facts = facts_of(name, config, theirs, arguments)
    if isinstance(stage, Prompts):
        facts["inputs"]["reward"] = stage.reward.fingerprint
    identity = identity_of(facts)
    last, damaged = resumable(out, identity, facts) if config.resume else (None, [])
    set_seed(arguments.seed)  # random weights and fresh adapters are the run's, not the process's
    model = open_model(config)
    check_vocabulary(model, tokenizer, "model")
    flash = items.packing is not None and "flash" in str(getattr(model.config, "_attn_implementation", ""))
    if items.packing is not None and not keeps_samples_apart(model.eval(), rows=1 if flash else 2):
        raise InputError(
            f"{config.model or config.init}: this architecture lets the samples of a packed row see each other",
            remedy="set packing=false" if name != "cpt" else "continued pre-training needs packed rows: another model",
        )
    model, reference, old = _adapted(config, model, tokenizer, arguments.device)
    pad = tokenizer.pad_token_id or 0
    screen = Progress(out, epochs, quiet)
    collate: Any = Collator(pad, one_row=flash)
    if isinstance(config, AnswersConfig):
        assert isinstance(stage, Stage)
        model.to(arguments.device)
        every = [stage.sets, *([evaluated.sets] if evaluated else [])]
        collate = collator(config, model, pad, name == "pbl", every)
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):  # as it will be trained
            for sets in every:
                fill(config, sets, model, collate, arguments.eval_batch_size, arguments.seed)
            method = method_of(config, stage, model, reference, collate, arguments.eval_batch_size)
    elif isinstance(config, CppoConfig):
        assert isinstance(stage, Prompts) and isinstance(items, Slots)
        model.to(arguments.device)
        collate = collate_slots
        method = cppo_of(
            config,
            stage,
            items.phases,
            model,
            tokenizer,
            arguments.device,
            arguments.seed,
            screen.tell,
            parallel.sharded(arguments) or parallel.zero3(arguments),
            len(items),
        )
    else:
        method = _method(config, model, reference, old)
    try:
        trainer = RehearseTrainer(
            method=method, identity=identity, model=model, args=arguments, train_dataset=items,
            eval_dataset=evaluated, processing_class=tokenizer, callbacks=[screen], data_collator=collate,
        )  # fmt: skip
        trainer.try_out()
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"training arguments: {str(error)[:500]}") from None
    if arguments.process_index == 0:
        for each in damaged:
            screen.tell(f"{each}: left aside; going on from {last.name if last else 'the start'}")
        with whole(out / f".{FACTS}", "the same command begins again"):
            if not config.resume:
                clear(out)
            if last is None:  # rollouts are of the policy that begins now
                shutil.rmtree(out / ROLLOUTS, ignore_errors=True)
            write_facts(out, facts | {"identity": identity})
            stage.write_left_out(out)
            lineage.write(items, out, arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps,
                          arguments.world_size)  # fmt: skip
    screen.tell(_start(name, stage, items, arguments, last))
    for what, of in (("", stage), ("of eval_data ", evaluated)):
        left = getattr(getattr(of, "sets", of), "left_out", None)
        if left is not None and left.height:
            listed = "listed in left_out.parquet" if of is stage else f"the first: {left['reason'][0]}"
            screen.tell(f"{left.height:,} answers or prompts {what}are not used: {listed}")
    if last is not None:
        trainer.take_up(last)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.end()
    finally:
        if isinstance(method, Cppo):
            method.close()
    if trainer.state.best_model_checkpoint is not None:
        best = Path(trainer.state.best_model_checkpoint).name
        screen.tell(f"best: {best}, {arguments.metric_for_best_model} {trainer.state.best_metric:.4f}")
    model_folder = _publish(trainer, out, config, tokenizer)
    if isinstance(config, CoprConfig) and isinstance(stage, Stage) and arguments.process_index == 0:
        leave_buffer(config, stage, tokenizer, out, arguments.seed)
    if isinstance(method, Cppo) and arguments.process_index == 0:
        write_value(method, out)
        if method.head is not None:
            screen.tell(f"value function for the next stage: value.head={out / VALUE}"
                        + (f" value.model={out / 'value'}" if method.critic is not None else ""))  # fmt: skip
    return model_folder


def _start(name: str, stage: Examples | Stage | Prompts, items: Items, arguments: Any, last: Path | None) -> str:
    """What a run is, in a line."""
    rows = _rows(stage)
    held = ", ".join(f"{len(of):,} {origin}" for origin, of in rows.groups("origin").items())
    words = [f"{name}: {held} rows", f"{arguments.max_steps:,} steps", str(arguments.device)]
    if arguments.world_size > 1:
        words.append(f"{arguments.world_size} processes")
    if last is not None and int(last.name[11:]) >= arguments.max_steps:
        words.append(f"{last.name} is the last: nothing is left to train")
    elif last is not None:
        words.append(f"going on from {last.name}")
    return " · ".join(words)


# --- data ---


def _rows(stage: Examples | Stage | Prompts) -> Examples:
    return stage if isinstance(stage, Examples) else stage.sets.rows if isinstance(stage, Stage) else stage.rows


def _stage(name: str, config: RunConfig, tokenizer: Any, context: int | None) -> Examples | Stage | Prompts:
    if isinstance(config, CppoConfig):
        return read_prompts(config, tokenizer, end_tokens(config, tokenizer), context)
    if isinstance(config, AnswersConfig):
        return read_stage(name, config, tokenizer, end_tokens(config, tokenizer), context)
    return _examples(name, config, config.data, tokenizer, context)


def _items(
    name: str, config: RunConfig, stage: Examples | Stage | Prompts, context: int | None, arguments: Any, theirs: Any
) -> tuple[Items, float]:
    """(the items of the whole run, how many epochs they are)."""
    rows = _rows(stage)
    mixture, packing = Mixture(rows, config.mixture, arguments.seed), _packing(name, config, rows, context)

    def planned(**how: Any) -> Items:
        if isinstance(stage, Stage):
            return SetItems(stage.sets, mixture, **how)
        if isinstance(config, CppoConfig):
            of = config.rollouts
            return Slots(rows, Phases(mixture, of.prompts, of.k, of.passes, arguments.seed), **how)
        return Items(rows, mixture, packing=packing, **how)

    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    items = planned(epochs=arguments.num_train_epochs, max_steps=steps, items_per_step=per_step)
    total = len(items) // per_step
    epochs = arguments.num_train_epochs
    if steps is not None:
        epochs = len(items) / len(planned())
    for what in ("eval", "save", "logging"):  # the library would take the whole run for one epoch
        if getattr(arguments, f"{what}_strategy") == "epoch":
            setattr(arguments, f"{what}_strategy", type(arguments.logging_strategy)("steps"))
            setattr(arguments, f"{what}_steps", max(1, round(total / epochs)))
    if "logging_steps" not in theirs and arguments.logging_strategy == "steps":
        arguments.logging_steps = max(1, min(10, total // 20))  # short runs are looked at too
    arguments.num_train_epochs, arguments.max_steps = 1, total  # the items hold the whole run
    return items, epochs


def _examples(name: str, config: RunConfig, folders: list[str], tokenizer: Any, context: int | None) -> Examples:
    """Rows of no more tokens than the model has positions for; those of blocks are cut anyway.

    Raises:
        InputError: a longer row, where `too_long` is error.
    """
    paths = [config.path(folder) for folder in folders]
    most = None if name == "cpt" else min((n for n in (config.max_length, context) if n is not None), default=None)
    return Examples.read(paths, tokenizer, max_length=most, too_long=config.too_long,
                         loss_on="all" if name == "cpt" else "answer", ends=end_tokens(config, tokenizer))  # fmt: skip


def _packing(name: str, config: RunConfig, examples: Examples, context: int | None) -> Packing | None:
    """How rows share items. Blocks fit the context; packs need not, as positions begin anew in each row."""
    if not config.packing:
        return None
    length = config.pack_length or config.max_length or int(examples.lengths.max())
    if name == "cpt" and context is not None:
        if (config.pack_length or config.max_length or 0) > context:
            raise InputError(f"pack_length {length}: the model has positions for {context} tokens",
                             remedy=f"set pack_length={context} or less")  # fmt: skip
        length = min(length, context)
    return Packing(length, split=name == "cpt")


def _evaluated(name: str, config: RunConfig, tokenizer: Any, context: int | None, arguments: Any) -> Any:
    if not config.eval_data:
        if arguments.eval_strategy != "no":
            raise InputError("eval_strategy asks for evaluation, but there is no `eval_data`",
                             remedy="name a manifest: eval_data=runs/held-out")  # fmt: skip
        return None
    if isinstance(config, AnswersConfig):
        sets = read_sets(name, config, config.eval_data, tokenizer, end_tokens(config, tokenizer), context)
        return SetItems(sets, Mixture(sets.rows, None, arguments.seed))
    examples = _examples(name, config, config.eval_data, tokenizer, context)
    packing = _packing(name, config, examples, context)
    return Items(examples, Mixture(examples, None, arguments.seed), packing=packing)


# --- model and method ---


def _adapted(
    config: RunConfig, model: Any, tokenizer: Any, device: torch.device
) -> tuple[Any, Any, dict[str, list[Tensor]]]:
    """(the model with its adapter, π_ref where a KL term asks for one, frozen A matrices of older adapters)."""
    reference: Any = None
    kl: KlConfig | None = None if isinstance(config, CppoConfig) else getattr(config, "kl", None)
    wanted = kl is not None and kl.weight > 0
    if kl is not None and wanted and (kl.reference is not None or config.lora is None):
        named = kl.reference  # else the model before training, random weights or not
        reference = deepcopy(model) if named is None else open_model(config, named, "kl.reference")
        check_vocabulary(reference, tokenizer, "kl.reference")
        if reference.config.vocab_size != model.config.vocab_size:
            raise InputError(f"kl.reference: {reference.config.vocab_size:,} tokens, the model has "
                             f"{model.config.vocab_size:,}: there is no KL between them")  # fmt: skip
        reference = reference.to(device).eval().requires_grad_(False)  # whole in each process
    old: dict[str, list[Tensor]] = {}
    if config.lora is not None:
        model, old = with_adapter(model, config, getattr(config, "o_lora", None))
        if reference is None and wanted:
            reference = AdapterOff(model, "default")  # π_ref: the same weights without the new adapter
    return model, reference, old


def _method(config: RunConfig, model: Any, reference: Any, old: dict[str, list[Tensor]]) -> Method:
    if not isinstance(config, CftConfig):
        return Cpt()
    kl, ewc, o_lora = config.kl, config.ewc, config.o_lora
    fishers = read_fishers([config.path(folder) for folder in ewc.fisher], model) if ewc and ewc.weight else []
    return Cft(
        kl=kl.weight if kl else 0.0, reference=reference, ewc=ewc.weight if ewc else 0.0, fishers=fishers,
        orthogonal=o_lora.weight if o_lora else 0.0, old_adapters=old,
    )  # fmt: skip


def _arguments(config: RunConfig, theirs: Mapping[str, Any]) -> Any:
    from transformers import TrainingArguments

    half = config.dtype != "float32" and torch.cuda.is_available()
    parallel.check_installed(theirs)
    try:
        arguments = TrainingArguments(
            **{"save_strategy": "steps", "save_steps": 500, "save_total_limit": 2,
               "dataloader_pin_memory": torch.cuda.is_available(), "disable_tqdm": True,
               "ddp_find_unused_parameters": False, "bf16": half,
               "use_cache": True,  # goes into the saved config; no pass of ours makes a cache
               "use_cpu": not torch.accelerator.is_available(), **theirs},
            output_dir=config.out, remove_unused_columns=False, average_tokens_across_devices=True,
            label_names=["loss_mask"],
        )  # fmt: skip
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise InputError(f"training arguments: {str(error)[:500]}") from None
    best = arguments.metric_for_best_model
    kind = str(best or "loss").removeprefix("eval_")
    if arguments.load_best_model_at_end and not kind.startswith(("loss", "accuracy")):
        raise InputError(f"metric_for_best_model: {best!r} is not measured",
                         remedy="name eval_loss, or the loss of a task: eval_loss_task/NAME")  # fmt: skip
    if "greater_is_better" not in theirs:  # the library looks at the end of the name, where a task's may stand
        arguments.greater_is_better = kind.startswith("accuracy")
    if arguments.n_gpu > 1:
        raise InputError(f"one process sees {arguments.n_gpu} GPUs: rows would reach them in an unplanned order",
                         remedy="start one process a GPU, as in `accelerate launch -m train.cli cft …`, or set "
                         "CUDA_VISIBLE_DEVICES=0")  # fmt: skip
    if getattr(arguments.accelerator_config, "split_batches", False):
        raise InputError("accelerator_config.split_batches: the batch size is that of a process here",
                         remedy="leave it out")  # fmt: skip
    parallel.check(arguments)
    parallel.load_whole(arguments)
    split = parallel.sharded(arguments) or parallel.zero3(arguments)
    if isinstance(config, CppoConfig) and split:
        if config.rollouts.sync:
            raise InputError("rollouts.sync: no process has the whole policy", remedy="DDP; or load checkpoints there")
        if config.advantages == "gae":
            raise InputError("a sharded optimizer knows the model's parameters alone, and not the value function",
                             remedy="advantages=group with rollouts.k=2 or more; or DDP")  # fmt: skip
    if config.merge and split:
        raise InputError(
            "merge: no process has the whole model", remedy="merge the saved adapter afterwards, with PEFT"
        )
    if parallel.zero3(arguments) and (getattr(config, "ewc", None) or getattr(config, "o_lora", None)):
        raise InputError("ewc and o_lora need whole parameters, which ZeRO-3 does not show",
                         remedy="ZeRO-2, FSDP2 or DDP")  # fmt: skip
    return arguments


def _publish(trainer: RehearseTrainer, out: Path, config: RunConfig, tokenizer: Any) -> Path:
    """The final model, whole or not there."""
    staging, final = out / ".model", out / MODEL
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    if config.save_dtype != "auto":
        trainer.accelerator.unwrap_model(trainer.model).to(getattr(torch, config.save_dtype))
    with whole(staging, "the last checkpoint is whole, and the same command ends the run from there"):
        trainer.save_model(str(staging))
        if trainer.args.should_save and (old := getattr(config, "o_lora", None)) is not None:
            join_adapters(staging, trainer.accelerator.unwrap_model(trainer.model), [*map(config.path, old.previous)])
        if trainer.args.should_save and config.merge and config.lora is not None:
            merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(staging / "merged")
            tokenizer.save_pretrained(staging / "merged")
    if trainer.args.should_save:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
    trainer.accelerator.wait_for_everyone()  # no process leaves before the model is there
    return final
