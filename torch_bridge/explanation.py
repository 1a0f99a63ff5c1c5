"""What a call would run, and which of its tensors are copied on the way, as text."""

import inspect
from typing import Any

import torch

from torch_bridge import flash, messages, sdpa
from torch_bridge.arguments import Numbers, Operands

__all__ = ["explain", "explain_flash_attention"]


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> str:
    """What `scaled_dot_product_attention` would do with these arguments: implementation and why, layout, copies.

    Nothing is computed. Arguments and errors are those of `scaled_dot_product_attention`.
    """
    call = sdpa.prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _explain(call.operands, call.numbers)


def explain_flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any) -> str:
    """What `flash_attention` would do with these arguments, which it has by the same names: as `explain` says it."""
    for name in keywords:
        if name not in inspect.signature(flash.flash_attention).parameters:
            raise messages.unknown_keyword(flash.flash_attention, name)
    keywords.pop("return_lse", None)
    text = _explain(*flash.prepare(query, key, value, **keywords))
    return text if keywords.get("sinks") is None else f"{text}\nsinks: one more pass over out, by PyTorch"


def _explain(operands: Operands, numbers: Numbers) -> str:
    query, key, value, mask, bias, *_ = operands
    if operands.is_empty:
        return "no output element or no key: the result is empty or zero, and nothing is run"
    from torch_bridge import exchange

    plan = exchange.make_plan(operands, numbers)
    order = {"BLHD": "(batch, length, heads, dim)", "BHLD": "(batch, heads, length, dim)"}[plan.layout]
    lines = [str(plan.decision), f"layout {plan.layout}: read and written as {order} storage"]
    named = {"query": (query, plan.layout), "key": (key, plan.layout), "value": (value, plan.layout),
             "attn_mask": (mask if bias is None else bias, "BHLD")}
    for name, (tensor, layout) in named.items():
        if tensor is not None:
            reason = exchange.copy_reason(tensor, layout)
            lines.append(f"{name}: {'shared, not copied' if reason is None else 'copied: ' + reason}")
    out = torch.empty_strided(query.shape[:3] + value.shape[3:], plan.out_strides, device="meta")
    same = (out if plan.layout == "BHLD" else out.transpose(1, 2)).is_contiguous()
    lines.append(f"out: {'JAX memory, not copied' if same else 'copied into the storage order of query'}")
    return "\n".join(lines)
