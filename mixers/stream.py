"""A stream over several domains whose probabilities may change while it runs.

Position g of the stream is one example: its domain is drawn from the probabilities that hold at g
with a number that is a function of (seed, g), and the domain goes through its examples in a random
order, a new one each epoch. Every process makes all draws and reads only its own examples, so that
ranks and workers agree without a word, and their number does not change what is seen.

The state is global: a position and how often each domain was drawn before it. It can be taken up
with another number of ranks, of workers, or another batch size.

Shapes: K domains, n positions.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from curate.config import nearest
from curate.errors import ConfigError, InputError
from curate.models.epochs import random_seed
from mixers.changes import Change, Changes
from mixers.draws import Draws, Place
from mixers.orders import Order

log = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]


class Examples(Protocol):
    """What a domain is: a list, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class MixtureStream(IterableDataset[Any]):
    """Examples of several domains, mixed as they are asked for.

    Iterating begins at the start, or where `load_state_dict` went. Use it with `max_steps`: the
    stream has no length.

    Args:
        domains: name -> its examples, with a length and indices; at least one example each.
        probabilities: name -> probability of an *example*, in any scale; domains that are not named
            get nothing. Mixtures say shares of tokens: `mixers.phases` turns them into this.
        seed: of all draws.
        batch_size: of the DataLoader, where it has workers or there are several ranks: batches are
            dealt to ranks and workers in turn, so that what has been trained on is one stretch.
        rank: which of `num_ranks` processes reads here. Leave both under `Trainer` and accelerate,
            which deal the batches themselves.
        num_ranks: how many processes share the stream.
        draw: "even" spreads the domains over every 64 positions; "random" draws each by itself.
        exhausted: "repeat" begins a new epoch of the domain in a new order, and the log says so;
            "stop" ends the stream at the first example that is not there.
        domain_column: name of a column to add that holds the domain; examples are dicts then.

    Raises:
        InputError: a domain has no examples or cannot be indexed.
        ConfigError: a probability is no probability, or for an unknown domain.
    """

    def __init__(
        self,
        domains: Mapping[str, Examples],
        probabilities: Mapping[str, float],
        *,
        seed: int = 0,
        batch_size: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        draw: Literal["random", "even"] = "random",
        exhausted: Literal["repeat", "stop"] = "repeat",
        domain_column: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < num_ranks or batch_size < 1:
            raise ConfigError(
                f"rank {rank} of {num_ranks}, batch_size {batch_size}",
                fix="count ranks from 0, and set batch_size to that of the DataLoader",
            )
        if draw not in ("random", "even") or exhausted not in ("repeat", "stop"):
            raise ConfigError(
                f"draw is {draw!r} and exhausted {exhausted!r}",
                fix="draw is random or even, exhausted repeat or stop",
            )
        self.domains = dict(domains)
        self.sizes = np.array([_size(name, each) for name, each in domains.items()])
        self.seed, self.draw, self.exhausted = seed, draw, exhausted
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.domain_column = domain_column
        self._start = Place(0, np.zeros(len(self.domains), np.int64))
        self._known = self._start
        self._consumed: int | None = 0
        self._changes = Changes([Change(0, self._checked(probabilities))], 0)
        self._draws = Draws(self.sizes, seed, even=draw == "even", stop=exhausted == "stop")
        self._orders: dict[int, tuple[int, Order]] = {}

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (None, 1) if worker is None else (worker.id, worker.num_workers)
        place = self._start
        turn = self.rank + self.num_ranks * (own or 0)
        while True:
            first = self._start.position + turn * self.batch_size
            # Said before the changes are read: see `mixers.changes`.
            self._changes.reach(first + self.batch_size, own)
            place, is_over = self._draws.skip(place, first, self._changes)
            if is_over:
                return
            taken = self._draws.take(place, first + self.batch_size, self._changes)
            for number, (domain, drawn) in enumerate(
                zip(taken.domains.tolist(), taken.numbers.tolist(), strict=True)
            ):
                self._consumed = self._consumed_after(first, number)
                yield self._example(domain, drawn)
            if taken.is_over:
                return
            place = taken.place
            turn += self.num_ranks * workers

    @property
    def start(self) -> int:
        """The position at which iterating begins."""
        return self._start.position

    def set_probabilities(
        self, probabilities: Mapping[str, float], *, from_position: int | None = None
    ) -> None:
        """Change the mixture from a position on; later changes come at later positions.

        Args:
            probabilities: as at the start.
            from_position: the first position to draw with them, the same on all ranks, and one that
                no worker has reached. By default the next one, where this process alone draws.

        Raises:
            ConfigError: a probability is no probability, or the position is before another change.
            CurateError: a worker has drawn beyond the position.
        """
        if from_position is None:
            if self._changes.by_workers or self.num_ranks > 1:
                raise ConfigError(
                    "workers or other ranks draw from the stream too",
                    fix="say from_position, the same on all ranks: step times global batch size",
                )
            from_position = self._changes.furthest
        if from_position < self._changes.last.position:
            raise ConfigError(
                f"a change from position {from_position:,} after one from "
                f"{self._changes.last.position:,}",
                fix="give the changes in their order",
            )
        self._changes.add(Change(from_position, self._checked(probabilities)))

    def probabilities(self, position: int | None = None) -> dict[str, float]:
        """Domain -> probability at a position, by default of the next example to be drawn."""
        where = self._changes.furthest if position is None else position
        row = self._changes.since(where)[0].probabilities
        return dict(zip(self.domains, row.tolist(), strict=True))

    def epochs(self, position: int | None = None) -> dict[str, float]:
        """Domain -> how often it has been gone through before a position."""
        place = self._place(position)
        return dict(zip(self.domains, (place.drawn / self.sizes).tolist(), strict=True))

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the stream stands, as JSON values.

        Args:
            position: how many examples are behind, over all ranks: steps times global batch size.
                By default as many as were iterated over in this very process.

        Raises:
            ConfigError: workers or other ranks have read, so that only you know the position.
        """
        place = self._place(position)
        return {
            "schema_version": 1,
            "seed": self.seed,
            "draw": self.draw,
            "position": place.position,
            "sizes": dict(zip(self.domains, self.sizes.tolist(), strict=True)),
            "drawn": dict(zip(self.domains, place.drawn.tolist(), strict=True)),
            "changes": [
                [
                    change.position,
                    dict(zip(self.domains, change.probabilities.tolist(), strict=True)),
                ]
                for change in self._changes.since(place.position)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream over the same domains stood.

        Raises:
            InputError: the state is of other domains, other draws, or another version of curate.
        """
        own = {
            "schema_version": 1,
            "seed": self.seed,
            "draw": self.draw,
            "sizes": dict(zip(self.domains, self.sizes.tolist(), strict=True)),
        }
        for key, value in own.items():
            if state.get(key) != value:
                raise InputError(
                    f"the state of the stream was saved with {key} {state.get(key)}, "
                    f"and this stream has {value}",
                    fix="make the stream from the same domains, seed and draw",
                )
        drawn = np.array([state["drawn"][name] for name in self.domains], np.int64)
        self._start = self._known = Place(int(state["position"]), drawn)
        self._consumed = self._start.position
        changes = [
            Change(int(where), np.array([row[name] for name in self.domains], np.float64))
            for where, row in state["changes"]
        ]
        self._changes = Changes(changes, self._start.position)

    def _place(self, position: int | None) -> Place:
        """Where a position is, from the nearest known place before it."""
        if position is None:
            position = self._consumed
            # What workers have read, this process has not seen.
            if position is None or self._changes.by_workers:
                raise ConfigError(
                    "where the stream stands is not known here: others read it, or a batch of "
                    "several ranks is under way",
                    fix="say position: steps times global batch size",
                )
        if position < self._known.position:
            self._known = self._start
        if position < self._start.position:
            raise ConfigError(
                f"position {position:,} is before {self._start.position:,}, where the stream began",
                fix="count from the beginning of the whole stream",
            )
        self._known, _ = self._draws.skip(self._known, position, self._changes)
        return self._known

    def _example(self, domain: int, drawn: int) -> Any:
        name = list(self.domains)[domain]
        epoch, place = divmod(drawn, int(self.sizes[domain]))
        if epoch and not place:
            log.info("domain %s: all examples seen %d times, a new order begins", name, epoch)
        if self._orders.get(domain, (-1,))[0] != epoch:
            key = random_seed(self.seed, "stream", "order", name, epoch)
            self._orders[domain] = epoch, Order(int(self.sizes[domain]), key)
        index = int(self._orders[domain][1].at(np.array([place]))[0])
        example = self.domains[name][index]
        if self.domain_column is None:
            return example
        return {**example, self.domain_column: name}

    def _consumed_after(self, first: int, number: int) -> int | None:
        """Examples behind once this one is read; None inside a batch of several ranks."""
        if self.num_ranks == 1:
            return first + number + 1
        is_last = number == self.batch_size - 1
        return first + (self.num_ranks - self.rank) * self.batch_size if is_last else None

    def _checked(self, probabilities: Mapping[str, float]) -> npt.NDArray[np.float64]:
        for name, value in probabilities.items():
            if name not in self.domains:
                raise ConfigError(
                    f"there is no domain {name!r} in the stream",
                    fix=nearest(name, self.domains) or f"use some of {', '.join(self.domains)}",
                )
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"the probability of {name} is {value}", fix="give numbers from 0 up"
                )
        row = np.array([probabilities.get(name, 0.0) for name in self.domains], np.float64)
        if not row.sum() > 0:
            raise ConfigError("no probability is above 0", fix="give one domain a probability")
        return row / row.sum()


def _size(name: str, examples: Examples) -> int:
    try:
        size = len(examples)
    except TypeError as error:
        raise InputError(
            f"domain {name} has no length, so its examples cannot be drawn in any order",
            fix="load it without streaming=True, or write it to disk first",
        ) from error
    if size == 0:
        raise InputError(f"domain {name} has no examples", fix="leave it out")
    return size
