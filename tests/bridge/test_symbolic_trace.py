"""torch.fx.symbolic_trace of the functions of torch_bridge: one node where they are wrapped, else a sentence."""

import pytest
import torch

import torch_bridge
from torch_bridge import flash_attn

attend = torch_bridge.scaled_dot_product_attention
torch.fx.wrap("attend")
Q = torch.randn(1, 2, 5, 8)


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) * 2


DIRECT = {
    "sdpa": lambda x: torch_bridge.scaled_dot_product_attention(x, x, x, is_causal=True),
    "flash": lambda x: torch_bridge.flash_attention(x, x, x), "func": lambda x: flash_attn.flash_attn_func(x, x, x),
    "qkvpacked": flash_attn.flash_attn_qkvpacked_func, "kvpacked": lambda x: flash_attn.flash_attn_kvpacked_func(x, x),
    "varlen": lambda x: flash_attn.flash_attn_varlen_func(x, x, x, x, x, 3, 3),
    "varlen qkvpacked": lambda x: flash_attn.flash_attn_varlen_qkvpacked_func(x, x, 3),
    "varlen kvpacked": lambda x: flash_attn.flash_attn_varlen_kvpacked_func(x, x, x, x, 3, 3),
    "cache": lambda x: flash_attn.flash_attn_with_kvcache(x, x, x),
    "partial": lambda x: torch_bridge.partial_attention(x, x, x),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_direct_call_says_what_to_do(name):
    """It named the types, and functions of arrays."""
    function = DIRECT[name]
    with pytest.raises(TypeError, match=r"Proxy.*torch.fx.wrap\(\"attend\"\)"):
        torch.fx.symbolic_trace(Model(lambda x: function(x)))


def test_a_wrapped_function_is_one_node():
    traced = torch.fx.symbolic_trace(Model(lambda x: attend(x, x, x, is_causal=True)))
    assert next(node.target for node in traced.graph.nodes if node.op == "call_function") is attend
    torch.testing.assert_close(traced(Q), attend(Q, Q, Q, is_causal=True) * 2)
