"""Weights in a real Trainer, against the plain Trainer and against autograd on single examples."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from online_training import (
    collate,
    examples,
    language_model,
    parameters,
    stepped,
    token_losses,
    trainer,
    weighted_tokens,
)
from tiny_models import byte_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from curate.errors import ConfigError, InputError
from mixers.online import LossReweighting, TokenWeights, apply_weights
from mixers.weighted_loss import class_losses

LOSSES = LossReweighting(uniform_share=0)


def linupper(losses: list[float], temperature: float = 1.0) -> list[float]:
    """M times the paper's weights, by a plain loop."""
    low, high = min(losses), max(losses)
    powers = []
    for loss in losses:
        h = (2 * loss - high - low) / (high - low)
        powers.append(math.exp(min(h + 1, 1) / temperature))
    return [len(losses) * power / sum(powers) for power in powers]


def means(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    with torch.no_grad():
        return [float(token_losses(model, row).mean()) for row in rows]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weights", ["curate_weight", LossReweighting(temperature=1e6)])
def test_weights_of_one_are_the_plain_trainer(tmp_path: Path, accumulation: int, weights: Any):
    rows = [{**row, "curate_weight": 1.0} for row in examples(40)]
    plain = trainer(tmp_path, language_model(), rows, steps=3, accumulation=accumulation)
    plain.train()
    weighted = trainer(
        tmp_path,
        language_model(),
        rows,
        steps=3,
        accumulation=accumulation,
        remove_unused_columns=False,
    )
    apply_weights(weighted, weights)
    weighted.train()
    torch.testing.assert_close(
        parameters(weighted.model), parameters(plain.model), rtol=1e-5, atol=1e-6
    )
    before, after = (
        [entry["loss"] for entry in each.state.log_history if "loss" in entry]
        for each in (plain, weighted)
    )
    assert len(before) == 3
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_column_weighs_the_gradient(tmp_path: Path, accumulation: int):
    rows = examples(4 * accumulation)
    data = datasets.Dataset.from_list(rows)
    run = trainer(
        tmp_path, language_model(), data, accumulation=accumulation, remove_unused_columns=False
    )
    apply_weights(run)
    run.train()
    factors = [row["curate_weight"] for row in rows]
    expected = stepped(language_model(), lambda model: weighted_tokens(model, rows, factors))
    torch.testing.assert_close(parameters(run.model), expected, rtol=1e-5, atol=1e-6)


def test_a_column_may_weigh_examples_instead_of_tokens(tmp_path: Path):
    rows = examples(8)
    run = trainer(tmp_path, language_model(), rows, accumulation=2, remove_unused_columns=False)
    apply_weights(run, average="examples")
    run.train()

    def loss(model: Any) -> Tensor:
        each = [row["curate_weight"] * token_losses(model, row).mean() for row in rows]
        return torch.stack(each).sum() / 8

    torch.testing.assert_close(
        parameters(run.model), stepped(language_model(), loss), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("average", ["tokens", "examples"])
def test_losses_of_all_micro_batches_weigh_the_gradient(
    tmp_path: Path, accumulation: int, average: Any
):
    rows = examples(4 * accumulation)
    run = trainer(tmp_path, language_model(), rows, accumulation=accumulation)
    made = apply_weights(run, LOSSES, average=average)
    run.train()
    factors = linupper(means(language_model(), rows))

    def by_tokens(model: Any) -> Tensor:
        return weighted_tokens(model, rows, factors)

    def by_examples(model: Any) -> Tensor:
        each = [u * token_losses(model, row).mean() for u, row in zip(factors, rows, strict=True)]
        return torch.stack(each).sum() / len(rows)

    chosen = by_tokens if average == "tokens" else by_examples
    torch.testing.assert_close(
        parameters(run.model), stepped(language_model(), chosen), rtol=1e-5, atol=1e-6
    )
    told = made.summary()
    assert told is not None
    assert told.largest == pytest.approx(max(factors), rel=1e-5)
    assert told.mean_loss == pytest.approx(sum(means(language_model(), rows)) / len(rows))
    squares = sum((u / len(rows)) ** 2 for u in factors)
    assert told.effective_size == pytest.approx(1 / squares, rel=1e-5)


def test_micro_batches_weighed_by_themselves_are_another_method(tmp_path: Path):
    rows = examples(8)
    run = trainer(tmp_path, language_model(), rows, accumulation=2)
    apply_weights(run, LOSSES, accumulation="each")
    run.train()
    losses = means(language_model(), rows)
    factors = linupper(losses[:4]) + linupper(losses[4:])
    expected = stepped(language_model(), lambda model: weighted_tokens(model, rows, factors))
    torch.testing.assert_close(parameters(run.model), expected, rtol=1e-5, atol=1e-6)
    assert factors != pytest.approx(linupper(losses), rel=1e-2)


def test_the_first_pass_draws_the_dropout_of_the_passes_that_train(tmp_path: Path):
    seen: list[Tensor] = []

    def measure(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, counted = class_losses(output, labels, shift=True)
        seen.append(losses.detach())
        return losses, counted

    model = language_model(attention_dropout=0.5)
    run = trainer(tmp_path, model, examples(12), accumulation=3)
    apply_weights(run, LOSSES, losses=measure)
    run.train()
    assert len(seen) == 6
    for early, late in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(early, late)
    assert not torch.equal(seen[0], class_losses_without_dropout(run, 12))


def class_losses_without_dropout(run: Any, number: int) -> Tensor:
    model = language_model()
    rows = collate([{k: row[k] for k in ("input_ids", "labels")} for row in examples(number)[:4]])
    with torch.no_grad():
        output = model(input_ids=rows["input_ids"])
    return class_losses(output, rows["labels"], shift=True)[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_token_weights_weigh_the_gradient(tmp_path: Path, accumulation: int):
    rows = examples(4 * accumulation)

    def tldr(losses: Tensor, tau: float) -> Tensor:
        return (math.pi * (-losses).exp()).cos() + 1

    def talr(losses: Tensor, tau: float) -> Tensor:
        return (-losses / tau).exp().clamp(min=0.01)

    ordered = sorted(means(language_model(), rows))
    middle = len(ordered) // 2
    tau = (ordered[middle - 1] + ordered[middle]) / 2
    kinds: list[tuple[Any, Any]] = [("tldr", tldr), ("talr", talr)]
    for kind, formula in kinds:
        run = trainer(tmp_path, language_model(), rows, accumulation=accumulation)
        apply_weights(run, TokenWeights(kind=kind))
        run.train()

        def loss(model: Any, formula: Any = formula) -> Tensor:
            each = [token_losses(model, row) for row in rows]
            total = sum(len(losses) for losses in each)
            weighed = [(formula(losses.detach(), tau) * losses).sum() for losses in each]
            return torch.stack(weighed).sum() / total

        torch.testing.assert_close(
            parameters(run.model), stepped(language_model(), loss), rtol=1e-5, atol=1e-6
        )


def test_domains_weigh_one_each_within_themselves_and_are_logged(tmp_path: Path):
    rows = examples(16)
    for row in rows[::2]:  # domain a repeats one token: much easier or harder than b
        row["input_ids"] = [3] * 8
        row["labels"] = [-100, *[3] * 7]
    told: list[dict[str, float]] = []
    for within in (False, True):
        run = trainer(tmp_path, language_model(), rows, accumulation=4, remove_unused_columns=False)
        settings = LossReweighting(uniform_share=0, within_domain=within)
        apply_weights(run, settings, domains=["a", "b"])
        run.train()
        told += [entry for entry in run.state.log_history if "weights/largest" in entry]
    assert len(told) == 2
    free, bound = ([entry[f"weights/domain/{name}"] for name in "ab"] for entry in told)
    assert bound == pytest.approx([1, 1], abs=1e-5)
    assert free[0] != pytest.approx(1, abs=0.05)
    assert 0 < told[0]["weights/effective_share"] < 1
    assert {"weights/unweighted_loss", "step"} <= set(told[0])


def test_evaluation_is_unweighted_and_needs_no_column(tmp_path: Path):
    rows = examples(8)
    held_out = [{key: row[key] for key in ("input_ids", "labels")} for row in examples(6, seed=9)]
    plain = trainer(tmp_path, language_model(), rows, eval_dataset=held_out)
    expected = plain.evaluate()["eval_loss"]
    run = trainer(
        tmp_path, language_model(), rows, eval_dataset=held_out, remove_unused_columns=False
    )
    apply_weights(run)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    run = trainer(tmp_path, language_model(), rows, eval_dataset=held_out)
    apply_weights(run, LOSSES)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_classifiers_are_weighed_too(tmp_path: Path, accumulation: int):
    def classifier() -> Any:
        torch.manual_seed(0)
        fields = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = AutoConfig.for_model(
            "bert", vocab_size=23, num_attention_heads=2, num_labels=3, **fields,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return AutoModelForSequenceClassification.from_config(config)

    rows = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3, "curate_weight": 1.0}
        for row in examples(16)
    ]
    plain = trainer(tmp_path, classifier(), rows, accumulation=accumulation)
    # Trainer takes a classifier's loss for one that is divided by the accumulation already.
    plain.loss_is_scaled_for_ga = False
    plain.train()
    run = trainer(
        tmp_path, classifier(), rows, accumulation=accumulation, remove_unused_columns=False
    )
    run.loss_is_scaled_for_ga = False
    apply_weights(run)
    run.train()
    torch.testing.assert_close(parameters(run.model), parameters(plain.model), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_are_weighed_too(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    rows = examples(8)

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        return peft.get_peft_model(language_model(), config)

    plain = trainer(tmp_path, adapted(), rows, accumulation=2)
    plain.train()
    run = trainer(tmp_path, adapted(), rows, accumulation=2)
    apply_weights(run, LossReweighting(temperature=1e6))
    run.train()
    torch.testing.assert_close(parameters(run.model), parameters(plain.model), rtol=1e-5, atol=1e-6)


def test_a_column_that_would_be_lost_is_refused(tmp_path: Path):
    rows = examples(8)
    run = trainer(tmp_path, language_model(), rows)
    with pytest.raises(ConfigError, match="removes curate_weight before") as error:
        apply_weights(run)
    assert "remove_unused_columns=False" in error.value.fix
    data = datasets.Dataset.from_list(rows).remove_columns("curate_weight")
    run = trainer(tmp_path, language_model(), data, remove_unused_columns=False)
    with pytest.raises(ConfigError, match="no column curate_weight, but input_ids"):
        apply_weights(run)
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    run = trainer(tmp_path, language_model(), bare, remove_unused_columns=False)
    apply_weights(run)
    with pytest.raises(InputError, match="a training batch has no curate_weight"):
        run.train()


def test_settings_under_which_weights_would_be_lost_are_refused(tmp_path: Path):
    rows = examples(8)

    def refused(match: str, weights: Any = LOSSES, **options: Any) -> None:
        run = trainer(tmp_path, options.pop("model", language_model()), rows, **options)
        with pytest.raises(ConfigError, match=match):
            apply_weights(run, weights)

    refused("label smoothing", label_smoothing_factor=0.1)
    refused("needs the domains", LossReweighting(within_domain=True))
    refused("TinyHead computes", model=TinyHead())
    routed = language_model()
    routed.config.output_router_logits = True
    refused("a loss for its router", model=routed)
    run = trainer(tmp_path, language_model(), rows)
    apply_weights(run, LOSSES)
    with pytest.raises(ConfigError, match="compute_loss_func already"):
        apply_weights(run, LOSSES)
    run = trainer(tmp_path, language_model(), rows)
    run.args.packing = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="packing joins examples"):
        apply_weights(run, LOSSES)


class TinyHead(torch.nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layer(input_ids)


@pytest.mark.parametrize("value", [-1.0, math.nan, None])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, value: float | None):
    rows = examples(4)
    rows[2]["curate_weight"] = value
    run = trainer(tmp_path, language_model(), rows, remove_unused_columns=False)
    apply_weights(run)
    with pytest.raises(InputError, match="an example has the curate_weight"):
        run.train()


def test_an_unknown_domain_is_refused(tmp_path: Path):
    run = trainer(tmp_path, language_model(), examples(4), remove_unused_columns=False)
    apply_weights(run, LOSSES, domains=["a", "c"])
    with pytest.raises(InputError, match="of domain 'b'"):
        run.train()


def test_an_example_without_targets_neither_counts_nor_sets_the_range(tmp_path: Path):
    rows = examples(4)
    rows[1]["labels"] = [-100] * 8
    run = trainer(tmp_path, language_model(), rows)
    apply_weights(run, LOSSES)
    run.train()
    there = [rows[0], *rows[2:]]
    factors = linupper(means(language_model(), there))
    expected = stepped(language_model(), lambda model: weighted_tokens(model, there, factors))
    torch.testing.assert_close(parameters(run.model), expected, rtol=1e-5, atol=1e-6)


def test_the_robust_range_survives_a_checkpoint(tmp_path: Path):
    rows = examples(64)
    settings = LossReweighting(uniform_share=0, robust=True, window_steps=3)

    def run(saving: str) -> Any:
        made = trainer(
            tmp_path,
            language_model(),
            rows,
            steps=4,
            accumulation=2,
            save_strategy=saving,
            save_steps=2,
        )
        apply_weights(made, settings)
        return made

    whole = run("steps")
    whole.train()
    resumed = run("no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_sft_trainer_takes_the_weights(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    rows = [{**row, "curate_weight": 2.0} for row in examples(8)]
    data = datasets.Dataset.from_list(rows).remove_columns("curate_domain")

    def with_mask(rows: list[Any]) -> Any:
        """Its metrics read a mask, of batches without padding too."""
        batch = collate(rows)
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}

    def run(weighted: bool) -> Tensor:
        made = trl.SFTTrainer(
            language_model(),
            trl.SFTConfig(
                str(tmp_path), max_steps=1, per_device_train_batch_size=8, optim="sgd",
                learning_rate=0.5, max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
                report_to=[], save_strategy="no", bf16=False, remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=data,
            data_collator=with_mask,
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        before = parameters(made.model)
        if weighted:
            apply_weights(made)
        made.train()
        return parameters(made.model) - before

    torch.testing.assert_close(run(True), 2 * run(False), rtol=1e-4, atol=1e-6)
