"""Score functions launched directly, on a GPU: against a textbook in float64, and in a CUDA graph."""

import dataclasses

import jax.numpy as jnp
import pytest
import torch

import pallas_flash as pf
import torch_bridge
from bridge import textbook
from bridge.test_scores import leaky
from torch_bridge.direct import attention

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
B, H, G, L, S, D = 2, 4, 2, 200, 300, 64


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.delenv("PALLAS_FLASH_DIRECT", raising=False)
    for name in ("_choices", "_reasons"):
        monkeypatch.setattr(attention, name, {})
    torch_bridge.report(reset=True)


@dataclasses.dataclass(frozen=True)
class Fading(pf.Score):
    """Arrays of floats, of integers and of booleans; it hides keys."""

    half_lives: torch.Tensor
    lines: torch.Tensor
    shown: torch.Tensor

    def __call__(self, score, batch, head, q_pos, kv_pos):
        faded = score * jnp.exp2(-abs(q_pos - kv_pos).astype(score.dtype) / self.half_lives[head])
        return jnp.where(self.shown[kv_pos], jnp.where(self.lines[batch, kv_pos] > 1, faded, score), -jnp.inf)


def fading(half_lives):
    places = torch.arange(S, device="cuda")
    return Fading(half_lives, (places % 4).int().repeat(B, 1), places % 7 != 3)


def fading_in_torch(s, b, h, q, k, half_lives):
    faded = s * torch.exp2(-(q - k).abs() / half_lives[h])
    return torch.where(k % 7 != 3, torch.where(k % 4 > 1, faded, s), -torch.inf)


CASES = {
    "plain": (lambda _: leaky, lambda s, b, h, q, k, _: torch.where(k < q, torch.maximum(s, 0.1 * s), s),
              dict(is_causal=True, causal_offset=S - L)),
    "alibi": (pf.ALiBi, lambda s, b, h, q, k, slopes: s - slopes[h] * (q - k).abs(), dict(window=(99, 50))),
    "own": (fading, fading_in_torch, dict()),
}


def rows():
    """How often what was launched directly."""
    return {(row.what, row.implementation): row.calls for row in torch_bridge.report()
            if "launched directly" in row.problem}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case):
    made, in_torch, keywords = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.randn(B, heads, n, D, device="cuda", dtype=BF16).requires_grad_()
               for heads, n in ((H, L), (G, S), (G, S))]
    array = torch.rand(H, device="cuda") + 0.5
    dout = torch.randn(B, H, L, D, device="cuda", dtype=BF16)
    out, lse = torch_bridge.flash_attention(*tensors, score=made(array), return_lse=True, **keywords)
    found = out, lse, *torch.autograd.grad(out, tensors, dout)
    assert rows() == {("forward", "hopper"): 1, ("backward", "hopper"): 1}, str(torch_bridge.report())
    wide, array = [x.detach().double().requires_grad_() for x in tensors], array.double()
    exact, exact_lse = textbook.attention(*wide, score=lambda s, *at: in_torch(s, *at, array), **keywords)
    wanted = exact, exact_lse, *torch.autograd.grad(exact, wide, dout.double())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        a, b = (x.detach().double().masked_fill(x == -torch.inf, 0) for x in (a, b))
        assert (a - b).norm() < 1e-2 * b.norm(), (name, ((a - b).norm() / b.norm()).item())


def test_a_graph_reads_the_arrays_that_are_there():
    """Also where they have a gradient, which JAX makes outside of one."""
    x = torch.randn(B, H, 256, D, device="cuda", dtype=BF16)
    slopes = torch.full((H,), 0.1, device="cuda")

    def attend():
        return torch_bridge.flash_attention(x, x, x, score=pf.ALiBi(slopes), is_causal=True)
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for slope in (0.1, 3.0):
        slopes.fill_(slope)
        graph.replay()
        assert torch.equal(out, attend())
    learned = slopes.clone().requires_grad_()
    torch_bridge.flash_attention(x, x, x, score=pf.ALiBi(learned), is_causal=True).float().square().sum().backward()
    assert learned.grad.isfinite().all() and learned.grad.abs().min() > 0
    assert rows()["forward", "hopper"] == 5 and ("backward", "hopper") not in rows(), str(torch_bridge.report())
