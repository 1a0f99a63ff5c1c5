"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map.

Head dimensions that are no multiples of 8 are padded in front of everything else (`padding`): below `forward` and
`backward` a spec is `padding.padded`.

Where a mask holds arrays, they are arguments like others, and what kernels read instead of them (`mask_arrays`) is made
beside the launches: on each device, for its shard and its schedule.
"""

import functools
from collections.abc import Callable

import jax

from pallas_flash import errors, padding
from pallas_flash.device import Device
from pallas_flash.device import default as default_device
from pallas_flash.kernels.ampere import defaults, launches, mask_arrays
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import Computation, partitioned
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.launch import Pass, WithArrays
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward"]

_HOPPER = (9, 0)
"""From here on Mosaic GPU emits an instruction that GPUs before it lack; and what it lowers for where there is no GPU.
"""


def _computation(spec: AttentionSpec, launched: Pass, schedule: ForwardSchedule | BackwardSchedule) -> Computation:
    if not spec.mask.has_arrays:
        return launched
    return WithArrays(launched, spec.mask, lambda mask, _: mask_arrays.make(spec, schedule, mask))


@functools.lru_cache(maxsize=1024)
def _forward(spec: AttentionSpec, schedule: ForwardSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    return _computation(spec, launches.forward(spec, schedule), schedule)


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


def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    found: Results[jax.Array] = _run_forward(
        padding.padded(spec), padding.padded_operands(spec, _without_seed(operands)), dropout.inputs(spec, operands))
    return padding.cut_results(spec, found)


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array | None, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`."""
    saved: Results[jax.Array] = Results(out, stats)  # type: ignore[arg-type]
    results, cotangents = (padding.padded_results(spec, x) for x in (saved, Results(dout, dstats)))
    found: Gradients[jax.Array] = _run_backward(
        padding.padded(spec), padding.padded_operands(spec, _without_seed(operands)), results, cotangents,
        dropout.inputs(spec, operands))
    return padding.cut_gradients(spec, found)


def _without_seed(operands: Operands) -> Operands:
    """Those that have batch entries: dropout's keys, made of the seed, have them, too."""
    return operands._replace(dropout_seed=None)


@interpreted_as(lambda device: None)
def _require_its_generation(device: Device) -> None:
    """Raises UnsupportedError where Mosaic GPU, which asks JAX's default device, would lower for a generation whose
    instructions `device` lacks: the GPU's compiler would refuse the program, elsewhere and later.
    """
    here = default_device()
    assert device.capability is not None
    if device.capability < _HOPPER <= (lowered := here.capability or _HOPPER):
        name = lambda capability: ".".join(map(str, capability))
        raise errors.unsupported(
            f'implementation="ampere" cannot be lowered for {device.name} here',
            [f"needs a default device of JAX before compute capability 9.0, it is {here.name}, for which Mosaic GPU "
             f"lowers as {name(lowered)}, the target has {name(device.capability)}"],
            'lower it in a process with such a GPU, by jax.config.update("jax_default_device", ...) if it has several, '
            'or use implementation="xla"')


@vmappable
def _run_forward(spec: AttentionSpec, device: Device, operands: Operands,
                 keys: tuple[jax.Array, ...]) -> Results[jax.Array]:
    _require_its_generation(device)
    fields = jax.tree.leaves(operands.mask)
    roles = f"query key key {'row ' * len(keys)}{'field ' * len(fields)}-> query row"
    out, stats = partitioned(_forward_on(device), roles, spec, operands.q, operands.k, operands.v, *keys,
                             *fields)
    return Results(out, stats)


@vmappable
def _run_backward(spec: AttentionSpec, device: Device, operands: Operands, results: Results[jax.Array],
                  cotangents: Results[jax.Array], keys: tuple[jax.Array, ...]) -> Gradients[jax.Array]:
    _require_its_generation(device)
    fields = jax.tree.leaves(operands.mask)
    saved = "row" if results.out is None else "query row"
    roles = f"query key key {saved} query row {'row ' * len(keys)}{'field ' * len(fields)}-> query key key"
    arrays = operands.q, operands.k, operands.v, *jax.tree.leaves(results), *cotangents, *keys, *fields
    dq, dk, dv = partitioned(_backward_on(device), roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None, dscore=())
