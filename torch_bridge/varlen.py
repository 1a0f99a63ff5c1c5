"""aten's operators of flash attention on sequences of their own lengths, computed by pallas_flash (`activation`).

    _flash_attention_forward                     out and lse
    _flash_attention_forward_no_dropout_inplace  into an out that is there
    _flash_attention_backward                    the gradients of query, key and value

`torch.nn.attention.varlen.varlen_attn` and nested tensors call them. Tensors are (tokens, heads, dim) with boundaries,
or (batch, length, heads, dim) without; the causal mask and windows are aligned at the bottom right.
"""

import torch

from torch_bridge import kept_lse, ops
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results

__all__ = ["KERNELS"]


def _call(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], starts: tuple[torch.Tensor | None, ...],
          numbers: Numbers, seed: torch.Tensor | None) -> tuple[Operands, Numbers]:
    if (starts[0] is None) != (starts[1] is None):
        raise NotImplementedError("pallas_flash's kernels of aten::_flash_attention_forward need cum_seq_q and "
                                  "cum_seq_k, or neither, got one of them")
    query, key, value = map(_with_batch, tensors)
    operands = Operands.of(query, key, value, mask=None, bias=None, seed=seed)
    if starts[0] is None or starts[1] is None:
        return operands, numbers._replace(offset=key.shape[2] - query.shape[2])
    q_starts, kv_starts = (x.to(torch.int32) for x in starts if x is not None)
    return operands._replace(q_starts=q_starts, kv_starts=kv_starts), numbers._replace(ends_aligned=True)


def _with_batch(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, dim) of (batch, length, heads, dim), or of one row of tokens."""
    return (tensor if tensor.dim() == 4 else tensor[None]).transpose(1, 2)


def _numbers(is_causal: bool, dropout_p: float, scale: float | None, left: int | None, right: int | None) -> Numbers:
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    numbers = Numbers.of(causal_offset=None, scale=scale, dropout_p=dropout_p)
    return numbers._replace(left=left, right=0 if is_causal else right)


def _require_none(**given: object) -> None:
    names = [name for name, value in given.items() if value is not None and value is not False]
    if names:
        raise NotImplementedError(f"pallas_flash's kernels of aten::_flash_attention_forward do not take {names[0]}: "
                                  "call torch.nn.attention.restore_flash_attention_impl() before, or the functions of "
                                  "torch_bridge.flash_attn")


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cum_seq_q: torch.Tensor | None,
             cum_seq_k: torch.Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
             return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None,
             window_size_right: int | None = None, seqused_k: torch.Tensor | None = None,
             alibi_slopes: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
             num_splits: int | None = None) -> tuple[torch.Tensor, ...]:
    """aten::_flash_attention_forward; the seed of dropout is returned as rng_state."""
    _require_none(return_debug_mask=return_debug_mask, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
                  block_table=block_table)
    seed = ops.draw_seed(query) if dropout_p > 0 else None
    call = _call((query, key, value), (cum_seq_q, cum_seq_k),
                 _numbers(is_causal, dropout_p, scale, window_size_left, window_size_right), seed)
    out, stats = ops.attention(*Attention(*call, needs_stats=True).flat())
    out, lse = out.transpose(1, 2), kept_lse.of(stats)
    if query.dim() == 3:
        out, lse = out[0], lse[0]
    state = query.new_zeros((2,), dtype=torch.int64) if seed is None else seed.to(torch.int64)
    return (out, lse, state.view(torch.uint64), query.new_empty((), dtype=torch.uint64), query.new_empty((0,)))


def _forward_into(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int, max_k: int,
                  dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
                  window_size_left: int | None = None, window_size_right: int | None = None,
                  seqused_k: torch.Tensor | None = None, alibi_slopes: torch.Tensor | None = None,
                  block_table: torch.Tensor | None = None, num_splits: int | None = None) -> torch.Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: lse; out is copied into its place."""
    found, lse, *_ = _forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale,
        window_size_left=window_size_left, window_size_right=window_size_right, seqused_k=seqused_k,
        alibi_slopes=alibi_slopes, block_table=block_table)
    out.copy_(found)
    return lse


def _backward(grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
              logsumexp: torch.Tensor, cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int,
              max_k: int, dropout_p: float, is_causal: bool, rng_state: torch.Tensor, unused: torch.Tensor, *,
              scale: float | None = None, window_size_left: int | None = None,
              window_size_right: int | None = None) -> tuple[torch.Tensor, ...]:
    """aten::_flash_attention_backward."""
    seed = rng_state.view(torch.int64).to(torch.int32) if dropout_p > 0 else None
    operands, numbers = _call((query, key, value), (cum_seq_q, cum_seq_k),
                              _numbers(is_causal, dropout_p, scale, window_size_left, window_size_right), seed)
    lse = logsumexp if query.dim() == 4 else logsumexp[None]
    grads = ops.attention_backward(*AttentionBackward(
        operands, numbers, Results(_with_batch(out), kept_lse.stats(lse)), Cotangents(_with_batch(grad_out), None),
        PerArray(query=True, key=True, value=True, bias=False, score_floats=False)).flat())[:3]
    found = (x.transpose(1, 2) for x in grads)
    return tuple(found if query.dim() == 4 else (x[0] for x in found))


KERNELS = {"_flash_attention_forward": _forward, "_flash_attention_forward_no_dropout_inplace": _forward_into,
           "_flash_attention_backward": _backward}
"""By the names of their operators in aten."""
