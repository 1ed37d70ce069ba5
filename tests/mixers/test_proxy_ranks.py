"""The proxy's loop on two ranks goes the way of one, through kills too, and under torchrun."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
from proxy_case import VOCABULARY, make_optimiser, make_task
from tiny_models import byte_tokenizer, save_language_model
from torch import Tensor

from curate.errors import ConfigError
from curate.models.sequence_files import write_sequences
from curate.models.sequences import PARTS, Sequences
from curate.models.tasks.protocol import Encoded
from mixers.doremi import DoReMi, DoReMiRule
from mixers.loss_weights import LossReweighting
from mixers.plain import PlainRule, ReweightedRule
from mixers.proxy import Files, ProxyResult, run_proxy
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data
from mixers.rules import Rule, Seen, Step, loss_sums, token_counts

DOMAINS = ("common", "rare", "some")
SETTINGS = Proxy(
    steps=6, sequences=9, lr=1e-2, held_out=5, evaluate_every=3, resume_every_seconds=0.0
)
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
MOSTLY_ONE = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


class OwnPiecesRule:
    """Weighs domains, one piece each, by the norm of their share of the gradient."""

    columns: ClassVar[Mapping[str, str]] = {"norm": "of the gradient of the domain's loss"}
    by_domain: ClassVar[bool] = True

    def __init__(self) -> None:
        self._weights = UNIFORM

    def shares(self) -> Tensor:
        return MOSTLY_ONE

    def step(self, step: Step) -> Seen:
        counts = token_counts(step)
        sums = torch.zeros_like(counts)
        flat = torch.zeros(3, sum(p.numel() for p in step.parameters))
        for piece in step.pieces:
            tokens = step.tokens(piece)
            sums += loss_sums(tokens, 3)
            domain = int(piece.domains[0])
            own = torch.autograd.grad(tokens.losses.sum() / counts[domain], step.parameters)
            flat[domain] += torch.cat([gradient.flatten() for gradient in own])
        weights = self._weights.float()
        for parameter, gradient in zip(
            step.parameters,
            (weights @ flat).split([p.numel() for p in step.parameters]),
            strict=True,
        ):
            parameter.grad = gradient.view_as(parameter).clone()
        norms = step.total(flat).norm(dim=1).double()
        self._weights = torch.softmax(norms, 0)
        return Seen(self._weights, step.total(sums), counts, {"norm": norms})

    def mixture(self) -> Tensor:
        return self._weights

    def state(self) -> dict[str, Tensor]:
        return {"weights": self._weights}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self._weights = saved["weights"]


def reweighted(*, within: bool) -> Rule:
    settings = LossReweighting(robust=True, window_steps=2, uniform_share=0.2, within_domain=within)
    return ReweightedRule(UNIFORM, settings)


RULES: dict[str, Callable[[], Rule]] = {
    "plain": lambda: PlainRule(MOSTLY_ONE[None], torch.ones(1), total_steps=SETTINGS.steps),
    "reweighted": lambda: reweighted(within=False),
    "reweighted within": lambda: reweighted(within=True),
    "doremi": lambda: DoReMiRule(DoReMi(warm_share=0.1), 3),
    "by domain": OwnPiecesRule,
}
PIECES = replace(SETTINGS, piece_tokens=32)
ONE_EACH = replace(SETTINGS, sequences=3)
"""With three sequences a step, one of each domain: a rank lacks one or two of them."""
WAYS: dict[str, tuple[str, Proxy]] = {
    **{name: (name, SETTINGS) for name in RULES},
    **{f"{name}, pieces": (name, PIECES) for name in RULES},
    **{f"{name}, few": (name, ONE_EACH) for name in ("reweighted", "doremi", "by domain")},
}


def write_ragged(path: Path) -> Path:
    """Sequences of 4 to 16 tokens, of which some do not count; a rare domain has three in all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(3)
    sizes = {"common": 60, "rare": 3, "some": 30}
    num = sum(sizes.values())
    lengths = draw.integers(4, 17, num)
    starts = np.concatenate([[0], lengths.cumsum()])
    tokens = draw.integers(1, VOCABULARY, starts[-1]).astype(np.int32)
    tokens[: starts[60]] = 1 + np.arange(starts[60]) % 5
    counted = draw.random(starts[-1]) < 0.7
    counted[starts[:-1]] = False
    counted[starts[:-1] + 1] = True
    parts = np.array([PARTS.index("proxy"), PARTS.index("held_out")], dtype=np.uint8)
    encoded = Encoded(
        lengths=lengths,
        num_scored=np.add.reduceat(counted, starts[:-1]),
        truncated=np.zeros(num, dtype=np.bool_),
        arrays={"tokens": tokens, "starts": starts, "counted": counted},
        problems={},
    )
    write_sequences(
        path,
        encoded,
        domain=np.repeat(np.arange(3, dtype=np.int32), list(sizes.values())),
        part=parts[(draw.random(num) < 0.2).astype(int)],
        names=list(sizes),
    )
    return path


def open_data(path: Path) -> Data:
    sequences = Sequences.open([path], parts=("proxy",))
    assert sequences.domains == DOMAINS
    every = sequences.read(np.arange(sequences.total))

    def losses(numbers: np.ndarray) -> np.ndarray:
        """Of the reference: a level for each sequence, for each of its counted tokens."""
        return np.repeat(2 + (numbers % 7) / 7, every.num_scored[numbers]).astype(np.float32)

    return Data(sequences, Sequences.open([path], parts=("held_out",)), reference=losses)


def run(
    folder: Path, data: Path, way: str, *, die_after: int | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    """What a run ends with, in full."""
    name, settings = WAYS[way]
    rule, optimiser = RULES[name](), make_optimiser(settings, dropout=dropout)

    def told(step: int, _: Tensor) -> None:
        if step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    files = Files(folder=folder, fingerprint=way)
    made = run_proxy(optimiser, make_task(), open_data(data), rule, settings, files, told=told)
    return facts(made, rule, optimiser.state())


def facts(made: ProxyResult, rule: Rule, state: Mapping[str, Tensor]) -> dict[str, Any]:
    rule_state = {key: value.double().tolist() for key, value in rule.state().items()}
    tensors = {key: value.double().flatten().tolist() for key, value in state.items()}
    return {**made._asdict(), "rule": rule_state, "state": tensors}


def _rank(rank: int, folder: Path, data: Path, jobs: list[tuple[str, int | None, float]]) -> None:
    """Runs some ways in a group of two; a file tells what each ended with."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    for way, die_after, dropout in jobs:
        found[way] = run(folder / way, data, way, die_after=die_after, dropout=dropout)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def on_two_ranks(
    folder: Path, data: Path, jobs: list[tuple[str, int | None, float]]
) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Exit codes of both, and what each told where it came to the end."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "meeting").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(r, folder, data, jobs)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    told = [folder / f"{rank}.json" for rank in range(2)]
    return [p.exitcode for p in ranks], [json.loads(p.read_text()) for p in told if p.exists()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_find_the_weights_and_the_model_of_one(tmp_path: Path):
    """With sequences of unequal lengths, so that ranks hold different numbers of tokens."""
    data = write_ragged(tmp_path / "data.safetensors")
    codes, (first, second) = on_two_ranks(
        tmp_path / "two", data, [(way, None, 0.0) for way in WAYS]
    )
    assert codes == [0, 0]
    for way in WAYS:
        assert first[way] == second[way], way
        alone, both = run(tmp_path / "one" / way, data, way), first[way]
        assert both["num_tokens"] == alone["num_tokens"], way
        assert both["epochs"] == alone["epochs"], way
        assert both["mixture"] == pytest.approx(alone["mixture"], rel=1e-5), way
        assert both["held_out"] == pytest.approx(alone["held_out"], rel=1e-4), way
        for key, values in alone["state"].items():
            if key.startswith("weight."):
                assert both["state"][key] == pytest.approx(values, rel=1e-3, abs=2e-4), (way, key)
        tables = [
            pl.read_parquet(tmp_path / at / way / "trajectory.parquet") for at in ("one", "two")
        ]
        assert tables[0]["num_tokens"].equals(tables[1]["num_tokens"]), way
        for column in tables[0].columns[2:]:
            one, two = (table[column].fill_null(-1).to_list() for table in tables)
            assert one == pytest.approx(two, rel=1e-4), (way, column)


def test_the_case_has_what_it_is_for(tmp_path: Path):
    """Ranks of different numbers of tokens, and one without a domain."""
    data = open_data(write_ragged(tmp_path / "data.safetensors"))
    assert data.sequences.sizes[1] < 4
    assert len(set(data.sequences.read(np.arange(40)).num_scored.tolist())) > 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_that_are_killed_twice_end_in_the_same_bits(tmp_path: Path):
    data = write_ragged(tmp_path / "data.safetensors")
    ways = ["reweighted", "doremi"]
    _, whole = on_two_ranks(tmp_path / "whole", data, [(way, None, 0.2) for way in ways])
    for way in ways:
        for step in (2, 5):
            codes, _ = on_two_ranks(tmp_path / "killed", data, [(way, step, 0.2)])
            assert codes == [-signal.SIGKILL] * 2
        assert (tmp_path / "killed" / way / "resume" / "state.safetensors").exists()
    codes, again = on_two_ranks(tmp_path / "killed", data, [(way, None, 0.2) for way in ways])
    assert codes == [0, 0]
    assert again == whole
    for way in ways:
        for name in ("trajectory.parquet", "held_out.parquet"):
            tables = [pl.read_parquet(tmp_path / at / way / name) for at in ("whole", "killed")]
            assert tables[0].equals(tables[1])


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


NO_THREADS_LEFT = """
threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not any(name.startswith("pt_gloo") for name in threads), threads
"""
"""Threads of gloo that outlive its group abort a process that ends, now and then."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_of_the_page_trains_under_torchrun(tmp_path: Path):
    """The first Python block of the page, by the real torchrun, on one process and on two."""
    page = (Path(__file__).parents[2] / "docs" / "proxies.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: list[dict[str, float]] = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        write_ragged(folder / "run" / "proxies" / "sequences" / "key" / "part.safetensors")
        save_language_model(folder / "model", tokenizer=byte_tokenizer(merges=False))
        (folder / "train.py").write_text(code + NO_THREADS_LEFT)
        command = [*TORCHRUN, str(ranks), "--master-port", str(free_port()), "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        assert pl.read_parquet(folder / "proxy" / "trajectory.parquet").height > 0
    assert len(set(found[0].values())) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_fewer_sequences_than_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixers.proxy.num_ranks", lambda: 12)
    rule, optimiser = RULES["plain"](), make_optimiser(SETTINGS)
    data = open_data(write_ragged(tmp_path / "data.safetensors"))
    files = Files(folder=tmp_path, fingerprint="f")
    with pytest.raises(ConfigError, match="too few for 12 ranks"):
        run_proxy(optimiser, make_task(), data, rule, SETTINGS, files)
