"""Other tools at the same work as the gradient index and EK-FAC, where they are installed.

They are no dependency of the project: `pip install bergson dattri kronfluence` brings them, in an
environment of its own. Each function gives what runs the tool once, or None and says so.
"""

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from gradient_ways import language_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Work = Callable[[], object]


def is_there(name: str) -> bool:
    """Whether a tool is installed; says so where it is not."""
    if importlib.util.find_spec(name) is not None:
        return True
    print(f"{name} is not installed: left out")
    return False


@contextlib.contextmanager
def quiet() -> Any:
    """Bars, reports and warnings of the tools are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def bergson_build(name: str, ids: Tensor, rows: int, folder: Path, *, dim: int) -> Work | None:
    """Bergson's index of the body of a model, float32, on disk.

    Args:
        name: of the model.
        ids: (N, T) tokens.
        rows: of a batch.
        folder: for what it writes.
        dim: p.
    """
    if not is_there("bergson"):
        return None
    with quiet():
        bergson = import_module("bergson")
        config = import_module("bergson.config.config")
        count, length = ids.shape
        data = import_module("datasets").Dataset.from_dict(
            {"input_ids": ids.tolist(), "length": [length] * count}
        )
    model = language_model(name)
    model.requires_grad_(False)  # as its own loader does
    model.get_input_embeddings().requires_grad_(True)
    batches = [list(range(at, min(at + rows, count))) for at in range(0, count, rows)]

    def work() -> None:
        place = folder / "bergson"
        shutil.rmtree(f"{place}.part", ignore_errors=True)
        settings = config.IndexConfig(run_path=str(place), projection_dim=dim,
                               token_batch_size=rows * length)  # fmt: skip
        settings.partial_run_path.mkdir(parents=True, exist_ok=True)
        with quiet():
            bergson.collect_gradients(
                model,
                data,
                bergson.GradientProcessor(projection_dim=dim),
                settings,
                batches=batches,
            )

    return work


def dattri_build(name: str, ids: Tensor, rows: int, *, dim: int) -> Work | None:
    """dattri's LoGra of the body of a model, float32, in memory.

    Args:
        name: of the model.
        ids: (N, T) tokens.
        rows: of a batch.
        dim: p; numbers of a layer are its square.
    """
    if not is_there("dattri"):
        return None
    with quiet():
        attributor = import_module("dattri.algorithm.logra").LoGraAttributor
        attribution = import_module("dattri.task").AttributionTask

    model = _Logits(language_model(name))

    def loss(one: nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
        return _loss(one(batch["input_ids"]), batch["input_ids"])

    task = attribution(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    loader: Any = DataLoader(_Examples(ids), batch_size=rows)

    def work() -> None:
        with quiet():
            made = attributor(
                task=task, layer_names=body_layers(model), hessian="Identity", device="cpu",
                proj_dim=dim * dim,
            )  # fmt: skip
            made.cache(loader)

    return work


def kronfluence_self_scores(name: str, ids: Tensor, rows: int, folder: Path) -> Work | None:
    """kronfluence's EK-FAC self-influence of the body of a model, which is fitted here.

    Args:
        name: of the model.
        ids: (N, T) tokens.
        rows: of a batch.
        folder: for what it writes.
    """
    if not is_there("kronfluence"):
        return None
    with quiet():
        analyzers = import_module("kronfluence.analyzer")
        arguments = import_module("kronfluence.arguments")
        base: Any = import_module("kronfluence.task").Task

    model = _Logits(language_model(name))
    tracked = body_layers(model)

    class Language(base):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return _loss(model(batch["input_ids"]), batch["input_ids"])
            logits = model(batch["input_ids"])[:, :-1].flatten(0, 1)
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
            return nn.functional.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

    task = Language()
    data = _Examples(ids)
    with quiet():
        analyzer = analyzers.Analyzer(
            analysis_name="peer", model=analyzers.prepare_model(model, task), task=task, cpu=True,
            output_dir=str(folder / "kronfluence"), disable_tqdm=True, disable_model_save=True,
        )  # fmt: skip
        analyzer.fit_all_factors(
            factors_name="all", dataset=data, per_device_batch_size=rows,
            factor_args=arguments.FactorArguments(strategy="ekfac"), overwrite_output_dir=True,
        )  # fmt: skip

    def work() -> None:
        with quiet():
            analyzer.compute_self_scores(
                scores_name="self", factors_name="all", train_dataset=data,
                per_device_train_batch_size=rows, overwrite_output_dir=True,
                score_args=arguments.ScoreArguments(damping_factor=None),
            )  # fmt: skip

    return work


def body_layers(model: nn.Module) -> list[str]:
    """Names of the Linear layers, but for the head."""
    heads = ("lm_head", "embed_out")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(heads)
    ]


class _Logits(nn.Module):
    """A language model that gives its logits and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, use_cache=False).logits


class _Examples(Dataset[dict[str, Tensor]]):
    """A row of tokens each."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[place]}


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over all positions."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
