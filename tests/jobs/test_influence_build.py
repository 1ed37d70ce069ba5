"""The gradient index of a run: right rows, the same after a kill and on workers; refusals."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gradient_loop import gradient_loop
from killed import found
from safetensors.torch import load_file
from tiny_models import save_language_model
from torch import Tensor, nn
from torch.nn import functional

from curate.config import plain, to_yaml
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.errors import ConfigError, InputError, OutputError
from curate.models.index_pass import IndexPass
from curate.models.index_rows import (
    Header,
    RowsWriter,
    Storage,
    check_alike,
    open_rows,
    read_header,
)
from curate.models.load import load_model
from curate.models.mlp import MLP
from curate.models.projection import Projection, check_sides, draw_side
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.index import index_run
from jobs.influence_build import (
    World,
    build_tasks,
    build_work,
    open_part,
    pool_world,
    rows_output,
    target_world,
    vectors_output,
)
from jobs.influence_sides import IndexOptions, sample_rows, sides_of, sides_tasks, sides_work
from jobs.measurers import measurers
from jobs.run import raise_failures, run_tasks
from jobs.settings import Settings, parse_settings, task_settings
from jobs.target import target_task, target_work

INLINE = Pool(InlineExecutor(), 1)
WORDS = ["the", "cat", "in", "a", "hat", "then", "sat"]


def texts(count: int, seed: int) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    return pl.DataFrame({"text": [" ".join(draw.choice(WORDS, 1 + n % 6)) for n in range(count)]})


def language_run(root: Path, run: str = "run", **changes: Any) -> Settings:
    """Thirteen texts in partitions of four, a target of three, and a small language model."""
    if not (root / "lm").exists():
        texts(13, 0).write_parquet(root / "pool.parquet")
        texts(3, 1).write_parquet(root / "target.parquet")
        save_language_model(root / "lm", num_hidden_layers=1)
    settings = parse_settings(
        {
            "run": str(root / run),
            "sources": {"pool": {"path": str(root / "pool.parquet"), "text": "text"}},
            "target": {"path": str(root / "target.parquet"), "text": "text"},
            "task": {"kind": "causal-lm", "max_tokens": 48},
            "model": {"name": str(root / "lm"), "device": "cpu"},
            "index": {"held_out": 0.0, "partition_rows": 4},
            **changes,
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def table_run(root: Path, rows: pl.DataFrame, *, classes: int = 2, **changes: Any) -> Settings:
    """Rows of numbers in partitions of five, and a network."""
    rows.write_parquet(root / "rows.parquet")
    if not (root / "mlp").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            width = rows["x"].to_numpy().shape[1]
            MLP(num_features=width, num_classes=classes, hidden=(6,)).save_pretrained(root / "mlp")
    source = {"path": str(root / "rows.parquet"), "features": "x", "label": "label"}
    settings = parse_settings(
        {
            "run": str(root / "run"),
            "sources": {"rows": source},
            "task": {"kind": "tabular-classification", "num_classes": classes},
            "model": {"name": str(root / "mlp"), "device": "cpu"},
            "index": {"held_out": 0.0, "partition_rows": 5},
            **changes,
        }
    )
    index_run(settings, pool=INLINE)
    return settings


def options(dtype: Storage = "float32", *, reduction: Any = "mean", norms: bool = False,
            **projection: Any) -> IndexOptions:  # fmt: skip
    chosen: dict[str, Any] = {"dim": 3, **projection}
    return IndexOptions(
        projection=Projection(**chosen),
        dtype=dtype,
        reduction=reduction,
        norms=norms,
    )


def build(world: World, chosen: IndexOptions, pool: Pool = INLINE) -> Any:
    tasks = build_tasks(world, measurers(world.settings), chosen)
    outcome = run_tasks("influence", tasks, build_work, pool=pool, keep_receipts=True)
    raise_failures("influence", outcome)
    return outcome


def read(world: World) -> tuple[Tensor, pl.DataFrame, Header]:
    """All rows, their table, and the last header."""
    (measurer,) = measurers(world.settings)
    parts = [open_part(world.folder, part, measurer.slug) for part in world.folder.partitions()]
    tables = [part.table.drop("scales", strict=False) for part in parts]
    return torch.cat([part.values() for part in parts]), pl.concat(tables), parts[-1].header


def bytes_of(world: World) -> dict[str, bytes]:
    root = world.folder.root / "influence"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/part-*"))}


def by_hand(settings: Settings, folder: RunFolder, projection: Projection) -> dict[str, Tensor]:
    """Rows, losses, positions and squared norms from a loop over single texts in float64."""
    loaded = load_model(settings.model, task_settings(settings))
    model: Any = loaded.model.double()
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    names = matrices + (["lm_head.weight"] if projection.head else [])
    found: dict[str, list[Tensor]] = {"rows": [], "loss": [], "positions": [], "squares": []}
    for part in folder.partitions():
        address = pl.read_parquet(part.address)[part.first_row : part.first_row + part.num_rows]
        for text in address["text"]:
            tokenizer: Any = loaded.tokenizer
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [tokenizer.bos_token_id, *ids][:48]
            batch = {"ids": torch.tensor([ids])}

            def losses(model: nn.Module, batch: Any) -> Tensor:
                logits = model(input_ids=batch["ids"]).logits[0, :-1]
                return functional.cross_entropy(logits, batch["ids"][0, 1:])[None]

            whole = gradient_loop(model, losses, batch)
            rows: list[Tensor] = []
            for name in names:
                g = whole[name][0]
                left, right = (
                    torch.from_numpy(
                        draw_side(name, side, n, dim=projection.dim, seed=projection.seed)
                    )
                    for side, n in zip(("left", "right"), g.shape, strict=True)
                )
                rows.append((left.T @ g @ right).flatten())
            found["rows"].append(torch.cat(rows))
            found["loss"].append(losses(model, batch)[0].detach())
            found["positions"].append(torch.tensor(len(ids) - 1.0))
            squares = [whole[name].square().sum() for name in names]
            found["squares"].append(torch.stack(squares).sum())
    return {name: torch.stack(values).double() for name, values in found.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_are_those_of_a_plain_loop_in_float64(tmp_path: Path, reduction: str):
    """For pool and target alike, losses, positions and norms beside them."""
    settings = language_run(tmp_path)
    raise_failures("target", run_tasks("t", [target_task(settings)], target_work, pool=INLINE))
    chosen = options(reduction=reduction, norms=True, head=True, seed=4)
    for world in (pool_world(settings), target_world(settings)):
        build(world, chosen)
        rows, table, header = read(world)
        wanted = by_hand(settings, world.folder, chosen.projection)
        factor = torch.ones(1).double() if reduction == "mean" else wanted["positions"]
        wide = wanted["rows"] * factor[:, None]
        torch.testing.assert_close(
            rows.double(), wide, rtol=1e-4, atol=1e-5 * float(wide.abs().max())
        )
        for name, values in (
            ("loss", wanted["loss"]),
            ("num_positions", wanted["positions"]),
            ("squared_norm", wide.square().sum(1)),
            ("grad_sq_norm", wanted["squares"] * factor.square()),
        ):
            np.testing.assert_allclose(table[name], values, rtol=1e-4, err_msg=name)
        assert table["row"].to_list() == list(range(len(rows)))
        assert header.width == sum(block.size for block in header.blocks) == 8 * 9


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 1 / 250)]
)
def test_smaller_types_hold_the_same_rows(tmp_path: Path, dtype: Storage, error: float):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    exact, table, _ = read(world)
    build(world, options(dtype))
    rows, other, header = read(world)
    assert header.dtype == dtype
    assert ((rows - exact).abs() <= error * exact.abs().amax(1, keepdim=True)).all()
    assert table.equals(other)
    norms = exact.double().square().sum(1)
    np.testing.assert_allclose(table["squared_norm"], norms, rtol=1e-6)


def test_batches_and_partitions_do_not_change_the_rows(tmp_path: Path):
    first = pool_world(language_run(tmp_path))
    build(first, options())
    rows, table, _ = read(first)
    small = language_run(tmp_path, "small", score={"batch_tokens": 40},
                         index={"held_out": 0.0, "partition_rows": 5})  # fmt: skip
    build(pool_world(small), options())
    others, again, _ = read(pool_world(small))
    torch.testing.assert_close(rows, others, rtol=1e-5, atol=1e-6 * float(rows.abs().max()))
    assert table.select(KEY).equals(again.select(KEY))


def test_a_lack_of_memory_halves_the_batch_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    rows, table, _ = read(world)
    right = IndexPass.measure

    def short_of_memory(self: IndexPass, batch: Any, num_examples: int) -> Any:
        found = right(self, batch, num_examples)
        if num_examples > 2:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(IndexPass, "measure", short_of_memory)
    for path in (tmp_path / "run" / "influence").rglob("*.vectors.json"):
        path.unlink()
    outcome = build(world, options())
    assert sum("halved" in receipt for receipt in outcome.receipts.values()) == 4
    others, after, _ = read(world)
    torch.testing.assert_close(rows, others, rtol=1e-5, atol=1e-6 * float(rows.abs().max()))
    np.testing.assert_allclose(table["loss"], after["loss"], rtol=1e-6)


def numbers(count: int = 13, width: int = 4) -> pl.DataFrame:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(count, width)).astype(np.float32)
    return pl.DataFrame({"x": features, "label": (features[:, 0] > 0).astype(np.int64)})


def linear(root: Path, slope: float) -> None:
    """Two classes; the logits are plus and minus `slope` times the first number."""
    model = MLP(num_features=4, num_classes=2)
    with torch.no_grad():
        first = torch.tensor([slope, 0, 0, 0])
        model.layers[0].weight.copy_(torch.stack([first, -first]))  # pyright: ignore
        model.layers[0].bias.zero_()  # pyright: ignore
    model.save_pretrained(root / "mlp")


def with_number(value: float, row: int) -> pl.DataFrame:
    rows = numbers()
    features = rows["x"].to_numpy().copy()
    features[row] = value
    return rows.with_columns(pl.Series("x", features))


def test_a_gradient_that_is_not_finite_has_no_row_and_is_counted(tmp_path: Path):
    linear(tmp_path, 10)
    world = pool_world(table_run(tmp_path, with_number(3e38, 7)))
    outcome = build(world, options("float16"))
    values, table, _ = read(world)
    assert table["squared_norm"].is_null().arg_true().to_list() == [7]
    assert values.abs().amax(1).eq(0).nonzero().flatten().tolist() == [7]
    assert sum(receipt["not_finite"] for receipt in outcome.receipts.values()) == 1
    assert sum(receipt["unscored"] for receipt in outcome.receipts.values()) == 1


def test_gradients_beyond_float16_are_scaled_and_said(tmp_path: Path):
    """With equal logits the gradient is half the example's numbers: 2e6 where they are 4e6."""
    linear(tmp_path, 0)
    world = pool_world(table_run(tmp_path, with_number(4e6, 2)))
    outcome = build(world, options("float16", dim=8))
    values, table, _ = read(world)
    half = torch.full((1, 4), 2e6)
    sign = 1 if numbers()["label"][2] else -1
    torch.testing.assert_close(values[2], torch.cat([half, -half]).flatten() * sign, rtol=1e-3,
                               atol=0)  # fmt: skip
    assert table["squared_norm"].null_count() == 0
    assert sum(receipt["rescaled"] for receipt in outcome.receipts.values()) == 1


def test_an_example_without_a_counted_position_has_no_row(tmp_path: Path):
    save_language_model(tmp_path / "lm", num_hidden_layers=1)
    prompts = ["the cat"] * 5
    prompts[3] = "the cat " * 30
    pairs = pl.DataFrame({"p": prompts, "r": [f"in a hat {n}" for n in range(5)]})
    pairs.write_parquet(tmp_path / "pairs.parquet")
    source = {"path": str(tmp_path / "pairs.parquet"), "prompt": "p", "response": "r"}
    texts(2, 0).write_parquet(tmp_path / "target.parquet")
    settings = language_run(tmp_path, sources={"pairs": source},
                            task={"kind": "causal-lm", "max_tokens": 24})  # fmt: skip
    world = pool_world(settings)
    outcome = build(world, options("int8"))
    values, table, _ = read(world)
    for name in ("loss", "squared_norm", "num_scored"):
        assert table[name].is_null().arg_true().to_list() == [3]
    assert values.abs().amax(1).eq(0).nonzero().flatten().tolist() == [3]
    assert sum(receipt["unscored"] for receipt in outcome.receipts.values()) == 1


def test_what_is_done_is_not_done_again_and_an_option_redoes_all(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    assert len(build(world, options()).done) == 4
    before = bytes_of(world)
    assert not build(world, options()).done
    for other in (options(seed=1), options(reduction="sum"), options("int8"), options(dim=2),
                  options(norms=True), options(parameters="mlp")):  # fmt: skip
        tasks = build_tasks(world, measurers(settings), other)
        assert not any(task.is_done() for task in tasks)
    part = world.folder.partitions()[1]
    vectors_output(world.folder, part, "model").path.unlink()
    assert len(build(world, options()).done) == 1
    assert bytes_of(world) == before


def test_a_truncated_file_is_built_again_and_refused_by_readers(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    before = bytes_of(world)
    path = vectors_output(world.folder, world.folder.partitions()[0], "model").path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="is damaged: it has"):
        open_rows(path)
    assert len(build(world, options()).done) == 1
    assert bytes_of(world) == before


def test_a_table_of_another_index_is_refused(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    part = world.folder.partitions()[2]
    found = open_part(world.folder, part, "model")
    assert torch.equal(found.values(slice(1, 3)), found.values()[1:3])
    table = rows_output(world.folder, part, "model")
    table.write(lambda path: found.table.write_parquet(path), "another")
    with pytest.raises(InputError, match="the table beside it is of another index"):
        open_part(world.folder, part, "model")
    table.path.write_bytes(table.path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        InputError, match=r"\.vectors is damaged: .*\.parquet is missing or dam"
    ) as e:
        open_part(world.folder, part, "model")
    assert "remove it and run the same command again" in e.value.fix
    table.path.unlink()
    assert len(build(world, options()).done) == 1
    assert torch.equal(open_part(world.folder, part, "model").values(), found.values())


def test_another_model_makes_another_index_that_is_refused_beside_the_first(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    path = vectors_output(world.folder, world.folder.partitions()[0], "model").path
    first = read_header(path)
    save_language_model(tmp_path / "lm", num_hidden_layers=1, seed=5)
    assert len(build(world, options()).done) == 4
    with pytest.raises(ConfigError, match=r"cannot be compared: they differ in model \("):
        check_alike(first, read_header(path))
    changed = parse_settings({**plain(settings), "task": {"kind": "causal-lm", "max_tokens": 20}})
    build(pool_world(changed), options(reduction="sum"))
    with pytest.raises(ConfigError, match=r"differ in loss reduction .*model .*task"):
        check_alike(first, read_header(path))


def test_the_sides_of_an_index_can_be_drawn_again(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options(seed=9))
    header = read(world)[2]
    loaded = load_model(settings.model, task_settings(settings))
    check_sides(header.projection, sides_of(loaded, options(seed=9)))
    with pytest.raises(ConfigError, match="is not the one of seed 9"):
        check_sides(header.projection, sides_of(loaded, options(seed=8)))


def test_principal_axes_of_the_pool_serve_pool_and_target(tmp_path: Path):
    """The top axes of E[x x^T] and E[g g^T], by a loop over single texts in float64."""
    settings = language_run(tmp_path)
    raise_failures("target", run_tasks("t", [target_task(settings)], target_work, pool=INLINE))
    chosen = options(init="pca", parameters="down_proj")
    with pytest.raises(InputError, match=r"sides\.safetensors is damaged"):
        build(pool_world(settings), chosen)
    tasks = sides_tasks(settings, measurers(settings), chosen)
    raise_failures("axes", run_tasks("axes", tasks, sides_work, pool=INLINE))
    assert sides_tasks(settings, measurers(settings), chosen)[0].is_done()
    assert not sides_tasks(settings, measurers(settings), options(init="pca"))[0].is_done()
    headers = [
        read_after(world, chosen) for world in (pool_world(settings), target_world(settings))
    ]
    check_alike(*headers, names=("pool", "target"))
    sides = load_file(tmp_path / "run" / "influence" / "model" / "sides.safetensors")
    for side, wanted in zip(("left", "right"), axes_by_hand(settings), strict=True):
        found = sides[f"model.layers.0.mlp.down_proj.weight/{side}"].double()
        torch.testing.assert_close(found.T @ found, torch.eye(3).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-3, rtol=0)


def read_after(world: World, chosen: IndexOptions) -> Header:
    build(world, chosen)
    return read(world)[2]


def axes_by_hand(settings: Settings) -> list[Tensor]:
    loaded = load_model(settings.model, task_settings(settings))
    model: Any = loaded.model.double()
    layer = model.model.layers[0].mlp.down_proj
    kept: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _m, args, _o: kept.update(x=args[0][0]))
    layer.register_full_backward_hook(lambda _m, _i, grads: kept.update(g=grads[0][0]))
    moments: dict[str, Any] = {"g": 0, "x": 0}
    for text in pl.read_parquet(Path(settings.run).parent / "pool.parquet")["text"]:
        tokenizer: Any = loaded.tokenizer
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        given = torch.tensor([ids])
        functional.cross_entropy(model(input_ids=given).logits[0, :-1], given[0, 1:]).backward()
        for name in moments:  # the last position predicts nothing: its gradient is zero
            moments[name] += kept[name][:-1].T @ kept[name][:-1]
    return [torch.linalg.eigh(moments[name]).eigenvectors[:, -3:] for name in ("g", "x")]


def test_a_sample_is_drawn_from_all_partitions(tmp_path: Path):
    settings = language_run(tmp_path)
    run = RunFolder(tmp_path / "run")
    found = sample_rows(run, Projection(sample=6))
    assert [part.name for part, _ in found] == [part.name for part in run.partitions()]
    assert [len(rows) for _, rows in found] == [2, 2, 2, 2]
    assert all(rows == sorted(set(rows)) for _, rows in found)
    assert [rows for _, rows in sample_rows(run, Projection(sample=6, seed=1))] != [
        rows for _, rows in found]  # fmt: skip
    whole = sample_rows(run, Projection())
    assert sum(len(rows) for _, rows in whole) == 13
    assert settings.index.partition_rows == 4


def test_a_full_disk_is_said_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    calls: list[int] = []
    right = RowsWriter.write

    def full(self: RowsWriter, rows: Any, stored: Any) -> None:
        calls.append(len(stored))
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        right(self, rows, stored)

    monkeypatch.setattr(RowsWriter, "write", full)
    with pytest.raises(OutputError, match=r"part-.*\.vectors could not be written: No space left"):
        build(world, options())
    monkeypatch.setattr(RowsWriter, "write", right)
    done = [task for task in build_tasks(world, measurers(settings), options()) if task.is_done()]
    files = list((tmp_path / "run" / "influence").rglob("part-*"))
    assert len([path for path in files if path.suffix == ".vectors"]) == len(done) == 2
    assert len(build(world, options()).done) == 2


@pytest.mark.slow
def test_workers_write_the_same_bytes(tmp_path: Path):
    inline = pool_world(language_run(tmp_path))
    build(inline, options("int8"))
    other = pool_world(language_run(tmp_path, "dask"))
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        build(other, options("int8"), pool)
    assert bytes_of(inline) == bytes_of(other)


@pytest.mark.slow
def test_a_kill_loses_one_partition_and_changes_no_byte(tmp_path: Path):
    settings = language_run(tmp_path)
    world = pool_world(settings)
    build(world, options())
    whole = bytes_of(world)
    killed = pool_world(language_run(tmp_path, "killed"))
    (tmp_path / "settings.yaml").write_text(to_yaml(plain(killed.settings)))
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(tmp_path / "settings.yaml")])
    deadline = time.monotonic() + 120
    marks = tmp_path / "killed" / "influence"
    while not found(marks, "**/*.vectors.json"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = build(killed, options())
    assert outcome.skipped
    assert outcome.done
    assert bytes_of(killed) == whole


SLOWLY = """
import sys, time
from pathlib import Path
import yaml
from curate.models.index_rows import RowsWriter
from curate.models.projection import Projection
from jobs.cluster import InlineExecutor, Pool
from jobs.influence_build import build_tasks, build_work, pool_world
from jobs.influence_sides import IndexOptions
from jobs.measurers import measurers
from jobs.run import run_tasks
from jobs.settings import parse_settings

right = RowsWriter.write

def slow(self, rows, stored):
    time.sleep(0.3)
    right(self, rows, stored)

RowsWriter.write = slow
world = pool_world(parse_settings(yaml.safe_load(Path(sys.argv[1]).read_text())))
chosen = IndexOptions(projection=Projection(dim=3), dtype="float32")
tasks = build_tasks(world, measurers(world.settings), chosen)
run_tasks("influence", tasks, build_work, pool=Pool(InlineExecutor(), 1))
"""
