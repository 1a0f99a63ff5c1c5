"""Derivatives beyond one backward: forward mode and second ones in float64; elsewhere a sentence, and never silence."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge.problems import OURS, TORCH, operator_call, qkv

SHAPES = ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3))
BIAS = (1, 3, 5)


def problem(dtype=torch.float64, requires_grad=False):
    return [*qkv(*SHAPES, dtype=dtype, requires_grad=requires_grad),
            torch.randn(BIAS, dtype=dtype, requires_grad=requires_grad)]


def ours(q, k, v, bias):
    return OURS(q, k, v, bias, enable_gqa=True)


def theirs(q, k, v, bias):
    with sdpa_kernel(SDPBackend.MATH):
        return TORCH(q, k, v, bias, enable_gqa=True)


def loss(function):
    return lambda *tensors: function(*tensors).pow(3).sum()


def tangent_of_dual(call, tensors, which, tangent):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) if i == which else x for i, x in enumerate(tensors)]
        return forward_ad.unpack_dual(call(*duals)).tangent


def without_grad(*tensors):
    with torch.no_grad():
        return ours(*tensors)


def operator(q, k, v, bias):
    operands, numbers = operator_call(q, k, v, bias=bias[None])
    return torch.ops.pallas_flash.attention(*operands, *numbers, True)[0]


def through_torch_func(call, tensors, which, tangent):
    function = lambda x: call(*(x if i == which else y for i, y in enumerate(tensors)))
    return jvp(function, (tensors[which],), (tangent,))[1]


def through_a_compiled_jvp(call, tensors, which, tangent):
    compiled = torch.compile(lambda x, t: through_torch_func(
        call, [x if i == which else y for i, y in enumerate(tensors)], which, t), backend="aot_eager", fullgraph=True)
    with torch.no_grad():  # the compiler would trace a backward of the jvp, which has none
        return compiled(tensors[which], tangent)


WAYS = [tangent_of_dual, through_torch_func, through_a_compiled_jvp]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", [ours, without_grad, operator])
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_in_float64(way, call, requires_grad, which, quiet):
    """The tangent was lost without a word where nothing required grad, under no_grad, and in a compiled jvp."""
    tensors = problem(requires_grad=requires_grad)
    tangent = torch.randn_like(tensors[which]).detach()
    if call is operator:
        tensors[1:3] = [x.detach().expand(-1, 2, -1, -1) if x is not tensors[which] else x for x in tensors[1:3]]
        call = lambda q, k, v, bias: operator(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1), bias)
    expected = through_torch_func(theirs, tensors, which, tangent)
    assert expected.norm() > 0.1
    torch.testing.assert_close(way(call, tensors, which, tangent), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", [ours, without_grad])
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_elsewhere_raises_a_sentence(way, call, dtype, quiet):
    tensors = problem(dtype)
    error = Exception if way is through_a_compiled_jvp else NotImplementedError  # the compiler wraps it in its own
    with pytest.raises(error, match=r"scaled_dot_product_attention has no forward-mode .*jacrev.*float64"):
        way(call, tensors, 0, torch.randn_like(tensors[0]))


def test_a_dual_level_without_tangents_changes_nothing():
    tensors = problem(torch.bfloat16, requires_grad=True)
    with forward_ad.dual_level():
        out = ours(*tensors)
        out.sum().backward()
    assert torch.equal(out, ours(*tensors)) and all(x.grad is not None for x in tensors)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_gradcheck_of_every_mode(kwargs):
    tensors = qkv(*SHAPES, dtype=torch.float64)
    function = lambda *x: OURS(*x, enable_gqa=True, **kwargs)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True,
                                    check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, check_undefined_grad=False,
                                        fast_mode=True)


def test_forward_mode_drops_the_weights_that_the_output_dropped():
    tensors = qkv(*SHAPES, dtype=torch.float64, requires_grad=False)
    function = lambda *x: OURS(*x, dropout_p=0.5, enable_gqa=True)
    torch.manual_seed(3)
    _, tangent = jvp(lambda v: function(*tensors[:2], v), (tensors[2],), (tensors[2],))
    torch.manual_seed(3)
    torch.testing.assert_close(tangent, function(*tensors))  # linear in value


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_hessians(compiles, quiet):
    tensors = problem()
    every = (0, 1, 2, 3)
    second = {
        "hessian": lambda f: hessian(loss(f), argnums=every),
        "reverse": lambda f: jacrev(jacrev(loss(f), every), every),
        "jvp of grad": lambda f: lambda *x: jvp(lambda q: grad(loss(f), every)(q, *x[1:]), x[:1], x[:1])[1]}
    compiled = lambda call: torch.compile(call, backend="aot_eager", fullgraph=True) if compiles else call
    for name, transform in second.items():
        try:
            compiled(transform(theirs))(*tensors)
        except torch._dynamo.exc.Unsupported:
            continue  # torch 2.11 compiles no hessian, of no function
        found = compiled(transform(ours))(*tensors)
        for a, b in zip(torch.utils._pytree.tree_leaves(found),
                        torch.utils._pytree.tree_leaves(transform(theirs)(*tensors)), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_columns_of_a_jacobian_in_forward_mode():
    tensors = problem()
    for a, b in zip(*(jacfwd(f, argnums=(0, 1, 2, 3))(*tensors) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_dual_cotangent_of_a_plain_call():
    tensors = problem(requires_grad=True)
    out, dout, tangent = ours(*tensors), *torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, tensors, forward_ad.make_dual(dout, tangent))
        found = [forward_ad.unpack_dual(x).tangent for x in grads]
    for a, b in zip(found, torch.autograd.grad(ours(*tensors), tensors, tangent), strict=True):
        torch.testing.assert_close(a, b)


THIRD = {
    "three backwards": lambda f, q: grad(lambda z: grad(lambda y: grad(f)(y).sum())(z).sum())(q),
    "jvp of a jvp": lambda f, q: jvp(lambda y: jvp(f, (y,), (q,))[1], (q,), (q,)),
    "jacrev of a jacfwd": lambda f, q: jacrev(jacfwd(f))(q),
    "jacfwd of a hessian": lambda f, q: jacfwd(hessian(f))(q),
}


@pytest.mark.parametrize("name", THIRD)
def test_what_has_no_derivative_says_so(name, quiet):
    """Third derivatives left out what goes through the second ones, without a word."""
    q, *rest = problem()
    with pytest.raises(NotImplementedError, match=r"scaled_dot_product_attention has no derivative of .*hessian"):
        THIRD[name](loss(lambda q: ours(q, *rest)), q)


def test_three_backwards_of_eager_calls_say_so():
    tensors = problem(requires_grad=True)
    total = loss(ours)(*tensors)
    for _ in range(2):
        total = torch.autograd.grad(total, tensors[0], create_graph=True)[0].sum()
    with pytest.raises(NotImplementedError, match="no derivative of its second derivatives"):
        total.backward()
