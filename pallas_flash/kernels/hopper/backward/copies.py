"""Copies of q and dout in which queries that attend to nothing are zeros: whatever is in such a row would meet a weight
of 0 in the sums over queries, and 0 * NaN is NaN.

Sums over keys need none: there a row spoils itself alone, and `dq.repaired` makes it 0.

`backward.prepare` copies tiles that have such a query, and no others: most have none, also where a mask may leave some,
and two copies of everything are as many bytes as all else that it reads and writes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["COPIED", "copy_of", "is_copied", "names", "types", "with_source"]

COPIED = "copied"
"""(batch, q_heads, 64 queries) int32: whether their tile was copied, 1 or 0."""


def copy_of(name: str) -> str:
    """The copy of "q" or of "dout"."""
    return f"clean_{name}"


def names(spec: AttentionSpec) -> tuple[str, ...]:
    """What kernels read of it: nothing where each query attends to some key."""
    return (copy_of("q"), copy_of("dout"), COPIED) if work.may_have_idle_queries(spec) else ()


def types(spec: AttentionSpec, schedule: BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each of these arrays. What no tile was copied to is not written."""
    count = schedule.padded_q(spec) // ROWS_PER_WARPGROUP
    every = (jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.dtype), jax.ShapeDtypeStruct(spec.out_shape, spec.dtype),
             jax.ShapeDtypeStruct((spec.batch, spec.q_heads, count), jnp.int32))
    return dict(zip(names(spec), every, strict=False))


def is_copied(gmem: dict[str, Ref], index: tuple[Index, Index, Index]) -> Flag | None:
    """Whether a tile of queries was copied; None if none is. To be asked before a wait that hides how long it takes.

    Args:
      index: (batch, head, first row) of the tile.
    """
    if COPIED not in gmem:
        return None
    batch, head, first = index
    return gmem[COPIED][batch, head, div(first, ROWS_PER_WARPGROUP)] != 0


def with_source(gmem: dict[str, Ref], name: str, copied: Flag | None, use: Callable[[Ref], None]) -> None:
    """Runs use(array), with the array to load a tile of: the copy where the tile was copied.

    Args:
      name: that of the array; only "q" and "dout" are copied.
      copied: of the tile of queries, as `is_copied` found it.
    """
    copy = gmem.get(copy_of(name))
    if copy is None or copied is None:
        return use(gmem[name])
    return lax.cond(copied, lambda: use(copy), lambda: use(gmem[name]))
