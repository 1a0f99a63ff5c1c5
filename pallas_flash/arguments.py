"""Single arguments of the public functions: what each accepts, and the errors for anything else."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors, masks
from pallas_flash.arrays import Shaped
from pallas_flash.spec import AttentionSpec, check_dtype

__all__ = [
    "Array", "Boundaries", "Ids", "Integers", "Shaped", "array", "boolean", "dropout_seed", "fitted", "in_bounds",
    "integers", "listed", "names_keywords", "reshape", "score_axes", "segments", "sinks", "window_sides",
]

Array = jax.Array | np.ndarray
"""What the public functions take as arrays."""
Integers = Array | int | Sequence[int]
"""Of each batch entry: an array, one number for all, or a list."""
Ids = Array | Sequence[Sequence[int]]
"""(batch, length) integers."""
Boundaries = Array | Sequence[int]
"""Of sequences in a packed row: (sequences + 1,) integers."""

_CAUSAL, _WINDOW = ("is_causal=True", "mask=Causal()"), ("local_window_size=(left, right)", "mask=Window(left, right)")
_OFFSET = ("mask=Causal(offset=...)",)
_ELSEWHERE = {
    "causal": _CAUSAL, "is_causal": _CAUSAL, "window_size": _WINDOW, "local_window_size": _WINDOW, "window": _WINDOW,
    "sliding_window": _WINDOW, "attn_mask": ("mask=Dense(array) or bias=array",),
    "attention_mask": ("mask=Dense(array)",), "dropout_p": ("dropout_rate=",), "softmax_scale": ("scale=",),
    "sm_scale": ("scale=",), "soft_cap": ("softcap=",), "logits_soft_cap": ("softcap=",),
    "return_residual": ("return_lse=True",), "return_lse": ("return_residual=True",),
    "query_seq_lengths": ("q_lengths=",), "key_value_seq_lengths": ("kv_lengths=",),
    "score_mod": ("score=",), "alibi_slopes": ("score=ALiBi(slopes)",),
    "learnable_sink": ("sinks=",), "s_aux": ("sinks=",), "softmax_offset": ("sinks=",),
    "q_lengths": ("query_seq_lengths=",), "kv_lengths": ("key_value_seq_lengths=",),
    "cu_seqlens": ("cu_seqlens_q=",), "cu_seqlens_k": ("cu_seqlens_kv=",), "max_seqlen": ("max_seqlen_q=",),
    "max_seqlen_k": ("max_seqlen_kv=",), "causal_offset": _OFFSET, "offset": _OFFSET,
}
"""Names of arguments in other attention libraries -> what to pass here: the first that the function has."""
_OF_ARRAYS = {
    "attn_mask": "pass mask=array or bias=array", "attention_mask": "pass mask=array",
    **dict.fromkeys(("causal_offset", "offset"), "call flash_attention, which takes mask=Causal(offset=...)"),
}
"""The same for a function whose mask is an array, `dot_product_attention`."""


def names_keywords[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Wraps `function` so that an unknown keyword raises a TypeError that names the keyword that is meant."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        for name in keywords:
            if name not in known:
                raise _no_keyword(function.__name__, name, known, keywords)
        return function(*args, **keywords)
    return call


def _no_keyword(function: str, name: str, known: list[str], keywords: Mapping[str, object]) -> TypeError:
    here = [clause for clause in _ELSEWHERE.get(name, ()) if clause.split("=")[0] in known]
    if "broadcast_dropout" in keywords:
        do = "give a Flax layer attention_fn=pallas_flash.flax.dot_product_attention, which takes what Flax passes"
    elif name == "enable_gqa":
        do = "leave it out: the heads of key may divide those of query"
    elif name == "score":
        do = "call flash_attention, which has it, on one device; what is added to the scores can be a bias"
    elif "is_causal" in known and name in _OF_ARRAYS:
        do = _OF_ARRAYS[name]
    elif here:
        do = f"pass {here[0]}"
    elif close := difflib.get_close_matches(name, known, 1):
        do = f"pass {close[0]}="
    else:
        do = f"it has {', '.join(known)}"
    value = keywords[name]
    shown = repr(value) if isinstance(value, bool | int | float | str | tuple | None) else type(value).__name__
    return errors.mistyped(f"{function}() has no argument `{name}`", f"{name}={shown}", do)


def _is_array(x: object) -> TypeGuard[Shaped]:
    return hasattr(x, "shape") and hasattr(getattr(x, "dtype", None), "name")


def array(name: str, x: object) -> Shaped:
    """Returns `x` unchanged if it is an array: converting to JAX would round float64 before it is checked."""
    if _is_array(x):
        return x
    do = "pass a JAX or NumPy array"
    if errors.is_torch(x):
        do += ", or PyTorch tensors to torch_bridge.flash_attention"
    elif isinstance(x, masks.Mask):
        do += "; flash_attention takes a rule as its mask"
    raise errors.invalid(f"{name} must be an array", f"type({name})={type(x).__name__}", do)


def listed(name: str, x: object) -> Shaped:
    """Converts a number, or lists of them, to a NumPy array of integers; returns an array unchanged. Lists that hold
    numbers of a program that is being traced become a JAX array.
    """
    if not isinstance(x, int | float | list | tuple):
        return array(name, x)
    try:
        found = _converted(x)
    except (ValueError, TypeError) as error:
        raise errors.invalid(f"{name} must be lists of equal lengths, or an array", f"{name}={x!r}",
                             "pad the shorter ones") from error
    if isinstance(found, jax.Array):
        return found
    if not found.size:  # NumPy takes the type of no number for float64
        return found.astype(np.int32)
    if found.dtype.kind not in "iub":
        raise errors.invalid(f"{name} must hold integers", f"{name}={x!r}", "pass integers, or an array of them")
    return found


def _converted(x: object) -> jax.Array | np.ndarray:
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(x)


def reshape(x: Shaped, shape: tuple[int, ...]) -> Shaped:
    """Reshapes an array, or the `ShapeDtypeStruct` that stands for one."""
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)


def score_axes(spec: AttentionSpec) -> dict[str, int]:
    """The axes of the scores of a problem, by name."""
    return dict(batch=spec.batch, q_heads=spec.q_heads, q_len=spec.q_len, kv_len=spec.kv_len)


def fitted(name: str, x: object, axes: dict[str, int], exact: str = "",
           do: str = "reshape it: missing axes are added in front") -> Shaped:
    """Adds missing axes of size 1 in front of `x`, so that it has all of `axes`.

    Raises ValueError, which ends in `do`, unless each axis has its size or, except for `exact`, size 1.
    """
    x = array(name, x)
    shape = (1,) * (len(axes) - len(x.shape)) + tuple(x.shape)
    if len(shape) != len(axes) or any(
            size != full and (size != 1 or axis == exact) for size, (axis, full) in zip(shape, axes.items())):
        wanted = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise errors.invalid(f"{name} must broadcast to ({wanted})", f"{name}.shape={tuple(x.shape)}", do)
    return reshape(x, shape)


def boolean(name: str, x: Shaped) -> Shaped:
    """Returns `x` unchanged if it is boolean, else raises ValueError."""
    if x.dtype != jnp.bool_:
        raise errors.invalid(f"{name} must be boolean", f"{name}.dtype={x.dtype}", "pass an additive mask as `bias`")
    return x


def integers(name: str, x: Shaped) -> Shaped:
    """Returns `x` unchanged if it holds integers, else raises ValueError."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise errors.invalid(f"{name} must hold integers", f"{name}.dtype={x.dtype}", "cast it to int32")
    return x


def in_bounds(spec: AttentionSpec, q_lengths: object, kv_lengths: object,
              names: tuple[str, str] = ("q_lengths", "kv_lengths")) -> masks.Mask:
    """The mask of the lengths of queries and keys, each None for all; `names` are the caller's words for them."""
    if q_lengths is None and kv_lengths is None:
        return masks.Full()
    return masks.InBounds(_lengths(names[0], q_lengths, spec, "q_len"), _lengths(names[1], kv_lengths, spec, "kv_len"))


def _lengths(name: str, x: object, spec: AttentionSpec, axis: str) -> Shaped | int:
    if x is None:
        return masks.UNBOUNDED
    array, do = listed(name, x), "reshape it: missing axes are added in front"
    if len(array.shape) > 1 and array.shape[-1] == getattr(spec, axis) > 1:
        place = "None, None, :" if axis == "kv_len" else "None, :, None"
        do = ("count the real positions of each row; an array that marks them is a mask, "
              f"Dense((x != 0)[:, {place}]), or segment_ids, -1 at padding")
    lengths = integers(name, fitted(name, array, {"batch": spec.batch}, do=do))
    masks.check_lengths(name, lengths)
    return lengths


def segments(spec: AttentionSpec, segment_ids: object) -> masks.SegmentIds:
    """The mask of segment ids: one array for both sides, or a tuple (q_ids, kv_ids)."""
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
    return integers(name, fitted(name, listed(name, ids), dict(batch=batch, length=length), exact="length"))


def sinks(spec: AttentionSpec, x: object) -> Shaped:
    """Returns `x` unchanged if it is one logit a query head, else raises ValueError."""
    x = array("sinks", x)
    if tuple(x.shape) != (spec.q_heads,):
        raise errors.invalid(f"sinks must have shape (q_heads,) = ({spec.q_heads},)", f"sinks.shape={tuple(x.shape)}",
                             "give one logit a query head; under shard_map, of the shard's heads")
    check_dtype("sinks", x)
    return x


def window_sides(size: object) -> tuple[int, int]:
    """(left, right) from `local_window_size`."""
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    if _is_count(left) and _is_count(right):
        return int(left), int(right)
    raise errors.invalid("local_window_size must be an integer >= 0 or a pair (left, right) of them",
                         f"local_window_size={size!r}", "count the keys visible on each side")


def _is_count(x: object) -> TypeGuard[int]:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= 0)


def dropout_seed(spec: AttentionSpec, rng: Array | None) -> jax.Array | None:
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
