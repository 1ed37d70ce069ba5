"""A small whole run on real text for the tests of this folder, and how to look at its bytes."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import polars as pl
import yaml

ROOT = Path(__file__).parents[2]


def write_inputs(folder: Path) -> None:
    """Real Python text as three sources of unequal size: Parquet, JSON lines and plain files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("email", "json"):
        for path in sorted((library / package).glob("*.py"))[:6]:
            lines = path.read_text(encoding="utf-8").split("\n\n")
            records = [{"text": text, "file": path.name} for text in lines if text.strip()]
            if package == "email":
                frame = pl.DataFrame({**pl.DataFrame(records).to_dict(as_series=True)})
                target = folder / "email" / f"{path.stem}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                frame.write_parquet(target, row_group_size=16)
            else:
                target = folder / "json" / f"{path.stem}.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("".join(json.dumps(record) + "\n" for record in records))
    notes = folder / "notes"
    notes.mkdir(parents=True)
    for name in ("this.py", "keyword.py", "bisect.py"):
        (notes / name).write_bytes((library / name).read_bytes())


def settings(folder: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Settings of the small run; a change replaces a whole top-level key."""
    return {
        "run": str(run),
        "seed": 3,
        "sources": {
            "email": {"path": str(folder / "email"), "text": "text"},
            "json": {"path": str(folder / "json"), "text": "text"},
            "notes": {"path": str(folder / "notes"), "format": "text", "passage_chars": 500},
        },
        "task": {"kind": "causal-lm", "max_tokens": 64},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 512},
        },
        "checkpoints": {
            "train": {
                "seeds": [0, 1],
                "lr": 3e-3,
                "batch_tokens": 1024,
                "save_every_epochs": 0.5,
                "resume_every_seconds": 0.05,
            }
        },
        "index": {"partition_rows": 40},
        "score": {"scorers": ["el2n", "loss", "length", "random"], "batch_tokens": 1024},
        "mix": {"mixer": "cooldown"},
        "plan": {"score": "el2n", "keep": {"token_share": 0.5}, "draw": "sample"},
        "shards": {"size_mb": 0.02},
        **changes,
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """`values` as YAML at `path`."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def command(*arguments: str | Path) -> list[str]:
    """The command line as a user types it, in this environment's Python."""
    return [sys.executable, "-m", "curate", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread and no network, whatever the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def curate(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stderr}\n{done.stdout}")
    return done


def visible_files(folder: Path) -> list[Path]:
    """Files below `folder` that are not hidden, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def bytes_of(run: Path, *folders: str) -> dict[str, str]:
    """Relative path -> digest of every visible file in the folders of a run."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in visible_files(run / folder)
    }


def finished(run: Path) -> dict[Path, tuple[int, int]]:
    """Every table that has its mark -> (inode, time of writing): both change when it is redone."""
    found: dict[Path, tuple[int, int]] = {}
    for mark in run.rglob(".done/*.json"):
        table = mark.parent.parent / mark.name.removesuffix(".json")
        if table.exists():
            facts = table.stat()
            found[table] = (facts.st_ino, facts.st_mtime_ns)
    return found
