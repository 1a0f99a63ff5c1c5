"""A small GPT, which calls this project's function."""

import torch

import torch_bridge

__all__ = ["Block", "Gpt"]


class Block(torch.nn.Module):
    """Causal attention of `heads` heads and a residual connection, of (batch, length, width)."""

    def __init__(self, width=32, heads=4, dropout=0.0):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        out = torch_bridge.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Gpt(torch.nn.Module):
    """Logits (batch, length, 50) of tokens (batch, length)."""

    def __init__(self, width=32, heads=4, blocks=2):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(50, width), torch.nn.Linear(width, 50)
        self.blocks = torch.nn.Sequential(*(Block(width, heads) for _ in range(blocks)))

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))
