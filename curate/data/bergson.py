"""Folders of the tool Bergson: scores and gradients, row by row, read without it.

    scores      info.json  {num_items, num_rows, num_scores, dtype, attribute_tokens}
                scores.bin  num_rows records (score_0, written_0, score_1, ...), as `dtype` says
                candidates.npy  where only some rows were scored: which
                config.yaml  steps[].*.score_cfg.higher_is_better
    gradients   info.json  {num_items, num_grads, grad_sizes, base_dtype, attribute_tokens}
                gradients.bin  num_grads rows of all modules in the order of grad_sizes
    both        offsets.npy  with attribute_tokens: a row is a token, and these end the examples

Written against version 2.5.1. A row is an example of its data set, in the data set's order. Those
of tokens are added up, as both kinds say that they may be. An index may be in subfolders, whose
names have `shard` in them.

Shapes: N rows of the data set, n rows that are read, T tokens, k numbers of a gradient.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import yaml

from curate.data.bergson_files import (
    Floats,
    Part,
    count_of,
    damaged,
    decoded,
    folders_of,
    map_part,
    read_info,
    read_numbers,
)
from curate.data.files import digest_file, fingerprint
from curate.errors import InputError

_FILES = ("info.json", "scores.bin", "gradients.bin", "offsets.npy", "candidates.npy",
          "config.yaml")  # fmt: skip
_PIECE_NUMBERS = 1 << 24
"""Numbers of gradients in memory at a time."""


class Store(NamedTuple):
    """What a folder says of the rows of a data set."""

    columns: tuple[str, ...]
    num_rows: int | None
    """N; None where the folder does not say: it has scores of chosen rows only."""
    last_row: int
    """Largest row that it knows; -1 where there is none."""
    read: Callable[[int, int], Floats]
    """(first, end) -> (n, columns) of these rows, NaN where nothing was written."""


def is_store(folder: Path) -> bool:
    """Whether a folder is one of Bergson's."""
    return folder.is_dir() and bool(folders_of(folder))


def store_digest(folder: Path) -> str:
    """Of all that is read of a folder."""
    known = [each / name for each in folders_of(folder) for name in _FILES]
    return fingerprint(
        **{str(path.relative_to(folder)): digest_file(path) for path in known if path.is_file()}
    )


def open_store(folder: Path, queries: Path | None = None) -> Store:
    """Scores of a folder, or numbers from its gradients.

    Args:
        folder: of scores, or of gradients.
        queries: a folder of gradients that asks: the column `score` is then the inner product of
            each row's gradient with the mean of theirs. Without it an index has the column
            `squared_norm`.

    Raises:
        InputError: it is truncated, unfinished or none of Bergson's, or the two have gradients of
            different modules.
    """
    folders = folders_of(folder)
    if not folders:
        raise InputError(
            f"{folder} is no folder of Bergson: it has no info.json",
            fix="name the folder that `bergson score` or `bergson build` wrote",
        )
    infos = [read_info(each) for each in folders]
    if "num_scores" in infos[0]:
        if queries is not None:
            raise InputError(
                f"{folder} holds scores, of which nothing can be asked", fix="remove `queries`"
            )
        return _scores(folders[0], infos[0])
    return _gradients(folder, queries)


# ---- scores


def _scores(folder: Path, info: dict[str, Any]) -> Store:
    number = count_of(folder, info, "num_scores")
    dtype, bits = _record(folder, info, number)
    part = map_part(folder, info, "scores.bin", "num_rows", dtype, 0)
    sign = 1.0 if _is_positive(folder) else -1.0
    chosen = _chosen(folder, part.num_items)

    def read(first: int, end: int) -> Floats:
        rows = part.records[part.span(first, end)]
        columns: list[Floats] = []
        for place in range(number):
            values = decoded(rows[f"score_{place}"], bits=bits)
            written = np.where(rows[f"written_{place}"], 0.0, np.nan)
            columns.append(part.sums(values + written, first, end))
        return sign * np.stack(columns, 1)

    def read_chosen(first: int, end: int) -> Floats:
        assert chosen is not None
        found = np.full((end - first, number), np.nan)
        places = np.flatnonzero((chosen >= first) & (chosen < end))
        if len(places):
            low, high = int(places.min()), int(places.max()) + 1
            found[chosen[places] - first] = read(low, high)[places - low]
        return found

    names = ("score",) if number == 1 else tuple(f"score_{place}" for place in range(number))
    if chosen is None:
        return Store(names, part.num_items, part.num_items - 1, read)
    return Store(names, None, int(chosen.max(initial=-1)), read_chosen)


def _record(folder: Path, info: dict[str, Any], number: int) -> tuple[np.dtype[Any], bool]:
    """How a row of scores lies on disk, and whether its numbers are bits of bfloat16."""
    try:
        given = dict(info["dtype"])
        formats = ["<u2" if kind == "bfloat16" else kind for kind in given["formats"]]
        dtype = np.dtype(cast(Any, {**given, "formats": formats}))
        wanted = {f"{kind}_{n}" for kind in ("score", "written") for n in range(number)}
        if not number or not wanted <= set(dtype.names or ()):
            raise ValueError("fields are missing")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / "info.json", f"its dtype cannot be read: {error}") from error
    return dtype, "bfloat16" in given["formats"]


def _chosen(folder: Path, num_items: int) -> npt.NDArray[np.int64] | None:
    """(num_items,) rows of the data set that were scored; None where all were."""
    path = folder / "candidates.npy"
    if not path.is_file():
        return None
    found = read_numbers(path)
    if len(found) != num_items or (found < 0).any() or len(np.unique(found)) != len(found):
        raise damaged(path, f"it does not name {num_items:,} different rows")
    return found


def _is_positive(folder: Path) -> bool:
    """Whether a high score is of a row that helps."""
    path = folder / "config.yaml"
    if not path.is_file():
        return True
    try:
        steps = yaml.safe_load(path.read_text(encoding="utf-8"))["steps"]
        for command in (each for step in steps for each in step.values()):
            if "score_cfg" in (command or {}):
                return bool(command["score_cfg"].get("higher_is_better", True))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, "it does not say whether a high score helps") from error
    return True


# ---- gradients


def _gradients(folder: Path, queries: Path | None) -> Store:
    parts = _gradient_parts(folder)
    ask = None if queries is None else _mean_query(parts[0], queries)
    ends = np.cumsum([part.num_items for part in parts])

    def read(first: int, end: int) -> Floats:
        found: list[Floats] = []
        for part, stop in zip(parts, ends.tolist(), strict=True):
            start = stop - part.num_items
            low, high = max(first, start), min(end, stop)
            for rows in _blocks(part, low - start, high - start):
                squares = np.square(rows).sum(1)
                values = squares if ask is None else rows @ ask
                # An example of which no token is counted has a gradient of zeros: no score.
                found.append(np.where(squares > 0, values, np.nan))
        return np.concatenate(found)[:, None] if found else np.empty((0, 1))

    total = int(ends[-1])
    return Store(("squared_norm" if ask is None else "score",), total, total - 1, read)


def _gradient_parts(folder: Path) -> list[Part]:
    parts: list[Part] = []
    for each in folders_of(folder):
        info = read_info(each)
        try:
            width = sum(map(int, info["grad_sizes"].values()))
            kind = info["base_dtype"] if "base_dtype" in info else info["dtype"]["formats"][0]
            dtype = np.dtype("<u2" if kind == "bfloat16" else kind).base
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise damaged(each / "info.json", "it has no sizes or type of gradients") from error
        info = {
            **info,
            "bits": kind == "bfloat16",
            "num_items": info.get("num_items", info["num_grads"]),
        }
        parts.append(map_part(each, info, "gradients.bin", "num_grads", dtype, width))
        _check_modules(parts[0], parts[-1])
    if not parts:
        raise InputError(
            f"{folder} is no folder of Bergson: it has no info.json",
            fix="name the folder that `bergson build` wrote",
        )
    return parts


def _mean_query(pool: Part, queries: Path) -> Floats:
    """(k,) the mean gradient of the examples that ask."""
    total: Floats | None = None
    count = 0
    for part in _gradient_parts(queries):
        _check_modules(pool, part)
        for rows in _blocks(part, 0, part.num_items):
            known = rows[~np.isnan(rows).any(1)]
            total = known.sum(0) if total is None else total + known.sum(0)
            count += len(known)
    if total is None or not count:
        raise InputError(f"{queries} holds no gradient", fix="name an index with examples")
    return total / count


def _check_modules(one: Part, other: Part) -> None:
    """Modules, their sizes and their order are the same."""
    first, second = (list(part.info["grad_sizes"].items()) for part in (one, other))
    if first == second:
        return
    pairs = zip(first, second, strict=False)
    what = next(((a, b) for a, b in pairs if a != b), (len(first), len(second)))
    raise InputError(
        f"{one.folder} and {other.folder} hold gradients of different modules: {what[0]} and"
        f" {what[1]}",
        fix="build both with the same model and projection",
    )


def _blocks(part: Part, first: int, end: int) -> Iterator[Floats]:
    """(n, k) gradients of examples, some at a time."""
    width = max(1, part.records.shape[1])
    while first < end:
        last = first + 1
        if part.ends is None:
            last = min(end, first + max(1, _PIECE_NUMBERS // width))
        else:
            most = int(part.ends[first]) + _PIECE_NUMBERS // width
            last = max(last, int(np.searchsorted(part.ends, most, "right")) - 1)
            last = min(last, end)
        values = decoded(part.records[part.span(first, last)], bits=part.info["bits"])
        yield part.sums(values, first, last)
        first = last
