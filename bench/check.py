"""Whether results are right, before they are timed: against float32 results that do not come from the kernels.

Only the first and the last (batch, key head) are compared, the ends of every array; the rest must be finite. Of what is
learned, and for packed sequences, all rows of the first and the last key head are. The truth is `reference` where its
score matrix is small, else our blockwise implementation; that of packed sequences is one of padded rows.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import features
from bench.contestants import SHARED, UNTRIED, Arrays, Contestant, Exclusive, compiled
from pallas_flash import autodiff, flash_attention, masks, reference
from pallas_flash.packed import Packed
from pallas_flash.sinks import with_sinks
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing.problems import Problem

__all__ = ["NOISE", "Check"]

REFERENCE = 2**25
"""Pairs of a head up to which the score matrix is written out."""
NOISE = 0.25
"""The largest deviation from what dropout does on average (`Check.noise`)."""


class _Corner(NamedTuple):
    """What is compared: rows of the batch, and the queries' heads of one key head."""

    batches: tuple[int, ...]
    kv_head: int


class Check:
    """The right results of one problem, computed when they are first asked for."""

    def __init__(self, problem: Problem, arrays: Arrays, gradients: bool, exclusive: Exclusive = SHARED) -> None:
        self.problem, self.arrays, self.gradients, self.exclusive = problem, arrays, gradients, exclusive
        self.group = problem.q_heads // problem.kv_heads
        everything = tuple(range(problem.batch))
        ends = ((everything, 0), (everything, problem.kv_heads - 1)) if problem.learned else (
            ((0,), 0), ((problem.batch - 1,), problem.kv_heads - 1))
        self.corners = [_Corner(*end) for end in dict.fromkeys(ends)]

    @property
    def limit(self) -> float:
        """The relative error up to which a result counts as right: four roundings of its dtype, at least 1e-4."""
        return max(2 * float(jnp.finfo(self.problem.dtypes[0]).eps), 1e-4)

    def errors(self, contestant: Contestant, results: dict[str, Any]) -> dict[str, float]:
        """|result - truth| / |truth| of each result; infinite where an element is not finite."""
        return {name: self._error(contestant, name, array) for name, array in results.items()}

    def noise(self, contestant: Contestant, results: dict[str, Any], rate: float) -> dict[str, float]:
        """How far each result is from what dropout does to one of this problem, with bits that nobody else knows.

        On average it changes nothing, and the distance is sqrt(rate / (1 - rate)) of the result: independent errors of
        that size in every weight. Returned is the larger of both deviations, relative; more than `NOISE` is wrong.
        """
        return {name: self._noise(*self._compared(contestant, name, array), rate) if contestant.is_finite(array) else
                float("inf") for name, array in results.items()}

    @staticmethod
    def _noise(found: np.ndarray, wanted: np.ndarray, rate: float) -> float:
        mean = float(np.vdot(found, wanted) / np.vdot(wanted, wanted))
        distance = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) / np.sqrt(rate / (1 - rate))
        return max(abs(mean - 1), abs(distance - 1))

    def _error(self, contestant: Contestant, name: str, array: Any) -> float:
        found, wanted = self._compared(contestant, name, array)
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        return error if contestant.is_finite(array) else float("inf")

    def _compared(self, contestant: Contestant, name: str, array: Any) -> tuple[np.ndarray, np.ndarray]:
        """What is compared of a result, and the truth of it, flat."""
        found = [np.ravel(part) for corner in self.corners for part in self._parts(contestant, name, array, corner)]
        return np.concatenate(found), np.concatenate([truth[name].ravel() for truth in self._truths])

    def _parts(self, contestant: Contestant, name: str, array: Any, corner: _Corner) -> list[np.ndarray]:
        heads = self._heads(name, corner.kv_head)
        if name == "dsinks":
            return [contestant.numbers(array[heads.start:heads.stop])]
        if name == "dbias":
            return [contestant.numbers(array[0, head]) for head in heads]
        return [contestant.row(self.problem, array, batch, head) for batch in corner.batches for head in heads]

    def _heads(self, name: str, kv_head: int) -> range:
        return range(kv_head, kv_head + 1) if name in ("dk", "dv") else range(kv_head * self.group,
                                                                             (kv_head + 1) * self.group)

    @functools.cached_property
    def _truths(self) -> list[dict[str, np.ndarray]]:
        """For each corner the results of its rows and heads, (batch, heads, length, dim)."""
        return [self._truth(corner) for corner in self.corners]

    def _truth(self, corner: _Corner) -> dict[str, np.ndarray]:
        axis = self.problem.layout.index("H")
        by_heads = lambda name, x: np.asarray(x if name in ("dbias", "dsinks") else jnp.moveaxis(x, axis, 1))
        return {name: by_heads(name, x) for name, x in self.compute(*self._cut(corner)).items()}

    def _cut(self, corner: _Corner) -> tuple[Arrays, jax.Array]:
        """The inputs of one key head, float32, and where they begin in the whole (`Operands.dropout_origin`)."""
        first, count = corner.batches[0], len(corner.batches)
        axis = self.problem.layout.index("H")

        def cut(x: Any, name: str) -> Any:
            heads = self._heads(name, corner.kv_head)
            x = jax.lax.slice_in_dim(x[first:first + count], heads.start, heads.stop, axis=axis)
            return x.astype(jnp.float32)
        heads = self._heads("out", corner.kv_head)
        q, k, v, dout = (cut(x, name) for x, name in zip(self.arrays[:4], ("dq", "dk", "dv", "out"), strict=True))
        whole = {"bias": lambda x: x[:, heads.start:heads.stop].astype(jnp.float32),
                 "sinks": lambda x: x[heads.start:heads.stop].astype(jnp.float32),
                 "mask": lambda x: jax.tree.map(lambda leaf: leaf[first:first + count] if leaf.shape[0] > 1 else leaf,
                                                x.canonical())}
        learned, given = ({name: whole.get(name, lambda x: x)(x) for name, x in more.items()}
                          for more in self.arrays[4:])
        return Arrays(q, k, v, dout, learned, given), jnp.array([first, heads.start, 0, 0], jnp.int32)

    @functools.cached_property
    def compute(self) -> Any:
        """The executable that gives right results, compiled when it is first asked for."""
        function = functools.partial(_everything, self.problem, self.gradients)
        return compiled(function, jax.eval_shape(lambda: self._cut(self.corners[0])), self.exclusive, UNTRIED)


def _everything(problem: Problem, gradients: bool, arrays: Arrays, origin: jax.Array) -> dict[str, jax.Array]:
    if isinstance(problem.mask, Packed):
        return _of_sequences(problem, gradients, arrays, origin)
    q, k, v, dout, learned, given = arrays
    attend = lambda q, k, v, learned: _attend(problem, origin, q, k, v, **learned, **given)
    if not gradients:
        return {"out": attend(q, k, v, learned)}
    out, vjp = jax.vjp(attend, q, k, v, learned)
    *found, of_learned = vjp(dout)
    return {"out": out} | dict(zip(("dq", "dk", "dv"), found, strict=True)) | {
        f"d{name}": x for name, x in of_learned.items()}


def _attend(problem: Problem, origin: jax.Array, q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None,
            sinks: Any = None, dropout_rng: Any = None, starts: Any = None) -> jax.Array:
    del starts  # the mask says it
    mask = problem.mask.canonical() if mask is None else mask
    if problem.q_len * problem.kv_len > REFERENCE:
        return flash_attention(q, k, v, mask=mask, scale=problem.scale, implementation="xla",
                               softcap=problem.softcap, layout=problem.layout)
    spec = AttentionSpec.of(q, k, v, mask=mask, bias=bias, scale=problem.scale, softcap=problem.softcap,
                            layout=problem.layout, dropout_rate=problem.dropout_rate,
                            dropout_moved=dropout_rng is not None, return_lse=True)
    operands = Operands(q=q, k=k, v=v, bias=bias, score=(), mask=mask, score_integers=(), dropout_seed=dropout_rng,
                        dropout_origin=None if dropout_rng is None else origin, page_table=None)
    out, stats = reference.forward(spec, operands)
    if sinks is None:
        return out
    return with_sinks(problem.layout, out, autodiff.natural_lse(spec, operands, stats), sinks)[0]


def _of_sequences(problem: Problem, gradients: bool, arrays: Arrays, origin: jax.Array) -> dict[str, jax.Array]:
    """Those of packed sequences, from rows of one sequence each and padding."""
    starts = np.asarray(problem.mask.cu_seqlens_q)
    lengths, longest = np.diff(starts).astype(np.int32), features.longest(problem)
    where = starts[:-1, None] + np.arange(longest)
    real = np.arange(longest) < lengths[:, None]
    padded = dataclasses.replace(
        problem, batch=len(lengths), q_len=longest, kv_len=longest,
        mask=features.rule(problem.mask) & masks.InBounds(q_len=lengths, kv_len=lengths))
    rows = (x[0][np.minimum(where, problem.q_len - 1)] for x in arrays[:4])
    found = _everything(padded, gradients, Arrays(*rows, {}, {}), origin)
    return {name: x[real][None] for name, x in found.items()}
