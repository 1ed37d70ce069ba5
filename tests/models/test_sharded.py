"""Models in several places give what they give in one: offloaded layers, FSDP2 on two ranks."""

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
import torch.distributed as dist
from gradient_loop import assert_squares, gradient_loop, squares_of
from tiny_models import save_language_model
from torch import Tensor, multiprocessing, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from curate.errors import ConfigError
from curate.models import sharded
from curate.models.gradients import Engine, LowRank, Sides, Wanted
from curate.models.load import load_model
from curate.models.quantities import measure
from curate.models.settings import CausalLM, LoRA, Model
from curate.models.sharded import is_placed, is_spread, main_device, sharded_gradients
from curate.models.tasks import build_task

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
                         "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 1}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
IDS = torch.tensor([[5, 9, 5, 7, 11, 2], [3, 3, 8, 20, 1, 30], [40, 41, 42, 43, 44, 45]])


def losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def built(kind: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1)
    return model


def dispatched(kind: str, folder: Path) -> Any:
    """One block on disk, the other here, the norm behind them on disk."""
    from accelerate import big_modeling

    dispatch: Any = big_modeling.dispatch_model
    model = built(kind).double()
    blocks = "transformer.h" if kind == "gpt2" else "model.layers"
    last = "transformer.ln_f" if kind == "gpt2" else "model.norm"
    places = {name: "cpu" for name, _ in model.named_modules() if name and "." in name}
    places = {name: place for name, place in places.items() if name.count(".") == 1}
    places.pop(blocks)
    places |= {f"{blocks}.0": "disk", f"{blocks}.1": "cpu", last: "disk", "lm_head": "cpu"}
    return dispatch(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_layers_that_wait_on_disk_have_the_norms_of_a_loop(kind: str, tmp_path: Path):
    wanted = squares_of(gradient_loop(built(kind).double(), losses, {"input_ids": IDS}))
    model = dispatched(kind, tmp_path)
    assert sum(p.device.type == "meta" for p in model.parameters()) > 5
    assert is_spread(model)
    assert is_placed(model)
    assert main_device(model) == torch.device("cpu")
    engine = Engine(model)
    for _ in range(2):
        found = engine.measure(losses, {"input_ids": IDS}, num_examples=3)
        assert_squares(found.squares, {name: wanted[name] for name in found.squares})
    assert not engine.slow


def test_a_parameter_without_a_rule_that_waits_elsewhere_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.token = nn.Parameter(torch.empty(2, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.zeros(2)

    def odd_losses(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).sum((1, 2))

    with pytest.raises(ConfigError, match="parameter token has no layer"):
        Engine(Odd()).measure(odd_losses, {"x": torch.ones(2, 4, 3)}, num_examples=2)


def test_a_saved_model_is_spread_by_the_settings(tmp_path: Path):
    folder = save_language_model(tmp_path / "m", tie_word_embeddings=False)
    plain = load_model(Model(name=str(folder), device="cpu"), CausalLM())
    places: dict[str, int | str] = {"model.embed_tokens": "cpu", "model.layers.0": "disk",
                                    "model.layers.1": "cpu", "model.norm": "disk",
                                    "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread = load_model(Model(name=str(folder), device_map=places), CausalLM())
    assert is_spread(spread.model)
    assert spread.digest == plain.digest
    assert spread.device == torch.device("cpu")
    rows = _measured(plain), _measured(spread)
    assert rows[0].keys() == rows[1].keys()
    for name, values in rows[0].items():
        torch.testing.assert_close(rows[1][name], values, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_layers_that_wait_on_disk_is_refused(tmp_path: Path):
    pytest.importorskip("peft")
    folder = save_language_model(tmp_path / "m", tie_word_embeddings=False)
    places: dict[str, int | str] = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ConfigError, match="wait in memory or on disk"):
        load_model(Model(name=str(folder), device_map=places, lora=LoRA()), CausalLM())


def _measured(loaded: Any) -> dict[str, Tensor]:
    import polars as pl

    task = build_task(CausalLM(), loaded.tokenizer)
    encoded = task.encode(pl.DataFrame({"text": ["the cat in the hat", "a", "and another one"]}))
    wanted = {"loss", "grad_sq_norm"}
    found, _ = measure(
        loaded.model, task, encoded, batch_tokens=256, device=loaded.device, wanted=wanted
    )
    return {name: found[name] for name in sorted(wanted)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, port: int, folder: str) -> None:
    """Measure this rank's examples, sharded and not; write the largest relative errors."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    draw = torch.Generator().manual_seed(rank)
    batch = {"input_ids": torch.randint(0, 50, (3, 9), generator=draw)}
    wrong: dict[str, Any] = {}
    for kind in CONFIGS:
        plain, model = built(kind), built(kind)
        for block in model.transformer.h if kind == "gpt2" else model.model.layers:
            fully_shard(block)
        fully_shard(model)
        engine, reference = Engine(model), Engine(plain)
        rank_two = {
            name: LowRank(*(torch.randn(n, 2, generator=draw) for n in p.shape))
            for name, p in plain.named_parameters()
            if p.dim() == 2
        }
        name = next(iter(rank_two))
        sides = {name: Sides(rank_two[name].left, rank_two[name].right)}
        wanted = Wanted(directions={"v": rank_two}, projections=sides)
        given: dict[str, Any] = {"num_examples": 3, "wanted": wanted}
        engine.measure(losses, batch, **given)
        found = engine.measure(losses, batch, **given)
        other = reference.measure(losses, batch, **given)
        norm = other.total().sqrt()
        names = [n for n, _ in plain.named_parameters()]
        truth = sharded_gradients(model, losses, batch, torch.ones(3), names)
        wrong[kind] = {
            "sharded": all(not sharded.is_whole(p) for p in model.parameters()),
            "norm": float(((found.total().sqrt() - norm) / norm).abs().max()),
            "parameters": max(
                float(((found.squares[n] - v).abs() / (other.total())).max())
                for n, v in other.squares.items()
            ),
            "inner": float(((found.inner["v"] - other.inner["v"]) / norm).abs().max()),
            "projected": float((found.projections[name] - other.projections[name]).abs().max()),
            "slow": engine.slow,
            "checked": sorted(truth) == sorted(names),
        }
        # Training goes on as before.
        model.requires_grad_(True)
        losses(model, batch).sum().backward()
        wrong[kind]["gradients"] = all(p.grad is not None for p in model.parameters())
    (Path(folder) / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_parameters_sharded_over_two_ranks_have_the_norms_of_whole_ones(tmp_path: Path):
    multiprocessing.spawn(_rank, args=(_free_port(), str(tmp_path)), nprocs=2)  # pyright: ignore
    for rank in (0, 1):
        for kind, found in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            place = f"rank {rank}, {kind}: {found}"
            assert found["sharded"], place
            assert found["checked"], place
            assert found["slow"] == [], place
            assert max(found["norm"], found["parameters"], found["inner"]) <= 1e-6, place
            assert found["projected"] <= 1e-4, place
            assert found["gradients"], place
