"""How a block of the fused form that `rounds_dq` makes dq of the sums that it completes.

Additions to a query tile have an order, so a block knows to which query tiles its addition is the last. Once its
additions have arrived, its compute warpgroups read those sums, of which L2 still has most, and round them: no kernel
has to read all of them from memory again.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import memory, registers, tiles, work
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, KvSchedule, chunks
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["round_dq"]


def completed(block: Block[KvSchedule]) -> tuple[Array, Array]:
    """The query tiles [first, stop) of each head to which this block's addition is the last."""
    spec, s = block.spec, block.schedule
    mask = work.worst_case(spec, s)

    def look(q_tile: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        first, stop = found
        is_last = work.last_key_tile(mask, spec, s, q_tile) == block.tile
        return (jnp.where(is_last, jnp.minimum(first, q_tile), first), jnp.where(is_last, q_tile + 1, stop))

    none = jnp.int32(1 << 30), jnp.int32(0)
    first, stop = lax.fori_loop(ptx.scalar(block.walk.start), ptx.scalar(block.walk.stop), look, none)
    return first, jnp.maximum(stop, first)


def _load_piece_plain(sums: Ref, index: Index) -> Fragment:
    shape = sums.shape
    at: list[Index] = []
    rest = index
    for size in shape[3:0:-1]:
        at, rest = [rem(rest, size), *at], div(rest, size)
    return sums[rest, *at].reshape(CHUNK, CHUNK)


@interpreted_as(_load_piece_plain)
def load_piece(sums: Ref, index: Index) -> Fragment:
    """Loads a 64 x 64 piece of the sums in global memory in the layout TILE, 16 bytes a thread at a time.

    As PTX: of loads whose numbers are used in a branch LLVM would make loads of 4 bytes.

    Args:
      index: of the piece, of all of the sums'.
    """
    shape, layout = (CHUNK, CHUNK), registers.TILE

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout))
    def load(_: mgpu.LaunchContext, sums: ir.Value, index: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        f32, i64, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(64), ptx.i32()
        struct = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
        thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(ptx.WARPGROUP, i32))
        size = CHUNK * CHUNK
        first = arith.addi(arith.muli(arith.extui(i64, index.registers.item()), mgpu.utils.c(size, i64)),
                           arith.extui(i64, arith.muli(thread, mgpu.utils.c(4, i32))))
        pairs = []
        for i in range(size // (4 * ptx.WARPGROUP)):
            at = arith.addi(first, mgpu.utils.c(4 * ptx.WARPGROUP * i, i64))
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(sums), [at], f32)
            four = llvm.inline_asm(struct, [address], "ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];",
                                   "=f,=f,=f,=f,l", has_side_effects=True)
            numbers = [llvm.extractvalue(f32, four, [j]) for j in range(4)]
            pairs += [vector.from_elements(ir.VectorType.get((2,), f32), numbers[j:j + 2]) for j in (0, 2)]
        tile = layout.to_mgpu()
        found = np.array(pairs, dtype=object).reshape(tile.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=found, _layout=tile, _is_signed=None)

    return load(sums, ptx.scalar(index))


def round_dq(block: Block[KvSchedule], warpgroup: Index) -> None:
    """Writes dq of the query tiles whose sums this block completes.

    The warpgroups take 64 x 64 pieces in turn, as many at once as they have chunks of keys and values, through whose
    places in shared memory the pieces go: dk and dv, which are on their way from there, must have been started.
    """
    spec, s = block.spec, block.schedule
    pieces, columns, unit = memory.dq_pieces(spec, s), chunks(spec.d), spec.scale * dropout.factor(spec)
    first, stop = completed(block)
    count = (stop - first) * (block.walk.heads * pieces)
    rows = pl.ds(warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    buffers = [block.smem[name].at[pl.ds(chunk, 1), rows]
               for name, dim in (("k", spec.d), ("v", spec.d_v)) for chunk in range(chunks(dim))]

    def place(i: Index) -> tuple[Array, Array, Array]:
        tile, piece = div(i, pieces), rem(i, pieces)
        if block.walk.heads == 1:
            return ptx.scalar(block.walk.head), first + tile, piece
        each = jnp.maximum(stop - first, 1)
        return block.walk.head + lax.div(tile, each), first + lax.rem(tile, each), piece

    def load(i: Index) -> Fragment:
        head, tile, piece = place(jnp.minimum(i, count - 1))
        sums = block.gmem["dq"]
        index = functools.reduce(lambda i, j: i * j[1] + j[0],
                                 zip((head, tile, piece), sums.shape[1:4], strict=True), ptx.scalar(block.batch))
        return load_piece(sums, index)

    def store(i: Index, x: Fragment, buffer: Ref) -> None:
        head, tile, piece = place(i)
        row, column = div(piece, columns), rem(piece, columns)
        index = block.batch, head, tile * s.block_q + row * ROWS_PER_WARPGROUP, column
        tiles.store_tile(spec, x, buffer, block.gmem["dq_rounded"], index)

    plgpu.barrier_wait(block.bars["dq_added"])
    at_once = s.warpgroups * len(buffers)

    @pl.loop(jnp.int32(0), div(count + (at_once - 1), at_once))
    def _(n: Index) -> None:
        items = [n * at_once + i * s.warpgroups + warpgroup for i in range(len(buffers))]
        loaded = [(load(i) * unit).astype(spec.dtype) for i in items]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, x, buffer in zip(items, loaded, buffers, strict=True):
            pl.when(i < count)(functools.partial(store, i, x, buffer))
