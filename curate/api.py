"""curate in Python: `curate.open(run)` for the tables of a run, `curate.score(data, ...)` for
scores of a data set in memory, `curate.diff(a, b)` for what changed between two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import polars as pl

from curate.config import parse, read_yaml_file, resolve
from curate.data.counts import EXAMPLES, are_tokens
from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest
from curate.data.mirror import address_in, copy_of
from curate.data.partitions import Output
from curate.data.tables import SCHEMAS, scan, scan_examples
from curate.errors import ConfigError, CurateError, InputError
from curate.models.settings import TASKS, Model, Score
from curate.plan.mixture import Mixture, load_mixture

if TYPE_CHECKING:
    import datasets

    from curate.vectors.store import Vectors
    from jobs.diff import Difference
    from jobs.influence_ask import Answer
    from jobs.influence_index import GradientIndex

__all__ = ["Run", "diff", "open", "score"]

Data = TypeVar("Data", pl.DataFrame, "datasets.Dataset")

_KEY = ["source", "file", "row"]


@dataclass(frozen=True, slots=True)
class Run:
    """The tables of a run folder, read lazily; nothing is loaded before `collect()`.

    All tables that have one row per example have the same rows in the same order.
    """

    root: Path

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings, as plain values."""
        path = self._folder.config
        return read_yaml_file(path)

    @property
    def manifest(self) -> dict[str, Any]:
        """What made what: per stage versions, times, digests."""
        return load_manifest(self._folder)

    @property
    def examples(self) -> pl.LazyFrame:
        """source, file, row, id, domain, label, num_chars, content, split."""
        return scan_examples(self._folder)

    @property
    def quarantine(self) -> pl.LazyFrame:
        """Rows and files that were set aside: source, file, row, reason, detail."""
        paths = sorted(self._folder.quarantine.glob("part-*.parquet"))
        if not paths:
            return pl.LazyFrame(schema=SCHEMAS["quarantine"])
        return pl.scan_parquet(paths, glob=False).sort("source", "file", "row")

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers that have a table."""
        return self._names("scores")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the checkpoints that have measured."""
        return self._names("quantities")

    @property
    def scores(self) -> pl.LazyFrame:
        """The key and every score column side by side.

        A column that several scorers have (`num_scored`) stands once for each, as
        `<scorer>.<column>`.

        Raises:
            InputError: nothing was scored, or a scorer's tables are not complete.
            CurateError: a scorer's tables are of an older index.
        """
        names = self.scorers
        if not names:
            raise InputError(f"{self.root} has no scores", fix=f"run `curate score {self.root}`")
        tables = {name: self._table(f"scores/{name}") for name in names}
        columns = {name: table.collect_schema().names()[3:] for name, table in tables.items()}
        every = [column for own in columns.values() for column in own]
        frames = [self.examples.select(_KEY)]
        for name, table in tables.items():
            frames.append(
                table.select(
                    pl.col(column).alias(f"{name}.{column}" if every.count(column) > 1 else column)
                    for column in columns[name]
                )
            )
        return pl.concat(frames, how="horizontal")

    @property
    def plan(self) -> pl.LazyFrame:
        """source, file, row, keep, weight, copies, reason."""
        return self._table("plan")

    @property
    def plan_summary(self) -> dict[str, Any]:
        """`plan/summary.json`.

        Raises:
            InputError: there is no plan yet.
        """
        summary = read_json(self._folder.plan / "summary.json")
        if summary is None:
            raise InputError(f"{self.root} has no plan", fix=f"run `curate plan {self.root}`")
        return summary

    @property
    def lengths(self) -> pl.LazyFrame:
        """source, file, row, num_tokens, for the tokenizer that was counted last.

        Raises:
            InputError: no tokens were counted yet.
        """
        facts = self.manifest["stages"].get("lengths", {}).get("summary")
        if facts is None:
            raise InputError(f"{self.root} has no lengths", fix=f"run `curate plan {self.root}`")
        if are_tokens(digest := str(facts["digest"])):
            return self._table(f"lengths/{digest}")
        one = pl.lit(1, pl.Int64)
        counts = one if digest == EXAMPLES else pl.max_horizontal("num_chars", one)
        return self.examples.select(*_KEY, num_tokens=counts)

    @property
    def mixture(self) -> Mixture:
        """The mixture that `mix` asks for.

        Raises:
            InputError: the settings ask for none, or it was not made yet.
        """
        mixer = (self.config.get("mix") or {}).get("mixer")
        if mixer is None:
            raise InputError(f"the settings of {self.root} ask for no mixture", fix="set mix.mixer")
        return load_mixture(self._folder.mixtures / mixer / "mixture.json")

    def quantities(self, checkpoint: str) -> pl.LazyFrame:
        """What one checkpoint measured: the key and one column per quantity.

        Args:
            checkpoint: `seed-0/step-000200` or one of `checkpoints`.
        """
        return self._table(f"quantities/{checkpoint.replace('/', '-')}")

    @property
    def representations(self) -> tuple[str, ...]:
        """Names of the representations whose vectors are there."""
        return self._names("vectors")

    def vectors(self, representation: str) -> Vectors:
        """The vectors of all examples, in the order of `examples`, mapped and not read.

        Args:
            representation: one of `representations`.

        Raises:
            InputError: they are missing, incomplete or damaged.
        """
        from jobs.representations import open_vectors

        return open_vectors(self._folder, representation)

    @property
    def gradient_checkpoints(self) -> tuple[str, ...]:
        """Checkpoints whose gradients of the examples are kept."""
        from jobs.influence_index import indexed_checkpoints

        return indexed_checkpoints(self._folder)

    def gradients(self, checkpoint: str, *, whitened: bool = False) -> GradientIndex:
        """Projected gradients of all examples, in the order of `examples`, mapped and not read.

        Args:
            checkpoint: one of `gradient_checkpoints`.
            whitened: as kept by `influence: {whiten: true}`, so that products are influences.

        Raises:
            InputError: they are missing or damaged.
        """
        from jobs.influence_index import gradient_index

        return gradient_index(self._folder, checkpoint, whitened=whitened)

    def ask(
        self,
        query: str | Mapping[str, Any],
        *,
        examples: int = 3,
        domain: str | None = None,
    ) -> Answer:
        """The training examples that help and hurt a query most: `curate show --query`.

        Args:
            query: a text, `@FILE`, `SOURCE:FILE:ROW`, or an example's fields, as a dict or JSON.
            examples: how many of each.
            domain: of this one only.

        Raises:
            InputError: the run keeps no influence index, or the query cannot be scored.
            ConfigError: model, tokenizer or settings are not those of the index; there is no such
                domain; the query is no text and no example.
        """
        from jobs.influence_ask import ask

        return ask(self.root, query, examples=examples, domain=domain)

    def report(self, out: str | Path | None = None, *, examples: int = 10) -> Path:
        """Write one HTML page of all that the run did, and say where it is: `curate report`.

        Args:
            out: the file; `report.html` in the run folder by default.
            examples: how many of each end of a score are shown; 0 shows no content of the data.

        Raises:
            MissingDependencyError: a package that draws the page is not installed.
            CurateError: a table of the run is damaged, or the file cannot be written.
        """
        from jobs.report import report

        return report(self.root, None if out is None else Path(out), examples=examples)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.root)

    def _names(self, folder: str) -> tuple[str, ...]:
        found = list((self.root / folder).glob("*/"))
        return tuple(sorted(path.name for path in found if list(path.glob("part-*.parquet"))))

    def _table(self, folder: str) -> pl.LazyFrame:
        """A table of the same examples as the index; they meet by position."""
        table = scan(self._folder, folder)
        for part in self._folder.partitions():
            mine = Output(self.root / folder / f"{part.name}.parquet").mark()
            index = self._folder.examples(part).mark()
            if mine and index and mine.get("rows", index["rows"]) != index["rows"]:
                raise CurateError(
                    f"{folder} of {part.source}/{part.file} has {mine['rows']} rows, the index"
                    f" {index['rows']}: the index is newer",
                    fix=f"run `curate run {self.root / 'config.yaml'}`",
                )
        return table


def open(path: str | Path) -> Run:  # noqa: A001 - read as curate.open
    """The tables of a run folder.

    Args:
        path: the folder that `--out` or `run:` named.

    Raises:
        InputError: there is no run.
    """
    root = Path(path).expanduser().absolute()
    if address_in(path) is not None or copy_of(root) is not None:
        from jobs.store import at_hand

        root = at_hand(path).absolute()
    if not (root / "examples" / "partitions.json").is_file():
        raise InputError(f"there is no run at {root}", fix="name a folder made by `curate`")
    return Run(root)


def diff(a: str | Path, b: str | Path, *, examples: int = 3) -> Difference:
    """What changed between two runs, or two folders of shards: `curate diff`.

    Args:
        a: a run, or a folder of shards.
        b: the one that is compared with it.
        examples: how many of each kind of change are shown.

    Raises:
        InputError: one of them has neither a plan nor shards.
        CurateError: tables of a run are damaged or do not belong together.
    """
    from jobs.diff import difference

    places = (Path(place).expanduser() for place in (a, b))
    return difference(*places, examples=examples)


def score(
    dataset: Data,
    *,
    scorers: Sequence[str | Mapping[str, Mapping[str, Any]]],
    model: str | Path | Model | None = None,
    task: str | Mapping[str, Any] | None = None,
    text: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    messages: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    features: str | Sequence[str] | None = None,
    image: str | None = None,
    shape: Sequence[int] | None = None,
    label: str | None = None,
    classes: Sequence[str] = (),
    checkpoints: Sequence[str | Path] = (),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_tokens: int | Literal["auto"] = "auto",
    seed: int = 0,
    threads: int = 1,
) -> Data:
    """Scores of a data set in memory: one row for each of its rows, in its order.

    Args:
        dataset: a polars frame, or a `datasets.Dataset`; the answer is of the same kind.
        scorers: names, or a name with its options: `["el2n", {"loss": {}}]`.
        model: folder saved by transformers or hub id, or all its settings; not needed by `length`
            and `random`.
        task: kind of the task, or the kind and its options:
            `{"kind": "text-classification", "num_classes": 4}`.
        text: column of plain text.
        prompt: column of the prompt, which is read and not counted.
        response: column of the response to `prompt`.
        messages: column of chat messages.
        chosen: column of the preferred of two answers, for the task `preference`.
        rejected: column of the other one.
        features: column of number lists, or the number columns of a table.
        image: column of images: files, paths in full, or pixels.
        shape: of one image, where its numbers stand in one list.
        label: column of the class.
        classes: class names in label order, where the label column holds names.
        checkpoints: folders to average over, in place of `model`; each counts as an independent
            run, unless a `checkpoint.json` of curate says which run it comes from.
        device: auto, cpu, cuda ...
        dtype: of the weights; losses and sums are float32 or better.
        batch_tokens: tokens in a batch, padding included.
        seed: of `random`.
        threads: of the arithmetic on a CPU; sums depend on it in their last digits.

    Returns:
        The score columns; null where a row cannot be scored. `num_scored` says how many tokens a
        model's score stands on, and with several checkpoints `<column>_std` how they differ.

    Raises:
        ConfigError: a setting does not fit, such as an unknown scorer.
        InputError: a column or the model is missing.
    """
    from curate.data.example import Source
    from jobs.score_frame import Measure, score_table

    table, is_frame = _arrow(dataset)
    source = Source(
        path="memory",
        text=text,
        prompt=prompt,
        response=response,
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        features=features if features is None or isinstance(features, str) else tuple(features),
        image=image,
        shape=None if shape is None else tuple(shape),
        label=label,
        classes=tuple(classes),
    )
    how = Measure(
        model=_model(model, checkpoints, device=device, dtype=dtype),
        task=_task(task),
        checkpoints=tuple(Path(folder) for folder in checkpoints),
        score=parse(
            Score,
            {"scorers": list(scorers), "batch_tokens": batch_tokens},
            where="score",
        ),
        seed=seed,
        threads=threads,
    )
    scores = score_table(table, source, how)
    if is_frame:
        return cast(Data, scores)
    import datasets

    return cast(Data, datasets.Dataset.from_polars(scores))


def _arrow(dataset: Any) -> tuple[Any, bool]:
    if isinstance(dataset, pl.DataFrame):
        return dataset.to_arrow(), True
    if type(dataset).__name__ == "Dataset" and hasattr(dataset, "with_format"):
        return dataset.with_format("arrow")[:], False
    raise ConfigError(
        f"score cannot read a {type(dataset).__name__}",
        fix="pass a polars DataFrame or a datasets.Dataset, such as one split of a DatasetDict",
    )


def _model(
    model: str | Path | Model | None, checkpoints: Sequence[str | Path], **settings: Any
) -> Model:
    if isinstance(model, Model):
        return model
    if model is None and checkpoints:
        model = checkpoints[0]
    return parse(Model, {"name": None if model is None else str(model), **settings}, where="model")


def _task(task: str | Mapping[str, Any] | None) -> Any:
    if task is None:
        return None
    values = {"kind": task} if isinstance(task, str) else dict(task)
    kind = resolve(TASKS, str(values.get("kind")), what="task")
    return parse(kind, values, where="task")
