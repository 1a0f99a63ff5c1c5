"""The child process that makes a plan, seen from its parent: started, followed, and ended with it."""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch_bridge.direct.problem import Request
from torch_bridge.direct.progress import Progress

__all__ = ["NoLaunchesError", "NoPlanError", "make"]

COMMAND: tuple[str, ...] = (sys.executable, str(Path(__file__).with_name("child.py")))
"""What makes a plan: its arguments are a device's index and a path, its input is a request."""
MAX_SECONDS = 600.0
MAX_FAILURES = 3
"""Children that fail in a row without saying why: after so many, no more is started."""
_TAIL = 4000  # characters of what a failed child wrote to its standard error


class NoPlanError(RuntimeError):
    """There is no plan for a request, and can be none: why, and what to do."""


class NoLaunchesError(NoPlanError):
    """What is run for a problem on a GPU is no list of launches; so it will be whenever it is asked."""


_children: set[tuple[int, "subprocess.Popen[str]"]] = set()  # each with the process that started it
_failed: list[str] = []
"""What was said of those that failed since the last that did not."""


@atexit.register
def _end_children() -> None:
    """Ends what threads that are left behind at exit still wait for."""
    for parent, child in list(_children):
        if parent == os.getpid():
            child.kill()


def make(request: Request, index: int, path: Path, progress: Progress) -> None:
    """Has a child process write a plan.

    Args:
      request: what the plan is for.
      index: of a device of that kind, as the driver counts.
      path: where the plan goes.
      progress: shown meanwhile.

    Raises:
      NoPlanError: the child says why there can be none, or it fails; NoLaunchesError is one.
      OSError: no process can be started.
    """
    failed = list(_failed)  # another thread may clear it
    if len(failed) >= MAX_FAILURES:
        raise NoPlanError(f"{len(failed)} processes in a row that should compile have failed, and no more are "
                          f"started. {failed[-1]}")
    try:
        last = _run(request, index, path, progress)
    except NoPlanError as error:
        _failed.append(str(error))
        raise
    _failed.clear()
    if "reason" in last:
        raise (NoLaunchesError if "problem" in last else NoPlanError)(last["reason"])


def _run(request: Request, index: int, path: Path, progress: Progress) -> dict[str, str]:
    """The last that the child says; raises NoPlanError if it fails without a reason."""
    # JAX compiles in it, and needs no client of the GPU. Its other settings have no part in the key of a plan.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["JAX_PLATFORMS"] = "cpu"
    with (tempfile.TemporaryFile("w+", errors="replace") as errors,
          subprocess.Popen([*COMMAND, str(index), str(path)], env=environment, text=True, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=errors, process_group=0) as child):  # Ctrl-C is ours alone
        assert child.stdin is not None
        _children.add(mark := (os.getpid(), child))
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(f"{request.text}\n")
                child.stdin.close()
            last = _followed(child, progress)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            _children.discard(mark)
        errors.seek(0)
        said = errors.read()[-_TAIL:]
    if "reason" not in last and ("done" not in last or code):
        raise NoPlanError(f"the process that compiles the {request.pass_name} of {request.problem} ended with code "
                          f"{code} after {last or 'nothing'}; it wrote:\n{said}")
    return last


def _followed(child: "subprocess.Popen[str]", progress: Progress) -> dict[str, str]:
    """The last of the lines of JSON that a child writes, shown as progress until it ends. That need not close the pipe:
    a process that another thread forks while the child is started has it open, too.

    Raises:
      NoPlanError: it takes longer than MAX_SECONDS.
    """
    last: dict[str, str] = {}
    end, rest = time.monotonic() + MAX_SECONDS, b""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            has_ended = child.poll() is not None  # asked before what it wrote is looked for
            if time.monotonic() > end:
                raise NoPlanError(f"compiling took more than {MAX_SECONDS:g} s, after {last or 'nothing'}")
            if not selector.select(timeout=0.2):
                if has_ended:
                    return last
                progress.wait()
                continue
            read = os.read(child.stdout.fileno(), 1 << 16)
            if not read:
                return last
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                with contextlib.suppress(ValueError):  # what a library prints is none of ours
                    found = json.loads(line)
                    last = found if isinstance(found, dict) else last
                progress.wait(last.get("step"))
