"""Small training runs with the recipes themselves: what a trainer sees is the mixture."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixers.online import apply_weights
from tests.jobs.recipe_run import decide, domains_of, p_value, recipe, write_shards
from tests.mosaic.environment import needs_mosaic, result, start

LEAST = 1e-6
LENGTH = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("training")
    found: dict[str, Path] = {}
    for way in ("column", "domains"):
        (root / way).mkdir()
        found[way] = write_shards(root / way, way, ("parquet", "webdataset", "mds"))
    return found


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prepare(row: dict[str, Any]) -> dict[str, Any]:
    """A text whose first token names its row, so that a batch tells what it holds."""
    number = row["curate_row"]
    ids = [number // 256, number % 256, *row["text"].encode()][:LENGTH]
    ids += [299] * (LENGTH - len(ids))
    return {"input_ids": ids, "labels": ids}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.tensor([r[name] for r in rows]) for name in ("input_ids", "labels")}


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 16, "learning_rate": 0.05, "optim": "sgd", "use_cpu": True,
        "save_strategy": "no", "report_to": [], "remove_unused_columns": False, "max_steps": 6,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(str(folder), **values | given)


def weights_of(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def watch(trainer: Any) -> Counter[str]:
    """Counts the domains of all rows that reach the model in training."""
    seen = Counter[str]()

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        for first, second in kwargs["input_ids"][:, :2].tolist():
            decided = decide("pool", "x.parquet", 256 * first + second)
            assert decided is not None
            seen[decided.domain] += 1

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_recipe_trains_as_apply_weights_does(
    shards: dict[str, Path], tmp_path: Path, accumulation: int
):
    made = recipe(shards["column"], "trainer")
    rows = made.load(prepare=prepare)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=3)
    own = made.WeightedTrainer(model(), args, train_dataset=rows, data_collator=collate)
    other = Trainer(model(), args, train_dataset=rows, data_collator=collate)
    apply_weights(other)
    plain = Trainer(model(), args, train_dataset=rows, data_collator=collate)
    for trainer in (own, other, plain):
        trainer.train()
    torch.testing.assert_close(weights_of(own.model), weights_of(other.model))
    assert not torch.allclose(weights_of(own.model), weights_of(plain.model))


def test_the_trainer_recipe_refuses_what_would_lose_the_weights(
    shards: dict[str, Path], tmp_path: Path
):
    made = recipe(shards["column"], "trainer")
    rows = made.load(prepare=prepare)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        made.WeightedTrainer(
            model(), arguments(tmp_path, remove_unused_columns=True), train_dataset=rows
        )
    with pytest.raises(ValueError, match="has lost the column"):
        made.WeightedTrainer(
            model(), arguments(tmp_path), train_dataset=rows.remove_columns("curate_weight")
        )


def test_a_trainer_sees_the_domains_by_their_probabilities(shards: dict[str, Path], tmp_path: Path):
    """566 draws, chi-square with p >= 1e-6; a resumed run goes on with the same draws."""
    made = recipe(shards["domains"], "trainer")
    rows = made.load(prepare=prepare)
    args = arguments(
        tmp_path, max_steps=18, save_strategy="steps", save_steps=15, per_device_train_batch_size=32
    )
    trainer = made.WeightedTrainer(model(), args, train_dataset=rows, data_collator=collate)
    seen = watch(trainer)
    trainer.train()
    domains = domains_of(shards["domains"])
    assert seen.total() == 534 + 32  # an epoch, the last batch of which is short, and a step
    assert p_value(seen, {d: e["row_probability"] for d, e in domains.items()}) > LEAST

    again = made.WeightedTrainer(model(), args, train_dataset=rows, data_collator=collate)
    later = watch(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert later.total() == seen.total() - 15 * 32
    torch.testing.assert_close(weights_of(again.model), weights_of(trainer.model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl_sees_the_domains_and_the_weights(shards: dict[str, Path], tmp_path: Path):
    """Its own preparation and collation; weights doubled take a step twice as long."""
    trl: Any = pytest.importorskip("trl", reason="TRL is not installed")
    made = recipe(shards["domains"], "trl_sft")

    def run(rows: Any, steps: int) -> tuple[Any, Any]:
        config = trl.SFTConfig(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=16, use_cpu=True,
            bf16=False, report_to=[], save_strategy="no", remove_unused_columns=False,
            disable_tqdm=True, optim="sgd", learning_rate=0.01, max_grad_norm=0.0,
            lr_scheduler_type="constant", dataset_text_field="text",
        )  # fmt: skip
        trainer = made.WeightedSFTTrainer(
            model(), config, train_dataset=rows, processing_class=byte_tokenizer()
        )
        before = weights_of(trainer.model)
        trainer.train()
        return trainer, weights_of(trainer.model) - before

    rows = made.load()
    double = rows.map(lambda row: {"curate_weight": 2 * row["curate_weight"]})
    trainer, step = run(rows, 1)
    torch.testing.assert_close(run(double, 1)[1], 2 * step, rtol=1e-3, atol=1e-6)

    names = list(rows["curate_domain"])
    seen = Counter(names[n] for n in trainer._get_train_sampler())
    domains = domains_of(shards["domains"])
    assert p_value(seen, {d: e["row_probability"] for d, e in domains.items()}) > LEAST


def test_a_loop_over_webdataset_sees_the_mixture_and_its_weights(shards: dict[str, Path]):
    """The sum of weights of a domain, over all, is what the plan gives it: 5 standard errors."""
    made = recipe(shards["domains"], "webdataset_mix")
    loader = torch.utils.data.DataLoader(
        made.mixed(num_workers=2), batch_size=32, num_workers=2, collate_fn=list
    )
    trained = model()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.01)
    seen, weight = Counter[str](), Counter[str]()
    for samples in loader:
        facts = [sample["json"] for sample in samples]
        rows = [prepare({**f, "text": s["txt"]}) for f, s in zip(facts, samples, strict=True)]
        batch = collate(rows)
        logits = trained(batch["input_ids"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        weights = torch.tensor([fact["curate_weight"] for fact in facts])
        (weights[:, None] * losses).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        for fact in facts:
            seen[fact["curate_domain"]] += 1
            weight[fact["curate_domain"]] += fact["curate_weight"]
    domains = domains_of(shards["domains"])
    assert p_value(seen, {d: e["row_probability"] for d, e in domains.items()}) > LEAST
    total = sum(weight.values())
    for domain, entry in domains.items():
        p = entry["row_probability"]
        # Weights have mean 1 and are below 4 / 1 of it: their squares have a mean below 3.
        assert weight[domain] / total == pytest.approx(p, abs=5 * (3 * p / seen.total()) ** 0.5)


@needs_mosaic
def test_mosaic_sees_the_domains_and_trains(shards: dict[str, Path], tmp_path: Path):
    """In its own environment: the numbers of each domain are exact."""
    script = tmp_path / "train.py"
    script.write_text(_MOSAIC)
    folder = shards["domains"]
    seen = result(start(script, str(folder / "recipes")))
    mixture = json.loads((folder / "mixture.json").read_text())["phases"][0]
    for domain, entry in mixture["domains"].items():
        assert seen["rows"][domain] == round(entry["row_probability"] * mixture["epoch_rows"])
    assert seen["moved"]


_MOSAIC = """
import collections, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from mosaic import mixed
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 8)
before = model.weight.detach().clone()
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
seen = collections.Counter()
for batch in DataLoader(mixed(batch_size=8), batch_size=8):
    seen.update(batch["curate_domain"])
    target = torch.tensor([[float(ord(c)) / 128 for c in t.ljust(8)[:8]] for t in batch["text"]])
    losses = (model(torch.ones(len(target), 8)) - target).square().mean(dim=1)
    (losses * batch["curate_weight"]).mean().backward()
    optimiser.step()
    optimiser.zero_grad()
print(json.dumps({"rows": seen, "moved": not torch.equal(before, model.weight)}))
"""


def test_the_examples_of_the_page_run(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("trainer", "datasets_interleave"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "runs" / "news").mkdir(parents=True)
    (tmp_path / "runs" / "news" / "shards").symlink_to(shards["domains"])

    def short(folder: str, **given: Any) -> TrainingArguments:
        return arguments(Path(folder), **{**given, "max_steps": 2})

    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {
        "model": model(), "tokenize": prepare, "collator": collate, "TrainingArguments": short,
    }  # fmt: skip
    assert len(blocks) == 3
    for block in blocks:
        given = block.replace("from transformers import TrainingArguments\n", "")
        exec(compile(given, "recipes.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert len(list(names["later"])) > 0
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
