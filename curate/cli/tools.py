"""The commands that look and tell: show, verify, methods, doctor, schema."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from curate.cli.colour import Paint, show
from curate.cli.imports import foreign_packages, rivals
from curate.cli.reporter import print_json, start_logging
from curate.cli.text import table
from curate.data.mirror import address_in
from curate.data.shard_folder import DamageError
from curate.errors import ConfigError, CurateError, counted, on_one_line

if TYPE_CHECKING:
    from jobs.influence_doctor import Nearness
    from jobs.methods import Method

_MISSING_DEPENDENCY = 6
_MODEL_IS_WRONG = 1


def print_starter(data: Sequence[str], out: Path, *, target: str | None, as_json: bool) -> None:
    """`curate init`."""
    from jobs.starter import write_starter

    told = write_starter(list(data), out, wanted=target)
    if as_json:
        print_json("init", {"file": str(out), "says": list(told)})
    else:
        print("\n".join(map(on_one_line, told)))


def print_run(folder: Path, options: Mapping[str, Any], *, quarantine: bool, as_json: bool) -> None:
    """`curate show`.

    Raises:
        ConfigError: an option says nothing of what is asked for.
    """
    from curate.cli.showing import quarantine_lines, shown_lines
    from jobs.show import quarantined, shown

    if quarantine:
        for option in ("score", "domain"):
            if options[option] is not None:
                raise ConfigError(
                    f"--{option} does not go with --quarantine: what was set aside has none",
                    fix="leave one of the two out",
                )
        found = quarantined(folder, limit=options["examples"])
        if as_json:
            print_json("show", asdict(found))
        else:
            show(lambda paint, width: quarantine_lines(found, paint=paint, width=width))
        return
    view = shown(folder, **options)
    if as_json:
        print_json("show", asdict(view))
    else:
        show(lambda paint, width: shown_lines(view, paint=paint, width=width))


def print_verification(shards: Path, *, quick: bool, as_json: bool) -> None:
    """`curate verify`."""
    from jobs.verify import verify_shards

    try:
        result = verify_shards(shards, quick=quick)
    except CurateError as error:
        if as_json:
            problems = error.problems if isinstance(error, DamageError) else []
            place = address_in(shards) or str(shards)
            said = {"what": error.what, "fix": error.fix, "exit_code": error.exit_code}
            result = {"folder": place, "whole": False, "what": error.what}
            print_json("verify", {**result, "problems": problems, "error": said})
            error.is_told = True
        raise
    if as_json:
        print_json("verify", {**result, "whole": True, "problems": []})
    else:
        facts = ", ".join(
            counted(value, key.removesuffix("s"), key)
            for key, value in result.items()
            if isinstance(value, int)
        )
        looked = _not_looked(result, quick=quick)
        where = on_one_line(address_in(shards) or str(shards))
        lines = [f"{facts}{looked}"]
        if unfinished := result.get("unfinished"):
            again = f"`curate run {where}` goes on"
            lines.append(f"not finished yet, or failed: {', '.join(unfinished)} ({again})")

        def told(paint: Paint, _: int | None) -> Iterator[str]:
            yield f"{where} is {paint('whole', 'green')}: {lines[0]}"
            yield from (f"{paint('note', 'yellow')}: {line}" for line in lines[1:])

        show(told)


def _not_looked(result: Mapping[str, Any], *, quick: bool) -> str:
    """What verification says of rows that it has not looked at."""
    if result.get("rows_checked", "none to check") is not None:
        return ""
    why = "as --quick asks" if quick else "which needs parquet or arrow among the formats"
    return f" (digests and counts of files only; its rows were not looked into, {why})"


def print_methods(name: str | None, *, as_json: bool) -> None:
    """`curate methods`."""
    from jobs.methods import all_methods, find_method

    found = [find_method(name)] if name else all_methods()
    if as_json:
        print_json("methods", {"methods": [asdict(method) for method in found]})
    elif name:
        show(lambda paint, _: _method_lines(found[0], paint))
    else:
        show(lambda paint, _: _methods_lines(found, paint))


def print_passes(config: str, *, name: str | None, as_json: bool) -> None:
    """`curate methods --plan`: one line for each pass, and what it serves.

    Raises:
        ConfigError: a method was named beside it.
    """
    if name is not None:
        raise ConfigError(
            f"--plan tells of all scorers of the settings, and {name} is named beside it",
            fix="leave one of the two out",
        )
    from curate.cli.given import read_settings
    from curate.cli.options import Common
    from jobs.serving import passes_of

    start_logging(quiet=True, verbose=False)
    given: dict[str, Any] = dict.fromkeys(field.name for field in fields(Common))
    given |= {"config": config, "json": as_json, "more": {}}
    settings, _ = read_settings("methods", Common(**given))
    found = passes_of(settings)
    if as_json:
        print_json("methods", {"passes": [asdict(serving) for serving in found]})
        return
    rows = [["pass", "scorers", "of", "measures"]]
    rows += [[s.kind, ", ".join(s.scorers), _few(s.models), ", ".join(s.measures)] for s in found]
    show(lambda paint, width: table(rows, paint=paint, width=width))


def _few(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def print_doctor(
    model: str | None,
    config: Path | None,
    *,
    task: str | None,
    data: str | None,
    as_json: bool,
    influence: int | None = None,
) -> None:
    """`curate doctor`; ends with 6 where the machine is not ready, 1 where the model is not."""
    asks = task is not None or data is not None or influence is not None
    if asks and model is None and config is None:
        raise ConfigError("there is no model to check", fix="add --model DIR or --config FILE")
    if task is not None and config is not None:
        raise ConfigError("the settings say which task it is", fix="leave --task out")
    start_logging(quiet=influence is None, verbose=False)
    found = list(_doctor(model, config, task, data))
    near = None
    if influence is not None:
        from jobs.influence_doctor import influence_nearness

        near = influence_nearness(model, config, kind=task, data=data, rows=influence)
        found.append(asdict(near.check()))
    failed = [check["name"] for check in found if check["state"] == "bad"]
    of_model = [name for name in failed if name == "model" or name.startswith("model:")]
    bad = len(failed)
    if as_json:
        more = {} if near is None else {"influence": asdict(near)}
        print_json("doctor", {"checks": found, "bad": bad, **more})
    else:
        show(lambda paint, _: _check_lines(found, paint))
        if near is not None:
            show(lambda paint, width: _nearness_lines(near, paint=paint, width=width))
    if bad:
        raise typer.Exit(_MODEL_IS_WRONG if len(of_model) == bad else _MISSING_DEPENDENCY)


def print_schema(*, as_json: bool) -> None:
    """`curate schema`: the bare schema, as editors read it, or as `--json` of any command."""
    from jobs.schema import settings_schema

    schema = settings_schema()
    if as_json:
        print_json("schema", {"schema": schema})
    else:
        print(json.dumps(schema, indent=1, ensure_ascii=False))


def _check_lines(found: Sequence[Mapping[str, Any]], paint: Paint) -> Iterator[str]:
    styles = {"ok": "green", "bad": "bold red"}
    for check in found:
        state = paint(f"{check['state']:<5}", styles.get(check["state"], "yellow"))
        yield f"{state} {check['name']:<18} {on_one_line(check['text'])}"
        if check["state"] != "ok" and check["fix"]:
            yield f"{'':<24} fix: {on_one_line(check['fix'])}"


def _doctor(
    model: str | None, config: Path | None, task: str | None, data: str | None
) -> Iterator[dict[str, Any]]:
    foreign = foreign_packages()
    for name, place in foreign.items():
        fix = "remove what installs it, or run curate in an environment of its own"
        text = f"`import {name}` finds {place}, which is not part of curate"
        yield {"name": f"package {name}", "state": "bad", "text": text, "fix": fix}
    for name, others in rivals().items():
        text = f"{', '.join(others)} also brings a package called {name}: one hides the other"
        fix = "run curate in an environment of its own"
        yield {"name": f"package {name}", "state": "bad", "text": text, "fix": fix}
    if foreign:  # what follows lies in one of these packages
        return
    yield {"name": "packages", "state": "ok", "text": "jobs, scorers, mixers are curate's",
           "fix": ""}  # fmt: skip
    from jobs.doctor import checks

    yield from map(asdict, checks())
    if model is not None or config is not None:
        from jobs.model_check import check_model

        yield from map(asdict, check_model(model, config, kind=task, data=data))


def _nearness_lines(near: "Nearness", *, paint: Paint, width: int | None) -> Iterator[str]:
    yield ""
    yield (
        f"influence of {counted(near.rows, 'row')} on"
        f" {counted(near.queries, 'query', 'queries')}, beside the damped exact answer"
        f" ({near.seconds:.0f} s):"
    )
    rows = [["way", "rank correlation", "correlation", "relative error", ""]]
    rows += [
        [name, *(f"{way[key]:.3f}" for key in ("spearman", "pearson", "relative_error")),
         f"metric {near.metric}" if name == near.way else ""]
        for name, way in near.ways.items()
    ]  # fmt: skip
    yield from table(rows, right=frozenset({1, 2, 3}), width=width, paint=paint)


def _methods_lines(found: "list[Method]", paint: Paint) -> Iterator[str]:
    for kind in ("task", "scorer", "mixer"):
        group = [method for method in found if method.kind == kind]
        yield paint(f"{kind}s", "bold")
        width = max(len(method.name) for method in group)
        for method in group:
            yield f"  {paint(f'{method.name:<{width}}', 'cyan')}  {method.measures}"
            more = [f"needs {', '.join(method.needs)}"] if method.needs else []
            more += [f"cost: {re.split('[;.] ', method.cost)[0]}"] if method.cost else []
            if more:
                yield f"  {'':<{width}}  {'; '.join(more)}"
        yield ""
    yield "`curate methods NAME` tells columns, options, cost and source of one of them."


def _method_lines(method: "Method", paint: Paint) -> Iterator[str]:
    yield f"{paint(method.name, 'bold')}, a {method.kind}: {method.measures}"
    rows = [[name, text] for name, text in method.columns.items()]
    if rows:
        yield "columns"
        yield from (f"  {line}" for line in table(rows))
    if method.needs:
        yield f"needs    {', '.join(method.needs)}"
    if method.options:
        yield f"options  {', '.join(f'{k} = {v}' for k, v in method.options.items())}"
    if method.cost:
        yield f"cost     {method.cost}"
    if method.source:
        yield f"source   {method.source}"
    yield f"code     {method.address}"
