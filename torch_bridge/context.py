"""One thread, two runtimes: which CUDA device is current.

When JAX starts, it makes a context on every GPU it sees, and leaves the thread that started it on the last one. To
PyTorch that is the thread's current device: tensors on "cuda" would lie there from then on.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["device_kept", "undo_start_of_jax"]


@contextlib.contextmanager
def device_kept() -> Iterator[None]:
    """Whatever starts JAX in here, torch's current device afterwards is the one before."""
    before = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # 0: nobody has chosen another
    try:
        yield
    finally:
        if torch.cuda.device_count() > 1:
            torch.cuda.set_device(before)


def undo_start_of_jax() -> None:
    """Makes the first device current again where JAX was started before torch used a GPU."""
    if "jax" not in sys.modules or torch.cuda.is_initialized():
        return
    from pallas_flash import compat

    jax: Any = sys.modules["jax"]
    if compat.backends_are_initialized() and any(device.platform == "gpu" for device in jax.local_devices()):
        with device_kept():
            pass
