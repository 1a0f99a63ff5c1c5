"""What a profile of torch.profiler says of the time of a device: read from its trace, in Chrome's format.

Times are those that the device writes down: microseconds of kernels, copies and fills. Kernels of a stream may overlap
(programmatic dependent launch): `busy_us` counts such time once, `sum_us` for each of them. What functions of torch are
called on the device's time line ("gpu_user_annotation") is no work, and is left out.
"""

import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Event", "busy_us", "matching", "of_call", "read", "sum_us"]

_WORK = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories of events, by the kind of device. Those of a CPU are nested: only `busy_us` means anything there."""


class Event(NamedTuple):
    """Something that ran from one time to another, in microseconds."""

    name: str
    start_us: float
    end_us: float


def read(trace: dict[str, Any], device: str) -> list[Event]:
    """The work of a kind of device in a trace, in the order in which it began.

    Raises:
      ValueError: the trace has no list of events.
    """
    if not isinstance(trace.get("traceEvents"), list):
        raise ValueError(f"a trace must have a list traceEvents, got {sorted(trace)}. Is it torch.profiler's?")
    found = [Event(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
             for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") in _WORK[device]]
    return sorted(found, key=lambda event: event.start_us)


def sum_us(events: Iterable[Event]) -> float:
    """The time of all, overlapping or not."""
    return sum(event.end_us - event.start_us for event in events)


def busy_us(events: Iterable[Event]) -> float:
    """The time in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_us):
        total += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return total


def matching(events: Iterable[Event], pattern: str) -> list[Event]:
    """Those whose names a regular expression is found in, whatever the case."""
    return [event for event in events if re.search(pattern, event.name, re.IGNORECASE)]


def of_call(call: Callable[[], Any], device: str) -> list[Event]:
    """What a call does on a device, to its end."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    with profile(activities=[activity], acc_events=True) as found:
        call()
        wait()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return read(json.loads(path.read_text()), device)
