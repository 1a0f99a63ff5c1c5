"""The passes of a spec as lists of kernel launches (`mosaic.launch`).

forward: q, k, v -> out, stats. One kernel. Against a cache, q, k, v, the mask's arrays, a bias, sinks and, if there are
pages, their table -> out, stats: one kernel, too, whose counters are a constant.

backward: q, k, v, out, stats, dout, dstats -> dq, dk, dv. `prepare` makes statistics of each query; then
either one kernel makes dk and dv and adds dq up in float32, and `finish` makes dq of that, or a second kernel makes dq.

With dropout both also take its keys (`mosaic.dropout`), with a score function its arrays. Where the mask holds arrays,
each has those of `mask_arrays` as more inputs, or these arrays themselves, of which its first launch makes them; and
where there is a bias, those of `mosaic.bias`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.kernels.ampere import mask_arrays
from pallas_flash.kernels.ampere.backward import dq, finish, kv, prepare
from pallas_flash.kernels.ampere.decode import kernel as decode_kernel
from pallas_flash.kernels.ampere.forward import kernel as forward_kernel
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, DecodeSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import bias, dropout, mask_kernel, score_function
from pallas_flash.kernels.mosaic.decode.calls import inputs as decode_inputs
from pallas_flash.kernels.mosaic.launch import Launch, Pass
from pallas_flash.spec import AttentionSpec

__all__ = ["backward", "forward"]


def forward(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule) -> Pass:
    """The forward: out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), float32."""
    if isinstance(schedule, DecodeSchedule):
        return _decode(spec, schedule)
    inputs = _operands(spec) | _more(spec, schedule)
    return Pass(inputs=inputs, constants={},
                launches=(*_of_mask(spec, schedule), forward_kernel.launch(spec, schedule)), results=("out", "stats"))


def _decode(spec: AttentionSpec, schedule: DecodeSchedule) -> Pass:
    counters = np.zeros(decode_kernel.counters_shape(spec, schedule), np.int32)
    return Pass(inputs=decode_inputs(spec), constants={"counters": counters},
                launches=(decode_kernel.launch(spec, schedule),), results=("out", "stats"), restored=("counters",))


def backward(spec: AttentionSpec, schedule: BackwardSchedule) -> Pass:
    """The backward: the cotangents of q, k and v, in the spec's layout and `result_dtype`.

    Its inputs are the forward's, the forward's results, and the cotangents of these; of the statistics' only that of
    lse counts. Of a partial spec there is no out, and dstats hold -delta (`autodiff.without_out`).
    """
    out = jax.ShapeDtypeStruct(spec.out_shape, spec.dtype)
    stats = jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32)
    first = prepare.launch(spec, schedule)
    clean = {name: f"clean_{name}" for name in ("q", "dout") if f"clean_{name}" in first.outputs}
    inputs = _operands(spec) | ({} if spec.partial else {"out": out}) | {"stats": stats, "dout": out, "dstats": stats}
    inputs |= _more(spec, schedule)
    last = (finish.launch(spec, schedule) if schedule.dq is None else
            dq.launch(spec, schedule.dq).reading(clean))
    return Pass(inputs=inputs, constants={},
                launches=(*_of_mask(spec, schedule), first, kv.launch(spec, schedule).reading(clean), last),
                results=("dq", "dk", "dv"))


def _more(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """What dropout, a score function, the mask and a bias need."""
    of_mask = mask_kernel.fields(spec) if schedule.mask_kernel else mask_arrays.types(spec, schedule)
    return (dropout.input_types(spec) | score_function.input_types(spec) | of_mask
            | bias.types(spec, schedule.padded_blocks, bias.anchored_inputs))


def _of_mask(spec: AttentionSpec, schedule: ForwardSchedule | BackwardSchedule) -> tuple[Launch, ...]:
    """The launch that makes what others read of the mask's arrays, if it is not made beside the launches."""
    made = mask_arrays.launch(spec, schedule)
    return () if made is None else (made,)


def _operands(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = spec.operand_shapes
    return {name: jax.ShapeDtypeStruct(shape, spec.dtype) for name, shape in zip("qkv", shapes[:3])}
