"""What torch.utils.flop_counter counts of our operators, beside what it counts of torch's own attention."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as theirs
from torch.utils.flop_counter import FlopCounterMode

import torch_bridge
from bridge.problems import OURS, qkv

ROOT = Path(__file__).parents[2]


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operators_count_as_those_of_torch():
    """They counted 0."""
    tensors = qkv(*[(2, 3, 16, 8)] * 3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), torch.no_grad():
        wanted = counted(lambda: theirs(*tensors))
    forward = 2 * 2 * 3 * 16 * 16 * (8 + 8)
    with torch.no_grad():
        assert counted(lambda: OURS(*tensors)) == forward and wanted in (0, forward), "torch's own on a CPU: 0 or that"
    assert counted(lambda: OURS(*tensors, is_causal=True).sum().backward()) == forward * 7 // 2
    assert counted(lambda: torch.compile(OURS, backend="aot_eager")(*tensors)) == forward


def test_grouped_queries_and_caches_count_the_heads_of_queries():
    q, k, v = qkv((2, 4, 5, 16), (2, 2, 12, 16), (2, 2, 12, 8), requires_grad=False)
    assert counted(lambda: OURS(q, k, v, enable_gqa=True)) == 2 * 2 * 4 * 5 * 12 * (16 + 8)
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 32, 2, 16)
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    assert counted(lambda: torch_bridge.flash_attn.flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths)) == (
        2 * 2 * 4 * 32 * (16 + 16))


@pytest.mark.parametrize("first", ["torch_bridge", "torch.utils.flop_counter"])
def test_the_counter_is_imported_by_who_uses_it(first):
    code = f"""
import importlib, importlib.util, sys, torch
importlib.import_module({first!r})
assert {first!r} != "torch_bridge" or "torch.utils.flop_counter" not in sys.modules
assert importlib.util.find_spec("torch.utils.flop_counter") is not None  # which imports nothing
import torch_bridge, torch.utils.flop_counter as counter
for name in ("attention", "attention_backward", "attention_to_cache", "attention_direct"):
    assert getattr(torch.ops.pallas_flash, name) in counter.flop_registry
assert not any(type(finder).__module__.startswith("torch_bridge") for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
