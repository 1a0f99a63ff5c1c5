"""What the backward knows of each query: three float32 numbers, which `backward.prepare` computes.

P = exp2(scale log2(e) S - lse log2(e)), where product and difference are one instruction, rounded once; the accumulator
of dP starts at -delta, so that dS = P * dP (with dropout at -delta / factor: `mosaic.dropout`). Where one of 64 queries
is large (`scores`), lse log2(e) is rounded too much, and what it lost is added to the exponents of all 64: they are
exact where S is what it was in the forward, to the bit. The last bit of all 64 numbers says that one is.
"""

import enum

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.registers import PerColumn, PerRow
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.types import Flag

__all__ = ["IDLE", "LOADED", "Statistics", "is_idle", "is_marked", "with_mark", "without_mark"]


class Statistics(enum.IntEnum):
    """The rows of the statistics, (batch, q_heads, 3, padded length) float32."""

    LSE = 0  # lse log2(e), IDLE where a query attends to nothing; the last bit is 1 if one of 64 queries is large.
    # Where scores may be far (`scores.is_far`) it is lse itself, of which the differences are taken.
    DELTA = 1  # -delta; with dropout -delta / factor
    ROUNDING = 2  # how much more LSE is than it should be, base 2


IDLE = 3e38
"""Stands for lse log2(e) of a query that attends to nothing. Finite, so that its last bit is free."""

LOADED = (Statistics.LSE, Statistics.DELTA)
"""What comes to shared memory with each tile; the third is read where it is needed, which is rare."""


def with_mark(lse_log2: PerRow, large: Flag) -> PerRow:
    """Sets the last bit of lse log2(e) if `large`, else clears it."""
    bits = lax.bitcast_convert_type(lse_log2, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(large, bits | 1, bits & -2), jnp.float32)


def without_mark(lse: Array) -> Array:
    """Clears the last bit."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(lse, jnp.int32) & -2, jnp.float32)


def is_idle(lse_log2: PerRow) -> Array:
    """Whether each query attends to nothing, from its number, marked or not."""
    return without_mark(lse_log2) == float((np.float32(IDLE).view(np.int32) & -2).view(np.float32))


def is_marked(lse_log2: PerColumn, layout: ptx.Layout) -> Flag:
    """Whether one of 64 queries is large, from any of their numbers; the same in every thread of a warp."""
    return ptx.any_in_warp((lax.bitcast_convert_type(lse_log2, jnp.int32) & 1) != 0, layout)
