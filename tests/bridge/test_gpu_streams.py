"""Streams and lifetimes under stress on a GPU: each danger 1,000 times, with torch's stream busy and JAX allocating
beside it.

Beside them stand controls: the obvious bridge (`jax.dlpack.from_dlpack`, jit, `torch.from_dlpack`) in rounds where it
must be wrong, on any GPU, because each condition of its failure is made and looked at, not hoped for: torch's stream
sleeps, the allocator hands back the very block, JAX has written or read it, and only then does the stream go on. Ours
goes through the same rounds and must be right.
"""

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest
import torch

import torch_bridge
from bridge.problems import OURS, heads_inside
from torch_bridge import lifetime, views

pytestmark = pytest.mark.gpu

ROUNDS = 1000
SHAPE = (2, 8, 512, 64)


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


@functools.cache
def _matrix():
    return torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)


def busy(products=12):
    """Keeps torch's current stream busy for some hundred microseconds, while the host goes on."""
    x = _matrix()
    for _ in range(products):
        x = x @ _matrix()
        x = x / x.abs().amax()


@functools.cache
def _cycles_a_millisecond():
    """Of `torch.cuda._sleep`, measured: the highest rate of some, once the clocks are up."""
    torch.cuda._sleep(10**8)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    for event in events:
        event.record()
        torch.cuda._sleep(10**7)
    torch.cuda.synchronize()
    return max(10**7 / a.elapsed_time(b) for a, b in itertools.pairwise(events))


def sleep(milliseconds):
    """Keeps torch's current stream busy for so long, with one kernel, while the host goes on."""
    torch.cuda._sleep(int(milliseconds * _cycles_a_millisecond()))


class Beside:
    """JAX computations that take any memory of the shape of an output that JAX believes to be free, and write it."""

    def __init__(self, jax):
        self.base = jax.device_put(jax.numpy.ones(SHAPE, "bfloat16"), jax.devices()[0])
        self.write = jax.jit(lambda x: x * 0 + 9)
        self.jax, self.kept = jax, []

    def run(self, times=6):
        self.kept = [self.write(self.base) for _ in range(times)]

    def take(self, address, tries=256):
        """Whether JAX handed out memory at an address again. It hands out, and writes, until it has, or much."""
        taken, is_found, size = [], False, self.base.nbytes
        while len(taken) < tries and not is_found:
            taken.append(self.write(self.base))
            is_found = abs(taken[-1].unsafe_buffer_pointer() - address) < size
        self.jax.block_until_ready(taken)
        return is_found


@functools.cache
def _obvious_function():
    import jax

    import pallas_flash
    return jax.jit(lambda q, k, v: pallas_flash.flash_attention(q, k, v, mask=pallas_flash.Causal(), layout="BHLD"))


def obvious(q, k, v):
    """The bridge that anyone would write first."""
    import jax
    return torch.from_dlpack(_obvious_function()(*(jax.dlpack.from_dlpack(x.detach()) for x in (q, k, v))))


def ours(q, k, v):
    return OURS(q, k, v, is_causal=True)


def fresh(count=3):
    return [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def wrong_rounds(one_round, rounds):
    """How many rounds gave another result than expected; `one_round` returns (result, expected)."""
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for i in range(rounds):
        result, expected = one_round()
        wrong += (result != expected).any()
        if i % 50 == 49:
            torch.cuda.synchronize()  # the host must not run arbitrarily far ahead
    return int(wrong)


# --- controls --------------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """What a round of a control saw."""

    is_reused: bool  # the allocator handed the block back
    is_asleep: bool  # torch's stream had not yet got to what it does with the block when JAX was done with it
    is_wrong: bool  # the result


def repeat(one_round, times=8):
    """Rounds that may sleep for longer whenever one before did not for long enough; `one_round` takes milliseconds."""
    milliseconds, seen = 50, []
    for _ in range(times):
        seen.append(one_round(milliseconds))
        milliseconds *= 1 if seen[-1].is_asleep else 2
    return seen


def assert_seen(rounds):
    """The obvious bridge was wrong wherever it had to be, and that was at least once."""
    counts = ", ".join(f"{field} in {sum(column)}" for field, column in zip(Round._fields, zip(*rounds)))
    forced = [x for x in rounds if x.is_reused and x.is_asleep]
    assert forced, f"this control could see nothing: of {len(rounds)} rounds {counts}"
    assert all(x.is_wrong for x in forced), f"a wrong bridge was right, so the danger is another: {rounds}"


def read_late(jax, bridge, reader):
    """Rounds in which an output is dropped, and JAX writes whatever memory it has free, before `reader` reads it."""
    beside, tensors = Beside(jax), fresh()
    beside.take(address=-(2**62))  # JAX's pool grows here: a round must not wait for an allocation
    expected = bridge(*tensors).clone()
    with torch.cuda.stream(reader):
        bridge(*tensors).clone()
    torch.cuda.synchronize()

    def one_round(milliseconds):
        out = bridge(*tensors)
        address = out.data_ptr()
        reader.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(reader):
            sleep(milliseconds)
            awake = torch.cuda.Event()
            awake.record()
            result = out.clone()
        del out
        is_reused = beside.take(address)
        is_asleep = not awake.query()
        torch.cuda.synchronize()
        return Round(is_reused, is_asleep, not torch.equal(result, expected))
    return repeat(one_round)


def read_early(jax, bridge, times=8):
    """Rounds in which inputs are made by a stream that sleeps first; until then their memory holds NaN.

    `bridge` returns an array of JAX that is ready.
    """
    tensors = fresh()
    torch.cuda.synchronize()
    expected = torch.from_dlpack(bridge(*tensors)).clone()

    def one_round(milliseconds):
        # More than torch has free blocks of this size: all that it can hand back hold NaN.
        noise = [torch.full(SHAPE, torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
        addresses = {x.data_ptr() for x in noise}
        torch.cuda.synchronize()
        del noise
        sleep(milliseconds)
        awake = torch.cuda.Event()
        awake.record()
        inputs = [x.clone() for x in tensors]
        result = bridge(*inputs)
        is_asleep = not awake.query()
        torch.cuda.synchronize()
        is_reused = bool(addresses & {x.data_ptr() for x in inputs})
        return Round(is_reused, is_asleep, not torch.equal(torch.from_dlpack(result), expected))
    return repeat(one_round, times)


# --- lifetimes -------------------------------------------------------------------------------------------------------


def dropped_output(jax, bridge):
    """A round in which the output is dropped while torch's stream has still to read it."""
    beside, tensors = Beside(jax), fresh()
    expected = bridge(*tensors).clone()
    torch.cuda.synchronize()

    def one_round():
        out = bridge(*tensors)
        busy()
        result = out.clone()
        del out
        beside.run()
        return result, expected
    return one_round


def test_an_output_may_be_dropped_before_torch_has_read_it(jax, path):
    assert_seen(read_late(jax, obvious, torch.cuda.current_stream()))
    assert not any(x.is_wrong for x in read_late(jax, ours, torch.cuda.current_stream()))
    assert wrong_rounds(dropped_output(jax, ours), ROUNDS) == 0
    for _ in range(2):  # events are recorded, and have passed
        lifetime.collect(torch.cuda.current_device())
        torch.cuda.synchronize()
    lifetime.collect(torch.cuda.current_device())
    assert lifetime.held_exports() <= 1


def dropped_on_another_stream(jax, bridge):
    """A round in which a second stream reads the output, which is dropped while the first is current again."""
    beside, tensors, side = Beside(jax), fresh(), torch.cuda.Stream()
    expected = bridge(*tensors).clone()
    with torch.cuda.stream(side):
        bridge(*tensors)
    torch.cuda.synchronize()

    def one_round():
        out = bridge(*tensors)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            busy()
            result = out.clone()
        del out
        beside.run()
        torch.cuda.current_stream().wait_stream(side)
        result.record_stream(torch.cuda.current_stream())
        return result, expected
    return one_round


def test_an_output_may_be_read_by_another_stream(jax, path):
    assert_seen(read_late(jax, obvious, torch.cuda.Stream()))
    assert not any(x.is_wrong for x in read_late(jax, ours, torch.cuda.Stream()))
    assert wrong_rounds(dropped_on_another_stream(jax, ours), ROUNDS) == 0


def refilled_inputs(jax, bridge, milliseconds=lambda: 3):
    """A round in which a busy stream makes the inputs, which are dropped and refilled right after the call.

    The memory holds NaN from the round before until the stream gets to the inputs: with 3 ms long after the host, which
    needs less than one for a round, has returned from the call.
    """
    beside, tensors = Beside(jax), fresh()
    torch.cuda.synchronize()
    expected = bridge(*tensors).clone()
    torch.cuda.synchronize()
    assert expected.isfinite().all()

    def one_round():
        sleep(milliseconds())
        q, k, v = (x.clone() for x in tensors)
        out = bridge(q, k, v)
        del q, k, v
        noise = [torch.full(SHAPE, torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        beside.run()
        del noise
        return out, expected
    return one_round


def test_inputs_may_be_dropped_and_refilled_right_after_the_call(jax, path):
    assert wrong_rounds(refilled_inputs(jax, ours), ROUNDS) == 0


def test_inputs_of_a_stream_that_is_about_to_rest(jax, path):
    """A call asks whether the stream is at rest, and orders nothing if it is: here it may be either at that moment."""
    def milliseconds():
        return torch.rand(()).item() * 0.2
    assert wrong_rounds(refilled_inputs(jax, ours, milliseconds), ROUNDS) == 0


def test_a_control_without_order_is_seen(jax):
    """What the two tests above would see if JAX did not wait for torch's stream; ordered, the same rounds are right."""
    def without_order(x):
        capsule = torch.utils.dlpack.to_dlpack(x)
        producer = type("P", (), {"__dlpack__": lambda self, stream=None, **_: capsule,
                                  "__dlpack_device__": lambda self: (2, torch.cuda.current_device())})()
        return jax.dlpack.from_dlpack(producer)

    def bridge(imported):
        return lambda *inputs: jax.block_until_ready(_obvious_function()(*map(imported, inputs)))
    assert_seen(read_early(jax, bridge(without_order)))
    assert not any(x.is_wrong for x in read_early(jax, bridge(jax.dlpack.from_dlpack), times=2))


def test_views_of_reused_memory(jax, monkeypatch):
    """Kept views are used again by other tensors at the same addresses, in one order and in another."""
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "0")  # the other way keeps no views
    tensors = [fresh() for _ in range(4)]
    expected = [ours(*x).clone() for x in tensors]
    torch.cuda.synchronize()
    before, turn = views.kept_views(), iter(range(10**9))

    def one_round():
        i = next(turn)
        busy(2)
        clones = [x.clone() for x in tensors[i % 4]]
        clones = [clones[j] for j in ((0, 1, 2), (2, 0, 1), (1, 2, 0))[i % 3]]  # which address holds which operand
        for x, source in zip(clones, tensors[i % 4], strict=True):
            x.copy_(source)
        out = ours(*clones)
        for x in clones:
            x.fill_(torch.nan)
        return out, expected[i % 4]
    assert wrong_rounds(one_round, ROUNDS) == 0
    assert views.kept_views() - before < 100, "memory was not reused: this test proves nothing"


def test_side_streams(jax, path):
    tensors = fresh()
    expected = ours(*tensors).clone()
    streams, beside = [torch.cuda.Stream() for _ in range(3)], Beside(jax)
    torch.cuda.synchronize()
    turn = iter(range(10**9))

    def one_round():
        stream = streams[next(turn) % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            busy(4)
            q, k, v = (x.clone() for x in tensors)
            result = ours(q, k, v).clone()
            del q, k, v
        beside.run(2)
        torch.cuda.current_stream().wait_stream(stream)
        result.record_stream(torch.cuda.current_stream())
        return result, expected
    assert wrong_rounds(one_round, ROUNDS) == 0


def test_training_steps(jax, path):
    """Forward and backward; the saved tensors go, and the gradients are read late."""
    beside, tensors, dout = Beside(jax), fresh(), fresh(1)[0]

    def gradients():
        leaves = [x.clone().requires_grad_() for x in tensors]
        torch.use_deterministic_algorithms(True)
        try:
            return torch.autograd.grad(OURS(*leaves, is_causal=True), leaves, dout)
        finally:
            torch.use_deterministic_algorithms(False)
    expected = [grad.clone() for grad in gradients()]
    torch.cuda.synchronize()

    def one_round():
        busy(6)
        grads = gradients()
        busy(6)
        result = torch.stack([(a != b).any() for a, b in zip(grads, expected, strict=True)])
        del grads
        beside.run()
        return result, torch.zeros_like(result)
    assert wrong_rounds(one_round, ROUNDS) == 0


def test_threads_with_streams_of_their_own(jax, path):
    tensors = fresh()
    expected = ours(*tensors).clone()
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            def one_round():
                busy(2)
                return ours(*(x.clone() for x in tensors)), expected
            wrong.append(wrong_rounds(one_round, ROUNDS // 4))
            torch.cuda.current_stream().synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 4


# --- order, copies, capture ------------------------------------------------------------------------------------------


def test_the_host_does_not_wait_for_dropout(jax):
    the_host_does_not_wait(0.4)


def test_the_host_does_not_wait(jax, path):
    the_host_does_not_wait(0.0)


def the_host_does_not_wait(dropout_p):
    def call(q, k, v):
        return OURS(q, k, v, is_causal=True, dropout_p=dropout_p)
    q, k, v = (x.requires_grad_() for x in fresh())
    torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    torch.cuda.synchronize()
    sleep(500)  # one kernel: a queue of many would fill up and block the host
    start = time.perf_counter()
    out = call(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    took = time.perf_counter() - start
    assert not torch.cuda.current_stream().query(), "the stream was not busy for long enough to see anything"
    assert took < 0.05
    torch.cuda.synchronize()


def kernels_of(step, times=3):
    """The names of what some calls run on the GPU. A process' first profile may miss kernels: the second counts.

    acc_events: without it torch 2.11 warns that a profile of several cycles keeps the last; there is but one here.
    """
    step()
    for _ in range(2):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(times):
                step()
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("direction", ["forward", "backward", "training step"])
@pytest.mark.parametrize("inside", [False, True], ids=["BHLE", "BLHE"])
def test_hopper_kernels_run_without_a_copy_kernel(jax, path, inside, direction):
    """Plain XLA fuses as it likes; this is about the hand-written kernels."""
    from pallas_flash import dispatch
    if not all("hopper" in module for module in dispatch.get("hopper").modules[:1 if direction == "forward" else 2]):
        pytest.skip("the backward is plain XLA")
    tensors = [(heads_inside(x) if inside else x).requires_grad_() for x in fresh()]
    out = ours(*tensors)
    dout = torch.randn_like(out)
    step = {"forward": lambda: ours(*tensors),
            "backward": lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True),
            "training step": lambda: torch.autograd.grad(ours(*tensors), tensors, dout)}[direction]
    names = kernels_of(step)
    assert sum("mosaic" in name for name in names) >= 3, f"the profiler missed kernels of three calls: {names}"
    assert not [name for name in names if re.search(r"transpose|copy|memcpy", name, re.IGNORECASE)], names


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")  # a leaf used on two streams
def test_a_captured_training_step_is_right_for_new_numbers(monkeypatch):
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "1")
    tensors, dout = [x.requires_grad_() for x in fresh()], fresh(1)[0]

    def step():
        out = ours(*tensors)
        return out, *torch.autograd.grad(out, tensors, dout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*tensors, dout):
                x.normal_()
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):  # dq is a sum in any order
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_a_first_call_in_a_capture_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "1")
    x = torch.ones(8, device="cuda")
    tensors = [torch.randn(1, 2, 72, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must have run once before it is captured"), torch.cuda.graph(graph):
        x.mul_(2)
        ours(*tensors)
    torch.cuda.synchronize()
    assert ours(*tensors).isfinite().all()


def test_a_capture_is_refused_with_a_sentence(jax, monkeypatch):
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "0")
    tensors, x = fresh(), torch.ones(8, device="cuda")
    ours(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
        x.mul_(2)  # torch warns of an empty graph when the capture ends, and that warning would hide the error
        ours(*tensors)
    torch.cuda.synchronize()
    assert ours(*tensors).isfinite().all()


def test_an_output_dropped_during_a_capture_is_kept(jax, path):
    out = ours(*fresh())
    x = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        del out
    graph.replay()
    torch.cuda.synchronize()
    assert y.sum().item() == 16 and ours(*fresh()).isfinite().all()


def test_tensors_on_the_second_device_while_the_first_is_current(jax, asked):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = fresh()
    expected = ours(q, k, v)
    q, k, v = (x.to("cuda:1").requires_grad_() for x in (q, k, v))
    out = ours(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.device == q.device and all(grad.device == q.device for grad in grads)
    torch.testing.assert_close(out.to("cuda:0"), expected)
    with pytest.raises(RuntimeError, match="same device"):
        ours(q, k.to("cuda:0"), v)


STARTS_JAX = {
    "the-bridge": "import torch, torch_bridge",
    "jax-first": "import jax; jax.devices(); import torch, torch_bridge",
    "torch-first": "import torch; torch.zeros(1, device='cuda'); import jax, torch_bridge",
}


@pytest.mark.parametrize("start", STARTS_JAX)
def test_the_current_device_stays_the_first(start, asked):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    program = STARTS_JAX[start] + """
q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
out = torch_bridge.scaled_dot_product_attention(q, q, q)
assert q.device.index == out.device.index == torch.cuda.current_device() == 0, (q.device, torch.cuda.current_device())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_dropout_advances_the_gpus_generator_as_randint_does(jax):
    tensors = fresh()

    def state(call):
        torch.manual_seed(7)
        call()
        return torch.cuda.get_rng_state()
    drawn = state(lambda: torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device="cuda"))
    assert torch.equal(state(lambda: OURS(*tensors, dropout_p=0.4)), drawn)
    assert not torch.equal(state(lambda: OURS(*tensors)), drawn)


# --- compile, autocast -----------------------------------------------------------------------------------------------


HAS_TRITON = importlib.util.find_spec("triton") and (shutil.which("cc") or shutil.which("gcc"))
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton and a C compiler"))


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compile_trains_on_the_gpu(jax, path, backend, quiet):
    def step(q, k, v):
        return ours(q * 2, k, v).float().square().sum()
    tensors = [x.requires_grad_() for x in fresh()]
    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for name, a, b in zip("qkv", torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm(), f"d{name}"


def test_autocast_on_the_gpu(jax, path):
    q, k, v = (torch.randn(SHAPE, device="cuda", requires_grad=True) for _ in range(3))
    with torch.autocast("cuda", torch.bfloat16):
        out = ours(q, k, v.half())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_activate_replaces_the_flash_backend(jax, path):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this PyTorch has no registry of flash attention implementations")
    leaves = [x.requires_grad_() for x in fresh()]
    dout = fresh(1)[0]

    def step():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, dout)]
    expected = step()
    runs = lambda: sum(row.calls for row in torch_bridge.report())
    before = runs()
    torch_bridge.activate()
    try:
        ours_now = step()
        assert runs() == before + 2, "a forward and a backward of ours"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    for a, b in zip(ours_now, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_activate_reaches_unchanged_calls(jax, asked):
    """With no sdpa_kernel context: on Hopper GPUs PyTorch prefers cuDNN. And varlen_attn, where this PyTorch has it."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this PyTorch has no registry of flash attention implementations")
    leaves, dout = [x.requires_grad_() for x in fresh()], fresh(1)[0]
    order = torch._C._get_sdp_priority_order
    F.scaled_dot_product_attention(*leaves)  # PyTorch sets its own order when it first chooses
    before = order()

    def step():
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, dout)]
    expected = step()
    varlen = getattr(torch.nn.attention, "varlen", None) or pytest.importorskip("torch.nn.attention.varlen")
    tokens = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in leaves]
    bounds = torch.tensor([0, 30, tokens[0].shape[0]], device="cuda", dtype=torch.int32)
    packed = lambda: varlen.varlen_attn(*tokens, bounds, bounds, tokens[0].shape[0], tokens[0].shape[0])
    theirs = packed()
    torch_bridge.report(reset=True)
    torch_bridge.activate()
    try:
        found, ours_packed = step(), packed()
        torch.autograd.grad(ours_packed, tokens, torch.ones_like(ours_packed))
        rows = torch_bridge.report(reset=True)
        with sdpa_kernel(SDPBackend.MATH):
            step()
        assert not torch_bridge.report(reset=True), "an explicit choice is respected"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    for what in ("forward", "backward"):
        assert sum(row.calls for row in rows if row.what == what) == 2, rows
    assert {"launched directly" in row.problem for row in rows} == {asked == "direct"}, rows
    assert order() == before
    torch.testing.assert_close(ours_packed, theirs, rtol=0.05, atol=0.02)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
