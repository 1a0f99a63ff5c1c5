"""Matrix products of operands in parts, as `wgmma` has those of 16-bit operands, with sums as exact as float32's.

Tensor cores truncate: 16 products and what is there already are cut off a few bits below the largest one's, and their
sum is cut off to float32 (Khattak and Mikaitis, arXiv 2512.07004). Of numbers of one sign all these errors have one
direction, and a long sum loses some of itself each time. Here tensor cores add up 16 columns alone, the three products
of their parts, from zero; these sums are added in float32, which rounds to nearest (docs/notes/hopper_features.md).
"""

import functools

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_flash.kernels.hopper import registers, wgmma
from pallas_flash.kernels.hopper.float32.parts import PRODUCTS
from pallas_flash.kernels.hopper.registers import ACC, CHUNKED, TILE, Fragment, PerRow
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["add", "multiply_transposed"]

AT_ONCE = wgmma.STEP
"""Columns, or keys, that tensor cores add up: those of one instruction for each pair of parts."""


def _parts_of(ref: Ref) -> tuple[Fragment, Fragment]:
    """hi and lo of a (2 chunks, rows, 64) buffer: (rows, columns) float32 each."""
    rows = jnp.swapaxes(ref[...], 0, 1).reshape(ref.shape[1], -1).astype(jnp.float32)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


def _multiply_transposed_plain(a_ref: Ref, b_ref: Ref, swapped: bool = False, in_flight: int = 2) -> Fragment:
    del swapped, in_flight
    a, b = _parts_of(a_ref), _parts_of(b_ref)
    plgpu.commit_smem()  # see `wgmma.ready`
    return sum((jnp.dot(a[i], b[j].T, preferred_element_type=jnp.float32) for i, j in PRODUCTS), jnp.float32(0.0))


@interpreted_as(_multiply_transposed_plain)
def multiply_transposed(a_ref: Ref, b_ref: Ref, swapped: bool = False, in_flight: int = 2) -> Fragment:
    """Computes a b^T: (64, n) float32.

    Args:
      a_ref: (2 chunks, 64, 64) in shared memory: chunks of hi, then those of lo.
      b_ref: (2 chunks, n, 64) in shared memory.
      swapped: the order of products is that of b a^T, so that both are the same to the bit.
      in_flight: how many sums are in flight at a time, 1 or 2, 32 registers each. It does not change their order.
    """
    columns, n = b_ref.shape[0] // 2 * b_ref.shape[2], b_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),) * 2,
                       return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, ACC))
    def compute(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value) -> mgpu.FragmentedArray:
        pairs = [pair[::-1] if swapped else pair for pair in PRODUCTS]
        a_at, b_at = ([wgmma.descriptors(x, opaque=True) for _ in pairs] for x in (a, b))
        groups = [[([a_at[n](i * columns + column)], b_at[n](j * columns + column))
                   for n, (i, j) in enumerate(pairs) for column in range(first, first + AT_ONCE, wgmma.STEP)]
                  for first in range(0, columns, AT_ONCE)]
        return _sum_of(groups, n, b, in_flight)

    return plgpu.layout_cast(compute(a_ref, b_ref), TILE)


def _sum_of(groups: list[wgmma.Steps], columns: int, b: ir.Value, in_flight: int) -> mgpu.FragmentedArray:
    """The sum of those that tensor cores make, in order. Each is made in the registers of one that was added: ptxas
    would take others.
    """
    issue = functools.partial(wgmma.issue_steps, columns=columns, b=b, transposed=(0, 0))
    parts = [issue(group) for group in groups[:in_flight]]
    total, over = wgmma.awaited(parts.pop(0), in_flight - 1), None
    for group in groups[in_flight:]:
        parts.append(issue(group, over=over))
        over = wgmma.awaited(parts.pop(0), in_flight - 1)
        total = total + over
    return total + wgmma.awaited(parts.pop(0), 0) if parts else total


def _add_plain(acc: Fragment, alpha: PerRow, weights: tuple[Fragment, Fragment], v_ref: Ref) -> Fragment:
    p, v = [x.astype(jnp.float32) for x in weights], [x[:, :acc.shape[1]] for x in _parts_of(v_ref)]
    plgpu.commit_smem()
    parts = (jnp.dot(p[i], v[j], preferred_element_type=jnp.float32) for i, j in PRODUCTS)
    return acc * alpha[:, None] + sum(parts, jnp.float32(0.0))


@interpreted_as(_add_plain)
def add(acc: Fragment, alpha: PerRow, weights: tuple[Fragment, Fragment], v_ref: Ref) -> Fragment:
    """Computes acc alpha + (hi + lo) v: (64, columns) float32 in the layout TILE.

    Args:
      acc: (64, columns) float32 in the layout TILE; columns a multiple of 8.
      weights: hi and lo, (64, keys) float16 in the layout TILE; keys a multiple of 16.
      v_ref: (2 chunks, keys, 64) in shared memory, of which the columns of a part are 64 chunks.
    """
    keys, count, columns = weights[0].shape[1], v_ref.shape[0] // 2, acc.shape[1]

    @plgpu.inline_mgpu(arg_types=(TILE,) * 4 + (plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE))
    def compute(_: mgpu.LaunchContext, acc: mgpu.FragmentedArray, alpha: mgpu.FragmentedArray, hi: mgpu.FragmentedArray,
                lo: mgpu.FragmentedArray, v: ir.Value) -> mgpu.FragmentedArray:
        p, at = fa.optimization_barrier(hi, lo), wgmma.transposed_descriptors(v)
        part = None
        for first in range(0, keys, AT_ONCE):
            steps = [(wgmma.words(p[i], key), at(j * count, key))
                     for i, j in PRODUCTS for key in range(first, first + AT_ONCE, wgmma.STEP)]
            part = wgmma.awaited(wgmma.issue_steps(steps, columns, v, (0, 1), over=part), 0)
            acc = (acc if first else acc * alpha) + part.to_layout(acc.layout)
        return acc

    return compute(acc, registers.spread(alpha, columns), *weights, v_ref)
