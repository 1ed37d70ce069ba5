"""Proxy runs that are fitted together: what each has read and lost, and those that diverged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.data.files import remove_folder
from curate.errors import DivergedError, InputError, counted
from jobs.proxy_work import result_output, train_proxy
from mixers.laws import Floats


def train_run(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one proxy; that it diverged is a result too.

    Raises:
        ConfigError: the sequences are longer than the model reads.
        OutputError: the disk refuses a write.
    """
    try:
        return train_proxy(payload)
    except DivergedError as error:
        folder = Path(payload["folder"])
        text = json.dumps({"schema_version": 1, "diverged": error.what}) + "\n"
        result_output(folder).write(
            lambda path: path.write_text(text, encoding="utf-8"), str(payload["fingerprint"])
        )
        remove_folder(folder / "resume")
        return {"diverged": 1}


@dataclass(frozen=True, slots=True)
class Results:
    """Of the runs that came to their end; n runs, m domains, q losses."""

    names: tuple[str, ...]
    """(n,)"""
    domains: tuple[str, ...]
    """(m,)"""
    tokens: Floats
    """(n, m) what was really read: batches hold whole sequences."""
    targets: tuple[str, ...]
    """(q,) domains with held-out sequences."""
    losses: Floats
    """(n, q) nats per token of the last step's model."""
    num_parameters: int
    notes: tuple[str, ...]


def read_results(folders: Sequence[Path]) -> Results:
    """What the runs of these folders have come to.

    Raises:
        InputError: all diverged, or there was nothing to measure a loss on.
    """
    results = {folder.name: read_result(folder) for folder in folders}
    diverged = [name for name, result in results.items() if "diverged" in result]
    ended = {name: result for name, result in results.items() if "diverged" not in result}
    if not ended:
        raise InputError(
            f"all proxies diverged; {diverged[0]}: {results[diverged[0]]['diverged']}",
            fix="lower mix.proxy.lr, or raise mix.proxy.warmup",
        )
    first = next(iter(ended.values()))
    domains, targets = sorted(first["num_tokens"]), sorted(first["held_out"])
    if not targets:
        raise InputError(
            "no domain has held-out sequences, so that proxies have no losses",
            fix="raise index.held_out or mix.proxy.held_out",
        )
    tokens = [[run["num_tokens"][name] for name in domains] for run in ended.values()]
    losses = [[run["held_out"][name] for name in targets] for run in ended.values()]
    notes: list[str] = []
    if diverged:
        total = counted(len(results), "proxy", "proxies")
        notes.append(f"{len(diverged)} of {total} diverged, set aside: {', '.join(diverged[:10])}")
    silent = sorted(set(domains) - set(targets))
    if silent:
        notes.append(f"without held-out sequences, so without a loss: {', '.join(silent)}")
    return Results(
        tuple(ended),
        tuple(domains),
        np.array(tokens, dtype=np.float64),
        tuple(targets),
        np.array(losses, dtype=np.float64),
        int(first["num_parameters"]),
        tuple(notes),
    )


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a run."""
    return json.loads(result_output(folder).path.read_text(encoding="utf-8"))


def target_of(folder: Path, targets: Sequence[str], shares: Floats) -> float | None:
    """The weighted sum of a run's losses; None where it diverged."""
    result = read_result(folder)
    if "diverged" in result:
        return None
    return float(np.array([result["held_out"][name] for name in targets]) @ shares)
