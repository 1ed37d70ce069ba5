"""Names of domains and labels: the largest stand for themselves, the rest together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

REST = "\0rest"
"""In place of the name of the rest: no name in the data has it."""


@dataclass(frozen=True, slots=True)
class Names:
    """The values of `domain` or `label`, as numbers."""

    column: str
    names: list[str | None]
    """The largest; None is no label."""
    num_rest: int
    """Further ones."""
    shown: Mapping[int, str]
    """Number of a class -> its name."""

    @classmethod
    def of(cls, sizes: pl.DataFrame, most: int, shown: Mapping[int, str] | None = None) -> "Names":
        """The first names of a table of sizes.

        Args:
            sizes: from `jobs.report_survey.Sizes`.
            most: how many stand for themselves; a single further one does too.
            shown: of labels, their names; None for domains.
        """
        names = sizes["name"].to_list()
        most = most + 1 if len(names) == most + 1 else most
        return cls("domain" if shown is None else "label", names[:most], len(names[most:]),
                   shown or {})  # fmt: skip

    def __len__(self) -> int:
        return max(1, len(self.names) + bool(self.num_rest))

    @property
    def total(self) -> int:
        """How many different names there are."""
        return len(self.names) + self.num_rest

    def codes(self, rows: pl.DataFrame) -> NDArray[np.int64]:
        """(N,) place of each row's name in `listed`."""
        if len(self) == 1:
            return np.zeros(rows.height, np.int64)
        column = rows[self.column].cast(pl.String)
        known = {name: code for code, name in enumerate(self.names)}
        found = column.replace_strict(known, default=len(self.names), return_dtype=pl.Int64)
        return found.to_numpy()

    def listed(self) -> Iterator[tuple[str, str]]:
        """Each name, as in the plan's groups and as it is shown; the rest last."""
        for name in self.names:
            yield name or "none", shown_name(name, self.shown)
        if self.num_rest:
            yield REST, rest_name(self.num_rest)


def rest_name(number: int) -> str:
    """What stands for those that are not shown one by one."""
    return f"{number:,} others"


def shown_name(name: str | None, shown: Mapping[int, str]) -> str:
    """A domain's name, or that of a class."""
    if name is None:
        return "no label"
    return shown.get(int(name), name) if shown and name.lstrip("-").isdigit() else name


def label_names(manifest: Mapping[str, Any]) -> dict[int, str]:
    """Number -> name of the classes, where all sources that name them agree.

    Args:
        manifest: of the run; its index says what the columns of each source are.
    """
    columns = manifest["stages"].get("index", {}).get("columns", {})
    named = [tuple(entry.get("classes") or ()) for entry in columns.values()]
    found = {classes for classes in named if classes}
    return dict(enumerate(next(iter(found)))) if len(found) == 1 else {}
