"""What PyTorch asks of an operator: opcheck, compile, export, fake and meta tensors, vmap, both import orders."""

import os
import runpy
import subprocess
import sys
import textwrap

import jax
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right

import torch_bridge
from bridge.problems import OURS, TORCH, heads_inside, operator_call, qkv, results
from torch_bridge import activation, context, exchange, memory, ops, patching

Q, KV = (2, 4, 5, 8), (2, 4, 7, 8)
KERNELS = torch.ops.pallas_flash


def run(code, environment=None):
    """Runs code in a new process; it must end well and write no warning."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=250, env=environment)
    assert done.returncode == 0, done.stderr


# --- import ----------------------------------------------------------------------------------------------------------


def test_operators_exist_without_jax_and_torch_may_come_first():
    environment = {name: value for name, value in os.environ.items() if name not in memory.CHOICES}
    run("""
        import os, sys, torch, torch_bridge
        assert not {"jax", "pallas_flash", "transformers"} & set(sys.modules)
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        x = torch.empty(2, 3, 5, 4, device="meta", requires_grad=True)
        torch_bridge.scaled_dot_product_attention(x, x, x).sum().backward()
        assert "jax" not in sys.modules and x.grad.shape == x.shape
        x = torch.ones(1, 1, 2, 4)
        assert torch_bridge.scaled_dot_product_attention(x, x, x).sum().item() == 8
        import jax
        assert jax.numpy.ones(8).sum() == 8
        """, environment)


def test_jax_may_come_first():
    run("""
        import jax
        assert jax.numpy.ones(8).sum() == 8
        import torch, torch_bridge
        x = torch.ones(1, 1, 2, 4)
        assert torch_bridge.scaled_dot_product_attention(x, x, x).sum().item() == 8
        """)


@pytest.fixture
def nothing_chosen(monkeypatch):
    for name in memory.CHOICES:
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what the test sets
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", [None, *memory.CHOICES])
def test_preallocation_is_switched_off_unless_chosen(name, nothing_chosen, monkeypatch):
    monkeypatch.setattr(memory, "_preallocated", list)
    if name is not None:
        monkeypatch.setenv(name, "true")
    memory.share_with_torch()
    assert os.environ.get(memory.CHOICES[0]) == {None: "false", memory.CHOICES[0]: "true"}.get(name)


def test_a_late_import_warns_with_numbers(nothing_chosen, monkeypatch):
    monkeypatch.setattr(memory, "_preallocated", lambda: [("cuda:0", 59.4)])
    with pytest.warns(UserWarning, match=r"reserved 59\.4 GiB on cuda:0"):
        memory.share_with_torch()


@pytest.fixture
def made_current(monkeypatch):
    """What becomes torch's current device, on a machine with two GPUs, of which the second is current."""
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return found


def gpus_seen(monkeypatch, *counts):
    """JAX runs with so many GPUs, each time it is asked."""
    counts = list(counts)
    monkeypatch.setattr(memory, "running_gpus", lambda: [object()] * (counts.pop(0) if len(counts) > 1 else counts[0]))


@pytest.mark.parametrize(("counts", "initialized", "expected"), [
    ((0, 2), True, [1]), ((0, 2), False, [0]),  # JAX starts
    ((2, 2), True, []), ((0, 1), True, []), ((0, 0), False, [])])  # it ran already, or sees one GPU, or none
def test_starting_jax_leaves_torchs_current_device(counts, initialized, expected, made_current, monkeypatch):
    gpus_seen(monkeypatch, *counts)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    assert exchange.jax_device.__wrapped__(torch.device("cpu")).platform == "cpu"
    assert made_current == expected


@pytest.mark.parametrize(("count", "bad_fork", "expected"), [(2, False, [0]), (2, True, []), (0, False, [])])
def test_an_import_after_the_start_of_jax_makes_the_first_device_current(count, bad_fork, expected, made_current,
                                                                         monkeypatch):
    gpus_seen(monkeypatch, count)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: bad_fork)
    context.undo_start_of_jax()
    assert made_current == expected


def test_running_gpus_are_none_without_a_gpu():
    jax.local_devices()
    assert len(memory.running_gpus()) == sum(device.platform == "gpu" for device in jax.local_devices())


def test_the_diagnosis(capsys):
    runpy.run_module("torch_bridge", run_name="__main__")
    text = capsys.readouterr().out
    for expected in ("torch 2.", "jax 0.", "ptxas", "XLA_FLAGS", "for tensors on cpu", "implementation="):
        assert expected in text


# --- contracts -------------------------------------------------------------------------------------------------------


def problem(kind, dtype=torch.float32):
    q, k, v = qkv(Q, KV, KV, dtype=dtype)
    mask = bias = seed = None
    offset, dropout = 0, 0.0
    if kind == "masked":
        mask, offset = torch.rand(2, 1, 5, 7) > 0.3, None
        bias = torch.randn(1, 4, 1, 7, dtype=dtype, requires_grad=True)
    if kind == "dropout":
        q, seed, dropout = heads_inside(q), torch.tensor([3, -4], dtype=torch.int32), 0.4
    operands, numbers = operator_call(q, k, v, mask=mask, bias=bias, seed=seed, causal_offset=offset, dropout_p=dropout)
    return [*operands, *numbers]


@pytest.mark.parametrize("kind", ["causal", "masked", "dropout"])
def test_opcheck(kind, quiet):
    args = problem(kind)
    torch.library.opcheck(KERNELS.attention.default, (*args, True))
    args = [x.detach() if torch.is_tensor(x) else x for x in args]
    torch.library.opcheck(KERNELS.attention.default, (*args, False))


def test_opcheck_of_the_backward(quiet):
    args = [x.detach() if torch.is_tensor(x) else x for x in problem("masked")]
    out, lse = ops.attention(*args, True)
    for needs in ([True] * 5, [False, True, False, False, False]):
        torch.library.opcheck(KERNELS.attention_backward.default, (*args, out, lse, torch.randn_like(out), None, needs))


def test_opcheck_of_the_double_backward(quiet):
    args = [x.detach() if torch.is_tensor(x) else x for x in problem("causal", torch.float64)]
    tensors = (*[torch.randn_like(x) for x in args[:3]], None, None, torch.randn(Q, dtype=torch.float64), None)
    torch.library.opcheck(KERNELS.attention_double_backward.default, (*args, *tensors),
                          test_utils=("test_schema", "test_faketensor"))


def test_lse_is_differentiable():
    q, k, *rest = problem("causal", torch.float64)
    function = lambda q, k: ops.attention(q, k, *rest, True)[1]
    assert torch.autograd.gradcheck(function, (q, k), fast_mode=True)


def test_fake_strides_are_the_real_ones():
    for tensors in ([heads_inside(x) for x in qkv(Q, KV, KV)], qkv(Q, KV, KV), qkv((2, 1, 5, 8), KV, KV)):
        tensors = [x.detach() for x in tensors]
        with FakeTensorMode() as mode:
            fake = OURS(*(mode.from_tensor(x) for x in tensors))
        assert fake.stride() == OURS(*tensors).stride() == OURS(*(x.to("meta") for x in tensors)).stride()


# --- torch.compile, export -------------------------------------------------------------------------------------------


def test_compile_is_the_first_call_of_a_process_and_trains():
    run("""
        import sys, warnings, torch, torch.nn.functional as F
        warnings.simplefilter("default")  # the compiler's own deprecations are not ours
        import torch_bridge
        torch.manual_seed(0)

        class Block(torch.nn.Module):
            def __init__(self, attention):
                super().__init__()
                self.attention, self.qkv = attention, torch.nn.Linear(16, 48)
            def forward(self, x):
                q, k, v = self.qkv(x).view(2, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
                return x + self.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        def losses(attention, compile):
            torch.manual_seed(1)
            block = Block(attention)
            step = torch.compile(block, fullgraph=True) if compile else block
            optimizer, x = torch.optim.SGD(block.parameters(), 0.5), torch.randn(2, 9, 16)
            for _ in range(3):
                optimizer.zero_grad()
                loss = step(x).square().mean()
                loss.backward()
                optimizer.step()
                yield loss.item()

        assert "jax" not in sys.modules
        ours = list(losses(torch_bridge.scaled_dot_product_attention, True))
        theirs = list(losses(F.scaled_dot_product_attention, False))
        assert max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-5, (ours, theirs)
        """)


def test_compile_with_dynamic_shapes_masks_and_causal_bias(quiet):
    bias = causal_lower_right(5, 7)
    for function in (lambda q, k, v: OURS(q, k, v, bias),
                     lambda q, k, v: OURS(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(2))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        q, k, v = qkv(Q, KV, KV)
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    torch.testing.assert_close(compiled(q[:, :2, :4], k[:, :2], v[:, :2]), function(q[:, :2, :4], k[:, :2], v[:, :2]))


@pytest.mark.parametrize("function", [OURS, torch_bridge.flash_attention, torch_bridge.flash_attn.flash_attn_func,
                                      patching.scaled_dot_product_attention],
                         ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_dynamic_shapes_compile_once(function, quiet):
    """A default of 0.0 was a symbol, so that the compiler began once more when it turned out to be a constant."""
    starts = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        starts.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    with torch_bridge.patched():
        for length in (6, 7):
            tensors = torch.randn(3, 2, length, length, 8)
            torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert len(starts) == 1


def test_compile_under_autocast_with_dropout_and_determinism(quiet):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return OURS(q, k, v, dropout_p=0.5)
    torch.use_deterministic_algorithms(True)
    try:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        outs = []
        for _ in range(2):
            torch.manual_seed(0)
            outs.append(compiled(*qkv(Q, KV, KV, requires_grad=False)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert outs[0].dtype == torch.bfloat16 and torch.equal(*outs)


def test_export(quiet):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return OURS(q, k, v, is_causal=True)
    tensors = qkv(Q, KV, KV, requires_grad=False)
    program = torch.export.export(Module(), tuple(tensors))
    assert any(node.target is KERNELS.attention.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), OURS(*tensors, is_causal=True))


# --- torch.func ------------------------------------------------------------------------------------------------------


def loop(function, *tensors):
    return torch.stack([function(*xs) for xs in zip(*tensors, strict=True)])


def test_vmap():
    q, k, v = qkv((3, *Q), (3, *KV), (3, *KV), requires_grad=False)
    mask = torch.randn(5, 7)
    function = lambda q, k, v: OURS(q, k, v, mask)
    torch.testing.assert_close(torch.vmap(function)(q, k, v), loop(function, q, k, v))
    shared = lambda q: OURS(q, k[0], v[0], mask)
    mapped = torch.vmap(shared, in_dims=2, out_dims=1)(q.movedim(0, 2))
    torch.testing.assert_close(mapped, loop(shared, q).movedim(0, 1))


def test_vmap_with_dropout_is_drawn_element_by_element():
    q, k, v = qkv((3, *Q), (3, *KV), (3, *KV), requires_grad=False)
    same = torch.vmap(lambda q, k, v: OURS(q, k, v, dropout_p=0.5), randomness="same")(
        *(x[:1].expand_as(x) for x in (q, k, v)))
    assert torch.equal(same[0], same[1])
    different = torch.vmap(lambda q, k, v: OURS(q, k, v, dropout_p=0.5), randomness="different")(
        *(x[:1].expand_as(x) for x in (q, k, v)))
    assert not torch.equal(different[0], different[1])


def test_gradients_per_sample():
    """vmap(grad) of a fused attention crashed elsewhere (jax #38495)."""
    q, k, v = qkv((3, *Q), (3, *KV), (3, *KV), requires_grad=False)
    bias = torch.randn(3, 1, 5, 7)
    loss = lambda q, k, v, bias: OURS(q, k, v, bias).square().sum()
    ours = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (q, k, v, bias)]
        for a, b in zip(ours, torch.autograd.grad(TORCH(*leaves).square().sum(), leaves), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_second_derivatives_by_torch_func():
    q, k, v = qkv((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3), dtype=torch.float64, requires_grad=False)
    bias = torch.randn(1, 3, 5, dtype=torch.float64)
    loss = lambda q, bias: OURS(q, k, v, bias, enable_gqa=True).square().sum()
    ours = torch.func.jacrev(torch.func.jacrev(loss, argnums=(0, 1)), argnums=(0, 1))(q, bias)
    for row, expected in zip(ours, torch.autograd.functional.hessian(loss, (q, bias)), strict=True):
        for a, b in zip(row, expected, strict=True):
            torch.testing.assert_close(a, b)


# --- activate --------------------------------------------------------------------------------------------------------


def test_activate_needs_cuda_and_a_registry(monkeypatch):
    import torch_bridge
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="sees no CUDA device"):
            torch_bridge.activate()
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match="register_flash_attention_impl"):
        torch_bridge.activate()


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_flash_backends_replacements(is_causal):
    """The functions that `activate` registers, called as the dispatcher would, on CPU tensors."""
    q, k, v = qkv(Q, Q, Q)
    dout = torch.randn(Q)
    expected = results(lambda *x: TORCH(*x, is_causal=is_causal, scale=0.3), (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, _, _, _, _, state, unused, _ = activation._forward(q, k, v, 0.0, is_causal, scale=0.3)
    assert lse.shape == Q[:3] and lse.dtype == torch.float32
    grads = activation._backward(dout, q, k, v, out, lse, None, None, 5, 5, 0.0, is_causal, state, unused, scale=0.3)
    for a, b in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_flash_backends_results_are_those_that_a_compiler_expects(dropout_p):
    """Regression: a stride of lse and the dtype of the seed were others, and what inductor compiled raised."""
    tensors = [x.detach() for x in qkv(Q, Q, Q)]
    expected = torch.ops.aten._scaled_dot_product_flash_attention(*(x.to("meta") for x in tensors), dropout_p, True)
    for i in (1, 6, 7):  # lse, rng_state, unused
        found, meta = activation._forward(*tensors, dropout_p, True)[i], expected[i]
        assert (found.shape, found.stride(), found.dtype) == (meta.shape, meta.stride(), meta.dtype), i


def test_a_copy_of_lse_serves_the_flash_backend():
    """The rest of the statistics lies behind it; a copy comes back without."""
    q, k, v = (x.detach() for x in qkv(Q, Q, Q))
    out, lse, *_, state, unused, _ = activation._forward(q, k, v, 0.5, True)
    found = [activation._backward(torch.ones_like(out), q, k, v, out, x, None, None, 5, 5, 0.5, True, state, unused)
             for x in (lse, lse.clone())]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_lse_of_more_keys_serves_the_flash_backend():
    """Regression: a ring hands out and lse of all keys to the backward of some, which computed its own instead, or took
    the other half of a lse of twice the length for its rest.
    """
    q, k, v = (x.detach() for x in qkv((1, 1, 6, 8), (1, 1, 6, 8), (1, 1, 6, 8)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    truth = results(lambda *x: TORCH(*x)[:, :, 3:], leaves, torch.ones(1, 1, 3, 8))
    out, lse, *_, state, unused, _ = activation._forward(q, k, v)
    out, lse = out[:, :, 3:], lse.clone()[:, :, 3:]
    assert lse.is_contiguous()
    for keys in (slice(0, 2), slice(2, 6)):
        found = activation._backward(torch.ones_like(out), q[:, :, 3:], k[:, :, keys], v[:, :, keys], out, lse, None,
                                     None, 3, keys.stop - keys.start, 0.0, False, state, unused)
        for a, b in zip(found[1:], truth[2:], strict=True):
            torch.testing.assert_close(a, b[:, :, keys])


def test_the_flash_backends_schema_is_the_one_replaced():
    returns = torch.ops.aten._scaled_dot_product_flash_attention.default._schema.returns
    assert len(returns) == len(activation._forward(*(x.detach() for x in qkv(Q, Q, Q)), 0.5, True))
