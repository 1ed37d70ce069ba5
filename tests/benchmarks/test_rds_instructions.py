"""What rds takes of six sources of instructions, and whether a model trained on it is better.

    CURATE_ENCODER=FOLDER python -m pytest tests/benchmarks/test_rds_instructions.py -s \
        -o addopts=--import-mode=importlib

The target is the human-written rows of `instruct_mix`; the plan keeps 5 and 20 % of the characters
by `rds_rank`. Printed is the share of each source in the pool and in what is kept; then, by
`compare` with five seeds, the loss of a small Llama trained from scratch on that and on a random
choice of the same tokens, on human-written rows that nothing has seen.

`CURATE_DATA` names the data sets, `CURATE_ENCODER` the folder of a sentence encoder; without it the
vectors are hashed words and nothing is trained.
"""

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from curate.cli.compare import comparison_lines
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import InlineExecutor, Pool
from jobs.opening import open_run
from jobs.settings import parse_settings

INLINE = Pool(InlineExecutor(), 1)
SHARES = (0.05, 0.2)
COLUMNS = {"prompt": "prompt", "response": "response"}
HUMAN = pl.col("source") == "human_seed"


def write_rows(root: Path) -> None:
    data = Path(os.environ["CURATE_DATA"]) / "instruct_mix"
    both = pl.concat_str("instruction", "input", separator="\n").str.strip_chars_end()
    train, test = (
        pl.read_parquet(data / f"{name}.parquet").select(
            "id", "source", prompt=both, response="output"
        )
        for name in ("train", "test")
    )
    train.filter(~HUMAN).write_parquet(root / "pool.parquet")
    train.filter(HUMAN).write_parquet(root / "target.parquet")
    test.filter(HUMAN).write_parquet(root / "unseen.parquet")


def done(command: str, values: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The run folder, and what its stages said."""
    with open_run(parse_settings(values)) as settings:
        said = run_stages(settings, stages_for(settings, command), pool=INLINE)
    return Path(settings.run), said


def plan_of(root: Path, share: float) -> dict[str, Any]:
    encoder = os.environ.get("CURATE_ENCODER")
    embed = {"model": encoder, "max_tokens": 40} if encoder else {"kind": "ngrams", "dim": 2048}
    return {
        "run": str(root / f"plan-{share}"),
        "sources": {
            "mix": {"path": str(root / "pool.parquet"), "domain": "source", **COLUMNS}
        },
        "target": {"path": str(root / "target.parquet"), **COLUMNS},
        "embed": {"vectors": embed},
        "score": {"scorers": ["rds"]},
        "plan": {
            "score": "rds_rank", "order": "easiest", "within": "all",
            "keep": {"token_share": share},
        },
    }  # fmt: skip


def comparison_of(root: Path, share: float, plan: Path) -> dict[str, Any]:
    shape = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    train = {"epochs": 1, "lr": 2e-3, "seeds": [0], "batch_tokens": 2048}
    return {
        "run": str(root / f"compare-{share}"),
        "sources": plan_of(root, share)["sources"],
        "target": {"path": str(root / "unseen.parquet"), **COLUMNS},
        "task": {"kind": "causal-lm", "max_tokens": 192},
        "model": {"config": shape, "tokenizer": {"train": "bpe", "vocab_size": 2048}},
        "checkpoints": {"train": train},
        "plan": {"keep": {"token_share": share}},
        "compare": {
            "arms": [{"name": "rds", "run": str(plan)}, "random"],
            "steps": 150,
            "seeds": [0, 1, 2, 3, 4],
        },
    }


@pytest.mark.timeout(7200)
@pytest.mark.skipif("CURATE_DATA" not in os.environ, reason="CURATE_DATA names no data sets")
@pytest.mark.parametrize("share", SHARES)
def test_what_a_target_of_human_instructions_takes(share: float, tmp_path: Path):
    write_rows(tmp_path)
    folder, said = done("plan", plan_of(tmp_path, share))
    total = {key: said["plan"][key]["tokens"] for key in ("training", "kept")}
    print(f"\n| source | pool | {share:.0%} kept |\n| --- | --- | --- |")
    for name, one in said["plan"]["domains"].items():
        pool, kept = one["tokens"] / total["training"], one["kept_tokens"] / total["kept"]
        print(f"| {name} | {pool:.0%} | {kept:.0%} |")
    if "CURATE_ENCODER" in os.environ:
        run, said = done("compare", comparison_of(tmp_path, share, folder))
        print("\n".join(comparison_lines(said["compare"], str(run))))
