"""The stage commands: settings, run folder, pool, stages, result."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from curate.cli.colour import show
from curate.cli.given import read_settings
from curate.cli.options import Common
from curate.cli.reporter import Reporter, print_json, reporting, start_logging
from curate.config import Raw, plain
from curate.data.mirror import shown_place
from curate.errors import ConfigError
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import ask_workers_devices, check_cluster
from jobs.settings import Settings

_CHECKED = ("score", "task", "model", "checkpoints", "target", "evaluation")
"""Sections of the settings that the scorers' own checks read."""


def run_command(command: str, common: Common) -> None:
    """Run one stage, or all, with what must come before it; or only say what is due."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _run_command(command, common)
        return
    from jobs.proxy_ranks import under_torchrun

    with under_torchrun() as is_first:
        if is_first:
            _run_command(command, common)


def _run_command(command: str, common: Common) -> None:
    if common.measure and not common.dry_run:
        raise ConfigError("--measure belongs to --dry-run", fix="add --dry-run")
    start_logging(quiet=common.quiet, verbose=common.verbose)
    settings, raw = read_settings(command, common)
    ask_workers_devices(settings.cluster)
    names = {stage.name for stage in stages_for(settings, command)}
    if "score" in names and not _has_checked(settings):
        from jobs.score_check import check_scores

        check_scores(settings)
    from jobs.representations import check_representations

    check_representations(settings)
    if "plan" in names:
        from jobs.plan_check import check_plan

        check_plan(settings)
    if "mix" in names:
        from jobs.mix_check import check_mix

        check_mix(settings)
    if command == "compare":
        from jobs.compare_check import check_compare

        check_compare(settings)
    if command == "evaluate-attribution":
        from jobs.evaluate_attribution import check_evaluate_attribution

        check_evaluate_attribution(settings)
    if common.dry_run:
        _tell(command, common, settings, raw)
        return
    check_cluster(settings.cluster, profile=common.profile)
    with reporting(events=common.events, quiet=common.quiet) as reporter:
        done = _work(command, common, settings, reporter)
    result: dict[str, Any] = {"planned": False, **done}
    if common.events == "-":
        reporter.event("result", command=command, **result)
    elif common.json:
        print_json(command, result)
    elif command == "compare" and command in result["stages"]:
        from curate.cli.compare import comparison_lines

        told = (result["stages"]["compare"], result["run"])
        show(lambda paint, width: comparison_lines(*told, paint=paint, width=width))
    elif command == "evaluate-attribution" and command in result["stages"]:
        from curate.cli.attribution import evaluation_lines

        told = (result["stages"][command], result["run"])
        show(lambda paint, width: evaluation_lines(*told, paint=paint, width=width))
    else:
        from curate.cli.summaries import summary_lines

        show(lambda paint, _: summary_lines(result, paint=paint))


def _has_checked(settings: Settings) -> bool:
    """Whether the run folder was opened with these scorers before; checking them loads torch."""
    from jobs.opening import saved_values
    from jobs.resolving import resolved

    saved = saved_values(Path(settings.run).expanduser())
    if saved is None:
        return False
    now = plain(resolved(settings, old=saved))
    return all(saved.get(name) == now[name] for name in _CHECKED)


def _work(command: str, common: Common, settings: Settings, reporter: Reporter) -> dict[str, Any]:
    from jobs.cluster import open_pool
    from jobs.opening import open_run

    with open_run(settings, command=command) as full:
        stages = stages_for(full, command)
        names = [stage.name for stage in stages]
        reporter.event("start", command=command, run=shown_place(full.run), stages=names)
        with open_pool(full.cluster, profile=common.profile) as pool:
            summaries = run_stages(
                full,
                stages,
                pool=pool,
                listener=reporter,
                reuse=tuple(common.reuse or ()),
                retry_failed=common.retry_failed,
            )
    return {"run": shown_place(full.run), "stages": summaries}


def _tell(command: str, common: Common, settings: Settings, raw: Raw) -> None:
    """`--dry-run`: nothing is written, not even the run folder."""
    from curate.cli.text import dry_run_lines
    from jobs.dry_run import describe

    result = describe(command, settings, raw.origins, measure=common.measure)
    script: dict[str, str] = {}
    if settings.cluster.kind == "slurm":
        from jobs.cluster_slurm import job_script

        script = {"job_script": job_script(settings.cluster)}
    if common.json:
        print_json(command, {"planned": True, **dataclasses.asdict(result), **script})
    else:
        details = common.verbose
        show(lambda paint, width: dry_run_lines(result, details=details, paint=paint, width=width))
        if script:
            print(f"\nscript of a Slurm job\n\n{script['job_script']}")
