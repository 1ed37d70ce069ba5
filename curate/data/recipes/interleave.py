"""`datasets.interleave_datasets`, of rows or of packed sequences."""

from curate.data.recipes.blend import Blend, chosen_columns, header
from curate.data.recipes.parts import FIND, PARQUET_FILES

_USE = """Use: `from datasets_interleave import mixed`, then `mixed(phase=0, rank=0,
num_ranks=1)`: an IterableDataset of stated length. Needs `datasets` and pyarrow, not curate."""

_PACKED_USE = """Use: `from packed_interleave import mixed`, then `mixed(phase=0, rank=0,
num_ranks=1)`: an IterableDataset of stated length, of input_ids and labels as a Trainer takes
them. Needs `datasets` and pyarrow, not curate."""

_UNIT = """Unit: rows. A domain is drawn with row_probability, its share of tokens divided by the
mean tokens of a row; drawn by its share of tokens, a domain of long rows would get too much."""

_PACKED_UNIT = """Unit: sequences of equal length, hence tokens. A domain is drawn in proportion
to its sequences times `repeat`."""

_HONOURED = {
    "column": """Weights: rows carry curate_weight; `datasets` applies nothing, your loss must
(see trainer.py).""",
    "copies": """Weights: honoured by the copies; nothing else is to be done.""",
    "domains": """Weights: the domains' part is honoured here; curate_weight must be applied by
your loss (see trainer.py).""",
}

_LOST = """Weights: packed sequences have no weight each: curate_weight is lost, and every
example of a domain counts alike. Write with `--weights copies` to have them honoured."""

_APPROXIMATED = """Approximated: domains are drawn at random, so their numbers of rows vary as
sqrt(n); within a domain rows are shuffled in a buffer, in the same order in every pass."""

_CODE = '''
# Later versions of `datasets` read several files at once, and rest 5 s after every pass.
OPTIONS = inspect.signature(IterableDataset.shuffle).parameters
ONE_FILE = {{"max_buffer_input_shards": 1}} if "max_buffer_input_shards" in OPTIONS else {{}}


def load(folder):
    """A domain as a stream."""
    paths = {{"train": files(folder)}}
    return load_dataset("parquet", data_files=paths, split="train", streaming=True{columns})


def mixed(phase=0, *, epochs=1.0, seed=0, buffer_size=10_000, rank=0, num_ranks=1):
    """The mixture as a stream of so many epochs, one of `num_ranks` equal parts."""
    chosen = list(domains(phase).values())
    sizes = [{size} for d in chosen]
    # Without an end to any domain no stopping strategy can bend the mixture; `take` ends it.
    parts = [
        load(d["folder"]).shuffle(seed=seed, buffer_size=buffer_size, **ONE_FILE).repeat(None)
        for d in chosen
    ]
    stream = interleave_datasets(
        parts,
        probabilities=[size / sum(sizes) for size in sizes],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
    # In this order, as what is taken after the split would be taken by every worker.
    stream = stream.take(round(epochs * sum(sizes)) // num_ranks * num_ranks)
    if num_ranks > 1:
        stream = split_dataset_by_node(stream, rank=rank, world_size=num_ranks)
    return stream
'''

_IMPORTS = """from datasets import IterableDataset, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
"""


def rows(blend: Blend) -> str:
    """`datasets_interleave.py`."""
    size = 'd["row_probability"] * MIXTURE["phases"][phase]["epoch_rows"]'
    return (
        header(
            blend,
            "The mixture for `datasets`: domains interleaved by their probabilities.",
            _USE,
            _UNIT,
            _HONOURED[blend.way],
            _APPROXIMATED,
        )
        + _with_imports(_IMPORTS)
        + PARQUET_FILES.format(room="data")
        + _CODE.format(columns=chosen_columns(blend), size=size)
    )


def packed(blend: Blend) -> str:
    """`packed_interleave.py`."""
    count = 'd["repeat"] * sum(pq.read_metadata(file).num_rows for file in files(d["folder"]))'
    lost = "Weights: honoured by the copies." if blend.way == "copies" else _LOST
    return (
        header(
            blend,
            "The mixture of packed sequences for `datasets` and a Trainer.",
            _PACKED_USE,
            _PACKED_UNIT,
            lost,
            _APPROXIMATED,
        )
        + _with_imports("import pyarrow.parquet as pq\n" + _IMPORTS)
        + PARQUET_FILES.format(room="packed")
        + _CODE.format(columns="", size=count)
    )


def _with_imports(imports: str) -> str:
    standard, rest = FIND.split("\n\n", 1)
    return f"import inspect\n{standard}\n\n{imports}\n{rest}"
