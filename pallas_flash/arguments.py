"""Single arguments of the public functions: what is taken for each, and what is said of anything else."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors, masks
from pallas_flash.arrays import Shaped
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Array", "Ids", "Integers", "Shaped", "array", "boolean", "dropout_seed", "fitted", "in_bounds", "names_keywords",
    "reshape", "score_axes", "segments", "window_sides",
]

Array = jax.Array | np.ndarray
"""What holds numbers: nothing is converted but these."""
Integers = Array | int | Sequence[int]
"""Of each batch entry: an array, one number for all, or a list."""
Ids = Array | Sequence[Sequence[int]]
"""(batch, length) integers."""

_CAUSAL, _WINDOW = ("is_causal=True", "mask=Causal()"), ("local_window_size=(left, right)", "mask=Window(left, right)")
_ELSEWHERE = {
    "causal": _CAUSAL, "is_causal": _CAUSAL, "window_size": _WINDOW, "local_window_size": _WINDOW, "window": _WINDOW,
    "sliding_window": _WINDOW, "attn_mask": ("mask=Dense(array) or bias=array",),
    "attention_mask": ("mask=Dense(array)",), "dropout_p": ("dropout_rate=",), "softmax_scale": ("scale=",),
    "sm_scale": ("scale=",), "soft_cap": ("softcap=",), "logits_soft_cap": ("softcap=",),
    "return_residual": ("return_lse=True",), "return_lse": ("return_residual=True",),
    "query_seq_lengths": ("q_lengths=",), "key_value_seq_lengths": ("kv_lengths=",),
    "q_lengths": ("query_seq_lengths=",), "kv_lengths": ("key_value_seq_lengths=",),
}
"""What other attention functions call it: what it is here, the first of those that a function has."""


def names_keywords[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which says of a keyword that it does not have which one is meant, as a TypeError of our form."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        for name in keywords:
            if name not in known:
                raise _no_keyword(function.__name__, name, known, keywords)
        return function(*args, **keywords)
    return call


def _no_keyword(function: str, name: str, known: list[str], keywords: Mapping[str, object]) -> TypeError:
    def meant(name: str) -> list[str]:
        return [clause for clause in _ELSEWHERE.get(name, ()) if clause.split("=")[0] in known]

    here = meant(name)
    if "broadcast_dropout" in keywords:
        do = "give a Flax layer attention_fn=pallas_flash.flax.dot_product_attention, which takes what Flax passes"
    elif name == "enable_gqa":
        do = "leave it out: the heads of key may divide those of query"
    elif here:
        do = f"pass {here[0]}"
    elif close := difflib.get_close_matches(name, [*known, *filter(meant, _ELSEWHERE)], 1):
        do = f"pass {close[0]}=" if close[0] in known else f"pass {meant(close[0])[0]}"
    else:
        do = f"it has {', '.join(known)}"
    value = keywords[name]
    shown = repr(value) if isinstance(value, bool | int | float | str | tuple | None) else type(value).__name__
    return errors.mistyped(f"{function}() has no argument `{name}`", f"{name}={shown}", do)


def array(name: str, x: Any) -> Shaped:
    """`x` unchanged if it is an array: converting to JAX would round float64 before it is checked."""
    if hasattr(x, "shape") and hasattr(getattr(x, "dtype", None), "name"):
        return x
    do = "pass a JAX or NumPy array"
    if errors.is_torch(x):
        do += ", or PyTorch tensors to torch_bridge.scaled_dot_product_attention"
    elif isinstance(x, masks.Mask):
        do += "; flash_attention takes a rule as its mask"
    raise errors.invalid(f"{name} must be an array", f"type({name})={type(x).__name__}", do)


def _listed(name: str, x: object) -> Shaped:
    """Integers as a NumPy array if they are a number or in lists."""
    if not isinstance(x, int | float | list | tuple):
        return array(name, x)
    try:
        found = np.asarray(x)
    except ValueError as error:
        raise errors.invalid(f"{name} must be lists of equal lengths, or an array", f"{name}={x!r}",
                             "pad the shorter ones") from error
    if found.dtype.kind not in "iub" or not found.size:
        raise errors.invalid(f"{name} must hold integers", f"{name}={x!r}", "pass integers, or an array of them")
    return found


def reshape(x: Shaped, shape: tuple[int, ...]) -> Shaped:
    """An array, or what stands for one, in another shape."""
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)


def score_axes(spec: AttentionSpec) -> dict[str, int]:
    """The axes of the scores of a problem, by name."""
    return dict(batch=spec.batch, q_heads=spec.q_heads, q_len=spec.q_len, kv_len=spec.kv_len)


def fitted(name: str, x: object, axes: dict[str, int], exact: str = "",
           do: str = "reshape it: missing axes are added in front") -> Shaped:
    """`x` with all of `axes`, missing ones in front added with size 1; each may be 1 but `exact`; else `do`."""
    x = array(name, x)
    shape = (1,) * (len(axes) - len(x.shape)) + tuple(x.shape)
    if len(shape) != len(axes) or any(
            size != full and (size != 1 or axis == exact) for size, (axis, full) in zip(shape, axes.items())):
        wanted = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise errors.invalid(f"{name} must broadcast to ({wanted})", f"{name}.shape={tuple(x.shape)}", do)
    return reshape(x, shape)


def boolean(name: str, x: Shaped) -> Shaped:
    """`x` unchanged if it is boolean."""
    if x.dtype != jnp.bool_:
        raise errors.invalid(f"{name} must be boolean", f"{name}.dtype={x.dtype}", "pass an additive mask as `bias`")
    return x


def _integers(name: str, x: Shaped) -> Shaped:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise errors.invalid(f"{name} must hold integers", f"{name}.dtype={x.dtype}", "cast it to int32")
    return x


def in_bounds(spec: AttentionSpec, **lengths: object) -> masks.Mask:
    """What the lengths of queries and keys, in this order, leave; named as the caller's arguments."""
    if all(x is None for x in lengths.values()):
        return masks.Full()
    bounds = (_lengths(name, x, spec, axis) for (name, x), axis in zip(lengths.items(), ("q_len", "kv_len")))
    return masks.InBounds(*bounds)


def _lengths(name: str, x: object, spec: AttentionSpec, axis: str) -> Shaped | int:
    if x is None:
        return masks.UNBOUNDED
    array, do = _listed(name, x), "reshape it: missing axes are added in front"
    if len(array.shape) > 1 and array.shape[-1] == getattr(spec, axis) > 1:
        place = "None, None, :" if axis == "kv_len" else "None, :, None"
        do = ("count the real positions of each row; an array that marks them is a mask, "
              f"Dense((x != 0)[:, {place}]), or segment_ids, -1 at padding")
    lengths = _integers(name, fitted(name, array, {"batch": spec.batch}, do=do))
    masks.check_lengths(name, lengths)
    return lengths


def segments(spec: AttentionSpec, segment_ids: object) -> masks.SegmentIds:
    """The mask of an array of segment ids, or of a tuple of those of queries and keys."""
    lengths = (spec.q_len, spec.kv_len)
    if not isinstance(segment_ids, tuple):
        if spec.q_len != spec.kv_len:
            raise errors.invalid("segment_ids must be a tuple (q_ids, kv_ids) where query and key differ in length",
                                 f"q_len={spec.q_len}, kv_len={spec.kv_len}", "pass the ids of both")
        ids = _segment_axis("segment_ids", segment_ids, spec.batch, spec.q_len)
        return masks.SegmentIds(ids, ids)
    if len(segment_ids) != 2:
        raise errors.invalid("segment_ids must be an array, or a tuple (q_ids, kv_ids)",
                             f"len(segment_ids)={len(segment_ids)}", "pass integers of shape (batch, length)")
    return masks.SegmentIds(*(_segment_axis(f"segment_ids[{i}]", ids, spec.batch, length)
                              for i, (ids, length) in enumerate(zip(segment_ids, lengths))))


def _segment_axis(name: str, ids: object, batch: int, length: int) -> Shaped:
    return _integers(name, fitted(name, _listed(name, ids), dict(batch=batch, length=length), exact="length"))


def window_sides(size: Any) -> tuple[int, int]:
    """(left, right) from `local_window_size`."""
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    for side in (left, right):
        if not isinstance(side, int | np.integer) or isinstance(side, bool) or side < 0:
            raise errors.invalid("local_window_size must be an integer >= 0 or a pair (left, right) of them",
                                 f"local_window_size={size!r}", "count the keys visible on each side")
    return int(left), int(right)


def dropout_seed(spec: AttentionSpec, rng: Any) -> jax.Array | None:
    """(2,) uint32 from a PRNG key, or None where nothing is random."""
    if not spec.dropout_rate:
        return None
    if rng is None:
        raise errors.invalid("dropout_rng must be given when dropout_rate > 0", f"dropout_rate={spec.dropout_rate}, "
                             "dropout_rng=None", "pass a JAX PRNG key, a new one for every call")
    if errors.is_torch(rng):
        array("dropout_rng", rng)
    if hasattr(rng, "dtype") and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.shape == ():
        return jax.random.bits(rng, (2,), "uint32")
    if hasattr(rng, "dtype") and rng.dtype == jnp.uint32 and rng.shape == (2,):
        return jnp.asarray(rng)
    raise errors.invalid("dropout_rng must be one JAX PRNG key, or uint32 of shape (2,)",
                         f"dropout_rng with dtype={getattr(rng, 'dtype', type(rng).__name__)}, "
                         f"shape={getattr(rng, 'shape', None)}", "make one with jax.random.key(seed)")
