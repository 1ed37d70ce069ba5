"""`curate mix` with ScaleBiO: three made-up sources of questions, one of them like the target."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import byte_tokenizer, save_language_model

from curate.errors import ConfigError, CurateError
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
PROXY: dict[str, Any] = {
    "steps": 60,
    "sequences": 12,
    "packed": False,
    "lr": 5e-3,
    "held_out": 4,
}
SOURCES = ("long", "noise", "vowels")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def example(source: str, row: int) -> tuple[str, str]:
    """`vowels` answers with four of them, `noise` with any letters, `long` with the alphabet."""
    draw = random.Random(f"{source} {row}")
    question = "".join(draw.choices(LETTERS, k=3)) + "?"
    if source == "long":
        return question, LETTERS[:16]
    return question, "".join(draw.choices("aeiou" if source == "vowels" else LETTERS, k=4))


def write_inputs(root: Path) -> None:
    """40 examples of each source, and 80 of the target."""
    rows = [(*example(name, row), name) for name in SOURCES for row in range(40)]
    schema = ["prompt", "response", "topic"]
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(root / "rows.parquet")
    wanted = [example("vowels", row) for row in range(100, 180)]
    pl.DataFrame(wanted, schema=schema[:2], orient="row").write_parquet(root / "target.parquet")
    save_language_model(root / "model", tokenizer=byte_tokenizer(merges=False))


def values_of(root: Path, *, run: str = "run", **mix: Any) -> dict[str, Any]:
    proxy = PROXY | mix.pop("proxy", {})
    fields = {"prompt": "prompt", "response": "response"}
    return {
        "run": str(root / run),
        "sources": {"rows": {"path": str(root / "rows.parquet"), **fields, "domain": "topic"}},
        "target": {"path": str(root / "target.parquet"), **fields},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(root / "model"), "device": "cpu"},
        "index": {"held_out": 0.1, "partition_rows": 50},
        "mix": {"mixer": "scalebio", "lr": 0.1, "proxy": proxy, **mix},
    }


def settings_of(root: Path, *, run: str = "run", **mix: Any) -> Settings:
    return parse_settings(values_of(root, run=run, **mix))


def mixed(settings: Settings) -> dict[str, Any]:
    index_run(settings, pool=INLINE)
    return mix_run(settings, pool=INLINE)


def result(root: Path, seed: int = 0, *, run: str = "run") -> dict[str, Any]:
    path = root / run / "proxies" / "scalebio" / f"seed-{seed}" / "result.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_weights_of_examples_become_shares_of_tokens(tmp_path: Path):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path)
    summary = mixed(settings)
    weights = result(tmp_path)["mixture"]
    assert max(weights, key=lambda name: weights[name]) == "vowels"
    rows = {row["domain"]: row for row in summary["domains"]}
    tokens = {n: weights[n] * row["tokens"] / row["examples"] for n, row in rows.items()}
    total = sum(tokens.values())
    for name, row in rows.items():
        assert row["weight"] == pytest.approx(tokens[name] / total)
        assert f"ScaleBiO's weight of {weights[name]:.3g} of the examples" in row["why"]
    assert rows["long"]["weight"] > weights["long"]
    table = pl.read_parquet(tmp_path / "run" / "mixtures" / "scalebio" / "trajectory.parquet")
    late = table.filter(pl.col("step") > 30).group_by("domain").agg(pl.col("weight").mean())
    # The table has the weights before each step.
    assert dict(late.iter_rows()) == pytest.approx(weights, abs=0.03)
    state = plan_mix(settings)
    assert state.done == state.total
    assert mix_run(settings, pool=INLINE) == summary


def test_packed_windows_are_shares_of_tokens_already(tmp_path: Path):
    write_inputs(tmp_path)
    proxy = {"packed": True, "length": 24, "steps": 6}
    summary = mixed(settings_of(tmp_path, proxy=proxy, lr=0.5))
    weights = {row["domain"]: row["weight"] for row in summary["domains"]}
    assert weights == pytest.approx(result(tmp_path)["mixture"])
    assert all("of the windows" in row["why"] for row in summary["domains"])


def test_several_seeds_are_averaged_and_their_spread_is_told(tmp_path: Path):
    write_inputs(tmp_path)
    summary = mixed(
        settings_of(tmp_path, seeds=[0, 1], lr=0.5, target_sequences=150, proxy={"steps": 6})
    )
    runs = [result(tmp_path, seed)["mixture"] for seed in (0, 1)]
    assert runs[0] != runs[1]
    assert any("over 2 seeds" in note for note in summary["notes"])
    assert any("sequences of the target were gone through" in n for n in summary["notes"])
    mean = (runs[0]["vowels"] + runs[1]["vowels"]) / 2
    assert any(f"weight of {mean:.3g} (" in row["why"] for row in summary["domains"])


def test_a_model_from_scratch_with_lisa(tmp_path: Path):
    write_inputs(tmp_path)
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = {"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 2, **fields}
    summary = mixed(
        settings_of(
            tmp_path, lr=0.5, lisa={"blocks": 2, "every": 3}, proxy={"steps": 8, "model": model}
        )
    )
    assert sum(row["weight"] for row in summary["domains"]) == pytest.approx(1.0)
    with pytest.raises(CurateError, match="but the model has 4 blocks"):
        mixed(settings_of(tmp_path, lisa={"blocks": 5}, proxy={"steps": 8, "model": model}))


def test_an_adapter_on_a_given_checkpoint(tmp_path: Path):
    pytest.importorskip("peft")
    write_inputs(tmp_path)
    values = values_of(tmp_path, lr=0.5, proxy={"steps": 6, "keep_model": True})
    values["model"]["lora"] = {"rank": 2, "dropout": 0.1}
    summary = mixed(parse_settings(values))
    assert sum(row["weight"] for row in summary["domains"]) == pytest.approx(1.0)
    kept = tmp_path / "run" / "proxies" / "scalebio" / "seed-0" / "model"
    assert (kept / "adapter_model.safetensors").exists()


def test_no_target_too_low_a_rate_and_few_sequences_are_told(tmp_path: Path):
    write_inputs(tmp_path)
    values = values_of(tmp_path)
    index_run(parse_settings(values), pool=INLINE)
    with pytest.raises(ConfigError, match="target"):
        mix_run(parse_settings({**values, "target": None}), pool=INLINE)
    few = {"steps": 6, "sequences": 6}
    summary = mixed(settings_of(tmp_path, run="slow", lr=0.01, proxy=few))
    assert any("lr is 0.01, below 3 / steps = 0.5" in note for note in summary["notes"])
    assert any("2 sequences of each source" in note for note in summary["notes"])


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path):
    write_inputs(tmp_path)
    commands: dict[str, list[str]] = {}
    for run in ("whole", "killed"):
        values = values_of(
            tmp_path, run=run, lisa={"blocks": 1, "every": 5}, proxy={"resume_every_seconds": 0.0}
        )
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        commands[run] = curate_command("mix", path)
        run_to_end(curate_command("index", path))
    run_to_end(commands["whole"])
    folder = tmp_path / "killed" / "proxies" / "scalebio" / "seed-0"
    for delay in (0.1, 0.3):
        assert is_killed(
            commands["killed"], lambda: found(folder, "resume/state*") > 0, delay=delay
        )
    run_to_end(commands["killed"])
    for name in ("result.json", "trajectory.parquet", "held_out.parquet"):
        files = [tmp_path / run / "proxies/scalebio/seed-0" / name for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
