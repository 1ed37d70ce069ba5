"""How many tokens each example has: of a tokenizer, from `lengths/`; or what the index knows.

Where no tokenizer is set, characters stand for tokens, and the index has counted them; rows of
numbers and images are 1 each. Neither needs a table of its own.
"""

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Output, Partition
from curate.data.tables import read_table

IntArray = npt.NDArray[np.int64]

CHARACTERS = "characters"
"""In place of a tokenizer's digest where none is set: characters are counted."""
EXAMPLES = "examples"
"""In place of a tokenizer's digest where examples are rows of numbers or images: each is 1."""


def are_tokens(tokenizer: str) -> bool:
    """Whether a tokenizer counts, and not the index."""
    return tokenizer not in (CHARACTERS, EXAMPLES)


def counts_output(run: RunFolder, part: Partition, tokenizer: str) -> Output:
    """The table that the counts of a partition are in.

    Args:
        run: the run folder.
        part: the partition.
        tokenizer: its digest, `CHARACTERS` or `EXAMPLES`.
    """
    return run.lengths(part, tokenizer) if are_tokens(tokenizer) else run.examples(part)


def read_counts(run: RunFolder, part: Partition, tokenizer: str) -> pl.DataFrame:
    """The key of each example of a partition, and `num_tokens`.

    Raises:
        InputError: the table is missing or damaged.
    """
    path = counts_output(run, part, tokenizer).path
    if are_tokens(tokenizer):
        return read_table(path, [*KEY, "num_tokens"])
    table = read_table(path, [*KEY, "num_chars"])
    counts = known_counts(table["num_chars"].to_numpy(), tokenizer)
    return table[list(KEY)].hstack([pl.Series("num_tokens", counts)])


def known_counts(num_chars: IntArray, tokenizer: str) -> IntArray:
    """(N,) what counts as the tokens of each example where no tokenizer does.

    Args:
        num_chars: (N,) as the index has it: 0 for rows of numbers and images.
        tokenizer: `CHARACTERS` or `EXAMPLES`.
    """
    return np.ones_like(num_chars) if tokenizer == EXAMPLES else np.maximum(num_chars, 1)
