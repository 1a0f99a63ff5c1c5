"""Problems of the catalogue spread over virtual devices, and brought back into their own order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import pallas_flash
from pallas_flash import InBounds, SegmentIds
from pallas_flash.masks import Dense
from pallas_flash.packed import Packed
from pallas_flash.testing import conformance
from pallas_flash.testing.textbook import Results

AXIS = "sequence"


def why_not(problem):
    """Why a problem of the catalogue is none of a sequence over devices, or None."""
    if problem.q_len != problem.kv_len:
        return "queries and keys differ in length"
    if problem.score is not None:
        return "a score function"
    if any(isinstance(part, Dense) for part in problem.mask.parts):
        return "a dense mask"
    if any(isinstance(part, Packed) for part in problem.mask.parts):
        return "a mask of packed sequences, which are given as documents"
    return "heads before length" if problem.layout == "BHLD" else None


def mesh_of(n):
    return jax.make_mesh((n,), (AXIS,), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))


def results(problem, operands, cotangents, n, **options):
    """`textbook.Results` of a problem, computed by n devices: padded to a length that divides, and cut back."""
    length = math.ceil(problem.q_len / (2 * n)) * 2 * n
    balance = options.get("load_balance", "zigzag")
    there = functools.partial(_there, problem.q_len, length, n, balance)
    ids, mask = None, InBounds(problem.q_len, problem.kv_len)
    for part in operands.mask.parts:
        if isinstance(part, SegmentIds):
            ids = tuple(there(x[:, 0], axis=1, value=-1) for x in (part.q_ids, part.kv_ids))
        else:
            mask = part & mask
    q, k, v, bias = (None if x is None else jnp.asarray(x) for x in operands.differentiable[:4])
    dout, dlse = cotangents
    for axis in (2, 3):
        bias = bias if bias is None or bias.shape[axis] == 1 else there(bias, axis=axis)

    def call(q, k, v, bias):
        return pallas_flash.context_parallel_attention(
            q, k, v, axis_name=AXIS, mask=mask, segment_ids=ids, bias=bias, scale=problem.scale,
            softcap=problem.softcap, dropout_rate=problem.dropout_rate, dropout_rng=operands.dropout_seed,
            deterministic=problem.deterministic, return_lse=True, mesh=mesh_of(n), spec=PartitionSpec(None, AXIS),
            **options)

    @functools.partial(jax.jit, compiler_options=conformance._fast_to_compile())
    def both(given, dout, dlse):
        found, vjp = jax.vjp(call, *given)
        return found, vjp((dout, dlse))
    (out, lse), (dq, dk, dv, dbias) = both((*(there(x, axis=1) for x in (q, k, v)), bias), there(dout, axis=1),
                                           there(dlse, axis=2))
    back = functools.partial(_back, problem.q_len, n, balance)
    for axis in (2, 3):
        dbias = dbias if dbias is None or dbias.shape[axis] == 1 else back(dbias, axis=axis)
    return Results(out=back(out, axis=1), lse=back(lse, axis=2), dq=back(dq, axis=1), dk=back(dk, axis=1),
                   dv=back(dv, axis=1), dbias=None if dbias is None else np.asarray(dbias))


def _there(real, length, n, balance, x, axis, value=0):
    x = np.asarray(x)
    pad = [(0, length - real if i == axis else 0) for i in range(x.ndim)]
    return jnp.asarray(pallas_flash.reorder(np.pad(x, pad, constant_values=value), n, axis, load_balance=balance))


def _back(real, n, balance, x, axis):
    x = pallas_flash.reorder(np.asarray(x), n, axis, inverse=True, load_balance=balance)
    return np.take(x, np.arange(real), axis=axis)


