"""`patched()`, which puts ours where PyTorch's function was and takes it away again, and `report()`, which counts."""

import sys
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import pallas_flash
import torch_bridge
from bridge.problems import TORCH, check, qkv
from torch_bridge import patching, records

SHAPE = (2, 4, 5, 8)


@pytest.fixture(autouse=True)
def from_zero():
    torch_bridge.report(reset=True)
    yield
    assert F.scaled_dot_product_attention is TORCH


def calls(**wanted):
    """How many calls the report counts in rows with these fields."""
    return sum(row.calls for row in torch_bridge.report()
               if all(getattr(row, name) == value for name, value in wanted.items()))


# --- patched ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fast", [True, False])
def test_pytorchs_fast_path_is_not_reached(is_fast):
    """As the docs say: modules in eval mode without gradients bypass the function, until the fast path is off."""
    layer, x = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 7, 16)
    heads = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        with torch_bridge.patched(), torch.no_grad():
            layer(x)
            heads(x, x, x, need_weights=False)
            assert calls(what="forward") == (0 if is_fast else 2)
            heads(x, x, x)
            assert calls(what="forward") == (0 if is_fast else 2)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


def test_an_unchanged_module_runs_ours_and_gives_torchs_numbers():
    module = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)

    def gradient():
        out = module(x, src_mask=torch.ones(7, 7, dtype=torch.bool).triu(1))
        return out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))
    expected = gradient()
    with torch_bridge.patched():
        assert calls() == 0
        torch.testing.assert_close(gradient(), expected)
    assert calls(what="forward") == calls(what="backward") == 1
    gradient()
    assert calls() == 2


def test_contexts_nest_and_end_in_any_order_also_by_an_error():
    outer, inner = torch_bridge.patched(), torch_bridge.patched()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is not TORCH
    inner.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(KeyError), torch_bridge.patched(), torch_bridge.patched():
        raise KeyError


def test_all_threads_see_it_until_the_last_has_left():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with torch_bridge.patched():
            entered.set()
            leave.wait(20)
            seen.append(F.scaled_dot_product_attention)
    thread = threading.Thread(target=other)
    with torch_bridge.patched():
        ours = F.scaled_dot_product_attention
        thread.start()
        assert entered.wait(20)
    assert F.scaled_dot_product_attention is ours
    leave.set()
    thread.join()
    assert seen == [ours]


def test_many_threads_enter_and_leave():
    def work():
        for _ in range(200):
            with torch_bridge.patched():
                assert F.scaled_dot_product_attention is patching.scaled_dot_product_attention
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patching._state.depth == 0


def test_modules_that_imported_the_function_use_ours(monkeypatch):
    before, during = types.ModuleType("before"), types.ModuleType("during")
    exec("from torch.nn.functional import scaled_dot_product_attention", vars(before))
    monkeypatch.setitem(sys.modules, "before", before)
    monkeypatch.setitem(sys.modules, "during", during)
    with torch_bridge.patched():
        exec("from torch.nn.functional import scaled_dot_product_attention", vars(during))
        kept = F.scaled_dot_product_attention
        assert before.scaled_dot_product_attention is during.scaled_dot_product_attention is kept
    assert before.scaled_dot_product_attention is during.scaled_dot_product_attention is TORCH
    q = torch.randn(SHAPE)
    torch.testing.assert_close(kept(q, q, q), TORCH(q, q, q))
    assert calls() == 0, "a function kept from a context that is closed is torch's"
    assert torch._C._nn.scaled_dot_product_attention is TORCH


def test_another_librarys_function_is_put_back(monkeypatch):
    theirs = lambda *args, **kwargs: TORCH(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with torch_bridge.patched():
        F.scaled_dot_product_attention(*qkv(SHAPE, SHAPE, SHAPE))
    assert calls(what="forward") == 1 and F.scaled_dot_product_attention is theirs
    with torch_bridge.patched():  # they replace it while a context is open: theirs stays
        monkeypatch.setattr(F, "scaled_dot_product_attention", TORCH)


def test_arguments_and_errors_are_those_of_the_function():
    q, k, v = qkv(SHAPE, (2, 2, 7, 8), (2, 2, 7, 8))
    with torch_bridge.patched():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=0.3, enable_gqa=True)
        for args, kind in (((q, k, v), RuntimeError), ((q, k, 3), TypeError), ((q, k.double(), v), RuntimeError)):
            with pytest.raises(kind):
                F.scaled_dot_product_attention(*args)
    torch.testing.assert_close(out, TORCH(q, k, v, scale=0.3, enable_gqa=True))


@pytest.fixture
def new_reasons(monkeypatch):
    monkeypatch.setattr(patching._state, "warned", set())


def test_what_ours_does_not_take_is_left_to_torch_and_said_once(new_reasons):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*nested")
        nested = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 5)])
    with torch_bridge.patched():
        with pytest.warns(pallas_flash.FallbackWarning, match="query is nested"):
            out = F.scaled_dot_product_attention(nested, nested, nested)
        F.scaled_dot_product_attention(nested, nested, nested)
    for a, b in zip(out.unbind(), nested.unbind()):
        torch.testing.assert_close(a, TORCH(b, b, b))
    (row,) = torch_bridge.report()
    assert row.calls == 2 and row.implementation == "torch" and "nested" in row.reasons[0]
    with torch_bridge.patched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        patching._state.warned.clear()
        for _ in range(2):
            with pytest.raises(pallas_flash.FallbackWarning):
                F.scaled_dot_product_attention(nested, nested, nested)


def test_jagged_tensors(new_reasons):
    """PyTorch's function knows them by its own identity: in a context, calls failed that it takes."""
    x, offsets = torch.randn(9, 4, 8, requires_grad=True), torch.tensor([0, 4, 9])
    jagged = torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2)
    with torch_bridge.patched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = F.scaled_dot_product_attention
        out = kept(jagged, jagged, jagged)
    (grad,) = torch.autograd.grad(out.values().sum(), x)
    assert calls(what="forward") == calls(what="backward") == 1 and grad.shape == x.shape
    torch.testing.assert_close(kept(*[jagged.detach()] * 3).values(), out.values())
    assert calls() == 2, "outside torch's own runs"
    flat = torch.nested.nested_tensor_from_jagged(x.detach().flatten(1), offsets)
    assert "query has other axes" in patching._reason_against(flat, jagged, jagged)


@pytest.mark.parametrize("attribute", ["device", "placements"])
def test_devices_and_distributed_tensors_are_left_to_torch(attribute):
    class Elsewhere(torch.Tensor):
        placements, device = None, torch.device("mps")
    if attribute == "device":
        del Elsewhere.placements
    x = torch.randn(1).as_subclass(Elsewhere)
    assert patching._reason_against(x, x, x) is not None
    assert patching._reason_against(*[torch.randn(1)] * 3) is None
    assert patching._reason_against(*[torch.empty(1, device="meta")] * 3) is None


def test_a_torch_function_mode_sees_the_call():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))
    seen, (q, k, v) = [], qkv(SHAPE, SHAPE, SHAPE)
    with torch_bridge.patched(), Mode():
        F.scaled_dot_product_attention(q, k, v)
        assert F.scaled_dot_product_attention in seen
    assert calls(what="forward") == 1


def test_torchscript_calls_ours(quiet):
    def causal(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True)
                - F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.5))
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    with torch_bridge.patched():
        scripted = torch.jit.script(causal)
        out = scripted(q, k, v)
        (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert calls(what="forward") == calls(what="backward") == 2
    expected = causal(q, k, v)
    torch.testing.assert_close((out, grad), (expected, *torch.autograd.grad(expected.square().sum(), q)))
    torch.testing.assert_close(scripted(q, k, v), expected)
    assert calls(what="forward") == 2, "after the context it calls torch's"


def test_compiled_in_a_context_and_again_outside(quiet):
    function = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), fullgraph=True,
                             backend="aot_eager")
    q, k, v = qkv(SHAPE, SHAPE, SHAPE)
    expected = TORCH(q, k, v)
    with torch_bridge.patched():
        torch.testing.assert_close(function(q, k, v), expected)
        torch.testing.assert_close(function(q, k, v), expected)
    assert calls(what="forward") == 2
    torch.testing.assert_close(function(q, k, v), expected)
    assert calls(what="forward") == 2


@torch_bridge.patched()
def decorated(*args):
    return F.scaled_dot_product_attention(*args)


def test_it_decorates():
    for n in (1, 2):
        decorated(*qkv(SHAPE, SHAPE, SHAPE))
        assert calls(what="forward") == n


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_names_problem_implementation_and_reasons():
    assert str(torch_bridge.report()) == "nothing has run"
    check(qkv(SHAPE, SHAPE, SHAPE), is_causal=True)
    rows = torch_bridge.report(reset=True)
    assert sorted((row.calls, row.what) for row in rows) == [(1, "backward"), (1, "forward")]
    text = str(rows)
    for expected in ("forward, ", "backward, ", "heads=4:4", "len=5x5", "float32", "not 'hopper': "):
        assert expected in text
    assert torch_bridge.report() == ()


def test_second_derivatives_are_counted():
    q = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(torch_bridge.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    grad.sum().backward()
    assert calls(what="double backward", implementation="reference") == 1


def test_explain_counts_nothing():
    q = torch.randn(SHAPE)
    torch_bridge.explain(q, q, q)
    torch_bridge.scaled_dot_product_attention(*[torch.empty(0, 4, 5, 8)] * 3)
    assert torch_bridge.report() == ()


def test_memory_is_bounded_and_threads_lose_no_count(monkeypatch):
    monkeypatch.setattr(records, "_tallies", {})
    monkeypatch.setattr(records, "MAX_ROWS", 8)
    runs = records.Runs("problem", "xla", {"hopper": ["needs a GPU"], "xla": []})

    def work(n):
        for i in range(500):
            runs.count("forward")
            records.count("forward", "xla", f"problem {n} {i}", ())
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = torch_bridge.report()
    assert len(rows) <= 9 and sum(row.calls for row in rows) == 4000
    assert (2000, "forward", "xla", "problem", ("not 'hopper': needs a GPU",)) in rows
    assert any(row.problem == records.OTHER_PROBLEMS for row in rows)
    torch_bridge.report(reset=True)
    runs.count("forward")
    assert [row.calls for row in torch_bridge.report()] == [1]
