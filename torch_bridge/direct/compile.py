"""Compiles the launches of a program, and records how each is launched. JAX alone; needs a GPU, or a stand-in driver.

The host part of a Mosaic kernel computes its parameters (pointers, tensor maps) from the addresses of its arrays, and
launches. That is captured into a CUDA graph, which runs nothing, with made-up addresses, and read back from there. What
differs between two such recordings with other addresses are the addresses: a tensor map holds its address as a word.
"""

import concurrent.futures
import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch_bridge.direct import driver, plugin
from torch_bridge.direct.driver import Pointer, Size
from torch_bridge.direct.plan import Kernel, Module, Program, Step

__all__ = ["compile_program"]

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: loading the module, which the first launch does, is allowed
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


class _Launch(NamedTuple):
    """A captured launch."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    cluster: tuple[int, int, int]
    words: tuple[int, ...]


def compile_program(program: Program[Module], index: int, report: Callable[[str], None]) -> Program[Kernel]:
    """The program with each kernel compiled for a device and recorded.

    Args:
      index: of the device, as the driver counts.
      report: told of each kernel that is done.

    Raises:
      RuntimeError: this JAX cannot compile, or launches otherwise than by addresses; DriverError is one.
    """
    modules = {step.kernel: len(step.arrays) for step in program.steps}
    with driver.current(index), concurrent.futures.ThreadPoolExecutor(plugin.threads()) as pool:
        tasks = {module: pool.submit(_compiled, module, index) for module in modules}
        kernels = {}
        for done, (module, task) in enumerate(tasks.items(), 1):
            compiled = task.result()
            kernels[module] = _recorded(compiled, modules[module])
            report(f"compiled {done} of {len(tasks)}")
    steps = tuple(Step(kernels[module], names) for module, names in program.steps)
    return Program(program.buffers, program.inputs, program.results, program.constants, steps, program.given,
                   program.operations, program.implementation, program.restored, program.left, program.reasons)


def _compiled(module: Module, index: int) -> plugin.Compiled:
    with driver.current(index):
        return plugin.compile_module(module.code)


def _recorded(compiled: plugin.Compiled, count: int) -> Kernel:
    """The launch of a kernel on `count` arrays."""
    first = [(i + 1) << 36 for i in range(count)]
    second = [((i + 17) << 36) + (i << 8) for i in range(count)]
    launch, other = (_capture(compiled, addresses) for addresses in (first, second))
    if launch._replace(words=()) != other._replace(words=()) or len(launch.words) != len(other.words):
        raise RuntimeError(f"{launch.name} is launched otherwise for other addresses of its arrays")
    pairs = {pair: i for i, pair in enumerate(zip(first, second))}
    patches = []
    for place, pair in enumerate(zip(launch.words, other.words)):
        if pair[0] != pair[1]:
            if pair not in pairs:
                raise RuntimeError(f"parameters of {launch.name} depend on addresses, but are none: "
                                   f"{pair[0]:#x} and {pair[1]:#x} at byte {8 * place}")
            patches.append((place, pairs[pair]))
    words = list(launch.words)
    for place, _ in patches:
        words[place] = 0  # an address that nobody gave is none
    return Kernel(launch.name, launch.grid, launch.block, launch.smem_bytes, compiled.cubin,
                  struct.pack(f"<{len(words)}Q", *words), tuple(patches), launch.cluster)


def _capture(compiled: plugin.Compiled, addresses: Sequence[int]) -> _Launch:
    """What the kernel's host part launches for these addresses."""
    stream, graph = Pointer(), Pointer()
    driver.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))  # non-blocking
    try:
        driver.call("cuStreamBeginCapture_v2", stream, ctypes.c_int(RELAXED))
        assert stream.value is not None
        compiled.launch(stream.value, addresses)
        driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            return _only_launch(graph)
        finally:
            driver.call("cuGraphDestroy", graph)
    finally:
        driver.call("cuStreamDestroy_v2", stream)


def _only_launch(graph: Pointer) -> _Launch:
    """The launch that a graph consists of."""
    count = Size()
    driver.call("cuGraphGetNodes", graph, None, ctypes.byref(count))
    if count.value != 1:
        raise RuntimeError(f"a launch must be one node of a graph, this JAX makes {count.value}")
    node, kind = Pointer(), ctypes.c_int()
    driver.call("cuGraphGetNodes", graph, ctypes.byref(node), ctypes.byref(count))
    driver.call("cuGraphNodeGetType", node, ctypes.byref(kind))
    if kind.value != KERNEL_NODE:
        raise RuntimeError(f"a launch must be a kernel's node of a graph (0), this JAX makes one of type {kind.value}")
    value = (driver.UInt * driver.VALUE_WORDS)()
    driver.call("cuGraphKernelNodeGetAttribute", node, ctypes.c_int(driver.CLUSTER), ctypes.byref(value))
    cluster = max(1, value[0]), max(1, value[1]), max(1, value[2])  # 0 where none was given
    found = driver.NodeParameters()
    driver.call("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(found))
    name = ctypes.c_char_p()
    driver.call("cuFuncGetName", ctypes.byref(name), Pointer(found.function))
    assert name.value is not None
    return _Launch(name.value.decode(), tuple(found.grid), tuple(found.block), found.smem_bytes, cluster,
                   _words(found))


def _words(found: driver.NodeParameters) -> tuple[int, ...]:
    """The block of parameters of a kernel's node, filled with zeros up to a multiple of 8 bytes."""
    block, offset, size, i = bytearray(), Size(), Size(), 0
    while True:
        try:
            driver.call("cuFuncGetParamInfo", Pointer(found.function), Size(i), ctypes.byref(offset),
                        ctypes.byref(size))
        except driver.DriverError as error:
            if error.code != 1 or i == 0:  # invalid value: there are no more
                raise
            break
        block.extend(bytes(offset.value + size.value - len(block)))
        block[offset.value:] = ctypes.string_at(found.parameters[i], size.value)
        i += 1
    block.extend(bytes(-len(block) % 8))
    return struct.unpack(f"<{len(block) // 8}Q", block)
