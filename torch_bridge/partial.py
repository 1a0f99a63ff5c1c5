"""Attention over some of the keys of each query, and the gradients' terms of those keys: what a ring over processes
(docs/torch_bridge.md) calls at each step and sums up itself.

Both are calls of the operators of ops.py with `Numbers.partial`, so nothing here knows how they are computed.
"""

import torch

from torch_bridge import ops, sdpa, strides
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, PerArray, Results

__all__ = ["partial_attention", "partial_attention_backward"]


def partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, *,
    is_causal: bool = False, causal_offset: int = 0, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = softmax(scale * query key^T) value and logsumexp = log(sum(exp(scale * query key^T))) over these keys.

    With a and b over two sets of keys, those over both are

        logsumexp = torch.logaddexp(logsumexp_a, logsumexp_b)
        out = out_a * exp(logsumexp_a - logsumexp) + out_b * exp(logsumexp_b - logsumexp)

    where a query has a key in either. Both results are differentiable, as that of `scaled_dot_product_attention` is;
    autograd gives the gradients the dtype of their tensors, so a sum that must not be rounded is one of
    `partial_attention_backward`.

    Args:
      query: (N, Hq, L, E); bfloat16, float16, float32 or float64.
      key: (N, H, S, E).
      value: (N, H, S, Ev). H is Hq, or 1.
      attn_mask: boolean (True attends), broadcastable to (N, Hq, L, S).
      is_causal: the query at i attends to the keys up to i + causal_offset.
      causal_offset: the key aligned with the first query.
      scale: multiplies the scores; None means 1 / sqrt(E).
      enable_gqa: Hq may be a multiple of H.

    Returns:
      out (N, Hq, L, Ev), stored in the order of query, and logsumexp (N, Hq, L), a natural logarithm; both float32
      whatever the dtype of query (float64 for float64). A query that attends to nothing has out 0 and logsumexp -inf.

    Raises:
      RuntimeError, TypeError, ValueError: as `scaled_dot_product_attention`; and RuntimeError if attn_mask is not
        boolean, or an axis would have to be broadcast.
    """
    call = _prepare(sdpa.prepare(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa),
                    (query, key, value), is_causal, causal_offset)
    out, stats = ops.attention(*call.flat())
    return out, stats[:, :, 0]


def partial_attention_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    logsumexp: torch.Tensor, attn_mask: torch.Tensor | None = None, *, is_causal: bool = False, causal_offset: int = 0,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms that these keys add to the gradients of attention over more keys.

    The gradient of query is the sum of its terms over all keys, those of key and value are the sums over all queries.
    float32 holds logsumexp to 2^-24 of it, and the weights, which are computed anew from it, are wrong by as much: with
    scores of 1e4 by up to 5e-4 of themselves.

    Args:
      grad_out: (N, Hq, L, Ev), the gradient of out; in the dtype of query or of logsumexp.
      query, key, value, attn_mask, is_causal, causal_offset, scale, enable_gqa: as in `partial_attention`.
      out: (N, Hq, L, Ev), of all keys that the queries attend to; in the dtype of query or of logsumexp.
      logsumexp: (N, Hq, L), likewise of all keys; float32 (float64 for float64).

    Returns:
      Terms of the gradients of query, key and value: each in the shape and storage order of its tensor, float32
      whatever its dtype (float64 for float64). They have no derivative.

    Raises:
      RuntimeError, TypeError, ValueError: as `partial_attention`; and RuntimeError if grad_out, out or logsumexp do not
        fit query and value.
    """
    call = _prepare(sdpa.prepare(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa),
                    (query, key, value), is_causal, causal_offset)
    query, value = call.operands.query, call.operands.value
    wide, shape = strides.stats_dtype(query), (*query.shape[:3], value.shape[3])
    _check("grad_out", grad_out, shape, (query.dtype, wide), query.device)
    _check("out", out, shape, (query.dtype, wide), query.device)
    _check("logsumexp", logsumexp, shape[:3], (wide,), query.device)
    dq, dk, dv, *_ = ops.attention_backward(*AttentionBackward(
        call.operands, call.numbers, Results(out, logsumexp), Cotangents(grad_out, None),
        needs=PerArray(query=True, key=True, value=True, bias=False, score_floats=False)).flat())
    return dq, dk, dv


def _prepare(call: sdpa.Call, given: tuple[torch.Tensor, ...], is_causal: bool, causal_offset: int) -> Attention:
    """The call as one of partial results, or an error where that has none of them."""
    operands, numbers = call.operands, call.numbers
    if operands.bias is not None:
        raise RuntimeError(f"attn_mask of a partial call must be boolean, got attn_mask.dtype: {operands.bias.dtype}. "
                           "Pass True where a query attends to a key.")
    if any(x.dim() != 4 or x.shape != y.shape for x, y in zip(given, operands[:3], strict=True)):
        shapes = ", ".join(f"{name}.shape={tuple(x.shape)}"
                           for name, x in zip(("query", "key", "value"), given, strict=True))
        raise RuntimeError("query, key and value of a partial call must be (batch, heads, length, dim), with one batch "
                           f"size, and as many heads in key as in value, got {shapes}. Expand them before.")
    if not isinstance(causal_offset, int) or isinstance(causal_offset, bool):
        raise TypeError(f"causal_offset must be int, got {causal_offset=}. Pass a number of keys.")
    if causal_offset and not is_causal:
        raise ValueError(f"causal_offset needs is_causal=True, got {is_causal=}, {causal_offset=}. Leave it out, or "
                         "pass is_causal=True.")
    offset = causal_offset if is_causal else numbers.offset
    return Attention(operands, numbers._replace(offset=offset, partial=True), needs_stats=True)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
           device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        allowed = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise RuntimeError(
            f"{name} must have shape {shape}, dtype {allowed} and device {device}, "
            f"got {name}.shape={tuple(tensor.shape)}, {name}.dtype={tensor.dtype}, {name}.device={tensor.device}. "
            "Pass out and logsumexp of all keys, and the gradient of that out.")
