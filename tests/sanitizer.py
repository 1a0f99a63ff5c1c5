"""compute-sanitizer over a program in a process of its own."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.hopper.offline.places import cuda_root

OPTIONS = {"memcheck": ("--report-api-errors", "no"), "initcheck": ("--report-api-errors", "no"),
           "racecheck": ("--racecheck-report", "all")}
SECONDS = 150
WATCH = f"import faulthandler; faulthandler.dump_traceback_later({SECONDS}, exit=True)\n"
"""Stands before a program, which then says where it is and ends if it takes that long. A test that waits for it longer
than its own limit says nothing of it.
"""
ENVIRONMENT = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
"""Each array is an allocation of its own, so that what lies past its end is not another one's."""


def command(tool: str, kernels: str | None = None) -> tuple[str, ...]:
    """What stands before the command of a program; skips the test where there is no compute-sanitizer.

    Args:
      kernels: how the names of those begin that are looked at; None: all.
    """
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}{cuda_root() or ''}/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH: pip install nvidia-cuda-sanitizer-api, or the CUDA toolkit")
    chosen = () if kernels is None else ("--kernel-regex", f"kns={kernels}")
    ports = "--max-connections", "256"  # ten of its own are too few for all tests that run at a time, and their ptxas
    return program, "--tool", tool, *ports, "--error-exitcode", "9", *chosen, *OPTIONS[tool]


def assert_nothing_found(tool: str, done: subprocess.CompletedProcess) -> None:
    text = done.stdout + done.stderr
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert done.returncode == 0 and summary in text, text[-4000:]


def check(tool: str, code: str, kernels: str) -> None:
    """Nothing is found in the kernels that a Python program launches."""
    here = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert_nothing_found(tool, subprocess.run([*command(tool, kernels), sys.executable, "-c", WATCH + code],
                                              env=os.environ | here, capture_output=True, text=True))
