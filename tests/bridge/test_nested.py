"""Nested (jagged) tensors in scaled_dot_product_attention: each sequence as torch computes it alone."""

import pytest
import torch
from torch.nested import nested_tensor_from_jagged

import torch_bridge
from bridge.problems import OURS, TORCH

H, D, OFFSETS, OTHERS = 4, 8, torch.tensor([0, 4, 4, 9]), torch.tensor([0, 1, 3, 10])


def values(offsets, heads=H):
    return torch.randn(int(offsets[-1]), heads, D, dtype=torch.float64, requires_grad=True)


def nested(x, offsets):
    return nested_tensor_from_jagged(x, offsets).transpose(1, 2)


def alone(query, key, value, q_offsets, kv_offsets, **keywords):
    parts = [x.split(offsets.diff().tolist())
             for x, offsets in ((query, q_offsets), (key, kv_offsets), (value, kv_offsets))]
    outs = [TORCH(*(x[None].transpose(1, 2) for x in sequence), **keywords)[0].transpose(0, 1)
            for sequence in zip(*parts, strict=True)]
    return torch.cat(outs)


def assert_same(found, expected, leaves):
    dout = torch.randn_like(expected)
    for a, b in zip(*([x, *torch.autograd.grad(x, leaves, dout)] for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_self_attention_in_a_layer():
    """Projections before and after, so that the result must be nested as the input is."""
    x, project = values(OFFSETS).flatten(1).detach().requires_grad_(), torch.nn.Linear(H * D, H * D).double()

    def attend(x):
        heads = project(nested_tensor_from_jagged(x, OFFSETS)).unflatten(-1, (H, D)).transpose(1, 2)
        out = OURS(heads, heads, heads, is_causal=True)
        return (out + heads).transpose(1, 2).flatten(-2).values()
    heads = project(x).unflatten(-1, (H, D))
    expected = (alone(heads, heads, heads, OFFSETS, OFFSETS, is_causal=True) + heads).flatten(-2)
    assert_same(attend(x), expected, (x, *project.parameters()))


def test_cross_attention_of_grouped_queries():
    """The first query is aligned with the first key of its sequence also where lengths differ."""
    query, key, value = values(OFFSETS), values(OTHERS, 2), values(OTHERS, 2)
    keys = nested(key, OTHERS), nested(value, OTHERS)
    keywords = dict(is_causal=True, scale=0.4, enable_gqa=True)
    out = OURS(nested(query, OFFSETS), *keys, **keywords)
    expected = alone(query, key, value, OFFSETS, OTHERS, **keywords)
    assert_same(out.transpose(1, 2).values(), expected, (query, key, value))


def test_with_gaps():
    padded = torch.randn(2, 6, H, D, dtype=torch.float64)
    x = torch.nested.narrow(padded, 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged).transpose(1, 2)
    tight = torch.cat((padded[0, :3], padded[1, 1:3]))
    expected = alone(tight, tight, tight, *[torch.tensor([0, 3, 5])] * 2)
    torch.testing.assert_close(OURS(x, x, x).transpose(1, 2).values(), expected)


def test_compile_without_a_break(quiet):
    x = values(OFFSETS)

    def step(x):
        query = nested(x, OFFSETS)
        return OURS(query, query, query, is_causal=True).transpose(1, 2).values()
    assert_same(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x), (x,))


def test_errors():
    x = nested(values(OFFSETS).detach(), OFFSETS)
    with pytest.raises(RuntimeError, match=r"must all be \(batch, heads, ragged length, dim\).*key: torch.strided"):
        OURS(x, torch.zeros(3, H, 5, D), x)
    with pytest.raises(RuntimeError, match="ragged length, dim"):
        OURS(x.transpose(1, 2), x, x)
    with pytest.raises(RuntimeError, match="attn_mask must be None with nested tensors"):
        OURS(x, x, x, torch.zeros(1))
    with pytest.raises(RuntimeError, match="key and value must have the same offsets"):
        OURS(x, x, nested(values(OTHERS).detach(), OTHERS))
    with pytest.raises(RuntimeError, match="enable_gqa=True"):
        OURS(x, *[nested(values(OFFSETS, 2).detach(), OFFSETS)] * 2)
    with pytest.raises(TypeError, match="must be Tensors"):
        OURS(x, None, x)
    with pytest.raises(TypeError, match="is_causal and enable_gqa must be bool"):
        OURS(x, x, x, is_causal=1)
    dense = torch.zeros(3, H, 5, D, dtype=torch.float64)
    for call in (OURS, torch_bridge.flash_attention):
        with pytest.raises(RuntimeError, match=r"strided tensors, got layout torch.jagged.*all three.*varlen_func"):
            call(dense, x, x)


def test_what_runs_is_explained():
    """It was an error that sent to PyTorch's own function."""
    x, y = (nested(values(offsets).detach(), offsets) for offsets in (OFFSETS, OTHERS))
    text = torch_bridge.explain(x, y, y, is_causal=True)
    assert f"len={OFFSETS[-1]}x{OTHERS[-1]}" in text and "on cpu: implementation='xla'" in text
    with pytest.raises(RuntimeError, match="attn_mask must be None"):
        torch_bridge.explain(x, y, y, torch.zeros(1))
    for call in (OURS, torch_bridge.explain):
        with pytest.raises(TypeError, match="is_causal and enable_gqa must be bool"):
            call(x, y, y, is_causal=1)
