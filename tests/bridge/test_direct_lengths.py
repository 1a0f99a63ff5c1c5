"""Lengths on the direct path: how many plans they need, and that what is padded changes nothing.

On the stand-ins of test_direct.py.
"""

import pytest
import torch

import torch_bridge
from bridge.problems import OURS, check, heads_inside, operator_call, qkv
from bridge.test_direct import BF16, BOTH, launched
from torch_bridge import exchange, strides
from torch_bridge.arguments import Cotangents, PerArray, Results
from torch_bridge.direct import attention, cache, lengths

__all__ = ["launched"]  # a fixture


def lengths_of_plans(pass_name="forward"):
    return sorted(problem.q_len for (problem, _), x in attention._directs.items() if x.runner(pass_name) is not None)


def test_the_buckets():
    found = [lengths.bucket(n) for n in (1, 128, 129, 900, 1024, 1025, 1500, 5000, 2**17)]
    assert found == [128, 128, 256, 1024 - 128 + 128, 1024, 1280, 1536, 5120, 2**17]
    buckets = {lengths.bucket(n) for n in range(1, 2**17 + 1)}
    assert len(buckets) == 36 and all(lengths.bucket(n) == n for n in buckets)
    assert max((lengths.bucket(n) - n) / lengths.bucket(n) for n in range(513, 5000)) < 0.25


@pytest.mark.parametrize("change", [lambda x: x, heads_inside], ids=["dense", "heads inside"])
def test_many_lengths_need_few_plans(launched, change):
    ran = [9, 12, 13, 30, 31, 100, 128, 130, 131]
    for _ in range(2):
        for length in ran:
            tensors = [change(x) for x in qkv((2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 8), dtype=BF16)]
            results = check(tensors, is_causal=True, enable_gqa=True)
            assert results[0].stride() == strides.like_query(tensors[0], 8)
            for x, grad in zip(tensors, results[1:], strict=True):
                assert grad.stride() == torch.empty_like(x).stride()
    assert launched == BOTH * 2 * len(ran)
    assert lengths_of_plans("forward") == lengths_of_plans("backward") == [9, 12, 128, 256]


def test_a_packed_tensor_may_share_a_plan(launched):
    for length in (9, 12, 13, 30):
        x = torch.randn(2, length, 3, 4, 16).to(BF16)
        check([y.transpose(1, 2).detach().requires_grad_() for y in x.unbind(2)], is_causal=True)
    assert lengths_of_plans() == [9, 12, 128]


def test_a_compiled_program_of_any_length_needs_few_plans(launched, quiet):
    torch._dynamo.reset()
    function = lambda q, k, v: OURS(q, k, v, is_causal=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 12, 13, 30, 130):
        tensors = qkv(*[(2, 4, length, 16)] * 3, dtype=BF16)
        out = compiled(*tensors)
        found = out, *torch.autograd.grad(out, tensors, torch.ones_like(out))
        out = function(*tensors)
        for a, b in zip(found, (out, *torch.autograd.grad(out, tensors, torch.ones_like(out))), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    assert lengths_of_plans() == [9, 12, 128, 256]


def test_a_length_with_a_plan_on_disk_has_it(launched, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(lengths, "OWN", 0)
    for length, kept in ((30, []), (31, BOTH), (32, ["forward"])):
        tensors = qkv(*[(1, 2, length, 8)] * 3, dtype=BF16)
        operands, numbers = operator_call(*tensors, causal_offset=0)
        for name in kept:
            problem = attention.problem_of(operands, numbers)
            cache.path_of(attention.request(problem, name, tensors[0].device)).touch()
        check(tensors, is_causal=True)
    assert lengths_of_plans("forward") == lengths_of_plans("backward") == [31, 32, 128]
    assert launched == BOTH * 3


def test_a_length_that_comes_often_gets_a_plan_meanwhile(launched, monkeypatch):
    expected = []
    monkeypatch.setattr(lengths, "OWN", 0)
    monkeypatch.setattr(lengths, "OFTEN", 4)
    monkeypatch.setattr(attention.Direct, "expect", lambda self, name: expected.append((self.problem.q_len, name)))
    tensors = qkv(*[(1, 2, 30, 8)] * 3, dtype=BF16, requires_grad=False)
    for _ in range(7):
        OURS(*tensors, is_causal=True)
    assert expected == [(30, "forward")] and lengths_of_plans() == [128]
    monkeypatch.setattr(cache, "is_kept", lambda request: True)
    OURS(*tensors, is_causal=True)  # the eighth looks whether it is there
    assert lengths_of_plans() == [30, 128]
    for _ in range(3):
        OURS(*tensors, is_causal=True)
    assert len(launched) == 11


def test_plans_that_are_loaded_end_the_sharing(launched, monkeypatch):
    monkeypatch.setattr(lengths, "OWN", 0)
    tensors = qkv(*[(1, 2, 30, 8)] * 3, dtype=BF16, requires_grad=False)
    OURS(*tensors, is_causal=True)
    attention.prepared(*operator_call(*tensors, causal_offset=0), tensors[0].device, "forward")
    OURS(*tensors, is_causal=True)
    OURS(*tensors, is_causal=True)
    assert launched == ["forward"] * 3 and len(attention._choices) == 2


def test_switched_off_nothing_is_padded(launched, monkeypatch):
    monkeypatch.setattr(lengths, "OWN", 0)
    monkeypatch.setenv(attention.VARIABLE, "0")
    tensors = qkv(*[(1, 2, 30, 8)] * 3, dtype=BF16)
    check(tensors, is_causal=True)
    assert launched == [] and not lengths._ways
    monkeypatch.delenv(attention.VARIABLE)
    check(tensors, is_causal=True)
    assert launched == BOTH and lengths_of_plans() == [128]


def test_explain_says_so(launched, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(lengths, "OWN", 0)
    tensors = qkv(*[(1, 2, 30, 8)] * 3, dtype=BF16, requires_grad=False)
    assert "forward to be compiled" in torch_bridge.explain(*tensors, is_causal=True)
    OURS(*tensors, is_causal=True)
    text = torch_bridge.explain(*tensors, is_causal=True)
    assert "plans: forward shared by lengths up to 128 and 128, to which tensors are padded, backward to be" in text


def test_other_lengths_of_arrays_share_plans_too(launched):
    """Regression: ids and packed tokens of each length were compiled for, and so was every length with dropout."""
    for arguments in (lambda length: dict(segment_ids=torch.arange(length).expand(2, -1) // 5 - 1),
                      lambda length: dict(dropout_p=0.5)):
        attention._directs.clear()
        for length in (9, 12, 13, 30, 130):
            tensors = qkv(*[(2, 2, length, 16)] * 3, dtype=BF16)
            torch_bridge.flash_attention(*tensors, **arguments(length)).sum().backward()
        assert lengths_of_plans("forward") == lengths_of_plans("backward") == [9, 12, 128, 256]
    attention._directs.clear()
    for length in (9, 12, 13, 30, 130):
        q, k, v = (x[0] for x in qkv(*[(1, length, 2, 16)] * 3, dtype=BF16))
        starts = torch.tensor([0, 4, length - 1], dtype=torch.int32)
        torch_bridge.flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, length, length).sum().backward()
    assert lengths_of_plans("forward") == lengths_of_plans("backward") == [9, 12, 128, 256]


@pytest.mark.parametrize("kind", ["keys", "pairs", "bias of keys", "bias of pairs", "queries"])
def test_other_lengths_of_masks_share_plans_too(launched, kind):
    """Regression: each length of an attn_mask was compiled for."""
    for length in (9, 12, 13, 30, 130):
        tensors = qkv(*[(2, 2, length, 16)] * 3, dtype=BF16)
        shape = dict(keys=(2, 1, 1, length), pairs=(length, length), queries=(length, 1))[kind.removeprefix("bias of ")]
        mask = torch.rand(shape) < 0.7
        if "bias" in kind:
            mask = torch.where(mask, torch.randn(shape), -torch.inf)
        found, leaves = OURS(*tensors, attn_mask=mask), [x.detach().double().requires_grad_() for x in tensors]
        wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask.double() if "bias" in kind
                                                                  else mask).nan_to_num()
        torch.testing.assert_close(found.double(), wanted, atol=3e-2, rtol=3e-2)
        grads, exact = torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(wanted.sum(), leaves)
        for a, b in zip(grads, exact):
            torch.testing.assert_close(a.double(), b.nan_to_num(), atol=5e-2, rtol=5e-2)
    assert lengths_of_plans("forward") == lengths_of_plans("backward") == [9, 12, 128, 256]


def test_lengths_are_not_asked_one_by_one_for_the_gradient_of_a_bias(launched, monkeypatch):
    """Regression: while no launches make it, a process was started for each length, to say so."""
    asked, find = [], cache.find

    def counted(request, index):
        if request.pass_name == "dbias":
            asked.append(request.problem.q_len)
        return find(request, index)
    monkeypatch.setattr(cache, "find", counted)
    for length in (9, 12, 13, 30, 31, 31, 130):
        tensors = qkv(*[(2, 2, length, 16)] * 3, dtype=BF16)
        OURS(*tensors, attn_mask=torch.randn(length, length).requires_grad_()).sum().backward()
    assert asked == [9, 12, 128, 256]


def test_one_query_stays_one(launched):
    """Regression: the queries of decoding were padded to 128, from the third length of its keys on."""
    for length in (64, 128, 192, 256, 320):
        tensors = qkv((2, 4, 1, 16), *[(2, 2, length, 16)] * 2, dtype=BF16, requires_grad=False)
        found = torch_bridge.flash_attention(*tensors, kv_lengths=torch.tensor([length - 3, 7], dtype=torch.int32))
        keep = torch.arange(length) < torch.tensor([length - 3, 7])[:, None, None, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.double() for x in tensors), attn_mask=keep, enable_gqa=True)
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    found = sorted((problem.q_len, problem.kv_len) for problem, _ in attention._directs)
    assert found == [(1, 64), (1, 128), (1, 192), (1, 256), (1, 384)]


MEANINGS = {
    "full": {}, "aligned at the end": dict(causal_offset=3), "lengths": dict(kv_lengths=[4, 100]),
    "ids and lengths": dict(q_ids=True, kv_lengths=[0, 9], causal_offset=1), "dropout": dict(dropout_p=0.4),
    "mask": dict(mask=(2, 1, 9, 12)), "mask of queries, causal": dict(mask=(1, 1, 9, 1), causal_offset=4),
    "bias": dict(bias=(1, 4, 9, 12)), "bias of keys": dict(bias=(2, 1, 1, 12)),
    "packed": dict(starts=([0, 3, 3, 7], [0, 5, 6, 10]), causal_offset=0, ends_aligned=True),
    "packed, past the end": dict(starts=([0, 3, 300], [0, 5, 400]), dropout_p=0.2),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_is_padded_changes_nothing(name):
    """By DLPack, in float64: the arithmetic, not the way."""
    arguments = dict(MEANINGS[name])
    offset, dropout_p = arguments.pop("causal_offset", None), arguments.pop("dropout_p", 0.0)
    batch = 1 if "starts" in arguments else 2
    tensors = qkv((batch, 4, 9, 8), (batch, 2, 12, 8), (batch, 2, 12, 8), dtype=torch.float64, requires_grad=False)
    operands, numbers = operator_call(*tensors, causal_offset=offset, dropout_p=dropout_p,
                                      seed=torch.tensor([5, -9], dtype=torch.int32) if dropout_p else None)
    if "starts" in arguments:
        q_starts, kv_starts = (torch.tensor(starts, dtype=torch.int32) for starts in arguments["starts"])
        operands = operands._replace(q_starts=q_starts, kv_starts=kv_starts)
        numbers = numbers._replace(ends_aligned=arguments.get("ends_aligned", False))
    if "kv_lengths" in arguments:
        operands = operands._replace(kv_lengths=torch.tensor(arguments["kv_lengths"], dtype=torch.int32))
    if "q_ids" in arguments:
        operands = operands._replace(q_ids=torch.randint(-1, 2, (2, 9), dtype=torch.int32),
                                     kv_ids=torch.randint(-1, 2, (2, 12), dtype=torch.int32))
    if "mask" in arguments:
        operands = operands._replace(mask=torch.rand(arguments["mask"]) < 0.6)
    if "bias" in arguments:
        operands = operands._replace(bias=torch.randn(arguments["bias"], dtype=torch.float64))
    filled = lengths.padded(operands, numbers)
    assert filled.query.shape[2] == filled.key.shape[2] == filled.value.shape[2] == 128
    assert (filled.kv_lengths is None) == (name == "aligned at the end" or any(
        kind in name for kind in ("packed", "bias")) or name == "mask")
    out, stats = exchange.forward(operands, numbers, True)
    wide, more = exchange.forward(filled, numbers, True)
    torch.testing.assert_close(wide[:, :, :9], out)
    torch.testing.assert_close(more[..., 0, :9], stats[..., 0, :])
    dout, dstats, needs = torch.randn_like(out), torch.randn_like(stats), PerArray(True, True, True, False, False)
    dstats[:, :, 1] = 0
    dstats[torch.isinf(stats)] = 0
    wanted = exchange.backward(operands, numbers, Results(out, stats), Cotangents(dout, dstats), needs)
    found = exchange.backward(filled, numbers, Results(lengths._filled(out, 128), lengths._filled(stats, 128, 3)),
                              Cotangents(lengths._filled(dout, 128), lengths._filled(dstats, 128, 3)), needs)
    for x, a, b in zip(tensors, found, wanted):
        torch.testing.assert_close(a[:, :, :x.shape[2]], b)
        assert not a[:, :, x.shape[2]:].any()
