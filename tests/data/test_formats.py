"""Readers of all formats: rows, types, bad rows that keep their number, bounded memory."""

import bz2
import gzip
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.config import resolve
from curate.data.columns import PROBLEM
from curate.data.example import Source
from curate.data.formats import READERS
from curate.data.formats.text import passages
from curate.data.sources import InputFile, find_files
from curate.errors import ConfigError, InputError


def read_all(path: Path, **settings: Any) -> pa.Table:
    source = Source(path=str(path), **settings)
    (file,) = find_files("s", source)
    return pa.Table.from_batches(list(resolve(READERS, file.format, what="format")(file, source)))


def problems(table: pa.Table) -> dict[int, str]:
    found = table.column(PROBLEM).to_pylist()
    return {row: text for row, text in enumerate(found) if text is not None}


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return path


# -- JSON Lines -----------------------------------------------------------------------------------


def test_json_lines_keep_nested_values_and_widen_types_over_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.data.formats.jsonl._BLOCK_BYTES", 100)
    rows = [
        {"id": i, "n": i if i < 30 else i + 0.5, "meta": {"a": i} if i < 20 else {"b": ["x", None]},
         "late": None if i < 40 else f"t{i}", "turns": [{"role": "user", "content": "é"}] * (i % 3)}
        for i in range(60)
    ]  # fmt: skip
    table = read_all(write_lines(tmp_path / "a.jsonl", *(json.dumps(r) for r in rows)))
    assert problems(table) == {}
    assert table.schema.field("n").type == pa.float64()
    got = table.drop_columns([PROBLEM]).to_pylist()
    for row, want in zip(got, rows, strict=True):
        given: Any = want["meta"]
        meta = {"a": None, "b": None, **given}
        assert row == {**want, "meta": meta}


def test_bad_json_lines_are_all_null_rows_in_their_place(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        '{"text": "one", "n": 1}',
        '{"text": "broken',
        "",
        "[1, 2]",
        '{"text": "two"}{"text": "three"}',
        b'{"text": "x\xff", "n": 4}',
        '{"text": "\\ud800", "n": 5}',
        '{"text": "last", "n": 6}',
    )
    table = read_all(path)
    assert table.column("text").to_pylist() == ["one", None, None, None, None, None, "last"]
    assert table.column("n").to_pylist() == [1, None, None, None, None, None, 6]
    reasons = {row: text.split(":")[0] for row, text in problems(table).items()}
    assert reasons == {1: "unparsable", 2: "unparsable", 3: "unparsable", 4: "invalid_utf8",
                       5: "unparsable"}  # fmt: skip


def test_rows_of_the_rarer_kind_are_set_aside_with_the_column_named(tmp_path: Path) -> None:
    lines = ['{"text": "a", "id": 1}'] * 9 + ['{"text": "b", "id": "x"}', '{"text": 7, "id": 2}']
    table = read_all(write_lines(tmp_path / "a.jsonl", *lines))
    assert table.num_rows == 11
    found = problems(table)
    assert set(found) == {9, 10}
    assert all(text.startswith("wrong_type: ") for text in found.values())
    assert "/id" in found[9]
    assert "/text" in found[10]


def test_dates_and_empty_objects_survive_json(tmp_path: Path) -> None:
    lines = ['{"text": "2020-01-01", "o": {}}', '{"text": "2021-05-05T10:00:00Z", "o": {}}']
    table = read_all(write_lines(tmp_path / "a.jsonl", *lines))
    assert table.column("text").to_pylist() == ["2020-01-01", "2021-05-05T10:00:00Z"]
    pq.write_table(table, tmp_path / "out.parquet")


def test_a_json_array_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(InputError, match="jq"):
        read_all(path)


def test_a_line_longer_than_a_block_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.data.formats.jsonl._BLOCK_BYTES", 64)
    long = "x" * 1000
    table = read_all(write_lines(tmp_path / "a.jsonl", '{"text": "a"}', f'{{"text": "{long}"}}'))
    assert table.column("text").to_pylist() == ["a", long]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed_json_lines_are_read_as_streams(tmp_path: Path, suffix: str) -> None:
    data = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(5000))
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".zst":
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))
    else:
        path.write_bytes((gzip if suffix == ".gz" else bz2).compress(data))
    table = read_all(path)
    assert table.column("text").to_pylist() == [f"row {i}" for i in range(5000)]


def test_a_truncated_gzip_is_damage_and_not_a_short_file(tmp_path: Path) -> None:
    data = gzip.compress(b'{"text": "row"}\n' * 5000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[:-20])
    with pytest.raises(OSError, match="runcated"):
        read_all(path)


# -- CSV ------------------------------------------------------------------------------------------


def test_csv_types_hold_the_whole_file_and_bad_lines_keep_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.data.formats.csv._BLOCK_BYTES", 64)
    rows = [f"{i},{i}.5,true,00{i % 10},text {i}" for i in range(50)]
    rows[7] = "7,only three,true"
    rows[8] = "8,8.5,true,008,x,too,many"
    rows[30] = "NA,,false,030,NA"
    rows[40] = "40.25,40.5,true,040,last kind"
    table = read_all(write_lines(tmp_path / "a.csv", "i,f,b,zip,text", *rows))
    assert table.num_rows == 50
    assert set(problems(table)) == {7, 8}
    assert all(text.startswith("unparsable: ") for text in problems(table).values())
    kinds = {f.name: str(f.type) for f in table.schema}
    assert kinds == {"i": "double", "f": "double", "b": "bool", "zip": "large_string",
                     "text": "large_string", PROBLEM: "string"}  # fmt: skip
    got = table.to_pylist()
    assert got[7]["text"] is None
    assert got[9] == {"i": 9, "f": 9.5, "b": True, "zip": "009", "text": "text 9", PROBLEM: None}
    assert got[30] == {"i": None, "f": None, "b": False, "zip": "030", "text": "NA", PROBLEM: None}
    assert got[49]["text"] == "text 49"


def test_bad_lines_at_the_end_and_only_bad_lines_are_counted(tmp_path: Path) -> None:
    table = read_all(write_lines(tmp_path / "a.csv", "a,b", "1,2", "3", "4"))
    assert table.column("a").to_pylist() == [1, None, None]
    assert set(problems(table)) == {1, 2}
    table = read_all(write_lines(tmp_path / "b.csv", "a,b", "3", "4"))
    assert set(problems(table)) == {0, 1}


def test_csv_cells_may_hold_line_breaks_quotes_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"a ""b"", c\nd",1\r\n\r\nplain,2\r\n')
    table = read_all(path)
    assert table.to_pylist() == [
        {"text": 'a "b", c\nd', "n": 1, PROBLEM: None},
        {"text": "plain", "n": 2, PROBLEM: None},
    ]


def test_a_quote_that_is_never_closed_is_damage_and_not_one_long_cell(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", "n,text", "1,a", '2,"b', "3,c", "4,d")
    with pytest.raises(pa.ArrowInvalid, match="never closed"):
        read_all(path)


def test_a_csv_row_with_invalid_utf8_is_a_problem_of_that_row_only(tmp_path: Path) -> None:
    table = read_all(write_lines(tmp_path / "a.csv", "text,n", "a,1", b"b\xff,2", "c,3"))
    assert table.column("text").to_pylist() == ["a", None, "c"]
    assert problems(table)[1].startswith("invalid_utf8: ")


def test_a_table_of_numbers_needs_no_header(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(b"0,1.5,3\n2,4,5\n"))
    table = read_all(path)
    assert table.drop_columns([PROBLEM]).to_pydict() == {
        "column_0": [0, 2], "column_1": [1.5, 4.0], "column_2": [3, 5]
    }  # fmt: skip
    table = read_all(path, header=True)
    assert table.column_names[:3] == ["0", "1.5", "3"]
    assert table.num_rows == 1


def test_tab_separated_files_and_long_numbers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.tsv", "id\ttext", "12345678901234567890\ta, b", "1.5\tc")
    assert read_all(path).column("id").to_pylist() == ["12345678901234567890", "1.5"]


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two columns called 'a'"):
        read_all(write_lines(tmp_path / "a.csv", "a,a", "1,2"))


@pytest.mark.parametrize(
    ("name", "sign", "said"),
    [("a.csv", ";", "';'.*\n.*sources.s.separator to \";\""), ("a.csv", "\t", "tabs"),
     ("a.tsv", ",", "','"), ("a.csv", "|", r"'\|'")],
)  # fmt: skip
def test_columns_between_other_signs_are_refused_until_the_separator_is_named(
    tmp_path: Path, name: str, sign: str, said: str
) -> None:
    lines = (sign.join(cells) for cells in (("id", "text", "label"), ("1", "a b", "x")))
    path = write_lines(tmp_path / name, *lines)
    with pytest.raises(InputError, match=rf"has one column, called 'id.*separated by {said}"):
        read_all(path)
    table = read_all(path, separator=sign).drop_columns([PROBLEM])
    assert table.to_pylist() == [{"id": 1, "text": "a b", "label": "x"}]


def test_one_column_with_a_sign_in_its_name_is_read_where_the_separator_is_said(
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "a.csv", "text; as it came", "a;b")
    assert read_all(path, separator=",").column(0).to_pylist() == ["a;b"]
    assert read_all(path, header=False).column(0).to_pylist() == ["text; as it came", "a;b"]


def test_a_separator_is_one_sign(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="separator is ';;'"):
        Source(path=str(tmp_path), separator=";;")


def test_a_csv_cell_longer_than_a_block_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.data.formats.csv._BLOCK_BYTES", 64)
    long = "x" * 3000
    table = read_all(write_lines(tmp_path / "a.csv", "n,text", "1,a", f"2,{long}"))
    assert table.column("text").to_pylist() == ["a", long]


def test_an_empty_csv_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"")
    source = Source(path=str(path))
    (file,) = find_files("s", source)
    assert list(resolve(READERS, "csv", what="format")(file, source)) == []


# -- Arrow ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_and_streams_keep_types_and_metadata(tmp_path: Path, kind: str) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "c"], pa.large_string()),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "image": pa.array([{"bytes": b"\x00", "path": None}] * 3),
        }
    ).replace_schema_metadata({"huggingface": "{}"})
    path = tmp_path / "a.arrow"
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    got = read_all(path)
    assert got.equals(table)
    assert got.schema.equals(table.schema, check_metadata=True)


# -- data sets of the hub -----------------------------------------------------------------------


def test_a_hub_data_set_is_streamed_with_its_types(tmp_path: Path) -> None:
    """A folder stands in for the hub: `datasets` reads both by the same call."""
    lines = [f'{{"text": "t{i}", "meta": {{"n": {i}}}}}' for i in range(2500)]
    write_lines(tmp_path / "train.jsonl", *lines)
    file = InputFile(
        source="s", file="train", address=str(tmp_path), size_bytes=0, stamp="", format="hub"
    )
    source = Source(path=str(tmp_path), format="datasets", split="train")
    batches = list(resolve(READERS, "hub", what="format")(file, source))
    assert len(batches) > 1
    table = pa.Table.from_batches(batches)
    assert table.column("text").to_pylist() == [f"t{i}" for i in range(2500)]
    assert table.column("meta").to_pylist()[7] == {"n": 7}
    with pytest.raises(InputError, match="cannot be had from the hub"):
        list(resolve(READERS, "hub", what="format")(replace(file, file="dev"), source))


# -- text -----------------------------------------------------------------------------------------

PARAGRAPHS = st.lists(
    st.lists(st.text(st.sampled_from("ab é\t"), min_size=1, max_size=60), min_size=1, max_size=6),
    max_size=12,
)


@given(PARAGRAPHS, st.integers(1, 80), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_passages_lose_nothing_and_keep_to_their_length(
    paragraphs: list[list[str]], target: int, gap: int
) -> None:
    text = ("\n" * (gap + 1)).join("\n".join(lines) for lines in paragraphs) + "\n"
    lines = [(n, line) for n, line in enumerate(io.StringIO(text), 1)]
    got = list(passages(iter(lines), target))
    assert "".join("".join(t for _, t in got).split()) == "".join(text.split())
    every_line = text.split("\n")
    for line, passage in got:
        assert passage.strip()
        assert len(passage) <= math.floor(1.5 * target) + 1
        first = next(part for part in passage.split("\n") if part)
        assert first in every_line[line - 1]


def test_passages_are_whole_paragraphs_where_these_are_short(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n\n" + "x" * 40 + "\n\nlast\n", newline="")
    table = read_all(path, passage_chars=14)
    assert table.column("text").to_pylist() == [
        "one\ntwo", "three", "x" * 14, "x" * 14, "x" * 12, "last",
    ]  # fmt: skip
    assert table.column("line").to_pylist() == [1, 5, 7, 7, 7, 9]


def test_a_long_paragraph_is_cut_between_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"\r\n".join(b"line %d" % i for i in range(10)))
    table = read_all(path, passage_chars=20)
    texts = table.column("text").to_pylist()
    assert "\n".join(texts) == "\n".join(f"line {i}" for i in range(10))
    assert all(len(text) <= 30 for text in texts)
    assert table.column("line").to_pylist() == [1, 5, 9]


def test_passages_with_invalid_bytes_are_problems_and_the_rest_of_the_file_stays(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good one\n\nbad \xff\xfe bytes\n\n" + "gut é\n".encode())
    table = read_all(path, passage_chars=10)
    assert table.column("text").to_pylist() == ["good one", None, "gut é"]
    assert problems(table) == {1: "invalid_utf8: line 3: byte 0xff"}


def test_one_endless_line_is_cut_without_breaking_a_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.data.formats.text._LONGEST_LINE_BYTES", 7)
    path = tmp_path / "a.txt"
    text = "aé€😀" * 50
    path.write_text(text, encoding="utf-8")
    table = read_all(path, passage_chars=30)
    assert problems(table) == {}
    assert "".join(table.column("text").to_pylist()) == text


# -- memory ---------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from pathlib import Path
from curate.data.convert import convert, converted, conversion_fingerprint
from curate.data.example import Source
from curate.data.layout import RunFolder
from curate.data.sources import find_files
source = Source(path=sys.argv[1])
run = RunFolder(Path(sys.argv[2]))
(file,) = find_files("s", source)
warm = find_files("s", Source(path=sys.argv[3]))[0]
convert(warm, source, converted(run, warm), "x", partition_rows=10_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(file, source, converted(run, file), "x", partition_rows=10_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_converting_a_hundred_megabytes_needs_a_small_part_of_that(tmp_path: Path) -> None:
    words = "lorem ipsum dolor sit amet " * 15
    with (tmp_path / "big.jsonl").open("w") as file:
        for block in range(200):
            lines = [json.dumps({"text": f"{block} {i} {words}", "n": i}) for i in range(1150)]
            file.write("\n".join(lines) + "\n")
    assert (tmp_path / "big.jsonl").stat().st_size > 100e6
    write_lines(tmp_path / "small.jsonl", *['{"text": "a", "n": 1}'] * 1000)
    paths = [tmp_path / "big.jsonl", tmp_path, tmp_path / "small.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 60_000  # kilobytes above the start
    stored = pq.ParquetFile(tmp_path / "examples" / "data" / "s" / "big.jsonl.parquet")
    assert stored.metadata.num_rows == 230_000
    assert (
        max(stored.metadata.row_group(i).num_rows for i in range(stored.num_row_groups)) <= 10_000
    )
