"""Plans on disk and in memory: found by their key, and made by a child process where there is none.

Processes that need the same plan at the same time wait for the one that makes it. A plan appears whole (it is renamed
into its place), and one that is damaged is made again.
"""

import contextlib
import fcntl
import json
import os
import selectors
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torch_bridge.direct import plan
from torch_bridge.direct.plan import Kernel, Program
from torch_bridge.direct.problem import Request
from torch_bridge.direct.progress import Progress

__all__ = ["VARIABLE", "NoPlanError", "directory", "find", "path_of"]

VARIABLE = "PALLAS_FLASH_PLANS"
COMMAND: tuple[str, ...] = (sys.executable, str(Path(__file__).with_name("child.py")))
"""What makes a plan: its arguments are a device's index and a path, its input is a request."""
MAX_SECONDS = 600.0
_TAIL = 4000  # characters of what a failed child wrote to its standard error


class NoPlanError(RuntimeError):
    """There is no plan for a request, and can be none: why, and what to do."""


def directory() -> Path:
    """Where plans are kept: PALLAS_FLASH_PLANS, else pallas_flash/plans in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
      NoPlanError: the user has no home directory, and neither variable is set.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "pallas_flash" / "plans"
    except RuntimeError as error:
        raise NoPlanError(f"plans must be kept in a directory, and this user has no home directory, got {error} Name a "
                          f"directory in {VARIABLE}.") from error


def path_of(request: Request) -> Path:
    """Where the plan of a request is kept."""
    return directory() / f"{request.key}.plan"


def find(request: Request, index: int, *, quiet: bool = False) -> Program[Kernel]:
    """The plan of a request, from its file; where there is none, it is made, which takes seconds.

    Args:
      request: what the plan is for.
      index: of a device of that kind, as the driver counts.
      quiet: shows no progress.

    Raises:
      NoPlanError: it cannot be made, or everyone may write to the directory.
      OSError: the directory cannot be written.
    """
    path = path_of(request)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_trusted(path.parent)
    found = _read(path, request)
    if found is not None:
        return found
    with _locked(path.with_suffix(".lock")):
        found = _read(path, request)  # another process may have made it
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as new:
            made = Path(new, "plan")
            _make(request, index, made, quiet)
            made.chmod(made.stat().st_mode & 0o755)  # whatever the process's umask: nobody else writes to it
            os.replace(made, path)
    found = _read(path, request)
    if found is None:
        raise NoPlanError(f"{path} cannot be read although it was just written. Name another directory in {VARIABLE}.")
    return found


def _require_trusted(folder: Path) -> None:
    """Raises NoPlanError where everyone may write: plans run on the GPU, and their checksums are no signatures."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH:
        raise NoPlanError(f"a directory of plans must not be writable by everyone, because they are machine code, got "
                          f"{folder}, {stat.filemode(mode)}. Run chmod o-w on it, or name another in {VARIABLE}.")


def _read(path: Path, request: Request) -> Program[Kernel] | None:
    """The plan in a file; None if there is none, or if what is there cannot be trusted."""
    try:
        return plan.read(path.read_bytes(), request.text)
    except (FileNotFoundError, plan.UnreadablePlanError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes, and among threads; its file is there as long as it is held or waited for."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_in_place(file, path):
                continue  # who held it before has removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too
            return
        finally:
            os.close(file)


def _is_in_place(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _make(request: Request, index: int, path: Path, quiet: bool) -> None:
    """Has a child process write the plan to `path`.

    Raises:
      NoPlanError: it says why there can be none, or it fails.
    """
    # JAX compiles in it, and needs no client of the GPU. Its other settings have no part in the key of a plan.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["JAX_PLATFORMS"] = "cpu"
    with (tempfile.TemporaryFile("w+", errors="replace") as errors,
          subprocess.Popen([*COMMAND, str(index), str(path)], env=environment, text=True, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=errors) as child):
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request.text)
                child.stdin.close()
            title = f"compiling the {request.pass_name} (kept in {path.parents[1]})"
            last = _followed(child.stdout, Progress(title, quiet))
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        errors.seek(0)
        said = errors.read()[-_TAIL:]
    if "reason" in last:
        raise NoPlanError(last["reason"])
    if "done" not in last or code:
        raise NoPlanError(f"the process that compiles the {request.pass_name} of {request.problem} ended with code "
                          f"{code} after {last or 'nothing'}; it wrote:\n{said}")


def _followed(lines: IO[str], progress: Progress) -> dict[str, str]:
    """The last of the lines of JSON that a child writes, shown as progress until it ends.

    Raises:
      NoPlanError: it takes longer than MAX_SECONDS.
    """
    last: dict[str, str] = {}
    end, rest = time.monotonic() + MAX_SECONDS, b""
    with progress, selectors.DefaultSelector() as selector:
        selector.register(lines, selectors.EVENT_READ)
        while True:
            if time.monotonic() > end:
                raise NoPlanError(f"compiling took more than {MAX_SECONDS:g} s, after {last or 'nothing'}")
            if not selector.select(timeout=0.2):
                progress.wait()
                continue
            read = os.read(lines.fileno(), 1 << 16)
            if not read:
                return last
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                with contextlib.suppress(ValueError):  # what a library prints is none of ours
                    found = json.loads(line)
                    last = found if isinstance(found, dict) else last
                progress.wait(last.get("step"))
