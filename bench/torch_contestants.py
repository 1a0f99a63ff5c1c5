"""PyTorch's backends of scaled_dot_product_attention, its flex_attention, and our bridge, on the same numbers viewed as
(batch, heads, length, dim).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import features
from bench.contestants import PEERS, SHARED, Arrays, Contestant, Exclusive, Prepared, refusal, simple_mask
from bench.timing import Call
from pallas_flash import masks
from pallas_flash.testing.problems import Problem

__all__ = ["TORCH", "graph"]


Begin = Callable[[], Callable[[], dict[str, Any]]]
"""Makes the function to time; the backward alone keeps to the stream that is current now, where its forward runs."""


class TorchContestant(Contestant):
    """A function with the signature of `torch.nn.functional.scaled_dot_product_attention`, under one backend."""

    packages = ("torch",)
    get = "pip install 'torch>=2.11'"
    has_own_bits = True

    def __init__(self, name: str, label: str, backend: str | None, takes: tuple[str, ...] = ()) -> None:
        self.name, self.label, self.backend, self.takes = name, label, backend, takes

    def computes(self, problem: Problem) -> Problem:
        return dataclasses.replace(problem, dropout_rate=0.0)

    def why_not(self, problem: Problem) -> str:
        import torch
        if not torch.cuda.is_available():
            return "runs on gpu only"
        if reason := refusal(problem, self.takes):
            return reason
        _, window = simple_mask(problem) or (False, None)
        return "" if window is None else f"has no mask like {problem.mask}"

    def _function(self, problem: Problem) -> Callable[..., Any]:
        import torch
        is_causal, _ = simple_mask(problem) or (False, None)
        options = dict(is_causal=is_causal and not _needs_array(problem), scale=problem.scale,
                       dropout_p=problem.dropout_rate, enable_gqa=problem.q_heads != problem.kv_heads)
        if self.backend is None:
            from torch_bridge import scaled_dot_product_attention
            return functools.partial(scaled_dot_product_attention, **options)
        backend = getattr(torch.nn.attention.SDPBackend, self.backend)

        def attend(*tensors: Any) -> Any:  # q, k, v, and a mask where there is one
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
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
        q, k, v, dout = (view(torch.from_dlpack(x).clone()) for x in arrays[:4])
        tensors = [q, k, v, *self._mask(problem, arrays)]
        names = ("dq", "dk", "dv", *(f"d{name}" for name in problem.learned))
        attend = self._function(problem)
        leaves = [x.detach() if isinstance(x, torch.Tensor) else x for x in tensors]
        inputs = [x.requires_grad_() for x in leaves[:len(names)]]

        def forward() -> dict[str, Any]:
            with torch.no_grad():
                return {"out": attend(*tensors)}

        def gradients(out: Any, **options: Any) -> dict[str, Any]:
            return dict(zip(names, torch.autograd.grad(out, inputs, dout, **options), strict=True))

        def both() -> dict[str, Any]:
            out = attend(*leaves)
            return {"out": out.detach()} | gradients(out)

        def begin() -> Callable[[], dict[str, Any]]:
            if direction != "backward":
                return {"forward": forward, "both": both}[direction]
            saved = attend(*leaves)
            return lambda: gradients(saved, retain_graph=True)
        return begin

    def _mask(self, problem: Problem, arrays: Arrays) -> list[Any]:
        """What the function takes behind q, k and v, made once and not timed."""
        return _mask(problem, arrays)

    def row(self, problem: Problem, array: Any, batch: int, head: int) -> np.ndarray:
        return self.numbers(array[batch, head])

    def numbers(self, array: Any) -> np.ndarray:
        return array.float().cpu().numpy()

    def is_finite(self, array: Any) -> bool:
        return bool(array.isfinite().all())


class FlexContestant(TorchContestant):
    """`flex_attention`, compiled for each problem's shapes; its block mask is made once and not timed, as a model makes
    one for all of its layers.
    """

    has_own_bits = False

    def __init__(self) -> None:
        super().__init__("torch-flex", "PyTorch (flex)", None,
                         ("documents", "packed sequences", "lengths", "a soft cap"))

    def why_not(self, problem: Problem) -> str:
        import torch
        return refusal(problem, self.takes) if torch.cuda.is_available() else "runs on gpu only"

    def _function(self, problem: Problem) -> Callable[..., Any]:
        import torch
        from torch.nn.attention.flex_attention import flex_attention
        cap = problem.softcap

        def capped(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return cap * torch.tanh(score / cap)
        attend = functools.partial(flex_attention, score_mod=None if cap is None else capped, scale=problem.scale,
                                   enable_gqa=problem.q_heads != problem.kv_heads)
        # All shapes are one function to the compiler, which by default leaves the ninth as it is: O(length²) memory.
        config = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = 4096
        compiled = torch.compile(attend, dynamic=False, fullgraph=True)
        return lambda q, k, v, *mask: compiled(q, k, v, block_mask=mask[0] if mask else None)

    def _mask(self, problem: Problem, arrays: Arrays) -> list[Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask
        rules = self._rules(problem, torch.from_dlpack(arrays.q).device)

        def kept(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return functools.reduce(torch.logical_and, [rule(b, h, q, kv) for rule in rules])
        batch = problem.batch if problem.mask.has_arrays else None
        device = torch.from_dlpack(arrays.q).device
        return [create_block_mask(kept, batch, None, problem.q_len, problem.kv_len, device=device)] if rules else []

    def _rules(self, problem: Problem, device: Any) -> list[Callable[..., Any]]:
        """The parts of a problem's mask as functions (batch, head, query, key) -> whether the pair attends."""
        import torch
        is_causal, window = simple_mask(problem) or (False, None)
        left, right = window or (masks.UNBOUNDED, 0 if is_causal else masks.UNBOUNDED)
        rules: list[Callable[..., Any]] = []
        if left != masks.UNBOUNDED:
            rules.append(lambda b, h, q, kv: kv >= q - left)
        if right != masks.UNBOUNDED:
            rules.append(lambda b, h, q, kv: kv <= q + right)
        if (starts := features.boundaries(problem)) is not None:
            token = np.arange(problem.batch * problem.q_len).reshape(problem.batch, -1)
            ids = torch.asarray(np.searchsorted(starts, token, side="right"), device=device)
            rules.append(lambda b, h, q, kv: ids[b, q] == ids[b, kv])
        if (lengths := features.part(problem.mask, masks.InBounds)) is not None:
            known = torch.asarray(np.broadcast_to(lengths.kv_len, (problem.batch,)).copy(), device=device)
            rules.append(lambda b, h, q, kv: kv < known[b])
        return rules


def _needs_array(problem: Problem) -> bool:
    """Whether a problem is one with `attn_mask`, beside which `is_causal` is an error."""
    return problem.mask.has_arrays or problem.bias is not None


def _mask(problem: Problem, arrays: Arrays) -> list[Any]:
    """What PyTorch calls attn_mask, made once and not timed: booleans (batch, 1, q_len, kv_len), or the bias, which is
    -inf where the rule of the mask hides a pair."""
    import jax.numpy as jnp
    import torch
    if not _needs_array(problem):
        return []
    q_pos, kv_pos = jnp.arange(problem.q_len)[:, None], jnp.arange(problem.kv_len)[None, :]
    keep = masks.over_batch(problem.mask.canonical(), lambda part: part.keep(q_pos, kv_pos))
    if problem.bias is None:
        return [torch.from_dlpack(keep).clone()]
    bias = (arrays.learned | arrays.given)["bias"]
    return [torch.from_dlpack(jnp.where(keep, bias, -jnp.inf)).clone()]


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


_ARRAYS = ("documents", "lengths", "a dense mask", "a bias")
TORCH = (
    TorchContestant("torch-cudnn", "PyTorch (cuDNN)", "CUDNN_ATTENTION", (*_ARRAYS, "dropout")),
    TorchContestant("torch-flash", "PyTorch (FA2)", "FLASH_ATTENTION", ("dropout",)),
    TorchContestant("torch-efficient", "PyTorch (efficient)", "EFFICIENT_ATTENTION",
                    (*_ARRAYS, "the gradient of a bias", "dropout")),
    FlexContestant(),
    TorchContestant("bridge", "torch_bridge", None),
)
PEERS.extend(TORCH)
