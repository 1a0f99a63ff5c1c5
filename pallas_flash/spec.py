"""`AttentionSpec`: an attention problem, validated and hashable; `Operands`, `Results` and `Gradients`: its arrays.

A spec says everything about *what* is computed and nothing about how fast. It is valid by construction:
`AttentionSpec.of` is the only way to make one, so nothing below this file checks shapes again.

The arrays of a problem have names and no defaults: where one is forgotten, a type checker says so. One more array with
a gradient is a field of `Differentiable`, `Operands` and `Gradients`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeGuard, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors, masks, scores, softmax
from pallas_flash.arrays import Array, Float, Int, Shaped
from pallas_flash.masks import ArrayField
from pallas_flash.paging import Pages

__all__ = ["AttentionSpec", "Differentiable", "Gradients", "Layout", "Operands", "Others", "Results",
           "check_dropout_rate", "check_dtype"]

Layout = Literal["BLHD", "BHLD"]
"""Order of the axes (batch, length, heads, dim) of query, key, value and out."""

DTYPES = ("bfloat16", "float16", "float32", "float64")
ANCHOR_ROWS = 128
"""Rows of a bias that are looked at together, so that memory stays O(length)."""
MAX_LEN = masks.UNBOUNDED // 2
LARGEST_NUMBER = 1e30
"""Of scale and softcap: their products with scores, and the inverse of a soft cap, are then normal float32 numbers."""


class Gradients[T](NamedTuple):
    """Cotangents of the differentiable operands, each in the shape of its operand and in
    `AttentionSpec.gradient_dtype`; or one T for each.
    """

    dq: T
    dk: T
    dv: T
    dbias: T | None
    dscore: tuple[T, ...]
    dsinks: T | None = None  # of `Operands.sinks`, from a backward that has it; `autodiff` computes it for the others

    def as_operands(self) -> "Differentiable[T]":
        """The same in the structure of what they are cotangents of, as JAX wants them; but that of sinks."""
        return Differentiable(q=self.dq, k=self.dk, v=self.dv, bias=self.dbias, score=self.dscore)


class Differentiable[T](NamedTuple):
    """The operands that have a gradient; or one T for each."""

    q: T
    k: T
    v: T
    bias: T | None
    score: tuple[T, ...]  # the floating-point arrays of the score function, in the order of its fields

    def gradients[R](self, function: Callable[[T], R]) -> Gradients[R]:
        """function(x) in the place of the gradient of each operand x that there is."""
        return Gradients(dq=function(self.q), dk=function(self.k), dv=function(self.v),
                         dbias=None if self.bias is None else function(self.bias),
                         dscore=tuple(map(function, self.score)))


class Operands(NamedTuple):
    """The arrays of one call, in the layout of the spec; what a spec holds placeholders for."""

    q: Float[Array, "b t h d"]
    k: Float[Array, "b s k d"]
    v: Float[Array, "b s k v"]
    bias: Float[Array, "1|b 1|h 1|t 1|s"] | None
    score: tuple[Array, ...]  # the floating-point arrays of the score function, in the order of its fields
    mask: masks.Mask  # canonical: array fields have leading axes (1|b 1|h)
    score_integers: tuple[Array, ...]  # its other arrays
    dropout_seed: Int[Array, "2"] | None  # uint32
    dropout_origin: Int[Array, "4"] | None  # int32: (batch, head, query, key) of the first pair; if `dropout_moved`
    page_table: Int[Array, "b p"] | None  # int32; with `AttentionSpec.pages`, where k and v are pages (see paging.py)
    cache_scales: tuple[Array, Array] | None = None  # of k and v (`AttentionSpec.cache_scales`); float32
    sinks: Float[Array, "1|b h 1 1"] | None = None  # of a forward that takes them (`AttentionSpec.sinks`); float32

    @property
    def differentiable(self) -> Differentiable[Array]:
        """Those that have a gradient."""
        return Differentiable(q=self.q, k=self.k, v=self.v, bias=self.bias, score=self.score)

    @property
    def others(self) -> "Others":
        """Those that have none."""
        return Others(mask=self.mask, score_integers=self.score_integers, dropout_seed=self.dropout_seed,
                      dropout_origin=self.dropout_origin, page_table=self.page_table, cache_scales=self.cache_scales)

    @classmethod
    def of(cls, differentiable: Differentiable[Array], others: "Others") -> "Operands":
        """The operands again from the two parts."""
        q, k, v, bias, score = differentiable
        return cls(q=q, k=k, v=v, bias=bias, score=score, **others._asdict())


class Others(NamedTuple):
    """The operands without a gradient."""

    mask: masks.Mask
    score_integers: tuple[Array, ...]
    dropout_seed: Int[Array, "2"] | None
    dropout_origin: Int[Array, "4"] | None
    page_table: Int[Array, "b p"] | None
    cache_scales: tuple[Array, Array] | None = None


class Results[T](NamedTuple):
    """What a forward computes, or the cotangents of it; or one T for each.

    Attributes:
      out: (b t h v), in the spec's layout and `AttentionSpec.result_dtype`.
      stats: (b h 2 t), of each row lse and its rest (`softmax.statistics`), in `AttentionSpec.acc_dtype`.
    """

    out: T
    stats: T


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """out = dropout(softmax(score(softcap(scale * q k^T)) + bias, where mask keeps)) v, for arrays of given shapes.

    softcap(s) = softcap * tanh(s / softcap). Make one with `AttentionSpec.of`.

    Attributes:
      score: the score function, with placeholders for its arrays; None: there is none.
      dropout_moved: if not 0, the problem is a part of a larger one, and drops what that drops there. The first query
        and key of the part (`Operands.dropout_origin`) are then at multiples of so many positions.
      partial: the results are terms of sums over several calls (of the keys of several devices, say), and are not
        rounded: out and all gradients are returned in `acc_dtype`. The backward takes the cotangent of out in `dtype`,
        and no out: the cotangent of lse has -delta in it (`autodiff.without_out`).
      pages: keys and values lie in so many pages, (pages, page_size, heads, dim) or heads before page_size, and
        `Operands.page_table` (batch, kv_len / page_size) says in which; None: they lie one after the other.
      sinks: the shape of `Operands.sinks`, that take part in the softmax, where the forward computes that itself
        (`dispatch.Implementation.takes_sinks`); None: there are none, or `autodiff` adds them to the results.
      cache_scales: k and v are float8_e4m3fn numbers (`quantised`), to be multiplied with `Operands.cache_scales` of
        these shapes, each (batch, or pages, or 1; kv_heads or 1); `dtype` is that of q. They have no gradient. None: k
        and v are in `dtype`.
    """

    layout: Layout
    dtype: np.dtype
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d: int
    d_v: int
    mask: masks.Mask
    bias: ArrayField | None
    score: scores.Score | None
    softcap: float | None
    scale: float
    dropout_rate: float
    dropout_moved: int
    return_lse: bool
    deterministic: bool
    partial: bool
    pages: Pages | None
    sinks: ArrayField | None = None
    cache_scales: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @classmethod
    def of(cls, q: Shaped, k: Shaped, v: Shaped, *, layout: Layout = "BLHD", mask: masks.Mask | None = None,
           bias: Shaped | None = None, softcap: float | None = None, scale: float | None = None,
           dropout_rate: float = 0.0, dropout_moved: int = 0, return_lse: bool = False,
           deterministic: bool = False, partial: bool = False,
           score: scores.Score | scores.Function | None = None) -> "AttentionSpec":
        """The spec of a call, from arrays or anything with a shape and a dtype.

        Args:
          q: (batch, q_len, q_heads, d) if layout is "BLHD", (batch, q_heads, q_len, d) if "BHLD".
          k: (batch, kv_len, kv_heads, d), or heads before length; kv_heads divides q_heads.
          v: (batch, kv_len, kv_heads, d_v), or heads before length.
          mask: which pairs attend; None for all.
          bias: added to the scaled scores, (batch or 1, q_heads or 1, q_len or 1, kv_len or 1).
          softcap, scale, dropout_rate: Python numbers; scale None means 1 / sqrt(d).
          dropout_moved: see the attribute.
          return_lse, deterministic, partial: Python booleans.
          score: what becomes of scores before the bias: a `Score`, or a plain function.

        Raises:
          ValueError: naming the array, what must hold, what was given and what to do.
        """
        _check_arrays(q, k, v, layout)
        (batch, q_len, q_heads, d), (_, kv_len, kv_heads, _), d_v = _blhd(q, layout), _blhd(k, layout), v.shape[-1]
        _check_shapes(_blhd(q, layout), _blhd(k, layout), _blhd(v, layout), layout)
        _check_numbers(softcap, scale, dropout_rate)
        errors.require_bool("return_lse", return_lse)
        errors.require_bool("deterministic", deterministic)
        errors.require_bool("partial", partial)
        spec = cls(
            layout=layout, dtype=np.dtype(q.dtype), batch=batch, q_heads=q_heads, kv_heads=kv_heads, q_len=q_len,
            kv_len=kv_len, d=d, d_v=d_v, mask=masks.Full(), bias=None, score=None,
            softcap=None if softcap is None else float(softcap),
            scale=float(scale) if scale is not None else 1 / math.sqrt(d) if d else 1.0,
            dropout_rate=float(dropout_rate), dropout_moved=int(dropout_moved), return_lse=bool(return_lse),
            deterministic=bool(deterministic), partial=bool(partial), pages=None)
        spec = spec if mask is None and bias is None else spec.masked(masks.checked(mask).canonical(), bias)
        return spec.scored(scores.checked(score))

    def masked(self, mask: masks.Mask, bias: Shaped | None) -> "AttentionSpec":
        """This spec with a canonical mask and a bias; raises as `of` does."""
        _check_mask_arrays(mask, self.batch, self.q_heads, {"q": self.q_len, "kv": self.kv_len})
        if bias is not None:
            _check_bias(bias, (self.batch, self.q_heads, self.q_len, self.kv_len))
        return dataclasses.replace(self, mask=mask.with_placeholders(),
                                   bias=None if bias is None else ArrayField.of(bias))

    def scored(self, score: scores.Score | None) -> "AttentionSpec":
        """This spec with a score function that is `scores.checked`; raises as `of` does."""
        if score is None:
            return self
        for x in scores.floats(score):
            check_dtype(f"an array of the score function {score}", x)
        score.require_sizes(self.batch, self.q_heads)
        score = score.with_placeholders()
        scores.check_result(score, self.acc_dtype)
        return dataclasses.replace(self, score=score)

    def score_function(self, operands: Operands) -> scores.Score | None:
        """The score function with its arrays, those of floating-point numbers in `acc_dtype`."""
        if self.score is None:
            return None
        return self.score.filled([x.astype(self.acc_dtype) for x in operands.score], operands.score_integers)

    def paged(self, pages: Pages | None) -> "AttentionSpec":
        """This spec with keys and values in pages, whose size divides kv_len."""
        return dataclasses.replace(self, pages=pages)

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.q_heads // self.kv_heads if self.kv_heads else 1

    @property
    def acc_dtype(self) -> np.dtype:
        """What scores, softmax and sums are computed in."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    @property
    def result_dtype(self) -> np.dtype:
        """The dtype of out."""
        return self.gradient_dtype(self.dtype)

    def gradient_dtype(self, operand: np.dtype) -> np.dtype:
        """The dtype of the gradient of an operand of a dtype."""
        return self.acc_dtype if self.partial else operand

    @property
    def is_empty(self) -> bool:
        """True if there is no output element or no key: the result is known without a kernel."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.kv_heads, self.kv_len)

    def shape(self, length: int, heads: int, dim: int) -> tuple[int, int, int, int]:
        """The shape of an array of this problem, in its layout."""
        return (self.batch, length, heads, dim) if self.layout == "BLHD" else (self.batch, heads, length, dim)

    @property
    def is_anchored(self) -> bool:
        """Whether an anchor is taken from scores behind the bias. Not from those of a bias of pairs in 16 bits: making
        it reads all of the bias once more, and where a score is so large that lse does not hold its sum, it is the bias
        to the bit, of which 16 bits leave room for the rest (`softmax.statistics`).
        """
        return self.bias is not None and not (self.bias.shape[2] > 1 and self.bias.dtype.itemsize == 2)

    def anchor(self, operands: Operands, at_once: int = ANCHOR_ROWS) -> Float[Array, "1|b 1|h 1|t 1"]:
        """What is taken from scores behind the bias: `largest_bias`, or 0 if the spec `is_anchored` not."""
        assert operands.bias is not None
        if not self.is_anchored:
            return jnp.zeros((1, 1, 1, 1), operands.bias.dtype)
        return self.largest_bias(operands, at_once)

    def largest_bias(self, operands: Operands, at_once: int = ANCHOR_ROWS) -> Float[Array, "1|b 1|h 1|t 1"]:
        """`softmax.anchor` of the bias where the mask keeps it, which is made for so many rows at once."""
        assert operands.bias is not None
        bias: Array = jax.lax.stop_gradient(operands.bias)
        if isinstance(self.mask, masks.Full):
            return softmax.anchor(bias)
        kv_pos, count = jnp.arange(self.kv_len, dtype=jnp.int32)[None, :], min(at_once, self.q_len)

        def rows(first: Int[Array, ""]) -> Array:
            q_pos = jnp.minimum(first + jnp.arange(count, dtype=jnp.int32), self.q_len - 1)
            keep = masks.over_batch(operands.mask, lambda part: part.keep(q_pos[:, None], kv_pos))
            part = bias if bias.shape[2] == 1 or count == self.q_len else jnp.take(bias, q_pos, axis=2)
            return softmax.anchor(jnp.where(keep, part, jnp.full_like(part, -jnp.inf)))[..., 0]

        if count == self.q_len:
            return rows(jnp.int32(0))[..., None]
        found = jax.lax.map(rows, jnp.arange(0, self.q_len, count, dtype=jnp.int32))
        return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1)[..., :self.q_len, None]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of `out`: like q, with d_v in place of d."""
        return self.shape(self.q_len, self.q_heads, self.d_v)

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        """The shape of `lse`, whatever the layout."""
        return self.batch, self.q_heads, self.q_len

    @property
    def operand_shapes(self) -> Differentiable[tuple[int, ...]]:
        """The shapes of the operands that have a gradient."""
        k_shape = self.shape(self.kv_len, self.kv_heads, self.d)
        if self.pages is not None:
            in_pages = dataclasses.replace(self, batch=self.pages.number)
            k_shape = in_pages.shape(self.pages.size, self.kv_heads, self.d)
        return Differentiable(q=self.shape(self.q_len, self.q_heads, self.d), k=k_shape, v=(*k_shape[:3], self.d_v),
                              bias=None if self.bias is None else self.bias.shape,
                              score=tuple(x.shape for x in scores.floats(self.score)))

    @property
    def page_table_shape(self) -> tuple[int, int] | None:
        """The shape of `Operands.page_table`, if keys and values are in pages."""
        return None if self.pages is None else (self.batch, self.kv_len // self.pages.size)

    @property
    def stats_shape(self) -> tuple[int, int, int, int]:
        """The shape of what the forward keeps of each row for the backward: lse and its rest (`softmax.statistics`)."""
        return self.batch, self.q_heads, 2, self.q_len

    def __str__(self) -> str:
        shape = f"batch={self.batch}, heads={self.q_heads}:{self.kv_heads}, len={self.q_len}x{self.kv_len}"
        dim = f"d={self.d}" if self.d == self.d_v else f"d={self.d}, d_v={self.d_v}"
        extras = [f"bias={'x'.join(map(str, self.bias.shape))}" if self.bias else "",
                  f"score={self.score}" if self.score is not None else "",
                  f"softcap={self.softcap:g}" if self.softcap is not None else "",
                  f"dropout_rate={self.dropout_rate:g}" if self.dropout_rate else "",
                  "deterministic" if self.deterministic else "", "partial" if self.partial else "",
                  f"pages={self.pages}" if self.pages is not None else "",
                  "cache=float8_e4m3fn" if self.cache_scales is not None else ""]
        return ", ".join([f"AttentionSpec({self.layout} {self.dtype.name}", shape, dim, f"mask={self.mask}",
                          *filter(None, extras)]) + ")"


def _blhd(array: Shaped, layout: Layout) -> tuple[int, int, int, int]:
    batch, a, b, dim = array.shape
    return (batch, a, b, dim) if layout == "BLHD" else (batch, b, a, dim)


def _check_arrays(q: Shaped, k: Shaped, v: Shaped, layout: str) -> None:
    if layout not in get_args(Layout):
        raise errors.invalid(f"layout must be one of {get_args(Layout)}", f"{layout=}", "name the order of the axes")
    for name, array in (("query", q), ("key", k), ("value", v)):
        if len(array.shape) != 4:
            raise errors.invalid(f"{name} must have 4 axes ({layout})", f"{name}.shape={tuple(array.shape)}",
                                 "add or merge axes; leading batch axes are merged into one")
        if not all(isinstance(size, int) for size in array.shape[1:]):
            raise errors.invalid(f"{name} must have numbers for all axes but the batch",
                                 f"{name}.shape={tuple(array.shape)}", "export one program for each length")
        check_dtype(name, array)
        if array.dtype != q.dtype:
            raise errors.invalid(f"query and {name} must have the same dtype",
                                 f"query.dtype={q.dtype.name}, {name}.dtype={array.dtype.name}", "cast one of them")


def check_dtype(name: str, array: Shaped) -> None:
    """Raises ValueError unless the dtype of an array of numbers is one of `DTYPES`."""
    dtype = array.dtype.name
    if dtype not in DTYPES:
        advice = "cast it"
        if "float8" in dtype and name in ("query", "key", "value"):
            advice = "cast it to bfloat16 and multiply its scale into `scale`"
        elif dtype == "bool" and name == "bias":
            advice = "pass a boolean array as a mask: Dense(array)"
        raise errors.invalid(f"{name} must have one of the dtypes {', '.join(DTYPES)}", f"{name}.dtype={dtype}", advice)
    if not array.dtype.isnative:
        raise errors.invalid(f"{name} must have the byte order of this machine", f"{name}.dtype={array.dtype.str}",
                             f'convert it: {name}.astype({name}.dtype.newbyteorder("="))')
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise errors.invalid(f"{name} can be float64 only in JAX's 64-bit mode",
                             f"{name}.dtype=float64 with jax_enable_x64=False",
                             'call jax.config.update("jax_enable_x64", True) first, or cast to float32')


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], layout: str) -> None:
    """Shapes as (batch, length, heads, dim)."""
    def show(**shapes: tuple[int, ...]) -> str:
        order = (0, 1, 2, 3) if layout == "BLHD" else (0, 2, 1, 3)
        given = (f"{name}.shape={tuple(shape[i] for i in order)}" for name, shape in shapes.items())
        return f"{', '.join(given)} ({layout})"
    rules = (
        (q[0] == k[0], "query and key must have the same batch size", dict(query=q, key=k), "broadcast one"),
        (q[0] == v[0], "query and value must have the same batch size", dict(query=q, value=v), "broadcast one"),
        (k[1] == v[1], "key and value must have the same length", dict(key=k, value=v), "pad or cut one of them"),
        (k[2] == v[2], "key and value must have the same number of heads", dict(key=k, value=v), "repeat one"),
        (q[3] == k[3], "query and key must have the same head dimension", dict(query=q, key=k), "project one"),
        (q[2] == 0 == k[2] or (k[2] and q[2] % k[2] == 0), "the heads of key must divide the heads of query",
         dict(query=q, key=k), "repeat or drop key heads"),
        (max(q[1], k[1]) <= MAX_LEN, f"lengths must be at most {MAX_LEN}", dict(query=q, key=k), "split the sequence"),
    )
    for holds, must, shapes, do in rules:
        if not holds:
            raise errors.invalid(must, show(**shapes), do)


def _is_number(x: object, smallest: float = -LARGEST_NUMBER) -> TypeGuard[float]:
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        return False
    # One of NumPy's would round the bounds to its own type, and warn of it.
    x = float(x) if isinstance(x, np.floating) else x
    return bool(x <= LARGEST_NUMBER and not x < smallest)


def check_dropout_rate(rate: object) -> None:
    """Raises ValueError unless it is a probability, a Python number or one of NumPy's."""
    if not (_is_number(rate) and 0 <= rate <= 1):
        raise errors.invalid("dropout_rate must be a Python number in [0, 1]", f"dropout_rate={rate!r}",
                             "pass the probability of dropping an entry")


def _check_numbers(softcap: float | None, scale: float | None, dropout_rate: float) -> None:
    rules = (
        (scale is None or _is_number(scale),
         f"scale must be a Python number from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}, or None", f"{scale=}",
         "for a traced scale, multiply the query with it and pass scale=1.0"),
        (softcap is None or _is_number(softcap, 1 / LARGEST_NUMBER),
         f"softcap must be a Python number from {1 / LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}, or None", f"{softcap=}",
         "pass None for no cap"),
    )
    for holds, must, given, do in rules:
        if not holds:
            raise errors.invalid(must, given, do)
    check_dropout_rate(dropout_rate)


def _check_mask_arrays(mask: masks.Mask, batch: int, heads: int, lengths: dict[str, int]) -> None:
    for part in mask.parts:
        for name, array in part.array_fields().items():
            label = f"{type(part).__name__}.{name}"
            axes = part.position_axes.get(name, ())
            wanted = dict(batch=batch, q_heads=heads) | {
                f"{axis}_len": lengths.get(axis, size) for axis, size in zip(axes, array.shape[2:])}
            allowed = [{size} if axis in ("q_len", "kv_len") and not part.broadcasts else {1, size}
                       for axis, size in wanted.items()]
            if any(size not in sizes for size, sizes in zip(array.shape, allowed, strict=True)):
                shape = ", ".join(f"{axis}={' or '.join(map(str, sorted(sizes, reverse=True)))}"
                                  for axis, sizes in zip(wanted, allowed))
                raise errors.invalid(f"{label} must have shape ({shape})", f"{label}.shape={tuple(array.shape)}",
                                     "make it match query and key; if one of batch and heads is left out, it is heads")
            if np.dtype(array.dtype).kind not in "iub":
                raise errors.invalid(f"{label} must be boolean or integer", f"{label}.dtype={array.dtype}",
                                     "pass an additive float mask as `bias`")


def _check_bias(bias: Shaped, wanted: tuple[int, ...]) -> None:
    if len(bias.shape) != 4 or any(size not in (1, full) for size, full in zip(bias.shape, wanted, strict=True)):
        raise errors.invalid(f"bias must have shape {wanted} (batch, q_heads, q_len, kv_len; each may be 1)",
                             f"bias.shape={tuple(bias.shape)}", "reshape it so that it broadcasts")
    check_dtype("bias", bias)
