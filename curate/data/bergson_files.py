"""Files of Bergson's folders, mapped and checked: see `curate.data.bergson`.

Shapes: N examples, k numbers of a gradient.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from curate.errors import InputError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_COPY = "copy the folder again, or let Bergson finish it"


class Part(NamedTuple):
    """One info.json and its file of numbers."""

    folder: Path
    info: dict[str, Any]
    records: Array
    """(rows,) records, or (rows, k) numbers; bfloat16 as its bits."""
    ends: npt.NDArray[np.int64] | None
    """(N + 1,) where examples begin and end, if rows are tokens."""

    @property
    def num_items(self) -> int:
        return int(self.info["num_items"])

    def span(self, first: int, end: int) -> slice:
        """Rows of the file that examples first ... end - 1 have."""
        if self.ends is None:
            return slice(first, end)
        return slice(int(self.ends[first]), int(self.ends[end]))

    def sums(self, values: Array, first: int, end: int) -> Floats:
        """(n, ...) of values (rows, ...) of these examples; NaN where one has no token."""
        if self.ends is None:
            return values.astype(np.float64)
        starts = (self.ends[first : end + 1] - self.ends[first]).astype(np.int64)
        found = np.full((end - first, *values.shape[1:]), np.nan)
        filled = np.flatnonzero(np.diff(starts))
        if len(filled):
            found[filled] = np.add.reduceat(values.astype(np.float64), starts[filled], axis=0)
        return found


def folders_of(folder: Path) -> list[Path]:
    """The folder itself, or the shards in it; none where it is not of Bergson."""
    if (folder / "info.json").is_file():
        return [folder]
    if not folder.is_dir():
        return []
    found = [path for path in sorted(folder.iterdir()) if "shard" in path.name]
    return [path for path in found if (path / "info.json").is_file()]


def read_info(folder: Path) -> dict[str, Any]:
    """What `info.json` says.

    Raises:
        InputError: it cannot be read or is of something else.
    """
    path = folder / "info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(found, dict) or not found.keys() & {"num_scores", "num_grads"}:
        raise damaged(path, "it says nothing of scores or gradients")
    return cast(dict[str, Any], found)


def map_part(
    folder: Path, info: dict[str, Any], name: str, rows: str, dtype: np.dtype[Any], width: int
) -> Part:
    """Map the numbers of a folder.

    Args:
        folder: with an `info.json`.
        info: what it says.
        name: of the file of numbers.
        rows: what `info` calls the number of its rows.
        dtype: of a record or a number.
        width: k; 0 for records.

    Raises:
        InputError: a file is missing, truncated, or does not fit `info`.
    """
    path = folder / name
    num_rows, num_items = count_of(folder, info, rows), count_of(folder, info, "num_items")
    shape = (num_rows, width) if width else (num_rows,)
    wanted = num_rows * max(1, width) * dtype.itemsize
    if not path.is_file():
        raise InputError(f"{path} is missing", fix=_COPY)
    size = path.stat().st_size
    if size != wanted:
        raise InputError(
            f"{path} has {size:,} bytes, {wanted:,} by its info.json: it is truncated or of"
            " another run",
            fix=_COPY,
        )
    records = np.memmap(path, dtype, "r", shape=shape) if num_rows else np.empty(shape, dtype)
    ends: npt.NDArray[np.int64] | None = None
    if info.get("attribute_tokens"):
        ends = read_numbers(folder / "offsets.npy")
        whole = len(ends) == num_items + 1 and ends[0] == 0 and ends[-1] == num_rows
        if not whole or (np.diff(ends) < 0).any():
            raise damaged(
                folder / "offsets.npy",
                f"it does not divide {num_rows:,} rows into {num_items:,} examples",
            )
    elif num_items != num_rows:
        raise damaged(folder / "info.json", f"it has {num_items:,} items in {num_rows:,} rows")
    return Part(folder, info, records, ends)


def count_of(folder: Path, info: dict[str, Any], name: str) -> int:
    """A whole number of `info.json`."""
    value = info.get(name)
    if not isinstance(value, int) or value < 0:
        raise damaged(folder / "info.json", f"its {name} is {value}")
    return value


def read_numbers(path: Path) -> npt.NDArray[np.int64]:
    """A list of whole numbers as numpy saves it."""
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", fix=_COPY) from error
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise damaged(path, "it holds no list of whole numbers")
    return found.astype(np.int64)


def decoded(values: Array, *, bits: bool) -> Floats:
    """float64, of bfloat16 by its bits."""
    if bits:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, dtype=np.float64)


def damaged(path: Path, why: str) -> InputError:
    """The error of a file that is not as Bergson writes it."""
    return InputError(f"{path} cannot be read: {why}", fix=_COPY)
