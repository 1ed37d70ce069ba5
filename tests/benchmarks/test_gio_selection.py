"""Whose rows does GIO take? The target's own, in the target's proportions, beside other methods.

    pytest tests/benchmarks/test_gio_selection.py -s -o addopts=--import-mode=importlib

A pool of several groups, a target of few examples of some of them, none of which is in the pool.
Printed is the share of chosen rows that are of the target's groups, for as many rows as `gio`
chooses by itself, and the total variation of their groups from the target's. Vectors are those of
a sentence encoder where `CURATE_VECTORS` names a folder with `<set>/train.npy`, `train.parquet`
and the same of `test`, rows of one length and order; hashed words otherwise; pixels of images.
`CURATE_DATA` says where the sets are.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from curate.models.text_ngrams import buckets_of, ngram_blocks
from curate.vectors.clusters import assign, kmeans
from curate.vectors.ngrams import hashed_ngrams
from curate.vectors.projection import fit_pca
from curate.vectors.ranking import Best, cosine_blocks, unit_rows
from curate.vectors.search import nearest
from curate.vectors.store import Vectors
from scorers.dsir import compare, gumbel, log_weights
from scorers.gio_explode import ordered, owners, whole_steps
from scorers.gio_gradient import Descent, descend
from scorers.gio_search import Selection, Stop, select
from scorers.rds import take_turns

SEEDS = (0, 1, 2)
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Case(NamedTuple):
    """A pool and a target."""

    pool: Floats
    target: Floats
    groups: npt.NDArray[np.str_]
    """Of the pool's rows."""
    aimed: npt.NDArray[np.str_]
    """Of the target's rows."""
    texts: list[str] | None
    target_texts: list[str] | None


class Space(NamedTuple):
    """Target and pool as they are compared, the pool quantised."""

    target: Floats
    pool: Floats
    centroids: Floats
    labels: npt.NDArray[np.int32]


_spaces: dict[int | None, Space] = {}


def space_of(case: Case, seed: int, dims: int | None) -> Space:
    """Made once for all methods that use it."""
    if dims not in _spaces:
        target, pool = case.target, case.pool
        if dims is not None:
            fitted = fit_pca(Vectors([target, pool]), dims, seed=seed)
            target, pool = fitted.apply(target), fitted.apply(pool)
        vectors = Vectors([pool])
        centroids = kmeans(vectors, min(1500, len(pool) // 10), seed=seed, iterations=10)
        _spaces[dims] = Space(target, pool, centroids, assign(vectors, centroids).labels)
    return _spaces[dims]


def gio(
    case: Case, seed: int, *, dims: int | None = 32, most: float | None = 5.0, **more: Any
) -> Rows:
    """As the scorer's passes do it, centroids of the pool as candidates."""
    space = space_of(case, seed, dims)
    start = space.pool[np.random.default_rng(seed).choice(len(space.pool), 1)]
    found = select(*map(torch.from_numpy, (space.target, space.centroids, start)), **more)
    return exploded(space, found, most)


def gio_points(case: Case, seed: int, **more: Any) -> Rows:
    space = space_of(case, seed, 32)
    start = space.pool[np.random.default_rng(seed).choice(len(space.pool), 1)]
    found = select(*map(torch.from_numpy, (space.target, space.pool, start)), **more)
    return np.array([step.candidate for step in found.steps], dtype=np.int64)


def authors(case: Case, seed: int, first: Any = "mean") -> Rows:
    """KL_avg by descent, 20 even draws of length 1 at the start, whole clusters, all dimensions."""
    space = space_of(case, seed, None)
    start = unit_rows(np.random.default_rng(seed).uniform(-1, 1, (20, space.pool.shape[1])))
    found = descend(
        *map(torch.from_numpy, (space.target, space.centroids, start.astype(np.float32))),
        stop=Stop(max_steps=100), descent=Descent(first=first), seed=seed,
    )  # fmt: skip
    return exploded(space, found, None)


def exploded(space: Space, found: Selection, most: float | None) -> Rows:
    added = np.array([step.candidate for step in found.steps], dtype=np.int64)
    sizes = np.bincount(space.labels, minlength=len(space.centroids))[added]
    steps = owners(torch.from_numpy(space.target), torch.from_numpy(space.centroids[added]))
    num, _, taken = whole_steps(steps, sizes, most=most, budget=None)
    step_of = np.full(len(space.centroids), -1, dtype=np.int32)
    step_of[added[:num]] = np.arange(num)
    distances = nearest(space.pool, Vectors([space.target]), 1, metric="l2").values[:, 0]
    return ordered(step_of[space.labels], distances, taken.tolist())


def rds(case: Case, seed: int) -> Rows:
    queries, vectors = unit_rows(case.target), Vectors([case.pool])

    def fill(used: Any, depth: int) -> list[Rows]:
        best = Best(len(queries), depth)
        for first, positions, block in cosine_blocks(queries, vectors, used):
            best.add(first, positions, block)
        return best.lists()

    nobody = np.zeros(len(case.pool), dtype=np.bool_)
    return take_turns(fill, lanes=len(queries), taken=nobody, limit=len(case.pool)).rows


def dsir(case: Case, seed: int) -> Rows:
    assert case.texts is not None
    assert case.target_texts is not None
    blocks = [
        [(block.first + block.texts, buckets_of(block.hashes, 10_000))
         for block in ngram_blocks(texts, ngrams=(1, 2), unit="words")]
        for texts in (case.target_texts, case.texts)
    ]  # fmt: skip
    target, pool = (
        np.bincount(np.concatenate([own for _, own in found]), minlength=10_000) for found in blocks
    )
    ratios = compare(target, pool).log_ratios
    texts, buckets = (np.concatenate(part) for part in zip(*blocks[1], strict=True))
    weights = log_weights(texts, buckets, ratios, num_texts=len(case.texts))
    keys = weights + gumbel(np.arange(len(weights)), stream=seed)
    return np.argsort(-keys, kind="stable")


def at_random(case: Case, seed: int) -> Rows:
    return np.random.default_rng(seed).permutation(len(case.pool))


METHODS: dict[str, Callable[[Case, int], Rows]] = {
    "gio": gio,
    "gio, mode: points": gio_points,
    "gio, dims: null": lambda case, seed: gio(case, seed, dims=None),
    "gio, max_share: null": lambda case, seed: gio(case, seed, most=None),
    "gio, estimator: avg": lambda case, seed: gio(case, seed, estimator="avg"),
    "authors' settings": authors,
    "authors' settings, v_init: prev_opt": lambda case, seed: authors(case, seed, "previous"),
    "authors' settings, v_init: jump": lambda case, seed: authors(case, seed, "jump"),
    "rds": rds,
    "dsir": dsir,
    "random": at_random,
}


def clinc150(seed: int) -> list[Case]:
    """Five intents in proportions .40/.25/.20/.10/.05; 15,100 utterances of 151."""
    (pool, frame), (rest, aimed) = sets("clinc150")
    draw = np.random.default_rng(seed)
    wanted = draw.choice(150, 5, replace=False)
    return [drawn(pool, frame, "label_name", rest, aimed, "label", wanted, draw)]


def domains_en(seed: int) -> list[Case]:
    """One domain of ten, 50 passages; for each of them."""
    (pool, frame), (rest, aimed) = sets("domains_en")
    draw = np.random.default_rng(seed)
    found: list[Case] = []
    for name in sorted(frame["domain"].unique()):
        some = np.flatnonzero((aimed["domain"] == name).to_numpy())
        some = draw.choice(some, min(50, len(some)), replace=False)
        found.append(case_of(pool, frame, "domain", rest[some], aimed[some]))
    return found


def mnist(seed: int) -> list[Case]:
    """Digits 0 to 4 in proportions .40/.25/.20/.10/.05; 20,000 images, 14 x 14 pixels."""
    (pool, frame), (rest, aimed) = sets("mnist")
    draw = np.random.default_rng(seed)
    return [drawn(pool, frame, "label_name", rest, aimed, "label", np.arange(5), draw)]


def drawn(
    pool: Floats, frame: pl.DataFrame, name: str, rest: Floats, aimed: pl.DataFrame, label: str,
    wanted: Any, draw: np.random.Generator,
) -> Case:  # fmt: skip
    rows: list[int] = []
    sizes = (40, 25, 20, 10, 5) if len(aimed) < 5500 else (20, 12, 10, 5, 3)
    for number, size in zip(wanted, sizes, strict=True):
        own = np.flatnonzero((aimed[label] == int(number)).to_numpy())
        rows += draw.choice(own, size, replace=False).tolist()
    return case_of(pool, frame, name, rest[rows], aimed[rows])


def case_of(
    pool: Floats, frame: pl.DataFrame, name: str, target: Floats, aimed: pl.DataFrame
) -> Case:
    texts = [each["text"].to_list() if "text" in each.columns else None for each in (frame, aimed)]
    groups = [each[name].cast(pl.String).to_numpy().astype(str) for each in (frame, aimed)]
    return Case(pool, target, groups[0], groups[1], texts[0], texts[1])


def sets(name: str) -> list[tuple[Floats, pl.DataFrame]]:
    """Vectors and rows of training and test part."""
    if "CURATE_DATA" not in os.environ:
        pytest.skip("CURATE_DATA does not say where the shared data sets are")
    return [part_of(name, part) for part in ("train", "test")]


def part_of(name: str, part: str) -> tuple[Floats, pl.DataFrame]:
    given = Path(os.environ.get("CURATE_VECTORS", ".")) / name / f"{part}.npy"
    if given.is_file():
        return np.load(given), pl.read_parquet(given.with_suffix(".parquet"))
    frame = pl.read_parquet(Path(os.environ["CURATE_DATA"]) / name / f"{part}.parquet")
    if name != "mnist":
        vectors = hashed_ngrams(frame["text"].to_list(), dim=1024, ngrams=(1, 2), unit="words")
        return unit_rows(vectors).astype(np.float32), frame
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(image))) for image in frame["image"]]
    small = np.stack(images).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)
    return unit_rows(small.astype(np.float32)).astype(np.float32), frame


def variation(case: Case, rows: Rows) -> float:
    """Total variation of the rows' groups from the target's."""
    names = np.unique(np.concatenate([case.aimed, case.groups]))
    one, two = (
        np.bincount(np.searchsorted(names, groups), minlength=len(names)) / len(groups)
        for groups in (case.aimed, case.groups[rows])
    )
    return float(np.abs(one - two).sum() / 2)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [clinc150, mnist, domains_en])
def test_share_of_the_targets_own_groups(world: Callable[[int], list[Case]]):
    shares: dict[str, list[float]] = {}
    far: dict[str, list[float]] = {}
    took: dict[str, list[int]] = {}
    for seed in SEEDS:
        for case in world(seed):
            _spaces.clear()
            own = np.isin(case.groups, case.aimed)
            num = len(case.pool)
            for name, method in METHODS.items():
                if name == "dsir" and case.texts is None:
                    continue
                rows = method(case, seed)
                if name == "gio":
                    num = min(len(rows), int(own.sum()))
                rows = rows[:num]
                took.setdefault(name, []).append(len(rows))
                if len(rows):
                    shares.setdefault(name, []).append(float(own[rows].mean()))
                    far.setdefault(name, []).append(variation(case, rows))
    print(f"\n{world.__name__}, {len(took['gio'])} targets:")
    print("| method | rows | share of the target's groups | total variation from its mix |")
    for name, found in shares.items():
        print(f"| {name} | {np.mean(took[name]):.0f} | {np.mean(found):.3f} ± {np.std(found):.3f} |"
              f" {np.mean(far[name]):.3f} ± {np.std(far[name]):.3f} |"
              f" {took[name].count(0)} chose nothing")  # fmt: skip
    assert 1 - np.mean(shares["gio"]) < (1 - np.mean(shares["random"])) / 2
    assert np.mean(far["gio"]) < np.mean(far["random"])


def test_digits_of_five_classes():
    """A target of 151 digits, .40/.25/.20/.10/.05 of classes 0 to 4; a pool of 897 of all ten."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    features, labels = np.asarray(data.data), np.asarray(data.target)
    options: dict[str, dict[str, Any]] = {
        "knn, k=5, l=1": {},
        "knn, k=5, l=2": {"own_k": 2},
        "avg": {"estimator": "avg"},
    }
    found: dict[str, list[list[float]]] = {name: [] for name in options}
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(labels))
        pool, rest = order[:897], order[897:]
        rows = [row for number, size in enumerate((60, 38, 30, 15, 8))
                for row in rest[labels[rest] == number][:size]]  # fmt: skip
        scaled = (features / 16).astype(np.float32)
        fitted = fit_pca(Vectors([scaled[rows], scaled[pool]]), 16, seed=seed)
        target, candidates = fitted.apply(scaled[rows]), fitted.apply(scaled[pool])
        both = np.concatenate([target, candidates])
        start = draw.uniform(both.min(0), both.max(0), (20, 16)).astype(np.float32)
        mix = np.bincount(labels[rows], minlength=10) / len(rows)
        for name, more in options.items():
            steps = select(*map(torch.from_numpy, (target, candidates, start)), **more).steps
            chosen = labels[pool[[step.candidate for step in steps]]]
            first = np.bincount(chosen[:40], minlength=10) / len(chosen[:40])
            own = float((chosen < 5).mean())
            far = float(np.abs(first - mix).sum() / 2)
            found[name].append([len(steps), own, far, *np.bincount(chosen[:40], minlength=10)[:5]])
    print("\n| estimator | chosen | share in classes 0-4 | first 40 by class | TV to the target |")
    for name, rows in found.items():
        mean = np.mean(rows, axis=0)
        classes = ", ".join(f"{count:.1f}" for count in mean[3:])
        print(f"| {name} | {mean[0]:.0f} | {mean[1]:.3f} | {classes} | {mean[2]:.3f} |")
    knn, avg = (np.mean(found[name], axis=0) for name in ("knn, k=5, l=1", "avg"))
    assert knn[1] > 0.95
    assert knn[2] < 0.2 < avg[2]
