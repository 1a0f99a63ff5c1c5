"""Errors say what must hold, what was given and what to write; their types are torch's."""

import inspect

import numpy as np
import pytest
import torch

import torch_bridge
from bridge.problems import OURS, TORCH, qkv
from torch_bridge import arguments

B, H, L, S, E = 2, 4, 5, 7, 8
Q, KV = (B, H, L, E), (B, H, S, E)


def error(*args, **kwargs):
    """Ours, of the type of torch's."""
    with pytest.raises(Exception) as theirs:
        TORCH(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        OURS(*args, **kwargs)
    assert ours.type is theirs.type
    return str(ours.value)


@pytest.mark.parametrize(("name", "instead"), [
    ("causal", "is_causal=True"), ("window_size", r"flash_attention\(window=\(left, right\)\)"), ("mask", "attn_mask="),
    ("softmax_scale", "scale="), ("dropout", "dropout_p="), ("key_padding_mask", r"mask\[:, None, None, :\]"),
    ("softcap", r"flash_attention\(softcap="), ("nonsense", "It takes query"),
    ("causal_offset", r"flash_attention\(is_causal=True, causal_offset=")])
def test_keywords_of_other_functions(name, instead):
    text = error(*qkv(Q, KV, KV), **{name: True})
    assert text.startswith(f"scaled_dot_product_attention() got an unexpected keyword argument {name!r}.")
    assert "Use " in text or name == "nonsense"
    for call in (OURS, torch_bridge.explain, torch_bridge.precompile):
        with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) got an unexpected .*{instead}"):
            call(*qkv(Q, KV, KV), **{name: True})


def test_the_signature_is_torchs():
    expected = "query key value attn_mask dropout_p is_causal scale enable_gqa"  # torch's own is in C++
    for function in (OURS, torch_bridge.explain, torch_bridge.precompile):
        parameters = inspect.signature(function).parameters
        assert " ".join(parameters) == expected
        assert [x.name for x in parameters.values() if x.kind is x.KEYWORD_ONLY] == ["scale", "enable_gqa"]


@pytest.mark.parametrize("heads", [1, 2])
def test_grouped_heads_without_enable_gqa(heads):
    """Torch's "Attempting to broadcast a dimension of length 2 at -1" came through."""
    key, value = (torch.randn(B, count, S, E) for count in (2, 2 // heads))
    text = error(torch.randn(Q), key, value)
    assert "enable_gqa=True" in text and "key.shape=(2, 2, 7, 8)" in text
    OURS(torch.randn(Q), key, value, enable_gqa=True)


def test_other_leading_axes():
    text = error(*qkv(Q, (3, H, S, E), (3, H, S, E)))
    assert "leading axes" in text and "key.shape=(3, 4, 7, 8)" in text and "enable_gqa" not in text
    text = error(*qkv(Q, (B, 3, S, E), (B, 3, S, E)), enable_gqa=True)
    assert "must divide" in text and "Attempting" not in text


@pytest.mark.parametrize(("shape", "written"), [
    ((B, S), "attn_mask[:, None, None, :]"), ((B, L, S), "attn_mask[:, None]"), ((B, 1, S), "attn_mask[:, None]")])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_a_batch(shape, written, dtype):
    """What is written in the message works, and means what such a mask means."""
    tensors, mask = qkv(Q, KV, KV), (torch.rand(shape) > 0.3).to(dtype)
    text = error(*tensors, mask)
    assert f"pass {written}." in text and f"attn_mask.shape={shape}" in text and "(2, 4, 5, 7)" in text
    out = OURS(*tensors, eval(written, {"attn_mask": mask}))
    full = mask.reshape(B, 1, -1, S).expand(B, H, L, S)
    torch.testing.assert_close(out, TORCH(*tensors, full))


@pytest.mark.parametrize("name", ["scale", "dropout_p"])
@pytest.mark.parametrize("value", ["a", "0.5", 1j, torch.tensor([0.5, 0.2]), [0.5], np.ones(3), np.ones(1)], ids=repr)
def test_numbers(name, value):
    assert f"argument {name!r} must be float, not {type(value).__name__}" in error(*qkv(Q, KV, KV), **{name: value})


@pytest.mark.parametrize("value", [torch.tensor(0.25), torch.tensor([0.25]), True, 1], ids=repr)
def test_what_counts_as_a_number(value):
    tensors = qkv(Q, KV, KV)
    torch.testing.assert_close(OURS(*tensors, scale=value), TORCH(*tensors, scale=float(value)))


def test_a_scale_that_is_learnt_has_no_gradient_here():
    """It became a number, so its gradient was None without a word."""
    scale = torch.tensor(0.25, requires_grad=True)
    for call in (OURS, torch_bridge.flash_attention):
        with pytest.raises(TypeError, match=r"'scale' has no gradient.* pass query \* scale"):
            call(*qkv(Q, KV, KV), scale=scale)


def test_a_causal_bias_beside_is_causal():
    """PyTorch's own test matches this text."""
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left
    for bias in (causal_upper_left(L, S), causal_lower_right(L, S)):
        assert "CausalBias should not be used with causal=True" in error(*qkv(Q, KV, KV), bias, is_causal=True)


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("spread", [(0,), (1, 2)], ids=str)
def test_a_dtensor_beside_a_tensor(mesh, spread):
    from torch.distributed.tensor import Shard, distribute_tensor
    tensors = qkv(Q, (B, 2, S, E), (B, 2, S, E), requires_grad=False)
    mixed = [distribute_tensor(x, mesh, [Shard(1)]) if i in spread else x for i, x in enumerate(tensors)]
    with pytest.raises(RuntimeError, match=r"all be DTensors.*DTensor \(2, .*to_local"):
        OURS(*mixed)
    local = [x.to_local() if i in spread else x for i, x in enumerate(mixed)]
    assert torch.equal(OURS(*local, enable_gqa=True), OURS(*tensors, enable_gqa=True))


def test_the_largest_number_is_that_of_a_spec():
    from pallas_flash.spec import LARGEST_NUMBER
    assert arguments.LARGEST_NUMBER == LARGEST_NUMBER
