"""Memory that is 0 between launches: what kernels count in, and set back themselves (`plan.Program.restored`).

Launches that may run at the same time must not count in the same place:

    of different streams     each stream has a place, made when it is first used
    captured in CUDA graphs  each launch has a place of its own: nothing says beside what its graph will be replayed.
                             The same graph never runs twice at a time

So a launch needs nothing before it, neither a fill nor a copy. Where more launches are captured than there are places
(`CAPTURED`), those after them count in memory of the graph, which fills it with zeros first: one more node.
"""

import threading

import torch

from torch_bridge.direct import apart

__all__ = ["CAPTURED", "Counters"]

CAPTURED = 1024
"""Places for captured launches of one plan: graphs of 32 layers for 32 sizes of a batch."""


class Counters:
    """Places of so many bytes on a device. Those that were handed out are never taken back.

    Args:
      num_bytes: of a place, a multiple of the alignment that kernels need.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes, self._device, self._lock = num_bytes, device, threading.Lock()
        self._of_streams: dict[int, torch.Tensor] = {}
        self._captured = self._zeros(CAPTURED)
        self._used = 0

    def at(self, stream: int) -> tuple[int, torch.Tensor]:
        """An address for what is launched next on torch's current stream, whose number is given, and a tensor that must
        live until it is launched.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._for_a_graph()
        place = self._of_streams.get(stream)
        if place is None:
            with self._lock:
                current = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
                place = self._of_streams.setdefault(stream, apart.run(self._zeros_on, current))
        return place.data_ptr(), place

    def _for_a_graph(self) -> tuple[int, torch.Tensor]:
        with self._lock:
            number = self._used
            self._used += number < CAPTURED
        if number < CAPTURED:
            return self._captured.data_ptr() + number * self._num_bytes, self._captured
        filled = self._zeros(1)
        return filled.data_ptr(), filled

    def _zeros_on(self, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A place that is 0 for what the stream runs from now on."""
        with torch.cuda.stream(stream):  # None: there are none
            return self._zeros(1)

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count * self._num_bytes, dtype=torch.uint8, device=self._device)
