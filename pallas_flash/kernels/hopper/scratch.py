"""What `plgpu.kernel` allocates for a block, from the description in `memory`, which has no Mosaic."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.memory import Memory

__all__ = ["allocate"]


def allocate(memory: Memory) -> tuple[dict[str, pl.MemoryRef], dict[str, plgpu.Barrier]]:
    """The scratch types of the buffers and of the barriers, by name."""
    smem = {buffer.name: plgpu.SMEM(buffer.shape, buffer.dtype, transforms=registers.CHUNKED if buffer.chunked else ())
            for buffer in memory.buffers}
    return smem, {barrier.name: plgpu.Barrier(num_arrivals=barrier.arrivals, num_barriers=barrier.slots)
                  for barrier in memory.barriers}
