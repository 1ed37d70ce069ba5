"""Files of sequences, mapped into memory: what is not asked for is never read.

A file is safetensors: `arrays.<name>` of the task, `lengths`, `num_scored`, `domain` and `part` of
each sequence; its metadata names the domains. It is read here by its own layout: the length of a
header, the header (JSON: name -> dtype, shape, first and last byte), the numbers. The library's
reader copies a tensor whole; a map costs what is touched, and the system may take that back.

Shapes: N sequences of a file, B that are read.
"""

import json
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from curate.errors import ConfigError, InputError
from curate.models.tasks.protocol import Encoded

FLAT = frozenset({"tokens", "counted", "positions", "content"})
"""Arrays in which the sequences stand one behind the other, as `starts` says; in all others they
are the first axis."""

_KINDS = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F32": np.float32,
    "F64": np.float64,
}

_OPEN = 128
"""Files that are mapped at a time: each takes a file handle."""


def check_layout(encoded: Encoded, kind: str) -> None:
    """Refuse a task whose arrays cannot be cut into sequences.

    Raises:
        ConfigError: names the array.
    """
    sizes = {name: len(values) for name, values in encoded.arrays.items()}
    starts = encoded.arrays.get("starts")
    for name, size in sizes.items():
        if name == "starts":
            wanted = len(encoded) + 1
        elif name in FLAT:
            wanted = -1 if starts is None else int(starts[-1])
        else:
            wanted = len(encoded)
        if size != wanted:
            raise ConfigError(
                f"mixers that train a proxy cannot cut what task {kind} makes of its examples:"
                f" {name} has {size} rows for {len(encoded)} examples",
                fix="use a mixer that trains none, or another task",
            )


def write_sequences(
    path: Path,
    encoded: Encoded,
    *,
    domain: npt.NDArray[np.int32],
    part: npt.NDArray[np.uint8],
    names: Sequence[str],
) -> None:
    """Write the sequences in which something counts, in order; equal input gives equal bytes.

    Args:
        path: of the file.
        encoded: N sequences.
        domain: (N,) which of `names`.
        part: (N,) which of `curate.models.sequences.PARTS`.
        names: of the domains.
    """
    rows = np.flatnonzero(encoded.num_scored > 0)
    arrays = {
        name: _rows_of(values, encoded.arrays.get("starts"), rows, is_flat=name in FLAT)
        for name, values in encoded.arrays.items()
        if name != "starts"
    }
    if "starts" in encoded.arrays:
        sizes = np.diff(encoded.arrays["starts"])[rows]
        arrays["starts"] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tensors = {f"arrays.{name}": np.ascontiguousarray(values) for name, values in arrays.items()}
    tensors["lengths"] = encoded.lengths[rows].astype(np.int64)
    tensors["num_scored"] = encoded.num_scored[rows].astype(np.int64)
    tensors["domain"] = domain[rows].astype(np.int32)
    tensors["part"] = part[rows].astype(np.uint8)
    # One entry: several would come in any order.
    save_file(tensors, path, metadata={"curate": json.dumps({"domains": list(names)})})


class MappedFile:
    """One file; its arrays are views of the map."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            size = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + size])
            self._begin = 8 + size
            self.domains: tuple[str, ...] = tuple(
                json.loads(header.pop("__metadata__")["curate"])["domains"]
            )
            self._header = header
            if self._begin + max(t["data_offsets"][1] for t in header.values()) != len(self._map):
                raise ValueError("its length is not what it says")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is missing or damaged: {error}",
                fix="remove what is left of it and run `curate mix` on the run again",
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        start = self._begin + entry["data_offsets"][0]
        return np.ndarray(entry["shape"], _KINDS[entry["dtype"]], buffer=self._map, offset=start)

    def __len__(self) -> int:
        return int(self._header["part"]["shape"][0])

    @property
    def arrays(self) -> list[str]:
        """Names of the task's arrays."""
        return sorted(
            name.removeprefix("arrays.") for name in self._header if name.startswith("arrays.")
        )

    def read(self, name: str, rows: npt.NDArray[np.int64]) -> list[np.ndarray]:
        """A copy of each named sequence's share of one of the task's arrays, but for `starts`."""
        values = self[f"arrays.{name}"]
        if name not in FLAT:
            return list(values[rows])
        starts = self["arrays.starts"]
        return [values[starts[row] : starts[row + 1]].copy() for row in rows]


class MappedFiles:
    """Several files as one; few are mapped at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._open: OrderedDict[int, MappedFile] = OrderedDict()
        sizes = [len(file) for file in self]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def total(self) -> int:
        """Sequences of all files."""
        return int(self.offsets[-1])

    def __iter__(self) -> Iterator[MappedFile]:
        for index in range(len(self.paths)):
            yield self._file(index)

    def read(self, numbers: npt.NDArray[np.int64]) -> Encoded:
        """(B,) sequences by their number, in that order."""
        first = self._file(0)
        names = first.arrays
        found: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] * len(numbers) for name in names}
        lengths = np.zeros(len(numbers), dtype=np.int64)
        scored = np.zeros(len(numbers), dtype=np.int64)
        for file, places, rows in self._by_file(numbers):
            lengths[places], scored[places] = file["lengths"][rows], file["num_scored"][rows]
            for name in names:
                if name != "starts":
                    for place, values in zip(places, file.read(name, rows), strict=True):
                        found[name][place] = values
        arrays: dict[str, np.ndarray] = {}
        for name in names:
            none = first[f"arrays.{name}"][:0]
            if name == "starts":
                continue
            if name in FLAT:
                arrays[name] = np.concatenate([none, *found[name]])
                sizes = [len(values) for values in found[name]]
                arrays["starts"] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            else:
                arrays[name] = np.stack(found[name]) if len(numbers) else none.copy()
        return Encoded(
            lengths=lengths,
            num_scored=scored,
            truncated=np.zeros(len(numbers), dtype=np.bool_),
            arrays=arrays,
            problems={},
        )

    def num_scored(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(B,) tokens that count in some sequences."""
        return self._each("num_scored", numbers)

    def lengths(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(B,) what some sequences cost in a batch, without reading them."""
        return self._each("lengths", numbers)

    def _each(self, name: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found = np.zeros(len(numbers), dtype=np.int64)
        for file, places, rows in self._by_file(numbers):
            found[places] = file[name][rows]
        return found

    def _by_file(
        self, numbers: npt.NDArray[np.int64]
    ) -> Iterator[tuple[MappedFile, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Each file that is needed, which places of `numbers` it fills, and from which rows."""
        files = np.searchsorted(self.offsets, numbers, side="right") - 1
        for index in np.unique(files).tolist():
            places = np.flatnonzero(files == index)
            yield self._file(index), places, numbers[places] - self.offsets[index]

    def _file(self, index: int) -> MappedFile:
        file = self._open.pop(index, None)
        if file is None:
            file = MappedFile(self.paths[index])
        self._open[index] = file
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return file


def _rows_of(
    values: np.ndarray, starts: np.ndarray | None, rows: npt.NDArray[np.int64], *, is_flat: bool
) -> np.ndarray:
    """Some sequences of one of the task's arrays."""
    if not is_flat:
        return values[rows]
    assert starts is not None
    if len(rows) == len(starts) - 1:
        return values
    pieces = [values[starts[row] : starts[row + 1]] for row in rows]
    return np.concatenate([values[:0], *pieces])
