"""Ring attention (Liu et al., "Ring Attention with Blockwise Transformers", 2023): keys travel, queries stay.

Each step is attention of this device's queries over the keys of another device. In the forward the partial results are
merged by their statistics (`softmax.merge`), as tiles are in FlashAttention. The backward runs each pair with the
statistics of the whole row, so that its gradients are terms of a sum: those of queries stay, those of keys and values
travel along with what they belong to. Partial results are not rounded (`AttentionSpec.partial`).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash import autodiff, compat, softmax
from pallas_flash.arrays import Array, Float
from pallas_flash.context_parallel import hops
from pallas_flash.context_parallel.hops import Carried, Chosen
from pallas_flash.context_parallel.plan import Call
from pallas_flash.context_parallel.shards import Shards, pick_rows, replace_rows, split, stacked
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["RingPasses", "added", "anchored", "attended", "merged", "no_stats", "nothing"]


def attended(passes: autodiff.Passes, operands: Operands) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out, lse) by passes whose statistics are those of `RingPasses`."""
    out, stats = autodiff.differentiable(passes, operands)
    lse = stats[:, :, 0]
    return out, lse if operands.bias is None else lse + lax.stop_gradient(stats[:, :, 2])


_Staying = tuple[Array | None, Array | None]
"""The sums that stay: dq and dbias; None before the first pair."""


class RingPasses(NamedTuple):
    """The passes of a ring, over the shards of a device (see `autodiff.Passes`).

    Of the results, stats are (b h 2 t), or with a bias (b h 3 t): lse, its rest, and what both are relative to
    (`AttentionSpec.anchor`).
    """

    shards: Shards

    @property
    def label(self) -> str:
        return "context_parallel_attention"

    def forward(self, operands: Operands) -> Results[Array]:
        spec = self.shards.spec
        batch, heads, _, length = spec.stats_shape
        stats_shape = batch, heads, 2 if operands.bias is None else 3, length

        def empty() -> Results[Array]:
            found: Results[Array] = compat.vary_like(
                nothing(spec.out_shape, stats_shape, spec.acc_dtype), operands)
            return found

        def compute(travelling: list[Array], carried: Carried[Results[Array] | None], call: Call,
                    chosen: list[Chosen]) -> Carried[Results[Array] | None]:
            spec, name, problem = self.shards.problem(operands, travelling, call, chosen)
            partial = autodiff.forward(spec, name, problem, where=self.shards.device)
            state: Results[Array] | None = carried[0]
            for pick, out, stats in zip(chosen, *(split(x, len(chosen)) for x in anchored(spec, problem, partial))):
                if state is None and _is_all(pick, out.shape, (batch, length, *out.shape[2:])):
                    state = Results(out, stats)
                else:
                    state = self._merged(empty() if state is None else state, Results(out, stats), pick)
            return state, carried[1]

        found, _ = self._around(compute, operands, None, [])
        out, stats = empty() if found is None else found
        return Results(out=out.astype(spec.dtype), stats=stats)

    def _merged(self, state: Results[Array], partial: Results[Array], pick: Chosen) -> Results[Array]:
        """`state` with the partial results of a pair merged into its rows."""
        (out, stats), rows = partial, partial.out.shape[1]
        if not isinstance(pick.needed, int):  # 0 * NaN is NaN: what is not needed may be anything
            out, stats = (jnp.where(pick.needed > 0, x, none) for x, none in zip(
                partial, nothing(out.shape, stats.shape, out.dtype), strict=True))
        start = pick.q_chunk * self.shards.chunking.chunk_len
        before = Results(out=pick_rows(state.out, start, rows, 1), stats=pick_rows(state.stats, start, rows, 3))
        out, stats = merged(before, Results(out, stats), self.shards.unit)
        return Results(out=replace_rows(state.out, out, start, 1), stats=replace_rows(state.stats, stats, start, 3))

    def backward(self, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        acc = self.shards.spec.acc_dtype
        # Else the first hop is that of the forward, and XLA keeps what it brought.
        k, v, dout = lax.optimization_barrier((operands.k, operands.v, cotangents.out))
        operands, cotangents = operands._replace(k=k, v=v), cotangents._replace(out=dout)
        results, cotangents = autodiff.without_out(self.shards.spec, results, cotangents)  # delta, once for all steps

        def zeros(x: Array) -> Array:
            return compat.vary_like(jnp.zeros(x.shape, acc), operands, results, cotangents)

        def compute(travelling: list[Array], carried: Carried[_Staying], call: Call,
                    chosen: list[Chosen]) -> Carried[_Staying]:
            spec, name, problem = self.shards.problem(operands, travelling, call, chosen)
            (_, stats), saved = (self._rows(x, call, chosen) for x in (results, cotangents))
            if problem.bias is not None:
                stats = softmax.shifted(stats[:, :, :2], stats[:, :, 2] - _anchor(spec, problem), self.shards.unit)
            grads = autodiff.backward(spec, name, problem, Results(out=None, stats=stats), saved,
                                      where=self.shards.device)
            for pick, dq, dk, dv in zip(chosen, *(split(x, len(chosen)) for x in grads[:3])):
                carried = self._added(carried, Gradients(dq=dq, dk=dk, dv=dv, dbias=grads.dbias, dscore=()), pick,
                                      operands.differentiable.gradients(zeros))
            return carried

        q, k, v, bias, _ = operands.differentiable
        nothing: _Staying = (None, None)
        (dq, dbias), sums = self._around(compute, operands, nothing, [])
        dk, dv = sums or (zeros(k), zeros(v))
        dq = zeros(q) if dq is None else dq
        dbias = zeros(bias) if dbias is None and bias is not None else dbias
        return Gradients(dq=dq.astype(q.dtype), dk=dk.astype(k.dtype), dv=dv.astype(v.dtype),
                         dbias=None if bias is None or dbias is None else dbias.astype(bias.dtype), dscore=())

    def _rows(self, x: Results[Array], call: Call, chosen: list[Chosen]) -> Results[Array]:
        """The rows of a call's pairs."""
        size = self.shards.chunking.chunk_len

        def of_call(x: Array, axis: int) -> Array:
            return stacked(chosen, lambda pick: pick_rows(x, pick.q_chunk * size, call.num_chunks * size, axis))
        out = None if x.out is None else of_call(x.out, 1)
        return Results(out=out, stats=of_call(x.stats, 3))

    def _added(self, carried: Carried[_Staying], grads: Gradients[Array], pick: Chosen,
               zeros: Gradients[Array]) -> Carried[_Staying]:
        """The sums with the gradients of a pair added where its chunks are; there are none before the first pair."""
        (dq, dbias), sums = carried
        dk, dv = sums or (None, None)
        size = self.shards.chunking.chunk_len
        dq = added(dq, grads.dq, pick, {1: pick.q_chunk * size}, zeros.dq)
        dk, dv = (added(whole, part, pick, {1: pick.kv_chunk * size}, none) for whole, part, none in (
            (dk, grads.dk, zeros.dk), (dv, grads.dv, zeros.dv)))
        if grads.dbias is not None and zeros.dbias is not None:
            starts = zip((2, 3), self.shards.bias_start(pick))
            at = {axis: start for axis, start in starts if zeros.dbias.shape[axis] != 1}
            dbias = added(dbias, grads.dbias, pick, at, zeros.dbias)
        return (dq, dbias), [dk, dv]

    def _around[S](self, compute: hops.Compute[S], operands: Operands, state: S, sums: list[Array]) -> Carried[S]:
        if not (steps := self.shards.steps):  # the mask keeps nothing
            return state, sums
        return hops.around(self.shards.ring, steps, compute, self.shards.travelling(operands), state, sums)


def added(whole: Array | None, part: Array, pick: Chosen, starts: dict[int, int | Array], zeros: Array) -> Array:
    """A sum with the part of a pair added where it begins along some axes; None: there is no sum yet, but zeros."""
    if whole is None and _is_all(pick, part.shape, zeros.shape):
        return part
    whole = zeros if whole is None else whole
    if not isinstance(pick.needed, int):
        part = jnp.where(pick.needed > 0, part, jnp.zeros_like(part))
    if part.shape == whole.shape:
        return whole + part
    at = [jnp.asarray(starts.get(axis, 0), jnp.int32) for axis in range(whole.ndim)]
    return lax.dynamic_update_slice(whole, lax.dynamic_slice(whole, at, part.shape) + part, at)


def _is_all(pick: Chosen, shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a pair's result, which every device needs, is all there is of it: nothing is read, added and written."""
    return shape == whole and isinstance(pick.needed, int)


def nothing(out_shape: tuple[int, ...], stats_shape: tuple[int, ...], dtype: np.dtype) -> Results[Array]:
    """Results over no keys."""
    return Results(out=jnp.zeros(out_shape, dtype), stats=no_stats(stats_shape, dtype))


def no_stats(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Statistics over no keys."""
    of_row = jnp.array([-jnp.inf, 0, jnp.finfo(dtype).min][:shape[2]], dtype)
    return jnp.broadcast_to(of_row[None, None, :, None], shape)


def merged(a: Results[Array], b: Results[Array], unit: float) -> Results[Array]:
    """Results of the same rows over two sets of keys."""
    stats, old, new = _merged_stats(a.stats, b.stats, unit)
    return Results(out=a.out * _over_dims(old) + b.out * _over_dims(new), stats=stats)


def _over_dims(shares: Float[Array, "b h t"]) -> Float[Array, "b t h 1"]:
    return shares.swapaxes(1, 2)[..., None]


def _anchor(spec: AttentionSpec, problem: Operands) -> Float[Array, "b h t"]:
    """What the statistics of a pair are relative to."""
    return jnp.broadcast_to(spec.anchor(problem)[..., 0], spec.lse_shape).astype(spec.acc_dtype)


def anchored(spec: AttentionSpec, problem: Operands, partial: Results[Array]) -> Results[Array]:
    """Partial results whose statistics have the anchor behind them, where there is a bias."""
    if problem.bias is None:
        return partial
    anchor = _anchor(spec, problem)[:, :, None]
    return Results(out=partial.out, stats=jnp.concatenate([partial.stats, anchor], axis=2))


def _merged_stats(a: Array, b: Array, unit: float) -> tuple[Array, Array, Array]:
    """`softmax.merge` of statistics that may have anchors behind them: they are made relative to the larger one."""
    if a.shape[2] == 2:
        return softmax.merge(a, b, unit)
    anchor = jnp.maximum(a[:, :, 2], b[:, :, 2])
    moved_a, moved_b = (softmax.shifted(x[:, :, :2], x[:, :, 2] - anchor, unit) for x in (a, b))
    stats, share_a, share_b = softmax.merge(moved_a, moved_b, unit)
    return jnp.concatenate([stats, anchor[:, :, None]], axis=2), share_a, share_b
