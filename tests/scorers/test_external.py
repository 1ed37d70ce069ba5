from pathlib import Path

import polars as pl
import pytest

from curate.errors import ConfigError, InputError
from scorers.external import External, tables

EXAMPLES = pl.DataFrame(
    {
        "source": ["web"] * 4,
        "file": ["a.jsonl"] * 4,
        "row": [3, 4, 6, 7],
        "id": ["007", "x", None, "7"],
    }
)


def write(folder: Path, text: str) -> External:
    path = folder / "scores.csv"
    path.write_text(text)
    return External(path=str(path))


def values(table: External, column: str = "q", *, single: bool = True) -> list[float | None]:
    return table.join(EXAMPLES, single_source=single)[column].to_list()


def test_the_whole_key_joins_and_other_sources_are_ignored(tmp_path: Path):
    table = write(
        tmp_path, "source,file,row,q\nweb,a.jsonl,6,0.5\nnews,a.jsonl,7,9\nweb,b.jsonl,3,9\n"
    )
    assert values(table, single=False) == [None, None, 0.5, None]


def test_file_and_row_suffice_where_there_is_one_source(tmp_path: Path):
    table = write(tmp_path, "file,row,q\na.jsonl,3,1\n")
    assert values(table) == [1, None, None, None]
    with pytest.raises(ConfigError, match="names no examples"):
        values(table, single=False)


def test_an_id_is_a_word_even_where_it_looks_like_a_number(tmp_path: Path):
    assert values(write(tmp_path, "id,q\n007,1\n7,2\n")) == [1, None, None, 2]


def test_an_example_without_an_id_has_no_score(tmp_path: Path):
    pl.DataFrame({"id": ["x", None], "q": [1.0, 5.0]}).write_parquet(tmp_path / "t.parquet")
    table = External(path=str(tmp_path / "t.parquet"), on="id")
    assert values(table) == [None, 1, None, None]


def test_columns_can_be_chosen_and_words_are_no_scores(tmp_path: Path):
    path = write(tmp_path, "id,q,r,word\nx,1,2,hello\n").path
    assert External(path=path).measurements() == ("q", "r")
    assert External(path=path, columns=("r",)).measurements() == ("r",)
    for column, message in (("word", "holds String"), ("s", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            External(path=path, columns=(column,)).measurements()


def test_scores_are_float32_and_what_is_no_number_is_null(tmp_path: Path):
    pl.DataFrame({"id": ["x", "7"], "q": [float("nan"), 1e-3]}).write_parquet(
        tmp_path / "t.parquet"
    )
    found = External(path=str(tmp_path / "t.parquet")).join(EXAMPLES, single_source=True)
    assert found.schema["q"] == pl.Float32
    assert found["q"].null_count() == 4 - 1


def test_a_key_that_stands_twice_is_named(tmp_path: Path):
    table = write(tmp_path, "file,row,q\na.jsonl,4,1\na.jsonl,4,1\n")
    with pytest.raises(InputError, match=r"more than one row for file a\.jsonl, row 4"):
        values(table)
    elsewhere = write(tmp_path, "file,row,q\nb.jsonl,4,1\nb.jsonl,4,1\na.jsonl,4,2\n")
    assert values(elsewhere) == [None, 2, None, None]  # another partition says it


def test_the_same_id_at_two_examples_gets_the_same_score(tmp_path: Path):
    twice = EXAMPLES.with_columns(id=pl.lit("x"))
    found = write(tmp_path, "id,q\nx,3\n").join(twice, single_source=True)
    assert found["q"].to_list() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "there is no score table"),
        ("scores.txt", b"id,q\n", "neither Parquet nor CSV"),
        ("scores.parquet", b"no parquet at all", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((InputError, ConfigError), match=message) as caught:
        External(path=str(path)).scan()
    assert name in caught.value.what


def test_a_row_that_is_no_number_is_refused(tmp_path: Path):
    table = write(tmp_path, "file,row,q\na.jsonl,first,1\n")
    with pytest.raises(InputError, match="cannot be read"):
        values(table)


def test_options_are_a_path_or_a_table_of_settings():
    found = tables({"a": "a.csv", "b": {"path": "b.csv", "on": "id", "columns": ["q"]}})
    assert found["a"] == External(path="a.csv")
    assert found["b"] == External(path="b.csv", on="id", columns=("q",))
    with pytest.raises(ConfigError, match="no name"):
        tables({"path": "a.csv"})
    with pytest.raises(ConfigError, match="did you mean path"):
        tables({"a": {"pathh": "a.csv"}})
