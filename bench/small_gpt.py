"""A small GPT that calls PyTorch's own attention, as models do that know nothing of others."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "Gpt", "Size"]


class Size(NamedTuple):
    """Of a model and its batch, and of the calls whose memory is looked at."""

    batch: int
    length: int
    heads: int
    dim: int
    layers: int
    vocabulary: int
    memory: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, length, dim) of query, key and value."""
        return self.batch, self.heads, self.length, self.dim


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of (batch, length, width)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.heads * size.dim
        self.heads = size.heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norms[0](x)).chunk(3, 2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """The mean cross entropy, in nats, of tokens (batch, length + 1), given those before them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.heads * size.dim
        self.embedding = nn.Embedding(size.vocabulary, width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)), nn.RMSNorm(width))
        self.head = nn.Linear(width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.embedding(tokens[:, :-1])))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
