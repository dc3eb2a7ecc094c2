"""The command line `train`: thin. It parses, calls, prints, and turns errors into exit codes.

0 = done, 1 = bad input, 2 = wrong usage, 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from train import metrics

if TYPE_CHECKING:
    from curate.settings import Section

Settings = TypeVar("Settings", bound="Section")

app = typer.Typer(name="train", no_args_is_help=True, add_completion=False, help="Train on a manifest, and measure it.")


Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of the run")]


def _words(example: str) -> Any:
    return typer.Argument(metavar="[KEY=VALUE]...", help=f"settings: {example}")


Words = Annotated[list[str] | None, _words("data=runs/superni learning_rate=1e-5")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import curate

        sys.stdout.write(f"rehearse {curate.__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def cft(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """Continual fine-tuning: weighted NLL on current and replayed rows; KL, LoRA, O-LoRA and EWC by settings.

    Keys are ours (see train/config.py) and all of transformers.TrainingArguments by their own names.

    Examples:
        train cft model=examples/starter data=runs/demo out=runs/cft learning_rate=1e-3 num_train_epochs=1

        train cft --config run.yaml data=runs/superni kl.weight=0.1 lora.r=16
    """
    _train("cft", config, settings, quiet)


@app.command()
def cpt(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """Continued pre-training: the loss is on all tokens of packed blocks; old domains come back by `mixture`."""
    _train("cpt", config, settings, quiet)


@app.command()
def pbl(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """PBL: towards the policy's answers that agree with the target, off those that conflict with it.

    Needs rollouts with similarities: `rollouts` and `candidates: {similarity: true}` in the manifest's config.
    """
    _train("pbl", config, settings, quiet)


@app.command()
def dpo(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """DPO or IPO (loss=ipo) over ranked answers, with KL to the old policy; old preferences come back by `mixture`."""
    _train("dpo", config, settings, quiet)


@app.command()
def copr(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    r"""COPR: fit the policy to the optimum of its own update over ranked answers, held by the optima of older tasks.

    A run leaves a folder `buffer`; later stages name it in `buffers`.

    Example: train copr model=runs/stage-1/model data=runs/two 'buffers=\[runs/stage-1/buffer]' out=runs/stage-2
    """
    _train("copr", config, settings, quiet)


@app.command()
def cppo(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """CPPO: PPO on fresh rollouts, weighted by their bucket, held to the policy of the task before.

    Example: train cppo model=runs/stage-1/model data=runs/two out=runs/stage-2 reward=exact rollouts.prompts=64
    """
    _train("cppo", config, settings, quiet)


@app.command()
def grpo(config: Config = None, settings: Words = None, quiet: Quiet = False) -> None:
    """GRPO (GSPO: level=sequence) on fresh rollouts; CPPO's weights and retention can be switched on."""
    _train("grpo", config, settings, quiet)


@app.command()
def settings(
    method: Annotated[str, typer.Argument(help="cft, cpt, copr, dpo, pbl, cppo, grpo, fisher, eval or stream")],
) -> None:
    """Every setting of a command with its default and what it means; those of TrainingArguments stand beside them.

    Example: train settings copr
    """
    from train.settings import described

    try:
        rows = described(method)
    except KeyError as error:
        raise typer.BadParameter(f"no command {method!r}: {error.args[0]}") from None
    width = max(len(f"{name} = {default}") for name, default, _ in rows)
    for name, default, what in rows:
        sys.stdout.write(f"{f'{name} = {default}':<{min(width, 44)}}  {what}\n")


@app.command()
def fisher(
    config: Config = None,
    settings: Annotated[list[str] | None, _words("model=runs/cft/model data=runs/superni samples=200")] = None,
) -> None:
    """Estimate the diagonal Fisher information of a model on its rows: what `ewc` holds in later stages.

    Example: train fisher model=runs/cft/model data=runs/demo out=runs/fisher samples=200
    """
    with _errors():
        from train.fisher import FisherConfig
        from train.fisher import fisher as estimate

        folder = estimate(_settings(FisherConfig, config, settings), lambda text: print(text, file=sys.stderr))
        sys.stdout.write(f"fisher: {folder}\n")


@app.command(name="eval")
def eval_(
    config: Config = None,
    settings: Annotated[list[str] | None, _words("models=runs/cft/model data=runs/held-out metric=exact")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace results of other settings in `out`")] = False,
    quiet: Quiet = False,
) -> None:
    r"""Score checkpoints on the tasks of a manifest: items, the R matrix, and the metrics of continual learning.

    Example: train eval 'models=\[examples/starter,runs/cft/model]' data=runs/held-out out=runs/eval metric=rouge_l
    """
    with _errors():
        from train.evaluate import EvalConfig, evaluate

        say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr))
        wanted = _settings(EvalConfig, config, settings)
        found = evaluate(wanted, say, force)
        if not quiet:
            sys.stdout.write(f"{wanted.metric:<{WIDTH}}estimate  95 % interval over items\n")
            for name, value in found.items():
                if isinstance(value, dict) and "interval" in value:
                    sys.stdout.write(f"{_title(name)}{_shown(value)}\n")


@app.command()
def stream(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the stream")],
    settings: Annotated[list[str] | None, _words("out=runs/stream train.learning_rate=1e-3")] = None,
    stage: Annotated[int | None, typer.Option(help="begin again with this stage, in all runs")] = None,
    hand: Annotated[
        bool, typer.Option("--by-hand", help="write the files of all stages, print their commands, run nothing")
    ] = False,
    quiet: Quiet = False,
) -> None:
    r"""A continual run from beginning to end: replay set, training and evaluation, stage after stage, over a grid.

    Writes results.parquet, stream.html and a folder a stage. What is done stays: the same command goes on.

    Example: train stream --config examples/stream.yaml out=runs/stream 'seeds=\[0,1,2]'
    """
    with _errors():
        from rich.console import Console

        from train.stream import stream as run
        from train.stream.config import BUDGETS, StreamConfig
        from train.stream.run import Silent, by_hand
        from train.stream.screen import Terminal, commands, ends_table

        if hand and stage is not None:
            raise typer.BadParameter(
                "--by-hand begins no stage, so there is none to begin again with: leave out --stage"
            )
        wanted = _settings(StreamConfig, config, settings, [[f"replay.{name}" for name in BUDGETS]])
        if hand:
            sys.stdout.writelines(f"{line}\n" for line in commands(by_hand(wanted)))
            return
        table = run(wanted, stage, Silent() if quiet else Terminal(Console(stderr=True)))
        if not quiet:
            Console().print(ends_table(table))
            sys.stdout.write(f"page: {Path(wanted.out) / 'stream.html'}\n")


TITLES = {
    "last": "mean of the tasks, last model",
    "ACC": "ACC: items right, last model",
    "KGR": "KGR: of the wrong, now right",
    "KRR": "KRR: of the right, kept",
    "forward_transfer": "forward transfer, zero-shot",  # the field calls two things forward transfer
}
WIDTH = 30


def _title(name: str) -> str:
    return f"{TITLES.get(name, name.replace('_', ' ')):<{WIDTH}}"


def _shown(found: dict[str, Any]) -> str:
    value, interval = found["value"], found.get("interval")
    if value is None or isinstance(value, list):
        return "–" if value is None else ", ".join(f"{v:.2f}" for v in value)
    return f"{value:.4f}" + (f"    [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _settings(
    model: type[Settings], path: Path | None, words: list[str] | None, exclusive: Sequence[Sequence[str]] = ()
) -> Settings:
    from curate.settings import checked, override, read_yaml

    data = read_yaml(path) if path is not None else {}
    for word in _checked(words):
        override(data, word, exclusive)
    return checked(model, {**data, "base": str(path.parent) if path else "."}, str(path or "command line"))


def _checked(words: list[str] | None) -> list[str]:
    for word in words or []:
        if "=" not in word or word.startswith("="):
            raise typer.BadParameter(f"{word!r} is not of the form key=value, as in learning_rate=1e-5")
    return words or []


def _train(name: str, config: Path | None, settings: list[str] | None, quiet: bool) -> None:
    with _errors():
        from train.run import CONFIGS, run
        from train.settings import load

        ours, theirs = load(CONFIGS[name], config, _checked(settings))
        model = run(name, ours, theirs, quiet)
        if not quiet and os.environ.get("RANK", "0") == "0":  # the first of several processes speaks
            sys.stdout.write(f"model: {model}\n")


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is one message and exit code 1; the rest keeps its traceback."""
    from curate.errors import InputError, of_system
    from curate.manifest import ManifestError

    try:
        yield
    except (InputError, ManifestError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint, if there is one\n")
        raise typer.Exit(130) from None
    except Exception as error:
        if not of_system(error):
            raise
        sys.stderr.write(f"error: {_plain(str(error)[:1000])}\n  remedy: mend the path, or make room; what is done is "
                         "kept, and the same command goes on\n")  # fmt: skip
        raise typer.Exit(1) from None


@app.command()
def lineage(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    step: Annotated[int, typer.Argument(help="counted from 1, as logs and checkpoints count")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Which rows a step of a run saw; `curate explain MANIFEST UID` says why each of them is in the set.

    Example: train lineage runs/cft 40
    """
    with _errors():
        from train.lineage import seen

        rows = seen(run, step)
        if as_json:  # in ASCII: names may hold what a terminal obeys
            for row in rows.iter_rows(named=True):
                sys.stdout.write(json.dumps(row, separators=(",", ":")) + "\n")
            return
        shown = [[_plain(text) for text in row] for row in rows.iter_rows()]
        width = max(len(task) for _, task, _ in shown)
        for uid, task, origin in shown:
            sys.stdout.write(f"{uid}  {task:<{width}}  {origin}\n")


def _plain(text: str) -> str:
    r"""Text of the data for a terminal: control characters and direction marks as \x1b, \u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@app.command(name="metrics")
def metrics_(
    matrix: Annotated[
        Path, typer.Argument(help="CSV of R: T+1 lines of T numbers, line 1 = before training; or eval's matrix.csv")
    ],
    upper: Annotated[str | None, typer.Option(help="scores of each task trained alone: 0.9,0.8,…")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """AP, backward transfer, forgetting, both forward transfers and relative gain of an R matrix."""
    with _errors():
        from train.evaluate import read_matrix

        r = read_matrix(matrix)
        found = _measured(r, _uppers(upper, len(r[0]) if r else 0), str(matrix))
    if as_json:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
        return
    for name, value in found.items():
        shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.4f}"
        sys.stdout.write(f"{_title(name)}{shown}\n")


def _uppers(text: str | None, tasks: int) -> list[float] | None:
    from curate.errors import InputError

    if text is None:
        return None
    try:
        best = [float(word) for word in text.split(",")]
    except ValueError:
        best = []
    if len(best) != tasks or not all(0 < value < math.inf for value in best):
        raise InputError(f"--upper {text[:80]!r}: not {tasks} positive numbers", remedy="one a task: --upper 0.9,0.8,…")
    return best


def _measured(r: list[list[float]], upper: list[float] | None, where: str) -> dict[str, float | list[float]]:
    import numpy as np

    from curate.errors import InputError

    try:
        with np.errstate(all="ignore"):
            found = metrics.every(r, upper)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if wrong := next((name for name, value in found.items() if not np.isfinite(value).all()), None):
        raise InputError(f"{where}: {wrong} is beyond what a number can hold", remedy="give scores of a usual size")
    return found


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
