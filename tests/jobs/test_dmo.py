"""DMO from beginning to end: 4 m + 1 proxies, the check, and results from a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curate.data.files import read_json
from jobs.cluster import InlineExecutor, Pool
from jobs.mix import mix_run, plan_mix
from mixers.mixture_results import read_amounts
from tests.jobs.test_regmix import LETTERS, settings_of

INLINE = Pool(InlineExecutor(), 1)


def test_every_domain_is_varied_and_the_mixture_is_checked(tmp_path: Path):
    regmix = settings_of(tmp_path)
    settings = replace(regmix, mix={"mixer": "dmo", "proxy": regmix.mix["proxy"] | {"steps": 24}})
    summary = mix_run(settings, pool=INLINE)
    runs = read_amounts(tmp_path / "run" / "mixtures" / "dmo" / "runs.parquet")
    assert runs.domains == tuple(LETTERS)
    assert len(runs.names) == 4 * 3 + 1
    equal = runs.tokens[runs.names.index("equal")]
    np.testing.assert_allclose(equal / equal.sum(), 1 / 3, atol=0.03)
    for at in range(3):
        for times, factor in (("third", 1 / 3), ("half", 1 / 2), ("double", 2), ("triple", 3)):
            row = runs.tokens[runs.names.index(f"domain-{at:03d}-{times}")] / equal
            assert row[at] == pytest.approx(factor, rel=0.2)
            np.testing.assert_allclose(np.delete(row, at), 1, rtol=0.2)
    facts = read_json(tmp_path / "run" / "mixtures" / "dmo" / "fits.json")
    assert set(facts["laws"]) == set(LETTERS)
    # Runs with more of a domain are longer too, and its loss falls.
    for at in range(3):
        less, more = (runs.names.index(f"domain-{at:03d}-{t}") for t in ("third", "triple"))
        assert runs.losses[more, at] < runs.losses[less, at]
    assert set(facts["measured"]) == {"mixture", "natural", "uniform", "foretold"}
    assert sum(entry["weight"] for entry in summary["domains"]) == pytest.approx(1)
    assert any("proxies of the first one's length" in note for note in summary["notes"])
    assert plan_mix(settings).done == plan_mix(settings).total

    given = tmp_path / "run" / "mixtures" / "dmo" / "runs.parquet"
    copy = given.rename(tmp_path / "given.parquet")
    again = mix_run(replace(settings, mix={"mixer": "dmo", "results": str(copy)}), pool=INLINE)
    assert [entry["weight"] for entry in again["domains"]] == pytest.approx(
        [entry["weight"] for entry in summary["domains"]], abs=1e-6
    )
