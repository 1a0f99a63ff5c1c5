"""What a call would run, and which of its tensors are copied on the way, as text; and having it compiled before."""

import inspect
from typing import TYPE_CHECKING, Never, Unpack

import torch

from torch_bridge import flash, flash_attn, kv_cache, messages, nested, sdpa, strides
from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import attention, cache, decoding, lengths, reasons, requirements, storage

if TYPE_CHECKING:
    from pallas_flash.device import Device

__all__ = ["explain", "explain_flash_attention", "explain_flash_attn_with_kvcache", "precompile"]


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    **unknown: Never,
) -> str:
    """What `scaled_dot_product_attention` would do with these arguments: implementation and why, path, layout, copies.

    Nothing is computed. Arguments and errors are those of `scaled_dot_product_attention`.
    """
    if unknown:
        raise messages.unknown_keyword(explain, next(iter(unknown)))
    if getattr(query, "layout", None) is torch.jagged:
        numbers = sdpa.nested_numbers((query, key, value), attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return _explain(*nested.prepare((query, key, value), attn_mask, numbers, enable_gqa))
    call = sdpa.prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _explain(call.operands, call.numbers)


def explain_flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, return_lse: bool = False,
                            **keywords: Unpack[flash.Keywords]) -> str:
    """What `flash_attention` would do with these arguments, which it has by the same names: as `explain` says it.

    What is said does not depend on return_lse.
    """
    for name in keywords:
        if name not in inspect.signature(flash.flash_attention).parameters:
            raise messages.unknown_keyword(flash.flash_attention, name)
    messages.require_bool("return_lse", return_lse)
    text = _explain(*flash.prepare(query, key, value, **keywords))
    return text if keywords.get("sinks") is None else f"{text}\nsinks: one more pass over out, by PyTorch"


def explain_flash_attn_with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                                    **keywords: Unpack[kv_cache.Keywords]) -> str:
    """What `flash_attn.flash_attn_with_kvcache` would do with these arguments, which it has by the same names: the
    kernel that reads the cache, or why another, and what is copied on the way. Nothing is appended or computed.
    """
    for name in keywords:
        if name not in inspect.signature(flash_attn.flash_attn_with_kvcache).parameters:
            raise messages.unknown_keyword(flash_attn.flash_attn_with_kvcache, name)
    messages.require_bool("return_softmax_lse", keywords.get("return_softmax_lse", False))
    call = flash_attn.cached_call(q, k_cache, v_cache, **keywords)
    _check_device(q.device)
    from pallas_flash import dispatch
    from torch_bridge.direct import lower

    with torch.no_grad():
        given, rules = call.decoding()
        why_not = decoding.why_not_direct(given, rules)
        if why_not is None:
            decision = dispatch.decide(lower.spec_of(decoding.problem_of(given, rules)), _device(q.device))
            if decision.implementation.launches is None:
                why_not = "; ".join(decision.reasons["hopper"])
        if not call.is_at_the_end:
            why_not = "queries before the first key would see nothing: causal attention, or as many new keys, is needed"
        if why_not is not None:
            copies = [] if call.cache.rows is call.cache.pages is None else ["k_cache, v_cache: the rows or pages that "
                                                                             "are named are copied"]
            return "\n".join((f"not the kernel of caches ({why_not}), but attention with lengths:", *copies,
                              _explain(*call.with_lengths())))
    # The backward that dispatch names is JAX's alone.
    said = [line for line in str(decision).splitlines() if not line.startswith("  backward")]
    copied = storage.copy_reason(given.query, decoding.problem_of(given, rules).layout)
    return "\n".join((*said, decoding.path(given, rules), "k_cache, v_cache: read where they lie, not copied",
                      f"q: {'shared, not copied' if copied is None else 'copied: ' + copied}",
                      "gradients: none are computed"))


def _explain(operands: Operands, numbers: Numbers) -> str:
    query, key, value, mask, bias, *_ = operands
    _check_device(query.device)
    if operands.is_empty:
        return "no output element or no key: the result is empty or zero, and nothing is run"
    from torch_bridge import exchange

    why_not = reasons.why_not(operands, numbers)
    decision = exchange.decide(operands, numbers, _device(query.device) if why_not is None else None)
    if why_not is None and decision.implementation.launches is None:
        why_not = f"implementation={decision.implementation.name!r} is JAX's own program, not a list of launches"
    memory, layout = "JAX", strides.layout_of(query, key, value)
    if why_not is None:
        memory, layout = "torch's", attention.problem_of(operands, numbers).layout
    copy_reason = exchange.copy_reason if why_not else storage.copy_reason
    order = {"BLHD": "(batch, length, heads, dim)", "BHLD": "(batch, heads, length, dim)"}[layout]
    lines = [str(decision), _path(operands, numbers, why_not),
             f"layout {layout}: read and written as {order} storage"]
    copied = {name: copy_reason(x, layout) for name, x in dict(query=query, key=key, value=value).items()}
    array = mask if bias is None else bias
    if array is not None and why_not is not None:
        copied["attn_mask"] = copy_reason(array, "BHLD")
    lines += [f"{name}: {'shared, not copied' if reason is None else 'copied: ' + reason}"
              for name, reason in copied.items()]
    if array is not None and why_not is None:
        lines.append(f"attn_mask: {_as_read(array)}")
    out = torch.empty_strided(query.shape[:3] + value.shape[3:], strides.like_query(query, value.shape[3]),
                              device="meta")
    same = strides.in_layout(out, layout).is_contiguous()
    lines.append(f"out: {f'{memory} memory, not copied' if same else 'copied into the storage order of query'}")
    if why_not is None and not all(strides.in_layout(x, layout).is_contiguous() for x in (query, key, value)):
        lines.append("gradients: dense tensors of their own, which PyTorch copies into that of a packed one")
    return "\n".join(lines)


def _device(device: torch.device) -> "Device":
    """A GPU as dispatch sees it, of which torch knows enough: JAX, if it is asked, starts a client there."""
    from pallas_flash.device import Device

    return Device("gpu", **vars(attention.gpu_of(device)))


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise messages.must("an explanation is of a CPU or a CUDA device, on which the tensors must be",
                            f"tensors on {device}", 'Make them there: torch.empty(shape, device="cuda"), since their '
                            "values do not matter")


def _as_read(array: torch.Tensor) -> str:
    """What launches read of a mask or a bias."""
    if array.dtype == torch.bool:
        return "made into bits, once for the forward and once for the backward"
    if array.shape[2] == 1:
        return "copied: where it is -inf, a mask hides the key"
    return ("shared, where its lengths are whole tiles; else copied and filled up" if array.is_contiguous() else
            f"copied: strides {tuple(array.stride())} of shape {tuple(array.shape)} are not dense")


def _path(operands: Operands, numbers: Numbers, why_not: str | None) -> str:
    if why_not is not None:
        return f"path: DLPack, JAX's runtime launches (not the direct path: {why_not})"
    problem, device = attention.problem_of(operands, numbers), operands.query.device
    states = []
    for name in attention.PASSES:
        if reason := attention.reason_found(problem, device, name):
            states.append(f"{name} none, through DLPack ({reason})")
        elif (sizes := lengths.shared(operands, numbers, name)) is not None:
            states.append(f"{name} shared by lengths up to {sizes[0]} and {sizes[1]}, to which tensors are padded")
        else:
            is_there = cache.is_kept(attention.request(problem, name, device))
            states.append(f"{name} {'on disk' if is_there else 'to be compiled'}")
    return f"path: direct, launched on torch's stream; plans: {', '.join(states)}"


def precompile(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    **unknown: Never,
) -> None:
    """Compiles what `scaled_dot_product_attention` launches on the direct path for these arguments: the forward and the
    backward, whose plans are kept on disk (docs/torch_bridge.md). Where they are there already, they are only read.

    Arguments and errors are those of `scaled_dot_product_attention`. The tensors' values do not matter, and those on
    the device "meta" stand for tensors of the same shapes and strides on the current CUDA device. It does
    so whatever PALLAS_FLASH_DIRECT is.

    Raises:
      RuntimeError: the direct path does not take such a call, or cannot compile it; with the reason.
    """
    if unknown:
        raise messages.unknown_keyword(precompile, next(iter(unknown)))
    call = sdpa.prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    device = call.operands.query.device
    if device.type == "meta":
        device = torch.device("cuda", torch.cuda.current_device())
    reason = attention.why_not(*call[:2])
    if device.type not in attention.DEVICES:
        reason = f"it is for CUDA tensors, query is on {device}"
    elif reason is None:
        reason = attention.why_not_gpu(call.operands, call.numbers, device) or requirements.why_not()
    if reason is not None:
        raise RuntimeError(f"precompile needs a call that the direct path takes: {reason}. Through DLPack, JAX "
                           "compiles in the first call.")
    problem = attention.problem_of(*call[:2])
    for name in attention.PASSES:
        cache.find(attention.request(problem, name, device), device.index or 0)


messages.hide_unknown(explain, precompile)
