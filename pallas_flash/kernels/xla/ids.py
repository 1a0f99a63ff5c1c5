"""Segment ids that know their tiles: which tiles hold equal ids is asked of each tile's smallest and largest id."""

import dataclasses
import functools
import operator
from typing import ClassVar

import jax.numpy as jnp

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array, Int, Shaped
from pallas_flash.kernels.xla.schedule import Schedule

__all__ = ["with_tiles"]


def with_tiles(mask: masks.Mask, schedule: Schedule) -> masks.Mask:
    """The mask with bounds of segment ids that look at tiles, O(tiles) for each, where `SegmentIds` itself looks at all
    positions. Bounds may be asked of the tiles of the schedule only.
    """
    return functools.reduce(operator.and_, [
        _tiled(part, schedule) if isinstance(part, masks.SegmentIds) else part for part in mask.parts])


def _tiled(ids: masks.SegmentIds, schedule: Schedule) -> "_TiledIds":
    q_ids, kv_ids = jnp.asarray(ids.q_ids), jnp.asarray(ids.kv_ids)

    def extremes(own: Array, block: int) -> Array:
        return jnp.stack(tiles.id_extremes(own, block, tiles.cdiv(own.shape[-1], block)), axis=2)

    return _TiledIds(q_ids, kv_ids, extremes(q_ids, schedule.block_q), extremes(kv_ids, schedule.block_kv),
                     schedule.block_q, schedule.block_kv)


@dataclasses.dataclass(frozen=True)
class _TiledIds(masks.Mask):
    """`SegmentIds`, and `tiles.id_extremes` of the tiles of both sides, side by side: (.., .., 3, tiles) int32."""

    q_ids: Shaped
    kv_ids: Shaped
    q_tiles: Shaped
    kv_tiles: Shaped
    block_q: int
    block_kv: int
    position_axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "q_ids": ("q",), "kv_ids": ("kv",), "q_tiles": ("extremes", "tiles"), "kv_tiles": ("extremes", "tiles")}

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        return masks.SegmentIds(self.q_ids, self.kv_ids).keep(q_pos, kv_pos)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> masks.Bounds:
        own = jnp.asarray(self.q_tiles)[:, tiles.div(q_lo, self.block_q)]
        return _bounds(own, jnp.asarray(self.kv_tiles), self.block_kv)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> masks.Bounds:
        own = jnp.asarray(self.kv_tiles)[:, tiles.div(kv_lo, self.block_kv)]
        return _bounds(own, jnp.asarray(self.q_tiles), self.block_q)


def _bounds(own: Int[Array, "3"], others: Int[Array, "3 tiles"], block: int) -> masks.Bounds:
    """Bounds on the other side of a tile's positions, in whole tiles there; full ones count where they are one run."""
    (first, last, lowest), (other_first, other_last, other_lowest) = own, others
    tile, count = jnp.arange(others.shape[1], dtype=jnp.int32), others.shape[1]
    some = (first <= other_last) & (other_first <= last)
    full = (lowest == last) & (other_lowest == other_last) & (first == other_first) & some

    def hull(flags: Array) -> tuple[Array, Array]:
        return jnp.min(jnp.where(flags, tile, count)), jnp.max(jnp.where(flags, tile + 1, 0))

    (lo, hi), (full_lo, full_hi) = hull(some), hull(full)
    is_one_run = jnp.sum(full, dtype=jnp.int32) == full_hi - full_lo
    return masks.Bounds(lo * block, full_lo * block, jnp.where(is_one_run, full_hi * block, 0), hi * block)
