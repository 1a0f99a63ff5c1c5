"""PyTorch's backends of scaled_dot_product_attention, and our bridge, on (batch, heads, length, dim) views of the same
numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.contestants import PEERS, SHARED, Arrays, Contestant, Exclusive, Prepared, simple_mask
from bench.timing import Call
from pallas_flash.testing.problems import Problem

__all__ = ["TORCH", "graph"]


Begin = Callable[[], Callable[[], dict[str, Any]]]
"""Makes the function to time; the backward alone keeps to the stream that is current now, where its forward runs."""


class TorchContestant(Contestant):
    """A function with the signature of `torch.nn.functional.scaled_dot_product_attention`, under one backend."""

    packages = ("torch",)
    get = "pip install 'torch>=2.11'"

    def __init__(self, name: str, label: str, backend: str | None) -> None:
        self.name, self.label, self.backend = name, label, backend

    def why_not(self, problem: Problem) -> str:
        import torch
        if not torch.cuda.is_available():
            return "runs on gpu only"
        mask = simple_mask(problem)
        return f"has no mask like {problem.mask}" if mask is None or mask[1] is not None else ""

    def _function(self, problem: Problem) -> Callable[..., Any]:
        import torch
        is_causal, _ = simple_mask(problem) or (False, None)
        options = dict(is_causal=is_causal, scale=problem.scale, enable_gqa=problem.q_heads != problem.kv_heads)
        if self.backend is None:
            from torch_bridge import scaled_dot_product_attention
            return functools.partial(scaled_dot_product_attention, **options)
        backend = getattr(torch.nn.attention.SDPBackend, self.backend)

        def attend(q: Any, k: Any, v: Any) -> Any:
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return attend

    def prepare(self, problem: Problem, arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
        import torch

        def chain(count: int) -> Call:
            with exclusive:
                return graph(begin, count)
        with exclusive:
            begin = self._begin(problem, arrays, direction)
            call = Call(begin(), lambda _: torch.cuda.synchronize())
            return Prepared(call, lambda results: results, _peak_bytes(call), chain)

    def _begin(self, problem: Problem, arrays: Arrays, direction: str) -> Begin:
        import torch
        view = (lambda x: x) if problem.layout == "BHLD" else (lambda x: x.transpose(1, 2))
        q, k, v, dout = (view(torch.from_dlpack(x).clone()) for x in arrays)
        attend, inputs = self._function(problem), [x.detach().requires_grad_() for x in (q, k, v)]

        def forward() -> dict[str, Any]:
            with torch.no_grad():
                return {"out": attend(q, k, v)}

        def gradients(out: Any, **options: Any) -> dict[str, Any]:
            return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, dout, **options), strict=True))

        def both() -> dict[str, Any]:
            out = attend(*inputs)
            return {"out": out.detach()} | gradients(out)

        def begin() -> Callable[[], dict[str, Any]]:
            if direction != "backward":
                return {"forward": forward, "both": both}[direction]
            saved = attend(*inputs)
            return lambda: gradients(saved, retain_graph=True)
        return begin

    def row(self, problem: Problem, array: Any, batch: int, head: int) -> np.ndarray:
        return array[batch, head].float().cpu().numpy()

    def is_finite(self, array: Any) -> bool:
        return bool(array.isfinite().all())


def graph(begin: Begin, count: int) -> Call:
    """A CUDA graph of calls, which run in the order of the stream that they are captured from."""
    import torch
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start = begin()
        for _ in range(3):  # what a library sets up in its first calls may not be captured
            start()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            results = start()

    def replay() -> dict[str, Any]:
        graph.replay()
        return results
    return Call(replay, lambda _: torch.cuda.synchronize(), count)


def _peak_bytes(call: Call) -> int:
    """The most device memory that torch held during a call, less what it held before."""
    import torch
    call.finish()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.finish()
    return torch.cuda.max_memory_allocated() - before


TORCH = (
    TorchContestant("torch-cudnn", "PyTorch (cuDNN)", "CUDNN_ATTENTION"),
    TorchContestant("torch-flash", "PyTorch (FA2)", "FLASH_ATTENTION"),
    TorchContestant("torch-efficient", "PyTorch (efficient)", "EFFICIENT_ATTENTION"),
    TorchContestant("bridge", "torch_bridge", None),
)
PEERS.extend(TORCH)
