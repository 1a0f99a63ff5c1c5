"""What the device can do: the only hardware query of the project."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import jax

from pallas_flash import compat

__all__ = ["A100", "B200", "CPU", "H100", "H200", "L4", "RTX_4090", "RTX_5090", "Device", "assume", "current",
           "default", "of", "on"]


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


_SMEM_BYTES = {
    (7, 5): 65_536, (8, 0): 166_912, (8, 6): 101_376, (8, 7): 166_912, (8, 9): 101_376, (9, 0): 232_448,
    (10, 0): 232_448, (10, 3): 232_448, (11, 0): 232_448, (12, 0): 101_376, (12, 1): 101_376,
}
"""Opt-in shared memory of a block by compute capability (CUDA C++ Programming Guide, table of technical
specifications)."""


def _gpu(name: str, capability: tuple[int, int], num_sms: int) -> Device:
    """A GPU; of a capability that the table lacks, with the shared memory that every one since 8.0 has."""
    return Device("gpu", name, capability, num_sms, _SMEM_BYTES.get(capability, 101_376))


CPU = Device("cpu", "CPU")
A100 = _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)
L4 = _gpu("NVIDIA L4", (8, 9), 58)
RTX_4090 = _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128)
H100 = _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
H200 = _gpu("NVIDIA H200", (9, 0), 132)
B200 = _gpu("NVIDIA B200", (10, 0), 148)
RTX_5090 = _gpu("NVIDIA GeForce RTX 5090", (12, 0), 170)

_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar("assumed", default=None)


@functools.cache
def of(device: jax.Device) -> Device:
    """A JAX device as dispatch sees it."""
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return Device(device.platform, device.device_kind)
    major, minor = (int(x) for x in str(device.compute_capability).split("."))
    return _gpu(device.device_kind, (major, minor), device.core_count)


def current(arrays: object = ()) -> Device:
    """The device that a computation with `arrays` (a pytree) runs on here and now.

    It is the one that `assume` names; else the one that an array is committed to, unless some arrays have no values
    (inside `jit`, whose caller's arrays decide); else jax.default_device; else JAX's first.
    """
    if (assumed := _assumed.get()) is not None:
        return assumed
    if (committed := _committed(arrays)) is not None:
        return of(committed)
    return default()


def default() -> Device:
    """JAX's default device, whatever is assumed: jax.default_device, else JAX's first."""
    named = jax.config.jax_default_device
    if isinstance(named, str):
        return of(jax.devices(named)[0])
    return of(named if named is not None else jax.devices()[0])


def _committed(arrays: object) -> jax.Device | None:
    """The first device of the first array that is committed to one; None if there is none, or inside `jit`."""
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    found = [compat.concrete(leaf) for leaf in leaves]
    if any(array is None for array in found):
        return None
    places = [array.devices() for array in found if array.committed]  # type: ignore[union-attr]
    return min(places[0], key=lambda device: device.id) if places else None


@contextlib.contextmanager
def on(device: Device) -> Iterator[None]:
    """Makes `current()` this device in this thread: while a program is traced that JAX keeps for this device alone."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Makes dispatch choose for `device` in this thread, wherever arrays lie: to lower or export for a GPU on a machine
    without one, and in tests. It must hold while a program is traced, and what JAX has traced outside of it is traced
    again; nothing can be run for a GPU that is not there.
    """
    with compat.kept_apart(device), on(device):
        yield
