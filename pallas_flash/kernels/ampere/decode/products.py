"""Products of packed queries, in bands: each band of a tile of 64 rows has keys of its own of a tile of keys
(`mosaic.decode.rows`), so no two warps load the same ones where there are as many bands as warps.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere import pieces
from pallas_flash.kernels.ampere.pieces import K
from pallas_flash.kernels.ampere.registers import TILE, Fragment
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["add_values", "scores"]


def _first_key(keys: int, bands: int) -> ir.Value | None:
    """Where the keys of this warp's band begin in a tile of keys, of which each band has so many."""
    if bands == 1:
        return None
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    warp = arith.remui(arith.shrui(mgpu.utils.thread_idx(), const(5)), const(4))
    return arith.muli(arith.divui(warp, const(4 // bands)), const(keys))


def _of_bands(ref: Ref, bands: int) -> Array:
    """(chunks, keys, 64) as (bands, keys of a band, columns), for plain meanings."""
    x = jnp.swapaxes(ref[...], 0, 1)
    return x.reshape(bands, x.shape[0] // bands, -1)


def _scores_plain(q: Fragment | Ref, k_ref: Ref, d: int, bands: int) -> Fragment:
    x = q[...]
    x = x.reshape(bands, ROWS // bands, -1) if x.ndim == 2 else jnp.swapaxes(x, 0, 1).reshape(1, ROWS // bands, -1)
    x, k = jnp.broadcast_to(x, (bands, *x.shape[1:]))[..., :d], _of_bands(k_ref, bands)[..., :d]
    s = jnp.einsum("brd,bkd->brk", x, k, preferred_element_type=jnp.float32)
    return s.reshape(ROWS, -1)


def _left_operand(q: mgpu.FragmentedArray | ir.Value, bands: int) -> Callable[[int], pieces.Words]:
    """A function from a column to 16 columns of the queries from there on."""
    if isinstance(q, mgpu.FragmentedArray):
        held = q
        return lambda column: pieces.words_of(held, column // K)
    load = pieces.pieces(q, True, pieces.own_rows(ROWS // bands))
    return lambda column: load(column // CHUNK, 0, column % CHUNK, False)


@interpreted_as(_scores_plain)
def scores(q: Fragment | Ref, k_ref: Ref, d: int, bands: int) -> Fragment:
    """Computes q k^T of each band: (64, keys of a band) float32.

    Args:
      q: the queries of all bands, (64, columns) in the layout TILE, or those of one, (chunks, 64 / bands, 64) in shared
        memory.
      k_ref: (chunks, keys, 64) in shared memory; a multiple of 16 keys for each band.
      d: the columns that count; up to a multiple of 16 the rest must be zero.
    """
    keys = k_ref.shape[1] // bands
    kind = TILE if len(q.shape) == 2 else plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(kind, plgpu.RefType()), return_type=pieces.returned((ROWS, keys), 1))
    def product(_: mgpu.LaunchContext, q: mgpu.FragmentedArray | ir.Value, k: ir.Value) -> list[mgpu.FragmentedArray]:
        acc, b_piece = pieces.zeros(keys), pieces.pieces(k, False, _first_key(keys, bands))
        a_piece = _left_operand(q, bands)
        for column in range(0, d, K):
            left, at = a_piece(column), divmod(column, CHUNK)
            for key in range(0, keys, 16):
                right = b_piece(at[0], key, at[1], False)
                pieces.multiply(acc[key // 8:key // 8 + 2], left, right, pieces.element_of(k))
        return [pieces.as_tile(acc)]

    (s,) = product(q, k_ref)
    return s


def _add_values_plain(acc: Fragment, p: Fragment, v_ref: Ref, bands: int) -> Fragment:
    p, v = p.reshape(bands, ROWS // bands, -1), _of_bands(v_ref, bands)[..., :acc.shape[1]]
    return acc + jnp.einsum("brk,bkd->brd", p, v, preferred_element_type=jnp.float32).reshape(ROWS, -1)


@interpreted_as(_add_values_plain)
def add_values(acc: Fragment, p: Fragment, v_ref: Ref, bands: int) -> Fragment:
    """Computes acc + p v of each band: (64, columns) float32.

    Args:
      acc: (64, columns) float32; columns a multiple of 8.
      p: (64, keys of a band) of v's type; a multiple of 16 keys.
      v_ref: (chunks, keys, 64) in shared memory.
    """
    (_, columns), keys = acc.shape, p.shape[1]

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, plgpu.RefType()), return_type=pieces.returned((ROWS, columns), 1))
    def product(_: mgpu.LaunchContext, acc: mgpu.FragmentedArray, p: mgpu.FragmentedArray,
                v: ir.Value) -> list[mgpu.FragmentedArray]:
        sums, piece = pieces.scalars(acc), pieces.pieces(v, True, _first_key(keys, bands))
        for key in range(0, keys, K):
            left = pieces.words_of(p, key // K)
            for column in range(0, columns, 16):
                right = piece(column // CHUNK, key, column % CHUNK, True)
                pieces.multiply(sums[column // 8:column // 8 + 2], left, right, pieces.element_of(v))
        return [pieces.as_tile(sums)]

    (made,) = product(acc, p, v_ref)
    return made
