"""What kernels read of a mask that holds arrays: made of these by a few XLA operations before the first launch, so that
other values compile nothing.

They are those of `mosaic.mask_ranges`: key_tiles of 64 queries in the forward, of a query tile in dq.

The forward's "key_tiles" have one row more, of zeros: its first number counts the tiles that blocks have taken
(`forward.counter`). There it costs no kernel of its own, and each call has another one.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_flash import masks
from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import mask_kernel, mask_ranges
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.mask_kernel import RangesOf
from pallas_flash.kernels.mosaic.mask_ranges import Ranges, key_tiles, names, per_position
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import TileRange

__all__ = ["backward", "forward", "launch", "make", "names", "types", "within_loaded"]


def make(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays of a pass, of the canonical mask that a spec stands for."""
    return (forward(spec, schedule, mask) if isinstance(schedule, ForwardSchedule) else
            backward(spec, schedule, mask))


def types(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a pass, as `make` returns them."""
    return mask_ranges.types(spec, functools.partial(make, spec, schedule))


def forward(spec: AttentionSpec, schedule: ForwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the forward kernel reads, of the canonical mask that a spec stands for."""
    count = work.q_tiles(spec, schedule) * schedule.warpgroups
    rows = per_position(spec, mask, names(mask, True), (schedule.block_q, schedule.block_kv))
    needed = key_tiles(spec, mask, (ROWS_PER_WARPGROUP, count), schedule.block_kv, rows.get("key_bits"))
    needed = _within_loaded(needed, schedule.warpgroups)
    return {"key_tiles": jnp.pad(jnp.stack(needed, axis=-1), ((0, 0), (0, 0), (0, 1), (0, 0))), **rows}


def backward(spec: AttentionSpec, schedule: BackwardSchedule, mask: masks.Mask) -> dict[str, Array]:
    """The arrays that the kernels of the backward read, of the canonical mask that a spec stands for."""
    kv, dq = schedule.kv, schedule.dq
    return mask_ranges.backward(spec, mask, schedule.padded_q_block, (kv.block_q, kv.block_kv),
                                None if dq is None else (dq.block_q, dq.block_kv))


def launch(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> Launch | None:
    """The launch that makes the arrays of a pass of `mask_kernel.fields`; None where XLA makes them."""
    if not schedule.mask_kernel:
        return None
    return mask_kernel.launch(spec, types(spec, schedule), _ranges(schedule))


def _ranges(schedule: ForwardSchedule | BackwardSchedule) -> tuple[RangesOf, ...]:
    if isinstance(schedule, ForwardSchedule):
        return (RangesOf("key_tiles", ROWS_PER_WARPGROUP, schedule.block_kv, schedule.warpgroups, within_loaded, 1),)
    kv, dq = schedule.kv, schedule.dq
    found = (RangesOf("query_tiles", kv.block_kv, kv.block_q),)
    return found if dq is None else (*found, RangesOf("key_tiles", dq.block_q, dq.block_kv))


def _within_loaded(needed: Ranges, warpgroups: int) -> Ranges:
    """See `within_loaded`, of all tiles at once, the last axis."""
    own = [TileRange(*(x[..., i::warpgroups] for x in needed)) for i in range(warpgroups)]
    lo, hi = (jnp.repeat(x, warpgroups, axis=-1) for x in _loaded(own))
    return _clipped(needed, lo, hi)


def within_loaded(needed: list[Ranges]) -> list[Ranges]:
    """The forward's ranges of the blocks of 64 rows of a query tile: each needs at least one key tile, so that rows
    without keys are written, too, and none but those that they need together, which the query tile loads.
    """
    lo, hi = _loaded(needed)
    return [_clipped(own, lo, hi) for own in needed]


def _loaded(needed: list[Ranges]) -> tuple[jax.Array, jax.Array]:
    """The tiles [lo, hi) that some need. Taken apart by hand: XLA gives each reduction a kernel of its own."""
    hi = functools.reduce(jnp.maximum, [jnp.where(x.stop > x.start, x.stop, 0) for x in needed])
    lo = functools.reduce(jnp.minimum, [jnp.where(x.stop > x.start, x.start, hi) for x in needed])
    return lo, jnp.maximum(hi, lo + 1)


def _clipped(needed: Ranges, lo: jax.Array, hi: jax.Array) -> Ranges:
    stop = jnp.clip(needed.stop, lo + 1, hi)
    return needed._replace(start=jnp.clip(needed.start, lo, stop - 1), stop=stop)
