"""What regmix and dmo refuse before any proxy trains: thousands of runs, and losses of nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import LLAMA, byte_tokenizer

from curate.errors import ConfigError, InputError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.lengths import lengths_run
from jobs.mix import mix_run, plan_mix
from jobs.proxy_checks import check_num_runs
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)


def settings_of(root: Path, rows: Mapping[str, int], mix: Any, held_out: float = 0.2) -> Settings:
    """So many examples of each domain, indexed and their tokens counted."""
    generator = np.random.default_rng(0)
    made = [
        {"text": "".join(generator.choice(list("abcdefgh"), 30)), "topic": name}
        for name, count in rows.items()
        for _ in range(count)
    ]
    pl.DataFrame(made).write_parquet(root / "rows.parquet")
    byte_tokenizer(merges=False).save_pretrained(root / "tokenizer")
    proxy = {"steps": 2, "length": 32, "model": {"model_type": "llama", **LLAMA}}
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {
                "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
            },
            "task": {"kind": "causal-lm", "max_tokens": 32},
            "model": {"tokenizer": str(root / "tokenizer"), "device": "cpu"},
            "index": {"held_out": held_out},
            "mix": {**mix, "proxy": {**proxy, **mix.get("proxy", {})}},
        }
    )
    index_run(settings, pool=INLINE)
    lengths_run(settings, pool=INLINE)
    return settings


@pytest.mark.parametrize(
    ("mixer", "num_runs", "fix"), [("regmix", 3 * 1001, "mix.runs"), ("dmo", 4001, "clusters: 20")]
)
def test_a_thousand_domains_are_refused_with_the_number_of_runs(
    tmp_path: Path, mixer: str, num_runs: int, fix: str
):
    rows = {f"d{n:04d}": 1 for n in range(1000)}
    settings = settings_of(tmp_path, rows, {"mixer": mixer}, held_out=0.0)
    for command in (plan_mix, lambda given: mix_run(given, pool=INLINE)):
        with pytest.raises(ConfigError, match=f"{num_runs:,} proxies would be trained") as caught:
            command(settings)
        assert "for 1,000 domains" in caught.value.what
        assert fix in caught.value.fix
    assert not (tmp_path / "run" / "proxies").exists()


def test_the_limit_holds_only_beyond_a_thousand_runs():
    check_num_runs(1000, 300, can_be_set=True)
    with pytest.raises(ConfigError, match="1,001 proxies would be trained for 250 domains"):
        check_num_runs(1001, 250, can_be_set=False)


def test_dmo_refuses_a_domain_without_held_out_tokens_before_anything_trains(tmp_path: Path):
    rows = {"one": 40, "other": 40, "so\nrare": 1}
    settings = settings_of(tmp_path, rows, {"mixer": "dmo"})
    with pytest.raises(InputError, match=r"the domain 'so\\nrare' has no held-out") as caught:
        mix_run(settings, pool=INLINE)
    assert "raise index.held_out" in caught.value.fix
    assert any("no held-out sequences" in reason for reason in plan_mix(settings).why)
    assert not (tmp_path / "run" / "proxies").exists()


@pytest.mark.parametrize(("held_out", "proxy"), [(0.0, {}), (0.2, {"held_out": 0})])
def test_regmix_refuses_where_nothing_is_held_out(
    tmp_path: Path, held_out: float, proxy: dict[str, Any]
):
    mix = {"mixer": "regmix", "proxy": proxy}
    settings = settings_of(tmp_path, {"one": 40, "other": 40}, mix, held_out)
    with pytest.raises(InputError, match="no domain has held-out tokens"):
        mix_run(settings, pool=INLINE)
    assert not (tmp_path / "run" / "proxies").exists()
