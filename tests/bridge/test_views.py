"""Views of torch's GPU memory, made here over a CPU's memory, which takes the same capsules."""

import collections
import ctypes
import weakref

import jax
import numpy as np
import pytest
import torch

from bridge.problems import OURS, operator_call, qkv, results
from torch_bridge import exchange, streams, views


class Event:
    def record(self, stream):
        stream.calls.append("record")


class Stream:
    """A torch stream as views.py sees one."""

    device_index, cuda_stream, stream_id = 0, 8, 17

    def __init__(self):
        self.calls, self.is_at_rest = [], False

    def synchronize(self):
        self.calls.append("synchronize")

    def query(self):
        return self.is_at_rest

    def wait_event(self, event):
        assert isinstance(event, Event)
        self.calls.append("wait for the event")


@pytest.fixture
def where(monkeypatch):
    """JAX's CPU, to which views are made, none of them kept yet."""
    monkeypatch.setattr(views, "_kept", {})
    monkeypatch.setattr(views, "_recent", {})
    return jax.devices("cpu")[0]


@pytest.fixture
def stream(monkeypatch):
    current = Stream()
    monkeypatch.setattr(streams, "current", lambda index: current)
    monkeypatch.setattr(streams, "_events", collections.defaultdict(collections.deque))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return current


def aligned(*shape, dtype=torch.float32):
    """Torch aligns a CPU's memory to 64 bytes, as XLA wants it; a small tensor's need not be."""
    return torch.ones((1024, *shape)).to(dtype)[0]


@pytest.mark.parametrize("dtype", views._DTYPES, ids=str)
def test_a_view_is_the_memory(dtype, where):
    x = aligned(2, 3, 5, dtype=dtype)
    with jax.enable_x64(dtype == torch.float64):
        view = views.of(x, where)
        assert view.unsafe_buffer_pointer() == x.data_ptr()
        assert view.shape == tuple(x.shape) and view.dtype == exchange._DTYPES[dtype]
        assert np.asarray(view).astype(float).sum() == x.numel()


def test_every_dtype_that_crosses_has_a_view():
    assert views._DTYPES.keys() == exchange._DTYPES.keys()


def test_a_view_is_kept_for_an_address_a_shape_and_a_dtype(where):
    x = aligned(4, 6)
    view = views.of(x, where)
    assert views.of(x, where) is view and views.of(x.detach().view(4, 6), where) is view
    assert views.of(x.view(6, 4), where) is not view
    assert views.of(x.view(torch.int32), where) is not view
    assert views.kept_views() == 3


def test_a_view_owns_nothing(where, stream):
    x = aligned(4, 6)
    storage = x.untyped_storage()
    owners = torch._C._storage_Use_Count(storage._cdata)
    held = [views.of(x, where), views.after(x, where)]
    assert len(held) == 2 and torch._C._storage_Use_Count(storage._cdata) == owners


def test_a_deleted_view_is_made_again(where):
    x = aligned(4, 6)
    views.of(x, where).delete()
    assert float(views.of(x, where).sum()) == 24


def test_kept_views_are_bounded(where, monkeypatch):
    monkeypatch.setattr(views, "_MAX_VIEWS", 3)
    for size in range(1, 9):
        views.of(aligned(size), where)
        assert views.kept_views() <= 3


def test_new_views_are_not_kept_for_later_calls(where, stream):
    x = aligned(4, 6)
    made = [views.after(x, where) for _ in range(3 * views._IN_FLIGHT)]
    assert len(set(map(id, made))) == len(made) and views.kept_views() == 0
    assert len(views._recent[x.device]) == views._IN_FLIGHT


def test_jaxs_stream_waits_for_torchs(where, stream, monkeypatch):
    theirs, asked = Stream(), []

    def external(handle, device):
        asked.append(handle)
        return theirs
    monkeypatch.setattr(views, "_external_stream", external)
    monkeypatch.setattr(views.compat, "from_dlpack", lambda producer, device: producer.__dlpack__(stream=77))
    views.after(aligned(4), where)
    assert (asked, stream.calls, theirs.calls) == ([77], ["record"], ["wait for the event"])


def test_the_host_waits_where_jax_has_no_stream(where, stream):
    views.after(aligned(4), where)
    assert stream.calls == ["synchronize"]


def test_a_stream_at_rest_needs_no_order(where, stream):
    x = aligned(4, 6)
    busy = views.ready(x, where)
    assert stream.calls == ["synchronize"] and views.kept_views() == 0
    stream.is_at_rest = True
    assert views.ready(x, where) is views.ready(x, where) is views.of(x, where) is not busy
    assert stream.calls == ["synchronize"]


def test_other_users_of_pythons_capsules_are_let_be(where):
    """`jax.ffi.pycapsule` changes the types of `ctypes.pythonapi.PyCapsule_New`, and views were made with it once."""
    target = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p).value
    jax.ffi.pycapsule(target)
    assert float(views.of(aligned(4, 6), where).sum()) == 24
    jax.ffi.pycapsule(target)


@pytest.mark.parametrize("is_at_rest", [False, True])
def test_calls_through_views(where, stream, is_at_rest, monkeypatch):
    """The way of a GPU: the first operand new if the stream is busy, the others kept; the memory changes its values."""
    def arrays(tensors, where):
        first, *rest = tensors
        return [views.ready(first, where), *(views.of(tensor, where) for tensor in rest)]
    stream.is_at_rest = is_at_rest
    tensors, dout = qkv((2, 4, 16, 32), (2, 4, 16, 32), (2, 4, 16, 32)), torch.randn(2, 4, 16, 32)
    mask = torch.rand(2, 1, 16, 16) > 0.3
    for _ in range(3):
        with torch.no_grad():
            for x in tensors:
                x.normal_()
        expected = results(OURS, [*tensors, mask], dout)
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "_arrays", arrays)
            ours = results(OURS, [*tensors, mask], dout)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_error_leaves_nothing_running(monkeypatch):
    """Views hold no memory: if a call fails, what it may have started ends before its operands go."""
    waited = []

    class OnGpu(torch.Tensor):
        is_cuda = True
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(exchange, "_arrays", lambda *_: [])
    query = torch.ones(1, 1, 4, 4)
    plan = exchange.plan_for(*operator_call(query, query, query))

    def function():
        raise RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        exchange._run(plan, function, [query.as_subclass(OnGpu)] * 3, [])
    assert waited == [query.device]


def test_no_array_owns_a_tensor(where):
    """Else JAX's threads would release it, which aborts a process that is about to exit."""
    x = aligned(4)
    released = weakref.ref(x)
    arrays = exchange._arrays([x], where)
    del x
    assert released() is None and [array.shape for array in arrays] == [(4,)]
