"""The GPU that kernels are lowered for, which need not be the one that JAX would run them on, nor be there at all.

Mosaic GPU lowers a kernel for one compute capability, and writes instructions that older ones lack. It asks the device
of the mesh in force, else JAX's default device; without a GPU it takes 9.0. A mesh may name a device that is not there
(`jax.sharding.AbstractDevice`), so a mesh of no axes says here what is wanted.
"""

import contextlib
import dataclasses

import jax

from pallas_flash.device import Device

__all__ = ["lowering_for"]


@dataclasses.dataclass(frozen=True)
class _Gpu(jax.sharding.AbstractDevice):
    """An abstract device of which Mosaic GPU finds the compute capability, written as JAX's own devices have it."""

    compute_capability: str


def lowering_for(device: Device) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are to be traced so that Mosaic GPU lowers them for `device`; one that does nothing
    where it is no NVIDIA GPU.

    A GPU of JAX's of the same name is taken for what JAX says of it.
    """
    if device.capability is None:
        return contextlib.nullcontext()
    gpu = _Gpu(device.name, device.num_sms, device.platform, ".".join(map(str, device.capability)))
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))
