"""What the training examples learn from: the sources of Python's standard library, one ASCII character a token."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY = 128
"""Number of tokens; a character outside ASCII reads as a question mark."""


def encode(text: str) -> np.ndarray:
    """Text -> int32 tokens (length,)."""
    return np.frombuffer(text.encode("ascii", errors="replace"), np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> str:
    """Tokens -> text."""
    return bytes(np.asarray(tokens, np.uint8)).decode("ascii")


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on and tokens held out: every tenth of the modules, so that no file is in both."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise FileNotFoundError("this Python has no sources of its standard library; run the example with one that has")
    sources = [encode(file.read_text(encoding="utf-8", errors="replace")) for file in files]
    held_out = sources[5::10]
    return np.concatenate([source for i, source in enumerate(sources) if i % 10 != 5]), np.concatenate(held_out)


def batches(tokens: np.ndarray, steps: int, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` random excerpts (batch, context + 1): each token's target is the one after it."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(tokens) - context, size=(batch, 1))
        yield tokens[starts + np.arange(context + 1)]
