"""Rules of the loop that need no mixer: plain training at given shares."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from curate.config import nearest, parse
from curate.errors import ConfigError
from curate.models.sequences import Sequences
from jobs.proxy_work import Making
from mixers.loss_weights import LossReweighting
from mixers.plain import PlainRule, ReweightedRule
from mixers.rules import Rule


def plain(making: Making) -> Rule:
    """Training at fixed shares of the tokens.

    Options: `shares`: "natural", "uniform", domain -> share, or a list of phases, each with
    `share` and `weights`; or `from`: a result in the run whose mixture is taken. `reweight`:
    options of loss reweighting, for shares that stay the same.
    """
    options, sequences = making.options, making.data.sequences
    given: Any = options.get("shares")
    if "from" in options:
        path = Path(making.settings.run, options["from"])
        given = json.loads(path.read_text(encoding="utf-8"))["mixture"]
    whole: list[dict[str, Any]] = [{"share": 1.0, "weights": given}]
    phases = cast(list[dict[str, Any]], given) if isinstance(given, list) else whole
    shares = torch.stack([sequence_shares(phase["weights"], sequences) for phase in phases])
    if options.get("reweight") is not None:
        if len(shares) > 1:
            raise ConfigError("reweight goes with one phase", fix="give shares that stay the same")
        return ReweightedRule(shares[0], parse(LossReweighting, options["reweight"]))
    ends = torch.tensor([phase["share"] for phase in phases], dtype=torch.float64).cumsum(0)
    return PlainRule(shares, ends / ends[-1], total_steps=making.proxy.steps)


def sequence_shares(given: str | Mapping[str, float], sequences: Sequences) -> Tensor:
    """(K,) float64 share of the sequences of a batch that gives each domain its share of tokens.

    Args:
        given: "natural", "uniform", or domain -> share of the tokens in any scale; a domain that is
            not named gets nothing.
        sequences: K domains.

    Raises:
        ConfigError: a domain is unknown, or all shares are 0.
    """
    domains = sequences.domains
    if given == "natural":
        tokens = sequences.num_tokens.astype(np.float64)
    elif given == "uniform":
        tokens = np.ones(len(domains))
    else:
        assert not isinstance(given, str)
        unknown = [name for name in given if name not in domains and name not in sequences.missing]
        if unknown:
            raise ConfigError(
                f"there is no domain {unknown[0]!r} among the sequences",
                fix=nearest(unknown[0], domains) or f"use names of {', '.join(domains[:10])}",
            )
        tokens = np.array([float(given.get(name, 0.0)) for name in domains])
    if not tokens.sum() > 0:
        raise ConfigError("all shares are 0", fix="give a domain a share above 0")
    parts = tokens / (sequences.num_tokens / sequences.sizes)
    return torch.from_numpy(parts / parts.sum())
