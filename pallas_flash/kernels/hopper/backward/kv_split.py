"""dk and dv of wide heads on Hopper: a block for each tile of 64 keys, one warpgroup for dv, another for dk.

The first makes S^T = K Q^T, P^T = exp(S^T - lse) and dV += P^T dO; the second dP^T = V dO^T,
dS^T = P^T * (dP^T - delta) and dK += dS^T Q. P^T goes from the first to the second through shared memory, as
float16(2^15 P): bfloat16's eight bits would add as much error to dK as the rounding of dS does. Times the derivative of
a score function it may be any number: then it goes as a sum of two bfloat16. A third warpgroup loads.

Barriers: kv_full; q_full, q_free, dout_full, dout_free for slots of the rings (each read by both warpgroups); p_full,
p_free for slots of P.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.backward import kv as kv
from pallas_flash.kernels.hopper.backward import weights as weights
from pallas_flash.kernels.hopper.backward.load import load
from pallas_flash.kernels.hopper.backward.nonfinite import without_bad_rows
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, SplitSchedule
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.traced import is_additive
from pallas_flash.kernels.mosaic.types import Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import HeadAndTile, Step
from pallas_flash.spec import AttentionSpec

__all__ = ["SHIFT", "launch"]

SHIFT = 15
"""P is kept times 2^15: at most 2^15, so float16 holds it, and down to 2^-29 with all its bits."""


def load_role(block: Block[SplitSchedule]) -> None:
    """Runs the loading warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[-1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        pl.when(warp == 0)(functools.partial(load, block))


def whole(block: Block[SplitSchedule], name: str) -> Ref:
    """Selects the block's keys or values, (chunks, 64, 64), so that their descriptors are made where they are used."""
    return block.smem[name].at[:, pl.ds(ptx.opaque(0) * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)]


def scores(block: Block[SplitSchedule], slot: Index) -> Fragment:
    """Issues K Q^T of a slot, whose query must have come."""
    return wgmma.multiply_transposed(whole(block, "k"), block.smem["q"].at[slot], block.spec.d)


def hand_p_over(block: Block[SplitSchedule], step: Step, p: Fragment) -> None:
    """Writes P^T of a step, times the slope of scores, to its slot."""
    slot = step.slot(block.schedule.p_slots)

    @pl.when(step.ordinal >= block.schedule.p_slots)
    def _() -> None:
        plgpu.barrier_wait(block.bars["p_free"].at[slot])

    if is_additive(block.spec.score):
        parts = p.astype(jnp.float16)
    else:
        high = p.astype(jnp.bfloat16)
        parts = registers.concatenate([high, (p - high.astype(jnp.float32)).astype(jnp.bfloat16)])
    registers.store_chunks(parts, block.smem["p"].at[slot])
    plgpu.barrier_arrive(block.bars["p_full"].at[slot])


def handed_over(block: Block[SplitSchedule], slot: Index) -> Fragment:
    """Loads what `hand_p_over` has written to a slot."""
    p = block.smem["p"]
    parts = [registers.load_chunk(p.at[slot, i]).astype(jnp.float32) for i in range(p.shape[1])]
    return functools.reduce(jnp.add, parts)


def free(block: Block[SplitSchedule], name: str, slot: Index) -> None:
    """Frees the query or the dout of a slot, as far as this warpgroup is concerned."""
    plgpu.barrier_arrive(block.bars[f"{name}_free"].at[slot])


def weights_of(block: Block[SplitSchedule], step: Step, lse: weights.Lse, s: Fragment) -> Fragment:
    """Computes P^T of a tile's scores in the input's type, and hands it over."""
    p, slope = weights.tile_weights(block, 0, step, lse, s, SHIFT)
    hand_p_over(block, step, slope)
    return weights.kept_of(block, 0, step).weights(p).astype(block.spec.dtype)


def take_ds(block: Block[SplitSchedule], step: Step, dp: Fragment) -> Fragment:
    """Computes dS^T of a tile in the input's type, from dP^T in flight and the P^T handed over; frees its dout."""
    slot = step.slot(block.schedule.p_slots)
    plgpu.barrier_wait(block.bars["p_full"].at[slot])
    p = handed_over(block, slot)
    kept = weights.kept_of(block, 0, step)
    dp = kept.dp(plgpu.layout_cast(wgmma.ready(dp, 0), registers.TILE))
    plgpu.barrier_arrive(block.bars["p_free"].at[slot])
    free(block, "dout", step.slot(block.schedule.num_stages))
    if block.spec.dtype == jnp.float16:
        dp = dp * 2.0**-SHIFT
    return weights.score_gradients(block, step, p, dp).astype(block.spec.dtype)


def dv_step(block: Block[SplitSchedule], step: Step, dv: Fragment) -> Fragment:
    """Adds a tile to dv: S^T, P^T, and dv + P^T dO."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])
    lse = weights.lse_of(block, slot)
    s = wgmma.ready(scores(block, slot), 0)
    free(block, "q", slot)
    p = weights_of(block, step, lse, s)
    plgpu.barrier_wait(block.bars["dout_full"].at[slot])
    dv = wgmma.ready(wgmma.accumulate(dv, p, block.smem["dout"].at[slot]), 0)
    free(block, "dout", slot)
    return dv


def dk_step(block: Block[SplitSchedule], step: Step, dk: Fragment) -> Fragment:
    """Adds a tile to dk: dP^T, dS^T, and dk + dS^T Q."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])  # the statistics come with the query
    start = weights.start_of_dp(block, slot)
    plgpu.barrier_wait(block.bars["dout_full"].at[slot])
    dp = wgmma.multiply_transposed(whole(block, "v"), block.smem["dout"].at[slot], block.spec.d_v, start)
    ds = take_ds(block, step, dp)
    dk = wgmma.ready(wgmma.accumulate(dk, ds, block.smem["q"].at[slot]), 0)
    free(block, "q", slot)
    return dk


def gradient(block: Block[SplitSchedule], warpgroup: int) -> Fragment:
    """Sums dv (warpgroup 0) or dk (1) over the walk's steps, in the layout TILE."""
    columns = (block.spec.d_v, block.spec.d)[warpgroup]
    one_step = (dv_step, dk_step)[warpgroup]

    def step(i: Array, carry: tuple[HeadAndTile, Fragment]) -> tuple[HeadAndTile, Fragment]:
        at, acc = carry
        return block.walk.next(*at), one_step(block, Step(i, *at), acc)

    start = block.walk.first, wgmma.settled(registers.zeros(columns))
    return plgpu.layout_cast(lax.fori_loop(0, block.walk.steps, step, start)[1], registers.TILE)


def compute_role(block: Block[SplitSchedule], warpgroup: int) -> None:
    """Runs the warpgroup of dv (0) or of dk (1)."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    plgpu.barrier_wait(block.bars["kv_full"])
    if warpgroup == 1:
        without_bad_rows(block, "v", 0)
    unshift = 2.0**-SHIFT
    dk_unit = spec.scale * (1 if spec.dtype == jnp.float16 else unshift)
    x = gradient(block, warpgroup) * ((unshift, dk_unit)[warpgroup] * dropout.factor(spec))
    if warpgroup == 0:
        tiles.see_last_phases(block.bars["p_free"], s.p_slots, block.walk.steps)
    kv.meet(block)  # keys and values may be written over
    name, index = "vk"[warpgroup], (block.batch, block.head, block.tile * s.block_kv, 0)
    tiles.store_result(spec, x, block.smem[name], block.gmem[f"d{name}"], index)
    plgpu.wait_smem_to_gmem(0)


def launch(spec: AttentionSpec, schedule: SplitSchedule) -> Launch:
    """The launch that makes dk and dv of q, k, v, dout and the statistics."""
    outputs = kv.gradient_types(spec)

    def attention_backward_split(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*kv.references(spec), "dk", "dv"), arrays, strict=True))
        block = kv.block_of(spec, schedule, (gmem, smem, bars))
        warpgroup = lax.axis_index("warpgroup")
        for i in range(2):
            pl.when(warpgroup == i)(functools.partial(compute_role, block, i))
        pl.when(warpgroup == 2)(functools.partial(load_role, block))

    build = functools.partial(
        plgpu.kernel, attention_backward_split,
        scratch_types=kv.scratch(memory.split_memory(spec, schedule), schedule),
        grid=(work.kv_work(spec, schedule).blocks,), grid_names=("block",), num_threads=3, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch.of(build, kv.inputs(spec), outputs)
