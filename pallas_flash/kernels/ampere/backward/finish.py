"""The backward's last kernel: it makes dq of its float32 sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.kernels.ampere import copies, memory, registers
from pallas_flash.kernels.ampere.registers import TILE, Fragment
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS, BackwardSchedule
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


def _load_sums_plain(sums: Ref, chunk: int, wide: bool) -> Fragment:
    del wide
    return sums[:, chunk].reshape(ROWS, CHUNK)


@interpreted_as(_load_sums_plain)
def load_sums(sums: Ref, chunk: int, wide: bool) -> Fragment:
    """Loads 64 rows and 64 columns of dq, which `mma.add_outer` has left in the order of threads.

    Args:
      sums: (query tiles of 64 queries, chunks, numbers) in global memory.
      wide: as they were added.
    """
    (tiles, count, numbers), at_once = sums.shape, 4 if wide else 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),),
                       return_type=plgpu.ShapeDtypeStruct((ROWS, CHUNK), jnp.float32, TILE))
    def load(_: mgpu.LaunchContext, sums: ir.Value) -> mgpu.FragmentedArray:
        f32, layout = ir.F32Type.get(), TILE.to_mgpu()
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        lane, high = arith.remui(thread, const(32)), arith.divui(thread, const(64))
        low = arith.andi(arith.divui(thread, const(32)), const(1))
        # Warp (low, high) has 16 rows. In a tile of 64 queries, they are piece `low` of the warps in row `high`; one of
        # 32 is tile `high`, and they are those of the warps in row `low`.
        steps = (16 * ptx.WARPGROUP, 64 * at_once) if tiles == 1 else (64 * at_once, count * numbers)
        own = arith.addi(arith.muli(low, const(steps[0])), arith.muli(high, const(steps[1])))
        first = arith.addi(own, arith.muli(lane, const(at_once)) if wide else lane)
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(sums), [first], f32)
        registers = np.empty((CHUNK // 8, 2), dtype=object)
        pair, step = ir.VectorType.get((2,), f32), 1 if wide else ptx.WARPGROUP  # from one number to the next
        for j, i in np.ndindex(registers.shape):
            at = chunk * numbers + 32 * at_once * (j // 4) + 4 * ptx.WARPGROUP * (j % 4) + 2 * i * step
            found = [llvm.load(f32, mgpu.utils.getelementptr(base, [at + step * e], f32)) for e in (0, 1)]
            registers[j, i] = vector.from_elements(pair, found)
        shape = layout.registers_shape((ROWS, CHUNK))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return load(sums)


def launch(spec: AttentionSpec, schedule: BackwardSchedule) -> Launch:
    """The launch that makes dq of its float32 sums: a block for each 64 queries, one warpgroup."""
    per_rows = ROWS // schedule.block_q
    shape = memory.dq_sums_shape(spec, schedule)
    count, unit = shape[2] // per_rows, spec.scale * dropout.factor(spec)

    def attention_backward_finish(sums: Ref, dq: Ref, *_: object) -> None:
        block = lax.axis_index("block")
        pair, rows = div(block, count), rem(block, count)
        batch, head, first = div(pair, spec.q_heads), rem(pair, spec.q_heads), rows * ROWS
        axis, place = (1, (batch, first, head)) if spec.layout == "BLHD" else (2, (batch, head, first))
        own = sums.at[batch, head, pl.ds(rows * per_rows, per_rows)]
        for chunk in range(shape[3]):
            columns = min(CHUNK, spec.d - chunk * CHUNK)
            x = load_sums(own, chunk, schedule.wide_adds)[:, :columns] * unit
            registers.store_rows(x.astype(spec.result_dtype), dq, place, axis, chunk * CHUNK)

    outputs = {"dq": jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.result_dtype)}
    build = functools.partial(
        plgpu.kernel, attention_backward_finish, scratch_types=allocate(()),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), compiler_params=copies.COMPILER)
    return Launch.of(build, ("dq_sums",), outputs)
