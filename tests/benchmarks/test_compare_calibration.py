"""How often the verdict of `curate compare` is wrong, and whether it finds what it says it finds.

Prints the tables of docs/compare.md. About six minutes on one core.
"""

import numpy as np
import pytest
from evaluate.ridge_digits import Study

_CASES = 1000

pytestmark = pytest.mark.timeout(3600)


@pytest.mark.parametrize("noise", [False, True], ids=["no-noise", "noise"])
def test_false_verdicts_and_power(noise: bool):
    print(
        "\n| noise of training | seeds | plan | false verdicts | by the plain paired test"
        " | found at the stated difference | stated difference (median) |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for num_seeds in (3, 4, 5, 10):
        for fixed in (True, False):
            study = Study(seed=num_seeds, num_seeds=num_seeds, noise=noise)
            null = study.null_cases(_CASES, fixed=fixed)
            found = study.power_cases(_CASES, null=null, fixed=fixed).share("helps")
            print(
                f"| {'yes' if noise else 'no'} | {num_seeds}"
                f" | {'one draw for all seeds' if fixed else 'drawn anew with each seed'}"
                f" | {null.false_verdicts:.1%} | {null.false_without_luck:.1%} | {found:.1%}"
                f" | {np.median(null.stated):.3f} |"
            )
            assert null.false_verdicts <= 0.05
            assert found >= 0.80


def test_a_real_effect_is_found_by_the_runs_that_said_they_could():
    """Wrong labels in the pool; the plan keeps right ones. Nothing is shifted by hand."""
    print(
        "\n| labels wrong | true difference | stated (median) | helps | hurts"
        " | helps, of the runs that stated less than the truth |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for flipped in (0.1, 0.2, 0.3, 0.4):
        cases = Study(seed=9, num_seeds=5).noisy_labels(_CASES, flipped=flipped)
        truth = float(np.mean(cases.differences))
        able = np.asarray(cases.stated) <= truth
        found = float((np.asarray(cases.words)[able] == "helps").mean())
        print(
            f"| {flipped:.0%} | {truth:.3f} | {np.median(cases.stated):.3f}"
            f" | {cases.share('helps'):.1%} | {cases.share('hurts'):.1%}"
            f" | {found:.1%} of {able.sum()} |"
        )
        assert cases.share("hurts") <= 0.001
        assert able.sum() < 50 or found >= 0.80
