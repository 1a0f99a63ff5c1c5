"""What kernels read of a mask that holds arrays: made of these by a few XLA operations before the first launch, so that
other values compile nothing.

They are those of `mosaic.mask_ranges`: key_tiles of 64 queries in the forward, of a query tile in dq; and

    table        (blocks, slots, 3)  of the forward: a tile's number, and the key tiles [lo, hi) that it loads
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array, Int
from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic.mask_ranges import key_tiles, names, of_groups, per_position, query_tiles
from pallas_flash.spec import AttentionSpec

__all__ = ["backward", "forward", "names", "types"]

def types(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a pass, as `forward` and `backward` return them."""
    make: Any = forward if isinstance(schedule, ForwardSchedule) else backward
    given = jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype), spec.mask)
    found: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(functools.partial(make, spec, schedule), given)
    return found


def forward(spec: AttentionSpec, schedule: ForwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the forward kernel reads, of the canonical mask that a spec stands for."""
    count = work.q_tiles(spec, schedule) * schedule.warpgroups
    rows = per_position(spec, mask, names(mask, True), (schedule.block_q, schedule.block_kv))
    needed = key_tiles(spec, mask, (ROWS_PER_WARPGROUP, count), schedule.block_kv, rows.get("key_bits"))
    per_tile = (*needed.start.shape[:2], -1, schedule.warpgroups)
    start, stop = needed.start.reshape(per_tile), needed.stop.reshape(per_tile)
    lo, hi = _loaded(start, stop)
    stop = jnp.clip(stop, lo[..., None] + 1, hi[..., None])
    start = jnp.clip(start, lo[..., None], stop - 1)
    needed = needed._replace(start=start.reshape(needed.start.shape), stop=stop.reshape(needed.stop.shape))
    return {"table": _table(spec, schedule, lo, hi), "key_tiles": jnp.stack(needed, axis=-1), **rows}


def backward(spec: AttentionSpec, schedule: BackwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the kernels of the backward read, of the canonical mask that a spec stands for."""
    kv, dq, wanted, padded_kv = schedule.kv, schedule.dq, names(mask, False), schedule.kv.block_kv
    if dq is not None:
        wanted, padded_kv = wanted + names(mask, True), math.lcm(padded_kv, dq.block_kv)
    found = per_position(spec, mask, wanted, (schedule.padded_q_block, padded_kv))
    own = kv.block_kv, tiles.cdiv(spec.kv_len, kv.block_kv)
    needed = of_groups(spec, query_tiles(spec, mask, own, kv.block_q, found.get("query_bits")))
    found["query_tiles"] = jnp.stack(needed, axis=-1)
    if dq is not None:
        own = dq.block_q, tiles.cdiv(spec.q_len, dq.block_q)
        needed = key_tiles(spec, mask, own, dq.block_kv, found.get("key_bits"))
        found["key_tiles"] = jnp.stack(needed, axis=-1)
    return found


# -- the forward's table -----------------------------------------------------------------------------------------------

def _loaded(start: Array, stop: Array) -> tuple[Array, Array]:
    """The key tiles [lo, hi) that each query tile loads, at least one, of those that each of its blocks of 64 rows
    needs: (.., .., query tiles, blocks) -> (.., .., query tiles).
    """
    some = stop > start
    hi = jnp.where(some, stop, 0).max(axis=-1)
    lo = jnp.minimum(jnp.where(some, start, masks.UNBOUNDED).min(axis=-1), hi)
    return lo, jnp.maximum(hi, lo + 1)


def _table(spec: AttentionSpec, schedule: ForwardSchedule, lo: Array, hi: Array) -> Int[Array, "blocks slots 3"]:
    """`work.forward_table` with the key tiles that each tile loads: no role has to look them up by its number."""
    table = work.forward_table(spec, schedule)
    pair, q_tile = np.divmod(np.maximum(table, 0), work.q_tiles(spec, schedule))
    batch, head = np.divmod(pair, spec.q_heads)
    at = batch if lo.shape[0] > 1 else 0 * batch, head if lo.shape[1] > 1 else 0 * head, q_tile
    return jnp.stack([jnp.asarray(table), lo[at], hi[at]], axis=-1)
