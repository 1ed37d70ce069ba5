"""Arguments and options that commands share, and what they come to as settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOrRun = Annotated[
    str, typer.Argument(metavar="CONFIG_OR_RUN", help="Settings (YAML), or a run folder.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or s3://, gs://.")]
Files = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="More settings; a later file wins. Repeatable."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as plan.keep=0.3."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder, or s3://, gs://.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Events = Annotated[
    str | None,
    typer.Option("--events", metavar="PATH", help="Progress as JSON lines; - is stdout."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Details; all settings.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what is due; touch nothing.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="With --dry-run: time a few batches, tell hours and disk.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Dask workers: processes here, or of the kind that is set."
    ),
]
Profile = Annotated[
    Path | None, typer.Option("--profile", metavar="FILE", help="Save Dask's report of it (HTML).")
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Run the tasks that failed, and no others.")
]
Reuse = Annotated[
    list[Path] | None,
    typer.Option("--reuse", metavar="RUN", help="Take matching scores from it. Repeatable."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What every stage command was given."""

    config: str
    files: list[Path] | None
    overrides: list[str] | None
    out: Path | None
    json: bool
    events: str | None
    quiet: bool
    verbose: bool
    dry_run: bool
    measure: bool
    workers: int | None
    device: str | None
    profile: Path | None = None
    reuse: list[Path] | None = None
    retry_failed: bool = False
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """The command's own flags, those that were given."""
