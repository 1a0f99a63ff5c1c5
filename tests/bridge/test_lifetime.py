"""Memory that torch has dropped goes back to JAX when the streams have read it: with streams that we play."""

import gc
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import torch

from pallas_flash import compat
from torch_bridge import lifetime, streams


class Event:
    def __init__(self):
        self.passed = False

    def query(self):
        return self.passed

    def record(self, stream):
        self.passed = False
        stream.events.append(self)


class Stream:
    """A torch stream as the bridge sees one."""

    device_index = 0

    def __init__(self, name, external=False):
        self.cuda_stream, self.stream_id = name, name if external else 2 * name + 1
        self.events = []

    def passes(self):
        for event in self.events:
            event.passed = True


class Array:
    """A CPU array in the place of a GPU array."""

    def __init__(self, value, shape=(4, 8)):
        self.array, self.waited = jnp.full(shape, value), []


def to_dlpack(array, stream):
    array.waited.append(stream)
    return array.array.__dlpack__()


@pytest.fixture
def cuda(monkeypatch):
    """A device with a current stream and, after `cuda.capturing = True`, a capture under way."""
    class Cuda:
        current, capturing, freed = Stream(8), False, []
    for module, name, value in ((streams, "_streams", dict), (streams, "_events", lifetime.collections.deque),
                                (lifetime, "_dropped", lifetime.collections.deque),
                                (lifetime, "_released", lifetime.collections.deque)):
        monkeypatch.setattr(module, name, lifetime.collections.defaultdict(value))
    monkeypatch.setattr(lifetime, "_exported", {})
    function = lifetime._function

    def spy(deleter):
        def free(address):
            Cuda.freed.append(address)
            return function(deleter)(address)
        return free
    monkeypatch.setattr(lifetime, "_function", spy)
    monkeypatch.setattr(compat, "to_dlpack", to_dlpack)
    monkeypatch.setattr(streams, "_number", lambda index: Cuda.current.cuda_stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Cuda.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Cuda.capturing)
    Cuda.freed.clear()
    return Cuda


def export(value=1.0, shape=(4, 8)):
    return lifetime.export(Array(value, shape), streams.current(0))


def test_memory_is_held_until_the_stream_has_passed(cuda):
    array = Array(3.0)
    tensor = lifetime.export(array, streams.current(0))
    assert array.waited == [8] and tensor.data_ptr() == array.array.unsafe_buffer_pointer()
    view = tensor[1:]
    del tensor, array
    gc.collect()
    assert view.sum().item() == 3 * 8 * 3.0 and not cuda.freed and lifetime.held_exports() == 1
    lifetime.collect(0)
    assert not cuda.current.events, "the tensor is in use: an event now would come before what reads it"
    del view
    assert not cuda.freed and lifetime.held_exports() == 1
    lifetime.collect(0)
    (event,) = cuda.current.events
    lifetime.collect(0)
    assert not cuda.freed and lifetime.held_exports() == 1
    event.passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 1 and lifetime.held_exports() == 0


def test_small_tensors_share_an_event(cuda):
    tensors = [export(float(i)) for i in range(3 * lifetime._BATCH)]
    del tensors[lifetime._BATCH:]
    assert len(cuda.current.events) == 2 and lifetime.held_exports() == 3 * lifetime._BATCH
    cuda.current.passes()
    tensors.clear()
    assert len(cuda.current.events) == 3 and len(cuda.freed) == 2 * lifetime._BATCH


def test_a_large_tensor_waits_for_no_other(cuda):
    small, large = export(), export(shape=(lifetime._LARGE // 4,))
    del small
    assert not cuda.current.events
    del large
    (event,) = cuda.current.events  # of both
    event.passed = True
    lifetime.collect(0)
    assert len(cuda.freed) == 2


def test_what_is_held_without_events_is_bounded(cuda):
    for i in range(100):
        tensor = export(float(i), (lifetime._LARGE // 4 - 1 - i,))
        del tensor
        cuda.current.passes()
        assert lifetime.held_exports() < 2 * lifetime._BATCH


def test_events_are_used_again(cuda):
    for _ in range(6 * lifetime._BATCH):
        tensor = export()
        del tensor
        cuda.current.passes()
    assert len(cuda.current.events) == 6 and len(set(map(id, cuda.current.events))) <= 2


def test_threads_give_back_everything_once(cuda):
    def work():
        for i in range(150):
            tensor = export(shape=(lifetime._LARGE // 4,) if i % 40 == 0 else (4, 8))
            del tensor
            if i % 7 == 0:
                cuda.current.passes()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(2):
        lifetime.collect(0)
        cuda.current.passes()
    lifetime.collect(0)
    assert len(cuda.freed) == 600 and lifetime.held_exports() == 0


def test_the_default_stream_has_a_name(cuda):
    array, cuda.current = Array(1.0), Stream(0, external=True)  # torch gives the default stream the id 0
    tensor = lifetime.export(array, streams.current(0))
    assert array.waited == [1]
    del tensor
    lifetime.collect(0)
    assert len(cuda.current.events) == 1


def test_every_stream_that_may_read_is_waited_for(cuda):
    tensors, places = [], (cuda.current, Stream(16), Stream(24, external=True))
    for cuda.current in places:
        tensors.append(export())
    first, second, outside = places
    cuda.current = first
    del tensors[1:]
    lifetime.collect(0)
    assert [len(stream.events) for stream in places] == [1, 1, 0]
    cuda.current = outside  # it may be gone by the next batch: its event is recorded at once
    del tensors[0]
    assert [len(stream.events) for stream in places] == [2, 2, 1]
    first.passes(), second.passes()
    lifetime.collect(0)
    assert len(cuda.freed) == 2  # the last waits for the stream from outside
    outside.passes()
    lifetime.collect(0)
    assert len(cuda.freed) == 3


def test_a_stream_first_seen_at_a_release_is_waited_for(cuda):
    tensor, other = export(), Stream(16)
    cuda.current = other
    del tensor
    assert len(other.events) == 1


def test_nothing_is_recorded_or_asked_during_a_capture(cuda):
    tensors = [export() for _ in range(2 * lifetime._BATCH)]
    first, cuda.capturing = cuda.current, True
    del tensors[lifetime._BATCH:]
    cuda.current = Stream(16)
    tensors.clear()
    lifetime.collect(0)
    assert not first.events and not cuda.current.events and lifetime.held_exports() == 2 * lifetime._BATCH
    cuda.capturing = False
    lifetime.collect(0)
    assert len(first.events) == len(cuda.current.events) == 1
    first.passes(), cuda.current.passes()
    lifetime.collect(0)
    assert len(cuda.freed) == 2 * lifetime._BATCH


def test_the_jax_array_itself_may_be_dropped_or_kept(cuda):
    array = Array(2.0)
    tensor = lifetime.export(array, streams.current(0))
    del tensor
    lifetime.collect(0)
    cuda.current.passes()
    lifetime.collect(0)
    assert len(cuda.freed) == 1
    assert float(array.array.sum()) == 64.0 and isinstance(array.array, jax.Array)


def test_the_public_way_to_export(cuda, monkeypatch):
    """Where the runtime's own function is not the one that is known."""
    class Public:
        def __dlpack__(self, *, stream):
            return stream
    monkeypatch.undo()
    monkeypatch.setattr(compat, "_export_capsule", None)
    assert compat.to_dlpack(Public(), 8) == 8


AT_EXIT = """
import gc, torch, jax.numpy as jnp
from pallas_flash import compat
from torch_bridge import lifetime
class Stream:
    device_index, cuda_stream, stream_id = 0, 8, 17
compat.to_dlpack = lambda array, stream: array.__dlpack__()
torch.cuda.is_current_stream_capturing = lambda: False
class Keeper: pass
keeper = Keeper(); keeper.keeper = keeper; gc.disable()
keeper.tensor = tensor = lifetime.export(jnp.ones((1000,)), Stream())
print("alive", lifetime.held_exports())
"""


def test_tensors_may_outlive_the_interpreter():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive 1\n", "")
