"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map.

Head dimensions that are no multiples of 8 are padded in front of everything else (`padding`): below `forward` and
`backward` a spec is `padding.padded`.

Where a mask holds arrays, or there is a bias, they are arguments like others, and what kernels read instead of them
(`mask_arrays`, `mosaic.bias`) is made beside the launches: on each device, for its shard and its schedule.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from pallas_flash import masks, padding
from pallas_flash.device import Device
from pallas_flash.filled import filled_part
from pallas_flash.kernels.ampere import defaults, launches, mask_arrays
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, DecodeSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import bias, dropout, mask_kernel, prefill, score_function
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import Computation, partitioned
from pallas_flash.kernels.mosaic.decode import calls as decode_calls
from pallas_flash.kernels.mosaic.launch import Pass, WithArrays
from pallas_flash.kernels.mosaic.score_gradients import with_score_gradients
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward", "passes"]


def _computation(spec: AttentionSpec, launched: Pass, schedule: ForwardSchedule | BackwardSchedule) -> Computation:
    if not spec.mask.has_arrays or schedule.mask_kernel:
        return launched

    def make(mask: masks.Mask, biases: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        return mask_arrays.make(spec, schedule, mask) | bias.arrays(spec, schedule.padded_blocks, biases)
    return WithArrays(launched, spec.mask, make, len(bias.names(spec)))


@functools.lru_cache(maxsize=1024)
def _forward(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    launched = launches.forward(spec, schedule)
    if isinstance(schedule, DecodeSchedule):  # it reads the arrays of the mask as they are
        return launched
    return _computation(spec, launched, schedule)


@functools.lru_cache(maxsize=1024)
def _backward(spec: AttentionSpec, schedule: BackwardSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    return _computation(spec, launches.backward(spec, schedule), schedule)


@functools.lru_cache(maxsize=8)
def _forward_on(device: Device) -> Callable[[AttentionSpec], Computation]:
    """The forward of each spec, and the same object for the same device."""
    return lambda spec: _forward(spec, defaults.default_forward(spec, device))


@functools.lru_cache(maxsize=8)
def _backward_on(device: Device) -> Callable[[AttentionSpec], Computation]:
    """The backward of each spec, and the same object for the same device."""
    return lambda spec: _backward(spec, defaults.default_backward(spec, device))


def passes(spec: AttentionSpec, device: Device) -> tuple[Pass, Pass | None] | None:
    """The forward and the backward as lists of launches, which another runtime than JAX can run, and what it makes of
    a mask's arrays and a seed before them; None where there is a bias or a score function, or they read copies. Against
    a cache the forward alone, which reads all arrays of the call as they are: the backward is another's.
    """
    if prefill.is_needed(spec):
        return None
    if filled_part(spec.mask) is not None:
        return launches.forward(spec, defaults.default_forward(spec, device)), None
    if spec.bias is not None or spec.score is not None or padding.copies(spec) is not None:
        return None
    first = defaults.default_forward(spec, device)
    assert isinstance(first, ForwardSchedule), "keys are in no cache"
    first = defaults.with_mask_kernel(spec, first, device)
    second = defaults.with_mask_kernel(spec, defaults.default_backward(spec, device), device)
    return (_making(spec, launches.forward(spec, first), first), _making(spec, launches.backward(spec, second), second))


def _making(spec: AttentionSpec, found: Pass, schedule: ForwardSchedule | BackwardSchedule) -> Pass:
    """A pass, and what makes those of its inputs that are no arrays of the call."""
    if not spec.mask.has_arrays and not spec.dropout_rate:
        return found

    def make(operands: Operands) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}
        if schedule.mask_kernel:  # a launch reads those of the mask as they are
            arrays = dict(zip(mask_kernel.fields(spec), jax.tree.leaves(operands.mask), strict=True))
        elif spec.mask.has_arrays:
            arrays = mask_arrays.make(spec, schedule, operands.mask)
        return arrays | dict(zip(dropout.input_types(spec), dropout.inputs(spec, operands), strict=True))
    return dataclasses.replace(found, make=make)


def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    if prefill.is_needed(spec):
        return prefill.run(forward, spec, operands)
    if filled_part(spec.mask) is not None:
        return decode_calls.anchored(spec, operands, _run_decode(spec, operands))
    found: Results[jax.Array] = _run_forward(
        padding.padded(spec), padding.padded_operands(spec, _without_seed(operands)), dropout.inputs(spec, operands))
    found = padding.cut_results(spec, found)
    return found._replace(stats=bias.without_anchor(spec, operands, found.stats))


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array | None, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`, of a bias, and of a score function's arrays.
    """
    results: Results[jax.Array] = Results(out, stats)  # type: ignore[arg-type]
    cotangents, keys = Results(dout, dstats), dropout.inputs(spec, operands)
    saved = results._replace(stats=bias.with_anchor(spec, operands, stats))
    found: Gradients[jax.Array] = _run_backward(
        padding.padded(spec), padding.padded_operands(spec, _without_seed(operands)),
        padding.padded_results(spec, saved), padding.padded_results(spec, cotangents), keys)
    found = padding.cut_gradients(spec, found)
    return with_score_gradients(spec, operands, found, results, cotangents, keys)


def _without_seed(operands: Operands) -> Operands:
    """Those that have batch entries: dropout's keys, made of the seed and the origin, have them, too."""
    return operands._replace(dropout_seed=None, dropout_origin=None)


def _more(spec: AttentionSpec, operands: Operands, keys: tuple[jax.Array, ...]) -> tuple[list[jax.Array], str]:
    """What passes read beside operands, results and cotangents: dropout's keys, a score function's arrays, those of the
    mask, and of a bias; and their roles (`mosaic.call.partitioned`).
    """
    parts = {"row": keys, "whole": score_function.inputs(spec, operands), "field": jax.tree.leaves(operands.mask),
             "bias": bias.anchored_inputs(spec, operands)}
    return [x for own in parts.values() for x in own], "".join(f"{role} " * len(own) for role, own in parts.items())


@vmappable
def _run_forward(spec: AttentionSpec, device: Device, operands: Operands,
                 keys: tuple[jax.Array, ...]) -> Results[jax.Array]:
    spec, operands = bias.as_mask(spec, operands)
    more, names = _more(spec, operands, keys)
    roles = f"query key key {names}-> query row"
    out, stats = partitioned(_forward_on(device), roles, spec, operands.q, operands.k, operands.v, *more,
                             device=device)
    return Results(out, stats)


@vmappable
def _run_decode(spec: AttentionSpec, device: Device, operands: Operands) -> Results[jax.Array]:
    """Against a cache: the kernel reads a bias and sinks as they are, and finds the mask from its arrays."""
    arrays, roles = decode_calls.arrays(spec, operands)
    return Results(*partitioned(_forward_on(device), roles, spec, *arrays, device=device))


@vmappable
def _run_backward(spec: AttentionSpec, device: Device, operands: Operands, results: Results[jax.Array],
                  cotangents: Results[jax.Array], keys: tuple[jax.Array, ...]) -> Gradients[jax.Array]:
    spec, operands = bias.as_mask(spec, operands)
    more, names = _more(spec, operands, keys)
    saved = "row" if results.out is None else "query row"
    roles = f"query key key {saved} query row {names}-> query key key"
    arrays = operands.q, operands.k, operands.v, *jax.tree.leaves(results), *cotangents, *more
    dq, dk, dv = partitioned(_backward_on(device), roles, spec, *arrays, device=device)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None, dscore=())
