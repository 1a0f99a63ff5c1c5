"""Where the offline compilation finds its tools: an interpreter with jax[cuda13], and each ptxas to compile with."""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pallas_flash import diagnosis

__all__ = ["compilers", "cuda_root", "environment", "interpreter", "why_not"]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
VARIABLE = "PALLAS_FLASH_OFFLINE_PYTHON"
ASK = """
import importlib.util as u, json
plugin = u.find_spec("jax_plugins") and u.find_spec("jax_plugins.xla_cuda13")
print(json.dumps(dict(plugin=bool(plugin), nvidia=list(u.find_spec("nvidia").submodule_search_locations)
                      if u.find_spec("nvidia") else [])))
"""


@functools.cache
def _ask(python: str) -> dict:
    """What an interpreter has installed: whether the CUDA plugin of JAX, and where NVIDIA's wheels lie."""
    done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def interpreter() -> str | None:
    """The interpreter whose environment has JAX's CUDA plugin: the one that PALLAS_FLASH_OFFLINE_PYTHON names, else
    this one, else that of .venv-cuda; None if none has it."""
    if named := os.environ.get(VARIABLE):
        assert _ask(named)["plugin"], f"{VARIABLE} must name an interpreter with jax[cuda13], got {named}"
        return named
    made = ROOT / ".venv-cuda" / "bin" / "python"
    return next((python for python in (sys.executable, str(made)) if Path(python).exists() and _ask(python)["plugin"]),
                None)


def why_not() -> str | None:
    """Why nothing can be compiled here, and what to do; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "jax[cuda13] is for Linux on x86-64"
    if shutil.which("gcc") is None:
        return "needs gcc, which makes the stand-in for the driver"
    if interpreter() is None:
        return f"needs JAX's CUDA plugin: run `make offline`, or name an interpreter that has it in {VARIABLE}"
    if not compilers():
        return f"needs a ptxas: install nvidia-cuda-nvcc beside {interpreter()}"
    if cuda_root() is None and not compilers()["found"].with_name("nvdisasm").exists():
        return f"needs nvdisasm, which is not beside {compilers()['found']}: run `make offline`"
    return None


def cuda_root() -> Path | None:
    """Where the wheels of the interpreter bring ptxas and nvdisasm."""
    python = interpreter()
    roots = [Path(place, "cu13") for place in _ask(python)["nvidia"]] if python else []
    return next((root for root in roots if (root / "bin" / "ptxas").exists()), None)


@functools.cache
def compilers() -> dict[str, Path]:
    """Each ptxas to compile with: "pinned", the wheel's, which is what `pip install` gives; and "found", the first one
    outside the wheels that JAX would take, if its version is another."""
    root = cuda_root()
    pinned = root / "bin" / "ptxas" if root else None
    found = next((path for path in diagnosis.ptxas_places() if path.exists() and path != pinned), None)
    if pinned is None:
        return {"found": found} if found else {}
    if found is None or diagnosis.ptxas_version(found) == diagnosis.ptxas_version(pinned):
        return {"pinned": pinned}
    return {"pinned": pinned, "found": found}


def environment(work: Path, ptxas: Path) -> dict[str, str]:
    """The environment to compile in; builds the stand-in driver in `work`, where PTX and machine code are left.

    JAX takes the first ptxas on PATH, whatever its own wheels bring: a wrapper in front of all others calls the one
    wanted and leaves a mark, `ptxas-was-called`.
    """
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", work / "libcuda.so.1", HERE / "driver.c", "-ldl"], check=True)
    wrapper = work / "bin" / "ptxas"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\n: >"{work}/bin/ptxas-was-called"\nexec "{ptxas}" "$@"\n')
    wrapper.chmod(0o755)
    dumps = {f"MOSAIC_GPU_DUMP_{name}": "1" for name in ("PTX", "PTXAS", "SASS_CTRL")}
    paths = {"PATH": f"{work}/bin:{os.environ.get('PATH', '')}", "PYTHONPATH": str(ROOT),
             "LD_LIBRARY_PATH": f"{work}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    root = {"CUDA_ROOT": str(cuda_root() or ptxas.parent.parent)}  # where JAX takes nvdisasm from
    return {**os.environ, **dumps, **paths, **root, "PALLAS_FLASH_DUMPS": str(work), "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3"}
