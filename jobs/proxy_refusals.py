"""Settings of proxies that are refused before anything is made or trained, by `--dry-run` too."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curate.data.layout import RunFolder
from curate.data.tables import read_examples
from curate.errors import ConfigError
from curate.models.scratch import check_config
from jobs.settings import Settings
from mixers.basis import simplex


@contextmanager
def model_named(where: str) -> Generator[None]:
    """Whatever is wrong with `model.config` within is wrong with the setting `where`.

    Raises:
        ConfigError: the same, under that name.
    """
    try:
        yield
    except ConfigError as error:
        what, fix = (text.replace("model.config", where) for text in (error.what, error.fix))
        raise ConfigError(what, fix=fix) from error


def check_proxy_model(config: Mapping[str, Any] | None, where: str = "mix.proxy.model") -> None:
    """Refuse a proxy's configuration that no model can be made of.

    Raises:
        ConfigError: it names no known model type, or has an unknown field.
    """
    if config is not None:
        with model_named(where):
            check_config(config)


def check_shares(settings: Settings, shares: str | Mapping[str, float], where: str) -> None:
    """Refuse shares of domains that the index does not have.

    Raises:
        ConfigError: a domain is unknown, a share negative, or none is above 0.
    """
    if not isinstance(shares, str):
        simplex(shares, indexed_domains(settings), what=where)


def indexed_domains(settings: Settings) -> list[str]:
    """Domains of all rows of the index, in order of name."""
    run, found = RunFolder(Path(settings.run)), set[str]()
    for part in run.partitions():
        found |= set(read_examples(run, part, ["domain"])["domain"].unique())
    return sorted(found)
