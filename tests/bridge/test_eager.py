"""Calls that nothing intercepts go around the dispatcher; all others go through the operators, backward included."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bridge.problems import OURS, TORCH, heads_inside, qkv
from torch_bridge import eager, exchange, ops

SHAPE = (2, 4, 5, 8)


class Seen(TorchDispatchMode):
    """The names of the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


@pytest.fixture
def dispatched(monkeypatch):
    """The names of our operators that eager code called."""
    names = []

    def spy(operator):
        def call(*args):
            names.append(operator._schema.name.removeprefix("pallas_flash::"))
            return operator(*args)
        return call
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(ops, name, spy(getattr(ops, name)))
    return names


def test_plain_calls_are_not_dispatched(dispatched):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    OURS(q, k, v, is_causal=True).sum().backward()
    OURS(torch.nn.Parameter(q.detach()), k, v, torch.randn(5, 5, requires_grad=True)).sum().backward()
    with torch.no_grad():
        OURS(q, k, v, dropout_p=0.5)
    with torch.inference_mode():
        OURS(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        OURS(q, k, v).sum().backward()
    assert dispatched == [] and all(x.grad is not None for x in (k, v))


class Tagged(torch.Tensor):
    pass


class Unchanged(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def through_a_mode(*tensors):
    with Unchanged():
        return OURS(*tensors)


def through_forward_ad(*tensors):
    with torch.autograd.forward_ad.dual_level():
        return OURS(*tensors)


def beneath_autograd(*tensors):
    with torch._C._AutoDispatchBelowAutograd():
        out = OURS(*tensors)
    assert not out.requires_grad
    return out


@pytest.mark.parametrize("call", [
    lambda q, k, v: OURS(q.as_subclass(Tagged), k, v), through_a_mode, through_forward_ad, beneath_autograd,
    lambda q, k, v: OURS(*(x.to("meta") for x in (q, k, v))), lambda q, k, v: OURS(q[:, :, :0], k, v)])
def test_what_may_be_intercepted_is_dispatched(call, dispatched):
    call(*qkv(SHAPE, SHAPE, SHAPE))
    assert dispatched == ["attention"]


def test_modes_see_the_operators_also_in_a_backward_alone():
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    with Seen() as whole:
        OURS(q, k, v).sum().backward()
    assert {"pallas_flash::attention", "pallas_flash::attention_backward"} <= set(whole.names)
    out, expected = OURS(q, k, v), [x.grad.clone() for x in (q, k, v)]
    with Seen() as late:
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert "pallas_flash::attention_backward" in late.names
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_cotangents(dispatched):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    out, douts = OURS(q, k, v), torch.randn(3, *SHAPE)
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    assert "attention_backward" in dispatched
    for i, dout in enumerate(douts):
        for a, b in zip(batched, torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_needs_and_a_graph_used_twice(monkeypatch):
    asked, gradients = [], exchange.gradients
    monkeypatch.setattr(exchange, "gradients", lambda *args: (asked.append(args[-1]), gradients(*args))[1])
    q, k, v = (heads_inside(x.detach()) for x in qkv(SHAPE, SHAPE, SHAPE))
    bias = torch.randn(5, 5, requires_grad=True)
    k.requires_grad_()
    out = OURS(q, k, v, bias)
    first = torch.autograd.grad(out.sum(), (k, bias), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (k, bias))
    assert asked == [(False, True, False, True, False)] * 2 and first[0].stride() == k.stride()
    for a, b, c in zip(first, again, torch.autograd.grad(TORCH(q, k, v, bias).sum(), (k, bias)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), k)


def test_second_derivatives_start_from_a_plain_call(dispatched):
    q, k, v = qkv((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: OURS(*x), (q, k, v), fast_mode=True)
    assert "attention" not in dispatched and "attention_backward" in dispatched
    single = qkv(SHAPE, SHAPE, SHAPE)
    (grad,) = torch.autograd.grad(OURS(*single).sum(), single[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative for"):
        grad.sum().backward()


def test_a_checkpoint_recomputes(dispatched):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    expected = torch.autograd.grad(OURS(q, k, v).sum(), (q, k, v))
    ours = torch.autograd.grad(checkpoint(OURS, q, k, v, use_reentrant=False).sum(), (q, k, v))
    assert all(map(torch.equal, ours, expected)) and dispatched == []


def test_what_is_saved_goes_with_the_graph():
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    out = OURS(q, k, v)
    stats = weakref.ref(out.grad_fn.stats)
    assert isinstance(out.grad_fn, eager._Attention._backward_cls) and stats() is not None
    del out
    gc.collect()
    assert stats() is None


@pytest.mark.parametrize("is_dispatched", [False, True])
@pytest.mark.parametrize(("function", "changed"), [
    *((f, name) for f in (TORCH, OURS) for name in ("query", "key", "value", "out")),
    (OURS, "bias"), (OURS, "mask")])  # torch may save another form of these
def test_writing_to_what_the_backward_needs_is_seen(function, changed, is_dispatched):
    """Autograd knows by a tensor's version, which a copy in its place would not have. As with torch's function."""
    named = dict(zip(("query", "key", "value"), (x * 1 for x in qkv(SHAPE, SHAPE, SHAPE)), strict=True))
    bias = torch.randn(5, 5, requires_grad=changed == "bias") * 1
    named["attn_mask"] = torch.rand(5, 5) > 0.2 if changed == "mask" else bias
    with Unchanged() if is_dispatched else contextlib.nullcontext():
        out = function(**named)
    unchanged = torch.autograd.grad(out.sum(), named["query"], retain_graph=True)
    assert unchanged[0].isfinite().all()
    target = {"mask": named["attn_mask"], "bias": bias, "out": out, **named}[changed]
    with torch.no_grad():
        target.copy_(target.clone())  # the same values: only the version tells
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), named["query"])
