"""What EK-FAC costs after fitting, as ratios to one plain forward and backward.

    CURATE_BENCH_MODEL=llama-50m pytest tests/benchmarks/test_ekfac.py -s \
        -o addopts=--import-mode=importlib

All Linear layers of the body; the head and the embedding are not part of it. The baseline is
`loss.backward()` for all parameters on the same batch. Every way runs once a round; a ratio is
the median over the rounds of user CPU seconds, on one thread. The default model is smaller.
kronfluence scores four such batches in the same rounds where it is installed, of which a quarter is
counted: it reads its factors and writes its scores in each call.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_ways import Ways, interleaved, medians, ratios, tokens
from influence_peers import kronfluence_self_scores

from curate.models.example_losses import draw_keys
from curate.models.kfac import basis_of, damped
from curate.models.kfac_layers import layers_of
from curate.models.kfac_pass import KFACPass
from curate.models.kfac_queries import query_directions
from curate.models.settings import CausalLM
from curate.models.tasks import Encoded
from curate.models.tasks.causal_lm import CausalLMTask

MODELS = os.environ.get("CURATE_BENCH_MODEL", "llama-4m").split(",")
LENGTHS = [int(n) for n in os.environ.get("CURATE_BENCH_LENGTHS", "128,512").split(",")]
ROUNDS = int(os.environ.get("CURATE_BENCH_ROUNDS", "4"))
ROWS = {128: 4, 512: 2}
QUERIES, RANK = 2, 32

PEER_BATCHES = 4

BASE = "forward and backward"
SELF = "**EK-FAC self-influence**"
PEER = "kronfluence, EK-FAC self-influence"
GOAL = 2.0


class _Tokenizer:
    bos_token_id = None
    pad_token_id = 0
    eos_token_id = 0


def encoded(rows: torch.Tensor) -> Encoded:
    count, length = rows.shape
    marks = np.tile(np.arange(length) > 0, count)
    return Encoded(
        lengths=np.full(count, length),
        num_scored=np.full(count, length - 1),
        truncated=np.zeros(count, dtype=bool),
        arrays={
            "tokens": rows.flatten().numpy(),
            "starts": np.arange(count + 1) * length,
            "counted": marks,
        },
        problems={},
    )


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_what_self_influence_costs_after_fitting(name: str, length: int, tmp_path: Path):
    torch.set_num_threads(1)
    ways = Ways(name, ROWS[length], length)
    given, chosen = encoded(ways.batch["input_ids"]), np.arange(ROWS[length])
    task = CausalLMTask(CausalLM(max_tokens=length), _Tokenizer())
    engine = KFACPass(
        ways.model, task, layers_of(ways.model), batch_tokens=1 << 20, device=torch.device("cpu")
    )
    draws = draw_keys([str(number) for number in chosen], seed=0)
    sums = engine.factors(given, chosen, draws)
    bases = {key: basis_of(one) for key, one in sums.items()}
    values = engine.eigenvalues(given, chosen, bases, draws)
    curvatures = {
        key: damped(
            bases[key]._replace(left=bases[key].left.float(), right=bases[key].right.float()),
            (one / len(chosen)).float(),
        )
        for key, one in values.items()
    }
    gradients = engine.gradients(given, chosen[:1])
    queries, kept = query_directions(gradients, curvatures, engine.layers, rank=RANK)
    wanted = sum(
        float((gradients[key] * one.inverse(gradients[key])).double().sum())
        for key, one in curvatures.items()
    )
    del gradients
    scores: Callable[[], object] = lambda: engine.scores(given, chosen, queries * QUERIES)  # noqa: E731
    table: dict[str, Callable[[], object]] = {
        BASE: ways.plain,
        "forward and activation gradients": ways.floor,
        SELF: lambda: engine.self_influence(given, chosen, curvatures),
        "factors": lambda: engine.factors(given, chosen, draws),
        "eigenvalues": lambda: engine.eigenvalues(given, chosen, bases, draws),
        f"{QUERIES} queries of rank {RANK}": scores,
    }
    found = engine.self_influence(given, chosen, curvatures)
    many = tokens(PEER_BATCHES * ROWS[length], length)
    peer = kronfluence_self_scores(name, many, ROWS[length], tmp_path)
    if peer is not None:
        peer()
        table[PEER] = peer
    times, peaks = interleaved(table, ROUNDS, ())
    if PEER in times:
        times[PEER] = [spent / PEER_BATCHES for spent in times[PEER]]
    base = sorted(times[BASE])[len(times[BASE]) // 2]
    print(f"\n{name}, T = {length}, B = {ROWS[length]}, {ROUNDS} rounds; baseline {base:.2f} CPU s;"
          f" rank {RANK} keeps {100 * kept:.1f} % of a query's squared length\n")  # fmt: skip
    print("| what | ratio | range | peak MB |\n| --- | ---: | --- | ---: |")
    each = ratios(times, BASE)
    for label, middle in medians(each).items():
        spread = f"{min(each[label]):.2f} to {max(each[label]):.2f}"
        print(f"| {label} | {middle:.2f} | {spread} | {peaks[label]:.0f} |")
    error = abs(float(found[0]) / wanted - 1)
    print(f"\nself-influence of one example against its whole gradient: {error:.1e} off")
    assert error < 1e-3
    assert medians(each)[SELF] <= (GOAL if name == "llama-50m" else 2 * GOAL)
