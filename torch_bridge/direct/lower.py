"""A pass of a problem as launches of Mosaic modules. JAX alone, as a compiler: JAX_PLATFORMS=cpu, no GPU client.

A launch is lowered by itself, as a function of its inputs. It must come out as one call of a Mosaic kernel on just
these inputs; what is updated is an operand that is a result, too.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir

from pallas_flash import device, errors, masks, scores
from pallas_flash.filled import Filled
from pallas_flash.launches import Launch, Pass, Passes, launches, tracing
from pallas_flash.mask_fields import ArrayField
from pallas_flash.paging import Pages
from pallas_flash.spec import AttentionSpec, Operands
from torch_bridge.direct import beside, score_ir
from torch_bridge.direct.plan import Buffer, Module, Program, Step
from torch_bridge.direct.problem import AnyProblem, CacheProblem, Problem, Request
from torch_bridge.rules import TENSORS, Rule

__all__ = ["LoweringError", "lower", "spec_of"]

CALL, TARGET = "stablehlo.custom_call", "mosaic_gpu_v2"
_PREFIX = "given "
"""Of the names of a call's tensors among the arrays of a plan: a pass has arrays of the same names."""


class LoweringError(RuntimeError):
    """A launch that does more than to call a Mosaic kernel on arrays of the call."""


def spec_of(problem: AnyProblem) -> AttentionSpec:
    """The spec of a problem; raises as `AttentionSpec.of` does."""
    if isinstance(problem, CacheProblem):
        return _spec_of_cache(problem)
    spec = AttentionSpec.of(
        *(jax.ShapeDtypeStruct(shape, problem.dtype) for shape in problem.shapes().values()), layout=problem.layout,
        scale=problem.scale, softcap=problem.softcap, dropout_rate=problem.dropout_p,
        deterministic=problem.deterministic)
    given = _given(problem)
    spec = spec.masked(_rule(problem).mask(spec, given), given.get("bias"))
    if problem.score_ir is None:
        return spec
    return spec.scored(score_ir.function(problem.score_ir, f"function {problem.score}"))


def _spec_of_cache(problem: CacheProblem) -> AttentionSpec:
    """As `pallas_flash.cache.attend` has it."""
    given, pages = _given(problem), problem.pages
    shapes = dataclasses.replace(problem, pages=None).shapes()
    spec = AttentionSpec.of(*(jax.ShapeDtypeStruct(shape, problem.dtype) for shape in shapes.values()),
                            layout=problem.layout, scale=problem.scale, softcap=problem.softcap)
    spec = spec.paged(None if pages is None else Pages(*pages))
    left, right = (masks.UNBOUNDED if side is None else side for side in problem.window)
    rule = masks.Full() if problem.window == (None, None) else masks.Window(left, right)
    spec = spec.masked(Filled(rule, given["lengths"], problem.q_len).canonical(), given.get("bias"))
    if "sinks" not in given:
        return spec
    heads = jax.ShapeDtypeStruct((1, problem.q_heads, 1, 1), given["sinks"].dtype)
    return dataclasses.replace(spec, sinks=ArrayField.of(heads))


def _given(problem: AnyProblem) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in problem.given}


def _rule(problem: Problem) -> Rule:
    given = _given(problem)
    return Rule(*problem.window, tuple(name for name in TENSORS if name in given))


def _beside(problem: Problem, found: Pass) -> beside.Operations:
    """What makes the inputs of a pass that are no arrays of the call."""
    spec, rule = spec_of(problem), _rule(problem)

    def make(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        given = {name.removeprefix(_PREFIX): x for name, x in arrays.items()}
        seed = jax.lax.bitcast_convert_type(given["seed"], jnp.uint32) if problem.dropout_p else None
        none: Any = None
        assert found.make is not None
        return found.make(Operands(
            q=none, k=none, v=none, bias=given.get("bias"),
            score=score_ir.split(scores.floats(spec.score), given.get("score_floats")),
            mask=rule.mask(spec, {name: given[name] for name in rule.given}),
            score_integers=score_ir.split(scores.integers(spec.score), given.get("score_integers")), dropout_seed=seed,
            dropout_origin=None, page_table=None))

    if found.make is None:
        return beside.Operations((), {})
    return beside.traced(make, {_PREFIX + name: x for name, x in _given(problem).items()})


def _as_given(operations: tuple[beside.Operation, ...], found: Pass) -> dict[str, str]:
    """Of the inputs of a pass, those that are arrays of the call as they are, or with other axes of one element; each
    with the array's name. A launch may read them where they lie, if none writes to them.
    """
    made = {operation.output: operation for operation in operations}
    updated = {name for launch in found.launches for name in launch.updates}

    def source(name: str | float) -> str | None:
        operation = made.get(name) if isinstance(name, str) else None
        if operation is None:
            return name if isinstance(name, str) and name.startswith(_PREFIX) else None
        return source(operation.inputs[0]) if operation.name in ("clone", "reshape") else None
    sources = {name: source(name) for name in found.inputs if name in made and name not in updated}
    return {name: x for name, x in sources.items() if x is not None}


def _known(operations: tuple[beside.Operation, ...], constants: dict[str, np.ndarray],
           found: Pass) -> tuple[tuple[beside.Operation, ...], dict[str, np.ndarray]]:
    """The operations but those that copy what is known, and the constants, those copies among them; what launches
    update is copied in each call.
    """
    updated = {name for launch in found.launches for name in launch.updates}
    copies = {operation.output: constants[operation.inputs[0]] for operation in operations
              if operation.name == "clone" and operation.inputs[0] in constants and operation.output not in updated}
    left = tuple(operation for operation in operations if operation.output not in copies)
    read = {x for operation in left for x in operation.inputs}
    return left, {name: x for name, x in constants.items() if name in read} | copies


def lower(request: Request) -> Program[Module]:
    """The pass that is asked for.

    Kernels take an operand as the dense array of which it is a part, from the operand's first element on. They touch
    only heads and columns that the spec has, whatever more the array has: of columns, because they read 64 at a time,
    if that is how many there are, or a multiple. So they do with gradients, of a `backward_of_parts`.

    Raises:
      UnsupportedError: it is no list of launches on that GPU, with every reason.
      LoweringError: this JAX lowers a launch to something else than a call of a Mosaic kernel, a launch writes to
        the caller's arrays, or there is no operation for what is computed beside the launches.
    """
    problem, gpu = request.problem, device.Device("gpu", **vars(request.gpu))
    spec = spec_of(problem)
    passes = launches(spec, gpu, request.implementation)
    if isinstance(problem, CacheProblem):
        return _lowered(passes.forward, gpu, {}, {}, beside.Operations((), {}), passes)
    of_parts = request.pass_name == "backward_of_parts"
    wanted: Pass | None = passes.backward if of_parts else getattr(passes, request.pass_name)
    if wanted is None:
        raise errors.unsupported(f"launches of the {request.pass_name} of {spec}", ["there is no kernel for it"],
                                 "let JAX run it")
    outer = {name: jax.ShapeDtypeStruct(shape, wanted.inputs[name].dtype)
             for name, shape in problem.outer_shapes().items()}
    shapes = {name: tuple(wanted.inputs[name].shape) for name in outer}
    if of_parts:
        gradients = {f"d{name}": x for name, x in outer.items()}
        wanted, outer = wanted.writing(gradients), outer | gradients
        shapes |= {f"d{name}": shape for name, shape in shapes.items()}
    try:
        operations = _beside(problem, wanted)
    except beside.UntranslatableError as error:
        raise LoweringError(str(error)) from error
    given = {_PREFIX + name: x for name, x in _given(problem).items()}
    lowered = _lowered(wanted, gpu, outer, given, operations, passes)
    for name, shape in shapes.items():
        if outer[name].shape != shape:
            lowered.buffers[name] = Buffer(shape, lowered.buffers[name].dtype, problem.strides()[name[-1]])
    return lowered


def _lowered(found: Pass, gpu: device.Device, outer: dict[str, jax.ShapeDtypeStruct],
             given: dict[str, jax.ShapeDtypeStruct], work: beside.Operations, passes: Passes) -> Program[Module]:
    """One of the passes, of operands that are parts of the arrays `outer`; `work` is done on what is given before."""
    as_given = _as_given(work.operations, found)
    operations = beside.needed(work.operations, [name for name in found.inputs if name not in as_given])
    operations, known = _known(operations, work.constants, found)
    constants, made = found.constants | known, {operation.output for operation in operations} & {*found.inputs}
    types = found.inputs | outer | given
    types |= {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in constants.items()}
    if any(constants[name].any() for name in found.restored):
        raise LoweringError(f"what launches leave as it was must be 0: {found.restored}")
    steps = []
    with tracing(gpu):
        for launch in found.launches:
            if kept := {*launch.updates} & {*found.inputs, *found.constants} - {*made, *found.restored}:
                raise LoweringError(f"a launch updates {', '.join(kept)}, which outlives the call: it must update what "
                                   "launches before it made")
            step = _step(launch, [types[name] for name in launch.inputs])
            steps.append(step._replace(arrays=tuple(as_given.get(name, name) for name in step.arrays)))
            types |= launch.outputs
    return Program(buffers={name: Buffer(tuple(kind.shape), kind.dtype.name) for name, kind in types.items()
                            if name not in as_given},
                   inputs=tuple(name for name in found.inputs if name not in {*made, *known, *as_given}),
                   results=found.results,
                   constants={name: x.tobytes() for name, x in constants.items() if name not in found.restored},
                   steps=tuple(steps), given=tuple(given), operations=operations,
                   implementation=passes.implementation, restored=found.restored, left=passes.left,
                   reasons=passes.reasons)


def _step(launch: Launch, given: list[jax.ShapeDtypeStruct]) -> Step[Module]:
    """One launch, of inputs of these types."""
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


def _only_call(lowered: ir.Module) -> tuple[Module, dict[int, int], int]:
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
