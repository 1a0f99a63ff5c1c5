"""A bias of each key, or of each pair: added to scores in registers, forward and backward; its gradient is
`mosaic.dbias`.

With a bias, scores are in the unit 1: (s * unit + bias) - anchor, in this order, as in `xla`: a score added to
finfo.min rounds to it, so that keys that a library hides by it weigh alike where a query sees no other. The anchor
(`AttentionSpec.anchor`) is the largest bias of a row, where that is far from 0; there is none beside a bias of pairs in
16 bits (`scores.is_far`). Kernels read, padded to whole tiles where they are not whole:

    bias    (batch or 1, heads or 1, 1, kv_len) float32, zeros where it is -inf; or as it came, with an axis of queries
    anchor  (batch or 1, heads or 1, 1, q_len) float32, of each query

A bias of -inf hides a key from all queries, as a dense mask of that shape does, so it becomes one (`as_mask`): such
keys are skipped by whole tiles, and what is in them reaches nothing. In a bias of pairs it is looked for pair by pair,
in every tile, and skips none.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks, softmax, tiles
from pallas_flash.arrays import Array, Bool, Float
from pallas_flash.kernels.mosaic import fragments, ptx
from pallas_flash.kernels.mosaic.fragments import ROWS, Fragment, PerRow
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import ANCHOR_ROWS, AttentionSpec, Operands

__all__ = ["HeadBias", "anchored_inputs", "arrays", "as_mask", "hiding", "inputs", "is_anchored_at_once", "names",
           "place", "types", "with_anchor", "with_pairs", "without_anchor"]


# -- the arrays, which XLA makes ---------------------------------------------------------------------------------------

def as_mask(spec: AttentionSpec, operands: Operands) -> tuple[AttentionSpec, Operands]:
    """The same problem with what a bias of -inf hides in its mask, too. Where a bias of pairs, or a score function,
    says pair by pair what it hides, with an array in the mask, so that nothing is known of it before it runs.
    """
    if operands.bias is None and spec.score is None:
        return spec, operands
    hides = jnp.ones(_EVERYTHING, jnp.bool_)
    if operands.bias is not None and operands.bias.shape[2] == 1:
        hides = jnp.not_equal(operands.bias, -jnp.inf)
    mask = operands.mask & masks.Dense(hides)
    return dataclasses.replace(spec, mask=mask.with_placeholders()), operands._replace(mask=mask)


_EVERYTHING = 1, 1, 1, 1
"""The shape of a dense mask that hides no pair."""


def hiding(spec: AttentionSpec) -> AttentionSpec:
    """The spec that `as_mask` returns, which only needs to know shapes."""
    if spec.bias is None and spec.score is None:
        return spec
    of_keys = spec.bias is not None and spec.bias.shape[2] == 1
    shape = spec.bias.shape if spec.bias is not None and of_keys else _EVERYTHING
    mask = spec.mask & masks.Dense(jax.ShapeDtypeStruct(shape, jnp.bool_))
    return dataclasses.replace(spec, mask=mask.with_placeholders())


def is_anchored_at_once(spec: AttentionSpec) -> bool:
    """Whether the anchor may be made without a loop over rows: what that takes is no more than the bias itself, or of
    O(kv_len).
    """
    assert spec.bias is not None
    return (spec.bias.shape[2] > 1 or isinstance(spec.mask, masks.Full) or spec.q_len <= ANCHOR_ROWS
            or _seen_by_first(spec) is not None)


def _seen_by_first(spec: AttentionSpec) -> int | None:
    """How many keys the first query sees, where each sees those from the first key on, and one more than that before
    it; below 0 for queries in front of the first key. None: the mask is another.
    """
    mask = spec.mask
    if not isinstance(mask, masks.Window) or mask.has_arrays:
        return None
    left, right, offset = (int(x) for x in (mask.left, mask.right, mask.offset))
    return offset + right + 1 if spec.q_len - 1 + offset - left <= 0 else None


def _anchor_of_prefixes(spec: AttentionSpec, bias: Array, seen: int) -> Float[Array, "1|b 1|h t 1"]:
    """`AttentionSpec.anchor` of a bias of keys: the largest of the first `seen` keys, of one more, and so on."""
    largest = lax.cummax(bias[:, :, 0], axis=2)
    largest = jnp.concatenate((jnp.full_like(largest[..., :1], -jnp.inf), largest), axis=2)  # of no key first
    middle = largest[..., max(seen, 0):max(seen + spec.q_len, 0)]
    before = min(max(-seen, 0), spec.q_len)
    after = spec.q_len - before - middle.shape[2]
    shapes = ((*largest.shape[:2], count) for count in (before, after))
    ends = [jnp.broadcast_to(x, shape) for x, shape in zip((largest[..., :1], largest[..., -1:]), shapes)]
    return softmax.anchor(jnp.concatenate((ends[0], middle, ends[1]), axis=2)[..., None])


def inputs(spec: AttentionSpec, operands: Operands,
           rows: int = ANCHOR_ROWS) -> tuple[Float[Array, "1|b 1|h 1 n"], ...]:
    """What a pass is made of: the bias and its anchor, made of so many rows at once; nothing if there is no bias."""
    if operands.bias is None:
        return ()
    if not spec.is_anchored:
        return operands.bias, jnp.zeros((1, 1, 1, spec.q_len), jnp.float32)
    bias = operands.bias
    if bias.shape[2] == 1:
        bias = jnp.where(bias == -jnp.inf, 0.0, bias.astype(jnp.float32))
    seen = _seen_by_first(spec) if rows == spec.q_len and bias.shape[2] == 1 else None
    anchor = spec.anchor(operands, rows) if seen is None else _anchor_of_prefixes(spec, operands.bias, seen)
    return bias, _of_rows(spec, anchor)


def anchored_inputs(spec: AttentionSpec, operands: Operands) -> tuple[Float[Array, "1|b 1|h 1 n"], ...]:
    """`inputs` of kernels that take an anchor from scores also where the spec does not."""
    found = inputs(spec, operands)
    if operands.bias is None or spec.is_anchored:
        return found
    return found[0], _of_rows(spec, spec.largest_bias(operands))


def _of_rows(spec: AttentionSpec, anchor: Float[Array, "1|b 1|h 1|t 1"]) -> Float[Array, "1|b 1|h 1 t"]:
    """The anchor of each query, float32."""
    anchor = anchor[..., 0].astype(jnp.float32)
    return jnp.broadcast_to(anchor, (*anchor.shape[:2], spec.q_len))[:, :, None]


def without_anchor(spec: AttentionSpec, operands: Operands, stats: Float[Array, "b h 2 t"]) -> Float[Array, "b h 2 t"]:
    """The statistics of the spec, of those that such kernels return."""
    if operands.bias is None or spec.is_anchored:
        return stats
    return softmax.shifted(stats, _of_rows(spec, spec.largest_bias(operands))[:, :, 0], 1.0)


def with_anchor(spec: AttentionSpec, operands: Operands, stats: Float[Array, "b h 2 t"]) -> Float[Array, "b h 2 t"]:
    """The statistics that such kernels take, of those of the spec."""
    if operands.bias is None or spec.is_anchored:
        return stats
    return softmax.shifted(stats, -_of_rows(spec, spec.largest_bias(operands))[:, :, 0], 1.0)


def names(spec: AttentionSpec) -> tuple[str, ...]:
    """The arrays that every kernel reads that makes scores."""
    return ("bias", "anchor") if spec.bias is not None else ()


def arrays(spec: AttentionSpec, blocks: tuple[int, int], given: tuple[Array, ...]) -> dict[str, Array]:
    """The arrays that kernels read, padded to whole tiles, of `inputs`.

    Args:
      blocks: keys and queries of a whole tile (`padded_blocks` of a schedule).
    """
    if not given:
        return {}
    kv_len, q_len = (tiles.cdiv(length, block) * block for length, block in zip((spec.kv_len, spec.q_len), blocks))
    bias, anchor = given
    return {"bias": _padded(bias, q_len, kv_len), "anchor": _padded(anchor, 1, q_len)}


def _padded(x: Array, rows: int, columns: int) -> Array:
    """Adds zeros up to so many rows, if there is more than one, and columns; a copy only where there are fewer."""
    missing = 0 if x.shape[2] == 1 else rows - x.shape[2], columns - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), *((0, n) for n in missing))) if any(missing) else x


def types(spec: AttentionSpec, blocks: tuple[int, int], made_by: Callable[
        [AttentionSpec, Operands], tuple[Array, ...]] = inputs) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a pass; none if there is no bias.

    Args:
      made_by: what the pass is made of, `inputs` or `anchored_inputs`.
    """
    if spec.bias is None:
        return {}
    fields = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (spec.bias, spec.mask))

    def make(bias: Array, mask: masks.Mask) -> dict[str, Array]:
        operands = Operands(q=bias, k=bias, v=bias, bias=bias, score=(), mask=mask, score_integers=(),
                            dropout_seed=None, dropout_origin=None, page_table=None)
        return arrays(spec, blocks, made_by(spec, operands))

    found: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(make, *fields)
    return found


# -- in registers ------------------------------------------------------------------------------------------------------

def of_pairs(gmem: dict[str, Ref]) -> bool:
    """Whether there is a bias of each pair."""
    return "bias" in gmem and gmem["bias"].shape[2] > 1


def place(ref: Ref, batch: Index, head: Index) -> tuple[Index, Index]:
    """Where an array that is broadcast over batch or heads has what belongs to a batch entry and head."""
    return batch if ref.shape[0] > 1 else 0, head if ref.shape[1] > 1 else 0


def column_of_pairs(ref: Ref, head: tuple[Index, Index], first: Index, key: Index) -> PerRow:
    """Loads the bias of 64 queries and one key, float32."""
    column = ref.at[*head, pl.ds(first, ROWS), key]
    return plgpu.load(column, layout=fragments.ROW_LAYOUT, optimized=False).astype(jnp.float32)


def with_pairs(spec: AttentionSpec, s: Fragment, bias: Fragment) -> Fragment:
    """Scores with the bias of each pair, in 16 bits, in the unit 1: -inf where that is, unless the score is NaN."""
    return s * softmax.unit(spec.scale, spec.softcap) + bias.astype(jnp.float32)


class HeadBias(NamedTuple):
    """The bias of one batch entry and query head."""

    spec: AttentionSpec
    gmem: dict[str, Ref]
    batch: Index
    head: Index

    def added(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """Scores with the bias, in the unit 1; 8 columns at a time.

        Args:
          s: (64, n), in their own unit, in the layout TILE.
          first: the positions of the first query and of the first key.
          keys_dim: the axis that runs over keys.
        """
        # Opaque, or LLVM would keep what follows from them, addresses first, in registers through every loop.
        here = self._replace(batch=ptx.opaque(self.batch), head=ptx.opaque(self.head))
        own, other = ("anchor", "bias") if keys_dim == 1 else ("bias", "anchor")
        row, column = (ptx.opaque(x) for x in (first if keys_dim == 1 else first[::-1]))
        if of_pairs(self.gmem):
            return here._added_to_pairs(s, row, column, keys_dim)
        rows = fragments.spread(here._rows(own, row), 8)
        parts = []
        for i in range(0, s.shape[1], 8):
            columns = fragments.stack(fragments.load_row(self.gmem[other], (*here._at(other), 0), column + i, 8))
            bias, anchor = (columns, rows) if keys_dim == 1 else (rows, columns)
            parts.append(s[:, i:i + 8] * self._unit + bias - anchor)
        return fragments.concatenate(parts)

    def _with_pairs(self, s: Fragment, bias: Fragment, anchor: Fragment) -> Fragment:
        """Scores with the bias of each pair; -inf where that is, whatever the score."""
        bias = bias.astype(jnp.float32)
        return jnp.where(bias == -jnp.inf, bias, s * self._unit + bias - anchor)

    def added_to_key(self, s: PerRow, first: Index, key: Index) -> PerRow:
        """Scores of 64 queries and one key, with the bias of the key."""
        if of_pairs(self.gmem):
            bias = column_of_pairs(self.gmem["bias"], self._at("bias"), first, key)
        else:
            bias = self.gmem["bias"][*self._at("bias"), 0, key]
        return s * self._unit + bias - self._rows("anchor", first)

    def keep(self, by_mask: Bool[Array, "64 n"], first: Index, key: Index) -> Bool[Array, "64 n"]:
        """Leaves out the pairs of the 64 queries from `first` on and a key that the bias hides.

        Args:
          by_mask: which of them the mask keeps, the same in each column.
        """
        if not of_pairs(self.gmem):
            return by_mask
        own = column_of_pairs(self.gmem["bias"], self._at("bias"), first, key)
        return by_mask & (fragments.spread(own, by_mask.shape[1]) != -jnp.inf)

    def _added_to_pairs(self, s: Fragment, row: Index, column: Index, keys_dim: int) -> Fragment:
        """Scores with the bias of each pair, from global memory."""
        ref, at, parts = self.gmem["bias"], self._at("bias"), []
        rows = fragments.spread(self._rows("anchor", row), 8) if keys_dim == 1 else None
        for i in range(0, s.shape[1], 8):
            if rows is not None:
                tile = ref.at[*at, pl.ds(row, ROWS), pl.ds(column + i, 8)]
                bias, anchor = plgpu.load(tile, layout=fragments.TILE, optimized=False), rows
            else:
                bias = fragments.load_columns(ref, (*at, column + i), row, 8)
                where = *self._at("anchor"), 0
                anchor = fragments.stack(fragments.load_row(self.gmem["anchor"], where, column + i, 8))
            parts.append(self._with_pairs(s[:, i:i + 8], bias, anchor))
        return fragments.concatenate(parts)

    @property
    def _unit(self) -> float:
        return softmax.unit(self.spec.scale, self.spec.softcap)

    def _rows(self, name: str, first: Index) -> PerRow:
        ref = self.gmem[name].at[*self._at(name), 0, pl.ds(first, ROWS)]
        return plgpu.load(ref, layout=fragments.ROW_LAYOUT, optimized=False)

    def _at(self, name: str) -> tuple[Index, Index]:
        return place(self.gmem[name], self.batch, self.head)
