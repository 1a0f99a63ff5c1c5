"""Packed sequences: documents of any lengths one after the other in one row of tokens, (tokens, heads, dim).

    query    [ sequence 0 | sequence 1 | ... | padding ]     sequence j: tokens cu_seqlens_q[j] to cu_seqlens_q[j + 1]
    key      [ sequence 0   | sequence 1 | ... ]             sequence j: tokens cu_seqlens_kv[j] to cu_seqlens_kv[j + 1]

Boundaries become the mask `Packed`: the query attends to keys of its own sequence, and among them to those that a rule
(`Causal()`, a window) keeps, asked about positions within the sequence. Everything else is attention over one row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import arguments, errors, mask_fields, masks, scores
from pallas_flash.arithmetic import Positions, maximum, minimum, where
from pallas_flash.arrays import Array, Shaped
from pallas_flash.spec import AttentionSpec

__all__ = ["Alignment", "Boundaries", "Packed", "Packing", "Side", "numbered"]

Alignment = Literal["first", "last"]
"""What the offset of a rule counts from in each sequence: its first query at its first key, or its last at its last."""
Boundaries = arguments.Boundaries


class Side(Protocol):
    """The queries, or the keys, of a packed row, as the bounds of `Packed` ask it."""

    @property
    def tokens(self) -> int: ...

    @property
    def end(self) -> Array:
        """Where the last sequence ends."""

    def sequence_at(self, pos: Positions) -> Array:
        """The number of the sequence at a position; that of the last position for those past the end."""

    def span(self, sequence: Array) -> tuple[Array, Array]:
        """The positions [start, stop) of a sequence; of padding, nothing at the end of the last sequence."""


class _Side(NamedTuple):
    """A `Side` of arrays."""

    sequence: Array  # (tokens,), the sequence of each
    starts: Array  # (sequences + 1,), its boundaries

    @property
    def tokens(self) -> int:
        return self.sequence.shape[0]

    @property
    def end(self) -> Array:
        return self.starts[-1]

    def sequence_at(self, pos: Positions) -> Array:
        return self.sequence[jnp.minimum(pos, self.sequence.shape[0] - 1)]

    def span(self, sequence: Array) -> tuple[Array, Array]:
        last = self.starts.shape[0] - 1
        return self.starts[jnp.minimum(sequence, last)], self.starts[jnp.minimum(sequence + 1, last)]


@dataclasses.dataclass(frozen=True)
class Packed(masks.Mask):
    """Packed sequences: a query attends to the keys of its own sequence that `rule` keeps; padding to nothing.

    Positions in the rule count from the first query and the first key of the sequence, and with alignment "last" its
    query 0 is at kv_len - q_len of the sequence. The bounds are tight where each sequence has as many queries as keys
    and those of the rule are; else sound. `Packing.mask` makes one from boundaries alone.

    Attributes:
      rule: a mask of numbers.
      cu_seqlens_q, cu_seqlens_kv: (sequences + 1,) int32, from 0, never falling: where sequences begin, the last ends.
      q_sequence: (q_len,) int32, the number of each query's sequence; for padding the number of sequences.
      kv_sequence: (kv_len,) int32, likewise of keys.
    """

    rule: masks.Mask
    cu_seqlens_q: Shaped
    cu_seqlens_kv: Shaped
    q_sequence: Shaped
    kv_sequence: Shaped
    alignment: Alignment = "first"
    position_axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "cu_seqlens_q": ("boundaries",), "cu_seqlens_kv": ("boundaries",), "q_sequence": ("q",), "kv_sequence": ("kv",)}

    def __str__(self) -> str:
        alignment = "" if self.alignment == "first" else f", alignment={self.alignment}"
        return f"Packed({self.rule}, sequences={self.cu_seqlens_q.shape[-1] - 1}{alignment})"

    @property
    def positions(self) -> tuple[Shaped, Shaped]:
        """The position of each query and of each key within its sequence, (1, q_len) and (1, kv_len) int32: with
        alignment "last" query 0 is at kv_len - q_len. Of placeholders, placeholders."""
        if not isinstance(self.cu_seqlens_q, Array | np.ndarray):
            return (jax.ShapeDtypeStruct((1, *self.q_sequence.shape[-1:]), jnp.int32),
                    jax.ShapeDtypeStruct((1, *self.kv_sequence.shape[-1:]), jnp.int32))
        def within(side: _Side) -> Array:
            return jnp.arange(side.sequence.shape[0], dtype=jnp.int32) - side.span(side.sequence)[0]

        queries, keys = (_Side(jnp.asarray(sequence), jnp.asarray(starts)) for sequence, starts in (
            (self.q_sequence, self.cu_seqlens_q), (self.kv_sequence, self.cu_seqlens_kv)))
        q_pos = within(queries)
        if self.alignment == "last":
            (q_start, q_stop), (kv_start, kv_stop) = (side.span(queries.sequence) for side in (queries, keys))
            q_pos = q_pos + (kv_stop - kv_start) - (q_stop - q_start)
        return q_pos[None], within(keys)[None]

    @property
    def queries(self) -> Side:
        """The side of the queries."""
        return _Side(jnp.asarray(self.q_sequence), jnp.asarray(self.cu_seqlens_q))

    @property
    def keys(self) -> Side:
        """The side of the keys."""
        return _Side(jnp.asarray(self.kv_sequence), jnp.asarray(self.cu_seqlens_kv))

    def _rule_of(self, sequence: Array) -> masks.Mask:
        """The rule of a sequence, about positions from its first query and its first key on."""
        if self.alignment == "first":
            return self.rule
        (q_start, q_stop), (kv_start, kv_stop) = self.queries.span(sequence), self.keys.span(sequence)
        return self.rule.moved((kv_stop - kv_start) - (q_stop - q_start), 0)

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        sequence = self.queries.sequence_at(q_pos)
        (q_start, _), (kv_start, kv_stop) = self.queries.span(sequence), self.keys.span(sequence)
        inside: Positions = (kv_start <= kv_pos) & (kv_pos < kv_stop)
        return inside & self._rule_of(sequence).keep(q_pos - q_start, maximum(kv_pos - kv_start, 0))

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> masks.Bounds:
        return _Tile(self.queries, self.keys, q_lo, q_hi).bounds(
            lambda sequence, lo, hi: self._rule_of(sequence).kv_bounds(lo, hi))

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> masks.Bounds:
        return _Tile(self.keys, self.queries, kv_lo, kv_hi).bounds(
            lambda sequence, lo, hi: self._rule_of(sequence).q_bounds(lo, hi))


_Ask = Callable[[Array, Positions, Positions], masks.Bounds]
"""(sequence, lo, hi) -> the bounds of its rule for [lo, hi), positions within the sequence."""


class _Tile(NamedTuple):
    """The positions [lo, hi) of one side, which ask about the other side."""

    own: Side
    other: Side
    lo: Positions
    hi: Positions

    def bounds(self, ask: _Ask) -> masks.Bounds:
        """Bounds on the other side: from what the first sequence in the tile needs to what the last one does."""
        end, length = self.own.end, self.own.tokens
        last = maximum(minimum(self.hi, end), self.lo + 1) - 1  # without padding; never empty
        sequences = self.own.sequence_at(self.lo), self.own.sequence_at(last)
        first_bounds, last_bounds = (self._of_sequence(sequence, last, ask) for sequence in sequences)
        one = (sequences[0] == sequences[1]) & (minimum(self.hi, length) <= end)
        return masks.Bounds(first_bounds.lo, first_bounds.full_lo, where(one, first_bounds.full_hi, 0),
                            where(self.lo < end, last_bounds.hi, 0))

    def _of_sequence(self, sequence: Array, last: Positions, ask: _Ask) -> masks.Bounds:
        """Bounds from the positions of one sequence among [lo, last]."""
        (start, stop), (other_start, other_stop) = self.own.span(sequence), self.other.span(sequence)
        lo = maximum(self.lo - start, 0)
        hi = maximum(minimum(last + 1, stop) - start, lo + 1)
        found = masks.Bounds(*(other_start + maximum(minimum(x, other_stop - other_start), 0)
                               for x in ask(sequence, lo, hi)))
        some = found.lo < found.hi
        return found._replace(lo=where(some, found.lo, other_stop), hi=where(some, found.hi, other_start))


class Packing(NamedTuple):
    """What the public functions take for packed sequences; nothing of it is given where rows are not packed."""

    cu_seqlens_q: object
    cu_seqlens_kv: object
    max_seqlen_q: object
    max_seqlen_kv: object
    alignment: Alignment

    def mask(self, rule: object, spec: AttentionSpec, batched: bool, **others: object) -> object:
        """`rule` within each sequence; `rule` itself where nothing is packed.

        Args:
          rule: the mask argument, as it was given.
          batched: whether query, key and value have a batch axis.
          others: arguments that boundaries stand for, and that must be None with them.
        """
        if self.alignment not in get_args(Alignment):
            raise errors.invalid(f"alignment must be one of {get_args(Alignment)}", f"alignment={self.alignment!r}",
                                 "say which query and key of each sequence are aligned")
        if self.cu_seqlens_q is None:
            self._require_nothing()
            return rule
        self._require_one_row(batched, others)
        within = _checked_rule(rule, self.alignment)
        q_starts = _boundaries("cu_seqlens_q", self.cu_seqlens_q, spec.q_len)
        kv_starts = self._kv_boundaries(spec, q_starts)
        _check_maximum("max_seqlen_q", self.max_seqlen_q, q_starts)
        _check_maximum("max_seqlen_kv", self.max_seqlen_kv, kv_starts)
        (q_starts, q_sequence), (kv_starts, kv_sequence) = (
            _sides(starts, tokens) for starts, tokens in ((q_starts, spec.q_len), (kv_starts, spec.kv_len)))
        return Packed(within, q_starts, kv_starts, q_sequence, kv_sequence, self.alignment)

    def score(self, score: object, mask: object) -> scores.Score | None:
        """A score function within each sequence of `mask`, which `mask()` returned."""
        function = scores.checked(score)
        if function is None or not isinstance(mask, Packed):
            return function
        if function.is_relative and self.cu_seqlens_kv is None:  # distances within a sequence are those in the row
            return function
        return scores.At(function, *mask.positions)

    def _require_nothing(self) -> None:
        given = {name: value for name, value in self._asdict().items() if value is not None and value != "first"}
        if given:
            name, value = next(iter(given.items()))
            raise errors.invalid(f"{name} goes with cu_seqlens_q", f"{name}={_shown(value)}, cu_seqlens_q=None",
                                 "pass the boundaries of the sequences as cu_seqlens_q")

    def _require_one_row(self, batched: bool, others: dict[str, object]) -> None:
        if batched:
            raise errors.invalid("query, key and value must be (tokens, heads, dim) with cu_seqlens_q",
                                 "arrays with a batch axis", "pack all sequences into one row, without the batch axis")
        for name, value in others.items():
            if value is not None:
                raise errors.invalid(f"{name} must be None with cu_seqlens_q, which says where sequences are",
                                     f"both cu_seqlens_q and {name}", f"leave {name} out")

    def _kv_boundaries(self, spec: AttentionSpec, q_starts: Shaped) -> Shaped:
        if self.cu_seqlens_kv is None:
            if spec.q_len != spec.kv_len:
                raise errors.invalid("cu_seqlens_kv must be given where query and key differ in length",
                                     f"q_len={spec.q_len}, kv_len={spec.kv_len}", "pass the boundaries of both")
            return q_starts
        kv_starts = _boundaries("cu_seqlens_kv", self.cu_seqlens_kv, spec.kv_len)
        if kv_starts.shape != q_starts.shape:
            raise errors.invalid(
                "cu_seqlens_q and cu_seqlens_kv must be of the same sequences",
                f"cu_seqlens_q.shape={tuple(q_starts.shape)}, cu_seqlens_kv.shape={tuple(kv_starts.shape)}",
                "repeat a boundary for a sequence without queries, or without keys")
        return kv_starts


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | str) else type(value).__name__


def _checked_rule(rule: object, alignment: Alignment) -> masks.Mask:
    """The mask within a sequence: of numbers alone, and able to move where sequences are aligned at their ends."""
    mask = masks.checked(rule)
    for part in mask.parts:
        if part.has_arrays:
            raise errors.invalid("mask must hold numbers, no arrays, with cu_seqlens_q", f"mask={part}",
                                 "pass numbers, which count within each sequence; other arrays as bias")
        if alignment == "last" and type(part).moved is masks.Mask.moved:
            raise errors.invalid('the class of a mask must define moved(q_lo, kv_lo) for alignment="last"',
                                 f"mask={part}, without",
                                 "define it: the mask whose keep(q, k) is this one's keep(q + q_lo, k + kv_lo)")
    return mask


def _boundaries(name: str, given: object, tokens: int) -> Shaped:
    """The boundaries as an array; raises ValueError unless they are (sequences + 1,) integers, and, where their values
    are on the host, rise from 0 to at most `tokens`."""
    starts = arguments.integers(name, arguments.listed(name, given))
    if len(starts.shape) != 1 or not starts.shape[0]:
        raise errors.invalid(f"{name} must have shape (sequences + 1,)", f"{name}.shape={tuple(starts.shape)}",
                             "pass the start of each sequence, and the end of the last")
    known = mask_fields.on_host(starts)
    if known is not None and (known[0] != 0 or (known[1:] < known[:-1]).any() or known[-1] > tokens):
        shown = known.tolist() if known.size <= 16 else _first_wrong(known, tokens)
        raise errors.invalid(f"{name} must start at 0, never fall, and end at the number of tokens or before",
                             f"{name}={shown}, tokens={tokens}",
                             "pass the cumulative sum of the lengths, with 0 in front")
    return starts


def _first_wrong(starts: np.ndarray, tokens: int) -> str:
    """The first boundary that is wrong, of many."""
    wrong = np.concatenate([starts[:1] != 0, (starts[1:] < starts[:-1]) | (starts[1:] > tokens)])
    at = int(wrong.argmax())
    return f"[..., {', '.join(str(x) for x in starts[max(at - 1, 0):at + 1])}, ...] at index {at}"


def _check_maximum(name: str, given: object, starts: Shaped) -> None:
    """Raises ValueError unless `given` is None, or a number that no sequence is longer than, as far as is known."""
    if given is None:
        return
    if not isinstance(given, int | np.integer) or isinstance(given, bool) or given < 0:
        raise errors.invalid(f"{name} must be a Python integer of at least 0, or None", f"{name}={_shown(given)}",
                             "leave it out where it is not known on the host")
    known = mask_fields.on_host(starts)
    longest = 0 if known is None else int(np.diff(known).max(initial=0))
    if longest > given:
        raise errors.invalid(f"{name} must be at least the length of the longest sequence, {longest}",
                             f"{name}={given}", "raise it, or leave it out")


def _sides(starts: Shaped, tokens: int) -> tuple[Shaped, Shaped]:
    """The boundaries as int32, and the number of each token's sequence; of placeholders, placeholders."""
    if isinstance(starts, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(starts.shape, jnp.int32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    found: tuple[Shaped, Shaped] = numbered(starts, tokens)
    return found


@functools.partial(jax.jit, static_argnums=1)
def numbered(starts: Array, tokens: int) -> tuple[Array, Array]:
    """The boundaries as int32, and the number of each token's sequence, of those that never fall.

    What a traced array may hold and a host's may not is made to rise from 0 to at most `tokens`. A runtime that reads
    what JAX traced (`torch_bridge.direct`) knows this function by its name, and has one of its own.
    """
    if starts.dtype.itemsize >= 4:  # or `tokens` may not fit
        starts = starts.clip(0, tokens)
    starts = jax.lax.cummax(starts.astype(jnp.int32).at[0].set(0).clip(0, tokens))
    # A search that is unrolled is part of what uses it; a scatter and a sum of all before are kernels of their own.
    found = jnp.searchsorted(starts, jnp.arange(tokens, dtype=jnp.int32), side="right", method="scan_unrolled")
    return starts, found.astype(jnp.int32) - 1
