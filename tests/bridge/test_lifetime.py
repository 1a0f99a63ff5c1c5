"""Memory that torch has dropped goes back to JAX when the streams have read it: with streams that we play."""

import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch

from torch_bridge import lifetime


class Event:
    def __init__(self):
        self.passed = False

    def query(self):
        return self.passed


class Stream:
    """A torch stream as lifetime.py sees one."""

    device_index = 0

    def __init__(self, name, external=False):
        self.cuda_stream, self.stream_id = name, name if external else 2 * name + 1
        self.events = []

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]


class Array:
    """A CPU array in the place of a GPU array, whose `__dlpack__` takes a stream."""

    def __init__(self, value):
        self.array, self.waited = jnp.full((4, 8), value), []

    def __dlpack__(self, *, stream):
        self.waited.append(stream)
        return self.array.__dlpack__()


@pytest.fixture
def cuda(monkeypatch):
    """A device with a current stream and, after `cuda.capturing = True`, a capture under way."""
    class Cuda:
        current, capturing, freed = Stream(8), False, []
    for name, value in (("_streams", lifetime.collections.defaultdict(dict)),
                        ("_released", lifetime.collections.defaultdict(lifetime.collections.deque)),
                        ("_exported", {}), ("_unrecorded", lifetime.collections.deque())):
        monkeypatch.setattr(lifetime, name, value)
    call = lifetime._Deleter

    def spy(pointer):
        Cuda.freed.append(pointer)
        return call(pointer)
    monkeypatch.setattr(lifetime, "_Deleter", spy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Cuda.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Cuda.capturing)
    Cuda.freed.clear()
    return Cuda


def test_memory_is_held_until_the_stream_has_passed(cuda):
    array = Array(3.0)
    tensor = lifetime.export(array, cuda.current)
    assert array.waited == [8] and tensor.data_ptr() == array.array.unsafe_buffer_pointer()
    view = tensor[1:]
    del tensor, array
    gc.collect()
    assert view.sum().item() == 3 * 8 * 3.0 and not cuda.freed and lifetime.held_exports() == 1
    del view
    (event,) = cuda.current.events
    lifetime.collect(0)
    assert not cuda.freed and lifetime.held_exports() == 1
    event.passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 1 and lifetime.held_exports() == 0


def test_the_default_stream_has_a_name(cuda):
    array, stream = Array(1.0), Stream(0, external=True)  # torch gives the default stream the id 0
    tensor = lifetime.export(array, stream)
    assert array.waited == [1]
    del tensor
    assert len(stream.events) == 1


def test_every_stream_that_may_read_is_waited_for(cuda):
    first, second, outside = cuda.current, Stream(16), Stream(24, external=True)
    tensors = [lifetime.export(Array(1.0), stream) for stream in (first, second, outside)]
    del tensors[1:]
    cuda.current = outside
    del tensors[0]
    assert [len(stream.events) for stream in (first, second, outside)] == [3, 3, 1]
    for event in first.events + second.events:
        event.passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 2  # the last waits for the stream from outside
    outside.events[0].passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 3


def test_nothing_is_recorded_or_asked_during_a_capture(cuda):
    tensor = lifetime.export(Array(1.0), cuda.current)
    cuda.capturing = True
    del tensor
    assert not cuda.current.events and lifetime.held_exports() == 1
    cuda.capturing = False
    lifetime.collect(0)
    (event,) = cuda.current.events
    event.passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 1


def test_released_memory_is_looked_at_by_later_exports(cuda):
    for i in range(5):
        tensor = lifetime.export(Array(float(i)), cuda.current)
        del tensor
        for event in cuda.current.events:
            event.passed = True
    assert len(cuda.freed) == 4


def test_the_jax_array_itself_may_be_dropped_or_kept(cuda):
    array = Array(2.0)
    tensor = lifetime.export(array, cuda.current)
    del tensor
    cuda.current.events[0].passed = True
    lifetime.collect(0)
    assert float(array.array.sum()) == 64.0 and isinstance(array.array, jax.Array)


AT_EXIT = """
import gc, torch, jax.numpy as jnp
from torch_bridge import lifetime
class Stream:
    device_index, cuda_stream, stream_id = 0, 8, 17
class Array:
    array = jnp.ones((1000,))
    def __dlpack__(self, stream): return self.array.__dlpack__()
torch.cuda.is_current_stream_capturing = lambda: False
class Keeper: pass
keeper = Keeper(); keeper.keeper = keeper; gc.disable()
keeper.tensor = tensor = lifetime.export(Array(), Stream())
print("alive", lifetime.held_exports())
"""


def test_tensors_may_outlive_the_interpreter():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive 1\n", "")
