"""Where a row stands in an order: bits that sort as scores do, and seeded hashes of keys.

Shapes: N rows.
"""

import numpy as np
import xxhash
from numpy.typing import NDArray

Bits = NDArray[np.uint64]

_SIGN = np.uint64(1 << 63)


def ordered_bits(values: NDArray[np.float64]) -> Bits:
    """(N,) integers that sort as the numbers do; -0.0 is 0.0, no number may be NaN."""
    bits = np.ascontiguousarray(values + 0.0).view(np.uint64)
    return np.where(bits >= _SIGN, ~bits, bits | _SIGN)


def number_of(bits: int) -> float:
    """The number that `ordered_bits` made this integer from."""
    raw = bits ^ int(_SIGN) if bits >= int(_SIGN) else bits ^ ((1 << 64) - 1)
    return float(np.array([raw], np.uint64).view(np.float64)[0])


def file_hash(source: str, file: str, *, seed: int) -> int:
    """Where the hashes of a file's rows start; 64 bits."""
    # Only a length in front keeps ("ab", "c") and ("a", "bc") apart.
    text = f"plan {len(source)} {source}/{file}"
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed & 0xFFFF_FFFF_FFFF_FFFF)


def row_hashes(start: int, row: NDArray[np.int64]) -> Bits:
    """(N,) 64-bit hashes of (seed, source, file, row); different for all rows of one file.

    The finaliser of SplitMix64 over a Weyl sequence: both are one-to-one.

    Args:
        start: from `file_hash`.
        row: (N,) position in the file.
    """
    return mixed_bits(np.uint64(start) + row.astype(np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15))


def mixed_bits(values: Bits) -> Bits:
    """(N,) the same integers, scattered over all 64 bits by a one-to-one map."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


def gumbel(hashes: Bits) -> NDArray[np.float64]:
    """(N,) draws of the standard Gumbel distribution, one for each hash.

    The rows with the largest score / temperature + Gumbel are a draw without replacement with
    probabilities in proportion to exp(score / temperature).
    """
    uniform = ((mixed_bits(hashes ^ _SIGN) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return -np.log(-np.log(uniform))
