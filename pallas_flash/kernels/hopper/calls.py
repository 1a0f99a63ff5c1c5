"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map.

The gradient of a bias is a computation of its own, which is left out where nothing asks for it: a kernel's, or a walk
in plain JAX (`mosaic.dbias`).

Where a mask holds arrays, or there is a bias, they are arguments like others, and what kernels read instead of them
(`mask_arrays`, `bias`) is made beside the launches: on each device, for its shard and its schedule.

Masks of other classes that hold arrays become part of the score function (`mask_score`).

Head dimensions that are no multiples of 8 are padded in front of everything else (`padding`), and values of more than
256 columns are cut into parts (`wide`): below `forward` and `backward` a spec is one that kernels can compute.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_flash import device, masks, padding, softmax
from pallas_flash.device import Device
from pallas_flash.filled import filled_part
from pallas_flash.kernels.hopper import defaults, launches, mask_arrays, support, wide
from pallas_flash.kernels.hopper.backward.statistics import Statistics
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DbiasSchedule, DecodeSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import bias, dropout, dropout_keys, mask_kernel, mask_score, prefill, score_function
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import Computation, partitioned
from pallas_flash.kernels.mosaic.dbias import operands_of, result_type, walk
from pallas_flash.kernels.mosaic.decode import calls as decode_calls
from pallas_flash.kernels.mosaic.launch import Pass, WithArrays
from pallas_flash.kernels.mosaic.mask_ranges import ids_of
from pallas_flash.kernels.mosaic.score_gradients import with_score_gradients
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward", "passes"]


def _computation(spec: AttentionSpec, launched: Pass, schedule: ForwardSchedule | BackwardSchedule) -> Computation:
    if not spec.mask.has_arrays:
        return launched

    if mask_kernel.fields(spec).keys() <= launched.inputs.keys():  # never beside a bias, a dense part of the mask
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


@dataclasses.dataclass(frozen=True)
class _BiasGradient:
    """The gradient of a bias of pairs by a kernel: see `mosaic.dbias.walk`."""

    spec: AttentionSpec
    schedule: DbiasSchedule

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct]:
        return (result_type(self.spec),)

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        operands, keys = operands_of(self.spec, arrays)
        # Of a partial spec out and the cotangent of lse are such that delta is what it is of another one.
        spec, operands = bias.as_mask(dataclasses.replace(self.spec, partial=False), operands)
        kind, = self.result_types
        run = _computation(spec, launches.dbias_pass(spec, self.schedule, kind.dtype), self.schedule.tiles)
        found, = run(*arrays[:7], *keys, *jax.tree.leaves(operands.mask), *bias.inputs(spec, operands))
        return (found[:, :, :kind.shape[2], :kind.shape[3]],)


@functools.lru_cache(maxsize=1024)
def _dbias(spec: AttentionSpec, schedule: DbiasSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    return _BiasGradient(spec, schedule)


@functools.lru_cache(maxsize=8)
def _dbias_on(device: Device) -> Callable[[AttentionSpec], Computation]:
    """The gradient of the bias of each spec, by a kernel where there is one; and the same object for the same device.
    """
    def build(spec: AttentionSpec) -> Computation:
        schedule = defaults.default_dbias(spec, device)
        return walk(spec) if schedule is None else _dbias(spec, schedule)
    return build


def passes(spec: AttentionSpec, device: Device) -> tuple[Pass | None, ...] | None:
    """The forward, the backward and the gradient of a bias as lists of launches, which another runtime than JAX can
    run, and what it makes of a mask's arrays, a bias, a score function's arrays and a seed before them; None where a
    mask is asked pair by pair, or a bias has an anchor that takes a loop, or they read copies of arrays of the call, or
    run in clusters (heads above 256). The last is missing where no kernel makes it, or there is no bias; and no kernel
    makes the gradients of a score function's arrays. Against a cache the forward alone, which reads all arrays of the
    call as they are: the backward is another's.
    """
    if prefill.is_needed(spec):
        return None
    if filled_part(spec.mask) is not None:
        return launches.forward(spec, defaults.default_forward(spec, device)), None
    takes_loop = spec.bias is not None and not bias.is_anchored_at_once(spec)
    if mask_score.own_parts(spec) or takes_loop or support.is_wide(spec) or support.copies(spec) is not None:
        return None
    inner = bias.hiding(spec)
    has_kernel = defaults.has_mask_kernel(inner)
    if not has_kernel:
        inner = bias.hiding(dataclasses.replace(spec, mask=_typed(spec).with_placeholders()))
    first, second = defaults.default_forward(inner, device), defaults.default_backward(inner, device)
    assert isinstance(first, ForwardSchedule), "keys are in no cache"
    first, second = (dataclasses.replace(first, mask_kernel=has_kernel),
                     dataclasses.replace(second, mask_kernel=has_kernel))
    found = (_making(spec, inner, launches.forward(inner, first), first),
             _making(spec, inner, launches.backward(inner, second), second))
    third = None if spec.bias is None else defaults.default_dbias(spec, device)
    if third is None:
        return found
    return *found, _making(spec, inner, launches.dbias_pass(inner, third, result_type(spec).dtype), third.tiles)


def _typed(spec: AttentionSpec) -> masks.Mask:
    """`_by_key` of a spec's mask: types of arrays in their place."""
    fields: masks.Mask = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), spec.mask)
    typed: masks.Mask = jax.eval_shape(functools.partial(_by_key, spec), fields)
    return typed


def _by_key(spec: AttentionSpec, mask: masks.Mask) -> masks.Mask:
    """The mask with a boolean for each key in the place of ids, where there is one query, and no kernel makes what is
    read of a mask: XLA makes ranges of ids in few kernels, another runtime in twice as many as of booleans.
    """
    if spec.q_len > 1 or ids_of(mask) is None:
        return mask
    parts = [_pairs(part) if isinstance(part, masks.SegmentIds) else part for part in mask.parts]
    return functools.reduce(operator.and_, parts)


def _pairs(ids: masks.SegmentIds) -> masks.Mask:
    """The pairs of equal ids; of a canonical mask, (batch or 1, heads or 1, length)."""
    q_ids, kv_ids = jnp.asarray(ids.q_ids)[..., :, None], jnp.asarray(ids.kv_ids)[..., None, :]
    return masks.Dense((q_ids == kv_ids) & (q_ids >= 0))


def _making(spec: AttentionSpec, inner: AttentionSpec, found: Pass,
            schedule: ForwardSchedule | BackwardSchedule) -> Pass:
    """A pass of the spec that kernels run, `inner`, and what makes those of its inputs that are no arrays of the call.
    """
    if not inner.mask.has_arrays and not spec.dropout_rate:
        return found
    if (makes_keys := defaults.has_keys_kernel(spec)):
        keys = dropout_keys.launch(spec)
        types = {name: x for name, x in found.inputs.items() if name not in keys.outputs}
        seed = {dropout_keys.SEED: jax.ShapeDtypeStruct((2,), jnp.uint32)}
        found = dataclasses.replace(found, inputs=types | seed, launches=(keys, *found.launches))

    def make(operands: Operands) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}
        mask = operands.mask if schedule.mask_kernel else _by_key(spec, operands.mask)
        _, hidden = bias.as_mask(spec, operands._replace(mask=mask))
        if schedule.mask_kernel:  # a launch reads those of the mask as they are
            arrays = dict(zip(mask_kernel.fields(inner), jax.tree.leaves(hidden.mask), strict=True))
        elif inner.mask.has_arrays:
            arrays = mask_arrays.make(inner, schedule, hidden.mask)
        # Anchored by the mask of the call: what the bias itself hides is no row's largest.
        arrays |= bias.arrays(spec, schedule.padded_blocks, bias.inputs(spec, operands, spec.q_len))
        arrays |= zip(score_function.input_types(spec), score_function.inputs(spec, operands), strict=True)
        if makes_keys:
            assert operands.dropout_seed is not None
            return arrays | {dropout_keys.SEED: operands.dropout_seed}
        return arrays | dict(zip(dropout.input_types(spec), dropout.inputs(spec, operands), strict=True))
    return dataclasses.replace(found, make=make)


def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    if prefill.is_needed(spec):
        return prefill.run(forward, spec, operands)
    if filled_part(spec.mask) is not None:
        return decode_calls.anchored(spec, operands, _run_decode(spec, operands))
    keys = dropout.inputs(spec, operands)
    spec, operands = mask_score.as_score(spec, operands)
    padded = padding.padded_operands(spec, _without_seed(operands))
    found = [_run_forward(part, given, keys) for part, given in wide.parts(padding.padded(spec), padded)]
    return padding.cut_results(spec, wide.joined(found))


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array | None, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`, of a bias, and of a score function's arrays.
    """
    results: Results[jax.Array] = Results(out, stats)  # type: ignore[arg-type]
    cotangents, keys = Results(dout, dstats), dropout.inputs(spec, operands)
    found: Gradients[jax.Array]
    inner, given = mask_score.as_score(spec, operands)
    found, rows = _run_backward(
        padding.padded(inner), padding.padded_operands(inner, _without_seed(given)),
        padding.padded_results(spec, results), padding.padded_results(spec, cotangents), keys)
    found = padding.cut_gradients(spec, found)
    if rows is not None:
        assert operands.sinks is not None
        found = found._replace(dsinks=_sinks_gradient(spec, rows, stats, dstats, operands.sinks))
    return with_score_gradients(spec, operands, found, results, cotangents, keys, _dbias_on(device.current()))


def _without_seed(operands: Operands) -> Operands:
    """Those that have batch entries: dropout's keys, made of the seed and the origin, have them, too."""
    return operands._replace(dropout_seed=None, dropout_origin=None)


@vmappable
def _run_forward(spec: AttentionSpec, device: Device, operands: Operands,
                 keys: tuple[jax.Array, ...]) -> Results[jax.Array]:
    (spec, operands), own = bias.as_mask(spec, operands), (*keys, *score_function.inputs(spec, operands))
    fields, biases = jax.tree.leaves(operands.mask), bias.inputs(spec, operands)
    sinks = () if operands.sinks is None else (operands.sinks,)
    more = (f"{'row ' * len(keys)}{'whole ' * (len(own) - len(keys))}{'bias ' * len(sinks)}{'field ' * len(fields)}"
            f"{'bias ' * len(biases)}")
    arrays = operands.q, operands.k, operands.v, *own, *sinks, *fields, *biases
    out, stats = partitioned(_forward_on(device), f"query key key {more}-> query row", spec, *arrays, device=device)
    return Results(out, stats)


@vmappable
def _run_decode(spec: AttentionSpec, device: Device, operands: Operands) -> Results[jax.Array]:
    """Against a cache: the kernel reads a bias and sinks as they are, and finds the mask from its arrays."""
    arrays, roles = decode_calls.arrays(spec, operands)
    return Results(*partitioned(_forward_on(device), roles, spec, *arrays, device=device))


@vmappable
def _run_backward(spec: AttentionSpec, device: Device, operands: Operands, results: Results[jax.Array],
                  cotangents: Results[jax.Array],
                  keys: tuple[jax.Array, ...]) -> tuple[Gradients[jax.Array], jax.Array | None]:
    """The gradients; and with sinks the statistics of queries (`backward.statistics`)."""
    (spec, operands), own = bias.as_mask(spec, operands), (*keys, *score_function.inputs(spec, operands))
    fields, biases = jax.tree.leaves(operands.mask), bias.inputs(spec, operands)
    more = f"{'row ' * len(keys)}{'whole ' * (len(own) - len(keys))}{'field ' * len(fields)}{'bias ' * len(biases)}"
    saved = "row" if results.out is None else "query row"
    roles = f"query key key {saved} query row {more}-> query key key{' row' * (spec.sinks is not None)}"
    arrays = operands.q, operands.k, operands.v, *jax.tree.leaves(results), *cotangents, *own, *fields, *biases
    dq, dk, dv, *rows = partitioned(_backward_on(device), roles, spec, *arrays, device=device)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None, dscore=()), rows[0] if rows else None


def _sinks_gradient(spec: AttentionSpec, rows: jax.Array, stats: jax.Array, dstats: jax.Array,
                    sinks: jax.Array) -> jax.Array:
    """The gradient of sinks from the statistics of queries, in which delta is: neither out nor dout is read for it."""
    of_query = lambda row: rows[:, :, row, :spec.q_len]
    lse, dlse = stats[:, :, 0], dstats[:, :, 0]
    delta = -of_query(Statistics.DELTA) * dropout.factor(spec)
    delta = jnp.where(lse == -jnp.inf, -dlse, jnp.where(jnp.isnan(of_query(Statistics.LSE)), jnp.nan, delta))
    return softmax.sinks_gradient(sinks, lse, delta)
