"""Attention and its gradients from the formulas, in plain NumPy: what an error budget measures its baseline with.

    S = f(softcap(scale Q K^T)) + bias  P = exp(S - lse)     O = drop(P) V
    dV = drop(P)^T dO     dP = drop(dO V^T)     dS = P (dP - sum(O dO) + dlse)     dQ = scale f' dS K     dK = ...

It shares no code with the kernels or with `reference` but the mask's `keep`, the score function f of one pair, and the
dropout bits. In a spec's own
precision it rounds where the kernels do: P, dS and O to the input's dtype, everything else in the accumulation dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import dropout, scores
from pallas_flash.arrays import Array
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing import inputs

__all__ = ["Results", "attention"]


class Results[T](NamedTuple):
    """Everything that a call computes, forward and backward; or one T for each."""

    out: T
    lse: T
    dq: T
    dk: T
    dv: T
    dbias: T | None
    dscore: T | None = None  # of the one floating-point array of the score function


class _Terms(NamedTuple):
    """Arrays of the problem, heads before length and key heads repeated; P and what its gradient needs."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    p: np.ndarray
    factor: np.ndarray  # dropout: 0 or 1 / keep_rate
    slope: np.ndarray  # the derivative of soft cap and score function
    out: np.ndarray


def attention(spec: AttentionSpec, operands: Operands, dout: np.ndarray,
              dlse: np.ndarray) -> tuple[Results[np.ndarray], Results[np.ndarray]]:
    """The results in the precision of `spec`, and a magnitude for each element of each.

    The magnitude of a sum is the root of the sum of its squared terms: relative errors of one roundoff in every term,
    independent of each other, change the sum by about one roundoff of that. No term counts as less than what underflow
    may take from it, in roundoffs. Where the magnitude is 0 the result is exactly 0.

    The gradient of a score function's array may be added up one pair at a time, in any order (where the array is
    gathered from, it is scattered to, on a GPU by atomic additions): there the roundings of partial sums count, too.
    """
    acc = spec.acc_dtype
    keep = inputs.attends(spec, operands)
    q, k, v, dout = (_bhld(np.asarray(x), spec).astype(acc) for x in (operands.q, operands.k, operands.v, dout))
    k, v = (np.repeat(x, spec.group, axis=1) for x in (k, v))
    q, k, v = (np.where(keep.any(axis=axis)[..., None], x, 0) for x, axis in ((q, 3), (k, 2), (v, 2)))

    s, slope, jacobian = _scores(spec, q, k, operands, keep)
    keep = keep & (s != -np.inf)
    p, lse, nothing = _softmax(s)
    factor = _dropout_factor(spec, operands, acc)
    out = _through(spec, _through(spec, p * factor) @ v)

    p = np.exp(s - lse[..., None])  # as a backward has it, which keeps lse alone
    dp = (dout @ v.swapaxes(-1, -2)) * factor
    ds = p * (dp - (out * dout).sum(-1)[..., None] + dlse[..., None])
    ds_qk = _through(spec, ds * slope * acc.type(spec.scale))
    results = Results(out, np.where(nothing, -np.inf, lse), ds_qk @ k, _group_sum(ds_qk.swapaxes(-1, -2) @ q, spec),
                      _group_sum(_through(spec, p * factor).swapaxes(-1, -2) @ dout, spec), _bias_sum(ds, spec),
                      _score_sum(ds, jacobian))
    row_size = 1 + np.maximum(np.where(keep, abs(s), 0).max(-1, initial=0), abs(lse))
    terms = _Terms(q, k, v, dout, p, factor, slope, out)
    sizes = _magnitudes(spec, terms, keep, dlse, np.where(nothing, 0, row_size), (jacobian, results.dscore))
    return _in_layout(_rounded(results, spec), spec), _in_layout(sizes, spec)


def _through(spec: AttentionSpec, x: np.ndarray) -> np.ndarray:
    """Rounds to the spec's dtype, and back to its accumulation dtype."""
    return x.astype(spec.dtype).astype(spec.acc_dtype)


def _magnitudes(spec: AttentionSpec, terms: _Terms, keep: np.ndarray, dlse: np.ndarray,
                row_size: np.ndarray,
                of_score: tuple[np.ndarray | None, np.ndarray | None]) -> Results[np.ndarray]:
    """The magnitude of each result, in float64.

    Args:
      row_size: 1 + max(|S|, |lse|), the condition of exp; 0 if empty.
      of_score: the derivatives by the score function's array, and the gradient of that; None where there is none.
    """
    jacobian, total = of_score
    # Squares of everything: products then add up squared terms.
    q, k, v, dout, p, factor, slope, out = (np.square(x, dtype=np.float64) for x in terms)
    # S, lse and the slope are rounded in the accumulation dtype: one of its roundoffs in units of the spec's.
    fine = float(jnp.finfo(spec.acc_dtype).eps) / float(jnp.finfo(spec.dtype).eps)
    least = np.square(_underflow(spec))
    p = p * np.square(1 + fine * row_size)[..., None] + keep * least
    slope = np.square(abs(terms.slope) + fine * abs(2 - terms.slope))  # 1 - t^2 with terms 1 and t^2
    ds = p * ((dout @ v.swapaxes(-1, -2)) * factor + (out * dout).sum(-1)[..., None] + np.square(dlse)[..., None])
    ds_qk = ds * slope * spec.scale**2
    ds_qk = ds_qk + (ds_qk > 0) * least
    squares = (p * factor @ v, ds_qk @ k, _group_sum(ds_qk.swapaxes(-1, -2) @ q, spec),
               _group_sum((p * factor).swapaxes(-1, -2) @ dout, spec))
    out_size, dq, dk, dv = map(np.sqrt, squares)
    dbias, dscore = _bias_sum(ds, spec), None
    if jacobian is not None and total is not None:
        dscore = _of_any_order(ds, jacobian, total, fine)
    return Results(out_size, row_size, dq, dk, dv, *(None if x is None else np.sqrt(x) for x in (dbias, dscore)))


def _underflow(spec: AttentionSpec) -> float:
    """The least number that keeps its precision in the spec's dtype, and in sums that flush subnormals to zero."""
    dtype, acc = jnp.finfo(spec.dtype), jnp.finfo(spec.acc_dtype)
    return max(float(dtype.smallest_normal), float(acc.smallest_normal) / float(acc.eps), 1e-150)


def _bhld(x: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)


def _scores(spec: AttentionSpec, q: np.ndarray, k: np.ndarray, operands: Operands,
            keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """S, -inf where a pair does not attend, and its derivatives by scale Q K^T and by the score function's array."""
    s, slope = q @ k.swapaxes(-1, -2) * q.dtype.type(spec.scale), np.ones((), q.dtype)
    if spec.softcap is not None:
        t = np.tanh(s / q.dtype.type(spec.softcap))
        s, slope = q.dtype.type(spec.softcap) * t, 1 - t * t
    jacobian = None
    if spec.score is not None:
        s, own_slope, jacobian = _after(spec, operands, s)
        slope = slope * own_slope
    if operands.bias is not None:
        s = s + np.where(keep, operands.bias, 0).astype(q.dtype)
    return np.where(keep, s, -np.inf), slope, jacobian


def _after(spec: AttentionSpec, operands: Operands,
           s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Scores after the score function, (b h t s), their derivatives, and those by its array, (b h t s, *array)."""
    array = next(iter(operands.score), None)
    given = () if array is None else (np.asarray(array).astype(spec.acc_dtype),)

    def pair(s: Array, given: tuple[Array, ...], *place: Array) -> Array:
        assert spec.score is not None
        after: Array = spec.score.filled(given, operands.score_integers)(s, *place)
        return after

    @jax.jit
    def each(s: Array, given: tuple[Array, ...], *place: Array) -> tuple[Array, tuple[Array, tuple[Array, ...]]]:
        found: tuple[Array, tuple[Array, tuple[Array, ...]]] = jax.vmap(
            jax.value_and_grad(pair, argnums=(0, 1)), (0, None, 0, 0, 0, 0))(s, given, *place)
        return found
    value, (slope, of_array) = each(s.ravel(), given, *(x.ravel().astype(np.int32) for x in np.indices(s.shape)))
    jacobian = np.asarray(of_array[0]).reshape(s.shape + given[0].shape) if given else None
    return np.asarray(value).reshape(s.shape), np.asarray(slope).reshape(s.shape), jacobian


def _score_sum(ds: np.ndarray, jacobian: np.ndarray | None) -> np.ndarray | None:
    """The gradient of the score function's array; None where there is none."""
    return None if jacobian is None else np.tensordot(ds.astype(jacobian.dtype), jacobian, 4)


def _of_any_order(ds: np.ndarray, jacobian: np.ndarray, total: np.ndarray, fine: float) -> np.ndarray:
    """The squared magnitude of the gradient of a score function's array, of the squares of dS.

    Of n terms in random order, the squares of the n partial sums add up to n (total^2 / 3 + squares / 6) on average;
    each is rounded by one roundoff of the accumulation, `fine` in units of the spec's.
    """
    squares = np.tensordot(ds, np.square(jacobian, dtype=float), 4)
    count = np.tensordot((ds > 0).astype(float), (jacobian != 0).astype(float), 4)
    found: np.ndarray = squares + np.square(fine) * count * (np.square(total, dtype=float) / 3 + squares / 6)
    return found


def _softmax(s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, lse (0 on rows that attend to nothing), and which rows those are."""
    row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
    nothing = row_max == -np.inf
    row_max = np.where(nothing, 0, row_max)
    p = np.exp(s - row_max)
    row_sum = np.where(nothing, 1, p.sum(-1, keepdims=True))
    return p / row_sum, (row_max + np.log(row_sum))[..., 0], nothing[..., 0]


def _dropout_factor(spec: AttentionSpec, operands: Operands, acc: np.dtype) -> np.ndarray:
    """0 or 1 / keep_rate for each weight; 1 without dropout."""
    if operands.dropout_seed is None:
        return np.ones((), acc)
    batch, head, q_pos, kv_pos = np.ogrid[: spec.batch, : spec.q_heads, : spec.q_len, : spec.kv_len]
    place = dropout.moved((batch, head, q_pos, kv_pos), operands.dropout_origin)
    kept = jax.jit(dropout.keep, static_argnums=5)(operands.dropout_seed, *place, spec.dropout_rate)
    return np.where(kept, dropout.factor(spec.dropout_rate), 0).astype(acc)


def _group_sum(x: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """Sums over the query heads that share a key head."""
    return x.reshape(spec.batch, spec.kv_heads, spec.group, *x.shape[2:]).sum(axis=2)


def _bias_sum(ds: np.ndarray, spec: AttentionSpec) -> np.ndarray | None:
    """Sums over the axes along which the bias is broadcast; None without a bias."""
    if spec.bias is None:
        return None
    return ds.sum(axis=tuple(axis for axis, size in enumerate(spec.bias.shape) if size == 1), keepdims=True)


def _rounded(results: Results[np.ndarray], spec: AttentionSpec) -> Results[np.ndarray]:
    """Rounds what leaves a kernel in the dtype of its operand to that dtype."""
    out, dq, dk, dv = (x.astype(spec.dtype) for x in (results.out, results.dq, results.dk, results.dv))
    dbias = None if results.dbias is None or spec.bias is None else results.dbias.astype(spec.bias.dtype)
    array = next(iter(scores.floats(spec.score)), None)
    dscore = None if results.dscore is None or array is None else results.dscore.astype(array.dtype)
    return results._replace(out=out, dq=dq, dk=dk, dv=dv, dbias=dbias, dscore=dscore)


def _in_layout(results: Results[np.ndarray], spec: AttentionSpec) -> Results[np.ndarray]:
    return results._replace(out=_bhld(results.out, spec), dq=_bhld(results.dq, spec), dk=_bhld(results.dk, spec),
                            dv=_bhld(results.dv, spec))
