"""dk, dv and dq with mma.sync, a block for each key tile (FlashAttention-2, Dao, 2023).

Each warpgroup keeps dk and dv of its keys in registers, 64 or 128 of them. The block walks the query tiles that the
mask needs (for each query head of the group), a part of a tile at a time:

    S^T = K Q^T        P^T = exp2(S^T unit - lse)     dv += P^T dO
    dP^T = V dO^T - delta     dS^T = P^T * dP^T       dk += dS^T Q

P^T and dS^T go from registers to the products for dv and dk. dq = dS K needs dS of all the block's keys: dS^T goes
through shared memory, where all warpgroups meet after each tile; each then makes some chunks of dq, four warps as
2 x 2, and adds them to float32 sums in global memory, in any order or in one (`backward.order`). Where another kernel
makes dq (`backward.dq`), all that is left out.

With two slots the next query tile is loaded while this one is used; with one, while dq is multiplied. Other roles of
two warpgroups: `kv_split`, `kv_halves`.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import tiles
from pallas_flash.kernels.ampere import copies, memory, mma, registers, work
from pallas_flash.kernels.ampere.backward import kv_halves, kv_split
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.backward.nonfinite import without_bad_rows
from pallas_flash.kernels.ampere.backward.order import await_turn, count_previous
from pallas_flash.kernels.ampere.backward.statistics import Statistics
from pallas_flash.kernels.ampere.backward.sums import Sums, add_dq, finished, over_queries
from pallas_flash.kernels.ampere.backward.weights import (
    Part,
    dp_kept,
    drawn,
    kept,
    needs,
    statistic,
    weights_and_slopes,
)
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.schedule import ROWS, BackwardSchedule
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.mosaic import bias, dropout, mask_ranges, ptx, score_function
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import Descending, Step, Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


def add_part(block: Block, part: Part, sums: Sums) -> Sums:
    """Adds a part of a query tile to dk and dv, and in the fused form writes its dS^T to shared memory."""
    spec, s, count = block.spec, block.schedule, block.schedule.row_tiles
    assert isinstance(part.start, int), "all warpgroups have the same queries"
    q, dout = part.tiles(block)
    scores = mma.multiply_transposed(block.own_rows("k"), q, spec.d)
    start = [statistic(block, part, Statistics.DELTA)] * count
    dps = mma.multiply_transposed(block.own_rows("v"), dout, spec.d_v, start)
    ps, dss = [], []
    for i, (x, dp) in enumerate(zip(scores, dps, strict=True)):
        flags = drawn(block, part, i)
        p, ds = weights_and_slopes(block, part, i, x, dp_kept(block, part, flags, dp))
        p, ds = kept(flags, p), ds.astype(spec.dtype)
        if s.dq is None:
            mma.store_rows(ds, block.smem["ds"].at[:, pl.ds(block.own, ROWS * count)], i * ROWS, 0, part.start)
        ps.append(p.astype(spec.dtype))
        dss.append(ds)
    return Sums(mma.accumulate(sums.dk, dss, q), mma.accumulate(sums.dv, ps, dout))


def add_tile(block: Block, step: Step, slot: Index, sums: Sums) -> Sums:
    """Adds a query tile to dk and dv, if the warpgroup's keys meet it, as all do where the mask holds arrays, and
    writes its dS^T to shared memory.
    """
    s = block.schedule

    def add(sums: Sums) -> Sums:
        flags = needs(block, step, slot)
        for start in range(0, s.block_q, s.part_q):
            sums = add_part(block, Part(step, slot, start, flags), sums)
        return sums

    def leave_out(sums: Sums) -> Sums:
        if s.dq is not None:
            return sums
        nothing = registers.zeros(s.block_q).astype(block.spec.dtype)
        for i in range(s.row_tiles):
            mma.store_rows(nothing, block.smem["ds"].at[:, pl.ds(block.own, ROWS * s.row_tiles)], i * ROWS, 0)
        return sums

    if s.warpgroups == 1 or block.spec.mask.has_arrays or not work.kv_work(block.spec, s).partial:
        return add(sums)
    own = work.own_q_range(block.spec, s, (block.first_key(0), block.first_key(s.row_tiles)))
    return lax.cond((step.tile >= own.start) & (step.tile < own.stop), add, leave_out, sums)


def one_step(block: Block, step: Step, sums: Sums) -> Sums:
    """Adds a query tile, which is on its way, to the sums, and starts to load the next one."""
    s, slot = block.schedule, block.slot(step.ordinal)
    copies.sync(block.team)
    count_previous(block, step)
    if s.num_stages > 1:
        block.load_next(step)
    sums = add_tile(block, step, slot, sums)
    await_turn(block, step)
    if s.dq is None or s.num_stages == 1:
        copies.meet(block.team)
    if s.num_stages == 1:
        block.load_next(step)
    if s.dq is None:
        add_dq(block, step)
    return sums


def compute(block: Block) -> None:
    """Runs a block."""
    spec, count = block.spec, block.schedule.row_tiles
    block.load_keys()
    block.load_first()
    copies.sync(block.team)
    spoiled = without_bad_rows(block)

    sums = Sums((registers.zeros(spec.d),) * count, (registers.zeros(spec.d_v),) * count)
    sums = over_queries(block, functools.partial(one_step, block), sums)
    for i, (dk, dv) in enumerate(finished(block, sums, spoiled)):
        block.store("dk", i, dk)
        block.store("dv", i, dv)


def mask_of(spec: AttentionSpec, s: BackwardSchedule, gmem: dict[str, Ref],
            index: tuple[Index, Index, Index]) -> tuple[HeadMask, tiles.TileRange[Index]]:
    """The mask of a block's heads (`of_head` is that of one), and the query tiles that they need.

    Args:
      index: (batch, key head, key tile).
    """
    batch, head, kv_tile = index
    if spec.mask.has_arrays:
        mask = ArrayMask(gmem, batch, head)
        return mask, mask.tiles("query_tiles", kv_tile)
    needed = work.q_range(spec, s, kv_tile)
    return StaticMask(work.mask_of(spec, s)), tiles.TileRange(*map(ptx.scalar, needed))


def launch(spec: AttentionSpec, schedule: BackwardSchedule) -> Launch:
    """The launch that makes dk and dv, and in the fused form adds to dq's float32 sums, of q, k, v, dout, what
    `backward.prepare` makes, dropout's keys, a score function's arrays, and what `mask_arrays` and `mosaic.bias` make.
    """
    updates = ("dq_sums",) * (schedule.dq is None) + ("additions",) * schedule.ordered
    inputs = ("q", "k", "v", "dout", "statistics", *dropout.input_types(spec), *score_function.input_types(spec),
              *mask_ranges.names(spec.mask, False), *bias.names(spec), *updates)
    shapes, blocks = spec.operand_shapes, work.kv_work(spec, schedule)
    names = *("stats" if name == "statistics" else name for name in inputs), "dk", "dv"
    outputs = {name: jax.ShapeDtypeStruct(shape, spec.result_dtype)
               for name, shape in (("dk", shapes.k), ("dv", shapes.v))}
    size = schedule.warpgroups

    def attention_backward_kv(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        pair, kv_tile = blocks.head_and_tile(lax.axis_index("block"))
        batch, head = div(pair, spec.kv_heads), rem(pair, spec.kv_heads)
        team = Team(size, lax.axis_index("warpgroup") if size > 1 else 0, bars.get("met"))
        gmem = dict(zip(names, arrays, strict=True))
        mask, needed = mask_of(spec, schedule, gmem, (batch, head, kv_tile))
        walk = (Descending if schedule.ordered else Walk)(head * spec.group, spec.group, *needed)
        run = kv_split.compute if schedule.split else kv_halves.compute if schedule.halves else compute
        run(Block(spec, schedule, gmem, smem, team, mask, batch, head, kv_tile, walk))

    build = functools.partial(
        plgpu.kernel, attention_backward_kv,
        scratch_types=allocate(memory.kv_buffers(spec, schedule), size), grid=(blocks.blocks,), grid_names=("block",),
        num_threads=size if size > 1 else None, thread_name="warpgroup" if size > 1 else None,
        compiler_params=copies.COMPILER)
    return Launch.of(build, inputs, outputs, updates)
