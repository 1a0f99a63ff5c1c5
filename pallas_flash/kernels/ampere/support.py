"""What the kernels with mma.sync take, as reasons why not; no Mosaic in here, dispatch asks on any machine."""

from pallas_flash import dropout, padding
from pallas_flash.device import Device
from pallas_flash.filled import filled_part
from pallas_flash.kernels.mosaic import cache_rules, mask_rules, prefill, score_rules
from pallas_flash.spec import AttentionSpec

__all__ = ["backward_of", "copies", "finds_lost", "is_made_for", "not_measured", "takes_sinks", "why_not"]

CAPABILITY = (8, 0)
MAX_DIM = 256
_HAS_OTHERS = (9, 0)
"""Of GPUs that run these kernels, too, but have kernels of their own."""


def is_made_for(device: Device) -> bool:
    """Whether it is a GPU that these kernels were written for: of those that run them, all but Hopper."""
    return not _device_reasons(device) and device.capability != _HAS_OTHERS


def why_not(spec: AttentionSpec, device: Device) -> list[str]:
    """The reasons why the kernels cannot run `spec` on `device`, each what is needed and what there is, and in
    parentheses what to change to reach them.
    """
    return _device_reasons(device) + _spec_reasons(spec)


def not_measured(spec: AttentionSpec) -> list[str]:
    """What of `spec` the kernels take, but have not computed on any GPU in our tests, each with what to do. What they
    have, they have on an H200 alone.
    """
    of_prefill: list[str] = []
    if prefill.is_needed(spec):
        of_prefill, spec = prefill.not_measured(spec), prefill.ordinary(spec)
    rules = (*((True, what) for what in of_prefill),
             (bool(spec.dropout_moved), "dropout of a part of a problem"))
    return [f'{what} has not run on a GPU yet (name implementation="ampere" to try it)'
            for is_there, what in rules if is_there]


def backward_of(spec: AttentionSpec) -> str | None:
    """The implementation whose backward follows the forward, if it is another one: there is none of a cache here."""
    return None if filled_part(spec.mask) is None else "xla"


def copies(spec: AttentionSpec) -> padding.Copies | None:
    """What is copied around the kernels: nothing for the kernel against a cache."""
    if prefill.is_needed(spec):
        return prefill.copies(spec, padding.copies(prefill.ordinary(spec)))
    return padding.copies(spec) if filled_part(spec.mask) is None else None


def finds_lost(spec: AttentionSpec) -> bool:
    """Whether the forward is the kernel against a cache, which gives NaN for sequences that have lost keys."""
    return prefill.is_decoding(spec)


def takes_sinks(spec: AttentionSpec) -> bool:
    """Whether the forward computes `AttentionSpec.sinks`: that against a cache does."""
    return finds_lost(spec)


def _device_reasons(device: Device) -> list[str]:
    needed = "8.0 or higher"
    if device.platform != "gpu" or device.capability is None:
        return [f"needs an NVIDIA GPU of compute capability {needed}, device is {device.platform!r}"]
    if device.capability < CAPABILITY:
        return [f"needs compute capability {needed}, device has {'.'.join(map(str, device.capability))}"]
    return []


def _spec_reasons(spec: AttentionSpec) -> list[str]:
    if prefill.is_needed(spec):
        return prefill.why_not(spec, _spec_reasons)
    dims = f"d={spec.d}, d_v={spec.d_v}"
    rules = (
        (isinstance(spec.batch, int),
         f"needs a batch size that is a number, batch is {spec.batch} (export one program for each size)"),
        (spec.dtype.name in ("bfloat16", "float16"),
         f"needs bfloat16 or float16, dtype is {spec.dtype.name} (cast query, key and value)"),
        (min(spec.d, spec.d_v) >= 1 and max(spec.d, spec.d_v) <= MAX_DIM,
         f"needs head dimensions from 1 to {MAX_DIM} (a gradient of 64 keys is in registers), {dims}"),
        (spec.cache_scales is None,
         "takes no cache in eight bits yet (keep keys and values in the dtype of query)"),
        (spec.dropout_moved % dropout.UNIT == 0,
         f"needs dropout of parts of a problem that begin at multiples of {dropout.UNIT} positions, this one begins at "
         f"a multiple of {spec.dropout_moved} (pad the sequence)"),
    )
    filled = filled_part(spec.mask)
    found = [reason for holds, reason in rules if not holds] + score_rules.why_not(spec)
    return found + (mask_rules.why_not(spec) if filled is None else cache_rules.why_not(spec, filled))
