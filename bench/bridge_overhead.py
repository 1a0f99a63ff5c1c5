"""Host microseconds of one call from PyTorch, with its parts: `python -m bench.bridge_overhead`, one JSON object a
line.

The problem is too small to keep a device busy. The loops do not synchronise, so that a figure is what the host spends
before it may go on. On an H100 the whole forward must stay within 200 us; the obvious way through DLPack takes 560. All
of it takes about 20 seconds there, half of them to start. Where there is no history of the code, set BENCH_COMMIT
(bench/environment.py). All calls go through DLPack, whose parts these are: PALLAS_FLASH_DIRECT is 0. `python -m
bench.bridge_paths` measures whole calls by DLPack and by the direct path.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench import environment, records
from torch_bridge import exchange, ops, sdpa, views
from torch_bridge import scaled_dot_product_attention as OURS
from torch_bridge.arguments import Numbers, Operands, PerArray
from torch_bridge.direct.attention import VARIABLE

__all__ = ["main", "measure"]

SHAPE = (1, 8, 128, 64)
ROUNDS = 25


def _microseconds(calls: Sequence[Callable[[], Any]], repeats: int, finish: Callable[[], Any]) -> list[list[float]]:
    """For each call, the mean host time of one in every round.

    All take turns in a round, as a process is fast for a second and slow for the next. Before a turn the device is
    drained and the call made three times, untimed.
    """
    for call in calls:
        for _ in range(20):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            finish()
            for _ in range(3):
                call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            found.append((time.perf_counter() - start) / repeats * 1e6)
    finish()
    return times


def _tensors(device: str, inside: bool, requires_grad: bool) -> list[torch.Tensor]:
    made = [torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(3)]
    if inside:
        made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    return [x.requires_grad_(requires_grad) for x in made]


def _calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Whole calls: ours in both storage orders, torch's own, and the obvious bridge."""
    for name, inside in (("BHLE", False), ("BLHE", True)):
        q, k, v = _tensors(device, inside, False)
        yield f"forward, {name}", functools.partial(OURS, q, k, v, is_causal=True)
    leaves = _tensors(device, False, True)
    dout = torch.randn(SHAPE, device=device, dtype=torch.bfloat16)
    yield "forward, leaves require grad", lambda: OURS(*leaves, is_causal=True)
    step = lambda: torch.autograd.grad(OURS(*leaves, is_causal=True), leaves, dout)
    yield "forward and backward", step
    yield "forward and backward, in one thread", _in_one_thread(step)
    q, k, v = _tensors(device, False, False)
    yield "torch's own forward", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield "torch's own forward and backward", lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    yield "the obvious forward", _obvious(q, k, v)


def _in_one_thread(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step whose backward does not move to autograd's thread of the device."""
    def call() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            step()
    return call


def _obvious(*tensors: torch.Tensor) -> Callable[[], Any]:
    import jax

    import pallas_flash
    causal = pallas_flash.Causal()
    attend = jax.jit(lambda q, k, v: pallas_flash.flash_attention(q, k, v, mask=causal, layout="BHLD"))
    return lambda: torch.from_dlpack(attend(*(jax.dlpack.from_dlpack(x) for x in tensors)))


def _parts(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a forward is made of, in order: the checks, and the exchange, which holds all that come after it."""
    q, k, v = _tensors(device, False, False)
    problem = Operands.of(q, k, v, mask=None, bias=None, seed=None)
    numbers = Numbers.of(causal_offset=0, scale=None, dropout_p=0.0)
    plan = exchange.plan_for(problem, numbers)
    arrays = exchange._arrays((q, k, v), plan.device)
    (out,) = plan.forward[False](*arrays)
    yield "check and normalise arguments", lambda: sdpa.prepare(q, k, v, None, 0.0, True, None, False)
    yield "exchange, forward", lambda: exchange.attend(problem, numbers)
    yield "plan", lambda: exchange.plan_for(problem, numbers)
    yield "is it sharable, 3 tensors", lambda: exchange._shared(plan.layout, (q, k, v), (None, None, None))
    yield "import 3 tensors", lambda: exchange._arrays((q, k, v), plan.device)
    if device == "cuda":
        yield "view that carries the wait, if torch's stream is not at rest", lambda: views.after(q, plan.device)
    yield "jitted call, arrays known", lambda: plan.forward[False](*arrays)
    yield "import 3 tensors and jitted call", lambda: plan.forward[False](*exchange._arrays((q, k, v), plan.device))
    yield "export and release 1 tensor", lambda: exchange._tensors([out], q)
    result, stats = exchange.attend_saving(problem, numbers)
    dout, needs = torch.randn_like(result), PerArray(True, True, True, False, False)
    yield "exchange, forward that saves lse", lambda: exchange.attend_saving(problem, numbers)
    yield "exchange, backward, in the thread of the call", lambda: exchange.gradients(
        problem, numbers, (result, stats), dout, needs)
    tensors = (result, exchange.stats_tensor(stats, q))
    yield "operator, for calls that something intercepts", lambda: ops.attention(*problem, *numbers, False)
    yield "backward operator, likewise", lambda: ops.attention_backward(
        *problem, *numbers, *tensors, dout, None, [*needs])


def measure(device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """A record for each whole call and each part: the median of the rounds, the fastest and the slowest."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    where = environment.describe()
    named = [(kind, *call) for kind, calls in (("call", _calls(device)), ("part", _parts(device))) for call in calls]
    times = _microseconds([call for *_, call in named], repeats, finish)
    for (kind, what, _), found in zip(named, times, strict=True):
        yield {"environment": where, "kind": f"bridge-{kind}", "what": what, "shape": SHAPE,
               "host_us": round(statistics.median(found), 1),
               "host_us_range": [round(min(found), 1), round(max(found), 1)]}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="calls a turn")
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    os.environ[VARIABLE] = "0"
    for record in measure(arguments.device, arguments.repeats):
        records.show(record, arguments.save)


if __name__ == "__main__":
    main()
