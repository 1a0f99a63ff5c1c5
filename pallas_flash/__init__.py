"""Exact, tiled, causal FlashAttention for JAX on NVIDIA GPUs and everywhere else; see `flash_attention`."""

from pallas_flash.attention import dot_product_attention, explain, flash_attention
from pallas_flash.autodiff import RESIDUAL_NAMES
from pallas_flash.context_parallel.attention import context_parallel_attention
from pallas_flash.context_parallel.explanation import explain_context_parallel
from pallas_flash.context_parallel.order import positions, reorder
from pallas_flash.context_parallel.settings import ContextParallel
from pallas_flash.errors import FallbackWarning, UnsupportedError
from pallas_flash.mask_check import check_mask
from pallas_flash.masks import Causal, Dense, Full, InBounds, Mask, PrefixLM, SegmentIds, Window
from pallas_flash.relative_scores import ALiBi, RelativeBias, alibi_slopes
from pallas_flash.scores import Score
from pallas_flash.spec import AttentionSpec

__all__ = [
    "RESIDUAL_NAMES", "ALiBi", "AttentionSpec", "Causal", "ContextParallel", "Dense", "FallbackWarning", "Full",
    "InBounds", "Mask", "PrefixLM", "RelativeBias", "Score", "SegmentIds", "UnsupportedError", "Window", "alibi_slopes",
    "check_mask", "context_parallel_attention", "dot_product_attention", "explain", "explain_context_parallel",
    "flash_attention", "positions", "reorder",
]
__version__ = "0.1.0"
