"""What takes GPU memory beside torch's allocator: `python -m bench.module_memory BATCH HEADS LENGTH DIM WAY DEVICE`.

It prints one JSON object: bytes of the device, read before and after each step of a first forward and backward by the
direct path, of those steps that took any: the import, each call of the driver that loads a module or prepares its
function, the launches of a pass; what no step explains is "between them". All but torch's own allocator counts, so
nothing else may run on the device meanwhile.

WAY is "alone", or "after an empty module": then a module with one kernel that does nothing is loaded before ours. If it
takes what ours take alone, and ours then take nothing, it is the driver that takes its memory of modules in pieces of
that size. "again" says the same of ours: how many bytes so many more loads of the same modules took.

As in first_generate.py it prints "ready" first, waits for a line, and imports no JAX.
"""

import ctypes
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from bench import first_call, waiting

__all__ = ["Meter", "measure", "watched"]

LOADS = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
_AGAIN = 16
_EMPTY = b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"


class Meter:
    """Which steps took how many bytes.

    Args:
      used: bytes that are in use now.
    """

    def __init__(self, used: Callable[[], int]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._used, self.first, self._inner = used, used(), 0

    def of[T](self, name: str, call: Callable[[], T]) -> T:
        """What the call returns; its bytes, without those of steps within it, are noted, if there are any."""
        before, outer, self._inner = self._used(), self._inner, 0
        result = call()
        taken = self._used() - before
        own, self._inner = taken - self._inner, outer + taken
        if own:
            self.steps.append({"step": name, "bytes": own})
        return result

    def taken(self) -> int:
        """Bytes in all, since its beginning."""
        return self._used() - self.first


@contextmanager
def watched(meter: Meter, modules: list[bytes]) -> Iterator[None]:
    """Notes what each of our loads and launches takes; the machine code of what is loaded goes into the list."""
    from torch_bridge.direct import driver, launch
    call, launched = driver.call, launch.Loaded.launch

    def noted(name: str, *arguments: Any) -> None:
        if name == "cuModuleLoadData":
            modules.append(arguments[1])
        if name in LOADS:
            number = f" of module {len(modules)}, {len(modules[-1]):,} bytes" if modules else ""
            meter.of(f"{name}{number}", lambda: call(name, *arguments))
        else:
            call(name, *arguments)

    def noted_launch(self: Any, *arguments: Any) -> None:
        meter.of("launches of a pass", lambda: launched(self, *arguments))
    with mock.patch.object(driver, "call", noted), mock.patch.object(launch.Loaded, "launch", noted_launch):
        yield


def _again(modules: list[bytes], meter: Meter) -> dict[str, int] | None:
    """Loads modules more times, into the thread's context, and what that took."""
    from torch_bridge.direct import driver
    if not modules:
        return None
    before = meter.taken()
    for code in modules * _AGAIN:
        driver.call("cuModuleLoadData", ctypes.byref(driver.Pointer()), code)
    return {"loads": len(modules) * _AGAIN, "code_bytes": sum(map(len, modules)) * _AGAIN,
            "bytes": meter.taken() - before}


def _load_nothing() -> None:
    from torch_bridge.direct import driver
    module, function = driver.Pointer(), driver.Pointer()
    driver.call("cuModuleLoadData", ctypes.byref(module), _EMPTY)
    driver.call("cuModuleGetFunction", ctypes.byref(function), module, b"nothing")


def measure(shape: tuple[int, ...], way: str, device: str, used: Callable[[], int],
            wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Bytes in all and of each step that took any."""
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, device=device, dtype=torch.bfloat16)
    wanted = first_call.truth(tensors, dout)
    first_call.largest_error([torch.zeros_like(x) for x in wanted], wanted)  # torch loads kernels of its own
    wait()
    meter, modules = Meter(used), list[bytes]()

    def imported() -> Callable[..., torch.Tensor]:
        import torch_bridge
        from torch_bridge.direct import driver, launch  # noqa: F401  (what is watched)
        return torch_bridge.scaled_dot_product_attention
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        attend = meter.of("import", imported)
        if way == "after an empty module":
            meter.of("an empty module", _load_nothing)
        with watched(meter, modules):
            out = attend(*tensors, is_causal=True)
            grads = torch.autograd.grad(out, tensors, dout)
        taken = meter.taken()
    if between := taken - sum(step["bytes"] for step in meter.steps):
        meter.steps.append({"step": "between them", "bytes": between})
    return {"way": way, "bytes": taken, "steps": meter.steps, "modules": [len(code) for code in modules],
            "again": _again(modules, meter), "imports_jax": "jax" in sys.modules,
            "error": first_call.largest_error([out, *grads], wanted),
            "warnings": [str(x.message) for x in warned if x.category.__name__ == "FallbackWarning"]}


def main() -> None:
    """Prints the object."""
    *shape, way, device = sys.argv[1:]
    used = first_call._beside_torch if device == "cuda" else lambda: 0
    found = measure(tuple(map(int, shape)), way, device, used, waiting.wait_for_word)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
