"""The public functions: arrays -> `AttentionSpec` -> `dispatch` -> the implementation, differentiable."""

from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from pallas_flash import arguments, autodiff, compat, dispatch, errors, forks, masks, packed, scores
from pallas_flash.arguments import Array, Ids, Integers
from pallas_flash.arrays import Shaped
from pallas_flash.device import Device, current
from pallas_flash.spec import AttentionSpec, Layout, Operands

__all__ = ["dot_product_attention", "explain", "flash_attention"]


@overload
def flash_attention(
    query: Array, key: Array, value: Array, *, mask: masks.Mask | None = None, bias: Array | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, q_lengths: Integers | None = None,
    kv_lengths: Integers | None = None, cu_seqlens_q: packed.Boundaries | None = None,
    cu_seqlens_kv: packed.Boundaries | None = None, max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
    alignment: packed.Alignment = "first", score: scores.Score | scores.Function | None = None,
    scale: float | None = None, softcap: float | None = None, dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, sinks: Array | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, layout: Layout = "BLHD",
    implementation: dispatch.Requested = None,
) -> jax.Array: ...


@overload
def flash_attention(
    query: Array, key: Array, value: Array, *, mask: masks.Mask | None = None, bias: Array | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, q_lengths: Integers | None = None,
    kv_lengths: Integers | None = None, cu_seqlens_q: packed.Boundaries | None = None,
    cu_seqlens_kv: packed.Boundaries | None = None, max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
    alignment: packed.Alignment = "first", score: scores.Score | scores.Function | None = None,
    scale: float | None = None, softcap: float | None = None, dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, sinks: Array | None = None,
    return_lse: Literal[True], deterministic: bool = False, layout: Layout = "BLHD",
    implementation: dispatch.Requested = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def flash_attention(
    query: Array, key: Array, value: Array, *, mask: masks.Mask | None = None, bias: Array | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, q_lengths: Integers | None = None,
    kv_lengths: Integers | None = None, cu_seqlens_q: packed.Boundaries | None = None,
    cu_seqlens_kv: packed.Boundaries | None = None, max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
    alignment: packed.Alignment = "first", score: scores.Score | scores.Function | None = None,
    scale: float | None = None, softcap: float | None = None, dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, sinks: Array | None = None,
    return_lse: bool, deterministic: bool = False, layout: Layout = "BLHD",
    implementation: dispatch.Requested = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@arguments.names_keywords
def flash_attention(
    query: Array, key: Array, value: Array, *, mask: masks.Mask | None = None, bias: Array | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, q_lengths: Integers | None = None,
    kv_lengths: Integers | None = None, cu_seqlens_q: packed.Boundaries | None = None,
    cu_seqlens_kv: packed.Boundaries | None = None, max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
    alignment: packed.Alignment = "first", score: scores.Score | scores.Function | None = None,
    scale: float | None = None, softcap: float | None = None, dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, sinks: Array | None = None,
    return_lse: bool = False, deterministic: bool = False, layout: Layout = "BLHD",
    implementation: dispatch.Requested = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention: out = dropout(softmax(score(softcap(scale * query key^T)) + bias, where the mask keeps)) value.

    Never O(q_len * kv_len) in memory unless `implementation="reference"`. Differentiable (reverse mode) with respect
    to query, key, value, bias, the arrays of a score function and sinks, `lse` included. A query that attends to
    nothing gives output 0, lse -inf (with sinks: the sink) and zero gradients.

    Args:
      query: (batch, q_len, q_heads, d) with layout "BLHD", (batch, q_heads, q_len, d) with "BHLD"; bfloat16, float16,
        float32 or float64. Without the batch axis: all three arrays, and the result, are without it.
      key: (batch, kv_len, kv_heads, d), the dtype of query; kv_heads divides q_heads (grouped queries), nothing is
        repeated.
      value: (batch, kv_len, kv_heads, d_v).
      mask: which pairs attend, e.g. `Causal()`, `Window(left=1023, right=0)`, `PrefixLM(100)`, `Dense(array)`, or
        several joined with `&`. None: all.
      bias: added to the scores, broadcastable to (batch, q_heads, q_len, kv_len); -inf masks. It has a gradient.
      segment_ids: integers (batch, length), an array or lists, or a tuple of those of queries and those of keys: tokens
        attend within their segment; ids below 0 are padding, and none is above 2^31 - 1.
      q_lengths, kv_lengths: integers (batch,), or one for all: positions from there on are padding, whatever they hold.
        One below 0 is refused where its value is on the host (numbers, lists, NumPy arrays), and counts as 0 in a JAX
        array. Under `jit` of sharded inputs, lengths and segments cost an all-reduce of tile bounds; under `shard_map`
        nothing.
      cu_seqlens_q, cu_seqlens_kv: the boundaries of packed sequences, integers (sequences + 1,): arrays are (tokens,
        heads, dim), sequence j is tokens cu_seqlens_q[j] to cu_seqlens_q[j + 1] of query and cu_seqlens_kv[j] to
        cu_seqlens_kv[j + 1] of key and value. Sequences may be empty; tokens after the last boundary are padding.
        Tokens attend within their sequence, and positions in `mask`, which must hold numbers alone, count from the
        sequence's first query and first key; those of bias and dropout from the first token. cu_seqlens_kv None: as
        cu_seqlens_q. Where values are on the host they must start at 0, not fall, and not exceed the tokens; in a JAX
        array each counts as the nearest number that does so. Other values of the same shapes compile nothing.
      max_seqlen_q, max_seqlen_kv: upper bounds of the lengths of packed sequences, Python integers. Neither is needed,
        and no implementation reads them, so they change no result; one that boundaries on the host exceed is refused.
      alignment: "first": the first query of each packed sequence is aligned with its first key; "last": the last with
        the last, as in flash-attn, which adds the sequence's kv_len - q_len to the offset of `mask`.
      score: what becomes of each score after scale and soft cap, before bias and mask: a function (score, batch, head,
        q_pos, kv_pos) -> score of scalars in jnp, or a `Score`, such as `ALiBi(slopes)` and `RelativeBias(table)`,
        whose arrays have gradients. -inf masks; it skips no tile, so say what is a rule in `mask` too. For packed
        sequences positions count as those of `mask`, and with alignment "last" query 0 is at the sequence's kv_len -
        q_len. Inside `shard_map` and `vmap` batch and head count from the shard's and the element's first.
      scale: multiplies the scores; None means 1 / sqrt(d).
      softcap: scores become softcap * tanh(scores / softcap), before score function, bias and mask.
      dropout_rate: the probability of dropping an attention weight, rounded to a multiple of 2^-16; those kept are
        scaled by the inverse of the exact keep rate. `dropout_rng`, a JAX PRNG key, is needed if it is not 0. Which
        weights drop depends on the key, batch, head and positions only, not on the implementation; under `vmap` with
        one key for all, elements drop alike. Inside `shard_map` batch and head count from the shard's first, so each
        shard needs its own key, for instance `jax.random.fold_in(dropout_rng, jax.lax.axis_index(axis_names))`: a key
        shared by shards is refused (with `check_vma=False` it cannot be seen, and they drop alike).
      sinks: (q_heads,), in any of these dtypes: a logit of each head that joins the softmax of every row like the score
        of one more key, whose value is 0; it is never masked or dropped. It has a gradient. Where the kernel does not
        take them, which `explain` says, the forward reads and writes out once more: see docs/semantics.md.
      return_lse: also return lse.
      deterministic: gradients are bit-equal on every run; for the arrays of score functions see docs/semantics.md.
      layout: the order of the axes of query, key, value and out.
      implementation: "hopper", "ampere", "xla" or "reference"; a tuple of these for the first in it that can run this
        on the device; or None for the fastest that can, with a `FallbackWarning` where that is not one written for the
        device. See `explain`. The device is the one that the arrays are committed to (by `jax.device_put`, a sharding);
        otherwise, and inside `jit`, where they have no place yet, it is `jax.default_device` or JAX's first.

    Returns:
      out, in the layout and dtype of query with d_v in place of d; with `return_lse`, (out, lse), lse (batch, q_heads,
      q_len) being the natural logarithm of each row's sum of exponentials, sinks included, float32 (float64 for float64
      input). Without the batch axis, as packed sequences are, lse is (q_heads, q_len).

    NaN and infinity reach only the pairs that attend; for the exceptions in "hopper", "ampere" and "reference", and
    every other convention, see docs/semantics.md.

    Raises:
      ValueError: wrong shapes, dtypes or numbers; the message names the array.
      RuntimeError: this process was forked after JAX had started.
      UnsupportedError: no implementation named can run this here, with every reason; or a derivative that it does
        not have: forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`) and derivatives of derivatives are those of
        implementation="reference" alone.
      TypeError: a keyword that does not exist, with the one that is meant.

    The algorithm is FlashAttention-2's (Dao, 2023, arXiv:2307.08691).
    """
    forks.require_no_fork("flash_attention")
    inputs = _Inputs.of(query, key, value, layout)
    spec = inputs.spec(layout, scale=scale, softcap=softcap, dropout_rate=dropout_rate, return_lse=return_lse,
                       deterministic=deterministic)
    packing = packed.Packing(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, alignment)
    rule = packing.mask(mask, spec, batched=not inputs.unbatched, segment_ids=segment_ids, q_lengths=q_lengths,
                        kv_lengths=kv_lengths)
    problem = _problem(inputs, spec, mask=rule, bias=bias, segment_ids=segment_ids, q_lengths=q_lengths,
                       kv_lengths=kv_lengths).with_score(packing.score(score, rule)).with_sinks(sinks)
    out, lse = problem.attend(dropout_rng, implementation)
    return out if lse is None else (out, lse)


@arguments.names_keywords
def explain(
    query: Shaped, key: Shaped, value: Shaped, *, mask: masks.Mask | None = None, bias: Shaped | None = None,
    segment_ids: Ids | Shaped | tuple[Ids | Shaped, Ids | Shaped] | None = None,
    q_lengths: Integers | Shaped | None = None, kv_lengths: Integers | Shaped | None = None,
    cu_seqlens_q: packed.Boundaries | Shaped | None = None, cu_seqlens_kv: packed.Boundaries | Shaped | None = None,
    max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None, alignment: packed.Alignment = "first",
    score: scores.Score | scores.Function | None = None, scale: float | None = None, softcap: float | None = None,
    dropout_rate: float = 0.0, dropout_rng: Shaped | None = None, sinks: Shaped | None = None, return_lse: bool = False,
    deterministic: bool = False, layout: Layout = "BLHD",
    implementation: dispatch.Requested = None, device: Device | None = None,
) -> str:
    """What `flash_attention` would run for these arguments, with which kernels and schedules, why not the others, and
    what to change to reach them.

    Only shapes, dtypes and the device count: arrays may be `jax.ShapeDtypeStruct`s. Nothing is computed.

    Args:
      device: the `pallas_flash.device.Device` to decide for, such as `device.H200`; None: the one that
        `flash_attention` would find.

    The other arguments are those of `flash_attention`.

    Raises:
      ValueError: see `flash_attention`. A named implementation that cannot run is part of the text, not raised.
    """
    inputs = _Inputs.of(query, key, value, layout)
    spec = inputs.spec(layout, scale=scale, softcap=softcap, dropout_rate=dropout_rate, return_lse=return_lse,
                       deterministic=deterministic)
    packing = packed.Packing(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, alignment)
    rule = packing.mask(mask, spec, batched=not inputs.unbatched, segment_ids=segment_ids, q_lengths=q_lengths,
                        kv_lengths=kv_lengths)
    problem = _problem(inputs, spec, mask=rule, bias=bias, segment_ids=segment_ids, q_lengths=q_lengths,
                       kv_lengths=kv_lengths).with_score(packing.score(score, rule)).with_sinks(sinks)
    where = problem.where(dropout_rng) if device is None else device
    return dispatch.explain(problem.spec, where, implementation, has_sinks=sinks is not None)


@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None, *,
    scale: float | None = None, is_causal: bool = False, query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None, local_window_size: int | tuple[int, int] | None = None,
    implementation: dispatch.Requested = None, return_residual: Literal[False] = False, softcap: float | None = None,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, segment_ids: Ids | tuple[Ids, Ids] | None = None,
    sinks: Array | None = None, score: scores.Score | scores.Function | None = None,
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None, *,
    scale: float | None = None, is_causal: bool = False, query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None, local_window_size: int | tuple[int, int] | None = None,
    implementation: dispatch.Requested = None, return_residual: Literal[True], softcap: float | None = None,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, segment_ids: Ids | tuple[Ids, Ids] | None = None,
    sinks: Array | None = None, score: scores.Score | scores.Function | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None, *,
    scale: float | None = None, is_causal: bool = False, query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None, local_window_size: int | tuple[int, int] | None = None,
    implementation: dispatch.Requested = None, return_residual: bool, softcap: float | None = None,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, segment_ids: Ids | tuple[Ids, Ids] | None = None,
    sinks: Array | None = None, score: scores.Score | scores.Function | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@arguments.names_keywords
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None, *,
    scale: float | None = None, is_causal: bool = False, query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None, local_window_size: int | tuple[int, int] | None = None,
    implementation: dispatch.Requested = None, return_residual: bool = False, softcap: float | None = None,
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, segment_ids: Ids | tuple[Ids, Ids] | None = None,
    sinks: Array | None = None, score: scores.Score | scores.Function | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`jax.nn.dot_product_attention` with its signature, computed by `flash_attention`; plus soft cap, dropout,
    segments, sinks and score functions.

    A query that attends to nothing gives 0 (in jax.nn: the mean of value), and lse is float32 with a gradient.
    docs/semantics.md lists the other differences from jax.nn.

    Args:
      query: (batch, q_len, q_heads, d) or (q_len, q_heads, d).
      key, value: (batch, kv_len, kv_heads, d) or (kv_len, kv_heads, d).
      bias: added to the scaled scores, broadcastable to (batch, q_heads, q_len, kv_len).
      mask: boolean, True attends, broadcastable to (batch, q_heads, q_len, kv_len). For rules, not arrays, use
        `flash_attention`.
      is_causal: the query at q attends to the keys up to q, whatever the lengths.
      query_seq_lengths, key_value_seq_lengths: integers (batch,): positions from there on are padding.
      local_window_size: keys visible on the left and right of a query; one number for both.
      return_residual: also return lse, (batch, q_len, q_heads) as in jax.nn.
      scale, implementation, softcap, dropout_rate, dropout_rng, segment_ids, sinks, score: see
        `flash_attention`.

    Raises:
      ValueError, RuntimeError, UnsupportedError: see `flash_attention`.
    """
    forks.require_no_fork("dot_product_attention")
    errors.require_bool("is_causal", is_causal)
    errors.require_bool("return_residual", return_residual)
    inputs = _Inputs.of(query, key, value, "BLHD")
    spec = inputs.spec("BLHD", scale=scale, softcap=softcap, dropout_rate=dropout_rate, return_lse=return_residual,
                       deterministic=False)
    rule: masks.Mask = masks.Causal() if is_causal else masks.Full()
    if local_window_size is not None:
        rule = rule & masks.Window(*arguments.window_sides(local_window_size))
    if mask is not None:
        attend = arguments.fitted("mask", mask, arguments.score_axes(spec))
        rule = rule & masks.Dense(arguments.boolean("mask", attend))
    rule = rule & arguments.in_bounds(
        spec, query_seq_lengths, key_value_seq_lengths, names=("query_seq_lengths", "key_value_seq_lengths"))
    problem = _problem(inputs, spec, mask=rule, bias=bias, segment_ids=segment_ids, q_lengths=None, kv_lengths=None)
    problem = problem.with_score(scores.checked(score)).with_sinks(sinks)
    out, lse = problem.attend(dropout_rng, implementation)
    return out if lse is None else (out, lse.swapaxes(-1, -2))


class _Inputs(NamedTuple):
    """query, key and value with four axes, and whether a batch axis was added."""

    q: Shaped
    k: Shaped
    v: Shaped
    unbatched: bool

    @classmethod
    def of(cls, query: object, key: object, value: object, layout: Layout) -> "_Inputs":
        arrays = {name: arguments.array(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
        rank = len(arrays["query"].shape)
        unbatched = rank == 3
        if rank not in (3, 4):
            raise errors.invalid(f"query must have 4 axes ({layout}), or 3 without the batch",
                                 f"query.shape={tuple(arrays['query'].shape)}", "add or merge batch axes")
        for name, x in arrays.items():
            if len(x.shape) != rank:
                raise errors.invalid(f"{name} must have as many axes as query",
                                     f"{name}.shape={tuple(x.shape)}, query.shape={tuple(arrays['query'].shape)}",
                                     "give all of query, key and value a batch axis, or none")
        q, k, v = (arguments.reshape(x, (1, *x.shape)) if unbatched else x for x in arrays.values())
        return cls(q, k, v, unbatched)

    def spec(self, layout: Layout, *, scale: float | None, softcap: float | None, dropout_rate: float,
             return_lse: bool, deterministic: bool) -> AttentionSpec:
        """The spec without a mask or a bias: what these are checked against."""
        return AttentionSpec.of(self.q, self.k, self.v, layout=layout, scale=scale, softcap=softcap,
                                dropout_rate=dropout_rate, return_lse=return_lse, deterministic=deterministic)


class _Problem(NamedTuple):
    """Checked, canonical arguments: operands with four axes, and what was given without a batch axis."""

    inputs: _Inputs
    bias: Shaped | None
    mask: masks.Mask
    spec: AttentionSpec
    score: scores.Score | None
    sinks: Shaped | None

    def with_score(self, score: scores.Score | None) -> "_Problem":
        """The same with a score function that is `scores.checked`; None: without."""
        return self._replace(score=score, spec=self.spec.scored(score))

    def with_sinks(self, sinks: object) -> "_Problem":
        """The same with sinks, once checked; None: without."""
        return self if sinks is None else self._replace(sinks=arguments.sinks(self.spec, sinks))

    def attend(self, dropout_rng: Array | None,
               implementation: dispatch.Requested) -> tuple[jax.Array, jax.Array | None]:
        """(out, lse) by the implementation that dispatch chooses; lse is None if the spec does not ask for it."""
        spec, where = self.spec, self.where(dropout_rng)
        chosen = dispatch.choose(spec, where, implementation)
        operands = self.operands(arguments.dropout_seed(spec, dropout_rng))
        _check_shards(operands)
        sinks = None if self.sinks is None else _as_jax("sinks", self.sinks)
        out, lse = autodiff.attend(spec, autodiff.Target(chosen.name, where), operands, sinks)
        if self.inputs.unbatched:
            return out[0], None if lse is None else lse[0]
        return out, lse

    def where(self, dropout_rng: object) -> Device:
        """Where the call runs: a dropout key that is used counts like the other arrays."""
        q, k, v, *_ = self.inputs
        rng = dropout_rng if self.spec.dropout_rate else None
        return current((q, k, v, self.bias, self.score, self.sinks, self.mask, rng))

    def operands(self, dropout_seed: jax.Array | None) -> Operands:
        """As JAX arrays; raises where one has a shape and no values."""
        q, k, v, *_ = self.inputs
        return Operands(
            q=_as_jax("query", q), k=_as_jax("key", k), v=_as_jax("value", v),
            bias=None if self.bias is None else _as_jax("bias", self.bias),
            score=self._arrays(scores.floats(self.score)),
            mask=_mask_as_jax(self.mask), score_integers=self._arrays(scores.integers(self.score)),
            dropout_seed=dropout_seed, dropout_origin=None, page_table=None)

    def _arrays(self, of_score: tuple[Shaped, ...]) -> tuple[jax.Array, ...]:
        return tuple(_as_jax(f"an array of the score function {self.score}", x) for x in of_score)


def _problem(inputs: _Inputs, spec: AttentionSpec, *, mask: object, bias: object, segment_ids: object,
             q_lengths: object, kv_lengths: object) -> _Problem:
    rule = masks.checked(mask) & arguments.in_bounds(spec, q_lengths, kv_lengths)
    if segment_ids is not None:
        rule = rule & arguments.segments(spec, segment_ids)
    fitted = None if bias is None else arguments.fitted("bias", bias, arguments.score_axes(spec))
    rule = rule.canonical()
    return _Problem(inputs, fitted, rule, spec.masked(rule, fitted), score=None, sinks=None)


def _require_values(name: str, x: object) -> None:
    if isinstance(x, jax.ShapeDtypeStruct | masks.ArrayField):
        raise errors.invalid(f"{name} must hold values to compute with", f"type({name})={type(x).__name__}",
                             "ask explain() about shapes alone, or trace with jax.eval_shape or jax.jit(...).lower")


def _mask_as_jax(mask: masks.Mask) -> masks.Mask:
    for part in mask.parts:
        for name, x in part.array_fields().items():
            _require_values(f"{type(part).__name__}.{name}", x)
    with_jax: masks.Mask = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), mask)
    return with_jax


def _as_jax(name: str, x: Shaped) -> jax.Array:
    _require_values(name, x)
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _check_shards(operands: Operands) -> None:
    """Raises where shards under `shard_map` share a seed: each counts batch and heads from 0 and would drop alike."""
    if operands.dropout_seed is None:
        return
    sharded = compat.dividing_axes(operands.q, operands.k, operands.v)
    seeds = compat.dividing_axes(operands.dropout_seed)
    if shared := tuple(sorted(sharded - seeds)):
        raise errors.invalid(
            "dropout_rng must vary over the shard_map axes that query, key and value vary over, or shards drop alike",
            f"axes of query, key and value={sorted(sharded)}, axes of dropout_rng={sorted(seeds)}",
            f"fold the shard in: jax.random.fold_in(dropout_rng, jax.lax.axis_index({shared}))")
