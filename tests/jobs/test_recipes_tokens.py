"""Recipes of shards that hold tokens: a blend for Megatron, packed sequences for `datasets`."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config
from tiny_models import byte_tokenizer

from tests.jobs.recipe_run import domains_of, p_value, recipe, write_shards

LEAST = 1e-6


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of token ids, domains weighed by probabilities."""
    root = tmp_path_factory.mktemp("tokens")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    packing = {"length": 16, "tokenizer": str(root / "tokenizer")}
    return write_shards(root, "domains", ("packed", "megatron"), packing=packing)


def test_megatron_draws_domains_by_their_tokens(tokens: Path):
    """A file's weight: its tokens times how often its domain is gone through."""
    domains = domains_of(tokens)
    manifest = json.loads((tokens / "manifest.json").read_text())
    wanted = {
        str(tokens / shard["file"].removesuffix(".bin")): shard["facts"]["tokens"]
        * domains[shard["domain"]]["repeat"]
        for shard in manifest["shards"]
        if shard["format"] == "megatron"
    }
    total = sum(wanted.values())
    script = str(tokens / "recipes" / "megatron.py")
    line, values = (
        subprocess.run(
            [sys.executable, script, *more], capture_output=True, text=True, check=True
        ).stdout
        for more in ((), ("--json",))
    )
    items = line.split()
    found = dict(zip(items[1::2], map(float, items[::2]), strict=True))
    assert found == pytest.approx({prefix: amount / total for prefix, amount in wanted.items()})
    assert all(Path(f"{prefix}.idx").is_file() for prefix in found)
    assert json.loads(values) == {"train": items, "valid": None, "test": None}


def test_packed_sequences_are_drawn_by_their_number_times_repeat(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    made = recipe(tokens, "packed_interleave")
    domains = domains_of(tokens)
    counts = {
        domain: sum(pq.read_metadata(file).num_rows for file in made.files(entry["folder"]))
        for domain, entry in domains.items()
    }
    amounts = {domain: counts[domain] * domains[domain]["repeat"] for domain in domains}
    rows = list(made.mixed(epochs=3.0, seed=1))
    assert len(rows) == round(3 * sum(amounts.values()))
    assert {len(row["input_ids"]) for row in rows} == {16}
    probabilities = {domain: n / sum(amounts.values()) for domain, n in amounts.items()}
    assert p_value(Counter(row["curate_domain"] for row in rows), probabilities) > LEAST
