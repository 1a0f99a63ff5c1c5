"""The attention function that transformers' models call, in each layer.

    query (batch, q_heads, q_len, d), key, value (batch, kv_heads, kv_len, d)  ->  out (batch, q_len, q_heads, d)

Where no gradient is needed, lengths are padded to buckets and the true ones are run-time values, so that the next token
or the next prompt finds the programs of the last. Padding copies keys and values once a layer, as a growing cache does.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from torch_bridge import cached, eager, flash
from torch_bridge.direct import decoding
from torch_bridge.flash import Keywords, flash_attention
from torch_bridge.transformers import static
from torch_bridge.transformers.buckets import padded
from torch_bridge.transformers.rule import Rule

__all__ = ["Attention"]

_UNREAD = ("sinks", "indices", "block_indices")
"""What some models pass that changes the result: sinks of each query, and the keys that sparse attention selects, which
they make a mask of for transformers' own implementations alone."""

logger = logging.get_logger(__name__)


class _Masked(NamedTuple):
    """What of a call says which keys a query attends to, and what is added to the scores."""

    window: tuple[int | None, int | None] | None
    offset: int
    ids: tuple[Tensor, Tensor] | None
    attn_mask: Tensor | None

    def arguments(self) -> Keywords:
        """As arguments of `flash_attention`."""
        return dict(window=self.window, causal_offset=None if self.window is None else self.offset,
                    segment_ids=self.ids, attn_mask=self.attn_mask)


class Attention:
    """What `AttentionInterface` holds.

    Args:
      buckets: the length to which sequences are padded where no gradient is needed; None: they are not.
    """

    def __init__(self, buckets: Callable[[int], int] | None) -> None:
        self._buckets = buckets

    def __call__(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                 is_causal: bool | None = None, sliding_window: int | None = None, softcap: float | None = None,
                 s_aux: Tensor | None = None, position_bias: Tensor | None = None,
                 **others: object) -> tuple[Tensor, None]:
        """(out, None): there are no weights to return."""
        _check(others, attention_mask)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        masked = _masked((query, key), attention_mask, is_causal, sliding_window, position_bias)
        numbers: Keywords = dict(softcap=softcap, sinks=s_aux, dropout_p=dropout, scale=scaling)
        needs_grad = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, s_aux, masked.attn_mask))
        if (out := self._of_static_cache((query, key, value), attention_mask, position_bias, numbers)) is not None:
            return out.transpose(1, 2).contiguous(), None
        if self._buckets is None or needs_grad or torch.compiler.is_compiling():
            out = flash_attention(query, key, value, **masked.arguments() | numbers)
        else:
            out = _in_buckets(self._buckets, (query, key, value), masked, numbers)
        return out.transpose(1, 2).contiguous(), None

    def _of_static_cache(self, tensors: tuple[Tensor, Tensor, Tensor], attention_mask: Tensor | None,
                         position_bias: Tensor | None, numbers: Keywords) -> Tensor | None:
        """Of a query whose mask has a note, by the kernel of caches; None: it takes no such call."""
        if position_bias is not None or attention_mask is None:
            return None
        if torch.compiler.is_compiling():
            return _decoded_in_graph(tensors, attention_mask, numbers)
        filled = static.noted(attention_mask)
        return None if filled is None else _decoded(tensors, filled, numbers)


def _decoded(tensors: tuple[Tensor, Tensor, Tensor], filled: static.Filled, numbers: Keywords) -> Tensor | None:
    """(batch, q_heads, 1, d_v) by the kernel of caches; None: it takes no such call."""
    if numbers["dropout_p"] or not decoding.is_asked(tensors[0].device):
        return None
    call = decoding.Call(*tensors, filled.lengths, bias=filled.bias, sinks=numbers["sinks"])
    softcap = flash.checked_softcap(numbers["softcap"])
    found = eager.attend_to_cache(call, decoding.Rules(filled.left, None, softcap, numbers["scale"]))
    return None if found is None else found.out


def _decoded_in_graph(tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor, numbers: Keywords) -> Tensor | None:
    """`_decoded` of a single query whose mask is traced: what it keeps is read on the GPU.

    Whatever the mask: keys behind the last that any query sees are not read, and others that it hides get a bias of
    -inf. A note is not asked for: no graph tells whether its mask was written to since.
    """
    query, key, _ = tensors
    if type(mask) is not Tensor or mask.dtype != torch.bool or query.shape[2] != 1 or mask.dim() != 4 or (
            mask.shape[1:3] != (1, 1) or mask.shape[3] != key.shape[2]):
        return None
    if numbers["dropout_p"] or not decoding.is_asked(query.device):
        return None
    after = torch.arange(1, key.shape[2] + 1, dtype=torch.int32, device=mask.device)
    lengths = torch.where(mask[:, 0, 0], after, 0).amax(-1).expand(query.shape[0])
    bias = torch.where(mask, 0.0, -torch.inf)
    call = decoding.Call(*tensors, lengths, bias=bias, sinks=numbers["sinks"])
    rules = decoding.Rules(None, None, flash.checked_softcap(numbers["softcap"]), numbers["scale"])
    return cached.attend_traced(call, rules, needs_lse=False)[0]


def _check(others: Mapping[str, object], attention_mask: Tensor | None) -> None:
    if others.get("output_attentions"):
        logger.warning_once("pallas_flash never holds the attention weights: output_attentions=True gives None. Use "
                            'attn_implementation="eager" to look at them.')
    for name in _UNREAD:
        if others.get(name) is not None:
            raise NotImplementedError(
                f"the attention of this model passes {name!r}, which pallas_flash does not read: without it results "
                'would be wrong. Use attn_implementation="eager" for this model.')
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "packed sequences need a mask, got attention_mask=None with cu_seq_lens_q: pass position_ids without an "
            "attention_mask to the model, from which the mask is made. Continuous batching is not supported: use "
            "generate().")


def _masked(tensors: tuple[Tensor, Tensor], attention_mask: Tensor | None, is_causal: bool,
            sliding_window: int | None, position_bias: Tensor | None) -> _Masked:
    """Reads attention_mask: a `Rule`, an ordinary mask, or none, which leaves it to `is_causal` as for PyTorch's own
    function: causal from the first key, and no mask at all for a single query.
    """
    query, key = tensors
    if isinstance(attention_mask, Rule) and attention_mask.is_written_out:
        attention_mask = attention_mask.written_out()
    if isinstance(attention_mask, Rule):
        bounds = attention_mask.bounds
        window = None if bounds.left is bounds.right is None else (bounds.left, bounds.right)
        ids = None if attention_mask.q_ids is None or attention_mask.kv_ids is None else (
            attention_mask.q_ids, attention_mask.kv_ids)
        return _Masked(window, bounds.offset, ids, _bias(position_bias, None, query))
    if attention_mask is not None:
        return _Masked(None, 0, None, _bias(position_bias, attention_mask, query))
    left = None if sliding_window is None else sliding_window - 1
    if query.shape[2] == 1:
        window, offset = (None, 0) if left is None else ((left, 0), key.shape[2] - 1)
    else:
        window, offset = (left, 0) if is_causal else None, 0
    return _Masked(window if is_causal else None, offset, None, _bias(position_bias, None, query))


def _bias(position_bias: Tensor | None, attention_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """What is added to the scores and masks them, in one tensor."""
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        attention_mask = attention_mask.to(query.dtype)
    if position_bias is None:
        return attention_mask
    if position_bias.dtype not in (torch.float32, query.dtype):
        position_bias = position_bias.to(query.dtype)
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _in_buckets(buckets: Callable[[int], int], tensors: tuple[Tensor, Tensor, Tensor], masked: _Masked,
                numbers: Keywords) -> Tensor:
    """`flash_attention` of tensors padded to buckets. What was there before sees no key that is padding."""
    query, key, value = tensors
    q_len, kv_len = query.shape[2], key.shape[2]
    q_size, kv_size = 1 if q_len == 1 else buckets(q_len), buckets(kv_len)
    if q_size < q_len or kv_size < kv_len:
        raise ValueError(f"buckets must give lengths of at least the given ones, got {q_size} for {q_len} and {kv_size}"
                         f" for {kv_len}. Round up.")
    if q_len == 1 and masked.ids is None and masked.attn_mask is None and (
            masked.window is None or (masked.window[1] == 0 and masked.offset == kv_len - 1)):
        found = _of_growing_cache(tensors, kv_size, None if masked.window is None else masked.window[0], numbers)
        if found is not None:
            return found
    arguments = _padded_masks(masked, (q_len, kv_len), (q_size, kv_size)).arguments()
    if masked.window is not None and masked.offset:
        arguments["causal_offset"] = torch.full((1,), masked.offset, dtype=torch.int32, device=query.device)
    if _sees_padding(masked, q_len, kv_len):
        arguments["kv_lengths"] = torch.full((1,), kv_len, dtype=torch.int32, device=query.device)
    out = flash_attention(padded(query, q_size, 2), padded(key, kv_size, 2), padded(value, kv_size, 2),
                          **arguments | numbers)
    return out[:, :, :q_len]


def _of_growing_cache(tensors: tuple[Tensor, Tensor, Tensor], size: int, left: int | None,
                      numbers: Keywords) -> Tensor | None:
    """Of a query at the last key, by the kernel of caches, as if there were room for `size` keys."""
    query, key, value = tensors
    if not decoding.is_asked(query.device):
        return None
    lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    return _decoded((query, padded(key, size, 2), padded(value, size, 2)), static.Filled(lengths, left, None), numbers)


def _padded_masks(masked: _Masked, lengths: tuple[int, int], sizes: tuple[int, int]) -> _Masked:
    """Padded keys have no id and False; axes of size 1 for all queries or all keys stay."""
    ids, attn_mask = masked.ids, masked.attn_mask
    if ids is not None:
        ids = padded(ids[0], sizes[0], 1, -1), padded(ids[1], sizes[1], 1, -1)
    if attn_mask is not None:
        for axis, length, size in zip((attn_mask.dim() - 2, attn_mask.dim() - 1), lengths, sizes, strict=True):
            if attn_mask.shape[axis] == length:
                attn_mask = padded(attn_mask, size, axis)
    return masked._replace(ids=ids, attn_mask=attn_mask)


def _sees_padding(masked: _Masked, q_len: int, kv_len: int) -> bool:
    """Whether a query would see keys from kv_len on. A rule of static numbers alone is what most kernels take, so what
    follows from it needs no run-time length; it follows for all lengths of a kind of call, or for none.
    """
    if masked.ids is not None:
        return False
    if masked.attn_mask is not None and masked.attn_mask.dtype == torch.bool and masked.attn_mask.shape[-1] == kv_len:
        return False
    right = None if masked.window is None else masked.window[1]
    return right is None or q_len - 1 + masked.offset + right >= kv_len
