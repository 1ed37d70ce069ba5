"""`curate show` and the page name the class of an example, and the one that looks likelier."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.cli import main
from curate.cli.showing import shown_lines
from curate.config import to_yaml
from jobs.report import gather
from jobs.show import View, shown

NAMES = ["arrival", "linking", "rate"]
WRONG = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose words tell their class; that of row 7 is given wrong, row 8 has none."""
    root = tmp_path_factory.mktemp("labels")
    random = np.random.default_rng(0)
    own = [row % 3 for row in range(120)]
    texts = [" ".join(f"{NAMES[c]}{n}" for n in random.integers(0, 4, 6)) for c in own]
    label = [NAMES[c] for c in own]
    label[WRONG] = NAMES[(own[WRONG] + 1) % 3]
    frame = pl.DataFrame({"text": texts, "label": [*label[:8], None, *label[9:]]})
    frame.write_parquet(root / "texts.parquet")
    config = root / "run.yaml"
    config.write_text(
        to_yaml(
            {
                "run": str(root / "run"),
                "sources": {
                    "web": {"path": str(root / "texts.parquet"), "text": "text", "label": "label",
                            "classes": NAMES}
                },
                "index": {"held_out": 0.0},
                "score": {"scorers": ["label_issues"]},
                "plan": {"score": "label_issues.self_confidence", "keep": 0.5},
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    assert main(["plan", str(config), "--quiet"]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def view(run: Path) -> View:
    return shown(run, examples=59)


def test_every_example_has_the_name_of_its_class(view: View):
    for one in [*view.lowest, *view.highest]:
        true = NAMES[one.row % 3]
        if one.row == WRONG:
            assert (one.label, one.likely_label) == (NAMES[(one.row + 1) % 3], true)
        elif one.row == 8:
            assert (one.label, one.likely_label) == (None, None)
        else:
            assert (one.label, one.likely_label) == (true, None)
    assert view.lowest[0].row == WRONG


def test_the_label_stands_before_the_text_or_below_a_narrow_line(view: View):
    given, likely = NAMES[(WRONG + 1) % 3], NAMES[WRONG % 3]
    said = f"label {given}, likely {likely}"
    lines = list(shown_lines(view))
    (line,) = [line for line in lines if f"texts.parquet:{WRONG} " in line]
    assert f" {said}: {view.lowest[0].text[:20]}" in line
    narrow = list(shown_lines(view, width=80))
    (at,) = [at for at, line in enumerate(narrow) if said in line]
    assert f":{WRONG} " in narrow[at - 1]
    assert narrow[at].strip() == said
    assert all(len(line) <= 80 for line in narrow[: at + 1] if "note" not in line)
    assert sum("rows count from 0" in line for line in lines) == 1


def test_the_page_has_the_likely_class_beside_the_given_one(run: Path):
    samples = gather(run, examples=3).samples
    assert samples is not None
    (one,) = [one for one in samples.examples if one.row == WRONG]
    assert (one.label, one.likely_label) == (NAMES[(WRONG + 1) % 3], NAMES[WRONG % 3])
