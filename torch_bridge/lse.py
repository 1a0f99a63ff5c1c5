"""What can be computed from out and lse alone, in plain torch: attention sinks, and the sum of partial results.

    sinks: lse' = log(exp(lse) + exp(sink))     out' = exp(lse - lse') out
    parts: lse' = log(sum(exp(lse_i)))          out' = sum(exp(lse_i - lse') out_i)
"""

from collections.abc import Sequence

import torch

from torch_bridge import messages

__all__ = ["check_sinks", "combine", "with_sinks"]


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the softmax that sinks (heads,) take part in, from those of the softmax without them.

    out is (batch, heads, length, dim) and lse (batch, heads, length). A row that attends to nothing keeps out 0 and has
    the sink as its lse. A sink of -inf changes nothing. Computed in the dtype of lse.
    """
    sink = sinks.to(lse.dtype)[:, None]
    nothing = lse == -torch.inf
    some = lse.masked_fill(nothing, 0.0)
    # exp(lse - lse') from lse - sink alone, with a derivative of full precision where the sink weighs little.
    share = torch.nn.functional.logsigmoid(some - sink).exp().masked_fill(nothing, 0.0)
    total = torch.where(nothing, sink, torch.logaddexp(some, sink))
    return (out * share[..., None]).to(out.dtype), total


def check_sinks(sinks: torch.Tensor, query: torch.Tensor) -> None:
    """Raises unless there is one logit for each head of query (batch, heads, length, dim)."""
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks must be a Tensor of shape (heads,), not {type(sinks).__name__}. Wrap it: "
                        "torch.tensor(...) on the device of query.")
    heads = query.shape[1]
    if tuple(sinks.shape) != (heads,) or not sinks.is_floating_point() or sinks.device != query.device:
        raise messages.must(
            f"sinks must be floats of shape (heads,) = ({heads},) on {query.device}",
            f"sinks.shape={tuple(sinks.shape)}, sinks.dtype={sinks.dtype}, sinks.device={sinks.device}",
            "Give one logit for each head of query")


def combine(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention over all keys, from those over parts of the keys; differentiable.

    Args:
      outs: of each part out (..., dim), for instance (batch, heads, length, dim).
      lses: of each part lse (...), a natural logarithm, -inf for rows that attend to nothing of the part. For
        flash-attn's order, out (batch, length, heads, dim) and lse (batch, heads, length), pass lse.transpose(1, 2).

    Returns:
      out (..., dim) in the dtype of the first part, lse (...) in that of the first lse. A row that attends to nothing
      at all has out 0 and lse -inf.

    Raises:
      ValueError: no parts, not as many lses as outs, or shapes that do not fit.
    """
    if not len(outs) or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be of the same parts, at least one, got {len(outs)} and {len(lses)}. "
                         "Pass lse of each out.")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(f"each lse must have the shape of its out without the last axis, and all outs one shape, "
                             f"got out.shape={tuple(out.shape)}, lse.shape={tuple(lse.shape)}, outs[0].shape="
                             f"{tuple(outs[0].shape)}. Transpose lse, or expand a part.")
    each = torch.stack([*lses])
    largest = each.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (each - largest).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    terms = [(weight / total)[..., None] * out for weight, out in zip(weights, outs, strict=True)]
    return sum(terms[1:], terms[0]).to(outs[0].dtype), (largest + total.log()).masked_fill(nothing, -torch.inf)
