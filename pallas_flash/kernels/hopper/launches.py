"""The passes of a spec as lists of kernel launches (`mosaic.launch`).

forward: q, k, v -> out, stats. One kernel; its table of tiles is a constant. Of float32 inputs, behind three kernels
that split q, k and v (`float32.split`). Against a cache, q, k, v, the mask's arrays, a bias, sinks and, if there are
pages, their table -> out, stats: one kernel, too, whose counters are a constant.

backward: q, k, v, out, stats, dout, dstats -> dq, dk, dv. `prepare` makes statistics of each query; then either one
fused kernel adds dq up in float32, of which `finish` makes dq, or two kernels make dk and dv, and dq. Above 256 columns
three make dv, dk, and dq.

dbias: the same inputs -> the gradient of a bias of pairs, padded to whole tiles. `prepare` once more, then one kernel;
a program that does not ask for it leaves both out.

With dropout all also take its keys (`mosaic.dropout`). Where the mask holds arrays, each has those of `mask_arrays` as
more inputs, or these arrays themselves, of which its first launch makes them; and the forward no table. With a score
function or a bias it always does (`bias.as_mask`): the function's arrays come behind dropout's keys, then a forward's
sinks; those of `mosaic.bias` last.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.kernels.hopper import mask_arrays, work
from pallas_flash.kernels.hopper.backward import dbias, dq, finish, kv, kv_split, prepare, wide
from pallas_flash.kernels.hopper.decode import kernel as decode_kernel
from pallas_flash.kernels.hopper.float32 import forward as forward_float32
from pallas_flash.kernels.hopper.float32 import gradients, split
from pallas_flash.kernels.hopper.float32 import prepare as prepare_float32
from pallas_flash.kernels.hopper.forward import kernel as forward_kernel
from pallas_flash.kernels.hopper.forward import sinks
from pallas_flash.kernels.hopper.memory import in_parts
from pallas_flash.kernels.hopper.schedule import (
    BackwardSchedule,
    DbiasSchedule,
    DecodeSchedule,
    DqSchedule,
    ForwardSchedule,
    KvSchedule,
    SplitSchedule,
    WideSchedule,
)
from pallas_flash.kernels.mosaic import bias, dropout, mask_kernel, score_function
from pallas_flash.kernels.mosaic.decode.calls import inputs
from pallas_flash.kernels.mosaic.launch import Launch, Pass
from pallas_flash.spec import AttentionSpec

__all__ = ["backward", "dbias_pass", "forward"]


def forward(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule) -> Pass:
    """The forward: out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), float32."""
    if isinstance(schedule, DecodeSchedule):
        return _decode(spec, schedule)
    arrays = spec.mask.has_arrays
    if spec.dtype == jnp.float32:
        return _in_parts(spec, schedule)
    inputs = _operands(spec) | dropout.input_types(spec) | score_function.input_types(spec) | sinks.input_types(spec)
    of_mask, first = _of_mask(spec, schedule)
    inputs |= of_mask | bias.types(spec, schedule.padded_blocks)
    return Pass(inputs=inputs, constants={} if arrays else {"table": work.forward_table(spec, schedule)},
                launches=(*first, forward_kernel.launch(spec, schedule)), results=("out", "stats"))


def _of_mask(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule,
             ) -> tuple[dict[str, jax.ShapeDtypeStruct], tuple[Launch, ...]]:
    """The inputs of a pass that come of the mask's arrays, and the launch that makes of them what others read."""
    if not spec.mask.has_arrays:
        return {}, ()
    made = mask_arrays.launch(spec, schedule)
    return (mask_arrays.types(spec, schedule), ()) if made is None else (mask_kernel.fields(spec), (made,))


def _in_parts(spec: AttentionSpec, schedule: ForwardSchedule) -> Pass:
    """The forward of float32 inputs: q, k and v are split into parts first."""
    arrays, wide = spec.mask.has_arrays, in_parts(spec)
    return Pass(inputs=_operands(spec) | (mask_arrays.types(spec, schedule) if arrays else {}),
                constants={} if arrays else {"table": work.forward_table(wide, schedule)},
                launches=(*(split.launch(spec, name, values=name == "v") for name in "qkv"),
                          forward_float32.launch(spec, schedule)),
                results=("out", "stats"))


def _decode(spec: AttentionSpec, schedule: DecodeSchedule) -> Pass:
    launches = (decode_kernel.launch(spec, schedule),)
    if schedule.cluster > 1:
        return Pass(inputs=inputs(spec), constants={}, launches=launches, results=("out", "stats"))
    counters = np.zeros(decode_kernel.counters_shape(spec, schedule), np.int32)
    return Pass(inputs=inputs(spec), constants={"counters": counters}, launches=launches, results=("out", "stats"),
                restored=("counters",))


def backward(spec: AttentionSpec, schedule: BackwardSchedule) -> Pass:
    """The backward: the cotangents of q, k and v, in the spec's layout and `result_dtype`.

    Its inputs are the forward's, the forward's results, and the cotangents of these; of the statistics' only that of
    lse counts. Of a partial spec there is no out, and dstats hold -delta (`autodiff.without_out`). With sinks, whose
    gradient follows from delta, it also returns the statistics (`backward.statistics`).
    """
    launches = (_gradients_in_parts(spec, schedule) if spec.dtype == jnp.float32 else
                _prepared(spec, schedule, _gradients(spec, schedule)))
    return _backward(spec, schedule, launches, ("dq", "dk", "dv", *["statistics"] * (spec.sinks is not None)))


def dbias_pass(spec: AttentionSpec, schedule: DbiasSchedule, dtype: np.dtype) -> Pass:
    """The gradient of a bias of pairs, in a dtype: see `backward.dbias.launch`. Its inputs are those of `backward`, of
    a spec that is not partial.
    """
    launches = _prepared(spec, schedule.tiles, (dbias.launch(spec, schedule, dtype),))
    found = _backward(spec, schedule.tiles, launches, ("dbias",))
    return dataclasses.replace(found, constants={"tiles": work.dbias_table(spec, schedule)})


def _backward(spec: AttentionSpec, schedule: BackwardSchedule, launches: tuple[Launch, ...],
              results: tuple[str, ...]) -> Pass:
    """Launches of what a backward is given, behind the one that makes of the mask's arrays what they read."""
    out = jax.ShapeDtypeStruct(spec.out_shape, spec.dtype)
    stats = jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32)
    inputs = _operands(spec) | ({} if spec.partial else {"out": out}) | {"stats": stats, "dout": out, "dstats": stats}
    inputs |= dropout.input_types(spec) | score_function.input_types(spec)
    of_mask, before = _of_mask(spec, schedule)
    inputs |= of_mask | bias.types(spec, schedule.padded_blocks)
    return Pass(inputs=inputs, constants={}, launches=(*before, *launches), results=results)


def _prepared(spec: AttentionSpec, schedule: BackwardSchedule, gradients: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """Launches that make gradients, behind the one that prepares them."""
    return prepare.launch(spec, schedule), *gradients


def _gradients(spec: AttentionSpec, schedule: BackwardSchedule) -> tuple[Launch, ...]:
    if isinstance(schedule.kv, WideSchedule):
        assert schedule.dv is not None and isinstance(schedule.dq, WideSchedule)
        return tuple(wide.launch(spec, s) for s in (schedule.dv, schedule.kv, schedule.dq))
    assert not isinstance(schedule.dq, WideSchedule)
    if isinstance(schedule.kv, SplitSchedule):
        assert schedule.dq is not None
        return kv_split.launch(spec, schedule.kv), dq.launch(spec, schedule.dq)
    if schedule.kv.rounds_dq:
        return (kv.launch(spec, schedule.kv),)
    last = finish.launch(spec, schedule.kv) if schedule.dq is None else dq.launch(spec, schedule.dq)
    return kv.launch(spec, schedule.kv), last


def _gradients_in_parts(spec: AttentionSpec, schedule: BackwardSchedule) -> tuple[Launch, ...]:
    assert isinstance(schedule.dq, DqSchedule) and isinstance(schedule.kv, KvSchedule)
    schedules: dict[str, DqSchedule | KvSchedule] = dict(dq=schedule.dq, dk=schedule.kv, dv=schedule.kv)
    return (*(split.launch(spec, name) for name in "qkv"), prepare_float32.launch(spec, schedule),
            *(gradients.launch(spec, name, own) for name, own in schedules.items()))


def _operands(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, spec.dtype) for name, shape in zip("qkv", spec.operand_shapes[:3])}
