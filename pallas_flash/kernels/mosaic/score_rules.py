"""Which biases and score functions the kernels know; no Mosaic in here, dispatch asks on any machine."""

from pallas_flash.kernels.mosaic import traced
from pallas_flash.spec import AttentionSpec

__all__ = ["why_not"]


def why_not(spec: AttentionSpec) -> list[str]:
    """The reasons why kernels do not know a spec's bias or score function."""
    bias = spec.bias
    rules = (
        (spec.score is None or bias is None,
         f"takes a bias or a score function, not both yet, score={spec.score} (let the function add the bias)"),
        (bias is None or bias.shape[3] > 1 or spec.kv_len == 1, "takes a bias of keys or of pairs "
         f"(batch, heads, 1 or q_len, kv_len), bias is {bias} (leave it out: it changes lse alone)"),
        (bias is None or bias.dtype.name != "float64" or bias.shape[2] == 1,
         "takes a bias of pairs in 16 or 32 bits only, bias is float64 (cast it)"),
    )
    found = [reason for holds, reason in rules if not holds]
    return found if spec.score is None else [*found, *traced.why_not(spec.score)]
