"""Lengths that share a compiled program: sequences are padded to the next of a few, and their own is a run-time value.
"""

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["bucket", "padded"]

SMALLEST = 128


def bucket(length: int) -> int:
    """The next multiple of an eighth of the next power of two, or of 128 if that is more.

        128, 256, 384, 512, 640, 768, 896, 1024, 1280, ...

    From 512 on, less than a quarter is padding. Up to 128 Ki there are 36 of them: those of `direct.lengths`, which
    would copy what is padded to others once more.
    """
    step = max(SMALLEST, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def padded(tensor: Tensor, length: int, axis: int, value: float = 0) -> Tensor:
    """The tensor with this axis filled up to `length`."""
    missing = length - tensor.shape[axis]
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, missing), value=value) if missing else tensor
