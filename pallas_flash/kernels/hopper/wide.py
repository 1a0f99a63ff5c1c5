"""Values of more than 256 columns, in the forward: out is made in two parts of columns, each by a call of its own.

A warpgroup keeps out of 64 queries in registers, half a register a thread and column, and no thread has more than 255.
Each part has its columns of v and all of q and k, so scores are computed twice; with d = d_v that is half as much work
again. Parts are copied around the whole call, as in `padding`, and their statistics are the same.

No Mosaic in here.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_flash import padding, tiles
from pallas_flash.arrays import Array
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["copies", "joined", "parts"]

MAX_COLUMNS = 256


def _widths(spec: AttentionSpec) -> tuple[int, ...]:
    """The columns of each part: multiples of 8, as d_v is one."""
    count = tiles.cdiv(spec.d_v, MAX_COLUMNS)
    width = padding.UNIT * tiles.cdiv(spec.d_v, padding.UNIT * count)
    return (*(width,) * (count - 1), spec.d_v - width * (count - 1))


def parts(spec: AttentionSpec, operands: Operands) -> list[tuple[AttentionSpec, Operands]]:
    """The problems of the parts, of a spec that is `padding.padded`; where one is enough, the problem itself."""
    widths, found, first = _widths(spec), [], 0
    if len(widths) == 1:
        return [(spec, operands)]
    for width in widths:
        v = lax.slice_in_dim(operands.v, first, first + width, axis=3)
        found.append((dataclasses.replace(spec, d_v=width), operands._replace(v=v)))
        first += width
    return found


def joined(found: list[Results[Array]]) -> Results[Array]:
    """The results of a problem, of those of its parts."""
    if len(found) == 1:
        return found[0]
    return found[0]._replace(out=jnp.concatenate([part.out for part in found], axis=3))


def copies(spec: AttentionSpec) -> padding.Copies | None:
    """What is copied around the kernels for a spec, padding too; None: nothing."""
    found, padded = padding.copies(spec), padding.padded(spec)
    widths = _widths(padded)
    if len(widths) == 1:
        return found
    keys, queries = padded.kv_len * padded.kv_heads, padded.q_len * padded.q_heads
    size = padded.batch * padded.d_v * (keys * padded.dtype.itemsize + queries * padded.result_dtype.itemsize)
    line = (f"v cut into parts of {' and '.join(map(str, widths))} columns, out joined of theirs, for each of which "
            f"scores are computed: {size:,} bytes written")
    filled = "" if found is None else f"{found.forward}; "
    return padding.Copies(dataclasses.replace(padded, d_v=widths[0]), padded, filled + line,
                          "" if found is None else found.backward)
