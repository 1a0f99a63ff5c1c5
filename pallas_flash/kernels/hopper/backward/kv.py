"""dk and dv on Hopper, a block for each key tile; and dq too in the fused form (FlashAttention-2, Dao, 2023).

Roles. Each compute warpgroup keeps dk and dv of 64 keys in registers, and walks the query tiles that the mask needs
(for each query head of the group): S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T * (dP^T - delta),
dV += P^T dO, dK += dS^T Q. P^T and dS^T go from registers to the product. One more warpgroup loads; in the fused form
its other warps add dq to global memory (`backward.ordered_dq`).

dq = dS K needs the dS of all the block's keys, so dS^T goes through shared memory. Its product is made by the compute
warpgroups, a 64 x 64 piece each, one step late (`dq="shared"`), or by a warpgroup of its own (`dq="own"`).

Barriers. A barrier is named for the state it announces: q_full, q_free, dout_full, dout_free for slots of the rings;
kv_full for the block's keys and values; ds_full, ds_free for slots of dS; dq_full, dq_free for pieces of slots of dq.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward import products as grad_products
from pallas_flash.kernels.hopper.backward import tiles as grad_tiles
from pallas_flash.kernels.hopper.backward.nonfinite import unknown, without_bad_rows
from pallas_flash.kernels.hopper.backward.ordered_dq import add_dq, hand_dq_over
from pallas_flash.kernels.hopper.backward.tiles import LOADED, Walk
from pallas_flash.kernels.hopper.backward.weights import lse_of, start_of_dp, tile_weights
from pallas_flash.kernels.hopper.backward_schedule import KvSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, chunks
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


class Block(NamedTuple):
    """What the roles of one block share."""

    spec: AttentionSpec
    schedule: Any  # KvSchedule, or the SplitSchedule of `kv_split`
    gmem: dict[str, Any]  # q, k, v, dout, stats, dq, turns, dk, dv
    smem: dict[str, Any]  # schedules.kv_buffers, stats, dq
    bars: dict[str, Any]
    batch: Any
    kv_head: Any
    kv_tile: Any
    walk: Walk


class Step(NamedTuple):
    """One query tile, for one query head."""

    index: Any  # how many steps came before it
    head: Any
    tile: Any

    def slot(self, slots: int) -> Any:
        return rem(self.index, slots)


# -- loading -----------------------------------------------------------------------------------------------------------

def load(block: Block) -> None:
    """Keys and values once; then queries with their statistics, and douts, as slots become free."""
    spec, s, gmem, smem, bars = block.spec, block.schedule, block.gmem, block.smem, block.bars
    keys = (block.batch, block.kv_head, block.kv_tile * s.block_kv)
    grad_tiles.load_tile(spec, gmem["k"], keys, smem["k"], bars["kv_full"])
    grad_tiles.load_tile(spec, gmem["v"], keys, smem["v"], bars["kv_full"])

    def step(i: Any, at: tuple[Any, Any]) -> tuple[Any, Any]:
        head, tile = at
        slot, place = rem(i, s.num_stages), (block.batch, head, tile * s.block_q)

        def load_next(name: str, stats: bool) -> None:
            full, free = bars[f"{name}_full"].at[slot], bars[f"{name}_free"].at[slot]

            @pl.when(i >= s.num_stages)
            def _() -> None:
                plgpu.barrier_wait(free)

            grad_tiles.load_tile(spec, gmem[name], place, smem[name].at[slot], full)
            if stats:
                source = gmem["stats"].at[block.batch, head, pl.ds(0, len(LOADED)), pl.ds(tile * s.block_q, s.block_q)]
                plgpu.copy_gmem_to_smem(source, smem["stats"].at[slot], full)

        load_next("q", True)
        load_next("dout", False)
        return block.walk.next(head, tile)

    lax.fori_loop(0, block.walk.steps, step, block.walk.first)
    for name in ("q_free", "dout_free"):
        grad_tiles.drain(bars[name], s.num_stages, block.walk.steps)


def load_role(block: Block) -> None:
    """The loading warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[-1], action="decrease")

    @plgpu.warp_map
    def _(warp: Any) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            load(block)

        if block.schedule.dq != "none":
            for slot in range(block.schedule.dq_slots):
                pl.when(warp == 1 + slot)(functools.partial(add_dq, block, slot))


# -- the compute warpgroups --------------------------------------------------------------------------------------------

def own_rows(block: Block, name: str, warpgroup: Any) -> Any:
    """A compute warpgroup's 64 rows of the keys or values, (chunks, 64, 64)."""
    index = ptx.opaque(warpgroup) if block.schedule.opaque else warpgroup
    return block.smem[name].at[:, pl.ds(index * ROWS, ROWS)]


def issue_scores(block: Block, warpgroup: Any, slot: Any) -> Any:
    """K Q^T of a slot, in flight."""
    return products.scores(own_rows(block, "k", warpgroup), block.smem["q"].at[slot], block.spec.d)


def issue_dp(block: Block, warpgroup: Any, slot: Any, start: Any) -> Any:
    """dP^T - delta of a slot, in flight."""
    plgpu.barrier_wait(block.bars["dout_full"].at[slot])
    return grad_products.scores(start, own_rows(block, "v", warpgroup), block.smem["dout"].at[slot], block.spec.d_v)


def ds_rows(block: Block, warpgroup: Any, step: Step) -> Any:
    """Where a warpgroup's 64 rows of dS^T go: (chunks of queries, 64, 64)."""
    return block.smem["ds"].at[step.slot(block.schedule.ds_slots), :, pl.ds(warpgroup * ROWS, ROWS)]


def issue_dq(block: Block, warpgroup: Any, step: Step) -> Any:
    """The warpgroup's piece of dq = dS K, in flight: some 64 queries, some 64 columns."""
    row, column = div(warpgroup, chunks(block.spec.d)), rem(ptx.opaque(warpgroup), chunks(block.spec.d))
    ds = block.smem["ds"].at[step.slot(block.schedule.ds_slots), row]
    return grad_products.outer(ds, block.smem["k"].at[pl.ds(column, 1)], CHUNK)


def hand_ds_over(block: Block, warpgroup: Any, step: Step, ds: Any) -> None:
    """dS^T to the warpgroup that multiplies it with the keys."""
    slots = block.schedule.ds_slots

    @pl.when(step.index >= slots)
    def _() -> None:
        plgpu.barrier_wait(block.bars["ds_free"].at[step.slot(slots)])

    products.store_chunks(ds, ds_rows(block, warpgroup, step))
    grad_products.fence()
    plgpu.barrier_arrive(block.bars["ds_full"].at[step.slot(slots)])


def _meet_plain(block: Block) -> None:
    plgpu.barrier_arrive(block.bars["met"])
    plgpu.barrier_wait(block.bars["met"])


@interpreted_as(_meet_plain)
def meet(block: Block) -> None:
    """Waits until every compute warpgroup, and that of dq, has come here."""
    roles = meeting_roles(block.schedule)
    ptx.named_sync(ptx.first_free(roles + 1), roles * ptx.WARPGROUP)


def meeting_roles(s: Any) -> int:
    """The warpgroups that meet: all but the loading one."""
    return s.warpgroups + len(s.registers) - 2


@interpreted_as(lambda s: {"met": plgpu.Barrier(num_arrivals=meeting_roles(s))})
def meeting_barriers(s: Any) -> dict[str, Any]:
    """The barriers that `meet` needs: none on a GPU, where it takes a named one."""
    return {}


class Weights(NamedTuple):
    """P^T and dS^T of a tile, in the input's type, not yet multiplied with its dout and its query."""

    p: Any
    ds: Any


def weights_in_turn(block: Block, warpgroup: Any, step: Step) -> Weights:
    """The weights of a step's tile; nothing is left in flight."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])
    lse, from_delta = lse_of(block, slot), start_of_dp(block, slot)
    s = issue_scores(block, warpgroup, slot)
    dp = issue_dp(block, warpgroup, slot, from_delta)
    p, slope = tile_weights(block, warpgroup, step, lse, products.ready(s, 1))
    ds = slope * plgpu.layout_cast(products.ready(dp, 0), products.TILE)
    return Weights(p.astype(block.spec.dtype), ds.astype(block.spec.dtype))


def step_in_turn(block: Block, warpgroup: Any, step: Step, dk: Any, dv: Any) -> tuple[Any, Any]:
    """One step that leaves nothing in flight."""
    slot, bars = step.slot(block.schedule.num_stages), block.bars
    w = weights_in_turn(block, warpgroup, step)
    if block.schedule.dq == "own":
        hand_ds_over(block, warpgroup, step, w.ds)
    dv = products.accumulate(dv, w.p, block.smem["dout"].at[slot])
    dk = products.accumulate(dk, w.ds, block.smem["q"].at[slot])
    dv = products.ready(dv, 1)
    plgpu.barrier_arrive(bars["dout_free"].at[slot])
    dk = products.ready(dk, 0)
    plgpu.barrier_arrive(bars["q_free"].at[slot])
    return dk, dv


def gradients_in_turn(block: Block, warpgroup: Any) -> tuple[Any, Any]:
    """dk and dv of a compute warpgroup."""
    def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        at, dk, dv = carry
        dk, dv = step_in_turn(block, warpgroup, Step(i, *at), dk, dv)
        return block.walk.next(*at), dk, dv

    start = block.walk.first, products.zeros(block.spec.d), products.zeros(block.spec.d_v)
    return lax.fori_loop(0, block.walk.steps, step, start)[1:]


def issue_late_dq(block: Block, warpgroup: Any, step: Step) -> Any:
    """The warpgroup's piece of dq of an earlier step, in flight."""
    plgpu.barrier_wait(block.bars["ds_full"].at[step.slot(block.schedule.ds_slots)])
    return issue_dq(block, warpgroup, step)


def finish_late_dq(block: Block, warpgroup: Any, step: Step, dq: Any) -> None:
    plgpu.barrier_arrive(block.bars["ds_free"].at[step.slot(block.schedule.ds_slots)])
    hand_dq_over(block, step.index, warpgroup, dq)


def step_with_late_dq(block: Block, warpgroup: Any, step: Step, late: bool, dk: Any, dv: Any) -> tuple[Any, Any]:
    """One step, and dq of the step before (`late`), whose dS the other warpgroups wrote long ago: nobody waits."""
    bars, slot, before = block.bars, step.slot(block.schedule.num_stages), Step(step.index - 1, None, None)
    w = weights_in_turn(block, warpgroup, step)
    hand_ds_over(block, warpgroup, step, w.ds)
    dv = products.accumulate(dv, w.p, block.smem["dout"].at[slot])
    if late:
        dq = issue_late_dq(block, warpgroup, before)
    dk = products.accumulate(dk, w.ds, block.smem["q"].at[slot])
    dv = products.ready(dv, 1 + late)
    plgpu.barrier_arrive(bars["dout_free"].at[slot])
    if late:
        finish_late_dq(block, warpgroup, before, products.ready(dq, 1))
    dk = products.ready(dk, 0)
    plgpu.barrier_arrive(bars["q_free"].at[slot])
    return dk, dv


def gradients_with_late_dq(block: Block, warpgroup: Any) -> tuple[Any, Any]:
    """dk and dv of a compute warpgroup; dq of each tile is multiplied one step later."""
    spec, walk, first = block.spec, block.walk, block.walk.first

    def run() -> tuple[Any, Any]:
        sums = grad_products.zeros(spec.d), grad_products.zeros(spec.d_v)
        sums = step_with_late_dq(block, warpgroup, Step(jnp.int32(0), *first), False, *sums)

        def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            at, sums = carry
            return walk.next(*at), step_with_late_dq(block, warpgroup, Step(i, *at), True, *sums)

        _, sums = lax.fori_loop(1, walk.steps, step, (walk.next(*first), sums))
        last = Step(walk.steps - 1, None, None)
        finish_late_dq(block, warpgroup, last, products.ready(issue_late_dq(block, warpgroup, last), 0))
        return sums

    return _where_work(block, run)


def _where_work(block: Block, run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What `run` returns, or zeros for key tiles that no query needs, if there are such."""
    spec = block.spec
    nothing = lambda: (products.zeros(spec.d), products.zeros(spec.d_v))
    empty = schedules.kv_work(spec, block.schedule).empty
    return lax.cond(block.walk.steps > 0, run, nothing) if empty else run()


def multiply_weights(block: Block, w: Weights, slot: Any, dk: Any, dv: Any) -> tuple[Any, Any]:
    """Issues dk + dS^T Q and dv + P^T dO of a slot."""
    dv = products.accumulate(dv, w.p, block.smem["dout"].at[slot])
    return products.accumulate(dk, w.ds, block.smem["q"].at[slot]), dv


def free_slot(block: Block, slot: Any) -> None:
    plgpu.barrier_arrive(block.bars["dout_free"].at[slot])
    plgpu.barrier_arrive(block.bars["q_free"].at[slot])


def step_behind(block: Block, warpgroup: Any, step: Step, last: Weights | None,
                sums: tuple[Any, Any]) -> tuple[Weights, tuple[Any, Any]]:
    """One step: the weights of its tile, while dk and dv of the tile before are multiplied.

    All products are issued at once and none is left in flight: over the loop's back edge ptxas loses count of them.
    """
    spec, slots = block.spec, block.schedule.num_stages
    slot, before = step.slot(slots), rem(step.index + slots - 1, slots)
    plgpu.barrier_wait(block.bars["q_full"].at[slot])
    lse, from_delta = lse_of(block, slot), start_of_dp(block, slot)
    s = issue_scores(block, warpgroup, slot)
    if last is not None:
        sums = multiply_weights(block, last, before, *sums)
    dp = issue_dp(block, warpgroup, slot, from_delta)
    p, slope = tile_weights(block, warpgroup, step, lse, products.ready(s, 1 if last is None else 3))
    ds = slope * plgpu.layout_cast(products.ready(dp, 0), products.TILE)
    if last is not None:
        free_slot(block, before)
    w = Weights(p.astype(spec.dtype), ds.astype(spec.dtype))
    if block.schedule.dq == "own":
        hand_ds_over(block, warpgroup, step, w.ds)
    return w, sums


def gradients_behind(block: Block, warpgroup: Any) -> tuple[Any, Any]:
    """dk and dv of a compute warpgroup, each tile's multiplied during the next tile's softmax."""
    spec, walk, first = block.spec, block.walk, block.walk.first

    def run() -> tuple[Any, Any]:
        sums = grad_products.zeros(spec.d), grad_products.zeros(spec.d_v)
        w, sums = step_behind(block, warpgroup, Step(jnp.int32(0), *first), None, sums)

        def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            at, w, sums = carry
            return walk.next(*at), *step_behind(block, warpgroup, Step(i, *at), w, sums)

        _, w, sums = lax.fori_loop(1, walk.steps, step, (walk.next(*first), w, sums))
        slot = rem(walk.steps - 1, block.schedule.num_stages)
        dk, dv = multiply_weights(block, w, slot, *sums)
        dk, dv = products.ready(dk, 0), products.ready(dv, 0)
        free_slot(block, slot)
        return dk, dv

    return _where_work(block, run)


def compute_role(block: Block, warpgroup: Any) -> None:
    """A compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    plgpu.barrier_wait(block.bars["kv_full"])
    spoiled = without_bad_rows(block, "v" if s.dq == "none" else "kv", warpgroup)
    in_order = {"in turn": gradients_in_turn, "behind": gradients_behind}[s.order]
    gradients = gradients_with_late_dq if s.dq == "shared" else in_order
    dk, dv = gradients(block, warpgroup)
    if s.dq != "none":
        grad_tiles.drain(block.bars["ds_free"], s.ds_slots, block.walk.steps)
        meet(block)  # the others' last dq has been multiplied: keys may be written over
    place = (block.batch, block.kv_head, block.kv_tile * s.block_kv + warpgroup * ROWS)
    rows = pl.ds(warpgroup * ROWS, ROWS)
    dk, dv = (plgpu.layout_cast(x, products.TILE) for x in (dk, dv))
    if s.dq != "none":
        dk, dv = unknown(block, warpgroup, spoiled, dk, dv)
    for name, x in (("k", dk * spec.scale), ("v", dv)):
        grad_tiles.store_tile(spec, x.astype(spec.dtype), block.smem[name].at[:, rows], block.gmem[f"d{name}"], place)
    plgpu.wait_smem_to_gmem(0)


def dq_role(block: Block) -> None:
    """The warpgroup that makes dq of every step from the others' dS."""
    spec, s, bars = block.spec, block.schedule, block.bars
    plgpu.set_max_registers(s.registers[1], action="decrease")
    plgpu.barrier_wait(bars["kv_full"])
    pieces = schedules.dq_pieces(spec, s)

    @pl.loop(0, block.walk.steps)
    def _(i: Any) -> None:
        slot = rem(i, s.ds_slots)
        plgpu.barrier_wait(bars["ds_full"].at[slot])
        for piece in range(pieces):
            row, column = divmod(piece, chunks(spec.d))
            keys = block.smem["k"].at[pl.ds(ptx.opaque(column), 1)]
            dq = products.ready(grad_products.outer(block.smem["ds"].at[slot, row], keys, CHUNK), 0)
            if piece == pieces - 1:
                plgpu.barrier_arrive(bars["ds_free"].at[slot])
            hand_dq_over(block, i, piece, dq)

    meet(block)


# -- launch ------------------------------------------------------------------------------------------------------------

def scratch(spec: AttentionSpec, s: KvSchedule) -> tuple[dict[str, Any], dict[str, Any]]:
    """The buffers and barriers of a block. A full barrier counts chunks, a free one warpgroups."""
    smem = {name: plgpu.SMEM(shape, spec.dtype, transforms=products.CHUNKED)
            for name, shape in schedules.kv_buffers(spec, s).items()}
    smem["stats"] = plgpu.SMEM(schedules.stats_shape(s), jnp.float32)
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    bars = {"kv_full": plgpu.Barrier(num_arrivals=d + d_v),
            "q_full": plgpu.Barrier(num_arrivals=d + 1, num_barriers=s.num_stages),
            "dout_full": plgpu.Barrier(num_arrivals=d_v, num_barriers=s.num_stages)}
    for name in ("q_free", "dout_free"):
        bars[name] = plgpu.Barrier(num_arrivals=s.warpgroups, num_barriers=s.num_stages)
    bars |= meeting_barriers(s)
    if s.dq != "none":
        handed = s.dq_slots * schedules.dq_pieces(spec, s)
        smem["dq"] = plgpu.SMEM((handed, CHUNK * CHUNK // 256, 256), jnp.float32)
        for name in ("dq_full", "dq_free"):
            bars[name] = plgpu.Barrier(num_barriers=handed)
        bars["ds_full"] = plgpu.Barrier(num_arrivals=s.warpgroups, num_barriers=s.ds_slots)
        bars["ds_free"] = plgpu.Barrier(num_arrivals=1 if s.dq == "own" else s.warpgroups, num_barriers=s.ds_slots)
    return smem, bars


def block_of(spec: AttentionSpec, s: Any, refs: tuple[dict[str, Any], ...]) -> Block:
    """This block's key tile."""
    head, kv_tile = schedules.kv_work(spec, s).head_and_tile(lax.axis_index("block"))
    batch, kv_head = div(head, spec.kv_heads), rem(head, spec.kv_heads)
    q_tiles = schedules.q_range(spec, s, kv_tile)
    gmem, smem, bars = refs
    return Block(spec, s, gmem, smem, bars, batch, kv_head, kv_tile, Walk(kv_head * spec.group, spec.group, *q_tiles))


def launch(spec: AttentionSpec, schedule: KvSchedule) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel of a spec: a function of q, k, v, dout, the statistics that `backward.prepare` makes, and in the
    fused form of one more.

    It returns dk and dv in the spec's layout. Where blocks add to dq in any order, the last argument is a reference to
    dq's float32 sums (`schedules.dq_acc_shape`), to which it adds; where they take turns, a reference to zeros, (batch,
    q_heads, q_tiles) int32, and the sums are returned, too.
    """
    smem, bars = scratch(spec, schedule)
    fused, ordered = schedule.dq != "none", schedule.ordered

    def attention_backward_kv(*refs: Any) -> None:
        last = ["turns"] * ordered or ["dq"] * fused
        names = ["q", "k", "v", "dout", "stats", *last, "dk", "dv", *["dq"] * ordered]
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

    shape = lambda dim: jax.ShapeDtypeStruct(spec.shape(spec.kv_len, spec.kv_heads, dim), spec.dtype)
    sums = [jax.ShapeDtypeStruct(schedules.dq_acc_shape(spec, schedule), jnp.float32)] if ordered else []
    kernel = plgpu.kernel(
        attention_backward_kv, out_type=(shape(spec.d), shape(spec.d_v), *sums), scratch_types=(smem, bars),
        grid=(schedules.kv_work(spec, schedule).blocks,), grid_names=("block",),
        num_threads=schedule.warpgroups + len(schedule.registers) - 1, thread_name="warpgroup",
        compiler_params=grad_tiles.COMPILER)
    return lambda *arrays: tuple(kernel(*arrays))
