"""Small models of transformers, from their configuration, against autograd in a loop."""

import warnings
from typing import Any

import pytest
import torch
import transformers as tr
from gradient_loop import assert_squares, gradient_loop, squares_of
from torch import Tensor, nn
from torch.nn import functional

from curate.models.gradients import Engine, Wanted

HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, **HEADS}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
EXPERTS: dict[str, Any] = {**LLAMA, "experts_implementation": "eager"}

VIT: dict[str, Any] = {**SIZES, "image_size": 8, "patch_size": 4}
DEBERTA: dict[str, Any] = {**SIZES, "relative_attention": True, "max_relative_positions": 8,
                           "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}  # fmt: skip

CAUSAL = {
    "gpt2 tied": tr.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "llama": tr.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama tied": tr.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": tr.Qwen3Config(**LLAMA, head_dim=8),
    "neox": tr.GPTNeoXConfig(**SIZES),
    "gemma2": tr.Gemma2Config(**LLAMA, head_dim=8),
    "opt": tr.OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16,
                        max_position_embeddings=32, **HEADS),
    "mixtral": tr.MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen2 moe": tr.Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=8, num_experts=4,
                                   shared_expert_intermediate_size=12, decoder_sparse_step=1),
}  # fmt: skip
CLASSIFIERS = {
    "bert": tr.BertConfig(**SIZES, max_position_embeddings=32),
    "roberta": tr.RobertaConfig(**SIZES, max_position_embeddings=32),
    "modernbert": tr.ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2,
                                      bos_token_id=1, eos_token_id=2),
    "deberta": tr.DebertaV2Config(**DEBERTA),
}  # fmt: skip
IMAGES = {
    "vit": tr.ViTConfig(**VIT),
    "resnet": tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
                              layer_type="basic"),
    "convnext": tr.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
}  # fmt: skip
SEQUENCES = {
    "t5": tr.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "bart": tr.BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1,
                          encoder_attention_heads=2, decoder_attention_heads=2,
                          encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(auto: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no gain at one, no shift at zero
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:  # far from the linear start
                parameter.mul_(4)
    return model


def tokens() -> Tensor:
    found = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    found[0, 1] = found[0, 3] = found[0, 5]
    return found


def padded() -> dict[str, Tensor]:
    """Three sequences of 9, 6 and 4 tokens."""
    mask = (torch.arange(9) < torch.tensor([9, 6, 4])[:, None]).long()
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def next_token_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(**batch, use_cache=False).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    losses = functional.cross_entropy(logits.mT, targets, reduction="none")
    return (losses * batch["attention_mask"][:, 1:]).sum(1)


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def translation_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(**batch, use_cache=False).logits
    targets = batch["decoder_input_ids"]
    return functional.cross_entropy(logits.mT, targets, reduction="none").sum(1)


def check(
    model: nn.Module, losses: Any, batch: dict[str, Tensor], *, rtol: float, slow: int = 0
) -> None:
    engine = Engine(model)
    found = engine.measure(losses, batch, num_examples=3)
    wanted = squares_of(gradient_loop(model, losses, batch))
    assert_squares(found.squares, wanted, rtol=rtol)
    total = torch.stack(list(wanted.values())).sum(0)
    torch.testing.assert_close(found.total(), total, rtol=rtol, atol=0)
    assert len(engine.slow) == slow, engine.slow


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_have_the_squares_of_the_loop(name: str):
    model = built(tr.AutoModelForCausalLM, CAUSAL[name])
    # Gemma casts to float32 within its norms: their own gradients have no more digits.
    check(model, next_token_losses, padded(), rtol=1e-6 if name == "gemma2" else 1e-9)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_have_the_squares_of_the_loop(name: str):
    model = built(tr.AutoModelForSequenceClassification, CLASSIFIERS[name])
    batch = {**padded(), "labels": torch.tensor([0, 1, 1])}
    # DeBERTa's relative embeddings and the layers on top of them have no example axis.
    check(model, class_losses, batch, rtol=1e-9, slow=9 if name == "deberta" else 0)


@pytest.mark.parametrize("name", IMAGES)
def test_image_models_have_the_squares_of_the_loop(name: str):
    model = built(tr.AutoModelForImageClassification, IMAGES[name])
    images = torch.randn(3, 3, 8 if name == "vit" else 32, 8 if name == "vit" else 32)
    batch = {"pixel_values": images.double(), "labels": torch.tensor([0, 1, 1])}
    # ViT's class token and position embeddings, ConvNeXt's gains of a branch: bare parameters.
    check(model, class_losses, batch, rtol=1e-9, slow=0 if name == "resnet" else 2)


@pytest.mark.parametrize("name", SEQUENCES)
def test_encoder_decoders_have_the_squares_of_the_loop(name: str):
    model = built(tr.AutoModelForSeq2SeqLM, SEQUENCES[name])
    batch = {**padded(), "decoder_input_ids": tokens()[:, :5]}
    # T5 takes the mean square in float32; its relative biases have no example axis.
    is_t5 = name == "t5"
    check(model, translation_losses, batch, rtol=1e-7 if is_t5 else 1e-9, slow=2 * is_t5)


class Replaced(nn.Module):
    """A model with other values of its parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = (model, values)

    def forward(self, **inputs: Any) -> Any:
        return torch.func.functional_call(*self._call, (), inputs)


@pytest.mark.parametrize("name", ["gpt2 tied", "mixtral", "llama"])
def test_inner_products_are_directional_derivatives_of_the_losses(name: str):
    model = built(tr.AutoModelForCausalLM, CAUSAL[name])
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    batch = padded()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    wanted = Wanted(directions={"v": direction}, squares=False)
    found = Engine(model).measure(next_token_losses, batch, num_examples=3, wanted=wanted)

    def losses_at(values: dict[str, Tensor]) -> Tensor:
        return next_token_losses(Replaced(model, values), batch)

    values = {n: p.detach() for n, p in model.named_parameters()}
    slope = torch.func.jvp(losses_at, (values,), (direction,))[1]
    torch.testing.assert_close(found.inner["v"], slope, rtol=1e-5, atol=1e-5)
