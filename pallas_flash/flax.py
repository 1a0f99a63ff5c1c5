"""Attention functions for Flax: `attention_fn=` of `MultiHeadAttention`, in nnx and in linen:

    from flax import linen, nnx
    from pallas_flash.flax import attention_fn, dot_product_attention
    from pallas_flash.masks import Causal, Window

    nnx.MultiHeadAttention(..., attention_fn=dot_product_attention)(x, is_causal=True)
    linen.MultiHeadAttention(..., attention_fn=attention_fn(mask=Causal()))(x)
    nnx.MultiHeadAttention(..., attention_fn=attention_fn(mask=Causal() & Window(left=1023), softcap=30.0))(x)

nnx says per call whether attention is causal. Linen never does: without `mask=Causal()` at construction, causality
reaches the function as a dense (length, length) mask, which is right but costs that memory and skips no tile.

The `mask` of a layer's call may be a `Mask` instead of an array, which costs O(length) memory and skips tiles:

    layer(x, mask=SegmentIds(ids, ids), is_causal=True)      # packed: ids (batch, length) of integers
    layer(x, mask=InBounds(kv_len=lengths), is_causal=True)  # padded: lengths (batch,) of integers

Not in a decode step: there Flax itself joins the mask with that of the filled slots, and takes arrays only.

Flax's own cache, `decode=True`, takes one token at a time, and has one length for the whole batch. A layer with
`decode=False` and an attention function that owns a `pallas_flash.cache.Cache` takes any number of them, for sequences
of any lengths, and pages; in nnx it is a module:

    class WithCache(nnx.Module):
        def __init__(self, empty):
            self.cache = nnx.Cache(empty)  # of cache.empty(...)

        def __call__(self, query, key, value, **keywords):
            self.cache.set_value(cache.append(self.cache.get_value(), key, value))
            return cache.attend(query, self.cache.get_value())

    layer.attention_fn = nnx.data(WithCache(cache.empty(batch, capacity, kv_heads, head_dim)))

Sequences that are cut over devices, with all arrays in the order of `pallas_flash.reorder`:

    parallel = ContextParallel("sequence", mesh=mesh, spec=PartitionSpec("data", "sequence", "model"))
    nnx.MultiHeadAttention(..., attention_fn=attention_fn(context_parallel=parallel))(x, is_causal=True)
    linen.MultiHeadAttention(..., attention_fn=attention_fn(mask=Causal(), context_parallel=parallel))(x)

Attention sinks are a parameter, which a layer's call does not hand on. In nnx the attention function may be a module
that owns it, and its parameter is then one of the layer's:

    class WithSinks(nnx.Module):
        def __init__(self, heads):
            self.sinks = nnx.Param(jnp.zeros(heads))

        def __call__(self, query, key, value, **keywords):
            return dot_product_attention(query, key, value, sinks=self.sinks[...], **keywords)

    nnx.MultiHeadAttention(8, ..., attention_fn=WithSinks(8))(x, is_causal=True)

In linen the module around the layer owns it, and makes the layer in its compact `__call__`:

    sinks = self.param("sinks", linen.initializers.zeros, (8,))
    attend = functools.partial(attention_fn(mask=Causal()), sinks=sinks)
    return linen.MultiHeadAttention(8, attention_fn=attend)(x)

A score function with arrays of its own (`RelativeBias`, learned slopes of `ALiBi`) is handed on likewise, by `score=`.

Where this differs from Flax's own function, on purpose:

- A query that may attend to nothing gives 0 with zero gradients; Flax's gives the mean of all values.
- Dropout is drawn for every entry of (batch, head, query, key). `broadcast_dropout=True`, Flax's default, asks for one
  pattern shared by batch entries and heads: with an active dropout it raises, so say `broadcast_dropout=False`.
- The weights are never formed, so `sow_weights=True` raises; so do the replaced einsums of linen.
- The softmax is in float32 whatever the inputs are, and `precision` has nothing to raise: float32 inputs are computed
  in float32, 16-bit inputs are accumulated in float32.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_flash import arguments, masks
from pallas_flash.attention import flash_attention
from pallas_flash.context_parallel.attention import context_parallel_attention
from pallas_flash.context_parallel.settings import ContextParallel
from pallas_flash.dispatch import Requested, require_names
from pallas_flash.errors import invalid, require_bool, unsupported
from pallas_flash.filled import Filled
from pallas_flash.forks import require_no_fork
from pallas_flash.masks import Causal, Dense, Full, Mask, SegmentIds, over_batch
from pallas_flash.scores import At, Function, Score, checked
from pallas_flash.spec import check_dropout_rate

__all__ = ["attention_fn", "dot_product_attention"]


def attention_fn(
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Score | Function | None = None,
    deterministic_backward: bool = False,
    implementation: Requested = None,
    context_parallel: ContextParallel | None = None,
) -> Callable[..., jax.Array]:
    """An attention function for `MultiHeadAttention` of `flax.nnx` and of `flax.linen`.

    Args:
      mask: which positions attend, in addition to the masks given in each call. Query i and key j have the positions i
        and j. At a decode step with a cache (one query, more keys, and the mask of the filled slots that Flax adds) the
        query has the position of the last key that this mask shows; so it has for the flag `is_causal` of a call. It
        holds no arrays: those belong to a call.
      scale: factor of the scores, 1 / sqrt(head_dim) if None.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      score: a score function, as in `pallas_flash.flash_attention`. It holds no arrays: one that does, learned slopes
        say, is handed on as sinks are. Batch entries are counted over all batch dimensions; at a decode step the query
        has the position that it has for `mask`.
      deterministic_backward: gradients equal to the last bit on every run.
      implementation: as in `pallas_flash.flash_attention`.
      context_parallel: how sequences are cut over devices, None: they are not. All that has a sequence axis (the
        layer's input and output, segment ids, both axes of a bias) is then in the order of `pallas_flash.reorder`, and
        positions of masks are those of the original sequence. A call's mask is a `Mask`, not an array.

    Returns:
      A function of query (batch..., q_len, q_heads, head_dim), key (batch..., kv_len, kv_heads, head_dim) and value
      (batch..., kv_len, kv_heads, v_dim), any number of batch dimensions, `q_heads` a multiple of `kv_heads`, and of
      the keywords that Flax passes. It returns (batch..., q_len, q_heads, v_dim) in the type that Flax's promotion
      gives. Functions made from equal arguments are equal, so that they share compiled code.

    Raises:
      ValueError: if `mask` or `score` holds arrays, or `mask`, `implementation` or `context_parallel` is something
        else.
      ModuleNotFoundError: in a call, if Flax is not installed.
      UnsupportedError: in a call that asks for shared dropout, sown weights or replaced einsums, or gives a mask array
        or a score function where sequences are cut.
    """
    require_bool("deterministic_backward", deterministic_backward)
    require_names(implementation)
    if mask is not None and masks.checked(mask).has_arrays:
        raise invalid(
            "mask of attention_fn must be the same in every call",
            f"a {type(mask).__name__} that holds arrays",
            "give those as the boolean `mask` of the layer's call",
        )
    function = checked(score)
    if jax.tree.leaves(function):
        raise invalid("score of attention_fn must be the same in every call", f"{function}, which holds arrays",
                      "hand it on in each call: functools.partial(dot_product_attention, score=...)")
    if not isinstance(context_parallel, ContextParallel | None):
        raise invalid("context_parallel of attention_fn must be a ContextParallel or None", f"{context_parallel=}",
                      "pass pallas_flash.ContextParallel(axis_name)")
    return _AttentionFn(mask, scale, softcap, function, deterministic_backward, implementation, context_parallel)


@dataclass(frozen=True)
class _AttentionFn:
    """What `attention_fn` returns: a value, so that Flax can hold it as a static attribute."""

    mask: Mask | None
    scale: float | None
    softcap: float | None
    score: Score | None
    deterministic_backward: bool
    implementation: Requested
    context_parallel: ContextParallel | None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | Mask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: object = None,  # nothing to raise, see the module's docstring
        module: object = None,
        is_causal: bool = False,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
        sinks: jax.Array | None = None,
        score: Score | Function | None = None,
    ) -> jax.Array:
        """Attention as Flax calls it; `bias` and `mask` broadcast to (batch..., q_heads, q_len, kv_len).

        `mask` may also be a `Mask`, whose arrays begin with the axes (batch...) or are shared by the whole batch.
        No layer passes `sinks`, (q_heads,), nor `score`, which takes the place of that of construction: see the
        module's docstring.

        Raises:
          ValueError: a flag that is no bool, a dropout rate that is no number; and as `pallas_flash.flash_attention`.
        """
        require_no_fork("pallas_flash.flax.dot_product_attention")
        for name, given in (("is_causal", is_causal), ("deterministic", deterministic),
                            ("broadcast_dropout", broadcast_dropout)):
            require_bool(name, given)
        check_dropout_rate(dropout_rate)
        dropout_rate = 0.0 if deterministic else dropout_rate
        _refuse_what_needs_weights(module, qk_attn_weights_einsum, attn_weights_value_einsum)
        _refuse_shared_dropout(dropout_rate, broadcast_dropout)
        batch = _batch(query=query, key=key, value=value)
        query, key, value = _promote(query, key, value, dtype=dtype)
        rule = _join_masks(self.mask, mask, is_causal, batch, (query.shape[-3], key.shape[-3]))
        function = self.score if score is None else checked(score)
        if function is not None and query.shape[-3] == 1 < key.shape[-3]:
            function = _at_decode_step(function, _as_rule(mask, batch), key.shape[-3])
        attend: Callable[..., jax.Array] = functools.partial(flash_attention, mask=rule, score=function)
        if self.context_parallel is not None:
            attend = _over_devices(self.context_parallel, rule, function)
        out: jax.Array = attend(
            _merge_batch(query),
            _merge_batch(key),
            _merge_batch(value),
            bias=None if bias is None else _merge_batch_of_scores("bias", bias, batch),
            scale=self.scale,
            softcap=self.softcap,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng if dropout_rate > 0 else None,
            sinks=sinks,
            deterministic=self.deterministic_backward,
            implementation=self.implementation,
        )
        return out.reshape(batch + out.shape[1:])


dot_product_attention = attention_fn()
"""Stands in for `nnx.dot_product_attention` and `linen.dot_product_attention`."""


def _over_devices(settings: ContextParallel, rule: Mask | None, score: Score | None) -> Callable[..., jax.Array]:
    """Attention over sequences that are cut over devices, under the rule: its segment ids are cut like the arrays."""
    if score is not None:
        raise unsupported(
            f"attention_fn(context_parallel=...) with the score function {score}",
            ["score functions are not told the positions of sequences that are cut over devices"],
            "give what is added to the scores as the layer's bias, or leave out context_parallel",
        )
    parts = () if rule is None else rule.parts
    segments = [part for part in parts if isinstance(part, SegmentIds)]
    others = [part for part in parts if not isinstance(part, SegmentIds)]
    if any(isinstance(part, Dense) for part in others) or len(segments) > 1:
        raise unsupported(
            f"attention_fn(context_parallel=...) with the mask {rule}",
            ["neither a mask array over queries and keys nor a second SegmentIds is cut over devices"],
            "say causality by is_causal=True or attention_fn(mask=Causal()), documents and padding by the layer's "
            "mask=SegmentIds(ids, ids), with ids (batch, length) in the order of pallas_flash.reorder, -1 at padding",
        )
    rest: Mask = functools.reduce(operator.and_, others, Full())
    ids = (segments[0].q_ids, segments[0].kv_ids) if segments else None
    return functools.partial(context_parallel_attention, **vars(settings) | dict(mask=rest, segment_ids=ids))


def _promote(*arrays: jax.Array, dtype: DTypeLike | None) -> Sequence[jax.Array]:
    """Casts all to `dtype`, or to the type that Flax infers."""
    try:
        from flax.linen.dtypes import promote_dtype
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pallas_flash.flax needs Flax: pip install "pallas_flash[flax]"') from error
    return promote_dtype(*arrays, dtype=dtype)


def _refuse_what_needs_weights(module: object, *einsums: object) -> None:
    if module is not None:
        raise unsupported(
            "sow_weights=True",
            ["flash attention never forms the attention weights"],
            "use sow_weights=False, or Flax's dot_product_attention for this layer",
        )
    if any(einsum is not None for einsum in einsums):
        raise unsupported(
            "an einsum given through qk_attn_weights_einsum_cls or attn_weights_value_einsum_cls",
            ["a fused kernel has no einsum to replace"],
            "drop both, or use Flax's dot_product_attention for this layer",
        )


def _refuse_shared_dropout(dropout_rate: float, broadcast_dropout: bool) -> None:
    if dropout_rate > 0 and broadcast_dropout:
        raise unsupported(
            f"{broadcast_dropout=} with {dropout_rate=}",
            ["one dropout pattern shared by batch entries and heads was asked for, here every entry has its own"],
            "give MultiHeadAttention broadcast_dropout=False",
        )


def _batch(**arrays: object) -> tuple[int, ...]:
    """The batch axes of query, key and value, which must be the same: merged, other axes of as many entries would be
    paired with each other.
    """
    shapes = {name: tuple(arguments.array(name, x).shape) for name, x in arrays.items()}
    for name, shape in shapes.items():
        if len(shape) < 3:
            raise invalid(f"{name} must be (batch..., length, heads, dim)", f"{name}.shape={shape}", "add axes")
        if shape[:-3] != shapes["query"][:-3]:
            raise invalid(f"query and {name} must have the same batch axes",
                          f"query.shape={shapes['query']}, {name}.shape={shape}", "broadcast one")
    return shapes["query"][:-3]


def _merge_batch(x: jax.Array) -> jax.Array:
    """(batch..., length, heads, dim) -> (prod(batch), length, heads, dim)."""
    return x.reshape((math.prod(x.shape[:-3]), *x.shape[-3:]))


def _merge_batch_of_scores(name: str, x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """(batch..., heads, q_len, kv_len), or what broadcasts to it -> (prod(batch) or 1, ...) with four axes."""
    shape = tuple(arguments.array(name, x).shape)
    extra = max(len(shape) - len(batch) - 3, 0)
    whole = (1,) * (len(batch) + 3 - len(shape)) + shape[extra:]
    if math.prod(shape[:extra]) != 1 or any(size not in (1, full) for size, full in zip(whole, batch)):
        raise invalid(f"{name} must broadcast to (batch..., heads, q_len, kv_len) with batch axes {batch}",
                      f"{name}.shape={shape}", "give it the batch axes of query, or 1 in their places")
    x = x.reshape(whole)
    if math.prod(x.shape[:-3]) != 1:
        x = jnp.broadcast_to(x, batch + x.shape[-3:])
    return _merge_batch(x)


def _join_masks(
    fixed: Mask | None,
    given: jax.Array | Mask | None,
    is_causal: bool,
    batch: tuple[int, ...],
    lengths: tuple[int, int],
) -> Mask | None:
    """The mask of construction, the mask and the flag of the call, as one mask (None if there is none)."""
    q_len, kv_len = lengths
    given = _as_rule(given, batch)
    if q_len == 1 < kv_len and (fixed is not None or given is not None):
        return _decode_step(fixed, given, is_causal, kv_len)
    joined = [mask for mask in (fixed, Causal() if is_causal else None, given) if mask is not None]
    return functools.reduce(operator.and_, joined) if joined else None


def _as_rule(given: jax.Array | Mask | None, batch: tuple[int, ...]) -> Mask | None:
    """The mask of a call with its batch axes merged."""
    if given is None or isinstance(given, Mask):
        return given if given is None else _merge_batch_of_rule(given, batch)
    arguments.array("mask", given)
    return Dense(_merge_batch_of_scores("mask", given.astype(bool), batch))


def _merge_batch_of_rule(rule: Mask, batch: tuple[int, ...]) -> Mask:
    """`rule` with the axes (batch...) of its arrays merged into one; arrays that do not begin with them stay."""
    def merged(part: Mask) -> Mask:
        arrays = {
            name: array.reshape((math.prod(batch), *array.shape[len(batch) :]))
            for name, array in part.array_fields().items()
            if isinstance(array, jax.Array | np.ndarray)
            and array.shape[: len(batch)] == batch
            and array.ndim >= len(batch) + len(part.position_axes.get(name, ()))
        }
        return replace(part, **arrays)  # type: ignore[type-var]

    return rule if len(batch) < 2 else functools.reduce(operator.and_, map(merged, rule.parts))


def _decode_step(fixed: Mask | None, given: Mask | None, is_causal: bool, kv_len: int) -> Mask:
    """The mask of one query at the last position that `given`, the filled slots of a cache, shows: no later tile is
    read, and none that `fixed` hides. The flag hides nothing there.
    """
    if not _is_of_keys(given, kv_len):
        if fixed is None:  # the flag, and no mask of the keys: the query is the first
            return (Causal() if is_causal else Full()) & (Full() if given is None else given)
        raise invalid(
            f"one query under attention_fn(mask={fixed}) must come with a mask of the keys, which tells its position",
            f"{kv_len=} and no mask of them",
            "pass a mask of the filled slots, as decode=True does",
        )
    filled, kv_pos = _filled(given, kv_len)
    lengths = jnp.max(jnp.where(filled, kv_pos + 1, 0), axis=(2, 3))
    return Filled(Full() if fixed is None else fixed, lengths, q_len=1) & given


def _is_of_keys(given: Mask | None, kv_len: int) -> TypeGuard[Mask]:
    """Whether a mask tells keys apart."""
    return given is not None and not (isinstance(given, Dense) and given.attend.shape[-1] != kv_len)


def _filled(given: Mask, kv_len: int) -> tuple[jax.Array, jax.Array]:
    """Which keys one query attends to, (batch or 1, heads or 1, 1, kv_len), and their positions, (1, 1, 1, kv_len)."""
    kv_pos = jnp.arange(kv_len, dtype=jnp.int32).reshape(1, kv_len)
    filled = over_batch(given.canonical(), lambda part: part.keep(jnp.zeros((1, 1), jnp.int32), kv_pos))
    return filled, kv_pos[None, None]


def _at_decode_step(score: Score, given: Mask | None, kv_len: int) -> Score:
    """A score function of one query at the last position that `given`, the filled slots, shows to any head."""
    if not _is_of_keys(given, kv_len):
        raise invalid(
            f"one query with the score function {score} must come with a mask of the keys, which tells its position",
            f"{kv_len=} and no mask of them",
            "pass a mask of the filled slots, as decode=True does",
        )
    filled, kv_pos = _filled(given, kv_len)
    q_pos = jnp.max(jnp.where(filled, kv_pos, 0), axis=(1, 3))
    return At(score, q_pos, kv_pos[0, 0])
