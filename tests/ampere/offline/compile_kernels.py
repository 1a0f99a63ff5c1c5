"""Lowers the kernels with mma.sync for a GPU, and compiles them to its machine code.

    python -m tests.ampere.offline.compile_kernels CAPABILITY SPEC...

CAPABILITY is such as 8.9. A SPEC is "d64", "d192-v128", "d128-ragged", "d64-softcap", "d64-dropout", "d64-repeats"
(deterministic), "d64-bias" (of each key), "d64-pairs" (a bias of each pair), or has one of `SCORES`, as "d64-alibi"
does, or of `MASKS`, as "d64-lengths" does: it is causal without. Or it is "exported", or "d64-cache" (`cached`). With
"launched" a launch makes what is read of a mask's arrays. The environment is that of
`tests.hopper.offline.compile_kernels`, and so is what is printed. Without arguments it lowers what it is asked for,
such as "8.9 d64".
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir import ir

from pallas_flash import ALiBi, RelativeBias, device, flash_attention, masks, scores
from pallas_flash.filled import Filled
from pallas_flash.kernels.ampere import defaults, launches
from pallas_flash.kernels.mosaic.target import lowering_for
from pallas_flash.mask_fields import ArrayField
from pallas_flash.paging import Pages
from pallas_flash.spec import AttentionSpec
from tests.hopper.offline import machine_code, tools
from tests.hopper.offline.compile_kernels import modules_in, mosaic_modules, written

GPUS = {"8.0": device.A100, "8.9": device.L4, "9.0": device.H200, "10.0": device.B200, "12.0": device.RTX_5090}


_IDS, _NUMBER = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 4096), (1,)))
MASKS = {
    "window": masks.Window(300, 50),
    "lengths": masks.Causal(_NUMBER) & masks.InBounds(kv_len=_NUMBER),
    "documents": masks.Causal() & masks.SegmentIds(_IDS, _IDS),
    "dense": masks.Dense(jax.ShapeDtypeStruct((1, 4, 4096, 4096), jnp.bool_)),
}
BIASES = {"bias": (1, 1, 1, 4096), "pairs": (1, 4, 4096, 4096)}


def bent(score, batch, head, q_pos, kv_pos):
    """A score function whose derivative is not 1."""
    return jnp.where(q_pos - kv_pos > 100, 0.5 * score, 30 * jnp.tanh(score / 30))


SCORES = {name: scores.checked(score).with_placeholders() for name, score in (
    ("alibi", ALiBi(np.ones(4, np.float32))), ("bent", bent), ("table", RelativeBias(np.ones((4, 63), np.float32))))}


def spec_of(name: str) -> AttentionSpec:
    """The problem of a name."""
    options = name.split("-")
    number = lambda letter: next((int(x[1:]) for x in options if re.fullmatch(rf"{letter}\d+", x)), None)
    d, d_v, length = number("d"), number("v"), 4096 - 48 * ("ragged" in options)
    shape = lambda dim: jax.ShapeDtypeStruct((1, length, 4, dim), jnp.bfloat16)
    mask = next((MASKS[name] for name in options if name in MASKS), masks.Causal())
    score = next((SCORES[name] for name in options if name in SCORES), None)
    bias = next((jax.ShapeDtypeStruct(BIASES[name], jnp.bfloat16) for name in options if name in BIASES), None)
    if bias is not None or score is not None:  # as `mosaic.bias.as_mask` does
        of_keys = bias is not None and bias.shape[2] == 1
        mask &= masks.Dense(jax.ShapeDtypeStruct(bias.shape if of_keys else (1, 1, 1, 1), jnp.bool_))
    return AttentionSpec.of(shape(d), shape(d), shape(d_v or d), mask=mask, bias=bias, score=score,
                            softcap=30.0 if "softcap" in options else None,
                            dropout_rate=0.1 if "dropout" in options else 0.0, deterministic="repeats" in options)


def cached(name: str) -> AttentionSpec:
    """The problem of a name like "d128-cache-pages-r64": of queries against a cache, r (8) of which share a key head,
    with keys in pages of 16, a bias of each key and head, and sinks.
    """
    options = name.split("-")
    number = lambda letter, other: next((int(x[1:]) for x in options if re.fullmatch(rf"{letter}\d+", x)), other)
    d, rows, batch, length = number("d", None), number("r", 8), 16, 4096
    q_len = 1 if rows <= 16 else rows // 4
    shape = lambda length, heads, dim: jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.bfloat16)
    spec = AttentionSpec.of(shape(q_len, 2 * rows // q_len, d), shape(length, 2, d), shape(length, 2, number("v", d)),
                            softcap=30.0 if "softcap" in options else None)
    if "pages" in options:
        spec = spec.paged(Pages(batch * length // 16, 16))
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    spec = spec.masked(Filled(masks.Causal(), lengths, q_len).canonical(), None)
    field = lambda *shape: ArrayField(shape, np.dtype("float32")) if shape[-1] else None
    return dataclasses.replace(
        spec, bias=field(batch, spec.q_heads, 1, length * ("bias" in options)),
        sinks=field(1, spec.q_heads, 1, int("sinks" in options)))


def exported(gpu: device.Device) -> list[bytes]:
    """The Mosaic GPU modules of a program that takes gradients, exported for a GPU that is not there."""
    q = jax.ShapeDtypeStruct((1, 500, 4, 64), jnp.bfloat16)
    loss = lambda q, k, v: flash_attention(q, k, v, mask=masks.Causal()).astype(jnp.float32).sum()
    with device.assume(gpu):
        program = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"])(q, q, q)
    with mlir.make_ir_context():
        return modules_in(ir.Module.parse(program.mlir_module()))


def modules_of(capability: str, name: str) -> list[bytes]:
    """Those of a name, lowered for the capability, which is not that of JAX's default device: there is none."""
    gpu = GPUS[capability]
    if name == "exported":
        return exported(gpu)
    has_cache, found = "cache" in name.split("-"), []
    spec = cached(name) if has_cache else spec_of(name)
    made = [(launches.forward, defaults.default_forward(spec, gpu))]
    made += [] if has_cache else [(launches.backward, defaults.default_backward(spec, gpu))]
    changed = dict(mask_kernel=True) if "launched" in name.split("-") else {}
    for make, schedule in made:
        launched = make(spec, dataclasses.replace(schedule, **changed))
        function = jax.jit(lambda *arrays, launched=launched: launched(*arrays))
        with lowering_for(gpu):
            lowered = function.trace(*launched.inputs.values()).lower(lowering_platforms=("cuda",))
        found += mosaic_modules(lowered)
    return found


def main(capability: str, names: list[str]) -> None:
    """Compiles what is named."""
    for name in names:
        for module in modules_of(capability, name):
            print(json.dumps(dict(problem=name) | machine_code.compile_module(module)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1], sys.argv[2:])
    else:
        tools.answer(lambda question: written(modules_of(*question.split())))
