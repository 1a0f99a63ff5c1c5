"""JAX's CUDA plugin as a compiler: the only file that uses what JAX keeps to itself, all of it listed here.

    xla_cuda_plugin.so in jax_plugins.xla_cuda13   the library that jax-cuda13-plugin brings
    MosaicGpuCompile(module, length)               compiles a Mosaic module for the device of the current context
      -> pointers: what to launch with, the function that launches, the compiled kernel
    launch(what to launch with, stream, addresses) computes the parameters and launches; ends the process if that fails
      of JAX 0.12: (the compiled kernel, what to launch with, stream, addresses, the device's index)
    the compiled kernel                            a structure, one of whose first words points to the machine code

It was read in JAX 0.11 and 0.12. In other releases it may be otherwise, and nothing would tell: they are refused.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from torch_bridge.direct import driver, requirements

__all__ = ["Compiled", "compile_module", "threads", "why_not"]

FUNCTION = "MosaicGpuCompile"
_WORDS = 32  # of the compiled kernel's structure, in which the pointer to the machine code is looked for
_CUDA, _ELF, _HEAD_BYTES = 190, b"\x7fELF", 64
Pointer = ctypes.c_void_p


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
      launch: (stream, addresses of the arrays): queues it, with a context current. An error ends the process.
      cubin: its machine code, an ELF file for one compute capability.
    """

    launch: Callable[[int, Sequence[int]], None]
    cubin: bytes


def why_not() -> str | None:
    """Why this JAX cannot compile for the direct path, and what to do; None if it can."""
    reason = requirements.why_not_version(jax.__version__) or requirements.why_not()
    if reason is None and not hasattr(_library(), FUNCTION):
        return f"needs {FUNCTION} in {requirements.plugin()}, which lacks it: install that of jax {jax.__version__}"
    return reason


@functools.cache
def _library() -> ctypes.CDLL:
    import jax.experimental.mosaic.gpu  # noqa: F401  tells the compiler, in variables, where its own libraries lie
    return ctypes.CDLL(str(requirements.plugin()))


def compile_module(module: bytes) -> Compiled:
    """Compiles a Mosaic module for the device of the thread's current context.

    Raises:
      RuntimeError: it does not compile, or is not what was read in JAX 0.11 and 0.12.
    """
    if reason := why_not():
        raise RuntimeError(f"the direct path {reason}")
    compiler = getattr(_library(), FUNCTION)
    compiler.argtypes, compiler.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.POINTER(Pointer)
    found = compiler(module, len(module))
    if not found:
        raise RuntimeError(f"{FUNCTION} could not compile the kernel; what it wrote to the standard error says why")
    state, function, kernel = found[0], found[1], found[2]
    takes_device = jax.__version_info__[:2] >= (0, 12)
    kinds = Pointer, Pointer, ctypes.POINTER(Pointer)
    native = ctypes.CFUNCTYPE(None, *((Pointer, *kinds, ctypes.c_int) if takes_device else kinds))(function)

    def launch(stream: int, addresses: Sequence[int]) -> None:
        given = state, stream, (Pointer * len(addresses))(*addresses)
        if takes_device:
            native(kernel, *given, driver.current_device())
        else:
            native(*given)

    return Compiled(launch, _cubin(kernel))


def _cubin(structure: int) -> bytes:
    """The machine code to which the structure of a compiled kernel points."""
    spans = _readable()

    def is_there(word: int, size: int) -> bool:
        return any(first <= word and word + size <= end for first, end in spans)

    if is_there(structure, 8 * _WORDS):
        for word in (ctypes.c_uint64 * _WORDS).from_address(structure):
            if is_there(word, _HEAD_BYTES):
                head = ctypes.string_at(word, _HEAD_BYTES)
                size = _elf_bytes(head)
                if size and is_there(word, size):
                    return ctypes.string_at(word, size)
    raise RuntimeError(f"the compiled kernel of jax {jax.__version__} does not point to its machine code: the direct "
                       "path does not know this release. Let JAX's runtime run it (PALLAS_FLASH_DIRECT=0).")


def _readable() -> list[tuple[int, int]]:
    """The memory of this process that can be read."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    found: list[tuple[int, int]] = []
    for span, rights, *_ in lines:
        first, end = (int(x, 16) for x in span.split("-"))
        if "r" not in rights:
            continue
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], end
        else:
            found.append((first, end))
    return found


def _elf_bytes(head: bytes) -> int:
    """The length of the ELF file for CUDA that begins so; 0 if none does."""
    if head[:4] != _ELF or struct.unpack_from("<H", head, 18)[0] != _CUDA:
        return 0
    program, sections = struct.unpack_from("<QQ", head, 32)
    program_size, programs, section_size, count = struct.unpack_from("<4H", head, 54)
    return int(max(program + program_size * programs, sections + section_size * count))


def threads() -> int:
    """How many kernels to compile at once."""
    return max(1, len(os.sched_getaffinity(0)))
