"""Compiles a kernel whose warpgroups ask for unequal numbers of registers, and prints what ptxas says of it, as JSON:
has_gpu, and if there is one of compute capability 9.0, moves_registers, and the line of the report against it.

JAX is here as a compiler alone (JAX_PLATFORMS=cpu): the CUDA plugin's MosaicGpuCompile, which it keeps to itself, wants
a current CUDA context, and writes ptxas' report where MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_TO say.
"""

import ctypes
import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.device import H100
from pallas_flash.kernels.hopper.support import CAPABILITY
from pallas_flash.kernels.mosaic.target import lowering_for

PLUGINS = ("xla_cuda13", "xla_cuda12")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def enter_context() -> bool:
    """Makes the primary context of the first GPU of the Hopper kernels current; False if there is no such GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    for index in range(count.value):
        found = [ctypes.c_int(), ctypes.c_int()]
        driver.cuDeviceGet(ctypes.byref(device), index)
        for value, attribute in zip(found, (_MAJOR, _MINOR)):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        if tuple(value.value for value in found) == CAPABILITY:
            code = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) or driver.cuCtxSetCurrent(context)
            if code:  # its memory may be full, or it may be another process' alone
                raise SystemExit(f"a context of GPU {index} could not be entered (CUDA error {code})")
            return True
    return False


def compiler() -> ctypes.CDLL:
    """The library of JAX's CUDA plugin, which is not imported."""
    for name in PLUGINS if importlib.util.find_spec("jax_plugins") else ():
        found = importlib.util.find_spec(f"jax_plugins.{name}")
        if found is not None and found.origin is not None:
            return ctypes.CDLL(str(Path(found.origin).with_name("xla_cuda_plugin.so")))
    raise SystemExit("there is no CUDA plugin of JAX: install jax[cuda13]")


def module() -> bytes:
    """A kernel of two warpgroups, of which one gives registers to the other."""
    def kernel(out: jax.Ref) -> None:
        warpgroup = lax.axis_index("wg")
        pl.when(warpgroup == 0)(lambda: plgpu.set_max_registers(232, action="increase"))
        pl.when(warpgroup == 1)(lambda: plgpu.set_max_registers(40, action="decrease"))

        @pl.when(warpgroup == 0)
        def _() -> None:
            out[...] = plgpu.layout_cast(jnp.full((128,), 1.0, jnp.float32), plgpu.Layout.WG_STRIDED((128,), 1))

    run = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), num_threads=2, thread_name="wg")
    with lowering_for(H100):
        text = jax.jit(run).trace().lower(lowering_platforms=("cuda",)).compiler_ir()
    operations = [operation for function in text.body.operations for operation in function.regions[0].blocks[0]]
    call = next(x for x in operations if x.operation.name == "stablehlo.custom_call")
    found: bytes = call.attributes["mhlo.backend_config"]["module"].value_bytes
    return found


def main() -> None:
    """Asks."""
    if not enter_context():
        print(json.dumps(dict(has_gpu=False)))
        return
    code, function = module(), compiler().MosaicGpuCompile
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    if not function(code, len(code)):
        raise SystemExit("MosaicGpuCompile could not compile the kernel")
    report = "".join(path.read_text() for path in Path(os.environ["MOSAIC_GPU_DUMP_TO"]).glob("*.ptxas"))
    if not report:
        raise SystemExit("MosaicGpuCompile wrote no report of ptxas")
    against = re.search(r"C7504.*|.*setmaxnreg.*ignored.*", report)
    print(json.dumps(dict(has_gpu=True, moves_registers=against is None,
                          report=against[0].strip() if against else "")))


if __name__ == "__main__":
    main()
