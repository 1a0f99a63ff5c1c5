"""JAX arrays as torch tensors whose memory goes back to JAX only when torch's streams have read it.

JAX's allocator knows nothing of torch's streams: the memory of an array that Python drops may be overwritten at once,
while a kernel queued on a torch stream has yet to read it. So on a GPU the deleter in the DLPack capsule is
replaced by ours, and the original is called when events, recorded later than the tensor was dropped on every torch
stream of that device that may read it, have passed. The streams are the current one of the releasing thread and all of
torch's own that were current in an earlier call or release there; streams made outside torch (`ExternalStream`) may be
gone by then and count only while they are current.

    exported -> (torch drops the last reference) dropped -> events recorded: released -> all passed -> JAX's deleter

An event covers everything that was dropped before it, so small tensors are collected and share their events: fewer than
`_BATCH` of less than `_LARGE` bytes each are without events at any time, 28 MiB of a device. When events are recorded,
those of the batches before are looked at, so one batch more may be held than the streams still need. Deleters run on
any thread, also inside each other, so the state is changed by single operations of `dict` and `deque`, which are
atomic, and never under a lock.
"""

import atexit
import collections
import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

from pallas_flash import compat
from pallas_flash.arrays import Array
from torch_bridge import streams

__all__ = ["collect", "export", "held_exports", "order"]

_BATCH = 8  # tensors
_LARGE = 4 * 2**20  # bytes

# DLPack's DLManagedTensor, the "dltensor" capsule that `__dlpack__` without a max_version returns: 48 bytes of
# DLTensor; then manager_ctx; then deleter. That layout is frozen.
_DELETER = 56
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# A function object of our own: the attributes of `ctypes.pythonapi` are shared, and others (JAX) change their types.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))


class _Export(NamedTuple):
    """A tensor over JAX's memory: its capsule's struct, the deleter that JAX gave it, where it is, and its size."""

    address: int
    deleter: int
    device_index: int
    is_large: bool


class _Released(NamedTuple):
    """Tensors that torch has dropped: their memory may go back when the events have passed."""

    events: list[torch.cuda.Event]
    exports: list[_Export]


_exported: dict[int, _Export] = {}  # by address
_dropped: dict[int, collections.deque[_Export]] = collections.defaultdict(collections.deque)  # by device's index
_released: dict[int, collections.deque[_Released]] = collections.defaultdict(collections.deque)


def export(array: Array, stream: torch.cuda.Stream) -> torch.Tensor:
    """A tensor over the memory of a GPU array, ordered after it on `stream`, torch's current stream on its device."""
    capsule = compat.to_dlpack(array, stream.cuda_stream or 1)  # 1 is CUDA's name for the default stream
    address = _capsule_pointer(capsule, b"dltensor")
    tensor = from_dlpack(capsule)  # it looks for the deleter in the struct when it needs it
    deleter = ctypes.c_void_p.from_address(address + _DELETER)
    _exported[address] = _Export(address, deleter.value or 0, stream.device_index, tensor.nbytes >= _LARGE)
    deleter.value = _on_release_pointer
    return tensor


def order(array: Array, stream: torch.cuda.Stream) -> None:
    """Makes `stream`, torch's current stream, wait for a GPU array that is not exported to torch."""
    compat.to_dlpack(array, stream.cuda_stream or 1)


def collect(device_index: int) -> None:
    """Records events for what was dropped, and gives back what has passed, oldest first; does not wait."""
    if torch.cuda.is_current_stream_capturing():  # to record or to query would enter the capture, or end it
        return
    _release(device_index, [])


def held_exports() -> int:
    """How many tensors of JAX memory are held: in use by torch, or dropped and waiting for a stream."""
    released = (len(batch.exports) for queue in tuple(_released.values()) for batch in tuple(queue))
    return len(_exported) + sum(map(len, _dropped.values())) + sum(released)


def _on_release(address: int) -> None:
    export = _exported.pop(address)
    index = export.device_index
    dropped = _dropped[index]
    if streams.is_known(index):  # so events recorded from now on cover it, whoever records them
        dropped.append(export)
        if export.is_large or len(dropped) >= _BATCH:
            collect(index)
    elif torch.cuda.is_current_stream_capturing():
        dropped.append(export)
    else:  # a new stream or one from outside: recorded by this thread, while it is current
        _release(index, [export])


_release_callback = _Deleter(_on_release)  # kept: the pointer does not keep it alive
_on_release_pointer = ctypes.cast(_release_callback, ctypes.c_void_p).value


def _release(index: int, exports: list[_Export]) -> None:
    """Records events for these and all dropped tensors on the device's streams, and gives back what has passed."""
    dropped = _dropped[index]
    while dropped:
        try:
            exports.append(dropped.popleft())
        except IndexError:  # another thread was faster
            break
    if exports:  # the streams are asked for after the tensors: whoever dropped one had made its stream known
        waiting = dict.fromkeys((streams.current(index), *streams.known(index)))
        _released[index].append(_Released([streams.record(stream) for stream in waiting], exports))
    _give_back(index)


def _give_back(index: int) -> None:
    queue = _released[index]
    while queue:
        try:
            oldest = queue.popleft()
        except IndexError:
            return
        if not all(event.query() for event in oldest.events):
            queue.appendleft(oldest)
            return
        for export in oldest.exports:
            _function(export.deleter)(export.address)
        for event in oldest.events:
            streams.recycle(index, event)


@functools.lru_cache(maxsize=16)
def _function(deleter: int) -> Callable[[int], None]:
    return _Deleter(deleter)


@atexit.register
def _leave_to_the_system() -> None:
    """Removes the deleters at exit: tensors may outlive the interpreter, and the process frees their memory anyway."""
    for address in tuple(_exported):
        ctypes.c_void_p.from_address(address + _DELETER).value = None
    _exported.clear()
