"""Interpret mode: kernels on a CPU, in Pallas' GPU interpreter, with its race detector.

The interpreter runs everything but inline PTX. So each function that emits PTX has a plain meaning in JAX beside it,
which takes its place while a kernel is traced inside `interpreted()`. Named barriers do nothing there: where order
matters to results, not to speed alone, a kernel needs one of Pallas' barriers.

An asynchronous operation reads its buffers until it has been waited for, but its plain meaning reads them at once, and
the race detector would miss a buffer that is overwritten too early. So it also names the buffers (`issue`), and the
plain meaning of the wait reads them again (`wait`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["interpreted", "interpreted_as", "issue", "wait"]

_in_flight: contextvars.ContextVar[list[tuple[Ref, ...]] | None] = contextvars.ContextVar("in_flight", default=None)
"""In interpret mode, the buffers of each operation in flight, the oldest first; otherwise None."""


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Runs the kernels that are traced inside in interpret mode."""
    token = _in_flight.set([])
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _in_flight.reset(token)


def interpreted_as[**P, R](plain: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Replaces the decorated function, in interpret mode, with `plain`; mypy sees that their signatures agree."""
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
            return (function if _in_flight.get() is None else plain)(*args, **kwargs)

        return chosen

    return decorate


def issue(*buffers: Ref) -> None:
    """Starts an operation that reads `buffers` until `wait` has let it finish; for plain meanings only."""
    _operations().append(buffers)


def wait(pending: int) -> None:
    """Finishes the oldest operations, until at most `pending` are in flight; for plain meanings only."""
    operations = _operations()
    while len(operations) > pending:
        for buffer in operations.pop(0):
            buffer[...]


def _operations() -> list[tuple[Ref, ...]]:
    operations = _in_flight.get()
    assert operations is not None, "a plain meaning was called outside of interpret mode"
    return operations
