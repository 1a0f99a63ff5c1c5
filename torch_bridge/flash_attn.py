"""flash-attn's functions, by its names and with its arguments in its order: import them from here instead.

    from torch_bridge.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Tensors are (batch, seqlen, heads, dim), or (tokens, heads, dim) where sequences are packed. The causal mask and windows
are aligned at the bottom right: the query at i is at the key i + seqlen_k - seqlen_q. `window_size` is (left, right),
-1 for no limit. A row that attends to nothing gives 0; its lse is -inf. What is not supported raises a
NotImplementedError that names the argument.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple, Never, Unpack

import torch

from torch_bridge import cached, eager, flash, kv_cache, messages, packed, sdpa
from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import decoding
from torch_bridge.kv_cache import KVCache, Rotary
from torch_bridge.options import Options, WindowSize

__all__ = [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
]

Returned = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]
"""out, or with return_attn_probs (out, softmax_lse, None)."""


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0, softmax_scale: float | None = None,
    causal: bool = False, window_size: WindowSize = (-1, -1), softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    **unknown: Never,
) -> Returned:
    """Attention of (batch, seqlen, heads, dim), differentiable.

    Args:
      q: (batch, seqlen_q, heads, dim); bfloat16, float16, float32 or float64.
      k, v: (batch, seqlen_k, heads_k, dim); heads is a multiple of heads_k.
      dropout_p: the probability of dropping an attention weight, drawn from torch's generator.
      softmax_scale: multiplies the scores; None means 1 / sqrt(dim).
      causal: the query at i attends to the keys up to i + seqlen_k - seqlen_q.
      window_size: (left, right): from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right; -1: no limit.
      softcap: scores become softcap * tanh(scores / softcap); 0: as they are.
      alibi_slopes: (heads,) or (batch, heads): ``-slope * |i + seqlen_k - seqlen_q - j|`` is added to the score of
        query i and key j. Where no key after the aligned one is seen: causal, or a window with right 0. No gradient. In
        float32 scores are off by up to 2^-24 * slope * seqlen_k.
      deterministic: gradients are bit-equal on every run.
      return_attn_probs: also return softmax_lse, and None in place of the probabilities.

    Returns:
      out (batch, seqlen_q, heads, dim), or (out, softmax_lse, None): softmax_lse (batch, heads, seqlen_q) is the
      natural logarithm of each row's sum of exponentials, float32 (float64 for float64), with a gradient.

    Raises:
      RuntimeError, TypeError, ValueError: an argument does not fit, with what must hold.
      NotImplementedError: alibi_slopes without causal.
    """
    if unknown:
        raise messages.unknown_keyword(flash_attn_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_dense((q, k, v), options, return_attn_probs))


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, dropout_p: float = 0, softmax_scale: float | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: float = 0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    **unknown: Never,
) -> Returned:
    """`flash_attn_func` of q, k and v in one tensor (batch, seqlen, 3, heads, dim). Kernels that are launched directly
    read it where it lies; of its gradient see docs/torch_bridge.md, "Packed tensors".
    """
    if unknown:
        raise messages.unknown_keyword(flash_attn_qkvpacked_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_dense(packed.parts("qkv", qkv, 5, 3), options, return_attn_probs, (qkv,)))


def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, dropout_p: float = 0, softmax_scale: float | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: float = 0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    **unknown: Never,
) -> Returned:
    """`flash_attn_func` of k and v in one tensor (batch, seqlen_k, 2, heads_k, dim): see flash_attn_qkvpacked_func."""
    if unknown:
        raise messages.unknown_keyword(flash_attn_kvpacked_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_dense((q, *packed.parts("kv", kv, 5, 2)), options, return_attn_probs, (q, kv)))


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0, softmax_scale: float | None = None,
    causal: bool = False, window_size: WindowSize = (-1, -1), softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    **unknown: Never,
) -> Returned:
    """Attention within each of several packed sequences, differentiable; nothing is padded.

    Args:
      q: (total_q, heads, dim), the tokens of all sequences.
      k, v: (total_k, heads_k, dim).
      cu_seqlens_q, cu_seqlens_k: (batch + 1,) integers: sequence j is the tokens from the j-th to the next. They start
        at 0 and never fall; tokens after the last are padding, whose out is 0. Other values compile nothing.
      max_seqlen_q, max_seqlen_k: not needed, and not read.
      block_table: not supported.
      dropout_p, ...: as in `flash_attn_func`; lengths are those of each sequence.

    Returns:
      out (total_q, heads, dim), or (out, softmax_lse, None), softmax_lse being (heads, total_q).

    Raises:
      NotImplementedError: block_table; alibi_slopes without causal.
    """
    if unknown:
        raise messages.unknown_keyword(flash_attn_varlen_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    if block_table is not None:
        raise NotImplementedError("flash_attn_varlen_func() does not support block_table: packed keys must be one row "
                                  "of tokens. Use flash_attn_with_kvcache, which takes pages.")
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_varlen((q, k, v), packed.Starts(cu_seqlens_q, cu_seqlens_k), options, return_attn_probs))


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float = 0,
    softmax_scale: float | None = None, causal: bool = False, window_size: WindowSize = (-1, -1), softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    **unknown: Never,
) -> Returned:
    """`flash_attn_varlen_func` of q, k and v in one tensor (total, 3, heads, dim): see `flash_attn_qkvpacked_func`."""
    if unknown:
        raise messages.unknown_keyword(flash_attn_varlen_qkvpacked_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_varlen(packed.parts("qkv", qkv, 4, 3), packed.Starts(cu_seqlens, cu_seqlens), options,
                              return_attn_probs, (qkv,)))


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0, softmax_scale: float | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: float = 0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    **unknown: Never,
) -> Returned:
    """`flash_attn_varlen_func` of k and v in one tensor (total_k, 2, heads_k, dim): see `flash_attn_qkvpacked_func`."""
    if unknown:
        raise messages.unknown_keyword(flash_attn_varlen_kvpacked_func, next(iter(unknown)))
    messages.require_bool("return_attn_probs", return_attn_probs)
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _returned(*_varlen((q, *packed.parts("kv", kv, 4, 2)), packed.Starts(cu_seqlens_q, cu_seqlens_k), options,
                              return_attn_probs, (q, kv)))


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None, rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: WindowSize = (-1, -1), softcap: float = 0,
    rotary_interleaved: bool = True, alibi_slopes: torch.Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
    **unknown: Never,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention to a cache of keys and values, after k and v, if they are given, were written to it in place.

    It has no gradient. Other values of cache_seqlens, of the indices and of the table compile nothing.

    Args:
      q: (batch, seqlen_q, heads, dim).
      k_cache, v_cache: (batch, seqlen_cache, heads_k, dim), of the rows cache_batch_idx if it is given; with
        block_table pages (pages, page_length, heads_k, dim). They are read where they lie; but where the kernel of
        caches does not take the call, rows that cache_batch_idx names, and pages, are copied first: seqlen_cache
        positions of each sequence, in every call. `torch_bridge.explain_flash_attn_with_kvcache` says which.
      k, v: (batch, seqlen_new, heads_k, dim), written from position cache_seqlens of each sequence on.
      rotary_cos, rotary_sin: (positions, rotary_dim / 2): k is rotated at the positions it is written to, q at those
        from cache_seqlens on, or, without causal and a window, all of it at cache_seqlens. Only with k and v.
      cache_seqlens: how many positions count already: one number, or integers (batch,), at least 0 and at most
        seqlen_cache - seqlen_new, which is checked on a CPU only. None: all, and no k and v. int32 tensors are read by
        the kernel alone: a call captured in a CUDA graph is replayed with other lengths.
      cache_batch_idx: integers (batch,), the row of each sequence; distinct where k and v are given.
      cache_leftpad: integers (batch,), the first position that counts; not with rotary_cos or block_table.
      block_table: integers (batch, pages of a sequence); not with cache_batch_idx. Pages may be shared, but for those
        that k and v are written to. One that a sequence needs and is not there: an error on a CPU, NaN on a GPU.
      rotary_interleaved: the pairs are 0 and 1, 2 and 3, ...; else 0 and rotary_dim / 2, 1 and rotary_dim / 2 + 1, ...
      num_splits: not needed, and not read.
      return_softmax_lse: also return softmax_lse (batch, heads, seqlen_q).
      softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`; seqlen_k is cache_seqlens +
        seqlen_new of each sequence.

    Raises:
      RuntimeError, TypeError, ValueError: an argument does not fit, with what must hold.
      NotImplementedError: cache_leftpad with rotary_cos or block_table; alibi_slopes without causal.
    """
    if unknown:
        raise messages.unknown_keyword(flash_attn_with_kvcache, next(iter(unknown)))
    messages.require_bool("return_softmax_lse", return_softmax_lse)
    options = Options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    cache = KVCache(k_cache, v_cache, cache_batch_idx, block_table)
    numbers = softmax_scale, causal, window_size, softcap, k is None, v is None, block_table is None
    usual = kv_cache.usual(q, cache, (k, v), cache_seqlens, (rotary_cos, rotary_sin, cache_leftpad, alibi_slopes))
    with torch.no_grad():
        if usual is not None and (known := eager.recent_cache(usual, numbers)) is not None:
            out, lse = kv_cache.again(known, q, cache, (k, v), usual[3])
            return (out, lse) if return_softmax_lse else out
        call, append = to_cache(q, cache, (k, v), options, (rotary_cos, rotary_sin, rotary_interleaved), cache_seqlens,
                                cache_leftpad)
        given = call.decoding() if call.is_at_the_end and decoding.is_asked(q.device) else None
        if append is not None:
            if given is None or not eager.takes_cache(*given):  # which checks the same
                call.check()
            call.cache.append(*append)
        out, found = call.attended(return_softmax_lse, given)
        if usual is not None and given is not None:
            decoding.learn(usual, numbers, *given)
        return out if found is None else (out, found)


messages.hide_unknown(
    flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func, flash_attn_with_kvcache)


def to_cache(
    q: torch.Tensor, cache: KVCache, new: tuple[torch.Tensor | None, torch.Tensor | None], options: Options,
    rotary: tuple[torch.Tensor | None, torch.Tensor | None, bool], cache_seqlens: int | torch.Tensor | None,
    leftpad: torch.Tensor | None,
) -> "tuple[Cached, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]":
    """The checked arguments of `flash_attn_with_kvcache`, and what is to be appended before, if anything is: keys,
    values and their first positions.
    """
    (k, v), (cos, sin, interleaved) = new, rotary
    messages.require_bool("rotary_interleaved", interleaved)
    if leftpad is not None and (cos is not None or cache.pages is not None):
        other = "block_table" if cos is None else "rotary_cos"
        raise NotImplementedError(f"flash_attn_with_kvcache() does not support cache_leftpad with {other}")
    messages.require_tensors(q=q, k_cache=cache.keys, v_cache=cache.values)
    _check_rank(4, "(batch, seqlen, heads, dim)", q=q, **{name: x for name, x in (("k", k), ("v", v)) if x is not None})
    cache.check(q.shape[0])
    turned = Rotary.of(cos, sin, interleaved, q, k)
    count = _check_new(cache, k, v, cache_seqlens, q.shape[0])
    before = cache.lengths(cache_seqlens, q, count)
    if turned is not None:
        q, k = _rotated(turned, q, k, before, options)
    call = Cached(q, cache, before + count if count else before, count, leftpad, options)
    cache.check_pages(call.lengths)
    return call, None if k is None or v is None else (k, v, before)


def cached_call(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                **keywords: Unpack[kv_cache.Keywords]) -> "Cached":
    """The checked arguments of `flash_attn_with_kvcache`, which it has by the same names; nothing is appended."""
    bound = inspect.signature(flash_attn_with_kvcache).bind(q, k_cache, v_cache, **keywords)
    bound.apply_defaults()
    x = bound.arguments
    options = Options(0.0, x["softmax_scale"], x["causal"], x["window_size"], x["softcap"], x["alibi_slopes"], False)
    with torch.no_grad():
        call, _ = to_cache(q, KVCache(k_cache, v_cache, x["cache_batch_idx"], x["block_table"]), (x["k"], x["v"]),
                           options, (x["rotary_cos"], x["rotary_sin"], x["rotary_interleaved"]), x["cache_seqlens"],
                           x["cache_leftpad"])
    return call


# --- ALiBi -----------------------------------------------------------------------------------------------------------
# The query at i + offset sees keys j <= i + offset, where the bias is slope * (j - last) + slope * (last - i - offset).
# The second term is the same for all keys of a query: it changes lse alone. The first is a bias of O(seqlen_k) memory.


def _key_bias(slopes: torch.Tensor, to_last: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """(batch or 1, heads, 1, kv_len) from slopes (batch or 1, heads, kv_len or 1) and last - j (batch or 1, kv_len)."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return -(slopes.to(wide) * to_last.to(wide)[:, None])[:, :, None]


def _with_query_bias(lse: torch.Tensor | None, slopes: torch.Tensor, to_last: torch.Tensor) -> torch.Tensor | None:
    """lse (batch, heads, q_len) with the second term: slopes (batch or 1, heads, q_len or 1), (batch or 1, q_len)."""
    return None if lse is None else lse + slopes.to(lse.dtype) * to_last.to(lse.dtype)[:, None]


# --- the three kinds of calls ----------------------------------------------------------------------------------------


def _prepared(tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, options: Options) -> sdpa.Call:
    """The checked call of (batch, seqlen, heads, dim)."""
    query, key, value = (x.transpose(1, 2) for x in tensors)
    return sdpa.prepare(query, key, value, bias, options.dropout_p, False, options.softmax_scale, True)


def _dense(tensors: Sequence[torch.Tensor], options: Options, return_lse: bool,
           whole: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = tensors
    _check_rank(4, "(batch, seqlen, heads, dim)", q=q, k=k, v=v)
    batch, q_len, heads, _ = q.shape
    kv_len, slopes, bias = k.shape[1], options.slopes(batch, heads), None
    if slopes is not None:
        bias = _key_bias(slopes[..., None], torch.arange(kv_len - 1, -1, -1, device=q.device)[None], q)
    call = _prepared(tensors, bias, options)
    operands, numbers = options.places(kv_len - q_len).within(call.operands, options.applied(call.numbers))
    out, lse = flash.attend(operands, numbers, None, return_lse, whole)
    if slopes is not None:
        lse = _with_query_bias(lse, slopes[..., None], torch.arange(q_len - 1, -1, -1, device=q.device)[None])
    return out.transpose(1, 2), lse


def _varlen(tensors: Sequence[torch.Tensor], starts: packed.Starts, options: Options, return_lse: bool,
            whole: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = tensors
    _check_rank(3, "(tokens, heads, dim)", q=q, k=k, v=v)
    packed.check(starts, q.device, (q.shape[0], k.shape[0]))
    slopes = options.slopes(starts.query.shape[0] - 1, q.shape[1])
    numbers = options.applied(Numbers.of(causal_offset=None, scale=options.softmax_scale, dropout_p=options.dropout_p))
    left, right = options.places(0).sides(numbers)
    numbers = numbers._replace(left=left, right=right, ends_aligned=True)
    if slopes is None:
        return packed.attend((q, k, v), starts, numbers, None, return_lse, whole)
    (of_keys, keys_to_last), (of_queries, queries_to_last) = (
        (_of_tokens(slopes, sequence), to_last[None]) for to_last, sequence in (
            packed.positions_from_the_end(starts.key, k.shape[0]),
            packed.positions_from_the_end(starts.query, q.shape[0])))
    out, lse = packed.attend((q, k, v), starts, numbers, _key_bias(of_keys, keys_to_last, q), return_lse, whole)
    lse = _with_query_bias(None if lse is None else lse[None], of_queries, queries_to_last)
    return out, None if lse is None else lse[0]


def _of_tokens(slopes: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens or 1), those of each token's sequence."""
    return slopes[..., None] if slopes.shape[0] == 1 else slopes[sequence].T[None]


class Cached(NamedTuple):
    """Checked arguments of attention to a cache that holds the new keys."""

    q: torch.Tensor
    cache: KVCache
    lengths: torch.Tensor  # the new keys included
    new: int  # how many there are
    leftpad: torch.Tensor | None
    options: Options

    def check(self) -> None:
        """Raises what `attended` would, so that nothing is written to a cache before."""
        one = self.q[:1], self.cache.keys[:1], self.cache.values[:1]  # a page has another number of rows
        _prepared(one, None, self.options)
        self.options.places(0).sides(_NO_RULE)
        self.options.applied(_NO_RULE)
        self._slopes()
        if self.leftpad is not None:
            flash.integers("cache_leftpad", self.leftpad, self.q.transpose(1, 2))

    def attended(self, return_lse: bool,
                 given: tuple[decoding.Call, decoding.Rules] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, lse) of the kernel of caches, or, where that takes no such call, of attention with lengths.

        Args:
          given: what `decoding` says of this call, before or after keys were appended; None: the kernel is not asked.
        """
        found = None
        if given is not None and not torch.compiler.is_compiling():
            found = eager.attend_to_cache(*given)
        if found is not None:
            out, lse = found.out, found.stats[:, :, 0] if return_lse else None
        elif given is not None and torch.compiler.is_compiling():
            out, lse = cached.attend_traced(*given, return_lse)
        else:
            out, lse = flash.attend(*self.with_lengths(), None, return_lse)
            out, lse = cached.unknown(out, lse, self.cache.lacks(self.lengths))
        if (slopes := self._slopes()) is not None:
            to_last = torch.arange(self.q.shape[1] - 1, -1, -1, device=self.q.device)
            lse = _with_query_bias(lse, slopes[..., None], to_last[None])
        return out.transpose(1, 2), lse

    @property
    def is_at_the_end(self) -> bool:
        """Whether no query sees more than it would if those before the first key saw nothing."""
        q_len, (_, right) = self.q.shape[1], self.options.places(0).sides(_NO_RULE)
        return q_len == 1 or q_len <= self.new or (right is not None and right <= 0)

    def decoding(self) -> tuple[decoding.Call, decoding.Rules]:
        """As the kernel of caches takes it: rows of a larger cache are pages of that length."""
        cache, options, table = self.cache, self.options, self.cache.pages
        if cache.rows is not None:
            table = cache.rows[:, None]
        query, key, value = (x.transpose(1, 2) for x in (self.q, cache.keys, cache.values))
        left, right = options.places(0).sides(_NO_RULE)
        bias, leftpad = self._bias(), self.leftpad
        if leftpad is not None:
            first = flash.integers("cache_leftpad", leftpad, query)[:, None, None, None]
            shown = torch.arange(cache.length, device=query.device) >= first
            bias = torch.where(shown, 0.0 if bias is None else bias, -torch.inf)
        return (decoding.Call(query, key, value, self.lengths, None if table is None else table.to(torch.int32), bias),
                decoding.Rules(left, right, options.cap, options.softmax_scale))

    def with_lengths(self) -> tuple[Operands, Numbers]:
        """As other kernels take it; rows and pages are copied."""
        q, lengths, options, ids = self.q, self.lengths, self.options, None
        if self.leftpad is not None:
            first = flash.integers("cache_leftpad", self.leftpad, q.transpose(1, 2))
            shown = torch.arange(self.cache.length, device=q.device) >= first[:, None]
            ids = first.new_zeros(q.shape[:2]), torch.where(shown, 0, -1).to(torch.int32)
        call = _prepared((q, *self.cache.read()), self._bias(), options)
        places = options.places(lengths - q.shape[1], kv_lengths=lengths, segment_ids=ids)
        return places.within(call.operands, options.applied(call.numbers))

    def _slopes(self) -> torch.Tensor | None:
        return self.options.slopes(self.q.shape[0], self.q.shape[2])

    def _bias(self) -> torch.Tensor | None:
        slopes = self._slopes()
        if slopes is None:
            return None
        at = torch.arange(self.cache.length, device=self.q.device)
        return _key_bias(slopes[..., None], self.lengths[:, None] - 1 - at, self.q)


_NO_RULE = Numbers.of(causal_offset=None, scale=None, dropout_p=0.0)


def _check_new(cache: KVCache, k: torch.Tensor | None, v: torch.Tensor | None, cache_seqlens: object,
               batch: int) -> int:
    """How many positions k and v take; raises where they cannot be appended, whatever the lengths."""
    if k is None and v is None:
        return 0
    if k is None or v is None or cache_seqlens is None:
        given = ", ".join(f"{name}={'None' if x is None else 'given'}"
                          for name, x in (("k", k), ("v", v), ("cache_seqlens", cache_seqlens)))
        raise messages.must("k, v and cache_seqlens go together", given, "Pass all of them to append to the cache")
    cache.check_new(k, v, batch)
    return k.shape[1]


def _rotated(rotary: Rotary, q: torch.Tensor, k: torch.Tensor | None, before: torch.Tensor,
             options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    assert k is not None
    new, asked = (torch.arange(x.shape[1], device=q.device) for x in (k, q))
    of_q = before[:, None] + (asked if options.is_local else torch.zeros_like(asked))
    return rotary.rotate(q, of_q), rotary.rotate(k, before[:, None] + new)


def _returned(out: torch.Tensor, lse: torch.Tensor | None) -> Returned:
    return out if lse is None else (out, lse, None)


def _check_rank(axes: int, shape: str, **tensors: torch.Tensor) -> None:
    messages.require_tensors(**tensors)
    if any(x.dim() != axes for x in tensors.values()):
        raise messages.must(f"{', '.join(tensors)} must be {shape}", messages.shapes(**tensors), "Add or merge axes")
