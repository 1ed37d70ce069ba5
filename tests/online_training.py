"""A tiny language model in a real Trainer, and the gradients that it should take."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

LENGTH, VOCABULARY, LR = 8, 23, 0.5
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def language_model(seed: int = 0, **fields: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", **{**TINY, **fields})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def examples(number: int, *, seed: int = 0, ragged: bool = True) -> list[dict[str, Any]]:
    """Examples of 4 to 8 tokens, padded, the first one or two without a target."""
    source = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for row in range(number):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=source).tolist()
        end = 4 + row % 5 if ragged else LENGTH
        labels = [-100] * (1 + row % 2 if ragged else 1) + ids[1 + (row % 2 if ragged else 0) : end]
        labels += [-100] * (LENGTH - end)
        found.append(
            {
                "input_ids": ids,
                "labels": labels,
                "curate_weight": float(torch.rand(1, generator=source)) * 2,
                "curate_domain": "ab"[row % 2],
            }
        )
    return found


def collate(rows: list[Any]) -> Any:
    return default_data_collator(rows)


def trainer(
    folder: Path,
    model: Any,
    data: Any,
    *,
    steps: int = 1,
    accumulation: int = 1,
    batch: int = 4,
    collator: Callable[[list[Any]], Any] = collate,
    **options: Any,
) -> Trainer:
    """Plain gradient descent, unclipped: a step is the gradient."""
    given: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    # A stream has no order that a sampler could choose.
    if not isinstance(data, list):
        del given["train_sampling_strategy"]
    callbacks = options.pop("callbacks", None)
    evaluated = options.pop("eval_dataset", None)
    source: Any = data
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**given, **options}),
        train_dataset=source,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=callbacks,
    )


def parameters(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def token_losses(model: Any, row: Mapping[str, Any]) -> Tensor:
    """Losses of the counted tokens of one example, position by position."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    return torch.stack(
        [-logits[t - 1, label] for t, label in enumerate(row["labels"]) if t and label != -100]
    )


def stepped(model: Any, loss: Callable[[Any], Tensor]) -> Tensor:
    """Parameters after one step down the gradient of a loss, by autograd alone."""
    model.zero_grad()
    model.train()
    loss(model).backward()
    return torch.cat([(p.detach() - LR * p.grad).flatten() for p in model.parameters()])


def weighted_tokens(model: Any, rows: Sequence[Any], factors: Sequence[float]) -> Tensor:
    """sum_i u_i sum_t nll / number of tokens."""
    losses = [token_losses(model, row) for row in rows]
    total = sum(len(each) for each in losses)
    return (
        torch.stack([u * each.sum() for u, each in zip(factors, losses, strict=True)]).sum() / total
    )
