"""The comparison, start to end on small networks: what is trained, on what, and what is said."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from evaluate.compared_digits import compare, digits_settings, words, write_digits

from curate.cli.compare import comparison_lines
from curate.data.layout import RunFolder
from curate.errors import ConfigError, CurateError, InputError, MissingDependencyError
from jobs.all_stages import load, stages_for
from jobs.cluster import Cluster
from jobs.compare import judge_results, plan_compare
from jobs.compare_judging import judge_table
from jobs.compare_results import Trained, table_of
from jobs.settings import Settings


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_digits(tmp_path_factory.mktemp("digits"), rows=600, flipped=0.3)


@pytest.fixture(scope="module")
def compared(
    pool: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, dict[str, Any]]:
    """A comparison with every arm that there is."""
    arms = ["plan", "random", "natural", "unimax", "shuffled", "longest", "everything",
            {"name": "small", "rules": {"keep": 0.05}},
            {"name": "redrawn", "rules": {"keep": 0.5}, "redraw": True}]  # fmt: skip
    settings = digits_settings(
        tmp_path_factory.mktemp("compared") / "run",
        *pool,
        mix={"mixer": "fixed", "weights": {"clean": 3, "noise": 1}},
        compare={"seeds": [0, 1, 2], "steps": 20, "points": 2, "shares": [0.25], "arms": arms},
    )
    return settings, compare(settings)


def test_every_arm_takes_the_same_steps_and_tokens(compared: tuple[Settings, dict[str, Any]]):
    _, summary = compared
    budget = summary["budget"]
    for arm, facts in summary["arms"].items():
        assert facts["steps"] == budget["steps"] == 20, arm
        if arm != "small":
            assert facts["trained_tokens"] == pytest.approx(budget["tokens"], rel=0.02), arm


def test_held_out_rows_are_in_no_arm(compared: tuple[Settings, dict[str, Any]]):
    run = RunFolder(Path(compared[0].run))
    folders = sorted({path.parent for path in (run.root / "compare" / "arms").rglob("*.parquet")})
    folders = [folder for folder in folders if folder.name == "plan"]
    assert len(folders) == 4 + 3 * 7  # plan, everything, small, plan@0.25; the others by seed
    for part in run.partitions():
        held_out = (pl.read_parquet(run.examples(part).path)["split"] == "held_out").to_numpy()
        assert held_out.any()
        for folder in folders:
            copies = pl.read_parquet(folder / f"{part.name}.parquet")["copies"].to_numpy()
            assert not copies[held_out].any(), folder


def test_random_gets_the_tokens_of_the_plan_and_new_rows_with_each_seed(
    compared: tuple[Settings, dict[str, Any]],
):
    settings, summary = compared
    arms = summary["arms"]
    assert arms["random"]["tokens"] == arms["plan"]["tokens"] == arms["random-2"]["tokens"]
    kept = [_kept(settings, f"random/seed-{seed}") for seed in (0, 1, 2)]
    again = [_kept(settings, f"random-2/seed-{seed}") for seed in (0, 1, 2)]
    assert len({tuple(rows) for rows in (*kept, *again)}) == 6


def test_the_luck_is_shared_by_what_the_seeds_share(compared: tuple[Settings, dict[str, Any]]):
    arms = compared[1]["arms"]
    assert arms["plan"]["shared_luck"] == 1.0  # one set for all
    assert arms["small"]["shared_luck"] == 1.0
    assert arms["everything"]["shared_luck"] == 0.0  # nothing was drawn
    for arm in ("random", "random-2", "redrawn", "shuffled"):
        assert arms[arm]["shared_luck"] < 0.1, arm


def test_arms_that_are_the_same_are_trained_once(pool: tuple[Path, Path], tmp_path: Path):
    """Without a score and with one domain, natural and unimax are random draws like `shuffled`."""
    settings = digits_settings(
        tmp_path / "run", pool[0], plan={"keep": 0.5, "within": "all"},
        sources={"digits": {"path": str(pool[0]), "features": "features", "label": "label"}},
        compare={"seeds": [0, 1, 2], "steps": 5, "random_draws": 1, "plot": "none",
                 "arms": ["plan", "random", "natural", "unimax", "shuffled"]},
    )  # fmt: skip
    summary = compare(settings)
    arms = summary["arms"]
    assert {arms[name]["same_as"] for name in ("natural", "unimax", "shuffled")} == {"random"}
    assert summary["cost"]["runs"] == 6  # plan and random
    assert words(summary)["natural"] == "not distinguishable from random"
    assert "those of random" in next(v for v in summary["verdicts"] if v["arm"] == "natural")["why"]


def test_the_table_has_every_number_of_every_run(compared: tuple[Settings, dict[str, Any]]):
    settings, summary = compared
    table = pl.read_parquet(Path(settings.run) / "compare" / "table.parquet")
    assert set(table["seed"]) == {0, 1, 2}
    assert set(table["step"]) == {10, 20}  # points: 2
    parts = {"held_out", "target", "domain: clean", "domain: noise", "worst_domain", "worst_class"}
    assert parts | {f"class: {n}" for n in range(10)} == set(table["part"])
    assert set(table["metric"]) == {"accuracy", "loss"}
    runs = len(summary["arms"]) * 3
    assert table.height == runs * 2 * 2 * len(set(table["part"]))
    assert table["value"].null_count() == 0


def test_the_target_is_what_the_verdict_stands_on(compared: tuple[Settings, dict[str, Any]]):
    question = compared[1]["question"]
    assert (question["metric"], question["part"], question["better"]) == (
        "accuracy",
        "target",
        "higher",
    )


def test_a_curve_over_the_share_gets_numbers_and_no_verdict(
    compared: tuple[Settings, dict[str, Any]],
):
    summary = compared[1]
    assert "plan@0.25" not in words(summary)
    entry = next(
        p for p in summary["parts"]
        if (p["arm"], p["part"], p["metric"]) == ("plan@0.25", "target", "accuracy")
    )  # fmt: skip
    base = next(
        p for p in summary["parts"]
        if (p["arm"], p["part"], p["metric"]) == ("random@0.25", "target", "accuracy")
    )  # fmt: skip
    assert entry["difference"] == pytest.approx(entry["mean"] - base["mean"])


def test_an_arm_with_fewer_tokens_is_said_to_have_them(compared: tuple[Settings, dict[str, Any]]):
    note = next(note for note in compared[1]["notes"] if note.startswith("small has"))
    assert "where the plan has" in note
    assert "it is gone through" in note


def test_the_text_says_what_was_trained_and_what_it_cost(
    compared: tuple[Settings, dict[str, Any]],
):
    summary = compared[1]
    assert "mlp, 1,210 parameters, 20 steps" in summary["scale"]  # 64*16 + 16 + 16*10 + 10
    assert summary["cost"]["steps"] == summary["cost"]["runs"] * 20
    saved = json.loads((Path(compared[0].run) / "compare" / "comparison.json").read_text())
    assert saved["verdicts"] == json.loads(json.dumps(summary["verdicts"]))
    assert saved["cost"]["seconds"] > 0
    assert (Path(compared[0].run) / "compare" / "plot.svg").read_text().startswith("<svg")
    assert not list((Path(compared[0].run) / "compare" / "trained").glob("*/checkpoints"))


def test_a_second_run_trains_nothing_and_says_so_beforehand(
    compared: tuple[Settings, dict[str, Any]],
):
    settings, summary = compared
    state = plan_compare(settings)
    assert state.done == state.total == summary["cost"]["runs"]
    path = Path(settings.run) / "compare" / "table.parquet"
    before = path.read_bytes()
    again = compare(settings)
    assert again["done"] == 0
    assert path.read_bytes() == before
    longer = replace(settings, compare=replace(settings.compare, steps=21))
    assert plan_compare(longer).done == 0


def test_dask_workers_give_the_same_table(pool: tuple[Path, Path], tmp_path: Path):
    tables: list[bytes] = []
    for name, cluster in (("inline", Cluster()), ("dask", Cluster(kind="local", workers=2))):
        settings = digits_settings(
            tmp_path / name, *pool,
            compare={"seeds": [0, 1, 2], "steps": 10, "arms": ["plan", "random"], "plot": "none"},
        )  # fmt: skip
        compare(settings, cluster)
        tables.append((tmp_path / name / "compare" / "table.parquet").read_bytes())
    assert tables[0] == tables[1]


def test_a_run_that_diverges_is_a_result_without_a_verdict(pool: tuple[Path, Path], tmp_path: Path):
    settings = digits_settings(
        tmp_path / "run", *pool,
        checkpoints={"train": {"lr": 1e30, "clip_norm": 0, "batch_tokens": 32, "warmup": 0}},
        compare={"seeds": [0, 1, 2], "steps": 10, "arms": ["plan"], "random_draws": 1},
    )  # fmt: skip
    summary = compare(settings)
    assert words(summary) == {"plan": "no verdict"}
    assert "random diverged with seeds 0, 1, 2" in summary["verdicts"][0]["sentence"]
    assert any(note.startswith("plan, seed 0: diverged: ") for note in summary["notes"])
    table = pl.read_parquet(tmp_path / "run" / "compare" / "table.parquet")
    assert table["value"].null_count() == table.height == 6
    assert compare(settings)["done"] == 0  # a result is not tried again


def test_nothing_is_averaged_over_the_seeds_that_did_not_diverge():
    def trained(arm: str, seed: int, value: float | None) -> Trained:
        measured = [{"part": "held_out", "metric": "loss", "value": value, "num_examples": 9}]
        points = [] if value is None else [{"step": 1, "tokens": 1, "measured": measured}]
        return Trained(arm, seed, {"diverged": None if points else "inf", "points": points})

    runs = [
        trained(arm, seed, None if seed == 2 else place + 0.1 * seed * (place + 1))
        for place, arm in enumerate(("random", "mine"))
        for seed in range(3)
    ]
    value = judge_table(table_of(runs), ["random", "mine"], {"random": 0.0}, metric=None,
                        better=None, on=None)  # fmt: skip
    for entry in value["parts"]:
        assert (entry["mean"], entry["spread"], entry.get("difference")) == (None, None, None)
    assert [entry["seeds"] for entry in value["parts"]] == [2, 2]


def test_two_seeds_give_numbers_and_no_verdict(pool: tuple[Path, Path], tmp_path: Path):
    settings = digits_settings(
        tmp_path / "run", *pool,
        compare={"seeds": [0, 1], "steps": 5, "arms": ["plan"], "plot": "none"},
    )  # fmt: skip
    summary = compare(settings)
    assert words(summary) == {"plan": "no verdict"}
    assert "fewer than three seeds: there is no verdict, only numbers" in summary["notes"]
    (short,) = [note for note in summary["notes"] if "trained for 5 steps only" in note]
    assert short.startswith("every arm: ")
    stored = json.loads((tmp_path / "run" / "compare" / "comparison.json").read_text())
    assert short in stored["notes"]
    assert any(short in line for line in comparison_lines(summary, "run"))


def test_a_domain_without_held_out_rows_is_named(tmp_path: Path):
    pool, _ = write_digits(tmp_path, rows=300)
    table = pl.read_parquet(pool).with_columns(domain=pl.lit("main"))
    rare = table.head(1).with_columns(domain=pl.Series(["rare"]))
    pl.concat([table.tail(-1), rare]).write_parquet(pool)
    settings = digits_settings(
        tmp_path / "run", pool, index={"held_out": 0.1},
        compare={"seeds": [0, 1, 2], "steps": 5, "arms": ["plan"], "plot": "none"},
    )  # fmt: skip
    summary = compare(settings)
    assert any(note.startswith("rare has no held-out examples") for note in summary["notes"])
    assert "domain: rare" not in {entry["part"] for entry in summary["parts"]}


def test_nothing_to_measure_on_is_an_error_with_a_way_out(pool: tuple[Path, Path], tmp_path: Path):
    settings = digits_settings(tmp_path / "run", pool[0], index={"held_out": 0.0})
    with pytest.raises(InputError, match="nothing is held out"):
        compare(settings)


def test_copies_and_weights_reach_the_training(pool: tuple[Path, Path], tmp_path: Path):
    """Weights near 0 on the wrong labels are as good as leaving them out."""
    base = {"seeds": [0, 1, 2], "steps": 40, "plot": "none", "random_draws": 1}
    accuracy: dict[str, float] = {}
    wrong = pl.read_parquet(pool[0])["domain"] == "noise"
    scores = pl.DataFrame(
        {
            "source": ["digits"] * len(wrong),
            "file": ["pool.parquet"] * len(wrong),
            "row": np.arange(len(wrong)),
            "right": 1.0 - wrong.cast(pl.Float32),
        }
    )
    scores.write_parquet(tmp_path / "right.parquet")
    for name, weights in (("plain", None), ("weighted", {"score": "right", "clip": [1e-6, 10]})):
        settings = digits_settings(
            tmp_path / name, *pool,
            score={"scorers": [{"external": {"right": str(tmp_path / "right.parquet")}}]},
            plan={"keep": 1.0, "weights": weights},
            compare={**base, "arms": ["plan"]},
        )  # fmt: skip
        summary = compare(settings)
        entry = next(
            p for p in summary["parts"]
            if (p["arm"], p["part"], p["metric"]) == ("plan", "target", "loss")
        )  # fmt: skip
        accuracy[name] = entry["mean"]
    assert accuracy["weighted"] < accuracy["plain"] - 0.1


def test_a_command_of_the_user_trains_the_arms(pool: tuple[Path, Path], tmp_path: Path):
    """It gets shards of the right arm, seed and budget; what it prints last is judged."""
    script = tmp_path / "train me.py"
    script.write_text(_TRAINER)
    command = f'{sys.executable} "{script}" --shards {{shards}} --seed {{seed}} --tokens={{tokens}}'
    settings = digits_settings(
        tmp_path / "run", pool[0],
        mix={"mixer": "fixed", "weights": {"clean": 1}}, plan={"keep": 0.3},
        compare={"seeds": [0, 1, 2], "arms": ["plan", "random"], "command": command,
                 "metric": "noise share", "better": "lower", "plot": "none"},
    )  # fmt: skip
    summary = compare(settings)
    assert summary["question"]["told"] == "noise share"
    means = {p["arm"]: p["mean"] for p in summary["parts"] if p["metric"] == "noise share"}
    assert means["plan"] == pytest.approx(0.0, abs=0.01)  # its shards hold the clean domain only
    assert means["random"] == pytest.approx(0.3, abs=0.1)
    assert words(summary) == {"plan": "helps"}
    tokens = {p["mean"] for p in summary["parts"] if p["metric"] == "tokens"}
    assert tokens == {float(summary["arms"]["plan"]["tokens"])}
    assert compare(settings)["done"] == 0


_TRAINER = """
import argparse, json, pathlib
import polars as pl
parser = argparse.ArgumentParser()
for name in ("--shards", "--seed", "--tokens"):
    parser.add_argument(name)
given = parser.parse_args()
files = sorted(pathlib.Path(given.shards).glob("data/**/*.parquet"))
domains = pl.concat([pl.read_parquet(f, columns=["curate_domain"]) for f in files])["curate_domain"]
print("some chatter")
share = (domains == "noise").mean() + 1e-4 * int(given.seed)
print(json.dumps({"noise share": share, "tokens": float(given.tokens)}))
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('out of luck', file=sys.stderr); sys.exit(3)", "code 3: out of luck"),
        ("print('accuracy 0.9')", "no JSON object: accuracy 0.9"),
        ('print(\'{"accuracy": "high"}\')', "metric accuracy is 'high', not a number"),
    ],
)
def test_a_command_that_fails_is_told_with_arm_seed_and_words(
    pool: tuple[Path, Path], tmp_path: Path, code: str, message: str
):
    script = tmp_path / "very bad.py"
    script.write_text(code)
    settings = digits_settings(
        tmp_path / "run", pool[0],
        compare={"seeds": [0], "steps": 3,
                 "arms": [{"name": "mine", "command": f"{sys.executable} '{script}'"}]},
    )  # fmt: skip
    with pytest.raises(CurateError, match="mine, seed 0") as caught:
        compare(settings)
    assert message in caught.value.what
    if "exit" in code:
        assert shlex.quote(str(script)) in caught.value.fix  # to be copied into a shell


def test_what_a_placeholder_holds_never_reaches_a_shell(pool: tuple[Path, Path], tmp_path: Path):
    script = tmp_path / "echo.py"
    script.write_text("import json, sys; print(json.dumps({'words': len(sys.argv)}))")
    run = tmp_path / "run; touch stolen $(touch stolen)"
    settings = digits_settings(
        run, pool[0],
        compare={"seeds": [0, 1, 2], "arms": ["plan"], "random_draws": 1, "better": "higher",
                 "command": f"{sys.executable} {script} {{shards}} {{arm}}", "plot": "none",
                 "on": "target"},
    )  # fmt: skip
    summary = compare(settings)
    assert {p["mean"] for p in summary["parts"]} == {3.0}  # script, shards, arm: one word each
    assert not list(tmp_path.rglob("stolen"))
    assert not Path("stolen").exists()


def test_a_command_alone_joins_arms_that_curate_trains(pool: tuple[Path, Path], tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import json, sys; print(json.dumps({'accuracy': 0.99 + 0.001 * int(sys.argv[1])}))"
    )
    settings = digits_settings(
        tmp_path / "run", *pool,
        compare={"seeds": [0, 1, 2], "steps": 5, "plot": "none",
                 "arms": ["plan", {"name": "mine",
                                   "command": f"{sys.executable} {script} {{seed}}"}]},
    )  # fmt: skip
    summary = compare(settings)
    assert words(summary)["mine"] == "helps"


def test_one_command_for_several_arms_is_run_for_each(pool: tuple[Path, Path], tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import json, sys; print(json.dumps({'accuracy': len(sys.argv[1]) + int(sys.argv[2])}))"
    )
    command = f"{sys.executable} {script} {{arm}} {{seed}}"
    settings = digits_settings(
        tmp_path / "run", *pool,
        compare={"seeds": [0, 1, 2], "steps": 5, "plot": "none",
                 "arms": [{"name": "a", "command": command}, {"name": "bb", "command": command}]},
    )  # fmt: skip
    reported = {p["arm"]: p["mean"] for p in compare(settings)["parts"] if p["part"] == "reported"}
    assert reported == {"a": 2.0, "bb": 3.0}


def test_a_part_that_was_not_measured_is_told(pool: tuple[Path, Path], tmp_path: Path):
    settings = digits_settings(
        tmp_path / "run", pool[0],
        compare={"seeds": [0, 1, 2], "steps": 2, "arms": ["plan"], "on": "target", "plot": "none"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="nothing was measured on the target"):
        compare(settings)


def test_numbers_from_elsewhere_join_the_arms(pool: tuple[Path, Path], tmp_path: Path):
    results = tmp_path / "results.csv"
    lines = [f"elsewhere,{seed},accuracy,{0.01 + 0.001 * seed}" for seed in range(3)]
    results.write_text("\n".join(["arm,seed,metric,value", *lines]) + "\n")
    settings = digits_settings(
        tmp_path / "run", *pool,
        compare={"seeds": [0, 1, 2], "steps": 60, "arms": ["random"], "results": str(results),
                 "plot": "none"},
    )  # fmt: skip
    assert words(compare(settings)) == {"elsewhere": "hurts"}


def test_a_file_of_numbers_is_judged_by_itself(tmp_path: Path):
    path = tmp_path / "results.csv"
    rows = [("random", s, 0.80 + 0.01 * s) for s in range(4)]
    rows += [("mine", s, 0.95 + 0.005 * s) for s in range(4)]
    rows += [("half", s, 0.9) for s in range(2)]
    rows += [("gone", s, None if s == 2 else 0.9) for s in range(4)]
    text = "".join(f"{a},{s},score,{'' if v is None else v}\n" for a, s, v in rows)
    path.write_text("arm,seed,metric,value\n" + text)
    summary = judge_results(path, better="higher")
    assert words(summary) == {"mine": "helps", "half": "no verdict", "gone": "no verdict"}
    whys = {v["arm"]: v["why"] for v in summary["verdicts"]}
    assert "seeds 2, 3" in whys["half"]
    assert "gone diverged with seed 2" in whys["gone"]
    with pytest.raises(ConfigError, match="which direction of score"):
        judge_results(path)


def _numbers(tmp_path: Path, *arms: str, end: str = "") -> Path:
    """Four seeds of each arm; later arms are better."""
    path = tmp_path / "results.csv"
    rows = [
        f"{arm},{seed},accuracy,{0.5 + 0.1 * place + 0.001 * (seed * (place + 1) % 4)}"
        for place, arm in enumerate(arms)
        for seed in range(4)
    ]
    path.write_text("\n".join(["arm,seed,metric,value", *rows]) + "\n" + end)
    return path


def test_the_table_tells_the_difference_that_is_judged(tmp_path: Path):
    """A name with an @ is a name like any other where no share is trained."""
    summary = judge_results(_numbers(tmp_path, "random", "random@0.1", "mine@0.1", "new@v2"))
    found = {entry["arm"]: entry for entry in summary["parts"]}
    for verdict in summary["verdicts"]:
        entry = found[verdict["arm"]]
        assert entry["difference"] == pytest.approx(verdict["test"]["mean"]), verdict["arm"]
        assert entry["interval"] == pytest.approx(verdict["test"]["interval"]), verdict["arm"]


def test_an_empty_line_and_spaces_beside_the_commas_do_no_harm(tmp_path: Path):
    path = _numbers(tmp_path, "random", "mine", end="\n")
    path.write_text(path.read_text().replace(",", ", "))
    assert words(judge_results(path)) == {"mine": "helps"}


def test_a_number_too_large_to_be_squared_is_one_of_a_run_that_diverged(tmp_path: Path):
    path = _numbers(tmp_path, "random", "mine", end="big,0,accuracy,1e308\nbig,1,accuracy,1e308\n"
                    "big,2,accuracy,1e308\nbig,3,accuracy,-1e307\n")  # fmt: skip
    verdict = judge_results(path)["verdicts"][1]
    assert verdict["why"] == "big diverged with seeds 0, 1, 2, 3"


def test_redrawn_names_an_arm_that_there_is(pool: tuple[Path, Path], tmp_path: Path):
    path = _numbers(tmp_path, "random", "mine")
    with pytest.raises(ConfigError, match="no arm mime"):
        judge_results(path, redrawn=("mime",))
    settings = digits_settings(
        tmp_path / "run",
        pool[0],
        compare={"arms": [], "redrawn": ["mime"], "results": str(path)},
    )
    with pytest.raises(ConfigError, match="no arm mime"):
        compare(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm,seed,value\nrandom,0,1\n", "no column metric"),
        ("arm,seed,metric,value\nrandom,zero,m,1\n", "line 2: seed 'zero'"),
        ("arm,seed,metric,value\nrandom,0,m,high\n", "line 2: .*value 'high'"),
        ("arm,seed,metric,value\nrandom,0,m,1\nrandom,0,m,2\n", "line 3 says again what line 2"),
        ("arm,seed,metric,value\n,0,m,1\n", "line 2 names no arm"),
        ("arm,seed,metric,value\nrandom,9999999999999999999,m,1\n", "line 2: seed '9999"),
        ("arm,seed,metric,value\nmine,0,loss,1\n", "no arm called random"),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        judge_results(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": ["plan", "plan"]}, "arm plan stands twice"),
        ({"arms": ["plans"]}, "there is no arm 'plans'"),
        ({"arms": [{"name": "random-2", "rules": {}}]}, "no name for an arm of your own"),
        ({"arms": [{"name": "../x", "rules": {}}]}, "no name for an arm of your own"),
        ({"arms": [{"name": "mine"}]}, "does not say what it trains on"),
        ({"arms": [{"name": "mine", "run": "a", "rules": {}}]}, "has a run and rules"),
        ({"arms": [{"name": "mine", "run": "a", "redraw": True}]}, "belong to rules"),
        ({"command": "python {shard}"}, "{shard}, which does not exist"),
        ({"command": "python 'open"}, "No closing quotation"),
        ({"seeds": [0, 0]}, r"seeds are \[0, 0\]"),
        ({"steps": 5, "tokens": 100}, "tokens and steps are both set"),
        ({"steps": 0}, "must be above 0"),
        ({"tokens": 0}, "must be above 0"),
        ({"arms": []}, "there are no arms"),
        ({"shares": [1.5]}, "shares are"),
        ({"random_draws": 0}, "start at 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, values: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        digits_settings(tmp_path, tmp_path, compare=values)


def test_without_the_plot_s_packages_everything_else_is_there(
    pool: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "altair", None)
    settings = digits_settings(
        tmp_path / "run", *pool, compare={"seeds": [0, 1, 2], "steps": 3, "arms": ["plan"]}
    )
    with pytest.raises(MissingDependencyError, match="table and verdict are written"):
        compare(settings)
    assert (tmp_path / "run" / "compare" / "comparison.json").exists()
    assert (tmp_path / "run" / "compare" / "table.parquet").exists()


def test_the_plan_of_another_run_is_an_arm(pool: tuple[Path, Path], tmp_path: Path):
    other = digits_settings(tmp_path / "other", pool[0], plan={"keep": 0.2})
    with_plan = list(stages_for(other, "plan"))
    from jobs.all_stages import run_stages
    from jobs.cluster import open_pool

    with open_pool(Cluster()) as workers:
        run_stages(other, with_plan, pool=workers)
    settings = digits_settings(
        tmp_path / "run", *pool,
        compare={"seeds": [0, 1, 2], "steps": 5, "plot": "none",
                 "arms": ["plan", {"name": "theirs", "run": str(tmp_path / "other")}]},
    )  # fmt: skip
    summary = compare(settings)
    theirs, own = summary["arms"]["theirs"], summary["arms"]["plan"]
    assert theirs["rows"] == pytest.approx(0.4 * own["rows"], abs=2)


def test_comparing_is_asked_for_by_name_only(compared: tuple[Settings, dict[str, Any]]):
    settings, _ = compared
    assert "compare" not in [stage.name for stage in stages_for(settings, "run")]
    assert [stage.name for stage in stages_for(settings, "compare")][-1] == "compare"
    assert load("jobs.compare:compare_run")


def _kept(settings: Settings, name: str) -> list[tuple[str, int]]:
    folder = Path(settings.run) / "compare" / "arms" / name / "plan"
    table = pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])
    return list(table.filter(pl.col("copies") > 0).select("file", "row").iter_rows())
