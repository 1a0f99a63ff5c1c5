"""Host microseconds of one call from PyTorch, with its parts: `python -m bench.bridge_overhead`, one JSON object a
line.

The problem is too small to keep a device busy. The loops do not synchronise, so that a figure is what the host spends
before it may go on. On an H100 the whole forward must stay within 200 us; the obvious way through DLPack takes 560.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench import environment, records
from torch_bridge import exchange, ops, sdpa, views
from torch_bridge import scaled_dot_product_attention as OURS

__all__ = ["main", "measure"]

SHAPE = (1, 8, 128, 64)


def _microseconds(call: Callable[[], Any], repeats: int, finish: Callable[[], Any]) -> float:
    """The median over rounds of the mean host time of a call; the device is drained between rounds, not timed."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(9):
        finish()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - start) / repeats * 1e6)
    finish()
    return sorted(rounds)[len(rounds) // 2]


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
    yield "forward and backward", lambda: torch.autograd.grad(OURS(*leaves, is_causal=True), leaves, dout)
    q, k, v = _tensors(device, False, False)
    yield "torch's own forward", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield "torch's own forward and backward", lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    yield "the obvious forward", _obvious(q, k, v)


def _obvious(*tensors: torch.Tensor) -> Callable[[], Any]:
    import jax

    import pallas_flash
    causal = pallas_flash.Causal()
    attend = jax.jit(lambda q, k, v: pallas_flash.flash_attention(q, k, v, mask=causal, layout="BHLD"))
    return lambda: torch.from_dlpack(attend(*(jax.dlpack.from_dlpack(x) for x in tensors)))


def _parts(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a forward is made of, in order; the operator is the whole without the first, and holds all the others."""
    q, k, v = _tensors(device, False, False)
    problem, numbers = (q, k, v, None, None, None), (0, None, 0.0, False)
    plan = exchange.plan_for(problem, numbers)
    arrays = exchange._arrays(problem[:3], plan.device)
    (out,) = plan.forward[False](*arrays)
    yield "check and normalise arguments", lambda: sdpa.prepare(q, k, v, None, 0.0, True, None, False)
    yield "operator", lambda: ops.attention(*problem, *numbers, False)
    yield "operator without dispatch", lambda: exchange.forward(problem, numbers, False)
    yield "plan", lambda: exchange.plan_for(problem, numbers)
    yield "is it sharable, 3 tensors", lambda: exchange._shared(plan.layout, problem[:3], problem[3:])
    yield "import 3 tensors", lambda: exchange._arrays(problem[:3], plan.device)
    if device == "cuda":
        yield "view that carries the wait, if torch's stream is not at rest", lambda: views.after(q, plan.device)
    yield "jitted call, arrays known", lambda: plan.forward[False](*arrays)
    yield "import 3 tensors and jitted call", lambda: plan.forward[False](*exchange._arrays(problem[:3], plan.device))
    yield "export and release 1 tensor", lambda: exchange._tensors([out], q.device)
    out, lse = ops.attention(*problem, *numbers, True)
    dout = torch.randn_like(out)
    yield "backward operator, in the thread of the call", lambda: ops.attention_backward(
        *problem, *numbers, out, lse, dout, None, [True, True, True, False])


def measure(device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """A record for each whole call and each part."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    where = environment.describe()
    for kind, calls in (("call", _calls(device)), ("part", _parts(device))):
        for what, call in calls:
            yield {"environment": where, "kind": f"bridge-{kind}", "what": what, "shape": SHAPE,
                   "host_us": round(_microseconds(call, repeats, finish), 1)}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=300, help="calls a round")
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    for record in measure(arguments.device, arguments.repeats):
        print(json.dumps({name: x for name, x in record.items() if name != "environment"}), flush=True)
        if arguments.save:
            records.append(records.RESULTS / records.file_name(record["environment"]), record)


if __name__ == "__main__":
    main()
