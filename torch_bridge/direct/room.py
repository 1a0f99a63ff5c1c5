"""Memory of a GPU beside that of calls: zeros that all problems read, and room for a process that compiles."""

import math
import threading
from collections.abc import Sequence

import torch

__all__ = ["make_room", "zeros"]

_CHILD_BYTES = 2**30  # of the GPU, at most, that a process which compiles takes
_zero: dict[torch.device, torch.Tensor] = {}
_zero_lock = threading.Lock()


def zeros(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Zeros to be read, in memory that all problems of a device share. A problem keeps them, as captured graphs hold
    their address: where they are too few, twice as many are made, so all that were are at most as much again.

    They are there for the stream that makes them; `Runner` waits for the device.
    """
    count = math.prod(shape)
    with _zero_lock:
        found = _zero.get(device)
        if found is None or found.numel() < count:
            before = 0 if found is None else found.numel()
            found = _zero[device] = torch.zeros(max(count, 2 * before), dtype=torch.float32, device=device)
    return found[:count].view(*shape)


def make_room(device: torch.device) -> None:
    """Gives back memory that torch keeps for later, if a process that compiles would find too little of the GPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _CHILD_BYTES:
        torch.cuda.empty_cache()
