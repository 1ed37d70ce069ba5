"""A task that the user wrote, named by its address, through index, training and scores."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from tiny_models import byte_tokenizer, save_language_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from curate.data.layout import RunFolder

OWN_TASK = '''
"""Sums: of "12+7=19" only what stands behind the sign counts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from curate.models.tasks import Encoded, Flat
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Settings:
    implementation: ClassVar[str] = "sums.task:Task"
    kind: str = "sums.task:Settings"
    sign: str = "="


class Task:
    model_class = "transformers:AutoModelForCausalLM"
    needs_tokenizer = True

    def __init__(self, settings, tokenizer, *, max_positions=None):
        self.settings, self.tokenizer = settings, tokenizer

    def encode(self, fields):
        rows = [self.tokenizer(text).input_ids for text in fields["text"]]
        asked = [len(self.tokenizer(text.split(self.settings.sign)[0]).input_ids) + 1
                 if self.settings.sign in text else len(row)
                 for text, row in zip(fields["text"], rows)]
        width = max(map(len, rows), default=1)
        table = np.zeros((len(rows), width), dtype=np.int64)
        for row, ids in zip(table, rows):
            row[:len(ids)] = ids
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return Encoded(
            lengths=lengths,
            num_scored=lengths - np.array(asked, dtype=np.int64),
            truncated=np.zeros(len(rows), dtype=bool),
            arrays={"ids": table, "first": np.array(asked), "length": lengths},
            problems={},
        )

    def collate(self, encoded, indices):
        chosen = np.asarray(indices)
        return {name: torch.from_numpy(encoded.arrays[name][chosen])
                for name in ("ids", "first", "length")}

    def logits_and_targets(self, model, batch):
        ids = batch["ids"][:, : int(batch["length"].max())]
        mask = torch.arange(ids.shape[1]) < batch["length"][:, None]
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        place = torch.arange(1, ids.shape[1])
        counts = (place >= batch["first"][:, None]) & mask[:, 1:]
        owner, column = counts.nonzero(as_tuple=True)
        return Flat(logits[owner, column].float(), ids[owner, column + 1], owner)

    def pieces(self, model, batch):
        yield self.logits_and_targets(model, batch)

    def loss(self, model, batch):
        flat = self.logits_and_targets(model, batch)
        return functional.cross_entropy(flat.logits, flat.targets)

    def facts(self):
        return {"version": 1}
'''


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "code" / "sums").mkdir(parents=True)
    (tmp_path / "code" / "sums" / "__init__.py").touch()
    (tmp_path / "code" / "sums" / "task.py").write_text(OWN_TASK)
    texts = [f"{i}+{(i * 7) % 10}={i + (i * 7) % 10}" for i in range(40)]
    pl.DataFrame({"text": [*texts, "no sum"]}).write_parquet(tmp_path / "sums.parquet")
    save_language_model(tmp_path / "model", tokenizer=byte_tokenizer(bos=False))
    settings = {
        "run": str(tmp_path / "run"),
        "sources": {"sums": {"path": str(tmp_path / "sums.parquet")}},
        "index": {"partition_rows": 15, "held_out": 0.1},
        "task": {"kind": "sums.task:Settings"},
        "model": {"name": str(tmp_path / "model"), "device": "cpu"},
        "checkpoints": {"train": {"epochs": 1, "lr": 1e-3, "batch_tokens": 60}},
        "score": {"scorers": ["loss", "el2n", "grand"]},
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def curate(world: Path, *words: str, finds_it: bool = True) -> subprocess.CompletedProcess[str]:
    path = str(world / "code") if finds_it else ""
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "curate", *words, str(world / "sums.yaml")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_its_scores_are_those_of_a_loop_over_single_sums(world: Path):
    done = curate(world, "score")
    assert done.returncode == 0, done.stderr
    run = RunFolder(world / "run")
    (folder,) = run.checkpoints.glob("seed-0/step-*")
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder)).double()
    parameters = list(model.parameters())
    tokenizer = byte_tokenizer(bos=False)
    texts = pl.read_parquet(world / "sums.parquet")["text"]
    rows = 0
    for part in run.partitions():
        tables = {n: pl.read_parquet(run.scores(part, n).path) for n in ("loss", "el2n", "grand")}
        for at, row in enumerate(tables["loss"]["row"]):
            text = texts[row]
            if "=" not in text:
                assert tables["loss"]["loss"][at] is None
                continue
            rows += 1
            first = len(tokenizer(text.split("=")[0] + "=").input_ids)
            ids = torch.tensor(tokenizer(text).input_ids)
            logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
            losses = functional.cross_entropy(logits, ids[first:], reduction="none")
            assert tables["loss"]["loss"][at] == pytest.approx(losses.mean().item(), rel=1e-4)
            errors = logits.softmax(-1) - functional.one_hot(ids[first:], logits.shape[1])
            wanted = errors.norm(dim=-1).mean().item()
            assert tables["el2n"]["el2n"][at] == pytest.approx(wanted, rel=1e-4)
            if row % 8 == 0:
                grads: Any = torch.autograd.grad(losses.sum(), parameters)
                squares = sum(float(grad.square().sum()) for grad in grads)
                wanted = math.sqrt(squares / len(losses))
                assert tables["grand"]["grand"][at] == pytest.approx(wanted, rel=1e-4)
    assert rows == 40


def test_a_module_that_is_not_found_is_a_wrong_setting(world: Path):
    done = curate(world, "score", finds_it=False)
    assert done.returncode == 2
    assert "task 'sums.task:Settings' cannot be imported" in done.stderr
    assert "PYTHONPATH" in done.stderr
