"""Lowers the Mosaic GPU kernels of catalogue problems for an H100, and compiles them to sm_90a machine code.

    python -m tests.hopper.offline.compile_kernels PROBLEM...

The environment must have the stand-in driver first on LD_LIBRARY_PATH, the ptxas to compile with first on PATH and the
compiler's reports switched on, as `places.environment` sets them. Prints one JSON object for each kernel, see
`machine_code`. Without a problem it lowers what it is asked for (`tools.answer`), and names a file of each module.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

from pallas_flash import Mask
from tests.hopper.offline import machine_code, tools


def mosaic_modules(lowered) -> list[bytes]:
    """The Mosaic GPU module of each kernel call in a lowered function."""
    return modules_in(lowered.compiler_ir())


def modules_in(program) -> list[bytes]:
    """The Mosaic GPU module of each kernel call in a program, an MLIR module."""
    found = []

    def walk(operation):
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            found.append(operation.attributes["mhlo.backend_config"]["module"].value_bytes)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    walk(inner.operation)

    walk(program.operation)
    return found


def numberless(module: bytes) -> bytes:
    """The module, with zeros for the digits by which its process numbers modules: of two problems with the same kernel
    the modules are equal then, and it is compiled once. It is part of a name for dumps alone.
    """
    return re.sub(rb"(?<=dump_basename\0)(\w+_)(\d+)(?=\0)", lambda m: m[1] + b"0" * len(m[2]), module)


def written(modules: list[bytes]) -> list[str]:
    """A file for each module in PALLAS_FLASH_DUMPS, the same for equal ones."""
    work, modules = Path(os.environ["PALLAS_FLASH_DUMPS"]), [*map(numberless, modules)]
    paths = [work / f"{hashlib.sha256(module).hexdigest()}.module" for module in modules]
    for path, module in zip(paths, modules, strict=True):
        path.write_bytes(module)
    return [*map(str, paths)]


def with_arrays(problem, options: list[str]):
    """The mask of a problem, in which lengths, documents or pairs are arrays."""
    import numpy as np

    from pallas_flash import masks, packed
    mask = problem.mask
    if "lengths" in options:
        mask = mask & masks.InBounds(kv_len=np.full(problem.batch, problem.kv_len - 7, np.int32))
    if "documents" in options:
        ids = (np.zeros((problem.batch, length), np.int32) for length in (problem.q_len, problem.kv_len))
        mask = mask & masks.SegmentIds(*ids)
    if "dense" in options:
        mask = mask & masks.Dense(np.ones((problem.batch, 1, problem.q_len, problem.kv_len), bool))
    if "packed" in options:
        sides = np.zeros(9, np.int32), np.zeros(9, np.int32)
        sequences = (np.zeros(length, np.int32) for length in (problem.q_len, problem.kv_len))
        mask = packed.Packed(mask, *sides, *sequences, "last")
    if "padding" in options:
        mask = mask & masks.Dense(np.ones((problem.batch, 1, 1, problem.kv_len), bool))
    if "own" in options:
        mask = mask & Groups(*(np.zeros((problem.batch, length), np.int32)
                               for length in (problem.q_len, problem.kv_len)))
    return mask


@dataclasses.dataclass(frozen=True)
class Groups(Mask):
    """Pairs of one group, within 1,000 positions."""

    position_axes: ClassVar = {"q_groups": ("q",), "kv_groups": ("kv",)}

    q_groups: Any
    kv_groups: Any

    def keep(self, q_pos, kv_pos):
        return (self.q_groups[q_pos] == self.kv_groups[kv_pos]) & (kv_pos > q_pos - 1000)


def score_of(problem, options: list[str]):
    """A score function: ALiBi, a table of distances, or one that bends scores, whose derivative is not 1."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_flash import ALiBi, RelativeBias

    def bent(score, batch, head, q_pos, kv_pos):
        return jnp.where(q_pos - kv_pos > 100, 0.5 * score, 30 * jnp.tanh(score / 30))

    found = {"alibi": ALiBi(np.ones(problem.q_heads, np.float32)), "bent": bent,
             "table": RelativeBias(np.ones((problem.q_heads, 513), np.float32))}
    return next((score for name, score in found.items() if name in options), None)


def decoding(problem, options: list[str]):
    """A query against a cache of a problem's keys, with "pages" in pages of 16: a function, and its arguments. With
    "bias" there is one of each key, with "heads" of each head, too; with "sinks" there are sinks; with "eight" keys and
    values are of eight bits, with scales of heads."""
    import jax
    import jax.numpy as jnp

    from pallas_flash import cache
    spec, size = problem.spec(), 16 if "pages" in options else problem.kv_len
    stored = jnp.float8_e4m3fn if "eight" in options else spec.dtype
    q = jax.ShapeDtypeStruct((spec.batch, 1, spec.q_heads, spec.d), spec.dtype)
    keys = (jax.ShapeDtypeStruct((batch, length, heads, d), stored) for batch, length, heads, d in (
        (spec.batch * spec.kv_len // size, size, spec.kv_heads, d) for d in (spec.d, spec.d_v)))
    lengths, table = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (
        (spec.batch,), (spec.batch, spec.kv_len // size)))

    heads = (spec.batch, spec.q_heads, 1, spec.kv_len) if "heads" in options else (1, 1, 1, spec.kv_len)
    more = {"bias": jax.ShapeDtypeStruct(heads, jnp.float32)} if "bias" in options else {}
    more |= {"sinks": jax.ShapeDtypeStruct((spec.q_heads,), jnp.float32)} if "sinks" in options else {}

    def call(q, cached, more):
        return cache.attend(q, cached, softcap=problem.softcap, return_lse=True, implementation="hopper", **more)

    scales = [jax.ShapeDtypeStruct((1, spec.kv_heads), jnp.float32)] * 2 if "eight" in options else []
    return call, (q, cache.Cache(*keys, lengths, table if "pages" in options else None, "BLHD", *scales), more)


SCHEDULED = {"bands": dict(bands=4), "late": dict(combines_late=True, query_slots=2, pieces_at_once=4),
             "cluster": dict(cluster=8), "two": dict(workers=2, num_stages=3), "three": dict(workers=3)}
"""How schedules of decoding differ from the default, by option."""


@contextlib.contextmanager
def scheduled(arguments, options: list[str]):
    """A context in which `decoding`'s arguments have the schedule of the options.

    JAX keeps what it has traced by the arguments, which are those of the default schedule: it is forgotten.
    """
    import jax

    from pallas_flash import Causal, cache, device
    from pallas_flash.kernels.hopper import defaults
    fields = {name: value for option in options for name, value in SCHEDULED.get(option, {}).items()}
    if not fields:
        yield
        return
    q, cached, _ = arguments  # sinks change no schedule
    spec = cache._Call.of(q, cached, Causal(), None, {}).spec
    jax.clear_caches()
    with defaults.assume(dataclasses.replace(defaults.default_forward(spec, device.H100), **fields)):
        yield
    jax.clear_caches()


def with_mask_kernel(spec):
    """Both passes with schedules that have the mask's arrays made by a launch: a function, and its arguments."""
    import dataclasses

    from pallas_flash import device
    from pallas_flash.kernels.hopper import defaults, launches
    schedules = defaults.default_forward(spec, device.H100), defaults.default_backward(spec, device.H100)
    passes = [make(spec, dataclasses.replace(schedule, mask_kernel=True))
              for make, schedule in zip((launches.forward, launches.backward), schedules)]

    def call(*arrays):
        return [launched(*own) for launched, own in zip(passes, arrays)]

    return call, [tuple(launched.inputs.values()) for launched in passes]


def merged(spec):
    """A part of a problem of twice the lengths, whose results the kernels merge, in the backward where they can: a
    function, and its arguments.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    from pallas_flash import device
    from pallas_flash.kernels.hopper import defaults, merging
    from pallas_flash.spec import Results
    part = dataclasses.replace(spec, partial=True)
    whole = dataclasses.replace(part, q_len=2 * spec.q_len, kv_len=2 * spec.kv_len)
    shapes = whole.operand_shapes
    dout, q, k, v = (jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (whole.out_shape, *shapes[:3]))
    out, stats = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (whole.out_shape, whole.stats_shape))

    def call(q, k, v, dout, places, out, stats):
        first = merging.first_part(part, q, k, v, places, stats)
        merged = first, merging.forward(part, q, k, v, places, Results(out, stats))
        if defaults.default_parts(part, device.current()) is None:
            return merged
        sums = merging.sums(whole, stats, stats)
        dk, dv, sums = merging.backward(part, (q, k, v, dout), places, sums)
        return merged, dk, dv, merging.dq(whole, sums)

    return call, (q, k, v, dout, jax.ShapeDtypeStruct((spec.batch, 4), jnp.int32), out, stats)


def lower(name: str, options: list[str]):
    """A catalogue problem, lowered for an H100 with implementation="hopper"; options: gradients, deterministic,
    softcap, ragged (48 positions less), wide (twice the head dimensions), dropout, partial (results in float32; with
    gradients always, and dropout of a part), lengths, documents, packed, dense, padding, own (a mask that holds arrays
    beside the problem's; own: of a class that kernels do not know), sinks, bias (of each key), pairs (a bias of each
    pair; bias32: in float32), learned (with gradients also that of the bias), alibi, table, bent (see `score_of`);
    decode, pages, heads, sinks, eight: see `decoding`; bands, late, cluster: see `scheduled`; mask: see
    `with_mask_kernel`; merge: see `merged`; keys: the launch that makes dropout's."""

    import jax
    import jax.numpy as jnp

    from pallas_flash import autodiff, device, flash_attention
    from pallas_flash.kernels.mosaic import dropout_keys
    from pallas_flash.spec import Operands
    from pallas_flash.testing import problems
    problem, less, times = problems.find(name), 48 if "ragged" in options else 0, 2 if "wide" in options else 1
    problem = dataclasses.replace(problem, deterministic="deterministic" in options, q_len=problem.q_len - less,
                                  kv_len=problem.kv_len - less, d=times * problem.d, d_v=times * problem.d_v,
                                  softcap=30.0 if "softcap" in options else None,
                                  dropout_rate=0.1 if "dropout" in options else 0.0,
                                  dtypes=("float32",) if "float32" in options else problem.dtypes)
    problem = dataclasses.replace(problem, mask=with_arrays(problem, options))
    spec = problem.spec()
    shapes = ((spec.q_len, spec.q_heads, spec.d), (spec.kv_len, spec.kv_heads, spec.d),
              (spec.kv_len, spec.kv_heads, spec.d_v))
    q, k, v = (jax.ShapeDtypeStruct(spec.shape(*shape), spec.dtype) for shape in shapes)
    biases = {"bias": (spec.batch, 1, 1, spec.kv_len), "pairs": (1, spec.q_heads, spec.q_len, spec.kv_len)}
    bias_dtype = jnp.float32 if "bias32" in options else spec.dtype
    bias = [jax.ShapeDtypeStruct(shape, bias_dtype) for name, shape in biases.items() if name in options]
    sinks = jnp.zeros(spec.q_heads) if "sinks" in options else None
    keywords = dict(mask=problem.mask, sinks=sinks, softcap=problem.softcap, scale=problem.scale, layout=problem.layout,
                    dropout_rate=problem.dropout_rate, deterministic=problem.deterministic, return_lse=True,
                    score=score_of(problem, options), implementation="hopper")

    def call(q, k, v, *bias):
        rng = jnp.array([1, 2], jnp.uint32)
        return flash_attention(q, k, v, bias=bias[0] if bias else None, dropout_rng=rng, **keywords)

    def call_with_gradients(q, k, v, *bias):
        learned, given = (bias, []) if "learned" in options else ([], bias)
        results, vjp = jax.vjp(lambda *learned: call(*learned, *given), q, k, v, *learned)
        return vjp(results)

    def partial_call(q, k, v):
        operands = Operands(q, k, v, None, (), problem.mask, (), None, None, None)
        if spec.dropout_rate:
            operands = operands._replace(dropout_seed=jnp.array([1, 2], jnp.uint32),
                                         dropout_origin=jnp.array([0, 8, 64, 128]))
        results = autodiff.forward(partial, "hopper", operands)
        given = results._replace(out=results.out.astype(partial.dtype))
        return results, autodiff.backward(partial, "hopper", operands, given, given)

    partial = dataclasses.replace(spec, partial=True, dropout_moved=64 if spec.dropout_rate else 0)
    function, arguments = call_with_gradients if "gradients" in options else call, (q, k, v, *bias)
    if "partial" in options:
        function = partial_call
    if "decode" in options:
        function, arguments = decoding(problem, options)
        with device.assume(device.H100), scheduled(arguments, options):
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    if "mask" in options:
        function, arguments = with_mask_kernel(spec)
    if "merge" in options:
        function, arguments = merged(spec)
    if "keys" in options:
        function, arguments = dropout_keys.launch(spec).kernel, [jax.ShapeDtypeStruct((2,), jnp.uint32)]
    with device.assume(device.H100):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def modules_of(name: str) -> list[bytes]:
    """Those of a name, which may end in options of `lower`: "+gradients", "+softcap", "+documents" and others."""
    problem, *options = name.split("+")
    return mosaic_modules(lower(problem, options))


def main(names: list[str]) -> None:
    """Compiles what is named."""
    for name in names:
        for module in modules_of(name):
            print(json.dumps(dict(problem=name) | machine_code.compile_module(module)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    else:
        tools.answer(lambda question: written(modules_of(question)))
