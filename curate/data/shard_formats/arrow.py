"""Arrow streams in the layout of `datasets`' `save_to_disk`: mapped into memory, not read.

arrow/<domain>/data-00000-of-00024.arrow, and beside them state.json and dataset_info.json
"""

import base64
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from curate.data.kinds import item_kind
from curate.data.shard_formats.sink import Context
from curate.data.shard_layout import Shard

log = logging.getLogger(__name__)

_BATCH_ROWS = 1000
"""As `datasets` writes them: a batch is what it looks up a row in."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
_FIRST = re.compile(r"\.?data-0+-of-")


class _Sink:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._is_first = _FIRST.match(path.name) is not None
        self._schema = schema_of(schema)
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, table: pa.Table) -> None:
        columns = [
            canonical(column.combine_chunks().cast(field.type))
            for column, field in zip(table.columns, self._schema, strict=True)
        ]
        plain = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(plain, max_chunksize=_BATCH_ROWS)

    def close(self) -> dict[str, Any]:
        self._writer.close()
        self._file.close()
        stored = self._schema.serialize().to_pybytes()
        facts = {"schema_digest": xxhash.xxh3_64_hexdigest(stored)}
        if self._is_first:
            facts["schema"] = base64.b64encode(stored).decode()
        return facts

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()


def schema_of(schema: pa.Schema) -> pa.Schema:
    """The schema in types that `datasets` knows: without dictionaries, maps and views of lists."""
    fields = [field.with_type(_known(field.type)) for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def _known(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _known(kind.value_type)
    if pa.types.is_map(kind):
        entry = [pa.field("key", _known(kind.key_type)), pa.field("value", _known(kind.item_type))]
        return pa.list_(pa.struct(entry))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_known(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_known(kind.value_type)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_known(kind.value_type)))
    if item_kind(kind) is not None and not isinstance(kind, pa.BaseExtensionType):
        return pa.list_(kind.value_field.with_type(_known(kind.value_type)))
    return kind


def canonical(array: pa.Array) -> pa.Array:
    """The same values in memory that depends on nothing else.

    What lies under a null, and before and behind a slice, goes to the file otherwise.
    """
    everything = pa.array(np.arange(len(array)))
    taken = array.take(everything)
    return _emptied(taken).take(everything) if "struct<" in str(array.type) else taken


def _emptied(array: pa.Array) -> pa.Array:
    """Structs that are null have null fields: `take` does not look into them."""
    kind = array.type
    if pa.types.is_struct(kind):
        parts = [_emptied(part) for part in array.flatten()]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=array.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = _emptied(array.values)
        return type(array).from_arrays(array.offsets, values, type=kind, mask=array.is_null())
    if pa.types.is_fixed_size_list(kind):
        values = _emptied(array.values)
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=array.is_null())
    return array


@dataclass(frozen=True, slots=True)
class Arrow:
    """See `curate.data.shard_formats.sink.Format`."""

    pattern: str = (
        r"arrow/(?:[^/]+/){0,2}(?:data-\d{5,}-of-\d{5,}\.arrow|state\.json|dataset_info\.json)"
    )

    def files(self, shard: Shard) -> tuple[str, ...]:
        return (shard.path("arrow", f"data-{shard.number:05d}-of-{shard.total:05d}.arrow"),)

    def open(self, paths: Sequence[Path], schema: pa.Schema, context: Context) -> _Sink:
        del context
        return _Sink(paths[0], schema)

    def documents(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        folders: dict[PurePosixPath, list[Mapping[str, Any]]] = {}
        for shard in shards:
            folders.setdefault(PurePosixPath(shard["file"]).parent, []).append(shard)
        found: dict[str, str] = {}
        for folder, mine in folders.items():
            mine.sort(key=lambda shard: (len(shard["file"]), shard["file"]))
            if len({shard["facts"]["schema_digest"] for shard in mine}) > 1:
                log.warning(
                    "%s cannot be opened with load_from_disk as a whole: the columns of its"
                    " sources have types that do not go together",
                    folder,
                )
                continue
            found[f"{folder}/state.json"] = _state(mine)
            found[f"{folder}/dataset_info.json"] = _info(mine)
        return found

    def count_rows(self, paths: Sequence[Path]) -> int:
        with pa.memory_map(str(paths[0])) as file:
            size = file.size()
            file.seek(max(0, size - len(_END)))
            # A reader takes a stream that breaks off between two batches for a whole one.
            if file.read() != _END:
                raise OSError("the end of the stream is missing")
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                return sum(batch.num_rows for batch in stream)


def _state(shards: Sequence[Mapping[str, Any]]) -> str:
    digests = "".join(shard["digest"] for shard in shards)
    state = {
        "_data_files": [{"filename": PurePosixPath(shard["file"]).name} for shard in shards],
        "_fingerprint": xxhash.xxh3_64_hexdigest(digests.encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    return json.dumps(state, indent=2) + "\n"


def _info(shards: Sequence[Mapping[str, Any]]) -> str:
    import datasets

    stored = pa.py_buffer(base64.b64decode(shards[0]["facts"]["schema"]))
    features = datasets.Features.from_arrow_schema(pa.ipc.read_schema(stored))
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "",
            "license": ""}  # fmt: skip
    return json.dumps(info, indent=2, ensure_ascii=False) + "\n"


ARROW = Arrow()
