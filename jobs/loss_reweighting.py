"""Loss reweighting as tasks: the sequences, then one proxy for each seed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from curate.config import parse, plain
from curate.errors import InputError
from curate.models.sequences import Sequences
from curate.plan.mixture import DomainSize, Phase
from jobs.mix_passes import Found, MixPasses
from jobs.own_passes import Phase as Work
from jobs.proxy_refusals import check_shares
from jobs.proxy_rules import sequence_shares
from jobs.proxy_work import Making, proxy_base, result_output, tiny_note, train_proxy
from jobs.sequences import open_sequences
from jobs.settings import Settings
from mixers.loss_reweighting import TokenRule, WeightsByLoss
from mixers.plain import ReweightedRule
from mixers.rules import Rule

PARTS = ("reference", "proxy")

_FEW_SEQUENCES = 32
_MOST = 2.0
"""Of the mean weight: what the paper's theory assumes of the largest."""


def passes(settings: Settings, mixer: WeightsByLoss) -> MixPasses:
    """Sequences, then the proxies.

    Raises:
        ConfigError: there is no model, or `shares` name an unknown domain.
        InputError: the index has not been made.
    """
    base, phases = proxy_base(settings, "loss_reweighting", mixer.proxy)
    check_shares(settings, mixer.shares, "mix.shares")
    own = ("proxy", "seeds")
    options = {name: value for name, value in plain(mixer).items() if name not in own}
    tasks = base.tasks(
        mixer.seeds,
        rule="jobs.loss_reweighting:make_rule",
        proxy=mixer.proxy,
        options=options,
        parts=PARTS,
    )
    folders = [Path(task.payload["folder"]) for task in tasks]
    key = str(base.payload["sequences"])

    def finish(sizes: Mapping[str, DomainSize]) -> Found:
        return _finish(mixer, folders, open_sequences(settings, key, PARTS), sizes)

    return MixPasses((*phases, Work("loss_reweighting: proxies", tasks, train_proxy)), finish)


def make_rule(making: Making) -> Rule:
    """The rule for a proxy.

    Raises:
        ConfigError: `shares` name an unknown domain.
    """
    mixer = parse(WeightsByLoss, making.options)
    shares = sequence_shares(mixer.shares, making.data.sequences)
    if mixer.token is not None:
        return TokenRule(shares, mixer.token)
    return ReweightedRule(shares, mixer.examples)


@dataclass(frozen=True, slots=True)
class _Run:
    """What one proxy has shown."""

    factors: dict[str, float]
    """Domain -> its mean weight; those of the shares' mean are 1."""
    facts: dict[str, Any]
    effective_share: float
    """Mean over the steps."""
    largest: float
    """The same, of the largest weight by the mean one."""


def _finish(
    mixer: WeightsByLoss,
    folders: list[Path],
    sequences: Sequences,
    sizes: Mapping[str, DomainSize],
) -> Found:
    """The shares of the tokens times the mean weights, and what else must be known."""
    shares = dict(
        zip(sequences.domains, sequence_shares(mixer.shares, sequences).tolist(), strict=True)
    )
    runs = [_read(folder, shares) for folder in folders]
    lengths = dict(zip(sequences.domains, sequences.num_tokens / sequences.sizes, strict=True))
    tokens = {name: shares[name] * float(lengths[name]) for name in sizes if name in shares}
    factors = {name: [run.factors[name] for run in runs] for name in tokens if tokens[name] > 0}
    weights = {
        name: tokens[name] * fmean(factors[name]) if name in factors else 0.0 for name in sizes
    }
    total = sum(weights.values())
    if not total > 0:
        raise InputError(
            "no domain that has training tokens has a weight",
            fix="give mix.shares a domain that has training tokens, or remove mix.shares",
        )
    before = sum(tokens.values())
    why = {
        name: _why(tokens.get(name, 0.0) / before, factors.get(name, []), mixer) for name in sizes
    }
    unseen = sorted(name for name in sizes if name not in shares)
    return Found(
        (Phase(1.0, {name: weight / total for name, weight in weights.items()}),),
        why,
        _notes(mixer, runs, factors, unseen),
        {folder.name: folder / "trajectory.parquet" for folder in folders},
    )


def _read(folder: Path, shares: Mapping[str, float]) -> _Run:
    facts = json.loads(result_output(folder).path.read_text(encoding="utf-8"))
    told = pl.read_parquet(
        folder / "trajectory.parquet", columns=["effective_share", "largest"]
    ).mean()
    effective, largest = told.row(0)
    factors = {
        name: weight / shares[name] for name, weight in facts["mixture"].items() if shares[name] > 0
    }
    return _Run(factors, facts, effective, largest)


def _why(share: float, factors: list[float], mixer: WeightsByLoss) -> str:
    if not factors:
        return "no sequence of it was drawn"
    spread = f" ({min(factors):.3g} to {max(factors):.3g} over {len(factors)} seeds)"
    of = "tokens" if mixer.token else "examples"
    return (
        f"{100 * share:.3g} % of the proxy's tokens, times a mean weight of its {of} of"
        f" {fmean(factors):.3g}{spread if len(factors) > 1 else ''}"
    )


def _notes(
    mixer: WeightsByLoss,
    runs: list[_Run],
    factors: Mapping[str, list[float]],
    unseen: list[str],
) -> tuple[str, ...]:
    what = "tokens" if mixer.token else "examples"
    found = [
        tiny_note(runs[0].facts["num_parameters"]),
        f"weights of {what} from their losses came to this mixture of domains. It is a by-product:"
        " the method weighs anew at every step of training (mixers.online), and no mixture of"
        " domains repeats that",
    ]
    if mixer.within_domain:
        found.append("within_domain: every domain keeps its share, so the mixture is mix.shares")
    share, largest = (fmean(getattr(run, name) for run in runs)
                      for name in ("effective_share", "largest"))  # fmt: skip
    found.append(
        f"mean over the steps: effective sample size {100 * share:.3g} % of the {what}, largest"
        f" weight {largest:.3g} times the mean one"
    )
    if mixer.token is None and largest > _MOST:
        found.append(
            f"the paper's theory assumes a largest weight of {_MOST:g} times the mean one at most:"
            " raise mix.temperature to come back to it"
        )
    if mixer.token is None and mixer.proxy.sequences < _FEW_SEQUENCES:
        found.append(
            f"{mixer.proxy.sequences} sequences in a step: the smallest and the largest loss of so"
            f" few are noise; set mix.proxy.sequences to {_FEW_SEQUENCES} or more"
        )
    if len(runs) > 1:
        widest = max(factors, key=lambda name: max(factors[name]) - min(factors[name]))
        spread = max(factors[widest]) - min(factors[widest])
        found.append(f"over {len(runs)} seeds mean weights differ by {spread:.3g} ({widest})")
    if unseen:
        found.append(f"no sequence to learn from, so no weight: {', '.join(unseen)}")
    found += sorted({note for run in runs for note in run.facts["notes"]})
    return tuple(note for note in found if note)
