"""Memory of a GPU beside that of calls: room for a process that compiles."""

import torch

__all__ = ["make_room"]

_CHILD_BYTES = 2**30  # of the GPU, at most, that a process which compiles takes


def make_room(device: torch.device) -> None:
    """Gives back memory that torch keeps for later, if a process that compiles would find too little of the GPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _CHILD_BYTES:
        torch.cuda.empty_cache()
