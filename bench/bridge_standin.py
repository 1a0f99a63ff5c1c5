"""What a call on the direct path costs the host, without a GPU: `python -m bench.bridge_standin`, a JSON object a line.

Everything runs as it does before a GPU, but for three things: CPU tensors stand for those of a GPU, the driver is one
that returns at once (made with gcc), and the plans are made up, with as many launches and addresses as those of B1 H8
S128 d64 have there. So a figure is what the bridge and torch do, without the driver and torch's allocator of GPU
memory, and autograd works in the caller's thread. It is for pairs: the same script on two trees, in turn. Whole calls
on a GPU, beside torch's own: `python -m bench.bridge_paths`.
"""

import argparse
import contextlib
import ctypes
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from torch_bridge import scaled_dot_product_attention, streams
from torch_bridge.direct import attention, cache, driver, repeated, requirements, shared, shortcut
from torch_bridge.direct.plan import Buffer, Kernel, Program, Step
from torch_bridge.direct.problem import Gpu

__all__ = ["SHAPE", "calls", "main", "microseconds", "stand_ins"]

SHAPE = (1, 2, 16, 64)
"""(batch, heads, length, dim), bfloat16 and causal: small, as what C takes from the system anew for each large tensor
costs more than a call."""
_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuModuleLoadData(void **module, void *image) { return *module = (void *)2, 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { return *function = (void *)3, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuLaunchKernelEx(void *config, void *function, void **parameters, void **extra) { return 0; }
int cuGetErrorString(int error, char **text) { return 0; }
"""
_H200 = Gpu("NVIDIA H200", (9, 0), 132, 232_448)


def _program(pass_name: str) -> Program[Kernel]:
    batch, heads, length, dim = SHAPE
    x, stats = Buffer(SHAPE, "bfloat16"), Buffer((batch, heads, 2, length), "float32")
    known = {"q": x, "k": x, "v": x, "out": x, "stats": stats}

    def step(*arrays: str) -> Step[Kernel]:
        patches = tuple((place, place) for place in range(len(arrays)))
        return Step(Kernel("kernel", (1, 1, 1), (128, 1, 1), 1024, b"", bytes(8 * 160), patches), arrays)
    if pass_name == "forward":
        return Program({**known, "table": Buffer((heads, 2), "int32")}, ("q", "k", "v"), ("out", "stats"),
                       {"table": bytes(8 * heads)}, (step("q", "k", "v", "table", "out", "stats"),),
                       implementation="hopper")
    more = {"dout": x, "dstats": stats, "statistics": Buffer((batch, heads, 3, length), "float32"),
            "dq_sums": Buffer((batch, heads, length, dim), "float32"), "dq": x, "dk": x, "dv": x}
    return Program(known | more, ("q", "k", "v", "out", "stats", "dout", "dstats"), ("dq", "dk", "dv"), {}, (
        step("out", "dout", "stats", "dstats", "statistics", "dq_sums"),
        step("q", "k", "v", "dout", "statistics", "dq_sums", "dk", "dv", "dq_sums"),
        step("dq_sums", "dq")), implementation="hopper")


@contextlib.contextmanager
def stand_ins(device: str = "cpu") -> Iterator[None]:
    """Where calls of a device's tensors are launched directly, by the driver that does nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library = pathlib.Path(folder) / "driver.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-o", library, "-"], input=_DRIVER.encode(),
                       check=True)
        loaded = ctypes.CDLL(str(library))
        for target, name, value in (
                (driver, "library", lambda: loaded), (driver, "version", lambda: 13000),
                (attention, "DEVICES", frozenset({device})), (attention, "gpu_of", lambda device: _H200),
                (attention.Direct, "expect", lambda self, pass_name: None), (requirements, "why_not", lambda: None),
                (cache, "find", lambda request, index: _program(request.pass_name)),
                (streams, "_number", lambda index: 78),
                # What is known of calls is forgotten with them.
                *((attention, name, {}) for name in ("_choices", "_directs", "_reasons")),
                *((shared, name, {}) for name in ("_zeros", "_unread")), (shortcut, "_shortcuts", {}),
                (shortcut, "_recent", []), (repeated, "_forwards", []), (repeated, "_backwards", [])):
            stack.enter_context(mock.patch.object(target, name, value))
        driver.context_of.cache_clear()
        stack.callback(driver.context_of.cache_clear)
        yield


def calls(device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    attend = scaled_dot_product_attention
    q, k, v, dout = (torch.empty(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        for x in leaves:
            x.grad = None
        attend(*leaves, is_causal=True).backward(dout)
    return {"forward": lambda: attend(q, k, v, is_causal=True),
            "forward with gradient": lambda: attend(*leaves, is_causal=True), "forward and .backward()": both,
            "forward and autograd.grad": lambda: torch.autograd.grad(attend(*leaves, is_causal=True), leaves, dout)}


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call, on average: of this thread's time, as others work on the machine, too."""
    begin = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - begin) / repeats * 1e6


def main() -> None:
    """Prints the median and the least of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=50, help="calls a round")
    arguments = parser.parse_args()
    with stand_ins():
        found = calls()
        times: dict[str, list[float]] = {what: [] for what in found}
        for i in range(arguments.rounds + 1):
            for what, call in found.items():
                time_us = microseconds(call, arguments.repeats if i else 10)
                if i:  # the first round is for what is set up once
                    times[what].append(time_us)
    for what, mine in times.items():
        print(json.dumps({"kind": "bridge-host", "what": what, "median_us": round(statistics.median(mine), 2),
                          "least_us": round(min(mine), 2)}))


if __name__ == "__main__":
    main()
