"""What kernels read of a mask that holds arrays, made of these by one launch: the numbers of `mask_ranges`, which makes
them in several kernels of XLA.

A thread for each position asks the mask's own rules for its interval, a thread for each tile for the tile's range. With
ids, a warp takes a tile: its block has the smallest and the largest id of each tile of the other side in shared memory,
which each thread of the warp compares some of. Packed sequences are looked up by their starts.

It makes what `mask_rules.kernel_makes` says. No number passes from block to block, so there is one launch; it costs
reading the other side's ids in each block.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import mask_ranges, ptx, threads
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.mask_ranges import Ranges
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.packed import Packed, Side
from pallas_flash.spec import AttentionSpec

__all__ = ["RangesOf", "fields", "launch"]

_WARPS = ptx.WARPGROUP // threads.WARP
_AT_ONCE = 8
"""Tiles whose ids a warp loads before it needs them."""
_NONE = int(jnp.iinfo(jnp.int32).max)
_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                 lowering_semantics=plgpu.LoweringSemantics.Lane)


class RangesOf(NamedTuple):
    """One of the arrays of ranges.

    Attributes:
      name: "query_tiles", or another one of tiles of keys.
      own: positions of a tile.
      other: positions of a tile of the other side.
      together: neighbouring tiles whose ranges depend on each other, by `finish`.
      finish: makes the ranges of these.
      rows_of_zeros: how many follow the last tile.
    """

    name: str
    own: int
    other: int
    together: int = 1
    finish: Callable[[list[Ranges]], list[Ranges]] = lambda needed: needed
    rows_of_zeros: int = 0

    @property
    def of_keys(self) -> bool:
        return self.name != "query_tiles"


def fields(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a spec's mask, by the names that the launch reads them by, in the order of a call."""
    return {f"field{i}": jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(jax.tree.leaves(spec.mask))}


# -- the mask of a thread ----------------------------------------------------------------------------------------------

class _Starts(NamedTuple):
    """A `packed.Side` in global memory: the sequence of a position is looked up among the starts."""

    ref: Ref  # (batch or 1, 1, sequences + 1)
    batch: Index
    tokens: int

    @property
    def end(self) -> Array:
        return self._start(self.ref.shape[2] - 1)

    def _start(self, i: Index) -> Array:
        return threads.load(self.ref, self.batch, 0, i)

    def sequence_at(self, pos: Positions) -> Array:
        count, pos = self.ref.shape[2], jnp.minimum(pos, self.tokens - 1)
        found: Array = pos * 0  # so many starts at `pos` or before
        for step in (1 << i for i in reversed(range(count.bit_length()))):
            more = found + step
            before = (more <= count) & (self._start(jnp.minimum(more, count) - 1) <= pos)
            found = jnp.where(before, more, found)
        return found - 1

    def span(self, sequence: Array) -> tuple[Array, Array]:
        last = self.ref.shape[2] - 1
        return self._start(jnp.minimum(sequence, last)), self._start(jnp.minimum(sequence + 1, last))


@dataclasses.dataclass(frozen=True)
class _Sequences(Packed):
    """`Packed`, with other sides than those of its arrays."""

    sides: tuple[Side, Side] = dataclasses.field(kw_only=True)

    @property
    def queries(self) -> Side:
        return self.sides[0]

    @property
    def keys(self) -> Side:
        return self.sides[1]


def _lead(ref: Ref, batch: Index) -> Index:
    return batch if ref.shape[0] > 1 else 0


def _rules(spec: AttentionSpec, gmem: dict[str, Ref], batch: Index) -> masks.Mask:
    """The interval rules of a batch entry, with numbers in place of arrays."""
    def read(part: masks.Mask) -> masks.Mask:
        if type(part) is Packed:
            q_starts, kv_starts = _ref(part, "cu_seqlens_q"), _ref(part, "cu_seqlens_kv")
            sides = (_Starts(q_starts, _lead(q_starts, batch), spec.q_len),
                     _Starts(kv_starts, _lead(kv_starts, batch), spec.kv_len))
            return _Sequences(part.rule, part.cu_seqlens_q, part.cu_seqlens_kv, part.q_sequence, part.kv_sequence,
                              part.alignment, sides=sides)
        numbers: masks.Mask = jax.tree.map(lambda ref: threads.load(ref, _lead(ref, batch), 0), part)
        return numbers
    parts = [read(part) for part in _filled(spec, gmem).parts if not isinstance(part, masks.SegmentIds)]
    return functools.reduce(operator.and_, parts, masks.InBounds(q_len=spec.q_len, kv_len=spec.kv_len))


def _filled(spec: AttentionSpec, gmem: dict[str, Ref]) -> masks.Mask:
    """The mask with references in place of arrays."""
    mask: masks.Mask = jax.tree.unflatten(jax.tree.structure(spec.mask), [gmem[name] for name in fields(spec)])
    return mask


def _ref(part: masks.Mask | None, name: str) -> Ref:
    """The reference that stands in place of an array of a `_filled` mask."""
    ref: Ref = getattr(part, name)
    return ref


# -- positions ---------------------------------------------------------------------------------------------------------

def _intervals(spec: AttentionSpec, gmem: dict[str, Ref], name: str, batch: Index, pos: Array) -> None:
    """Makes "keys" or "queries" of a position."""
    of_keys, ref = name == "keys", gmem[name]
    ask = _rules(spec, gmem, batch)
    bounds = ask.kv_bounds(pos, pos + 1) if of_keys else ask.q_bounds(pos, pos + 1)
    found = mask_ranges.kept_interval(bounds, spec.kv_len if of_keys else spec.q_len)
    for i, x in enumerate(found):
        threads.store(ref, (batch, 0, i, pos), (x,), pos < ref.shape[3])


def _copy_ids(spec: AttentionSpec, gmem: dict[str, Ref], name: str, batch: Index, pos: Array) -> None:
    """Makes "q_ids" or "kv_ids" of a position."""
    ids, padding = _ids(spec, gmem, name == "q_ids"), -1 if name == "q_ids" else -2
    length = ids.shape[2]
    own = threads.load(ids, _lead(ids, batch), 0, jnp.minimum(pos, length - 1))
    own = jnp.where((pos < length) & (own >= 0), own, padding)
    threads.store(gmem[name], (batch, 0, 0, pos), (own,), pos < gmem[name].shape[3])


def _ids(spec: AttentionSpec, gmem: dict[str, Ref], of_queries: bool) -> Ref:
    return _ref(mask_ranges.ids_of(_filled(spec, gmem)), "q_ids" if of_queries else "kv_ids")


# -- ranges ------------------------------------------------------------------------------------------------------------

def _range_of_rules(spec: AttentionSpec, rules: masks.Mask, made: RangesOf, tile: Array) -> Ranges:
    """The tiles that a tile needs by the interval rules."""
    lo, hi = mask_ranges.asked_about(spec, made.of_keys, tile, made.own)
    bounds = rules.kv_bounds(lo, hi) if made.of_keys else rules.q_bounds(lo, hi)
    other_len = spec.kv_len if made.of_keys else spec.q_len
    needed = tiles.tile_range(bounds, made.other, tiles.cdiv(other_len, made.other))
    return tiles.TileRange(*(tile * 0 + x for x in needed))


def _store_ranges(made: RangesOf, ref: Ref, batch: Index, item: Array, needed: list[Ranges], writes: Array) -> None:
    """Stores the ranges of the tiles of an item, and behind the last one zeros."""
    items = (ref.shape[2] - made.rows_of_zeros) // made.together
    for i, own in enumerate(made.finish(needed)):
        threads.store(ref, (batch, 0, item * made.together + i, 0), tuple(own), writes & (item < items))
    for i in range(made.rows_of_zeros):
        threads.store(ref, (batch, 0, items * made.together + i, 0), (0,) * 4, writes & (item == 0))


def _ranges(spec: AttentionSpec, gmem: dict[str, Ref], made: RangesOf, batch: Index, item: Array) -> None:
    """Makes the ranges of the tiles of an item, a thread's own."""
    rules, first = _rules(spec, gmem, batch), item * made.together
    needed = [_range_of_rules(spec, rules, made, first + i) for i in range(made.together)]
    _store_ranges(made, gmem[made.name], batch, item, needed, item >= 0)


class _Extremes(NamedTuple):
    """Of the ids of a tile: the smallest, the largest, and the only one, or a number below 0; see `tiles.id_extremes`.
    """

    first: Array
    last: Array
    only: Array


class _Ids(NamedTuple):
    """The ids of one side of a batch entry, in tiles."""

    ref: Ref  # (batch or 1, 1, length)
    batch: Index
    block: int
    missing: int  # below 0, what a tile with several ids has instead of one

    @property
    def number(self) -> int:
        """Of tiles."""
        return tiles.cdiv(self.ref.shape[2], self.block)

    def load(self, tile: Array) -> list[tuple[Array, Array]]:
        """Loads this thread's ids of a warp's tile; with each, whether there is one."""
        length, found = self.ref.shape[2], []
        for first in range(0, self.block, threads.WARP):
            column = rem(threads.of_block(), threads.WARP) + first
            pos = tile * self.block + column
            own = threads.load(self.ref, self.batch, 0, jnp.minimum(pos, length - 1))
            found.append((own, (column < self.block) & (pos < length)))
        return found

    def extremes(self, loaded: list[tuple[Array, Array]]) -> _Extremes:
        """Those of a warp's tile, the same in all of its threads."""
        known = [jnp.where(is_there & (x >= 0), x, _NONE) for x, is_there in loaded]
        largest = [jnp.where(is_there, x, -1) for x, is_there in loaded]
        any_ = [jnp.where(is_there, x, _NONE) for x, is_there in loaded]
        first, lowest = (threads.smallest(functools.reduce(jnp.minimum, x)) for x in (known, any_))
        last = _largest(jnp.maximum(functools.reduce(jnp.maximum, largest), -1))
        return _Extremes(first, last, jnp.where((lowest == last) & (last >= 0), first, self.missing))


def _largest(x: Array) -> Array:
    """The largest of a warp's numbers of at least -1."""
    return -threads.smallest(-x)


def _shared_size(count: int) -> int:
    """Tiles whose extremes are in shared memory: all of them, and the rest of what all warps load at once."""
    return tiles.cdiv(count, _WARPS * _AT_ONCE) * _WARPS * _AT_ONCE


def _share_extremes(ids: _Ids, smem: Ref) -> None:
    """Writes the extremes of all tiles to shared memory, (3, `_shared_size`): a warp takes several tiles at once."""
    warp = div(threads.of_block(), threads.WARP)

    def some(i: Array, carry: Array) -> Array:
        own = [(i * _AT_ONCE + j) * _WARPS + warp for j in range(_AT_ONCE)]
        loaded = [ids.load(tile) for tile in own]
        for tile, found in zip(own, map(ids.extremes, loaded)):
            for row, x in enumerate(found):
                threads.store_shared(smem, (row, tile), x)
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(_shared_size(ids.number) // (_WARPS * _AT_ONCE)), some, jnp.int32(0))
    threads.meet()


def _range_of_ids(own: _Extremes, count: int, smem: Ref) -> Ranges:
    """The tiles of the other side that may hold an id of a warp's tile; of full ones the first run of them or the last,
    whichever is longer.
    """
    lane = rem(threads.of_block(), threads.WARP)

    def some(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = i * threads.WARP + lane
        at = jnp.minimum(tile, count - 1)
        other = _Extremes(*(threads.load(smem, row, at) for row in range(3)))
        inside = tile < count
        needed = inside & (own.first <= other.last) & (other.first <= own.last)
        full = inside & (own.only == other.only)
        after = (tile > 0) & (tile <= count) & (own.only == threads.load(smem, 2, jnp.clip(tile - 1, 0, count - 1)))
        first = needed, full, after & ~full & inside  # the first tile of each
        last = needed, full & ~after, full
        start = [jnp.minimum(x, jnp.where(flag, tile, count)) for x, flag in zip(found[:3], first)]
        stop = [jnp.maximum(x, jnp.where(flag, tile + 1, 0)) for x, flag in zip(found[3:], last)]
        return *start, *stop

    zero = lane * 0
    found = lax.fori_loop(jnp.int32(0), jnp.int32(tiles.cdiv(count, threads.WARP)), some,
                          (zero + count,) * 3 + (zero,) * 3)
    start, first_run, first_stop = map(threads.smallest, found[:3])
    stop, last_run, last_stop = map(_largest, found[3:])
    return mask_ranges.with_longer_run((start, stop), (first_run, first_stop), (last_run, last_stop))


def _ranges_with_ids(spec: AttentionSpec, gmem: dict[str, Ref], smem: Ref, made: RangesOf,
                     place: tuple[Index, Index]) -> None:
    """Makes the ranges of the tiles of as many items as a block has warps.

    Args:
      place: the batch entry, and the first item.
    """
    batch, item = place[0], place[1] + div(threads.of_block(), threads.WARP)
    q_ids, kv_ids = (_ids(spec, gmem, of_queries) for of_queries in (True, False))
    own_ref, other_ref = (q_ids, kv_ids) if made.of_keys else (kv_ids, q_ids)
    own = _Ids(own_ref, _lead(own_ref, batch), made.own, -1)
    other = _Ids(other_ref, _lead(other_ref, batch), made.other, -2)
    _share_extremes(other, smem)
    rules, needed = _rules(spec, gmem, batch), []
    for i in range(made.together):
        tile = item * made.together + i
        by_ids = _range_of_ids(own.extremes(own.load(tile)), other.number, smem)
        needed.append(mask_ranges.both(_range_of_rules(spec, rules, made, tile), by_ids))
    is_first = rem(threads.of_block(), threads.WARP) == 0
    _store_ranges(made, gmem[made.name], batch, item, needed, is_first)


# -- launch ------------------------------------------------------------------------------------------------------------

class _Section(NamedTuple):
    """The blocks that make one array: for each batch entry as many as it takes."""

    name: str
    batch: int
    blocks: int  # of a batch entry


def _sections(spec: AttentionSpec, outputs: dict[str, jax.ShapeDtypeStruct],
              ranges: dict[str, RangesOf]) -> list[_Section]:
    found, has_ids = [], mask_ranges.ids_of(spec.mask) is not None
    for name, kind in outputs.items():
        if name in ranges:
            made = ranges[name]
            items = (kind.shape[2] - made.rows_of_zeros) // made.together
            found.append(_Section(name, kind.shape[0], tiles.cdiv(items, _WARPS if has_ids else ptx.WARPGROUP)))
        else:
            found.append(_Section(name, kind.shape[0], tiles.cdiv(kind.shape[3], ptx.WARPGROUP)))
    return found


def launch(spec: AttentionSpec, outputs: dict[str, jax.ShapeDtypeStruct], ranges: tuple[RangesOf, ...]) -> Launch:
    """The launch that makes the arrays of the mask of a spec, of its `fields`.

    Args:
      outputs: all that there are to make, as `mask_ranges` makes them.
      ranges: those of them that are ranges.
    """
    inputs, by_name = tuple(fields(spec)), {made.name: made for made in ranges}
    has_ids = mask_ranges.ids_of(spec.mask) is not None
    sections = _sections(spec, outputs, by_name)
    lengths = [tiles.cdiv(spec.kv_len if made.of_keys else spec.q_len, made.other) for made in ranges]
    scratch = [plgpu.SMEM((3, max(map(_shared_size, lengths))), jnp.int32)] if has_ids else []

    def attention_mask(*refs: Ref) -> None:
        gmem, smem = dict(zip((*inputs, *outputs), refs)), refs[-1]
        block, first = lax.axis_index("block"), 0
        for section in sections:
            stop = first + section.batch * section.blocks
            own = functools.partial(make, gmem, smem, section, block - first)
            pl.when((block >= first) & (block < stop))(own)
            first = stop

    def make(gmem: dict[str, Ref], smem: Ref, section: _Section, block: Array) -> None:
        batch, piece = div(block, section.blocks), rem(block, section.blocks)
        own = piece * ptx.WARPGROUP + threads.of_block()
        if section.name not in by_name:
            fill = _intervals if section.name in ("keys", "queries") else _copy_ids
            fill(spec, gmem, section.name, batch, own)
        elif has_ids:
            _ranges_with_ids(spec, gmem, smem, by_name[section.name], (batch, piece * _WARPS))
        else:
            _ranges(spec, gmem, by_name[section.name], batch, own)

    kernel = plgpu.kernel(
        attention_mask, out_type=tuple(outputs.values()), scratch_types=scratch,
        grid=(sum(section.batch * section.blocks for section in sections),), grid_names=("block",), num_threads=1,
        thread_name="warpgroup", compiler_params=_COMPILER)
    return Launch(kernel, inputs, outputs)
