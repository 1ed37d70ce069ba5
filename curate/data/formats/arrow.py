"""Arrow IPC, as files (Feather version 2) and as streams."""

from collections.abc import Iterator

import pyarrow as pa

from curate.data.example import Source
from curate.data.sources import InputFile
from curate.data.storage import locate, store_errors

_MAGIC = b"ARROW1"


def read(file: InputFile, source: Source) -> Iterator[pa.RecordBatch]:
    """The record batches of a file, its schema's metadata included."""
    del source
    system, path = locate(file.address)
    with store_errors(file.address), system.open(path, "rb") as raw:
        is_file = raw.read(len(_MAGIC)) == _MAGIC
        raw.seek(0)
        if not is_file:
            with pa.ipc.open_stream(raw) as stream:
                yield _none(stream.schema)
                yield from stream
            return
        with pa.ipc.open_file(raw) as stored:
            yield _none(stored.schema)
            for at in range(stored.num_record_batches):
                yield stored.get_batch(at)


def _none(schema: pa.Schema) -> pa.RecordBatch:
    """No rows, but the schema: a file without batches is still a table."""
    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
