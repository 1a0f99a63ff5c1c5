"""Whether results are right, before they are timed: against float32 results that do not come from the kernels.

Only the first and the last (batch, key head) are compared, the ends of every array; the rest must be finite. Of what is
learned, and for packed sequences, all rows of the first and the last key head are. The truth is the textbook's formula
where a head's score matrix is small, else our blockwise implementation; packed sequences are padded rows there. Which
pairs attend is an argument of the formula: XLA would spend a minute on folding it into a constant.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import features
from bench.contestants import SHARED, UNTRIED, Arrays, Contestant, Exclusive, compiled
from pallas_flash import dropout, flash_attention, masks
from pallas_flash.packed import Packed
from pallas_flash.testing.problems import Problem

__all__ = ["NOISE", "Check"]

WRITTEN_OUT = 2**25
"""Pairs of a head up to which the score matrix is."""
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

        def of_rows(name: str, x: jax.Array) -> np.ndarray:
            if name in ("dbias", "dsinks"):
                return np.asarray(x)
            if self._rows is not None:
                x = x[self._rows.is_real][None]
            return np.asarray(jnp.moveaxis(x, axis, 1))
        return {name: of_rows(name, x) for name, x in self.compute(*self._arguments(corner)).items()}

    @functools.cached_property
    def _rows(self) -> "_Rows | None":
        return _Rows.of(self.problem) if isinstance(self.problem.mask, Packed) else None

    @property
    def _is_written_out(self) -> bool:
        return self._rows is not None or self.problem.q_len * self.problem.kv_len <= WRITTEN_OUT

    @functools.cached_property
    def compute(self) -> Any:
        """The executable that gives right results, compiled when it is first asked for."""
        return compiled(lambda *args: self._everything(*self._cut(*args)), self._arguments(self.corners[0]),
                        self.exclusive, UNTRIED)

    def _arguments(self, corner: _Corner) -> tuple[Any, ...]:
        """All arrays; the first row of the batch and the key head that are compared; the positions."""
        problem = self.problem if self._rows is None else self._rows.padded
        return self.arrays, np.int32(corner.batches[0]), np.int32(corner.kv_head), *(
            np.arange(length, dtype=np.int32) for length in (problem.q_len, problem.kv_len))

    def _cut(self, arrays: Arrays, first: jax.Array, kv_head: jax.Array, q_pos: jax.Array,
             kv_pos: jax.Array) -> tuple[Arrays, jax.Array]:
        """The inputs of one key head, float32, with "keep" in place of the mask where the scores are written out; and
        where they begin in the whole (`Operands.dropout_origin`)."""
        axis, count = self.problem.layout.index("H"), len(self.corners[0].batches)
        part = jax.lax.dynamic_slice_in_dim

        def cut(x: Any, heads: int) -> Any:
            x = part(part(x, first, count), kv_head * heads, heads, axis=axis).astype(jnp.float32)
            return x if self._rows is None else x[0][self._rows.where]
        q, k, v, dout = (cut(x, heads) for x, heads in zip(arrays[:4], (self.group, 1, 1, self.group), strict=True))
        of_head = {name: functools.partial(part, start_index=kv_head * self.group, slice_size=self.group, axis=axis)
                   for name, axis in (("bias", 1), ("sinks", 0))}
        learned, given = ({name: of_head[name](x).astype(jnp.float32) for name, x in more.items() if name in of_head}
                          for more in arrays[4:])
        if self.problem.dropout_rate:
            given["dropout_rng"] = arrays.given["dropout_rng"]
        if self._is_written_out:
            problem = self.problem if self._rows is None else self._rows.padded
            keep = masks.over_batch(problem.mask.canonical(), lambda part: part.keep(q_pos[:, None], kv_pos[None, :]))
            given["keep"] = part(keep, first, count) if keep.shape[0] == self.problem.batch else keep
        origin = jnp.stack([first, kv_head * self.group, jnp.int32(0), jnp.int32(0)])
        return Arrays(q, k, v, dout, learned, given), origin

    def _everything(self, arrays: Arrays, origin: jax.Array) -> dict[str, jax.Array]:
        q, k, v, dout, learned, given = arrays
        function = _textbook if self._is_written_out else _blockwise
        attend = lambda q, k, v, learned: function(self.problem, origin, (q, k, v), **learned, **given)
        if not self.gradients:
            return {"out": attend(q, k, v, learned)}
        out, vjp = jax.vjp(attend, q, k, v, learned)
        *found, of_learned = vjp(dout)
        return {"out": out} | dict(zip(("dq", "dk", "dv"), found, strict=True)) | {
            f"d{name}": x for name, x in of_learned.items()}


class _Rows(NamedTuple):
    """Packed sequences as rows of one sequence each and padding."""

    padded: Problem
    where: np.ndarray  # (sequences, longest): each row's tokens
    is_real: np.ndarray  # those of them that are no padding

    @classmethod
    def of(cls, problem: Problem) -> "_Rows":
        starts = np.asarray(features.boundaries(problem))
        lengths, count = np.diff(starts).astype(np.int32), features.longest(problem)
        padded = dataclasses.replace(
            problem, batch=len(lengths), q_len=count, kv_len=count,
            mask=features.rule(problem.mask) & masks.InBounds(q_len=lengths, kv_len=lengths))
        where = np.minimum(starts[:-1, None] + np.arange(count), problem.q_len - 1)
        return cls(padded, where, np.arange(count) < lengths[:, None])


def _blockwise(problem: Problem, origin: jax.Array, qkv: tuple[Any, Any, Any]) -> jax.Array:
    del origin
    return flash_attention(*qkv, mask=problem.mask, scale=problem.scale, implementation="xla", softcap=problem.softcap,
                           layout=problem.layout)


def _textbook(problem: Problem, origin: jax.Array, qkv: tuple[Any, Any, Any], keep: Any, bias: Any = None,
              sinks: Any = None, dropout_rng: Any = None) -> jax.Array:
    """out = dropout(softmax(softcap(scale Q K^T) + bias, where keep)) V of the queries' heads of one key head."""
    q, k, v = (x if problem.layout == "BHLD" else x.swapaxes(1, 2) for x in qkv)
    exactly = jax.lax.Precision.HIGHEST
    s = jnp.einsum("bhtd,bsd->bhts", q, k[:, 0], precision=exactly) * problem.spec().scale
    if problem.softcap is not None:
        s = problem.softcap * jnp.tanh(s / problem.softcap)
    s = jnp.where(keep, s if bias is None else s + bias, -jnp.inf)
    row_max = jax.lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(s.dtype).min / 2))
    p = jnp.exp(s - row_max)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[None, :, None, None] - row_max)
    p = p / jnp.where(total == 0, 1, total)
    if dropout_rng is not None:
        place = dropout.moved(tuple(jnp.ogrid[tuple(slice(n) for n in p.shape)]), origin)
        p = jnp.where(dropout.keep(dropout_rng, *place, problem.dropout_rate), p * dropout.factor(problem.dropout_rate),
                      0)
    out = jnp.einsum("bhts,bsv->bhtv", p, v[:, 0], precision=exactly)
    return out if problem.layout == "BHLD" else out.swapaxes(1, 2)
