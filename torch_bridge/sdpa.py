"""The arguments of `torch.nn.functional.scaled_dot_product_attention`: checked, broadcast, and made into a `Call`.

Only torch is used here and everything is traceable, so `torch.compile`, `torch.export`, FakeTensor, autocast and
functorch see ordinary tensor operations around one operator. Errors have the type that torch raises on the same
condition. Defaults of public functions are the int 0, never 0.0: a float is a symbol to torch.compile(dynamic=True),
which starts again where it turns out to be a constant.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Never, SupportsFloat, TypeGuard

import torch

from torch_bridge import eager, messages
from torch_bridge.arguments import LARGEST_NUMBER, Numbers, Operands
from torch_bridge.direct import shortcut

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

__all__ = ["Call", "nested_numbers", "prepare", "scaled_dot_product_attention"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN_NUMBERS = (float, int, type(None))  # NumPy's float64 is a float; what an array or a tensor holds may change


class Call(NamedTuple):
    """One call with its axes merged to four, as the operator takes it."""

    operands: Operands  # without a seed
    numbers: Numbers
    out_shape: tuple[int, ...] | None  # None: four axes, as the operator returns them


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    **unknown: Never,
) -> torch.Tensor:
    """out = dropout(softmax(scale * query key^T + attn_mask)) value, exact, without O(L * S) memory.

    A stand-in for `torch.nn.functional.scaled_dot_product_attention`, computed by pallas_flash: same arguments, results
    and errors, on CPU and CUDA tensors, with autograd, autocast, torch.func, torch.compile and torch.export. The
    deliberate differences are listed in docs/semantics.md. Nested tensors (torch.jagged) are (N, Hq, ragged L, E) each.

    Args:
      query: (..., Hq, L, E), 2 to any number of axes; bfloat16, float16, float32 or float64.
      key: (..., H, S, E).
      value: (..., H, S, Ev). Leading axes broadcast.
      attn_mask: boolean (True attends) or float (added to the scores; it may require grad), broadcastable to
        (..., Hq, L, S), one axis being (S,); or a `torch.nn.attention.bias.CausalBias`, which is never materialised.
      dropout_p: the probability of dropping an attention weight, drawn from torch's generator (`torch.manual_seed`).
      is_causal: the query at i attends to the keys at 0..i (aligned top left).
      scale: multiplies the scores; None means 1 / sqrt(E).
      enable_gqa: Hq may be a multiple of H.

    Returns:
      (..., Hq, L, Ev) in the dtype of query, stored in the order of query. A query that attends to nothing gives 0.

    Raises:
      RuntimeError, IndexError, TypeError, ValueError: where torch raises them; and RuntimeError if the lengths of key
        and value differ; inside CUDA graph capture, where the call is the first of its kind or goes through DLPack; and
        in a process that was forked after JAX had started or kernels were loaded.
    """
    if unknown:
        raise messages.unknown_keyword(scaled_dot_product_attention, next(iter(unknown)))
    name = None
    if (attn_mask is None and type(is_causal) is type(enable_gqa) is bool and isinstance(scale, _PLAIN_NUMBERS)
            and isinstance(dropout_p, _PLAIN_NUMBERS) and dropout_p == 0 and not torch.compiler.is_compiling()):
        out = eager.attend_recent(query, key, value, (is_causal, scale, enable_gqa))
        if out is not None:
            return out
        if shortcut.may_know(query, key, value):
            name = shortcut.name_of(query, key, value, is_causal, scale, enable_gqa)
            out = eager.attend_again(name, query, key, value)
            if out is not None:
                return out
            copies = eager.with_copies(name, query, key, value)
            if copies is not None:
                return scaled_dot_product_attention(query, *copies, is_causal=is_causal, scale=scale,
                                                    enable_gqa=enable_gqa)
    if getattr(query, "layout", None) is torch.jagged:
        from torch_bridge import nested  # which is made from this

        numbers = nested_numbers((query, key, value), attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return nested.attend((query, key, value), attn_mask, numbers, enable_gqa)
    call = prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = eager.attend(call.operands, call.numbers)
    if name is not None and call.operands.query is query and call.operands.key is key and call.operands.value is value:
        shortcut.learn(name, call.operands, call.numbers)
    return out if call.out_shape is None else out.reshape(call.out_shape)


# `**unknown` is there for its message alone: who asks for the signature is told torch's.
scaled_dot_product_attention.__signature__ = messages.without_unknown(scaled_dot_product_attention)  # type: ignore[attr-defined]


def nested_numbers(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attn_mask: torch.Tensor | None,
                   dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> Numbers:
    """Those of a call of nested query, key and value, whose arguments have the types that it takes."""
    _check_types(*tensors, attn_mask, is_causal, enable_gqa)
    return Numbers.of(causal_offset=0 if is_causal else None, scale=scale, dropout_p=dropout_p)


def prepare(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
            dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> Call:
    """The checked and broadcast call; raises what torch raises."""
    _check_types(query, key, value, attn_mask, is_causal, enable_gqa)
    scale, dropout_p = None if scale is None else _number("scale", scale), _number("dropout_p", dropout_p)
    if scale is not None and not abs(scale) <= LARGEST_NUMBER:
        raise ValueError(f"scale must be a Python number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}, or None, got "
                         f"{scale=}. Multiply query with it and pass scale=1.0.")
    causal_offset = 0 if is_causal else None
    if attn_mask is not None and type(attn_mask) is not torch.Tensor and _is_causal_bias(attn_mask):
        causal_offset, attn_mask = _causal_offset(attn_mask, query, key, is_causal), None
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (_autocast(x, dtype) for x in (query, key, value))
        attn_mask = None if attn_mask is None else _autocast(attn_mask, dtype)
    _check_tensors(query, key, value, attn_mask)
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True. "
                           "Combine the two into one mask.")
    rank, lead = max(query.dim(), key.dim(), value.dim()), query.shape[:-3]
    if rank != 4 or not (query.shape[:2] == key.shape[:2] == value.shape[:2]):
        query, key, value, lead = _broadcast(query, key, value, rank, enable_gqa)
    if query.shape[3] != key.shape[3]:
        raise RuntimeError("query and key must have the same last size, "
                           f"got query {tuple(query.shape)}, key {tuple(key.shape)}")
    if key.shape[2] != value.shape[2]:
        raise RuntimeError("key and value must have the same length, "
                           f"got key {tuple(key.shape)}, value {tuple(value.shape)}")
    mask = bias = out_shape = None
    if attn_mask is not None:
        attn_mask = _merged_mask(attn_mask, lead, (query.shape[1], query.shape[2], key.shape[2]), rank)
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    if rank != 4:
        out_shape = (*lead, *query.shape[1:3], value.shape[3])[-rank:]
    if query.shape[3] == 0:  # no products at all: one of zeros has the same scores
        query, key, scale = torch.nn.functional.pad(query, (0, 1)), torch.nn.functional.pad(key, (0, 1)), 1.0
    return Call(Operands.of(query, key, value, mask=mask, bias=bias, seed=None),
                Numbers.of(causal_offset=causal_offset, scale=scale, dropout_p=dropout_p), out_shape)


def _number(name: str, value: SupportsFloat) -> float:
    if not isinstance(value, (float, int)):
        is_single = (value.numel() == 1 if isinstance(value, torch.Tensor) else
                     hasattr(value, "__float__") and getattr(value, "shape", ()) == ())
        if not is_single:
            raise TypeError(f"scaled_dot_product_attention(): argument {name!r} must be float, not "
                            f"{type(value).__name__}, got {name}={value!r}. Pass one number.")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise TypeError(f"scaled_dot_product_attention(): argument {name!r} has no gradient, got a Tensor that "
                            "requires one. For a scale that is learnt, pass query * scale and scale=1.0; else detach "
                            "it.")
    return float(value)


def _check_types(query: object, key: object, value: object, attn_mask: object, is_causal: object,
                 enable_gqa: object) -> None:
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        messages.require_tensors(query=query, key=key, value=value)
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got type(attn_mask)={type(attn_mask).__name__}. Pass "
                        "booleans, True where a query attends, or floats to add; a rule is is_causal=True, or window= "
                        "of torch_bridge.flash_attention.")
    if not (isinstance(is_causal, bool) and isinstance(enable_gqa, bool)):
        raise TypeError("scaled_dot_product_attention(): is_causal and enable_gqa must be bool, "
                        f"got {is_causal=}, {enable_gqa=}")


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got query.dtype: {query.dtype} "
                           f"key.dtype: {key.dtype} and value.dtype: {value.dtype} instead.")
    if not query.device == key.device == value.device:
        raise RuntimeError("Expected query, key, and value to have the same device, but got query.device: "
                           f"{query.device} key.device: {key.device} and value.device: {value.device} instead.")
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError("Expected query, key, and value to all be at least 2 dimensional, but got query.dim: "
                           f"{query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead.")
    if query.dtype not in DTYPES:
        kind = RuntimeError if query.dtype in (torch.bool, *_INTEGERS) else NotImplementedError
        raise kind(f"scaled_dot_product_attention is not implemented for {query.dtype}: cast to one of {DTYPES}")
    for tensor in (query, key, value):
        if tensor.layout is not torch.strided or tensor.is_nested:
            do = "Pad it, or use torch's own function"
            if any(x.layout is torch.jagged for x in (query, key, value)):
                do = ("Nested query, key and value, all three, are for torch_bridge.scaled_dot_product_attention, and "
                      "their values() and offsets() for torch_bridge.flash_attn.flash_attn_varlen_func")
            raise messages.must("attention needs strided tensors", f"layout {tensor.layout}, "
                                f"is_nested={tensor.is_nested}", do)
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError("Expected attn_mask dtype to be bool or float or to match query dtype, but got "
                           f"attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead.")
    if attn_mask.device != query.device:
        raise RuntimeError("Expected attn_mask to be on the device of query, but got attn_mask.device: "
                           f"{attn_mask.device} and query.device: {query.device} instead.")


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def _autocast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts as autocast does for this function: every floating tensor except float64 to the autocast dtype."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _is_causal_bias(attn_mask: object) -> "TypeGuard[CausalBias]":
    """Known by its fields: importing its class would import the compiler, for seconds."""
    return hasattr(attn_mask, "seq_len_kv")


def _causal_offset(bias: "CausalBias", query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> int:
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True, got attn_mask and is_causal=True. Leave out "
                         "is_causal: the bias is causal.")
    q_len, kv_len = bias.seq_len_q, bias.seq_len_kv
    if bias.variant.name == "UPPER_LEFT" or q_len == kv_len:
        return 0
    if query.shape[-2] != q_len or key.shape[-2] != kv_len:
        raise RuntimeError(f"causal_lower_right({q_len}, {kv_len}) does not match query of length {query.shape[-2]} "
                           f"and key of length {key.shape[-2]}")
    return int(kv_len - q_len)


def _broadcast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rank: int,
               enable_gqa: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Size]:
    """Four axes each, batch sizes equal, heads of key and value equal and dividing those of query; and the lead."""
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError("enable_gqa needs query, key and value of at least 3 dimensions, "
                         f"got {query.dim()}, {key.dim()}, {value.dim()}")
    tensors = [tensor.unsqueeze(0) if tensor.dim() == 2 else tensor for tensor in (query, key, value)]
    given = [tensor.shape[-3] for tensor in tensors]
    try:
        heads = _grouped_heads(*given) if enable_gqa else _broadcast_heads(*given)
        lead = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))
    except RuntimeError:
        raise messages.leading_axes(query, key, value, enable_gqa) from None
    query, key, value = (_merge(_with_heads(tensor, count, enable_gqa), lead)
                         for tensor, count in zip(tensors, heads, strict=True))
    return query, key, value, lead


def _broadcast_heads(q_heads: int, k_heads: int, v_heads: int) -> tuple[int, int, int]:
    (heads,) = torch.broadcast_shapes((q_heads,), (k_heads,), (v_heads,))
    return (heads, 1, 1) if k_heads == v_heads == 1 else (heads, heads, heads)


def _grouped_heads(q_heads: int, k_heads: int, v_heads: int) -> tuple[int, int, int]:
    for count in (k_heads, v_heads):
        if count != q_heads and (count == 0 or q_heads % count != 0):
            raise RuntimeError("heads")  # `_broadcast` has the message
    return (q_heads, k_heads, v_heads) if k_heads == v_heads else (q_heads, q_heads, q_heads)


def _with_heads(tensor: torch.Tensor, heads: int, enable_gqa: bool) -> torch.Tensor:
    count = tensor.shape[-3]
    if count == heads:
        return tensor
    if enable_gqa:
        return tensor.repeat_interleave(heads // count, dim=-3)
    return tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])


def _merge(tensor: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """(*lead, ...) with the lead axes broadcast and merged into one; a view wherever torch can make one."""
    if tuple(tensor.shape[:-3]) != tuple(lead):
        tensor = tensor.expand(*lead, *tensor.shape[-3:])
    if len(lead) == 1:
        return tensor
    return tensor.unsqueeze(0) if len(lead) == 0 else tensor.flatten(0, len(lead) - 1)


def _merged_mask(attn_mask: torch.Tensor, lead: Sequence[int], sizes: tuple[int, int, int], rank: int) -> torch.Tensor:
    """(batch or 1, heads or 1, q_len or 1, kv_len or 1), not materialised; sizes are (heads, q_len, kv_len)."""
    if attn_mask.dim() < 1:
        raise IndexError("attn_mask must have at least 1 dimension, got attn_mask.dim()=0. Pass "
                         "attn_mask.expand(kv_len).")
    full = (*lead, *sizes)[-rank:] if rank != 3 else (1, *sizes)
    shape = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != len(full) or any(size not in (1, wanted) for size, wanted in zip(shape, full, strict=True)):
        raise messages.mask_shape(attn_mask, full)
    if not attn_mask.requires_grad:
        for axis in range(attn_mask.dim()):  # an expanded axis holds one element: its copies need not be read
            if attn_mask.stride(axis) == 0 and attn_mask.shape[axis] > 1:
                attn_mask = attn_mask.narrow(axis, 0, 1)
    inner = (1,) * max(3 - attn_mask.dim(), 0) + tuple(attn_mask.shape[-3:])
    outer = tuple(attn_mask.shape[:-3])
    if all(size == 1 for size in outer):
        return attn_mask.reshape(1, *inner)
    return _merge(attn_mask.reshape((1,) * (len(lead) - len(outer)) + outer + inner), lead)
