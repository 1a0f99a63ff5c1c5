"""Hugging Face's caches and the kernel of caches: tiny models in float16 whose single queries a stand-in for the kernel
computes (test_direct_decode.py), against their own eager attention.
"""

import functools

import pytest
import torch

from bridge.test_direct import launched  # noqa: F401
from bridge.test_direct_decode import DecodeGpu, decoded, no_reads  # noqa: F401
from torch_bridge.direct import attention, cache

transformers = pytest.importorskip("transformers")
from transformers import masking_utils as hf  # noqa: E402

from bridge import test_transformers as models  # noqa: E402
from bridge.test_transformers import from_zero, registered  # noqa: E402, F401
from torch_bridge.transformers import masks, static  # noqa: E402

CACHES = "dynamic", "static"


@functools.cache
def causal_lm(name):
    changes = dict(layer_types=["full_attention"] * 2) if name == "GptOss" else {}
    return models.causal_lm.__wrapped__(name, dtype="float16", **changes).half()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name, side", [("Llama", None), ("Llama", "left"), ("GptOss", None)])
def test_generate(decoded, monkeypatch, name, side, kind):  # noqa: F811
    """Every step after the prompt is a launch a layer, of one plan; but where keys grow and some are padding."""
    asked, find = [], cache.find
    monkeypatch.setattr(cache, "find", lambda request, index: (asked.append(request), find(request, index))[1])
    model, ids = causal_lm(name), models.tokens()
    mask = None if side is None else models.padding(side)
    with torch.no_grad():
        expected, found = (models.generate(model, implementation, ids, mask, cache_implementation=kind,
                                           disable_compile=True) for implementation in ("eager", "pallas"))
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert models.distance(a.float(), b.float()) < 2e-2
    has_sinks, padded = name == "GptOss", side == "left"
    count = 0 if padded and kind == "dynamic" else 3 * 2
    assert decoded.count("decode") == count
    plans = [request for request in asked if request.pass_name == "decode"]
    assert len(plans) == min(count, 1)
    if plans:
        names = {name for name, _, _ in plans[0].problem.given}
        assert names == {"lengths"} | ({"bias"} if padded else set()) | ({"sinks"} if has_sinks else set())


def test_where_the_direct_path_is_off_the_mask_is_read(decoded, monkeypatch):  # noqa: F811
    monkeypatch.setenv(attention.VARIABLE, "0")
    model, ids = causal_lm("Llama"), models.tokens()
    with torch.no_grad():
        expected, found = (models.generate(model, implementation, ids, cache_implementation="static",
                                           disable_compile=True) for implementation in ("eager", "pallas"))
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert models.distance(a.float(), b.float()) < 2e-2
    assert decoded == []


def test_a_step_reads_no_number_on_the_host(decoded, monkeypatch):  # noqa: F811
    """So that it can be captured in a CUDA graph."""
    model, token = causal_lm("Llama"), models.tokens(1)
    model.set_attn_implementation("pallas")
    kept = transformers.StaticCache(config=model.config, max_cache_len=32)
    step = lambda: model(token, **{models.CACHE: kept})
    with torch.no_grad():
        step()  # makes the cache
        step()
        with monkeypatch.context() as patch, no_reads(monkeypatch):
            patch.setattr(DecodeGpu, "launch", lambda self, addresses, stream: self.launched.append(self.pass_name))
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # for transformers: traced
            step()
    assert decoded == ["forward"] * 2 + ["decode"] * 4, "the first knows no cache, and reads its mask"


def noted(position, pads=None, function=hf.causal_mask_function, capacity=9):
    return masks.mask(
        batch_size=2, q_length=1, kv_length=capacity, q_offset=torch.tensor(position), mask_function=function,
        attention_mask=None if pads is None else torch.tensor(pads, dtype=torch.bool), allow_is_causal_skip=False)


PADS = [None, [[1] * 6] * 2, [[0, 0, 1, 1, 1, 1], [1] * 6], [[1] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 0]],
        [[1, 0, 1, 1, 1, 1], [1] * 6]]


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("function", [hf.causal_mask_function, hf.sliding_window_causal_mask_function(3)])
def test_a_note_says_what_its_mask_says(decoded, function, pads):  # noqa: F811
    mask = noted(5, pads, function)
    filled, at = static.noted(mask), torch.arange(9)
    lengths = filled.lengths[:, None]
    keep = (at < lengths) & (at >= lengths - 1 - (99 if filled.left is None else filled.left))
    if filled.bias is not None:
        keep = keep & (filled.bias[:, 0, 0] == 0)
    assert torch.equal(mask[:, 0, 0], keep)
    holes = pads in (PADS[2], PADS[4])
    assert (filled.bias is not None) == holes, "without padding no bias is read"


def test_other_masks_have_no_note(decoded, monkeypatch):  # noqa: F811
    two_chunks = hf.chunked_causal_mask_function(3, torch.tensor([0, 0]))
    assert static.noted(noted(5, function=two_chunks)) is None
    assert static.noted(noted(5, function=hf.bidirectional_mask_function)) is None
    assert static.noted(masks.mask(batch_size=2, q_length=1, kv_length=6, q_offset=5)) is None
    mask = noted(5)
    assert static.noted(mask) is not None and static.noted(mask[:, :, :, :8]) is None
    mask[0, 0, 0, 2] = False
    assert static.noted(mask) is None, "it was written to"
    with torch.inference_mode():
        mask = noted(5)
        assert static.noted(mask) is not None
        mask.logical_and_(torch.tensor(False))
        assert static.noted(mask) is None
    monkeypatch.setenv(attention.VARIABLE, "0")
    assert static.noted(noted(5)) is None


@pytest.mark.parametrize("name, side", [("Llama", None), ("Llama", "left"), ("GptOss", None), ("Gemma3", "left")])
def test_a_compiled_step_of_a_static_cache(decoded, quiet, monkeypatch, name, side):  # noqa: F811
    """What `generate` compiles on a GPU: each layer's attention is the operator of the kernel, sliding layers' too."""
    graphs = []

    def keep(module, inputs):
        graphs.append([node.target for node in module.graph.nodes if "pallas_flash." in str(node.target)])
        return module.forward
    from torch._dynamo.backends.common import aot_autograd
    torch._dynamo.reset()
    model, ids = causal_lm(name), models.tokens()
    mask = None if side is None else models.padding(side)
    with torch.no_grad():
        expected = models.generate(model, "eager", ids, mask, cache_implementation="static", disable_compile=True)
    compiled = torch.compile(model.forward, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: compiled)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, *_: True)
    with torch.no_grad():
        found = models.generate(model, "pallas", ids, mask, cache_implementation="static")
    direct = torch.ops.pallas_flash.attention_to_cache_direct.default
    assert graphs and all(graph == [direct] * 2 for graph in graphs) and decoded.count("decode") == 3 * 2
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert models.distance(a.float(), b.float()) < 2e-2
