"""Lengths, offsets, segment ids, packed sequences, dropout and sinks on the direct path: from torch's functions to the
arrays that kernels would be given, which the stand-in of test_direct.py reads, against float64 through DLPack.
"""

import pytest
import torch

import torch_bridge
from bridge.problems import qkv
from bridge.test_direct import BF16, BOTH, launched  # noqa: F401
from torch_bridge import flash_attn, ops
from torch_bridge.arguments import Attention, Numbers, Operands
from torch_bridge.direct import cache

B, HQ, HKV, L, S, D = 3, 4, 2, 70, 90, 16
integers = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
IDS = torch.arange(S).expand(B, S) // 23 - 1  # padding first
CASES = {
    "both, causal": dict(q_lengths=integers(70, 50, 1), kv_lengths=integers(80, 2, 90), is_causal=True),
    "an offset each": dict(is_causal=True, causal_offset=integers(20, -3, 0)),
    "ids in any order": dict(segment_ids=tuple((torch.arange(n) * 7 % 5).expand(B, n) for n in (L, S))),
    "ids, causal and a cap": dict(segment_ids=(IDS[:, :L], IDS), is_causal=True, softcap=1.5),
    "all": dict(segment_ids=(IDS[:, :L], IDS), window=(30, 4), causal_offset=integers(1, 2, 3), softcap=2.0,
                q_lengths=integers(70, 50, 40), kv_lengths=integers(80, 60, 90), scale=0.3),
}


def both(function, tensors, argument=None):
    """Results and gradients of a call in bfloat16, and of the same numbers in float64."""
    found = []
    for x in (tensors, [x.detach().double().requires_grad_() for x in tensors]):
        results = function(*x)
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(7)
        cotangents = [torch.randn(y.shape).to(y.dtype) for y in results]
        found.append((*results, *torch.autograd.grad(results, x, [c.where(y.isfinite(), 0) for c, y in zip(
            cotangents, results)])))
    return zip(*found, strict=True)


def compare(function, tensors):
    for x, exact in both(function, tensors):
        torch.testing.assert_close(x.double(), exact, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("name", CASES)
def test_places(launched, name):  # noqa: F811
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)
    compare(lambda *x: torch_bridge.flash_attention(*x, **CASES[name], return_lse=name == "all"), tensors)
    assert launched == BOTH, "the one in bfloat16, both ways"


@pytest.mark.parametrize("arguments", [dict(causal=True), dict(window_size=(9, 4), softcap=2.0)], ids=str)
def test_packed_sequences(launched, arguments):  # noqa: F811
    """One of no tokens, one of fewer queries than keys, and padding after the last."""
    tensors = [x[0].detach().transpose(0, 1).contiguous().requires_grad_()
               for x in qkv((1, HQ, L, D), (1, HKV, S, D), (1, HKV, S, D), dtype=BF16)]
    starts = integers(0, 20, 20, 31, 64), integers(0, 22, 22, 51, 84)
    compare(lambda *x: flash_attn.flash_attn_varlen_func(*x, *starts, 33, 33, **arguments), tensors)
    assert launched == BOTH


def test_dropout(launched):  # noqa: F811
    """The same seed drops the same on both paths; lengths beside it, too."""
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)

    def dropped(*x, **arguments):
        torch.manual_seed(3)
        return torch_bridge.flash_attention(*x, dropout_p=0.4, **arguments)
    compare(lambda *x: dropped(*x, kv_lengths=integers(90, 1, 41)), tensors)
    compare(lambda *x: dropped(*x, is_causal=True, return_lse=True), tensors)
    assert launched == BOTH * 2
    with torch.no_grad():
        assert torch.equal(dropped(*tensors), dropped(*tensors))
        torch.manual_seed(4)
        assert not torch.equal(torch_bridge.flash_attention(*tensors, dropout_p=0.4), dropped(*tensors))


def test_sinks(launched):  # noqa: F811
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    tensors = (*qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16), sinks.requires_grad_())
    compare(lambda q, k, v, sinks: torch_bridge.flash_attention(
        q, k, v, sinks=sinks, window=(20, 0), kv_lengths=integers(90, 0, 41), return_lse=True), tensors)
    assert launched == BOTH


def test_other_numbers_take_the_same_plan(launched, monkeypatch):  # noqa: F811
    asked, find = [], cache.find
    monkeypatch.setattr(cache, "find", lambda request, index: (asked.append(request), find(request, index))[1])
    q, k, v = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16, requires_grad=False)
    for lengths in (integers(1, 2, 3), integers(90, 80, 70), integers(-4, 1000, 5)):
        found = torch_bridge.flash_attention(q, k, v, kv_lengths=lengths)
        keep = torch.arange(S) < lengths[:, None, None, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v)), attn_mask=keep).nan_to_num()
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    assert len(asked) == 1 and launched == ["forward"] * 3
    torch_bridge.flash_attention(q, k, v, q_lengths=integers(1, 2, 3))
    torch_bridge.flash_attention(q, k, v)
    assert len({request.key for request in asked}) == len(asked) == 3


def test_what_is_given_must_fit(launched):  # noqa: F811
    """The operators may be called with anything."""
    q, k, v = qkv(*[(2, 2, 8, 16)] * 3, dtype=BF16, requires_grad=False)
    operands = Operands.of(q, k, v, mask=None, bias=None, seed=None)._replace(kv_lengths=integers(3, 4))
    numbers = Numbers.of(causal_offset=None, scale=None, dropout_p=0.0)
    ops.attention(*Attention(operands, numbers, False).flat())
    wrong = operands._replace(kv_lengths=integers(3, 4).long())
    with pytest.raises(ValueError, match=r"given kv_lengths must be Buffer\(shape=\(2,\), dtype='int32'"):
        ops.attention(*Attention(wrong, numbers, False).flat())
    assert launched == ["forward"]
