"""A cache of keys and values, contiguous or in pages, as flash-attn has it: rows are appended in place."""

from typing import NamedTuple, TypedDict

import torch

from torch_bridge import cached, flash, messages
from torch_bridge.direct import decoding

__all__ = ["KVCache", "Keywords", "Rotary", "again", "usual"]


class Keywords(TypedDict, total=False):
    """The arguments of `flash_attn.flash_attn_with_kvcache` behind q and the cache, by which others hand them on."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cache_seqlens: int | torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    rotary_interleaved: bool
    alibi_slopes: torch.Tensor | None
    num_splits: int
    return_softmax_lse: bool


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
        if self.rows is not None and self.pages is not None:
            raise messages.must("cache_batch_idx and block_table exclude each other", "both",
                                "Pass block_table[cache_batch_idx] alone")
        named = {"cache_batch_idx": (self.rows, 1), "block_table": (self.pages, 2)}
        for name, (table, axes) in named.items():
            if table is not None and (table.dim() != axes or table.shape[0] != batch or table.dtype not in _INDICES):
                raise messages.must(f"{name} must hold integers, {axes} axes, the first of them batch = {batch}",
                                    f"{name}.shape={tuple(table.shape)}, {name}.dtype={table.dtype}", "Reshape it")
        if self.rows is None and self.pages is None and self.keys.shape[0] != batch:
            raise messages.must(f"k_cache must have as many rows as q, {batch}, without cache_batch_idx",
                                f"k_cache.shape={tuple(self.keys.shape)}", "Pass cache_batch_idx, or a part of it")
        if self.rows is not None:
            _check_range("cache_batch_idx", self.rows, self.keys.shape[0], "row of k_cache")

    def check_new(self, key: torch.Tensor, value: torch.Tensor, batch: int) -> None:
        """Raises unless key and value (batch, new, heads, dim) can be written to the cache as they are."""
        for name, x, cache in (("k", key, self.keys), ("v", value, self.values)):
            wanted = (batch, key.shape[1], *cache.shape[2:])
            if x.shape != wanted or x.dtype != cache.dtype:
                raise messages.must(f"{name} must be (batch, seqlen_new, heads, dim) = {wanted}, {cache.dtype} as its "
                                    "cache",
                                    f"{name}.shape={tuple(x.shape)}, {name}.dtype={x.dtype}", "Cast or expand it")
            if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
                raise messages.must(f"{name}_cache must have memory for each of its elements: {name} is written to it",
                                    f"{name}_cache.stride()={cache.stride()}",
                                    "Pass a copy: expanded axes are one place for all sequences")

    @property
    def length(self) -> int:
        """How many positions a sequence has room for."""
        return self.keys.shape[1] if self.pages is None else self.keys.shape[1] * self.pages.shape[1]

    def lengths(self, cache_seqlens: int | torch.Tensor | None, q: torch.Tensor, new: int) -> torch.Tensor:
        """How many positions of each sequence count before `new` more are appended, (batch,) int32."""
        room = self.length - new
        must = f"cache_seqlens must be from 0 to seqlen_cache - seqlen_new = {room}"
        if isinstance(cache_seqlens, torch.Tensor):
            lengths = flash.integers("cache_seqlens", cache_seqlens, q.transpose(1, 2))
            if flash.is_on_host(cache_seqlens) and ((lengths < 0) | (lengths > room)).any():
                raise messages.must(must, f"cache_seqlens={lengths.tolist()}", "Allocate a longer cache, or give the "
                                    "sequence more pages")
            return lengths
        count = self.length if cache_seqlens is None else cache_seqlens
        if not flash.is_integer(count):
            raise TypeError("cache_seqlens must be an int, or a Tensor of integers (batch,), got type(cache_seqlens)="
                            f"{type(cache_seqlens).__name__}. Wrap it: torch.tensor(...) on the device of q.")
        if not 0 <= count <= room:
            raise messages.must(must, f"{cache_seqlens=}", "Allocate a longer cache, or give the sequence more pages")
        return torch.full((q.shape[0],), count, dtype=torch.int32, device=q.device)

    def append(self, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor) -> None:
        """Writes (batch, new, heads, dim) in place, from position at (batch,) of each sequence on."""
        places = self._places(at, key.shape[1])
        table = self.rows if self.pages is None else self.pages
        if table is not None and flash.is_on_host(places) and places.unique().numel() < places.numel():
            name = "cache_batch_idx" if self.pages is None else "block_table"
            raise messages.must(f"{name} must give each sequence places of its own to write k and v to",
                                f"{name}={table.tolist()}", "Copy what sequences share before they differ")
        cached.append(self.keys, key, places)
        cached.append(self.values, value, places)

    def _places(self, at: torch.Tensor, count: int) -> torch.Tensor:
        """(batch, count) int64: row * length + position in it, of so many positions from `at` on."""
        length, batch, device = self.keys.shape[1], at.shape[0], at.device
        pos = at.long()[:, None]
        if count > 1:
            pos = pos + torch.arange(count, device=device)
        if self.pages is not None:
            pages = self.pages.gather(1, pos // length)
            _check_range("block_table", pages, self.keys.shape[0], "page of k_cache")
            return pages * length + pos % length
        if self.rows is not None:
            return self.rows.long()[:, None] * length + pos
        return pos if batch == 1 else pos + torch.arange(0, batch * length, length, device=device)[:, None]

    def check_pages(self, lengths: torch.Tensor) -> None:
        """Raises where the host knows that a page of positions below the lengths (batch,) is not there."""
        if self.pages is None or not flash.is_on_host(lengths) or not flash.is_on_host(self.pages):
            return
        used = cached.first_of_pages(self.pages, self.keys.shape[1]) < lengths[:, None]
        _check_range("block_table", self.pages[used], self.keys.shape[0], "page of k_cache, up to the end of each "
                     "sequence")

    def lacks(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """Which sequences of so many positions lack a page, booleans (batch,); None: `check_pages` has seen to it."""
        if self.pages is None or (flash.is_on_host(lengths) and flash.is_on_host(self.pages)):
            return None
        return cached.lack(self.pages, lengths, *self.keys.shape[:2])

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, length, heads, dim): the cache itself, or a copy of what rows or pages name."""
        if self.pages is not None:  # what a table holds behind the end of a sequence may be anything; before: `lacks`
            pages = self.pages.long().clamp(0, self.keys.shape[0] - 1)
            return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)
        if self.rows is not None:
            return self.keys[self.rows.long()], self.values[self.rows.long()]
        return self.keys, self.values


_INDICES = (torch.int32, torch.int64)


def _check_range(name: str, indices: torch.Tensor, count: int, last: str) -> None:
    """Raises where indices that the host knows are not below count; `last` says what the last one is."""
    if flash.is_on_host(indices) and ((indices < 0) | (indices >= count)).any():
        raise messages.must(f"{name} must be from 0 to {count - 1}, the last {last}", f"{indices.tolist()}",
                            "Allocate more")


class Rotary(NamedTuple):
    """Rotary embeddings of the first 2 * cos.shape[1] entries of a head."""

    cos: torch.Tensor  # (positions, rotary_dim / 2)
    sin: torch.Tensor
    interleaved: bool  # entries 0 and 1, 2 and 3, ... are pairs; else 0 and rotary_dim / 2, ...

    @classmethod
    def of(cls, cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool, q: torch.Tensor,
           k: torch.Tensor | None) -> "Rotary | None":
        """The checked embeddings of a call with these queries and new keys; None: it has none."""
        if cos is None and sin is None:
            return None
        if cos is None or sin is None or k is None:
            raise messages.must(
                "rotary_cos and rotary_sin go together, and with k and v",
                f"rotary_cos={type(cos).__name__}, rotary_sin={type(sin).__name__}, k={type(k).__name__}",
                "Rotate q before the call where nothing is appended")
        found = cls(cos, sin, interleaved)
        found.check(q.shape[3])
        return found

    def check(self, dim: int) -> None:
        """Raises where shapes do not fit to heads of a dim."""
        if self.cos.dim() != 2 or self.cos.shape != self.sin.shape or 2 * self.cos.shape[1] > dim:
            raise messages.must(f"rotary_cos and rotary_sin must be (positions, rotary_dim / 2), rotary_dim <= {dim}",
                                messages.shapes(rotary_cos=self.cos, rotary_sin=self.sin), "Pass tables of both")

    def rotate(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """x (batch, length, heads, dim) at positions (batch, length), in float32 and rounded to the dtype of x."""
        _check_range("cache_seqlens and the positions after it", pos, self.cos.shape[0], "position of rotary_cos")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (table[pos.long()][:, :, None].to(wide) for table in (self.cos, self.sin))
        width = 2 * self.cos.shape[1]
        turned, rest = x[..., :width].to(wide), x[..., width:]
        shape = (-1, 2) if self.interleaved else (2, -1)
        axis = -1 if self.interleaved else -2
        a, b = turned.unflatten(-1, shape).unbind(axis)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2)
        return torch.cat((turned.to(x.dtype), rest), -1)


# --- calls like one before -------------------------------------------------------------------------------------------

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def usual(q: torch.Tensor, cache: KVCache, new: tuple[torch.Tensor | None, torch.Tensor | None], lengths: object,
          others: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...] | None:
    """All tensors of a call that may be known by them, lengths the fourth; None: it has others, or lengths that are
    converted first, or none that a kernel would be launched for.
    """
    if torch.compiler.is_compiling() or cache.rows is not None or any(x is not None for x in others):
        return None
    if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int32 or type(q) not in _PLAIN:
        return None
    tensors = tuple(x for x in (q, cache.keys, cache.values, lengths, cache.pages, *new) if x is not None)
    return tensors if all(type(x) in _PLAIN for x in tensors) and decoding.is_asked(q.device) else None


def again(known: decoding.Known, q: torch.Tensor, cache: KVCache,
          new: tuple[torch.Tensor | None, torch.Tensor | None],
          lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call like others before it, which were checked."""
    k, v = new
    if k is not None and v is not None:
        cache.append(k, v, lengths)
        lengths = lengths + k.shape[1]
    tensors = q, cache.keys, cache.values, lengths
    return known.attend(tensors if cache.pages is None else (*tensors, cache.pages))
