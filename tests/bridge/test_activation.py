"""What `activate` puts behind PyTorch's own functions, on CPU tensors: the order of the backends, and the operators of
flash attention, which varlen_attn calls.
"""

import contextlib
import inspect
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_bridge import activation, varlen
from torch_bridge.flash_attn import flash_attn_func, flash_attn_varlen_func

CUDNN, FLASH, MATH = map(int, (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
BOUNDS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
KEYS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)


def order():
    return torch._C._get_sdp_priority_order()


def uses_priority():
    return getattr(torch.nn.attention, "_is_sdp_priority_order_active", lambda: False)()


def test_the_flash_backend_comes_first_until_it_is_undone():
    """Regression: on Hopper GPUs PyTorch chose cuDNN before it, and an unchanged model ran none of ours."""
    before = order()
    cudnn = [CUDNN, *(backend for backend in before if backend != CUDNN)]
    torch._C._set_sdp_priority_order(cudnn)
    try:
        handle = activation._register("cpu")
        try:
            assert order() == [FLASH, *(backend for backend in cudnn if backend != FLASH)]
            assert uses_priority() or not hasattr(torch.nn.attention, "_sdpa_kernel_uses_priority")
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
                assert order()[:2] == [CUDNN, MATH]
            assert order()[0] == FLASH
        finally:
            handle.remove()
        assert order() == cudnn and not uses_priority() and handle.library is None
    finally:
        torch._C._set_sdp_priority_order(before)


@contextlib.contextmanager
def on_cpu():
    """The operators as `activate` registers them for CUDA."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in varlen.KERNELS.items():
            if hasattr(torch.ops.aten, name):
                library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def tokens(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(n, heads, 16, dtype=dtype).requires_grad_() for n, heads in ((8, 4), (12, 2), (12, 2))]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_an_unchanged_varlen_attn_runs_ours(window):
    """Forward, lse and backward, grouped heads, an empty sequence, aligned at the ends."""
    attention = pytest.importorskip("torch.nn.attention.varlen")
    tensors, dout, grouped = tokens(), torch.randn(8, 4, 16), dict(enable_gqa=True)
    if "enable_gqa" not in inspect.signature(attention.varlen_attn).parameters:  # PyTorch 2.11 infers it
        grouped = {}
    with on_cpu():
        out, lse = attention.varlen_attn(*tensors, BOUNDS, KEYS, 5, 6, window_size=window,
                                         return_aux=attention.AuxRequest(lse=True), **grouped)
        found = torch.autograd.grad(out, tensors, dout)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact, exact_lse, _ = flash_attn_varlen_func(*wide, BOUNDS, KEYS, 5, 6, window_size=window, return_attn_probs=True)
    expected = exact, exact_lse, *torch.autograd.grad(exact, wide, dout.double())
    for a, b in zip((out, lse, *found), expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_operators_of_dense_tensors_and_dropout(dropout_p):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 16) for n in (3, 5, 5))
    dout, options = torch.randn(2, 3, 4, 16), dict(scale=0.3, window_size_left=3)
    torch.manual_seed(7)
    out, lse, state, unused, _ = varlen._forward(q, k, v, None, None, 3, 5, dropout_p, True, False, **options)
    grads = varlen._backward(dout, q, k, v, out, lse, None, None, 3, 5, dropout_p, True, state, unused, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(7)
    expected = flash_attn_func(*leaves, dropout_p, 0.3, True, (3, -1))
    for a, b in zip((out, *grads), (expected, *torch.autograd.grad(expected, leaves, dout)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    place = torch.empty_like(out)
    assert torch.equal(varlen._forward_into(place, q, k, v, None, None, 3, 5, 0.0, True, False, **options), lse)
    assert dropout_p or torch.equal(place, out)


@pytest.mark.parametrize("starts", [None, BOUNDS])
def test_results_are_those_that_a_compiler_expects(starts):
    q = torch.randn(8, 4, 16) if starts is not None else torch.randn(2, 8, 4, 16)
    args = starts, starts, 5, 5, 0.0, True, False
    moved = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    expected = torch.ops.aten._flash_attention_forward(*[q.to("meta")] * 3, *moved)
    for i, (found, meta) in enumerate(zip(varlen._forward(q, q, q, *args), expected, strict=True)):
        assert found.dtype == meta.dtype and (i > 1 or (found.shape, found.stride()) == (meta.shape, meta.stride())), i


@pytest.mark.parametrize("given", ["seqused_k", "alibi_slopes", "block_table"])
def test_what_it_does_not_take_is_named(given):
    with pytest.raises(NotImplementedError, match=f"do not take {given}: call torch.nn.attention.restore_flash"):
        varlen._forward(*tokens(), BOUNDS, KEYS, 5, 6, 0.0, False, False, **{given: torch.ones(3)})
    with pytest.raises(NotImplementedError, match="need cum_seq_q and cum_seq_k, or neither"):
        varlen._forward(*tokens(), BOUNDS, None, 5, 6, 0.0, False, False)
