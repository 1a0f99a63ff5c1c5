"""What kernels read of a mask that holds arrays: made of these by a few XLA operations before the first launch, so that
other values compile nothing.

They are those of `mosaic.mask_ranges`: key_tiles of 64 queries in the forward, of a query tile in dq.

The forward's "key_tiles" have one row more, of zeros: its first number counts the tiles that blocks have taken
(`forward.counter`). There it costs no kernel of its own, and each call has another one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic.mask_ranges import Ranges, key_tiles, names, of_groups, per_position, query_tiles
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
    needed = _within_loaded(needed, schedule.warpgroups)
    return {"key_tiles": jnp.pad(jnp.stack(needed, axis=-1), ((0, 0), (0, 0), (0, 1), (0, 0))), **rows}


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


def _within_loaded(needed: Ranges, warpgroups: int) -> Ranges:
    """The forward's ranges: blocks of 64 rows need at least one key tile, so that rows without keys are written, too,
    and none but those that the blocks of the same query tile need together, which it loads.
    """
    start, stop = ([x[..., i::warpgroups] for i in range(warpgroups)] for x in (needed.start, needed.stop))
    # Taken apart by hand: XLA gives each reduction a kernel of its own.
    hi = functools.reduce(jnp.maximum, [jnp.where(b > a, b, 0) for a, b in zip(start, stop)])
    lo = functools.reduce(jnp.minimum, [jnp.where(b > a, a, hi) for a, b in zip(start, stop)])
    lo, hi = (jnp.repeat(x, warpgroups, axis=-1) for x in (lo, jnp.maximum(hi, lo + 1)))
    own_stop = jnp.clip(needed.stop, lo + 1, hi)
    return needed._replace(start=jnp.clip(needed.start, lo, own_stop - 1), stop=own_stop)
