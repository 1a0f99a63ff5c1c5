"""What the torch tests compare: our function against torch's, forward and gradients, with random cotangents."""

import torch
import torch.nn.functional as F

import torch_bridge
from torch_bridge.arguments import Numbers, Operands

TORCH, OURS = F.scaled_dot_product_attention, torch_bridge.scaled_dot_product_attention
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def qkv(*shapes, dtype=torch.float32, requires_grad=True):
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def heads_inside(x):
    """The same values as a (batch, heads, length, dim) view of (batch, length, heads, dim) storage."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def operator_call(q, k, v, *, mask=None, bias=None, seed=None, causal_offset=None, scale=None, dropout_p=0.0):
    """Operands and numbers of a call of SDPA, as the operators take them: flat when added."""
    operands = Operands.of(q, k, v, mask=mask, bias=bias, seed=seed)
    return operands, Numbers.of(causal_offset=causal_offset, scale=scale, dropout_p=dropout_p)


def results(function, tensors, dout, *args, **kwargs):
    """The output of function(*tensors[:3], ...) and its gradients for all tensors that require one."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    for leaf, x in zip(leaves, tensors, strict=True):
        assert leaf.stride() == x.stride()
    out = function(*leaves[:3], *leaves[3:], *args, **kwargs)
    differentiable = [x for x in leaves if x.requires_grad]
    if not differentiable:
        return [out]
    grads = torch.autograd.grad(out, differentiable, dout.to(out.dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(differentiable, grads, strict=True)]
    return [out.detach(), *grads]


def assert_within_budget(ours, theirs, truth, unit, size=1.0):
    """Results are as near to the truth in float64 as torch's in the same precision: twice its error, plus a band.

    The band is a few units in the last place (`unit`) of the largest result or of `size`, what is summed on the way.
    """
    for name, t, a, b in zip(("out", "dq", "dk", "dv", "dmask"), truth, theirs, ours, strict=False):
        assert b.dtype == a.dtype and b.shape == a.shape, name
        if b.numel():
            error, baseline = ((x.double() - t).abs().max().item() for x in (b, a))
            band = 16 * unit * max(t.abs().max().item(), size)
            assert error <= 2 * baseline + band, f"{name}: error {error:.2e}, torch's {baseline:.2e}, band {band:.2e}"


def check(tensors, *args, **kwargs):
    """Ours against torch: the output and every gradient, within the budget of `assert_within_budget`; returns ours.

    tensors: query, key, value and, if there is one, attn_mask; args and kwargs are the other arguments of SDPA.
    """
    shape = TORCH(*(x.detach() for x in tensors[:3]), *tensors[3:], *args, **kwargs).shape
    dout = torch.randn(shape, dtype=torch.float64).to(tensors[0].dtype)
    doubled = [x if x.dtype == torch.bool else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    truth = results(TORCH, doubled, dout, *args, **kwargs)
    ours = results(OURS, tensors, dout, *args, **kwargs)
    assert_within_budget(ours, results(TORCH, tensors, dout, *args, **kwargs), truth, UNIT[tensors[0].dtype])
    return ours
