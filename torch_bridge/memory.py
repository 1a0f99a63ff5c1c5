"""One GPU, two allocators: JAX reserves three quarters of the memory when it starts, unless told not to."""

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_flash.compat import JaxDevice

__all__ = ["running_gpus", "share_with_torch"]

CHOICES = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION",
           "XLA_PYTHON_CLIENT_ALLOCATOR")
"""Variables with which a user decides about JAX's memory; if one is set, nothing is changed."""


def share_with_torch() -> None:
    """Switches off JAX's preallocation unless the user chose; if it is too late for that, warns with the numbers."""
    if any(name in os.environ for name in CHOICES):
        return
    os.environ[CHOICES[0]] = "false"
    if taken := _preallocated():
        amounts = ", ".join(f"{gib:.1f} GiB on {name}" for name, gib in taken)
        warnings.warn(f"JAX was started before torch_bridge was imported and has reserved {amounts}, which PyTorch "
                      f"cannot use. Import torch_bridge before the first JAX computation, or set {CHOICES[0]}=false.",
                      stacklevel=3)


def _preallocated() -> list[tuple[str, float]]:
    """(device, GiB that JAX's pool holds), for the GPUs of a JAX that is running."""
    stats = [(str(device), device.memory_stats() or {}) for device in running_gpus()]
    return [(name, numbers.get("bytes_limit", 0) / 2**30) for name, numbers in stats]


def running_gpus() -> "list[JaxDevice]":
    """JAX's GPUs, if JAX is running; starts nothing, and does not import JAX."""
    if "jax" not in sys.modules:
        return []
    import jax

    from pallas_flash import compat

    running = compat.backends_are_initialized()
    return [device for device in jax.local_devices() if device.platform == "gpu"] if running else []
