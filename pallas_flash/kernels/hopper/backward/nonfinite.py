"""Keys and values that are not finite, in the kernels that keep a tile of them: 0 * NaN is NaN, also in a tensor core.

dP = dO V^T is wanted only where P is not 0, and dq = dS K sums over all keys of a tile, also over those that a query
does not attend to. So rows that are not finite are replaced by zeros in shared memory, when the block begins. A query
that attends to such a key has out or lse that are not finite, and gets NaN from those (`backward.prepare.statistics`).
There is one exception: a key with -inf whose weight is 0. Nothing but its own dk and dv depends on it then: they become
NaN.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import registers, work
from pallas_flash.kernels.hopper.backward.tiles import KeyBlock
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP
from pallas_flash.kernels.hopper.slow_rows import SlowRows, over_chunks
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref

__all__ = ["mark_nonfinite", "without_bad_rows"]


def without_bad_rows(block: KeyBlock, names: str, warpgroup: Index) -> Flag | None:
    """Overwrites rows that are not finite with zeros, among the warpgroup's 64 keys ("k" in names) and values ("v").

    Returns whether there were such, or None where no tile needs the mask. A barrier of the warpgroup.
    """
    if not work.kv_work(block.spec, block.schedule).partial:
        return None
    dtype, rows = block.spec.dtype, pl.ds(warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    refs = [block.smem[name].at[:, rows] for name in names]
    pieces = [registers.load_chunk(block.smem[name].at[chunk, rows]) for name, ref in zip(names, refs)
              for chunk in range(ref.shape[0])]
    nothing = functools.reduce(jnp.add, [x * jnp.zeros((), dtype) for x in pieces]).astype(jnp.float32)
    spoiled = ptx.any_nonfinite_in_warpgroup(nothing, registers.TILE)

    @pl.when(spoiled)
    def _() -> None:
        for ref in refs:
            _overwrite_bad_rows(ref, dtype)
        plgpu.commit_smem()

    return spoiled


def _overwrite_bad_rows(ref: Ref, dtype: np.dtype) -> None:
    """Overwrites rows of ref, (chunks, 64, 64) in shared memory, that are not finite with zeros."""
    piece = lambda chunk: ref.at[pl.ds(chunk, 1)]
    load = lambda chunk: registers.load_chunks(piece(chunk), 0, CHUNK, dtype).astype(jnp.float32)

    def mark(chunk: Index, _: int, marks: PerRow) -> PerRow:
        bad = jnp.where(jnp.abs(load(chunk)) < jnp.inf, jnp.float32(0.0), jnp.float32(1.0))
        return jnp.maximum(marks, bad.max(axis=1))

    bad = registers.spread(over_chunks(ref.shape[0] * CHUNK, mark, registers.row_zeros()), CHUNK) > 0

    @pl.loop(jnp.int32(0), jnp.int32(ref.shape[0]))
    def _(chunk: Array) -> None:
        registers.store_chunks(jnp.where(bad, 0.0, load(chunk)).astype(dtype), piece(chunk))


def mark_nonfinite(block: KeyBlock, warpgroup: Index, spoiled: Flag | None, dk: Fragment,
                   dv: Fragment) -> tuple[Fragment, Fragment]:
    """Sets dk and dv, in the layout TILE, to NaN for keys that are not finite and that some query attends to."""
    if spoiled is None:
        return dk, dv
    spec, first = block.spec, block.tile * block.schedule.block_kv + warpgroup * ROWS_PER_WARPGROUP
    keys = SlowRows(spec, {}, block.gmem, (block.batch, block.head))

    def mark(position: Array, sums: tuple[Fragment, Fragment]) -> tuple[Fragment, Fragment]:
        add = lambda at, columns, bad: bad + 0.0 * keys.row("k", position, at * CHUNK, columns).sum(axis=1)
        bad = over_chunks(spec.d, add, registers.row_zeros())  # 0 or NaN, the same in all rows
        here = lambda x: registers.positions(x.shape[1], 0, first) == position
        dk, dv = (jnp.where(here(x) & (x != 0), x + registers.spread(bad, x.shape[1]), x) for x in sums)
        return dk, dv

    last = jnp.minimum(first + ROWS_PER_WARPGROUP, spec.kv_len)
    marked = lambda sums: lax.fori_loop(ptx.scalar(first), ptx.scalar(last), mark, sums)
    dk, dv = lax.cond(spoiled, marked, lambda sums: sums, (dk, dv))
    return dk, dv
