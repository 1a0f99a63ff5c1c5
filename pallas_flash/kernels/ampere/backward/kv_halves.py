"""dk, dv and dq with mma.sync where two warpgroups share the keys of a block, so that what is loaded serves more rows:
32 a warp at d 128, whose dk and dv would not fit in its registers.

A tile of 64 queries is two halves. Warpgroup i makes P^T and dS^T of half i, for all keys, and keeps half i of the
columns of dk and dv, for all keys:

    S^T = K Q_i^T     P^T = exp2(S^T unit - lse)     dP^T = V dO_i^T - delta     dS^T = P^T * dP^T
    dv_i += P^T dO         dk_i += dS^T Q            of both halves of the queries

Its own P^T and dS^T go from registers to these products; the other warpgroup's come through shared memory, where dq
needs dS^T anyway. What its own half gives comes before the barrier, so that a warp that is early has something to do.
"""

import functools

from jax.experimental import pallas as pl

from pallas_flash.kernels.ampere import copies, mma, registers
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.backward.nonfinite import without_shared_bad_rows
from pallas_flash.kernels.ampere.backward.order import await_turn, count_previous
from pallas_flash.kernels.ampere.backward.statistics import Statistics
from pallas_flash.kernels.ampere.backward.sums import Sums, add_dq, finished, over_queries
from pallas_flash.kernels.ampere.backward.weights import (
    Part,
    dp_kept,
    drawn,
    kept,
    needs,
    statistic,
    weights_and_slopes,
)
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS, chunks
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.kernels.mosaic.walk import Step

__all__ = ["compute"]


def own_columns(block: Block, name: str, part: Part) -> Ref:
    """The warpgroup's columns of the queries ("q") or douts ("dout") of a part."""
    count = block.smem[name].shape[1] // 2
    rows = pl.ds(part.start, block.schedule.part_q)
    return block.smem[name].at[part.slot, pl.ds(block.team.warpgroup * count, count), rows]


def weights_of(block: Block, part: Part) -> tuple[list[Fragment], list[Fragment]]:
    """P^T and dS^T of the warpgroup's half of the queries, of each 64 keys; writes them to shared memory, too."""
    spec, s, half = block.spec, block.schedule, pl.ds(block.team.warpgroup, 1)
    q, dout = part.tiles(block)
    scores = mma.multiply_transposed(block.own_rows("k"), q, spec.d)
    start = [statistic(block, part, Statistics.DELTA)] * s.row_tiles
    dps = mma.multiply_transposed(block.own_rows("v"), dout, spec.d_v, start)
    ps, dss = [], []
    for i, (x, dp) in enumerate(zip(scores, dps, strict=True)):
        flags = drawn(block, part, i)
        p, ds = weights_and_slopes(block, part, i, x, dp_kept(block, part, flags, dp))
        p, ds = kept(flags, p).astype(spec.dtype), ds.astype(spec.dtype)
        mma.store_rows(p, block.smem["p"].at[half], i * ROWS, 0)
        mma.store_rows(ds, block.smem["ds"].at[half], i * ROWS, 0)
        ps.append(p)
        dss.append(ds)
    return ps, dss


def add(block: Block, part: Part, sums: Sums, ps: list[Fragment], dss: list[Fragment]) -> Sums:
    """Adds half of the queries to the warpgroup's columns."""
    return Sums(mma.accumulate(sums.dk, dss, own_columns(block, "q", part)),
                mma.accumulate(sums.dv, ps, own_columns(block, "dout", part)))


def other_weights(block: Block, name: str) -> list[Fragment]:
    """P^T ("p") or dS^T ("ds") of the other warpgroup's half, of each 64 keys."""
    ref = block.smem[name].at[pl.ds(1 - block.team.warpgroup, 1)]
    return [mma.load_rows(ref, i * ROWS, 0) for i in range(block.schedule.row_tiles)]


def one_step(block: Block, step: Step, sums: Sums) -> Sums:
    """Adds a query tile, which is on its way, and starts to load the next one."""
    s, slot, warpgroup = block.schedule, block.slot(step.ordinal), block.team.warpgroup
    copies.sync(block.team)
    count_previous(block, step)
    if s.num_stages > 1:
        block.load_next(step)
    flags = needs(block, step, slot)
    part = lambda half: Part(step, slot, half * s.part_q, flags)
    ps, dss = weights_of(block, part(warpgroup))
    sums = add(block, part(warpgroup), sums, ps, dss)
    await_turn(block, step)
    copies.meet(block.team)
    other: Index = 1 - warpgroup
    sums = add(block, part(other), sums, other_weights(block, "p"), other_weights(block, "ds"))
    if s.num_stages == 1:
        copies.meet(block.team)
        block.load_next(step)
    if s.dq is None:
        add_dq(block, step)
    return sums


def store(block: Block, sums: Sums, half: int) -> None:
    """Stores half of the columns of dk and dv."""
    for name, totals, width in (("dk", sums.dk, block.spec.d), ("dv", sums.dv, block.spec.d_v)):
        first = half * CHUNK * (chunks(width) // 2)
        for i, x in enumerate(totals):
            block.store(name, i, x[:, :min(x.shape[1], width - first)], first)


def compute(block: Block) -> None:
    """Runs a block."""
    spec, count = block.spec, block.schedule.row_tiles
    block.load_keys()
    block.load_first()
    copies.sync(block.team)
    spoiled = without_shared_bad_rows(block)

    zeros = lambda dim: (registers.zeros(CHUNK * (chunks(dim) // 2)),) * count
    sums = over_queries(block, functools.partial(one_step, block), Sums(zeros(spec.d), zeros(spec.d_v)))
    sums = Sums(*map(tuple, zip(*finished(block, sums, spoiled), strict=True)))
    for half in range(2):
        pl.when(block.team.warpgroup == half)(functools.partial(store, block, sums, half))
