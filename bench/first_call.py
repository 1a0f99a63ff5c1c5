"""The first call of a process: `python -m bench.first_call PATH BATCH HEADS LENGTH DIM` prints one JSON object.

PATH is "torch" (PyTorch's own function) or "bridge", which goes the way that its environment says
(PALLAS_FLASH_DIRECT, PALLAS_FLASH_PLANS). Milliseconds are those until the result is there; of memory, what the device
has given away beside torch's allocator since before the bridge was imported. No other module of bench is imported,
since they import JAX.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["largest_error", "measure", "truth"]


def _beside_torch() -> int:
    """Bytes of the device that are in use, but not by torch's allocator."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _function(path: str) -> Callable[..., Any]:
    if path == "torch":
        return F.scaled_dot_product_attention
    import torch_bridge
    return torch_bridge.scaled_dot_product_attention


def truth(tensors: Sequence[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    """out and the gradients of query, key and value by PyTorch's formula, float32; causal."""
    leaves = [x.detach().float().requires_grad_() for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.float())]


def largest_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest |result - wanted| / |wanted|."""
    return max(float((a.detach().float() - b.float()).norm() / b.float().norm())
               for a, b in zip(found, wanted, strict=True))


def measure(path: str, shape: tuple[int, ...], device: str = "cuda") -> dict[str, Any]:
    """Milliseconds of the import and of the first two forwards and backwards, and what they left behind."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, device=device, dtype=torch.bfloat16)
    wanted = truth(tensors, dout)
    largest_error([torch.zeros_like(x) for x in wanted], wanted)  # torch loads kernels of its own
    before = _beside_torch() if device == "cuda" else 0
    milliseconds: dict[str, float] = {}

    def timed[T](name: str, call: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = call()
        wait()
        milliseconds[name] = (time.perf_counter() - begin) * 1e3
        return result
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        attend = timed("import", lambda: _function(path))
        for name in ("first", "second"):
            out = timed(f"{name} forward", lambda: attend(*tensors, is_causal=True))
            grads = timed(f"{name} backward", lambda out=out: torch.autograd.grad(out, tensors, dout))
    mib = (_beside_torch() - before) / 2**20 if device == "cuda" else None
    return {"milliseconds": milliseconds, "beside_torch_mib": mib, "imports_jax": "jax" in sys.modules,
            "error": largest_error([out, *grads], wanted),
            "warnings": [str(x.message) for x in warned if x.category.__name__ == "FallbackWarning"]}


def main() -> None:
    """Prints the object."""
    path, *shape = sys.argv[1:]
    print(json.dumps(measure(path, tuple(map(int, shape)))), flush=True)


if __name__ == "__main__":
    main()
