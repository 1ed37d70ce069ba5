"""Moments read from what a run and a Trainer leave, by name or by number; refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_language_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from curate.errors import InputError
from curate.models.adam_moments import moments_file, read_moments
from curate.models.checkpoints import Moments, save_checkpoint
from curate.models.load import load_model
from curate.models.settings import CausalLM, Model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


NAMES = ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"]


def stepped(make: Any, *, steps: int = 2, groups: Any = None) -> tuple[Net, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        optimiser = make(model.parameters() if groups is None else groups(model))
        for _ in range(steps):
            model(torch.randn(5, 4)).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    return model, optimiser


def saved(folder: Path, content: Any, name: str = "optimizer.pt") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    return moments_file(folder)


def assert_state(found: Any, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    for name, moment in found.items():
        state = optimiser.state[model.get_parameter(name)]
        assert torch.equal(moment.gradient, state["exp_avg"]), name
        assert torch.equal(moment.square, state["exp_avg_sq"]), name
        assert moment.step == float(state["step"])


def test_the_state_of_a_real_trainer_is_read_by_name(tmp_path: Path):
    """Two steps of a language model; the Trainer's own optimiser, still in memory, is the truth."""
    model = AutoModelForCausalLM.from_pretrained(save_language_model(tmp_path / "lm"))
    rows = [{"input_ids": [5, 6, 7, 8 + n], "labels": [5, 6, 7, 8 + n]} for n in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=2, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, adam_beta2=0.98, weight_decay=0.1, disable_tqdm=True,
    )  # fmt: skip
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=rows)  # pyright: ignore
    trainer.train()
    path = moments_file(tmp_path / "out" / "checkpoint-2")
    assert path.name == "optimizer.pt"
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    names = [name for name, _ in fresh.named_parameters()]
    found = read_moments(path, fresh, names)
    assert list(found) == names
    assert len(trainer.optimizer.param_groups) == 2
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert_state(found, model, inner)
    assert {(m.step, m.betas, m.eps) for m in found.values()} == {(2, (0.9, 0.98), 1e-8)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_the_state_of_a_trainer_of_an_adapter_fits_the_adapter_as_it_is_loaded_here(
    tmp_path: Path,
):
    """peft's names begin with what the model's own do not."""
    peft = pytest.importorskip("peft")
    base = save_language_model(tmp_path / "lm")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    rows = [{"input_ids": [5, 6, 7, 8 + n], "labels": [5, 6, 7, 8 + n]} for n in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, save_steps=3, use_cpu=True, report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=rows)  # pyright: ignore
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-3"
    settings = Model(name=str(base), device="cpu")
    loaded = load_model(settings, CausalLM(max_tokens=16), checkpoint=folder).model
    names = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(names) == 8
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    known = dict(model.named_parameters())
    for name, moment in read_moments(moments_file(folder), loaded, names).items():
        state = inner.state[known[f"base_model.model.{name}"]]
        assert torch.equal(moment.square, state["exp_avg_sq"])


def test_the_moments_of_a_run_are_read_by_name(tmp_path: Path):
    model, optimiser = stepped(torch.optim.AdamW)
    kept = Moments({}, {})
    for name, parameter in model.named_parameters():
        kept.gradient[name] = optimiser.state[parameter]["exp_avg"]
        kept.square[name] = optimiser.state[parameter]["exp_avg_sq"]
    checkpoint = save_checkpoint(
        tmp_path, seed=0, step=2, epoch=1.0, lr=0.1, write_model=lambda _: None, moments=kept
    )
    found = read_moments(moments_file(checkpoint.path), model, ["last.weight", "first.bias"])
    assert list(found) == ["last.weight", "first.bias"]
    assert_state(found, model, optimiser)


def decay_first(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    decays = ["first.weight", "last.weight"]
    rest = [p for name, p in named.items() if name not in decays]
    return [{"params": [named[n] for n in decays]}, {"params": rest, "weight_decay": 0.0}]


def norms_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Not one of the orders in use: norms decay, weights do not."""
    groups = decay_first(model)
    return [{"params": groups[1]["params"]}, {"params": groups[0]["params"]}]


@pytest.mark.parametrize("groups", [None, decay_first])
@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "optimizer_0.bin"])
def test_numbers_follow_the_groups_or_the_model(tmp_path: Path, groups: Any, name: str):
    model, optimiser = stepped(torch.optim.AdamW, groups=groups)
    path = saved(tmp_path, optimiser.state_dict(), name)
    assert_state(read_moments(path, Net(), NAMES), model, optimiser)


def test_frozen_parameters_have_no_number(tmp_path: Path):
    def unfrozen(model: nn.Module) -> list[nn.Parameter]:
        model.get_parameter("first.weight").requires_grad_(False)
        return [p for p in model.parameters() if p.requires_grad]

    model, optimiser = stepped(torch.optim.Adam, groups=unfrozen)
    path = saved(tmp_path, optimiser.state_dict())
    with pytest.raises(InputError, match=r"is of 5 parameters \(groups of 5\), the model has 6"):
        read_moments(path, Net(), NAMES[1:])
    assert_state(read_moments(path, model, NAMES[1:]), model, optimiser)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "base_model.model."])
def test_names_are_taken_as_keys_with_or_without_a_wrappers_prefix(tmp_path: Path, prefix: str):
    model, optimiser = stepped(torch.optim.AdamW)
    state = {prefix + name: optimiser.state[p] for name, p in model.named_parameters()}
    groups = [{"params": list(state), "betas": (0.9, 0.999), "eps": 1e-8}]
    path = saved(tmp_path, {"state": state, "param_groups": groups})
    assert_state(read_moments(path, Net(), NAMES), model, optimiser)


def test_a_state_inside_a_larger_file_is_found(tmp_path: Path):
    model, optimiser = stepped(torch.optim.AdamW)
    path = saved(tmp_path, {"epoch": 1, "optimizer": optimiser.state_dict()})
    assert_state(read_moments(path, Net(), NAMES), model, optimiser)


def refused(path: Path, words: str, model: nn.Module | None = None) -> None:
    with pytest.raises(InputError, match=words) as error:
        read_moments(path, model or Net(), NAMES)
    assert str(path) in error.value.what
    assert error.value.fix


def test_an_optimiser_without_moments_is_refused(tmp_path: Path):
    _, plain = stepped(lambda p: torch.optim.SGD(p, lr=0.1))
    refused(saved(tmp_path, plain.state_dict()), "made no step, or keeps none")
    _, momentum = stepped(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    refused(saved(tmp_path, momentum.state_dict()), "it has momentum_buffer, no exp_avg")
    bits = {"state": {0: {"state1": torch.ones(3), "state2": torch.ones(3)}}, "param_groups": []}
    refused(saved(tmp_path, bits), "8-bit")


def test_moments_of_another_shape_or_order_are_refused(tmp_path: Path):
    _, optimiser = stepped(torch.optim.AdamW)
    state = optimiser.state_dict()
    state["state"][0]["exp_avg_sq"] = torch.ones(24)
    refused(saved(tmp_path, state), "moments of shape 24, which no parameter of the model has")
    _, other = stepped(torch.optim.AdamW, groups=norms_decay)
    refused(saved(tmp_path, other.state_dict()), "an order that is neither a Trainer's nor")
    named = {"state": {"first.weight": {"exp_avg_sq": torch.ones(6, 5), "step": 1}}}
    refused(saved(tmp_path, named), "the moments of first.weight are 6 x 5, the parameter is 6 x 4")
    named = {"state": {"body.weight": {"exp_avg_sq": torch.ones(6, 5), "step": 1}}}
    refused(saved(tmp_path, named), "moments of body.weight, the model has none of these")


def test_a_number_that_may_be_either_of_two_parameters_is_refused(tmp_path: Path):
    """A norm that decayed in one version of the Trainer and not in another, beside its twin."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale_norm = nn.Linear(4, 4, bias=False)  # a norm by its name only
            self.gain = nn.Parameter(torch.ones(4, 4))
            self.body = Named()

    class Named(nn.Module):
        """A norm by the name of its class only."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    Named.__name__ = "SomeNorm"
    model = Odd()
    state = {n: {"exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.ones(4, 4), "step": 1}
             for n in range(3)}  # fmt: skip
    path = saved(tmp_path, {"state": state, "param_groups": [{"params": [0, 1]}, {"params": [2]}]})
    with pytest.raises(InputError, match="does not say which parameter its number 1 is"):
        read_moments(path, model, ["body.weight"])


def test_parameters_that_never_moved_are_refused_by_name(tmp_path: Path):
    _, optimiser = stepped(torch.optim.AdamW)
    state = optimiser.state_dict()
    lacking = {**state, "state": {key: state["state"][key] for key in range(5)}}
    refused(saved(tmp_path, lacking), "no moments of last.bias: it was frozen, or no batch")
    state["state"][4]["exp_avg_sq"].zero_()
    refused(saved(tmp_path, state), "the moments of last.weight are all 0")


def test_a_file_that_runs_code_is_refused(tmp_path: Path):
    class Own:
        pass

    globals()["Own"] = Own
    Own.__qualname__ = "Own"
    refused(saved(tmp_path, {"state": {0: Own()}}), "holds Python objects, which could run code")


def test_files_that_are_damaged_or_something_else_are_refused(tmp_path: Path):
    _, optimiser = stepped(torch.optim.AdamW)
    path = saved(tmp_path, optimiser.state_dict())
    path.write_bytes(path.read_bytes()[:-300])
    refused(path, "is damaged")
    refused(saved(tmp_path, [1, 2]), "is no state of an optimiser")
    refused(saved(tmp_path, {"weights": torch.ones(2)}), "is no state of an optimiser")
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "moments.safetensors"
    own.write_bytes(b"nothing")
    refused(own, "no checkpoint.json beside it")
    (tmp_path / "own" / "checkpoint.json").write_text('{"step": 2}')
    refused(own, "is damaged")


def test_a_folder_says_what_it_lacks(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"neither moments\.safetensors nor optimizer\.pt"
    ) as error:
        moments_file(tmp_path)
    assert "save_moments" in error.value.fix
    for rank in range(2):
        (tmp_path / f"optimizer_{rank}.pt").write_bytes(b"")
    (tmp_path / "rng_state.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"more than one state .*optimizer_0\.pt, optimizer_1"):
        moments_file(tmp_path)
    (tmp_path / "x" / "global_step100").mkdir(parents=True)
    with pytest.raises(InputError, match="in shards"):
        moments_file(tmp_path / "x")
