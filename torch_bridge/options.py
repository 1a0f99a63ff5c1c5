"""The arguments that flash-attn's functions share, checked as they are used."""

from typing import NamedTuple

import numpy as np
import torch

from torch_bridge import flash, messages
from torch_bridge.arguments import Numbers

__all__ = ["Options", "WindowSize"]

WindowSize = tuple[int, int]


class Options(NamedTuple):
    """The arguments that all functions have, under flash-attn's names."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: WindowSize
    softcap: float
    alibi_slopes: torch.Tensor | None
    deterministic: bool

    @property
    def is_local(self) -> bool:
        """Whether there is a rule of positions."""
        return self.causal or self.window is not None

    @property
    def window(self) -> flash.Window | None:
        given = self.window_size
        if not isinstance(given, tuple | list) or len(given) != 2 or not all(map(flash.is_integer, given)):
            raise TypeError(f"window_size must be (left, right), two ints, got window_size={given!r}. Count the keys "
                            "seen on each side of the aligned one; -1 is no limit.")
        left, right = (None if side < 0 else side for side in given)
        return None if left is None and right is None else (left, right)

    @property
    def is_causal(self) -> bool:
        messages.require_bool("causal", self.causal)
        return self.causal

    def places(self, offset: int | torch.Tensor, kv_lengths: torch.Tensor | None = None,
               segment_ids: flash.SegmentIds | None = None) -> flash.Places:
        """Which positions attend, the query at i being at the key i + offset."""
        causal, offset_if_local = self.is_causal, offset if self.is_local else None
        return flash.Places(causal, offset_if_local, self.window, segment_ids, None, kv_lengths)

    def applied(self, numbers: Numbers) -> Numbers:
        """The numbers of a call with the soft cap and the kind of gradients."""
        messages.require_bool("deterministic", self.deterministic)
        return numbers._replace(softcap=self.cap, deterministic=numbers.deterministic or self.deterministic)

    @property
    def cap(self) -> float | None:
        """The soft cap; None for 0, which is none."""
        given = self.softcap
        is_array = isinstance(given, torch.Tensor | np.ndarray) and given.ndim > 0  # of no single truth
        return flash.checked_softcap(None if given is None or (not is_array and given == 0) else given)

    def slopes(self, batch: int, heads: int) -> torch.Tensor | None:
        """(batch or 1, heads), None without ALiBi."""
        if self.alibi_slopes is None:
            return None
        messages.require_tensors(alibi_slopes=self.alibi_slopes)
        if not self.causal and (self.window is None or self.window[1] != 0):
            raise NotImplementedError(
                "alibi_slopes needs causal=True, or a window_size whose right is 0: with keys on both sides the bias "
                "would be an array of seqlen_q * seqlen_k. Pass that as attn_mask to torch_bridge.flash_attention.")
        slopes = self.alibi_slopes if self.alibi_slopes.dim() == 2 else self.alibi_slopes[None]
        if slopes.dim() != 2 or slopes.shape[0] not in (1, batch) or slopes.shape[1] != heads:
            raise messages.must(f"alibi_slopes must be (heads,) = ({heads},), or (batch, heads) = ({batch}, {heads})",
                                f"alibi_slopes.shape={tuple(self.alibi_slopes.shape)}", "Give one for each head")
        return slopes.detach()
