"""P^T of a tile in the kernels that keep keys: from K Q^T and the statistics that came with the queries."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward import products as grad_products
from pallas_flash.kernels.hopper.backward import tiles as grad_tiles
from pallas_flash.kernels.hopper.backward.tiles import Statistics
from pallas_flash.kernels.hopper.schedule import ROWS
from pallas_flash.kernels.hopper.scores import may_be_large
from pallas_flash.kernels.mosaic import ptx

__all__ = ["Lse", "lse_of", "start_of_dp", "tile_weights"]


class Lse(NamedTuple):
    """lse of a slot's queries."""

    log2: Any  # (block_q,)
    is_large: Any  # whether one is large (`scores`); None if none ever is


def lse_of(block: Any, slot: Any) -> Lse:
    """lse of a slot's queries, which must have come. Loaded before products are issued: what waits for them would wait
    for this, too (5 % in heads of 64).
    """
    stats = block.smem["stats"].at[slot, int(Statistics.LSE)]
    log2 = plgpu.load(stats, layout=products.COLUMNS)
    if not may_be_large(block.spec):
        return Lse(log2, None)
    marks = (grad_tiles.is_marked(plgpu.load(stats.at[pl.ds(i, 8)], layout=products.COLUMNS), products.COLUMNS)
             for i in range(0, block.schedule.block_q, ROWS))
    return Lse(log2, functools.reduce(jnp.logical_or, marks))


def start_of_dp(block: Any, slot: Any) -> Any:
    """-delta of a slot's queries, in every row of an accumulator."""
    stats = block.smem["stats"].at[slot, int(Statistics.DELTA)]
    return grad_products.spread_columns(plgpu.load(stats, layout=products.COLUMNS))


def without_rounding(block: Any, step: Any, y: Any) -> Any:
    """Exponents of a step, (64, block_q), exact. Some columns after the others: with all of them at once something
    would be spilled, also for tiles that never come here.
    """
    first = step.tile * block.schedule.block_q
    place = (block.batch, step.head, int(Statistics.ROUNDING))

    def part(column: int) -> Any:
        rounding = products.load_row(block.gmem["stats"], place, first + column, 8)
        return y[:, column:column + 8] + lax.broadcast_in_dim(rounding, (ROWS, 8), [1])

    return products.beside([part(column) for column in range(0, block.schedule.block_q, 8)])


def tile_weights(block: Any, warpgroup: Any, step: Any, lse: Lse, s: Any, shift: float = 0.0) -> tuple[Any, Any]:
    """P^T and what dP^T is multiplied with, from K Q^T; times 2^shift."""
    spec, schedule = block.spec, block.schedule
    first = step.tile * schedule.block_q, block.kv_tile * schedule.block_kv + warpgroup * ROWS
    corrections = grad_tiles.Corrections(
        block.walk.partial(step.tile) if schedules.kv_work(spec, schedule).partial else None,
        lse.is_large,
        functools.partial(grad_tiles.masked, mask=schedules.kv_mask(spec, schedule), first=first, keys_dim=0),
        functools.partial(without_rounding, block, step), schedule.apart)
    lse_log2 = lax.broadcast_in_dim(lse.log2, (ROWS, schedule.block_q), [1])
    p, slope = grad_tiles.weights(spec, plgpu.layout_cast(s, products.TILE), lse_log2, corrections, shift)
    if schedule.pinned:
        ptx.pin(functools.reduce(jnp.add, [p[:, i:i + 8] for i in range(0, schedule.block_q, 8)]), products.TILE)
    return p, slope
