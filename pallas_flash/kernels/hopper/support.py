"""What the Hopper kernels take, as reasons why not; no Mosaic in here, dispatch asks on any machine."""

import numpy as np

from pallas_flash import dropout, padding
from pallas_flash.device import Device
from pallas_flash.filled import Filled, filled_part
from pallas_flash.kernels.hopper import compiler, wide
from pallas_flash.kernels.mosaic import cache_rules, mask_rules, mask_score, prefill, score_rules
from pallas_flash.spec import AttentionSpec

__all__ = ["backward_of", "copies", "finds_lost", "is_made_for", "is_wide", "not_measured", "takes_sinks", "why_not"]

CAPABILITY = (9, 0)
MAX_DIM = 512
MAX_NARROW = 256
"""Of what other kernels run than those of wide heads."""
MAX_DIM_FLOAT32 = 128
KERNELS_MERGE = True
"""Whether kernels merge results of parts (`merging`): off only to compare them with XLA's merging."""
BYTES_UNIT = 32
"""Of head dimensions where keys and values are of eight bits: what all threads of a warpgroup convert at a time."""


def is_made_for(device: Device) -> bool:
    """Whether it is a GPU that the Hopper kernels run on."""
    return not _device_reasons(device)


def why_not(spec: AttentionSpec, device: Device) -> list[str]:
    """The reasons why the Hopper kernels cannot run `spec` on `device`, each what is needed and what there is, and in
    parentheses what to change to reach them.
    """
    return (_device_reasons(device) or _compiler_reasons()) + _spec_reasons(spec)


FLOAT32_WAITS = ('float32 is 4.6 to 7.5 times as fast as "xla" on an H200, and is to be 5 times as fast in both passes '
                 'of every head dimension before it is chosen (name implementation="hopper" to take it)')
"""Causal: forward 6.8, both passes 4.6 at B4 S4096 H16 d 128; 7.5 and 6.3 at B2 S2048 H16 d 64
(docs/notes/hopper_features.md, 2026-11-30).
"""


def not_measured(spec: AttentionSpec) -> list[str]:
    """What of `spec` runs by name alone, as reasons, each with what to do: kernels that were not timed on a GPU beside
    other implementations, or are not yet as fast as they are to be.

    A new kind of kernel enters here, and leaves when its tests and its benchmark have run.
    """
    of_prefill: list[str] = []
    if prefill.is_needed(spec):
        of_prefill, spec = prefill.not_measured(spec), prefill.ordinary(spec)
    rules = (*((True, what) for what in of_prefill),
             (bool(spec.dropout_moved), "dropout of a part of a problem"),
             (bool(mask_score.own_parts(spec)), "a mask class of your own with or beside arrays"),
             (is_wide(spec), f"the backward of a head dimension above {MAX_NARROW}"),
             (spec.cache_scales is not None, "a cache in eight bits"))
    untimed = [f'{what} has not been measured on a GPU yet (name implementation="hopper" to try it)'
               for is_there, what in rules if is_there]
    return untimed + [FLOAT32_WAITS] * _is_float32(spec)


def backward_of(spec: AttentionSpec) -> str | None:
    """The implementation whose backward follows the forward, if it is another one: there is none of a cache here."""
    return None if filled_part(spec.mask) is None else "xla"


def copies(spec: AttentionSpec) -> padding.Copies | None:
    """What is copied around the kernels, because they compute another problem."""
    if prefill.is_needed(spec):
        return prefill.copies(spec, wide.copies(prefill.ordinary(spec)))
    return wide.copies(spec)


def finds_lost(spec: AttentionSpec) -> bool:
    """Whether the forward is the kernel against a cache, which gives NaN for sequences that have lost keys."""
    return prefill.is_decoding(spec)


def takes_sinks(spec: AttentionSpec) -> bool:
    """Whether the forward computes `AttentionSpec.sinks`: against a cache; and in the epilogue, unless a bias moves the
    scores of a row (`AttentionSpec.anchor`), or inputs are float32.
    """
    if prefill.is_needed(spec):
        return takes_sinks(prefill.ordinary(spec))
    in_epilogue = spec.bias is None and not (_is_float32(spec) or is_wide(spec) or spec.partial)
    return filled_part(spec.mask) is not None or in_epilogue


def _is_float32(spec: AttentionSpec) -> bool:
    return spec.dtype == np.float32


def is_wide(spec: AttentionSpec) -> bool:
    """Whether heads have more columns than one accumulator."""
    return max(spec.d, spec.d_v) > MAX_NARROW


def _device_reasons(device: Device) -> list[str]:
    if device.platform != "gpu" or device.capability is None:
        return [f"needs an NVIDIA GPU of compute capability 9.0, device is {device.platform!r}"]
    if device.capability != CAPABILITY:
        return [f"needs compute capability 9.0, device has {'.'.join(map(str, device.capability))}"]
    return []


def _compiler_reasons() -> list[str]:
    """Of the process, not of the device: what compiles here is asked where there is a GPU."""
    reason = compiler.why_not()
    return [] if reason is None else [reason]


def _spec_reasons(spec: AttentionSpec) -> list[str]:
    if prefill.is_needed(spec):
        return prefill.why_not(spec, _spec_reasons)
    dims = f"d={spec.d}, d_v={spec.d_v}"
    rules = (
        (isinstance(spec.batch, int),
         f"needs a batch size that is a number, batch is {spec.batch} (export one program for each size)"),
        (spec.dtype.name in ("bfloat16", "float16", "float32"),
         f"needs bfloat16, float16 or float32, dtype is {spec.dtype.name} (cast query, key and value)"),
        (min(spec.d, spec.d_v) >= 1 and max(spec.d, spec.d_v) <= MAX_DIM,
         f"needs head dimensions from 1 to {MAX_DIM}, {dims}"),
        (mask_score.hiding(spec).score is None or not is_wide(spec),
         "takes a score function, or a mask class of your own with or beside arrays, with head dimensions up to "
         f"{MAX_NARROW} only, {dims} (above, the backward has no room in shared memory for P times its derivative)"),
        (spec.dropout_moved % dropout.UNIT == 0,
         f"needs dropout of parts of a problem that begin at multiples of {dropout.UNIT} positions, this one begins at "
         f"a multiple of {spec.dropout_moved} (pad the sequence)"),
    )
    found = [reason for holds, reason in rules if not holds]
    found += _float32_reasons(spec) if _is_float32(spec) else []
    if (filled := filled_part(spec.mask)) is not None:
        return found + score_rules.why_not(spec) + cache_rules.why_not(spec, filled) + _reasons_in_eight_bits(spec)
    if reasons := mask_score.why_not(spec):
        return found + score_rules.why_not(spec) + reasons
    return found + score_rules.why_not(mask_score.hiding(spec)) + mask_rules.why_not(mask_score.hiding(spec))


def _float32_reasons(spec: AttentionSpec) -> list[str]:
    """Float32 inputs have kernels of their own, which lack some features."""
    cast = "cast query, key and value to bfloat16 or float16"
    rules = (
        (max(spec.d, spec.d_v) <= MAX_DIM_FLOAT32,
         f"needs head dimensions from 1 to {MAX_DIM_FLOAT32} in float32, d={spec.d}, d_v={spec.d_v} ({cast})"),
        (spec.bias is None, f"takes no bias in float32 yet, bias is {spec.bias} ({cast})"),
        (spec.score is None, f"takes no score function in float32 yet, score={spec.score} ({cast})"),
        (not mask_score.own_parts(spec),
         f"takes no mask class of your own with or beside arrays in float32 yet ({cast})"),
        (not spec.dropout_rate, f"takes no dropout in float32 yet, dropout_rate={spec.dropout_rate:g} ({cast})"),
        (filled_part(spec.mask) is None, f"needs bfloat16 or float16 against a cache, dtype is float32 ({cast})"),
    )
    return [reason for holds, reason in rules if not holds]


def _reasons_in_eight_bits(spec: AttentionSpec) -> list[str]:
    """What else holds of a cache in eight bits: values that are not finite are told apart in 16 bits alone."""
    if spec.cache_scales is None:
        return []
    rules = (
        (spec.d % BYTES_UNIT == 0 == spec.d_v % BYTES_UNIT,
         f"needs head dimensions that are multiples of {BYTES_UNIT} against a cache in eight bits, d={spec.d}, "
         f"d_v={spec.d_v} (keep query and the cache padded with zeros)"),
        (spec.pages is None or all(rows == 1 for rows, _ in spec.cache_scales),
         "takes scales of each head alone with pages in eight bits yet, not of each page"),
        (spec.q_len == 1 and spec.bias is None,
         f"takes one query of each head and no bias against a cache in eight bits yet, q_len={spec.q_len}, "
         f"bias={spec.bias}"),
        (all(type(rule) in mask_rules.INTERVAL_RULES for part in spec.mask.parts
             for rule in (part.rule.parts if isinstance(part, Filled) else (part,))),
         f"takes masks that are intervals of keys alone against a cache in eight bits yet, mask={spec.mask}"),
    )
    return [reason for holds, reason in rules if not holds]
