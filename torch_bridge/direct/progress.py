"""What is shown while a plan is made: nothing for a second, then tqdm's bar, or a line where there is no tqdm."""

import contextlib
import importlib
import math
import sys
import time
from typing import Protocol, Self

__all__ = ["Progress"]

SILENT_SECONDS = 1.0


class Progress:
    """Shows, on the standard error, what takes longer than a second; a context.

    Args:
      title: what is done.
      quiet: shows nothing; so it is where Python was started without a standard error.
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self._title, self._step, self._shown = f"pallas_flash: {title}", "", ""
        self._next = math.inf if quiet or sys.stderr is None else time.monotonic() + SILENT_SECONDS
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()

    def wait(self, step: str | None = None) -> None:
        """Shows that time passes, once a second; `step`: what was done last, if that is new. To be called often."""
        self._step, now = step or self._step, time.monotonic()
        if now < self._next and (self._bar is None or self._step == self._shown):
            return
        self._next, self._shown = now + 1.0, self._step
        with contextlib.suppress(OSError, ValueError):  # the standard error is closed: no reason to stop
            if self._bar is None:
                self._bar = _bar(self._title)
            self._bar.set_postfix_str(self._step)


class _Bar(Protocol):
    """What of tqdm's bar is used."""

    def set_postfix_str(self, s: str) -> object: ...
    def close(self) -> object: ...


class _Line:
    """In the place of a bar: the title, written once."""

    def __init__(self, title: str) -> None:
        print(title, file=sys.stderr, flush=True)

    def set_postfix_str(self, s: str) -> None:
        """Shows nothing: lines would be many."""

    def close(self) -> None:
        """Leaves the line where it is."""


def _bar(title: str) -> _Bar:
    """tqdm's, which counts the seconds; or a line where there is no tqdm."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        return _Line(title)
    bar: _Bar = tqdm(desc=title, bar_format="{desc}: {elapsed} {postfix}", leave=False, file=sys.stderr)
    return bar
