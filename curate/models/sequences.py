"""The sequences a proxy draws from: one memory-mapped file for each partition.

A sequence is an example, or a window of packed texts. It has a domain and a part: the training
examples fall into two halves by their content, so that what one model has learned can be measured
on what it has not seen, and the held-out ones are a third part; a target has two halves of its own.

Shapes: N sequences of a file, M that are chosen, B that are taken, K domains.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from curate.models.epochs import random_permutation, random_seed
from curate.models.sequence_files import MappedFiles
from curate.models.tasks.protocol import Encoded

Integers = npt.NDArray[np.int64]

PARTS = ("reference", "proxy", "held_out", "target", "target_held_out")
"""A part's place here is its number in the files."""

OTHER_HALF = {
    "reference": "proxy",
    "proxy": "reference",
    "target": "target_held_out",
    "target_held_out": "target",
}

_SHOWN = 5


class Taken(NamedTuple):
    """Some sequences."""

    encoded: Encoded
    """(B,) in the order they were asked for, for `task.collate(encoded, range(B))`."""
    numbers: Integers
    """(B,) the number of each among all sequences of all files, whatever parts are chosen."""


class Sequences:
    """The chosen sequences by domain; none is read before it is taken, 8 bytes each are kept."""

    domains: tuple[str, ...]
    """(K,) those that have a sequence."""
    sizes: Integers
    """(K,) sequences of each."""
    num_tokens: Integers
    """(K,) tokens that count in them."""
    missing: tuple[str, ...]
    """Domains without a sequence."""
    borrowed: tuple[str, ...]
    """Domains of which the other half is used, as the one that was asked for is empty."""

    def __init__(
        self,
        files: MappedFiles,
        numbers: Mapping[str, Integers],
        num_tokens: Integers,
        *,
        missing: Sequence[str] = (),
        borrowed: Sequence[str] = (),
    ) -> None:
        """From the numbers of each domain's sequences; `open` finds them."""
        self._files = files
        self._numbers = dict(numbers)
        self._chosen = list(self._numbers.values())
        self.domains = tuple(self._numbers)
        self.sizes = np.array([len(own) for own in self._chosen], dtype=np.int64)
        self.num_tokens = num_tokens
        self.missing, self.borrowed = tuple(missing), tuple(borrowed)

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        *,
        parts: Sequence[str],
        domains: Sequence[str] | None = None,
        as_one: str | None = None,
    ) -> "Sequences":
        """The sequences of some parts.

        A domain whose half is empty uses its other half; one that has no sequence is dropped:
        `missing`, `borrowed` and `notes` say so.

        Args:
            paths: of the files; their order numbers the sequences.
            parts: of `PARTS`.
            domains: which, in this order; by default all, in the order of the alphabet.
            as_one: name of the one domain that all sequences count as, whatever their own.

        Raises:
            InputError: a file is missing or damaged.
        """
        files = MappedFiles(paths)
        if as_one is not None:
            names = [as_one]
        elif domains is None:
            names = sorted({name for file in files for name in file.domains})
        else:
            names = list(domains)
        asked = [PARTS.index(part) for part in parts]
        others = [OTHER_HALF[part] for part in parts if part in OTHER_HALF]
        spare = [PARTS.index(part) for part in others if part not in parts]
        found = _find(files, names, asked, spare, is_one=as_one is not None)
        have = [k for k in range(len(names)) if len(found.numbers[k])]
        return cls(
            files,
            {names[k]: found.numbers[k] for k in have},
            found.num_tokens[have],
            missing=[name for k, name in enumerate(names) if not len(found.numbers[k])],
            borrowed=[names[k] for k in have if found.is_spare[k]],
        )

    @property
    def total(self) -> int:
        """Sequences of all files, chosen or not: every number is below it."""
        return self._files.total

    @property
    def offsets(self) -> Integers:
        """(F + 1,) the number of each file's first sequence; the last entry is `total`."""
        return self._files.offsets

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the domains."""
        found: list[str] = []
        if self.borrowed:
            found.append(
                "one half of the examples holds none of these domains, so that the other half"
                f" stands for both: {_listed(self.borrowed)}"
            )
        if self.missing:
            found.append(
                f"these domains have no sequence in which a token counts: {_listed(self.missing)}"
            )
        return tuple(found)

    def numbers_of(self, domain: str) -> Integers:
        """(n,) numbers of a domain's sequences, ascending: place -> number."""
        return self._numbers[domain]

    def take(self, domains: npt.ArrayLike, places: npt.ArrayLike) -> Taken:
        """Read some sequences.

        Args:
            domains: (B,) int, which of `domains`.
            places: (B,) int in [0, sizes[domain]).
        """
        pairs = zip(np.asarray(domains).tolist(), np.asarray(places).tolist(), strict=True)
        numbers = np.array([self._chosen[k][place] for k, place in pairs], dtype=np.int64)
        return Taken(self.read(numbers), numbers)

    def read(self, numbers: Integers) -> Encoded:
        """(B,) sequences by their number."""
        return self._files.read(numbers)

    def lengths(self, numbers: Integers) -> Integers:
        """(B,) what some sequences cost in a batch: their tokens; none is read for it."""
        return self._files.lengths(numbers)

    def limited(self, most: Mapping[str, int], *, seed: int) -> "Sequences":
        """The same with at most so many sequences of some domains, drawn at random.

        Args:
            most: domain -> at most so many, at least 1; domains that are not named keep all.
            seed: of the draw; more sequences of the same seed hold those of fewer.
        """
        numbers = dict(self._numbers)
        num_tokens = self.num_tokens.copy()
        for k, name in enumerate(self.domains):
            own = numbers[name]
            if name in most and most[name] < len(own):
                draw = random_permutation(len(own), random_seed(seed, "limited", name))
                numbers[name] = np.sort(own[draw[: max(1, most[name])]])
                num_tokens[k] = self._files.num_scored(numbers[name]).sum()
        return Sequences(
            self._files, numbers, num_tokens, missing=self.missing, borrowed=self.borrowed
        )


def half_of(content: int, *, seed: int, halves: tuple[str, str] = ("reference", "proxy")) -> str:
    """The half that an example falls into, the same for all copies of it.

    Args:
        content: its content hash, 64 bits.
        seed: the run's seed.
        halves: their names.
    """
    draw = xxhash.xxh3_64_intdigest(
        b"half" + content.to_bytes(8, "little"), seed=seed & 0xFFFF_FFFF_FFFF_FFFF
    )
    return halves[draw & 1]


class _Found(NamedTuple):
    numbers: list[Integers]
    """Of each domain."""
    num_tokens: Integers
    """(K,)"""
    is_spare: npt.NDArray[np.bool_]
    """(K,) whether they are of the other half."""


def _find(
    files: MappedFiles,
    names: Sequence[str],
    asked: Sequence[int],
    spare: Sequence[int],
    *,
    is_one: bool,
) -> _Found:
    """Numbers of the sequences of each domain, of the parts asked for or else of the spare ones."""
    place = {name: k for k, name in enumerate(names)}
    numbers: list[Integers] = []
    domains: list[npt.NDArray[np.int32]] = []
    tokens = np.zeros((2, len(names)), dtype=np.int64)
    for offset, file in zip(files.offsets[:-1], files, strict=True):
        own = [0 if is_one else place.get(name, -1) for name in file.domains]
        domain = np.array(own, dtype=np.int32)[file["domain"]]
        for kind, parts in enumerate((asked, spare)):
            rows = np.flatnonzero((domain >= 0) & np.isin(file["part"], parts))
            np.add.at(tokens[kind], domain[rows], file["num_scored"][rows])
            numbers.append(rows + offset)
            domains.append(domain[rows] + kind * len(names))  # the spare ones behind the others
    joined = np.concatenate([np.zeros(0, np.int32), *domains])
    order = np.argsort(joined, kind="stable")
    every = np.concatenate([np.zeros(0, np.int64), *numbers])[order]
    bounds = np.searchsorted(joined[order], np.arange(2 * len(names) + 1))
    spans = [every[start:stop] for start, stop in pairwise(bounds)]
    first, second = spans[: len(names)], spans[len(names) :]
    is_spare = np.array(
        [not len(one) and len(other) > 0 for one, other in zip(first, second, strict=True)],
        dtype=np.bool_,
    )
    return _Found(
        [
            (two if far else one).copy()
            for one, two, far in zip(first, second, is_spare, strict=True)
        ],
        np.where(is_spare, tokens[1], tokens[0]),
        is_spare,
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
