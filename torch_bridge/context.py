"""One thread or process, two runtimes: which CUDA device is current, and what a fork leaves behind.

When JAX starts, it makes a context on every GPU it sees, and leaves the thread that started it on the last one. To
PyTorch that is the thread's current device: tensors on "cuda" would lie there from then on.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from torch_bridge import memory

__all__ = ["device_kept", "undo_start_of_jax"]


@contextlib.contextmanager
def device_kept() -> Iterator[None]:
    """If JAX starts in here, and finds GPUs, torch's current device afterwards is the one before."""
    if memory.running_gpus():
        yield
        return
    before = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # 0: nobody has chosen another
    yield
    _make_current(before)


def undo_start_of_jax() -> None:
    """Makes the first device current again where JAX was started before torch used a GPU."""
    if not torch.cuda.is_initialized():
        _make_current(0)


def _make_current(index: int) -> None:
    in_bad_fork = getattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # where torch cannot use CUDA any more
    if len(memory.running_gpus()) > 1 and torch.cuda.device_count() > 1 and not in_bad_fork():
        torch.cuda.set_device(index)


def _before_fork() -> None:
    """JAX may run although nothing of ours has used it yet: whether it does is then noted here."""
    if "jax" in sys.modules and "pallas_flash" not in sys.modules:
        from pallas_flash import forks
        forks.note_start_of_jax()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
