"""`curate mix` with DGA on texts of four made-up domains, one of them like the target."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from killed import curate_command, is_killed, run_to_end
from tiny_models import byte_tokenizer, save_language_model

from curate.data.files import read_json
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, InputError
from curate.plan.mixture import load_mixture
from jobs.cluster import InlineExecutor, Pool
from jobs.domains import domains_run
from jobs.domains_work import centroids_output, names_output
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.opening import open_run
from jobs.representations import open_vectors
from jobs.settings import Settings, parse_settings
from jobs.target import target_folder

INLINE = Pool(InlineExecutor(), 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROXY: dict[str, Any] = {"steps": 40, "sequences": 16, "length": 32, "lr": 1e-2, "held_out": 4}
DOMAINS = ("noise", "upwards", "vowels")


def text_of(domain: str, row: int) -> str:
    """`upwards` follows the alphabet, `vowels` has few letters, `noise` any."""
    draw = random.Random(f"{domain} {row}")
    if domain == "noise":
        return "".join(draw.choices(LETTERS + "0123456789#?!", k=60))
    if domain == "vowels":
        return "".join(draw.choices("aeiou", k=60))
    starts = [draw.randrange(26) for _ in range(5)]
    return " ".join("".join(LETTERS[(s + i) % 26] for i in range(11)) for s in starts)


def write_inputs(root: Path, domains: tuple[str, ...] = DOMAINS, *, rows: int = 40) -> None:
    """Texts of each domain; the first three of the target stand in the pool too."""
    pool = [
        (text_of(name.split("-")[0], place * rows + row if rows == 1 else row), name)
        for place, name in enumerate(domains)
        for row in range(rows)
    ]
    pl.DataFrame(pool, schema=["text", "topic"], orient="row").write_parquet(root / "rows.parquet")
    wanted = [text_of("upwards", row) for row in [*range(3), *range(100, 124)]]
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
        "mix": {"mixer": "dga", "every": 4, "sequences": 4, "proxy": proxy, **mix},
    }


def settings_of(root: Path, **more: Any) -> Settings:
    return parse_settings(values_of(root, **more))


def mixed(settings: Settings) -> tuple[dict[str, float], dict[str, Any]]:
    """Domain -> weight, and the whole summary."""
    index_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    return {row["domain"]: row["weight"] for row in summary["domains"]}, summary


def result_of(root: Path, seed: int = 0) -> dict[str, Any]:
    return read_json(root / "run" / "proxies" / "dga" / f"seed-{seed}" / "result.json")


def test_the_schedule_leads_to_the_domain_like_the_target(tmp_path: Path):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path)
    weights, summary = mixed(settings)
    assert max(weights, key=lambda name: weights[name]) == "upwards"
    assert any("upwards (3)" in note for note in summary["notes"])
    folder = tmp_path / "run" / "mixtures" / "dga"
    mixture = load_mixture(folder / "mixture.json")
    # Measured after 4, 8, ..., 36 steps, and drawn by it one step later.
    shares = [phase.share * 40 for phase in mixture.phases]
    assert shares == pytest.approx([5, *[4] * 8, 3])
    assert mixture.phases[0].weights == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3))
    assert mixture.phases[-1].weights["upwards"] > mixture.phases[1].weights["upwards"]
    table = pl.read_parquet(folder / "trajectory.parquet")
    means = table.group_by("domain").agg(pl.col("weight").mean()).rows()
    assert dict(means) == pytest.approx(weights)
    assert all("mean alignment" in row["why"] for row in summary["domains"])
    state = plan_mix(settings)
    assert state.done == state.total
    assert mix_run(settings, pool=INLINE) == summary


def test_one_phase_is_the_mean_over_the_measurements_and_trains_nothing_anew(tmp_path: Path):
    write_inputs(tmp_path)
    mixed(settings_of(tmp_path))
    trained = (tmp_path / "run" / "proxies" / "dga" / "seed-0" / "result.json").stat().st_mtime_ns
    for phases in (1, 3):
        weights, summary = mixed(settings_of(tmp_path, phases=phases))
        assert len(summary["phases"]) == phases
        if phases == 1:
            assert weights == pytest.approx(result_of(tmp_path)["mixture"])
    path = tmp_path / "run" / "proxies" / "dga" / "seed-0" / "result.json"
    assert path.stat().st_mtime_ns == trained


def test_several_seeds_are_averaged_and_their_spread_is_told(tmp_path: Path):
    write_inputs(tmp_path)
    weights, summary = mixed(settings_of(tmp_path, seeds=[0, 1], phases=1, proxy={"steps": 12}))
    found = [result_of(tmp_path, seed)["mixture"] for seed in (0, 1)]
    assert found[0] != found[1]
    for name, weight in weights.items():
        assert weight == pytest.approx((found[0][name] + found[1][name]) / 2)
    assert any("over 2 seeds" in note for note in summary["notes"])


def test_unpacked_sequences_count_by_their_tokens(tmp_path: Path):
    """All have the same share of the sequences; texts of half the length have half the tokens."""
    write_inputs(tmp_path)
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    is_short = pl.col("topic") == "vowels"
    short = pl.when(is_short).then(pl.col("text").str.slice(0, 16)).otherwise(pl.col("text"))
    rows.with_columns(text=short).write_parquet(tmp_path / "rows.parquet")
    settings = settings_of(tmp_path, every=1000, proxy={"packed": False, "sequences": 15})
    weights, summary = mixed(settings)
    result = result_of(tmp_path)
    tokens = {name: result["num_tokens"][name] for name in DOMAINS}
    for name, weight in weights.items():
        assert weight == pytest.approx(tokens[name] / sum(tokens.values()))
    assert weights["vowels"] < 0.6 * weights["noise"]
    assert any("nothing was measured" in note for note in summary["notes"])


def test_a_basis_in_a_file_counts_by_what_it_holds(tmp_path: Path):
    write_inputs(tmp_path)
    path = tmp_path / "basis.yaml"
    path.write_text(yaml.safe_dump({"one": {"noise": 1, "vowels": 1}, "two": {"upwards": 1}}))
    settings = settings_of(tmp_path, basis=str(path), proxy={"steps": 12})
    weights, _ = mixed(settings)
    assert weights["noise"] == pytest.approx(weights["vowels"])
    path.write_text(json.dumps({"one": {"noise": 3, "vowels": 1}, "two": {"upwards": 1}}))
    assert plan_mix(settings).done < plan_mix(settings).total
    weights, _ = mixed(settings)
    assert weights["noise"] == pytest.approx(3 * weights["vowels"])


@pytest.mark.slow
def test_a_thousand_domains_are_weighed_on_a_basis(tmp_path: Path):
    names = tuple(f"{DOMAINS[n % 3]}-{n:03}" for n in range(1000))
    write_inputs(tmp_path, names, rows=1)
    basis = {kind: {name: 1.0 for name in names if name.startswith(kind)} for kind in DOMAINS}
    weights, summary = mixed(settings_of(tmp_path, basis=basis, proxy={"held_out": 0}))
    kinds = {
        kind: sum(weight for name, weight in weights.items() if name.startswith(kind))
        for kind in DOMAINS
    }
    assert max(kinds, key=lambda kind: kinds[kind]) == "upwards"
    assert len(summary["domains"]) > 800


def test_what_cannot_work_is_refused(tmp_path: Path):
    write_inputs(tmp_path)
    index_run(settings_of(tmp_path), pool=INLINE)
    with pytest.raises(ConfigError, match="target"):
        mix_run(parse_settings({**values_of(tmp_path), "target": None}), pool=INLINE)
    with pytest.raises(ConfigError, match="start gives a share to 'upward'"):
        mix_run(settings_of(tmp_path, start={"upward": 1.0}), pool=INLINE)
    with pytest.raises(ConfigError, match=r"basis\.one gives a share to 'x'"):
        mix_run(settings_of(tmp_path, basis={"one": {"x": 1.0}}), pool=INLINE)
    with pytest.raises(InputError, match="cannot be read"):
        mix_run(settings_of(tmp_path, basis=str(tmp_path / "none.yaml")), pool=INLINE)
    pl.DataFrame({"text": ["", ""]}).write_parquet(tmp_path / "target.parquet")
    with pytest.raises(CurateError, match="target"):
        mixed(settings_of(tmp_path, run="empty"))


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
    folder = tmp_path / "killed" / "proxies" / "dga" / "seed-0"
    state = folder / "resume" / "state.safetensors"
    assert is_killed(curate_command("mix", configs["killed"]), state.exists, delay=0.3)
    assert not (folder / "result.json").exists()
    run_to_end(curate_command("mix", configs["killed"]))
    for name in ("mixture.json", "trajectory.parquet"):
        whole, killed = (
            (tmp_path / run / "mixtures" / "dga" / name).read_bytes() for run in configs
        )
        assert killed == whole, name


def test_importance_sampling_is_a_start_where_the_pool_is_clustered(tmp_path: Path):
    """By hand: the target's rows are compared with the centroids, one by one."""
    write_inputs(tmp_path)
    values = values_of(tmp_path, start="target", start_uniform=0.0, warm_share=0.99)
    values |= {
        "embed": {"grams": {"kind": "ngrams", "dim": 64, "ngrams": [1, 2]}},
        "domains": {"clusters": 3},
    }
    with open_run(parse_settings(values)) as settings:
        index_run(settings, pool=INLINE)
        with pytest.raises(InputError, match="has no clustered domains yet"):
            mix_run(settings, pool=INLINE)
        embed_run(settings, pool=INLINE)
        domains_run(settings, pool=INLINE)
        found = {row["domain"]: row["weight"] for row in mix_run(settings, pool=INLINE)["domains"]}
    run = RunFolder(tmp_path / "run")
    target = open_vectors(target_folder(run), "grams")
    rows = target.take(np.arange(len(target))).astype(np.float64)
    centroids = np.load(centroids_output(run).path).astype(np.float64)
    away = np.square(rows[:, None] - centroids).sum(-1)
    names = [each["domain"] for each in read_json(names_output(run).path)["clusters"]]
    expected = {name: float((away.argmin(1) == k).mean()) for k, name in enumerate(names)}
    assert max(expected.values()) > 0.5
    assert found == pytest.approx(expected, abs=0.02)


def test_importance_sampling_needs_clusters(tmp_path: Path):
    write_inputs(tmp_path)
    settings = settings_of(tmp_path, start="target")
    index_run(settings, pool=INLINE)
    with pytest.raises(ConfigError, match=r"mix\.start is target, but the pool is not cut"):
        mix_run(settings, pool=INLINE)
