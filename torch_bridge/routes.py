"""Which way a call goes: straight to the driver, or through DLPack into JAX's runtime.

    direct/lengths.py    on a GPU, what nothing is against (`attention.find`), unless PALLAS_FLASH_DIRECT=0 is set
    exchange.py          every other call, on CPU and GPU

JAX is imported by the first call that goes through DLPack.
"""

import math
from typing import TYPE_CHECKING

import torch

from torch_bridge.arguments import Cotangents, Numbers, Operands, PerArray, Results
from torch_bridge.direct import attention, lengths
from torch_bridge.direct.problem import PassName

if TYPE_CHECKING:
    from pallas_flash.arrays import Array

__all__ = ["Stats", "attend", "attend_saving", "backward", "forward", "gradients", "stats_tensor", "write_gradients"]

type Stats = "Array" | torch.Tensor
"""The statistics of rows between a forward and its backward: a tensor, if the forward was launched directly."""


def attend(operands: Operands, numbers: Numbers) -> torch.Tensor:
    """`forward`'s out alone."""
    direct = lengths.forward(operands, numbers, most=attention.MOST_ALONE)
    if direct is not None:
        return direct.out
    from torch_bridge import exchange
    return exchange.attend(operands, numbers)


def attend_saving(operands: Operands, numbers: Numbers, then: PassName = "backward") -> tuple[torch.Tensor, Stats]:
    """`forward`'s results, the statistics being for `gradients` and `write_gradients` alone.

    Args:
      then: the pass that will follow, if it is launched directly.
    """
    more = operands.bias, operands.score_floats  # the backward that makes their gradients may go through DLPack
    wants_more = any(x is not None and x.requires_grad for x in more)
    direct = lengths.forward(operands, numbers, most=attention.MOST_WITH_GRADIENTS,
                             then=None if wants_more else then)
    if direct is not None:
        return direct
    from torch_bridge import exchange
    return exchange.attend_saving(operands, numbers)


def stats_tensor(stats: Stats, like: torch.Tensor) -> torch.Tensor:
    """`attend_saving`'s statistics as a tensor, on the device of `like`."""
    if isinstance(stats, torch.Tensor):
        return stats
    from torch_bridge import exchange
    return exchange.stats_tensor(stats, like)


def gradients(operands: Operands, numbers: Numbers, results: tuple[torch.Tensor, Stats], dout: torch.Tensor,
              needs: PerArray[bool]) -> PerArray[torch.Tensor | None]:
    """`backward` with the results of `attend_saving`; None in place of the gradients that are not needed."""
    out, stats = results
    if isinstance(stats, torch.Tensor):
        found = backward(operands, numbers, Results(out, stats), Cotangents(dout, None), needs)
        return PerArray(*(grad if needed else None for grad, needed in zip(found, needs, strict=True)))
    from torch_bridge import exchange
    return exchange.gradients(operands, numbers, (out, stats), dout, needs)


def write_gradients(operands: Operands, numbers: Numbers, results: tuple[torch.Tensor, Stats], dout: torch.Tensor,
                    needs: PerArray[bool], grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Writes `gradients` of query, key and value into tensors of their shapes: kernels do, or they are copied.

    Args:
      needs: those of which others may be left as they are.
    """
    out, stats = results
    if isinstance(stats, torch.Tensor) and lengths.write_gradients(
            operands, numbers, Results(out, stats), dout, grads, most=attention.MOST_WITH_GRADIENTS):
        return
    for found, grad in zip(gradients(operands, numbers, results, dout, needs), grads):
        if found is not None:
            grad.copy_(found)


def forward(operands: Operands, numbers: Numbers, needs_stats: bool, in_graph: bool = False) -> Results:
    """out (batch, q_heads, q_len, d_v), stored as query is, and the statistics of rows, (0,) if they are not needed.

    Args:
      in_graph: whether the call may be part of a CUDA graph, which what DLPack does cannot be.
    """
    most = math.inf if in_graph else attention.MOST_WITH_GRADIENTS if needs_stats else attention.MOST_ALONE
    direct = lengths.forward(operands, numbers, most=most)
    if direct is not None:
        out, stats = direct
        return Results(out, stats if needs_stats else stats.new_empty((0,)))
    from torch_bridge import exchange
    return exchange.forward(operands, numbers, needs_stats)


def backward(operands: Operands, numbers: Numbers, results: Results, cotangents: Cotangents,
             needs: PerArray[bool], in_graph: bool = False) -> PerArray[torch.Tensor]:
    """The gradients with the storage order of their tensors; (0,) in place of those not needed. See `forward`."""
    # Else lse alone (`AttentionBackward`); and no launches make gradients of a score function's arrays.
    is_launched = results.stats.dim() == 4 and not (needs.score_floats and operands.score_floats is not None)
    wants_bias = needs.bias and operands.bias is not None
    most = math.inf if in_graph else attention.MOST_WITH_GRADIENTS
    grads = lengths.backward(operands, numbers, results, cotangents, most=most,
                             wants_bias=wants_bias) if is_launched else None
    if grads is not None:
        return PerArray(*(grad if needed and grad is not None else operands.query.new_empty((0,))
                          for grad, needed in zip(grads, needs, strict=True)))
    from torch_bridge import exchange
    return exchange.backward(operands, numbers, results, cotangents, needs)
