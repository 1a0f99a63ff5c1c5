"""The direct path as it is by default, on a GPU: packed tensors, modes of PyTorch, and a process of its own."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import torch_bridge
from bridge.problems import OURS
from bridge.test_gpu_streams import kernels_of
from torch_bridge import routes
from torch_bridge.arguments import Numbers, Operands, PerArray, Results
from torch_bridge.direct import attention, driver, lengths, repeated, shortcut
from torch_bridge.flash_attn import flash_attn_qkvpacked_func

pytestmark = pytest.mark.gpu

B, L, H, D, BF16 = 2, 300, 4, 64, torch.bfloat16


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.delenv("PALLAS_FLASH_DIRECT", raising=False)


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=BF16)


PACKED = {  # the shape for a head dim, and query, key and value
    "(B, L, 3, H, D)": (lambda d: (B, L, 3, H, d), lambda x: [y.transpose(1, 2) for y in x.unbind(2)]),
    "(B, L, H, 3, D)": (lambda d: (B, L, H, 3, d), lambda x: [y.transpose(1, 2) for y in x.unbind(3)]),
    "(B, L, (Hq + 2 Hkv) D)": (lambda d: (B, L, (H + 4) * d), lambda x: [
        y.unflatten(2, (-1, x.shape[2] // (H + 4))).transpose(1, 2)
        for y in x.split([x.shape[2] // (H + 4) * n for n in (H, 2, 2)], 2)]),
    "(B, 3, H, L, D)": (lambda d: (B, 3, H, L, d), lambda x: [*x.unbind(1)]),
}
CASES = [("(B, L, 3, H, D)", 64, False), ("(B, L, 3, H, D)", 64, True), ("(B, L, 3, H, D)", 96, False),
         ("(B, L, H, 3, D)", 64, False), ("(B, L, H, 3, D)", 256, False), ("(B, L, (Hq + 2 Hkv) D)", 128, False),
         ("(B, 3, H, L, D)", 64, False)]


@pytest.mark.parametrize("name, d, deterministic", CASES)
def test_packed_tensors(name, d, deterministic):
    assert_packed_tensors_are_right(name, d, deterministic)


@pytest.fixture
def with_mma(monkeypatch):
    """Calls launch the kernels with mma.sync, which are not the first choice on this GPU."""
    real = attention.request
    monkeypatch.setattr(attention, "request", lambda *given: dataclasses.replace(
        real(*given), implementation="ampere"))
    for module, names in ((attention, ("_choices", "_directs", "_reasons")), (shortcut, ("_shortcuts", "_copied")),
                          (lengths, ("_ways", "_own"))):
        for name in names:
            monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(shortcut, "_recent", [])
    for name in ("_forwards", "_backwards"):
        monkeypatch.setattr(repeated, name, [])
    torch_bridge.report(reset=True)
    yield
    direct = [row for row in torch_bridge.report() if "launched directly" in row.problem]
    assert direct and {row.implementation for row in direct} == {"ampere"}


@pytest.mark.parametrize("name, d, deterministic", [CASES[0], CASES[1], CASES[4], CASES[5], CASES[6]])
def test_kernels_with_mma_take_packed_tensors(with_mma, name, d, deterministic):
    assert_packed_tensors_are_right(name, d, deterministic)


def test_kernels_with_mma_do_not_read_what_lies_beside(with_mma):
    test_what_lies_beside_a_part_is_not_read()


def test_kernels_with_mma_take_lengths_and_a_graph(with_mma):
    """Lengths are read by the GPU when the graph runs; hidden keys are NaN."""
    q, k, v = (random(B, H, L, D) for _ in range(3))
    count = torch.tensor([170, 290], device="cuda", dtype=torch.int32)
    run = lambda: torch_bridge.flash_attention(q, k, v, kv_lengths=count, is_causal=True)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    count.copy_(torch.tensor([33, 211]))
    for i, n in enumerate((33, 211)):
        k[i, :, n:], v[i, :, n:] = torch.nan, torch.nan
    graph.replay()
    for i, n in enumerate((33, 211)):
        mask = torch.arange(L)[:, None] >= torch.arange(n)
        arrays = [x[i:i + 1].double().cpu() for x in (q, k[:, :, :n], v[:, :, :n])]
        exact = F.scaled_dot_product_attention(*arrays, attn_mask=mask)
        assert ((out[i:i + 1].double().cpu() - exact).norm() / exact.norm()).item() < 6e-3


def assert_packed_tensors_are_right(name, d, deterministic):
    shape, parts = PACKED[name]
    leaf = random(*shape(d)).requires_grad_()
    q, k, v = parts(leaf)
    options = dict(is_causal=True, enable_gqa=True)
    lines = torch_bridge.explain(q, k, v, **options).splitlines()
    assert "path: direct" in str(lines) and sum(line.endswith("shared, not copied") for line in lines) == 3
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = OURS(q, k, v, **options)
        dout = torch.randn_like(out)
        found = out, torch.autograd.grad(out, leaf, dout)[0]
    finally:
        torch.use_deterministic_algorithms(False)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, **options)
    grads = torch.autograd.grad(exact, wide, dout.double())
    view = leaf.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(parts(view), view, grads)
    for a, b in zip(found, (exact, wanted), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 6e-3


def test_what_lies_beside_a_part_is_not_read():
    for dim in (2, 3):
        shape = (B, L, 3, H, D) if dim == 2 else (B, L, H, 3, D)
        qkv = torch.full(shape, torch.nan, device="cuda", dtype=BF16)
        qkv.select(dim, 0).normal_()
        x = qkv.select(dim, 0).transpose(1, 2)
        wanted = OURS(*[x.contiguous()] * 3)
        assert torch.equal(OURS(x, x, x), wanted)


def test_no_copy_kernel_runs_for_a_packed_tensor():
    shape, parts = PACKED["(B, L, 3, H, D)"]
    tensors = parts(random(*shape(D)))
    names = kernels_of(lambda: OURS(*tensors, is_causal=True))
    assert len(names) == 3 and all("mosaic" in name for name in names), names


@pytest.mark.parametrize(("d", "dim", "deterministic"), [(64, 2, True), (96, 2, False), (256, 3, True)])
def test_gradients_that_are_parts_touch_nothing_else(d, dim, deterministic):
    assert_gradients_that_are_parts_touch_nothing_else(d, dim, deterministic)


@pytest.mark.parametrize(("d", "dim"), [(64, 2), (256, 3)])
def test_kernels_with_mma_write_gradients_that_are_parts(with_mma, d, dim):
    assert_gradients_that_are_parts_touch_nothing_else(d, dim, True)


def assert_gradients_that_are_parts_touch_nothing_else(d, dim, deterministic):
    """Each is the middle third of a tensor of its own that holds another number, with as much before and behind it;
    bit by bit the dense gradients, where their order is fixed.
    """
    shape, poison = ((B, L, 3, H, d) if dim == 2 else (B, L, H, 3, d)), -777.0
    query, key, value = (x.transpose(1, 2) for x in random(*shape).unbind(dim))
    operands = Operands.of(query, key, value, mask=None, bias=None, seed=None)
    numbers = Numbers.of(causal_offset=0, scale=None, dropout_p=0.0)._replace(deterministic=deterministic)
    out, stats = routes.attend_saving(operands, numbers, then="backward_of_parts")
    dout, needs, size = torch.randn_like(out), PerArray(True, True, True, False, False), query.numel() * 3
    memory = [torch.full((3 * size,), poison, device="cuda", dtype=BF16) for _ in range(3)]
    grads = [x[size:2 * size].view(shape).select(dim, 1).transpose(1, 2) for x in memory]
    assert lengths.write_gradients(operands, numbers, Results(out, stats), dout, tuple(grads), most=0)
    expected = routes.gradients(operands, numbers, (out, stats), dout, needs)[:3]
    for x, grad, dense in zip(memory, grads, expected, strict=True):
        assert torch.equal(grad, dense) if deterministic else ((grad - dense).norm() / dense.norm()).item() < 6e-3
        grad.fill_(poison)
        assert (x == poison).all()


def test_no_copy_kernel_runs_for_the_gradient_of_a_packed_tensor():
    leaf, dout = random(B, L, 3, H, D).requires_grad_(), random(B, L, H, D)
    names = kernels_of(lambda: torch.autograd.grad(flash_attn_qkvpacked_func(leaf, causal=True), leaf, dout))
    assert len(names) == 3 * 4 and all("mosaic" in name for name in names), names


def test_the_gradient_of_a_packed_tensor_in_a_graph():
    """Captured once it has run, and replayed with other numbers."""
    leaf, dout = random(B, L, 3, H, D).requires_grad_(), random(B, L, H, D)
    run = lambda: torch.autograd.grad(flash_attn_qkvpacked_func(leaf, causal=True), leaf, dout)[0]
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        leaf.normal_()
    graph.replay()
    wide = leaf.detach().double().requires_grad_()
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide.unbind(2)), is_causal=True)
    (wanted,) = torch.autograd.grad(exact, wide, dout.double().transpose(1, 2))
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 6e-3


def test_modes_of_torch():
    """The first call in inference mode; then what records, what transforms, and threads."""
    q, k, v = (random(B, H, L + 8, D) for _ in range(3))
    with torch.inference_mode():
        first = OURS(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = OURS(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    assert torch.equal(out, first)
    with pytest.raises(RuntimeError, match="has no derivative"):
        grads[0].sum().backward()
    again = torch.func.grad(lambda *x: OURS(*x).sum(), (0, 1, 2))(*(x.detach() for x in leaves))
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b.detach(), atol=2e-2, rtol=2e-2)
    mapped = torch.vmap(OURS)(*(x.detach()[:, None] for x in leaves))[:, 0]
    torch.testing.assert_close(mapped, first.clone(), atol=1e-2, rtol=1e-2)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        OURS(torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q)), k, v)
    assert OURS(q[:, :, :0], k, v).shape == (B, H, 0, D) and not OURS(q, k[:, :, :0], v[:, :, :0]).any()
    wrong = []
    fresh = [x.detach()[:, :, :L - 40].contiguous() for x in leaves]
    wanted = F.scaled_dot_product_attention(*(x.double() for x in fresh))
    threads = [threading.Thread(target=lambda: wrong.append(
        (OURS(*fresh).double() - wanted).norm() / wanted.norm() > 6e-3)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 and not any(wrong)


ALONE = """
import sys, torch, torch_bridge
tensors = [torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
{before}
out = torch_bridge.scaled_dot_product_attention(*tensors, is_causal=True)
out.sum().backward()
torch.cuda.synchronize()
print("jax" in sys.modules, torch_bridge.report()[0].problem.endswith("launched directly"))
"""


def alone(before="", **environment):
    return subprocess.run([sys.executable, "-c", ALONE.format(before=before)], capture_output=True, text=True,
                          timeout=200, env=os.environ | environment)


def test_a_process_imports_no_jax(tmp_path):
    for _ in range(2):  # from nothing, and from plans
        done = alone(PALLAS_FLASH_PLANS=str(tmp_path / "plans"))
        assert done.stdout.split() == ["False", "True"], done.stderr[-2000:]
    assert len([*(tmp_path / "plans").glob("*.plan")]) == 2


def test_where_plans_cannot_be_kept(tmp_path):
    (tmp_path / "file").touch()
    done = alone(PALLAS_FLASH_PLANS=str(tmp_path / "file" / "plans"))
    assert done.stdout.split() == ["True", "False"], done.stderr[-2000:]
    assert done.stderr.count("FallbackWarning") == 1 and "plans must be kept in a directory" in done.stderr


def leaves():
    return [random(B, H, L, D).requires_grad_() for _ in range(3)]


def step(function, tensors, dout):
    out = function(*tensors, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def test_a_step_seen_before_asks_the_driver_for_launches_alone(monkeypatch):
    """Also in autograd's thread, which has no context of CUDA before it is given one."""
    tensors, dout = leaves(), random(B, H, L, D)
    wanted = [step(OURS, tensors, dout) for _ in range(3)][-1]
    asked, call = [], driver.call
    monkeypatch.setattr(driver, "call", lambda name, *arguments: (asked.append(name), call(name, *arguments))[1])
    found = step(OURS, tensors, dout)
    assert asked == []
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(*tensors, is_causal=True), atol=0.02, rtol=0.02)


def test_forwards_of_two_streams_write_statistics_to_the_same_memory():
    inputs = [[random(B, H, L, D) for _ in range(3)] for _ in range(2)]
    wanted = [OURS(*tensors, is_causal=True) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(50):
        for tensors, stream, outs in zip(inputs, streams, found):
            with torch.cuda.stream(stream):
                outs.append(OURS(*tensors, is_causal=True))
    torch.cuda.synchronize()
    assert all(torch.equal(out, x) for x, outs in zip(wanted, found) for out in outs)


def test_a_compiled_program_calls_operators_that_are_known(quiet):
    tensors, dout = leaves(), random(B, H, L, D)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x, **options: OURS(*x, **options), fullgraph=True, backend="aot_eager")
    results = [step(compiled, tensors, dout) for _ in range(4)]
    assert repeated._forwards and repeated._backwards
    for a, b in zip(results[-1], step(OURS, tensors, dout), strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
