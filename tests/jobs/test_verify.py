"""Verification names every file that is not as it was written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from data.planned_run import Row, planned_run

from curate.data.files import read_json, write_json
from curate.data.layout import RunFolder
from curate.data.shard_folder import DamageError
from curate.errors import CurateError, InputError
from curate.models.checkpoints import Checkpoint, Moments, facts_of, save_checkpoint
from curate.models.mlp import MLP
from jobs.cluster import open_pool
from jobs.plan import plan_run
from jobs.training_work import done_output
from jobs.verify import verify_shards
from jobs.write import write_run
from tests.jobs.scored_run import POOL, scored_run


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    table = pa.table({"text": [f"text {i} {i**7}" for i in range(200)]})
    settings = planned_run(
        tmp_path, {"a": {"x.parquet": table}}, lambda _s, _f, row: Row("ab"[row % 2])
    )
    with open_pool(settings.cluster) as pool:
        write_run(settings, pool=pool)
    return tmp_path / "run" / "shards"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


A, B = "data/a/train-00000-of-00001.parquet", "data/b/train-00000-of-00001.parquet"

DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one flipped bit": (lambda f: flip(f / A), [f"{A}: changed: its digest"]),
    "a missing shard": (lambda f: (f / B).unlink(), [f"{B}: missing"]),
    "a cut shard": (lambda f: (f / A).write_bytes((f / A).read_bytes()[:-1]), [f"{A}: changed: "]),
    "another shard": (
        lambda f: (f / "data/a/train-00001-of-00001.parquet").write_bytes(b"x"),
        ["data/a/train-00001-of-00001.parquet: not in the manifest"],
    ),
    "a folder with a shard": (
        lambda f: (f / "data" / "c").mkdir() or (f / "data/c/mine.parquet").write_bytes(b""),
        ["data/c/mine.parquet: not in the manifest"],
    ),
    "what a killed writer leaves": (
        lambda f: (f / "data/a/.train-00000-of-00001.parquet.77.tmp").write_bytes(b"x"),
        ["data/a/.train-00000-of-00001.parquet.77.tmp: not in the manifest"],
    ),
    "a changed mixture": (
        lambda f: (f / "mixture.json").write_text("{}"),
        ["mixture.json: changed"],
    ),
    "two things at once": (
        lambda f: (flip(f / A), (f / B).unlink()),
        [f"{A}: changed", f"{B}: missing"],
    ),
    "shards exchanged": (
        lambda f: (f / A).rename(f / "t") and (f / B).rename(f / A) and (f / "t").rename(f / B),
        [f"{A}: ", f"{B}: "],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(shards: Path, damage: str):
    verify_shards(shards)
    harm, expected = DAMAGES[damage]
    harm(shards)
    with pytest.raises(CurateError) as caught:
        verify_shards(shards)
    for line in expected:
        assert line in caught.value.what
    number = "1 file is" if len(expected) == 1 else f"{len(expected)} files are"
    assert f"{number} not as" in caught.value.what
    assert caught.value.exit_code == 1
    assert "curate write" in caught.value.fix


def test_a_manifest_that_lies_about_rows_is_found(shards: Path):
    manifest = read_json(shards / "manifest.json")
    manifest["shards"][0]["rows"] += 1
    write_json(shards / "manifest.json", manifest)
    with pytest.raises(CurateError, match="100 rows, not 101"):
        verify_shards(shards)


def test_the_card_may_be_edited_and_notes_added(shards: Path):
    with (shards / "README.md").open("a") as file:
        file.write("\nOur notes.\n")
    (shards / "LICENSE").write_text("free")
    assert verify_shards(shards)["rows"] == 200


def test_the_run_folder_stands_for_its_shards(shards: Path):
    assert verify_shards(shards.parent) == verify_shards(shards)


def test_every_damaged_file_of_a_run_is_named(tmp_path: Path):
    settings = scored_run(tmp_path, plan={"score": "el2n", "keep": 0.5})
    plan_run(settings, pool=POOL)
    root = Path(settings.run)
    write_json(root / "config.yaml", {"run": str(root), "sources": {}})
    whole = verify_shards(root)
    tables = len(RunFolder(root).partitions())
    assert whole["files"] == 4 * tables + 2  # index, el2n, loss, plan; two documents
    write_run(settings, pool=POOL)
    assert verify_shards(root)["rows"] == verify_shards(root / "shards")["rows"]
    part, other = RunFolder(root).partitions()[:2]
    damaged = {
        "scores/el2n": RunFolder(root).scores(part, "el2n"),
        "plan": RunFolder(root).planned(other),
        "scores/loss": RunFolder(root).scores(part, "loss"),
        "examples": RunFolder(root).examples(part),
    }
    flip(damaged["scores/el2n"].path)
    flip(damaged["plan"].path)
    damaged["scores/loss"].path.unlink()
    damaged["examples"].mark_path.write_text("[]")
    shard = next((root / "shards").rglob("*.parquet"))
    flip(shard)
    with pytest.raises(DamageError) as caught:
        verify_shards(root)
    assert sorted(caught.value.problems) == sorted([
        f"scores/el2n/{part.name}.parquet: changed: its digest is another",
        f"plan/{other.name}.parquet: changed: its digest is another",
        f"scores/loss/{part.name}.parquet: missing",
        f"examples/{part.name}.parquet: its mark is damaged",
        f"{shard.relative_to(root).as_posix()}: changed: its digest is another",
    ])  # fmt: skip
    assert "5 files are not as they were written" in caught.value.what


def trained_run(root: Path) -> Path:
    """Two checkpoints of a finished seed, and one of a seed at work."""
    write_json(root / "config.yaml", {"run": str(root), "sources": {}})
    saved: list[Checkpoint] = []
    for seed, step in ((0, 2), (0, 4), (1, 2)):
        torch.manual_seed(step)
        model = MLP(num_features=4, num_classes=3, hidden=(5,))
        moments = Moments({"w": torch.ones(3)}, {"w": torch.ones(3)})
        saved.append(
            save_checkpoint(root / "checkpoints", seed=seed, step=step, epoch=1.0, lr=0.1,
                            write_model=model.save_pretrained, moments=moments)
        )  # fmt: skip
    facts = {"checkpoints": [facts_of(one) for one in saved if one.seed == 0]}
    done_output(RunFolder(root), 0).write(lambda path: write_json(path, facts), "f")
    return root


def test_weights_of_checkpoints_that_have_changed_are_found(tmp_path: Path):
    root = trained_run(tmp_path / "run")
    whole = verify_shards(root)
    assert (whole["files"], whole["checkpoints"]) == (1, 3)
    checkpoints = root / "checkpoints"
    flip(checkpoints / "seed-0" / "step-000002" / "model.safetensors")
    flip(checkpoints / "seed-1" / "step-000002" / "model.safetensors")
    shutil.rmtree(checkpoints / "seed-0" / "step-000004")
    with pytest.raises(DamageError) as caught:
        verify_shards(root)
    changed = "changed: the digest of its weights is another"
    again = "remove checkpoints/seed-{}/ to train it again"
    assert sorted(caught.value.problems) == [
        f"checkpoints/seed-0/step-000002: {changed}; {again.format(0)}",
        f"checkpoints/seed-0/step-000004: missing; {again.format(0)}",
        f"checkpoints/seed-1/step-000002: {changed}; {again.format(1)}",
    ]


def test_a_checkpoint_whose_facts_are_damaged_is_named(tmp_path: Path):
    root = trained_run(tmp_path / "run")
    (root / "checkpoints" / "seed-1" / "step-000002" / "checkpoint.json").write_text("{")
    with pytest.raises(DamageError, match=r"seed-1/step-000002/checkpoint\.json: damaged"):
        verify_shards(root)


def test_a_missing_folder_and_a_missing_manifest_are_told_apart(shards: Path):
    with pytest.raises(InputError, match="there is no folder"):
        verify_shards(shards / "nowhere")
    (shards / "manifest.json").unlink()
    with pytest.raises(CurateError, match="incomplete"):
        verify_shards(shards)


@pytest.mark.parametrize("text", ["", '{"shards": [', "[]", '{"stages": {}}'])
def test_a_damaged_or_foreign_manifest_is_one_clear_message(shards: Path, text: str):
    (shards / "manifest.json").write_text(text)
    with pytest.raises(CurateError, match=r"manifest\.json"):
        verify_shards(shards)


def test_a_manifest_of_another_version_is_refused(shards: Path):
    manifest = read_json(shards / "manifest.json")
    write_json(shards / "manifest.json", {**manifest, "schema_version": 99})
    with pytest.raises(CurateError, match="schema version 99"):
        verify_shards(shards)
