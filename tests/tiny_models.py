"""Tiny models with random weights, saved the way transformers saves any other."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**WIDE, "num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {**WIDE, "num_attention_heads": 4, "max_position_embeddings": 64}

MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("Ġ", "a")]


def byte_tokenizer(
    *, bos: bool = True, eos: bool = True, merges: bool = True, template: str | None = None
) -> Any:
    """Bytes and a few merges; `<s>` and `</s>` where asked for."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = MERGES if merges else []
    pieces += ["".join(pair) for pair in pairs] + ["<s>", "</s>", "[CLS]", "[SEP]"]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special: dict[str, Any] = {"additional_special_tokens": ["[CLS]", "[SEP]"]}
    if bos:
        special["bos_token"] = "<s>"
    if eos:
        special["eos_token"] = "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def classifier_tokenizer() -> Any:
    """The byte tokenizer, with [CLS] before and [SEP] behind every text."""
    tokenizer = byte_tokenizer(bos=False)
    core = tokenizer.backend_tokenizer
    ids = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


def save_language_model(
    folder: Path, *, kind: str = "llama", seed: int = 0, tokenizer: Any = None, **fields: Any
) -> Path:
    """A causal language model and its tokenizer; large weights, so that it has opinions."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**LLAMA, **fields})
    _save(folder, AutoModelForCausalLM.from_config, config, seed)
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(
    folder: Path, *, kind: str = "bert", num_labels: int = 3, seed: int = 0, **fields: Any
) -> Path:
    """A text classifier and its tokenizer."""
    tokenizer = classifier_tokenizer()
    shape = BERT if kind == "bert" else LLAMA
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), num_labels=num_labels, **{**shape, **fields}
    )
    _save(folder, AutoModelForSequenceClassification.from_config, config, seed)
    tokenizer.save_pretrained(folder)
    return folder


def _save(folder: Path, make: Any, config: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
