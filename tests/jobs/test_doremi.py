"""`curate mix` with DoReMi on a few made-up domains, from references to the mixture."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from killed import curate_command, found, is_killed, run_to_end
from tiny_models import LLAMA, byte_tokenizer, save_language_model
from torch.nn import functional

from curate.data.files import remove_folder
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, DivergedError, InputError, TooManyBadError
from curate.models.sequence_losses import SequenceLosses
from curate.models.sequences import Sequences
from jobs import doremi, doremi_work
from jobs.all_stages import load
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.plan import plan_run
from jobs.settings import Settings, parse_settings

INLINE = Pool(InlineExecutor(), 1)
LETTERS = {"capital": "ABCDEFGH", "figure": "0123", "noise": "".join(map(chr, range(33, 127)))}
SIZES = {"capital": 120, "figure": 40, "noise": 80}
SMALL = {**LLAMA, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL = {"model_type": "llama", **SMALL}
PROXY: dict[str, Any] = {
    "steps": 8, "sequences": 9, "length": 32, "lr": 0.02, "held_out": 4, "model": MODEL,
}  # fmt: skip


def write_inputs(root: Path, sizes: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"text": "".join(generator.choice(list(LETTERS[name]), 40)), "topic": name}
        for name, size in sizes.items()
        for _ in range(size)
    ]
    pl.DataFrame(rows).sample(fraction=1.0, shuffle=True, seed=0).write_parquet(
        root / "rows.parquet", row_group_size=60
    )
    byte_tokenizer(merges=False).save_pretrained(root / "tokenizer")


def values_of(root: Path, **mix: Any) -> dict[str, Any]:
    proxy = PROXY | mix.pop("proxy", {})
    return {
        "run": str(root / "run"),
        "sources": {
            "rows": {"path": str(root / "rows.parquet"), "text": "text", "domain": "topic"}
        },
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"tokenizer": str(root / "tokenizer"), "device": "cpu"},
        "index": {"held_out": 0.1, "partition_rows": 60},
        "plan": {"keep": 0.5},
        "mix": {"mixer": "doremi", "proxy": proxy, "reference": {"seeds": [0]}, **mix},
    }


def settings_of(root: Path, sizes: dict[str, int] = SIZES, **mix: Any) -> Settings:
    """A corpus with an index of several partitions."""
    if not (root / "rows.parquet").exists():
        write_inputs(root, sizes)
    settings = parse_settings(values_of(root, **mix))
    index_run(settings, pool=INLINE)
    return settings


def weights_of(summary: dict[str, Any]) -> dict[str, float]:
    return {entry["domain"]: entry["weight"] for entry in summary["domains"]}


def result_of(settings: Settings, run: str) -> dict[str, Any]:
    path = Path(settings.run) / "proxies" / "doremi" / run / "result.json"
    return json.loads(path.read_text())


def sequences_of(settings: Settings, part: str) -> Sequences:
    paths = sorted((Path(settings.run) / "proxies" / "sequences").rglob("part-*.safetensors"))
    run = RunFolder(Path(settings.run))
    names = [part.name for part in run.partitions()]
    paths.sort(key=lambda path: names.index(path.stem))
    return Sequences.open(paths, parts=[part])


def losses_of(settings: Settings, chain: str = "seed-0/round-1") -> SequenceLosses:
    run = RunFolder(Path(settings.run))
    folder = run.proxies / "doremi" / chain / "losses"
    return SequenceLosses([folder / f"{part.name}.npy" for part in run.partitions()])


def test_the_mean_over_references_is_the_mixture_and_their_spread_is_told(tmp_path: Path):
    settings = settings_of(tmp_path, reference={"seeds": [0, 3]})
    summary = mix_run(settings, pool=INLINE)
    chains = [result_of(settings, f"seed-{seed}/round-1/proxy")["mixture"] for seed in (0, 3)]
    assert chains[0] != chains[1]
    weights = weights_of(summary)
    for name, weight in weights.items():
        assert weight == pytest.approx((chains[0][name] + chains[1][name]) / 2)
    spread = max(abs(chains[0][name] - chains[1][name]) for name in weights)
    assert any(f"differ by {spread:.3g} at most" in note for note in summary["notes"])
    assert any("million parameters without embeddings" in note for note in summary["notes"])
    assert all("over 2 references" in entry["why"] for entry in summary["domains"])
    table = pl.read_parquet(tmp_path / "run" / "mixtures" / "doremi" / "trajectory.parquet")
    assert {"run", "step", "domain", "weight", "loss", "excess"} <= set(table.columns)
    assert table["run"].unique().sort().to_list() == ["seed-0", "seed-3"]
    means = dict(table.group_by("domain").agg(pl.col("weight").mean()).rows())
    assert means == pytest.approx(weights)
    plan_run(settings, pool=INLINE)
    kept = tables_of(settings, "plan").filter(pl.col("keep"))
    assert kept.height > 0


def tables_of(settings: Settings, folder: str) -> pl.DataFrame:
    run = RunFolder(Path(settings.run))
    return pl.concat(
        [pl.read_parquet(run.root / folder / f"{part.name}.parquet") for part in run.partitions()]
    )


def test_the_excess_is_measured_on_what_the_reference_has_not_read(tmp_path: Path):
    settings = settings_of(tmp_path)
    mix_run(settings, pool=INLINE)
    seen, measured = (sequences_of(settings, part) for part in ("reference", "proxy"))
    for domain in SIZES:
        assert not set(seen.numbers_of(domain)) & set(measured.numbers_of(domain))
    texts = [
        {sequences.read(np.array([n])).arrays["tokens"].tobytes() for n in own}
        for sequences in (seen, measured)
        for own in [np.concatenate([sequences.numbers_of(d) for d in SIZES])]
    ]
    assert not texts[0] & texts[1]
    # What each was trained on: with other sequences the epochs would not fit the draws.
    for run, sequences in (("reference", seen), ("proxy", measured)):
        epochs = result_of(settings, f"seed-0/round-1/{run}")["epochs"]
        sizes = dict(zip(sequences.domains, sequences.sizes.tolist(), strict=True))
        drawn = [epochs[name] * size for name, size in sizes.items()]
        np.testing.assert_allclose(drawn, np.rint(drawn), atol=1e-9)
        assert sum(drawn) == pytest.approx(PROXY["steps"] * PROXY["sequences"])
    cached = losses_of(settings)
    for domain in SIZES:
        for number in seen.numbers_of(domain):
            with pytest.raises(InputError, match="has not seen"):
                cached(np.array([number]))


def test_cached_losses_are_those_of_a_fresh_pass_and_the_proxy_has_them(tmp_path: Path):
    """By transformers alone: texts of a window one by one, in float64."""
    from transformers import AutoModelForCausalLM

    settings = settings_of(tmp_path, warm_share=0.0)
    mix_run(settings, pool=INLINE)
    chain = tmp_path / "run" / "proxies" / "doremi" / "seed-0" / "round-1"
    model = AutoModelForCausalLM.from_pretrained(chain / "reference" / "model").double().eval()
    sequences, cached = sequences_of(settings, "proxy"), losses_of(settings)
    for domain in SIZES:
        for number in sequences.numbers_of(domain)[:6]:
            try:
                found = cached(np.array([number]))
            except InputError:
                continue
            arrays = sequences.read(np.array([number])).arrays
            tokens, starts = torch.from_numpy(arrays["tokens"]).long(), arrays["positions"] == 0
            expected: list[float] = []
            for text, counted in zip(
                tokens.split(np.diff(np.append(np.flatnonzero(starts), len(tokens))).tolist()),
                np.split(arrays["counted"], np.flatnonzero(starts)[1:]),
                strict=True,
            ):
                if len(text) > 1:
                    with torch.no_grad():
                        logits = model(input_ids=text[None]).logits[0, :-1]
                    losses = functional.cross_entropy(logits, text[1:], reduction="none")
                    expected += losses[torch.from_numpy(counted[1:])].tolist()
            assert len(found) == len(expected) > 0
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_all_that_the_proxy_draws_has_losses_and_nothing_else(tmp_path: Path):
    settings = settings_of(tmp_path, proxy={"steps": 4})
    mix_run(settings, pool=INLINE)
    sequences = sequences_of(settings, "proxy")
    result = result_of(settings, "seed-0/round-1/proxy")
    cached = losses_of(settings)
    for place, domain in enumerate(sequences.domains):
        known = 0
        for number in sequences.numbers_of(domain):
            try:
                known += len(cached(np.array([number]))) > 0
            except InputError:
                continue
        assert known == min(sequences.sizes[place], 3 * 4)
        assert result["epochs"][domain] == pytest.approx(12 / sequences.sizes[place])


def test_a_proxy_that_is_its_reference_gives_uniform_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A model that does not move, compared with itself: no excess beyond the cache's rounding."""
    save_language_model(tmp_path / "same", tokenizer=byte_tokenizer(merges=False))
    settings = settings_of(tmp_path, reference={"path": str(tmp_path / "same"), "seeds": [0]})
    settings = replace(
        settings,
        model=parse_settings(
            {**values_of(tmp_path), "model": {"name": str(tmp_path / "same"), "device": "cpu"}}
        ).model,
    )
    proxy = {**PROXY, "model": None, "lr": 1e-30}
    settings = replace(settings, mix={**settings.mix, "proxy": proxy, "warm_share": 0.0})
    real = doremi_work.SequenceLosses.__call__

    def rounded_up(self: SequenceLosses, numbers: np.ndarray) -> np.ndarray:
        """Half precision rounds some losses down; those would be an excess of 0.001."""
        losses = real(self, numbers)
        return np.nextafter(losses.astype(np.float16), np.float16(np.inf)).astype(np.float32)

    monkeypatch.setattr(doremi_work.SequenceLosses, "__call__", rounded_up)
    summary = mix_run(settings, pool=INLINE)
    assert list(weights_of(summary).values()) == pytest.approx([1 / 3] * 3, abs=1e-15)
    table = pl.read_parquet(tmp_path / "run" / "mixtures" / "doremi" / "trajectory.parquet")
    assert table["excess"].to_list() == [0.0] * len(table)


def test_a_reference_that_exists_is_taken_and_one_of_another_tokenizer_is_refused(tmp_path: Path):
    save_language_model(tmp_path / "given", tokenizer=byte_tokenizer(merges=False))
    save_language_model(tmp_path / "other", tokenizer=byte_tokenizer(merges=True))
    settings = settings_of(tmp_path, reference={"path": str(tmp_path / "given"), "seeds": [0]})
    summary = mix_run(settings, pool=INLINE)
    assert sum(weights_of(summary).values()) == pytest.approx(1)
    assert not (tmp_path / "run/proxies/doremi/seed-0/round-1/reference").exists()
    with pytest.raises(ConfigError, match="another tokenizer"):
        mix_run(settings_of(tmp_path, reference={"path": str(tmp_path / "other")}), pool=INLINE)
    with pytest.raises(InputError, match="nowhere"):
        mix_run(settings_of(tmp_path, reference={"path": str(tmp_path / "nowhere")}), pool=INLINE)


def test_several_models_are_several_references(tmp_path: Path):
    models = [MODEL, {**MODEL, "hidden_size": 32}]
    settings = settings_of(tmp_path, proxy={"steps": 4}, reference={"seeds": [1], "models": models})
    summary = mix_run(settings, pool=INLINE)
    sizes = [
        result_of(settings, f"model-{place}-seed-1/round-1/proxy")["num_parameters"]
        for place in (0, 1)
    ]
    assert sizes[0] < sizes[1]
    assert any(f"has {sizes[0] / 1e6:.3g} million" in note for note in summary["notes"])
    assert any("over 2 references" in note for note in summary["notes"])


def test_rounds_end_where_the_weights_rest(tmp_path: Path):
    """With a tolerance that any step meets, the second round is the last one that is trained."""
    settings = settings_of(tmp_path, rounds=3, tolerance=1.0)
    summary = mix_run(settings, pool=INLINE)
    first, second, third = (result_of(settings, f"seed-0/round-{n}/proxy") for n in (1, 2, 3))
    assert first["mixture"] != second["mixture"]
    assert {**third, "notes": None} == {**second, "notes": None}
    moved = max(abs(second["mixture"][n] - w) for n, w in first["mixture"].items())
    assert second["moved"] == pytest.approx(moved)
    assert second["at_rest"]
    assert any("1 of 1 chains came to rest within 3 rounds" in note for note in summary["notes"])
    assert not (tmp_path / "run/proxies/doremi/seed-0/round-3/reference/model").exists()
    # The second reference was trained at the shares that the first round found.
    tokens = result_of(settings, "seed-0/round-2/reference")["num_tokens"]
    shares = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    assert shares == pytest.approx(first["mixture"], abs=0.03)
    assert plan_mix(settings).done == plan_mix(settings).total


def test_a_round_that_is_stopped_as_it_ends_says_whether_it_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its result is there, and whole, before anything else is tidied up."""
    settings = settings_of(tmp_path, rounds=2, tolerance=1.0)

    def stop(path: Path) -> None:
        if "round-2/proxy" in str(path):
            raise KeyboardInterrupt
        remove_folder(path)

    with monkeypatch.context() as patched:
        patched.setattr("jobs.proxy_work.remove_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            mix_run(settings, pool=INLINE)
    summary = mix_run(settings, pool=INLINE)
    assert any("came to rest within 2 rounds" in note for note in summary["notes"])


def test_a_change_redoes_what_depends_on_it_and_a_moved_run_stays_done(tmp_path: Path):
    settings = settings_of(tmp_path)
    num_parts = len(RunFolder(Path(settings.run)).partitions())
    assert num_parts > 2
    assert plan_mix(settings).done == 0
    mix_run(settings, pool=INLINE)
    state = plan_mix(settings)
    assert state.done == state.total == 1 + num_parts + 1 + num_parts + 1

    def due(**mix: Any) -> int:
        changed = plan_mix(settings_of(tmp_path, **mix))
        return changed.total - changed.done

    assert due(eta=0.5) == 1 + 1
    assert due(reference={"seeds": [0], "shares": "uniform"}) == 1 + 1 + num_parts + 1
    assert due(proxy={"lr": 0.01}) == 1 + 1 + num_parts + 1
    assert due(proxy={"length": 16}) == state.total
    assert due(reference={"seeds": [0, 1]}) == 1 + 1 + num_parts + 1
    assert due(proxy={"resume_every_seconds": 1.0}) in (0, 1)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = replace(settings, run=str(tmp_path / "moved"))
    assert plan_mix(moved).done == state.total


def test_no_model_is_refused_before_anything_is_done(tmp_path: Path):
    settings = settings_of(tmp_path, proxy={"model": None})
    with pytest.raises(ConfigError) as caught:
        mix_run(settings, pool=INLINE)
    assert "no model to train" in caught.value.what
    assert "mix.proxy.model" in caught.value.fix
    assert not (tmp_path / "run" / "proxies").exists()


def test_small_domains_are_gone_through_again_and_told(tmp_path: Path):
    """A domain of one example has one half only, and nothing held out; both are said."""
    settings = settings_of(
        tmp_path, {"capital": 120, "figure": 1, "noise": 80}, proxy={"steps": 12}
    )
    index = tables_of(settings, "examples")
    if index.filter(pl.col("domain") == "figure")["split"][0] != "train":
        pytest.fail("the one example is held out: change the seed")
    summary = mix_run(settings, pool=INLINE)
    result = result_of(settings, "seed-0/round-1/proxy")
    assert set(result["held_out"]) == {"capital", "noise"}
    assert result["epochs"]["figure"] >= 18
    assert sum(weights_of(summary).values()) == pytest.approx(1)
    notes = " ".join(summary["notes"])
    assert "the other half stands for both: figure" in notes
    assert "figure (" in notes.split("went more than 4 times through")[1]


def test_losses_that_are_no_numbers_name_run_domain_and_step_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One proxy's model breaks in its third step."""
    settings = settings_of(tmp_path, reference={"seeds": [0, 1]})
    rule = load("jobs.doremi_work:DoReMiRule")
    real = rule.step

    def step(self: Any, given: Any) -> Any:
        if given.number == 3 and breaks:
            breaks.pop()
            with torch.no_grad():
                next(given.model.parameters()).fill_(torch.nan)
        return real(self, given)

    breaks = [True]
    monkeypatch.setattr(rule, "step", step)
    with pytest.raises(TooManyBadError) as caught:
        mix_run(settings, pool=INLINE)
    assert "domain capital at step 3 is nan" in caught.value.what
    assert "seed-0/round-1/proxy" in caught.value.what
    chains = tmp_path / "run" / "proxies" / "doremi"
    table = pl.read_parquet(chains / "seed-0/round-1/proxy/trajectory.parquet")
    assert table["step"].max() == 2
    assert (chains / "seed-1/round-1/proxy/result.json").exists()
    state = plan_mix(settings)
    assert state.total - state.done == 2


def test_a_learning_rate_that_is_far_too_large_is_an_error_with_a_way_out(tmp_path: Path):
    settings = settings_of(tmp_path, proxy={"lr": 1e30, "clip_norm": 0.0, "warmup": 0.0})
    with pytest.raises(DivergedError) as caught:
        mix_run(settings, pool=INLINE)
    assert "mix.proxy.lr" in caught.value.fix
    assert "seed-0/round-1/reference" in caught.value.what


def test_half_way_the_rest_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = settings_of(tmp_path)

    def stops(payload: dict[str, Any]) -> dict[str, Any]:
        raise CurateError("stopped", fix="go on")

    with monkeypatch.context() as patch:
        patch.setattr(doremi, "train_round", stops)
        with pytest.raises(CurateError, match="stopped"):
            mix_run(settings, pool=INLINE)
    state = plan_mix(settings)
    assert state.total - state.done == 2
    assert "1 task of its own is due for doremi" in state.why[-1]
    mix_run(settings, pool=INLINE)
    assert plan_mix(settings).done == state.total


SLOW = {"steps": 60, "resume_every_seconds": 0.0}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twice_in_each_training_and_resumed_or_on_dask_it_is_the_same_to_the_last_byte(
    tmp_path: Path,
):
    """In one run folder, which forgets what was found in between."""
    write_inputs(tmp_path, SIZES)
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values_of(tmp_path, proxy=SLOW)))
    run_to_end(curate_command("index", config))
    mix = curate_command("mix", config)
    kills: list[int] = []
    for which in ("reference", "proxy"):
        folder = run / "proxies" / "doremi" / "seed-0" / "round-1" / which
        for at_least in (5, 30):

            def moment(folder: Path = folder, at_least: int = at_least) -> bool:
                step = steps_shown(folder / "trajectory.parquet")
                return step >= at_least and found(folder, "resume/state.safetensors") == 1

            assert is_killed(mix, moment, within=300), (which, at_least)
            assert found(folder, "result.json") == 0
            kills.append(steps_shown(folder / "trajectory.parquet"))
    assert kills[0] < kills[1]
    assert kills[2] < kills[3]
    seen: list[list[bytes]] = []
    for more in ([], [], ["--set", "cluster.kind=local", "--set", "cluster.workers=2"]):
        run_to_end([*mix, *more])
        folder = run / "mixtures" / "doremi"
        files = [folder / "mixture.json", folder / "trajectory.parquet"]
        seen.append([path.read_bytes() for path in files])
        shutil.rmtree(run / "proxies")
        shutil.rmtree(folder)
    assert seen[0] == seen[1] == seen[2]


def steps_shown(path: Path) -> int:
    """The last step of a trajectory that may be replaced at any moment; 0 without one."""
    time.sleep(0.01)
    try:
        step = pl.read_parquet(path, columns=["step"])["step"].max()
    except (OSError, pl.exceptions.PolarsError):
        return 0
    return int(step) if isinstance(step, int) else 0
