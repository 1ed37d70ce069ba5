"""The examples of the guide and of the README run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
from online_training import collate, examples, language_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

ROOT = Path(__file__).parents[2]


class Rows(Dataset[Any]):
    """A data set of the user's own."""

    def __init__(self, number: int, seed: int) -> None:
        rows = examples(number, seed=seed)
        names = {"a": "web", "b": "code"}
        self.rows = [{**row, "curate_domain": names[row["curate_domain"]]} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def short(*args: Any, **options: Any) -> TrainingArguments:
    """Four steps of few examples on the CPU, whatever the text says."""
    few = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(*args, **{**options, **few, **quiet, "dataloader_pin_memory": False})


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["docs/online.md", "README.md"])
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "web": Rows(20, 0),
        "code": Rows(5, 1),
        "weighted": Rows(16, 2),
        "target": Rows(6, 3),
        "collator": collate,
        "measured": {"web": 1.0, "code": 2.0},
        "Trainer": Trainer,
    }
    chosen = [block for block in blocks(page) if "mixers" in block]
    assert chosen
    for block in chosen:
        names |= {"model": language_model(), "TrainingArguments": short}
        given = block.replace("from transformers import Trainer, TrainingArguments\n", "")
        exec(compile(given, page, "exec"), names)
        trainer: Any = names.pop("trainer", None)
        if trainer is not None:
            assert trainer.state.global_step == 4
    if page == "docs/online.md":
        assert names["again"].start == 32
