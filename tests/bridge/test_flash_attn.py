"""flash-attn's functions, each against a textbook in float64 on its definition; its package is not needed."""

import functools
import inspect

import numpy as np
import pytest
import torch

from bridge import textbook
from torch_bridge import cached, flash_attn, rules
from torch_bridge.direct import decoding
from torch_bridge.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

B, H, G, D = 3, 4, 2, 8
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.03])


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def alibi(slopes, q_len, kv_len, dtype):
    """What flash-attn's documentation says is added: (batch or 1, heads, q_len, kv_len)."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return -slopes.reshape(-1, H, 1, 1).to(dtype) * (i + kv_len - q_len - j).abs()


def expected(q, k, v, *, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None,
             **places):
    """(out, lse) of (batch, seqlen, heads, dim), aligned at the bottom right."""
    q_len, kv_len = q.shape[1], k.shape[1]
    bias = None if alibi_slopes is None else alibi(alibi_slopes, q_len, kv_len, q.dtype)
    out, lse = textbook.attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, softcap=softcap or None,
                                  scale=softmax_scale, is_causal=causal, causal_offset=kv_len - q_len,
                                  window=tuple(None if x < 0 else x for x in window_size), **places)
    return out.transpose(1, 2), lse


def assert_same(found, truth, tensors):
    """out, lse, and the gradients of both."""
    douts = [torch.randn_like(x) for x in truth]
    douts[1] = douts[1].masked_fill(truth[1] == -torch.inf, 0)
    for a, b in zip(*([*x, *torch.autograd.grad(x, tensors, douts)] for x in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "window": dict(window_size=(2, 1), softmax_scale=0.3, softcap=1.5),
    "alibi, window": dict(window_size=(3, 0), alibi_slopes=torch.stack([SLOPES, 9 * SLOPES, 400 * SLOPES])),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_dense(options):
    tensors = randn(B, 4, H, D), randn(B, 7, G, D), randn(B, 7, G, D)
    out, lse, nothing = flash_attn_func(*tensors, return_attn_probs=True, **OPTIONS[options])
    assert nothing is None and out.is_contiguous() and lse.shape == (B, H, 4)
    assert_same((out, lse), expected(*tensors, **OPTIONS[options]), tensors)


def test_more_queries_than_keys():
    """The first queries attend to nothing."""
    tensors = randn(B, 6, H, D), randn(B, 2, G, D), randn(B, 2, G, D)
    out, lse, _ = flash_attn_func(*tensors, 0.0, None, True, (-1, -1), 0.0, SLOPES, True, True)
    assert (out[:, :4] == 0).all() and (lse[:, :, :4] == -torch.inf).all()
    assert_same((out, lse), expected(*tensors, causal=True, alibi_slopes=SLOPES), tensors)


def test_packed_tensors():
    qkv, kv, q = randn(B, 5, 3, H, D), randn(B, 5, 2, H, D), randn(B, 5, H, D)
    options = dict(causal=True, window_size=(2, -1))
    found = flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)[:2]
    assert_same(found, expected(*qkv.unbind(2), **options), (qkv,))
    found = flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options)[:2]
    assert_same(found, expected(q, *kv.unbind(2), **options), (q, kv))
    assert torch.equal(flash_attn_kvpacked_func(q, kv, 0.0, None, True, (2, -1)), found[0])


def test_half_precision(dtype=torch.bfloat16):
    q, k, v = randn(B, 40, H, D, dtype=dtype), randn(B, 60, G, D, dtype=dtype), randn(B, 60, G, D, dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, alibi_slopes=SLOPES, return_attn_probs=True)
    truth, true_lse = expected(*(x.double() for x in (q, k, v)), causal=True, alibi_slopes=SLOPES)
    assert out.dtype == dtype and lse.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


# --- packed sequences ------------------------------------------------------------------------------------------------

Q_LENGTHS, KV_LENGTHS = (3, 0, 5, 2, 4), (6, 2, 5, 0, 1)
PADDING = 2


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def each(tensors, slopes, **options):
    """(out, lse) of packed tensors, sequence by sequence; padding is 0 and -inf."""
    q, k, v = tensors
    outs, lses = [], []
    rows = zip(q[:sum(Q_LENGTHS)].split(Q_LENGTHS), k.split(KV_LENGTHS), v.split(KV_LENGTHS), strict=True)
    for j, parts in enumerate(rows):
        if slopes is not None:
            options["alibi_slopes"] = slopes[j] if slopes.dim() == 2 else slopes
        out, lse = expected(*(x[None] for x in parts), **options)
        outs.append(out[0])
        lses.append(lse[0])
    return (torch.nn.functional.pad(torch.cat(outs), (0, 0, 0, 0, 0, PADDING)),
            torch.nn.functional.pad(torch.cat(lses, 1), (0, PADDING), value=-torch.inf))


@pytest.mark.parametrize("options", [
    dict(window_size=(1, 2), softcap=2.0),
    dict(causal=True, window_size=(2, -1), alibi_slopes=torch.rand(5, H) * 300)], ids=["window", "alibi for each"])
def test_packed_sequences(options):
    tensors = randn(sum(Q_LENGTHS) + PADDING, H, D), randn(sum(KV_LENGTHS), G, D), randn(sum(KV_LENGTHS), G, D)
    out, lse, _ = flash_attn_varlen_func(*tensors, starts(Q_LENGTHS), starts(KV_LENGTHS), max(Q_LENGTHS),
                                         max(KV_LENGTHS), return_attn_probs=True, **options)
    assert out.is_contiguous() and lse.shape == (H, tensors[0].shape[0])
    rest = {name: x for name, x in options.items() if name != "alibi_slopes"}
    assert_same((out, lse), each(tensors, options.get("alibi_slopes"), **rest), tensors)


def test_no_sequences():
    """All tokens are padding."""
    x, bounds = randn(3, H, D), torch.tensor([0])
    out, lse, _ = flash_attn_varlen_func(x, x, x, bounds, bounds, 0, 0, causal=True, alibi_slopes=SLOPES,
                                         return_attn_probs=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_packed_sequences_in_packed_tensors():
    tokens, bounds = 9, starts((4, 5))
    qkv, kv, q = randn(tokens, 3, H, D), randn(tokens, 2, H, D), randn(tokens, H, D)
    found = flash_attn_varlen_qkvpacked_func(qkv, bounds, 5, causal=True)
    assert torch.equal(found, flash_attn_varlen_func(*qkv.unbind(1), bounds, bounds, 5, 5, causal=True))
    found = flash_attn_varlen_kvpacked_func(q, kv, bounds, bounds, 5, 5, causal=True)
    assert torch.equal(found, flash_attn_varlen_func(q, *kv.unbind(1), bounds, bounds, 5, 5, causal=True))


def test_a_sequence_hears_nothing_of_another():
    bounds = starts((4, 5))
    q, k, v = (x.detach() for x in (randn(9, H, D), randn(9, H, D), randn(9, H, D)))
    clean = flash_attn_varlen_func(q, k, v, bounds, bounds, 5, 5, causal=True)
    k[:4], v[:4] = torch.nan, torch.inf
    assert torch.equal(flash_attn_varlen_func(q, k, v, bounds, bounds, 5, 5, causal=True)[4:], clean[4:])


def traced(monkeypatch):
    """A list that grows by one for each mask that is made."""
    masks, make = [], rules.Rule.mask
    monkeypatch.setattr(rules.Rule, "mask", lambda *args: masks.append(1) or make(*args))
    return masks


def test_other_boundaries_compile_nothing(monkeypatch):
    q, k, v = (x.detach() for x in (randn(9, H, D), randn(9, H, D), randn(9, H, D)))
    run = lambda lengths: flash_attn_varlen_func(q, k, v, starts(lengths), starts(lengths), 9, 9, causal=True)
    run((4, 5))
    masks = traced(monkeypatch)
    run((0, 9))
    run((1, 2))
    assert not masks


# --- the cache -------------------------------------------------------------------------------------------------------

LENGTHS, ROOM = torch.tensor([5, 0, 9], dtype=torch.int32), 12


def cache_of(rows=B):
    return [torch.randn(rows, ROOM, G, D, dtype=torch.float64) for _ in range(2)]


def by_hand(q, k_rows, v_rows, lengths, first=(0,) * B, **options):
    """(out, lse), row by row over the keys that count."""
    found = [expected(q[i:i + 1], k_rows[i:i + 1, first[i]:n], v_rows[i:i + 1, first[i]:n], **options)
             for i, n in enumerate(lengths)]
    return [torch.cat(x) for x in zip(*found, strict=True)]


def assert_close(found, truth):
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def new(length):
    return [torch.randn(B, length, heads, D, dtype=torch.float64) for heads in (H, G, G)]


def appended(cache, part, lengths):
    """A copy of the cache with a part behind each row."""
    cache = cache.clone()
    for row, (x, n) in enumerate(zip(part, lengths.tolist(), strict=True)):
        cache[row, n:n + x.shape[0]] = x
    return cache


@pytest.mark.parametrize("options", [dict(causal=True, alibi_slopes=SLOPES), dict(window_size=(3, 1), softcap=2.0)],
                         ids=["alibi", "window"])
def test_new_keys_are_written_in_place(options):
    (q, k, v), (keys, values) = new(2), cache_of()
    wanted = [appended(x, part, LENGTHS) for x, part in ((keys, k), (values, v))]
    found = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=LENGTHS, return_softmax_lse=True, **options)
    assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])
    assert_close(found, by_hand(q, *wanted, (LENGTHS + 2).tolist(), **options))


def test_decoding_compiles_once(monkeypatch):
    (keys, values), counts = cache_of(), []
    masks = traced(monkeypatch)
    for step in range(3):
        q, k, v = new(1)
        out = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=step, causal=True)
        assert_close([out], by_hand(q, keys, values, [step + 1] * B, causal=True)[:1])
        counts.append(len(masks))
    assert counts[0] == counts[1] == counts[2]


def test_a_whole_cache():
    (q, _, _), (keys, values) = new(2), cache_of()
    assert_close([flash_attn_with_kvcache(q, keys, values, window_size=(-2, -1))],
                 by_hand(q, keys, values, [ROOM] * B)[:1])


def test_rows_of_a_larger_cache():
    (q, k, v), (keys, values), rows = new(1), cache_of(5), torch.tensor([4, 0, 2], dtype=torch.int32)
    wanted = [appended(x[rows], part, LENGTHS) for x, part in ((keys, k), (values, v))]
    untouched = keys[[1, 3]].clone()
    found = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=LENGTHS, cache_batch_idx=rows, causal=True)
    assert torch.equal(keys[rows], wanted[0]) and torch.equal(keys[[1, 3]], untouched)
    assert_close([found], by_hand(q, *wanted, (LENGTHS + 1).tolist(), causal=True)[:1])


def test_pages():
    """Entries of the table behind the end of a sequence may be anything."""
    (q, k, v), page = new(1), 4
    keys, values = (torch.randn(10, page, G, D, dtype=torch.float64) for _ in range(2))
    table = torch.tensor([[7, 1, -5], [3, 99, 99], [0, 9, 4]], dtype=torch.int32)
    shown = table.clamp(0, 9).long()
    wanted = [appended(x[shown].flatten(1, 2), part, LENGTHS) for x, part in ((keys, k), (values, v))]
    found = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=LENGTHS, block_table=table, causal=True)
    assert torch.equal(keys[1, 1], k[0, 0]) and torch.equal(keys[3, 0], k[1, 0]) and torch.equal(keys[4, 1], k[2, 0])
    assert_close([found], by_hand(q, *wanted, (LENGTHS + 1).tolist(), causal=True)[:1])


@pytest.mark.parametrize("page", [-1, 10, 99])
@pytest.mark.parametrize("new_keys", [False, True])
def test_a_page_that_is_not_there(page, new_keys):
    """Regression: where nothing was appended to it, the nearest page was read in its place. What no host knows is NaN,
    as in the kernel of caches, and other sequences are as before.
    """
    (q, k, v), size = new(1), 4
    keys, values = (torch.randn(10, size, G, D, dtype=torch.float64) for _ in range(2))
    good = torch.tensor([[7, 1, -5], [3, 99, 99], [0, 9, 4]], dtype=torch.int32)
    bad, lengths = good.clone(), torch.tensor([5, 1, 9], dtype=torch.int32)
    bad[2, 0] = page
    appended_here = dict(k=k, v=v) if new_keys else {}
    call = functools.partial(flash_attn_with_kvcache, q, causal=True, return_softmax_lse=True, **appended_here)
    before = keys.clone()
    with pytest.raises(RuntimeError, match="block_table must be from 0 to 9, the last page of k_cache, up to the end"):
        call(keys, values, cache_seqlens=lengths, block_table=bad)
    assert torch.equal(keys, before)
    out, lse = call(keys.clone(), values.clone(), cache_seqlens=lengths, block_table=good)
    compiled = torch.compile(call, backend="eager")
    found, found_lse = compiled(keys.clone(), values.clone(), cache_seqlens=lengths, block_table=bad)
    assert found[2].isnan().all() and found_lse[2].isnan().all()
    assert_close([found[:2], found_lse[:2]], [out[:2], lse[:2]])
    found, found_lse = compiled(keys.clone(), values.clone(), cache_seqlens=lengths, block_table=good)
    assert_close([found, found_lse], [out, lse])


def test_a_page_that_is_not_there_where_a_graph_falls_back():
    """Regression: what a compiled program runs where the kernel of caches takes no such call read the nearest page."""
    q, pages = torch.randn(2, H, 1, D), torch.randn(8, G, 4, D)
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    good, bad = (torch.tensor([[0, 1], [2, page]], dtype=torch.int32) for page in (7, 8))
    rules = decoding.Rules(None, 0, None, None)
    (out, lse), (found, found_lse) = (
        cached.attend(decoding.Call(q, pages, pages, lengths, table), rules) for table in (good, bad))
    assert found[1].isnan().all() and found_lse[1].isnan().all() and not out.isnan().any()
    assert torch.equal(found[0], out[0]) and torch.equal(found_lse[0], lse[0])


def test_padding_on_the_left():
    (q, k, v), (keys, values), first = new(2), cache_of(), torch.tensor([3, 0, 8], dtype=torch.int32)
    keys[0, :3], values[2, :8] = torch.nan, torch.inf
    wanted = [appended(x, part, LENGTHS) for x, part in ((keys, k), (values, v))]
    found = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=LENGTHS, cache_leftpad=first, causal=True,
                                    window_size=(4, -1), return_softmax_lse=True)
    assert_close(found, by_hand(q, *wanted, (LENGTHS + 2).tolist(), first.tolist(), causal=True, window_size=(4, -1)))


@pytest.mark.parametrize("interleaved, causal", [(True, True), (False, False)])
def test_rotary_embeddings(interleaved, causal):
    """As multiplications of complex numbers."""
    (q, k, v), (keys, values), width = new(2), cache_of(), 6
    angles = torch.randn(20, width // 2, dtype=torch.float64)

    def turned(x, pos):
        head = x[..., :width]
        pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
        turns = torch.polar(torch.ones_like(angles), angles)[pos][:, :, None]
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        return torch.cat(((pairs if interleaved else pairs.mT).flatten(-2), x[..., width:]), -1)
    pos = LENGTHS.long()[:, None] + torch.arange(2)
    wanted = appended(keys, turned(k, pos), LENGTHS), appended(values, v, LENGTHS)
    found = flash_attn_with_kvcache(q, keys, values, k, v, angles.cos(), angles.sin(), LENGTHS, causal=causal,
                                    rotary_interleaved=interleaved)
    torch.testing.assert_close(keys, wanted[0])
    q = turned(q, pos if causal else pos[:, :1].expand(-1, 2))
    assert_close([found], by_hand(q, *wanted, (LENGTHS + 2).tolist(), causal=causal)[:1])


# --- signatures and errors -------------------------------------------------------------------------------------------

COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
BOUNDS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"


@pytest.mark.parametrize("name, expected", [
    ("flash_attn_func", f"q k v {COMMON}"), ("flash_attn_qkvpacked_func", f"qkv {COMMON}"),
    ("flash_attn_kvpacked_func", f"q kv {COMMON}"), ("flash_attn_varlen_func", f"q k v {BOUNDS} {COMMON} block_table"),
    ("flash_attn_varlen_qkvpacked_func", f"qkv cu_seqlens max_seqlen {COMMON}"),
    ("flash_attn_varlen_kvpacked_func", f"q kv {BOUNDS} {COMMON}"),
    ("flash_attn_with_kvcache", "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
     "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
     "return_softmax_lse")])
def test_signatures_are_those_of_flash_attn(name, expected):
    """Its order, since its users pass arguments by position."""
    assert " ".join(inspect.signature(getattr(flash_attn, name)).parameters) == expected
    assert name in flash_attn.__all__


@pytest.mark.parametrize("bad, message", [
    (dict(cache_seqlens=ROOM), "cache_seqlens must be from 0 to seqlen_cache - seqlen_new = 11, got cache_seqlens=12"),
    (dict(cache_seqlens=-1), "cache_seqlens must be from 0"),
    (dict(cache_seqlens=torch.tensor([0, 12, 3])), r"from 0 to .* = 11, got cache_seqlens=\[0, 12, 3\]"),
    (dict(cache_seqlens=torch.tensor([0, -1, 3])), "cache_seqlens must be from 0"),
    (dict(k=slice(1)), r"k must be \(batch, seqlen_new, heads, dim\) = \(3, 1, 2, 8\), .*got k.shape=\(1, 1, 2, 8\)"),
    (dict(k=(slice(None), slice(None), slice(1))), r"k must be .*got k.shape=\(3, 1, 1, 8\)"),
    (dict(v=(slice(None), [0, 0])), r"v must be .*got v.shape=\(3, 2, 2, 8\)"),
    (dict(cache_batch_idx=torch.tensor([0, 1, -1])), "cache_batch_idx must be from 0 to 2"),
    (dict(cache_batch_idx=torch.tensor([0, 1, 3])), "cache_batch_idx must be from 0 to 2"),
    (dict(rotary_cos=torch.ones(4, 2), rotary_sin=torch.ones(4, 2), cache_seqlens=torch.tensor([0, 4, 1])),
     r"from 0 to 3, the last position of rotary_cos, got \[\[0\], \[4\], \[1\]\]"),
    (dict(block_table=torch.tensor([[0], [1], [7]])), "block_table must be from 0 to 2"),
    (dict(cache_batch_idx=torch.tensor([0, 1, 1])), "cache_batch_idx must give each sequence places of its own"),
    (dict(block_table=torch.tensor([[0, 1], [2, 1], [0, 2]])), "block_table must give each sequence places of its own"),
    (dict(q=torch.zeros(3, 1, 3, 8, dtype=torch.float64)), "Number of heads in key and value must divide"),
    (dict(q=torch.zeros(3, 1, 4, 8, dtype=torch.bfloat16)), "to have the same dtype"),
    (dict(q=torch.zeros(3, 1, 4, 16, dtype=torch.float64)), "query and key must have the same last size"),
    (dict(alibi_slopes=SLOPES[:2], causal=True), "alibi_slopes must be"),
    (dict(alibi_slopes=SLOPES), "alibi_slopes needs causal=True"),
    (dict(cache_leftpad=torch.tensor([0, 1])), "cache_leftpad must hold integers"),
    (dict(window_size=3), "window_size must be"),
    (dict(causal=1), "causal must be bool, got causal=1"),
    (dict(return_softmax_lse="no"), "return_softmax_lse must be bool, got return_softmax_lse='no'. Pass"),
    (dict(rotary_interleaved="no"), "rotary_interleaved must be bool, got rotary_interleaved='no'. Pass"),
    (dict(softmax_scale=np.ones(3)), r"'scale' must be float, not ndarray, got scale=array\("),
    (dict(softcap=np.ones(3)), r"softcap must be a number .*, got softcap=array\("),
    (dict(is_causal=True), "got an unexpected keyword argument 'is_causal'. Use causal=True. It takes q, k_cache"),
    (dict(cache_seqlens=torch.ones(3, ROOM).long()), r"cache_seqlens must hold .* pass attn_mask=x\[:, None, None"),
    (dict(softcap=-1.0), "softcap must be"),
    (dict(softmax_scale=float("nan")), "scale must be"),
], ids=str)
def test_what_does_not_fit_into_the_cache_leaves_it_as_it_was(bad, message):
    """Positions below 0 were written from the end of a row, and a k of one sequence into the first row alone; two
    sequences of one row into the same places; and what attention alone refuses was refused after k and v were written.
    """
    (q, k, v), (keys, values) = new(1), cache_of()
    before = keys.clone(), values.clone()
    bad = dict(bad)
    q, k, v = bad.pop("q", q), k[bad.pop("k", ...)], v[bad.pop("v", ...)]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        flash_attn_with_kvcache(q, keys, values, k, v, **dict(cache_seqlens=1) | bad)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


STARTS = torch.tensor([0, 3, 5])
CALLS = {
    "flash_attn_func": [(2, 5, H, D), (2, 5, G, D), (2, 5, G, D)], "flash_attn_qkvpacked_func": [(2, 5, 3, H, D)],
    "flash_attn_kvpacked_func": [(2, 5, H, D), (2, 5, 2, G, D)],
    "flash_attn_varlen_func": [(5, H, D), (5, G, D), (5, G, D), STARTS, STARTS, 3, 3],
    "flash_attn_varlen_qkvpacked_func": [(5, 3, H, D), STARTS, 3],
    "flash_attn_varlen_kvpacked_func": [(5, H, D), (5, 2, G, D), STARTS, STARTS, 3, 3],
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_other_kinds(name):
    """Regression: deterministic="no" was taken for True, a keyword gave Python's own TypeError, an array NumPy's."""
    args, call = [torch.zeros(x) if isinstance(x, tuple) else x for x in CALLS[name]], getattr(flash_attn, name)
    for flag in ("causal", "deterministic", "return_attn_probs"):
        for value in ("no", 1, None):
            with pytest.raises(TypeError, match=f"^{flag} must be bool, got {flag}={value!r}. Pass True or False"):
                call(*args, **{flag: value})
    for number in ("softmax_scale", "dropout_p", "softcap"):
        with pytest.raises((TypeError, ValueError), match=r"must be .*=array\(\[1., 1., 1.\]\). Pass"):
            call(*args, **{number: np.ones(3)})
    for keyword, instead in (("is_causal", "causal=True"), ("window", r"window_size=\(left, right\)"),
                             ("scale", "softmax_scale="), ("return_lse", "return_attn_probs=True"),
                             ("sinks", r"torch_bridge.flash_attention\(sinks="),
                             ("layout", r"tensors \(batch, seqlen,")):
        found = rf"^{name}\(\) got an unexpected .*{keyword!r}. Use {instead}.* It takes q"
        with pytest.raises(TypeError, match=found):
            call(*args, **{keyword: True})
    assert torch.equal(call(*args, softcap=0.0), call(*args, softcap=np.float32(0)))


def test_nothing_is_written_to_an_expanded_cache():
    """Sequences of one memory read what the last of them wrote, without a word."""
    (q, k, v), (keys, values) = new(1), cache_of()
    shared = values[:1].expand_as(values)
    with pytest.raises(RuntimeError, match=r"v_cache must have memory for each of its elements.*stride\(\)=\(0, "):
        flash_attn_with_kvcache(q, keys, shared, k, v, cache_seqlens=1)
    out = flash_attn_with_kvcache(q, keys, shared)  # read alone, it is a cache like others
    torch.testing.assert_close(out, flash_attn_with_kvcache(q, keys, shared.clone()))


def test_export_with_lengths_that_vary():
    """The offset of the bottom right is then no int, but a number that torch traces."""
    class Attend(torch.nn.Module):
        def forward(self, q, k):
            return flash_attn_func(q, k, k, causal=True, window_size=(k.shape[1], -1))
    q, k = (x.detach() for x in (randn(B, 4, H, D), randn(B, 6, G, D)))
    lengths = ({1: torch.export.Dim("L", min=2, max=64)}, {1: torch.export.Dim("S", min=2, max=64)})
    program = torch.export.export(Attend(), (q, k), dynamic_shapes=lengths, strict=False).module()
    q, k = (x.detach() for x in (randn(B, 6, H, D), randn(B, 2, G, D)))
    torch.testing.assert_close(program(q, k), expected(q, k, k, causal=True)[0])


X, C = torch.zeros(B, 2, H, D), torch.zeros(B, ROOM, G, D)
P, BOUND = torch.zeros(4, H, D), torch.tensor([0, 4])


@pytest.mark.parametrize("call, error, message", [
    (lambda: flash_attn_func(X, X, X, alibi_slopes=SLOPES), NotImplementedError, "alibi_slopes needs causal=True"),
    (lambda: flash_attn_func(X, X, X, causal=True, alibi_slopes=SLOPES[:2]), RuntimeError, "alibi_slopes must be"),
    (lambda: flash_attn_func(P, P, P), RuntimeError, r"q, k, v must be \(batch, seqlen, heads, dim\)"),
    (lambda: flash_attn_func(X, X, X, window_size=(None, 0)), TypeError, "-1 is no limit"),
    (lambda: flash_attn_qkvpacked_func(X), RuntimeError, r"qkv must be \(batch, seqlen, 3, heads, dim\)"),
    (lambda: flash_attn_varlen_kvpacked_func(P, P, BOUND, BOUND, 4, 4), RuntimeError,
     r"kv must be \(tokens, 2, heads, dim\)"),
    (lambda: flash_attn_varlen_func(P, P, P, BOUND, BOUND, 4, 4, block_table=BOUND), NotImplementedError,
     "does not support block_table"),
    (lambda: flash_attn_varlen_func(P, P, P, BOUND, starts((1, 3)), 4, 4), RuntimeError, "of the same sequences"),
    (lambda: flash_attn_varlen_func(P, P, P, BOUND.float(), BOUND, 4, 4), RuntimeError, "of queries must be"),
    (lambda: flash_attn_varlen_func(P, P, P, BOUND, BOUND + 1, 4, 4), RuntimeError, "of keys must start at 0"),
    (lambda: flash_attn_varlen_func(P, P, P, 2 * BOUND, BOUND, 4, 4), RuntimeError, "of queries .* end at 4.*got .*8"),
    (lambda: flash_attn_varlen_func(P, P, P, *[torch.tensor([0, 3, 2])] * 2, 4, 4), RuntimeError, "never fall"),
    (lambda: flash_attn_varlen_func(P, P, P, [0, 4], [0, 4], 4, 4), TypeError, "must be a Tensor, not list"),
    (lambda: flash_attn_varlen_func(X, X, X, BOUND, BOUND, 4, 4), RuntimeError, r"must be \(tokens, heads, dim\)"),
    (lambda: flash_attn_with_kvcache(X, C, C, X, X), RuntimeError, "k, v and cache_seqlens go together"),
    (lambda: flash_attn_with_kvcache(X, C, C, rotary_cos=X, rotary_sin=X), RuntimeError, "go together, and with k"),
    (lambda: flash_attn_with_kvcache(X[0], C, C), RuntimeError, r"q must be \(batch, seqlen, heads, dim\)"),
    (lambda: flash_attn_with_kvcache(X, C, C, cache_batch_idx=LENGTHS, block_table=LENGTHS[:, None]), RuntimeError,
     "exclude each other"),
    (lambda: flash_attn_with_kvcache(X, C[:2], C[:2]), RuntimeError, "as many rows as q, 3"),
    (lambda: flash_attn_with_kvcache(X, C, C, cache_leftpad=LENGTHS, block_table=LENGTHS), NotImplementedError,
     "cache_leftpad with block_table"),
    (lambda: flash_attn_with_kvcache(X, C, C, cache_batch_idx=LENGTHS[:2]), RuntimeError, "cache_batch_idx must hold"),
    # These were Python's own: "int is not iterable", "no attribute dim", "fill_value must be Number", IndexError.
    (lambda: flash_attn_func(X, X, X, window_size=3), TypeError, r"window_size must be \(left, right\), two ints, got"),
    (lambda: flash_attn_func([X], X, X), TypeError, r"q, k, v must be Tensors, got type\(q\)=list"),
    (lambda: flash_attn_func(X, X, X, causal=True, alibi_slopes=[0.5] * H), TypeError, "alibi_slopes must be Tensors"),
    (lambda: flash_attn_with_kvcache(X, C, C, C[:, :1], C[:, :1], cache_seqlens=[1, 2, 3]), TypeError,
     "cache_seqlens must be an int, or a Tensor .*=list. Wrap it"),
    (lambda: flash_attn_with_kvcache(X, C, C, C[:, :1], C[:, :1], cache_seqlens=ROOM), RuntimeError,
     "cache_seqlens must be from 0 to seqlen_cache - seqlen_new = 11"),
])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
