"""CUDA's driver API through ctypes: only what compiling and launching need. Return codes become errors.

ctypes, and not `cuda.bindings`: a launch costs the host the same, and nothing has to be installed.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from ctypes import c_int as Int
from ctypes import c_size_t as Size
from ctypes import c_uint as UInt
from ctypes import c_void_p as Pointer

__all__ = [
    "CLUSTER", "VALUE_WORDS", "DriverError", "Int", "LaunchAttribute", "LaunchConfig", "NodeParameters", "Pointer",
    "Size", "UInt", "adopt", "call", "capability", "check", "context_of", "current", "current_device", "is_current",
    "library", "version",
]

LIBRARY = "libcuda.so.1"
_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class DriverError(RuntimeError):
    """A call of the driver that failed; its text names the call, the code and what the driver says of it."""

    def __init__(self, name: str, code: int, text: str) -> None:
        super().__init__(f"{name} returned CUDA error {code}: {text}")
        self.code = code


class NodeParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = [("function", Pointer), ("grid", UInt * 3), ("block", UInt * 3), ("smem_bytes", UInt),
                ("parameters", ctypes.POINTER(Pointer)), ("extra", Pointer), ("kernel", Pointer), ("context", Pointer)]


CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
VALUE_WORDS = 16  # of CUlaunchAttributeValue, 64 bytes


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", Int), ("padding", UInt), ("value", UInt * VALUE_WORDS)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", UInt * 3), ("block", UInt * 3), ("smem_bytes", UInt), ("stream", Pointer),
                ("attributes", Pointer), ("num_attributes", UInt)]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, initialised.

    Raises:
      RuntimeError: there is none here.
      DriverError: it finds no GPU.
    """
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise RuntimeError(f"{LIBRARY}, NVIDIA's driver, must be there to launch kernels, got {error}. Run on a "
                           "machine with an NVIDIA GPU.") from error
    check(found, "cuInit", found.cuInit(UInt(0)))
    return found


def check(found: ctypes.CDLL, name: str, code: int) -> None:
    """Raises DriverError if a call of that name returned an error."""
    if code:
        text = ctypes.c_char_p()
        found.cuGetErrorString(Int(code), ctypes.byref(text))
        raise DriverError(name, code, (text.value or b"an error that the driver does not know").decode())


def call(name: str, *arguments: object) -> None:
    """Calls a function of the driver with values of ctypes.

    Raises:
      DriverError: it returns an error, or the driver, being older, lacks it (code 500, not found).
    """
    try:
        function = getattr(library(), name)
    except AttributeError:
        raise DriverError(name, 500, "this driver has no such function; kernels need one for CUDA 13") from None
    check(library(), name, function(*arguments))


@functools.cache
def version() -> int:
    """The version of CUDA that the driver speaks, 1000 * major + 10 * minor."""
    found = Int()
    call("cuDriverGetVersion", ctypes.byref(found))
    return found.value


def capability(index: int) -> tuple[int, int]:
    """The compute capability of a device."""
    device, major, minor = Int(), Int(), Int()
    call("cuDeviceGet", ctypes.byref(device), Int(index))
    for found, attribute in zip((major, minor), _CAPABILITY):
        call("cuDeviceGetAttribute", ctypes.byref(found), Int(attribute), device)
    return major.value, minor.value


def current_device() -> int:
    """The index of the device of the thread's current context."""
    device = Int()
    call("cuCtxGetDevice", ctypes.byref(device))
    return device.value


@functools.cache
def context_of(index: int) -> int:
    """The primary context of a device, which torch's runtime uses, too. It is retained as long as the process lives."""
    device, context = Int(), Pointer()
    call("cuDeviceGet", ctypes.byref(device), Int(index))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    assert context.value is not None
    return context.value


def _current() -> int | None:
    """The thread's current context; None: it has none."""
    found = Pointer()
    call("cuCtxGetCurrent", ctypes.byref(found))
    return found.value


def is_current(index: int) -> bool:
    """Whether the primary context of a device is the thread's current one."""
    return _current() == context_of(index)


def adopt(index: int) -> None:
    """Leaves the primary context of device 0 with a thread that has none, as CUDA's runtime does at its first call
    there. So what such a thread launches next is not refused. A thread's current device stays what it was: it is 0
    where no context says otherwise, which is why other devices are left alone.
    """
    if index == 0 and _current() is None:
        call("cuCtxSetCurrent", Pointer(context_of(index)))


@contextlib.contextmanager
def current(index: int) -> Iterator[None]:
    """The primary context of a device as the thread's current one. A thread that has not used CUDA, such as autograd's,
    has none; and the thread's current device may be another. Afterwards it is what it was.
    """
    wanted, before = context_of(index), Pointer()
    call("cuCtxGetCurrent", ctypes.byref(before))
    if before.value == wanted:
        yield
        return
    call("cuCtxSetCurrent", Pointer(wanted))
    try:
        yield
    finally:
        call("cuCtxSetCurrent", before)
