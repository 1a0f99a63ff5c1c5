"""dk and dv on Hopper, a block for each key tile; and dq too in the fused form (FlashAttention-2, Dao, 2023).

Roles. Each compute warpgroup keeps dk and dv of 64 keys in registers, and walks the query tiles that the mask needs
(for each query head of the group): S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T * (dP^T - delta),
dV += P^T dO, dK += dS^T Q. P^T and dS^T go from registers to the product. One more warpgroup loads; in the fused form
its other warps add dq to global memory (`backward.ordered_dq`). If it `rounds_dq`, the compute warpgroups end with that
(`backward.round_dq`).

dq = dS K needs the dS of all the block's keys, so dS^T goes through shared memory. Its product is made by the compute
warpgroups, a 64 x 64 piece each, one step late (`dq="shared"`), or by a warpgroup of its own (`dq="own"`).

Barriers. A barrier is named for the state it announces: q_full, q_free, dout_full, dout_free for slots of the rings (if
pipelined or paired, q_full and q_free are for both); kv_full for the block's keys and values; ds_full, ds_free for
slots of dS; dq_full, dq_free for pieces of slots of dq; dq_added once all of the block's additions have arrived.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.backward import copies
from pallas_flash.kernels.hopper.backward.load import load
from pallas_flash.kernels.hopper.backward.nonfinite import mark_nonfinite, without_bad_rows
from pallas_flash.kernels.hopper.backward.ordered_dq import add_dq, hand_dq_over
from pallas_flash.kernels.hopper.backward.own_rows import own_rows, with_held_rows
from pallas_flash.kernels.hopper.backward.round_dq import round_dq
from pallas_flash.kernels.hopper.backward.tiles import Block, KeyBlock
from pallas_flash.kernels.hopper.backward.weights import (
    Weights,
    kept_of,
    lse_of,
    rounded,
    score_gradients,
    start_of_dp,
    tile_weights,
)
from pallas_flash.kernels.hopper.memory import Memory
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, KeySchedule, KvSchedule, chunks
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import bias, dropout, ptx, score_function
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import HeadAndTile, Step, Walk
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import TileRange

__all__ = ["block_of", "gradient_types", "inputs", "launch", "meet", "references", "scratch"]


def load_role(block: Block[KvSchedule]) -> None:
    """Runs the loading warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[-1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            load(block)

        if block.schedule.makes_dq:
            for slot in range(block.schedule.dq_slots):
                pl.when(warp == 1 + slot)(functools.partial(add_dq, block, slot))


# -- the compute warpgroups --------------------------------------------------------------------------------------------

type Sums = tuple[Fragment, Fragment]
"""dk and dv of a compute warpgroup, in the layout ACC."""


def issue_scores(block: Block[KvSchedule], warpgroup: Index, slot: Index) -> Fragment:
    """Issues K Q^T of a slot, whose query must have come."""
    return wgmma.multiply_transposed(own_rows(block, "k", warpgroup), block.smem["q"].at[slot], block.spec.d)


def issue_dp(block: Block[KvSchedule], warpgroup: Index, slot: Index, start: Fragment) -> Fragment:
    """Issues dP^T - delta of a slot."""
    if not block.schedule.together:
        plgpu.barrier_wait(block.bars["dout_full"].at[slot])
    values, douts = own_rows(block, "v", warpgroup), block.smem["dout"].at[slot]
    return wgmma.multiply_transposed(values, douts, block.spec.d_v, start)


def ds_rows(block: Block[KvSchedule], warpgroup: Index, ordinal: Index) -> Ref:
    """Selects where a warpgroup's 64 rows of dS^T go: (chunks of queries, 64, 64)."""
    rows = pl.ds(warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    return block.smem["ds"].at[rem(ordinal, block.schedule.ds_slots), :, rows]


def issue_dq(block: Block[KvSchedule], warpgroup: Index, ordinal: Index) -> Fragment:
    """Issues the warpgroup's piece of dq = dS K: some 64 queries, some 64 columns."""
    row, column = div(warpgroup, chunks(block.spec.d)), rem(ptx.opaque(warpgroup), chunks(block.spec.d))
    ds = block.smem["ds"].at[rem(ordinal, block.schedule.ds_slots), row]
    return wgmma.outer(ds, block.smem["k"].at[pl.ds(column, 1)], CHUNK)


def hand_ds_over(block: Block[KvSchedule], warpgroup: Index, ordinal: Index, ds: Fragment) -> None:
    """Hands dS^T to the warpgroup that multiplies it with the keys."""
    slots = block.schedule.ds_slots

    @pl.when(ordinal >= slots)
    def _() -> None:
        plgpu.barrier_wait(block.bars["ds_free"].at[rem(ordinal, slots)])

    registers.store_chunks(ds, ds_rows(block, warpgroup, ordinal))
    wgmma.fence()
    plgpu.barrier_arrive(block.bars["ds_full"].at[rem(ordinal, slots)])


def _meet_plain(block: KeyBlock) -> None:
    plgpu.barrier_arrive(block.bars["met"])
    plgpu.barrier_wait(block.bars["met"])


@interpreted_as(_meet_plain)
def meet(block: KeyBlock) -> None:
    """Waits until every compute warpgroup, and that of dq, has reached this point."""
    roles = meeting_roles(block.schedule)
    ptx.named_sync(ptx.first_free(roles + 1), roles * ptx.WARPGROUP)


def meeting_roles(s: KeySchedule) -> int:
    """Counts the warpgroups that meet: all but the loading one."""
    return s.warpgroups + len(s.registers) - 2


@interpreted_as(lambda s: {"met": plgpu.Barrier(num_arrivals=meeting_roles(s))})
def meeting_barriers(s: KeySchedule) -> dict[str, plgpu.Barrier]:
    """The barriers that `meet` needs: none on a GPU, where it takes a named one."""
    return {}


def weights_unpipelined(block: Block[KvSchedule], warpgroup: Index, step: Step) -> Weights:
    """Computes the weights of a step's tile; nothing is left in flight."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])
    lse, from_delta = lse_of(block, slot), start_of_dp(block, slot)
    s = issue_scores(block, warpgroup, slot)
    dp = issue_dp(block, warpgroup, slot, from_delta)
    p, slope = tile_weights(block, warpgroup, step, lse, wgmma.ready(s, 1))
    kept = kept_of(block, warpgroup, step)
    ds = score_gradients(block, step, slope, kept.dp(plgpu.layout_cast(wgmma.ready(dp, 0), registers.TILE)))
    return rounded(block, step, kept.weights(p), ds)


def step_unpipelined(block: Block[KvSchedule], warpgroup: Index, step: Step, dk: Fragment, dv: Fragment) -> Sums:
    """Runs one step, and leaves nothing in flight."""
    slot, bars = step.slot(block.schedule.num_stages), block.bars
    w = weights_unpipelined(block, warpgroup, step)
    if block.schedule.dq == "own":
        hand_ds_over(block, warpgroup, step.ordinal, w.ds)
    dv = wgmma.accumulate(dv, w.p, block.smem["dout"].at[slot])
    dk = wgmma.accumulate(dk, w.ds, block.smem["q"].at[slot])
    dv = wgmma.ready(dv, 1)
    plgpu.barrier_arrive(bars["dout_free"].at[slot])
    dk = wgmma.ready(dk, 0)
    plgpu.barrier_arrive(bars["q_free"].at[slot])
    return dk, dv


def gradients_unpipelined(block: Block[KvSchedule], warpgroup: Index) -> Sums:
    """Computes dk and dv of a compute warpgroup; each step ends with its products."""
    def step(i: Array, carry: tuple[HeadAndTile, Fragment, Fragment]) -> tuple[HeadAndTile, Fragment, Fragment]:
        at, dk, dv = carry
        dk, dv = step_unpipelined(block, warpgroup, Step(i, *at), dk, dv)
        return block.walk.next(*at), dk, dv

    start = block.walk.first, registers.zeros(block.spec.d), registers.zeros(block.spec.d_v)
    return lax.fori_loop(0, block.walk.steps, step, start)[1:]


def issue_late_dq(block: Block[KvSchedule], warpgroup: Index, ordinal: Index) -> Fragment:
    """Issues the warpgroup's piece of dq of an earlier step."""
    plgpu.barrier_wait(block.bars["ds_full"].at[rem(ordinal, block.schedule.ds_slots)])
    return issue_dq(block, warpgroup, ordinal)


def finish_late_dq(block: Block[KvSchedule], warpgroup: Index, ordinal: Index, dq: Fragment) -> None:
    """Frees the dS of that step, and hands its dq over."""
    plgpu.barrier_arrive(block.bars["ds_free"].at[rem(ordinal, block.schedule.ds_slots)])
    hand_dq_over(block, ordinal, warpgroup, dq)


def step_with_late_dq(block: Block[KvSchedule], warpgroup: Index, step: Step, late: bool, dk: Fragment,
                      dv: Fragment) -> Sums:
    """Runs one step; if `late`, also dq of the step before, whose dS the other warpgroups have written meanwhile."""
    bars, slot, before = block.bars, step.slot(block.schedule.num_stages), step.ordinal - 1
    w = weights_unpipelined(block, warpgroup, step)
    hand_ds_over(block, warpgroup, step.ordinal, w.ds)
    dv = wgmma.accumulate(dv, w.p, block.smem["dout"].at[slot])
    if late:
        dq = issue_late_dq(block, warpgroup, before)
    dk = wgmma.accumulate(dk, w.ds, block.smem["q"].at[slot])
    if not block.schedule.paired:
        dv = wgmma.ready(dv, 1 + late)
        plgpu.barrier_arrive(bars["dout_free"].at[slot])
    if late:
        finish_late_dq(block, warpgroup, before, wgmma.ready(dq, 1))
    if block.schedule.paired:
        dv = wgmma.ready(dv, 0)
    dk = wgmma.ready(dk, 0)
    plgpu.barrier_arrive(bars["q_free"].at[slot])
    return dk, dv


def gradients_with_late_dq(block: Block[KvSchedule], warpgroup: Index) -> Sums:
    """Computes dk and dv of a compute warpgroup; dq of each tile is multiplied one step later."""
    spec, walk, first = block.spec, block.walk, block.walk.first

    def run() -> Sums:
        sums = wgmma.settled(registers.zeros(spec.d)), wgmma.settled(registers.zeros(spec.d_v))
        sums = step_with_late_dq(block, warpgroup, Step(jnp.int32(0), *first), False, *sums)

        def step(i: Array, carry: tuple[HeadAndTile, Sums]) -> tuple[HeadAndTile, Sums]:
            at, sums = carry
            return walk.next(*at), step_with_late_dq(block, warpgroup, Step(i, *at), True, *sums)

        _, sums = lax.fori_loop(1, walk.steps, step, (walk.next(*first), sums))
        last = walk.steps - 1
        finish_late_dq(block, warpgroup, last, wgmma.ready(issue_late_dq(block, warpgroup, last), 0))
        return sums

    return _where_work(block, run)


def _where_work(block: Block[KvSchedule], run: Callable[[], Sums]) -> Sums:
    """Returns what `run` returns, or zeros where no query needs the key tile."""
    spec = block.spec
    nothing = lambda: (registers.zeros(spec.d), registers.zeros(spec.d_v))
    empty = work.kv_work(spec, block.schedule).empty
    return lax.cond(block.walk.steps > 0, run, nothing) if empty else run()


def multiply_weights(block: Block[KvSchedule], w: Weights, slot: Index, dk: Fragment, dv: Fragment) -> Sums:
    """Issues dk + dS^T Q and dv + P^T dO of a slot."""
    dv = wgmma.accumulate(dv, w.p, block.smem["dout"].at[slot])
    return wgmma.accumulate(dk, w.ds, block.smem["q"].at[slot]), dv


def free_slot(block: Block[KvSchedule], slot: Index) -> None:
    """Frees the query and the dout of a slot, which have their barrier in common."""
    plgpu.barrier_arrive(block.bars["q_free"].at[slot])


def step_pipelined(block: Block[KvSchedule], warpgroup: Index, step: Step, last: Weights | None,
                   sums: Sums) -> tuple[Weights, Sums]:
    """Computes the weights of a step's tile, while dk and dv of the tile before are multiplied.

    All products are issued at once and none is left in flight: over the loop's back edge ptxas loses count of them.
    """
    slots = block.schedule.num_stages
    slot, before = step.slot(slots), rem(step.ordinal + slots - 1, slots)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])
    lse, from_delta = lse_of(block, slot), start_of_dp(block, slot)
    s = issue_scores(block, warpgroup, slot)
    if last is not None:
        sums = multiply_weights(block, last, before, *sums)
    dp = issue_dp(block, warpgroup, slot, from_delta)
    p, slope = tile_weights(block, warpgroup, step, lse, wgmma.ready(s, 1 if last is None else 3))
    kept = kept_of(block, warpgroup, step)
    ds = score_gradients(block, step, slope, kept.dp(plgpu.layout_cast(wgmma.ready(dp, 0), registers.TILE)))
    if last is not None:
        free_slot(block, before)
    w = rounded(block, step, kept.weights(p), ds)
    if block.schedule.dq == "own":
        hand_ds_over(block, warpgroup, step.ordinal, w.ds)
    return w, sums


def gradients_pipelined(block: Block[KvSchedule], warpgroup: Index) -> Sums:
    """Computes dk and dv of a compute warpgroup; each tile's are multiplied during the next tile's softmax."""
    spec, walk, first = block.spec, block.walk, block.walk.first

    def run() -> Sums:
        sums = wgmma.settled(registers.zeros(spec.d)), wgmma.settled(registers.zeros(spec.d_v))
        w, sums = step_pipelined(block, warpgroup, Step(jnp.int32(0), *first), None, sums)

        def step(i: Array, carry: tuple[HeadAndTile, Weights, Sums]) -> tuple[HeadAndTile, Weights, Sums]:
            at, w, sums = carry
            return walk.next(*at), *step_pipelined(block, warpgroup, Step(i, *at), w, sums)

        _, w, sums = lax.fori_loop(1, walk.steps, step, (walk.next(*first), w, sums))
        slot = rem(walk.steps - 1, block.schedule.num_stages)
        dk, dv = multiply_weights(block, w, slot, *sums)
        dk, dv = wgmma.ready(dk, 0), wgmma.ready(dv, 0)
        free_slot(block, slot)
        return dk, dv

    return _where_work(block, run)


def compute_role(block: Block[KvSchedule], warpgroup: Index) -> None:
    """Runs a compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    if not (s.bias_ring or spec.dropout_rate):  # ptxas would spill 8 to 16 bytes
        block.mask.load_ahead(block.tile * s.block_kv + warpgroup * ROWS_PER_WARPGROUP)
    plgpu.barrier_wait(block.bars["kv_full"])
    spoiled = without_bad_rows(block, "kv" if s.makes_dq else "v", warpgroup)
    block = with_held_rows(block, warpgroup)
    alone = gradients_pipelined if s.pipelined else gradients_unpipelined
    gradients = gradients_with_late_dq if s.dq == "shared" else alone
    dk, dv = gradients(block, warpgroup)
    if s.makes_dq:
        tiles.see_last_phases(block.bars["ds_free"], s.ds_slots, block.walk.steps)
        meet(block)  # the others' last dq has been multiplied: keys may be written over
    index = block.batch, block.head, block.tile * s.block_kv + warpgroup * ROWS_PER_WARPGROUP, 0
    rows = pl.ds(warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    dk, dv = (plgpu.layout_cast(x, registers.TILE) for x in (dk, dv))
    if s.makes_dq:
        dk, dv = mark_nonfinite(block, warpgroup, spoiled, dk, dv)
    if spec.dropout_rate:
        dv = dv * dropout.factor(spec)
    for name, x in (("k", dk * (spec.scale * dropout.factor(spec))), ("v", dv)):
        tiles.store_result(spec, x, block.smem[name].at[:, rows], block.gmem[f"d{name}"], index)
    if s.rounds_dq:
        round_dq(block, warpgroup)
    plgpu.wait_smem_to_gmem(0)


def dq_role(block: Block[KvSchedule]) -> None:
    """Runs the warpgroup that makes dq of every step from the others' dS."""
    spec, s, bars = block.spec, block.schedule, block.bars
    plgpu.set_max_registers(s.registers[1], action="decrease")
    plgpu.barrier_wait(bars["kv_full"])
    pieces = memory.dq_pieces(spec, s)

    @pl.loop(0, block.walk.steps)
    def _(i: Index) -> None:
        slot = rem(i, s.ds_slots)
        plgpu.barrier_wait(bars["ds_full"].at[slot])
        for piece in range(pieces):
            row, column = divmod(piece, chunks(spec.d))
            keys = block.smem["k"].at[pl.ds(ptx.opaque(column), 1)]
            dq = wgmma.ready(wgmma.outer(block.smem["ds"].at[slot, row], keys, CHUNK), 0)
            if piece == pieces - 1:
                plgpu.barrier_arrive(bars["ds_free"].at[slot])
            hand_dq_over(block, i, piece, dq)

    meet(block)


# -- launch ------------------------------------------------------------------------------------------------------------

def scratch(own: Memory,
            s: KeySchedule) -> tuple[dict[str, pl.MemoryRef], dict[str, plgpu.Barrier | plgpu.ClusterBarrier]]:
    """The buffers and barriers of a block, and in interpret mode the barrier of `meet`."""
    smem, bars = allocate(own)
    return smem, bars | meeting_barriers(s)


def inputs(spec: AttentionSpec) -> tuple[str, ...]:
    """The arrays that every kernel reads that keeps keys."""
    return ("q", "k", "v", "dout", "statistics", *mask_arrays.names(spec.mask, of_keys=False),
            *bias.names(spec), *dropout.input_types(spec), *score_function.input_types(spec), *copies.names(spec))


def references(spec: AttentionSpec) -> tuple[str, ...]:
    """What the kernels call them."""
    return tuple("stats" if name == "statistics" else name for name in inputs(spec))


def gradient_types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What every kernel makes that keeps keys: dk and dv."""
    shapes = spec.operand_shapes
    return {name: jax.ShapeDtypeStruct(shape, spec.result_dtype)
            for name, shape in (("dk", shapes.k), ("dv", shapes.v))}


def mask_of(spec: AttentionSpec, s: KeySchedule, gmem: dict[str, Ref],
            index: tuple[Index, Index, Index]) -> tuple[HeadMask, TileRange[Index]]:
    """The mask of a block's heads (`of_head` is that of one), and the query tiles that they need.

    Args:
      index: (batch, key head, key tile).
    """
    batch, kv_head, kv_tile = index
    if spec.mask.has_arrays:
        mask = ArrayMask(gmem, batch, kv_head)
        return mask, mask.tiles("query_tiles", kv_tile)
    static = work.worst_case(spec, s)
    return StaticMask(static), work.q_range(static, spec, s, kv_tile)


def block_of[S: KeySchedule](spec: AttentionSpec, s: S,
                             refs: tuple[dict[str, Ref], dict[str, Ref], dict[str, Ref]]) -> Block[S]:
    """Finds which block runs, of a grid whose blocks keep keys.

    Args:
      refs: arrays in global memory, buffers in shared memory and barriers, by name.
    """
    head, kv_tile = work.kv_work(spec, s).head_and_tile(lax.axis_index("block"))
    batch, kv_head = work.batch_and_head(spec, head, spec.kv_heads)
    gmem, smem, bars = refs
    mask, q_tiles = mask_of(spec, s, gmem, (batch, kv_head, kv_tile))
    walk = Walk(kv_head * spec.group, spec.group, *q_tiles)
    return Block(spec, s, gmem, smem, bars, mask, batch, kv_head, kv_tile, walk)


def launch(spec: AttentionSpec, schedule: KvSchedule, merges: bool = False) -> Launch:
    """The launch that makes dk and dv of q, k, v, dout and the statistics that `backward.prepare` makes.

    If it `merges`, arrays of queries and keys are whole ones, "places" says where the part's rows lie, and dq's sums
    are those of several launches (`merging`); not if `ordered`, nor if the `first_writes`.

    In the fused form it updates one more array. Where blocks add to dq in any order, that is dq's float32 sums
    (`memory.dq_acc_shape`). If `ordered`, or the `first_writes`, it is the counts of additions, and the sums are made
    here; dq too, if it `rounds_dq`.
    """
    fused, counts = schedule.dq != "none", schedule.ordered or schedule.first_writes
    assert not (merges and counts)
    updates = ("additions",) * counts or ("dq_sums",) * fused
    outputs = gradient_types(spec)
    if counts:
        outputs["dq_sums"] = jax.ShapeDtypeStruct(memory.dq_acc_shape(spec, schedule), jnp.float32)
    if schedule.rounds_dq:
        outputs["dq"] = jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.result_dtype)

    def attention_backward_kv(*refs: *KernelArguments) -> None:
        last = ["additions"] * counts or ["dq"] * fused
        made = ["dk", "dv", *["dq"] * counts, *["dq_rounded"] * schedule.rounds_dq]
        names = [*references(spec), *["places"] * merges, *last, *made]
        *arrays, smem, bars = refs
        block = block_of(spec, schedule, (dict(zip(names, arrays, strict=True)), smem, bars))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute_role(block, warpgroup)

        if schedule.dq == "own":
            @pl.when(warpgroup == schedule.warpgroups)
            def _run_dq() -> None:
                dq_role(block)

        @pl.when(warpgroup == schedule.warpgroups + (schedule.dq == "own"))
        def _() -> None:
            load_role(block)

    build = functools.partial(
        plgpu.kernel, attention_backward_kv,
        scratch_types=scratch(memory.kv_memory(spec, schedule), schedule),
        grid=(work.kv_work(spec, schedule).blocks,), grid_names=("block",),
        num_threads=schedule.warpgroups + len(schedule.registers) - 1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch.of(build, (*inputs(spec), *["places"] * merges, *updates), outputs, updates)
