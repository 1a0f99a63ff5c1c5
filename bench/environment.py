"""What a measurement ran on: commit, device, driver, and the versions of everything that compiles or computes."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

from pallas_flash import diagnosis

__all__ = ["busy", "describe", "version"]

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-runtime", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13",
            "torch", "numpy", "dew-flash-attn-cu13", "tokamax")
MOST_LOAD = 0.25
"""Of other processes, for each core."""


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _commit() -> tuple[str, bool | None]:
    """The commit of the code, and whether the code differs from it; None where that cannot be told.

    A machine that has the files but not their history is told both in the variable BENCH_COMMIT: the commit, and a "+"
    after it if the files differ. Without it the commit is "unknown" there.
    """
    if told := os.environ.get("BENCH_COMMIT"):
        return told.rstrip("+"), told.endswith("+")
    commit = _output("git", "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:  # no git, no repository, or one without commits, to which every file would look changed
        return "unknown", None
    return commit, bool(_output("git", "status", "--porcelain", "--", "pallas_flash", "torch_bridge", "bench/*.py"))


def _ptxas() -> tuple[str | None, str | None]:
    """The version and the path of the ptxas that compiles the kernels: the one that JAX calls."""
    path = next(iter(diagnosis.ptxas_places()), None)
    return (diagnosis.ptxas_version(path), str(path)) if path else (None, None)


def _cpu() -> str:
    text = _output("lscpu")
    name = re.search(r"Model name:\s*(.+)", text)
    return f"{name[1].strip() if name else platform.machine()}, {os.cpu_count()} cores"


def _load() -> float:
    """How many processes wanted a core in the last minute, over the number of cores: other work, and what compiles."""
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)


def busy() -> str | None:
    """Why times will be too long on this machine now, and what to do; None: it is quiet.

    With other work on 31 of 32 cores a call of 150 us took up to 780: between launches the GPU waits for the host.
    """
    load = _load()
    return None if load <= MOST_LOAD else (
        f"times will be too long: other processes keep {load:.0%} of the cores busy, and {MOST_LOAD:.0%} are "
        "the most. Wait for them, or end them")


def describe() -> dict[str, Any]:
    """The environment of this process, as every record carries it; "load" is that of its beginning."""
    import jax

    device, (commit, dirty) = jax.devices()[0], _commit()
    on_gpu = device.platform == "gpu"
    ptxas, ptxas_path = _ptxas() if on_gpu else (None, None)
    driver = _output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader").splitlines()
    return dict(
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), commit=commit, dirty=dirty,
        platform=device.platform, device=device.device_kind if on_gpu else _cpu(),
        driver=driver[0] if on_gpu and driver else None, load=_load(), ptxas=ptxas, ptxas_path=ptxas_path,
        python=platform.python_version(), versions={name: version(name) for name in PACKAGES if version(name)})
