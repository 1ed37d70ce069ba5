"""A stream whose mixture changes, in a real Trainer that is stopped and resumed."""

import logging
import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from online_training import collate, examples, language_model, parameters, trainer
from transformers import TrainerCallback, TrainerState

from curate.errors import ConfigError, InputError
from curate.plan.mixture import DomainSize
from mixers.cooldown import Cooldown
from mixers.online import LossReweighting, MixtureCallback, MixtureStream, apply_weights

MIX = {"large": 0.5, "small": 0.5}
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def domains() -> dict[str, list[dict[str, Any]]]:
    rows = examples(40, ragged=False)
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    return {"large": bare[:37], "small": bare[37:]}


def stream(**options: Any) -> MixtureStream:
    given: dict[str, Any] = {"seed": 5, **options}
    return MixtureStream(domains(), MIX, **given)


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


class Seen:
    """A collator that notes what it is given."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def __call__(self, rows: list[Any]) -> Any:
        self.rows += [row["input_ids"] for row in rows]
        return collate(rows)


def run(folder: Path, callback: MixtureCallback, *, stop: int | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {
        "steps": 6,
        "accumulation": 2,
        "batch": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        **options,
    }
    callbacks: list[TrainerCallback] = [callback]
    if stop is not None:
        callbacks.append(Stop(stop))
    model = language_model(attention_dropout=0.2)
    return trainer(folder, model, callback.stream, callbacks=callbacks, **given)


def live(state: TrainerState) -> dict[str, float]:
    """Decided from the step: a mixer that learns would do it from losses."""
    return {"large": 1, "small": state.global_step}


@MANY_WORKERS
@pytest.mark.parametrize(
    ("options", "workers"),
    [({}, 0), ({"live": live, "delay_steps": 4}, 0), ({"live": live, "delay_steps": 4}, 2)],
)
def test_stopped_and_resumed_it_ends_with_the_same_weights_to_the_last_bit(
    tmp_path: Path, options: dict[str, Any], workers: int
):
    schedule = None if options else {0: MIX, 3: {"small": 1}}

    def callback() -> MixtureCallback:
        return MixtureCallback(stream(), schedule, **options)

    whole = run(tmp_path / "whole", callback())
    whole.train()
    killed = run(tmp_path / "killed", callback(), stop=5)
    with pytest.raises(StoppedError):
        killed.train()
    resumed = run(
        tmp_path / "killed",
        callback(),
        ignore_data_skip=True,
        dataloader_num_workers=workers,
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert not torch.equal(parameters(whole.model), parameters(language_model()))


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    made = run(Path(folder), MixtureCallback(stream(), {3: {"small": 1}}))
    made.add_callback(Kill())
    made.train()


@pytest.mark.slow
def test_a_killed_process_is_taken_up_by_another_to_the_last_bit(tmp_path: Path):
    process = get_context("spawn").Process(
        target=_run_and_die, args=(str(tmp_path / "killed"), torch.get_num_threads())
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = run(tmp_path / "whole", MixtureCallback(stream(), {3: {"small": 1}}))
    whole.train()
    callback = MixtureCallback(stream(), {3: {"small": 1}})
    resumed = run(tmp_path / "killed", callback, ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_without_ignore_data_skip_a_known_schedule_is_read_again(tmp_path: Path):
    schedule = {2: {"small": 1.0}}
    whole = run(tmp_path / "whole", MixtureCallback(stream(), schedule))
    whole.train()
    killed = run(tmp_path / "killed", MixtureCallback(stream(), schedule), stop=5)
    with pytest.raises(StoppedError):
        killed.train()
    resumed = run(tmp_path / "killed", MixtureCallback(stream(), schedule))
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_a_known_schedule_is_the_stream_of_a_plain_loop(tmp_path: Path):
    seen = Seen()
    made = run(
        tmp_path, MixtureCallback(stream(), {3: {"small": 1}}), collator=seen, save_strategy="no"
    )
    made.train()
    expected = stream()
    expected.set_probabilities({"small": 1}, from_position=12)
    plain = [row["input_ids"] for row, _ in zip(expected, range(24), strict=False)]
    assert seen.rows[:24] == plain
    small = [row["input_ids"] for row in domains()["small"]]
    assert all(row in small for row in plain[12:])
    assert not all(row in small for row in plain[:12])


def test_what_a_live_mixer_decides_holds_after_the_delay(tmp_path: Path):
    seen = Seen()

    def decide(state: TrainerState) -> dict[str, float] | None:
        return {"small": 1.0} if state.global_step == 2 else None

    callback = MixtureCallback(stream(), live=decide)
    run(tmp_path, callback, collator=seen, save_strategy="no").train()
    before = [row["input_ids"] for row, _ in zip(stream(), range(12), strict=False)]
    assert seen.rows[:12] == before
    # Decided after step 2, drawn from step 3 on (counted from 0): the loader reads a batch ahead.
    small = [row["input_ids"] for row in domains()["small"]]
    assert all(row in small for row in seen.rows[12:])


def test_a_delay_shorter_than_what_workers_have_read_is_refused(tmp_path: Path):
    callback = MixtureCallback(stream(), live=live, delay_steps=0)
    made = run(tmp_path, callback, save_strategy="no", dataloader_num_workers=2)
    with pytest.raises(Exception, match="comes too late"):
        made.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_delay_by_default_is_enough_with_workers(tmp_path: Path, accumulation: int):
    callback = MixtureCallback(stream(), live=live)
    made = run(
        tmp_path,
        callback,
        steps=8,
        accumulation=accumulation,
        save_strategy="no",
        dataloader_num_workers=2,
    )
    made.train()
    assert made.state.global_step == 8


def test_a_cooldown_switches_at_a_step_and_is_logged(tmp_path: Path):
    sizes = {"large": DomainSize(37, 37 * 8), "small": DomainSize(3, 3 * 8)}
    mixture = Cooldown(tau_hot=100, switch=0.5).mixture(sizes, budget_tokens=6 * 4 * 8)
    callback = MixtureCallback(stream(), mixture, sizes=sizes)
    made = run(tmp_path, callback, save_strategy="no")
    made.train()
    told = [entry for entry in made.state.log_history if "mixture/small" in entry]
    shares = [entry["mixture/small"] for entry in told]
    hot = 3**0.01 / (3**0.01 + 37**0.01)
    assert shares == pytest.approx([hot] * 3 + [3 / 40] * 3)
    times = [entry["epochs/small"] for entry in told]
    assert times == sorted(times)
    assert times[2] == pytest.approx(made_epochs(12, hot), abs=1.2)
    logged: list[dict[str, float]] = []
    callback = MixtureCallback(stream(), mixture, sizes=sizes, log=logged.append)
    run(tmp_path, callback, save_strategy="no").train()
    assert [entry["mixture/small"] for entry in logged] == pytest.approx(shares)


def made_epochs(examples: int, share: float) -> float:
    return examples * share / 3


def test_training_again_begins_the_stream_anew(tmp_path: Path):
    first, second = Seen(), Seen()
    callback = MixtureCallback(stream(), {1: {"small": 1}})
    run(tmp_path, callback, collator=first, steps=2, save_strategy="no").train()
    run(tmp_path, callback, collator=second, steps=2, save_strategy="no").train()
    assert first.rows == second.rows


def test_a_stream_and_weights_from_losses_work_together(tmp_path: Path):
    made = run(
        tmp_path,
        MixtureCallback(stream(domain_column="curate_domain")),
        save_strategy="no",
        remove_unused_columns=False,
    )
    apply_weights(made, LossReweighting(uniform_share=0), domains=list(MIX))
    made.train()
    assert {"weights/domain/large", "weights/largest"} <= {
        key for entry in made.state.log_history for key in entry
    }
    assert any("mixture/large" in entry for entry in made.state.log_history)


def test_what_cannot_be_resumed_exactly_is_refused(tmp_path: Path):
    killed = run(tmp_path, MixtureCallback(stream(), live=live), stop=3)
    with pytest.raises(StoppedError):
        killed.train()
    again = run(tmp_path, MixtureCallback(stream(), live=live))
    with pytest.raises(ConfigError, match="was set live") as error:
        again.train(resume_from_checkpoint=True)
    assert "ignore_data_skip=True" in error.value.fix
    larger = run(tmp_path, MixtureCallback(stream()), batch=4)
    with pytest.raises(ConfigError, match="a step had 4 examples"):
        larger.train(resume_from_checkpoint=True)


def test_another_batch_size_goes_on_where_the_stream_stood(tmp_path: Path):
    killed = run(tmp_path, MixtureCallback(stream()), stop=3)
    with pytest.raises(StoppedError):
        killed.train()
    seen = Seen()
    larger = run(tmp_path, MixtureCallback(stream()), batch=4, ignore_data_skip=True, collator=seen)
    larger.train(resume_from_checkpoint=True)
    # Two steps of 4 are behind; four of 8 follow.
    expected = [row["input_ids"] for row, _ in zip(stream(), range(40), strict=False)]
    assert seen.rows[:32] == expected[8:]


def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path: Path):
    plain = trainer(
        tmp_path, language_model(), stream(), steps=2, save_strategy="steps", save_steps=2
    )
    plain.train()
    resumed = run(tmp_path, MixtureCallback(stream()), ignore_data_skip=True)
    with pytest.raises(InputError, match="step 2 holds no state of the stream"):
        resumed.train(resume_from_checkpoint=True)


def test_what_the_trainer_cannot_do_with_a_stream_is_refused(tmp_path: Path):
    other = MixtureCallback(stream())
    made = run(tmp_path, MixtureCallback(stream()), save_strategy="no")
    made.add_callback(other)
    with pytest.raises(ConfigError, match="does not train on the stream"):
        made.train()
    dealt = MixtureCallback(stream(rank=1, num_ranks=2))
    with pytest.raises(ConfigError, match="dealt to 2 ranks"):
        run(tmp_path, dealt, save_strategy="no").train()
    with pytest.raises(ConfigError, match="both set the mixture"):
        MixtureCallback(stream(), {0: MIX}, live=live)


def test_a_new_epoch_of_a_small_domain_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="mixers.stream"):
        run(tmp_path, MixtureCallback(stream()), save_strategy="no").train()
    assert "domain small: all examples seen" in caplog.text
