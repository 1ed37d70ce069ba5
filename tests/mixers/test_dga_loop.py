"""DGA in the proxy's loop: killed and resumed, on two ranks, in pieces, on a basis."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
from proxy_case import LENGTH, make_optimiser, make_task, open_data, write_domains
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from curate.models.optimiser import Optimiser
from curate.models.sequences import Sequences
from mixers.dga import DGA
from mixers.dga_rule import DGARule
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy

SIZES = {"count": 64, "noise": 64, "repeat": 64}
PROXY = Proxy(steps=12, sequences=12, lr=1e-2, warmup=0.1, held_out=4, resume_every_seconds=0.0)
MEASURED: dict[str, Any] = {"every": 3, "sequences": 5, "target_sequences": 7, "warm_share": 0.1}
BASIS = {"most": {"count": 1.0, "noise": 1.0, "repeat": 0.5}, "rest": {"repeat": 1.0}}
WAYS = {
    "cosine": DGA(**MEASURED),
    "raw": DGA(**MEASURED, form="raw", precondition="adam", beta=0.5),
    "capped": DGA(**MEASURED, max_epochs=0.8),
    "basis": DGA(**MEASURED, basis=BASIS),
}


def run(
    folder: Path,
    settings: DGA,
    proxy: Proxy = PROXY,
    *,
    die_after: int | None = None,
    dropout: float = 0.0,
) -> tuple[ProxyResult, DGARule, Optimiser]:
    """A run towards a target of repeated numbers."""
    mine = folder / str(os.environ.get("RANK", 0))
    mine.mkdir(exist_ok=True, parents=True)
    paths = [write_domains(mine / "data.safetensors", SIZES)]
    goal = write_domains(mine / "target.safetensors", {"repeat": 40}, seed=5)
    data = open_data(paths, target=Sequences.open([goal], parts=("reference", "proxy")))
    sequences = data.sequences
    rule = DGARule(settings, sequences.domains, torch.from_numpy(sequences.sizes))
    optimiser = make_optimiser(proxy, dropout=dropout)

    def told(step: int, _weights: Tensor) -> None:
        if step == die_after:
            raise KeyboardInterrupt

    files = Files(folder=folder, fingerprint="f")
    result = run_proxy(optimiser, make_task(), data, rule, proxy, files, told=told)
    return result, rule, optimiser


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_dies_twice_ends_in_the_same_bits(name: str, tmp_path: Path):
    whole, rule, model = run(tmp_path / "whole", WAYS[name], dropout=0.2)
    for step in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", WAYS[name], die_after=step, dropout=0.2)
    again, other, model_again = run(tmp_path / "killed", WAYS[name], dropout=0.2)
    assert again == whole
    for mine, theirs in ((rule.state(), other.state()), (model.state(), model_again.state())):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(theirs[key], value), key
    tables = [pl.read_parquet(tmp_path / at / "trajectory.parquet") for at in ("whole", "killed")]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("name", WAYS)
def test_pieces_of_a_step_go_the_way_of_the_whole(name: str, tmp_path: Path):
    whole, *_ = run(tmp_path / "whole", WAYS[name])
    split, *_ = run(tmp_path / "split", WAYS[name], replace(PROXY, piece_tokens=2 * LENGTH))
    assert split.mixture == pytest.approx(whole.mixture, rel=1e-3)
    assert split.held_out == pytest.approx(whole.held_out, rel=1e-3)


def test_the_domain_of_the_target_gains_and_the_table_says_why(tmp_path: Path):
    settings = DGA(every=5, sequences=8, target_sequences=16)
    result, rule, _ = run(tmp_path, settings, replace(PROXY, steps=100))
    assert max(result.mixture, key=lambda name: result.mixture[name]) == "repeat"
    assert rule.weights["repeat"] > 0.6
    table = pl.read_parquet(tmp_path / "trajectory.parquet")
    measured = table.drop_nulls("alignment")
    assert measured["step"].unique(maintain_order=True).to_list() == list(range(6, 101, 5))
    repeat, noise = (
        measured.filter(pl.col("domain") == name)["alignment"] for name in ("repeat", "noise")
    )
    assert sum(repeat.to_list()) > sum(noise.to_list())
    last = table.filter(pl.col("step") == 100)
    assert last["epochs"].to_list() == pytest.approx(list(result.epochs.values()))
    # Sampled by the weights of the table: 12 sequences a step.
    drawn = table.group_by("domain", maintain_order=True).agg(pl.col("weight").sum() * 12)
    read = rule.state()["read"].tolist()
    assert drawn["weight"].to_list() == pytest.approx(read, rel=0.05, abs=12)


def test_a_capped_domain_is_gone_through_no_more_than_allowed(tmp_path: Path):
    settings = DGA(every=4, kappa=3.0, sequences=4, max_epochs=5.0, warm_share=0.0)
    proxy = replace(PROXY, steps=60)
    capped, *_ = run(tmp_path / "capped", settings, proxy)
    free, *_ = run(tmp_path / "free", replace(settings, max_epochs=None), proxy)
    assert free.epochs["repeat"] > 6
    # 60 steps of 12 are 4.3 epochs of each of the three.
    assert 4.9 <= capped.epochs["repeat"] <= 5.2


def numbers(found: tuple[ProxyResult, DGARule, Optimiser]) -> dict[str, Any]:
    result, rule, optimiser = found
    return {
        "mixture": list(result.mixture.values()),
        "schedule": rule.state()["schedule"].flatten().tolist(),
        "weights": torch.cat([w.detach().flatten() for w in optimiser.trained]).tolist(),
    }


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    found = {way: numbers(run(Path(folder, way), settings)) for way, settings in WAYS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_go_the_way_of_one(tmp_path: Path):
    """With odd numbers of sequences, so that the ranks have different shares of them."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for way, settings in WAYS.items():
        alone = numbers(run(tmp_path / "alone" / way, settings))
        assert first[way] == second[way], way
        assert first[way]["schedule"] == pytest.approx(alone["schedule"], rel=1e-3), way
        assert first[way]["mixture"] == pytest.approx(alone["mixture"], rel=1e-3), way
        assert first[way]["weights"] == pytest.approx(alone["weights"], abs=2e-4), way
