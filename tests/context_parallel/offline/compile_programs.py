"""Compiles programs over several H200s by XLA:GPU, without a GPU; run by `test_offline`, in its own process.

    python -m tests.context_parallel.offline.compile_programs STRATEGY:N:MASK...

N is the number of devices, MASK "causal" or "full"; STRATEGY "ring", "merged" (a ring whose kernels merge), "rounds"
(the same, but no steps are unrolled), "all_gather" or "all_to_all"; both passes are one program. The environment must
have the stand-in driver first on LD_LIBRARY_PATH, as `places.environment` sets it. Prints one JSON object for each
program: the traffic of each kind of collective (`hlo.Traffic`), how many Mosaic kernels a device runs, the bytes that
it writes beside them, and those of arguments, results and temporary memory.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_flash import Causal, Full, context_parallel_attention, device
from pallas_flash.context_parallel import unrolled
from pallas_flash.kernels.hopper import support
from tests.context_parallel.offline import hlo, sizes

AXIS = "sequence"
PLACE = PartitionSpec(None, AXIS)
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""An H200, as XLA describes it."""


UNROLLED = unrolled.LONGEST
MASKS = {"causal": Causal(), "full": Full()}


def compiled(strategy: str, n: int, mask: str):
    """The program, compiled for n devices of one host."""
    merges = strategy in ("merged", "rounds")
    support.KERNELS_MERGE = merges
    unrolled.LONGEST = 0 if strategy == "rounds" else UNROLLED
    found = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{n}")
    mesh = jax.make_mesh((n,), (AXIS,), devices=found.devices, axis_types=(jax.sharding.AxisType.Auto,))
    problem, place = sizes.problem(n), NamedSharding(mesh, PLACE)
    q, k, v, dout = (jax.ShapeDtypeStruct((problem.batch, sizes.SEQUENCE, heads, d), jnp.bfloat16, sharding=place)
                     for heads, d in ((problem.q_heads, problem.d), (problem.kv_heads, problem.d),
                                      (problem.kv_heads, problem.d_v), (problem.q_heads, problem.d_v)))
    forward = functools.partial(context_parallel_attention, axis_name=AXIS,
                                strategy="ring" if merges else strategy, mask=MASKS[mask],
                                mesh=mesh, spec=PLACE)

    def both(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, vjp(dout)

    with device.assume(device.H100):
        return jax.jit(both).lower(q, k, v, dout).compile()


def main(names: list[str]) -> None:
    for name in names:
        strategy, n, mask = name.split(":")
        found = compiled(strategy, int(n), mask)
        text, memory = hlo.Program(found.as_text(), int(n)), found.memory_analysis()
        traffic = {kind: counts._asdict() for kind, counts in text.traffic().items()}
        print(json.dumps(dict(
            program=name, traffic=traffic, kernels=text.kernels(), written=text.written(),
            arguments=memory.argument_size_in_bytes,
            results=memory.output_size_in_bytes, temporary=memory.temp_size_in_bytes)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
