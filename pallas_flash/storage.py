"""The cache that `pallas_flash.cache` fills and reads: its arrays, what is checked of them, and empty ones."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import DTypeLike

from pallas_flash import arguments, errors, mask_fields, masks, paging, quantised
from pallas_flash.arrays import Array, Bool, Int, Shaped
from pallas_flash.spec import Layout, check_dtype

__all__ = ["Cache", "as_jax", "check_lengths", "empty", "empty_paged", "known", "require_cache", "require_values"]

type Scale = arguments.Array | float | list[float] | None
PAGE_MULTIPLE = 16
"""What the size of a page is a multiple of: kernels read so many keys at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of a batch of sequences, filled up to `lengths`; what lies past them does not matter.

    Contiguous: each sequence has its own row of the arrays. Paged: page p of a sequence, its positions from
    p * page_size on, is the page `page_table[b, p]` of the arrays. Sequences may share pages, a common prompt for
    instance; only what `append` writes must lie in a page of the sequence's own. An entry outside the pages, -1 say,
    means no page yet.

    Attributes:
      key: (batch, capacity, kv_heads, d), or (pages, page_size, kv_heads, d) with a page table, page_size a multiple of
        16; in the layout "BHLD" heads come first: (batch, kv_heads, capacity, d), (pages, kv_heads, page_size, d).
      value: the same with d_v in place of d.
      lengths: (batch,) integers, the keys that each sequence has. One above the capacity says that keys did not fit and
        are lost: see `overflowed`.
      page_table: (batch, pages of a sequence) integers; None: contiguous.
      layout: the order of the axes, also of what is appended, of queries and of results.
      key_scale, value_scale: with float8_e4m3fn key and value, what these are multiplied with: float32, positive,
        (kv_heads,), or (batch, kv_heads) of each sequence's heads, or with a page table (pages, kv_heads); an axis may
        be 1. `append` divides by them, and what is larger than 448 of them becomes that (`quantised`). Such a cache has
        no gradient, queries have. None: the numbers themselves.

    Raises:
      ValueError: wrong shapes or dtypes, or lengths, in a list or a NumPy array, that are negative or above the
        capacity.
    """

    key: Any
    value: Any
    lengths: Any
    page_table: Any = None
    layout: Layout = "BLHD"
    key_scale: Any = None
    value_scale: Any = None

    def __post_init__(self) -> None:
        _check_arrays(self)
        for name in _SCALES:
            object.__setattr__(self, name, _checked_scale(self, name))
        given = _integers(self)
        check_lengths(self, mask_fields.on_host, lengths=given["lengths"], page_table=given["page_table"])
        for name, x in (("key", self.key), ("value", self.value)):
            object.__setattr__(self, name, as_jax(x))
        for name, numbers in given.items():
            object.__setattr__(self, name, None if numbers is None else as_jax(numbers, np.int32))

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        count: int = self.lengths.shape[0]
        return count

    @property
    def pages(self) -> paging.Pages | None:
        """How many pages there are and how many positions each holds; None: the cache is contiguous."""
        if self.page_table is None:
            return None
        return paging.Pages(self.key.shape[0], self.key.shape[self.layout.index("L")])

    @property
    def capacity(self) -> int:
        """The most keys that a sequence can have, every page of its row in the table being there."""
        length: int = self.key.shape[self.layout.index("L")]
        return length if self.page_table is None else length * int(self.page_table.shape[1])

    @property
    def capacities(self) -> Int[Array, " b"]:
        """The most keys that each sequence can have: those of its pages up to the first that is missing."""
        return jnp.broadcast_to(jnp.asarray(self.room(self.page_table), jnp.int32), self.lengths.shape)

    @property
    def overflowed(self) -> Bool[Array, " b"]:
        """Which sequences have lost keys: more were appended than there is room for. `attend` gives NaN for them."""
        full: Array = self.lengths > self.capacity
        return full if self.pages is None else full | paging.lack(self.pages, self.page_table, self.lengths)

    @property
    def scales(self) -> tuple[Array, Array] | None:
        """key_scale and value_scale, if there are any."""
        return None if self.key_scale is None else (self.key_scale, self.value_scale)

    def room(self, page_table: Shaped | None) -> int | arguments.Array:
        """`capacities` under a table, in NumPy if it is; one number where they are the same for all."""
        if self.pages is None or page_table is None or isinstance(page_table, jax.ShapeDtypeStruct):
            return self.capacity
        there = (page_table >= 0) & (page_table < self.pages.number)
        return there.astype("int32").cumprod(axis=1).sum(axis=1, dtype="int32") * self.pages.size


_SCALES = ("key_scale", "value_scale")


def _flatten(cache: Cache) -> tuple[list[tuple[jax.tree_util.GetAttrKey, object]], Layout]:
    names = ("key", "value", "lengths", "page_table", *_SCALES)
    return [(jax.tree_util.GetAttrKey(name), getattr(cache, name)) for name in names], cache.layout


def _unflatten(layout: Layout, children: Iterable[object]) -> Cache:
    cache = object.__new__(Cache)  # no checks: a tree may hold anything in place of arrays
    for name, x in zip(("key", "value", "lengths", "page_table", *_SCALES, "layout"), (*children, layout), strict=True):
        object.__setattr__(cache, name, x)
    return cache


jax.tree_util.register_pytree_with_keys(Cache, _flatten, _unflatten)


def empty(batch: int, capacity: int, kv_heads: int, d: int, *, d_v: int | None = None,
          dtype: DTypeLike = jnp.bfloat16, layout: Layout = "BLHD", key_scale: Scale = None,
          value_scale: Scale = None) -> Cache:
    """A contiguous cache of lengths 0, with room for `capacity` keys of each sequence.

    Args:
      d: of a key's head; `d_v` that of a value's, None for the same.
      layout: the order of the axes (batch, length, heads, dim).
      key_scale, value_scale: with dtype float8_e4m3fn, see `Cache`.
    """
    _check_layout(layout)
    d_v = d if d_v is None else d_v
    _check_counts(batch=batch, capacity=capacity, kv_heads=kv_heads, d=d, d_v=d_v)
    shape = (batch, capacity, kv_heads) if layout == "BLHD" else (batch, kv_heads, capacity)
    key, value = (jnp.zeros((*shape, dim), dtype) for dim in (d, d_v))
    return Cache(key, value, jnp.zeros(batch, jnp.int32), None, layout, key_scale, value_scale)


def empty_paged(page_table: arguments.Ids, pages: tuple[int, int], kv_heads: int, d: int, *, d_v: int | None = None,
                dtype: DTypeLike = jnp.bfloat16, layout: Layout = "BLHD", key_scale: Scale = None,
                value_scale: Scale = None) -> Cache:
    """A paged cache of lengths 0.

    Args:
      page_table: (batch, pages of a sequence) integers, see `Cache`.
      pages: how many there are, and the positions of each.
      d, d_v, layout, key_scale, value_scale: as in `empty`.
    """
    if not isinstance(pages, tuple | list) or len(pages) != 2:
        raise errors.invalid("pages must be two numbers: how many there are, and the positions of each", f"{pages=}",
                             "pass (pages, page_size)")
    number, size = pages
    _check_counts(**{"pages[0]": number, "pages[1]": size})
    return dataclasses.replace(
        empty(number, size, kv_heads, d, d_v=d_v, dtype=dtype, layout=layout, key_scale=key_scale,
              value_scale=value_scale),
        lengths=jnp.zeros(len(page_table), jnp.int32), page_table=page_table)


def require_cache(cache: object) -> Cache:
    """Returns `cache` if it is one, else raises ValueError."""
    if not isinstance(cache, Cache):
        raise errors.invalid("cache must be a pallas_flash.cache.Cache", f"type(cache)={type(cache).__name__}",
                             "make one with cache.empty, cache.empty_paged or Cache(key, value, lengths)")
    return cache


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not export.is_symbolic_dim(count):
            errors.require_count(name, count, 0, "pass a number: arrays get the shape that it says")


def _check_layout(layout: object) -> None:
    if layout not in get_args(Layout):
        raise errors.invalid(f"layout must be one of {get_args(Layout)}", f"{layout=}", "name the order of the axes")


def _check_arrays(cache: Cache) -> None:
    _check_layout(cache.layout)
    for name, given in (("key", cache.key), ("value", cache.value)):
        x = arguments.array(name, given)
        if len(x.shape) != 4:
            raise errors.invalid(f"{name} of a cache must have 4 axes ({cache.layout})", f"{name}.shape={x.shape}",
                                 "begin with the batch, or with the pages")
        if not quantised.is_quantised(x.dtype):
            check_dtype(name, x)
    key, value = cache.key, cache.value
    if key.dtype != value.dtype or key.shape[:3] != value.shape[:3]:
        raise errors.invalid("key and value of a cache must be alike but for the last axis",
                             f"key: {key.dtype}{tuple(key.shape)}, value: {value.dtype}{tuple(value.shape)}",
                             "make both alike")
    size = key.shape[cache.layout.index("L")]
    if cache.page_table is not None and (not key.shape[0] or not size or size % PAGE_MULTIPLE):
        raise errors.invalid(f"pages must be at least one, of a multiple of {PAGE_MULTIPLE} positions",
                             f"{key.shape[0]} pages of {size} positions", "choose another page size")


def _checked_scale(cache: Cache, name: str) -> Any:
    """A scale as (rows of the arrays or 1, kv_heads or 1) float32; None for a cache without."""
    given, key = getattr(cache, name), cache.key
    if (given is not None) != quantised.is_quantised(key.dtype):
        raise errors.invalid(f"{name} goes with key and value of float8_e4m3fn, and only with these",
                             f"{name}={'None' if given is None else 'given'}, key.dtype={key.dtype}",
                             "give both scales, ones for instance, or keep numbers of 16 bits")
    if given is None:
        return None
    x = arguments.array(name, np.asarray(given, np.float32) if isinstance(given, list | tuple | float | int) else given)
    shape, wanted = tuple(x.shape), (key.shape[0], key.shape[cache.layout.index("H")])
    shape = (1,) * (2 - len(shape)) + shape
    if len(shape) != 2 or any(size not in (1, full) for size, full in zip(shape, wanted)) or x.dtype != np.float32:
        raise errors.invalid(f"{name} must be float32 of shape {wanted}, (sequences or pages, kv_heads), each may be 1",
                             f"{name}: {x.dtype}{tuple(x.shape)}", "give one number for each head, say")
    values = known(x)
    if values is not None and not (np.isfinite(values) & (values > 0)).all():
        raise errors.invalid(f"{name} must be positive and finite", f"min({name})={values.min()}",
                             "divide the largest numbers of each head by 448, or take 1 where there are none")
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return as_jax(x).reshape(shape)


def _integers(cache: Cache) -> dict[str, Shaped | None]:
    """lengths and page_table, checked, as they were given."""
    lengths = arguments.listed("lengths", cache.lengths)
    table = cache.page_table
    if table is not None:
        table = arguments.integers("page_table", arguments.listed("page_table", table))
        if len(table.shape) != 2:
            raise errors.invalid("page_table must have shape (batch, pages of a sequence)",
                                 f"page_table.shape={tuple(table.shape)}", "give each sequence a row")
    batch = cache.key.shape[0] if table is None else table.shape[0]
    if tuple(lengths.shape) != (batch,):
        do = "give the number of keys of each sequence"
        if len(lengths.shape) > 1 and lengths.shape[-1] > 1:
            do += "; an array that marks them is a mask: (x != 0).sum(1) counts them, where they come first"
        raise errors.invalid(f"lengths must have shape (batch,) = ({batch},)", f"lengths.shape={tuple(lengths.shape)}",
                             do)
    return dict(lengths=arguments.integers("lengths", lengths), page_table=table)


def known(x: object) -> np.ndarray | None:
    """The values of an array that this process has; None under a trace."""
    has_values = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    return np.asarray(x) if has_values else mask_fields.on_host(x)


def check_lengths(cache: Cache, read: Callable[[object], np.ndarray | None], *, lengths: object, page_table: object,
                  new: int = 0) -> None:
    """Raises ValueError where `read` gives the values of the lengths and the table of a cache, and a length is negative
    or, with `new` keys more, above the capacity.
    """
    values, table = read(lengths), None if page_table is None else read(page_table)
    if values is None or (table is None and page_table is not None):
        return
    masks.check_lengths("lengths", values)
    room = np.broadcast_to(cache.room(table), values.shape)
    lost = np.flatnonzero(values + np.int64(new) > room)
    if lost.size:
        of = int(lost[0])
        raise errors.invalid(
            "the keys of each sequence must fit into the cache",
            f"lengths[{of}]={values[of]}{f' and {new} more' if new else ''}, room for {room[of]}",
            "make a cache of a larger capacity, or give the sequence more pages")


def require_values(**given: object) -> None:
    """Raises ValueError where an argument, by name, holds shapes alone."""
    for name, x in given.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct | masks.ArrayField) for leaf in jax.tree.leaves(x)):
            raise errors.invalid(f"{name} must hold values to compute with", f"{name} of shapes alone",
                                 "ask explain() about shapes, or trace with jax.eval_shape or jax.jit(...).lower")


def as_jax(x: Shaped, dtype: DTypeLike | None = None) -> Any:
    """A JAX array of `x`; what stands for one stands for it still."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x if dtype is None else jax.ShapeDtypeStruct(x.shape, dtype)
    return x if isinstance(x, jax.Array) and dtype in (None, x.dtype) else jnp.asarray(x, dtype)
