"""Scores of bands (`mosaic.decode.rows`): each band of a product with a whole tile of keys has keys of its own.

wgmma multiplies all 64 rows with all keys of a tile. Of few queries every band of the rows holds all, and each has the
scores of its own keys out of the product: so each weight is computed once, not once for each of the rows that no query
has. Weights go back to where their keys are, beside zeros, and O += P V is a sum of a band's own keys.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.registers import TILE, Fragment, thread_in_tile
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = ["own", "placed"]


def _in_bands(x: Array, bands: int) -> Array:
    """(64, columns) as (bands, rows, bands, columns of a band)."""
    return x.reshape(bands, ROWS_PER_WARPGROUP // bands, bands, -1)


def _is_band(bands: int) -> list[ir.Value]:
    """Whether this warp is of each band."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    warp, _row, _quarter = thread_in_tile()
    band = arith.divui(warp, const(4 // bands))
    return [arith.cmpi(arith.CmpIPredicate.eq, band, const(i)) for i in range(bands)]


def _own_plain(x: Fragment, bands: int) -> Fragment:
    return jnp.concatenate([part[:, i] for i, part in enumerate(_in_bands(x, bands))])


@interpreted_as(_own_plain)
def own(x: Fragment, bands: int) -> Fragment:
    """The columns of each band: (64, columns) float32 in the layout TILE -> (64, columns / bands). Of the columns the
    first have those of the first band, and so on; a band has a multiple of 8.
    """
    if bands == 1:
        return x
    shape = (ROWS_PER_WARPGROUP, x.shape[1] // bands)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, TILE))
    def choose(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        flat, of = x.registers.reshape(bands, -1), _is_band(bands)
        pick = lambda values: functools.reduce(lambda a, b: arith.select(b[0], b[1], a), zip(of, values), values[0])
        found = [pick(list(values)) for values in flat.T]
        registers = np.array(found, dtype=object).reshape(TILE.to_mgpu().registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return choose(x)


def _placed_plain(x: Fragment, bands: int) -> Fragment:
    parts = x.reshape(bands, ROWS_PER_WARPGROUP // bands, -1)
    where = jnp.eye(bands, dtype=x.dtype)
    return (parts[:, :, None] * where[:, None, :, None]).reshape(ROWS_PER_WARPGROUP, -1)


@interpreted_as(_placed_plain)
def placed(x: Fragment, bands: int) -> Fragment:
    """Puts the columns of each band where they are among those of all: (64, columns of a band) of 16 bits in the layout
    TILE -> (64, columns), 0 elsewhere.
    """
    if bands == 1:
        return x
    shape = (ROWS_PER_WARPGROUP, x.shape[1] * bands)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, TILE))
    def spread_out(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        kind = ir.VectorType(x.registers.flat[0].type)
        zero = vector.broadcast(kind, mgpu.utils.c(0.0, kind.element_type))
        found = [arith.select(is_own, value, zero) for is_own in _is_band(bands) for value in x.registers.flat]
        registers = np.array(found, dtype=object).reshape(TILE.to_mgpu().registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return spread_out(x)
