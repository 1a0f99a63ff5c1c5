"""Attention as a textbook writes it, in torch, with every argument of `torch_bridge.flash_attention`: the oracle."""

import torch


def kept(shape, device, *, is_causal=False, causal_offset=0, window=(None, None), segment_ids=None, q_lengths=None,
         kv_lengths=None):
    """Which pairs attend, booleans (batch, 1, q_len, kv_len)."""
    batch, q_len, kv_len = shape
    offset = torch.as_tensor(0 if causal_offset is None else causal_offset, device=device).expand(batch)[:, None, None]
    q, k = (torch.arange(length, device=device) for length in (q_len, kv_len))
    distance = k[None, None, :] - (q[None, :, None] + offset)
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    left, right = window or (None, None)
    if is_causal:
        keep &= distance <= 0
    if left is not None:
        keep &= distance >= -left
    if right is not None:
        keep &= distance <= right
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        keep &= (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] >= 0)
    if q_lengths is not None:
        keep &= q[None, :, None] < q_lengths[:, None, None]
    if kv_lengths is not None:
        keep &= k[None, None, :] < kv_lengths[:, None, None]
    return keep[:, None]


def attention(query, key, value, *, attn_mask=None, softcap=None, score=None, sinks=None, scale=None, **places):
    """(out, lse) of (batch, heads, length, dim), with the scores in memory; pairs that do not attend contribute 0.

    score: a function of the scores and of the numbers of batch, head, query and key, in torch.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[3]**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if score is not None:
        axes = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
        scores = score(scores, *(x.to(query.device) for x in axes))
    keep = kept((query.shape[0], *scores.shape[2:]), query.device, **places).expand_as(scores)
    if attn_mask is not None:
        keep = keep & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
        scores = scores if attn_mask.dtype == torch.bool else scores + attn_mask
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, keep = torch.cat((scores, column), 3), torch.nn.functional.pad(keep, (0, 1), value=True)
    scores = scores.masked_fill(~keep, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)  # and no NaN in the gradient of such a row
    lse = scores.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().masked_fill(nothing, 0.0)[..., :value.shape[2]]
    return weights @ value, lse.masked_fill(nothing, -torch.inf)[..., 0]
