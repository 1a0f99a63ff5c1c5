"""What a call on the direct path asks of the host: tensors made, calls of the driver, and what is not looked at again.

On the stand-ins of test_direct.py, and on a driver in Python that counts.
"""

import contextlib
import ctypes
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.direct import PROGRAM
from bridge.problems import OURS, check, heads_inside, qkv
from bridge.test_direct import BF16, BOTH, CAUSAL, NONE, launched, moved
from bridge.test_direct_shortcut import short
from torch_bridge import eager, ops, streams
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, Operands, PerArray, Results
from torch_bridge.direct import allocation, attention, driver, launch, lengths, repeated, runner, shared, shortcut
from torch_bridge.direct.plan import Buffer, Operation

__all__ = ["launched", "short"]  # fixtures

SHAPE = (2, 4, 6, 8)
OPTIONS = dict(is_causal=True)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the tensors that calls make which were seen before, but for scratch memory, one piece a pass."""
    found = []

    def maker(device):
        def make(shape, strides, dtype):
            if dtype != torch.uint8:
                found.append(tuple(shape))
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return make
    monkeypatch.setattr(allocation, "maker", maker)
    return found


def test_a_call_makes_its_results_and_nothing_else(made, short, launched):
    """Without a gradient out alone: nobody reads the statistics, which go where those of all such calls go."""
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16)
    dout = torch.ones(SHAPE, dtype=BF16)
    for _ in range(2):
        with torch.no_grad():
            alone = OURS(*tensors, **OPTIONS)
        out = OURS(*tensors, **OPTIONS)
        wanted = torch.autograd.grad(out, tensors, dout)
    assert torch.equal(alone, out)
    stats = (*SHAPE[:2], 2, SHAPE[2])
    del made[:], short[:]
    with torch.no_grad():
        OURS(*tensors, **OPTIONS)
    assert made == [SHAPE]
    del made[:]
    out = OURS(*tensors, **OPTIONS)
    assert made == [SHAPE, stats]
    del made[:]
    grads = torch.autograd.grad(out, tensors, dout)
    assert made == [SHAPE] * 3
    assert short == ["forward", *BOTH] and all(map(torch.equal, grads, wanted))


def test_gradients_are_kept_as_they_are_made(short, launched):
    """autograd copies those that something else holds on to."""
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16)
    check(tensors, **OPTIONS)
    (known,) = shortcut._shortcuts.values()
    addresses, make = [], known._empty

    def noted(*args):
        x = make(*args)
        addresses.append(x.data_ptr())
        return x
    known._empty = noted
    out = OURS(*tensors, **OPTIONS)
    del addresses[:]
    out.backward(torch.ones_like(out))
    assert addresses == [x.grad.data_ptr() for x in tensors]


def test_statistics_that_nobody_reads_share_memory_up_to_a_size(made, short, launched, monkeypatch):
    monkeypatch.setattr(shared, "_unread", {})
    monkeypatch.setattr(shared, "MAX_UNREAD_BYTES", 4 * 2 * 4 * 2 * 6)
    monkeypatch.setattr(lengths, "OWN", 9)
    inputs = [qkv(*[(2, 4, length, 8)] * 3, dtype=BF16, requires_grad=False) for length in (5, 6, 7)]
    results = [[OURS(*x) for _ in range(3)] for x in inputs]
    assert all(torch.equal(x[0], y) for x in results for y in x)
    assert made == [(2, 4, 5, 8)] * 2 + [(2, 4, 6, 8)] * 2 + [(2, 4, 7, 8), (2, 4, 2, 7)] * 2
    (kept,) = shared._unread.values()
    assert kept.numel() <= 2 * (2 * 4 * 2 * 6)


@pytest.mark.parametrize("way", ["missing", "otherwise"])
def test_calls_are_right_where_torch_makes_tensors_otherwise(way, short, launched, monkeypatch):
    class Others:
        TensorGuards = sys.modules["torch._C._dynamo.guards"].TensorGuards
    if way == "otherwise":
        Others._empty_strided_cpu = staticmethod(lambda shape, strides, dtype: torch.empty(shape))
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", Others)
    for again in range(2):
        check(qkv((2, 4, 9, 16), (2, 4, 12, 16), (2, 4, 12, 8), dtype=BF16), **OPTIONS)
        assert short == BOTH * again


def test_memory_is_first_tried_on_the_device_alone(monkeypatch):
    """Regression: threads that load a plan are on the first GPU, where each process then had a context."""
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield
        entered.append(None)

    def make(shape, strides, dtype):
        return SimpleNamespace(shape=shape, stride=lambda: strides, dtype=dtype, device=entered[-1])
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", SimpleNamespace(_empty_strided_cuda=make))
    device = torch.device("cuda", 1)
    assert allocation.maker(device) is make and entered == [device, None]


def test_a_variable_is_asked_for_where_python_keeps_variables_elsewhere(monkeypatch):
    for values, on in (({}, ()), (attention._VALUES, attention._ON)):
        monkeypatch.setattr(attention, "_VALUES", values)
        monkeypatch.setattr(attention, "_ON", on)
        monkeypatch.delenv(attention.VARIABLE, raising=False)
        assert attention.is_on()
        for value, wanted in (("1", True), ("", True), ("0", False)):
            monkeypatch.setenv(attention.VARIABLE, value)
            assert attention.is_on() == wanted
        os.environ[attention.VARIABLE] = "yes"
        with pytest.raises(ValueError, match="must be 0 or 1"):
            attention.is_on()


@pytest.mark.parametrize("way", ["at once", "missing", "otherwise"])
def test_a_node_calls_its_backward(way, short, launched, monkeypatch):
    """Without torch's own method between, where it is as it was; its results are the same."""
    known = eager._call_at_once

    def changed(function):
        if way == "otherwise":
            return known(SimpleNamespace(_backward_cls=object, backward=function.backward))
        return known(function if way == "at once" else SimpleNamespace(backward=function.backward))
    monkeypatch.setattr(eager, "_call_at_once", changed)
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16)
    for again in range(2):
        check(tensors, **OPTIONS)
        assert short == BOTH * again
    out = OURS(*tensors, **OPTIONS)
    assert ("apply" in vars(type(out.grad_fn))) == (way == "at once")
    for needed in ((0,), (1, 2), (0, 2)):
        found = torch.autograd.grad(out, [tensors[i] for i in needed], torch.ones_like(out), retain_graph=True)
        wanted = torch.autograd.grad(OURS(*tensors, **OPTIONS), tensors, torch.ones_like(out))
        assert all(torch.equal(x, wanted[i]) for x, i in zip(found, needed, strict=True))


def test_kinds_of_calls_do_not_share_a_node(short):
    """Each knows its own launches, and gradients of several in one graph are each its own."""
    one, other = (qkv(shape, shape, shape, dtype=BF16) for shape in (SHAPE, (2, 4, 9, 8)))
    wanted = [torch.autograd.grad(OURS(*x, **OPTIONS), x, torch.ones(x[0].shape, dtype=BF16)) for x in (one, other)]
    assert short == []
    outs = [OURS(*x, **OPTIONS) for x in (one, other)]
    assert type(outs[0].grad_fn) is not type(outs[1].grad_fn)
    found = torch.autograd.grad(outs, (*one, *other), [torch.ones_like(x) for x in outs])
    assert sorted(short) == sorted(BOTH * 2) and all(map(torch.equal, found, (*wanted[0], *wanted[1])))


def test_each_array_has_its_address(monkeypatch):
    """In the order of the program's buffers, whatever the order of what is passed, made and kept."""
    order = ("more", "rest", "y", "given", "table", "x", "sum", "count", "unread", "z", "rest2")
    buffers = {name: Buffer((2, 64), "int32") for name in order}
    program = PROGRAM._replace(
        buffers=buffers, inputs=("x", "more"), results=("y", "z"), constants={"table": bytes(range(256)) * 2},
        steps=(PROGRAM.steps[0]._replace(arrays=tuple(x for x in order if x != "unread")),),
        given=("unread", "given"), restored=("count",), operations=(Operation("add", ("given", "unread"), (), "sum"),))
    seen = {}

    class Reader:
        def __init__(self, program, index):
            pass

        def launch(self, addresses, stream):
            seen.update(zip(order, addresses, strict=True))
            for name in ("table", "sum", "count"):
                seen[f"{name}'s"] = ctypes.string_at(seen[name], 512)
    monkeypatch.setattr(runner, "Loaded", Reader)
    monkeypatch.setattr(streams, "_number", lambda index: 3)
    run = runner.Runner(program, torch.device("cpu"))
    x, more, unread, given = (torch.full((2, 64), i, dtype=torch.int32) for i in range(4))
    y, z = run((x, more), (unread, given))
    expected = dict(x=x, more=more, y=y, z=z, given=given)
    assert {name: seen[name] for name in expected} == {name: tensor.data_ptr() for name, tensor in expected.items()}
    assert seen["table's"] == bytes(range(256)) * 2 and seen["count's"] == bytes(512)
    assert seen["sum's"] == (unread + given).numpy().tobytes()
    assert seen["rest2"] - seen["rest"] == 512 and len({seen[name] for name in order if name != "unread"}) == 10


def test_another_device_is_made_current(short, launched, monkeypatch):
    """Memory is taken from the current device, and its context is the thread's."""
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16)
    check(tensors, **OPTIONS)
    current, entered = [0], []

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        entered.append(index)
        yield
        current[0] = before
    monkeypatch.setattr(streams, "device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    (known,) = shortcut._shortcuts.values()
    known._index, run = 1, known._run
    known._run = lambda addresses: (run(addresses), current[0] == 1 or pytest.fail("on the wrong device"))
    check(tensors, **OPTIONS)
    assert entered == [1, 1] and current == [0] and launched == BOTH * 2


def test_results_that_were_not_asked_for_are_of_the_device_too(short, launched, monkeypatch):
    """What makes tensors quickly makes them on the thread's current device, which was another one for these."""
    check(qkv(SHAPE, SHAPE, SHAPE, dtype=BF16), **OPTIONS)
    (known,) = shortcut._shortcuts.values()
    current, made, make = [1], [], known._empty
    monkeypatch.setattr(streams, "device", lambda: current[0])
    monkeypatch.setattr(known, "_index", 1)
    monkeypatch.setattr(known, "_empty", lambda *args: (made.append(current[0]), make(*args))[1])
    for current[0], on in (1, [1]), (0, []):
        del made[:]
        x = known.nothing(torch.float32)
        assert (x.shape, x.dtype, x.device) == ((0,), torch.float32, known.device) and made == on


# --- the driver ------------------------------------------------------------------------------------------------------

OURS_OF = {0: 10, 1: 11}  # the primary contexts of devices
OTHER = 99


class Driver:
    """Counts the calls of the driver, and refuses what it refuses."""

    def __init__(self):
        self.called, self.thread, self.fails, self.home = [], threading.local(), 0, None

    def cuDeviceGet(self, device, index):
        device._obj.value = index.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = OURS_OF[device.value]
        return 0

    def cuCtxGetCurrent(self, context):
        self.called.append("get")
        context._obj.value = getattr(self.thread, "current", None)
        return 0

    def cuCtxSetCurrent(self, context):
        self.called.append("set")
        self.thread.current = context.value
        return 0

    def cuModuleLoadData(self, module, image):
        module._obj.value = self.thread.current
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = module.value
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"an error"
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        self.called.append("launch")
        current = getattr(self.thread, "current", None)
        return 201 if current is None else 400 if current != self.home else self.fails


@pytest.fixture
def counting(monkeypatch):
    found = Driver()
    monkeypatch.setattr(driver, "library", lambda: found)
    driver.context_of.cache_clear()
    yield found
    driver.context_of.cache_clear()


@pytest.fixture(params=[0, 1])
def loaded(counting, request):
    counting.home = OURS_OF[request.param]
    found = launch.Loaded(PROGRAM, request.param)
    del counting.called[:]
    return found


ADDRESSES = [16 * i for i in range(1, 6)]


def test_a_launch_is_one_call_of_the_driver(counting, loaded):
    counting.thread.current = counting.home
    for _ in range(2):
        loaded.launch(ADDRESSES, 7)
    assert counting.called == ["launch"] * 6


def test_a_thread_without_a_context_is_refused_once(counting, loaded):
    """Regression: autograd's thread was asked for its context, given one, and had it taken away, in each backward."""
    counts = []

    def run():
        for _ in range(2):
            loaded.launch(ADDRESSES, 7)
            counts.append(counting.called.count("launch"))
            del counting.called[:]
        counts.append(getattr(counting.thread, "current", None))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counts == ([4, 3, OURS_OF[0]] if loaded.index == 0 else [6, 6, None]), (
        "only device 0 is a thread's device before CUDA is told otherwise")


def test_another_context_stays_the_threads(counting, loaded):
    counting.thread.current = OTHER
    loaded.launch(ADDRESSES, 7)
    assert counting.thread.current == OTHER and counting.called.count("launch") == 6


def test_what_is_refused_for_another_reason_is_an_error(counting, loaded):
    counting.thread.current, counting.fails = counting.home, 400
    with pytest.raises(driver.DriverError, match="cuLaunchKernelEx of add returned CUDA error 400: an error"):
        loaded.launch(ADDRESSES, 7)
    counting.thread.current, counting.fails = None, 700
    with pytest.raises(driver.DriverError, match="CUDA error 700"):
        loaded.launch(ADDRESSES, 7)


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.fixture
def again(monkeypatch):
    """The calls of operators that were known."""
    seen = []
    for name in ("_forwards", "_backwards"):
        monkeypatch.setattr(repeated, name, [])
    from torch_bridge import derivatives
    for operator, (answer, learn) in derivatives._REPEATED.items():
        def noted(*args, answer=answer):
            found = answer(*args)
            seen.extend([answer.__name__] * (found is not None))
            return found
        monkeypatch.setitem(derivatives._REPEATED, operator, (noted, learn))
    return seen


def calls(q, k, v, numbers=CAUSAL, needs=(True, True, True, False, False), dstats=None, **operands):
    """Both operators: out, stats and the gradients."""
    operands = Operands.of(q, k, v, **(NONE | operands))
    results = ops.attention(*Attention(operands, numbers, True).flat())
    dout = torch.ones_like(results[0])
    grads = ops.attention_backward(*AttentionBackward(
        operands, numbers, Results(*results), Cotangents(dout, dstats), PerArray(*needs)).flat())
    return *results, *grads


def test_an_operator_that_was_launched_is_known(again, launched):
    tensors = qkv((2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 8), dtype=BF16, requires_grad=False)
    wanted = calls(*tensors)
    assert again == [] and launched == BOTH
    found = calls(*tensors)
    assert again == BOTH and launched == BOTH * 2
    assert all(map(torch.equal, wanted, found))
    assert [x.stride() for x in wanted] == [x.stride() for x in found]
    out, stats = ops.attention(*Attention(Operands.of(*tensors, **NONE), CAUSAL, False).flat())
    out, stats = ops.attention(*Attention(Operands.of(*tensors, **NONE), CAUSAL, False).flat())
    assert torch.equal(out, wanted[0]) and stats.shape == (0,) and again == [*BOTH, "forward"]


def test_another_call_of_an_operator_is_not_known(again, launched, monkeypatch):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16, requires_grad=False)
    calls(q, k, v)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    stats = torch.zeros(2, 4, 2, 6)
    for change in (dict(numbers=CAUSAL._replace(scale=0.5)), dict(mask=mask), dict(numbers=CAUSAL._replace(left=2))):
        del again[:]
        calls(q, k, v, **change)
        assert again == [], change
    for change in (dict(needs=(True, False, True, False, False)), dict(dstats=stats)):
        del again[:]
        calls(q, k, v, **change)
        assert again == ["forward"], change
    for others in ([heads_inside(q), k, v], [moved(q).detach(), k, v], [torch._neg_view(q), k, v]):
        del again[:]
        calls(*others)
        assert again == []
    del again[:]
    monkeypatch.setenv(attention.VARIABLE, "0")
    calls(q, k, v)
    assert again == []


def test_calls_that_are_copied_leave_the_known_ones_known(again, launched):
    """Regression: each call of a misaligned tensor was one more of the few kinds that are kept."""
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16, requires_grad=False)
    calls(*tensors)
    for _ in range(9):
        calls(*(moved(x).detach() for x in tensors))
    assert again == [] and len(repeated._forwards) == len(repeated._backwards) == 1
    calls(*tensors)
    assert again == BOTH


@pytest.mark.parametrize("change", [torch._neg_view, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)],
                         ids=["negative", "zeros"])
@pytest.mark.parametrize("which", range(3))
def test_numbers_that_are_not_in_memory_are_not_read_there(again, launched, change, which):
    """Regression: of the second call of an operator, the opposite numbers were read, and zeros at address 0."""
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16, requires_grad=False)
    tensors[which] = change(tensors[which])
    wanted = calls(*(x.resolve_neg() + 0 for x in tensors))
    del again[:]
    for _ in range(3):
        assert all(map(torch.equal, calls(*tensors), wanted))
    assert again == []


def test_modes_and_records_see_a_call_that_is_known(again, launched):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16, requires_grad=False)
    wanted = calls(q, k, v)
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))
    with Operators():
        calls(q, k, v)
        calls(q, k, v)
    assert again == [] and seen.count(ops.attention) == seen.count(ops.attention_backward) == 2
    leaf = q.clone().requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            calls(leaf, k, v)
        out, *_ = ops.attention(*Attention(Operands.of(leaf, k, v, **NONE), CAUSAL, True).flat())
        assert out.requires_grad and torch.equal(out, wanted[0])
    mapped = torch.vmap(lambda q: ops.attention(*Attention(Operands.of(q, k, v, **NONE), CAUSAL, False).flat())[0])
    assert torch.equal(mapped(q[None])[0], wanted[0])


def test_a_compiled_program_calls_operators_that_are_known(again, launched):
    tensors = qkv(SHAPE, SHAPE, SHAPE, dtype=BF16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: OURS(*x, **OPTIONS), fullgraph=True, backend="aot_eager")
    found = []
    for _ in range(4):
        out = compiled(*tensors)
        found.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    assert again[-4:] == BOTH * 2 and launched == BOTH * 4
    assert all(torch.equal(x, y) for results in found for x, y in zip(results, found[0], strict=True))
