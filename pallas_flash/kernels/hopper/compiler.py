"""Whether this JAX's compiler moves registers between warpgroups (setmaxnreg), which the Hopper kernels live by.

JAX 0.12.0.1 compiles Mosaic GPU kernels to relocatable code, and ptxas then ignores setmaxnreg (C7504): a forward of
168 registers spills 428 bytes, 97 accesses a step, and serialises its products. Later releases may do better. So from
0.12 on a process asks once, before the first of these kernels is compiled, by compiling a small one (compiler_probe.py)
in a process of its own.
"""

import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

__all__ = ["why_not"]

ASKED_FROM = (0, 12)
"""The releases before are known to move registers."""
COMMAND: tuple[str, ...] = (sys.executable, "-m", "pallas_flash.kernels.hopper.compiler_probe")
"""What compiles the small kernel, into the folder that MOSAIC_GPU_DUMP_TO names; it prints an object as JSON."""
SECONDS = 120


def why_not() -> str | None:
    """Why the compiler of this process is of no use to the Hopper kernels; None if it is, or if no GPU is here: the
    machine that has one compiles, by its own JAX.
    """
    if jax.__version_info__[:2] < ASKED_FROM or not _has_driver():
        return None
    return _answer()


@functools.cache
def _has_driver() -> bool:
    """Whether there may be a GPU: only with NVIDIA's driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def _answer() -> str | None:
    """What the compiler says; where it says nothing, that is a reason, too: nobody knows what would run."""
    try:
        said = _ask()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"needs a compiler that moves registers between warpgroups, and could not ask that of {_jax()}: {error}"
    if not said.get("has_gpu") or said.get("moves_registers"):
        return None
    return (f"needs a compiler that moves registers between warpgroups, that of {_jax()} does not "
            f"({said.get('report', 'it says nothing')}; install jax<0.12)")


def _jax() -> str:
    return f"jax {jax.__version__}"


def _ask() -> dict[str, object]:
    """What the child says; raises OSError, ValueError or SubprocessError if it says nothing."""
    root = importlib.util.find_spec("pallas_flash")
    assert root is not None and root.origin is not None
    paths = [str(Path(root.origin).parents[1]), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(prefix="pallas_flash_") as folder:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1",
                                    "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        done = subprocess.run(COMMAND, env=environment, text=True, capture_output=True, timeout=SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ValueError(f"the process that compiles ended with code {done.returncode}, it wrote: "
                         f"{done.stderr[-500:].strip() or 'nothing'}")
    found: dict[str, object] = json.loads(lines[-1])
    return found
