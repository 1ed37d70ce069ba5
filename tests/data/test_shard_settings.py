import io
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.config import parse
from curate.data.shard_formats.parquet import writer_options
from curate.data.shard_settings import Shards
from curate.errors import ConfigError

CODECS = get_args(get_type_hints(Shards)["compression"])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("level", [None, -1, 0, 1, 3, 9, 10, 12, 13, 22, 23])
def test_a_codec_and_level_that_pass_can_be_written(codec: Any, level: int | None):
    try:
        settings = Shards(compression=codec, compression_level=level)
    except ConfigError:
        assert level is not None
        return
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(100)}), sink, **writer_options(settings))
    found = pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0).column(0).compression
    wanted = {"none": "UNCOMPRESSED"}.get(codec, codec.upper())
    assert found == wanted


def test_pages_that_end_where_the_content_says_are_the_same_behind_a_row_more():
    generator = np.random.default_rng(0)
    rows = pa.array([generator.bytes(2000) for _ in range(4000)])
    more = pa.concat_arrays([pa.array([generator.bytes(700)]), rows])
    for wanted in (False, True):
        settings = Shards(content_chunks=wanted, compression="none")
        one, other = (written(values, settings) for values in (rows, more))
        # Some pages of 1 MB at most, with their heads.
        assert (one[len(one) // 2 :][: 3 << 20] in other) == wanted


def written(values: pa.Array, settings: Shards) -> bytes:
    sink = io.BytesIO()
    options: dict[str, Any] = {**writer_options(settings), "use_dictionary": False}
    pq.write_table(pa.table({"n": values}), sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_mb": 0}, "size_mb is 0"),
        ({"size_mb": float("nan")}, r"size_mb \(nan\): input should be a finite number"),
        ({"compression": "snappy", "compression_level": 3}, "snappy has no levels"),
        ({"compression": "gzip", "compression_level": 10}, "gzip takes 1 to 9"),
        ({"compression": "zstd", "compression_level": 0}, "zstd takes 1 to 22"),
        ({"compresion": "zstd"}, "unknown key"),
        ({"format": "tfrecord"}, "format"),
        ({"format": ["arrow", "arrow"]}, "each format of the shards once"),
        ({"format": []}, "each format"),
        ({"min_files": 0}, "min_files is 0"),
        ({"row_group_mb": 0}, "row_group_mb 0"),
        ({"packing": {"length": 1}}, "too short"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse(Shards, values)


def test_zstd_has_its_own_default_level_and_not_arrow_s():
    assert Shards().level == 3
    assert Shards(compression_level=1).level == 1
    assert Shards(compression="snappy").level is None
    assert writer_options(Shards())["compression_level"] == 3
