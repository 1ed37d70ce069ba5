"""What mixers that train proxies refuse before they train, and what they say first afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from tiny_models import byte_tokenizer, save_language_model

from curate.cli import main
from curate.config import plain
from curate.errors import ConfigError, CurateError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
DOMAINS = ("law", "maths", "news")
PROXY: dict[str, Any] = {"steps": 4, "sequences": 12, "length": 32, "held_out": 2}


def write_inputs(root: Path, *, wanted: str = "maths") -> None:
    """20 texts of each domain; the target has all of one, and a few of its own."""
    rows = [(f"{name} {row} of {'abc' * 12}", name) for name in DOMAINS for row in range(20)]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_parquet(root / "rows.parquet")
    own = [f"something else {row} {'xyz' * 10}" for row in range(8)]
    texts = [text for text, name in rows if name == wanted] + own
    pl.DataFrame({"text": texts}).write_parquet(root / "target.parquet")
    save_language_model(root / "model", tokenizer=byte_tokenizer(merges=False))


def settings_of(root: Path, mixer: str, **mix: Any) -> Settings:
    proxy = PROXY | mix.pop("proxy", {})
    return parse_settings(
        {
            "run": str(root / "run"),
            "sources": {
                "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
            },
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": 32},
            "model": {"name": str(root / "model"), "device": "cpu"},
            "index": {"held_out": 0.1},
            "mix": {"mixer": mixer, "proxy": proxy, **mix},
        }
    )


@pytest.mark.parametrize(
    ("mixer", "options"),
    [("doge", {}), ("dga", {"every": 2, "sequences": 2}), ("scalebio", {"lr": 0.1})],
)
def test_a_domain_that_stands_wholly_in_the_target_is_told_first(
    tmp_path: Path, mixer: str, options: dict[str, Any]
):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path, mixer, **options)
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    first, *rest = summary["notes"]
    assert first == (
        "the domain maths stands wholly in the target, so nothing of it is left to train on and it"
        " gets no weight: take it out of the target or the pool"
    )
    assert not any("so no weight" in note for note in rest)
    rows = {row["domain"]: row for row in summary["domains"]}
    assert rows["maths"]["weight"] == 0
    assert "it stands wholly in the target" in rows["maths"]["why"]
    assert rows["law"]["weight"] > 0


LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("mixer", "mix", "named"),
    [
        ("doge", {"proxy": {"model": {"model_type": "lama"}}}, "mix.proxy.model.model_type 'lama'"),
        ("doremi", {"proxy": {"model": LLAMA | {"heads": 2}}}, "mix.proxy.model.heads"),
        ("dga", {"proxy": {"model": {"hidden_size": 2}}}, "mix.proxy.model names no model_type"),
        ("doremi", {"reference": {"models": [LLAMA, {"model_type": "lama"}]}},
         "mix.reference.models[1].model_type"),
        ("doremi", {"reference": {"shares": {"mathes": 1.0}}},
         "mix.reference.shares gives a share to 'mathes'"),
        ("loss_reweighting", {"shares": {"mathes": 1.0}}, "mix.shares gives a share to 'mathes'"),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_no_proxy_can_start_from(
    tmp_path: Path, mixer: str, mix: dict[str, Any], named: str
):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path, mixer, **mix)
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError) as refused:
        plan_mix(settings)
    assert named in str(refused.value)
    assert "model.config" not in str(refused.value)


@pytest.mark.parametrize("mixer", ["doge", "dga", "scalebio"])
def test_a_dry_run_refuses_a_target_that_is_not_there(tmp_path: Path, mixer: str):
    write_inputs(tmp_path)
    (tmp_path / "target.parquet").unlink()
    settings = settings_of(tmp_path, mixer)
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError) as refused:
        plan_mix(settings)
    assert refused.value.what.startswith("target.path ")
    assert "sources." not in str(refused.value)


def test_sizes_that_no_model_can_have_are_of_the_proxy(tmp_path: Path):
    write_inputs(tmp_path)
    model = LLAMA | {"hidden_size": 15}
    settings = settings_of(tmp_path, "loss_reweighting", proxy={"model": model})
    index_run(settings, pool=INLINE)
    with pytest.raises(CurateError, match=r"mix\.proxy\.model"):
        mix_run(settings, pool=INLINE)


def test_a_negative_time_between_states_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"mix\.proxy\.resume_every_seconds"):
        settings_of(tmp_path, "doge", proxy={"resume_every_seconds": -1})


def test_many_phases_are_told_by_their_mean_and_ends_and_what_a_basis_leaves_out(tmp_path: Path):
    write_inputs(tmp_path, wanted="none")
    basis = {"one": {"law": 1.0}, "two": {"maths": 1.0}}
    proxy = {"steps": 12}
    settings = settings_of(tmp_path, "dga", every=2, sequences=2, basis=basis, proxy=proxy)
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    assert len(summary["phases"]) > 3
    for row in summary["domains"]:
        assert " then " not in row["why"]
        assert f"on average {100 * row['weight']:.3g} % (first " in row["why"]
        assert f"{sum(row['epochs']):.3g} epochs" in row["why"]
    assert "no distribution of mix.basis has these domains: news" in summary["notes"]


@pytest.mark.parametrize(("steps", "is_told"), [(4, True), (20, False)])
def test_weights_that_had_no_step_to_move_in_are_told(tmp_path: Path, steps: int, is_told: bool):
    write_inputs(tmp_path, wanted="none")
    proxy = {"steps": steps, "model": LLAMA | {"num_hidden_layers": 1, "intermediate_size": 16}}
    reference = {"seeds": [0]}
    settings = settings_of(tmp_path, "doremi", proxy=proxy, reference=reference, warm_share=0.9)
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    told = [note for note in summary["notes"] if "the weights stayed uniform" in note]
    assert bool(told) == is_told
    weights = [row["weight"] for row in summary["domains"]]
    assert (weights == pytest.approx([1 / 3] * 3)) == is_told


@pytest.mark.parametrize(
    ("model", "target", "named"),
    [
        ({"model_type": "lama"}, "target.parquet", "mix.proxy.model.model_type 'lama'"),
        (LLAMA, "missing.parquet", "target.path "),
    ],
)
@pytest.mark.parametrize("command", ["mix", "run"])
def test_before_there_is_an_index_the_command_refuses_too(
    tmp_path: Path,
    command: str,
    model: dict[str, Any],
    target: str,
    named: str,
    capsys: pytest.CaptureFixture[str],
):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path, "doge", proxy={"model": model})
    assert settings.target is not None
    moved = replace(settings.target, path=str(tmp_path / target))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plain(replace(settings, target=moved))))
    assert main([command, str(config), "--dry-run"]) == 2
    assert named in capsys.readouterr().err
