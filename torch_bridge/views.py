"""torch's memory as JAX arrays that do not own it; on a GPU kept for later calls on the same memory.

    new     a view of a CPU tensor
    of      a kept view; its reader must be ordered after torch's stream by other means
    after   a new view whose readers wait, on the GPU, for what torch's current stream holds now
    ready   `of` if that stream is idle, else `after`

A view is an address with a shape and a dtype, the same for every tensor that is ever stored there. Importing an array,
and using it for the first time, costs the runtime several times as much as using a known one
(docs/notes/torch_bridge.md), so `of` makes it once.

A view keeps no memory alive, so whoever passes one to a computation holds the tensor until torch's current stream, or
on a CPU the host, waits for the computation (`exchange._run`); from then on a reuse of the memory comes after it.
Nothing else reads a view. An array that owned its tensor would release it on a thread of JAX's, which needs Python's
lock for that: where Python has begun to exit, the process aborts.
"""

import collections
import ctypes
import functools
import struct
from collections.abc import Callable

import torch

from pallas_flash import compat
from pallas_flash.arrays import Array
from pallas_flash.compat import JaxDevice
from torch_bridge import streams

__all__ = ["after", "kept_views", "new", "of", "ready"]

_MAX_VIEWS = 4096
_IN_FLIGHT = 32  # computations that JAX lets the host run ahead of a GPU

_DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's numbers
_DTYPES = {  # DLPack's (code, bits)
    torch.bfloat16: (4, 16), torch.float16: (2, 16), torch.float32: (2, 32), torch.float64: (2, 64),
    torch.bool: (6, 8), torch.int32: (0, 32),
}

_kept: dict[tuple[int, torch.Size, torch.dtype, torch.device], Array] = {}
_recent: dict[torch.device, collections.deque[Array]] = {}


def new(tensor: torch.Tensor, where: JaxDevice) -> Array:
    """A view of a dense CPU tensor, or of a GPU's whose reader is ordered after torch's stream by other means."""
    return compat.from_dlpack(_Producer(tensor, None), where, is_ordered=False)


def of(tensor: torch.Tensor, where: JaxDevice) -> Array:
    """The view of a dense GPU tensor on `where`, JAX's device for it; made at the first call and kept."""
    name = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device)
    view = _kept.get(name)
    if view is None or view.is_deleted():  # a user can delete any array that `jax.live_arrays()` lists
        if len(_kept) >= _MAX_VIEWS:
            _kept.clear()
        view = _kept[name] = new(tensor, where)
    return view


def after(tensor: torch.Tensor, where: JaxDevice) -> Array:
    """A new view of a dense GPU tensor; what reads it waits for torch's current stream on that device."""
    view = compat.from_dlpack(_Producer(tensor, streams.current(_index(tensor))), where)
    # Held until the computation that reads it has long since begun, so that releasing it does not wait.
    _recent.setdefault(tensor.device, collections.deque(maxlen=_IN_FLIGHT)).append(view)
    return view


def ready(tensor: torch.Tensor, where: JaxDevice) -> Array:
    """A view whose readers run after everything that torch's current stream holds now.

    If the stream is idle, no order is needed: everything that torch queued there has finished. That is the case
    whenever the host is the bottleneck, so where host time matters, and asking is far cheaper than an event.
    """
    return (of if streams.current(_index(tensor)).query() else after)(tensor, where)


def kept_views() -> int:
    """How many views are kept for later calls."""
    return len(_kept)


class _Producer:
    """A dense tensor as DLPack's protocol wants it, without ownership."""

    __slots__ = ("stream", "tensor")

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self.tensor, self.stream = tensor, stream

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DEVICES[self.tensor.device.type], _index(self.tensor)

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        if self.stream is not None:
            if stream is None:
                self.stream.synchronize()
            else:
                event = streams.record(self.stream)
                _external_stream(stream, self.tensor.device).wait_event(event)
                streams.recycle(self.stream.device_index, event)
        return _capsule(self.tensor)


def _index(tensor: torch.Tensor) -> int:
    return tensor.device.index or 0


@functools.lru_cache(maxsize=64)
def _external_stream(stream: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(stream, device)


# --- capsules --------------------------------------------------------------------------------------------------------
# DLPack's DLManagedTensor, 64 bytes whose layout is frozen, and after it the shape: one block of C's allocator. Its
# deleter is C's `free`, which needs no interpreter, whichever thread drops the view and whenever.

_NAME = b"dltensor"
_DATA, _SHAPE, _SIZE = 0, 24, 64
# A function object of our own: the attributes of `ctypes.pythonapi` are shared, and `jax.ffi.pycapsule` changes the
# types of this one.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))


def _capsule(tensor: torch.Tensor) -> object:
    block = _block(tensor.shape, tensor.dtype, tensor.device)
    address = _malloc()(len(block))
    if address is None:
        raise MemoryError
    ctypes.memmove(address, block, len(block))
    ctypes.c_uint64.from_address(address + _DATA).value = tensor.data_ptr()
    ctypes.c_uint64.from_address(address + _SHAPE).value = address + _SIZE
    return _new_capsule(address, _NAME, None)


@functools.lru_cache(maxsize=_MAX_VIEWS)
def _block(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bytes:
    """The DLManagedTensor of a dense tensor, with its shape, but without addresses."""
    code, bits = _DTYPES[dtype]
    deleter = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p).value
    where = (_DEVICES[device.type], device.index or 0)
    return struct.pack("=QiiiBBHQQQQQ", 0, *where, len(shape), code, bits, 1, 0, 0, 0, 0, deleter) + (
        struct.pack(f"={len(shape)}q", *shape))


@functools.cache
def _malloc() -> Callable[[int], int | None]:
    malloc = ctypes.PyDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    return malloc
