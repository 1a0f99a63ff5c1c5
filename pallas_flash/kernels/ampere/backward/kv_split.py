"""dk and dv with mma.sync where a warpgroup cannot keep both in registers: heads of up to 256.

A block has 64 keys and two warpgroups, which share tiles and walk over the query tiles together:

    of dv    S^T = K Q^T     P^T = exp2(S^T unit - lse)                                         dv += P^T dO
    of dk    S^T = K Q^T     P^T, as above    dP^T = V dO^T - delta    dS^T = P^T * dP^T        dk += dS^T Q

So S^T is made twice, and nothing goes from one to the other: they meet only where tiles are loaded. Another kernel
makes dq (`backward.dq`).
"""

from collections.abc import Callable

from jax.experimental import pallas as pl

from pallas_flash.kernels.ampere import copies, mma, registers
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.backward.nonfinite import mark_nonfinite, without_shared_bad_rows
from pallas_flash.kernels.ampere.backward.statistics import Statistics
from pallas_flash.kernels.ampere.backward.sums import over_queries
from pallas_flash.kernels.ampere.backward.weights import (
    Part,
    dp_kept,
    drawn,
    kept,
    needs,
    statistic,
    weights,
    weights_and_slopes,
)
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.walk import Step

__all__ = ["compute"]

type Role = Callable[[Block, Part, Fragment], Fragment]
"""Adds a part of a query tile to a gradient."""


def add_to_dv(block: Block, part: Part, dv: Fragment) -> Fragment:
    """Adds P^T dO of a part."""
    q, dout = part.tiles(block)
    (x,) = mma.multiply_transposed(block.smem["k"], q, block.spec.d)
    p = kept(drawn(block, part, 0), weights(block, part, 0, x))
    (dv,) = mma.accumulate([dv], [p.astype(block.spec.dtype)], dout)
    return dv


def add_to_dk(block: Block, part: Part, dk: Fragment) -> Fragment:
    """Adds dS^T Q of a part."""
    q, dout = part.tiles(block)
    (x,) = mma.multiply_transposed(block.smem["k"], q, block.spec.d)
    start = [statistic(block, part, Statistics.DELTA)]
    (dp,) = mma.multiply_transposed(block.smem["v"], dout, block.spec.d_v, start)
    dp = dp_kept(block, part, drawn(block, part, 0), dp)
    _, ds = weights_and_slopes(block, part, 0, x, dp)
    (dk,) = mma.accumulate([dk], [ds.astype(block.spec.dtype)], q)
    return dk


def one_step(block: Block, step: Step, role: Role, total: Fragment) -> Fragment:
    """Adds a query tile, which is on its way, and starts to load the next one."""
    s, slot = block.schedule, block.slot(step.ordinal)
    copies.sync(block.team)
    if s.num_stages > 1:
        block.load_next(step)
    flags = needs(block, step, slot)
    for start in range(0, s.block_q, s.part_q):
        total = role(block, Part(step, slot, start, flags), total)
    if s.num_stages == 1:
        copies.meet(block.team)
        block.load_next(step)
    return total


def total_of(block: Block, role: Role, columns: int) -> Fragment:
    """Runs over all query tiles; returns a gradient of the block's keys, (64, columns)."""
    def step(step: Step, total: Fragment) -> Fragment:
        return one_step(block, step, role, total)

    return over_queries(block, step, registers.zeros(columns))


def compute(block: Block) -> None:
    """Runs a block."""
    spec = block.spec
    block.load_keys()
    copies.sync(block.team)
    spoiled = without_shared_bad_rows(block)
    block.load_first()

    def run(name: str, role: Role, columns: int, unit: float) -> None:
        total = total_of(block, role, columns)
        (total,) = mark_nonfinite(block, 0, spoiled, (total * unit if unit != 1 else total,))
        block.store(name, 0, total)

    factor = dropout.factor(spec) if spec.dropout_rate else 1.0
    pl.when(block.team.warpgroup == 0)(lambda: run("dv", add_to_dv, spec.d_v, factor))
    pl.when(block.team.warpgroup == 1)(lambda: run("dk", add_to_dk, spec.d, spec.scale * factor))
