"""What a problem asks for besides q, k, v and a mask of numbers: its names, its arrays, and the pairs that attend.

The arrays are arguments of what is timed, as they are in a model: nothing about their values is compiled in, and what a
library makes of them in each call counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.packed import Packed
from pallas_flash.testing import inputs
from pallas_flash.testing.problems import Problem

__all__ = ["arrays", "attended", "boundaries", "longest", "names", "part", "rule", "wanted"]

MASKS = {masks.SegmentIds: "documents", Packed: "packed sequences", masks.InBounds: "lengths",
         masks.Dense: "a dense mask"}


def part(mask: masks.Mask, kind: type[masks.Mask]) -> Any:
    """The part of a mask that is of a class; None: there is none."""
    return next((part for part in mask.parts if type(part) is kind), None)


def rule(mask: masks.Mask) -> masks.Mask:
    """What a mask says in numbers: for packed sequences, within each."""
    numbers = [part.rule if isinstance(part, Packed) else part for part in mask.parts
               if isinstance(part, Packed) or not part.has_arrays]
    return functools.reduce(lambda a, b: a & b, numbers, masks.Full())


def wanted(problem: Problem) -> list[str]:
    """What a problem asks for that not every library has, in words."""
    kinds = [MASKS.get(type(part), str(part)) for part in problem.mask.parts if part.has_arrays]
    rules = ((problem.bias is not None, "a bias"), ("bias" in problem.learned, "the gradient of a bias"),
             (problem.sinks, "sinks"), (problem.dropout_rate != 0, "dropout"),
             (problem.softcap is not None, "a soft cap"))
    return kinds + [name for holds, name in rules if holds]


def boundaries(problem: Problem) -> np.ndarray | None:
    """Where documents begin, and the last one ends, in all tokens of the batch; None where there are no documents."""
    if found := part(problem.mask, Packed):
        return np.asarray(found.cu_seqlens_q)
    if found := part(problem.mask, masks.SegmentIds):
        ids = np.broadcast_to(found.q_ids, (problem.batch, problem.q_len))
        begins = np.concatenate([np.ones((problem.batch, 1), bool), np.diff(ids) != 0], axis=1)
        return np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
    return None


def longest(problem: Problem) -> int:
    """The length of the longest document."""
    found = boundaries(problem)
    return 0 if found is None else int(np.diff(found).max())


def names(problem: Problem) -> set[str]:
    """Of the names of `arrays`, those that a problem has."""
    rules = {"mask": problem.mask.has_arrays, "starts": boundaries(problem) is not None,
             "bias": problem.bias is not None, "sinks": problem.sinks, "dropout_rng": problem.dropout_rate != 0}
    return {name for name, holds in rules.items() if holds}


def arrays(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """The arrays of a problem besides q, k and v, on the device: those of "mask", "starts" (`boundaries`), "bias",
    "sinks" and "dropout_rng"."""
    make = {
        "mask": lambda: jax.tree.map(jnp.asarray, problem.mask),
        "starts": lambda: jnp.asarray(boundaries(problem)),
        "bias": lambda: inputs.device_normal(3 * seed + 4, problem.bias or (), problem.spec().dtype),
        "sinks": lambda: inputs.device_normal(3 * seed + 5, (problem.q_heads,), np.dtype(np.float32)),
        "dropout_rng": lambda: jnp.array([0x9E3779B9, seed], jnp.uint32)}
    return {name: make[name]() for name in sorted(names(problem))}


@functools.lru_cache(maxsize=256)
def attended(problem: Problem) -> int:
    """How many pairs of a query and a key attend, in all rows of the batch, of one head."""
    if not problem.mask.has_arrays:
        return tiles.attended_pairs(problem.mask, problem.q_len, problem.kv_len) * problem.batch
    if (starts := boundaries(problem)) is not None:
        return sum(tiles.attended_pairs(rule(problem.mask), n, n) for n in np.diff(starts).tolist())
    mask = problem.mask.canonical()
    q_pos, kv_pos = np.arange(problem.q_len)[:, None], np.arange(problem.kv_len)[None, :]

    def kept(row: masks.Mask) -> int:
        parts = (np.asarray(part.keep(q_pos, kv_pos)) for part in row.parts)
        return int(np.sum(np.broadcast_to(functools.reduce(np.logical_and, parts), (problem.q_len, problem.kv_len))))
    return sum(kept(jax.tree.map(lambda x, i=i: np.asarray(x)[i % x.shape[0], 0], mask)) for i in range(problem.batch))
