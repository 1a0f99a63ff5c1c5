"""A pass of a problem as launches of Mosaic modules. JAX alone, as a compiler: JAX_PLATFORMS=cpu, no GPU client.

A launch is lowered by itself, as a function of its inputs. It must come out as one call of a Mosaic kernel on just
these inputs; what is updated is an operand that is a result, too.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

from pallas_flash import device, masks
from pallas_flash.launches import launches
from pallas_flash.spec import AttentionSpec
from torch_bridge.direct.plan import Buffer, Module, Program, Step
from torch_bridge.direct.problem import Problem, Request

__all__ = ["LoweringError", "lower", "spec_of"]

CALL, TARGET = "stablehlo.custom_call", "mosaic_gpu_v2"
_MASKS: dict[str, Callable[..., masks.Mask]] = {
    "Causal": masks.Causal, "Window": masks.Window, "PrefixLM": masks.PrefixLM}


class LoweringError(RuntimeError):
    """A launch that does more than to call a Mosaic kernel on arrays of the call."""


def spec_of(problem: Problem) -> AttentionSpec:
    """The spec of a problem; raises as `AttentionSpec.of` does."""
    rule: masks.Mask = masks.Full()
    for name, numbers in problem.mask:
        rule = rule & _MASKS[name](**dict(numbers))
    return AttentionSpec.of(
        *(jax.ShapeDtypeStruct(shape, problem.dtype) for shape in problem.shapes().values()), layout=problem.layout,
        mask=rule, scale=problem.scale, softcap=problem.softcap, deterministic=problem.deterministic)


def lower(request: Request) -> Program[Module]:
    """The pass that is asked for.

    Kernels take an operand as the dense array of which it is a part, from the operand's first element on. They touch
    only heads and columns that the spec has, whatever more the array has: of columns, because they read 64 at a time,
    if that is how many there are, or a multiple.

    Raises:
      UnsupportedError: it is no list of launches on that GPU, with every reason.
      LoweringError: this JAX lowers a launch to something else than a call of a Mosaic kernel, or a launch writes to
        the caller's arrays.
    """
    gpu = device.Device("gpu", **vars(request.gpu))
    found = getattr(launches(spec_of(request.problem), gpu), request.pass_name)
    outer = {name: jax.ShapeDtypeStruct(shape, found.inputs[name].dtype)
             for name, shape in request.problem.outer_shapes().items()}
    types = found.inputs | outer | {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in found.constants.items()}
    steps = []
    with device.assume(gpu):
        for launch in found.launches:
            if kept := {*launch.updates} & {*found.inputs, *found.constants}:
                raise LoweringError(f"a launch updates {', '.join(kept)}, which outlives the call: it must update what "
                                   "launches before it made")
            steps.append(_step(launch, [types[name] for name in launch.inputs]))
            types |= launch.outputs
    buffers = {name: Buffer(tuple(kind.shape), kind.dtype.name) for name, kind in types.items()}
    for name, strides in request.problem.strides().items():
        if outer[name].shape != (shape := found.inputs[name].shape):
            buffers[name] = Buffer(tuple(shape), buffers[name].dtype, strides)
    return Program(buffers=buffers,
                   inputs=tuple(found.inputs), results=found.results,
                   constants={name: x.tobytes() for name, x in found.constants.items()}, steps=tuple(steps))


def _step(launch: Any, given: list[jax.ShapeDtypeStruct]) -> Step[Module]:
    """One launch (`kernels.mosaic.launch.Launch`), of inputs of these types."""
    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        inputs = [jax.new_ref(x) if name in launch.updates else x for name, x in zip(launch.inputs, arrays)]
        updated = [ref for name, ref in zip(launch.inputs, inputs) if name in launch.updates]
        return (*launch.kernel(*inputs), *(ref[...] for ref in updated))

    lowered = jax.jit(run, keep_unused=True).trace(*given).lower(lowering_platforms=("cuda",)).compiler_ir()
    module, aliases, count = _only_call(lowered)
    names = [*launch.outputs, *(name for name in launch.inputs if name in launch.updates)]
    wanted = {i: launch.inputs.index(name) for i, name in enumerate(names) if name in launch.updates}
    if aliases != wanted or count != len(names):
        raise LoweringError(f"this JAX updates other arrays in place ({aliases} of {count} results) than the launch "
                           f"says ({wanted} of {names})")
    return Step(module, (*launch.inputs, *names))


def _only_call(lowered: Any) -> tuple[Module, dict[int, int], int]:
    """The Mosaic module of a function that does nothing but call it on its arguments; which result is which operand's
    memory; and the number of results."""
    functions = list(lowered.body.operations)
    block = functions[0].regions[0].blocks[0] if len(functions) == 1 else None
    operations = [operation.operation for operation in block.operations] if block is not None else []
    call = operations[0] if len(operations) == 2 else None
    is_plain = (call is not None and block is not None and call.name == CALL
                and call.attributes["call_target_name"].value == TARGET
                and list(call.operands) == list(block.arguments) and list(operations[1].operands) == list(call.results))
    if call is None or not is_plain:
        raise LoweringError(f"this JAX lowers a launch to more than one call of {TARGET!r} on its arguments:\n"
                           + re.sub(r'module = "[^"]*"', "module = ...", str(lowered))[:2000])
    attributes = call.attributes
    aliases = str(attributes["output_operand_aliases"]) if "output_operand_aliases" in attributes else ""
    same = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", aliases)
    return (Module(attributes["mhlo.backend_config"]["module"].value_bytes),
            {int(result or 0): int(operand) for result, operand in same}, len(call.results))
