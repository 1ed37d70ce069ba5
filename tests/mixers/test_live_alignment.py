"""A stream that follows a target's gradient, in a real Trainer that is stopped and resumed."""

import gc
import json
import logging
import os
import signal
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # see jobs.proxy_ranks
from online_training import (
    LENGTH,
    VOCABULARY,
    collate,
    language_model,
    parameters,
    token_losses,
    trainer,
)
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import TrainerCallback, TrainerState

from curate.errors import ConfigError, DivergedError, InputError
from mixers import alignment
from mixers.online import (
    DGA,
    LiveAlignment,
    LossReweighting,
    MixtureCallback,
    MixtureStream,
    align_mixture,
    apply_weights,
)

NAMES = ("low", "high", "noise")
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")
EACH_STEP: dict[str, Any] = {"every": 2, "warm_share": 0.0, "sequences": 5, "target_sequences": 7}


def rows(number: int, first: int, last: int, seed: int) -> list[dict[str, Any]]:
    """Sequences of tokens from a range, of unequal length."""
    source = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for row in range(number):
        ids = torch.randint(first, last, (LENGTH,), generator=source).tolist()
        end = LENGTH - row % 3
        found.append({"input_ids": ids, "labels": ids[:end] + [-100] * (LENGTH - end)})
    return found


def domains() -> dict[str, list[dict[str, Any]]]:
    return {
        "low": rows(30, 0, 6, 0),
        "high": rows(20, 12, 18, 1),
        "noise": rows(25, 0, VOCABULARY, 2),
    }


TARGET = rows(11, 0, 6, 3)


def made(
    folder: Path,
    *,
    settings: DGA | None = None,
    target: Any = None,
    data: Any = None,
    delay_steps: int | None = None,
    callbacks: Any = (),
    model: Any = None,
    **options: Any,
) -> tuple[Any, LiveAlignment]:
    stream = MixtureStream(data or domains(), dict.fromkeys(data or NAMES, 1.0), seed=5)
    given: dict[str, Any] = {
        "steps": 8,
        "accumulation": 2,
        "batch": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 3,
        **options,
    }
    built = trainer(
        folder,
        model or language_model(attention_dropout=0.2),
        stream,
        callbacks=list(callbacks),
        **given,
    )
    aligner = align_mixture(
        built,
        TARGET if target is None else target,
        settings or DGA(**EACH_STEP),
        delay_steps=delay_steps,
    )
    return built, aligner


def gradient(model: Any, found: list[Any]) -> Tensor:
    """Of the mean over all tokens, by autograd alone."""
    model.zero_grad()
    torch.cat([token_losses(model, row) for row in found]).mean().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat.double()


class Looking(TrainerCallback):
    """Notes the model after each step, and whether gradients are there."""

    def __init__(self) -> None:
        self.models: dict[int, Tensor] = {}
        self.has_gradients: list[bool] = []

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.models[state.global_step] = parameters(model)
        self.has_gradients.append(any(p.grad is not None for p in model.parameters()))


def test_a_measurement_is_the_cosine_of_the_whole_gradients(tmp_path: Path):
    """With as many sequences as there are, every example is drawn once."""
    data = {name: found[:6] for name, found in domains().items()}
    settings = DGA(every=2, warm_share=0, sequences=6, target_sequences=len(TARGET))
    looking = Looking()
    built, aligner = made(
        tmp_path, settings=settings, data=data, steps=4, callbacks=[looking], model=language_model()
    )
    built.train()
    model = language_model()
    place = 0
    for parameter in model.parameters():
        parameter.data.copy_(
            looking.models[2][place : place + parameter.numel()].view_as(parameter)
        )
        place += parameter.numel()
    wanted = gradient(model, TARGET)
    cosines = []
    for name in NAMES:
        own = gradient(model, data[name])
        cosines.append(float(own @ wanted / own.norm() / wanted.norm()))
    told = [entry for entry in built.state.log_history if "alignment/low" in entry]
    assert [told[-1][f"alignment/{name}"] for name in NAMES] == pytest.approx(cosines, abs=1e-5)
    shares = (torch.tensor(cosines).double() * 0.5).softmax(0)
    assert aligner.schedule()[0][0] == 3
    assert list(aligner.schedule()[0][1].values()) == pytest.approx(shares.tolist(), abs=1e-5)
    assert aligner.weights == pytest.approx(aligner.schedule()[-1][1])


def test_the_model_and_its_examples_are_those_of_a_run_that_only_follows(tmp_path: Path):
    """Its schedule, given to a run that measures nothing: dropout and all come out alike."""
    looking = Looking()
    built, aligner = made(tmp_path, callbacks=[looking])
    built.train()
    assert not any(looking.has_gradients)
    stream = MixtureStream(domains(), dict.fromkeys(NAMES, 1.0), seed=5)
    followed = trainer(
        tmp_path,
        language_model(attention_dropout=0.2),
        stream,
        callbacks=[MixtureCallback(stream, dict(aligner.schedule()))],
        steps=8,
        accumulation=2,
        batch=2,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    followed.train()
    assert len(aligner.schedule()) == 3
    assert torch.equal(parameters(built.model), parameters(followed.model))


def test_the_stream_leans_to_the_domain_of_the_target(tmp_path: Path):
    settings = DGA(every=2, warm_share=0.1, sequences=8, kappa=1.0)
    built, aligner = made(tmp_path, settings=settings, steps=30, save_strategy="no")
    built.train()
    found = aligner.mixture()
    assert found["low"] > 0.5
    assert aligner.weights["low"] > 0.8
    told = [entry["mixture/low"] for entry in built.state.log_history if "mixture/low" in entry]
    assert told[0] == pytest.approx(1 / 3)
    assert told[-1] == pytest.approx(aligner.schedule()[-1][1]["low"])
    assert sum(found.values()) == pytest.approx(1)


class StoppedError(Exception):
    """Stands for a kill."""


class Stop(TrainerCallback):
    """Stops training in the middle of things."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            raise StoppedError


@MANY_WORKERS
@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({}, 0),
        ({"precondition": "adam", "max_epochs": 0.5, "form": "raw"}, 0),
        ({"basis": {"one": {"low": 1, "noise": 1}, "two": {"high": 1}}}, 2),
    ],
)
def test_stopped_and_resumed_it_ends_with_the_same_weights_to_the_last_bit(
    tmp_path: Path, options: dict[str, Any], workers: int
):
    settings = DGA(**EACH_STEP, **options)
    whole, first = made(tmp_path / "whole", settings=settings, steps=12, delay_steps=3)
    whole.train()
    killed, _ = made(
        tmp_path / "killed", settings=settings, steps=12, delay_steps=3, callbacks=[Stop(7)]
    )
    with pytest.raises(StoppedError):
        killed.train()
    resumed, again = made(
        tmp_path / "killed",
        settings=settings,
        steps=12,
        delay_steps=3,
        ignore_data_skip=True,
        dataloader_num_workers=workers,
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert again.schedule() == first.schedule()
    assert [step for step, _ in first.schedule()] == [5, 7, 9, 11]


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    built, _ = made(Path(folder))
    built.add_callback(Kill())
    built.train()


@pytest.mark.slow
def test_a_killed_process_is_taken_up_by_another_to_the_last_bit(tmp_path: Path):
    process = get_context("spawn").Process(
        target=_run_and_die, args=(str(tmp_path / "killed"), torch.get_num_threads())
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole, first = made(tmp_path / "whole")
    whole.train()
    resumed, again = made(tmp_path / "killed", ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert again.schedule() == first.schedule()


WAYS: dict[str, dict[str, Any]] = {
    "dispatched": {},
    "sharded": {"accelerator_config": {"dispatch_batches": False}},
}


def _ranked(folder: Path, way: str, *, batch: int) -> tuple[list[float], list[Any]]:
    built, aligner = made(
        folder, batch=batch, model=language_model(), save_strategy="no", steps=6, **WAYS[way]
    )
    built.train()
    return parameters(built.model).tolist(), aligner.schedule()


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found = {way: _ranked(Path(folder), way, batch=2) for way in WAYS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path: Path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    spawn(_rank, args=(str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for way in WAYS:
        alone, schedule = _ranked(tmp_path / "alone", way, batch=4)
        assert first[way] == second[way]
        assert first[way][0] == pytest.approx(alone, rel=1e-3, abs=1e-4), way
        assert [step for step, _ in first[way][1]] == [step for step, _ in schedule] == [3, 5]
        for (_, ours), (_, wanted) in zip(first[way][1], schedule, strict=True):
            assert ours == pytest.approx(wanted, rel=1e-4)
            assert len({round(value, 4) for value in ours.values()}) == 3


@MANY_WORKERS
def test_what_workers_have_read_ahead_is_the_lag_that_is_logged(tmp_path: Path):
    built, aligner = made(tmp_path, save_strategy="no", dataloader_num_workers=2, steps=14)
    built.train()
    told = [entry for entry in built.state.log_history if "alignment/lag_steps" in entry]
    assert {entry["alignment/lag_steps"] for entry in told} == {4.0}
    # Measured after steps 2, 4, ..., 8; what would begin after the end is not measured.
    assert [step for step, _ in aligner.schedule()] == [6, 8, 10, 12]


def test_gradients_are_held_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    most, model = 0, language_model()
    sizes = {tuple(p.shape) for p in model.parameters()}
    name = "_gradients"
    inner = getattr(alignment, name)

    def watched(*given: Any) -> Any:
        nonlocal most
        found = inner(*given)
        held = [
            each
            for each in gc.get_objects()
            if type(each) is Tensor and tuple(each.shape) in sizes and not each.requires_grad
        ]
        most = max(most, sum(each.numel() for each in held if each.dtype == torch.float32))
        return found

    monkeypatch.setattr(alignment, name, watched)
    data = {f"d{n}": rows(9, n, n + 5, n) for n in range(8)}
    built, _ = made(tmp_path, model=model, steps=4, save_strategy="no", optim="sgd", data=data)
    built.train()
    size = sum(p.numel() for p in model.parameters())
    assert 2 * size <= most <= 2.2 * size


def test_the_weights_of_the_losses_can_be_followed_at_once(tmp_path: Path):
    built, aligner = made(tmp_path, save_strategy="no", remove_unused_columns=False)
    apply_weights(built, LossReweighting(uniform_share=0))
    built.train()
    assert len(aligner.schedule()) == 3


def test_domains_are_capped_by_their_epochs(tmp_path: Path):
    data = domains()
    data["low"] = data["low"][:4]
    settings = DGA(every=1, warm_share=0, sequences=4, kappa=3.0, max_epochs=3)
    built, _ = made(
        tmp_path, settings=settings, data=data, steps=20, save_strategy="no", accumulation=1
    )
    built.train()
    told = [entry["epochs/low"] for entry in built.state.log_history if "epochs/low" in entry]
    assert told[-1] <= 3.5
    free, _ = made(
        tmp_path,
        settings=DGA(every=1, warm_share=0, sequences=4, kappa=3.0),
        data=data,
        steps=20,
        save_strategy="no",
        accumulation=1,
    )
    free.train()
    often = [entry["epochs/low"] for entry in free.state.log_history if "epochs/low" in entry]
    assert often[-1] > 5


def test_what_is_in_the_target_too_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = domains()
    shared = [*TARGET[:3], *data["high"]]
    with caplog.at_level(logging.WARNING):
        built, aligner = made(
            tmp_path,
            data={"low": TARGET, "high": shared},
            steps=4,
            save_strategy="no",
            settings=DGA(every=1, warm_share=0, sequences=23),
        )
        built.train()
    assert caplog.text.count("examples of low are in the target too") == 1
    assert caplog.text.count("examples of high are in the target too") == 1
    # Nothing of the first is left to measure: it keeps its weight.
    assert aligner.weights["low"] == pytest.approx(0.5)
    entry = next(each for each in built.state.log_history if "alignment/high" in each)
    assert "alignment/low" not in entry


def test_training_again_begins_anew(tmp_path: Path):
    built, aligner = made(tmp_path, save_strategy="no", model=language_model())
    built.train()
    first = aligner.schedule()
    built.model.load_state_dict(language_model().state_dict())
    built.optimizer = built.lr_scheduler = None
    built.train()
    assert aligner.schedule() == first


def test_a_start_of_the_settings_replaces_the_streams(tmp_path: Path):
    settings = DGA(every=100, start={"high": 1.0}, start_uniform=0.3)
    built, aligner = made(tmp_path, settings=settings, save_strategy="no", steps=2)
    built.train()
    told = [entry["mixture/high"] for entry in built.state.log_history if "mixture/high" in entry]
    assert told[0] == pytest.approx(0.8)
    assert aligner.mixture()["low"] == pytest.approx(0.1)


def test_what_cannot_work_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="the target has no examples"):
        made(tmp_path, target=[])
    plain = trainer(tmp_path, language_model(), rows(4, 0, 5, 0))
    with pytest.raises(ConfigError, match="no MixtureStream"):
        align_mixture(plain, TARGET)
    built, _ = made(tmp_path)
    with pytest.raises(ConfigError, match="a MixtureCallback already"):
        align_mixture(built, TARGET)
    adam, _ = made(
        tmp_path,
        settings=DGA(**EACH_STEP, precondition="adam"),
        optim="sgd",
        save_strategy="no",
    )
    with pytest.raises(ConfigError, match="no mean squares"):
        adam.train()
    killed, _ = made(tmp_path / "killed", callbacks=[Stop(4)])
    with pytest.raises(StoppedError):
        killed.train()
    replayed, _ = made(tmp_path / "killed")
    with pytest.raises(ConfigError, match="was set live"):
        replayed.train(resume_from_checkpoint=True)
    other, _ = made(
        tmp_path / "killed",
        settings=DGA(**EACH_STEP, basis={"all": {"low": 1.0}}),
        ignore_data_skip=True,
    )
    with pytest.raises(InputError, match="weights are of low, high, noise"):
        other.train(resume_from_checkpoint=True)


def test_a_gradient_that_is_no_number_stops_training(tmp_path: Path):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(kwargs["model"].parameters()).data.fill_(torch.nan)

    built, _ = made(tmp_path, save_strategy="no", callbacks=[Break()])
    with pytest.raises(DivergedError, match="is not finite"):
        built.train()


def test_labels_are_needed(tmp_path: Path):
    def without(found: list[Any]) -> Any:
        batch = collate(found)
        if found[0] in TARGET:
            del batch["labels"]
        return batch

    built, _ = made(tmp_path, save_strategy="no", collator=without)
    with pytest.raises(ConfigError, match="without labels"):
        built.train()
