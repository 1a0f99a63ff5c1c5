"""A prompt, or a chunk of one, against a cache: more queries than the rows of a kernel of decoding.

The ordinary forward runs them, under the same mask: that of a cache (`filled.Filled`) is one of queries and keys by
number, moved by length - q_len, among the first length keys (`filled.by_number`). Two things are left for a pass over
out: queries before the first key, where the mask does not hide everything from them, here; and sequences that have lost
keys, in `autodiff`.

Ordinary kernels read keys one after the other, so what is in pages is copied from them first. No Mosaic in here:
`support` asks on any machine.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_flash import errors, masks, padding, paging
from pallas_flash.arrays import Array, Bool
from pallas_flash.filled import by_number, filled_part
from pallas_flash.kernels.mosaic.cache_rules import MAX_ROWS, rows
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["FEW_QUERIES", "copies", "is_decoding", "is_needed", "not_measured", "ordinary", "run", "why_not"]

FEW_QUERIES = 16
"""Of each head. A tile has 64 rows a warpgroup for the queries of one head: with fewer than 16, most are idle, and
`xla`, whose rows are the queries of a whole group, may be as fast (docs/notes/hopper_decode.md, 2026-11-30)."""


def is_needed(spec: AttentionSpec) -> bool:
    """Whether keys are in a cache, and more queries share a key head than a kernel of decoding takes. A cache in eight
    bits is left to those: no ordinary kernel reads it.
    """
    return filled_part(spec.mask) is not None and rows(spec) > MAX_ROWS and spec.cache_scales is None


def is_decoding(spec: AttentionSpec) -> bool:
    """Whether keys are in a cache, and a kernel of decoding takes the queries."""
    return filled_part(spec.mask) is not None and not is_needed(spec)


@functools.lru_cache(maxsize=1024)
def ordinary(spec: AttentionSpec) -> AttentionSpec:
    """The problem that the ordinary forward runs in the place of `spec`, which `is_needed`.

    Raises:
      UnsupportedError: a mask of a class that does not define `moved`.
    """
    fields: masks.Mask = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), spec.mask)
    mask: masks.Mask = jax.eval_shape(functools.partial(by_number, capacity=spec.kv_len), fields)
    return dataclasses.replace(spec, mask=mask.with_placeholders(), pages=None)


def why_not(spec: AttentionSpec, of_ordinary: Callable[[AttentionSpec], list[str]]) -> list[str]:
    """The reasons why no ordinary forward runs `spec`, which `is_needed`; `of_ordinary` finds those of a package."""
    try:
        found = of_ordinary(ordinary(spec))
    except errors.UnsupportedError:
        found = [f"takes more than {MAX_ROWS} queries that share a key head (q_len * q_heads / kv_heads) against a "
                 f"cache under masks that define moved(q_lo, kv_lo) only, there are {rows(spec)}, mask={spec.mask} "
                 "(define it, or give fewer queries at a time)"]
    rules = (
        (spec.score is None, f"takes no score function against a cache yet, score={spec.score}"),
        (not spec.dropout_rate and not spec.partial, "takes no dropout and no partial results against a cache yet"),
        (_copy_fits(spec), f"copies keys for {rows(spec)} queries that share a key head out of pages only where the "
         f"copy is no larger than all pages: {spec.batch} sequences of {spec.kv_len} positions, pages={spec.pages} "
         f"(give at most {MAX_ROWS} at a time, or a page table of fewer columns)"),
    )
    return found + [reason for holds, reason in rules if not holds]


def _copy_fits(spec: AttentionSpec) -> bool:
    """A table may show far more positions than there are pages: those that no sequence has, and those that many share.
    """
    return (spec.pages is None or not isinstance(spec.batch, int)
            or spec.batch * spec.kv_len <= spec.pages.number * spec.pages.size)


def not_measured(spec: AttentionSpec) -> list[str]:
    """What of `spec`, which `is_needed`, was not timed on a GPU beside `xla`."""
    rules = ((spec.pages is not None, "attention to keys that are copied out of pages"),
             (spec.q_len < FEW_QUERIES,
              f"attention of fewer than {FEW_QUERIES} queries of each head against a cache, where more than {MAX_ROWS} "
              f"share a key head ({spec.q_len} of each of {spec.group} heads),"))
    return [what for holds, what in rules if holds]


def copies(spec: AttentionSpec, of_ordinary: padding.Copies | None) -> padding.Copies:
    """What is run in the place of `spec`, which `is_needed`, and copied for it; `of_ordinary`: for that problem."""
    of_pages, inner = "", ordinary(spec)
    if spec.pages is not None:
        written = spec.batch * spec.kv_len * spec.kv_heads * (spec.d + spec.d_v) * spec.dtype.itemsize
        of_pages = f"k, v copied from their pages: {written:,} bytes written"
    instead = (f"the ordinary forward, mask={inner.mask}: {rows(spec)} queries share a key head, more than the "
               f"{MAX_ROWS} rows of the kernel against a cache")
    made = "" if of_ordinary is None else of_ordinary.forward
    run = inner if of_ordinary is None else of_ordinary.run
    return padding.Copies(run, spec, "; ".join(filter(None, (of_pages, made))), "", instead)


def run(forward: Callable[[AttentionSpec, Operands], Results[Array]], spec: AttentionSpec,
        operands: Operands) -> Results[Array]:
    """The results of `spec`, which `is_needed`, by the ordinary forward of a package."""
    k, v, table, axis = operands.k, operands.v, operands.page_table, spec.layout.index("L")
    if table is not None:
        k, v = (paging.contiguous(x, table, axis) for x in (k, v))
    found = forward(ordinary(spec), operands._replace(
        k=k, v=v, page_table=None, mask=by_number(operands.mask, spec.kv_len)))
    return _hidden(spec, operands, found) if _sees_before_first(spec) else found


def _sees_before_first(spec: AttentionSpec) -> bool:
    """Whether the moved mask may show keys to queries before the first one: a causal rule hides all of them."""
    filled = filled_part(spec.mask)
    assert filled is not None
    ends = [part.right + part.offset for part in filled.rule.parts
            if isinstance(part, masks.Window) and not part.has_arrays]
    return spec.q_len > 1 and not any(end <= 0 for end in ends)


def _hidden(spec: AttentionSpec, operands: Operands, results: Results[Array]) -> Results[Array]:
    """The results with nothing seen by queries before the first key."""
    filled = filled_part(operands.mask)
    assert filled is not None
    first = spec.q_len - jnp.maximum(filled.lengths, 0)[..., None]  # the query at position 0
    before: Bool[Array, "1|b 1|h t"] = jnp.arange(spec.q_len, dtype=jnp.int32)[None, None] < first
    of_out = (before if spec.layout == "BHLD" else before.swapaxes(1, 2))[..., None]
    nothing = jnp.array([-jnp.inf, 0], results.stats.dtype)[None, None, :, None]
    return Results(jnp.where(of_out, jnp.zeros_like(results.out), results.out),
                   jnp.where(before[:, :, None], nothing, results.stats))
