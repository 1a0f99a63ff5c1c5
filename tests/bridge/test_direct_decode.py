"""Attention to a cache on the direct path: from torch's functions to the arrays that the kernel would be given, which a
stand-in reads in memory, against float64 through the kernels of attention with lengths.
"""

import contextlib

import pytest
import torch

import torch_bridge
from bridge.direct import A100
from bridge.test_direct import BF16, FakeGpu, launched  # noqa: F401
from pallas_flash import dispatch
from pallas_flash.kernels.hopper import compiler
from torch_bridge import flash, flash_attn
from torch_bridge.direct import attention, cache, counters, decoding, runner
from torch_bridge.flash_attn import flash_attn_with_kvcache

B, HQ, HKV, ROOM, D = 3, 4, 2, 48, 16
integers = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
LENGTHS = integers(5, 0, 40)


class DecodeGpu(FakeGpu):
    """Computes in float64 what the decoding kernel would, in the memory at the addresses."""

    counted: list[int] = []  # noqa: RUF012  as FakeGpu.launched

    def launch(self, addresses, stream):
        if self.pass_name != "decode":
            super().launch(addresses, stream)
            return
        assert stream == 78 and all(address and address % 16 == 0 for address in addresses)
        problem, arrays = self.problem, {name: self.array(addresses, name) for name in self.program.buffers}
        assert not arrays["counters"].any(), "the kernel counts from 0"
        self.counted.append(arrays["counters"].data_ptr())
        for name in {*self.program.scratch, *self.program.results}:
            arrays[name].fill_(torch.nan)
        heads_first = lambda x: x.transpose(1, 2) if problem.layout == "BLHD" else x
        q, k, v = (heads_first(arrays[name]).double() for name in "qkv")
        if problem.pages is not None:
            table = arrays["page_table"].long().clamp(0, problem.pages[0] - 1)
            k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (k, v))
        lengths, (left, right) = arrays["field0"][:, 0], problem.window
        at = lengths[:, None] - problem.q_len + torch.arange(problem.q_len)
        distance = torch.arange(problem.capacity) - at[:, :, None]
        keep = (at >= 0)[:, :, None] & (torch.arange(problem.capacity) < lengths[:, None, None])
        keep &= (distance >= -(2**30 if left is None else left)) & (distance <= (2**30 if right is None else right))
        k, v = (x.repeat_interleave(problem.q_heads // problem.kv_heads, 1) for x in (k, v))
        s = q @ k.mT * (problem.d**-0.5 if problem.scale is None else problem.scale)
        s = s if problem.softcap is None else problem.softcap * torch.tanh(s / problem.softcap)
        s = (s + arrays["bias"].double() if "bias" in arrays else s).masked_fill(~keep[:, None], -torch.inf)
        if "sinks" in arrays:
            s = torch.cat((s, arrays["sinks"].double().expand(*s.shape[:3], 1)), -1)
        p = s.softmax(-1).nan_to_num(0.0)[..., :problem.capacity]
        v = v.masked_fill(~((p > 0).any(-2)[..., None]), 0.0)
        heads_first(arrays["out"]).copy_(p @ v)
        arrays["stats"].copy_(torch.stack((s.logsumexp(-1), torch.zeros_like(s[..., 0])), 2))
        self.launched.append("decode")


@pytest.fixture
def decoded(launched, monkeypatch):  # noqa: F811
    """The passes that were launched directly."""
    monkeypatch.setattr(runner, "Loaded", DecodeGpu)
    monkeypatch.setattr(decoding, "_known", {})
    decoding._why_not_gpu.cache_clear()
    monkeypatch.setattr(decoding, "_recent", [])
    monkeypatch.setattr(DecodeGpu, "counted", [])
    return launched


def cache_of(rows=B, room=ROOM, dim=D):
    """Keys and values, NaN where no test counts them."""
    return [torch.randn(rows, room, HKV, dim, dtype=BF16) for _ in range(2)]


def new(count, heads=HQ):
    return torch.randn(B, count, heads, D, dtype=BF16)


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(q, keys, values, *new_keys, **arguments):
    """Of a call in bfloat16, and of the same numbers in float64, whose caches are copies."""
    exact = flash_attn_with_kvcache(*map(wide, (q, keys, values, *new_keys)), return_softmax_lse=True,
                                    **{name: x if name == "alibi_slopes" else wide(x) for name, x in arguments.items()})
    found = flash_attn_with_kvcache(q, keys, values, *new_keys, return_softmax_lse=True, **arguments)
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, atol=2e-2, rtol=2e-2)
    return found


CASES = {
    "one query": (1, {}), "causal": (1, dict(causal=True)), "window": (1, dict(window_size=(6, 0), softcap=2.0)),
    "many, causal": (4, dict(causal=True, softmax_scale=0.3)), "many, window": (3, dict(window_size=(9, 0))),
    "alibi": (2, dict(causal=True, alibi_slopes=torch.rand(HQ))),
    "padding": (1, dict(cache_leftpad=integers(2, 0, 39), causal=True)),
    "padding, alibi": (2, dict(cache_leftpad=integers(2, 0, 7), causal=True, alibi_slopes=torch.rand(B, HQ))),
}


@pytest.mark.parametrize("name", CASES)
def test_contiguous(decoded, name):
    count, arguments = CASES[name]
    keys, values = cache_of()
    values[0, 5:] = torch.nan  # behind the end of a sequence
    compare(new(count), keys, values, cache_seqlens=LENGTHS, **arguments)
    assert decoded == ["decode"]


@pytest.mark.parametrize("count", [1, 3])
def test_new_keys_are_appended(decoded, count):
    keys, values = cache_of()
    before = keys.clone()
    k, v = new(count, HKV), new(count, HKV)
    compare(new(count), keys, values, k, v, cache_seqlens=LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        before[row, n:n + count] = k[row]
    assert torch.equal(keys, before) and decoded == ["decode"]


@pytest.mark.parametrize("room", [16, 32])
def test_pages_are_read_where_they_lie(decoded, room):
    keys, values = cache_of(9, room)
    table = integers(7, 1, -5, 3, 99, 99, 0, 8, 4).view(3, 3)
    lengths = integers(room + 3, 1, 3 * room - 2)
    read = []
    DecodeGpu.array, array = lambda self, addresses, name: read.append((name, addresses)) or array(
        self, addresses, name), DecodeGpu.array
    try:
        compare(new(1), keys, values, new(1, HKV), new(1, HKV), cache_seqlens=lengths, block_table=table, causal=True)
    finally:
        DecodeGpu.array = array
    assert decoded == ["decode"]
    assert any(name == "k" and keys.data_ptr() in addresses for name, addresses in read), "not copied"


def test_rows_of_a_larger_cache_are_pages(decoded):
    keys, values = cache_of(5)
    compare(new(1), keys, values, new(1, HKV), new(1, HKV), cache_seqlens=LENGTHS, cache_batch_idx=integers(4, 0, 2))
    assert decoded == ["decode"]


def test_other_lengths_are_the_same_plan(decoded, monkeypatch):
    """And so is causal attention of one query: nothing is behind it."""
    asked, find = [], cache.find
    monkeypatch.setattr(cache, "find", lambda request, index: (asked.append(request), find(request, index))[1])
    (keys, values), q = cache_of(), new(1)
    for lengths in (LENGTHS, integers(48, 1, 2), LENGTHS.long(), 7):
        for causal in (False, True):
            compare(q, keys, values, cache_seqlens=lengths, causal=causal)
    assert len(asked) == 1 and decoded == ["decode"] * 8
    assert len({*DecodeGpu.counted}) == 1, "launches of one stream count in one place"


def test_what_the_kernel_does_not_take(decoded):
    """Each goes to the kernels of attention with lengths, and is right there."""
    keys, values = cache_of()
    compare(new(3), keys, values, cache_seqlens=LENGTHS)  # one of no rule before the first key sees all keys
    compare(new(1), *cache_of(9, 8), cache_seqlens=LENGTHS % 24, block_table=integers(*range(9)).view(3, 3))
    strided = [torch.randn(B, ROOM + 1, HKV, D, dtype=BF16)[:, 1:] for _ in range(2)]
    compare(new(1), *strided, cache_seqlens=LENGTHS)
    compare(new(33), keys, values, cache_seqlens=LENGTHS, causal=True)
    assert "decode" not in decoded
    floats = [x.float() for x in (new(1), keys, values)]
    flash_attn_with_kvcache(*floats, cache_seqlens=LENGTHS)
    with pytest.raises(RuntimeError, match="must divide"):
        flash_attn_with_kvcache(new(1)[:, :, :3], keys, values, cache_seqlens=LENGTHS)
    assert "decode" not in decoded


def test_it_can_be_switched_off(decoded, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, "0")
    compare(new(1), *cache_of(), cache_seqlens=LENGTHS)
    assert decoded == []


def test_misaligned_caches_and_queries(decoded):
    memory = torch.randn(2 * B * ROOM * HKV * D + 8).to(BF16)
    start = (2 - memory.data_ptr()) % 16 // 2
    size = B * ROOM * HKV * D
    keys, values = (memory[start + i * size:][:size].view(B, ROOM, HKV, D) for i in range(2))
    compare(new(1), keys, values, cache_seqlens=LENGTHS)
    assert "decode" not in decoded, "a cache is not copied in each step"
    compare(new(1).expand(B, 1, HQ, D)[..., :D], *cache_of(), cache_seqlens=LENGTHS)
    compare(torch.randn(B, 1, HQ, 2 * D, dtype=BF16)[..., :D], *cache_of(), cache_seqlens=LENGTHS)
    assert decoded[-2:] == ["decode"] * 2, "queries are small, and copied"


@pytest.mark.parametrize("paged", [False, True])
def test_calls_like_one_before_are_known_by_their_tensors(decoded, monkeypatch, paged):
    """Of them only the addresses are new; any that is not like it is checked as the first was."""
    checked, check = [], flash_attn.to_cache
    monkeypatch.setattr(flash_attn, "to_cache", lambda *args: (checked.append(1), check(*args))[1])
    caches = [cache_of(9, 16) if paged else cache_of() for _ in range(3)]
    given = dict(block_table=integers(7, 1, 5, 3, 6, 2, 0, 8, 4).view(3, 3)) if paged else {}
    for (keys, values), lengths in zip(caches, (LENGTHS, integers(9, 8, 7), integers(47, 0, 1)), strict=True):
        compare(new(1), keys, values, new(1, HKV), new(1, HKV), cache_seqlens=lengths, window_size=(9, 0), **given)
        compare(new(1), keys, values, cache_seqlens=lengths, window_size=(9, 0), **given)
    assert decoded == ["decode"] * 6 and len(checked) == 2 + 6, "two in bfloat16, those in float64"
    before = len(checked)
    with pytest.raises(RuntimeError, match="k must be"):
        flash_attn_with_kvcache(new(1), keys, values, new(1, HKV)[:, :, :1], new(1, HKV), cache_seqlens=LENGTHS,
                                window_size=(9, 0), **given)
    with pytest.raises(RuntimeError, match="k, v and cache_seqlens go together"):  # regression: "wrong length"
        flash_attn_with_kvcache(new(1), keys, values, new(1, HKV), cache_seqlens=LENGTHS, window_size=(9, 0), **given)
    compare(new(1), keys, values, cache_seqlens=LENGTHS.long(), window_size=(9, 0), **given)
    compare(new(1), keys, values, cache_seqlens=LENGTHS, window_size=(8, 0), **given)
    assert len(checked) == before + 6
    monkeypatch.setenv(attention.VARIABLE, "0")
    compare(new(1), keys, values, cache_seqlens=LENGTHS, window_size=(9, 0), **given)
    assert decoded == ["decode"] * 8


def test_queries_that_are_not_in_memory_are_not_read_there(decoded):
    """Regression: of the second call, the opposite numbers were read, and zeros at address 0."""
    keys, values = cache_of()
    for q in (torch._neg_view(new(1)), torch._efficientzerotensor((B, 1, HQ, D), dtype=BF16)):
        for _ in range(3):
            out = flash_attn_with_kvcache(q, keys, values, cache_seqlens=LENGTHS)
            assert torch.equal(out, flash_attn_with_kvcache(q.resolve_neg() + 0, keys, values, cache_seqlens=LENGTHS))


def test_the_report_says_it(decoded):
    torch_bridge.report(reset=True)
    flash_attn_with_kvcache(new(1), *cache_of(), cache_seqlens=LENGTHS)
    row, = torch_bridge.report()
    assert (row.calls, row.what, row.implementation) == (1, "decode", "hopper")
    assert row.problem.startswith("CacheProblem(") and row.problem.endswith("launched directly")


def test_explain_says_it(decoded, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    keys, values = cache_of()
    before = keys.clone()
    new_keys = dict(k=new(1, HKV), v=new(1, HKV))
    text = torch_bridge.explain_flash_attn_with_kvcache(new(1), keys, values, cache_seqlens=LENGTHS, **new_keys)
    assert torch.equal(keys, before) and decoded == [], "nothing is appended or computed"
    assert "implementation='hopper'" in text and "forward: attention_decode" in text and "backward" not in text
    assert "path: direct, launched on torch's stream; plan: to be compiled" in text
    assert "k_cache, v_cache: read where they lie, not copied\nq: shared, not copied" in text
    pages = dict(block_table=integers(0, 1, 2).view(3, 1))
    small = [x[:, :8].contiguous() for x in (keys, values)]
    text = torch_bridge.explain_flash_attn_with_kvcache(new(1), *small, cache_seqlens=3, **pages)
    assert text.startswith("not the kernel of caches (it takes pages, and rows of cache_batch_idx, of multiples of 16 "
                           "positions, got 8), but attention with lengths:\nk_cache, v_cache: the rows or pages")
    text = torch_bridge.explain_flash_attn_with_kvcache(new(3), keys, values, cache_seqlens=LENGTHS)
    assert text.startswith("not the kernel of caches (queries before the first key would see nothing")
    with pytest.raises(TypeError, match="cache_len"):
        torch_bridge.explain_flash_attn_with_kvcache(new(1), keys, values, cache_len=3)


def test_an_a100_reads_caches_by_its_own_kernel(decoded, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(attention, "gpu_of", lambda device: A100)
    torch_bridge.report(reset=True)
    keys, values = cache_of()
    compare(new(1), keys, values, cache_seqlens=LENGTHS)
    assert decoded == ["decode"]
    assert {row.implementation for row in torch_bridge.report() if row.what == "decode"} == {"ampere"}
    text = torch_bridge.explain_flash_attn_with_kvcache(new(1), keys, values, cache_seqlens=LENGTHS)
    assert "path: direct, launched on torch's stream" in text and "implementation='ampere'" in text, text


def test_explain_knows_a_compiler_that_is_of_no_use(decoded, monkeypatch):
    monkeypatch.setattr(compiler, "why_not", lambda: "needs a compiler that moves registers")
    dispatch._decide.cache_clear()
    text = torch_bridge.explain_flash_attn_with_kvcache(new(1), *cache_of(), cache_seqlens=LENGTHS)
    dispatch._decide.cache_clear()
    assert "implementation='ampere'" in text and "not 'hopper': needs a compiler that moves registers" in text, text
    assert "path: direct" in text


@contextlib.contextmanager
def no_reads(monkeypatch):
    """Numbers of tensors are not asked for, as those of a GPU must not be where a CUDA graph is captured."""
    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        patch.setattr(flash, "is_on_host", lambda tensor: False)
        for name in ("__bool__", "__int__", "__index__", "__float__", "item", "tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize("arguments", [
    {}, dict(block_table=integers(7, 1, 5, 3, 9, 9, 0, 8, 4).view(3, 3)), dict(cache_batch_idx=integers(4, 0, 2)),
    dict(cache_leftpad=integers(1, 0, 2)), dict(causal=True, alibi_slopes=torch.rand(HQ), return_softmax_lse=True)],
    ids=lambda arguments: "-".join(arguments))
def test_the_host_reads_no_lengths(decoded, monkeypatch, arguments):
    keys, values = cache_of(10, 16) if "block_table" in arguments else cache_of(
        5 if "cache_batch_idx" in arguments else B)
    q, k, v = new(1), new(1, HKV), new(1, HKV)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeGpu, "launch", lambda self, addresses, stream: self.launched.append(self.pass_name))
        with no_reads(monkeypatch):
            flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=integers(5, 0, 9), **arguments)
    assert decoded == ["decode"]


# --- counters --------------------------------------------------------------------------------------------------------


def test_streams_and_captured_launches_count_in_places_of_their_own(monkeypatch):
    monkeypatch.setattr(counters, "CAPTURED", 3)
    found = counters.Counters(256, torch.device("cpu"))
    assert found.at(5)[0] == found.at(5)[0] != found.at(6)[0]
    captured = [found._for_a_graph() for _ in range(5)]
    addresses = [address for address, _ in captured]
    assert len({*addresses, found.at(5)[0], found.at(6)[0]}) == 7
    assert addresses[1] - addresses[0] == 256 == addresses[2] - addresses[1]
    assert not any(tensor.any() for _, tensor in captured)


def test_arguments_with_new_keys_are_prepared_once(decoded, monkeypatch):
    """Off the path of known calls; the kernel's own look at them says that they are right, before keys are written."""
    prepared, placed = [], []
    prepare, decode = flash_attn.sdpa.prepare, flash_attn.Cached.decoding
    monkeypatch.setattr(flash_attn.sdpa, "prepare", lambda *args: (prepared.append(1), prepare(*args))[1])
    monkeypatch.setattr(flash_attn.Cached, "decoding", lambda self: (placed.append(1), decode(self))[1])
    keys, values = cache_of()
    for given in (LENGTHS, LENGTHS.long(), 7):
        flash_attn_with_kvcache(new(1), keys, values, new(1, HKV), new(1, HKV), cache_seqlens=given, window_size=(9, 0))
    assert decoded == ["decode"] * 3 and prepared == [] and placed == [1] * 3
    before = keys.clone()
    with pytest.raises(ValueError, match="scale must be"):
        flash_attn_with_kvcache(new(1), keys, values, new(1, HKV), new(1, HKV), cache_seqlens=LENGTHS,
                                softmax_scale=float("inf"))
    assert torch.equal(keys, before), "an error comes before anything is written"


def test_a_call_is_known_under_autocast_that_changes_no_tensor(decoded, monkeypatch):
    checked, check = [], flash_attn.to_cache
    monkeypatch.setattr(flash_attn, "to_cache", lambda *args: (checked.append(1), check(*args))[1])
    q, (keys, values) = new(1), cache_of()
    for dtype, count in ((BF16, 1), (torch.float16, 4), (BF16, 4)):
        with torch.autocast("cpu", dtype):
            for _ in range(3):
                flash_attn_with_kvcache(q, keys, values, cache_seqlens=LENGTHS)
        assert len(checked) == count
    assert decoded == ["decode"] * 3 + ["forward"] * 3 + ["decode"] * 3, "autocast to float16 casts"
