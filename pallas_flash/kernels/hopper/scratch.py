"""What `plgpu.kernel` allocates for a block, from the description in `memory`, which has no Mosaic."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.memory import Barrier, Memory
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = ["CLUSTER_AXIS", "allocate"]

CLUSTER_AXIS = "pair"
"""The name of the axis along which the blocks of a cluster lie."""


def _own_barrier(barrier: Barrier) -> plgpu.Barrier | plgpu.ClusterBarrier:
    return plgpu.Barrier(num_arrivals=barrier.arrivals, num_barriers=barrier.slots)


@interpreted_as(_own_barrier)
def _shared_barrier(barrier: Barrier) -> plgpu.Barrier | plgpu.ClusterBarrier:
    return plgpu.ClusterBarrier(collective_axes=(CLUSTER_AXIS,), num_arrivals=barrier.arrivals,
                                num_barriers=barrier.slots)


def allocate(memory: Memory) -> tuple[dict[str, pl.MemoryRef], dict[str, plgpu.Barrier | plgpu.ClusterBarrier]]:
    """The scratch types of the buffers and of the barriers, by name."""
    smem = {buffer.name: plgpu.SMEM(buffer.shape, buffer.dtype, transforms=registers.CHUNKED if buffer.chunked else ())
            for buffer in memory.buffers}
    return smem, {barrier.name: (_shared_barrier if barrier.shared else _own_barrier)(barrier)
                  for barrier in memory.barriers}
