"""Inputs for a spec: seeded random operands and cotangents, and NaN wherever it must not matter."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks
from pallas_flash.arrays import Array
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["Cotangents", "Normal", "attends", "cotangents", "device_normal", "host_normal", "operands", "poisoned",
           "with_scores_of"]

Normal = Callable[[int, tuple[int, ...], np.dtype], Any]
"""(seed, shape, dtype) -> standard normal numbers, an array of NumPy's or of JAX's."""

Cotangents = tuple[np.ndarray, np.ndarray]
"""The cotangents of out and lse."""


def host_normal(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Standard normal numbers, drawn in float64 and rounded to `dtype`, as a numpy array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def device_normal(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Standard normal numbers made on the default device: for problems too large to send there."""
    drawn: jax.Array = jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, dtype)
    return drawn


def operands(spec: AttentionSpec, mask: masks.Mask, *, seed: int = 0, row_lse: float | None = None,
             bias_size: float = 1.0, bias_masks: bool = False, normal: Normal = host_normal) -> Operands:
    """Random operands of a spec without a score function.

    Args:
      mask: the spec's mask with its arrays.
      row_lse: if given, the first component of q and k shifts the scores of each query by a constant, from -row_lse in
        the first row to row_lse in the last, so that lse does too.
      bias_size: standard deviation of the bias.
      bias_masks: a fifth of the bias is -inf.
      normal: where and how numbers are drawn.
    """
    k_shape = spec.shape(spec.kv_len, spec.kv_heads, spec.d)
    q, k, v = (normal(3 * seed + i, shape, spec.dtype) for i, shape in enumerate(
        (spec.shape(spec.q_len, spec.q_heads, spec.d), k_shape, (*k_shape[:3], spec.d_v))))
    if row_lse is not None:
        rows = np.linspace(-row_lse, row_lse, spec.q_len) / spec.scale
        q[..., 0], k[..., 0] = (rows[:, None] if spec.layout == "BLHD" else rows), 1
    bias = None
    if spec.bias is not None:
        bias = (host_normal(3 * seed + 4, spec.bias.shape, np.dtype(np.float64)) * bias_size).astype(spec.bias.dtype)
        if bias_masks:
            bias[np.random.default_rng(seed).random(bias.shape) < 0.2] = -np.inf
    dropout_seed = np.array([0x9E3779B9, seed], np.uint32) if spec.dropout_rate else None
    return Operands(q=q, k=k, v=v, bias=cast(Array | None, bias), score=(), mask=mask.canonical(),
                    score_integers=(), dropout_seed=cast(Array | None, dropout_seed), dropout_origin=None,
                    page_table=None)


def with_scores_of(size: float, operands: Operands) -> Operands:
    """Random `operands` whose largest scores become about `size`, at a scale of 1 / sqrt(d)."""
    largest, factor = 0.9 * float(jnp.finfo(operands.q.dtype).max), np.sqrt(size / 3)
    q, k = (np.clip(factor * np.asarray(x, np.float64), -largest, largest).astype(x.dtype)
            for x in (operands.q, operands.k))
    return operands._replace(q=q, k=k)


def cotangents(spec: AttentionSpec, *, seed: int = 0, normal: Normal = host_normal) -> Cotangents:
    """Random cotangents of out (the spec's layout and dtype) and lse (batch, q_heads, q_len)."""
    return (normal(1000 + 2 * seed, spec.out_shape, spec.dtype),
            normal(1001 + 2 * seed, spec.lse_shape, spec.acc_dtype))


def attends(spec: AttentionSpec, operands: Operands) -> np.ndarray:
    """Which pairs attend, (batch, q_heads, q_len, kv_len) booleans, by mask and by a bias of -inf."""
    keep = np.asarray(_mask_keeps(operands.mask, spec.q_len, spec.kv_len))
    if operands.bias is not None:
        keep = keep & (operands.bias != -np.inf)
    return np.broadcast_to(keep, (spec.batch, spec.q_heads, spec.q_len, spec.kv_len))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mask_keeps(mask: masks.Mask, q_len: int, kv_len: int) -> Array:
    q_pos, kv_pos = jnp.arange(q_len, dtype=jnp.int32)[:, None], jnp.arange(kv_len, dtype=jnp.int32)[None, :]
    return masks.over_batch(mask, lambda part: part.keep(q_pos, kv_pos))


def poisoned(spec: AttentionSpec, operands: Operands, value: float = np.nan) -> Operands:
    """`operands` with `value` in every place that must not change a result.

    That is in queries that attend to nothing, in keys and values that no query attends to, and in the bias of pairs
    that do not attend.
    """
    keep = attends(spec, operands)
    idle_q = ~keep.any(axis=3)
    idle_kv = ~keep.reshape(spec.batch, spec.kv_heads, -1, spec.kv_len).any(axis=2)
    q = _overwritten(operands.q, idle_q, value, spec)
    k, v = (_overwritten(x, idle_kv, value, spec) for x in (operands.k, operands.v))
    bias = operands.bias
    if bias is not None:
        axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        unused = np.broadcast_to(~keep.any(axis=axes, keepdims=True), bias.shape) & (bias != -np.inf)
        bias = cast(Array, np.where(unused, np.asarray(value, bias.dtype), bias))
    return operands._replace(q=q, k=k, v=v, bias=bias)


def _overwritten(array: Array, idle: np.ndarray, value: float, spec: AttentionSpec) -> Array:
    """`idle` is (batch, heads, length)."""
    rows = idle if spec.layout == "BHLD" else idle.swapaxes(1, 2)
    return cast(Array, np.where(rows[..., None], np.asarray(value, array.dtype), array))
