"""A small training run for the proxy's loop: bytes of a few made-up domains, a tiny model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from curate.models.optimiser import Optimiser
from curate.models.sequence_files import write_sequences
from curate.models.sequences import PARTS, Sequences
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask
from curate.models.tasks.protocol import Encoded
from mixers.proxy_settings import Proxy
from mixers.proxy_step import Data

LENGTH = 16
VOCABULARY = 32


class _Tokenizer:
    """What the task asks of one; texts are made of numbers here."""

    bos_token_id = None
    pad_token_id = 0
    eos_token_id = 0
    chat_template = None


def domain_tokens(kind: str, num: int, generator: np.random.Generator) -> np.ndarray:
    """(num, LENGTH) `count`: numbers that go up; `repeat`: one number; `noise`: any."""
    if kind == "noise":
        return generator.integers(1, VOCABULARY, (num, LENGTH))
    first = generator.integers(1, VOCABULARY, (num, 1))
    step = 1 if kind == "count" else 0
    return 1 + (first - 1 + step * np.arange(LENGTH)) % (VOCABULARY - 1)


def write_domains(path: Path, sizes: Mapping[str, int], *, seed: int = 0) -> Path:
    """A file of sequences; the last eighth of each domain is held out."""
    generator = np.random.default_rng(seed)
    tokens: list[np.ndarray] = []
    domain: list[int] = []
    part: list[int] = []
    for number, (name, size) in enumerate(sizes.items()):
        tokens.append(domain_tokens(name.split("-")[0], size, generator))
        domain += [number] * size
        held_out = size // 8
        halves = [PARTS.index("reference"), PARTS.index("proxy")]
        part += [halves[i % 2] for i in range(size - held_out)]
        part += [PARTS.index("held_out")] * held_out
    flat = np.concatenate(tokens).astype(np.int32)
    num = len(flat)
    counted = np.tile(np.arange(LENGTH) > 0, (num, 1))
    encoded = Encoded(
        lengths=np.full(num, LENGTH),
        num_scored=np.full(num, LENGTH - 1),
        truncated=np.zeros(num, dtype=np.bool_),
        arrays={
            "tokens": flat.reshape(-1),
            "starts": np.arange(num + 1) * LENGTH,
            "counted": counted.reshape(-1),
        },
        problems={},
    )
    write_sequences(
        path,
        encoded,
        domain=np.array(domain, dtype=np.int32),
        part=np.array(part, dtype=np.uint8),
        names=list(sizes),
    )
    return path


def open_data(
    paths: Sequence[Path], *, parts: Sequence[str] = ("reference", "proxy"), **more: Any
) -> Data:
    """Training and held-out sequences of a file."""
    sequences = Sequences.open(paths, parts=parts)
    held_out = Sequences.open(paths, parts=("held_out",))
    return Data(sequences, held_out, **more)


def make_task() -> CausalLMTask:
    return CausalLMTask(CausalLM(max_tokens=LENGTH), _Tokenizer())


def make_model(*, seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            attention_dropout=dropout,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def make_optimiser(settings: Proxy, *, seed: int = 0, dropout: float = 0.0) -> Optimiser:
    return Optimiser(
        make_model(seed=seed, dropout=dropout),
        settings.train,
        seed=seed,
        total_steps=settings.steps,
        device=torch.device("cpu"),
    )
