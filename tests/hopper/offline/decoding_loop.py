"""Compiles decoding loops for an H200 by XLA:GPU, without a GPU, and counts what a step of one runs; run by
`test_decode`, in its own process.

    python -m tests.hopper.offline.decoding_loop PROGRAM...

The environment must be that of `places.environment`, with XLA_FLAGS such that XLA writes its list of thunks, in text,
into the current folder. Prints one JSON object for each program: how many thunks of each kind a step of the loop runs,
and how many of them are not in a CUDA graph (XLA's command buffers).
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_flash import cache, device
from tests.context_parallel.offline.compile_programs import TARGET

LAYERS, STEPS = 4, 8
VERSIONS = 'driver_version: "13.0.0" runtime_version: "13.0.0" registers_per_core_limit'
"""Of an old driver, which it takes this for without the number, XLA expects no calls of a library in CUDA graphs."""
PROGRAMS = {"one": (1, 1024, 0), "pages": (16, 1024, 16), "sinks and a bias": (1, 1024, 0)}
"""By name: sequences, capacity, and positions of a page (0: contiguous)."""


def compiled(batch: int, capacity: int, page: int, adds: bool) -> jax.stages.Compiled:
    """A loop of some steps, in each of which all layers append a key and attend, 32 query heads to 8 key heads; with
    sinks and a bias if it `adds` them.
    """
    target = TARGET.replace("registers_per_core_limit", VERSIONS)
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    place = SingleDeviceSharding(found.devices[0])
    array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    rows = array((batch * capacity // page, page, 8, 128) if page else (batch, capacity, 8, 128))
    table = array((batch, capacity // page), jnp.int32) if page else None
    caches = [cache.Cache(rows, rows, array((batch,), jnp.int32), table) for _ in range(LAYERS)]
    q, *new = (array((batch, 1, heads, 128)) for heads in (32, *(8,) * 2 * LAYERS))
    more = dict(sinks=array((32,), jnp.float32), bias=array((1, 32, 1, capacity), jnp.float32)) if adds else {}

    def step(state: tuple[list[cache.Cache], jax.Array], new: list[jax.Array], more: dict[str, jax.Array]):
        caches, x = state
        after = []
        for i, layer in enumerate(caches):
            after.append(cache.append(layer, *new[2 * i:2 * i + 2]))
            x = cache.attend(x, after[-1], implementation="hopper", **more)
        return after, x

    def decoding(caches: list[cache.Cache], x: jax.Array, new: list[jax.Array], more: dict[str, jax.Array]):
        return lax.fori_loop(0, STEPS, lambda _, state: step(state, new, more), (caches, x))

    with device.assume(device.H200):
        return jax.jit(decoding, donate_argnums=0).lower(caches, q, new, more).compile()


def thunks(text: str) -> tuple[Counter[str], int]:
    """What a step runs: how many thunks of each kind, and how many are not in a command buffer."""
    found = re.findall(r"^( *)\d+: (k\w+)", text.split("body:")[1], re.MULTILINE)
    depth = min(len(indent) for indent, _ in found)
    run = [(indent, kind) for indent, kind in found if kind != "kCommandBuffer"]
    return Counter(kind for _, kind in run), sum(len(indent) == depth for indent, _ in run)


def main(names: list[str]) -> None:
    for name in names:
        for old in Path().glob("*jit_decoding*"):
            old.unlink()
        compiled(*PROGRAMS[name], adds=name.startswith("sinks"))
        text, = (path.read_text() for path in Path().glob("*jit_decoding.thunk_sequence_after_thunk_passes.txt"))
        kinds, outside = thunks(text)
        print(json.dumps(dict(program=name, kinds=kinds, outside=outside)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
