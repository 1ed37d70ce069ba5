"""`curate mix` with DoGE on texts of four made-up domains, one of them like the target."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from killed import curate_command, is_killed, run_to_end
from tiny_models import byte_tokenizer, save_language_model

from curate.errors import ConfigError, CurateError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROXY: dict[str, Any] = {"steps": 40, "sequences": 16, "length": 32, "lr": 1e-2, "held_out": 4}


def text_of(domain: str, row: int) -> str:
    """`alphabet` goes up, `backwards` down, `vowels` has few letters, `noise` any."""
    draw = random.Random(f"{domain} {row}")
    if domain == "noise":
        return "".join(draw.choices(LETTERS + "0123456789#?!", k=60))
    if domain == "vowels":
        return "".join(draw.choices("aeiou", k=60))
    step = 1 if domain.startswith("alphabet") else -1
    starts = [draw.randrange(26) for _ in range(5)]
    return " ".join("".join(LETTERS[(s + step * i) % 26] for i in range(11)) for s in starts)


DOMAINS = ("alphabet", "backwards", "noise", "vowels")


def write_inputs(root: Path, *, domains: tuple[str, ...] = DOMAINS, target: int = 24) -> None:
    """40 texts of each domain; the first three of the target stand in the pool too."""
    rows = [(text_of(name, row), name) for name in domains for row in range(40)]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_parquet(root / "rows.parquet")
    wanted = [text_of("alphabet", row) for row in [*range(3), *range(100, 100 + target)]]
    pl.DataFrame({"text": wanted}).write_parquet(root / "target.parquet")
    save_language_model(root / "model", tokenizer=byte_tokenizer(merges=False))


def values_of(root: Path, *, run: str = "run", **mix: Any) -> dict[str, Any]:
    proxy = PROXY | mix.pop("proxy", {})
    return {
        "run": str(root / run),
        "sources": {
            "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
        },
        "target": {"path": str(root / "target.parquet"), "text": "text"},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(root / "model"), "device": "cpu"},
        "index": {"held_out": 0.1, "partition_rows": 50},
        "mix": {"mixer": "doge", "kappa": 0.5, "proxy": proxy, **mix},
    }


def settings_of(root: Path, **more: Any) -> Settings:
    return parse_settings(values_of(root, **more))


def mixed(settings: Settings) -> tuple[dict[str, float], dict[str, Any]]:
    """Domain -> weight, and the whole summary."""
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    return {row["domain"]: row["weight"] for row in summary["domains"]}, summary


def test_the_domain_like_the_target_has_the_most_and_shared_texts_are_not_learned(tmp_path: Path):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path)
    weights, summary = mixed(settings)
    assert max(weights, key=lambda name: weights[name]) == "alphabet"
    assert sum(weights.values()) == pytest.approx(1.0)
    assert any("stand in the target too" in n and "alphabet (3)" in n for n in summary["notes"])
    assert all("mean alignment" in row["why"] for row in summary["domains"])
    table = pl.read_parquet(tmp_path / "run" / "mixtures" / "doge" / "trajectory.parquet")
    assert {"run", "step", "domain", "weight", "alignment"} <= set(table.columns)
    means = table.group_by("domain").agg(pl.col("weight").mean()).rows()
    assert dict(means) == pytest.approx(weights)
    state = plan_mix(settings)
    assert state.done == state.total
    assert mix_run(settings, pool=INLINE) == summary


def test_several_seeds_are_averaged_and_their_spread_is_told(tmp_path: Path):
    write_inputs(tmp_path)
    weights, summary = mixed(settings_of(tmp_path, seeds=[0, 1], proxy={"steps": 10}))
    folder = tmp_path / "run" / "proxies" / "doge"
    found = [
        json.loads((folder / f"seed-{seed}" / "result.json").read_text())["mixture"]
        for seed in (0, 1)
    ]
    assert found[0] != found[1]
    for name, weight in weights.items():
        assert weight == pytest.approx((found[0][name] + found[1][name]) / 2)
    assert any("over 2 seeds" in note for note in summary["notes"])


def test_universal_needs_no_target(tmp_path: Path):
    write_inputs(tmp_path)
    (tmp_path / "target.parquet").unlink()
    settings = settings_of(tmp_path, mode="universal", proxy={"steps": 10})
    weights, summary = mixed(settings)
    assert set(weights) == set(DOMAINS)
    assert not any("target too" in note for note in summary["notes"])


def test_few_sequences_of_a_domain_are_told(tmp_path: Path):
    write_inputs(tmp_path)
    _, summary = mixed(settings_of(tmp_path, proxy={"steps": 4, "sequences": 6}))
    assert any("raise mix.proxy.sequences to 16" in note for note in summary["notes"])


def test_no_target_an_empty_one_and_too_many_domains_are_refused(tmp_path: Path):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path)
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError, match="target"):
        mix_run(parse_settings({**values_of(tmp_path), "target": None}), pool=INLINE)
    pl.DataFrame({"text": ["", ""]}).write_parquet(tmp_path / "target.parquet")
    with pytest.raises(CurateError, match="target") as empty:
        mixed(settings_of(tmp_path, run="empty"))
    assert "set aside" in str(empty.value)
    many = tuple(f"alphabet-{number}" for number in range(1000))
    rows = [(text_of("alphabet", row), name) for row, name in enumerate(many)]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(CurateError, match="domains in every step; 128 are the most"):
        mixed(settings_of(tmp_path, run="many", mode="universal"))


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_mixture(tmp_path: Path):
    write_inputs(tmp_path)
    configs: dict[str, Path] = {}
    for run in ("whole", "killed"):
        values = values_of(tmp_path, run=run, proxy={"steps": 60, "resume_every_seconds": 0.05})
        configs[run] = tmp_path / f"{run}.yaml"
        configs[run].write_text(yaml.safe_dump(values))
        run_to_end(curate_command("index", configs[run]))
    run_to_end(curate_command("mix", configs["whole"]))
    folder = tmp_path / "killed" / "proxies" / "doge" / "seed-0"
    state = folder / "resume" / "state.safetensors"
    assert is_killed(curate_command("mix", configs["killed"]), state.exists, delay=0.3)
    assert not (folder / "result.json").exists()
    run_to_end(curate_command("mix", configs["killed"]))
    for name in ("mixture.json", "trajectory.parquet"):
        whole, killed = (
            (tmp_path / run / "mixtures" / "doge" / name).read_bytes() for run in configs
        )
        assert killed == whole, name
