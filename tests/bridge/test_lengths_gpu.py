"""Lengths that share plans, on a GPU: two plans for all of them, eager and compiled, and the right results."""

import pytest
import torch
import torch.nn.functional as F

from bridge.problems import OURS
from torch_bridge.direct import attention, cache, lengths, shortcut

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture
def plans(monkeypatch, tmp_path):
    """The plans that are made, in a process that seems to begin."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    for module, names in ((attention, ("_choices", "_directs", "_reasons")), (lengths, ("_ways", "_own")),
                          (shortcut, ("_shortcuts", "_copied"))):
        for name in names:
            monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(shortcut, "_recent", [])
    monkeypatch.setattr(lengths, "OWN", 0)
    return lambda: len([*tmp_path.glob("*.plan")])


def right(function, length, inside):
    torch.manual_seed(length)
    shape = (2, length, 4, 64) if inside else (2, 4, length, 64)
    tensors = [torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3)]
    tensors = [(x.transpose(1, 2) if inside else x).requires_grad_() for x in tensors]
    out = function(*tensors)
    dout = torch.randn_like(out)
    found = out, *torch.autograd.grad(out, tensors, dout)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    for a, b in zip(found, (exact, *torch.autograd.grad(exact, wide, dout.double())), strict=True):
        assert a.shape == b.shape and ((a.double() - b).norm() / b.norm()).item() < 6e-3


def causal(q, k, v):
    return OURS(q, k, v, is_causal=True)


@pytest.mark.parametrize("inside", [False, True])
def test_lengths_share_two_plans(plans, inside, quiet):
    for length in (257, 300, 383, 384, 300):
        right(causal, length, inside)
    assert plans() == 2
    torch._dynamo.reset()
    compiled = torch.compile(causal, fullgraph=True, dynamic=True)
    for length in (290, 310, 350):
        right(compiled, length, inside)
    assert plans() == 2


def test_a_shared_length_in_a_cuda_graph(plans):
    x = torch.randn(2, 4, 300, 64, device="cuda", dtype=BF16)
    wanted = causal(x, x, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal(x, x, x)
    for _ in range(5):
        x.normal_()
        graph.replay()
        wanted = causal(x, x, x)
        assert torch.equal(out, wanted)
