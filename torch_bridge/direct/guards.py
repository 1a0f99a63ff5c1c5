"""Whether tensors are like others, asked of torch in one call instead of a dozen.

torch's compiler looks at the tensors of each call before it runs what it compiled for them: at their types, dispatch
keys (with those that the thread adds or leaves out), dtypes, devices, whether they require a gradient, and their
shapes and strides. That look is a function of torch's own, which takes 0.3 us for three tensors; to read the same one
by one takes 3. It is private: where it is not as this file knows it, nothing is like anything, and who asks looks for
himself.
"""

from collections.abc import Callable, Sequence

import torch

__all__ = ["Guard", "guard", "never"]

Guard = Callable[..., bool]
"""Of as many tensors as it was made of, in their order."""


def never(*_: torch.Tensor) -> bool:
    """The guard that knows nothing."""
    return False


def guard(tensors: Sequence[torch.Tensor]) -> Guard:
    """What says whether others are like these: of the same class, dtype, device, shape, strides, dispatch keys in this
    state of the thread, and whether they require a gradient. It is False also where one of them is there twice. `never`
    where torch has no such function.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        make: Callable[..., TensorGuards] = TensorGuards  # its stub takes the sizes of one tensor alone
        found: Guard = make(*tensors, dynamic_dims_sizes=[list(x.shape) for x in tensors],
                            dynamic_dims_strides=[list(x.stride()) for x in tensors]).check
        return found if type(found(*tensors)) is bool else never
    except (ImportError, AttributeError, TypeError, SystemError, RuntimeError):
        return never
