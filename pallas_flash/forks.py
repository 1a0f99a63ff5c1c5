"""Processes forked after JAX has started: JAX's threads do not exist there, and its computations never finish."""

import os
import sys

from pallas_flash import compat

__all__ = ["note_start_of_jax", "require_no_fork"]

_started_in: int | None = None  # the process in which JAX runs, as far as is known
_parent: int | None = None  # the process in which JAX ran when this one was forked


def note_start_of_jax() -> None:
    """Notes, before a fork, whether JAX has started, so that the child would have a JAX without threads."""
    global _started_in
    _started_in = os.getpid() if "jax" in sys.modules and compat.backends_are_initialized() else None


def _note_fork() -> None:
    global _parent
    _parent = _parent or _started_in  # children of such a child have no threads either


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=note_start_of_jax, after_in_child=_note_fork)


def require_no_fork(function: str) -> None:
    """Raises RuntimeError in a child that was forked after JAX had started.

    Args:
      function: the name of the function that was called.
    """
    if _parent is not None:
        raise RuntimeError(
            f"{function} must not run in a process that was forked after JAX had started, got pid={os.getpid()}, a "
            f"fork of pid={_parent}: JAX's threads are not in it, and the call would wait for them for ever. Start the "
            'process with the method "spawn" or "forkserver" (multiprocessing.get_context("spawn"); '
            'torch.utils.data.DataLoader(..., multiprocessing_context="spawn")), or fork before JAX is used.')
