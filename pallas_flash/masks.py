"""Attention masks: which (query, key) pairs attend, described once.

A mask answers questions about *positions*, and every consumer (oracle, forward, dq, dk/dv, tile skipping, FLOP
counting) asks only these:

    keep(q_pos, kv_pos)       True where the query at `q_pos` attends to the key at `kv_pos` (any broadcastable shapes);
    kv_bounds(q_lo, q_hi)     for the queries [q_lo, q_hi): which keys attend to none, some, all of them;
    q_bounds(kv_lo, kv_hi)    the same with queries and keys exchanged.

Positions are Python ints, numpy arrays or traced values, so a mask uses arithmetic, comparisons, `&`, `|` and the
functions `maximum`, `minimum`, `where` of this module; never a Python `if` on a position. Positions are never negative
and an interval is never empty; both may reach past the end of the sequence, into the padding of its last tile, so a
table is read at `minimum(pos, length - 1)`.

To write a new mask, subclass `Mask` as a frozen dataclass and define `keep`. Without bounds the mask is correct and no
tile is skipped. Wrong bounds give wrong results: `pallas_flash.check_mask` compares them with `keep`. Integer fields
are static. A field that holds an array is data: it is indexed by (batch, head) before the methods see it, so methods
are written for one sequence. `position_axes` names the axes such a field has beyond (batch, head), "q" or "kv" mostly.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors, mask_fields
from pallas_flash.arithmetic import Positions, maximum, minimum, where
from pallas_flash.arrays import Shaped
from pallas_flash.mask_fields import UNBOUNDED, ArrayField, FieldArray, as_array, is_static, limit, on_host

__all__ = [
    "And", "ArrayField", "Bounds", "Causal", "Dense", "Full", "InBounds", "Mask", "PrefixLM", "SegmentIds", "UNBOUNDED",
    "Window", "check_lengths", "checked", "maximum", "minimum", "over_batch", "where",
]

class Bounds(NamedTuple):
    """Half-open intervals of positions: outside [lo, hi) nothing attends, inside [full_lo, full_hi) everything does."""

    lo: Positions
    full_lo: Positions
    full_hi: Positions
    hi: Positions

    def __and__(self, other: "Bounds") -> "Bounds":
        return Bounds(maximum(self.lo, other.lo), maximum(self.full_lo, other.full_lo),
                      minimum(self.full_hi, other.full_hi), minimum(self.hi, other.hi))


class Mask:
    """Base class; see the module's docstring for what a mask must define."""

    position_axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    """For each array field, what its axes after (batch, head) run over: "q", "kv", or another name for an axis of any
    size; fields not named have none."""
    broadcasts: ClassVar[bool] = False
    """Whether those axes may also have size 1, which means the same value at all positions."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(
            cls, mask_fields.flatten, functools.partial(mask_fields.unflatten, cls))

    __array_ufunc__ = None  # NumPy arrays leave `array & mask` to `__rand__`

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        """True where the query at `q_pos` attends to the key at `kv_pos`; the shapes broadcast."""
        raise NotImplementedError(f"{type(self).__name__} must define keep(q_pos, kv_pos)")

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        """Bounds on the keys, seen from the queries [q_lo, q_hi), an interval that is not empty.

        The default bounds nothing: no tile is skipped, and every tile is masked.
        """
        return Bounds(0, UNBOUNDED, 0, UNBOUNDED)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        """Bounds on the queries, seen from the keys [kv_lo, kv_hi), an interval that is not empty; see `kv_bounds`."""
        return Bounds(0, UNBOUNDED, 0, UNBOUNDED)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> "Mask":
        """The mask of a part of the sequences: its query 0 and key 0 are those at `q_lo` and `kv_lo` here.

        Context parallelism and packed sequences that are aligned at their ends use it. Positions, as in `keep`, may be
        traced; for packed sequences `q_lo` is an array of the shape of `q_pos`. Pieces with equal masks share a call.

        Raises:
          UnsupportedError: the class does not define it.
        """
        raise errors.unsupported(
            f"{type(self).__name__} for a part of a sequence", ["the class does not define moved(q_lo, kv_lo)"],
            "define it: the mask whose keep(q, k) is this one's keep(q + q_lo, k + kv_lo)")

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            raise _not_a_mask("&", self, other)
        if isinstance(other, Full):
            return self
        return other if isinstance(self, Full) else And(self, other)

    def __rand__(self, other: object) -> "Mask":
        raise _not_a_mask("&", other, self)

    def __or__(self, other: object) -> NoReturn:
        raise _only_intersect("|", f"{_kind(self)} | {_kind(other)}")

    def __ror__(self, other: object) -> NoReturn:
        raise _only_intersect("|", f"{_kind(other)} | {_kind(self)}")

    def __xor__(self, other: object) -> NoReturn:
        raise _only_intersect("^", f"{_kind(self)} ^ {_kind(other)}")

    def __rxor__(self, other: object) -> NoReturn:
        raise _only_intersect("^", f"{_kind(other)} ^ {_kind(self)}")

    def __invert__(self) -> NoReturn:
        raise _only_intersect("~", f"~{_kind(self)}")

    def __str__(self) -> str:
        return self._written(type(self).__name__)

    def _written(self, name: str, **defaults: object) -> str:
        """A call that makes it: the fields that differ from the class' defaults, or from those given."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)} | defaults  # type: ignore[arg-type]
        shown = [f"{field}={x if is_static(x) else ArrayField.of(as_array(x))}"
                 for field, x in mask_fields.values(self).items() if not is_static(x) or x != defaults[field]]
        return f"{name}({', '.join(shown)})"

    @property
    def parts(self) -> "tuple[Mask, ...]":
        """The masks whose intersection this is."""
        return (self,)

    @property
    def has_arrays(self) -> bool:
        """Whether any field is an array."""
        return bool(jax.tree.leaves(self))

    def array_fields(self) -> dict[str, FieldArray]:
        """The fields that hold data, by name."""
        return {name: value for name, value in mask_fields.values(self).items()
                if not is_static(value) and not isinstance(value, Mask)}

    def canonical(self) -> "Mask":
        """This mask as kernels expect it: arrays shaped (batch or 1, heads or 1, *positions), integers as int32.

        A field with `position_axes` n may be given with n axes (shared by all), n + 1 (batch first) or n + 2 (batch,
        heads).
        """
        return dataclasses.replace(self, **{  # type: ignore[type-var]
            name: mask_fields.with_lead_axes(type(self).__name__, name, value, len(self.position_axes.get(name, ())))
            for name, value in self.array_fields().items()})

    def with_placeholders(self) -> "Mask":
        """This mask with each array replaced by its `ArrayField`: hashable, what an `AttentionSpec` holds."""
        placeholders: Mask = jax.tree.map(ArrayField.of, self)
        return placeholders


def _kind(value: object) -> str:
    return type(value).__name__


def _not_a_mask(sign: str, a: object, b: object) -> TypeError:
    return errors.mistyped(f"both sides of `{sign}` must be masks", f"types={_kind(a)} {sign} {_kind(b)}",
                           "wrap a boolean array, True attends: Causal() & Dense(array)")


def _only_intersect(sign: str, given: str) -> TypeError:
    return errors.mistyped(
        "masks can only be intersected, with `&`", f"operator={given}",
        "write another combination as a class with its own `keep`, or as the boolean array Dense(array)"
        + (", for instance Dense(a | b)" if sign == "|" else ""))


def _check_integers(mask: Mask) -> None:
    """Raises ValueError unless every field is an integer or an integer array; clips integers at `limit`."""
    for name, value in mask_fields.values(mask).items():
        dtype = as_array(value).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise errors.invalid(f"{type(mask).__name__}.{name} must be an integer or an integer array",
                                 f"{name}.dtype={dtype}" if hasattr(value, "dtype") else f"{name}={value!r}",
                                 "pass positions as integers")
        if is_static(value):
            object.__setattr__(mask, name, min(max(int(value), -limit(name)), limit(name)))


def checked(mask: object) -> Mask:
    """`mask` itself, `Full()` for None; raises ValueError for anything that is not a mask."""
    if mask is None:
        return Full()
    if not isinstance(mask, Mask):
        raise errors.invalid("mask must be a pallas_flash Mask", f"type(mask)={type(mask).__name__}",
                             "wrap a boolean array as Dense(array), or name the rule: Causal(), Window(left, right)")
    for part in mask.parts:
        kind: type[Mask] = type(part)
        mask_fields.check_class("mask", "masks", kind)
        if type(part).keep is Mask.keep:
            raise errors.invalid("a class of masks must define keep(q_pos, kv_pos)", f"mask={kind.__name__}(), without",
                                 "return True where the query at q_pos attends to the key at kv_pos")
    return mask


def _int32(x: Positions) -> jax.Array:
    """Converts to a JAX array, integers to int32, also in JAX's 64-bit mode."""
    x = jnp.asarray(x)
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x


@overload
def over_batch(mask: Mask, question: Callable[[Mask], Bounds]) -> Bounds: ...


@overload
def over_batch(mask: Mask, question: Callable[[Mask], Positions]) -> jax.Array: ...


def over_batch(mask: Mask, question: Callable[[Mask], Bounds | Positions]) -> Bounds | jax.Array:
    """Asks `question` of the mask for every (batch, head) for which its arrays differ.

    Returns what `question` returns, each array with two leading axes (batch or 1, heads or 1); the parts of an
    intersection are asked separately and their answers joined with `&`. The mask must be `canonical()`.
    """
    def answer(part: Mask) -> Bounds | jax.Array:
        answered: Bounds | jax.Array = jax.tree.map(_int32, question(part))
        return answered
    answers = [jax.vmap(jax.vmap(answer))(_with_equal_lead_axes(part)) if part.has_arrays else
               jax.tree.map(lambda leaf: leaf[None, None], answer(part)) for part in mask.parts]
    joined: Bounds | jax.Array = functools.reduce(operator.and_, answers)
    return joined


def _with_equal_lead_axes(part: Mask) -> Mask:
    """Repeats the arrays of a canonical mask so that all have the same batch and heads.

    NumPy's broadcast_shapes does not know a symbolic batch (`jax.export`).
    """
    lead = jnp.broadcast_shapes(*(leaf.shape[:2] for leaf in jax.tree.leaves(part)))
    repeated: Mask = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*lead, *leaf.shape[2:])), part)
    return repeated


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        return (q_pos >= 0) & (kv_pos >= 0)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        return Bounds(0, 0, UNBOUNDED, UNBOUNDED)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        return Bounds(0, 0, UNBOUNDED, UNBOUNDED)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> Mask:
        return self


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """q_pos + offset - left <= kv_pos <= q_pos + offset + right.

    `left` and `right` count keys besides the aligned one; `offset` is the key position aligned with query 0 (0: the
    first query with the first key; kv_len - q_len: the last with the last). Each may be a per-batch integer array.
    """

    left: Positions = UNBOUNDED
    right: Positions = UNBOUNDED
    offset: Positions = 0

    def __post_init__(self) -> None:
        if isinstance(self.left, tuple):  # it would be an array, a number for each batch entry
            raise errors.invalid("left and right of Window must be two arguments", f"left={self.left}",
                                 f"write Window{self.left}, or pass an array for numbers that differ in the batch")
        _check_integers(self)
        if is_static(self.left) and is_static(self.right) and self.right < -self.left:
            raise errors.invalid("Window needs -left <= right", f"left={self.left}, right={self.right}",
                                 "give the number of keys on each side of the aligned one, and leave out a side "
                                 "without a limit")

    def __str__(self) -> str:
        is_causal = is_static(self.left) and self.left == UNBOUNDED and is_static(self.right) and self.right == 0
        return self._written("Causal", right=0) if is_causal and type(self) is Window else super().__str__()

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        distance = kv_pos - (q_pos + self.offset)
        return (-self.left <= distance) & (distance <= self.right)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        first, last = q_lo + self.offset, q_hi - 1 + self.offset
        return Bounds(first - self.left, last - self.left, first + self.right + 1, last + self.right + 1)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        first, last = kv_lo - self.offset, kv_hi - 1 - self.offset
        return Bounds(first - self.right, last - self.right, first + self.left + 1, last + self.left + 1)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> Mask:
        return dataclasses.replace(self, offset=self.offset + q_lo - kv_lo)


def Causal(offset: Positions = 0) -> Window:
    """The query at q attends to the keys up to q + offset. `offset = kv_len - q_len` aligns the last query with the
    last key."""
    return Window(right=0, offset=offset)


@dataclasses.dataclass(frozen=True)
class InBounds(Mask):
    """Both positions lie inside the real (unpadded) sequences: q_pos < q_len and kv_pos < kv_len.

    The lengths are numbers, or integer arrays (batch,) for sequences of different lengths in one padded batch. Negative
    lengths raise where they are numbers or in a NumPy array, and count as 0 in a JAX array.
    """

    q_len: Any = UNBOUNDED
    kv_len: Any = UNBOUNDED

    def __post_init__(self) -> None:
        _check_integers(self)
        for name, lengths in mask_fields.values(self).items():
            check_lengths(f"InBounds.{name}", lengths)

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        inside: Positions = (q_pos < self.q_len) & (kv_pos < self.kv_len)
        return inside

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        return _inside(q_lo, q_hi, self.q_len, self.kv_len)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        return _inside(kv_lo, kv_hi, self.kv_len, self.q_len)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> Mask:
        return InBounds(maximum(self.q_len - q_lo, 0), maximum(self.kv_len - kv_lo, 0))


def check_lengths(name: str, lengths: object) -> None:
    """Raises ValueError for a negative length, if its value is on the host."""
    known = on_host(lengths)
    if known is not None and known.size and known.min() < 0:
        raise errors.invalid(f"{name} must be at least 0", f"{name}={known.min()}" if known.ndim == 0 else
                             f"min({name})={known.min()}", "pass the number of real positions")


def _inside(lo: Positions, hi: Positions, length: Positions, other_length: Positions) -> Bounds:
    return Bounds(0, 0, where(hi <= length, other_length, 0), where(lo < length, other_length, 0))


@dataclasses.dataclass(frozen=True)
class PrefixLM(Mask):
    """Bidirectional over the first `prefix` keys, causal after them, up to the key at q_pos + offset (see `Window`).
    Both may be integer arrays (batch,)."""

    prefix: Positions
    offset: Positions = 0

    def __post_init__(self) -> None:
        _check_integers(self)

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        return (kv_pos < self.prefix) | (kv_pos <= q_pos + self.offset)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        return Bounds(0, 0, maximum(self.prefix, q_lo + self.offset + 1), maximum(self.prefix, q_hi + self.offset))

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        lo = where(kv_lo < self.prefix, 0, kv_lo - self.offset)
        full_lo = where(kv_hi <= self.prefix, 0, kv_hi - 1 - self.offset)
        return Bounds(lo, full_lo, UNBOUNDED, UNBOUNDED)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> Mask:
        return PrefixLM(self.prefix - kv_lo, self.offset + q_lo - kv_lo)


@dataclasses.dataclass(frozen=True)
class SegmentIds(Mask):
    """Packed sequences: a query attends to the keys of its own segment; an id below 0 is padding and attends to
    nothing.

    q_ids (batch, q_len) and kv_ids (batch, kv_len) are integers, in any order. The bounds are tight where ids do not
    decrease, padding comes last and both sides hold the same segments (how packing lays them out), else only sound.
    """

    q_ids: Shaped
    kv_ids: Shaped
    position_axes: ClassVar[dict[str, tuple[str, ...]]] = {"q_ids": ("q",), "kv_ids": ("kv",)}

    def __post_init__(self) -> None:
        _check_integers(self)

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        q_id, kv_id = _at(self.q_ids, q_pos), _at(self.kv_ids, kv_pos)
        return (q_id == kv_id) & (q_id >= 0)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        return _segment_bounds(self.q_ids, q_lo, q_hi, self.kv_ids)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        return _segment_bounds(self.kv_ids, kv_lo, kv_hi, self.q_ids)


def _at(ids: Shaped, pos: Positions) -> Positions:
    """ids[pos], the last id for positions past the end: kernels ask about padded tiles too."""
    return jnp.asarray(ids)[jnp.minimum(pos, ids.shape[-1] - 1)]


def _segment_bounds(ids: Shaped, lo: Positions, hi: Positions, other_ids: Shaped) -> Bounds:
    """Bounds on the other axis for the positions [lo, hi) of this one, from the smallest and largest segment among
    them."""
    ids, other_ids = jnp.asarray(ids), jnp.asarray(other_ids)
    pos, largest = jnp.arange(ids.shape[0], dtype=jnp.int32), jnp.iinfo(ids.dtype).max
    inside = (pos >= lo) & (pos < hi)
    first_id = jnp.min(jnp.where(inside & (ids >= 0), ids, largest))
    last_id = jnp.max(jnp.where(inside, ids, -1))
    shared = (other_ids >= first_id) & (other_ids <= last_id) & (other_ids >= 0)
    other_pos = jnp.arange(other_ids.shape[0], dtype=jnp.int32)
    some_lo = jnp.min(jnp.where(shared, other_pos, other_ids.shape[0]))
    some_hi = jnp.max(jnp.where(shared, other_pos + 1, 0))
    one_segment = jnp.all(jnp.where(inside, (ids == last_id) & (ids >= 0), True)) & (hi <= ids.shape[0])
    contiguous = jnp.sum(shared, dtype=jnp.int32) == some_hi - some_lo
    return Bounds(some_lo, some_lo, jnp.where(one_segment & contiguous, some_hi, 0), some_hi)


@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """A boolean array of shape (batch or 1, heads or 1, q_len or 1, kv_len or 1): True attends.

    The array itself is O(q_len * kv_len); which tiles are empty is unknown without reading it, so none is skipped.
    """

    attend: Shaped
    position_axes: ClassVar[dict[str, tuple[str, ...]]] = {"attend": ("q", "kv")}
    broadcasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        dtype = as_array(self.attend).dtype
        if dtype != np.bool_:
            raise errors.invalid("Dense.attend must be boolean", f"attend.dtype={dtype}",
                                 "compare integers with 0; pass an additive float mask as `bias`")

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        rows, columns = self.attend.shape
        return jnp.asarray(self.attend)[jnp.minimum(q_pos, rows - 1), jnp.minimum(kv_pos, columns - 1)]


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """The intersection of two masks, also written `a & b`."""

    a: Mask
    b: Mask

    def __str__(self) -> str:
        return f"{self.a} & {self.b}"

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (*self.a.parts, *self.b.parts)

    def canonical(self) -> Self:
        return dataclasses.replace(self, a=self.a.canonical(), b=self.b.canonical())

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        return self.a.keep(q_pos, kv_pos) & self.b.keep(q_pos, kv_pos)

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        return self.a.kv_bounds(q_lo, q_hi) & self.b.kv_bounds(q_lo, q_hi)

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        return self.a.q_bounds(kv_lo, kv_hi) & self.b.q_bounds(kv_lo, kv_hi)

    def moved(self, q_lo: Positions, kv_lo: Positions) -> Mask:
        return self.a.moved(q_lo, kv_lo) & self.b.moved(q_lo, kv_lo)
