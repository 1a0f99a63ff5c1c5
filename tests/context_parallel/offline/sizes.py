"""The problem that is compiled for several devices: one causal layer, small, because sizes do not change what is sent
when."""

from pallas_flash.context_parallel import model

__all__ = ["SEQUENCE", "problem"]

SEQUENCE = 16384


def problem(n: int) -> model.Problem:
    """Its sizes on each of n devices."""
    return model.Problem(batch=1, length=SEQUENCE // n, n=n, q_heads=8, kv_heads=4, d=128, d_v=128, itemsize=2,
                         share=0.5)
