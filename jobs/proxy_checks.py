"""What is refused before the first of many proxies trains: too many of them, or nothing to fit."""

from collections.abc import Iterable
from pathlib import Path

from curate.data.example import HELD_OUT
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError, counted
from jobs.lengths import lengths_digest
from jobs.mix import domain_sizes
from jobs.settings import Settings
from mixers.proxy_settings import Proxy

MOST_RUNS = 1000
"""More proxies are trained only where their number stands in the settings."""


def check_num_runs(num_runs: int, num_domains: int, *, can_be_set: bool) -> None:
    """Refuse more proxies than anyone would have expected.

    Args:
        num_runs: that would be trained.
        num_domains: which are the reason.
        can_be_set: whether `mix.runs` decides their number.

    Raises:
        ConfigError: says how many.
    """
    if num_runs <= MOST_RUNS:
        return
    own = "set mix.runs to as many as you want, " if can_be_set else ""
    raise ConfigError(
        f"{counted(num_runs, 'proxy', 'proxies')} would be trained for"
        f" {counted(num_domains, 'domain')}",
        fix=f"{own}make fewer domains (`domains: {{clusters: 20}}`), or take a mixer that trains"
        " few proxies, such as doremi",
    )


def domains_with_losses(settings: Settings, proxy: Proxy, domains: Iterable[str]) -> list[str]:
    """Those of the domains that have held-out tokens, as the index says; others have no loss.

    Raises:
        InputError: none has, or tokens were not counted yet.
    """
    found: list[str] = []
    if proxy.held_out:
        run = RunFolder(Path(settings.run))
        sizes = domain_sizes(run, lengths_digest(settings), split=HELD_OUT)
        found = [name for name in domains if name in sizes and sizes[name].num_tokens > 0]
    if not found:
        raise InputError(
            "no domain has held-out tokens, so that proxies have no losses",
            fix="raise index.held_out or mix.proxy.held_out",
        )
    return found


def check_all_have_losses(settings: Settings, proxy: Proxy, domains: Iterable[str]) -> None:
    """Refuse a domain whose loss could not be measured.

    Raises:
        InputError: names it.
    """
    wanted = list(domains)
    known = set(domains_with_losses(settings, proxy, wanted))
    silent = [name for name in wanted if name not in known]
    if silent:
        raise no_loss(silent)


def no_loss(silent: list[str]) -> InputError:
    """What is wrong with domains without held-out sequences."""
    more = f" (nor have {len(silent) - 1:,} more)" if len(silent) > 1 else ""
    return InputError(
        f"the domain {silent[0]!r} has no held-out sequences{more}, and its law needs a loss",
        fix="raise index.held_out, or join the domain with another",
    )
