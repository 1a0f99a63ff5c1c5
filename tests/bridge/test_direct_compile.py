"""Calls on the direct path in graphs that torch traces, and where its own machinery wraps models: compiled, exported,
packaged, in CUDA graphs, checkpointed, sharded.

On the stand-ins of test_direct.py, and as far as JAX computes it on CPU tensors.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from bridge.gpt import Block
from bridge.problems import OURS, operator_call, qkv
from bridge.test_direct import BF16, BOTH, launched
from torch_bridge import ops
from torch_bridge.direct import attention, cache
from torch_bridge.direct.parent import NoPlanError

__all__ = ["launched"]  # a fixture

ROOT = Path(__file__).parents[2]
KERNELS = torch.ops.pallas_flash
UNSAFE = torch.Tag.cudagraph_unsafe


def graphs_of(function, *args, dynamic=False):
    """The graphs that a compiler gets of a function and of its backward, and the results of both."""
    graphs = []

    def keep(module, inputs):
        graphs.append([node.target for node in module.graph.nodes if "pallas_flash" in str(node.target)])
        return module.forward
    from torch._dynamo.backends.common import aot_autograd
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic,
                             backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    out = compiled(*args)
    grads = torch.autograd.grad(out, args, torch.ones_like(out)) if out.requires_grad else ()
    return graphs, (out, *grads)


def causal(q, k, v):
    return OURS(q, k, v, is_causal=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_traced_call_may_be_in_a_cuda_graph_if_it_goes_directly(launched, quiet, dynamic):
    tensors = qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16)
    graphs, found = graphs_of(causal, *tensors, dynamic=dynamic)
    assert graphs == [[KERNELS.attention_direct.default], [KERNELS.attention_backward_direct.default]]
    assert not any(UNSAFE in target.tags for graph in graphs for target in graph)
    out = causal(*tensors)
    for a, b in zip(found, (out, *torch.autograd.grad(out, tensors, torch.ones_like(out))), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert launched == BOTH * 2


def test_plans_are_loaded_when_a_call_of_known_sizes_is_traced(launched, quiet, monkeypatch):
    """Also under a mode of torch, and what is kept then is no fake tensor."""
    tensors, asked = qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16), []
    find = cache.find

    def asking(request, index):
        asked.append(request.pass_name)
        return find(request, index)
    monkeypatch.setattr(cache, "find", asking)
    torch._dynamo.reset()
    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
    out = compiled(*tensors)
    assert asked == BOTH and launched == ["forward"]
    out.sum().backward()
    assert asked == BOTH and launched == BOTH
    assert all(type(x._zeros) is torch.Tensor for x in attention._directs.values())


@pytest.mark.parametrize("why", ["variable", "plan", "dtype"])
def test_other_calls_stay_outside(launched, quiet, monkeypatch, why):
    tensors = qkv(*[(2, 2, 6, 8)] * 3, dtype=torch.float32 if why == "dtype" else BF16)
    said = contextlib.nullcontext()
    if why == "variable":
        monkeypatch.setenv(attention.VARIABLE, "0")
    if why == "plan":
        def refuse(request, index):
            raise NoPlanError("needs another JAX")
        monkeypatch.setattr(cache, "find", refuse)
        said = pytest.warns(UserWarning, match="needs another JAX")
    with said:
        graphs, _ = graphs_of(causal, *tensors)
    assert graphs == [[KERNELS.attention.default], [KERNELS.attention_backward.default]] and launched == []
    assert all(UNSAFE in target.tags for graph in graphs for target in graph)


def test_the_direct_operators_are_the_same_operators(launched):
    for name in ("attention", "attention_backward"):
        ours, direct = (getattr(KERNELS, name + suffix).default for suffix in ("", "_direct"))
        assert str(direct._schema).replace("_direct(", "(") == str(ours._schema)
        assert {*ours.tags} - {*direct.tags} == {UNSAFE}
    q, k, v = (x.detach() for x in qkv(*[(2, 2, 6, 8)] * 3, dtype=BF16))
    operands, numbers = operator_call(q, k, v, causal_offset=0)
    wanted = ops.attention(*operands, *numbers, True)
    assert all(map(torch.equal, ops.attention_direct(*operands, *numbers, True), wanted))
    q.requires_grad_()
    (dq,) = torch.autograd.grad(ops.attention_direct(*operands, *numbers, True)[0].sum(), q)
    assert torch.equal(dq, torch.autograd.grad(ops.attention(*operands, *numbers, True)[0].sum(), q)[0])
    mapped = torch.vmap(lambda q: ops.attention_direct(q, *operands[1:], *numbers, False)[0])(q.detach()[None])
    assert torch.equal(mapped[0], wanted[0])


def test_opcheck(quiet):
    operands, numbers = operator_call(*qkv(*[(2, 2, 6, 8)] * 3), causal_offset=0)
    torch.library.opcheck(ops.attention_direct, (*operands, *numbers, True))


def test_what_is_exported_holds_the_operator_that_may_be_captured(launched, quiet):
    x, model = torch.randn(2, 6, 32, dtype=BF16), Block().to(BF16).eval()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
        decomposed = program.run_decompositions()
        targets = [node.target for node in decomposed.graph.nodes if "pallas_flash" in str(node.target)]
        assert targets == [KERNELS.attention_direct.default]
        for length in (6, 9):
            x = torch.randn(2, length, 32, dtype=BF16)
            torch.testing.assert_close(decomposed.module()(x), model(x))


def test_a_checkpoint_and_a_compiled_checkpoint(launched, quiet):
    torch.manual_seed(0)
    x, model = torch.randn(2, 6, 32, dtype=BF16, requires_grad=True), Block().to(BF16)
    kept = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    for function in (kept, kept, torch.compile(kept, fullgraph=True, backend="aot_eager")):
        del launched[:]
        (found,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(found, wanted)
        assert launched == ["forward", "forward", "backward"]


class DiedError(AssertionError):
    """A process ended by a signal, or not at all: not by an error of Python's."""


def package(device, folder, ways=("make", "run"), whose="ours"):
    """A small GPT compiled ahead of time by one process, and run by another, which imports nothing of the first.

    Args:
      whose: attention, "ours" or "torch"'s.
    """
    # A pool of processes, each of which imports torch, takes longer than the few kernels.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for way in ways:
        done = subprocess.run([sys.executable, Path(__file__).with_name("package_worker.py"), way, device, whose,
                               folder / f"{whose}.pt2"], capture_output=True, text=True, env=environment)
        if done.returncode < 0 or "Timeout (" in done.stderr:  # the latter: faulthandler's, of package_worker.py
            raise DiedError(f"{way}: code {done.returncode} after {done.stdout!r}\n{done.stderr[-4000:]}")
        assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


def package_where_it_runs(device, folder):
    """Where the process dies of a signal or hangs, and that of a package of PyTorch's own attention does, too, it is
    not ours to mend: on one machine what its compiler made of a model died in PyTorch's loader.
    """
    try:
        return package(device, folder)
    except DiedError as error:
        try:
            package(device, folder, whose="torch")
        except DiedError as its:
            pytest.skip(f"a package of PyTorch's own attention dies or hangs as well: {its}; ours: {error}")
        raise


def test_a_package_compiled_ahead_of_time_runs_in_a_new_process(tmp_path):
    """Of lengths that vary; on a CPU the call goes through DLPack. On a GPU: test_compile_gpu.py."""
    assert package_where_it_runs("cpu", tmp_path) == ["True"]


@pytest.mark.parametrize("dies", [("ours",), ("ours", "torch"), ()])
def test_only_where_pytorchs_own_package_dies_is_ours_excused(dies, monkeypatch):
    def stand_in(device, folder, ways=("make", "run"), whose="ours"):
        if whose in dies:
            raise DiedError(whose)
        return ["True"]
    monkeypatch.setitem(globals(), "package", stand_in)
    wanted = {(): contextlib.nullcontext(), ("ours",): pytest.raises(DiedError, match="ours"),
              ("ours", "torch"): pytest.raises(pytest.skip.Exception, match="torch; ours: ours")}
    with wanted[dies]:
        assert package_where_it_runs("cuda", None) == ["True"]
