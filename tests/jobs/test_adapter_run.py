"""A run that trains an adapter: its checkpoints hold the adapter alone, and scores stand on it."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from gradient_loop import gradient_loop
from safetensors.torch import load_file
from tiny_models import save_language_model
from torch import Tensor, nn
from torch.nn import functional

from curate.models.checkpoints import list_checkpoints
from curate.models.load import load_model
from curate.models.settings import CausalLM, Model
from curate.models.tasks import build_task
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.score import score_run
from jobs.settings import Settings, parse_settings
from jobs.train import train_run

pytest.importorskip("peft")

INLINE = Pool(InlineExecutor(), 1)
TEXTS = ["the cat in the hat", "a dog and the cat", "in the end", "the the the"] * 3


def trained(root: Path, base: Path, run: str) -> Settings:
    given: dict[str, Any] = {
        "run": str(root / run),
        "sources": {"web": {"path": str(root / "data"), "text": "text"}},
        "task": {"kind": "causal-lm", "max_tokens": 32},
        "model": {"name": str(base), "device": "cpu", "lora": {"rank": 2, "targets": ["q_proj"]}},
        "checkpoints": {"train": {"epochs": 2, "lr": 0.05, "batch_tokens": 64}},
        "score": {"scorers": ["grand", "loss"], "checkpoints": "last"},
        "index": {"held_out": 0.0},
    }
    settings = parse_settings(given)
    index_run(settings, pool=INLINE)
    train_run(settings, pool=INLINE)
    return settings


def losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, ids[0, 1:], reduction="sum")[None]


@pytest.mark.slow
def test_an_adapter_is_trained_saved_and_scored(tmp_path: Path):
    base = save_language_model(tmp_path / "base")
    (tmp_path / "data").mkdir()
    pl.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "data" / "a.parquet")
    settings = trained(tmp_path, base, "run")
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    last = checkpoints[-1].path
    assert not (last / "model.safetensors").exists()
    first, after = (load_file(c.path / "adapter_model.safetensors") for c in checkpoints[:2])
    assert sorted(first) == sorted(after)
    assert len(first) == 4
    assert all(not torch.equal(first[name], after[name]) for name in first)
    score_run(settings, pool=INLINE)
    (table,) = (tmp_path / "run" / "scores" / "grand").rglob("part-*.parquet")
    found = pl.read_parquet(table)["grand_sum"].to_list()
    loaded = load_model(Model(name=str(base), device="cpu"), CausalLM(), checkpoint=last)
    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": TEXTS}))
    for row in (0, 1, 2):
        ids = task.collate(encoded, [row])["input_ids"]  # pyright: ignore[reportArgumentType]
        grads = gradient_loop(loaded.model, losses, {"input_ids": ids})
        assert set(grads) == {n for n, p in loaded.model.named_parameters() if p.requires_grad}
        norm = float(sum(value.square().sum() for value in grads.values())) ** 0.5
        assert found[row] == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_training_an_adapter_twice_gives_the_same_bytes(tmp_path: Path):
    base = save_language_model(tmp_path / "base")
    (tmp_path / "data").mkdir()
    pl.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "data" / "a.parquet")
    files: list[dict[str, bytes]] = []
    for run in ("one", "two"):
        trained(tmp_path, base, run)
        last = list_checkpoints(tmp_path / run / "checkpoints")[-1].path
        files.append({path.name: path.read_bytes() for path in last.iterdir()})
    assert files[0] == files[1]
