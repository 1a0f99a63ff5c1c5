"""Memory that the problems of a device share, each of which would keep its own for as long as the process lives.

Problems keep what they were given, as captured graphs hold its address. Where it is too little, twice as much is made,
so all that was made is at most as much again. It is there for the stream that makes it; `Runner` waits for the device.
"""

import math
import threading
from collections.abc import Sequence

import torch

__all__ = ["MAX_UNREAD_BYTES", "unread", "zeros"]

MAX_UNREAD_BYTES = 2**20
"""Of `unread`: statistics of 131,072 rows. A call of more does not wait for its host."""
_zeros: dict[torch.device, torch.Tensor] = {}
_unread: dict[torch.device, torch.Tensor] = {}
_lock = threading.Lock()


def zeros(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Zeros, float32, to be read alone."""
    return _at_least(_zeros, shape, device)


def unread(shape: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Memory to be written, float32, and never read: launches of all streams may write there at the same time. None:
    it would be too much to keep.
    """
    return _at_least(_unread, shape, device) if 4 * math.prod(shape) <= MAX_UNREAD_BYTES else None


def _at_least(kept: dict[torch.device, torch.Tensor], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    count = math.prod(shape)
    with _lock:
        found = kept.get(device)
        if found is None or found.numel() < count:
            before = 0 if found is None else found.numel()
            found = kept[device] = torch.zeros(max(count, 2 * before), dtype=torch.float32, device=device)
    return found[:count].view(*shape)
