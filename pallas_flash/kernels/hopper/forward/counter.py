"""How blocks of the forward kernel share out tiles where the mask holds arrays: each takes the next one when it is due.

What a tile costs is not known before the kernel runs, so there is no table. Tiles have an order (`work.tile_order`),
and a counter in global memory says how many have been taken. A warp of the loading warpgroup takes them: it counts,
reads which key tiles the query tile needs, and announces all that in shared memory, where the roles of the block read
it: a compute warpgroup, too, finds there which key tiles its own rows need.

    taken_full, taken_free    a tile has been announced / every role has read it, and its last keys are being loaded

A block takes its next tile late, when the last keys of this one are being loaded: a tile that waits in a block is one
that no other block can begin with. Two or three steps are left then, in which number, ranges and queries of the next
tile arrive.

The counter is the first number of the last row of "key_tiles" (`mask_arrays`). It is 0 before the kernel and after:
each block ends at a number that is no tile's, and the last of them takes it back to 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.forward.tiles import Block, Tile
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.head_mask import ArrayMask
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.tiles import TileRange

__all__ = ["for_each_taken", "take"]


class Taken(NamedTuple):
    """What a role is told of a tile: the numbers of the first row of "taken" in shared memory, and those of a compute
    warpgroup's own row.
    """

    pair: Array  # batch * q_heads + head; negative behind the last tile
    q_tile: Array
    lo: Array  # key tiles [lo, hi)
    hi: Array
    needed: TileRange[Index] | None  # by the rows of a compute warpgroup


def for_each_taken(block: Block, body: Callable[[Tile], None], warpgroup: Index | None,
                   is_last: bool = False) -> tuple[Index, Index]:
    """Runs `body` on every tile that `take` takes; returns how many tiles and steps there were.

    Args:
      warpgroup: the compute warpgroup, or None for a warp that loads.
      is_last: the block may take the next tile when `body` is done with this one, not when this role knows of it.
    """
    free = block.bars["taken_free"]

    def row(i: Index) -> tuple[Array, Array, Array, Array]:
        a, b, c, d = (block.smem["taken"][i, column] for column in range(4))
        return a, b, c, d

    def announced() -> Taken:
        plgpu.barrier_wait(block.bars["taken_full"])
        taken = Taken(*row(0), needed=None if warpgroup is None else TileRange(*row(1 + warpgroup)))
        if not is_last:
            plgpu.barrier_arrive(free)
        return taken

    def one(carry: tuple[Taken, Array, Array]) -> tuple[Taken, Array, Array]:
        taken, ordinal, step = carry
        batch, head = div(taken.pair, block.spec.q_heads), rem(taken.pair, block.spec.q_heads)
        mask = block.mask_of(batch, head)
        body(Tile(batch, head, taken.q_tile, taken.lo, taken.hi, ordinal, step, mask, needed=taken.needed))
        if is_last:
            plgpu.barrier_arrive(free)
        return announced(), ordinal + 1, ptx.opaque(step + (taken.hi - taken.lo))

    none = jnp.int32(0)
    _, count, steps = lax.while_loop(lambda carry: carry[0].pair >= 0, one, (announced(), none, none))
    if is_last:
        plgpu.barrier_arrive(free)  # the end of the tiles was announced, too
    return count, steps


def take(block: Block) -> None:
    """Runs the warp that takes tiles, until there are none."""
    def one(_: Array) -> Array:
        taken = next_tile(block)
        for i, row in enumerate(taken):
            for column, x in enumerate(row):
                block.smem["taken"][i, column] = x
        plgpu.barrier_arrive(block.bars["taken_full"])
        plgpu.barrier_wait(block.bars["taken_free"])
        return taken[0][0]

    lax.while_loop(lambda pair: pair >= 0, one, jnp.int32(0))


def next_tile(block: Block) -> list[list[Array]]:
    """Takes a tile, and returns what "taken" says of it."""
    spec, s = block.spec, block.schedule
    order = work.tile_order(spec, s)
    number = count_up(block.gmem["key_tiles"], order.blocks + work.forward_blocks(spec, s))
    pair, q_tile = order.head_and_tile(jnp.minimum(number, order.blocks - 1))
    batch, head = work.batch_and_head(spec, pair, spec.q_heads)
    mask = ArrayMask(block.gmem, batch, head)
    if work.shares_bias(spec):
        pair = jnp.asarray(batch * spec.q_heads + head)
    needed = [[ptx.scalar(x) for x in mask.tiles("key_tiles", q_tile * s.warpgroups + warpgroup)]
              for warpgroup in range(s.warpgroups)]
    start, _, _, stop = zip(*needed)
    lo, hi = functools.reduce(jnp.minimum, start), functools.reduce(jnp.maximum, stop)
    return [[jnp.where(number < order.blocks, pair, -1), q_tile, lo, hi], *needed]


def _count_up_plain(key_tiles: Ref, stop: int) -> Array:
    place = 0, 0, key_tiles.shape[2] - 1, 0
    number = key_tiles[place]
    key_tiles[place] = jnp.where(number == stop - 1, 0, number + 1)
    return number


@interpreted_as(_count_up_plain)
def count_up(key_tiles: Ref, stop: int) -> Array:
    """Counts this warp at the counter, which goes from stop - 1 back to 0. Returns what the counter was."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR))
    def count(_: mgpu.LaunchContext, ref: ir.Value, last: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        rows, columns = ir.MemRefType(ref.type).shape[2:]
        place = mgpu.utils.c((rows - 1) * columns, ptx.i32())
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], ptx.i32())
        found = llvm.inline_asm(ptx.i32(), [address, last.registers.item()], """
            { .reg .pred leads; .reg .b32 lane, before;
            mov.u32 lane, %laneid; setp.eq.u32 leads, lane, 0; mov.u32 before, 0;
            @leads atom.relaxed.gpu.global.inc.u32 before, [$1], $2;
            shfl.sync.idx.b32 $0, before, 0, 31, -1; }""",
            "=r,l,r,~{memory}", has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return count(key_tiles, ptx.scalar(stop - 1))
