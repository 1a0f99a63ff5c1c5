"""`explain_context_parallel`: what would run on several devices, and why, as text."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_flash import arguments, dispatch, errors, masks
from pallas_flash.arrays import Shaped
from pallas_flash.context_parallel import all_to_all, merged_ring
from pallas_flash.context_parallel.attention import Arrays, Options, choice, shards_of
from pallas_flash.context_parallel.model import Strategy
from pallas_flash.context_parallel.order import LoadBalance
from pallas_flash.context_parallel.plan import Call
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.device import Device, current
from pallas_flash.masks import Mask
from pallas_flash.spec import AttentionSpec

__all__ = ["explain_context_parallel"]


@arguments.names_keywords
def explain_context_parallel(
    query: Shaped, key: Shaped, value: Shaped, *, num_devices: int, strategy: Strategy | None = None,
    load_balance: LoadBalance = "zigzag", mask: Mask | None = None, has_documents: bool = False,
    bias: Shaped | None = None, dropout_rate: float = 0.0, scale: float | None = None, softcap: float | None = None,
    deterministic: bool = False, implementation: dispatch.Requested = None, device: Device | None = None,
) -> str:
    """What `context_parallel_attention` would run: the strategy, what each would cost, and the calls of a device.

    Only shapes and dtypes count; nothing is computed, and no other device is needed. Of masks the numbers count, arrays
    do not: a document that ends early saves work that is not seen here.

    Args:
      query, key, value: what one device holds.
      num_devices: along the sequence.
      has_documents: whether the call has `segment_ids` or `cu_seqlens`.
      bias: what one device holds of it.
      strategy, load_balance, mask, dropout_rate, scale, softcap, deterministic, implementation: as in
        `context_parallel_attention`.
      device: the `pallas_flash.device.Device` to decide for, such as `device.H200`; None: JAX's default one.
    """
    errors.require_count("num_devices", num_devices, 1, "pass the number of devices along the sequence")
    errors.require_bool("has_documents", has_documents)
    for name, x in (("query", query), ("key", key), ("value", value)):
        arguments.array(name, x)
    dispatch.require_device(device)
    options = Options("", strategy, load_balance, scale, softcap, dropout_rate, deterministic, implementation,
                      current() if device is None else device, return_lse=False)
    rule = masks.checked(mask).canonical()
    if has_documents:
        ids = jax.ShapeDtypeStruct((1, query.shape[1]), jnp.int32)
        rule = rule & masks.SegmentIds(ids, ids).canonical()
    arrays = Arrays(query, key, value, bias, rule, None, None, None, None)  # type: ignore[arg-type]
    try:
        shards = shards_of(options, arrays, rule, num_devices)
        chosen = choice(shards, strategy)
        return "\n".join([f"{num_devices} devices, each {shards.spec}", str(chosen),
                          *(f"  {line}" for line in _calls(shards, chosen.strategy))])
    except errors.UnsupportedError as error:
        return f"UnsupportedError: {error}"


def _calls(shards: Shards, strategy: Strategy) -> list[str]:
    """What a device computes, a line for each step."""
    spec, n, size = shards.spec, shards.chunking.num_devices, shards.chunking.chunk_len
    if strategy == "ring":
        return [*(f"keys of the device {step.distance} before: " + "; ".join(_call(shards, call) for call in step.calls)
                  for step in shards.steps), _kinds(shards), *_merging(shards)]
    whole = n * spec.kv_len
    if strategy == "all_gather":
        chunk = dataclasses.replace(spec, q_len=size, kv_len=whole)
        return [f"{len(shards.chunking.chunks(0))} calls, each {_run(shards, chunk)}"]
    heads = dataclasses.replace(all_to_all.of_heads(spec), q_len=whole, kv_len=whole, q_heads=spec.q_heads // n,
                                kv_heads=max(1, spec.kv_heads // n))
    return [f"one call, {_run(shards, heads)}"]


def _kinds(shards: Shards) -> str:
    """How many calls of a ring differ: a pass has a kernel to trace and compile for each."""
    calls = [call for step in shards.steps for call in step.calls]
    kinds = {(call.mask, call.num_chunks, len(call.picks)) for call in calls}
    return f"calls of a pass: {len(calls)}, of which {len(kinds)} differ and are compiled"


def _merging(shards: Shards) -> list[str]:
    """What merges the results of the calls of a ring, a line for each pass."""
    return [f"{name}: merged " + (f"by XLA, beside the calls: {'; '.join(reasons)}" if reasons else "in their kernels")
            for name, reasons in zip(("forward", "backward"), merged_ring.why_not(shards), strict=True)]


def _call(shards: Shards, call: Call) -> str:
    rows, pairs, rule = call.num_chunks * shards.chunking.chunk_len, len(call.picks), call.mask
    for part in shards.spec.mask.parts:
        rule = rule & part if part.has_arrays else rule
    return _run(shards, dataclasses.replace(shards.spec, batch=shards.spec.batch * pairs, q_len=rows, kv_len=rows,
                                            mask=rule, partial=True))


def _run(shards: Shards, spec: AttentionSpec) -> str:
    if shards.bias is not None:
        shape = tuple(min(size, full) for size, full in zip(shards.bias.shape, (
            spec.batch, spec.q_heads, spec.q_len, spec.kv_len)))
        spec = dataclasses.replace(spec, bias=masks.ArrayField(shape, shards.bias.dtype))
    decision = dispatch.decide(spec, shards.device, shards.implementation)
    return (f"batch={spec.batch}, heads={spec.q_heads}:{spec.kv_heads}, len={spec.q_len}x{spec.kv_len}, "
            f"mask={spec.mask}: implementation={decision.implementation.name!r}")
