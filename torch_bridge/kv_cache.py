"""A cache of keys and values, contiguous or in pages, as flash-attn has it: rows are appended in place."""

from typing import NamedTuple

import torch

from torch_bridge import messages

__all__ = ["KVCache", "Rotary"]


class KVCache(NamedTuple):
    """Keys and values (rows, length, heads, dim); of pages (pages, page_length, heads, dim)."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor | None  # of each sequence, its row of the cache, (batch,); None: its own number
    pages: torch.Tensor | None  # of each sequence, its pages in order, (batch, pages); None: the cache has no pages

    def check(self, batch: int) -> None:
        """Raises where shapes do not fit to a batch."""
        if self.keys.dim() != 4 or self.keys.shape[:3] != self.values.shape[:3]:
            raise messages.must("k_cache and v_cache must be (batch, seqlen, heads, dim), equal but for dim",
                                messages.shapes(k_cache=self.keys, v_cache=self.values), "Allocate them alike")
        named = {"cache_batch_idx": (self.rows, 1), "block_table": (self.pages, 2)}
        for name, (table, axes) in named.items():
            if table is not None and (table.dim() != axes or table.shape[0] != batch or table.is_floating_point()):
                raise messages.must(f"{name} must hold integers, {axes} axes, the first of them batch = {batch}",
                                    f"{name}.shape={tuple(table.shape)}, {name}.dtype={table.dtype}", "Reshape it")
        if self.rows is None and self.pages is None and self.keys.shape[0] != batch:
            raise messages.must(f"k_cache must have as many rows as q, {batch}, without cache_batch_idx",
                                f"k_cache.shape={tuple(self.keys.shape)}", "Pass cache_batch_idx, or a part of it")

    @property
    def length(self) -> int:
        """How many positions a sequence has room for."""
        return self.keys.shape[1] if self.pages is None else self.keys.shape[1] * self.pages.shape[1]

    def append(self, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor) -> None:
        """Writes (batch, new, heads, dim) in place, from position at (batch,) of each sequence on."""
        pos = at.long()[:, None] + torch.arange(key.shape[1], device=key.device)
        if self.pages is not None:
            page_length = self.keys.shape[1]
            index = (self.pages.long().gather(1, pos // page_length), pos % page_length)
        else:
            rows = torch.arange(key.shape[0], device=key.device) if self.rows is None else self.rows.long()
            index = (rows[:, None].expand_as(pos), pos)
        self.keys.index_put_(index, key)
        self.values.index_put_(index, value)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, length, heads, dim): the cache itself, or a copy of what rows or pages name."""
        if self.pages is not None:  # what a table holds behind the end of a sequence may be anything
            pages = self.pages.long().clamp(0, self.keys.shape[0] - 1)
            return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)
        if self.rows is not None:
            return self.keys[self.rows.long()], self.values[self.rows.long()]
        return self.keys, self.values


class Rotary(NamedTuple):
    """Rotary embeddings of the first 2 * cos.shape[1] entries of a head."""

    cos: torch.Tensor  # (positions, rotary_dim / 2)
    sin: torch.Tensor
    interleaved: bool  # entries 0 and 1, 2 and 3, ... are pairs; else 0 and rotary_dim / 2, ...

    def check(self, dim: int) -> None:
        """Raises where shapes do not fit to heads of a dim."""
        if self.cos.dim() != 2 or self.cos.shape != self.sin.shape or 2 * self.cos.shape[1] > dim:
            raise messages.must(f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), rotary_dim <= {dim}",
                                messages.shapes(rotary_cos=self.cos, rotary_sin=self.sin), "Pass tables of both")

    def rotate(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """x (batch, length, heads, dim) at positions (batch, length), in float32 and rounded to the dtype of x."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (table[pos.long()][:, :, None].to(wide) for table in (self.cos, self.sin))
        width = 2 * self.cos.shape[1]
        turned, rest = x[..., :width].to(wide), x[..., width:]
        shape = (-1, 2) if self.interleaved else (2, -1)
        axis = -1 if self.interleaved else -2
        a, b = turned.unflatten(-1, shape).unbind(axis)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2)
        return torch.cat((turned.to(x.dtype), rest), -1)
