"""Hugging Face's models with `attn_implementation="pallas"` against their own eager attention: tiny, randomly
initialised, in float32 (eager takes its softmax in float32 whatever the dtype).
"""

import functools
import inspect
import sys

import jax
import pytest
import torch

import torch_bridge
from torch_bridge.direct import lengths
from torch_bridge.transformers import bucket
from torch_bridge.transformers.buckets import padded

transformers = pytest.importorskip("transformers")
from transformers import masking_utils as hf  # noqa: E402

from torch_bridge.transformers import masks, models  # noqa: E402
from torch_bridge.transformers.rule import Rule  # noqa: E402

BATCH, LENGTH, WINDOW = 2, 11, 4
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128)
HEADS = dict(num_key_value_heads=2, head_dim=8)
GEMMA = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
MODELS = {
    "Llama": dict(**SIZES, **HEADS),
    "Mistral": dict(**SIZES, **HEADS, sliding_window=WINDOW),
    "Qwen3": dict(**SIZES, **HEADS),
    "Gemma2": dict(**SIZES, **HEADS, **GEMMA | dict(layer_types=["full_attention"] * 2), attn_logit_softcapping=2.0),
    "Gemma3": dict(**SIZES, **HEADS, **GEMMA),
    "GPT2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "GptOss": dict(**SIZES, **HEADS, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
                   layer_types=["sliding_attention"] * 2),
}
CACHE = "cache" if "cache" in inspect.signature(hf.create_causal_mask).parameters else "past_key_values"
"""What transformers calls the argument, by its release."""
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=63)


@pytest.fixture(autouse=True, scope="module")
def registered():
    torch_bridge.transformers.register()


@pytest.fixture(autouse=True)
def from_zero():
    torch_bridge.report(reset=True)


@functools.cache
def causal_lm(name, **changes):
    """A model whose attention weighs: its projections are scaled up, so that scores are of size 1 and more."""
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, config)(**MODELS[name] | TOKENS | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return scaled(getattr(transformers, kind)(config).eval())


def scaled(model):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("q_proj", "k_proj", "c_attn", ".query.", ".key.")):
                parameter.mul_(12)
            elif key.endswith("sinks"):
                parameter.normal_()
    return model


def tokens(length=LENGTH):
    return torch.randint(1, 63, (BATCH, length), generator=torch.Generator().manual_seed(5))


def padding(side, length=LENGTH, count=3):
    """attention_mask: the first sequence has `count` positions of padding on one side."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, slice(0, count) if side == "left" else slice(length - count, length)] = 0
    return mask


PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0]])
INPUTS = {
    "left": lambda: dict(attention_mask=padding("left"), use_cache=False),
    "right": lambda: dict(attention_mask=padding("right"), use_cache=False),
    "packed": lambda: dict(position_ids=PACKED, use_cache=False),
}


def results(model, implementation, inputs, ids=None):
    """Outputs at real tokens, and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(tokens() if ids is None else ids, **inputs)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    if "attention_mask" in inputs:
        out = out[inputs["attention_mask"].bool()]
    out.square().mean().backward()
    return out.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def assert_same(model, inputs, ids=None):
    expected, found = (results(model, name, inputs, ids) for name in ("eager", "pallas"))
    assert distance(found[0], expected[0]) < 2e-5
    assert found[1].keys() == expected[1].keys()
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max().item() < 1e-4 * max(grad.abs().max().item(), 1e-2 * largest), name
    return expected[0]


def written_out():
    """Reasons why masks were written out."""
    return [row.reasons for row in torch_bridge.report() if row.what == "mask"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name, case):
    assert_same(causal_lm(name), INPUTS[case]())
    assert written_out() == []


@pytest.mark.parametrize(("name", "without"), [
    ("Mistral", dict(sliding_window=None)), ("Gemma2", dict(attn_logit_softcapping=None)),
    ("Gemma3", dict(sliding_window=64))])
def test_these_models_would_show_a_missing_window_or_cap(name, without):
    (expected, _), (other, _) = (results(causal_lm(name, **changes), "eager", {}) for changes in ({}, without))
    assert distance(other, expected) > 1e-2


def test_sinks_would_be_missed():
    model = causal_lm("GptOss")
    _, grads = results(model, "eager", {})
    assert any(name.endswith("sinks") and grad.abs().max() > 1e-6 for name, grad in grads.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_with_padding(side):
    config = transformers.BertConfig(**SIZES)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = scaled(transformers.BertModel(config, add_pooling_layer=False).eval())
    assert_same(model, dict(attention_mask=padding(side)))
    assert written_out() == []


def test_custom_masks_are_written_out_and_counted():
    """The first four tokens see each other, as the image tokens of a model do."""
    prefix = lambda batch, head, i, j: (i < 4) & (j < 4)
    model = causal_lm("Llama")
    ids, found = tokens(), {}
    for name in ("eager", "pallas"):
        model.set_attn_implementation(name)
        embeds = model.get_input_embeddings()(ids)
        mask = hf.create_causal_mask(config=model.config, inputs_embeds=embeds, attention_mask=padding("left"),
                                     **{CACHE: None}, or_mask_function=prefix)
        found[name] = model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[padding("left") == 1]
    assert distance(found["pallas"], found["eager"]) < 2e-5
    (reasons,) = written_out()
    assert "or_masks" in reasons[0]


# --- generate --------------------------------------------------------------------------------------------------------


class Compilations(list):
    """Counts what JAX compiles inside a `with`."""

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            self.append(kwargs)

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def generate(model, implementation, ids, mask=None, **options):
    model.set_attn_implementation(implementation)
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, do_sample=False,
                          max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True,
                          pad_token_id=0, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])  # Gemma3 has both kinds of layers
def test_generate_with_left_padding_gives_what_eager_gives(name, cache):
    model, ids, mask = causal_lm(name), tokens(), padding("left")
    with torch.no_grad():
        expected, found = (generate(model, implementation, ids, mask, cache_implementation=cache)
                           for implementation in ("eager", "pallas"))
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits):
        assert distance(a, b) < 2e-5
    assert written_out() == []


def test_generate_compiles_nothing_for_another_length():
    model = causal_lm("Llama")
    with torch.no_grad():
        for mask in (None, padding("left")):
            generate(model, "pallas", tokens(), mask)
        with Compilations() as compiled:
            for length, mask in ((3, None), (9, padding("left", 9)), (40, padding("left", 40)), (41, None)):
                found = generate(model, "pallas", tokens(length), mask)
                expected = generate(model, "eager", tokens(length), mask)
                assert torch.equal(found.sequences, expected.sequences)
    assert compiled == []


def test_without_buckets_each_length_compiles():
    torch_bridge.transformers.register("exact", buckets=None)
    model = causal_lm("Llama")
    with torch.no_grad(), Compilations() as compiled:
        model.set_attn_implementation("exact")
        found = model(tokens(13)).logits
    assert len(compiled) == 1
    model.set_attn_implementation("eager")
    assert distance(found, model(tokens(13)).logits) < 2e-5


def test_a_prompt_in_parts():
    """Several queries after a cache that is not empty, which begin at another key for each part."""
    model, ids, found = causal_lm("Gemma3"), tokens(12), {}
    for implementation in ("eager", "pallas"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache, parts = transformers.DynamicCache(config=model.config), []
            for start, stop in ((0, 5), (5, 8), (8, 12)):
                out = model(ids[:, start:stop], attention_mask=padding("left", stop), **{CACHE: cache})
                parts.append(out.logits)
        found[implementation] = torch.cat(parts, 1)[padding("left", 12) == 1]
    assert distance(found["pallas"], found["eager"]) < 2e-5
    assert written_out() == []


def test_buckets_grow_with_the_length():
    sizes = sorted({bucket(n) for n in range(1, 2**17 + 1)})
    assert sizes[:9] == [128, 256, 384, 512, 640, 768, 896, 1024, 1280] and len(sizes) == 36
    assert all(n <= bucket(n) < max(n + 128, 1.25 * n) for n in range(1, 5000))
    assert all(lengths.bucket(n) == n for n in sizes), "launched directly, they would be padded again"
    assert padded(torch.ones(2, 3, 4), 6, 1).sum((0, 2)).tolist() == [8, 8, 8, 0, 0, 0]


# --- masks -----------------------------------------------------------------------------------------------------------


def two_chunks(start):
    return hf.chunked_causal_mask_function(3, torch.tensor(start))


MASKS = {
    "causal": hf.causal_mask_function,
    "everything": hf.bidirectional_mask_function,
    "window": hf.sliding_window_causal_mask_function(3),
    "window on both sides": hf.sliding_window_bidirectional_mask_function(2),
    "chunks": two_chunks([0, 0]),
    "chunks after padding": two_chunks([2, 1]),
    "two windows": hf.and_masks(hf.sliding_window_overlay(4), hf.sliding_window_causal_mask_function(2)),
}
PLACES = {"square": (7, 7, 0, 0), "static": (5, 12, 0, 0), "later": (3, 9, 6, 0), "tensor": (3, 9, torch.tensor(6), 0),
          "sliding": (3, 6, 8, 5)}


@pytest.mark.parametrize("pads", [None, [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 11],
                                  [[1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1]], [[1] * 11] * 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MASKS)
def test_rules_are_transformers_own_masks(name, place, pads):
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    arguments = dict(batch_size=2, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                     mask_function=MASKS[name],
                     attention_mask=None if pads is None else torch.tensor(pads, dtype=torch.bool))
    rule = masks.mask(**arguments)
    truth = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert isinstance(rule, Rule) and rule.shape == truth.shape and written_out() == []
    assert torch.equal(rule.written_out(), truth)


def remapped(function, positions):
    """As transformers counts the positions of packed sequences; release 5.17 counts those of the row."""
    remap = getattr(hf, "remap_positions_for_packed_sequence", None)
    return function if remap is None else remap(function, positions)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("positions", [
    PACKED, PACKED[:1], PACKED + 3, torch.tensor([[5, 6, 7, 2, 3, 3, 4, 9, 9, 9, 10]])])
def test_packed_sequences(positions, chunk):
    inner = hf.sliding_window_causal_mask_function(3)
    if chunk is not None:
        inner = hf.chunked_causal_mask_function(chunk, torch.zeros(BATCH, dtype=int))
    positions = positions.expand(BATCH, -1)
    numbers = hf.find_packed_sequence_indices(positions)
    function = hf.and_masks(remapped(inner, positions), hf.packed_sequence_mask_function(numbers))
    arguments = dict(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=function)
    rule = masks.mask(**arguments)
    assert isinstance(rule, Rule)
    assert torch.equal(rule.written_out(), hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


JUMPS = torch.arange(7).expand(2, 7) * 2
UNREAD = {
    "a lambda": lambda b, h, i, j: j <= i,
    "or": hf.or_masks(hf.causal_mask_function, hf.sliding_window_overlay(2)),
    "blocks": hf.blockwise_overlay(torch.zeros(2, 7, dtype=int)),
    "two chunks": hf.and_masks(two_chunks([0, 0]), two_chunks([1, 1])),
    "numbers that fall": hf.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 0, 0, 0]] * 2)),
    **({} if remapped(PACKED, JUMPS) is PACKED else {
        "positions alone": remapped(hf.causal_mask_function, JUMPS),
        "positions that jump": hf.and_masks(remapped(hf.causal_mask_function, JUMPS),
                                            hf.packed_sequence_mask_function(torch.zeros(2, 7, dtype=int)))}),
    "an inner lambda": hf.and_masks(hf.causal_mask_function, lambda b, h, i, j: (i + j) % 2 == 0),
}


@pytest.mark.parametrize("name", UNREAD)
def test_masks_without_a_reading_are_written_out(name):
    arguments = dict(batch_size=2, q_length=7, kv_length=7, mask_function=UNREAD[name],
                     attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool))
    mask = masks.mask(**arguments)
    assert isinstance(mask, Rule) and mask.is_written_out and len(written_out()) == 1
    assert torch.equal(mask, hf.sdpa_mask(**arguments))


def test_a_function_that_means_something_else_is_not_known(monkeypatch):
    """As if another release of transformers counted windows in another way."""
    def overlay(sliding_window):
        def inner_mask(b, h, i, j):
            return j >= i - sliding_window
        return inner_mask
    monkeypatch.setattr(hf, "sliding_window_overlay", overlay)
    masks._known.cache_clear()
    try:
        with pytest.raises(masks.Unread):
            masks.read(overlay(3))
        assert masks.read(hf.causal_mask_function).right == 0
    finally:
        monkeypatch.undo()
        masks._known.cache_clear()


def test_whatever_looks_into_a_rule_sees_the_mask():
    rule = masks.mask(batch_size=2, q_length=5, kv_length=7, mask_function=hf.sliding_window_causal_mask_function(3),
                      q_offset=2, attention_mask=padding("left", 7, 2).bool())
    truth = rule.clone().written_out()
    assert type(truth) is torch.Tensor and isinstance(rule, torch.Tensor) and rule.dtype == torch.bool
    assert isinstance(rule.contiguous(), Rule) and isinstance(rule.detach(), Rule)
    assert rule.to("meta").device.type == "meta" and isinstance(rule.to("meta"), Rule) and written_out() == []
    assert torch.equal(rule[:, :, :, :3], truth[:, :, :, :3])
    assert torch.equal(rule & False, truth & False) and torch.equal(rule.to(torch.float32), truth.float())
    assert torch.equal(torch.where(rule, 0.0, -1.0), torch.where(truth, 0.0, -1.0))
    assert torch.equal(torch.cat((rule, rule), 3), torch.cat((truth, truth), 3))
    assert torch.equal(rule.clone(), truth) and torch.equal(rule.to("cpu"), truth)
    assert len(written_out()) == 7 and "Rule" in repr(rule)


def and_in_place(rule):
    rule &= torch.arange(7) != 3


def set_item(rule):
    rule[:, :, 2:, 3] = False
    rule.detach()[:, :, :2, 3] = False


def fill_a_view(rule):
    rule.clone().fill_(False)
    rule[..., 3].fill_(False)


@pytest.mark.parametrize("change", [and_in_place, set_item, fill_a_view])
def test_what_a_model_writes_into_a_rule_counts(change):
    """Regression: it was written into a copy, and attention went by the bounds."""
    rule = masks.mask(batch_size=2, q_length=5, kv_length=7, q_offset=2)
    truth = rule.clone().written_out()
    truth[..., 3] = False
    change(rule)
    assert torch.equal(rule & True, truth)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer_call("pallas", q, k, k, rule), layer_call("sdpa", q, k, k, truth))
        torch.testing.assert_close(layer_call("pallas", q, k, k, rule.clone()), layer_call("sdpa", q, k, k, truth))


# --- models that apply their masks themselves ------------------------------------------------------------------------


SMALL = dict(vocab_size=64, hidden_size=32)
THEMSELVES = {  # a model's class and what its config says
    "Bloom": ("BloomForCausalLM", dict(**SMALL, n_layer=1, n_head=4)),
    "MPT": ("MptForCausalLM", dict(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)),
    "XGLM": ("XGLMForCausalLM", dict(vocab_size=64, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4)),
    "GPTNeoXJapanese": ("GPTNeoXJapaneseForCausalLM", dict(**SMALL, num_hidden_layers=1, num_attention_heads=4)),
    "GPT-Neo": ("GPTNeoForCausalLM", dict(**SMALL, num_layers=1, num_heads=4, attention_types=[[["global"], 1]])),
    "Falcon": ("FalconForCausalLM", dict(**SMALL, num_hidden_layers=1, num_attention_heads=4)),
}


def built(name, implementation):
    kind, numbers = THEMSELVES[name]
    config = getattr(transformers, kind).config_class(**numbers)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("name", THEMSELVES)
def test_a_model_that_applies_its_mask_itself_is_refused(name):
    """Regression: the first four lost causality without an error, the others were a bare KeyError."""
    model = built(name, "eager")
    model.set_attn_implementation("pallas")  # which transformers warns of, and leaves as it was
    assert model.config._attn_implementation == "eager"
    with pytest.raises(NotImplementedError, match=r'needs attention layers that call .*got \w+Model, .*"eager"'):
        built(name, "pallas")


def test_a_part_of_a_model_is_asked_by_its_own_class():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**SIZES), transformers.TrOCRConfig(
            vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48,
            cross_attention_hidden_size=32))
    build = transformers.AutoModelForSeq2SeqLM.from_config
    with pytest.raises(NotImplementedError, match="got TrOCR"):
        build(config, attn_implementation="pallas")
    model = build(config, attn_implementation={"": "pallas", "encoder": "pallas", "decoder": "eager"})
    assert model.encoder.config._attn_implementation == "pallas"


def test_a_model_without_masks_is_told_that_nothing_changes(monkeypatch):
    said = []
    monkeypatch.setattr(models.logger, "warning_once", said.append)
    config = transformers.Swinv2Config(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2],
                                       window_size=4)
    config._attn_implementation = "pallas"
    transformers.Swinv2Model(config)
    assert any("Swinv2Model computes attention itself, in Swinv2" in line for line in said)


MASK_USES = {
    "added": lambda scores, mask: scores + mask,
    "added in place": lambda scores, mask: scores.add_(mask),
    "added first": lambda scores, mask: mask + scores,
    "a part": lambda scores, mask: scores[..., :4] + mask[..., :4],
    "a copy of a part": lambda scores, mask: scores[..., :4] + mask[..., :4].contiguous(),
    "moved": lambda scores, mask: scores.flatten(2) + mask.transpose(2, 3).reshape(2, 1, 25),
    "filled before": lambda scores, mask: scores + mask.masked_fill(torch.eye(5, dtype=torch.bool), False),
    "heads": lambda scores, mask: scores + mask.expand(2, 3, 5, 5),
    "with another": lambda scores, mask: scores + (mask & torch.ones(5, dtype=torch.bool)),
    "product": lambda scores, mask: mask * -1e9,
    "filled": lambda scores, mask: scores.masked_fill(mask, -1e9),
    "filled in place": lambda scores, mask: scores.masked_fill_(mask, -1e9),
    "inverted where": lambda scores, mask: torch.where(mask, torch.tensor(-1e9), scores),
}


@pytest.mark.parametrize("function", [hf.causal_mask_function, lambda b, h, i, j: j <= i], ids=["rule", "dense"])
@pytest.mark.parametrize("name", MASK_USES)
def test_a_mask_that_is_taken_for_numbers_or_inverted_is_refused(name, function):
    """Whatever the class: a layer that no reading of its source found."""
    mask = masks.mask(batch_size=2, q_length=5, kv_length=5, mask_function=function)
    with pytest.raises(NotImplementedError, match=r'the model applies its mask itself.*"eager"'):
        MASK_USES[name](torch.randn(2, 3, 5, 5), mask)


@pytest.mark.parametrize("function", [hf.causal_mask_function, lambda b, h, i, j: j <= i], ids=["rule", "dense"])
def test_a_mask_that_is_applied_as_what_is_kept_is_right(function):
    mask, scores = masks.mask(batch_size=2, q_length=5, kv_length=5, mask_function=function), torch.randn(2, 3, 5, 5)
    truth = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = scores.masked_fill(~truth, -1e9)
    assert torch.equal(scores.masked_fill(~mask, -1e9), expected)
    assert torch.equal(torch.where(mask, scores, -1e9), expected)
    assert torch.equal(scores + torch.where(mask, 0.0, -torch.inf), scores.masked_fill(~truth, -torch.inf))
    moved = mask.transpose(2, 3)
    assert isinstance(moved, Rule) and moved.stride()[2:] == (1, 5)
    assert torch.equal(moved.contiguous().view(2, 25), truth.mT.reshape(25).expand(2, 25))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 4, 8)
    found = layer_call("pallas", q, k, k, mask[..., :4])
    torch.testing.assert_close(found, layer_call("sdpa", q, k, k, truth[:, :4].expand(2, 1, 5, 4)))


# --- arguments -------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


def layer_call(implementation, q, k, v, mask, **options):
    function = transformers.AttentionInterface()[implementation]
    out, weights = function(Layer(), q, k, v, mask, **options)
    assert weights is None
    return out


def test_one_layer_as_for_torchs_own_function():
    """Float masks, position bias, `is_causal`, head sizes that differ, a single query."""
    rows, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    bias, keep = torch.randn(1, 4, 5, 5), torch.rand(2, 1, 5, 5) > 0.4
    keep[..., 0] = True
    for q, mask, options in (
            (rows, None, dict(is_causal=False, scaling=0.2)), (rows, keep, {}), (rows, None, dict(position_bias=bias)),
            (rows, torch.where(keep, 0.0, torch.finfo(torch.float32).min), dict(position_bias=bias)),
            (rows, keep, dict(position_bias=bias)), (rows[:, :, :1], None, {})):
        with torch.no_grad():
            expected = layer_call("sdpa", q, k, v, mask, **options)
            found = layer_call("pallas", q, k, v, mask, **options)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected)


def test_a_window_without_a_mask_is_kept():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    i = torch.arange(5)
    keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 2)
    with torch.no_grad():
        for rows in (slice(0, 5), slice(4, 5)):
            found = layer_call("pallas", q[:, :, rows], k, v, None, sliding_window=2)
            torch.testing.assert_close(found, layer_call("sdpa", q[:, :, rows], k, v, keep[None, None, rows]))


def test_what_cannot_be_right_is_refused():
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        layer_call("pallas", q, q, q, None, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    for name in ("sinks", "indices", "block_indices"):
        with pytest.raises(NotImplementedError, match=f"passes '{name}', which pallas_flash does not read"):
            layer_call("pallas", q, q, q, None, **{name: torch.zeros(1)})
    with pytest.raises(TypeError, match=r"buckets must be a function .*buckets=64"):
        torch_bridge.transformers.register(buckets=64)
    torch_bridge.transformers.register("short", buckets=lambda length: length - 1)
    with torch.no_grad(), pytest.raises(ValueError, match="Round up"):
        layer_call("short", q, q, q, None)
    for name in ("flash", "my_flash_kernel", "paged|pallas", ""):
        with pytest.raises(ValueError, match="Leave it out"):
            torch_bridge.transformers.register(name)


def test_dropout_is_drawn_from_torchs_generator():
    q, outs = torch.randn(2, 4, 5, 8), []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(layer_call("pallas", q, q, q, None, dropout=0.5))
    assert torch.equal(*outs) and not torch.equal(outs[0], layer_call("pallas", q, q, q, None, dropout=0.5))


def test_a_compiled_model(quiet):
    model, inputs = causal_lm("Mistral", num_hidden_layers=1), dict(attention_mask=padding("left"))
    model.set_attn_implementation("pallas")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(tokens(), **inputs, use_cache=False).logits[padding("left") == 1]
        model.set_attn_implementation("eager")
        expected = model(tokens(), **inputs).logits[padding("left") == 1]
    assert distance(found, expected) < 2e-5


def test_without_transformers_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "transformers>=5\.17"'):
        torch_bridge.transformers.register()
