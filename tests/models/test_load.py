import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    LLAMA,
    byte_tokenizer,
    save_classifier,
    save_language_model,
)

from curate.errors import ConfigError, CurateError, InputError, MissingDependencyError
from curate.models import load
from curate.models.load import build_model, load_cached, load_model, model_digest, pick_device
from curate.models.mlp import MLP
from curate.models.settings import CausalLM, Model, TabularClassification, TextClassification
from curate.models.tasks import build_task
from curate.models.tokens import load_tokenizer, tokenizer_digest

SCRATCH = {"model_type": "llama", **LLAMA}


def language_model(folder: Path, **settings: Any) -> load.LoadedModel:
    return load_model(Model(name=str(folder), device="cpu", **settings), CausalLM())


def test_a_saved_model_is_loaded_ready_to_measure(tmp_path: Path):
    loaded = language_model(save_language_model(tmp_path))
    assert not loaded.model.training
    assert loaded.device == torch.device("cpu")
    assert loaded.tokenizer is not None
    half = language_model(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_the_digest_follows_the_values_and_not_the_place(tmp_path: Path):
    first = language_model(save_language_model(tmp_path / "a")).digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config |= {"transformers_version": "0.0", "_name_or_path": "elsewhere"}
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert language_model(tmp_path / "b").digest == first
    assert language_model(save_language_model(tmp_path / "c", seed=1)).digest != first
    config["rms_norm_eps"] = 0.1
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert language_model(tmp_path / "b").digest != first
    (tmp_path / "a" / "tokenizer.json").unlink()
    byte_tokenizer(merges=False).save_pretrained(tmp_path / "a")
    assert language_model(tmp_path / "a").digest != first


def test_a_model_in_several_files_is_digested_whole(tmp_path: Path):
    save_language_model(tmp_path / "one")
    loaded = language_model(tmp_path / "one")
    loaded.model.save_pretrained(tmp_path / "many", max_shard_size="20KB")  # pyright: ignore
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 1
    before = model_digest(tmp_path / "many")
    last = bytearray(files[-1].read_bytes())
    last[-1] ^= 1
    files[-1].write_bytes(last)
    assert model_digest(tmp_path / "many") != before
    files[-1].unlink()
    with pytest.raises(InputError, match=files[-1].name):
        model_digest(tmp_path / "many")


def break_model(folder: Path, how: str) -> None:
    match how:
        case "missing":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "bad config":
            (folder / "config.json").write_text("{")
        case "no tokenizer":
            for path in folder.glob("token*"):
                path.unlink()
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "torn weights":
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:200])
        case "adapter":
            (folder / "config.json").unlink()
            (folder / "adapter_config.json").write_text("{}")
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        case "other tokenizer":
            tokenizer = byte_tokenizer()
            tokenizer.add_tokens(["<extra>"])
            tokenizer.save_pretrained(folder)
        case "other architecture":
            other = save_language_model(folder.parent / "gpt2", kind="gpt2", **GPT2)
            shutil.copy(other / "model.safetensors", folder)
        case "fewer layers":
            edit_config(folder, num_hidden_layers=1)
        case "more layers":
            edit_config(folder, num_hidden_layers=9)
        case "other width":
            edit_config(folder, hidden_size=16, head_dim=8)
        case _:
            raise AssertionError(how)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("how", "error", "message", "fix"),
    [
        ("missing", InputError, "there is no model folder", "check"),
        ("no config", InputError, "no config.json", "save_pretrained"),
        ("bad config", InputError, "not valid JSON", "save"),
        ("no tokenizer", InputError, "holds no tokenizer", "save_pretrained"),
        ("pickle", InputError, "as pickles", "safetensors"),
        ("no weights", InputError, "model.safetensors is missing", "save_pretrained"),
        ("torn weights", InputError, "cannot be loaded", "check"),
        ("adapter", InputError, "an adapter", "merge_and_unload"),
        ("other architecture", InputError, "not those of the llama .* no weights", "together"),
        ("fewer layers", InputError, r"not those of .*layers\.1\..* has no place", "together"),
        ("more layers", InputError, r"not those of .* no weights for .*layers\.", "together"),
        ("other width", InputError, "cannot be loaded", "check"),
        ("other tokenizer", ConfigError, "has 266 tokens, but the model in", "trained with"),
    ],
)
def test_a_broken_model_folder_is_explained(
    tmp_path: Path, how: str, error: type[CurateError], message: str, fix: str
):
    folder = save_language_model(tmp_path / "model")
    break_model(folder, how)
    with pytest.raises(error, match=message) as caught:
        language_model(folder)
    assert str(folder) in caught.value.what
    assert fix in caught.value.fix


def test_a_name_that_is_neither_folder_nor_reachable_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="nobody/nothing is no folder"):
        load_model(Model(name="nobody/nothing", device="cpu"), CausalLM())


def test_the_wrong_number_of_classes_is_refused(tmp_path: Path):
    folder = save_classifier(tmp_path, num_labels=3)
    with pytest.raises(ConfigError, match=r"has 3 classes, but task\.num_classes is 5"):
        load_model(Model(name=str(folder), device="cpu"), TextClassification(num_classes=5))


def test_a_classifier_without_a_head_is_refused_unless_it_is_to_be_trained(tmp_path: Path):
    folder = save_language_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": {i: str(i) for i in range(3)}})
    )
    model, task = Model(name=str(folder), device="cpu"), TextClassification(num_classes=3)
    with pytest.raises(InputError, match=r"no weights for score\.weight"):
        load_model(model, task)
    heads: list[Any] = [
        load_model(model, TextClassification(num_classes=7), head_seed=seed)
        .model.get_parameter("score.weight")
        .detach()
        for seed in (1, 1, 2)
    ]
    assert heads[0].shape == (7, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_from_scratch_the_seed_decides_the_weights():
    first, again, other = (
        build_model(Model(config=dict(SCRATCH)), CausalLM(), byte_tokenizer(), seed)
        for seed in (0, 0, 1)
    )
    weights = [next(model.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    config: Any = first.config
    tokenizer = byte_tokenizer()
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id


def test_building_a_model_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(Model(config=dict(SCRATCH)), CausalLM(), byte_tokenizer(), 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no model_type"),
        ({"model_type": "lama"}, "'lama' is not known"),
        ({**SCRATCH, "hidden_siz": 3}, "unknown key model.config.hidden_siz"),
        ({**SCRATCH, "vocab_size": 10}, "vocab_size is 10"),
        ({**SCRATCH, "hidden_size": 30, "num_attention_heads": 7}, "cannot make a llama"),
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
            "allows 16 positions",
        ),
        ({"model_type": "mlp"}, "number of features is not known"),
        ({"model_type": "mlp", "hiden": [3]}, "unknown key model.config.hiden"),
    ],
)
def test_a_configuration_that_makes_no_model_is_explained(config: dict[str, Any], message: str):
    task: Any = CausalLM()
    if config.get("model_type") == "mlp":
        task = TabularClassification(num_classes=2)
    with pytest.raises(ConfigError, match=message):
        build_model(Model(config=config), task, byte_tokenizer(), 0)


def test_a_small_network_survives_saving(tmp_path: Path):
    task = TabularClassification(num_classes=3)
    model = build_model(
        Model(config={"model_type": "mlp", "hidden": [6, 5]}), task, None, 0, num_features=4
    )
    assert isinstance(model, MLP)
    model.save_pretrained(tmp_path)
    loaded = load_model(Model(name=str(tmp_path), device="cpu"), task)
    features = torch.randn(3, 4)
    assert torch.equal(loaded.model(features), model(features))
    with pytest.raises(ConfigError, match="has 3 classes"):
        load_model(Model(name=str(tmp_path), device="cpu"), TabularClassification(num_classes=2))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        load_model(Model(name=str(tmp_path), device="cpu"), task)


def test_a_text_model_for_a_table_is_refused(tmp_path: Path):
    folder = save_language_model(tmp_path)
    with pytest.raises(ConfigError, match="does not read tables"):
        load_model(Model(name=str(folder), device="cpu"), TabularClassification(num_classes=2))


@pytest.mark.parametrize(
    ("kind", "limit"), [("llama", None), ("bert", 64), ("roberta", 61), ("gpt2", 32)]
)
def test_how_long_an_input_may_be(tmp_path: Path, kind: str, limit: int | None):
    """RoBERTa's positions start after its padding token's number."""
    fields: dict[str, Any] = {"max_position_embeddings": 64, "hidden_size": 32}
    if kind == "roberta":
        fields |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 2}
    if kind == "gpt2":
        fields = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    task: Any = CausalLM(max_tokens=8)
    if kind == "bert":
        fields |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        task = TextClassification(num_classes=2, max_tokens=8)
    model = build_model(Model(config={"model_type": kind, **fields}), task, byte_tokenizer(), 0)
    assert load.max_positions(model) == limit
    if limit is not None:
        ids = torch.full((1, limit), 7)
        model(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="no device 'gpu0'"):
        pick_device("gpu0")
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(MissingDependencyError, match="0 GPUs"):
            pick_device("cuda")


def test_a_worker_builds_its_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_language_model(tmp_path)
    model = Model(name=str(folder), device="cpu")
    built: list[Path | None] = []
    original = load.load_model

    def counting(*args: Any, **kwargs: Any) -> load.LoadedModel:
        built.append(kwargs["checkpoint"])
        return original(*args, **kwargs)

    monkeypatch.setattr(load, "load_model", counting)
    first = load_cached(model, CausalLM(), checkpoint=folder, digest="a")
    assert load_cached(model, CausalLM(), checkpoint=folder, digest="a") is first
    assert len(built) == 1
    load_cached(model, CausalLM(), checkpoint=folder, digest="b")
    assert load_cached(model, CausalLM(), checkpoint=folder, digest="a") is not first
    assert len(built) == 3


def test_a_tokenizer_is_what_its_own_files_say(tmp_path: Path):
    """transformers would take Qwen2's class from config.json, and with it one more token."""
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(byte_tokenizer())
    assert tokenizer_digest(loaded) == tokenizer_digest(byte_tokenizer())


def test_use_leaves_a_tokenizer_s_digest_as_it_was():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_digest(tokenizer)
    tokenizer("the cat", truncation=True, max_length=2)
    tokenizer(["the", "a cat"], padding=True)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(byte_tokenizer(merges=False)) != before
    assert tokenizer_digest(byte_tokenizer(bos=False)) != before


def test_a_task_of_the_user_comes_in_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_task.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from curate.models.tasks.causal_lm import CausalLMTask\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Settings:\n"
        "    implementation: ClassVar[str] = 'own_task:Task'\n"
        "    kind: str = 'own_task:Settings'\n"
        "    max_tokens: int = 8\n"
        "    turns: str = 'all'\n"
        "class Task(CausalLMTask):\n"
        "    def facts(self):\n"
        "        return {'own': 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from jobs.settings import parse_settings, task_settings

    settings = task_settings(
        parse_settings(
            {
                "run": str(tmp_path / "run"),
                "sources": {"a": {"path": "a.parquet"}},
                "task": {"kind": "own_task:Settings", "max_tokens": 4},
            }
        )
    )
    assert build_task(settings, byte_tokenizer()).facts() == {"own": 1}
    assert settings.max_tokens == 4


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path: Path):
    folder = save_language_model(tmp_path / "llama")
    other = save_language_model(tmp_path / "gpt2", kind="gpt2", **GPT2)
    for model in (
        Model(name=str(folder), device="cpu"),
        Model(config={"model_type": "llama"}, device="cpu"),
    ):
        with pytest.raises(ConfigError, match=r"gpt2 is a gpt2 model, but .* is a llama one"):
            load_model(model, CausalLM(), checkpoint=other)
        assert load_model(model, CausalLM(), checkpoint=folder).model is not None
