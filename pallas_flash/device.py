"""What the device can do: the only hardware query of the project."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import jax

from pallas_flash import compat

__all__ = ["A100", "CPU", "H100", "Device", "assume", "current", "of"]


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as dispatch sees it.

    Attributes:
      platform: "cpu", "gpu" or another of JAX's platform names.
      name: what the vendor calls it.
      capability: CUDA compute capability (major, minor); None where there is none.
      num_sms: streaming multiprocessors.
      smem_bytes: the most shared memory that one block can ask for.
    """

    platform: str
    name: str
    capability: tuple[int, int] | None = None
    num_sms: int = 0
    smem_bytes: int = 0


CPU = Device("cpu", "CPU")
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)

_SMEM_BYTES = {(7, 5): 65_536, (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448}
"""Opt-in shared memory of a block by compute capability (CUDA C++ Programming Guide, table of technical
specifications)."""

_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar("assumed", default=None)


@functools.cache
def of(device: jax.Device) -> Device:
    """A JAX device as dispatch sees it."""
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return Device(device.platform, device.device_kind)
    major, minor = (int(x) for x in str(device.compute_capability).split("."))
    smem_bytes = _SMEM_BYTES.get((major, minor), 101_376)
    return Device("gpu", device.device_kind, (major, minor), device.core_count, smem_bytes)


def current(arrays: object = ()) -> Device:
    """The device that a computation with `arrays` (a pytree) runs on here and now.

    It is the one that `assume` names; else the one that an array is committed to, unless some arrays have no values
    (inside `jit`, whose caller's arrays decide); else jax.default_device; else JAX's first.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed
    if (committed := _committed(arrays)) is not None:
        return of(committed)
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return of(jax.devices(default)[0])
    return of(default if default is not None else jax.devices()[0])


def _committed(arrays: object) -> jax.Device | None:
    """The first device of the first array that is committed to one; None if there is none, or inside `jit`."""
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    found = [compat.concrete(leaf) for leaf in leaves]
    if any(array is None for array in found):
        return None
    places = [array.devices() for array in found if array.committed]  # type: ignore[union-attr]
    return min(places[0], key=lambda device: device.id) if places else None


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Makes dispatch choose for `device` in this thread: to lower for a GPU where there is none, and in tests."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)
