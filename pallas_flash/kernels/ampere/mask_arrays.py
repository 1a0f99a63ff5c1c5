"""What the kernels read of a mask that holds arrays: made of these by a few XLA operations before the first launch, so
that other values compile nothing. They are those of `mosaic.mask_ranges`; key_tiles is of a query tile, and

    row_tiles    (.., .., rows, 4)  a `TileRange` of key tiles for 64 queries, where a query tile has more
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere.schedule import ROWS, BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import mask_ranges
from pallas_flash.spec import AttentionSpec

__all__ = ["backward", "forward", "forward_names", "make", "types"]


def forward_names(spec: AttentionSpec, schedule: ForwardSchedule) -> tuple[str, ...]:
    """The arrays that the forward reads; none if the mask holds no arrays."""
    found = mask_ranges.names(spec.mask, True)
    return (*found, *["row_tiles"] * (bool(found) and schedule.row_tiles > 1))


def make(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays of a pass, of the canonical mask that a spec stands for."""
    return (forward(spec, schedule, mask) if isinstance(schedule, ForwardSchedule) else
            backward(spec, schedule, mask))


def types(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a pass, as `make` returns them; none if the mask holds no arrays."""
    if not spec.mask.has_arrays:
        return {}
    given: Any = jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype), spec.mask)
    found: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(functools.partial(make, spec, schedule), given)
    return found


def forward(spec: AttentionSpec, schedule: ForwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the forward kernel reads."""
    wanted, count = forward_names(spec, schedule), tiles.cdiv(spec.q_len, schedule.block_q)
    found = mask_ranges.per_position(spec, mask, wanted, (schedule.block_q, schedule.block_kv))
    blocks = {"key_tiles": (schedule.block_q, count), "row_tiles": (ROWS, count * schedule.row_tiles)}
    for name in blocks.keys() & set(wanted):
        needed = mask_ranges.key_tiles(spec, mask, blocks[name], schedule.block_kv, found.get("key_bits"))
        found[name] = jnp.stack(needed, axis=-1)
    return found


def backward(spec: AttentionSpec, schedule: BackwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the kernels of the backward read."""
    wanted, dq, padded_kv = mask_ranges.names(mask, False), schedule.dq, schedule.block_kv
    if dq is not None:
        wanted, padded_kv = wanted + mask_ranges.names(mask, True), max(padded_kv, dq.block_kv)  # both powers of 2
    found = mask_ranges.per_position(spec, mask, wanted, (schedule.padded_q_block, padded_kv))
    own = schedule.block_kv, tiles.cdiv(spec.kv_len, schedule.block_kv)
    needed = mask_ranges.query_tiles(spec, mask, own, schedule.block_q, found.get("query_bits"))
    found["query_tiles"] = jnp.stack(mask_ranges.of_groups(spec, needed), axis=-1)
    if dq is not None:
        own = dq.block_q, tiles.cdiv(spec.q_len, dq.block_q)
        needed = mask_ranges.key_tiles(spec, mask, own, dq.block_kv, found.get("key_bits"))
        found["key_tiles"] = jnp.stack(needed, axis=-1)
    return found
