"""The command line `curate`: thin. It parses, calls, prints, and turns errors into exit codes.

0 = done, 1 = bad input (or a manifest that fails its check), 2 = wrong usage, 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="curate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure what a stream of fine-tuning tasks is about to forget, and build the replay data against it.\n\n"
    "Start: `curate init FOLDER`, then `curate build config.yaml`, then `curate explain RUN UID`.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides by dotted path: replay.budget=400")
]
RUN = "folder of a manifest, or its URL"
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from curate import __version__

        sys.stdout.write(f"rehearse {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    config: Annotated[Path, typer.Argument(help="the YAML file of the build")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and do nothing else")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Turn a stream of tasks into a manifest: the current task's rows and the replay rows of the tasks before it.

    Tasks are listed in the order of the stream; the last one is the current one. Results of stages are kept beside
    the output, so a second build redoes only what changed, and a build that was stopped goes on where it stopped.

    Examples:
    - `curate build examples/superni/config.yaml`
    - `curate build config.yaml replay.budget=400 replay.selector=uniform out=runs/uniform`
    - `curate build config.yaml --dry-run`
    """
    with _errors(resumable=not dry_run):
        from curate.build import Build
        from curate.config import BuildConfig
        from curate.manifest.tables import counts
        from curate.plan import plan, plan_table
        from curate.screen import Silent, Terminal, policy_table, task_table

        console = Console(stderr=True, quiet=quiet)
        job = Build(BuildConfig.load(config, _checked(overrides)), Silent() if quiet or as_json else Terminal(console))
        if dry_run:
            steps = plan(job)
            _print(plan_table(steps), {"plan": [vars(s) for s in steps]}, quiet, as_json)
            return
        manifest = job.run()
        origins = counts(manifest.scan("samples"), "origin")
        summary = {
            "manifest": job.place.shown,
            "tasks": manifest.tasks.to_dicts(),
            "samples": sum(origins.values()),
            "replay": origins.get(("replay",), 0),
            "augmented": origins.get(("augmented",), 0),
            "completions": manifest.height("completions"),
        }
        _print(task_table(manifest), summary, quiet, as_json)
        if not as_json and (table := policy_table(manifest)) is not None:
            _print(table, {}, quiet, as_json)
        if not (quiet or as_json):
            Console().print(f"manifest: [bold]{escape(job.place.shown)}[/]", soft_wrap=True)
            Console().print(f"page: [bold]{escape(job.place.shown)}/report.html[/]", soft_wrap=True)


@app.command()
def check(run: Annotated[str, typer.Argument(help=RUN)], quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Validate a manifest: schema, hashes, uids, quotas, lineage, scores. Says exactly what is wrong."""
    with _errors():
        from curate.manifest import check as faults_of

        faults = faults_of(run)
        if as_json:
            _print(None, {"manifest": run, "faults": faults}, quiet, as_json)
        for fault in faults if not as_json else []:
            Console(stderr=True).print(f"[red]✗[/] {escape(fault)}", soft_wrap=True, highlight=False)
        if faults:
            raise typer.Exit(1)
        if not (quiet or as_json):
            Console().print(f"[green]✓[/] {escape(run)}: sound", soft_wrap=True)


@app.command()
def refilter(
    run: Annotated[str, typer.Argument(help="folder of a manifest with augmentations, or its URL")],
    settings: Annotated[list[str], typer.Argument(metavar="theta=VALUE [out=FOLDER]", help="the new threshold")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Decide about a manifest's rewrites again with another θ, from their stored scores; no model is asked.

    Examples:
    - `curate refilter runs/demo theta=0.001`
    - `curate refilter runs/demo theta=0.00001 out=runs/loose`
    """
    with _errors():
        from curate.refilter import refilter as decide

        given = _settings(settings, ("theta", "out"))
        manifest = decide(run, _number(given.get("theta"), "theta"), given.get("out"))
        place = given.get("out") or run
        kept, every = int(manifest.augmentations["kept"].sum()), manifest.augmentations.height
        if as_json:
            _print(None, {"manifest": place, "kept": kept, "rewrites": every}, quiet, as_json)
        elif not quiet:
            Console().print(f"{escape(place)}: {kept:,} of {every:,} rewrites kept", soft_wrap=True)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help=RUN)],
    to: Annotated[
        Literal["trl-sft", "trl-dpo", "trl-prompts", "alpaca", "llamafactory", "openai"],
        typer.Option("--to", help="format of the file"),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="the file; by default RUN.FORMAT.jsonl beside RUN (of a URL: here)")
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option("--origin", help="only samples of this origin (current, replay, augmented); may be repeated"),
    ] = None,
    pairs: Annotated[
        Literal["rank", "side"],
        typer.Option("--pairs", help="trl-dpo: each best answer against each worse one, or align against conflict"),
    ] = "rank",
    force: Annotated[bool, typer.Option("--force", help="overwrite what is there")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a manifest's rows for another trainer, as JSONL. What the format cannot express is listed in a file beside.

    Examples:
    - `curate export runs/demo --to trl-sft`
    - `curate export runs/demo --to trl-dpo --pairs side --out pairs.jsonl`
    - `curate export runs/demo --to llamafactory --origin replay --origin augmented`
    """
    with _errors():
        from curate.export import export as written
        from curate.manifest import read
        from curate.manifest.remote import is_url
        from curate.manifest.schema import Origin
        from curate.screen import export_lines

        if wrong := next((each for each in origin or () if each not in list(Origin)), None):
            raise typer.BadParameter(f"--origin {wrong}: not one of {', '.join(Origin)}")
        if is_url(run) and out is None:
            out = Path(f"{run.rstrip('/').rpartition('/')[2]}.{to}.jsonl")
        done = written(read(run), to, out, origins=origin or (), pairs=pairs, force=force)
        if as_json:
            summary = {"file": str(done.file), "rows": done.rows, "skipped": len(done.skipped), "notes": done.notes,
                       "skipped_file": done.skipped_file and str(done.skipped_file)}  # fmt: skip
            _print(None, summary, quiet, as_json)
        for line in [] if quiet or as_json else export_lines(done):
            Console().print(line, soft_wrap=True, highlight=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help=f"{RUN}, or of a phase of reinforcement learning")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[out=FILE]", help="where the page goes")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file that is there")] = False,
    quiet: Quiet = False,
) -> None:
    """Make report.html: what the model will forget, what was picked, and why each row. One file that opens offline.

    Every build makes it in its folder; this makes it of any manifest, older ones too.

    Examples:
    - `curate report runs/demo`
    - `curate report runs/cppo/rollouts/phase-00000 out=phase-0.html`
    """
    with _errors():
        from curate.report import report as make

        place = make(run, _settings(settings or [], ("out",)).get("out"), force)
        if not quiet:
            Console().print(f"page: [bold]{escape(str(place))}[/]", soft_wrap=True)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="RUN", help="folder of the older manifest, or its URL")],
    b: Annotated[str, typer.Argument(metavar="RUN", help="folder of the newer one, or its URL")],
    html: Annotated[Path | None, typer.Option("--html", help="write a page that opens offline")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the page that is there")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what changed between two builds: rows out and in, and why; settings, quotas, buckets.

    Examples:
    - `curate diff runs/superni runs/other`
    - `curate diff runs/superni runs/other --html diff.html`
    """
    with _errors():
        from curate.diff import diff as compared
        from curate.diff_view import page, screen
        from curate.errors import InputError
        from curate.files import refuse_existing, replace_text
        from curate.manifest import read

        if html:
            refuse_existing(html, force, "--html")
        try:
            found = compared(read(a), read(b))
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # tables are checked, facts are not
            raise InputError(f"{a} or {b}: provenance.json does not hold what a build writes ({type(error).__name__})",
                             remedy=f"`curate check` says more: {a}, {b}") from None  # fmt: skip
        if html:
            replace_text(html, page(found))
        if as_json:
            _print(None, found.to_dict(), quiet, as_json)
        for part in [] if quiet or as_json else screen(found):
            _print(part, {}, quiet, as_json)
        if html and not (quiet or as_json):
            Console().print(f"page: [bold]{escape(str(html))}[/]", soft_wrap=True)


@app.command()
def explain(
    run: Annotated[str, typer.Argument(help=RUN)],
    uid: Annotated[str, typer.Argument(help="uid of a row, or its first digits")],
) -> None:
    """Say why a row is in the set: its task's distance and share, its instruction's tags, its draw. Or why not."""
    with _errors():
        from curate.explain import explain as story
        from curate.manifest import read

        Console().print(escape(story(read(run), uid)), soft_wrap=True, highlight=False)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder with one data file a task")],
    out: Annotated[Path | None, typer.Option("--out", help="where to write; by default FOLDER/config.yaml")] = None,
) -> None:
    """Write a commented starting config from a folder of data files (one file a task, in the order of their names)."""
    with _errors():
        from curate.init import write_config

        path = write_config(folder, out or folder / "config.yaml")
        Console().print(f"wrote {escape(str(path))}; put the tasks in the order of your stream, then:", soft_wrap=True)
        Console().print(f"  curate build {escape(str(path))}", soft_wrap=True)


@app.command()
def selectors() -> None:
    """List the ways to choose replay rows (`replay.selector`)."""
    from curate.sample import SELECTORS

    for name, selector in SELECTORS.items():
        Console().print(f"[bold]{name:<22}[/]{escape(selector.about)}", soft_wrap=True, highlight=False)


def _checked(overrides: list[str] | None) -> list[str]:
    for override in overrides or []:
        if "=" not in override or override.startswith("="):
            raise typer.BadParameter(f"{override!r} is not of the form key=value, as in replay.budget=400")
    return overrides or []


def _settings(given: list[str], known: tuple[str, ...]) -> dict[str, str]:
    """key=value words as a mapping; an unknown key is wrong usage."""
    found = dict(each.split("=", 1) for each in _checked(given))
    if wrong := next((key for key in found if key not in known), None):
        raise typer.BadParameter(f"unknown key {wrong!r}; known: {', '.join(known)}")
    return found


def _number(text: str | None, name: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise typer.BadParameter(f"{name}={text or ''} is not a number; write {name}=0.1") from None


def _print(table: Any, summary: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(summary, ensure_ascii=False) + "\n")
    elif not quiet:
        console = Console()
        console.print(table) if console.is_terminal else Console(width=140).print(table)


@contextmanager
def _errors(resumable: bool = False) -> Iterator[None]:
    """What a user can mend is one message and exit code 1; the rest keeps its traceback."""
    from curate.errors import InputError, of_system
    from curate.manifest import ManifestError

    console = Console(stderr=True)
    try:
        yield
    except (InputError, ManifestError) as error:
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in str(error))  # no escape codes of the data
        console.print(f"[red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        more = "; what is done is kept, the same command goes on from there" if resumable else ""
        console.print(f"stopped{more}", soft_wrap=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if not of_system(error):
            raise
        console.print(
            f"[red]error:[/] {escape(str(error)[:1000])}\n  remedy: mend the path or make room, or choose others "
            "with out=FOLDER and cache=FOLDER; nothing was published, and what is done is kept",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would warn on every screen
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
