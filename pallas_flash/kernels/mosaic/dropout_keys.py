"""The keys of dropout (`mosaic.dropout`) by one launch, a thread for each: for a runtime without XLA, which makes them
in one kernel. Operations of PyTorch would be 120, for 20 rounds of Threefry.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import dropout as bits
from pallas_flash import tiles
from pallas_flash.kernels.mosaic import dropout, ptx, threads
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["SEED", "launch"]

SEED = "dropout_seed"
"""What the launch reads, by its name in `spec.Operands`: (2,) uint32."""
_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                 lowering_semantics=plgpu.LoweringSemantics.Lane)


def launch(spec: AttentionSpec) -> Launch:
    """The launch that makes `dropout.input_types` of a whole problem of its seed."""
    assert spec.dropout_rate and not spec.dropout_moved, "keys of a part of a problem hold places, too"
    outputs = dropout.input_types(spec)
    count = spec.batch * spec.q_heads

    def attention_dropout_keys(seed: Ref, found: Ref) -> None:
        own = lax.axis_index("block") * ptx.WARPGROUP + threads.of_block()
        batch, head = div(own, spec.q_heads), rem(own, spec.q_heads)
        words = threads.load(seed, 0), threads.load(seed, 1)
        key = bits.threefry_2x32(words, (_unsigned(batch), _unsigned(head)))  # `dropout.keys`
        threads.store(found, (batch, head, 0), tuple(lax.bitcast_convert_type(x, jnp.int32) for x in key), own < count)

    kernel = plgpu.kernel(
        attention_dropout_keys, out_type=tuple(outputs.values()), grid=(tiles.cdiv(count, ptx.WARPGROUP),),
        grid_names=("block",), num_threads=1, thread_name="warpgroup", compiler_params=_COMPILER)
    return Launch(kernel, (SEED,), outputs)


def _unsigned(x: Index) -> jax.Array:
    return lax.bitcast_convert_type(jnp.asarray(x), jnp.uint32)
