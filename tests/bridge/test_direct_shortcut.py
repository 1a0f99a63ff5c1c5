"""Calls that the direct path has seen before, from torch's function to the addresses: what they skip changes nothing.

On the stand-ins of test_direct.py.
"""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import torch_bridge
from bridge.problems import OURS, check, heads_inside, qkv
from bridge.test_direct import BF16, BOTH, launched, moved
from pallas_flash import FallbackWarning
from torch_bridge import sdpa
from torch_bridge.direct import attention, cache, shared, shortcut
from torch_bridge.direct import lengths as lengths_
from torch_bridge.direct.parent import NoPlanError

__all__ = ["launched"]  # a fixture


@pytest.fixture
def short(launched, monkeypatch):
    """The passes that took a shortcut."""
    seen = []

    def noted(name, original):
        def run(self, *args):
            result = original(self, *args)
            seen.extend([name] * (result is not None))
            return result
        return run
    for name in BOTH:
        monkeypatch.setattr(shortcut.Shortcut, name, noted(name, getattr(shortcut.Shortcut, name)))
    return seen


@pytest.mark.parametrize("change", [lambda x: x, heads_inside], ids=["dense", "heads inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_seen_before_takes_a_shortcut(short, launched, change, dtype):
    shapes = (2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 8)
    new = lambda change=change: [change(x) for x in qkv(*shapes, dtype=dtype)]
    options = dict(is_causal=True, enable_gqa=True, scale=0.4)
    check(new(), **options)
    assert short == []
    for again in range(1, 3):
        check(new(), **options)
        assert short == BOTH * again and launched == BOTH * (again + 1)
    tensors = new()
    out = OURS(*tensors, **options)
    with torch.no_grad():
        assert torch.equal(OURS(*tensors, **options), out)
    for x in tensors[:2]:
        x.requires_grad_(False)
    out = OURS(*tensors, **options)
    (dv,) = torch.autograd.grad(out, tensors[2:], torch.ones_like(out))
    assert dv.shape == shapes[2] and dv.stride() == torch.empty_like(tensors[2]).stride()
    del short[:]
    check(new(), **(options | dict(scale=0.5)))
    check(new(moved), **options)
    check([x.transpose(2, 3).contiguous().transpose(2, 3).detach().requires_grad_() for x in new()], **options)
    assert short == []


def test_a_shortcut_is_taken_under_autocast_that_changes_no_tensor(short, launched, monkeypatch):
    """As training does it: query, key and value come from autocast's own products. Arguments are prepared once."""
    prepared = []
    prepare = sdpa.prepare
    monkeypatch.setattr(sdpa, "prepare", lambda *args: prepared.append(len(short)) or prepare(*args))
    new = lambda: qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16)
    for dtype in (BF16, torch.float16, BF16):
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                tensors = new()
                out = OURS(*tensors, is_causal=True)
                assert out.dtype == dtype
            out.sum().backward()  # outside, as PyTorch says
            assert all(x.grad.dtype == BF16 for x in tensors)
    assert len(prepared) == 1 + 3 and short == BOTH * 5 and launched == BOTH * 9
    check(new(), is_causal=True)
    assert len(prepared) == 4, "outside of autocast it is the same call"


@pytest.mark.parametrize("inside", [(False, False, True), (True, False, True), (True, True, False)])
def test_a_call_whose_key_or_value_is_copied_takes_the_shortcut_of_the_copies(short, launched, inside):
    """As after rotary embedding, which leaves query and key dense and value a view of a projection: they are of two
    layouts. Query is never copied: out is stored as it is.
    """
    shapes, options = ((2, 4, 9, 16), (2, 4, 12, 16), (2, 4, 12, 16)), dict(is_causal=True)
    new = lambda: [heads_inside(x) if is_inside else x
                   for x, is_inside in zip(qkv(*shapes, dtype=torch.bfloat16), inside, strict=True)]
    for _ in range(2):  # the first is copied by its launch, the second learned as the call of the copies
        check(new(), **options)
    assert short == []
    for again in range(1, 3):
        check(new(), **options)
        assert short == BOTH * again and launched == BOTH * (again + 2)
    tensors = new()
    out = OURS(*tensors, **options)
    assert out.stride() == torch.empty_like(tensors[0]).stride()
    with torch.no_grad():
        assert torch.equal(OURS(*tensors, **options), out)


def test_a_cotangent_that_is_copied_is_known_too(short, launched, monkeypatch):
    made = []
    guard = shortcut.guards.guard
    monkeypatch.setattr(shortcut.guards, "guard", lambda tensors: made.append(len(tensors)) or guard(tensors))
    for _ in range(4):
        tensors = qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16)
        out = OURS(*tensors)
        grads = torch.autograd.grad(out, tensors, heads_inside(torch.ones_like(out)), retain_graph=True)
        for found, wanted in zip(grads, torch.autograd.grad(out, tensors, torch.ones_like(out)), strict=True):
            assert torch.equal(found, wanted)
    assert made.count(6) == 1 and launched.count("backward") == 8


def test_the_training_example_prepares_a_call_in_its_first_step_alone(short, launched, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import train_gpt_torch as example

    prepared = []
    prepare = sdpa.prepare
    monkeypatch.setattr(sdpa, "prepare", lambda *args: prepared.append(1) or prepare(*args))
    monkeypatch.setattr(example, "DEVICE", "cpu")
    args = argparse.Namespace(seed=0, dim=128, heads=4, kv_heads=2, layers=3)
    model, tokens = example.make_model(args, "flash"), np.arange(2 * 33, dtype=np.uint8).reshape(2, 33)
    example.loss_of(model, tokens, "bfloat16").backward()
    assert prepared
    del prepared[:], short[:]
    for step in range(1, 4):
        example.loss_of(model, tokens, "bfloat16").backward()
        assert not prepared and sorted(short) == sorted(BOTH * args.layers * step)


def test_a_shortcut_is_not_taken_where_a_call_is_another(short, launched, monkeypatch):
    tensors = qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16)
    empty = torch._efficientzerotensor((2, 2, 6, 8), dtype=BF16)
    OURS(*tensors[:2], empty)
    assert not OURS(*tensors[:2], empty).any() and short == []
    out = OURS(*tensors)
    dout = torch.ones((), dtype=BF16).expand(out.shape)  # stored otherwise than out: copied
    wanted = torch.autograd.grad(out, tensors, dout)
    again = OURS(*tensors)
    for found in (torch.autograd.grad(again, tensors, dout, retain_graph=True),
                  torch.autograd.grad(again, tensors, moved(dout).detach(), retain_graph=True),
                  torch.autograd.grad(again, tensors, dout.contiguous(), create_graph=True)):
        assert all(map(torch.equal, found, wanted))
    zeros = torch.autograd.grad(again, tensors, torch._efficientzerotensor(out.shape, dtype=BF16))
    assert not any(x.any() for x in zeros)
    assert short == [*BOTH, *BOTH, "backward", "backward"]  # not with create_graph
    with torch.autocast("cpu", torch.float16):
        assert OURS(*tensors).dtype == torch.float16
    with pytest.raises(TypeError, match="is_causal"):
        OURS(*tensors, is_causal=0)
    negated = [torch._neg_view(x.detach()) for x in tensors]
    assert all(x.is_neg() for x in negated)
    OURS(*(x.resolve_neg() for x in negated))
    check([x.requires_grad_() for x in negated])
    torch.use_deterministic_algorithms(True)
    try:
        check(tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(attention.VARIABLE, "0")
    del launched[:]
    check(tensors)
    assert launched == []


def test_a_shortcut_keeps_what_autograd_knows(short):
    """A second backward is an error."""
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    OURS(*tensors)
    out = OURS(*(x * 1 for x in tensors))
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()
    assert short == BOTH


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
@pytest.mark.parametrize("is_known", [False, True], ids=["first", "shortcut"])
def test_autograd_sees_that_a_saved_tensor_was_overwritten(short, is_known, name):
    """A clone of any of the four, saved in its place, would hide it."""
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    if is_known:
        OURS(*tensors)
    given = [x * 1 for x in tensors]
    out = OURS(*given)
    with torch.no_grad():
        dict(zip(("query", "key", "value", "out"), (*given, out), strict=True))[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert short == ["forward"] * is_known


def test_a_hook_may_give_back_saved_tensors_stored_otherwise(short):
    """Read at their addresses as if they were stored as before, their numbers were in the wrong places."""
    tensors = [heads_inside(x) for x in qkv((2, 4, 6, 8), *[(2, 2, 6, 8)] * 2, dtype=BF16)]
    options = dict(enable_gqa=True)
    dout = torch.randn(tensors[0].shape).to(BF16)
    wanted = torch.autograd.grad(OURS(*tensors, **options), tensors, dout)
    for change in (torch.Tensor.contiguous, lambda x: moved(x).detach(), torch.Tensor.clone):
        with torch.autograd.graph.saved_tensors_hooks(lambda x, change=change: change(x), lambda x: x):
            out = OURS(*tensors, **options)
        assert all(map(torch.equal, torch.autograd.grad(out, tensors, dout), wanted))
    assert short == ["forward"] * 3 + ["backward"]  # a clone is stored as before


def test_batches_of_cotangents_have_no_address(short, launched):
    """Regression: a known backward asked for that of a batched tensor, which has none, and raised."""
    tensors = qkv(*[(2, 2, 5, 8)] * 3, dtype=BF16)
    OURS(*tensors)
    out = OURS(*tensors)
    douts = torch.randn(3, *out.shape).to(BF16)
    wanted = [torch.autograd.grad(out, tensors, dout, retain_graph=True) for dout in douts]
    found = torch.autograd.grad(out, tensors, douts, is_grads_batched=True)
    assert short == ["forward", *["backward"] * 3] and launched[-1] == "backward"
    assert all(torch.equal(x[i], y) for i, grads in enumerate(wanted) for x, y in zip(found, grads, strict=True))


def test_nothing_is_recorded_below_autograd(short):
    """Regression: in the kernel of an operator, of tensors that require a gradient, the second call was recorded."""
    tensors = qkv(*[(2, 2, 5, 8)] * 3, dtype=BF16)
    wanted = OURS(*tensors)
    for _ in range(3):
        with torch._C._AutoDispatchBelowAutograd():
            out = OURS(*tensors)
        assert not out.requires_grad and torch.equal(out, wanted)
    with torch.inference_mode():
        OURS(*tensors)
        OURS(*tensors)
    assert short == ["forward"] * 2 and OURS(*tensors).requires_grad


def test_the_zeros_of_a_problem_stay_where_they_are(launched, monkeypatch):
    """Regression: a pass that was loaded later took others, and left what shortcuts and graphs read to be freed."""
    monkeypatch.setattr(shared, "_zeros", {})
    tensors, bias = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16), torch.zeros(1, 2, 5, 5, dtype=BF16)
    OURS(*tensors, bias).sum().backward()
    (direct,) = attention._directs.values()
    before = direct.address_of_zeros()
    check(qkv(*[(4, 2, 40, 8)] * 3, dtype=BF16))  # for which there is too little
    OURS(*tensors, bias.requires_grad_()).sum().backward()
    assert launched == [*BOTH * 3, "dbias"] and direct.address_of_zeros() == before


def test_the_first_call_in_a_checkpoint_saves_what_its_repetition_saves(short):
    """The repetition takes a shortcut, and torch counts saved tensors: they were four and five."""
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)

    def layer(*tensors):
        return OURS(*(x * 1.5 for x in tensors)).exp().sin()
    out = torch.utils.checkpoint.checkpoint(layer, *tensors, use_reentrant=False)
    found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert short == ["forward"]
    assert all(map(torch.equal, found, torch.autograd.grad(layer(*tensors), tensors, torch.ones_like(out))))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_number_that_may_change_has_no_shortcut(short, kind):
    tensors, scale = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16), kind(0.25)
    OURS(*tensors, scale=scale)
    scale += 1
    assert torch.equal(OURS(*tensors, scale=scale), OURS(*tensors, scale=1.25)) and short == []
    with pytest.raises(TypeError, match="dropout_p"):
        OURS(*tensors, dropout_p=torch.zeros(2))
    OURS(*tensors, scale=np.float64(0.5))
    OURS(*tensors, scale=np.float64(0.5))
    assert short == ["forward"], "NumPy's scalars do not change"


@pytest.mark.filterwarnings("ignore:.*(prototype|beta):UserWarning")
def test_tensors_without_strides_are_refused_as_ever(short):
    dense = torch.randn(2, 2, 5, 8, dtype=BF16)
    for x in (torch.nested.nested_tensor([dense[0], dense[1]]), dense[0, 0].to_sparse_csr()):
        with pytest.raises(RuntimeError, match="needs strided tensors"):
            OURS(dense, x, dense)


def test_problems_share_the_zeros_that_are_nobodys_cotangents(launched, monkeypatch):
    """Each length kept 8 bytes a row of its own for as long as the process lives."""
    monkeypatch.setattr(shared, "_zeros", {})
    monkeypatch.setattr(lengths_, "OWN", 99)
    lengths = range(5, 40)
    for _ in range(2):
        for length in lengths:
            check(qkv(*[(2, 2, length, 8)] * 3, dtype=BF16), is_causal=True)
    kept = {x._zeros.data_ptr(): x._zeros.untyped_storage().nbytes() for x in attention._directs.values()}
    assert len(attention._directs) == len(lengths) and not any(x._zeros.any() for x in attention._directs.values())
    assert sum(kept.values()) <= 4 * (4 * 2 * 2 * 2 * max(lengths)), "of one problem 32 bytes a position"


def test_explain_tells_a_forward_that_goes_directly_from_its_backward(launched, monkeypatch, tmp_path):
    """Once a backward could not be compiled, the whole call was said to go through DLPack."""
    find = cache.find

    def fails(request, index):
        if request.pass_name == "backward":
            raise NoPlanError("the compiler broke")
        return find(request, index)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "find", fails)
    with pytest.warns(FallbackWarning, match="the backward of"):
        check(tensors := qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))
    assert launched == ["forward"]
    assert ("path: direct, launched on torch's stream; plans: forward to be compiled, backward none, through DLPack "
            "(the compiler broke)") in torch_bridge.explain(*tensors).splitlines()
    OURS(*tensors)
    assert launched == ["forward"] * 2
