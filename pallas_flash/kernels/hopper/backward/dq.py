"""dq on Hopper in a kernel of its own: a block for each query tile, 64 queries a warpgroup; the same bits on every run.

S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K over the key tiles that the mask needs, from
the last to the first. One more warpgroup loads keys and values through rings.

Barriers: q_full for a warpgroup's query and dout; k_full, k_free, v_full, v_free for slots of the rings.
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
from pallas_flash.kernels.hopper.backward.tiles import Statistics
from pallas_flash.kernels.hopper.backward_schedule import DqSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, chunks
from pallas_flash.kernels.hopper.scores import largest, may_be_large
from pallas_flash.kernels.hopper.slow_rows import RowsAtRest, across
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import TileRange

__all__ = ["launch"]


class Block(NamedTuple):
    """What the roles of one block share."""

    spec: AttentionSpec
    schedule: DqSchedule
    gmem: dict[str, Any]  # q, k, v, dout, stats, dq
    smem: dict[str, Any]  # schedules.dq_buffers
    bars: dict[str, Any]
    batch: Any
    head: Any
    q_tile: Any
    kv_tiles: TileRange

    @property
    def steps(self) -> Any:
        return self.kv_tiles.stop - self.kv_tiles.start


class Rows(NamedTuple):
    """A warpgroup's 64 queries."""

    warpgroup: Any
    first: Any  # position
    lse_log2: Any  # (64,)
    delta: Any  # (64,): -delta
    large: Any  # whether some are large (`scores`); None if none ever is

    def own(self, block: Block, name: str) -> Any:
        """The warpgroup's queries or douts, (chunks, 64, 64)."""
        return block.smem[name].at[ptx.opaque(self.warpgroup) if block.schedule.opaque else self.warpgroup]


def load_ring(block: Block, name: str, slots: int) -> None:
    """Loads the key tiles (name "k") or value tiles ("v"), last first, as slots become free."""
    spec = block.spec
    full, free = block.bars[f"{name}_full"], block.bars[f"{name}_free"]

    @pl.loop(0, block.steps)
    def _(i: Any) -> None:
        slot = rem(i, slots)

        @pl.when(i >= slots)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        place = (block.batch, div(block.head, spec.group), (block.kv_tiles.stop - 1 - i) * block.schedule.block_kv)
        grad_tiles.load_tile(spec, block.gmem[name], place, block.smem[name].at[slot], full.at[slot])

    grad_tiles.drain(free, slots, block.steps)


def load_role(block: Block) -> None:
    """The loading warpgroup: one warp for the queries, douts and keys, one for the values."""
    s = block.schedule
    plgpu.set_max_registers(s.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Any) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            for i in range(s.warpgroups):
                place = (block.batch, block.head, block.q_tile * s.block_q + i * ROWS)
                full = block.bars["q_full"].at[i]
                for name in ("q", "dout"):
                    grad_tiles.load_tile(block.spec, block.gmem[name], place, block.smem[name].at[i], full)
            load_ring(block, "k", s.k_stages)

        @pl.when(warp == 1)
        def _() -> None:
            load_ring(block, "v", s.v_stages)


def statistic(block: Block, first: Any, row: Statistics) -> Any:
    """A row of the statistics of the 64 queries from `first` on: (64,)."""
    stats = block.gmem["stats"].at[block.batch, block.head, int(row), pl.ds(first, ROWS)]
    return plgpu.load(stats, layout=products.ROWS, optimized=False)


def any_large(spec: AttentionSpec, lse_log2: Any) -> Any:
    """Whether a query of 64 is large: the same in a warp, so not a branch around products."""
    if not may_be_large(spec):
        return None
    size = jnp.abs(lse_log2)
    return ptx.any_in_warp((size > largest(spec)) & (size < 1e38), products.ROWS)  # not IDLE


def without_rounding(block: Block, rows: Rows, y: Any) -> Any:
    """Exponents, (64, columns) or (64,), exact."""
    rounding = statistic(block, rows.first, Statistics.ROUNDING)
    return y + (across(rounding, y.shape[1]) if len(y.shape) == 2 else rounding)


def tile_weights(block: Block, rows: Rows, kv_tile: Any, s: Any) -> Any:
    """What dP is multiplied with."""
    spec, schedule, tiles = block.spec, block.schedule, block.kv_tiles
    first, partial = (rows.first, kv_tile * schedule.block_kv), None
    if schedules.dq_work(spec, schedule).partial:
        partial = (kv_tile < tiles.full_start) | (kv_tile >= tiles.full_stop)
    corrections = grad_tiles.Corrections(
        partial, rows.large,
        functools.partial(grad_tiles.masked, mask=schedules.kv_mask(spec, schedule), first=first, keys_dim=1),
        functools.partial(without_rounding, block, rows))
    lse_log2 = across(rows.lse_log2, schedule.block_kv)
    _, p = grad_tiles.weights(spec, plgpu.layout_cast(s, products.TILE), lse_log2, corrections)
    if schedule.pinned:
        ptx.pin(functools.reduce(jnp.add, [p[:, i:i + 8] for i in range(0, schedule.block_kv, 8)]), products.TILE)
    return p


def free_keys(block: Block, i: Any) -> None:
    plgpu.barrier_arrive(block.bars["k_free"].at[rem(i, block.schedule.k_stages)])


def keys_of(block: Block, i: Any) -> Any:
    return block.smem["k"].at[rem(i, block.schedule.k_stages)]


def one_step(block: Block, rows: Rows, i: Any, last: Any, dq: Any) -> tuple[Any, Any]:
    """dS of a key tile, in the input's type. `last`: dS of the step before, multiplied meanwhile, or None."""
    spec, s, bars = block.spec, block.schedule, block.bars
    slot, v_slot = rem(i, s.k_stages), rem(i, s.v_stages)
    from_delta = grad_products.spread_rows(rows.delta, s.block_kv)
    plgpu.barrier_wait(bars["k_full"].at[slot])
    scores = products.scores(rows.own(block, "q"), block.smem["k"].at[slot], spec.d)
    if last is not None:
        dq = products.accumulate(dq, last, keys_of(block, i - 1))
    plgpu.barrier_wait(bars["v_full"].at[v_slot])
    dp = grad_products.scores(from_delta, rows.own(block, "dout"), block.smem["v"].at[v_slot], spec.d_v)
    p = tile_weights(block, rows, block.kv_tiles.stop - 1 - i, products.ready(scores, 1 if last is None else 2))
    ds = p * plgpu.layout_cast(products.ready(dp, 0), products.TILE)
    plgpu.barrier_arrive(bars["v_free"].at[v_slot])
    if last is not None:
        free_keys(block, i - 1)
    return ds.astype(spec.dtype), dq


def gradient_in_turn(block: Block, rows: Rows) -> Any:
    """dq of a warpgroup's rows."""
    def step(i: Any, dq: Any) -> Any:
        ds, dq = one_step(block, rows, i, None, dq)
        dq = products.ready(products.accumulate(dq, ds, keys_of(block, i)), 0)
        free_keys(block, i)
        return dq

    return lax.fori_loop(0, block.steps, step, products.zeros(block.spec.d))


def gradient_behind(block: Block, rows: Rows) -> Any:
    """The same, each tile's dq multiplied during the next tile's softmax."""
    def run() -> Any:
        ds, dq = one_step(block, rows, jnp.int32(0), None, grad_products.zeros(block.spec.d))
        ds, dq = lax.fori_loop(1, block.steps, lambda i, carry: one_step(block, rows, i, *carry), (ds, dq))
        dq = products.ready(products.accumulate(dq, ds, keys_of(block, block.steps - 1)), 0)
        free_keys(block, block.steps - 1)
        return dq

    nothing = lambda: products.zeros(block.spec.d)
    return lax.cond(block.steps > 0, run, nothing) if schedules.dq_work(block.spec, block.schedule).empty else run()


def repaired(block: Block, rows: Rows, dq: Any) -> Any:
    """dq, or the same sums without the keys that the mask hides, if some element is not finite (0 * NaN is NaN).

    Rows that start from NaN, because they attend to what is not finite, stay NaN: nothing is repaired for them.
    """
    if not schedules.dq_work(block.spec, block.schedule).partial:
        return dq
    hopeless = across(jnp.isnan(rows.lse_log2), block.spec.d)
    spoiled = ptx.any_nonfinite_in_warpgroup(jnp.where(hopeless, 0.0, dq), products.TILE)
    return lax.cond(spoiled, lambda dq: again(block, rows), lambda dq: dq, dq)


def again(block: Block, rows: Rows) -> Any:
    """The sum of dS k over the keys that each row attends to, (64, d), a key at a time and without tensor cores.

    Some columns after the others: with all of them at once something would be spilled, also for the loop above.
    """
    spec, mask, block_kv = block.spec, schedules.kv_mask(block.spec, block.schedule), block.schedule.block_kv
    own = RowsAtRest(spec, {name: rows.own(block, name) for name in ("q", "dout")},
                     {name: block.gmem[name] for name in "kv"}, (block.batch, div(block.head, spec.group)))

    def add(first: int, position: Any, acc: Any) -> Any:
        exact = functools.partial(without_rounding, block, rows)
        corrections = grad_tiles.Corrections(None, rows.large, lambda y: y, exact)
        _, p = grad_tiles.weights(spec, own.dot("q", "k", spec.d, position), rows.lse_log2, corrections)
        ds = (p * (own.dot("dout", "v", spec.d_v, position) + rows.delta)).astype(spec.dtype).astype(jnp.float32)
        columns = acc.shape[1]
        keep = mask.keep(products.positions(columns, 0, rows.first), position)
        return acc + jnp.where(keep, across(ds, columns) * own.row("k", position, first, columns), 0.0)

    def columns_from(first: int) -> Any:
        zeros = jnp.zeros((ROWS, min(2 * CHUNK, spec.d - first)), jnp.float32)
        kv_pos = (ptx.scalar(block.kv_tiles.start * block_kv),
                  ptx.scalar(jnp.minimum(block.kv_tiles.stop * block_kv, spec.kv_len)))
        return lax.fori_loop(*kv_pos, functools.partial(add, first), plgpu.layout_cast(zeros, products.TILE))

    return products.beside([columns_from(first) for first in range(0, spec.d, 2 * CHUNK)])


def compute_role(block: Block, warpgroup: Any) -> None:
    """A compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    first = block.q_tile * s.block_q + warpgroup * ROWS
    lse_log2, delta = (statistic(block, first, row) for row in (Statistics.LSE, Statistics.DELTA))
    rows = Rows(warpgroup, first, lse_log2, delta, any_large(spec, lse_log2))
    plgpu.barrier_wait(block.bars["q_full"].at[warpgroup])
    dq = (gradient_behind if s.behind else gradient_in_turn)(block, rows)
    dq = repaired(block, rows, plgpu.layout_cast(dq, products.TILE))
    dq = (dq * spec.scale).astype(spec.dtype)
    grad_tiles.store_tile(spec, dq, block.smem["q"].at[warpgroup], block.gmem["dq"], (block.batch, block.head, first))
    plgpu.wait_smem_to_gmem(0)


def scratch(spec: AttentionSpec, s: DqSchedule) -> tuple[dict[str, Any], dict[str, Any]]:
    """The buffers and barriers of a block."""
    smem = {name: plgpu.SMEM(shape, spec.dtype, transforms=products.CHUNKED)
            for name, shape in schedules.dq_buffers(spec, s).items()}
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    bars = {"q_full": plgpu.Barrier(num_arrivals=d + d_v, num_barriers=s.warpgroups)}
    for name, count, slots in (("k", d, s.k_stages), ("v", d_v, s.v_stages)):
        bars[f"{name}_full"] = plgpu.Barrier(num_arrivals=count, num_barriers=slots)
        bars[f"{name}_free"] = plgpu.Barrier(num_arrivals=s.warpgroups, num_barriers=slots)
    return smem, bars


def launch(spec: AttentionSpec, schedule: DqSchedule) -> Callable[..., jax.Array]:
    """The kernel of a spec: a function of q, k, v, dout and the padded statistics; it returns dq."""
    smem, bars = scratch(spec, schedule)
    work = schedules.dq_work(spec, schedule)

    def attention_backward_dq(q: Any, k: Any, v: Any, dout: Any, stats: Any, dq: Any, smem: Any, bars: Any) -> None:
        gmem = {"q": q, "k": k, "v": v, "dout": dout, "stats": stats, "dq": dq}
        head, q_tile = work.head_and_tile(lax.axis_index("block"))
        batch, q_head = div(head, spec.q_heads), rem(head, spec.q_heads)
        kv_tiles = schedules.kv_range(spec, schedule, q_tile)
        block = Block(spec, schedule, gmem, smem, bars, batch, q_head, q_tile, kv_tiles)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute_role(block, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load_role(block)

    return plgpu.kernel(
        attention_backward_dq, out_type=jax.ShapeDtypeStruct(spec.shape(spec.q_len, spec.q_heads, spec.d), spec.dtype),
        scratch_types=(smem, bars), grid=(work.blocks,), grid_names=("block",), num_threads=schedule.warpgroups + 1,
        thread_name="warpgroup", compiler_params=grad_tiles.COMPILER)
