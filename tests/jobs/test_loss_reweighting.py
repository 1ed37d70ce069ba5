"""`curate mix` with weights from losses, on texts of three made-up domains, one of them noise."""

import io
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import byte_tokenizer, save_language_model

from curate.data.files import digest_file
from curate.errors import ConfigError, CurateError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.opening import open_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOMAINS = ("alphabet", "noise", "vowels")
PROXY: dict[str, Any] = {"steps": 30, "sequences": 16, "length": 32, "lr": 1e-2, "held_out": 4}


def text_of(domain: str, row: int) -> str:
    """`alphabet` goes up, `vowels` has few letters, `noise` any."""
    draw = random.Random(f"{domain} {row}")
    if domain == "alphabet":
        first = draw.randrange(26)
        return "".join(LETTERS[(first + place) % 26] for place in range(60))
    pool = LETTERS + "0123456789#?!" if domain == "noise" else "aeiou"
    return "".join(draw.choices(pool, k=60 if domain == "noise" else 20))


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    rows = [(text_of(name, row), name) for name in DOMAINS for row in range(40)]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_parquet(
        tmp_path / "rows.parquet"
    )
    save_language_model(tmp_path / "model", tokenizer=byte_tokenizer(merges=False))


def values_of(root: Path, *, run: str = "run", **mix: Any) -> dict[str, Any]:
    proxy = PROXY | mix.pop("proxy", {})
    return {
        "run": str(root / run),
        "sources": {
            "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
        },
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(root / "model"), "device": "cpu"},
        "index": {"held_out": 0.1, "partition_rows": 50},
        "mix": {"mixer": "loss_reweighting", "proxy": proxy, **mix},
    }


def mixed(root: Path, **more: Any) -> tuple[dict[str, float], dict[str, Any], Settings]:
    """Domain -> weight, the whole summary, and the settings."""
    settings = parse_settings(values_of(root, **more))
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    return {row["domain"]: row["weight"] for row in summary["domains"]}, summary, settings


def result_of(root: Path, *, run: str = "run", seed: int = 0) -> dict[str, Any]:
    folder = root / run / "proxies" / "loss_reweighting" / f"seed-{seed}"
    return json.loads((folder / "result.json").read_text())


def test_the_mixture_is_the_shares_times_mean_weights_and_says_so(tmp_path: Path):
    weights, summary, settings = mixed(tmp_path, shares="uniform")
    assert sum(weights.values()) == pytest.approx(1.0)
    noise = next(name for name in weights if name.endswith("noise"))
    assert weights[noise] > 1 / 3
    path = tmp_path / "run" / "mixtures" / "loss_reweighting" / "trajectory.parquet"
    table = pl.read_parquet(path)
    assert {"run", "step", "weight", "factor", "effective_share", "largest"} <= set(table.columns)
    means = dict(table.group_by("domain").agg(pl.col("factor").mean()).iter_rows())
    total = sum(means.values())
    # Shares of tokens are equal, and the sequences' own are nearly so.
    assert weights == pytest.approx({name: own / total for name, own in means.items()}, rel=0.02)
    told = " ".join(summary["notes"])
    assert "by-product" in told
    assert "effective sample size" in told
    assert "16 sequences in a step" in told
    assert all("times a mean weight of its examples of" in row["why"] for row in summary["domains"])
    state = plan_mix(settings)
    assert state.done == state.total
    assert mix_run(settings, pool=INLINE) == summary


def test_within_domains_the_mixture_is_natural_and_seeds_are_told(tmp_path: Path):
    weights, summary, _ = mixed(tmp_path, within_domain=True, seeds=[0, 1], proxy={"steps": 6})
    tokens = {row["domain"]: row["tokens"] for row in summary["domains"]}
    total = sum(tokens.values())
    # The first token of a window counts for nothing, so that shares differ a little.
    assert weights == pytest.approx({name: own / total for name, own in tokens.items()}, rel=0.05)
    assert result_of(tmp_path) != result_of(tmp_path, seed=1)
    told = " ".join(summary["notes"])
    assert "every domain keeps its share" in told
    assert "over 2 seeds" in told


def test_a_low_temperature_is_beyond_the_theory_and_that_is_told(tmp_path: Path):
    _, summary, _ = mixed(
        tmp_path, strategy="quadratic", temperature=0.2, uniform_share=0.0, proxy={"steps": 6}
    )
    assert any("raise mix.temperature" in note for note in summary["notes"])


def test_token_weights_and_given_shares(tmp_path: Path):
    shares = {"noise": 3.0, "vowels": 1.0}
    weights, summary, _ = mixed(tmp_path, token="tldr", shares=_named(tmp_path, shares))
    by_end = {name.split("/")[-1]: own for name, own in weights.items()}
    assert by_end["alphabet"] == 0
    assert by_end["noise"] > 0.75  # TLDR favours what is unlikely
    assert any("no sequence of it was drawn" in row["why"] for row in summary["domains"])
    assert any("weights of tokens" in note for note in summary["notes"])


def _named(root: Path, shares: dict[str, float]) -> dict[str, float]:
    """With the names that domains have in the run."""
    settings = parse_settings(values_of(root))
    index_run(settings, pool=INLINE)
    names = [row["domain"] for row in mix_run(
        parse_settings({**values_of(root), "mix": {"mixer": "natural"}}), pool=INLINE
    )["domains"]]  # fmt: skip
    return {next(n for n in names if n.endswith(name)): own for name, own in shares.items()}


def test_unknown_domains_and_a_missing_model_are_refused(tmp_path: Path):
    with pytest.raises(CurateError, match="noize"):
        mixed(tmp_path, shares={"noize": 1.0})
    values = {**values_of(tmp_path), "model": {}}
    with pytest.raises(ConfigError, match="no model to train"):
        mix_run(parse_settings(values), pool=INLINE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twice_it_ends_in_the_same_bytes(tmp_path: Path):
    configs: list[Path] = []
    for run in ("whole", "killed"):
        proxy = {"steps": 100, "resume_every_seconds": 0.0}
        path = tmp_path / f"{run}.yaml"
        values = values_of(tmp_path, run=run, robust=True, proxy=proxy)
        path.write_text(yaml.safe_dump(values))
        configs.append(path)
        with open_run(parse_settings(values), command="index") as settings:
            index_run(settings, pool=INLINE)
    whole, killed = configs
    run_to_end(curate_command("mix", whole))
    folder = tmp_path / "killed" / "proxies" / "loss_reweighting" / "seed-0"
    for step in (20, 60):

        def moment(least: int = step) -> bool:
            if not found(folder, "trajectory.parquet"):
                return False
            # Read at once: the file is replaced all the time.
            held = io.BytesIO((folder / "trajectory.parquet").read_bytes())
            return len(pl.read_parquet(held)) >= len(DOMAINS) * least

        assert is_killed(curate_command("mix", killed), moment)
    run_to_end(curate_command("mix", killed))
    for name in ("trajectory.parquet", "mixture.json"):
        paths = [tmp_path / run / "mixtures" / "loss_reweighting" / name
                 for run in ("whole", "killed")]  # fmt: skip
        assert digest_file(paths[0]) == digest_file(paths[1]), name
