"""What `plgpu.kernel` allocates for a block, from the description in `memory`, which has no Mosaic."""

from collections.abc import Sequence

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.ampere.memory import Buffer
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = ["allocate"]


def _barrier_of_sync(warpgroups: int) -> dict[str, plgpu.Barrier]:
    return {"met": plgpu.Barrier(num_arrivals=warpgroups)} if warpgroups > 1 else {}


@interpreted_as(_barrier_of_sync)
def _barriers(warpgroups: int) -> dict[str, plgpu.Barrier]:
    """What `copies.sync` needs: nothing on a GPU."""
    del warpgroups
    return {}


def allocate(buffers: Sequence[Buffer],
             warpgroups: int = 1) -> tuple[dict[str, pl.MemoryRef], dict[str, plgpu.Barrier]]:
    """The scratch types of the buffers, by name, and of what `copies.sync` needs."""
    return {buffer.name: plgpu.SMEM(buffer.shape, buffer.dtype) for buffer in buffers}, _barriers(warpgroups)
