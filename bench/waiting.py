"""Processes that import everything side by side, and then do what is timed one at a time, when they are told to.

No module of bench is imported here, so that such a process imports no JAX by this.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["Waiting", "wait_for_word"]

Record = dict[str, Any]
_READY = b"ready\n"


def wait_for_word() -> None:
    """In such a process: says that it is ready, and returns when it is told to go on."""
    print(_READY.decode(), end="", flush=True)
    sys.stdin.readline()


class Waiting:
    """A process that calls `wait_for_word()` once, and prints a JSON object at its end.

    Args:
      module: run with `python -m`, with these arguments and environment.
      seconds: after which it is ended.
    """

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str], seconds: float) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._timer = threading.Timer(seconds, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        self._is_ready = False

    def ready(self) -> bool:
        """Waits until it is; False: it ended before."""
        if not self._is_ready:
            line = self._stdout.readline()
            while line and line != _READY:  # what a library printed
                line = self._stdout.readline()
            self._is_ready = line == _READY
        return self._is_ready

    def go(self) -> Record:
        """Lets it go on to its end. What it printed; a reason, if it did not end well."""
        printed = b""
        if self.ready():
            with contextlib.suppress(BrokenPipeError):  # it ended meanwhile
                self._stdin.write(b"go\n")
            printed = self._stdout.read()
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read()[-300:].decode(errors="replace")
        self.end()
        try:
            found: Record = json.loads(printed.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            found = {}
        return found if found and code == 0 else {"reason": f"its process ended with exit code {code}: {said}"}

    def end(self) -> None:
        """Ends it, if it has not ended."""
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for file in (self._stdin, self._stdout, self._said):
            file.close()
