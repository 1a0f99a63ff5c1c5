"""Matrix products of operands in parts, as `wgmma` has those of 16-bit operands: three products in one sum and one
commit group. Each starts at zero: tensor cores truncate their sums, and a long one would lose digits (`forward`).
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_flash.kernels.hopper import wgmma
from pallas_flash.kernels.hopper.float32.parts import PRODUCTS
from pallas_flash.kernels.hopper.registers import ACC, CHUNKED, TILE, Fragment
from pallas_flash.kernels.mosaic import interpret
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["multiply", "multiply_transposed"]


def _parts_of(ref: Ref) -> tuple[Fragment, Fragment]:
    """hi and lo of a (2 chunks, rows, 64) buffer: (rows, columns) float32 each."""
    rows = jnp.swapaxes(ref[...], 0, 1).reshape(ref.shape[1], -1).astype(jnp.float32)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


def _multiply_transposed_plain(a_ref: Ref, b_ref: Ref, swapped: bool = False) -> Fragment:
    del swapped
    interpret.issue(a_ref, b_ref)
    a, b = _parts_of(a_ref), _parts_of(b_ref)
    return sum((jnp.dot(a[i], b[j].T, preferred_element_type=jnp.float32) for i, j in PRODUCTS), jnp.float32(0.0))


@interpreted_as(_multiply_transposed_plain)
def multiply_transposed(a_ref: Ref, b_ref: Ref, swapped: bool = False) -> Fragment:
    """Issues a b^T: (64, n) float32, in flight.

    Args:
      a_ref: (2 chunks, 64, 64) in shared memory: chunks of hi, then those of lo.
      b_ref: (2 chunks, n, 64) in shared memory.
      swapped: the order of products is that of b a^T, so that both are the same to the bit.
    """
    columns, n = b_ref.shape[0] // 2 * b_ref.shape[2], b_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),) * 2,
                       return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, ACC))
    def issue(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value) -> mgpu.FragmentedArray:
        pairs = [pair[::-1] if swapped else pair for pair in PRODUCTS]
        a_at, b_at = ([wgmma.descriptors(x, opaque=True) for _ in pairs] for x in (a, b))
        steps = [([a_at[n](i * columns + column)], b_at[n](j * columns + column))
                 for n, (i, j) in enumerate(pairs) for column in range(0, columns, wgmma.STEP)]
        return wgmma.issue_steps(steps, n, b, (0, 0))

    return issue(a_ref, b_ref)


def _multiply_plain(hi: Fragment, lo: Fragment, v_ref: Ref) -> Fragment:
    interpret.issue(v_ref)
    p, v = [x.astype(jnp.float32) for x in (hi, lo)], _parts_of(v_ref)
    return sum((jnp.dot(p[i], v[j], preferred_element_type=jnp.float32) for i, j in PRODUCTS), jnp.float32(0.0))


@interpreted_as(_multiply_plain)
def multiply(hi: Fragment, lo: Fragment, v_ref: Ref) -> Fragment:
    """Issues (hi + lo) v: (64, columns) float32, in flight.

    Args:
      hi, lo: (64, keys) float16 in the layout TILE; keys a multiple of 16.
      v_ref: (2 chunks, keys, 64) in shared memory, of which the columns of a part are 64 chunks.
    """
    keys, count = hi.shape[1], v_ref.shape[0] // 2
    columns = count * v_ref.shape[2]

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, ACC))
    def issue(_: mgpu.LaunchContext, hi: mgpu.FragmentedArray, lo: mgpu.FragmentedArray,
              v: ir.Value) -> mgpu.FragmentedArray:
        p, at = fa.optimization_barrier(hi, lo), wgmma.transposed_descriptors(v)
        steps = [(wgmma.words(p[i], key), at(j * count, key))
                 for i, j in PRODUCTS for key in range(0, keys, wgmma.STEP)]
        return wgmma.issue_steps(steps, columns, v, (0, 1))

    return issue(hi, lo, v_ref)
