"""What the kernels read of a mask that holds arrays: made of these by a few XLA operations before the first launch, so
that other values compile nothing. They are those of `mosaic.mask_ranges`; key_tiles is of a query tile, and

    row_tiles    (.., .., rows, 4)  a `TileRange` of key tiles for 64 queries, where a query tile has more
"""

import functools

import jax
import jax.numpy as jnp

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere.schedule import ROWS, BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import mask_kernel, mask_ranges
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.mask_kernel import RangesOf
from pallas_flash.spec import AttentionSpec

__all__ = ["backward", "forward", "forward_names", "launch", "make", "types"]


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
    return mask_ranges.types(spec, functools.partial(make, spec, schedule))


def launch(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> Launch | None:
    """The launch that makes the arrays of a pass of `mask_kernel.fields`; None where XLA makes them."""
    if not schedule.mask_kernel:
        return None
    return mask_kernel.launch(spec, types(spec, schedule), _ranges(schedule))


def _ranges(s: ForwardSchedule | BackwardSchedule) -> tuple[RangesOf, ...]:
    if isinstance(s, ForwardSchedule):
        rows = (RangesOf("row_tiles", ROWS, s.block_kv),) * (s.row_tiles > 1)
        return RangesOf("key_tiles", s.block_q, s.block_kv), *rows
    found = (RangesOf("query_tiles", s.block_kv, s.block_q),)
    return found if s.dq is None else (*found, RangesOf("key_tiles", s.dq.block_q, s.dq.block_kv))


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
    dq = schedule.dq
    return mask_ranges.backward(spec, mask, schedule.padded_q_block, (schedule.block_q, schedule.block_kv),
                                None if dq is None else (dq.block_q, dq.block_kv))
