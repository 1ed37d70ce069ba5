"""The commands. Each imports what it needs when it runs, so that `curate --help` is quick."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from curate import __version__
from curate.cli import options as o
from curate.cli.options import Common

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Measure every training example, choose a mixture, write pruned and reweighted shards.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def init(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...", help="Files, folders, globs or addresses: a source each."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("curate.yaml"),
    target: Annotated[
        str | None, typer.Option("--target", help="Examples of what is wanted: chosen by likeness.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a commented starter configuration for DATA."""
    from curate.cli.tools import print_starter

    print_starter(data, out, target=target, as_json=json)


def _stage(name: str, text: str) -> None:
    """A command for one stage (or all) that has the common options and no others."""

    def command(
        config: o.ConfigOrRun,
        files: o.Files = None,
        overrides: o.Overrides = None,
        out: o.Out = None,
        json: o.Json = False,
        events: o.Events = None,
        quiet: o.Quiet = False,
        verbose: o.Verbose = False,
        dry_run: o.DryRun = False,
        measure: o.Measure = False,
        workers: o.Workers = None,
        profile: o.Profile = None,
        device: o.Device = None,
        retry_failed: o.RetryFailed = False,
    ) -> None:
        _run(name, locals())

    app.command(name, help=text)(command)


def _run(command: str, given: Mapping[str, Any]) -> None:
    """Sort what a command was given into common options and its own, and run it."""
    from curate.cli.stages import run_command

    shared = {field.name: given[field.name] for field in fields(Common) if field.name in given}
    more = {key: given[key] for key in _OWN if given.get(key)}
    run_command(command, Common(**shared, more=more))


_OWN = ("scorer", "model", "task", "text", "label", "domain", "target", "embed", "mixer", "metric",
        "better", "redrawn", "weights")  # fmt: skip
"""Options of single commands."""


_stage("index", "List the examples, cut partitions, set bad rows aside.")
_stage("train", "Train the models that score, and their tokenizer where one is asked for.")
_stage("embed", "Make a vector of every example and target example.")
_stage("domains", "Cut the pool into domains by clustering its vectors.")


@app.command()
def score(
    config: Annotated[
        str,
        typer.Argument(metavar="DATA_OR_CONFIG", help="Data, settings (YAML), or a run folder."),
    ],
    scorer: Annotated[
        list[str] | None, typer.Option("--scorer", help="See `curate methods`. Repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder saved by transformers, or a hub id.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="By default what the model was made for.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column of the class.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Column of the domain.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Target examples, for methods that need them.")
    ] = None,
    embed: Annotated[
        str | None,
        typer.Option("--embed", help="Model whose vectors are compared; or ngrams, or values."),
    ] = None,
    reuse: o.Reuse = None,
    files: o.Files = None,
    overrides: o.Overrides = None,
    out: o.Out = None,
    json: o.Json = False,
    events: o.Events = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    measure: o.Measure = False,
    workers: o.Workers = None,
    profile: o.Profile = None,
    device: o.Device = None,
    retry_failed: o.RetryFailed = False,
) -> None:
    """Score every example of DATA_OR_CONFIG; data needs no settings file."""
    _run("score", locals())


@app.command()
def mix(
    config: o.ConfigOrRun,
    mixer: Annotated[
        str | None, typer.Option("--mixer", help="In place of the settings' mixer.")
    ] = None,
    files: o.Files = None,
    overrides: o.Overrides = None,
    out: o.Out = None,
    json: o.Json = False,
    events: o.Events = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    measure: o.Measure = False,
    workers: o.Workers = None,
    profile: o.Profile = None,
    device: o.Device = None,
    retry_failed: o.RetryFailed = False,
) -> None:
    """Find the share of the token budget that each domain gets."""
    _run("mix", locals())


_stage("plan", "Decide for every example: kept, weight, copies, and why.")


@app.command()
def write(
    config: o.ConfigOrRun,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="column, copies or domains, in place of shards.weights."),
    ] = None,
    files: o.Files = None,
    overrides: o.Overrides = None,
    out: o.Out = None,
    json: o.Json = False,
    events: o.Events = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    measure: o.Measure = False,
    workers: o.Workers = None,
    profile: o.Profile = None,
    device: o.Device = None,
    retry_failed: o.RetryFailed = False,
) -> None:
    """Write the kept examples as shards for a trainer."""
    _run("write", locals())


@app.command()
def compare(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_RUN",
            help="Settings (YAML), a run folder, or a CSV of arm, seed, metric, value.",
        ),
    ],
    metric: Annotated[
        str | None, typer.Option("--metric", help="What the verdict stands on.")
    ] = None,
    better: Annotated[
        str | None, typer.Option("--better", help="higher or lower, for a metric of your own.")
    ] = None,
    redrawn: Annotated[
        list[str] | None,
        typer.Option("--redrawn", help="Arm of a CSV whose data each seed drew anew. Repeatable."),
    ] = None,
    files: o.Files = None,
    overrides: o.Overrides = None,
    out: o.Out = None,
    json: o.Json = False,
    events: o.Events = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    measure: o.Measure = False,
    workers: o.Workers = None,
    profile: o.Profile = None,
    device: o.Device = None,
    retry_failed: o.RetryFailed = False,
) -> None:
    """Train on the plan, on random and others at equal tokens: does it help?"""
    if config.endswith(".csv"):
        from curate.cli.compare import check_alone, print_file

        check_alone({
            "--config": files, "--set": overrides, "--out": out, "--events": events,
            "--dry-run": dry_run, "--measure": measure, "--workers": workers,
            "--profile": profile, "--device": device, "--retry-failed": retry_failed,
        })  # fmt: skip
        arms = tuple(redrawn or ())
        print_file(Path(config), metric=metric, better=better, redrawn=arms, as_json=json)
        return
    _run("compare", locals())


_stage(
    "evaluate-attribution",
    "Train on random subsets: do attributions foretell it, do scores find wrong labels?",
)


@app.command()
def run(
    config: o.ConfigOrRun,
    reuse: o.Reuse = None,
    files: o.Files = None,
    overrides: o.Overrides = None,
    out: o.Out = None,
    json: o.Json = False,
    events: o.Events = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    measure: o.Measure = False,
    workers: o.Workers = None,
    profile: o.Profile = None,
    device: o.Device = None,
    retry_failed: o.RetryFailed = False,
) -> None:
    """All stages in order; what is done is skipped."""
    _run("run", locals())


@app.command()
def status(
    folder: o.RunPath,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again until the run ends.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option("--every", min=0.1, metavar="SECONDS", help="Between two looks."),
    ] = None,
    json: o.Json = False,
) -> None:
    """What of RUN is done, failed, remaining, set aside, and what runs now."""
    from curate.cli.status import print_status

    print_status(folder, as_json=json, watch=watch, every=every)


@app.command()
def show(
    folder: o.RunPath,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Passages per end.")] = 3,
    score: Annotated[
        str | None, typer.Option("--score", help="Column or expression; the plan's by default.")
    ] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Of one domain only.")] = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Rows that were set aside, and why.")
    ] = False,
    query: Annotated[
        str | None,
        typer.Option(
            "--query",
            metavar="TEXT",
            help="What helps and hurts a text, @FILE or SOURCE:FILE:ROW, by its influence index.",
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """What RUN kept, its best and worst examples, and how to load the shards."""
    if query is not None:
        from curate.cli.asking import print_answer

        print_answer(
            folder, query, examples=examples, domain=domain, as_json=json,
            others={"--score": score, "--quarantine": quarantine},
        )  # fmt: skip
        return
    from curate.cli.tools import print_run

    options: dict[str, Any] = {"examples": examples, "score": score, "domain": domain}
    print_run(folder, options, quarantine=quarantine, as_json=json)


@app.command()
def report(
    folder: o.RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; RUN/report.html by default.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, max=100, help="Examples of each end of a score.")
    ] = 10,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="No text and no picture of the data.")
    ] = False,
    json: o.Json = False,
) -> None:
    """One HTML page of all that RUN did; it opens without a network."""
    from curate.cli.page import print_report

    print_report(folder, out, examples=0 if no_samples else samples, as_json=json)


@app.command()
def verify(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder of shards, or a run.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Files alone: sizes, digests and counts, not rows.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Check files and rows of SHARDS, or all of a run and its shards against the plan."""
    from curate.cli.tools import print_verification

    print_verification(shards, quick=quick, as_json=json)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run, or folder of shards.")],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The one that is compared with it.")],
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Passages of each kind of change.")
    ] = 3,
    json: o.Json = False,
) -> None:
    """What changed from RUN_A to RUN_B: inputs, settings, what is kept, and why."""
    from curate.cli.differing import print_difference

    print_difference(a, b, examples=examples, as_json=json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Of one method only.")] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="CONFIG_OR_RUN", help="Which pass serves its scorers."),
    ] = None,
    json: o.Json = False,
) -> None:
    """What each scorer and mixer measures, needs and costs."""
    from curate.cli.tools import print_methods, print_passes

    if plan is not None:
        print_passes(plan, name=name, as_json=json)
    else:
        print_methods(name, as_json=json)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Also check scores and gradients of this model.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The same for the model of settings.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="What the model is for, where it does not say it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Check on the first rows of this data.")
    ] = None,
    influence: Annotated[
        int | None,
        typer.Option(
            "--influence", metavar="ROWS", help="How near its influence scores are: minutes."
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Is this machine ready: versions, devices, imports, disk; is a model computed right."""
    from curate.cli.tools import print_doctor

    print_doctor(model, config, task=task, data=data, as_json=json, influence=influence)


@app.command()
def schema(json: o.Json = False) -> None:
    """JSON Schema of the settings, for editors; with --json as part of a document."""
    from curate.cli.tools import print_schema

    print_schema(as_json=json)
