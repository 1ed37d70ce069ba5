"""Which labels EK-FAC draws for its two passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate.compared_digits import digits_settings, write_digits

from curate.models.kfac_pass import KFACPass
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.score import score_run


def test_eigenvalues_are_measured_with_other_labels_than_their_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Axes that were fitted to the labels would make the largest eigenvalues too large."""
    seen: dict[str, list[np.ndarray]] = {"factors": [], "eigenvalues": []}
    for name, place in (("factors", 2), ("eigenvalues", 3)):
        plain: Any = getattr(KFACPass, name)

        def noted(
            *given: Any, name: str = name, place: int = place, plain: Any = plain, **more: Any
        ):
            seen[name].append(given[1 + place])
            return plain(*given, **more)

        monkeypatch.setattr(KFACPass, name, noted)
    settings = digits_settings(
        tmp_path / "run", write_digits(tmp_path, rows=60)[0],
        checkpoints={"train": {"epochs": 2, "lr": 1e-2, "batch_tokens": 16}},
        score={"scorers": [{"self_influence": {"metric": "ekfac", "fit_tasks": 1}}]},
    )  # fmt: skip
    with open_pool(Cluster()) as pool:
        run_stages(settings, stages_for(settings, "index"), pool=pool)
        run_stages(settings, stages_for(settings, "train"), pool=pool)
        score_run(settings, pool=pool)
    assert len(seen["factors"]) == len(seen["eigenvalues"]) > 0
    for one, other in zip(seen["factors"], seen["eigenvalues"], strict=True):
        assert one.shape == other.shape
        assert (one != other).all()
