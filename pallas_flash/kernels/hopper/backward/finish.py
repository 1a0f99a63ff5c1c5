"""The backward's last kernel in the fused form: it makes dq of its float32 sums."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import memory, registers, tiles, work
from pallas_flash.kernels.hopper.schedule import CHUNK, KvSchedule, chunks
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, KernelArguments, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


def copy_out(spec: AttentionSpec, buffer: Ref, dq: Ref, index: tuple[Index, Index, Index]) -> None:
    """Copies 64 rows of dq from shared memory to global memory.

    Args:
      index: (batch, head, 64 queries).
    """
    batch, head, rows = index
    plgpu.commit_smem()
    for column in range(buffer.shape[0]):
        target = tiles.chunk_of(spec, dq, (batch, head, rows * CHUNK), CHUNK, column)
        plgpu.copy_smem_to_gmem(buffer.at[column], target)
    plgpu.wait_smem_to_gmem(0)


def launch(spec: AttentionSpec, schedule: KvSchedule) -> Launch:
    """The launch that makes dq of its float32 sums: a block for each 64 queries, one warpgroup.

    Where `first_writes`, the sums of a tile that nothing was added to were never written: its dq is 0.
    """
    inputs = ("dq_sums", *["additions"] * schedule.first_writes)
    per_tile, columns = schedule.block_q // CHUNK, chunks(spec.d)
    shape = memory.dq_acc_shape(spec, schedule)
    count, unit = shape[2] * per_tile, spec.scale * dropout.factor(spec)

    def place(block: Index) -> tuple[Index, Index, Index]:
        if schedule.first_writes:
            return work.rows_backwards(spec, schedule, block, count)
        head, rows = div(block, count), rem(block, count)
        return div(head, spec.q_heads), rem(head, spec.q_heads), rows

    def attention_backward_finish(*refs: *KernelArguments) -> None:
        *arrays, smem, _ = refs
        gmem = dict(zip((*inputs, "dq"), arrays, strict=True))
        acc, dq, additions = gmem["dq_sums"], gmem["dq"], gmem.get("additions")
        batch, q_head, rows = place(lax.axis_index("block"))
        tile, row = div(rows, per_tile), rem(rows, per_tile)
        is_written = None if additions is None else additions[batch, q_head, tile] != 0
        for column in range(columns):
            x = registers.load_linear(acc.at[batch, q_head, tile, row * columns + column], CHUNK) * unit
            x = x if is_written is None else jnp.where(is_written, x, 0.0)
            if spec.partial:
                tiles.store_rows(spec, x, dq, (batch, q_head, rows * CHUNK, column))
            else:
                registers.store_chunks(x.astype(spec.dtype), smem["dq"].at[column:column + 1])
        if not spec.partial:
            copy_out(spec, smem["dq"], dq, (batch, q_head, rows))

    outputs = {"dq": jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.result_dtype)}
    build = functools.partial(
        plgpu.kernel, attention_backward_finish,
        scratch_types=allocate(memory.finish_memory(spec)),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch.of(build, inputs, outputs)
