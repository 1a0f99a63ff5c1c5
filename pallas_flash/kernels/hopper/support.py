"""What the Hopper kernels take, as reasons why not; no Mosaic in here, dispatch asks on any machine."""

import jax
import numpy as np

from pallas_flash import masks, padding
from pallas_flash.device import Device
from pallas_flash.filled import Filled, filled_part
from pallas_flash.kernels.hopper.wide import copies
from pallas_flash.kernels.mosaic import mask_rules, traced
from pallas_flash.spec import AttentionSpec

__all__ = ["backward_of", "copies", "is_made_for", "not_measured", "why_not"]

CAPABILITY = (9, 0)
MAX_DIM = 512
MAX_NARROW = 256
"""Of what other kernels run than those of wide heads; also against a cache."""
MAX_ROWS = 64
"""Queries that share a key head, q_len * group, against a cache: the rows of one tile."""


def is_made_for(device: Device) -> bool:
    """Whether it is a GPU that the Hopper kernels run on."""
    return not _device_reasons(device)


def why_not(spec: AttentionSpec, device: Device) -> list[str]:
    """The reasons why the Hopper kernels cannot run `spec` on `device`, each what is needed and what there is, and in
    parentheses what to change to reach them.
    """
    return _device_reasons(device) + _spec_reasons(spec)


def not_measured(spec: AttentionSpec) -> list[str]:
    """What of `spec` the kernels take, but which was not timed on a GPU beside other implementations, each with what to
    do.

    A new kind of kernel enters here, and leaves when its tests and its benchmark have run.
    """
    rules = ((filled_part(spec.mask) is not None, "attention to a cache"),
             (any(type(part) is masks.Dense for part in spec.mask.parts), "a dense mask"),
             (spec.bias is not None, "a bias"), (spec.score is not None, "a score function"),
             (_is_wide(spec), f"a head dimension above {MAX_NARROW}"))
    return [f'{what} has not been measured on a GPU yet (name implementation="hopper" to try it)'
            for is_there, what in rules if is_there]


def backward_of(spec: AttentionSpec) -> str | None:
    """The implementation whose backward follows the forward, if it is another one: there is none of a cache here."""
    return None if filled_part(spec.mask) is None else "xla"


def _is_wide(spec: AttentionSpec) -> bool:
    return max(spec.d, spec.d_v) > MAX_NARROW


def _device_reasons(device: Device) -> list[str]:
    if device.platform != "gpu" or device.capability is None:
        return [f"needs an NVIDIA GPU of compute capability 9.0, device is {device.platform!r}"]
    if device.capability != CAPABILITY:
        return [f"needs compute capability 9.0, device has {'.'.join(map(str, device.capability))}"]
    return []


def _spec_reasons(spec: AttentionSpec) -> list[str]:
    dims = f"d={spec.d}, d_v={spec.d_v}"
    rules = (
        (isinstance(spec.batch, int),
         f"needs a batch size that is a number, batch is {spec.batch} (export one program for each size)"),
        (spec.dtype.name in ("bfloat16", "float16"),
         f"needs bfloat16 or float16, dtype is {spec.dtype.name} (cast query, key and value)"),
        (min(spec.d, spec.d_v) >= 1 and max(spec.d, spec.d_v) <= MAX_DIM,
         f"needs head dimensions from 1 to {MAX_DIM}, {dims}"),
        (spec.score is None or spec.bias is None,
         f"takes a bias or a score function, not both yet, score={spec.score} (let the function add the bias)"),
        (spec.score is None or not _is_wide(spec), "takes a score function with head dimensions up to "
         f"{MAX_NARROW} only, {dims} (in the backward above, P times its derivative finds no room in shared memory)"),
        (spec.bias is None or spec.bias.shape[3] > 1 or spec.kv_len == 1, "takes a bias of keys or of pairs "
         f"(batch, heads, 1 or q_len, kv_len), bias is {spec.bias} (leave it out: it changes lse alone)"),
        (spec.bias is None or spec.bias.dtype.name != "float64" or spec.bias.shape[2] == 1,
         "takes a bias of pairs in 16 or 32 bits only, bias is float64 (cast it)"),
        (not spec.dropout_moved, "takes dropout of whole problems only yet, and this is a part of one that several "
         "devices share (pass dropout_rate=0 where nothing is trained)"),
    )
    found = [reason for holds, reason in rules if not holds]
    found += () if spec.score is None else traced.why_not(spec.score)
    return found + (mask_rules.why_not(spec) if (filled := filled_part(spec.mask)) is None
                    else _cache_reasons(spec, filled))


def _cache_reasons(spec: AttentionSpec, filled: Filled) -> list[str]:
    """Keys in a cache are read by a kernel of their own."""
    rows, padded = spec.q_len * spec.group, padding.padded(spec)
    wide = sorted({type(part).__name__ for part in spec.mask.parts if not all(
        np.dtype(x.dtype) == np.int32 and x.shape[1:] == (1,) for x in jax.tree.leaves(part))})
    rules = (
        (not _is_wide(spec),
         f"needs head dimensions from 1 to {MAX_NARROW} against a cache, d={spec.d}, d_v={spec.d_v}"),
        (padded == spec,
         f"needs head dimensions that are multiples of {padding.UNIT} (TMA strides of 16 bytes) against a cache, which "
         f"is not copied in each step, d={spec.d}, d_v={spec.d_v} (keep query and the cache padded with zeros to "
         f"d={padded.d}, d_v={padded.d_v}, pass scale={spec.scale:g}, and cut out back)"),
        (rows <= MAX_ROWS, f"takes at most {MAX_ROWS} queries that share a key head (q_len * q_heads / kv_heads) "
         f"against a cache, there are {rows} (give it fewer at a time)"),
        (not wide and not filled.rule.has_arrays,
         "takes masks whose arrays are a number for each sequence against a cache only, mask has "
         f"{', '.join(wide) or f'arrays in {filled.rule}'}"),
        (spec.bias is None, "takes no bias against a cache yet"),
        (spec.score is None, f"takes no score function against a cache yet, score={spec.score}"),
        (not spec.dropout_rate and not spec.partial, "takes no dropout and no partial results against a cache yet"),
    )
    return [reason for holds, reason in rules if not holds]
