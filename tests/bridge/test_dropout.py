"""The seed of dropout is drawn once for a forward and its backward, whatever compiles, maps or recomputes them."""

import shutil

import pytest
import torch
import torch._functorch.config as functorch_config
from torch.utils.checkpoint import checkpoint

from bridge.problems import OURS, qkv

SHAPE = (2, 4, 48, 16)
DROPOUT = 0.4


def attention(q, k, v):
    return OURS(q, k, v, dropout_p=DROPOUT, is_causal=True)


def compiled(function):
    return torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)


def seeded(function, *tensors):
    torch.manual_seed(7)
    return function(*tensors)


PARTITIONERS = [{}, *({"activation_memory_budget": budget} for budget in (0.9, 0.7, 0.5, 0.2, 1e-6)),
                {"aggressive_recomputation": True}]


@pytest.mark.parametrize("config", PARTITIONERS, ids=str)
@pytest.mark.parametrize("function", [attention, lambda q, k, v: attention(q.sin(), k.cos(), v).tanh()],
                         ids=["alone", "between others"])
def test_a_partitioner_does_not_draw_again(config, function, quiet):
    """The backward drew other numbers than the forward (pytorch #190717)."""
    tensors, dout = qkv(SHAPE, SHAPE, SHAPE), torch.randn(SHAPE)
    with functorch_config.patch(**config):
        out = seeded(compiled(function), *tensors)
        grads = torch.autograd.grad(out, tensors, dout)
    expected = seeded(function, *tensors)
    torch.testing.assert_close(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, tensors, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_out_is_linear_in_value_also_when_recomputed(quiet):
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    dout = torch.randn(SHAPE)
    with functorch_config.patch(activation_memory_budget=0.5):
        out = compiled(attention)(q, k, v)
        out.backward(dout)
    torch.testing.assert_close((out * dout).sum(), (v * v.grad).sum())


def test_a_budget_of_nothing_is_refused_in_training_alone(quiet):
    """There the partitioner saves inputs alone, whatever is marked; torch's own dropout is wrong with it, too."""
    tensors = qkv(SHAPE, SHAPE, SHAPE)
    with functorch_config.patch(activation_memory_budget=0.0):
        with pytest.raises(Exception, match="activation_memory_budget above 0"):
            compiled(attention)(*tensors)
        with torch.no_grad():
            torch.testing.assert_close(seeded(compiled(attention), *tensors), seeded(attention, *tensors))


def test_a_checkpoint_in_a_compiled_function(quiet):
    def function(*tensors):
        return checkpoint(lambda *x: attention(*x).sin(), *tensors, use_reentrant=False)
    tensors = qkv(SHAPE, SHAPE, SHAPE)
    results = []
    for f in (compiled(function), function):
        out = seeded(f, *tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


HAS_COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param(
    "inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"))])
def test_compiled_and_eager_drop_alike(backend, quiet):
    tensors = qkv(SHAPE, SHAPE, SHAPE, requires_grad=False)
    ours = seeded(torch.compile(attention, backend=backend, fullgraph=True), *tensors)
    torch.testing.assert_close(ours, seeded(attention, *tensors))
    assert not torch.allclose(ours, attention(*tensors))


def test_a_call_draws_what_torchs_randint_draws():
    """The state of the generator after a call does not depend on the way that it took."""
    tensors = qkv(SHAPE, SHAPE, SHAPE)

    def state(call):
        seeded(call, *tensors)
        return torch.get_rng_state()
    expected = state(lambda *_: torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32))
    assert torch.equal(state(attention), expected)
    assert torch.equal(state(lambda q, k, v: attention(q.as_subclass(Tagged), k, v)), expected)
    assert not torch.equal(state(lambda *_: None), expected)


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("is_closed_over", [False, True])
@pytest.mark.parametrize("outer, inner, numbers", [
    ("same", "same", (1, 1, 1)), ("same", "different", (1, 3, 3)), ("different", "same", (2, 1, 2)),
    ("different", "different", (2, 3, 6))])
def test_vmaps_in_vmaps_draw_as_they_were_told(outer, inner, numbers, is_closed_over):
    """How many different results there are along the outer axis, along the inner, and in all."""
    q = torch.randn(1, 2, 8, 4)
    call = lambda x: OURS(*(q + 0 * x.sum() if is_closed_over else x,) * 3, dropout_p=0.5)
    outs = torch.vmap(torch.vmap(call, randomness=inner), randomness=outer)(q.expand(2, 3, *q.shape))
    found = (outs[:, 0], outs[0], outs.flatten(0, 1))
    assert tuple(len({str(out.tolist()) for out in some}) for some in found) == numbers
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(call)(q.expand(2, *q.shape))


def test_a_compiled_vmap_does_not_draw_again(quiet):
    def function(x):
        return torch.vmap(lambda x: OURS(x, x, x, dropout_p=0.5), randomness="different")(x)
    x, dout = torch.randn(3, 1, 2, 8, 4, requires_grad=True), torch.randn(3, 1, 2, 8, 4)
    with functorch_config.patch(activation_memory_budget=0.3):
        ours = torch.autograd.grad(seeded(compiled(function), x), x, dout)
    torch.testing.assert_close(ours, torch.autograd.grad(seeded(function, x), x, dout))


def test_export_and_meta_tensors(quiet):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)
    tensors = qkv(SHAPE, SHAPE, SHAPE, requires_grad=False)
    program = torch.export.export(Module(), tuple(tensors))
    assert [node.target for node in program.graph.nodes].count(torch.ops.pallas_flash.dropout_seed.default) == 1
    torch.testing.assert_close(seeded(program.module(), *tensors), seeded(attention, *tensors))
    assert attention(*(x.to("meta") for x in tensors)).shape == SHAPE


def test_opcheck_of_the_seed(quiet):
    torch.library.opcheck(torch.ops.pallas_flash.dropout_seed.default, (torch.randn(SHAPE), (3,)),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in torch.ops.pallas_flash.dropout_seed.default.tags
