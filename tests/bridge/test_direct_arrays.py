"""Lengths, offsets, segment ids, packed sequences, dropout and sinks on the direct path: from torch's functions to the
arrays that kernels would be given, which the stand-in of test_direct.py reads, against float64 through DLPack.
"""

import dataclasses
import math

import pytest
import torch

import torch_bridge
from bridge.direct import A100, FORWARD, SMALL
from bridge.problems import OURS, qkv
from bridge.test_direct import BF16, BOTH, launched  # noqa: F401
from pallas_flash import UnsupportedError, spec
from torch_bridge import flash_attn, ops, sdpa
from torch_bridge.arguments import Attention, Numbers, Operands
from torch_bridge.direct import attention, cache, lengths, lower

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


def test_as_many_sequences_or_fewer_take_the_same_plan(launched, monkeypatch):  # noqa: F811
    """Batches have other numbers of them: each was compiled for, seconds a time."""
    asked, find = [], cache.find
    monkeypatch.setattr(cache, "find", lambda request, index: (asked.append(request), find(request, index))[1])
    q, k, v = (x[0].transpose(0, 1) for x in qkv((1, HQ, L, D), (1, HKV, L, D), (1, HKV, L, D), dtype=BF16,
                                                 requires_grad=False))
    for ends in ((30, 60), (5, 5, 70), (70,), (10, 20, 30, 40)):
        starts = integers(0, *ends)
        found = flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, L, L)
        wanted = torch.zeros_like(q, dtype=torch.float64)
        for first, last in zip((0, *ends), ends):
            if last > first:
                one = [x[first:last].transpose(0, 1).double() for x in (q, k, v)]
                out = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in one), enable_gqa=True)
                wanted[first:last] = out[0].transpose(0, 1)
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    assert len(asked) == 1 and launched == ["forward"] * 4


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


NEVER = -torch.inf
MASKS = {
    "of keys": (torch.arange(S) % 3 != 1)[None, None, None].expand(B, 1, 1, S),
    "of pairs": (torch.arange(L)[:, None] * 3 + torch.arange(S)) % 7 < 4,
    "of heads": ((torch.arange(HQ)[:, None, None] + torch.arange(L)[:, None] * torch.arange(S)) % 5 < 2)[None],
    "of queries": (torch.arange(L) != 3)[:, None],
    "bias of keys": torch.where(torch.arange(S) % 3 == 1, NEVER, torch.arange(S) / 20)[None, None, None],
    "bias of keys and heads": (torch.arange(HQ * S).reshape(1, HQ, 1, S) % 13 / 5).to(BF16),
    "bias of pairs": torch.where(torch.arange(L)[:, None] % 5 > 3, NEVER, torch.arange(S) % 11 / 4 + 100),
    "bias of everything": torch.linspace(-3, 3, B * HQ * L * S).reshape(B, HQ, L, S)[..., torch.arange(S) * 7 % S],
}


@pytest.mark.parametrize("name", MASKS)
def test_attn_mask(launched, name):  # noqa: F811
    """Expanded, dense or neither, of any of its axes; what hides all keys of a query, too."""
    tensors, mask = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16), MASKS[name]
    of = lambda x: mask if mask.dtype != BF16 or x.dtype == BF16 else mask.double()
    compare(lambda *x: OURS(*x, attn_mask=of(x[0]).double() if x[0].dtype == torch.float64 and mask.is_floating_point()
                            else of(x[0]), enable_gqa=True), tensors)
    assert launched == BOTH


def test_attn_mask_beside_other_rules(launched):  # noqa: F811
    """A bias of pairs is anchored where the mask keeps it: what is hidden may be far larger."""
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)
    for mask, options in ((MASKS["of heads"], dict(is_causal=True, kv_lengths=integers(90, 1, 41))),
                          (torch.where(torch.arange(S) > 85, 1e5, MASKS["bias of everything"]),
                           dict(kv_lengths=integers(80, 1, 41), is_causal=True)),
                          (MASKS["of keys"], dict(dropout_p=0.4, window=(20, 5)))):
        def call(*x, mask=mask, options=options):
            torch.manual_seed(3)
            wide = mask.is_floating_point() and x[0].dtype == torch.float64
            return torch_bridge.flash_attention(*x, attn_mask=mask.double() if wide else mask, **options)
        compare(call, tensors)
    assert launched == BOTH * 3


def test_a_whole_bias_is_read_where_it_lies(launched):  # noqa: F811
    """One that is no multiple of tiles is copied, and filled up, as JAX does."""
    q, k, v = qkv((1, 2, 128, 64), (1, 2, 256, 64), (1, 2, 256, 64), dtype=BF16, requires_grad=False)
    for bias, names in ((torch.randn(1, 2, 128, 256), {"given bias"}),
                        (torch.randn(1, 2, 128, 256, dtype=BF16), {"given bias"}),
                        (torch.randn(1, 2, 1, 256), {"bias", "given bias"})):
        found = OURS(q, k, v, attn_mask=bias)
        wanted = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), bias.double())
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
        program = attention.known(*sdpa.prepare(q, k, v, bias, 0.0, False, None, False)[:2]).direct.runner(
            "forward").program
        assert {name for name in program.buffers if "bias" in name} == names
        read = {name for step in program.steps for name in step.arrays}
        assert ("given bias" in read) == (names == {"given bias"})
    assert launched == ["forward"] * 3


def test_explain_says_what_is_read_of_a_mask(launched):  # noqa: F811
    tensors = qkv((B, HQ, L, D), (B, HQ, S, D), (B, HQ, S, D), dtype=BF16, requires_grad=False)
    for mask, said in ((MASKS["of pairs"], "made into bits"), (MASKS["bias of keys"], "copied: where it is -inf"),
                       (MASKS["bias of pairs"], "shared, where its lengths are whole tiles"),
                       (MASKS["bias of everything"].mT.contiguous().mT, "copied: strides")):
        lines = torch_bridge.explain(*tensors, attn_mask=mask).splitlines()
        assert "path: direct" in str(lines) and any(line.startswith(f"attn_mask: {said}") for line in lines), lines


def test_the_gradient_of_a_bias(launched):  # noqa: F811
    """By its kernel; of a bias of keys through DLPack, after a direct forward."""
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)
    call = lambda *x: OURS(*x[:3], attn_mask=x[3], enable_gqa=True)
    pairs, keys = (torch.randn(1, HQ, n, S).requires_grad_() for n in (L, 1))
    compare(call, [*tensors, pairs])
    compare(call, [*tensors, torch.randn(L, S).to(BF16).requires_grad_()])
    compare(call, [*tensors, keys])
    assert launched == ["forward", "backward", "dbias"] * 2 + ["forward"]


def test_an_a100_is_asked_for_no_launches_with_a_bias(launched, monkeypatch):  # noqa: F811
    """Regression: each shape started a process that could only say no, and explain said that it goes directly."""
    pairs = dataclasses.replace(SMALL, given=(("bias", (1, 4, 200, 256), "bfloat16"),))
    with pytest.raises(UnsupportedError, match="makes what it reads of this bias beside the launches, by JAX"):
        lower.lower(dataclasses.replace(FORWARD, problem=pairs, gpu=A100))  # else that rule is to go
    monkeypatch.setattr(attention, "gpu_of", lambda device: A100)
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)
    call = lambda *x: OURS(*x, attn_mask=torch.ones(L, S).tril(), enable_gqa=True)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "find", None)
        compare(call, tensors)
    assert launched == []
    why = "it launches kernels of a float attn_mask for compute capability 9.0 alone, NVIDIA A100-SXM4-80GB has 8.0"
    given = dict(attn_mask=torch.ones(L, S), enable_gqa=True)
    said = torch_bridge.explain(*tensors, **given)
    assert f"path: DLPack, JAX's runtime launches (not the direct path: {why})" in said
    with pytest.raises(RuntimeError, match=why):
        torch_bridge.precompile(*tensors, **given)
    compare(lambda *x: OURS(*x, attn_mask=torch.ones(L, S).tril() > 0, enable_gqa=True), tensors)
    assert launched == BOTH, "booleans are launched"


def test_many_small_kernels_take_longer_than_dlpack(launched, monkeypatch):  # noqa: F811
    """Not where a program was compiled for CUDA graphs, nor where lengths share a plan; a pass that may be captured
    later has its plan.
    """
    tensors = qkv((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D), dtype=BF16)
    numbers = Numbers.of(causal_offset=None, scale=None, dropout_p=0.0)
    given = Operands.of(*(x.detach() for x in tensors), mask=None, bias=None, seed=None)._replace(
        kv_lengths=integers(80, 2, 90))
    call = lambda *x: torch_bridge.flash_attention(*x, kv_lengths=given.kv_lengths)
    monkeypatch.setattr(attention, "MOST_WITH_GRADIENTS", 20)
    compare(call, tensors)
    found = attention.known(given, numbers)
    assert launched == [] and 20 < found.direct.runner("forward").num_kernels < 40 and found.direct.runner("backward")
    said = torch_bridge.explain_flash_attention(*tensors, kv_lengths=given.kv_lengths)
    assert "path: DLPack" in said and "small kernels of PyTorch would make what the forward reads" in said
    with torch.no_grad():
        assert "path: direct" in torch_bridge.explain_flash_attention(*tensors, kv_lengths=given.kv_lengths)
        call(*tensors)
        assert launched == ["forward"]
        monkeypatch.setattr(attention, "MOST_ALONE", 20)
        ops.attention(*Attention(given, numbers, False).flat())
        assert launched == ["forward"]
        ops.DIRECT[ops.attention](*Attention(given, numbers, False).flat())
        assert launched == ["forward"] * 2
        monkeypatch.setattr(lengths, "OWN", 0)
        torch_bridge.flash_attention(*(x[:, :, :50] for x in tensors), kv_lengths=given.kv_lengths)
        assert launched == ["forward"] * 3


def test_what_a_bias_of_keys_needs():
    """Beside other masks than causal ones, its anchor takes a loop over rows where there are many: JAX makes it."""
    q, k = torch.empty(1, 2, attention._ANCHOR_ROWS + 1, 16, dtype=BF16), torch.empty(1, 2, 16, 16, dtype=BF16)
    assert attention._ANCHOR_ROWS == spec.ANCHOR_ROWS
    operands = Operands.of(q, k, k, mask=None, bias=torch.empty(1, 1, 1, 16), seed=None)
    numbers = Numbers.of(causal_offset=0, scale=None, dropout_p=0.0)
    assert attention.why_not(operands, numbers) is None
    for given, other in ((operands, numbers._replace(left=3)), (operands._replace(kv_lengths=integers(3)), numbers)):
        assert attention.why_not(given, other) == (
            "it takes a float attn_mask of keys beside a mask that is not causal for at most 128 queries, q_len=129")


def test_alibi(launched):  # noqa: F811
    """As flash-attn has it: of more queries than are anchored at once."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv(
        (1, HQ, 150, D), (1, HKV, 170, D), (1, HKV, 170, D), dtype=BF16))
    slopes = torch.tensor([0.5, 0.25, 0.125, 8.0])
    compare(lambda *x: flash_attn.flash_attn_func(*x, causal=True, alibi_slopes=slopes), [q, k, v])
    assert launched == BOTH


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
    for counts in (integers(1, 2, 3), integers(90, 80, 70), integers(-4, 1000, 5)):
        found = torch_bridge.flash_attention(q, k, v, kv_lengths=counts)
        keep = torch.arange(S) < counts[:, None, None, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v)), attn_mask=keep).nan_to_num()
        torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    assert len(asked) == 1 and launched == ["forward"] * 3
    said = torch_bridge.explain_flash_attention(q, k, v, kv_lengths=counts)
    assert "path: direct, launched on torch's stream" in said
    assert any("launched directly" in run.problem and "kv_lengths" in run.problem for run in torch_bridge.report())
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


# --- on a GPU --------------------------------------------------------------------------------------------------------

def gpu_mask(*shape):
    return (torch.arange(math.prod(shape)).reshape(shape) * 7919 % 11) > 3


GPU_CASES = {  # of the lengths 300 and 430, batch 2
    "kv_lengths, causal": dict(kv_lengths=integers(430, 17), is_causal=True, causal_offset=130),
    "ids": dict(segment_ids=tuple((torch.arange(n) // 77 - 1).expand(2, n).int() for n in (300, 430))),
    "dropout": dict(dropout_p=0.3, q_lengths=integers(300, 211)),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), window=(100, 0), kv_lengths=integers(0, 400)),
    "mask of keys": dict(attn_mask=gpu_mask(2, 1, 1, 430)),
    "mask of pairs, causal": dict(attn_mask=gpu_mask(2, 4, 300, 430), is_causal=True, causal_offset=130),
    "bias of keys": dict(attn_mask=torch.where(gpu_mask(2, 1, 1, 430), 0.5, -torch.inf)),
    "bias of pairs": dict(attn_mask=torch.where(gpu_mask(4, 300, 430), torch.linspace(-2, 2, 430), -torch.inf)),
    "bias of pairs, window": dict(attn_mask=torch.linspace(-2, 2, 300 * 430).reshape(300, 430), window=(90, 100)),
}


def on_gpu(arguments):
    move = lambda x: (tuple(map(move, x)) if isinstance(x, tuple) else x.cuda() if isinstance(x, torch.Tensor) else x)
    return {name: move(x) for name, x in arguments.items()}


def of_call(arguments, tensors, dtype):
    torch.cuda.manual_seed(5)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments = arguments | dict(attn_mask=mask.to(torch.float64 if dtype == torch.float64 else torch.float32))
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = torch_bridge.flash_attention(*leaves, **arguments)
    return out, *torch.autograd.grad(out, leaves, tensors[0].to(out.dtype))


@pytest.fixture(params=["direct", "DLPack"])
def way(request, monkeypatch):
    for name in ("MOST_ALONE", "MOST_WITH_GRADIENTS"):
        monkeypatch.setattr(attention, name, math.inf)
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "0" if request.param == "DLPack" else "1")
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_arrays_on_a_gpu(way, name):
    arguments = on_gpu(GPU_CASES[name])
    tensors = [torch.randn(2, heads, n, 64, device="cuda", dtype=BF16) for heads, n in ((4, 300), (2, 430), (2, 430))]
    assert f"path: {way}" in torch_bridge.explain_flash_attention(*tensors, **arguments)
    for x, exact in zip(of_call(arguments, tensors, BF16), of_call(arguments, tensors, torch.float64), strict=True):
        assert ((x.double() - exact).norm() / exact.norm()).item() < 8e-3


@pytest.mark.gpu
def test_packed_sequences_on_a_gpu(way):
    q, k, v = (torch.randn(500, heads, 64, device="cuda", dtype=BF16) for heads in (4, 2, 2))
    bounds = integers(0, 100, 100, 177, 460).cuda()
    found = []
    for dtype in (BF16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = flash_attn.flash_attn_varlen_func(*leaves, bounds, bounds, 283, 283, causal=True)
        found.append((out, *torch.autograd.grad(out, leaves, q.to(dtype))))
    for x, exact in zip(*found, strict=True):
        assert ((x.double() - exact).norm() / exact.norm()).item() < 8e-3


@pytest.mark.gpu
def test_a_graph_draws_a_new_seed_in_each_replay(monkeypatch):
    """And reads lengths that were written after it was captured: nothing of them went through the host."""
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "1")
    tensors = [torch.randn(2, heads, n, 64, device="cuda", dtype=BF16) for heads, n in ((4, 300), (2, 430), (2, 430))]
    counts = integers(430, 17).cuda()
    arguments = dict(dropout_p=0.3, kv_lengths=counts)
    leaves = [x.clone().requires_grad_() for x in tensors]

    def step():
        out = torch_bridge.flash_attention(*leaves, **arguments)
        return out, *torch.autograd.grad(out, leaves, tensors[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    seen = []
    for new in (integers(430, 17), integers(5, 200), integers(430, 430)):
        counts.copy_(new)
        torch.cuda.manual_seed(5)
        graph.replay()
        for x, exact in zip(results, of_call(arguments, tensors, torch.float64), strict=True):
            assert ((x.double() - exact).norm() / exact.norm()).item() < 8e-3
        graph.replay()
        seen.append(results[0].clone())
        graph.replay()
        assert not torch.equal(results[0], seen[-1]), "another seed"


@pytest.mark.gpu
@pytest.mark.parametrize("make", [gpu_mask, lambda *shape: torch.where(gpu_mask(*shape), 0.5, -torch.inf)],
                         ids=["booleans", "floats"])
def test_a_graph_reads_a_mask_that_was_written_after_it(monkeypatch, make):
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "1")
    tensors = [torch.randn(2, heads, n, 64, device="cuda", dtype=BF16) for heads, n in ((4, 300), (2, 430), (2, 430))]
    leaves, mask = [x.clone().requires_grad_() for x in tensors], make(2, 1, 1, 430).cuda()

    def step():
        out = torch_bridge.flash_attention(*leaves, attn_mask=mask)
        return out, *torch.autograd.grad(out, leaves, tensors[0])
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for shift in (0, 5, 100):
        mask.copy_(make(2, 1, 1, 430).roll(shift, 3))
        graph.replay()
        for x, exact in zip(results, of_call(dict(attn_mask=mask), tensors, torch.float64), strict=True):
            assert ((x.double() - exact).norm() / exact.norm()).item() < 8e-3
