"""Decoding with a cache of keys and values, contiguous or in pages: `append` what is new, and `attend` to all of it.

    kv = cache.empty(batch=2, capacity=1024, kv_heads=4, d=64)    # or cache.empty_paged, or a Cache of your own arrays
    kv = cache.append(kv, k, v)                                   # the prompt's keys and values, or a new token's
    out = cache.attend(q, kv)                                     # its queries, at the end of each sequence

A `Cache` is a value and a pytree: it passes through `jit`, `scan`, `vmap` and `shard_map`, and under a `jit` that is
given it to keep (`donate_argnums`) and in a loop's carry, `append` writes in place. Each sequence has a length of its
own, an array: other lengths compile nothing. `dataclasses.replace(kv, lengths=...)` takes tokens back, or hides padding
after a prompt.
"""

import dataclasses
import functools
import operator
from typing import Literal, NamedTuple, TypedDict, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import (
    arguments,
    autodiff,
    compat,
    dispatch,
    errors,
    forks,
    masks,
    paging,
    quantised,
    sharding,
    storage,
)
from pallas_flash.arrays import Array, Bool, Int, Shaped
from pallas_flash.device import Device, current
from pallas_flash.filled import Filled
from pallas_flash.spec import AttentionSpec, Operands, check_dtype
from pallas_flash.storage import Cache, empty, empty_paged

__all__ = ["Cache", "append", "attend", "empty", "empty_paged", "explain"]

CAUSAL: masks.Mask = masks.Causal()
"""What attention to a cache is unless another mask is given."""


def append(cache: Cache, key: arguments.Array, value: arguments.Array) -> Cache:
    """The cache with n new keys and values after those of each sequence, and lengths that are larger by n.

    In place where the cache may be overwritten: an argument in `jax.jit(..., donate_argnums=...)`, the carry of a loop.
    Outside of `jit` it is copied. Differentiable, but for a cache in eight bits: into that they are rounded here.

    Keys that find no room, past the capacity or where a page is missing, are dropped and never written anywhere else;
    lengths count them all the same, which makes the sequence one of `Cache.overflowed`. Where lengths are known
    (outside of `jit`) that is an error. A negative length counts as 0.

    Args:
      key, value: (batch, n, kv_heads, d or d_v), or heads first, in the cache's layout and dtype, for a cache in eight
        bits in any dtype of a query. A rotary embedding is the caller's: the new keys are at positions lengths to
        lengths + n - 1.

    Raises:
      ValueError: wrong shapes or dtypes; outside of `jit`, no room, or a page that another sequence has, too.
    """
    forks.require_no_fork("pallas_flash.cache.append")
    storage.require_cache(cache)
    key, value = _checked_rows(cache, "key", key), _checked_rows(cache, "value", value)
    axis = cache.layout.index("L")
    if key.shape[axis] != value.shape[axis]:
        raise errors.invalid("key and value must be of the same number of new tokens",
                             f"key.shape={tuple(key.shape)}, value.shape={tuple(value.shape)}", "append both together")
    _check_room(cache, key.shape[axis])
    appended: Cache = _append(cache, key, value)
    return appended


@jax.jit
def _append(cache: Cache, key: Array, value: Array) -> Cache:
    axis = cache.layout.index("L")

    def run(cache: Cache, key: Array, value: Array) -> tuple[Array, Array, Array]:
        start = jnp.maximum(cache.lengths, 0)
        pos = start[:, None] + jnp.arange(key.shape[axis], dtype=jnp.int32)[None]
        write = functools.partial(_write, cache, pos)
        if cache.scales is not None:
            key, value = (_quantised(cache, pos, x, scale)
                          for x, scale in zip((key, value), cache.scales, strict=True))
        return write(cache.key, key), write(cache.value, value), start + key.shape[axis]
    places = tuple(sharding.place(x) for x in (cache.key, cache.value, cache.lengths))
    key, value, lengths = sharding.automatic(run, places, cache, key, value)
    return dataclasses.replace(cache, key=key, value=value, lengths=lengths)


def _quantised(cache: Cache, pos: Int[Array, "b n"], new: Array, scale: Array) -> Array:
    """New keys or values as they are stored at positions, in the cache's layout."""
    axis, size = cache.layout.index("L"), 0 if cache.pages is None else cache.pages.size
    pos = jnp.clip(pos, 0, max(cache.capacity - 1, 0))
    scale = quantised.paged_scales(scale, cache.page_table, pos, size)
    return quantised.quantise(new, (scale if axis == 1 else scale.swapaxes(1, 2))[..., None])


def _write(cache: Cache, pos: Int[Array, "b n"], rows: Array, new: Array) -> Array:
    """The cache's keys, or its values, with new ones at the positions that there is room for."""
    rows, new, pos = compat.vary_like((rows, new, pos), rows, new, pos, cache.page_table)
    axis = cache.layout.index("L")
    is_one = pos.shape == (1, 1) and cache.capacity > 0
    if cache.pages is None:
        if is_one:
            return _write_one(rows, new, (0, pos[0, 0]), pos[0, 0] < cache.capacity, axis)

        def one(rows: Array, new: Array, pos: Array) -> Array:
            at = rows.at[pos] if axis == 1 else rows.at[:, pos]
            return at.set(new, mode="drop", unique_indices=True, indices_are_sorted=True)
        written: Array = jax.vmap(one)(rows, new, pos)
        return written
    number, size = rows.shape[0], rows.shape[axis]
    page = paging.page_at(cache.page_table, jnp.minimum(pos, cache.capacity - 1), size)
    has_room = (pos < cache.capacity) & (page >= 0) & (page < number)
    if is_one:
        return _write_one(rows, new, (page[0, 0], pos[0, 0] % size), has_room[0, 0], axis)
    page = jnp.where(has_room, page, number)
    if axis == 1:
        return rows.at[page, pos % size].set(new, mode="drop")
    return rows.at[page, :, pos % size].set(new.swapaxes(1, 2), mode="drop")


def _write_one(rows: Array, new: Array, place: tuple[Array | int, Array], has_room: Bool[Array, ""],
               axis: int) -> Array:
    """The rows with one key at a place, (sequence or page, position in it), if there is room.

    XLA writes a single row of a scatter in three kernels, one of which looks whether the place is inside. This is one.
    """
    zero = jnp.int32(0)  # as the others are, also where JAX counts in 64 bits
    start = [jnp.asarray(place[0], jnp.int32), zero, zero, zero]
    start[axis] = place[1]
    old = jax.lax.dynamic_slice(rows, start, new.shape)
    written: Array = jax.lax.dynamic_update_slice(rows, jnp.where(has_room, new, old), start)
    return written


@overload
def attend(
    query: arguments.Array, cache: Cache, *, mask: masks.Mask | None = CAUSAL,
    bias: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: arguments.Array | None = None, return_lse: Literal[False] = False,
    implementation: dispatch.Requested = None,
) -> jax.Array: ...


@overload
def attend(
    query: arguments.Array, cache: Cache, *, mask: masks.Mask | None = CAUSAL,
    bias: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: arguments.Array | None = None, return_lse: Literal[True],
    implementation: dispatch.Requested = None,
) -> tuple[jax.Array, jax.Array]: ...


@arguments.names_keywords
def attend(
    query: arguments.Array, cache: Cache, *, mask: masks.Mask | None = CAUSAL,
    bias: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: arguments.Array | None = None, return_lse: bool = False,
    implementation: dispatch.Requested = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention of new queries to the keys of a cache, in which their own keys are already (`append`).

    The last query is at the last key: query i of q_len is at position lengths - q_len + i of its sequence. One whose
    position would be negative, all of an empty sequence for instance, attends to nothing: output 0, lse -inf. For a
    sequence that has lost keys (`Cache.overflowed`) everything is NaN.

    Args:
      query: (batch, q_len, q_heads, d), or (batch, q_heads, q_len, d) in the layout "BHLD"; the dtype of the cache, or
        any of 16 bits or more beside one in eight bits, whose keys and values are its numbers times their scales.
      mask: which pairs attend, by positions in the sequence: `Causal()`, `Causal() & Window(left=1023)`, a class of
        your own; `None` or `Full()`: all keys that there are. Its numbers may be arrays (batch,); what is an array over
        positions (`Dense`, `SegmentIds`) is not taken: -inf in a bias hides keys.
      bias: added to the scores, broadcastable to (batch, q_heads, q_len, capacity): of each key's place in the cache.
      scale, softcap, sinks, return_lse, implementation: as in `flash_attention`. Nothing is repeated for grouped
        queries, and memory does not grow with q_len * capacity.

    Returns:
      out, as `query` with d_v in place of d; with `return_lse`, (out, lse), lse (batch, q_heads, q_len).

    Differentiable like `flash_attention`; the backward of pages copies what their table shows.

    Raises:
      ValueError: wrong shapes, dtypes or numbers; outside of `jit`, a sequence that has lost keys.
      RuntimeError, UnsupportedError: see `flash_attention`.
    """
    forks.require_no_fork("pallas_flash.cache.attend")
    call = _Call.of(query, cache, mask, bias, dict(scale=scale, softcap=softcap, return_lse=return_lse))
    storage.require_values(query=query, mask=mask, bias=bias, sinks=sinks, cache=cache)
    storage.check_lengths(cache, storage.known, lengths=cache.lengths, page_table=cache.page_table)
    sinks = None if sinks is None else storage.as_jax(arguments.sinks(call.spec, sinks))
    where = current((call, sinks))
    chosen = dispatch.choose(call.spec, where, implementation)
    out, lse = autodiff.attend(call.spec, autodiff.Target(chosen.name, where), call.operands(), sinks)
    return out if lse is None else (out, lse)


@arguments.names_keywords
def explain(
    query: Shaped, cache: Cache, *, mask: masks.Mask | None = CAUSAL, bias: Shaped | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Shaped | None = None, return_lse: bool = False,
    implementation: dispatch.Requested = None, device: Device | None = None,
) -> str:
    """What `attend` would run for these arguments, and why not the others, as `pallas_flash.explain` says it.

    Only shapes and dtypes count: arrays, those of the cache too, may be `jax.ShapeDtypeStruct`s, as `jax.eval_shape`
    makes them. `device` is the one to decide for, None: that of the arrays.

    Raises:
      ValueError: see `attend`. A named implementation that cannot run is part of the text, not raised.
    """
    call = _Call.of(query, cache, mask, bias, dict(scale=scale, softcap=softcap, return_lse=return_lse))
    given = None if sinks is None else arguments.sinks(call.spec, sinks)
    device = current((call, given)) if device is None else device
    return dispatch.explain(call.spec, device, implementation, has_sinks=sinks is not None)


class _Numbers(TypedDict):
    """The arguments of `AttentionSpec.of` that are not arrays."""

    scale: float | None
    softcap: float | None
    return_lse: bool


class _Call(NamedTuple):
    """Checked arguments: the arrays and their spec."""

    query: Shaped
    cache: Cache
    mask: masks.Mask
    bias: Shaped | None
    spec: AttentionSpec

    @classmethod
    def of(cls, query: object, cache: object, mask: object, bias: object, numbers: "_Numbers") -> "_Call":
        query, cache = arguments.array("query", query), storage.require_cache(cache)
        spec = AttentionSpec.of(query, *_all_rows(cache, query), layout=cache.layout, **numbers).paged(cache.pages)
        if cache.scales is not None:
            of_k, of_v = cache.scales
            spec = dataclasses.replace(spec, cache_scales=(of_k.shape, of_v.shape))
        rule = functools.partial(_rule, q_len=spec.q_len, capacity=cache.capacity)
        mask = masks.checked(mask)
        for part in mask.parts:
            _check_part(part)
        has_values = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((mask, cache.lengths)))
        made: masks.Mask = rule(mask, cache.lengths) if has_values else jax.eval_shape(rule, mask, cache.lengths)
        fitted = None if bias is None else arguments.fitted("bias", bias, arguments.score_axes(spec))
        made = made.canonical()
        return cls(query, cache, made, fitted, spec.masked(made, fitted))

    def operands(self) -> Operands:
        key, value, scales = self.cache.key, self.cache.value, self.cache.scales
        if scales is not None:
            key, value, scales = jax.lax.stop_gradient((key, value, scales))
        return Operands(
            q=storage.as_jax(self.query), k=key, v=value, cache_scales=scales,
            bias=None if self.bias is None else storage.as_jax(self.bias),
            score=(), mask=jax.tree.map(storage.as_jax, self.mask), score_integers=(), dropout_seed=None,
            dropout_origin=None, page_table=self.cache.page_table)


def _rule(mask: masks.Mask, lengths: Int[Array, " b"], q_len: int, capacity: int) -> masks.Mask:
    """The mask about queries and keys by number, from one about positions in the sequences. Lengths stay as they are
    (`filled.within`): to change them would be a program of its own for each call in a decoding loop.
    """
    numbers: masks.Mask = masks.Full()
    arrays: list[masks.Mask] = []
    for part in mask.parts:
        if part.has_arrays:
            arrays.append(part.canonical().moved(jnp.clip(lengths, 0, capacity)[:, None] - q_len, 0))
        else:
            numbers = numbers & part
    return functools.reduce(operator.and_, arrays, Filled(numbers, lengths, q_len))


def _check_part(part: masks.Mask) -> None:
    if part.has_arrays and part.position_axes:
        raise errors.invalid("mask must be a rule of positions, without arrays over them, where keys are in a cache",
                             f"mask={part}", "hide keys by -inf in the bias, (batch, 1, 1, capacity)")


def _all_rows(cache: Cache, query: Shaped) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What stands for keys and values as if they were contiguous, and without scales: what the shape of a query is
    checked against.
    """
    dtype = cache.key.dtype if cache.scales is None else query.dtype
    shapes = (list(cache.key.shape), list(cache.value.shape))
    for shape in shapes:
        shape[0], shape[cache.layout.index("L")] = cache.batch, cache.capacity
    key, value = (jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes)
    return key, value


def _check_room(cache: Cache, new: int) -> None:
    """Raises ValueError where values are known and `new` keys have no place, or one in a page that is shared."""
    storage.check_lengths(cache, storage.known, lengths=cache.lengths, page_table=cache.page_table, new=new)
    if cache.pages is None or not new:
        return
    lengths, table = storage.known(cache.lengths), storage.known(cache.page_table)
    if lengths is None or table is None:
        return
    page, size = np.arange(table.shape[1]), cache.pages.size
    used = page <= (lengths[:, None] + new - 1) // size
    written = used & (page >= lengths[:, None] // size)
    shared = written & (np.bincount(table[used], minlength=cache.pages.number)[np.where(used, table, 0)] > 1)
    if shared.any():
        of, at = (int(x) for x in np.argwhere(shared)[0])
        raise errors.invalid("what is written must lie in a page of the sequence's own",
                             f"page_table[{of}, {at}]={table[of, at]}, which another place in the table has, too",
                             "share full pages only, and copy one that is to be filled further")


def _checked_rows(cache: Cache, name: str, given: object) -> jax.Array:
    """New keys or values as a JAX array, once checked."""
    x, rows = arguments.array(name, given), getattr(cache, name)
    length = cache.layout.index("L")
    wanted: list[int | str] = list(rows.shape)
    wanted[0], wanted[length] = cache.batch, "n"
    if len(x.shape) != 4 or any(size != of for i, (size, of) in enumerate(zip(x.shape, wanted)) if i != length):
        raise errors.invalid(f"{name} must have shape ({', '.join(map(str, wanted))}) ({cache.layout})",
                             f"{name}.shape={tuple(x.shape)}", "give the new tokens of every sequence of the cache")
    if quantised.is_quantised(rows.dtype):
        check_dtype(name, x)
    elif x.dtype != rows.dtype:
        raise errors.invalid(f"{name} must have the dtype of the cache", f"{name}.dtype={x.dtype}, not {rows.dtype}",
                             "cast it")
    storage.require_values(**{name: x}, cache=cache)
    found: jax.Array = storage.as_jax(x)
    return found
