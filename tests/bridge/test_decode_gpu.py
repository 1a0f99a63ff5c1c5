"""Attention to a cache launched directly on a GPU: against torch's own in float64, in CUDA graphs replayed with lengths
that grow, over streams, and in Hugging Face's static cache.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import torch_bridge
from bridge.test_gpu_streams import kernels_of
from torch_bridge.direct import attention, decoding
from torch_bridge.flash_attn import flash_attn_with_kvcache

pytestmark = pytest.mark.gpu

B, HQ, HKV, ROOM, D, BF16 = 3, 8, 2, 512, 64, torch.bfloat16
integers = lambda *numbers: torch.tensor(numbers, dtype=torch.int32, device="cuda")


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    torch_bridge.report(reset=True)


def random(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def cache_of(rows=B, room=ROOM):
    return [random(rows, room, HKV, D) for _ in range(2)]


@pytest.fixture
def with_mma(monkeypatch):
    """Calls launch the kernel with mma.sync, which is not the first choice on this GPU."""
    real = attention.request
    monkeypatch.setattr(attention, "request", lambda *given: dataclasses.replace(
        real(*given), implementation="ampere"))
    for module, name, empty in ((attention, "_directs", {}), (attention, "_reasons", {}), (decoding, "_known", {}),
                                (decoding, "_recent", [])):
        monkeypatch.setattr(module, name, empty)
    yield
    assert {row.implementation for row in torch_bridge.report() if row.what == "decode"} == {"ampere"}


def launches():
    return sum(row.calls for row in torch_bridge.report() if row.what == "decode")


def exact(q, keys, values, lengths, left=None):
    """Of dense keys (batch, room, heads, d), in float64; the last query at the last key, causal."""
    at = torch.arange(keys.shape[1], device="cuda")
    pos = (lengths[:, None] - q.shape[1] + torch.arange(q.shape[1], device="cuda"))[:, None, :, None]
    keep = (at <= pos) & (at > pos - (1 << 30 if left is None else left + 1)) & (pos >= 0)
    k, v = (x.double().nan_to_num().transpose(1, 2).repeat_interleave(HQ // HKV, 1) for x in (keys, values))
    out = F.scaled_dot_product_attention(q.double().transpose(1, 2), k, v, attn_mask=keep)
    return out.nan_to_num().transpose(1, 2)


def near(found, wanted):
    assert found.isfinite().all()
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 6e-3


@pytest.mark.parametrize("count, left", [(1, None), (4, 100)])
def test_contiguous(monkeypatch, count, left):
    """Lengths of 1 to all, NaN behind them; new keys appended; the same numbers as the way through JAX's runtime."""
    keys, values = cache_of()
    before = integers(3, 500, 128)
    for row, n in enumerate(before.tolist()):
        keys[row, n:], values[row, n:] = torch.nan, torch.nan
    q, k, v = (random(B, count, heads, D) for heads in (HQ, HKV, HKV))
    window = (-1 if left is None else left, -1)
    out, lse = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=before, causal=True, window_size=window,
                                       return_softmax_lse=True)
    assert launches() == 1 and lse.isfinite().all()
    near(out, exact(q, keys, values, before + count, left))
    monkeypatch.setenv(attention.VARIABLE, "0")
    other, other_lse = flash_attn_with_kvcache(q, keys, values, cache_seqlens=before + count, causal=True,
                                               window_size=window, return_softmax_lse=True)
    assert launches() == 1
    near(out, other.double())
    torch.testing.assert_close(lse, other_lse, atol=2e-3, rtol=1e-3)


def test_pages_and_rows():
    """Pages in any order, what a table holds behind a sequence anything; and rows of a larger cache."""
    pages = cache_of(40, 16)
    table = torch.randperm(40, device="cuda")[:B * 12].view(B, 12).to(torch.int32)
    lengths, q = integers(150, 1, 33), random(B, 1, HQ, D)
    dense = [x[table.long()].flatten(1, 2) for x in pages]
    table[1, 1:], table[2, 3:] = -7, 99
    near(flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table), exact(q, *dense, lengths))
    keys, values = cache_of(5)
    rows, k, v = integers(4, 0, 2), random(B, 1, HKV, D), random(B, 1, HKV, D)
    found = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, cache_batch_idx=rows)
    near(found, exact(q, keys[rows.long()], values[rows.long()], lengths + 1))
    assert launches() == 2


def test_alibi_and_padding():
    keys, values = cache_of()
    q, lengths, first = random(B, 1, HQ, D), integers(300, 512, 80), integers(20, 0, 79)
    found = flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths, cache_leftpad=first, causal=True)
    at = torch.arange(ROOM, device="cuda")
    keep = (at < lengths[:, None]) & (at >= first[:, None])
    k, v = (x.double().transpose(1, 2).repeat_interleave(HQ // HKV, 1) for x in (keys, values))
    wide = q.double().transpose(1, 2)
    near(found, F.scaled_dot_product_attention(wide, k, v, attn_mask=keep[:, None, None]).transpose(1, 2))
    slopes = torch.rand(HQ, device="cuda")
    found = flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths, causal=True, alibi_slopes=slopes)
    bias = -slopes.double()[:, None, None] * (lengths[:, None, None, None] - 1 - at)
    bias = bias.masked_fill(at >= lengths[:, None, None, None], -torch.inf)
    near(found, F.scaled_dot_product_attention(wide, k, v, attn_mask=bias).transpose(1, 2))
    assert launches() == 2


def test_a_graph_is_replayed_with_lengths_that_grow():
    """Two layers that append and attend, and lengths that the graph itself counts on: 300 tokens, then others."""
    layers, q = [cache_of() for _ in range(2)], random(B, 1, HQ, D)
    k, v, lengths = random(B, 1, HKV, D), random(B, 1, HKV, D), integers(0, 0, 0)

    def step():
        found = [flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths) for keys, values in layers]
        lengths.add_(1)
        return found
    step()
    lengths.copy_(integers(0, 5, 150))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    lengths.copy_(integers(0, 5, 150))  # nothing ran while it was captured
    for i in range(300):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        if i % 37 == 0 or i == 299:
            assert lengths.tolist() == [1 + i, 6 + i, 151 + i]
            for out, layer in zip(found, layers, strict=True):
                near(out, exact(q, *layer, lengths))
    lengths.copy_(integers(100, 2, 400))
    graph.replay()
    near(found[0], exact(q, *layers[0], lengths))


def test_the_kernel_with_mma(with_mma, monkeypatch):
    """What a GPU runs that has these kernels alone: rows, pages, biases, and a graph."""
    test_a_graph_is_replayed_with_lengths_that_grow()
    torch_bridge.report(reset=True)
    test_pages_and_rows()
    torch_bridge.report(reset=True)
    test_alibi_and_padding()
    torch_bridge.report(reset=True)
    test_contiguous(monkeypatch, 4, 100)


def test_graphs_and_streams_at_a_time():
    """Two graphs and eager calls on streams of their own, over one plan: each counts in its own place."""
    keys, values = cache_of()
    queries, lengths = [random(B, 1, HQ, D) for _ in range(4)], integers(512, 77, 300)
    call = lambda q: flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths)
    wanted = [call(q) for q in queries]
    for q, x in zip(queries, wanted, strict=True):
        near(x, exact(q, keys, values, lengths))
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph, q in zip(graphs, queries, strict=False):
        with torch.cuda.graph(graph):
            outs.append([call(q) for _ in range(8)])
    streams, found = [torch.cuda.Stream() for _ in range(4)], [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for i in (0, 1):
            with torch.cuda.stream(streams[2 + i]):
                found[i] += [call(queries[2 + i]) for _ in range(8)]
    torch.cuda.synchronize()
    for x, results in zip(wanted, (*outs, *found), strict=True):
        assert all(torch.equal(x, y) for y in results)


def test_one_kernel_runs():
    """No fill of counters, no copy of pages."""
    pages, q, lengths = cache_of(40, 16), random(B, 1, HQ, D), integers(60, 1, 33)
    table = torch.arange(B * 12, device="cuda", dtype=torch.int32).view(B, 12)
    names = kernels_of(lambda: flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table))
    assert len(names) == 3 and all("attention_decode" in name for name in names), names


def test_a_first_call_in_a_capture_is_refused():
    (keys, values), q, lengths = cache_of(B, 96), random(B, 1, HQ, D), integers(3, 2, 1)
    said = "attention to a cache must have run once before it is captured"
    with pytest.raises(RuntimeError, match=said), torch.cuda.graph(torch.cuda.CUDAGraph()):
        q.add_(1)
        flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths)


ALONE = """
import sys, torch, torch_bridge
from torch_bridge.flash_attn import flash_attn_with_kvcache
keys, values = (torch.randn(2, 512, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
lengths = torch.tensor([5, 300], dtype=torch.int32, device="cuda")
q, k, v = (torch.randn(2, 1, n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths)
torch.cuda.synchronize()
print("jax" in sys.modules, torch_bridge.report()[0].what)
"""


def test_a_process_imports_no_jax(tmp_path):
    for _ in range(2):  # from nothing, and from plans
        done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=200,
                              env=os.environ | dict(PALLAS_FLASH_PLANS=str(tmp_path / "plans")))
        assert done.stdout.split() == ["False", "decode"], done.stderr[-2000:]
    assert len([*(tmp_path / "plans").glob("*.plan")]) == 1


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    torch_bridge.transformers.register()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=63)
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).to("cuda", torch.float16).eval()


@pytest.mark.parametrize("side", [None, "left"])
def test_generate_with_a_static_cache(side):
    """Logits of each step against eager attention's, as long as both are fed the same tokens."""
    model, ids = llama(), torch.randint(1, 63, (2, 11), device="cuda")
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :3] = 0
    found = {}
    for implementation in ("eager", "pallas"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6, output_logits=True,
            return_dict_in_generate=True, cache_implementation="static", disable_compile=True)
    assert launches() == 5 * 2
    for a, b in zip(found["pallas"].logits, found["eager"].logits, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-2
        if not torch.equal(a.argmax(-1), b.argmax(-1)):  # two tokens are as likely, to rounding
            break


def test_a_step_of_a_static_cache_in_a_cuda_graph():
    """Captured once, the model's forward counts its cache on itself: replayed, it gives the tokens of eager steps."""
    transformers = pytest.importorskip("transformers")
    model, ids = llama(), torch.randint(1, 63, (2, 12), device="cuda")
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"

    def run(implementation, captured):
        model.set_attn_implementation(implementation)
        cache, token, found = transformers.StaticCache(config=model.config, max_cache_len=64), ids[:, :1].clone(), []
        step = lambda: model(token, **{name: cache}).logits
        graph = torch.cuda.CUDAGraph()
        for i in range(ids.shape[1]):
            token.copy_(ids[:, i:i + 1])
            if i == 2 and captured:  # the first step made the cache, the second the plan
                with torch.cuda.graph(graph):
                    out = step()
            if i >= 2 and captured:
                graph.replay()
            else:
                out = step()
            found.append(out.clone())
        return found
    with torch.no_grad():
        wanted, found = run("eager", False), run("pallas", True)
    assert launches() == 2 * 2, "of the second step, and of the captured one"
    for a, b in zip(found, wanted, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-2


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_a_compiled_step_is_a_cuda_graph_with_our_kernel(quiet):
    """Two layers that append and attend, by CUDA graphs of torch's own: lengths that grow, no copy of a cache."""
    layers, q = [cache_of() for _ in range(2)], random(B, 1, HQ, D)
    k, v, lengths = random(B, 1, HKV, D), random(B, 1, HKV, D), integers(0, 5, 150)
    for x in (q, k, v, lengths, *layers[0], *layers[1]):
        torch._dynamo.mark_static_address(x)

    def step(q, k, v, lengths, layers):
        return [flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths) for keys, values in layers]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for i in range(40):
            for x in (q, k, v):
                x.normal_()
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(q, k, v, lengths, layers)
            lengths.add_(1)
            if i % 13 == 0:
                for out, layer in zip(found, layers, strict=True):
                    near(out, exact(q, *layer, lengths))
        counted = launches()

        def replay():
            torch.compiler.cudagraph_mark_step_begin()  # else it records what follows on the last step's results
            compiled(q, k, v, lengths, layers)
        names = kernels_of(replay)
    assert launches() == counted, "nothing is launched by the host once there is a graph"
    assert sum("attention_decode" in name for name in names) == 3 * 2, names
    assert not any("direct_copy" in name or "Memcpy" in name for name in names), names


def test_generate_compiles_a_step_of_a_static_cache(quiet):
    """As `generate` does by itself: its compiled forward is replayed, and gives eager's logits."""
    model, ids, found = llama(), torch.randint(1, 63, (2, 11), device="cuda"), {}
    for implementation in ("eager", "pallas"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8,
            output_logits=True, return_dict_in_generate=True, cache_implementation="static",
            disable_compile=implementation == "eager")
    assert launches() > 0
    for a, b in zip(found["pallas"].logits, found["eager"].logits, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-2
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            break
