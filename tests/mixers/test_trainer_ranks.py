"""Two processes that train together see and learn what one process does."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
from online_training import examples, language_model, parameters, trainer
from torch.multiprocessing.spawn import spawn

from mixers.online import LossReweighting, MixtureCallback, MixtureStream, apply_weights

WAYS: dict[str, dict[str, Any]] = {
    "dispatched": {},
    "sharded": {"accelerator_config": {"dispatch_batches": False}},
    "examples": {"accelerator_config": {"dispatch_batches": False}},
    "column": {},
    "local": {"average_tokens_across_devices": False},
}


def trained(folder: Path, way: str, *, batch: int) -> tuple[list[float], list[dict[str, float]]]:
    """Three steps of 8 examples, four at a time over all ranks; the mixture changes after one."""
    rows = examples(40, ragged=way != "local")
    names = {"a": rows[:20], "b": rows[20:]}
    source = MixtureStream(names, {"a": 0.5, "b": 0.5}, seed=1, domain_column="curate_domain")
    made = trainer(
        folder,
        language_model(),
        source,
        steps=3,
        batch=batch,
        accumulation=2,
        callbacks=[MixtureCallback(source, {1: {"a": 1, "b": 3}})],
        remove_unused_columns=False,
        **WAYS[way],
    )
    settings = LossReweighting(uniform_share=0, robust=True, window_steps=2)
    average: Any = "examples" if way in ("examples", "local") else "tokens"
    weights = "curate_weight" if way == "column" else settings
    apply_weights(made, weights, domains=["a", "b"], average=average)
    made.train()
    told = [entry for entry in made.state.log_history if "weights/largest" in entry]
    return parameters(made.model).tolist(), told


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
    found = {way: trained(Path(folder), way, batch=2) for way in WAYS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for way in WAYS:
        alone, told = trained(tmp_path / "alone", way, batch=4)
        assert first[way][0] == pytest.approx(second[way][0], abs=0)
        assert first[way][0] == pytest.approx(alone, rel=1e-4, abs=1e-5), way
        for entry, other in zip(told, first[way][1], strict=True):
            for key, value in entry.items():
                if key.startswith("weights/"):
                    assert other[key] == pytest.approx(value, rel=1e-4), (way, key)
