"""torch's current stream, its earlier current streams, and events: what orders work and ends lifetimes on a GPU.

torch's own look-up of the current stream takes 6 us of a call of 200, and making, recording and destroying an event for
each use took 30 us (docs/notes/torch_bridge.md). So streams are looked up by their number, and events are reused.

State is changed by single operations of `dict` and `deque`, which are atomic, because deleters use it on any thread.
"""

import collections

import torch

__all__ = ["current", "device", "is_known", "known", "number", "record", "recycle"]

# The number of the current stream on a device, as the code that inductor generates asks for it.
_number = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)

_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_streams: dict[int, dict[int, torch.cuda.Stream]] = collections.defaultdict(dict)  # by device's index, by number
_events: dict[int, collections.deque[torch.cuda.Event]] = collections.defaultdict(collections.deque)  # by index


def current(index: int) -> torch.cuda.Stream:
    """torch's current stream on a device; not to be called during CUDA graph capture. `known` lists it from now on, if
    torch made it.

    torch's streams live as long as the process; one made outside (`ExternalStream`) may be destroyed at any time.
    """
    number = _number(index)
    stream = _streams[index].get(number)
    if stream is None:
        stream = torch.cuda.current_stream(index)
        if stream.stream_id != stream.cuda_stream or stream.cuda_stream == 0:  # equal where torch did not make it
            _streams[index][number] = stream
    return stream


def number(index: int) -> int:
    """The number of torch's current stream on a device, for whoever launches on it; also during CUDA graph capture."""
    return int(_number(index))


def device() -> int:
    """The index of the thread's current GPU, asked of CUDA's runtime."""
    return int(_device())


def is_known(index: int) -> bool:
    """Whether the current stream on a device is one of `known`; does not call CUDA."""
    return _number(index) in _streams[index]


def known(index: int) -> tuple[torch.cuda.Stream, ...]:
    """The streams of torch's own that were current on a device when `current` was asked."""
    return tuple(_streams[index].values())


def record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Records an event after what the stream now holds. Give it back with `recycle` when it is no longer needed."""
    try:
        event = _events[stream.device_index].pop()
    except IndexError:
        event = torch.cuda.Event()
    event.record(stream)
    return event


def recycle(index: int, event: torch.cuda.Event) -> None:
    """Lets `record` reuse an event. Streams that already wait for it still wait for what it was recorded after."""
    _events[index].append(event)
