"""Files of sequences, mapped into memory: what is not asked for is never read.

The format is safetensors, read here by its own layout: the length of a header, the header (JSON:
name -> dtype, shape, first and last byte), the numbers. The library's reader copies a tensor
whole; a map costs what is touched, and the system may take that back.

Shapes: N sequences of a file, B that are read.
"""

import json
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curate.errors import InputError
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
        found = np.zeros(len(numbers), dtype=np.int64)
        for file, places, rows in self._by_file(numbers):
            found[places] = file["num_scored"][rows]
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
