"""Several processes that measure on one device: they compile side by side, and have the device one at a time.

Compiling takes most of a run's time, the device little of it. The first process hands out the problems, a fresh one to
each process that is done, and is the only one that writes: the others send their records as soon as they are measured.
When one of them dies, its problem is named; its records until then are kept, and the others measure what is left.
"""

import contextlib
import fcntl
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from bench import run

__all__ = ["DeviceLock", "Setting", "Task", "measure", "share"]


class DeviceLock:
    """The device to oneself, in a `with`: among all processes of a user on this machine that hold this lock.

    It is a lock on a file, which the system gives back when its holder ends, in whatever way.
    """

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._path = path or pathlib.Path(tempfile.gettempdir()) / f"pallas-flash-bench-{os.getuid()}.lock"

    def __enter__(self) -> None:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # which gives the lock back


class Task(NamedTuple):
    """A problem of the catalogue, by name, and how to measure it."""

    problem: str
    directions: list[str]
    options: run.Options


class Setting(NamedTuple):
    """What the tasks of a run have in common: names of contestants, and fields of all records."""

    ours: list[str]
    peers: list[str]
    common: dict[str, Any]


def measure(pipe: Connection, setting: Setting) -> None:
    """Measures what comes through the pipe until None comes, and sends (kind, content) for each event.

    The kinds: "ready" for a task; "left out" (the arguments of `run.LeftOut`); "round"; "records"; "failed" (a reason).
    """
    import bench.plain
    import bench.torch_contestants  # noqa: F401  (both add themselves to the peers)
    from bench import contestants
    from pallas_flash.testing import problems
    ours = contestants.find(setting.ours, list(contestants.OURS))
    peers = contestants.find(setting.peers, contestants.PEERS)
    hooks = run.Hooks(lambda *reason: pipe.send(("left out", reason)), lambda: pipe.send(("round", None)), DeviceLock())
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        problem, directions, options = task
        try:
            for found in run.measure(problems.find(problem), ours, peers, directions, options, setting.common, hooks):
                pipe.send(("records", found))
        except Exception as error:  # the next problem may be without it
            pipe.send(("failed", f"{type(error).__name__}: {error}"[:300]))
        pipe.send(("ready", None))


class _Worker:
    """A process, the pipe to it, and the task that it has."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self.task: Task | None = None

    def message(self) -> tuple[str, Any]:
        """What it sent; "ended" after its end."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "ended", f"its process ended with exit code {self.process.exitcode}"

    def give(self, task: Task | None) -> None:
        """Sends the next task, or None: there is no more. Of one that has ended already, `message` will tell."""
        self.task = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)


def share(tasks: Sequence[Task], count: int, handle: Callable[[str, Any], Any], target: Callable[..., None],
          *args: Any) -> dict[str, str]:
    """Has `target(pipe, *args)` measure tasks in `count` processes.

    Args:
      handle: called here with what a process sends, (kind, content), besides "ready" and "failed".

    Returns:
      Problem -> reason, for each that is not measured to its end.
    """
    left, missing = list(tasks), {}
    started = [_Worker(target, args) for _ in range(min(count, len(tasks)))]
    workers: dict[Any, _Worker] = {worker.pipe: worker for worker in started}
    while workers:
        for pipe in wait(list(workers)):
            worker = workers[pipe]
            kind, content = worker.message()
            if kind in ("failed", "ended") and worker.task:
                missing[worker.task.problem] = content
            if kind == "ready":
                worker.give(left.pop(0) if left else None)
            elif kind == "ended":
                del workers[pipe]
            elif kind != "failed":
                handle(kind, content)
    return missing | {task.problem: "no process was left" for task in left}
