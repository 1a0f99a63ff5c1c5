"""Errors for arguments of other attention functions and for shapes that nearly fit; each says what to write."""

import inspect
import re
from collections.abc import Callable, Sequence

import torch

__all__ = ["hide_unknown", "leading_axes", "mask_shape", "must", "require_bool", "require_tensors", "shapes",
           "unknown_keyword", "without_unknown"]

_OURS = "torch_bridge.flash_attention"
_INSTEAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("causal", "use_causal_mask", "is_causal"), ("is_causal=True", "causal=True")),
    **dict.fromkeys(("causal_offset", "offset"), (
        "causal_offset=...", f"{_OURS}(is_causal=True, causal_offset=...)")),
    **dict.fromkeys(("mask", "attention_mask", "bias", "attn_bias", "attn_mask"), (
        "attn_mask=...", f"{_OURS}(attn_mask=...)")),
    **dict.fromkeys(("key_padding_mask", "padding_mask"), (
        "attn_mask=mask[:, None, None, :], True where keys count",
        f"{_OURS}(attn_mask=mask[:, None, None, :]), True where keys count")),
    **dict.fromkeys(("dropout", "dropout_rate"), ("dropout_p=...",)),
    **dict.fromkeys(("softmax_scale", "scaling", "sm_scale", "scale"), ("scale=...", "softmax_scale=...")),
    **dict.fromkeys(("window_size", "sliding_window", "local_window_size", "window"), (
        "window=(left, right)", "window_size=(left, right)", f"{_OURS}(window=(left, right))")),
    **dict.fromkeys(("softcap", "soft_cap", "logits_soft_cap"), ("softcap=...", f"{_OURS}(softcap=...)")),
    **dict.fromkeys(("sinks", "s_aux"), ("sinks=...", f"{_OURS}(sinks=...)")),
    **dict.fromkeys(("kv_lengths", "seq_lens"), ("kv_lengths=...", "cache_seqlens=...", f"{_OURS}(kv_lengths=...)")),
    "segment_ids": ("segment_ids=...", f"{_OURS}(segment_ids=...)"),
    **dict.fromkeys(("return_lse", "return_attn_probs", "return_softmax_lse"), (
        "return_lse=True", "return_attn_probs=True", "return_softmax_lse=True", f"{_OURS}(return_lse=True)")),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q"), (
        "cu_seqlens=...", "cu_seqlens_q=...", "torch_bridge.flash_attn.flash_attn_varlen_func")),
    "alibi_slopes": ("score=pallas_flash.ALiBi(slopes)", f"{_OURS}(score=pallas_flash.ALiBi(slopes))"),
    "deterministic": ("torch.use_deterministic_algorithms(True)",),
    **dict.fromkeys(("score", "score_mod"), ("score=...", f"{_OURS}(score=...)")),
    **dict.fromkeys(("dropout_rng", "generator"), ("torch.manual_seed",)),
    "layout": ("tensors (batch, heads, length, dim): x.transpose(1, 2) of the other order is not copied",),
}
"""Names of arguments in other attention libraries -> what to use here: the first that is an argument of the function,
or no argument at all.
"""
_OF_FLASH_ATTN = _INSTEAD | {"layout": ("tensors (batch, seqlen, heads, dim), or (tokens, heads, dim) in varlen "
                                        "functions: x.transpose(1, 2) of the other order is not copied",)}
"""The same for flash-attn's functions."""


def must(clause: str, given: str, do: str) -> RuntimeError:
    """The error of an argument that does not fit: what must hold, what was given, what to do."""
    return RuntimeError(f"{clause}, got {given}. {do}.")


def shapes(**tensors: torch.Tensor) -> str:
    """The shapes of tensors, for a message."""
    return ", ".join(f"{name}.shape={tuple(tensor.shape)}" for name, tensor in tensors.items())


def require_tensors(**values: object) -> None:
    """Raises TypeError, as torch does, unless all are tensors: JAX's and NumPy's arrays are not."""
    if all(isinstance(value, torch.Tensor) for value in values.values()):
        return
    given = ", ".join(f"type({name})={type(value).__name__}" for name, value in values.items())
    do = "torch.tensor(...) makes one of numbers"
    if any(hasattr(value, "__dlpack__") and not isinstance(value, torch.Tensor) for value in values.values()):
        do = "torch.from_dlpack(array) makes one of an array; pallas_flash.flash_attention takes JAX arrays"
    if any(type(value).__module__ == "torch.fx.proxy" for value in values.values()):
        do = ("torch.fx.symbolic_trace cannot look into this function: name it in your module, attend = ..., and call "
              'torch.fx.wrap("attend") there, so that it is one node; or trace by torch.export.export')
    raise TypeError(f"{', '.join(values)} must be Tensors, got {given}. {do}.")


def unknown_keyword(function: Callable[..., object], name: str) -> TypeError:
    """The error of a keyword that a function does not have: what to write for it, and what there is."""
    *known, last = without_unknown(function).parameters
    clauses = (_INSTEAD if "query" in known else _OF_FLASH_ATTN).get(name, ())
    argument = re.compile(r"(\w+)=")
    here = [clause for clause in clauses if not (found := argument.match(clause)) or found[1] in (*known, last)]
    instead = f" Use {here[0]}." if here else ""
    return TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}.{instead} It takes "
                     f"{', '.join(known)} and {last}.")


def require_bool(name: str, value: object) -> None:
    """Raises TypeError, as torch does, unless `value` is a bool: Python would take any other object for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be bool, got {name}={value!r}. Pass True or False.")


def without_unknown(function: Callable[..., object]) -> inspect.Signature:
    """The signature of a function without its `**unknown`."""
    signature = inspect.signature(function)
    return signature.replace(parameters=[x for name, x in signature.parameters.items() if name != "unknown"])


def hide_unknown(*functions: Callable[..., object]) -> None:
    """Tells who asks for the signatures of functions nothing of `**unknown`, which is there for its message alone."""
    for function in functions:
        function.__signature__ = without_unknown(function)  # type: ignore[attr-defined]


def leading_axes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> RuntimeError:
    """The error of batch axes or heads that do not fit."""
    named = {"query": query, "key": key, "value": value}
    given = ", ".join(f"{name}.shape={tuple(tensor.shape)}" for name, tensor in named.items())
    spread = [name for name, tensor in named.items() if hasattr(tensor, "placements")]
    heads = [tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key, value)]
    must, do = "the leading axes of query, key and value must broadcast", "Make batch axes and heads equal, or 1."
    divide = all(count > 0 and heads[0] % count == 0 for count in heads[1:])
    if 0 < len(spread) < 3:
        must = "query, key and value must all be DTensors, or all be plain tensors"
        given = ", ".join(f"{name}: {type(tensor).__name__} {tuple(tensor.shape)}" for name, tensor in named.items())
        do = ("Call it with the local parts (DTensor.to_local(), torch.distributed.tensor.experimental.local_map), or "
              "distribute all three.")
    elif enable_gqa and not divide:
        must, do = "Number of heads in key and value must divide the number of heads in query", "Repeat or drop heads."
    elif not enable_gqa and divide and any(count not in (1, heads[0]) for count in heads[1:]):
        must = "the numbers of heads of query, key and value must be equal, or 1, without enable_gqa"
        do = "For grouped queries pass enable_gqa=True; nothing is repeated in memory."
    return RuntimeError(f"{must}, got {given}. {do}")


def mask_shape(attn_mask: torch.Tensor, full: Sequence[int]) -> RuntimeError:
    """The error of a mask that does not broadcast to (..., heads, q_len, kv_len)."""
    shape, full = tuple(attn_mask.shape), tuple(full)
    do = "Give it one axis of 1 for each axis that it does not depend on."
    if len(full) == 4:
        batch, _, q_len, kv_len = full
        if shape == (batch, kv_len):
            do = "It has the shape of (batch, kv_len): pass attn_mask[:, None, None, :]."
        elif shape in ((batch, q_len, kv_len), (batch, 1, kv_len)):
            do = "It has the shape of (batch, q_len, kv_len): pass attn_mask[:, None]."
    axes = "(batch, heads, q_len, kv_len)"
    named = f"{axes} = {full}" if len(full) == 4 else f"{full}"
    return RuntimeError(f"attn_mask must broadcast to {named}, got attn_mask.shape={shape}. {do}")
