"""What stands before and after the backward's large kernels: statistics of each query, dq from its float32 sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import backward_products as grad_products
from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import backward_tiles as grad_tiles
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward_schedule import KvSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, chunks
from pallas_flash.spec import AttentionSpec

__all__ = ["launch_finish", "statistics"]


def statistics(spec: AttentionSpec, padded: int, out: Any, lse: Any, dout: Any, dlse: Any) -> Any:
    """(batch, q_heads, 2, padded) float32: where a query's scores start (see `backward_tiles`), and -delta.

    Queries that attend to nothing, and those past the end, get weights of 0.
    """
    over_heads = lambda x: x if spec.layout == "BHLD" else x.swapaxes(1, 2)
    delta = over_heads(softmax.delta(out, dout, over_heads(dlse), jnp.float32))
    nothing = lse == -jnp.inf
    if grad_tiles.starts_at_lse(spec):
        start, absent = jnp.where(nothing, -jnp.inf, lse * (-1 / spec.scale)), -jnp.inf
    else:
        start, absent = jnp.where(nothing, jnp.inf, lse * softmax.LOG2E), jnp.inf
    pad = [(0, 0), (0, 0), (0, padded - spec.q_len)]
    delta = jnp.where(nothing, 0.0, -delta)
    return jnp.stack([jnp.pad(start, pad, constant_values=absent), jnp.pad(delta, pad)], axis=2)


def launch_finish(spec: AttentionSpec, schedule: KvSchedule) -> Callable[..., jax.Array]:
    """The kernel that makes dq of its float32 sums: a block for each 64 queries, one warpgroup."""
    per_tile, columns = schedule.block_q // CHUNK, chunks(spec.d)
    shape = schedules.dq_acc_shape(spec, schedule)
    count = shape[2] * per_tile

    def attention_backward_finish(acc: Any, dq: Any, smem: Any) -> None:
        block = lax.axis_index("block")
        head, rows = lax.div(block, count), lax.rem(block, count)
        batch, q_head = lax.div(head, spec.q_heads), lax.rem(head, spec.q_heads)
        tile, row = lax.div(rows, per_tile), lax.rem(rows, per_tile)
        for column in range(columns):
            piece = acc.at[batch, q_head, tile, row * columns + column]
            x = (grad_products.from_linear(piece, CHUNK) * spec.scale).astype(spec.dtype)
            products.store_chunks(x, smem.at[column:column + 1])
        plgpu.commit_smem()
        for column in range(columns):
            target = grad_tiles.chunk_of(spec, dq, (batch, q_head, rows * CHUNK), CHUNK, column)
            plgpu.copy_smem_to_gmem(smem.at[column], target)
        plgpu.wait_smem_to_gmem(0)

    dq_type = jax.ShapeDtypeStruct(spec.shape(spec.q_len, spec.q_heads, spec.d), spec.dtype)
    return plgpu.kernel(
        attention_backward_finish, out_type=dq_type,
        scratch_types=(plgpu.SMEM((columns, CHUNK, CHUNK), spec.dtype, transforms=products.CHUNKED),),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=grad_tiles.COMPILER)
