"""Why a call goes through DLPack, in words: what `explain` says, and `report` counts."""

import torch

from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import attention, cache, lengths, requirements

__all__ = ["why_not"]


def why_not(operands: Operands, numbers: Numbers) -> str | None:
    """Why a call goes through DLPack; None: it takes the direct path, if what computes it is a list of launches."""
    return _why_impossible(operands, numbers) or _why_slow(operands, numbers)


def _why_impossible(operands: Operands, numbers: Numbers) -> str | None:
    """`why_not` of what could not be launched directly."""
    query = operands.query
    if query.device.type not in attention.DEVICES:
        return f"tensors are on {query.device}"
    if not attention.is_on():
        return f"{attention.VARIABLE}=0 is set"
    return (attention.why_not(operands, numbers) or attention.why_not_gpu(operands, numbers, query.device)
            or requirements.why_not() or cache.why_not()
            or attention.reason_found(attention.problem_of(operands, numbers), query.device))


def _why_slow(operands: Operands, numbers: Numbers) -> str | None:
    """Why an eager call goes through DLPack although it could be launched directly; None: it does
    not, or its plan is not loaded.
    """
    call = attention.known(operands, numbers)
    if call is None or lengths.shared(operands, numbers, "forward") is not None:
        return None
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands.differentiable)
    return call.slow_reason("forward", attention.MOST_WITH_GRADIENTS if needs_grad else attention.MOST_ALONE)
