"""A plan on a device: its modules loaded, its launches queued on any stream. The driver alone, no torch.

One `Loaded` a device: a module belongs to a context. Calls may come from any thread, also from one that has no context
of CUDA yet; each thread has parameters of its own, into which the addresses are written.

Whether a thread has the right context is not asked before each launch: the driver refuses one in another context than
its function's, and in none. What it refused is launched again in the right one.
"""

import ctypes
import math
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple, Self

from torch_bridge.direct import driver
from torch_bridge.direct.driver import Pointer, Size, UInt
from torch_bridge.direct.plan import Kernel, Program

__all__ = ["ALIGNMENT", "Loaded", "require_no_fork"]

ALIGNMENT = 16
"""Bytes to which the address of every array must be aligned: the need of tensor maps."""
_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_PORTABLE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_PORTABLE = 8  # blocks of a cluster
_BUFFER, _SIZE = 1, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE
_STREAM = driver.LaunchConfig.stream.offset // 8
_OF_CONTEXTS = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE

_has_loaded = _was_forked = False


def _note_fork() -> None:
    global _was_forked
    _was_forked = _was_forked or _has_loaded


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def require_no_fork() -> None:
    """Raises RuntimeError in a process that was forked after a plan was loaded."""
    if _was_forked:
        raise RuntimeError(
            f"kernels must not be launched in a process that was forked after they were loaded, got pid={os.getpid()}: "
            'CUDA does not survive a fork. Start the process with the method "spawn" or "forkserver" '
            '(multiprocessing.get_context("spawn")), or fork before CUDA is used.')


class _Step(NamedTuple):
    """A launch.

    Attributes:
      places: (place, i): the word of the parameters that is the address of the i-th array of the program.
    """

    kernel: Kernel
    function: Pointer
    places: tuple[tuple[int, int], ...]


class _Prepared(NamedTuple):
    """A step as one thread launches it: only addresses and the stream are still to be written."""

    words: "memoryview[int]"
    places: tuple[tuple[int, int], ...]
    config: "memoryview[int]"
    arguments: tuple[object, ...]  # of cuLaunchKernelEx
    name: str
    kept: tuple[object, ...]  # what the arguments point to

    @classmethod
    def of(cls, step: _Step) -> Self:
        kernel = step.kernel
        block = bytearray(kernel.parameters)
        start, size = (ctypes.c_char * len(block)).from_buffer(block), Size(len(block))
        extra = (Pointer * 5)(_BUFFER, ctypes.addressof(start), _SIZE, ctypes.addressof(size), None)
        config = driver.LaunchConfig((UInt * 3)(*kernel.grid), (UInt * 3)(*kernel.block), kernel.smem_bytes)
        cluster = driver.LaunchAttribute(driver.CLUSTER)
        if math.prod(kernel.cluster) > 1:
            cluster.value[:3] = kernel.cluster
            config.attributes, config.num_attributes = ctypes.addressof(cluster), 1
        # Ready pointers: ctypes makes one of any other object in each call.
        arguments = ctypes.byref(config), Pointer.from_param(step.function.value), None, ctypes.byref(extra)
        return cls(memoryview(block).cast("Q"), step.places, memoryview(config).cast("B").cast("Q"), arguments,
                   kernel.name, (start, size, cluster))


class Loaded:
    """The program of a plan, loaded on a device.

    Args:
      index: of the device, as the driver counts.

    Raises:
      DriverError: the driver does not take the machine code, or lacks a function.
    """

    def __init__(self, program: Program[Kernel], index: int) -> None:
        global _has_loaded
        self.index = index
        numbers = {name: i for i, name in enumerate(program.buffers)}
        self._modules: list[Pointer] = []
        try:
            with driver.current(index):
                functions = {kernel: self._function(kernel) for kernel in {step.kernel: None for step in program.steps}}
        except BaseException:
            self.unload()
            raise
        self._launch, self._threads = driver.library().cuLaunchKernelEx, threading.local()
        self._steps = tuple(
            _Step(step.kernel, functions[step.kernel],
                  tuple((place, numbers[step.arrays[i]]) for place, i in step.kernel.patches))
            for step in program.steps)
        _has_loaded = True

    def _function(self, kernel: Kernel) -> Pointer:
        module, function = Pointer(), Pointer()
        driver.call("cuModuleLoadData", ctypes.byref(module), kernel.cubin)
        self._modules.append(module)
        driver.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
        driver.call("cuFuncSetAttribute", function, ctypes.c_int(_DYNAMIC_SMEM), ctypes.c_int(kernel.smem_bytes))
        if math.prod(kernel.cluster) > _PORTABLE:
            driver.call("cuFuncSetAttribute", function, ctypes.c_int(_NON_PORTABLE), ctypes.c_int(1))
        return function

    def launch(self, addresses: Sequence[int], stream: int) -> None:
        """Queues the launches on a stream of the device.

        Args:
          addresses: of every array of the program, in the order of its buffers; multiples of ALIGNMENT.
          stream: its number; 0 is the default stream.

        Raises:
          RuntimeError: in a process that was forked after a plan was loaded.
          DriverError: the driver refuses a launch; those before it are queued.
        """
        if _was_forked:
            require_no_fork()
        try:
            steps: list[_Prepared] = self._threads.steps
        except AttributeError:
            steps = self._threads.steps = [*map(_Prepared.of, self._steps)]
        launch = self._launch
        for words, places, config, arguments, name, _ in steps:
            for place, i in places:
                words[place] = addresses[i]
            config[_STREAM] = stream
            if code := launch(*arguments):
                self._launch_again(arguments, name, code)

    def _launch_again(self, arguments: tuple[object, ...], name: str, code: int) -> None:
        """Launches what was refused with a code, in the context of the device if it was in another or in none."""
        if code in _OF_CONTEXTS and not driver.is_current(self.index):
            with driver.current(self.index):
                code = self._launch(*arguments)
            driver.adopt(self.index)
        driver.check(driver.library(), f"cuLaunchKernelEx of {name}", code)

    def unload(self) -> None:
        """Gives the modules' memory back, once the device has run what was launched, and no captured graph will."""
        with driver.current(self.index):
            while self._modules:
                driver.call("cuModuleUnload", self._modules.pop())
        self._steps, self._threads = (), threading.local()
