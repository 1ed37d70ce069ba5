"""The fit of `density_ratio`: which examples, which folds, which features."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from curate.data.example import TRAIN
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_examples
from curate.errors import InputError
from curate.models.density import Folds, Line, Ratio, draws, fit_ratio
from curate.models.epochs import random_seed
from curate.models.out_of_fold import Features
from curate.vectors.store import Vectors
from jobs.lexical import pool_texts, target_texts
from jobs.representations import open_vectors
from jobs.run import Receipt
from jobs.settings import Settings, parse_settings
from jobs.target import target_folder
from scorers.density_ratio import DensityRatio

log = logging.getLogger(__name__)

NAME = "density_ratio"

FEW_TARGETS = 30
"""With fewer distinct target examples the classifier is little better than a guess."""

_MAX_NUMBERS = 100_000_000
"""Of a matrix that is fitted on; fewer examples are drawn where vectors are wide."""


class Work(NamedTuple):
    """What every task has at hand."""

    settings: Settings
    run: RunFolder
    options: DensityRatio
    vectors: str | None
    """The representation, or None where texts are read."""
    stamp: str


class Fit(NamedTuple):
    """What judges examples."""

    features: Features
    models: Ratio
    folds: Folds


Values = list[str] | npt.NDArray[np.float32]


def open_work(payload: dict[str, Any]) -> Work:
    settings = parse_settings(payload["settings"])
    options = DensityRatio(**payload["options"])
    run = RunFolder(Path(settings.run))
    return Work(settings, run, options, payload["vectors"], payload["fingerprint"])


def fit_output(run: RunFolder) -> Output:
    return Output(run.root / NAME / "fit.safetensors")


def fit_work(payload: dict[str, Any]) -> Receipt:
    """Draw folds and fit a model for each.

    Raises:
        InputError: target or pool have too few different examples.
    """
    from sklearn.metrics import roc_auc_score

    work = open_work(payload)
    target = _drawn(work, is_target=True)
    seed = random_seed(work.settings.seed, NAME, "folds")
    folds = Folds.of_target(target.contents, num_folds=work.options.folds, seed=seed)
    pool = _drawn(work, is_target=False)
    _check(folds, pool, target, work.options.folds)
    is_target = np.arange(len(pool) + len(target)) >= len(pool)
    contents = np.concatenate([pool.contents, target.contents])
    places = folds.of(contents, np.ones(len(contents), dtype=np.bool_))
    features, matrix = _features(work, pool, target)
    models, found = fit_ratio(
        matrix, is_target, places, num_folds=work.options.folds, penalty=work.options.penalty
    )
    arrays = {
        **features.arrays(),
        "weights": models.weights,
        "biases": models.biases,
        "line": np.array(models.line),
        "contents": folds.contents,
        "folds": folds.folds,
    }
    facts = {
        "rows": len(pool),
        "target_rows": len(target),
        "auc": round(float(roc_auc_score(is_target, found)), 6),
    }
    fit_output(work.run).write(lambda path: save_file(arrays, path), work.stamp, **facts)
    return facts


class Drawn(NamedTuple):
    """Examples that are fitted on."""

    values: Values
    contents: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.contents)


def _drawn(work: Work, *, is_target: bool) -> Drawn:
    """Training examples of the pool or of the target, at most about `fit_rows`, by content."""
    folder = target_folder(work.run) if is_target else work.run
    vectors = vectors_of(work, is_target=is_target)
    parts = folder.partitions()
    tables = [read_examples(folder, part, ["content", "split"]) for part in parts]
    total = sum(int((table["split"] == TRAIN).sum()) for table in tables)
    most = work.options.fit_rows
    if vectors is not None:
        most = max(1, min(most, _MAX_NUMBERS // vectors.dim))
    least = min(int(most / max(1, total) * 2**64), 2**64 - 1)
    seed = random_seed(work.settings.seed, NAME, "rows")
    texts: list[str] = []
    numbers: list[npt.NDArray[np.float32]] = []
    contents: list[npt.NDArray[np.uint64]] = [np.zeros(0, dtype=np.uint64)]
    for index, (part, table) in enumerate(zip(parts, tables, strict=True)):
        own = table["content"].to_numpy()
        chosen = (draws(own, seed) <= np.uint64(least)) & (table["split"] == TRAIN).to_numpy()
        values = values_of(work, part, index, vectors, is_target=is_target)
        chosen &= usable_of(values)
        rows = np.flatnonzero(chosen)
        if isinstance(values, list):
            texts += [values[row] for row in rows]
        else:
            numbers.append(values[rows])
        contents.append(own[rows])
    found = texts if vectors is None else np.concatenate(numbers)
    return Drawn(found, np.concatenate(contents))


def vectors_of(work: Work, *, is_target: bool) -> Vectors | None:
    folder = target_folder(work.run) if is_target else work.run
    return None if work.vectors is None else open_vectors(folder, work.vectors)


def values_of(
    work: Work, part: Partition, index: int, vectors: Vectors | None, *, is_target: bool
) -> Values:
    """What the classifier reads of a partition's examples."""
    if vectors is not None:
        return vectors.part(index)
    read = target_texts if is_target else pool_texts
    return read(work.settings, part, scorer=NAME)


def usable_of(values: Values) -> npt.NDArray[np.bool_]:
    if isinstance(values, list):
        return np.ones(len(values), dtype=np.bool_)
    return np.asarray(np.isfinite(values).all(axis=1))


def _features(work: Work, pool: Drawn, target: Drawn) -> tuple[Features, Any]:
    """Features of unit mean square, and both samples as a matrix."""
    if isinstance(pool.values, list) or isinstance(target.values, list):
        texts = [*pool.values, *target.values]
        return Features.of_texts(texts, num_models=work.options.folds, words=work.options.words)
    if pool.values.shape[1] != target.values.shape[1]:
        raise InputError(
            f"density_ratio: vectors of the pool have {pool.values.shape[1]} numbers, those of the"
            f" target {target.values.shape[1]}",
            fix="give the target the same columns",
        )
    both = np.concatenate([pool.values, target.values])
    features, _ = Features.of_numbers(both)
    # One number each, whatever their count: one penalty then fits all widths.
    narrow = (features.scale / np.sqrt(max(1, len(features.scale)))).astype(np.float32)
    features = Features(None, features.shift, narrow)
    return features, features.apply(both)


def _check(folds: Folds, pool: Drawn, target: Drawn, num_folds: int) -> None:
    different = len(folds.contents)
    if different < num_folds:
        raise InputError(
            f"density_ratio: the target has {different} different examples that can be read, fewer"
            f" than folds ({num_folds})",
            fix="give more target examples, or use rds, dsir or bm25",
        )
    places = folds.of(pool.contents, np.ones(len(pool), dtype=np.bool_))
    if len(np.unique(places)) < 2:
        raise InputError(
            f"density_ratio: the pool has {len(np.unique(pool.contents))} different training"
            " examples that can be read, too few for folds",
            fix="give a larger pool, or use rds, dsir or bm25",
        )
    if different < FEW_TARGETS:
        log.warning("density_ratio: the target has %d different examples; with fewer than %d its"
                    " weights are little better than a guess", different, FEW_TARGETS)  # fmt: skip


def load_fit(work: Work) -> Fit:
    output = fit_output(work.run)
    digest = (output.mark() or {}).get("digest", "")
    seed = random_seed(work.settings.seed, NAME, "folds")
    return _load(output.path, digest=digest, seed=seed, words=work.options.words)


@lru_cache(maxsize=1)
def _load(path: Path, *, digest: str, seed: int, words: Any) -> Fit:
    """The fit, once per process; `digest` tells one from the next."""
    found = load_file(path)
    slope, offset = found["line"].tolist()
    return Fit(
        Features.from_arrays(found, words),
        Ratio(found["weights"], found["biases"], Line(slope, offset)),
        Folds(found["contents"], found["folds"], len(found["biases"]), seed),
    )
