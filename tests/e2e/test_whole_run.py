"""From the files of the standard library to shards that `datasets` loads, by the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from datasets import load_dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curate.config import to_yaml

PACKAGES = ("json", "logging", "concurrent")


def curate(*arguments: object) -> dict[str, Any]:
    """The JSON result of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "curate", *map(str, arguments), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    values = {
        "run": str(folder / "run"),
        "sources": {
            name: {"path": f"pkg://{name}", "include": "**/*.py", "passage_chars": 600}
            for name in PACKAGES
        },
        "task": {"kind": "causal-lm", "max_tokens": 128},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 512},
        },
        "checkpoints": {"train": {"max_steps": 6, "lr": 3e-3, "batch_tokens": 1024}},
        "score": {"scorers": ["el2n", "loss", "length", "random"]},
        "mix": {"mixer": "unimax", "max_epochs": 2},
        "plan": {"score": "el2n", "keep": {"token_share": 0.5}, "draw": "sample"},
        "shards": {"size_mb": 1},
    }
    path = folder / "config.yaml"
    path.write_text(to_yaml(values))
    return path


@pytest.fixture(scope="module")
def result(config: Path) -> dict[str, Any]:
    return curate("run", config, "-q")


@pytest.fixture(scope="module")
def run(result: dict[str, Any]) -> Path:
    return Path(result["run"])


def test_every_stage_has_run_in_order(result: dict[str, Any]):
    assert list(result["stages"]) == [
        "index", "tokenizer", "train", "score", "lengths", "mix", "plan", "write",
    ]  # fmt: skip
    assert result["stages"]["index"]["bad"] == {}


def test_half_of_the_tokens_are_kept_in_the_shares_of_the_mixture(result: dict[str, Any]):
    plan = result["stages"]["plan"]
    assert plan["kept"]["token_share"] == pytest.approx(0.5, abs=0.01)
    for domain in plan["domains"].values():
        assert domain["token_share"] == pytest.approx(domain["token_share_asked"], abs=0.02)
        assert domain["epochs"] <= 2.001


@pytest.mark.filterwarnings("ignore")  # of the library that loads
def test_datasets_loads_all_of_it_one_domain_and_as_a_stream(
    result: dict[str, Any], run: Path, tmp_path: Path
):
    plan = pl.read_parquet(run / "plan" / "part-*.parquet").filter(pl.col("keep"))
    expected = dict(plan.group_by("source").agg(pl.col("copies").sum()).iter_rows())
    everything: Any = load_dataset(
        str(run / "shards"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(everything) == plan["copies"].sum() == result["stages"]["write"]["rows"]
    keys = set(zip(*(everything[f"curate_{name}"] for name in ("source", "file", "row")),
                   strict=True))  # fmt: skip
    assert keys == set(plan.select("source", "file", "row").iter_rows())
    for name in PACKAGES:
        domain: Any = load_dataset(
            str(run / "shards"), name, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(domain) == expected[name]
        assert set(domain["curate_domain"]) == {name}
    streamed: Any = load_dataset(str(run / "shards"), split="train", streaming=True)
    assert sum(1 for _ in streamed) == len(everything)


def test_the_text_in_the_shards_is_the_text_of_the_files(run: Path):
    import logging

    shards = pl.read_parquet(run / "shards" / "data" / "**" / "*.parquet")
    source = Path(logging.__file__).read_text(encoding="utf-8")
    own = shards.filter(curate_source="logging", curate_file="__init__.py")
    assert own.height > 10
    for text in own["text"]:
        assert text.strip() in source


def test_the_lines_that_show_prints_load_the_shards(run: Path, tmp_path: Path):
    lines = curate("show", run)["load"]
    assert len(lines) == 3
    code = "\n".join([*lines, "print(len(everything), len(one_domain))"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin",
             "HOME": str(tmp_path)},
    )  # fmt: skip
    total, one = map(int, done.stdout.split())
    assert total > one > 0


def test_the_resolved_settings_repeat_the_run_to_the_byte(run: Path, tmp_path: Path):
    again = tmp_path / "again"
    curate("run", run / "config.yaml", "-q", "--out", again)
    for folder in ("plan", "shards"):
        files = sorted(path for path in (run / folder).rglob("*") if path.is_file())
        assert files
        for file in files:
            assert (again / file.relative_to(run)).read_bytes() == file.read_bytes(), file


def test_verify_and_status_agree_that_all_is_done(run: Path):
    curate("verify", run)
    stages = curate("status", run)["stages"]
    assert [stage["stage"] for stage in stages if stage["remaining"] or stage["failed"]] == []


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    """A folder as transformers saves it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<s>", "<pad>"]
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_bare_data_is_scored_without_settings(saved_model: Path, tmp_path: Path):
    texts = ["the cat sat", "on the mat the cat sat", "a mat"]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "data.parquet")
    result = curate(
        "score", tmp_path / "data.parquet", "--scorer", "el2n", "--model", saved_model,
        "--out", tmp_path / "run", "-q",
    )  # fmt: skip
    assert list(result["stages"]) == ["index", "score"]
    scores = pl.read_parquet(tmp_path / "run" / "scores" / "el2n" / "part-*.parquet")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved_model)
    model = LlamaForCausalLM.from_pretrained(saved_model).double()
    for text, row in zip(texts, scores.iter_rows(named=True), strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            errors = model(input_ids=ids).logits[0, :-1].softmax(-1)
        errors[torch.arange(len(errors)), ids[0, 1:]] -= 1
        assert row["el2n"] == pytest.approx(float(errors.norm(dim=-1).mean()), rel=1e-5)
        assert row["num_scored"] == len(errors)


def test_length_and_random_need_no_model(tmp_path: Path):
    pl.DataFrame({"text": ["a", "bb"]}).write_csv(tmp_path / "data.csv")
    run = tmp_path / "run"
    curate("score", tmp_path / "data.csv", "--scorer", "length", "--scorer", "random",
           "--out", run, "-q")  # fmt: skip
    lengths = pl.read_parquet(run / "scores" / "length" / "part-*.parquet")
    assert lengths["num_chars"].to_list() == [1, 2]
    assert pl.read_parquet(run / "scores" / "random" / "part-*.parquet").height == 2
