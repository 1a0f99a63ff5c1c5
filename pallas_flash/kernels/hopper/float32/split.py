"""The kernel that splits the rows of q, k or v into parts (`parts`), before every other one.

A row that is not finite gets zeros for parts and a scale of NaN: scores or weights with it are NaN, which the mask
replaces like any other number where a pair does not attend. So nothing leaks, and nothing is repaired.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.hopper import registers, tiles
from pallas_flash.kernels.hopper.float32 import parts
from pallas_flash.kernels.hopper.memory import PARTS, split_rows_memory
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK, chunks
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Rows", "factors", "launch", "load_rows", "output_types", "scale_of", "size_of", "split", "store_parts"]

_EXPONENT = 0x7F800000  # of a float32 number
_ONE = 127 << 23


class Rows(NamedTuple):
    """64 rows in shared memory."""

    whole: Ref  # (chunks, 64, 64) float32
    parts: Ref  # (2 chunks, 64, 64) float16

    @property
    def chunks(self) -> int:
        """Chunks of columns."""
        return int(self.whole.shape[0])

    def load(self, chunk: int) -> Fragment:
        """Loads 64 columns in the layout TILE."""
        return load_rows(self.whole, chunk)


def load_rows(ref: Ref, chunk: int) -> Fragment:
    """Loads 64 columns of (chunks, 64, 64) float32 in the layout TILE."""
    x: Fragment = plgpu.load(ref.at[chunk], layout=registers.TILE, optimized=False)
    return x


def split(x: Fragment) -> tuple[Fragment, Fragment]:
    """Splits float32 numbers below 2^16 into hi and lo."""
    hi = x.astype(jnp.float16)
    return hi, (x - hi.astype(jnp.float32)).astype(jnp.float16)


def scale_of(size: PerRow, exponents: tuple[int, int]) -> tuple[PerRow, PerRow]:
    """The power of two at or below the largest number of a row, and its inverse; within limits."""
    lowest, highest = (jnp.int32(_ONE + (exponent << 23)) for exponent in exponents)
    bits = lax.bitcast_convert_type(size, jnp.int32) & _EXPONENT
    bits = jnp.minimum(jnp.maximum(bits, lowest), highest)
    power = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)
    return power(bits), power(2 * _ONE - bits)


def value_scales(size: PerRow) -> tuple[PerRow, tuple[PerRow, ...]]:
    """The inverse scale of rows of v in the forward; and what is kept of it: its exponent, the inverse, and NaN for a
    row that is not finite, else 0.
    """
    scale, inverse = scale_of(size, parts.VALUES)
    exponent = (lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127
    return inverse, (exponent.astype(jnp.float32), inverse, bad_mark(size))


def factors(size: PerRow) -> tuple[PerRow, tuple[PerRow, ...]]:
    """The inverse scale of any other rows, and what is kept of it: the factor of products with their parts."""
    scale, inverse = scale_of(size, parts.FACTORS)
    return inverse, (scale * 2.0**-parts.TOP + bad_mark(size),)


def bad_mark(size: PerRow) -> PerRow:
    """NaN for a row that is not finite, else 0."""
    return jnp.where(size == jnp.inf, jnp.nan, jnp.float32(0.0))


def size_of(pieces: Iterator[Fragment]) -> PerRow:
    """The largest number of each row, infinity where one is not finite; (64,) of the row's columns in pieces."""
    sizes = (jnp.where(jnp.abs(x) < jnp.inf, jnp.abs(x), jnp.inf).max(axis=1) for x in pieces)
    return functools.reduce(jnp.maximum, sizes)


def store_parts(spec: AttentionSpec, rows: Rows, inverse: PerRow, bad: Bool[Array, "64"], target: Ref,
                index: tuple[Index, Index, Index]) -> None:
    """Writes the parts of 64 rows to global memory, zeros for bad ones.

    Args:
      inverse: of their scales.
      index: (batch, head, first row).
    """
    for chunk in range(rows.chunks):
        x = rows.load(chunk) * registers.spread(inverse, CHUNK) * 2.0**parts.TOP
        for part, piece in enumerate(split(jnp.where(registers.spread(bad, CHUNK), 0.0, x))):
            at = part * rows.chunks + chunk
            tiles.store_tile(spec, piece, rows.parts.at[at:at + 1], target, (*index, at))
    plgpu.wait_smem_to_gmem(0)


def sizes(spec: AttentionSpec, name: str) -> tuple[int, int, int]:
    """Length, heads and columns of q, k, v or dout."""
    length, heads = (spec.q_len, spec.q_heads) if name in ("q", "dout") else (spec.kv_len, spec.kv_heads)
    return length, heads, spec.d if name in ("q", "k") else spec.d_v


def output_types(spec: AttentionSpec, name: str, kept: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The parts, in the spec's layout; and so many numbers that are kept of a row, (batch, heads, kept, whole tiles of
    rows).
    """
    length, heads, columns = sizes(spec, name)
    scales = (spec.batch, heads, kept, parts.padded_rows(length))
    return {f"{name}_parts": jax.ShapeDtypeStruct(spec.shape(length, heads, PARTS * CHUNK * chunks(columns)),
                                                  jnp.float16),
            f"{name}_scales": jax.ShapeDtypeStruct(scales, jnp.float32)}


def launch(spec: AttentionSpec, name: str, values: bool = False) -> Launch:
    """The launch that splits q, k or v (`name`): a block for each 64 rows of a head, one warpgroup.

    With `values`, its scales are those of values in the forward.
    """
    (length, heads, columns), scales = sizes(spec, name), value_scales if values else factors
    outputs, padded = output_types(spec, name, 3 if values else 1), parts.padded_rows(length)

    def attention_split(x: Ref, target: Ref, scales_ref: Ref, smem: dict[str, Ref], bars: dict[str, Ref]) -> None:
        block, blocks = lax.axis_index("block"), padded // CHUNK
        head, first = div(block, blocks), rem(block, blocks) * CHUNK
        index = div(head, heads), rem(head, heads), first
        tiles.load_tile(spec, x, index, smem["rows"], bars["full"])
        plgpu.barrier_wait(bars["full"])
        rows = Rows(smem["rows"], smem["parts"])
        size = size_of(map(rows.load, range(rows.chunks)))
        inverse, kept = scales(size)
        for i, numbers in enumerate(kept):
            registers.store_row_stats(numbers, scales_ref, len(kept) * head + i, first, padded)
        store_parts(spec, rows, inverse, size == jnp.inf, target, index)

    kernel = plgpu.kernel(
        attention_split, out_type=tuple(outputs.values()), scratch_types=allocate(split_rows_memory(columns)),
        grid=(spec.batch * heads * padded // CHUNK,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, (name,), outputs)
