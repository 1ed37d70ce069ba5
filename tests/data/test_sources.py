"""Finding the files of a source: places, keys, formats, stamps and messages."""

import functools
import http.server
import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from curate.data.example import Source
from curate.data.file_names import glob_pattern
from curate.data.sources import InputFile, find_files
from curate.errors import ConfigError, InputError, MissingDependencyError


def touch(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def keys(path: Any, **settings: Any) -> list[str]:
    path = str(path) if isinstance(path, Path) else path
    return [file.file for file in find_files("s", Source(path=path, **settings))]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.py", ["a.py"], ["b/a.py", "a.pyc", "xapy"]),
        ("**/*.py", ["a.py", "b/a.py", "b/c/a.py"], ["a.txt"]),
        ("b/**", ["b/a", "b/c/d"], ["a", "c/b"]),
        ("part-[0-3]?.txt", ["part-12.txt"], ["part-52.txt", "part-1.txt"]),
        ("[!a].txt", ["b.txt"], ["a.txt"]),
        ("a+(b).txt", ["a+(b).txt"], ["aab.txt"]),
    ],
)
def test_globs_match_relative_paths(pattern: str, yes: list[str], no: list[str]) -> None:
    assert all(glob_pattern(pattern).fullmatch(path) for path in yes)
    assert not any(glob_pattern(pattern).fullmatch(path) for path in no)


def test_keys_are_relative_to_what_the_user_named(tmp_path: Path) -> None:
    touch(tmp_path / "d" / "b.txt")
    touch(tmp_path / "d" / "sub" / "a.txt")
    assert keys(tmp_path / "d" / "b.txt") == ["b.txt"]
    assert keys(tmp_path / "d") == ["b.txt", "sub/a.txt"]
    assert keys(f"{tmp_path}/d/*/*.txt") == ["sub/a.txt"]
    assert keys(f"{tmp_path}/*/*.txt") == ["d/b.txt"]
    assert keys(f"{tmp_path}/**/*.txt") == ["d/b.txt", "d/sub/a.txt"]
    assert keys((f"{tmp_path}/d/b.txt", f"{tmp_path}/d/sub")) == ["a.txt", "b.txt"]


def test_a_relative_path_gives_an_absolute_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    (file,) = find_files("s", Source(path="a.txt"))
    assert file.address == str(tmp_path / "a.txt")


def test_hidden_private_and_cache_files_are_no_inputs(tmp_path: Path) -> None:
    for name in ("a.py", ".hidden.py", "_private.py", "__pycache__/b.py", ".git/c.py", "_t/d.py"):
        touch(tmp_path / name)
    assert keys(tmp_path) == ["a.py"]
    assert keys(tmp_path, include="**/*.py") == ["_private.py", "_t/d.py", "a.py"]
    assert keys(f"{tmp_path}/**/*.py") == ["a.py"]
    assert keys(f"{tmp_path}/_*.py") == ["_private.py"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    touch(tmp_path / "d" / "a.txt")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert keys(tmp_path / "d") == ["a.txt"]


def test_two_files_with_one_key_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.txt")
    touch(tmp_path / "b" / "x.txt")
    with pytest.raises(InputError, match=r"x\.txt' *\n.*separate sources"):
        keys((f"{tmp_path}/a/x.txt", f"{tmp_path}/b/x.txt"))


def test_mixed_formats_are_refused_by_name_and_chosen_by_format_or_include(tmp_path: Path) -> None:
    touch(tmp_path / "README.md")
    touch(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"README\.md is text, rows\.jsonl is jsonl"):
        keys(tmp_path)
    assert keys(tmp_path, format="jsonl") == ["rows.jsonl"]
    assert keys(tmp_path, include="*.md") == ["README.md"]


def test_an_unknown_suffix_needs_a_format(tmp_path: Path) -> None:
    path = touch(tmp_path / "rows.xyz")
    with pytest.raises(InputError, match=r"rows\.xyz"):
        keys(path)
    assert find_files("s", Source(path=str(path), format="text"))[0].format == "text"
    with pytest.raises(ConfigError, match="did you mean jsonl"):
        keys(path, format="json")


def test_formats_come_from_suffixes_and_compressed_lines_are_known(tmp_path: Path) -> None:
    formats = {"a.jsonl.gz": "jsonl", "a.csv.zst": "csv", "a.TSV": "csv", "a.ndjson": "jsonl",
               "a.feather": "arrow", "a.rst": "text", "a.parquet": "parquet"}  # fmt: skip
    for name, kind in formats.items():
        (file,) = find_files("s", Source(path=str(touch(tmp_path / name))))
        assert file.format == kind
    with pytest.raises(InputError):
        keys(touch(tmp_path / "a.parquet.gz"))


def test_what_is_missing_is_named_with_the_nearest_name_there_is(tmp_path: Path) -> None:
    touch(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"did you mean train\.jsonl\?"):
        keys(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        keys(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file matches"):
        keys(tmp_path / "empty")


def test_split_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split has no meaning"):
        keys(touch(tmp_path / "a.jsonl"), split="train")


def test_stamps_follow_content_and_time(tmp_path: Path) -> None:
    path = touch(tmp_path / "a.txt", "one")
    stamps = [find_files("s", Source(path=str(path)))[0].stamp]
    os.utime(path, ns=(1, 1))
    stamps.append(find_files("s", Source(path=str(path)))[0].stamp)
    path.write_text("longer")
    os.utime(path, ns=(1, 1))
    stamps.append(find_files("s", Source(path=str(path)))[0].stamp)
    assert len(set(stamps)) == 3


# -- packages ---------------------------------------------------------------------------------


def test_packages_are_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "bomb_pkg" / "__init__.py", "raise RuntimeError('imported')")
    touch(tmp_path / "bomb_pkg" / "data" / "rows.jsonl", '{"text": "a"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert keys("pkg://bomb_pkg/data") == ["rows.jsonl"]
    assert keys("pkg://bomb_pkg/data/rows.jsonl") == ["rows.jsonl"]
    assert keys("pkg://bomb_pkg/*/*.jsonl") == ["data/rows.jsonl"]
    assert "bomb_pkg" not in sys.modules


def test_the_standard_library_is_a_corpus() -> None:
    files = find_files("s", Source(path="pkg://asyncio", format="text", include="**/*.py"))
    found = {file.file for file in files}
    assert {"__init__.py", "base_events.py", "tasks.py"} <= found
    assert not any("__pycache__" in name for name in found)


@pytest.mark.parametrize("address", ["pkg://no_such_package/x", "pkg://", "pkg://a.b/c"])
def test_a_missing_package_is_named(address: str) -> None:
    with pytest.raises(InputError, match="there is no package"):
        keys(address)


# -- stores ---------------------------------------------------------------------------------------


def test_memory_store_gives_files_folders_globs_and_changing_stamps() -> None:
    system = fsspec.filesystem("memory")
    system.pipe({"/stored/d/a.jsonl": b"{}", "/stored/d/sub/b.jsonl": b"{}", "/stored/_x.txt": b""})
    try:
        assert keys("memory://stored/d/a.jsonl") == ["a.jsonl"]
        assert keys("memory://stored/d") == ["a.jsonl", "sub/b.jsonl"]
        assert keys("memory://stored/*/*.jsonl") == ["d/a.jsonl"]
        assert keys("memory://stored/**/*.jsonl") == ["d/a.jsonl", "d/sub/b.jsonl"]
        (file,) = find_files("s", Source(path="memory://stored/d/a.jsonl"))
        assert file.address == "memory:///stored/d/a.jsonl"
        system.pipe("/stored/d/a.jsonl", b"{}")
        assert find_files("s", Source(path="memory://stored/d/a.jsonl"))[0].stamp != file.stamp
        with pytest.raises(InputError, match="there is no memory://stored/nothing"):
            keys("memory://stored/nothing.jsonl")
    finally:
        system.rm("/stored", recursive=True)


def test_an_unknown_store_and_a_missing_driver_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="nostore://x"):
        keys("nostore://x/a.jsonl")

    def no_driver(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", no_driver)
    with pytest.raises(MissingDependencyError, match=r"pip install 'curate-data\[s3\]'"):
        keys("s3://bucket/a.jsonl")


def test_files_on_s3_are_found_and_read_over_the_wire(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moto.server import ThreadedMotoServer

    from curate.data.layout import RunFolder
    from curate.data.reading import read_rows
    from jobs.cluster import Cluster, open_pool
    from jobs.index import index_run
    from jobs.settings import parse_settings

    for name, value in (("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "k"),
                        ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").clear_instance_cache()
        # Another client, so that the one under test cannot know of the writes.
        other = fsspec.filesystem("s3", skip_instance_cache=True)
        other.mkdir("bucket")
        other.pipe({"bucket/d/a.parquet": parquet_bytes(0), "bucket/d/b.parquet": parquet_bytes(1)})
        settings = parse_settings(
            {"run": str(tmp_path), "sources": {"s": {"path": "s3://bucket/d/*.parquet"}}}
        )
        with open_pool(Cluster()) as pool:
            assert index_run(settings, pool=pool)["rows"] == 40
            other.pipe("bucket/d/b.parquet", parquet_bytes(2))
            again = index_run(settings, pool=pool)
        assert (again["done"], again["skipped"]) == (1, 1)
        run = RunFolder(tmp_path)
        last = read_rows(run, run.partitions()[-1], ["text"])
        assert last.column("text").to_pylist()[0] == "2 0"
        with pytest.raises(InputError, match="s3://bucket/nothing"):
            keys("s3://bucket/nothing.parquet")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()


def parquet_bytes(seed: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{seed} {i}" for i in range(20)]}), sink)
    return sink.getvalue()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def test_one_file_on_the_web_is_an_input(tmp_path: Path) -> None:
    from curate.data.storage import open_stream

    touch(tmp_path / "rows.jsonl", '{"text": "from afar"}\n')
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
            (file,) = find_files("s", Source(path=address))
            assert (file.file, file.format) == ("rows.jsonl", "jsonl")
            with open_stream(file.address) as stream:
                assert stream.read() == b'{"text": "from afar"}\n'
            with pytest.raises(InputError, match=r"there is no .*nothing\.jsonl"):
                keys(address.replace("rows", "nothing"))
        finally:
            server.shutdown()


# -- saved data sets ----------------------------------------------------------------------------


def test_a_saved_data_set_is_its_arrow_files(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [f"t{i}" for i in range(10)]})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    files: list[InputFile] = find_files("s", Source(path=str(tmp_path / "one")))
    assert [f.file for f in files] == [
        "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
    ]  # fmt: skip
    assert {f.format for f in files} == {"arrow"}
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    assert keys(tmp_path / "two", split="test") == ["test/data-00000-of-00001.arrow"]
    with pytest.raises(InputError, match="train, test"):
        keys(tmp_path / "two")


def test_a_hub_name_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source: dict[str, Any] = {"path": "owner/name", "format": "datasets"}
    with pytest.raises(InputError, match="no split is named"):
        find_files("s", Source(**source))
    with pytest.raises(InputError, match="owner/name cannot be had from the hub"):
        find_files("s", Source(**source, split="train"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (file,) = find_files("s", Source(**source, split="train", revision=commit))
    assert (file.file, file.stamp, file.format) == ("train", commit, "hub")


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl is no file, but a pipe"):
        find_files("a", Source(path=str(tmp_path)))
