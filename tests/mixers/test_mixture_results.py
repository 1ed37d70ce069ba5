"""Results of runs from files: one, or two that meet by run, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest

from curate.errors import ConfigError, InputError
from mixers.mixture_results import chosen_losses, read_runs, runs_table


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
    return path


def test_one_file_has_shares_and_losses_and_its_runs_may_have_names(tmp_path: Path):
    path = written(tmp_path, "runs.csv", """
        run,news,code,loss.news,loss.code
        a,0.25,0.75,3.5,1.5
        b,1,0,2.5,4
        """)  # fmt: skip
    runs = read_runs([path])
    assert (runs.names, runs.domains, runs.targets) == (
        ("a", "b"), ("news", "code"), ("news", "code"),
    )  # fmt: skip
    np.testing.assert_array_equal(runs.mixtures, [[0.25, 0.75], [1, 0]])
    np.testing.assert_array_equal(runs.losses, [[3.5, 1.5], [2.5, 4]])
    assert runs.notes == ()
    unnamed = written(tmp_path, "b.csv", "news,code,loss.news\n0.5,0.5,2\n0.4,0.6,3")
    assert read_runs([unnamed]).names == ("0", "1")


def test_ratios_and_metrics_of_olmix_meet_by_run(tmp_path: Path):
    ratios = written(tmp_path, "ratios.csv", """
        run,name,index,dclm,wikipedia,arxiv
        r2,second,0,0.6,0.2,0.2
        r1,first,1,0.45,0.30,0.25
        r3,third,2,0.33,0.33,0.33
        """)  # fmt: skip
    metrics = written(tmp_path, "metrics.csv", """
        run_id,name,arc_bpb,hellaswag_bpb
        r1,first,1.23,0.87
        r3,third,1.20,0.89
        r2,second,1.15,0.91
        r9,ninth,1.0,1.0
        """)  # fmt: skip
    runs = read_runs([ratios, metrics])
    assert runs.names == ("r2", "r1", "r3")
    assert runs.domains == ("dclm", "wikipedia", "arxiv")
    assert runs.targets == ("arc_bpb", "hellaswag_bpb")
    np.testing.assert_allclose(runs.mixtures.sum(1), 1, atol=1e-15)
    np.testing.assert_array_equal(runs.losses, [[1.15, 0.91], [1.23, 0.87], [1.20, 0.89]])
    assert runs.notes == (
        "1 mixture of the results scaled to add up to 1",
        "1 run in one of the two result files only, left out",
    )


def test_what_all_columns_of_regmix_begin_and_end_with_is_no_part_of_a_name(tmp_path: Path):
    mixtures = written(tmp_path, "train_mixture_1m.csv", """
        index,train_the_pile_arxiv,train_the_pile_github
        1,0.996,0.0
        2,0.3,0.7
        """)  # fmt: skip
    losses = written(tmp_path, "train_pile_loss_1m.csv", """
        index,metric/the_pile_arxiv_val_loss,metric/the_pile_github_val_loss
        1,7.0255866050720215,6.632823467254639
        2,4.738541603088379,4.141744136810303
        """)  # fmt: skip
    runs = read_runs([mixtures, losses])
    assert runs.domains == runs.targets == ("the_pile_arxiv", "the_pile_github")
    np.testing.assert_array_equal(runs.mixtures, [[1, 0], [0.3, 0.7]])


def test_the_table_of_runs_reads_back(tmp_path: Path):
    path = written(tmp_path, "a.csv", "run,name.x,index.y,loss.z\na,0.25,0.75,1\nb,0.5,0.5,")
    runs = read_runs([path])
    runs_table(runs).write_parquet(tmp_path / "runs.parquet")
    again = read_runs([tmp_path / "runs.parquet"])
    assert again.names == runs.names
    assert again.domains == runs.domains
    np.testing.assert_array_equal(again.mixtures, runs.mixtures)
    np.testing.assert_array_equal(again.losses, runs.losses)


def test_losses_are_chosen_and_runs_without_them_set_aside(tmp_path: Path):
    path = written(tmp_path, "a.csv", """
        run,x,y,loss.a,loss.b,loss.c
        1,0.1,0.9,1,2,
        2,0.2,0.8,,3,1
        3,0.3,0.7,inf,4,1
        4,0.4,0.6,2,5,1
        """)  # fmt: skip
    runs, shares = chosen_losses(read_runs([path]), {"b": 3.0, "a": 1.0, "c": 0.0})
    assert runs.targets == ("a", "b")
    assert runs.names == ("1", "4")
    np.testing.assert_array_equal(shares, [0.25, 0.75])
    np.testing.assert_array_equal(runs.losses, [[1, 2], [2, 5]])
    assert runs.notes == ("2 of 4 runs set aside (2, 3): loss.a is no finite number",)
    everything, equal = chosen_losses(read_runs([path]), {})
    assert everything.targets == ("a", "b", "c")
    np.testing.assert_allclose(equal, 1 / 3)
    assert everything.names == ("4",)
    assert everything.notes == (
        "3 of 4 runs set aside (1, 2, 3):"
        " loss.a (2 of them), loss.c (1 of them) are no finite numbers",
    )


@pytest.mark.parametrize(
    ("target", "message", "fix"),
    [({"nws": 1.0}, "'nws'", "did you mean news"), ({"news": 0.0}, "above 0", "give a loss")],
)
def test_a_target_that_is_no_loss_is_refused(
    tmp_path: Path, target: dict[str, float], message: str, fix: str
):
    path = written(tmp_path, "a.csv", "x,y,loss.news\n0.5,0.5,1")
    with pytest.raises(ConfigError, match=message) as caught:
        chosen_losses(read_runs([path]), target)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,loss.a\n0.5,0.6,1", "the shares of run 0 add up to 1.1"),
        ("x,y,loss.a\n1.5,-0.5,1", "or are below 0"),
        ("x,y,loss.a\n0.5,,1", "row 1: y is None"),
        ("x,y,loss.a\n0.5,0.5,1\n0.5,half,1", "row 2: y is 'half', no number"),
        ("x,y,loss.a\n0.5,0.5,bad", "loss.a is 'bad'"),
        ("x,y\n0.5,0.5", "no column loss.NAME"),
        ("run,loss.a\n1,2", "no column of a domain"),
        ("run,x,y,loss.a\nr,0.5,0.5,1\nr,0.5,0.5,1", "the run r twice"),
        ("x,y,loss.a\n0.5,0.5,1,7,8", "cannot be read"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        read_runs([written(tmp_path, "a.csv", text)])


def test_two_files_that_do_not_meet_say_so(tmp_path: Path):
    one = written(tmp_path, "one.csv", "run,x,y\na,0.5,0.5")
    other = written(tmp_path, "two.csv", "run,l\nb,1")
    unnamed = written(tmp_path, "three.csv", "x,y\n0.5,0.5")
    with pytest.raises(InputError, match="no run of"):
        read_runs([one, other])
    with pytest.raises(InputError, match="no column that names its runs"):
        read_runs([unnamed, other])
    with pytest.raises(InputError, match="there is no file"):
        read_runs([tmp_path / "none.csv"])
    with pytest.raises(ConfigError, match="names 3 files"):
        read_runs([one, other, other])
