"""Calls with score functions on the direct path: which are launched, and what their plans are told of the function.

A function has its name from JAX (score_names.py), which is imported with the first of such calls.
"""

__all__ = ["rules", "text"]


def rules(name: str | None, batch: int, heads: int) -> tuple[tuple[bool, str], ...]:
    """What must hold of a call with the function of a name, and why it does not; nothing without a function."""
    if name is None:
        return ()
    from torch_bridge import score_names
    found, reason = _as_data(name)
    return ((score_names.fits(name, batch, heads),  # JAX raises, and says more
             "an array of the score function is of other batch entries or heads than query"),
            (found is not None, f"the process that compiles is not told of this score function: {reason}"))


def text(name: str | None) -> str | None:
    """The text of the function of a name (score_ir.py), which is part of a plan's key."""
    return None if name is None else _as_data(name)[0]


def _as_data(name: str) -> tuple[str | None, str]:
    from torch_bridge import score_names
    return score_names.as_data(name)
