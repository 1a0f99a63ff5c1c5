"""Attention to a cache in graphs that torch traces: which operators they hold, what is written in place, and numbers,
on the stand-ins of test_direct_decode.py.
"""

import contextlib

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from bridge.test_direct import BF16, launched  # noqa: F401
from bridge.test_direct_decode import HKV, HQ, LENGTHS, B, cache_of, decoded, integers, new  # noqa: F401
from torch_bridge import cached
from torch_bridge.direct import attention, decoding
from torch_bridge.flash_attn import flash_attn_with_kvcache

KERNELS = torch.ops.pallas_flash
DIRECT, APPEND = KERNELS.attention_to_cache_direct.default, KERNELS.append_to_cache.default
UNSAFE = torch.Tag.cudagraph_unsafe


def targets_of(function, *args, dynamic=None, **keywords):
    """Our operators in the graph that a compiler gets of a function, and what it returns compiled."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward
    torch._dynamo.reset()
    found = torch.compile(function, fullgraph=True, dynamic=dynamic,
                          backend=aot_autograd(fw_compiler=keep))(*args, **keywords)
    graph, = graphs
    named = [*(node.target for node in graph.nodes), *(node.args[0] for node in graph.nodes if node.args)]
    return [x for x in named if "pallas_flash." in str(x) and isinstance(x, torch._ops.OpOverload)], found


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": contextlib.nullcontext}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_is_one_graph_that_holds_the_kernel(decoded, quiet, mode, dynamic):  # noqa: F811
    """Append and attend: nothing that may not be in a CUDA graph, and caches written in place."""
    def step(q, keys, values, k, v, lengths):
        return flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, causal=True,
                                       return_softmax_lse=True)
    (keys, values), q, k, v = cache_of(), new(1), new(1, HKV), new(1, HKV)
    copies = keys.clone(), values.clone()
    with MODES[mode]():
        targets, found = targets_of(step, q, keys, values, k, v, LENGTHS, dynamic=dynamic)
        wanted = step(q, *copies, k, v, LENGTHS)
    assert sorted(targets, key=str) == [APPEND, APPEND, DIRECT] and not any(UNSAFE in x.tags for x in targets)
    assert decoded == ["decode"] * 2
    for a, b in zip((keys, values, *found), (*copies, *wanted), strict=True):
        assert torch.equal(a, b) and a.is_contiguous() == b.is_contiguous()


CASES = {
    "pages": dict(block_table=integers(7, 1, -5, 3, 99, 99, 0, 8, 4).view(3, 3)),
    "rows": dict(cache_batch_idx=integers(4, 0, 2)),
    "padding, alibi": dict(cache_leftpad=integers(1, 0, 2), causal=True, alibi_slopes=torch.rand(HQ)),
    "window, softcap": dict(window_size=(6, 0), softcap=2.0, softmax_scale=0.3),
    "rotary": dict(rotary_cos=torch.rand(64, 4), rotary_sin=torch.rand(64, 4), causal=True),
}


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_cache(decoded, quiet, monkeypatch, name, direct):  # noqa: F811
    """With the direct path off, it is attention with lengths as before."""
    if not direct:
        monkeypatch.setenv(attention.VARIABLE, "0")
    arguments = CASES[name]
    rows, room = (9, 16) if name == "pages" else (5, 48) if name == "rows" else (B, 48)
    keys, values = cache_of(rows, room)
    lengths, q, k, v = integers(17, 3, 40), new(1), new(1, HKV), new(1, HKV)
    copies = keys.clone(), values.clone()
    step = lambda q, keys, values, k, v, n: flash_attn_with_kvcache(
        q, keys, values, k, v, cache_seqlens=n, return_softmax_lse=True, **arguments)
    with torch.no_grad():
        targets, found = targets_of(step, q, keys, values, k, v, lengths)
        wanted = step(q, *copies, k, v, lengths)
    assert (DIRECT in targets, decoded) == (direct, ["decode"] * (2 * direct))
    assert all(map(torch.equal, (keys, values), copies))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def test_a_cache_that_is_a_part_of_a_tensor_is_written_in_place(decoded, quiet):  # noqa: F811
    layers = torch.randn(2, 2, B, 48, HKV, 16, dtype=BF16)
    q, k, v, before = new(1), new(1, HKV), new(1, HKV), layers.clone()

    def step(q, layers, k, v, lengths):
        return [flash_attn_with_kvcache(q, *layer, k, v, cache_seqlens=lengths) for layer in layers.unbind(0)]
    with torch.no_grad():
        _, found = targets_of(step, q, layers, k, v, LENGTHS)
        wanted = step(q, before, k, v, LENGTHS)
    assert torch.equal(layers, before) and all(map(torch.equal, found, wanted)) and decoded == ["decode"] * 4


def test_what_the_kernel_does_not_take_is_attention_with_lengths(decoded, quiet):  # noqa: F811
    """What its shapes say is in the graph; what only its addresses say is found when it runs."""
    (keys, values), q = cache_of(), new(1)
    step = lambda q, keys, values, n: flash_attn_with_kvcache(q, keys, values, cache_seqlens=n)
    odd = q[..., :12], keys[..., :12], values[..., :12]
    with torch.no_grad():
        targets, found = targets_of(step, *odd, LENGTHS)
        assert DIRECT not in targets and len(targets) == 1
        torch.testing.assert_close(found, step(*odd, LENGTHS), atol=1e-2, rtol=1e-2)
        memory = torch.cat((keys.flatten(), values.flatten(), keys.new_zeros(8)))
        start = (2 - memory.data_ptr()) % 16 // 2
        size = keys.numel()
        moved = [memory[start + i * size:][:size].view(keys.shape) for i in range(2)]
        del decoded[:]
        targets, found = targets_of(step, q, *moved, LENGTHS)
        assert targets == [DIRECT] and "decode" not in decoded
        torch.testing.assert_close(found, step(q, *moved, LENGTHS), atol=1e-2, rtol=1e-2)


def call_of(q_len=1, **changes):
    """A call as the operator takes it, heads first."""
    query, key, value = (x.transpose(1, 2) for x in (new(q_len), *cache_of()))
    return decoding.Call(query, key, value, LENGTHS, **changes), decoding.Rules(7, 0, None, None)


def test_the_operator_has_derivatives_and_maps_where_something_asks(decoded, quiet):  # noqa: F811
    call, rules = call_of(sinks=torch.randn(HQ))
    with torch.no_grad():
        wanted, lse = cached.attend_traced(call, rules)
        assert decoded == ["decode"] and lse.shape == (B, HQ, 1)
        queries = torch.stack((call.query, -call.query))
        mapped = torch.vmap(lambda q: cached.attend_traced(call._replace(query=q), rules, False)[0])(queries)
        other, _ = cached.attend_traced(call._replace(query=-call.query), rules)
    assert decoded == ["decode"] * 4, "a launch for each that is mapped"
    torch.testing.assert_close(mapped, torch.stack((wanted, other)), atol=2e-2, rtol=2e-2)
    query = call.query.detach().requires_grad_()
    out, _ = cached.attend_traced(call._replace(query=query), rules, False)
    grad, = torch.autograd.grad(out.float().sum(), query)
    assert grad.isfinite().all() and grad[0].any() and "backward" in decoded


def test_opcheck(decoded, quiet):  # noqa: F811
    call, rules = call_of()
    torch.library.opcheck(DIRECT, (*call, *rules))
    torch.library.opcheck(APPEND, (cache_of()[0], new(1, HKV), torch.tensor([[3], [50], [99]])))


def test_appending_is_a_new_version_of_the_cache():
    keys, new_keys = cache_of()[0], new(2, HKV)
    before = keys._version
    KERNELS.append_to_cache(keys, new_keys, torch.tensor([[0, 1], [48, 49], [142, 143]]))
    assert keys._version > before and torch.equal(keys[1, :2], new_keys[1]) and torch.equal(keys[2, -2:], new_keys[2])
