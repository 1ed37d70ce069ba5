"""Whether a run can be asked: its index is there and whole, its models are those of the index.

What is wrong is said with a way out that works: `curate score` makes an index again only where the
lists that stand on it are missing too.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from curate.data.example import TRAIN
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.tables import read_examples
from curate.errors import ConfigError, InputError
from curate.models.checkpoints import weights_digest
from curate.models.index_rows import Header, check_alike
from jobs.influence import NAME
from jobs.influence_build import vectors_output
from jobs.influence_curvature import curvature_output
from jobs.influence_queries import features_name
from jobs.influence_rows import whitened_output
from jobs.influence_work import top_output
from jobs.measurers import Measurer
from jobs.settings import Settings
from scorers.catalog import build_scorer
from scorers.influence import Influence

_SHOWN_DOMAINS = 20


def options_of(settings: Settings) -> Influence:
    """Of the run's scorer.

    Raises:
        InputError: it keeps no index to ask.
    """
    named = settings.score.named
    if NAME not in named:
        raise InputError(
            f"the run {settings.run} has no influence index to ask",
            fix="add influence to score.scorers with a target, and run `curate score` again",
        )
    options = cast(Influence, build_scorer(NAME, named[NAME]))
    if not options.uses_index:
        raise InputError(
            "influence was measured with the metric ekfac, which keeps no index to ask",
            fix="set influence.metric to influence, and run `curate score` again",
        )
    return options


def check_index(run: RunFolder, options: Influence, chosen: Sequence[Measurer]) -> None:
    """Refuse to ask what was never made, or has been removed, before a model is loaded.

    Raises:
        InputError: says what is missing, or of which damping the curvature is.
    """
    for measurer in chosen:
        parts, features = run.partitions(), features_name(options)
        outputs = [vectors_output(run, part, measurer.slug) for part in parts]
        if options.has_curvature:
            outputs.append(curvature_output(run, measurer.slug, features))
        if options.whiten:
            outputs += [whitened_output(run, part, measurer.slug) for part in parts]
        missing = next((output for output in outputs if output.mark() is None), None)
        if not outputs or missing is not None:
            where = f": {missing.path} is missing" if missing is not None else ""
            raise InputError(
                f"the run has no whole influence index of {measurer.name}{where}",
                fix=_fix(run, options),
            )
        if options.has_curvature:
            mark = curvature_output(run, measurer.slug, features).mark() or {}
            made = {"structure": mark.get("structure"), "share": mark.get("share")}
            asked = {"structure": options.curvature, "share": options.damping}
            if made != asked:
                raise InputError(
                    f"the curvature of {measurer.name} was made with {made}, the settings say"
                    f" {asked}",
                    fix=f"run `curate score {run.root}`",
                )


def check_weights(settings: Settings, chosen: Sequence[Measurer]) -> None:
    """Refuse checkpoints of the run whose weights are no longer those that were saved.

    Scoring trusts the digest beside the weights; that of the user's own models is taken anew.

    Raises:
        InputError: names the files.
    """
    if settings.checkpoints.train is None:
        return
    for measurer in chosen:
        folder = measurer.folder
        saved = (read_json(folder / "checkpoint.json") or {}).get("digest")
        if weights_digest(folder) != saved:
            files = sorted(str(path) for path in folder.glob("*.safetensors"))
            raise InputError(
                f"the weights of {measurer.name} are not those that were saved:"
                f" {', '.join(files) or folder} has changed",
                fix=f"restore it, or remove {folder.parent} and run `curate train {settings.run}`"
                f" and `curate score {settings.run}`",
            )


def check_domain(run: RunFolder, domain: str) -> None:
    """Refuse a domain that no training example has.

    Raises:
        ConfigError: lists those that there are.
    """
    known: set[str] = set()
    for part in run.partitions():
        keys = read_examples(run, part, ["split", "domain"])
        known |= set(keys.filter(split=TRAIN)["domain"].unique().to_list())
    if domain not in known:
        names = sorted(known)
        more = ", ..." if len(names) > _SHOWN_DOMAINS else ""
        raise ConfigError(
            f"there is no domain {domain!r}",
            fix=f"use one of {', '.join(names[:_SHOWN_DOMAINS])}{more}",
        )


def check_query(run: RunFolder, index: Header, query: Header, where: Path) -> None:
    """Refuse a query that means something else than the rows of the index.

    Raises:
        ConfigError: says in what they differ.
    """
    try:
        check_alike(index, query, names=(f"the run in {where}", "the query"), is_query=True)
    except ConfigError as error:
        raise ConfigError(
            error.what,
            fix=f"restore what has changed, or run `curate score {run.root}` for a new index",
        ) from error


@contextmanager
def naming(run: RunFolder, options: Influence, output: Output) -> Generator[None]:
    """While a file of the index is read: one that is damaged is to be removed with the lists.

    Raises:
        InputError: as the block, with a fix that works.
    """
    try:
        yield
    except InputError as error:
        raise InputError(error.what, fix=_fix(run, options, output)) from error


def _fix(run: RunFolder, options: Influence, damaged: Output | None = None) -> str:
    lists = top_output(run, options).path
    paths = [str(path) for path in (damaged and damaged.path, lists) if path and path.exists()]
    first = f"remove {' and '.join(paths)}, then " if paths else ""
    return f"{first}run `curate score {run.root}`, which makes what is missing again"
