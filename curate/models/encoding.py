"""Texts and images as vectors: the hidden states of a transformers model, pooled.

Shapes: N examples, B of a batch, T tokens, d dimensions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from curate.errors import ConfigError, InputError
from curate.models.batches import for_each_batch
from curate.models.saved import max_positions, read_config, weights_files
from curate.models.tokens import load_tokenizer

Pooling = Literal["mean", "position_weighted", "first", "last"]

_MODES: dict[str, Pooling] = {
    "cls_token": "first",
    "lasttoken": "last",
    "weightedmean_tokens": "position_weighted",
    "mean_tokens": "mean",
}
"""As in `1_Pooling/config.json` of a sentence encoder, `pooling_mode_…`."""


class Encoded(NamedTuple):
    """What an encoder says of N examples."""

    vectors: npt.NDArray[np.float32]
    """(N, d); NaN where there was nothing to read."""
    num_read: npt.NDArray[np.int64]
    """(N,) tokens that were read, special ones included."""
    is_cut: npt.NDArray[np.bool_]
    """(N,) whether the text was longer than the limit."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model that reads texts, on its device."""

    model: nn.Module
    tokenizer: Any
    pooling: Pooling
    layer: int
    """-1 is the last, 0 the embeddings."""
    max_tokens: int
    device: torch.device

    @property
    def dim(self) -> int:
        return int(cast(Any, self.model).config.hidden_size)

    def encode(self, texts: Sequence[str], *, batch_tokens: int) -> Encoded:
        """The vector of each text.

        Args:
            texts: N.
            batch_tokens: tokens of a batch, padding included; halved where memory does not do.
        """
        # One token more than is read tells which texts are cut.
        tokens = _numbers(self.tokenizer, texts, self.max_tokens + 1)
        is_cut = np.array([len(row) > self.max_tokens for row in tokens], dtype=np.bool_)
        for row in np.flatnonzero(is_cut).tolist():
            tokens[row] = _numbers(self.tokenizer, [texts[row]], self.max_tokens)[0]
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        found = np.full((len(texts), self.dim), np.nan, dtype=np.float32)
        there = np.flatnonzero(lengths > self.tokenizer.num_special_tokens_to_add())

        def work(members: np.ndarray) -> None:
            rows = there[members]
            found[rows] = self._batch([tokens[row] for row in rows])

        with torch.inference_mode():
            for_each_batch(lengths[there], work, batch_tokens=batch_tokens)
        return Encoded(found, lengths, is_cut)

    def _batch(self, tokens: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        lengths = torch.tensor([len(row) for row in tokens])
        ids = torch.zeros(len(tokens), int(lengths.max()), dtype=torch.int64)
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        states = _states(
            self.model,
            self.layer,
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
        )
        return pool(states.float(), mask.to(self.device), self.pooling).cpu().numpy()


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of the states of each example's tokens.

    `position_weighted` is sum_t t h_t / sum_t t with t = 1, 2, ... over the tokens of the example.

    Args:
        states: (B, T, d)
        mask: (B, T) 1 for tokens, 0 for padding, which stands at the end.
        pooling: how.

    Returns:
        (B, d)
    """
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        last = mask.sum(1) - 1
        return states[torch.arange(len(states), device=states.device), last]
    weights = mask.to(states.dtype)
    if pooling == "position_weighted":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("btd,bt->bd", states, weights)


def load_encoder(
    folder: Path,
    *,
    pooling: Literal["auto"] | Pooling = "auto",
    layer: int = -1,
    max_tokens: int = 256,
    dtype: str = "float32",
    device: torch.device,
    tokenizer: str | None = None,
) -> Encoder:
    """A model without its head, and its tokenizer.

    Args:
        folder: saved by transformers; of an encoder and decoder the encoder is taken.
        pooling: `auto` as in `curate.vectors.settings.Embed`.
        layer: whose states.
        max_tokens: longest input; less where the model itself reads less.
        dtype: of the weights.
        device: where it runs.
        tokenizer: folder of the tokenizer, where it does not stand with the model.

    Raises:
        InputError: there is no model, no safetensors or no tokenizer, or it cannot be loaded.
        ConfigError: it has no such layer.
    """
    model = load_body(folder, dtype=dtype, device=device)
    limit = max_positions(model)
    depth = int(getattr(model.config, "num_hidden_layers", 0))
    if not -depth - 1 <= layer <= depth:
        raise ConfigError(
            f"layer is {layer}, but the model in {folder} has {depth}", fix="set layer to -1"
        )
    return Encoder(
        model=model,
        tokenizer=load_tokenizer(tokenizer or folder),
        pooling=pooling_of(folder) if pooling == "auto" else pooling,
        layer=layer,
        max_tokens=max_tokens if limit is None else min(max_tokens, limit),
        device=device,
    )


def load_body(folder: Path, *, dtype: str, device: torch.device) -> Any:
    """A transformers model without a head, in eval mode.

    Raises:
        InputError: it is missing, holds pickles only, or cannot be loaded.
    """
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    read_config(folder)
    weights_files(folder)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a head that is left out, a pooler that is new
    try:
        model: Any = AutoModel.from_pretrained(
            str(folder),
            use_safetensors=True,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the model in {folder} cannot be loaded:"
            f" {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            fix="name a folder saved by transformers, or a hub id",
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model.to(device).eval()


def pooling_of(folder: Path) -> Pooling:
    """How a model's own files want its states pooled; see `Embed.pooling`."""
    path = folder / "1_Pooling" / "config.json"
    if path.is_file():
        given = json.loads(path.read_text(encoding="utf-8"))
        for mode, pooling in _MODES.items():
            if given.get(f"pooling_mode_{mode}"):
                return pooling
    return "position_weighted" if _reads_forwards(folder) else "mean"


def encode_images(
    model: Any, pixels: Tensor, *, layer: int, device: torch.device
) -> npt.NDArray[np.float32]:
    """The mean over places of an image model's states.

    Args:
        model: of `load_body`.
        pixels: (B, C, H, W)
        layer: whose states.
        device: of the model.

    Returns:
        (B, d)
    """
    with torch.inference_mode():
        states = _states(model, layer, pixel_values=pixels.to(device)).float()
        places = states.flatten(2) if states.ndim == 4 else states.transpose(1, 2)
        return places.mean(2).cpu().numpy()


def _states(model: Any, layer: int, **inputs: Tensor) -> Tensor:
    """(B, T, d), or (B, d, H, W) of convolutions."""
    if layer == -1:
        return model(**inputs).last_hidden_state
    return model(**inputs, output_hidden_states=True).hidden_states[layer]


def _numbers(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]


def _reads_forwards(folder: Path) -> bool:
    """Whether a model is one that predicts the next token, and nothing else."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # The mappings hold classes that are loaded when they are asked for.
    return (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        and not getattr(config, "is_encoder_decoder", False)
    )
