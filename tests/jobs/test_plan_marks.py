"""The mark of a plan's table says what the table holds, so that nobody has to read it for that."""

from collections import Counter
from pathlib import Path

import polars as pl

from curate.data.choice import read_choice
from curate.data.layout import RunFolder
from jobs.mix import mix_run
from jobs.plan import plan_run
from tests.jobs.scored_run import POOL, scored_run


def test_marks_say_how_often_examples_of_each_domain_are_written(tmp_path: Path):
    """Domains that a mixture repeats, beside one that it thins out."""
    settings = scored_run(
        tmp_path,
        mix={"mixer": "unimax", "max_epochs": 4},
        plan={"score": "el2n", "keep": {"tokens": 3500}, "max_repeats": 4},
    )
    mix_run(settings, pool=POOL)
    plan_run(settings, pool=POOL)
    run = RunFolder(Path(settings.run))
    most = 0
    for part in run.partitions():
        mark = run.planned(part).mark()
        assert mark is not None
        choice = read_choice(run, part, tokenizer=None)
        said = {(phase, domain): numbers for phase, domain, numbers in mark["repeats"]}
        assert said == {(c.phase, c.domain): n for c, n in choice.repeats().items()}
        # Counted by hand, from the tables themselves.
        plan = pl.read_parquet(run.planned(part).path)
        domains = pl.read_parquet(run.root / "examples" / f"{part.name}.parquet")["domain"]
        by_hand = Counter(zip(domains.cast(pl.String), plan["copies"], strict=True))
        for (_, domain), numbers in said.items():
            assert numbers[-1] > 0
            assert all(by_hand[domain, n] == count for n, count in enumerate(numbers, 1))
        written = sum(n * count for (_, n), count in by_hand.items())
        assert written == mark["copies"] == sum(
            n * count for numbers in said.values() for n, count in enumerate(numbers, 1)
        )  # fmt: skip
        most = max([most, *map(len, said.values())])
    assert most >= 3
