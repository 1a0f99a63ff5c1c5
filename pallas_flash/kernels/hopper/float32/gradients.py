"""dq, dk and dv of float32 inputs: a kernel for each, all of one form.

A block keeps tiles of its own rows, 64 of them a warpgroup, and walks over tiles of the other axis:

    dq  keeps Q, dO  walks over K, V    S = Q K^T,   dP = dO V^T     dQ += dS K
    dk  keeps K, V   walks over Q, dO   S^T = K Q^T, dP^T = V dO^T   dK += dS^T Q
    dv  keeps K      walks over Q, dO   S^T = K Q^T                  dV += P^T dO

with P = exp(S - lse), at most 1, dS = P * (dP - delta), and products of parts (`products`). The rows that a sum adds
up have scales of their own; the weights they are added with, P or dS, take these on, and are then scaled so that the
largest of a row is near 2^14, by a power of two that grows with what comes, as the maximum does in a softmax. What is
lost is 2^-39 of a row's largest term. Of many tiles the sums are those of `sums`, in the gradient's own rows.

P is made before dP is multiplied, of which one sum is in flight: all at once takes more registers than there are.

That is 24 products of 16-bit tiles where a kernel for dk and dv would need 21; but that one has no registers left for
sums apart from dk and dv.

Barriers: own_full; other_0_full, other_0_free, other_1_full, other_1_free for slots of the rings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, work
from pallas_flash.kernels.hopper.backward import dq as dq_kernel
from pallas_flash.kernels.hopper.backward import kv as kv_kernel
from pallas_flash.kernels.hopper.backward.statistics import IDLE, Statistics
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.float32 import products, sums
from pallas_flash.kernels.hopper.float32.parts import TOP, WEIGHTS
from pallas_flash.kernels.hopper.float32.split import scale_of, split
from pallas_flash.kernels.hopper.float32.sums import Place
from pallas_flash.kernels.hopper.memory import KINDS, Kind, in_parts
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, DqSchedule, KvSchedule
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import scaled, score_unit, slope
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import HeadAndTile, Step, Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


OF_QUERIES = ("q", "dout", "lse", "delta", "rounding")
STATISTICS = {"lse": Statistics.LSE, "delta": Statistics.DELTA, "rounding": Statistics.ROUNDING}

type GradientBlock = Block[DqSchedule] | Block[KvSchedule]
"""A block that keeps queries, or keys, of the problem `in_parts`."""


class Here(NamedTuple):
    """A warpgroup's 64 rows."""

    kind: Kind
    block: GradientBlock
    warpgroup: Index

    @property
    def first(self) -> Index:
        """The position of the first row."""
        s = self.block.schedule
        size = s.block_q if self.kind.of_queries else s.block_kv
        return self.block.tile * size + self.warpgroup * ROWS_PER_WARPGROUP

    def own(self, i: int) -> Ref:
        """The warpgroup's rows of a tile that the block keeps, (chunks, 64, 64)."""
        rows = pl.ds(ptx.opaque(self.warpgroup) * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
        return self.block.smem[f"own_{i}"].at[:, rows]

    def other(self, i: int, step: Step) -> Ref:
        """A tile of a step."""
        ref = self.block.smem[f"other_{i}"]
        return ref.at[step.slot(ref.shape[0])]

    def await_other(self, i: int, step: Step) -> None:
        """Waits for a tile of a step."""
        full = self.block.bars[f"other_{i}_full"]
        plgpu.barrier_wait(full.at[step.slot(full.shape[0])])

    def free_other(self, i: int, step: Step) -> None:
        """Frees a tile of a step."""
        free = self.block.bars[f"other_{i}_free"]
        plgpu.barrier_arrive(free.at[step.slot(free.shape[0])])

    def numbers(self, name: str, step: Step) -> Fragment:
        """A number of each query or key of a step's pairs, (64, columns): a factor of an operand's parts, or a
        statistic.
        """
        block, is_own = self.block, (name in OF_QUERIES) == self.kind.of_queries
        ref, row = (block.gmem["stats"], int(STATISTICS[name])) if name in STATISTICS else (
            block.gmem[f"{name}_scales"], 0)
        columns = walked_rows(self.kind, block)
        if is_own:
            line = (block.batch * ref.shape[1] + block.head) * ref.shape[2] + row
            found = registers.load_row_stats(ref, line, self.first, ref.shape[3], IDLE if name == "lse" else 0.0)
            return registers.spread(found, columns)
        index = block.batch, other_head(self.kind, block, step.head), row
        return registers.stack(registers.load_row(ref, index, step.tile * columns, columns))


def walked_rows(kind: Kind, block: GradientBlock) -> int:
    """The rows of a tile that a block walks over."""
    return block.schedule.block_kv if kind.of_queries else block.schedule.block_q


def other_head(kind: Kind, block: GradientBlock, head: Index) -> Index:
    """The head of what a block walks over, at a query head."""
    return div(head, block.spec.group) if kind.of_queries else head


class Sum(NamedTuple):
    """A gradient: acc scale unit, and the rows that are stored (`sums`)."""

    acc: Fragment  # (64, columns) in the layout TILE
    scale: PerRow  # a power of two


def probabilities(here: Here, step: Step, s: Fragment) -> Fragment:
    """P from products of parts, in the layout TILE; for dS times the slope of a soft cap."""
    kind, spec = here.kind, here.block.spec
    numbers = lambda name: here.numbers(name, step)
    x = scaled(spec, s * numbers("q") * numbers("k"))
    y = jnp.minimum((x - numbers("lse") - numbers("rounding")) * score_unit(spec), 0.0)
    pair = here.first, step.tile * walked_rows(kind, here.block)
    mask, keys_dim = here.block.mask.of_head(step.head), 1 if kind.of_queries else 0
    hide = lambda y: mask.hide(y, pair if kind.of_queries else pair[::-1], keys_dim)
    p = jnp.exp2(lax.cond(here.block.walk.partial(step.tile), hide, lambda y: y, y))
    return p if len(kind.own) == 1 else slope(spec, x, p)


def weights_of(here: Here, step: Step, p: Fragment, dp: Fragment | None) -> Fragment:
    """The weights of the rows to be added, with their scales: P or dS, from products of parts."""
    numbers = lambda name: here.numbers(name, step)
    w = p * numbers(here.kind.others[here.kind.added])
    if dp is not None:
        w = w * (dp * numbers("dout") * numbers("v") + numbers("delta"))
    return jnp.where(p == 0, 0.0, w)  # whatever the mask hides may be NaN


def added(total: Sum, weights: Fragment, rows: Ref) -> Sum:
    """Adds weights times rows."""
    top = jnp.maximum(jnp.abs(weights).max(axis=1), total.scale)
    scale, inverse = scale_of(top, WEIGHTS)
    parts = split(weights * registers.spread(inverse, weights.shape[1]) * 2.0**TOP)
    return Sum(products.add(total.acc, total.scale * inverse, parts, rows), scale)


def store(here: Here, place: Place, stored: bool | Flag, total: Sum) -> Sum:
    """Moves a sum to the rows of the gradient, so that what is in registers is zero.

    Args:
      stored: whether that was done before.
    """
    unit = 2.0**-TOP * (1.0 if here.kind is KINDS["dv"] else here.block.spec.scale)
    before = place.stored(registers.row_zeros() + jnp.where(stored, 1.0, 0.0))
    place.store(total.acc * registers.spread(total.scale * unit, place.columns) + before)
    return Sum(sums.zeros(place.columns), total.scale)


def one_step(here: Here, place: Place, step: Step, total: Sum) -> Sum:
    """Adds the product of a step's tile."""
    kind, last = here.kind, len(here.kind.own) - 1
    here.await_other(0, step)
    s = products.multiply_transposed(here.own(0), here.other(0, step), swapped=not kind.of_queries)
    p = probabilities(here, step, s)
    here.await_other(1, step)
    dp = products.multiply_transposed(here.own(1), here.other(1, step), in_flight=1) if last else None
    here.free_other(1 - kind.added, step)
    total = added(total, weights_of(here, step, p, dp), here.other(kind.added, step))
    here.free_other(kind.added, step)
    put = lambda total: store(here, place, step.ordinal >= sums.SECTION, total)
    return lax.cond(sums.is_full(step.ordinal), put, lambda total: total, total)


def compute_role(here: Here, columns: int, target: Ref) -> None:
    """Runs a compute warpgroup, and writes its gradient, of so many columns."""
    block, spec = here.block, here.block.spec
    plgpu.set_max_registers(block.schedule.registers[0], action="increase")
    plgpu.barrier_wait(block.bars["own_full"])
    place = Place(spec, target, (block.batch, block.head, here.first, 0), columns)

    def step(i: Array, carry: tuple[HeadAndTile, Sum]) -> tuple[HeadAndTile, Sum]:
        at, total = carry
        return block.walk.next(*at), one_step(here, place, Step(i, *at), total)

    start = block.walk.first, Sum(sums.zeros(columns), registers.row_zeros() + 2.0**WEIGHTS[0])
    _, total = lax.fori_loop(0, block.walk.steps, step, start)
    store(here, place, block.walk.steps >= sums.SECTION, total)


def load_role(kind: Kind, block: GradientBlock) -> None:
    """Runs the loading warpgroup: a warp for each of the rings; the first loads what the block keeps, too."""
    plgpu.set_max_registers(block.schedule.registers[-1], action="decrease")

    def load_ring(i: int) -> None:
        buffer, full, free = (names[f"other_{i}{end}"] for names, end in (
            (block.smem, ""), (block.bars, "_full"), (block.bars, "_free")))

        def step(ordinal: Array, at: HeadAndTile) -> HeadAndTile:
            # opaque: of one slot LLVM would peel the first step, and ptxas 13.0 sets a coordinate after its load
            slot = tiles.await_free(free, buffer.shape[0], ptx.opaque(ordinal))
            index = block.batch, other_head(kind, block, at[0]), at[1] * walked_rows(kind, block)
            tiles.load_tile(block.spec, block.gmem[kind.others[i]], index, buffer.at[slot], full.at[slot])
            return block.walk.next(*at)

        lax.fori_loop(0, block.walk.steps, step, block.walk.first)
        tiles.see_last_phases(free, buffer.shape[0], block.walk.steps)

    @plgpu.warp_map
    def _(warp: Index) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            for i, name in enumerate(kind.own):
                buffer = block.smem[f"own_{i}"]
                index = block.batch, block.head, block.tile * buffer.shape[1]
                tiles.load_tile(block.spec, block.gmem[name], index, buffer, block.bars["own_full"])
            load_ring(0)

        pl.when(warp == 1)(lambda: load_ring(1))


def block_of(spec: AttentionSpec, s: DqSchedule | KvSchedule,
             refs: tuple[dict[str, Ref], dict[str, Ref], dict[str, Ref]]) -> GradientBlock:
    """Finds which block runs: of the problem `in_parts`, arrays in global memory, buffers, and barriers."""
    if isinstance(s, KvSchedule):
        return kv_kernel.block_of(spec, s, refs)
    head, q_tile = work.dq_work(spec, s).head_and_tile(lax.axis_index("block"))
    batch, q_head = div(head, spec.q_heads), rem(head, spec.q_heads)
    mask, needed = dq_kernel.mask_of(spec, s, refs[0], (batch, q_head, q_tile))
    return Block(spec, s, *refs, mask, batch, q_head, q_tile, Walk(q_head, 1, *needed))


def launch(spec: AttentionSpec, name: str, schedule: DqSchedule | KvSchedule) -> Launch:
    """The launch that makes dq, dk or dv (`name`), of parts and factors of q, k, v and dout, of the statistics that
    `prepare` makes, and of the arrays of the mask.
    """
    kind, wide = KINDS[name], in_parts(spec)
    of_gradient = dict(dq="q", dk="k", dv="v")[name]
    columns = dict(q=spec.d, k=spec.d, v=spec.d_v)[of_gradient]
    arrays = tuple(x for x in ("q", "k", "v", "dout") if x in kind.own + kind.others)
    masks = mask_arrays.names(spec.mask, of_keys=kind.of_queries)
    inputs = (*(f"{x}_parts" for x in arrays), *(f"{x}_scales" for x in arrays), "statistics", *masks)
    names = (*arrays, *(f"{x}_scales" for x in arrays), "stats", *masks, "out")
    blocks = (work.dq_work(wide, schedule) if isinstance(schedule, DqSchedule) else work.kv_work(wide, schedule)).blocks

    def attention_gradient_float32(*refs: *KernelArguments) -> None:
        *found, smem, bars = refs
        gmem = dict(zip(names, found, strict=True))
        block = block_of(wide, schedule, (gmem, smem, bars))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute_role(Here(kind, block, warpgroup), columns, gmem["out"])

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load_role(kind, block)

    outputs = {name: jax.ShapeDtypeStruct(getattr(spec.operand_shapes, of_gradient), jnp.float32)}
    kernel = plgpu.kernel(
        attention_gradient_float32, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.gradient_memory(wide, kind, schedule)),
        grid=(blocks,), grid_names=("block",), num_threads=schedule.warpgroups + 1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs)
