"""Adapters against peft's own loading, and their gradients against autograd in a loop."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gradient_loop import assert_squares, gradient_loop, squares_of
from safetensors.torch import load_file, save_file
from tiny_models import save_classifier, save_language_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from curate.errors import ConfigError, InputError, MissingDependencyError
from curate.models import devices
from curate.models.adapters import has_adapter, measurer_digest, save_adapter
from curate.models.gradients import Engine
from curate.models.load import LoadedModel, load_model, model_digest
from curate.models.settings import CausalLM, LoRA, Model, TextClassification

peft: Any = pytest.importorskip("peft")

# peft's own wrapper, which only the tests use, asks transformers for a name it is to lose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

IDS = torch.tensor([[5, 9, 5, 7, 11, 2], [3, 3, 8, 20, 1, 30], [40, 41, 42, 43, 44, 45]])


def losses(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def save_lora(base: Path, folder: Path, **options: Any) -> Any:
    """An adapter with large random weights, made and saved by peft itself; its wrapped model."""
    torch.manual_seed(3)
    kind = options.setdefault("task_type", "CAUSAL_LM")
    auto = AutoModelForCausalLM if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    more = {} if kind == "CAUSAL_LM" else {"num_labels": 5}
    model: Any = auto.from_pretrained(base, ignore_mismatched_sizes=True, **more)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def loaded(base: Path, task: Any = None, **settings: Any) -> LoadedModel:
    return load_model(Model(name=str(base), device="cpu", **settings), task or CausalLM())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_language_model(tmp_path / "base")


def test_a_saved_adapter_gives_the_logits_that_peft_gives(base: Path, tmp_path: Path):
    wrapped = save_lora(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    model = loaded(base, adapter=str(tmp_path / "adapter")).model
    torch.testing.assert_close(model(IDS).logits, wrapped(IDS).logits)
    plain = loaded(base).model(IDS).logits
    assert (model(IDS).logits - plain).abs().max() > 0.1


def test_only_the_adapter_of_a_loaded_model_learns(base: Path, tmp_path: Path):
    save_lora(base, tmp_path / "adapter", target_modules=["v_proj"])
    model = loaded(base, adapter=str(tmp_path / "adapter")).model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4  # two layers, two matrices each
    assert all("v_proj.lora_" in name for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
        {"target_modules": ["gate_proj"], "use_dora": True},
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
    ids=["all", "dropout", "dora", "head kept", "embedding"],
)
def test_norms_over_an_adapter_are_those_of_a_loop(
    base: Path, tmp_path: Path, options: dict[str, Any]
):
    save_lora(base, tmp_path / "adapter", **options)
    model = loaded(base, adapter=str(tmp_path / "adapter")).model.double()
    wanted = squares_of(gradient_loop(model, losses, {"input_ids": IDS}))
    assert min(float(values.min()) for values in wanted.values()) > 0
    engine = Engine(model)
    found = engine.measure(losses, {"input_ids": IDS}, num_examples=3)
    assert_squares(found.squares, wanted)
    assert all("magnitude" in name or "embedding" in name for name in engine.slow)
    single = model.float()
    found = Engine(single).measure(losses, {"input_ids": IDS}, num_examples=3)
    assert_squares(found.squares, wanted, rtol=1e-5)


def test_a_fresh_adapter_leaves_the_model_as_it_was(base: Path):
    plain = loaded(base).model(IDS).logits
    model = loaded(base, lora=LoRA(rank=2)).model
    torch.testing.assert_close(model(IDS).logits, plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers, matrices of each, two sides
    assert not any("lm_head" in name for name in trained)


def test_a_fresh_adapter_follows_its_seed_alone(base: Path):
    def sides(seed: int) -> Tensor:
        torch.rand(1)
        settings = Model(name=str(base), device="cpu", lora=LoRA(targets=("q_proj",)))
        model = load_model(settings, CausalLM(), head_seed=seed).model
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(sides(1), sides(1))
    assert not torch.equal(sides(1), sides(2))


def test_an_adapter_that_we_save_loads_again_here_and_in_peft(base: Path, tmp_path: Path):
    wrapped = save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    model = loaded(base, adapter=str(tmp_path / "a")).model
    assert has_adapter(model)
    save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b/model.safetensors").exists()
    again = load_model(Model(name=str(base), device="cpu"), CausalLM(), checkpoint=tmp_path / "b")
    torch.testing.assert_close(again.model(IDS).logits, wrapped(IDS).logits)
    assert again.tokenizer is not None  # that of the model under it
    theirs = peft.PeftModel.from_pretrained(
        cast(Any, AutoModelForCausalLM).from_pretrained(base), tmp_path / "b"
    )
    torch.testing.assert_close(theirs.eval()(IDS).logits, wrapped(IDS).logits)


def test_saving_an_adapter_twice_gives_the_same_bytes(base: Path, tmp_path: Path):
    model = loaded(base, lora=LoRA()).model
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_a_classifier_gets_its_head_from_the_adapter(tmp_path: Path):
    base = save_classifier(tmp_path / "base", num_labels=3)
    wrapped = save_lora(base, tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
    task = TextClassification(num_classes=5)
    model = loaded(base, task, adapter=str(tmp_path / "a")).model
    torch.testing.assert_close(model(IDS).logits, wrapped(IDS).logits)
    with pytest.raises(ConfigError, match="3 classes"):
        loaded(base, task)


def test_a_fresh_head_is_trained_and_saved_with_the_adapter(tmp_path: Path):
    base = save_language_model(tmp_path / "base")
    settings = Model(name=str(base), device="cpu", lora=LoRA())
    task = TextClassification(num_classes=4)
    model = load_model(settings, task, head_seed=7).model
    assert any(p.requires_grad for n, p in model.named_parameters() if n.startswith("score."))
    save_adapter(model, tmp_path / "a")
    again = load_model(settings, task, checkpoint=tmp_path / "a").model
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_the_digest_follows_the_adapter_and_the_model_under_it(base: Path, tmp_path: Path):
    plain = Model(name=str(base), device="cpu")
    assert measurer_digest(plain, base) == model_digest(base)
    save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    save_lora(base, tmp_path / "b", target_modules=["q_proj"], lora_alpha=32)
    other = save_language_model(tmp_path / "other", seed=1)
    found = [
        measurer_digest(plain, base),
        measurer_digest(plain, tmp_path / "a"),
        measurer_digest(plain, tmp_path / "b"),
        measurer_digest(Model(name=str(other)), tmp_path / "a"),
        measurer_digest(Model(name=str(base), lora=LoRA()), base),
        measurer_digest(Model(name=str(base), quantize="4bit"), base),
    ]
    assert len(set(found)) == len(found)
    named = Model(name=str(base), adapter=str(tmp_path / "a"))
    assert measurer_digest(named, base) == found[1]
    assert measurer_digest(named, tmp_path / "b") == found[2]  # a checkpoint goes first


def break_adapter(folder: Path, how: str) -> None:
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(settings.read_text())
    match how:
        case "no folder":
            settings.unlink()
        case "pickle":
            weights.rename(folder / "adapter_model.bin")
        case "prompt":
            settings.write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
        case "no json":
            settings.write_text("{")
        case "lacks":
            tensors.pop(min(tensors))
            save_file(tensors, weights)
        case "other shape":
            save_file({k: v[:, :1].contiguous() for k, v in tensors.items()}, weights)
        case "other layers":
            settings.write_text(json.dumps(config | {"target_modules": ["nowhere"]}))
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "there is no adapter in"),
        ("pickle", "no adapter_model.safetensors"),
        ("prompt", "of kind PROMPT_TUNING"),
        ("no json", "no settings of an adapter"),
        ("lacks", "lacks .*lora_A"),
        ("other shape", "does not fit the model"),
        ("other layers", "does not fit the model"),
    ],
)
def test_a_broken_adapter_is_explained(base: Path, tmp_path: Path, how: str, message: str):
    save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    break_adapter(tmp_path / "a", how)
    with pytest.raises(InputError, match=message) as caught:
        loaded(base, adapter=str(tmp_path / "a"))
    assert str(tmp_path / "a") in caught.value.what


def test_an_adapter_of_a_larger_model_is_refused(base: Path, tmp_path: Path):
    large = save_language_model(tmp_path / "large", num_hidden_layers=3)
    save_lora(large, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"the model has not, .*layers\.2"):
        loaded(base, adapter=str(tmp_path / "a"))


def test_an_adapter_is_no_model(base: Path, tmp_path: Path):
    save_lora(base, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(InputError, match="an adapter, not a model") as caught:
        loaded(tmp_path / "a")
    assert "model.adapter" in caught.value.fix


def test_layers_that_do_not_exist_are_refused_with_names_that_do(base: Path):
    with pytest.raises(ConfigError, match="no adapter fits") as caught:
        loaded(base, lora=LoRA(targets=("query",)))
    assert "q_proj" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"model_type": "llama"}, "lora": LoRA()}, "model.lora needs a model"),
        ({"config": {"model_type": "llama"}, "quantize": "4bit"}, "model.quantize needs"),
        ({"name": "m", "adapter": "a", "lora": LoRA()}, "one or the other"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Model(**settings)


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_impossible_adapters_are_refused(values: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"model\.lora"):
        LoRA(**values)


def test_without_peft_the_message_says_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="need peft") as caught:
        loaded(base, lora=LoRA())
    assert "pip install" in caught.value.fix


@pytest.mark.parametrize(
    ("has_gpu", "message", "fix"),
    [(False, "needs a GPU", "remove"), (True, "bitsandbytes is not installed", "pip install")],
)
def test_few_bits_need_a_gpu_and_bitsandbytes(
    base: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, message: str, fix: str
):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=message) as caught:
        loaded(base, device_map="auto", quantize="4bit", lora=LoRA())
    assert fix in caught.value.fix


def test_the_bits_that_are_asked_for_are_those_of_the_library():
    four = devices.quantization("4bit", torch.bfloat16)
    assert four.load_in_4bit
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert devices.quantization("8bit", torch.float32).load_in_8bit
