"""Compiles the requests on its standard input, one a line, into the folder that its argument names; and launches each
program twice at the same addresses, as Mosaic's own host code does and from the recorded plan. A second argument is how
many blocks of a cluster share a head where a cache is read. Run by `test_direct_offline` in the environment with JAX's
CUDA plugin, with the stand-in driver; it imports no torch.
"""

import contextlib
import ctypes
import functools
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.modules["torch_bridge"] = package = types.ModuleType("torch_bridge")
package.__path__ = [str(ROOT / "torch_bridge")]

from pallas_flash.kernels.hopper import defaults  # noqa: E402
from pallas_flash.kernels.hopper.schedule import DecodeSchedule  # noqa: E402
from torch_bridge.direct import compile as compiling  # noqa: E402
from torch_bridge.direct import driver, lower, plan, plugin  # noqa: E402
from torch_bridge.direct.launch import Loaded  # noqa: E402
from torch_bridge.direct.problem import Request  # noqa: E402


def main(folder, cluster="1"):
    plugin.compile_module = functools.cache(plugin.compile_module)  # kept, to be launched
    for text in sys.stdin.read().splitlines():
        request = Request.of(text)
        with contextlib.nullcontext() if cluster == "1" else defaults.assume(DecodeSchedule(cluster=int(cluster))):
            lowered = lower.lower(request)
        program = compiling.compile_program(lowered, 0, lambda step: None)
        content = plan.write(program, text)
        Path(folder, f"{request.key}.plan").write_bytes(content)
        addresses = {name: 0x7F00_0000_0000 + 0x10_0000 * i + 16 * i for i, name in enumerate(program.buffers)}
        with driver.current(0):
            for step in lowered.steps:
                plugin.compile_module(step.kernel.code).launch(0, [addresses[name] for name in step.arrays])
        loaded = Loaded(plan.read(content, text), 0)
        loaded.launch(list(addresses.values()), 0)
        print(captured(loaded, list(addresses.values())), flush=True)


def captured(loaded, addresses):
    """The kernels of a CUDA graph into which the launches are captured, by name and in order."""
    stream, graph, count = driver.Pointer(), driver.Pointer(), driver.Size()
    with driver.current(0):
        driver.call("cuStreamCreate", ctypes.byref(stream), driver.UInt(1))
        driver.call("cuStreamBeginCapture_v2", stream, driver.Int(0))
        loaded.launch(addresses, stream.value)
        driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        driver.call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes, names = (driver.Pointer * count.value)(), []
        driver.call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        for node in nodes:
            found, name = driver.NodeParameters(), ctypes.c_char_p()
            driver.call("cuGraphKernelNodeGetParams_v2", driver.Pointer(node), ctypes.byref(found))
            driver.call("cuFuncGetName", ctypes.byref(name), driver.Pointer(found.function))
            names.append(name.value.decode())
    return " ".join(names)


if __name__ == "__main__":
    main(*sys.argv[1:])
