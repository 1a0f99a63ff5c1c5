"""The host's microseconds of calls from PyTorch, beside torch's own: `python -m bench.bridge_paths --hosts`.

What bridge_paths.py times of the host, for PyTorch and the direct path alone, more rounds of it, and what tells where
it goes: the parts of a step one after another, the same with autograd in the caller's thread, and the calls as
operators in programs of torch.compile. About 45 s on an H200, most of them to compile four programs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import bridge_paths
from bench.bridge_paths import Path

__all__ = ["PARTS", "measure"]

PARTS = ("clear gradients", "forward", ".backward()", "drop")
"""Of a step, in their order."""
Record = dict[str, Any]


def _part(case: bridge_paths._Case, number: int) -> bridge_paths.Turn:
    """Times one part of steps."""
    def turn(path: Path, repeats: int) -> float:
        clock, total = time.perf_counter, 0.0
        for _ in range(repeats):
            times = [clock()]
            case.clear()
            times.append(clock())
            out = case.forward(path)
            times.append(clock())
            out.backward(case.dout)
            times.append(clock())
            del out
            times.append(clock())
            total += times[number + 1] - times[number]
        return total / repeats
    return turn


def _in_this_thread(turn: bridge_paths.Turn) -> bridge_paths.Turn:
    def other(path: Path, repeats: int) -> float:
        with torch.autograd.set_multithreading_enabled(False):
            return turn(path, repeats)
    return other


def _compiled(path: Path, backend: str) -> Path:
    def attend(*tensors: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return path.attend(*tensors, is_causal=is_causal)
    return path._replace(attend=torch.compile(attend, fullgraph=True, dynamic=False, backend=backend))


def measure(device: str, rounds: int, repeats: int, backend: str = "inductor") -> Iterator[Record]:
    """Records of kind "bridge-path"; those of a path that fails or is wrong have a reason."""
    shape = bridge_paths.SMALL
    case = bridge_paths._Case.of(shape, device)
    turns = bridge_paths._turns(case)
    both = turns["forward and .backward()"]
    more: dict[str, bridge_paths.Turn] = {
        **{f"in a step, {name}": _part(case, i) for i, name in enumerate(PARTS)},
        "forward and .backward(), in one thread": _in_this_thread(both)}
    whole = {name: turns[name] for name in ("forward", "forward with gradient", "forward and .backward()")}
    chosen = bridge_paths.PATHS[0], bridge_paths.PATHS[-1]
    yield from _timed(case, turns | more, chosen, rounds, repeats)
    with contextlib.suppress(ImportError):
        torch._dynamo.reset()
    programs = *(_compiled(path, backend) for path in chosen),
    yield from _timed(case, {f"compiled, {name}": turn for name, turn in whole.items()}, programs, rounds, repeats)


def _timed(case: bridge_paths._Case, turns: dict[str, bridge_paths.Turn], paths: tuple[Path, ...], rounds: int,
           repeats: int) -> Iterator[Record]:
    shape = tuple(case.q.shape)
    finish: Callable[[], Any] = torch.cuda.synchronize if case.q.is_cuda else lambda: None
    checked = [*bridge_paths._checked(case, paths, "host time")]
    yield from (bridge_paths._refused("host", shape, *one) for one in checked if one[1])
    able = [path for path, reason in checked if not reason]
    for what, turn in turns.items():
        one = lambda path, turn=turn: turn(path, repeats)
        yield from bridge_paths._records(
            what, "host_us", shape, bridge_paths._interleaved(one, able, rounds, finish))
