"""Compiled models on a GPU: our kernels inside PyTorch's CUDA graphs, and packages compiled ahead of time."""

import collections

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bridge.gpt import Block
from bridge.test_direct_compile import package, package_where_it_runs

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def default(monkeypatch, quiet):
    monkeypatch.delenv("PALLAS_FLASH_DIRECT", raising=False)
    torch.compiler.reset()


def happened(step):
    """How often each thing happened on the host and the GPU."""
    for _ in range(2):  # a process' first profile may miss kernels
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            step()
            torch.cuda.synchronize()
    return collections.Counter(event.name for event in profiler.events())


@pytest.mark.parametrize("dynamic", [False, True])
def test_our_kernels_are_in_the_graphs_of_a_compiled_training_step(dynamic, quiet):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(128, 2), Block(128, 2)).to("cuda", BF16)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=dynamic)

    def step(function, x):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        out = function(x)
        out.float().square().mean().backward()
        return out.detach().clone(), [p.grad.clone() for p in model.parameters()]

    for length in (256, 320) if dynamic else (256,):
        for seed in range(5):  # the first ones warm up and record
            torch.manual_seed(seed)
            x = torch.randn(2, length, 128, device="cuda", dtype=BF16)
            found, wanted = step(compiled, x), step(model, x)
            for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
                assert ((a.double() - b.double()).norm() / b.double().norm()).item() < 2e-2
        names = happened(lambda x=x: step(compiled, x))
        launches = {name: n for name, n in names.items() if "Launch" in name and "Kernel" in name}
        assert names["cudaGraphLaunch"] == 2, names  # one for the forward, one for the backward
        assert sum(n for name, n in names.items() if "mosaic" in name) >= 2 * 4, names
        assert "cuLaunchKernelEx" not in launches, launches  # ours are launched by no one but the graphs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_whole_training_step_in_a_cuda_graph(dropout):
    """Forward, backward and optimizer: replayed on new inputs, the losses are those of the same steps without a graph,
    whose generator starts at the same seeds.
    """
    def trained(captures):
        torch.manual_seed(0)
        model = torch.nn.Sequential(Block(128, 2, dropout), Block(128, 2, dropout)).to("cuda", BF16)
        optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.zeros(2, 200, 128, device="cuda", dtype=BF16)

        def step():
            optimizer.zero_grad(set_to_none=False)
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()
        side, state = torch.cuda.Stream(), {name: y.clone() for name, y in model.state_dict().items()}
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captures:
            with torch.cuda.graph(graph):
                loss = step()
        model.load_state_dict(state)
        for seed in range(10):
            x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
            torch.cuda.manual_seed(seed)
            if captures:
                graph.replay()
                yield loss.item()
            else:
                yield step().item()

    torch.testing.assert_close([*trained(True)], [*trained(False)], rtol=2e-2, atol=1e-3)


def test_an_exported_model_runs_in_a_new_process(tmp_path):
    assert package("cuda", tmp_path, ("export", "load")) == ["False"], "JAX was imported: a call went through DLPack"


def test_a_package_compiled_ahead_of_time_runs_in_a_new_process(tmp_path):
    """See `package_where_it_runs`."""
    assert package_where_it_runs("cuda", tmp_path) == ["False"], "JAX was imported: a call went through DLPack"
