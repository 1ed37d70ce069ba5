"""An index of Adam's updates: rows as the moments say; a target's are of gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_loop import gradient_loop
from safetensors.torch import load_file
from tiny_models import save_language_model
from torch import Tensor, nn
from torch.nn import functional

from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError
from curate.models.index_rows import Header, check_alike
from curate.models.load import load_model
from curate.models.projection import Projection, draw_side
from jobs.cluster import InlineExecutor, Pool
from jobs.index import index_run
from jobs.influence_build import (
    World,
    build_tasks,
    build_work,
    open_part,
    pool_world,
    target_world,
)
from jobs.influence_sides import IndexOptions
from jobs.measurers import measurers
from jobs.run import raise_failures, run_tasks
from jobs.settings import Settings, parse_settings, task_settings
from jobs.target import target_task, target_work
from jobs.train import train_run

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat"]
FORMS = ["exact", "diagonal", "factored"]


def texts(count: int, seed: int) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    return pl.DataFrame({"text": [" ".join(draw.choice(WORDS, 1 + n % 6)) for n in range(count)]})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Eleven texts, a target of three, and a model that three steps have trained."""
    root = tmp_path_factory.mktemp("adam")
    texts(11, 0).write_parquet(root / "pool.parquet")
    texts(3, 1).write_parquet(root / "target.parquet")
    save_language_model(root / "lm", num_hidden_layers=1)
    train = {"max_steps": 3, "epochs": 4, "lr": 1e-3, "batch_tokens": 300, "save_moments": True}
    found = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": 48},
            "model": {"name": str(root / "lm"), "device": "cpu"},
            "checkpoints": {"train": train},
            "score": {"checkpoints": "last"},
            "index": {"held_out": 0.0, "partition_rows": 6},
        }
    )
    index_run(found, pool=INLINE)
    train_run(found, pool=INLINE)
    raise_failures("target", run_tasks("t", [target_task(found)], target_work, pool=INLINE))
    return found


def options(adam: Any = "none", reduction: Any = "mean", **projection: Any) -> IndexOptions:
    given: dict[str, Any] = {"dim": 3, **projection}
    return IndexOptions(
        projection=Projection(**given), dtype="float32", adam=adam, reduction=reduction
    )


def build(world: World, chosen: IndexOptions) -> Any:
    tasks = build_tasks(world, measurers(world.pool), chosen)
    outcome = run_tasks("influence", tasks, build_work, pool=INLINE)
    raise_failures("influence", outcome)
    return outcome


def read(world: World) -> tuple[Tensor, Header]:
    (measurer,) = measurers(world.pool)
    parts = [open_part(world.folder, part, measurer.slug) for part in world.folder.partitions()]
    return torch.cat([part.values() for part in parts]), parts[-1].header


def by_hand(settings: Settings, form: str, reduction: str, names: list[str]) -> np.ndarray:
    """Rows from single texts in float64, with the moments as they lie in the checkpoint."""
    (measurer,) = measurers(settings)
    loaded = load_model(settings.model, task_settings(settings), checkpoint=measurer.folder)
    model: Any = loaded.model.double()
    kept = load_file(measurer.folder / "moments.safetensors")
    rows: list[np.ndarray] = []
    frame = pl.read_parquet(RunFolder(Path(settings.run)).partitions()[0].address)
    for text in frame["text"]:
        tokenizer: Any = loaded.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = {"ids": torch.tensor([[tokenizer.bos_token_id, *ids][:48]])}

        def losses(model: nn.Module, batch: Any) -> Tensor:
            logits = model(input_ids=batch["ids"]).logits[0, :-1]
            return functional.cross_entropy(logits, batch["ids"][0, 1:], reduction=reduction)[None]

        whole = gradient_loop(model, losses, batch)
        blocks: list[np.ndarray] = []
        for name in names:
            g = whole[name][0].numpy()
            first = kept[f"gradient.{name}"].double().numpy()
            second = kept[f"square.{name}"].double().numpy()
            ranked = np.sort(second[second > 0])
            second = np.maximum(second, ranked[int(np.ceil(len(ranked) / 100)) - 1])
            if form == "exact":
                m = (0.9 * first + 0.1 * g) / (1 - 0.9**4)
                v = (0.999 * second + 0.001 * g**2) / (1 - 0.999**4)
                update = m / np.sqrt(v + 1e-16)
            else:
                v = second / (1 - 0.999**3) + 1e-16
                outer = np.outer(v.mean(1), v.mean(0)) / v.mean()
                update = g / np.sqrt(outer if form == "factored" else v)
            left, right = (
                draw_side(name, side, n, dim=3, seed=0)
                for side, n in zip(("left", "right"), g.shape, strict=True)
            )
            blocks.append((left.T @ update @ right).ravel())
        rows.append(np.concatenate(blocks))
    return np.stack(rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_updates_of_a_plain_loop_in_float64(
    settings: Settings, form: str, reduction: str
):
    """With the moments that the run's own training kept after its third step."""
    world = pool_world(settings)
    build(world, options(form, reduction))
    rows, header = read(world)
    names = [block.name for block in header.blocks]
    assert len(names) == 7
    wanted = by_hand(settings, form, reduction, names)
    tolerance = 2e-3 * np.abs(wanted).max()  # where V is tiny, float32's rounding of g shows
    np.testing.assert_allclose(rows, wanted, rtol=1e-3, atol=tolerance)
    assert np.corrcoef(rows.numpy().ravel(), wanted.ravel())[0, 1] > 0.999999
    assert header.adam is not None
    assert header.adam["form"] == form


@pytest.mark.parametrize("form", ["exact", "diagonal"])
def test_head_and_embedding_are_written_out_where_a_pass_does_not_show_them(
    settings: Settings, form: str, monkeypatch: pytest.MonkeyPatch
):
    """The logits are not kept, so that the head's gradient is asked for, one text at a time."""
    monkeypatch.setattr("curate.models.adam_pass._PIECE_NUMBERS", 9000)
    kept: dict[str, Any] = {}
    monkeypatch.setattr("jobs.influence_adam._last", kept)
    world = pool_world(settings)
    build(world, options(form, head=True, embedding=True))
    rows, header = read(world)
    names = [block.name for block in header.blocks]
    (prepared,) = kept.values()
    assert prepared.adam.whole == ("lm_head.weight",)
    assert prepared.adam.most_examples() == 1
    assert "model.embed_tokens.weight" in names
    wanted = by_hand(settings, form, "mean", names)
    np.testing.assert_allclose(rows, wanted, rtol=1e-3, atol=2e-3 * np.abs(wanted).max())


def test_another_form_is_another_index_and_the_targets_is_always_plain(settings: Settings):
    pool, target = pool_world(settings), target_world(settings)
    for world in (pool, target):
        build(world, options())
    plain_rows, plain_header = read(target)
    for form in FORMS:
        assert len(build(pool, options(form)).done) == 2
        assert not build(pool, options(form)).done
        assert not build(target, options(form)).done
        rows, header = read(pool)
        assert torch.equal(read(target)[0], plain_rows)
        with pytest.raises(ConfigError, match=rf"form of Adam \({form} and none\)"):
            check_alike(header, plain_header)
        check_alike(header, plain_header, is_query=True)
        with pytest.raises(ConfigError, match="what asks must be of gradients"):
            check_alike(header, header, is_query=True)
        with pytest.raises(ConfigError, match="Adam's moments"):
            check_alike(header, replace(header, adam={**(header.adam or {}), "moments": "x"}))
        with pytest.raises(ConfigError, match="loss reduction"):
            check_alike(header, replace(plain_header, reduction="sum"), is_query=True)
        assert rows.isfinite().all()


def test_other_moments_are_another_index(settings: Settings):
    (measurer,) = measurers(settings)
    path = measurer.folder / "moments.safetensors"
    before = path.read_bytes()
    world = pool_world(settings)
    build(world, options("diagonal"))
    try:
        path.write_bytes(before + b" ")
        assert len(build_tasks(world, [measurer], options("diagonal"))) == 2
        assert not any(
            task.output.is_done(task.fingerprint)
            for task in build_tasks(world, [measurer], options("diagonal"))
        )
        path.unlink()
        with pytest.raises(InputError, match="has no moments of Adam"):
            build_tasks(world, [measurer], options("diagonal"))
    finally:
        path.write_bytes(before)
    assert not build(world, options("diagonal")).done


def test_an_adapter_is_indexed_with_the_moments_of_its_own_training(
    settings: Settings, tmp_path: Path
):
    pytest.importorskip("peft")
    assert settings.checkpoints.train is not None
    changed = replace(
        settings,
        run=str(tmp_path / "run"),
        model=replace(settings.model, lora=parse_lora(rank=2)),
        checkpoints=replace(
            settings.checkpoints, train=replace(settings.checkpoints.train, max_steps=3)
        ),
    )
    index_run(changed, pool=INLINE)
    train_run(changed, pool=INLINE)
    world = pool_world(changed)
    build(world, options("exact"))
    rows, header = read(world)
    assert all("lora_" in block.name for block in header.blocks)
    assert bool((rows != 0).any(1).all())


def parse_lora(**fields: Any) -> Any:
    from curate.models.settings import LoRA

    return LoRA(**fields)
