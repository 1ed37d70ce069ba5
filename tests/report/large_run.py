"""A run folder of very many examples, made by the commands themselves; also a program:

python tests/report/large_run.py FOLDER [ROWS]
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import yaml

_FILES = 4
_DOMAINS = ("books", "code", "forums", "law", "mail", "news", "papers", "web")
_WORDS = ("river", "stone", "<b>light</b>", "market", "engine", "garden", "window", "letter",
          "mountain", "bridge", "été", "数据", "harbour", "signal", "thread", "copper")  # fmt: skip


def write_inputs(folder: Path, rows: int) -> None:
    """Texts of 8 domains and 12 labels in four files, and a table of scores from elsewhere.

    Every fiftieth text repeats an earlier one; of every hundredth row the score is missing.
    """
    (folder / "data").mkdir(parents=True)
    random = np.random.default_rng(0)
    scores: list[pl.DataFrame] = []
    for number in range(_FILES):
        count = rows // _FILES + (number < rows % _FILES)
        words = random.integers(0, len(_WORDS), (count, 12))
        frame = pl.DataFrame(
            {f"w{at}": np.array(_WORDS)[words[:, at]] for at in range(words.shape[1])}
        )
        text = frame.select(pl.concat_str(pl.all(), separator=" ").alias("text"))["text"]
        times = pl.Series(1 + random.poisson(3, count))
        numbers = pl.Series(np.arange(count) - (np.arange(count) % 50 == 49))
        text = pl.select(
            text.gather(numbers) + pl.lit(" ") + numbers.cast(pl.String) + pl.lit(" and so on")
        ).to_series()
        text = pl.select(text.repeat_by(times).list.join(". ")).to_series()
        if number == 0:
            text[0] = "<script>alert('from the data')</script>"
        domain = random.choice(len(_DOMAINS), count, p=_shares())
        frame = pl.DataFrame(
            {
                "text": text.gather(numbers),
                "domain": np.array(_DOMAINS)[domain],
                "label": (domain + random.integers(0, 5, count)) % 12,
            }
        )
        name = f"part-{number}.parquet"
        frame.write_parquet(folder / "data" / name, row_group_size=10_000)
        quality = random.normal(domain / 4, 1.0, count).astype(np.float32)
        quality[np.arange(count) % 100 == 7] = np.nan
        scores.append(pl.DataFrame({"file": name, "row": np.arange(count), "quality": quality,
                                    "effort": np.exp(quality)}))  # fmt: skip
    pl.concat(scores).fill_nan(None).write_parquet(folder / "quality.parquet")


def _shares() -> list[float]:
    weights = np.arange(1, len(_DOMAINS) + 1, dtype=float)
    return (weights / weights.sum()).tolist()


def make_run(folder: Path, rows: int) -> Path:
    """Inputs and the run; gives the run folder."""
    write_inputs(folder, rows)
    settings = {
        "run": str(folder / "run"),
        "sources": {"pool": {"path": str(folder / "data"), "text": "text", "domain": "domain",
                             "label": "label"}},
        "score": {"scorers": ["length", "random", "duplicates",
                              {"external": {"quality": str(folder / "quality.parquet")}}]},
        "mix": {"mixer": "unimax"},
        "plan": {"score": "quality.quality", "keep": 0.4, "drop": "duplicate_keep == 0",
                 "weights": {"score": "effort", "clip": [0.2, 5.0]}},
    }  # fmt: skip
    config = folder / "large.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "curate", "plan", str(config)], check=True)
    return folder / "run"


if __name__ == "__main__":
    print(make_run(Path(sys.argv[1]), int(float(sys.argv[2])) if sys.argv[2:] else 1_000_000))
