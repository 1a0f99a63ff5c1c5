"""Packed tensors on the direct path: which parts of them are read where they lie, and that only these are read.

On the stand-ins of test_direct.py.
"""

import contextlib
import dataclasses

import pytest
import torch

import torch_bridge
from bridge.direct import FORWARD, SMALL
from bridge.problems import OURS, check, heads_inside, qkv
from bridge.test_direct import BF16, BOTH, FakeGpu, launched, moved
from bridge.test_direct_shortcut import short
from pallas_flash import FallbackWarning
from torch_bridge.direct import attention, cache, lengths, lower, storage
from torch_bridge.direct.parent import NoLaunchesError, NoPlanError
from torch_bridge.flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = ["launched", "short"]  # fixtures

B, L, H, G = 2, 9, 4, 2


def between(*shape):
    """Numbers with NaN on either side, which nothing may read."""
    memory = torch.full((torch.Size(shape).numel() + 1024,), torch.nan, dtype=BF16)
    return memory[512:-512].view(shape).normal_()


def heads(x, d):
    return x.unflatten(2, (-1, d)).transpose(1, 2)


# query, key and value of a packed tensor, and whether they are read where they lie.
PACKED = {
    "(B, L, 3, H, D)": (lambda d: [x.transpose(1, 2) for x in between(B, L, 3, H, d).unbind(2)], (16, 64, 96)),
    "(B, L, H, 3, D)": (lambda d: [x.transpose(1, 2) for x in between(B, L, H, 3, d).unbind(3)], (64, 128)),
    "(B, L, (Hq + 2 Hkv) D)": (lambda d: [heads(x, d) for x in between(B, L, (H + 2 * G) * d).split(
        [H * d, G * d, G * d], 2)], (16, 64)),
    "split, then transposed": (lambda d: [heads(x, d) for x in between(B, L, 3 * H * d).split(H * d, 2)], (16, 64)),
    "(B, 3, H, L, D)": (lambda d: [*between(B, 3, H, L, d).unbind(1)], (16, 64)),
    "(B, H, L, 3 D)": (lambda d: [*between(B, H, L, 3 * d).split(d, 3)], (64,)),
    "(B, L, 3, 1, D)": (lambda d: [x.transpose(1, 2) for x in between(B, L, 3, 1, d).unbind(2)], (16, 64)),
}
CASES = [(name, d, True) for name, (_, dims) in PACKED.items() for d in dims] + [
    ("(B, L, H, 3, D)", 16, False), ("(B, H, L, 3 D)", 96, False)]


@pytest.mark.parametrize("name, d, is_read", CASES)
def test_packed_tensors_are_read_where_they_lie(short, launched, monkeypatch, tmp_path, name, d, is_read):
    tensors = [x.requires_grad_() for x in PACKED[name][0](d)]
    options = dict(is_causal=True, enable_gqa=True)
    for again in range(2):
        results = check(tensors, **options)
        assert (FakeGpu.read == [x.data_ptr() for x in tensors]) == is_read
        assert short == (BOTH if again and is_read else [])
    assert launched == BOTH * 2
    for x, grad in zip(tensors, results[1:], strict=True):
        assert grad.stride() == torch.empty_like(x).stride()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    lines = torch_bridge.explain(*tensors, **options).splitlines()
    assert sum(line.endswith(": shared, not copied") for line in lines) == 3 * is_read
    assert ("are those of no part of dense" in str(lines)) != is_read and lines[-1].startswith("gradients: dense")


@pytest.mark.parametrize("name", ["(B, L, 3, H, D)", "(B, L, H, 3, D)"])
def test_gradients_reach_the_packed_tensor(short, launched, name):
    results = []
    for dtype in (BF16, BF16, torch.float64):
        torch.manual_seed(1)
        leaf = between(*((B, L, 3, H, 64) if "3, H" in name else (B, L, H, 3, 64))).to(dtype).requires_grad_()
        out = OURS(*(x.transpose(1, 2) for x in leaf.unbind(2 if "3, H" in name else 3)), is_causal=True)
        results.append(torch.autograd.grad(out, leaf, torch.ones_like(out))[0].double())
    assert launched == BOTH * 2 and short == BOTH and torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], atol=5e-2, rtol=5e-2)


def test_a_part_that_is_misaligned_is_copied_with_its_strides(short, launched):
    """It keeps its plan, which knows the strides."""
    tensors = PACKED["(B, L, 3, H, D)"][0](16)
    wide = [moved(torch.cat((x.transpose(1, 2).flatten(2),) * 3, 2)) for x in tensors]
    parts = [heads(x[:, :, :H * 16], 16).detach().requires_grad_() for x in wide]
    assert all(x.stride() == y.stride() for x, y in zip(parts, tensors))
    check(parts, is_causal=True)
    check([x.detach().requires_grad_() for x in tensors], is_causal=True)
    assert launched == BOTH * 2 and len(attention._directs) == 1


@pytest.mark.parametrize("change", [
    lambda x: x[:, :, :5], lambda x: x[:, :, ::2], lambda x: x.expand(2, 4, 9, 64), lambda x: x[..., :32],
    lambda x: x.mT, lambda x: x.as_strided((1, 4, 9, 64), (0, 8, 64, 1)), lambda x: x[:, ::3]], ids=range(7))
@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
def test_no_more_than_these_parts(change, layout):
    """A length must be whole: what lies behind it would be read as keys. Nothing overlaps."""
    x = torch.zeros(1, 4, 9, 64, dtype=BF16)
    part = change(x)
    found = storage.outer_of(part, layout)
    if found is not None:  # then the kernels' view of it is the tensor
        count, columns = found
        batch, number, length, d = part.shape
        shape = (batch, length, count, columns) if layout == "BLHD" else (batch, count, length, columns)
        memory = torch.empty(shape, device="meta")
        view = memory[..., :number, :d].transpose(1, 2) if layout == "BLHD" else memory[:, :number, :, :d]
        assert view.shape == part.shape
        assert all(a == b for n, a, b in zip(part.shape, view.stride(), part.stride()) if n > 1)


def test_each_part_has_a_plan_of_its_own():
    outer, backward = ((12, 64), (2, 64), (2, 192)), dataclasses.replace(FORWARD, pass_name="backward")
    other = dataclasses.replace(backward, problem=dataclasses.replace(SMALL, layout="BLHD", outer=outer))
    assert other.key != dataclasses.replace(backward, problem=dataclasses.replace(SMALL, layout="BLHD")).key
    assert lower.Request.of(other.text) == other
    program = lower.lower(other)
    assert program.buffers["dq"] == ((1, 200, 4, 64), "bfloat16", None)
    assert program.buffers["q"] == ((1, 200, 4, 64), "bfloat16", (200 * 12 * 64, 12 * 64, 64, 1))
    assert program.buffers["k"] == ((1, 256, 2, 64), "bfloat16", None)
    assert program.buffers["v"] == ((1, 256, 2, 64), "bfloat16", (256 * 2 * 192, 2 * 192, 192, 1))


# --- gradients into one packed tensor --------------------------------------------------------------------------------

OF_PARTS = ["forward", "backward_of_parts"]
BOUNDS = torch.tensor([0, 4, 9], dtype=torch.int32)
INTO_ONE = {
    "qkv": (lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True), [(B, L, 3, H, 16)]),
    "kv": (lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True, softcap=2.0), [(B, L, H, 16), (B, 12, 2, G, 16)]),
    "qkv of sequences": (lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, BOUNDS, 5, causal=True), [(L, 3, H, 64)]),
    "kv of sequences": (lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, BOUNDS, BOUNDS, 5, 5, window_size=(2, 0)),
                        [(L, H, 64), (L, 2, G, 64)]),
    "dropout": (lambda qkv: flash_attn_qkvpacked_func(qkv, 0.4), [(B, L, 3, H, 16)]),
}


def leaves(shapes, dtype=BF16, seed=1):
    torch.manual_seed(seed)
    return [between(*shape).to(dtype).requires_grad_() for shape in shapes]


def parts_of(tensors):
    *alone, packed = tensors
    return [*alone, *packed.unbind(-3)]


def gradients(function, tensors):
    torch.manual_seed(2)
    out = function(*tensors)
    dout = torch.randn(out.shape).to(out.dtype)
    return torch.autograd.grad(out, tensors, dout)


@pytest.mark.parametrize("name", INTO_ONE)
def test_gradients_are_written_into_one_packed_tensor(launched, name):
    """At the addresses of its parts, in which there was NaN; nothing is copied."""
    function, shapes = INTO_ONE[name]
    found = gradients(function, tensors := leaves(shapes))
    assert launched == OF_PARTS
    assert FakeGpu.written == [x.data_ptr() for x in parts_of(found)]
    assert [x.stride() for x in found] == [x.stride() for x in tensors]
    for x, exact in zip(found, gradients(function, leaves(shapes, torch.float64)), strict=True):
        torch.testing.assert_close(x.double(), exact, atol=8e-2, rtol=5e-2)


@pytest.mark.parametrize(("name", "overwritten"), [(name, part) for name in ("qkv", "kv", "qkv of sequences")
                                                 for part in ("query", "key", "value", "out")])
def test_autograd_sees_that_a_saved_part_was_overwritten(launched, name, overwritten):
    """A clone of the tensors or of out, saved in their place, would hide it."""
    function, shapes = INTO_ONE[name]
    leaf = leaves(shapes)
    given = [x * 1 for x in leaf]
    out = function(*given)
    total = out.sum()
    with torch.no_grad():
        dict(zip(("query", "key", "value", "out"), (*parts_of(given), out), strict=True))[overwritten].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaf)
    assert launched == ["forward"]


def test_only_the_gradient_that_is_needed(launched):
    function, shapes = INTO_ONE["kv"]
    q, kv = leaves(shapes)
    both, alone = gradients(function, [q, kv]), []
    for tensors, wanted in (((q.detach(), kv), kv), ((q, kv.detach()), q)):
        torch.manual_seed(2)
        out = function(*tensors)
        alone.append(torch.autograd.grad(out, wanted, torch.randn(out.shape).to(BF16))[0])
    assert torch.equal(both[1], alone[0]) and torch.equal(both[0], alone[1]) and launched == OF_PARTS * 3
    with torch.no_grad():
        function(q, kv)
    assert launched == [*OF_PARTS * 3, "forward"]


@pytest.mark.parametrize("error", [NoPlanError, NoLaunchesError])
def test_where_parts_cannot_be_written_dense_gradients_are_launched(launched, monkeypatch, error):
    """Regression: they went through DLPack, and without a word where there are no such launches."""
    def fails(request, index, *, find=cache.find):
        if request.pass_name == "backward_of_parts":
            raise error("it broke")
        return find(request, index)
    monkeypatch.setattr(cache, "find", fails)
    function, shapes = INTO_ONE["qkv"]
    is_told = pytest.warns(FallbackWarning, match="the backward_of_parts of .* goes to that of dense gradients")
    with is_told if error is NoPlanError else contextlib.nullcontext():
        found = [gradients(function, leaves(shapes)) for _ in range(2)]
    assert launched == BOTH * 2 and all(map(torch.equal, *found))


@pytest.mark.parametrize("name", INTO_ONE)
def test_dense_gradients_that_are_copied_are_the_same(launched, monkeypatch, name):
    function, shapes = INTO_ONE[name]
    with monkeypatch.context() as without:
        without.setattr(attention.DirectCall, "may_write", lambda *given: False)
        found = gradients(function, leaves(shapes))
    assert launched == BOTH
    for x, exact in zip(found, gradients(function, leaves(shapes)), strict=True):
        assert torch.equal(x, exact)
    assert launched == [*BOTH, *OF_PARTS]


@pytest.mark.parametrize("change", [
    lambda qkv: torch.cat((qkv, qkv), 1)[:, :L], lambda qkv: qkv.transpose(0, 1).contiguous().transpose(0, 1),
    lambda qkv: torch.cat((qkv, qkv), 4)[..., :16]], ids=["of a longer one", "length first", "columns"])
def test_other_tensors_get_dense_gradients_that_are_copied(launched, change):
    function, shapes = INTO_ONE["qkv"]
    leaf = leaves(shapes)
    expected, = gradients(function, leaf)
    found, = gradients(function, [change(leaf[0].detach()).requires_grad_()])
    assert launched == [*OF_PARTS, *BOTH]
    torch.testing.assert_close(found, expected)


def test_lengths_that_share_a_plan_are_copied(launched):
    function, _ = INTO_ONE["qkv"]
    for length in range(5, 5 + lengths.OWN + 1):
        found, = gradients(function, leaves([(1, length, 3, 2, 64)]))
        exact, = gradients(function, leaves([(1, length, 3, 2, 64)], torch.float64))
        torch.testing.assert_close(found.double(), exact, atol=8e-2, rtol=5e-2)
    assert launched == [*OF_PARTS * lengths.OWN, *BOTH]


def test_what_intercepts_calls_sees_operators(launched):
    """Second derivatives, transforms, autocast, lse: the gradients of parts are stacked."""
    wide = leaves([(1, 4, 3, 2, 8)], torch.float64)
    assert torch.autograd.gradcheck(flash_attn_qkvpacked_func, wide)
    assert torch.autograd.gradgradcheck(lambda *x: flash_attn_kvpacked_func(*x, causal=True), leaves(
        [(1, 3, 2, 8), (1, 4, 2, 2, 8)], torch.float64))
    leaf, = leaves([(1, 4, 3, 2, 8)])
    found = torch.func.grad(lambda x: flash_attn_qkvpacked_func(x).float().square().sum())(leaf.detach())
    (expected,) = torch.autograd.grad(flash_attn_qkvpacked_func(leaf).float().square().sum(), leaf)
    torch.testing.assert_close(found, expected)
    assert launched == [*BOTH, *OF_PARTS]
    with torch.autocast("cpu", BF16):
        out = flash_attn_qkvpacked_func(single := leaf.detach().float().requires_grad_())
    assert out.dtype == BF16 and torch.autograd.grad(out.float().square().sum(), single)[0].dtype == torch.float32
    out, lse, _ = flash_attn_qkvpacked_func(leaf, return_attn_probs=True)
    torch.autograd.grad(out.float().square().sum() + lse.sum(), leaf)
    assert launched == [*BOTH, *OF_PARTS, *BOTH, *BOTH]


def test_a_plan_that_cannot_be_made_leaves_dlpack(launched, monkeypatch):
    function, shapes = INTO_ONE["qkv"]
    expected, = gradients(function, tensors := leaves(shapes))
    monkeypatch.setenv(attention.VARIABLE, "0")
    found, = gradients(function, tensors)
    assert launched == OF_PARTS
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_the_plan_of_gradients_that_are_parts():
    outer = (12, 64), (6, 64), (6, 64)
    problem = dataclasses.replace(SMALL, layout="BLHD", outer=outer)
    request = dataclasses.replace(FORWARD, pass_name="backward_of_parts", problem=problem)
    assert lower.Request.of(request.text) == request
    program, dense = lower.lower(request), lower.lower(dataclasses.replace(request, pass_name="backward"))
    for name, shape in problem.shapes().items():
        assert program.buffers[f"d{name}"] == program.buffers[name] == (shape, "bfloat16", problem.strides()[name])
        assert dense.buffers[f"d{name}"] == (shape, "bfloat16", None)
    assert program.results == dense.results and len(program.steps) == len(dense.steps)


def test_a_compiled_program_reads_them_too(launched, quiet):
    """Its operator gets the strides that were traced."""
    def step(leaf):
        return OURS(*(x.transpose(1, 2) for x in leaf.unbind(2)), is_causal=True).float().square().sum()
    leaf = between(B, L, 3, H, 16).requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert launched == BOTH * 2
    assert FakeGpu.read == [x.data_ptr() for x in leaf.unbind(2)]
    torch.testing.assert_close(found[0], expected, atol=1e-2, rtol=1e-2)


def test_which_layout_copies_least():
    packed = PACKED["(B, L, 3, H, D)"][0](16)
    assert storage.layout_of(packed) == "BLHD"
    assert storage.layout_of(PACKED["(B, 3, H, L, D)"][0](16)) == "BHLD"
    dense = qkv((B, H, L, 16), (B, H, 4 * L, 16), (B, H, 4 * L, 16), dtype=BF16, requires_grad=False)
    assert storage.layout_of(dense) == "BHLD"
    assert storage.layout_of([heads_inside(dense[0]), *dense[1:]]) == "BHLD"
    assert storage.layout_of([dense[0], *map(heads_inside, dense[1:])]) == "BLHD"
