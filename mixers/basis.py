"""Weights on a few distributions over many domains, in place of a weight for each domain.

    alpha = w M,   M: (N, K) with rows on the simplex,   w on the simplex of N

Source: Fan, Grangier and Ablin, "Dynamic Gradient Alignment for Online Data Mixing", 2024,
arXiv:2410.02498: with thousands of clusters a few distributions are told apart, not the clusters.
Departures: the choice of the rows is the user's, for instance histograms of known tasks and the
natural distribution.
Cost: N gradients a measurement, whatever K.
Shapes: K domains, N distributions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import yaml
from torch import Tensor

from curate.config import nearest
from curate.errors import ConfigError, InputError

Distributions = dict[str, dict[str, float]]
"""Name -> domain -> share, in any scale; domains that are not named have none of it."""


class Basis(NamedTuple):
    """The distributions that weights live on."""

    names: tuple[str, ...]
    rows: Tensor
    """(N, K) float64, each row summing to 1."""
    is_plain: bool
    """Each domain is its own distribution."""

    def shares(self, weights: Tensor) -> Tensor:
        """(K,) of the domains, for weights (N,)."""
        return weights if self.is_plain else weights @ self.rows

    def caps(self, caps: Tensor) -> Tensor:
        """(N,) what each distribution can still give under caps (K,) of its domains."""
        return caps if self.is_plain else torch.minimum(self.rows, caps).sum(1)


def make_basis(domains: Sequence[str], given: Distributions | str | None) -> Basis:
    """The basis that settings ask for.

    Args:
        domains: K names, in order.
        given: distributions, or a YAML or JSON file of them; None for the domains themselves.

    Raises:
        ConfigError: a distribution is none, or names an unknown domain.
        InputError: the file is missing, or holds something else.
    """
    if given is None:
        return Basis(tuple(domains), torch.eye(len(domains), dtype=torch.float64), True)
    found = read_basis(given)
    if not found:
        raise ConfigError("the basis has no distribution", fix="remove basis, or give it some")
    if len(found) > len(domains):
        raise ConfigError(
            f"the basis has {len(found)} distributions over {len(domains)} domains",
            fix="remove basis: weights on the domains themselves say more",
        )
    rows = [simplex(row, domains, what=f"basis.{name}") for name, row in found.items()]
    return Basis(tuple(found), torch.stack(rows), False)


def simplex(shares: Mapping[str, float], names: Sequence[str], *, what: str) -> Tensor:
    """(K,) float64 the shares in order of the names, scaled to sum to 1.

    Args:
        shares: name -> share from 0 up, in any scale.
        names: K of them.
        what: the setting, for messages.

    Raises:
        ConfigError: a share is negative or for an unknown name, or all are 0.
    """
    for name, value in shares.items():
        if name not in names:
            raise ConfigError(
                f"{what} gives a share to {name!r}, which there is not",
                fix=nearest(name, names) or f"use some of {', '.join(names[:20])}",
            )
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{what}.{name} is {value}", fix="give shares from 0 up")
    row = torch.tensor([shares.get(name, 0.0) for name in names], dtype=torch.float64)
    if not float(row.sum()) > 0:
        raise ConfigError(f"{what} has no share above 0", fix="give one domain a share")
    return row / row.sum()


def read_basis(given: Distributions | str) -> Distributions:
    """The distributions themselves, of a setting that may name a file of them.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    if not isinstance(given, str):
        return given
    path = Path(given)
    try:
        found: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(
            f"the basis {path} cannot be read: {error}", fix="give a YAML or JSON file"
        ) from error
    rows = cast(dict[object, object], found) if isinstance(found, dict) else {}
    made: Distributions = {}
    for name, row in rows.items():
        shares = cast(dict[object, object], row) if isinstance(row, dict) else {}
        if not shares or not all(isinstance(value, int | float) for value in shares.values()):
            raise InputError(
                f"{name} of the basis {path} is no distribution", fix="write name: {domain: share}"
            )
        made[str(name)] = {str(key): float(cast(float, value)) for key, value in shares.items()}
    return made
