"""One trainer for every method: a thin layer over transformers.Trainer.

It adds what the library does not have: a loss that is normalised over the whole step, losses by origin and task, a stop
at the first loss that is not a number, with the uids of its batch, and checkpoints that are whole or not there. Loops,
optimizers, schedules, processes and loggers are the library's.

Departures from transformers.Trainer: `training_args.bin` (a pickle) is not written, run.json says the same; optimizer,
schedule and random states are the library's own files, which it reads with `weights_only`. (Sharded checkpoints are
torch's distributed ones, whose `.metadata` is a pickle: go on from folders of your own only.)
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DynamoBackend  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from curate.errors import InputError
from train.data import Examples
from train.folder import checkpoints, mark, whole
from train.methods.base import Method, RunAway
from train.models import adapters_kept
from train.parallel import Whole, compile_layers, load_whole, shards_on_cpus
from train.tally import Tally

STATE = "method.safetensors"
SOUND = "sound"  # in it: the step at which the phase began


class RehearseTrainer(Trainer):
    """Trains by a method on examples.

    Args:
        method: what the loss is.
        identity: what a checkpoint belongs to: method, data, settings; compared when one is resumed.
        more: transformers.Trainer's own arguments.
    """

    def __init__(self, *, method: Method, identity: dict[str, Any], **more: Any) -> None:
        super().__init__(**more)
        self.method, self.identity = method, identity
        trained, measured = more["train_dataset"], more.get("eval_dataset")
        self.examples: Examples = trained.examples  # that batches point to: for losses by origin and task, and for uids
        self.loss_is_scaled_for_ga = True  # the normaliser counts the whole step
        self.folder = Path(str(self.args.output_dir))
        self.tally, self.evaluated = (Tally(d.examples) for d in (trained, trained if measured is None else measured))
        self.met: list[int] = []  # rows of the step so far, of this process
        self.tokens, self.clock = 0, time.monotonic()
        self.whole: Whole | None = None  # the parameters, where the model is sharded
        self.phase: int | None = None  # of the method
        self.sound = 0  # the step at which it began
        if self.args.torch_compile:
            compile_layers(more["model"], self.args.torch_compile_backend, self.args.torch_compile_mode)
        self.add_callback(_AfterStep(method, self._total))
        self.remove_callback(PrinterCallback)  # prints every dictionary of values

    def create_accelerator_and_postprocess(self) -> None:
        """The library's, which then shards on CPUs too and compiles nothing: the whole model would be in each step."""
        with shards_on_cpus(self.args):
            super().create_accelerator_and_postprocess()
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    def _prepare_for_training(self, *args: Any, **more: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **more)
        self.whole = Whole(model) if self.is_fsdp_enabled else None
        load_whole(self.args)  # accelerate has said otherwise; a reward may be loaded yet
        return model, loader

    def try_out(self) -> None:
        """Make the optimizer and its schedule once, so that arguments that they refuse are found before the run.

        Raises:
            ValueError, TypeError, …: what the library says of them.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # they are made of parameters that are not there yet
        self.create_optimizer_and_scheduler(num_training_steps=self.args.max_steps)
        self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, *args: Any, **more: Any) -> Any:
        """The library's, over what the method trains beside the model too."""
        fresh = self.optimizer is None
        made = super().create_optimizer(*args, **more)
        if fresh and (own := self.method.parameters()):
            made.add_param_group({"params": own, "weight_decay": 0.0})
        return made

    # --- the loss ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step, filled by the method, and the method's size of them."""
        batches = list(islice(epoch_iterator, num_batches))
        with self.compute_loss_context_manager():  # what is measured here is compared with the step's own passes
            try:
                found = self.method.fill(self.model, batches)
            except RunAway as far:
                self._turn_back(far)
            except InputError:  # a judge that is gone: what was trained so far is sound, and kept
                self._keep()
                raise
        if self.method.phase != self.phase:  # and the policy was looked at
            self.phase, self.sound = self.method.phase, self.state.global_step
        return found, self._get_num_items_in_batch(list(found), device) if found else None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """The method's size of the whole step: added up over all passes and all processes, [g]."""
        return self._total(torch.stack([self.method.size(batch) for batch in batch_samples]).sum(0).to(device))

    def _total(self, value: Tensor) -> Tensor:
        """Added up over all processes."""
        if self.args.world_size <= 1:
            return value
        found: Tensor = self.accelerator.reduce(value.to(self.args.device), "sum")
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss of one pass, and its penalty once a step."""
        normaliser = num_items_in_batch
        if normaliser is None:  # evaluation: every batch by itself
            normaliser = self.method.size(inputs)
        try:
            loss, logged = self.method.loss(model, inputs, normaliser)
        except RunAway as far:
            self._turn_back(far)
        if not model.training:
            self.evaluated.add_rows(logged, inputs, lambda values: self._once(values, inputs))
            return (loss, {"loss": loss.detach()}) if return_outputs else loss
        penalty, more = self.method.penalty(self.whole or model)
        logged |= more
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if penalty is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps
        self._watch(loss, logged, inputs)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Evaluation: the loss of a batch; there is nothing to predict."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach().mean(), None, None

    def _once(self, rows: Tensor, batch: Any) -> Tensor:
        """Nothing of the items that the library repeats, so that all processes have as many batches.   [2, n]"""
        last, size = self.accelerator.gradient_state, self.args.eval_batch_size
        new = max(0, last.remainder - self.args.process_index * size)
        if self.args.world_size == 1 or not last.end_of_dataloader or last.remainder <= 0:
            return rows
        if "prompt" in batch:  # several answers an item: a row of values is an item
            return torch.cat([rows[:, :new], torch.zeros_like(rows[:, new:])], dim=1)
        if len(batch["input_ids"]) != size:  # items without rows of their own: flash attention's packs
            return rows
        again = batch["segment"][new:].unique()
        return rows.index_fill(1, again[again >= 0], 0)

    def evaluation_loop(self, *args: Any, **more: Any) -> EvalLoopOutput:
        """The method's values over all rows, and by origin and task (the library's mean is over batches)."""
        began = time.monotonic()
        self.evaluated.clear()
        output = super().evaluation_loop(*args, **more)
        found = self.evaluated.means(self._total)
        prefix = more.get("metric_key_prefix", "eval")
        output = output._replace(metrics={**(output.metrics or {}), **{f"{prefix}_{k}": v for k, v in found.items()}})
        self.clock += time.monotonic() - began
        return output

    def _watch(self, loss: Tensor, logged: dict[str, Tensor], batch: Any) -> None:
        """Keep what `log` reports; stop at a loss that is not a number."""
        self.met += batch["row"].tolist()
        if not bool(torch.isfinite(loss.detach())):
            self._stop(f"the loss is {float(loss.detach())}; the batch held", batch["row"].tolist())
        self.tally.add_rows(logged, batch)
        self.tally.add_step(logged)
        tokens = int((batch["segment"] >= 0).sum())
        self.tokens += tokens
        if self.args.include_num_input_tokens_seen == "no":  # else the library counts them itself
            self.state.num_input_tokens_seen += tokens * self.args.world_size  # a checkpoint keeps it

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The library's; a step that would make every weight not a number is not taken."""
        norm, rows = super()._get_grad_norm(model, grad_norm), self.met
        self.met = []
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):  # a scaler skips such steps itself
            self._stop(f"the norm of the gradient is {float(norm)}; the step held", rows)
        return norm

    def _stop(self, what: str, rows: list[int]) -> NoReturn:
        uids = self.examples.uids(rows)
        kept = checkpoints(self.folder)
        raise InputError(
            f"step {self.state.global_step + 1}: {what} {', '.join(uids[:20])}{' …' if len(uids) > 20 else ''}",
            remedy="lower learning_rate, or look at these rows with `curate explain`; "
            + (f"{kept[-1].name} is whole" if kept else "there is no checkpoint yet"),
        )

    def _keep(self) -> None:
        """A checkpoint of the last step, where there is none and checkpoints are wanted."""
        step = self.state.global_step
        if step and self.args.save_strategy != "no" and not (self.folder / f"checkpoint-{step}").exists():
            self._save_checkpoint(self.model_wrapped, None)

    def end(self) -> None:
        """A last look at what came out, before it is published.

        Raises:
            InputError: it has run away.
        """
        with self.compute_loss_context_manager():
            try:
                self.method.end(self.model)
            except RunAway as far:
                self._turn_back(far)

    def _turn_back(self, far: RunAway) -> NoReturn:
        kept = self._sound()
        if kept is None:
            back = "there is no checkpoint from before: begin again"
        else:
            back = f"{kept.name} is from before: begin again, or go on from it as model={kept} with another out"
        raise InputError(f"step {self.state.global_step + 1}: {far.seen}", remedy=f"{far.remedy}; {back}") from None

    def _sound(self) -> Path | None:
        """The newest checkpoint up to the beginning of the phase; None: there is none, or the method has no phases."""
        kept = checkpoints(self.folder) if self.method.phase is not None else []
        before = [c for c in kept if int(c.name.rpartition("-")[2]) <= self.sound]
        return before[-1] if before else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's values, the method's, losses by group, tokens a second and MFU."""
        if self.tally.rows and "loss" in logs:
            logs |= self.tally.means(self._total) | {"loss": logs["loss"]}  # the library's, of steps
            seconds = max(time.monotonic() - self.clock, 1e-9)
            logs["tokens_per_second"] = self.tokens * self.args.world_size / seconds
            if (mfu := self._mfu(logs["tokens_per_second"])) is not None:
                logs["mfu"] = mfu
            self.tally.clear()
            self.tokens, self.clock = 0, time.monotonic()
        if "loss" in logs or "train_runtime" in logs:
            logs["tokens"] = self.state.num_input_tokens_seen  # of the whole run so far
        super().log(logs, start_time)

    def _mfu(self, rate: float) -> float | None:
        """Share of the GPU's peak that the weights' products take; None where the peak is not known."""
        if self.args.device.type != "cuda":
            return None
        peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
        name = torch.cuda.get_device_name(self.args.device)
        peak = next((flops for part, flops in peaks.items() if part in name), None)
        if peak is None:
            return None
        assert self.model is not None
        return _operations(self.model) * rate / (peak * self.args.world_size)

    # --- data ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """In order: the mixture has decided it."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's checkpoint, the method's state, and last the mark that it is whole."""
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # what a killed process left of it
            self.accelerator.wait_for_everyone()
            with whole(folder, "the checkpoint before it is whole, and the same command goes on from there"):
                folder.mkdir(parents=True, exist_ok=True)  # processes ask whether it is there: is it the best?
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process has written its part
                if self.args.should_save:
                    state = self.method.state_dict()
                    if self.method.phase is not None:
                        state[SOUND] = torch.tensor(self.sound)
                    if state:
                        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / STATE)
                    mark(folder, self.state.global_step, self.identity)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None and limit > 0:
            self._drop_old(limit)

    def _drop_old(self, limit: int) -> None:
        kept = {self.state.best_model_checkpoint, str(self._sound())}
        others = [c for c in checkpoints(self.folder) if str(c) not in kept]
        for folder in others[: max(0, len(others) - limit)]:
            shutil.rmtree(folder, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The library's; but the final model is whole even where checkpoints are in shards."""
        if self.is_fsdp_enabled and not _internal_call:
            state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)  # on the first process, else empty
            tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
            state |= {name: state[source] for name, source in tied.items() if name in state and source in state}
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The library's files without the pickled arguments."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The library's, which would leave on one adapter of several."""
        with adapters_kept(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The library's, but not of a weight that another one is tied to: it is nowhere saved twice."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if set(load_result.missing_keys) - set(tied) or load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def take_up(self, checkpoint: Path) -> None:
        """The method's state of a checkpoint."""
        if (checkpoint / STATE).is_file():
            state = load_file(checkpoint / STATE)
            self.sound = int(state.pop(SOUND, torch.tensor(0)))
            self.method.load_state_dict(state)
            self.phase = self.method.phase


def _operations(model: Any) -> float:
    """Of a token, forward and backward: 6 a trained weight, 4 a frozen one; a table that is looked up counts 0."""
    inner = getattr(model, "base_model", model)
    table = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        table = set()
    counted = [p for p in inner.parameters() if id(p) not in table]
    return float(sum((6 if p.requires_grad else 4) * p.numel() for p in counted))


class _AfterStep(TrainerCallback):
    """Tells the method that the optimizer has stepped."""

    def __init__(self, method: Method, total: Callable[[Tensor], Tensor]) -> None:
        self.method, self.total = method, total

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients of what the method trains beside the model: their mean over processes, clipped by themselves."""
        own = [p for p in self.method.parameters() if p.grad is not None]
        for parameter in own:
            if args.world_size > 1 and parameter.grad is not None:
                parameter.grad = self.total(parameter.grad) / args.world_size
        if own and args.max_grad_norm:
            norm = torch.nn.utils.clip_grad_norm_(own, args.max_grad_norm)
            if not math.isfinite(float(norm)):
                raise InputError(f"step {state.global_step + 1}: the norm of the value function's gradient is {norm}",
                                 remedy="lower learning_rate, or value.weight")  # fmt: skip

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The place of a dual ascent."""
        self.method.after_step(self.total)
        for parameter in self.method.parameters():  # the library clears the gradients of the model alone
            parameter.grad = None
