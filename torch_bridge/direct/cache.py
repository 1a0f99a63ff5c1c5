"""Plans on disk and in memory: found by their key, and made by a child process where there is none.

Processes that need the same plan at the same time wait for the one that makes it. A plan appears whole (it is renamed
into its place), and one that is damaged is made again.
"""

import concurrent.futures
import contextlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch_bridge.direct import parent, plan
from torch_bridge.direct.parent import NoLaunchesError, NoPlanError
from torch_bridge.direct.plan import Kernel, Program
from torch_bridge.direct.problem import Request
from torch_bridge.direct.progress import Progress

__all__ = ["VARIABLE", "Pending", "directory", "find", "is_kept", "path_of", "why_not"]

VARIABLE = "PALLAS_FLASH_PLANS"
_SECONDS = 0.1  # between two looks at what is waited for
_turn = threading.Lock()  # of what is pending


def directory() -> Path:
    """Where plans are kept: PALLAS_FLASH_PLANS, else pallas_flash/plans in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
      NoPlanError: the user has no home directory, and neither variable names one without "~".
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named := os.environ.get(VARIABLE):
            return Path(named).expanduser()
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "pallas_flash" / "plans"
    except RuntimeError as error:
        raise NoPlanError(f"plans must be kept in a directory, and this user has no home directory, got {error} Name a "
                          f"directory in {VARIABLE}.") from error


def why_not() -> str | None:
    """Why no plan is read from that directory; None if some may be."""
    try:
        folder = directory()
        if folder.exists():
            _require_trusted(folder)
    except (NoPlanError, OSError) as error:
        return str(error)
    return None


def path_of(request: Request) -> Path:
    """Where the plan of a request is kept."""
    return directory() / f"{request.key}.plan"


def is_kept(request: Request) -> bool:
    """Whether there is a file for the plan of a request; not whether it can be read."""
    try:
        return path_of(request).exists()
    except OSError:  # of a directory that may not be searched; `find` says more
        return False


def find(request: Request, index: int, *, quiet: bool = False) -> Program[Kernel]:
    """The plan of a request, from its file; where there is none, it is made, which takes seconds.

    Args:
      request: what the plan is for.
      index: of a device of that kind, as the driver counts.
      quiet: shows no progress.

    Raises:
      NoPlanError: it cannot be made or kept, or everyone may write to the directory.
    """
    path = path_of(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_trusted(path.parent)
        found = _read(path, request)
        if found is None:
            with Progress(f"compiling the {request.pass_name} (kept in {path.parent})", quiet) as progress:
                found = _made(request, index, path, progress)
    except OSError as error:
        raise NoPlanError(f"plans must be kept in a directory that can be read and written, got {error}. Name one in "
                          f"{VARIABLE}.") from error
    return found


def _made(request: Request, index: int, path: Path, progress: Progress) -> Program[Kernel]:
    """The plan, which this process or another makes now."""
    with _locked(path.with_suffix(".lock"), progress):
        found = _read(path, request)  # another process may have made it
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as new:
            made = Path(new, "plan")
            try:
                parent.make(request, index, made, progress)
            except NoLaunchesError as error:
                made.write_text(str(error))
                os.replace(made, _refusal(path))
                raise
            made.chmod(made.stat().st_mode & 0o755)  # whatever the process's umask: nobody else writes to it
            os.replace(made, path)
    found = _read(path, request)
    if found is None:
        raise NoPlanError(f"{path} cannot be read although it was just written. Name another directory in {VARIABLE}.")
    return found


class Pending:
    """A plan that is found, or made, while the caller does something else.

    It has a thread of its own, which does not keep the process alive. One is made at a time: calls of many shapes whose
    backwards may never come would start as many processes. Whoever needs one whose turn has not come makes it.

    Raises:
      RuntimeError: no thread can start, at exit or at a limit.
    """

    def __init__(self, request: Request, index: int) -> None:
        self._request, self._index = request, index
        self._found = concurrent.futures.Future[Program[Kernel]]()
        threading.Thread(target=self._find, name=f"pallas_flash: {request.pass_name}", daemon=True).start()

    def _find(self) -> None:
        with _turn:
            if not self._found.set_running_or_notify_cancel():
                return
            try:
                self._found.set_result(find(self._request, self._index, quiet=True))
            except BaseException as error:  # whatever it is, it is raised where the plan is needed
                self._found.set_exception(error)

    def result(self) -> Program[Kernel]:
        """The plan, for which it waits; raises as `find` does."""
        if self._found.cancel():
            return find(self._request, self._index)
        with Progress(f"compiling the {self._request.pass_name} (kept in {directory()})") as progress:
            while not concurrent.futures.wait([self._found], timeout=_SECONDS).done:
                progress.wait()
        return self._found.result()


def _require_trusted(folder: Path) -> None:
    """Raises NoPlanError where everyone may write: plans run on the GPU, and their checksums are no signatures."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH:
        raise NoPlanError(f"a directory of plans must not be writable by everyone, because they are machine code, got "
                          f"{folder}, {stat.filemode(mode)}. Run chmod o-w on it, or name another in {VARIABLE}.")


def _refusal(path: Path) -> Path:
    """Where it is kept why there is no plan at `path`: then no process is started to ask again."""
    return path.with_suffix(".none")


def _read(path: Path, request: Request) -> Program[Kernel] | None:
    """The plan in a file; None if there is none, or if what is there cannot be trusted.

    Raises:
      NoLaunchesError: it was asked for before, and there can be none.
    """
    try:
        return plan.read(path.read_bytes(), request.text)
    except plan.UnreadablePlanError:
        return None
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            raise NoLaunchesError(_refusal(path).read_text(errors="replace")) from None
        return None


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds a lock among processes, and among threads; its file is there as long as it is held or waited for."""
    import fcntl  # which other systems than Linux may lack

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.wait("by another process")
                time.sleep(_SECONDS)
                continue
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
