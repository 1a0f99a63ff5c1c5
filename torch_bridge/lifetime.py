"""JAX arrays as torch tensors whose memory goes back to JAX only when torch's streams have read it.

JAX's allocator knows nothing of torch's streams: memory of an array that is dropped in Python may be written again at
once, while a kernel queued on a torch stream has still to read it. So on a GPU the deleter in the DLPack capsule is
replaced by ours, which records an event on every torch stream of that device that may read the tensor, and calls the
original when they have passed. The streams are the current one of the releasing thread and all of torch's own that were
current in an earlier export or release there; streams made outside torch (`ExternalStream`) may be gone by then and
count only while they are current.

    exported -> (torch drops the last reference) -> events recorded -> all passed -> JAX's deleter

Released memory is looked at on each later export and release. Deleters run on any thread, also inside each other, so
the state is changed by single operations of `dict`, `set` and `deque`, which are atomic, and never under a lock.
"""

import atexit
import collections
import ctypes
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

__all__ = ["collect", "export", "held_exports"]

# DLPack's DLManagedTensor, the "dltensor" capsule that `__dlpack__` without a max_version returns: 48 bytes of
# DLTensor, in which the device's index is at byte 12; then manager_ctx; then deleter. That layout is frozen.
_DEVICE_INDEX, _DELETER = 12, 56
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Released(NamedTuple):
    """A tensor that torch has dropped: its memory may go back when the events have passed."""

    events: tuple[Any, ...]
    address: int
    deleter: int


_exported: dict[int, int] = {}  # address of a capsule's struct -> the deleter that JAX gave it
_released: dict[int, collections.deque[_Released]] = collections.defaultdict(collections.deque)  # by device index
_unrecorded: collections.deque[tuple[int, int]] = collections.deque()  # (address, deleter), dropped during capture
_streams: dict[int, dict[Any, None]] = collections.defaultdict(dict)  # streams seen on a device, by device index


def export(array: Any, stream: Any) -> torch.Tensor:
    """A tensor over the memory of a GPU array, ordered after it on `stream`, torch's current stream on its device."""
    capsule = array.__dlpack__(stream=stream.cuda_stream or 1)  # 1 is CUDA's name for the default stream
    address = _capsule_pointer(capsule, b"dltensor")
    deleter = ctypes.c_void_p.from_address(address + _DELETER)
    _exported[address] = deleter.value or 0
    deleter.value = _on_release_pointer
    _remember(stream)
    collect(stream.device_index)
    return from_dlpack(capsule)


def collect(device_index: int) -> None:
    """Gives back the released memory of a device whose events have passed, oldest first; does not wait."""
    if torch.cuda.is_current_stream_capturing():  # a query would invalidate the capture
        return
    while _unrecorded:
        _record(*_unrecorded.popleft())
    queue = _released[device_index]
    while queue:
        try:
            oldest = queue.popleft()
        except IndexError:  # another thread was faster
            return
        if not all(event.query() for event in oldest.events):
            queue.appendleft(oldest)
            return
        _Deleter(oldest.deleter)(oldest.address)


def held_exports() -> int:
    """How many tensors of JAX memory are held: in use by torch, or released and waiting for a stream."""
    return len(_exported) + len(_unrecorded) + sum(map(len, _released.values()))


@_Deleter
def _on_release(address: int) -> None:
    deleter = _exported.pop(address)
    if torch.cuda.is_current_stream_capturing():
        _unrecorded.append((address, deleter))
    else:
        collect(_record(address, deleter))


_on_release_pointer = ctypes.cast(_on_release, ctypes.c_void_p).value


def _record(address: int, deleter: int) -> int:
    """Queues a dropped tensor behind what its device's streams now hold; returns the device's index."""
    index = ctypes.c_int32.from_address(address + _DEVICE_INDEX).value
    current = torch.cuda.current_stream(index)
    _remember(current)
    streams = {current, *_streams[index]}
    _released[index].append(_Released(tuple(stream.record_event() for stream in streams), address, deleter))
    return index


def _remember(stream: Any) -> None:
    if stream.stream_id != stream.cuda_stream or stream.cuda_stream == 0:  # equal where torch did not make the stream
        _streams[stream.device_index][stream] = None


@atexit.register
def _leave_to_the_system() -> None:
    """Tensors may outlive the interpreter, and must then not call into it: their memory goes back with the process."""
    for address in tuple(_exported):
        ctypes.c_void_p.from_address(address + _DELETER).value = None
    _exported.clear()
