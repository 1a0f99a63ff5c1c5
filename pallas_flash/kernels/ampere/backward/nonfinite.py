"""Keys and values that are not finite: 0 * NaN is NaN, also in a tensor core.

dP = dO V^T is wanted only where P is not 0, and dq = dS K sums over all keys of a tile, also over those that a query
does not attend to. So rows that are not finite are replaced by zeros in shared memory: where a block keeps keys when it
begins, where it walks over them in each tile that needs the mask. A query that attends to such a key has out or lse
that are not finite, and gets NaN from those (`backward.prepare.statistics`). There is one exception: a key with -inf
whose weight is 0. Nothing but its own dk and dv depends on it then: they become NaN.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_flash.kernels.ampere import copies, mma, registers, work
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.registers import Fragment, PerRow
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS
from pallas_flash.kernels.ampere.slow_rows import SlowRows, over_chunks
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref

__all__ = ["clean_rows", "mark_nonfinite", "without_bad_rows", "without_shared_bad_rows"]


def without_bad_rows(block: Block) -> Flag | None:
    """Overwrites rows of the warp's keys and values that are not finite with zeros.

    Returns whether there were such, or None where no tile needs the mask: then all that a query meets it attends to.
    """
    if not work.kv_work(block.spec, block.schedule).partial:
        return None
    return functools.reduce(jnp.logical_or, [clean_rows(block.own_rows(name)) for name in "kv"])


def without_shared_bad_rows(block: Block) -> Flag | None:
    """The same where two warpgroups share the keys: both have looked at them before one overwrites keys, the other
    values. A barrier of the block, and another one must come before they are read.
    """
    if not work.kv_work(block.spec, block.schedule).partial:
        return None
    places = [(owner, block.smem[name], first) for owner, name in enumerate("kv")
              for first in range(0, block.schedule.block_kv, ROWS)]
    marks = [_bad_rows(ref, first) for _, ref, first in places]
    flags = [ptx.any_in_warp(bad > 0, registers.ROW_LAYOUT) for bad in marks]
    copies.meet(block.team)
    for (owner, ref, first), bad, flag in zip(places, marks, flags, strict=True):
        pl.when(flag & (block.team.warpgroup == owner))(functools.partial(_overwrite, ref, first, bad))
    return functools.reduce(jnp.logical_or, flags)


def clean_rows(ref: Ref) -> Flag:
    """Overwrites rows of (chunks, rows, 64) in shared memory that are not finite with zeros, each warp its own; whether
    this warp has found such.
    """
    flags = []
    for first in range(0, ref.shape[1], ROWS):
        bad = _bad_rows(ref, first)
        flags.append(ptx.any_in_warp(bad > 0, registers.ROW_LAYOUT))
        pl.when(flags[-1])(functools.partial(_overwrite, ref, first, bad))
    return functools.reduce(jnp.logical_or, flags)


def _bad_rows(ref: Ref, first: int) -> PerRow:
    """1 for each of 64 rows of (chunks, rows, 64) in shared memory that is not finite, else 0."""
    marks = registers.row_zeros()
    for chunk in range(ref.shape[0]):
        x = mma.load_rows(ref, first, chunk).astype(jnp.float32)
        bad = jnp.where(jnp.abs(x) < jnp.inf, jnp.float32(0.0), jnp.float32(1.0))
        marks = jnp.maximum(marks, bad.max(axis=1))
    return marks


def _overwrite(ref: Ref, first: int, bad: PerRow) -> None:
    """Overwrites the marked ones of 64 rows with zeros."""
    for chunk in range(ref.shape[0]):
        x = mma.load_rows(ref, first, chunk).astype(jnp.float32)
        clean = jnp.where(registers.spread(bad, CHUNK) > 0, 0.0, x).astype(ref.dtype)
        mma.store_rows(clean, ref, first, chunk)


def mark_nonfinite(block: Block, row_tile: int, spoiled: Flag | None,
                   gradients: tuple[Fragment, ...]) -> tuple[Fragment, ...]:
    """Sets dk and dv to NaN for those of 64 keys that are not finite and that some query attends to."""
    if spoiled is None:
        return gradients
    spec, first = block.spec, ptx.scalar(block.first_key(row_tile))
    keys = SlowRows(spec, {"k": block.gmem["k"]}, (block.batch, block.head))

    def mark(position: Index, sums: tuple[Fragment, ...]) -> tuple[Fragment, ...]:
        add = lambda at, columns, bad: bad + 0.0 * keys.row("k", position, at * CHUNK, columns).sum(axis=1)
        bad = over_chunks(spec.d, add, registers.row_zeros())  # 0 or NaN, the same in all rows
        here = lambda x: registers.positions(x.shape[1], 0, first) == position
        return tuple(jnp.where(here(x) & (x != 0), x + registers.spread(bad, x.shape[1]), x) for x in sums)

    last = jnp.minimum(first + ROWS, spec.kv_len)
    marked = lambda sums: lax.fori_loop(first, ptx.scalar(last), mark, sums)
    found: tuple[Fragment, ...] = lax.cond(spoiled, marked, lambda sums: sums, gradients)
    return found
