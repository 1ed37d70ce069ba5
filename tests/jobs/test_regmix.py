"""RegMix from beginning to end: proxies as tasks, a killed one, diverged ones, results in files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_models import LLAMA, byte_tokenizer

from curate.data.files import read_json
from curate.errors import ConfigError, DivergedError, InputError
from jobs import proxy_results
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.lengths import lengths_run
from jobs.mix import mix_run, mixer_for, plan_mix
from jobs.mix_passes import mix_passes
from jobs.run import Task
from jobs.settings import Settings, parse_settings
from mixers.mixture_results import read_runs
from tests.jobs.scored_run import bytes_of

INLINE = Pool(InlineExecutor(), 1)
LETTERS = {"high": "ABCDEFGH", "low": "abcdefgh", "sums": "01234567"}
SMALL = {**LLAMA, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
PROXY: dict[str, Any] = {
    "steps": 15, "sequences": 8, "length": 32, "lr": 0.02, "held_out": 16,
    "model": {"model_type": "llama", **SMALL},
}  # fmt: skip


def settings_of(root: Path, *, rows: int = 420, **mix: Any) -> Settings:
    """Three domains of different letters; the index is made."""
    generator = np.random.default_rng(0)
    made = [
        {"text": "".join(generator.choice(list(letters), 30)), "topic": name}
        for name, letters in LETTERS.items()
        for _ in range({"high": 120, "low": 60, "sums": 30}[name])
    ]
    pl.DataFrame(made[:rows]).write_parquet(root / "rows.parquet")
    byte_tokenizer(merges=False).save_pretrained(root / "tokenizer")
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {
                "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
            },
            "task": {"kind": "causal-lm", "max_tokens": 32},
            "model": {"tokenizer": str(root / "tokenizer"), "device": "cpu"},
            "index": {"held_out": 0.2},
            "plan": {"keep": 0.5},
            "mix": {"mixer": "regmix", "runs": 8, "proxy": PROXY, **mix},
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def tasks_of(settings: Settings) -> list[Task]:
    name, mixer = mixer_for(settings)
    return mix_passes(settings, name, mixer).tasks


def test_proxies_are_fitted_and_the_mixture_found_is_checked(tmp_path: Path):
    settings = settings_of(tmp_path)
    summary = mix_run(settings, pool=INLINE)
    folder = tmp_path / "run" / "mixtures" / "regmix"
    runs = read_runs([folder / "runs.parquet"])
    assert runs.names == ("natural", "uniform", *(f"draw-{n:03d}" for n in range(1, 7)))
    assert runs.domains == runs.targets == ("high", "low", "sums")
    np.testing.assert_allclose(runs.mixtures[1], 1 / 3, atol=0.02)
    # Other letters: nothing is learned of a domain that a run does not have.
    for at in range(3):
        most, least = runs.mixtures[:, at].argmax(), runs.mixtures[:, at].argmin()
        assert runs.losses[most, at] < runs.losses[least, at] - 0.2
    facts = read_json(folder / "fits.json")
    assert facts["num_runs"] == 8
    assert facts["measured"]["natural"] == pytest.approx(runs.losses[0].mean())
    result = read_json(tmp_path / "run" / "proxies" / "regmix" / "check" / "result.json")
    assert facts["measured"]["mixture"] == pytest.approx(np.mean(list(result["held_out"].values())))
    weights = {entry["domain"]: entry["weight"] for entry in summary["domains"]}
    shares = np.array([result["num_tokens"][name] for name in weights], dtype=float)
    np.testing.assert_allclose(shares / shares.sum(), list(weights.values()), atol=0.02)
    assert any("a proxy on this mixture measured" in note for note in summary["notes"])
    assert any("8 runs are few for 3 domains" in note for note in summary["notes"])
    assert plan_mix(settings).done == plan_mix(settings).total == 1 + 1 + 8 + 1


def test_it_goes_on_where_it_stopped_and_runs_outlive_another_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    mix_run(settings_of(tmp_path / "whole"), pool=INLINE)
    broken = settings_of(tmp_path / "broken")
    real, trained = proxy_results.train_proxy, list[str]()

    def stops(payload: dict[str, Any]) -> dict[str, Any]:
        trained.append(payload["name"])
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(payload)

    monkeypatch.setattr(proxy_results, "train_proxy", stops)
    with pytest.raises(KeyboardInterrupt):
        mix_run(broken, pool=INLINE)
    assert trained == ["natural", "uniform", "draw-001", "draw-002"]
    mix_run(broken, pool=INLINE)
    assert trained[4:] == [*(f"draw-{n:03d}" for n in range(2, 7)), "check"]
    for file in ("mixture.json", "fits.json", "runs.parquet"):
        one, two = (
            (tmp_path / which / "run" / "mixtures" / "regmix" / file).read_bytes()
            for which in ("whole", "broken")
        )
        assert one == two
    other = replace(broken, mix={**broken.mix, "target": {"low": 1.0}})
    assert plan_mix(other).done == 1 + 8
    mix_run(other, pool=INLINE)
    assert trained[10:] == ["check"]


def test_more_runs_make_only_the_new_ones_due(tmp_path: Path):
    few = settings_of(tmp_path, check=False)
    lengths_run(few, pool=INLINE)
    many = replace(few, mix={**few.mix, "runs": 40})
    one, other = (
        [(task.name, task.fingerprint) for task in tasks_of(each)] for each in (few, many)
    )
    # The first task makes the sequences.
    assert len(one) == 1 + 8
    assert len(other) == 1 + 40
    assert other[: len(one)] == one


def test_a_diverged_proxy_is_set_aside_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = settings_of(tmp_path, check=False)
    real = proxy_results.train_proxy

    def diverges(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["name"] in ("draw-002", "draw-005"):
            raise DivergedError("the loss of domain low at step 3 is nan", fix="lower lr")
        return real(payload)

    monkeypatch.setattr(proxy_results, "train_proxy", diverges)
    summary = mix_run(settings, pool=INLINE)
    assert any("2 of 8 proxies diverged, set aside: draw-002, draw-005" in note
               for note in summary["notes"])  # fmt: skip
    runs = read_runs([tmp_path / "run" / "mixtures" / "regmix" / "runs.parquet"])
    assert len(runs.names) == 6
    before = bytes_of(tmp_path / "run" / "proxies")
    mix_run(settings, pool=INLINE)
    assert bytes_of(tmp_path / "run" / "proxies") == before


def test_too_few_or_no_proxies_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = settings_of(tmp_path, check=False)
    real = proxy_results.train_proxy

    def diverges(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["name"].startswith("draw"):
            raise DivergedError("the loss of domain low at step 3 is nan", fix="lower lr")
        return real(payload)

    monkeypatch.setattr(proxy_results, "train_proxy", diverges)
    with pytest.raises(InputError, match="2 runs are too few") as caught:
        mix_run(settings, pool=INLINE)
    assert "6 of 8 proxies diverged" in caught.value.what


def test_learning_rates_beyond_all_reason_are_named_as_such(tmp_path: Path):
    settings = settings_of(tmp_path, proxy={**PROXY, "lr": 1e30, "warmup": 0.0})
    with pytest.raises(InputError, match="all proxies diverged; natural: the loss of") as caught:
        mix_run(settings, pool=INLINE)
    assert "lower mix.proxy.lr" in caught.value.fix


@pytest.mark.parametrize(
    ("mix", "rows", "message"),
    [
        ({"runs": 5}, 420, "mix.runs is 5, too few for 3"),
        ({}, 100, "one domain with training"),
        ({"target": {"hihg": 1.0}}, 420, "mix.target names 'hihg', which is no loss"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_training(
    tmp_path: Path, mix: dict[str, Any], rows: int, message: str
):
    settings = settings_of(tmp_path, rows=rows, **mix)
    with pytest.raises(ConfigError, match=message):
        mix_run(settings, pool=INLINE)
    assert not (tmp_path / "run" / "proxies" / "regmix").exists()


def test_results_in_files_need_no_training_and_their_content_counts(tmp_path: Path):
    generator = np.random.default_rng(0)
    mixtures = generator.dirichlet(np.ones(3), 16)
    table = pl.DataFrame(
        {
            **{name: mixtures[:, at] for at, name in enumerate(LETTERS)},
            **{f"loss.{name}": 2 + np.exp(-3 * mixtures[:, at]) for at, name in enumerate(LETTERS)},
        }
    )
    path = tmp_path / "runs.csv"
    table.write_csv(path)
    settings = settings_of(tmp_path, results=[str(path)], penalty=0.0)
    assert plan_mix(settings).total == 1
    summary = mix_run(settings, pool=INLINE)
    weights = {entry["domain"]: entry["weight"] for entry in summary["domains"]}
    assert weights == pytest.approx(dict.fromkeys(LETTERS, 1 / 3), abs=1e-4)
    assert not (tmp_path / "run" / "proxies" / "regmix" / "natural").exists()
    fits = json.loads((tmp_path / "run" / "mixtures" / "regmix" / "fits.json").read_text())
    assert fits["fit"] == "log_linear"
    assert plan_mix(settings).done == 1
    table.with_columns(pl.col("loss.high") * 0.1).write_csv(path)
    assert plan_mix(settings).done == 0
    changed = mix_run(settings, pool=INLINE)["domains"][0]
    assert changed["domain"] == "high"
    assert changed["weight"] < 0.3
    path.unlink()
    with pytest.raises(InputError, match="there is no file of results"):
        mix_run(settings, pool=INLINE)
