"""float32 numbers as pairs of float16 numbers, hi + lo, each row with a scale of its own, a power of two.

Rounding to hi leaves 2^-11 of a number, and rounding the rest to lo 2^-23 of it, while lo is a normal number: numbers
down to 2^-17 of the largest of their row. A smaller one is off by 2^-39 of that largest number. Of a product of two
numbers, (hi + lo) (hi + lo), lo lo is left out, 2^-22 of it.

Rows have scales of their own because a tensor's would be that of its largest number, which may be anything: a token
with large activations, or memory past the end of a sequence.
"""

from pallas_flash.kernels.hopper.schedule import CHUNK

__all__ = ["FACTORS", "PRODUCTS", "TOP", "VALUES", "WEIGHTS", "padded_rows"]

PRODUCTS = ((1, 0), (0, 1), (0, 0))
"""Which parts of two operands are multiplied, in this order: small ones first, since sums of tensor cores are
truncated (`products`).
"""

TOP = 14
"""A row's largest number is scaled to 2^14 or above, but below 2^15: float16 ends at 2^16."""

FACTORS = -60, 60
"""The exponents that the scale of a row may have, so that no product with two of them leaves float32. Rows of smaller
numbers lose digits, and a row with a number of 2^62 or above is not finite.
"""

VALUES = -44, 80
"""The same for the rows of v in the forward, where weights have their scales (`softmax`)."""

WEIGHTS = -100, 100
"""The same for the rows of weights in the backward (`gradients`)."""


def padded_rows(length: int) -> int:
    """How many rows scales are kept of: whole tiles."""
    return -(-length // CHUNK) * CHUNK
