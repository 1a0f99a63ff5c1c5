"""Lowers problems and compiles their kernels in processes that wait for the next problem, so that a session starts JAX
and its plugin once; each problem is lowered once for all compilers."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hopper.offline import places

__all__ = ["Tools", "answer"]

MOST = 4
"""Processes of a session at a time, of 200 MB each: what lowers, each compiler, and one more."""


def answer(function: Callable[[str], Any]) -> None:
    """Answers each line of this process' input with what the function makes of it, as JSON on a line.

    What else is written to stdout goes to stderr.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(function(line.strip())), file=answers, flush=True)


class Process:
    """A process that answers each line of its input with a line of JSON, until its input ends."""

    def __init__(self, program: str, environment: dict[str, str], folder: Path):
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen([places.interpreter(), "-m", program], cwd=places.ROOT, env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def ask(self, question: str) -> Any:
        """The answer; raises with what the process wrote to stderr where it ended instead."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            if answer := self._process.stdout.readline():
                return json.loads(answer)
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"the process asked for {question} ended: {self._errors.read()[-4000:]}")

    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Waits until it has ended."""
        with contextlib.suppress(BrokenPipeError):  # what it has not read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class Tools:
    """The processes of a test session, in a folder of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._processes: dict[tuple[str, str, str], Process] = {}
        self.lowered = functools.cache(self._lowered)  # names of files

    def compiled(self, program: str, name: str, compiler: str, capability: str = "9.0") -> list[dict[str, Any]]:
        """The report on each kernel of a problem (see `machine_code`), compiled with that ptxas and no other.

        Arguments:
          program: what lowers it, such as "tests.hopper.offline.compile_kernels".
          name: the problem's, as `program` takes it.
          compiler: a key of `places.compilers`.
          capability: the GPU's.
        """
        process, work = self._process("tests.hopper.offline.machine_code", compiler, capability)
        reports = [dict(problem=name) | process.ask(str(module)) for module in self.lowered(program, name, capability)]
        assert (work / "bin" / "ptxas-was-called").exists(), f"another ptxas than {compiler} was called"
        return reports

    def _lowered(self, program: str, name: str, capability: str) -> list[Path]:
        """A file for each module, the same for equal ones."""
        process, _ = self._process(program, next(iter(places.compilers())), capability)
        return [Path(path) for path in process.ask(name)]

    def _process(self, program: str, compiler: str, capability: str) -> tuple[Process, Path]:
        """The process of a program, started where there is none or it has ended, and its folder."""
        key = program, compiler, capability
        work = self._folder / "-".join(key)
        process = self._processes.pop(key, None)
        if process is not None and process.ended():
            process.close()
            process = None
        if process is None:
            while len(self._processes) >= MOST:
                self._processes.pop(next(iter(self._processes))).close()
            work.mkdir(exist_ok=True)
            environment = places.environment(work, places.compilers()[compiler])
            environment["STAND_IN_CAPABILITY"] = capability.replace(".", "")
            process = Process(program, environment, work)
        self._processes[key] = process  # the last used is the last
        return self._processes[key], work

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes.values():
            process.close()
