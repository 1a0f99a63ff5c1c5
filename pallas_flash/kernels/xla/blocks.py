"""What the XLA forward and backward share: operands cut into tiles, the scores of a tile, products through which
masked NaN does not leak.

Heads are split into (kv_heads, group), so that GQA needs no repeated keys. Subscripts: b batch, k key head, g query
head of the group, q and s positions of query and key, d and v dims. Statistics and scores are always "bkgq" and
"bkgqs".
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import dropout, masks, paging, quantised, scores, softmax, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array, Bool, Float, Int
from pallas_flash.filled import filled_part
from pallas_flash.kernels.xla import ids
from pallas_flash.kernels.xla.schedule import Schedule
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["Problem", "Tile", "expanded_score", "is_cached", "masked_product", "prepare"]


class Tile(NamedTuple):
    """Scores of one tile and what its gradient needs."""

    s: Float[Array, "b k g q s"]  # scores in `Problem.unit`, -inf where a pair does not attend
    keep: Bool[Array, "1|b 1|k 1|g q s"] | None  # None: every pair of the tile attends
    dropped: Float[Array, "b k g q s"] | None  # what each weight is multiplied with; None without dropout
    slope: Float[Array, "b k g q s"] | float  # derivative of the score function and the soft cap
    before: Float[Array, "b k g q s"] | None  # what the score function is given; None without one


@dataclasses.dataclass(frozen=True)
class Problem:
    """A spec and its operands, padded to whole tiles, heads split, with the mask that also cuts off the padding.

    Attributes:
      keys_in_place: keys are a cache, which is neither padded nor copied.
    """

    spec: AttentionSpec
    schedule: Schedule
    q: Float[Array, "b q k g d"]  # in the layout "BLHD", as all of these
    k: Float[Array, "b s k d"]
    v: Float[Array, "b s k v"]
    bias: Float[Array, "1|b 1|h 1|q 1|s"] | None
    anchor: Float[Array, "1|b 1|h 1|q 1"] | None  # there is one where there is a bias
    score: scores.Score | None  # with arrays in `acc_dtype`
    mask: masks.Mask
    dropout_seed: Int[Array, "2"] | None
    dropout_origin: Int[Array, "4"] | None
    page_table: Int[Array, "b p"] | None
    scales: tuple[Array, Array] | None
    keys_in_place: bool

    @property
    def unit(self) -> float:
        """The unit of a tile's scores; a bias, and what a score function returns, have the unit 1."""
        return self.product_unit if self.bias is None and self.score is None else 1.0

    @property
    def product_unit(self) -> float:
        """The unit of scores before a score function and a bias."""
        return softmax.unit(self.spec.scale, self.spec.softcap)

    @property
    def q_subscripts(self) -> str:
        return "bqkgd" if self.spec.layout == "BLHD" else "bkgqd"

    @property
    def k_subscripts(self) -> str:
        return "bskd" if self.spec.layout == "BLHD" else "bksd"

    @property
    def q_axis(self) -> int:
        """The length axis of q, dout and out once their heads are split."""
        return self.q_subscripts.index("q")

    @property
    def kv_axis(self) -> int:
        return self.k_subscripts.index("s")

    @property
    def num_q_tiles(self) -> int:
        return tiles.cdiv(self.spec.q_len, self.schedule.block_q)

    @property
    def num_kv_tiles(self) -> int:
        return tiles.cdiv(self.spec.kv_len, self.schedule.block_kv)

    def q_tile(self, array: Array, tile: Array) -> Array:
        """One tile of q, out or dout."""
        return slice_tile(array, tile, self.schedule.block_q, self.q_axis)

    def k_tile(self, tile: Array) -> Array:
        """One tile of k, without its scales."""
        return self._without_scales(self._kv_tile(self.k, tile), tile, 0)

    def v_tile(self, tile: Array) -> Array:
        """One tile of v, without its scales."""
        return self._without_scales(self._kv_tile(self.v, tile), tile, 1)

    def _without_scales(self, rows: Array, tile: Array, which: int) -> Array:
        """What is stored with scales times these, in `acc_dtype`: a product of it is one of wide numbers."""
        if self.scales is None:
            return rows
        size, pos = 0 if self.spec.pages is None else self.spec.pages.size, self._kv_positions(tile)[None]
        if self.page_table is not None:  # a last tile may go past the table
            pos = jnp.minimum(pos, self.spec.kv_len - 1)
        scales = quantised.paged_scales(self.scales[which], self.page_table, pos, size)
        return quantised.dequantised(rows, scales, self.kv_axis, self.spec.acc_dtype)

    def _kv_tile(self, array: Array, tile: Array) -> Array:
        if self.page_table is not None:
            return paging.rows(array, self.page_table, self._kv_positions(tile), self.kv_axis)
        if self.keys_in_place and self.spec.layout == "BLHD":
            # XLA wants what it multiplies heads first: of a slice it would copy the whole cache into that layout.
            return jnp.take(array, self._kv_positions(tile), axis=self.kv_axis, mode="clip")
        return slice_tile(array, tile, self.schedule.block_kv, self.kv_axis)

    @property
    def masks_all_tiles(self) -> bool:
        """Whether a pair may be hidden in any tile, whatever the mask says: by -inf in a bias, or from a function."""
        return self.bias is not None or self.score is not None

    def needed(self, found: tiles.TileRange[Positions]) -> tiles.TileRange[Positions]:
        """The tiles that a mask needs, in as few loops as their steps allow (`tiles.sweep`)."""
        return tiles.all_partial(found) if self.masks_all_tiles else found

    @property
    def reaches_back(self) -> bool:
        """Whether the last tile, which the keys do not fill, begins with keys of the one before."""
        return self.keys_in_place and self.spec.kv_len % self.schedule.block_kv != 0

    def einsum(self, subscripts: str, a: Array, b: Array) -> Array:
        """A product accumulated in the spec's accumulation type; fp32 is never rounded to tf32 or bf16.

        XLA:GPU may compute sums of a few terms in a loop that rounds each term to the type of the operands, so those
        are widened: they are too few for a tensor core.
        """
        is_wide = max(a.dtype.itemsize, b.dtype.itemsize) > 2 or _terms(subscripts, a) <= _FEW_TERMS
        if is_wide:
            a, b = a.astype(self.spec.acc_dtype), b.astype(self.spec.acc_dtype)
        precision = jax.lax.Precision.HIGHEST if is_wide else None
        return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=self.spec.acc_dtype)

    def split_heads(self, x: Array) -> Array:
        """(b or 1, h or 1, ...) -> (b or 1, k or 1, g or 1, ...)."""
        heads = (1, 1) if x.shape[1] == 1 else (self.spec.kv_heads, self.spec.group)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    def join_heads(self, x: Array) -> Array:
        """Undoes `split_heads`."""
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])

    def positions(self, q_tile: Array, kv_tile: Array) -> tuple[Array, Array]:
        """Positions of a tile's queries (q, 1) and keys (1, s)."""
        rows = q_tile * self.schedule.block_q + jnp.arange(self.schedule.block_q, dtype=jnp.int32)
        return rows[:, None], self._kv_positions(kv_tile)[None, :]

    def _kv_positions(self, kv_tile: Array) -> Array:
        start = kv_tile * self.schedule.block_kv
        if self.reaches_back:  # where a slice that would end past the end begins
            start = jnp.minimum(start, self.spec.kv_len - self.schedule.block_kv)
        return start + jnp.arange(self.schedule.block_kv, dtype=jnp.int32)

    def tile_of(self, q: Array, k: Array, q_tile: Array, kv_tile: Array, masked: bool) -> Tile:
        """The scores of tile (q_tile, kv_tile), from one tile of q and one of k."""
        products = self.einsum(f"{self.q_subscripts},{self.k_subscripts}->bkgqs", q, k)
        s, slope = softmax.scores(products, self.spec.scale, self.spec.softcap)
        q_pos, kv_pos = self.positions(q_tile, kv_tile)
        before, attends = None, None
        if self.score is not None:
            before = s * self.product_unit
            s, own_slope = map(self.split_heads, scores.value_and_slope(
                self.score, self.join_heads(before), self.pairs(q_tile, kv_tile)))
            slope, attends = slope * own_slope, s != -jnp.inf
        keep = None
        if masked:
            keep = self.split_heads(masks.over_batch(self.mask, lambda part: part.keep(q_pos, kv_pos)))
            if self.reaches_back:
                keep = keep & (kv_pos >= kv_tile * self.schedule.block_kv)[None, None, None]
        if self.bias is not None and self.anchor is not None:
            bias, anchor = (self.split_heads(self.bias_tile(x, q_tile, kv_tile)).astype(s.dtype)
                            for x in (self.bias, self.anchor))
            s = (s * self.product_unit if before is None else s) + bias - anchor
            attends = bias != -jnp.inf if attends is None else attends & (bias != -jnp.inf)
        if attends is not None:
            keep = attends if keep is None else keep & attends
            s = jnp.maximum(s, jnp.finfo(s.dtype).min)  # masks of it stay finite: a row of them has equal scores
            s = s if self.score is None else scores.even_if_large(s)  # the anchor knows of the bias alone
        if keep is not None:
            s = jnp.where(keep, s, jnp.full_like(s, -jnp.inf))
        return Tile(s, keep, self._dropped(q_pos, kv_pos, s.dtype), slope, before)

    def pairs(self, q_tile: Array, kv_tile: Array) -> scores.Pairs:
        """The places of a tile's pairs, as a score function is told of them."""
        q_pos, kv_pos = self.positions(q_tile, kv_tile)
        return scores.tile(self.spec.batch, self.spec.q_heads, q_pos[:, 0], kv_pos[0])

    def score_gradients(self, tile: Tile, q_tile: Array, kv_tile: Array, ds: Array) -> tuple[Array, ...]:
        """The gradients of the score function's arrays from one tile, whose scores have the cotangents ds."""
        if self.score is None or tile.before is None or tile.keep is None:
            return ()
        before, keep, ds = map(self.join_heads, (tile.before, tile.keep, ds))
        return scores.gradients(self.score, before, self.pairs(q_tile, kv_tile), keep, ds)

    def bias_tile(self, bias: Array, q_tile: Array, kv_tile: Array) -> Array:
        """The part of a bias that a tile needs: (b or 1, h or 1, q or 1, s or 1)."""
        for axis, tile, block in ((2, q_tile, self.schedule.block_q), (3, kv_tile, self.schedule.block_kv)):
            if bias.shape[axis] != 1:
                bias = slice_tile(bias, tile, block, axis)
        return bias

    def _dropped(self, q_pos: Array, kv_pos: Array, dtype: np.dtype) -> Array | None:
        rate = self.spec.dropout_rate
        if self.dropout_seed is None:
            return None
        batch = jnp.arange(self.spec.batch)[:, None, None, None]
        head = jnp.arange(self.spec.q_heads)[:, None, None]
        place = dropout.moved((batch, head, q_pos, kv_pos), self.dropout_origin)
        kept = self.split_heads(dropout.keep(self.dropout_seed, *place, rate))
        return jnp.where(kept, dropout.factor(rate), 0.0).astype(dtype)


def slice_tile(array: Array, tile: Array, block: int, axis: int) -> Array:
    """Positions [tile * block, (tile + 1) * block) of an axis."""
    return jax.lax.dynamic_slice_in_dim(array, tile * block, block, axis)


def update_tile(array: Array, values: Array, tile: Array, block: int, axis: int) -> Array:
    """`array` with one tile of an axis replaced."""
    return jax.lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), tile * block, axis)


def pad(array: Array, length: int, axis: int, value: float = 0.0) -> Array:
    """`array` with an axis padded to `length`."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)], constant_values=value)


def _pad_bias(bias: Array, q_len: int, kv_len: int) -> Array:
    for axis, length in ((2, q_len), (3, kv_len)):
        if bias.shape[axis] != 1:
            bias = pad(bias, length, axis)
    return bias


def split_q_heads(x: Array, spec: AttentionSpec) -> Array:
    """q, out or dout with its heads split into (kv_heads, group)."""
    axis = spec.layout.index("H")
    return x.reshape(*x.shape[:axis], spec.kv_heads, spec.group, *x.shape[axis + 1:])


def expanded_score(spec: AttentionSpec, operands: Operands, schedule: Schedule) -> scores.Score | None:
    """The score function in the form that tiles read fastest, for whole tiles of positions."""
    function = spec.score_function(operands)
    return None if function is None else function.expanded(*_padded(spec, schedule))


def _padded(spec: AttentionSpec, schedule: Schedule) -> tuple[int, int]:
    """The lengths of queries and keys, in whole tiles."""
    return (tiles.cdiv(spec.q_len, schedule.block_q) * schedule.block_q,
            tiles.cdiv(spec.kv_len, schedule.block_kv) * schedule.block_kv)


def is_cached(spec: AttentionSpec) -> bool:
    """Whether keys and values are a cache: not to be copied for the few queries that read it."""
    return spec.pages is not None or filled_part(spec.mask) is not None


def prepare(spec: AttentionSpec, operands: Operands, schedule: Schedule, keys_in_place: bool = False) -> Problem:
    """Pads the operands to whole tiles (nothing is copied where they already are) and splits the heads; what has keys
    is not padded if they are to stay in place.

    Operands pass a barrier: of constants, XLA would compute what it can while it compiles, for seconds, on one core,
    and put a copy of each into every loop. Products of queries and keys would have another order of summation, too, and
    scores would differ between forward and backward (`softmax`).
    """
    operands = jax.lax.optimization_barrier(operands)
    axis = spec.layout.index("L")
    q_len, kv_len = _padded(spec, schedule)
    ragged = q_len != spec.q_len or kv_len != spec.kv_len
    if keys_in_place:
        kv_len = spec.kv_len
    bias, anchor = None, None
    if operands.bias is not None:
        bias, anchor = (_pad_bias(x, q_len, kv_len) for x in (operands.bias, spec.anchor(operands)))
    mask = ids.with_tiles(operands.mask, schedule)
    k, v = (x if keys_in_place else pad(x, kv_len, axis) for x in (operands.k, operands.v))
    return Problem(
        spec=spec, schedule=schedule,
        q=split_q_heads(pad(operands.q, q_len, axis), spec), k=k, v=v, bias=bias, anchor=anchor,
        score=expanded_score(spec, operands, schedule),
        mask=mask & masks.InBounds(spec.q_len, spec.kv_len) if ragged else mask,
        dropout_seed=operands.dropout_seed, dropout_origin=operands.dropout_origin, page_table=operands.page_table,
        scales=operands.cache_scales, keys_in_place=keys_in_place)


_FEW_TERMS = 8
_MINUS, _NAN = 2.0**12, 2.0**40
"""What -inf and NaN count, beside 1 for +inf: more than the keys of a tile, so that float32 holds the counts of both
infinities exactly; no count of them comes near that of NaN. Powers of two are exact in bfloat16, so the product is one
of 16 bits where the values are."""


def _terms(subscripts: str, a: Array) -> int:
    """How many terms each element of an einsum of `a` and another array sums."""
    operands, result = subscripts.split("->")
    return math.prod(size for name, size in zip(operands.split(",")[0], a.shape, strict=True) if name not in result)


def masked_product(problem: Problem, subscripts: str, weights: Array, keep: Array | None, values: Array) -> Array:
    """A product in which NaN and infinity in `values` reach only the pairs of `keep`.

    `weights` are 0 where not kept, but 0 * inf is NaN: the finite part is multiplied, and what is not finite is
    counted for each result over the kept pairs only. Costs a second product, on tiles that need a mask.
    """
    if keep is None:
        return problem.einsum(subscripts, weights, values)
    finite = jnp.isfinite(values)
    product = problem.einsum(subscripts, weights, jnp.where(finite, values, jnp.zeros_like(values)))
    dtype = jnp.bfloat16 if values.dtype.itemsize == 2 else problem.spec.acc_dtype
    infinite = jnp.where(values > 0, 1.0, jnp.where(values < 0, _MINUS, _NAN))
    code = jnp.where(finite, 0.0, infinite)
    pairs = jnp.broadcast_to(keep, weights.shape)
    count = problem.einsum(subscripts, pairs.astype(dtype), code.astype(dtype))
    minus = jnp.floor(count / _MINUS)
    extra = jnp.where(count - minus * _MINUS > 0, jnp.inf, 0.0) + jnp.where(minus > 0, -jnp.inf, 0.0)
    extra = jnp.where(count >= _NAN, jnp.nan, extra)
    return product + extra.astype(product.dtype)
