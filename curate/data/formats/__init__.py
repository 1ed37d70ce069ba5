"""Input formats that are converted to Parquet: one file and one function `read` each.

`read(file, source)` yields Arrow record batches of one schema with bounded memory, one row per
original row. A row that cannot be read is all null but for `curate_problem`, which says
`reason: detail`. Damage to the whole file is an Arrow error.
"""

READERS = {
    "jsonl": "curate.data.formats.jsonl:read",
    "csv": "curate.data.formats.csv:read",
    "arrow": "curate.data.formats.arrow:read",
    "text": "curate.data.formats.text:read",
    "images": "curate.data.formats.images:read",
    "hub": "curate.data.formats.hub:read",
}
"""Format -> reader; Parquet needs none."""

SETTINGS = {
    "jsonl": (),
    "csv": ("header", "separator"),
    "arrow": (),
    "text": ("passage_chars",),
    "images": ("include",),
    "hub": ("path", "subset", "split", "revision"),
}
"""Format -> settings of the source that its rows depend on."""
