"""One look at the tensors of a call: what it tells apart, and that calls are right without it.

On the stand-ins of test_direct.py.
"""

import sys
import weakref

import pytest
import torch

from bridge.problems import OURS, check, heads_inside, qkv
from bridge.test_direct import BF16, BOTH, launched, moved
from bridge.test_direct_shortcut import short
from torch_bridge.direct import guards, lengths, shortcut

__all__ = ["launched", "short"]  # fixtures


class Subclass(torch.Tensor):
    pass


def tensors():
    return qkv(*[(2, 4, 6, 8)] * 3, dtype=BF16, requires_grad=False)


OTHERS = {
    "shape": lambda x: x[:, :3], "strides": heads_inside, "dtype": lambda x: x.half(), "needs": lambda x: x.clone()
    .requires_grad_(), "negated": torch._neg_view, "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=BF16),
    "class": lambda x: x.as_subclass(Subclass), "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "device": lambda x: x.to("meta"), "rank": lambda x: x[None], "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_guard_tells_apart(name):
    q, k, v = tensors()
    has = guards.guard((q, k, v))
    assert has(q, k, v) and has(*tensors())
    assert not has(q, k, OTHERS[name](v)) and not has(OTHERS[name](q), k, v)
    assert not has(q, q, v), "the same tensor twice: whoever asks looks for himself"


def test_a_guard_knows_the_state_of_the_thread():
    q, k, v = tensors()
    has = guards.guard((q, k, v))
    with torch.inference_mode():
        assert not has(q, k, v)
    with torch.autocast("cpu"):
        assert not has(q, k, v)
    seen = []
    torch.vmap(lambda x: (seen.append(has(x, k, v)), x)[1])(q)
    assert seen == [False]


def test_a_guard_keeps_no_tensor():
    made = tensors()
    has, refs = guards.guard(made), [weakref.ref(x) for x in made]
    del made
    assert has(*tensors()) and all(ref() is None for ref in refs)


@pytest.fixture(params=["missing", "otherwise"])
def no_guards(request, monkeypatch):
    """A torch without the function, or with one of another kind."""
    class Others:
        TensorGuards = staticmethod(lambda *tensors: None)
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None if request.param == "missing" else Others)


def test_calls_are_right_where_torch_has_no_such_function(no_guards, short, launched):
    inputs = qkv((2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 8), dtype=BF16)
    for again in range(3):
        check(inputs, is_causal=True, enable_gqa=True)
        assert short == BOTH * again
    assert shortcut._recent == []


def test_kinds_of_calls_in_turn(short, launched, monkeypatch):
    """More of them than are known at a glance, with and without gradients, and misaligned ones in between."""
    monkeypatch.setattr(lengths, "OWN", 3)
    kinds = [qkv(*[(1, 2, length, 8)] * 3, dtype=BF16) for length in (3, 4, 5)]
    for _ in range(3):
        for inputs in kinds:
            check(inputs, is_causal=True)
            check(inputs)
            with torch.no_grad():
                OURS(*inputs)
            check([moved(x) for x in inputs])
    assert len(shortcut._recent) == shortcut._MAX_RECENT
    assert short.count("backward") == 2 * 6 and launched.count("backward") == 3 * 9


def test_the_same_tensor_three_times(short, launched):
    x = tensors()[0].requires_grad_()
    results = [torch.autograd.grad(OURS(x, x, x), x, torch.ones_like(x))[0] for _ in range(3)]
    assert short == BOTH * 2 and all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("wrong", [None, 3, "q"])
def test_what_is_no_tensor_is_refused_as_ever(launched, wrong):
    inputs = tensors()
    for _ in range(3):
        OURS(*inputs)
    assert shortcut._recent
    for i in range(3):
        with pytest.raises(TypeError, match="must be Tensor"):
            OURS(*inputs[:i], wrong, *inputs[i + 1:])
