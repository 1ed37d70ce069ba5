"""ScaleBiO in the proxy's loop: killed and resumed, on two ranks, with LISA and dropout."""

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
from proxy_case import LENGTH, VOCABULARY, make_task, open_data, write_domains
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.optimiser import Optimiser
from curate.models.sequences import Sequences
from mixers.lisa import Lisa
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy
from mixers.scalebio import ScaleBiO
from mixers.scalebio_rule import ScaleBiORule

SIZES = {"count": 64, "noise": 64, "repeat": 64}
PROXY = Proxy(steps=12, sequences=12, lr=1e-2, warmup=0.1, held_out=4, resume_every_seconds=0.0)
WAYS = {
    "plain": ScaleBiO(lr=0.3, target_sequences=5),
    "lisa": ScaleBiO(lr=0.3, target_sequences=5, lisa=Lisa(blocks=1, every=3)),
    "separate": ScaleBiO(lr=0.3, target_sequences=5, separate_batches=True),
}


def make_optimiser(settings: Proxy, *, dropout: float) -> Optimiser:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Optimiser(
        LlamaForCausalLM(config),
        settings.train,
        seed=1,
        total_steps=settings.steps,
        device=torch.device("cpu"),
    )


def run(
    folder: Path,
    settings: ScaleBiO,
    proxy: Proxy = PROXY,
    *,
    die_after: int | None = None,
    dropout: float = 0.0,
) -> tuple[ProxyResult, ScaleBiORule, Optimiser]:
    """A run towards a target of repeated numbers."""
    folder.mkdir(exist_ok=True, parents=True)
    mine = folder / str(os.environ.get("RANK", 0))
    mine.mkdir(exist_ok=True)
    paths = [write_domains(mine / "data.safetensors", SIZES)]
    goal = write_domains(mine / "target.safetensors", {"repeat": 40}, seed=5)
    target = Sequences.open([goal], parts=("reference", "proxy"))
    data = open_data(paths, target=target)
    rule = ScaleBiORule(settings, len(SIZES))
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
    for step in (4, 9):
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
    pieces = replace(PROXY, piece_tokens=5 * LENGTH)
    split, *_ = run(tmp_path / "split", WAYS[name], pieces)
    assert split.mixture == pytest.approx(whole.mixture, rel=1e-3)
    assert split.held_out == pytest.approx(whole.held_out, rel=1e-3)


def test_the_source_that_is_like_the_target_gains(tmp_path: Path):
    proxy = replace(PROXY, steps=80)
    result, *_ = run(tmp_path, ScaleBiO(lr=0.05, target_sequences=8), proxy)
    assert max(result.mixture, key=lambda name: result.mixture[name]) == "repeat"
    assert result.mixture["repeat"] > 0.5
    table = pl.read_parquet(tmp_path / "trajectory.parquet")
    assert set(ScaleBiORule.columns) < set(table.columns)
    repeat = table.filter(pl.col("domain") == "repeat", pl.col("step") > 20)
    assert float(repeat["difference"].to_numpy().mean()) < 0
    first = table.filter(pl.col("step") == 1)
    assert first["loss_w"].to_list() == first["loss_u"].to_list()
    assert first["loss"].to_list() == pytest.approx(first["loss_w"].to_list())


def numbers(found: tuple[ProxyResult, ScaleBiORule, Optimiser]) -> dict[str, Any]:
    result, rule, optimiser = found
    weights = [*optimiser.trained, *rule.second.trained]
    return {
        "mixture": list(result.mixture.values()),
        "weights": torch.cat([w.detach().flatten() for w in weights]).tolist(),
        "moments": sorted(key for key in optimiser.state() if key.startswith("adamw")),
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
    """With five sequences of the target, so that the ranks have different shares of it."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for way, settings in WAYS.items():
        alone = numbers(run(tmp_path / "alone" / way, settings))
        assert first[way] == second[way], way
        assert first[way]["mixture"] == pytest.approx(alone["mixture"], rel=1e-3), way
        assert first[way]["weights"] == pytest.approx(alone["weights"], abs=2e-4), way
        assert first[way]["moments"] == alone["moments"], way
