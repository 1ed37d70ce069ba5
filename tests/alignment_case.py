"""A step around a tiny language model, without the proxy's loop, on one rank or on two."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig

from mixers.ranks import over_ranks
from mixers.rules import Piece, Tokens

NUM_DOMAINS = 4


def language_model(**fields: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.double().train()


def piece(domain: int, number: int, *, seed: int) -> Piece:
    """Sequences of different numbers of counted tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (number, 7), generator=generator)
    counts = torch.randint(2, 7, (number,), generator=generator)
    return Piece({"ids": ids}, torch.full((number,), domain), counts)


def losses_of(model: nn.Module, ids: Tensor, counts: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[torch.arange(losses.shape[1]) < counts[:, None]]


@dataclass
class ModelStep:
    """A step around a language model, on the ranks there are."""

    model: nn.Module
    pieces: Sequence[Piece]
    num_ranks: int = 1
    num_domains: int = NUM_DOMAINS
    number: int = 1
    total_steps: int = 10
    lr: float = 0.1
    asked: list[int] = field(default_factory=list[int])
    """Sequences of each pass."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        self.asked.append(len(piece.domains))
        losses = losses_of(model or self.model, piece.batch["ids"], piece.counts)
        owner = torch.arange(len(piece.domains)).repeat_interleave(piece.counts)
        return Tokens(losses, owner, piece.domains[owner])

    def second_moments(self) -> list[Tensor] | None:
        return None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def total(self, values: Tensor) -> Tensor:
        return over_ranks(values, dist.ReduceOp.SUM, None)

    def more(self, purpose: str, each: int | Tensor) -> list[Piece]:
        raise AssertionError("not drawn here")

    def target(self, purpose: str, count: int) -> list[Piece]:
        raise AssertionError("not drawn here")


def share(pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """Every `ranks`-th sequence; a rank without any of a domain has no such piece."""
    found: list[Piece] = []
    for each in pieces:
        rows = torch.arange(len(each.domains))[rank::ranks]
        if len(rows):
            found.append(
                Piece({"ids": each.batch["ids"][rows]}, each.domains[rows], each.counts[rows])
            )
    return found


def in_two_ranks(work: Callable[..., None], folder: Path) -> list[Any]:
    """What `work(rank, folder)` saved as `<rank>.pt` in two processes."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_joined, args=(work, str(folder), port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _joined(rank: int, work: Callable[..., None], folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, Path(folder))
    finally:
        dist.destroy_process_group()
